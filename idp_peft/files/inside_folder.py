"""File names and links that come out of files: they must stay inside the folder that they were found in."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def plain_name(value, what: str) -> str:
    """A file name that was read from a file, checked: a plain name without a folder.

    Args:
        value: what stands there.
        what (`str`): what the error calls it.

    Raises:
        `ValueError`: for anything that is not the name of a file in one's own folder.
    """
    is_plain = isinstance(value, str) and value not in ("", ".", "..") and not set(value) & set("/\\:\0")
    if not is_plain:
        raise ValueError(f"{what} must be a plain file name in its own folder, got {value!r}")
    return value


def inside(folder: str | Path, file: str | Path) -> Path:
    """A file of a folder, checked: links must not lead out of it.

    The Hub's cache is made of links: there, the folder is the whole cache of that repository.

    Args:
        folder (`str` or `Path`): the folder.
        file (`str` or `Path`): a name in it, or a path.

    Raises:
        `ValueError`: where the file is outside, naming where it leads.
    """
    path = Path(folder, file)
    root, target = Path(folder).resolve(), path.resolve()
    if root.parent.name == "snapshots":
        root = root.parent.parent
    if not target.is_relative_to(root):
        raise ValueError(
            f"{path} is a link that leads out of its folder, to {target}: put the file itself there, where it belongs to the "
            "model"
        )
    return path


def files_inside(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """The files of a folder that fit one of the patterns, sorted, each once.

    Raises:
        `ValueError`: for a link that leads out of the folder.
    """
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return [inside(folder, path.name) for path in sorted(found)]
