"""Cells: measurements that are never made twice. One JSON-lines file per contender, and one `run.json` with what cells share.

A cell is a JSON object with a name. Its environment, settings and training record are large and the same in many cells, so
each stands once in `run.json`, under its digest.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from idp_peft.files.whole_file import write_whole

SHARED = ("environment", "evaluation", "made", "method_settings", "training", "training_environment")


class Cells:
    """The cells of one contender.

    Args:
        results (`Path`): the run's folder, with `run.json`.
        contender (`str` or `Path`): where in it the file is, without its ending: `"gptq-3bit/idp.lm.seed0"`.
    """

    def __init__(self, results: Path, contender: str | Path) -> None:
        self.run = Path(results) / "run.json"
        path = Path(results) / contender
        self.path = path.with_name(f"{path.name}.jsonl")

    def read(self) -> dict[str, dict]:
        """Every cell by its name, in the order of measurement. A last line that a killed process left half is no cell."""
        if not self.path.is_file():
            return {}
        shared = json.loads(self.run.read_text(encoding="utf-8"))["shared"] if self.run.is_file() else {}
        found = {}
        for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                cell = json.loads(line)
                name = cell.pop("name")
                found[name] = {key: shared[v["shared"]] if _is_reference(v) else v for key, v in cell.items()}
        return found

    def add(self, name: str, content: dict) -> None:
        """Append a cell. Several processes may add to the same run.

        Raises:
            `ValueError`: where there is a cell of this name.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(self.run.with_name(".run.lock")):
            if name in self.read():
                raise ValueError(f"{self.path} has a cell {name!r} already")
            line = {"name": name, **content}
            values = {_digest(line[key]): line[key] for key in SHARED if isinstance(line.get(key), dict)}
            self._share(values)
            line |= {key: {"shared": _digest(line[key])} for key in SHARED if isinstance(line.get(key), dict)}
            with self.path.open("ab+") as file:
                file.seek(0)
                whole = file.read().rpartition(b"\n")  # behind the last line end: what a killed process left
                file.truncate(len(whole[0] + whole[1]))
                file.write((json.dumps(line, separators=(",", ":")) + "\n").encode())
                file.flush()
                os.fsync(file.fileno())

    def _share(self, values: dict[str, dict]) -> None:
        record = json.loads(self.run.read_text(encoding="utf-8")) if self.run.is_file() else {"format": 2, "shared": {}}
        if not values.keys() <= record["shared"].keys():
            record["shared"] |= values
            lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in record["shared"].items())
            write_whole(self.run, f'{{"format": 2, "shared": {{\n{lines}\n}}}}\n')


def all_cells(results: Path, pattern: str = "**/*.jsonl") -> Iterator[tuple[Path, str, dict]]:
    """`(contender, name, cell)` of every cell below a run's folder, contenders in the order of their names."""
    for path in sorted(Path(results).glob(pattern)):
        contender = path.relative_to(results).with_suffix("")
        for name, cell in Cells(results, contender).read().items():
            yield contender, name, cell


def _is_reference(value) -> bool:
    return isinstance(value, dict) and list(value) == ["shared"]


def _digest(value: dict) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Waits until no other process writes."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
