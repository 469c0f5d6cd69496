"""One process at a time in a folder: a lock that the kernel releases when its process ends."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Hold a folder, which is made if it is not there (and removed again where it stays empty).

    Raises:
        `ValueError`: where another process holds it.
    """
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    handle = hold(folder)
    if handle is None:
        raise ValueError(f"another process is working in {folder}: wait for it, or choose another folder")
    try:
        yield
    finally:
        if is_new:
            with contextlib.suppress(OSError):  # it holds something now
                folder.rmdir()
        os.close(handle)


def hold(folder: Path) -> int | None:
    """A handle that holds a folder until it is closed; `None` where another one does."""
    if fcntl is None:
        return os.open(os.devnull, os.O_RDONLY)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def is_free(folder: Path) -> bool:
    """Whether no process holds a folder. `False` where that cannot be found out."""
    handle = None if fcntl is None else hold(folder)
    if handle is not None:
        os.close(handle)
    return handle is not None
