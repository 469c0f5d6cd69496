"""Result files: one JSON per evaluated model, as `evaluate` writes it, read and checked."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from idp_peft.report.fields import Fields

logger = logging.getLogger(__name__)

FORMAT = 1
ROLES = ("dense", "compressed", "recovered")
METHODS = ("idp", "prompt_tuning", "prefix_tuning", "lora")


@dataclass(frozen=True)
class Measurement:
    """One model on one text or one task, item by item.

    Args:
        facts (`dict`): how it was measured: `window` and `stride` of a text, `metric` and `chance` of a task, ...
        ids (`list[str]`): the items' names, unique.
        values (`np.ndarray`): float64 `[items]`, nats of a document or score of a question.
        weights (`np.ndarray`): float64 `[items]`, tokens of a document; 1 for a question.
        prompts (`np.ndarray`): int64 `[items]`, the chosen prompt, -1 for none.
        by_prompt (`list[np.ndarray | None]`): for each item, float64 `[num_prompts]`: its value under each prompt.
    """

    facts: dict
    ids: list[str]
    values: np.ndarray
    weights: np.ndarray
    prompts: np.ndarray
    by_prompt: list[np.ndarray | None]


@dataclass(frozen=True)
class Result:
    """A result file. `texts` and `tasks` map names to `Measurement`; the other fields are those of the file."""

    path: Path
    label: str
    role: str
    model: str
    adapter: str | None
    method: str | None
    extra_parameters: int
    num_prompts: int | None
    settings: dict
    environment: dict
    texts: dict[str, Measurement]
    tasks: dict[str, Measurement]
    training: dict


def read_results(sources: list[str | Path]) -> list[Result]:
    """Read result files: the dense one first, then the compressed one, then the recovered ones in the order given.

    Args:
        sources (`list[str | Path]`): files, or folders, which stand for the result files among their `*.json`.

    Raises:
        `FileNotFoundError`: for a path that does not exist, or a folder without result files.
        `ValueError`: for a file that breaks the format, two files with one label, two dense or compressed ones, or none
            that is compressed: every difference in a report is a difference to it.
    """
    if isinstance(sources, str | Path):
        sources = [sources]
    results = [_read(path) for path in _expand([Path(source) for source in sources])]
    by_label: dict[str, Result] = {}
    for result in results:
        if (other := by_label.setdefault(result.label, result)) is not result:
            raise ValueError(
                f"`label` must differ between files, got {result.label!r} in {other.path} and {result.path}"
            )
    for role in ROLES[:2]:
        found = [result for result in results if result.role == role]
        if len(found) > 1:
            raise ValueError(f"one file of `role` {role!r} is wanted, got {found[0].path} and {found[1].path}")
        if role == "compressed" and not found:
            labels = ", ".join(repr(result.label) for result in results) or "no file"
            raise ValueError(
                f"one file of `role` 'compressed' is needed to compare with, got {labels}: evaluate that model too"
            )
    return sorted(results, key=lambda result: ROLES.index(result.role))


def _expand(sources: list[Path]) -> list[Path]:
    """Files as they are, folders as the result files in them; each file once."""
    paths: dict[Path, Path] = {}
    for source in sources:
        if source.is_dir():
            found = [path for path in sorted(source.glob("*.json")) if _looks_like_a_result(path)]
            if not found:
                raise FileNotFoundError(f"no result file (*.json written by `evaluate`) in the folder {source}")
        elif source.is_file():
            found = [source]
        else:
            raise FileNotFoundError(f"no such result file or folder: {source}")
        for path in found:
            paths.setdefault(path.resolve(), path)
    return list(paths.values())


def _looks_like_a_result(path: Path) -> bool:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError):
        values = None
    if isinstance(values, dict) and {"format", "label", "role"} <= values.keys():
        return True
    logger.info("%s is not a result file: skipped", path)
    return False


def _read(path: Path) -> Result:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also text that is not UTF-8
        raise ValueError(f"{path}: must be a JSON result file written by `evaluate`: {error}") from error
    file = Fields(values, str(path))
    file.get("format", f"{FORMAT}, the format this version reads", lambda x: x == FORMAT)
    num_prompts = file.count("num_prompts", 1, default=None)
    return Result(
        path=path,
        label=file.text("label"),
        role=file.get("role", f"one of {', '.join(ROLES)}", lambda x: x in ROLES),
        model=file.text("model"),
        adapter=file.get("adapter", "a string or null", lambda x: isinstance(x, str), None),
        method=file.get("method", f"null or one of {', '.join(METHODS)}", lambda x: x in METHODS, None),
        extra_parameters=file.count("extra_parameters"),
        num_prompts=num_prompts,
        settings=file.optional_object("settings"),
        environment=file.optional_object("environment"),
        texts={name: _text(fields, num_prompts) for name, fields in file.children("perplexity").items()},
        tasks={name: _task(fields, num_prompts) for name, fields in file.children("tasks").items()},
        training=file.optional_object("training"),
    )


def _text(fields: Fields, num_prompts: int | None) -> Measurement:
    facts = {"window": fields.count("window", 1), "stride": fields.count("stride", 1)}
    facts["selection_reads"] = fields.get("selection_reads", "a string or null", lambda x: isinstance(x, str), None)
    return _measurement(fields, facts, "nats", num_prompts)


def _task(fields: Fields, num_prompts: int | None) -> Measurement:
    facts = {"metric": fields.text("metric"), "chance": fields.number("chance", None)}
    return _measurement(fields, facts, "score", num_prompts)


def _measurement(fields: Fields, facts: dict, value: str, num_prompts: int | None) -> Measurement:
    items = fields.items("items")
    ids = [item.text("id") for item in items]
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise ValueError(f"{fields.place}: `id` must differ between items, got {twice!r} twice")
    prompts = [item.count("prompt", -1, default=None) for item in items]
    by_prompt = [item.numbers(f"{value}_by_prompt") for item in items]
    for item, prompt, row in zip(items, prompts, by_prompt, strict=True):
        if num_prompts is not None and prompt is not None and prompt >= num_prompts:
            raise ValueError(f"{item.place}: `prompt` must be below num_prompts={num_prompts}, got {prompt}")
        if row is not None and len(row) != (num_prompts or len(row)):
            raise ValueError(
                f"{item.place}: `{value}_by_prompt` must hold num_prompts={num_prompts} numbers, got {len(row)}"
            )
    weights = [item.count("tokens", 1) if value == "nats" else 1 for item in items]
    return Measurement(
        facts=facts,
        ids=ids,
        values=np.array([item.number(value) for item in items], dtype=np.float64),
        weights=np.array(weights, dtype=np.float64),
        prompts=np.array([-1 if prompt is None else prompt for prompt in prompts], dtype=np.int64),
        by_prompt=by_prompt,
    )
