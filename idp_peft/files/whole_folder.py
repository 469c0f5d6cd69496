"""An output folder that appears atomically, when it is complete."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from idp_peft.files.folder_lock import hold, is_free


@contextlib.contextmanager
def whole_folder(target: str | Path) -> Iterator[Path]:
    """Yields a folder beside `target` to write into; it becomes `target` at the end, and vanishes on any error. What a
    process that was killed left of one is removed.

    Raises:
        `ValueError`: where `target` is a file, or a folder that is not empty.
    """
    target = Path(target).expanduser().absolute()
    check_free(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary, handle = _new_folder(target)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)  # mkdtemp's are private
        check_free(target)
        if target.is_dir():
            target.rmdir()
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(handle)


def _new_folder(target: Path) -> tuple[Path, int]:
    """A new folder beside `target`, and the handle that locks it. Folders that killed processes left are removed."""
    parent = hold(target.parent)  # so that nobody sweeps a folder before its maker holds it
    try:
        if parent is not None:
            for left_over in target.parent.glob(f".{glob.escape(target.name)}-????????"):
                if left_over.is_dir() and not left_over.is_symlink() and is_free(left_over):
                    shutil.rmtree(left_over, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        return temporary, hold(temporary)
    finally:
        if parent is not None:
            os.close(parent)


def check_free(target: Path) -> None:
    """Refuse an output folder that would be mixed with something else."""
    if target.is_dir() and any(target.iterdir()):
        raise ValueError(f"`output_dir` must be new or empty, got {target}, which has files in it")
    if target.exists() and not target.is_dir():
        raise ValueError(f"`output_dir` must be a folder, got the file {target}")
