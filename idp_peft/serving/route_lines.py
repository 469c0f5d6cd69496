"""`idp-peft route`: JSON lines of texts in, the same lines with their prompts out."""

from __future__ import annotations

import contextlib
import itertools
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TextIO

from idp_peft.serving.router import Router

_LINES = 256  # read at once, so that a stream of any length is answered as it comes


def route_lines(router: Router, source: str, target: str, text_column: str = "text", batch_size: int = 8) -> int:
    """Add `prompt_id`, `prompt_name` (where prompts have names) and `scores` to each line.

    Args:
        router (`Router`): who chooses.
        source (`str`): a file of JSON objects, one a line, or of JSON texts; `"-"` for standard input.
        target (`str`): a file, or `"-"` for standard output.
        text_column (`str`, defaults to `"text"`): where the text is in an object.
        batch_size (`int`, defaults to `8`): texts at once.

    Returns:
        `int`: how many lines there were.

    Raises:
        `ValueError`: naming the line that is no JSON, or has no text.
    """
    count = 0
    with _opened(source, "r") as lines, _opened(target, "w") as out:
        rows = _rows(lines, text_column)
        while some := list(itertools.islice(rows, _LINES)):
            selection = router.route([row[text_column] for row in some], batch_size)
            for index, row in enumerate(some):
                row["prompt_id"] = int(selection.prompt_ids[index])
                if selection.names is not None:
                    row["prompt_name"] = selection.names[index]
                row["scores"] = None if selection.scores is None else selection.scores[index].tolist()
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
            out.flush()
            count += len(some)
    return count


def _rows(lines: Iterable[str], column: str) -> Iterator[dict]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} is not JSON: {error}") from error
        row = {column: row} if isinstance(row, str) else row
        if not isinstance(row, dict) or not isinstance(row.get(column), str) or not row[column]:
            raise ValueError(f"line {number} must be a text, or an object with a text that is not empty as {column!r}")
        yield row


def _opened(name: str, mode: str) -> contextlib.AbstractContextManager[TextIO]:
    if name == "-":
        return contextlib.nullcontext(sys.stdin if mode == "r" else sys.stdout)
    return Path(name).expanduser().open(mode, encoding="utf-8")
