"""One measurement, one JSON file: written whole or not at all, and never made twice."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from idp_peft.files.whole_file import write_whole

FORMAT = 1


def cell(path: Path, settings: dict, measure: Callable[[], dict]) -> dict:
    """The content of a cell, from its file or by measuring it now.

    Args:
        path (`Path`): where the cell is kept.
        settings (`dict`): what decides the result.
        measure (`Callable`): makes the rest of the content; not called where the file is there.

    Raises:
        `ValueError`: where the file holds a result of other settings.
    """
    if path.exists():
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["settings"] != settings:
            raise ValueError(
                f"{path} holds a result of other settings, {content['settings']} and not {settings}: remove it, or give "
                "another --results"
            )
        return content
    wall, processor = time.perf_counter(), time.process_time()
    content = {"format": FORMAT, "settings": settings, **measure()}
    # On a machine that is shared, the time on the processor is the one that means something.
    content["seconds"] = round(time.perf_counter() - wall, 1)
    content["processor_seconds"] = round(time.process_time() - processor, 1)
    write(path, content)
    return content


def write(path: Path, content: dict) -> None:
    """JSON, one line per key of the top level and per person, moved into place when it is whole."""
    parts = [f"{json.dumps(key)}: {_block(value)}" for key, value in content.items()]
    write_whole(path, "{\n" + ",\n".join(parts) + "\n}\n")


def _block(value) -> str:
    if not (isinstance(value, dict) and value and all(isinstance(inner, dict) for inner in value.values())):
        return json.dumps(value)
    rows = [f" {json.dumps(key)}: {json.dumps(inner, separators=(',', ':'))}" for key, inner in value.items()]
    return "{\n" + ",\n".join(rows) + "\n}"
