"""Checkpoints that are whole: a marker, written last, holds the size and digest of every file.

A run that is killed, or whose disk is full, may leave a checkpoint cut anywhere. `Trainer` would read what is left of it,
without its optimiser's state for instance, and end with another adapter.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from pathlib import Path

from transformers import TrainerCallback

from idp_peft.files.whole_file import write_whole

logger = logging.getLogger(__name__)

MARKER = "whole.json"
# Without these, training goes on, but not to the same adapter.
_NEEDED = ("trainer_state.json", "optimizer.pt", "scheduler.pt")


def digests(folder: Path, pattern: str = "**/*") -> dict[str, list]:
    """Size in bytes and SHA-256 of the files of a folder, by their path in it."""
    files = sorted(path for path in folder.glob(pattern) if path.is_file() and path.name != MARKER)
    return {path.relative_to(folder).as_posix(): [path.stat().st_size, _digest(path)] for path in files}


def are_there(folder: Path, expected) -> bool:
    """Whether a folder holds the files of [`digests`], unchanged. Anything that is no such record is not there."""
    if not isinstance(expected, dict) or not expected:
        return False
    for name, facts in expected.items():
        path = folder / name
        if not path.is_file() or [path.stat().st_size, _digest(path)] != facts:
            return False
    return True


def last_whole_checkpoint(run: Path) -> Path | None:
    """The newest whole checkpoint of a run's folder. Newer ones that are cut are removed, with a remark."""
    found = [path for path in run.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    for folder in sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), reverse=True):
        if is_whole(folder):
            return folder
        logger.warning("%s is cut (the run was killed, or its disk was full): it is removed", folder)
        shutil.rmtree(folder)
    return None


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint has its marker and every file that it names, with the size and digest that it says; and where
    `Trainer` is to return to the best one, whether that one is whole too."""
    try:
        files = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        if not (isinstance(files, dict) and set(_NEEDED) <= set(files) and are_there(folder, files)):
            return False
        best = json.loads((folder / _NEEDED[0]).read_text(encoding="utf-8")).get("best_model_checkpoint")
    except (OSError, ValueError):
        return False
    return best is None or Path(best).name == folder.name or is_whole(folder.parent / Path(best).name)


class MarkWhole(TrainerCallback):
    """Writes the marker of each checkpoint when `Trainer` has written all of its files."""

    def on_save(self, args, state, control, **kwargs):
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if state.is_world_process_zero and folder.is_dir():
            write_whole(folder / MARKER, json.dumps(digests(folder), indent=1) + "\n")


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            found.update(block)
    return found.hexdigest()
