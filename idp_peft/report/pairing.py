"""The same items for every model: models may have been measured on different samples, and only shared items compare."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from idp_peft.report.results import Measurement, Result


@dataclass(frozen=True)
class Paired:
    """One text or task, for the models that were measured on it, on the items they share.

    Args:
        name (`str`): of the text or task.
        is_text (`bool`): nats of documents, where less is better, or scores of questions, where more is.
        facts (`dict`): how it was measured, the same for all models.
        ids (`list[str]`): the shared items.
        weights (`np.ndarray`): float64 `[items]`.
        values, prompts (`dict`): label -> `[items]`.
        by_prompt (`dict`): label -> float64 `[items, num_prompts]`, for the models where all shared items have it.
        measured (`dict`): label -> how many items that file holds.
        selection_reads (`dict`): label -> what the choice read, where the file says so.
    """

    name: str
    is_text: bool
    facts: dict
    ids: list[str]
    weights: np.ndarray
    values: dict[str, np.ndarray]
    prompts: dict[str, np.ndarray]
    by_prompt: dict[str, np.ndarray]
    measured: dict[str, int]
    selection_reads: dict[str, str]


def pair(results: list[Result], name: str, is_text: bool) -> Paired:
    """Put the items of one text (or task) side by side.

    Args:
        results (`list[Result]`): those without this text or task are passed over.
        name (`str`): of the text or task.
        is_text (`bool`): look among texts, not tasks.

    Raises:
        `ValueError`: if two files were measured differently (`window`, `stride`, `metric`, `chance`, tokens of an item), naming
            both, or if no item is shared.
    """
    found = [(r, (r.texts if is_text else r.tasks)[name]) for r in results if name in (r.texts if is_text else r.tasks)]
    what = f"{'text' if is_text else 'task'} {name!r}"
    for fact in ("window", "stride") if is_text else ("metric", "chance"):
        _check_same(found, f"`{fact}` of {what}", [m.facts[fact] for _, m in found])
    shared = set.intersection(*(set(m.ids) for _, m in found))
    if not shared:
        counts = ", ".join(f"{len(m.ids)} in {r.path}" for r, m in found)
        raise ValueError(
            f"no item of {what} is in every file ({counts}): evaluate all models on the same sample (one seed)"
        )
    ids = [item for item in found[0][1].ids if item in shared]
    aligned = {r.label: _take(m, ids) for r, m in found}
    first = aligned[found[0][0].label]
    for place, item in enumerate(ids):
        _check_same(found, f"`tokens` of item {item!r} of {what}", [int(m.weights[place]) for m in aligned.values()])
    by_prompt = {label: _stacked(m.by_prompt) for label, m in aligned.items()}
    return Paired(
        name=name,
        is_text=is_text,
        facts={key: value for key, value in first.facts.items() if key != "selection_reads"},
        ids=ids,
        weights=first.weights,
        values={label: m.values for label, m in aligned.items()},
        prompts={label: m.prompts for label, m in aligned.items()},
        by_prompt={label: table for label, table in by_prompt.items() if table is not None},
        measured={r.label: len(m.ids) for r, m in found},
        selection_reads={r.label: m.facts["selection_reads"] for r, m in found if m.facts.get("selection_reads")},
    )


def _take(measurement: Measurement, ids: list[str]) -> Measurement:
    """The items named by `ids`, in that order."""
    rows = dict(zip(measurement.ids, range(len(measurement.ids)), strict=True))
    order = [rows[item] for item in ids]
    return Measurement(
        facts=measurement.facts,
        ids=ids,
        values=measurement.values[order],
        weights=measurement.weights[order],
        prompts=measurement.prompts[order],
        by_prompt=[measurement.by_prompt[row] for row in order],
    )


def _check_same(found: list[tuple[Result, Measurement]], what: str, values: list) -> None:
    """Refuse files that were not measured alike, naming the first two that differ."""
    for (result, _), value in zip(found, values, strict=True):
        if value != values[0]:
            raise ValueError(
                f"{what} must be the same in every file, got {values[0]!r} in {found[0][0].path} and {value!r} in {result.path}"
            )


def _stacked(rows: list[np.ndarray | None]) -> np.ndarray | None:
    """float64 `[items, num_prompts]`, or `None` unless every item has the same number of values."""
    if any(row is None for row in rows) or len({len(row) for row in rows}) != 1:
        return None
    return np.stack(rows)
