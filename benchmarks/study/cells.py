"""The cells of a matrix, read back: entries (a method with all its seeds) and each item's value under each use of prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.common.cells import Cells
from benchmarks.study.matrix import COMPOSED, Contender, Matrix
from idp_peft.report.choices import ORACLE, RANDOM, SINGLE, other_uses

# How a prompt is taken for an item. ATTENTION is the method's own; for a model without a bank it is just its value.
ATTENTION, LEAST_LOSS = "attention", "least loss of the context"
USES = (ATTENTION, LEAST_LOSS, RANDOM, SINGLE, ORACLE)
_NAMES = {
    "dense": "dense",
    "compressed": "compressed",
    "bos_prefix": "BOS prefix of the dense model",
    "own_bos_prefix": "its own BOS prefix",
    "prefix_tuning": "prefix tuning",
}


@dataclass
class Entry:
    """A method on one compression, with one objective and all its seeds.

    Args:
        one (`Contender`): of its first seed.
        label (`str`): what tables call it.
        cells (`dict`): seed (`None` where nothing was trained) -> measure -> the cell's JSON.
    """

    one: Contender
    label: str
    cells: dict[int | None, dict[str, dict]] = field(default_factory=dict)

    @property
    def seeds(self) -> tuple[int | None, ...]:
        return tuple(self.cells)

    @property
    def extra_parameters(self) -> int:
        return next(cell for cells in self.cells.values() for cell in cells.values())["extra_parameters"]

    @property
    def chooses(self) -> bool:
        return (next(cell for cells in self.cells.values() for cell in cells.values())["num_prompts"] or 1) > 1

    def measured(self, measure: str) -> tuple[int | None, ...]:
        return tuple(seed for seed, cells in self.cells.items() if measure in cells)


def read_entries(matrix: Matrix, results: Path, compression: str) -> list[Entry]:
    """What is there so far of one compression; the dense model first, which every table compares with.

    Raises:
        `ValueError`: for a cell that was measured with other settings than the configuration's.
    """
    entries: dict[tuple, Entry] = {}
    for one in matrix.contenders:
        if one.compression != compression and one.path != Path("none", "dense"):
            continue
        cells, found = Cells(results / matrix.name, one.path), {}
        measured = cells.read()
        for measure in matrix.measures(one):
            if measure in measured:
                found[measure] = measured[measure]
                if found[measure]["evaluation"] != matrix.evaluation:
                    raise ValueError(
                        f"{measure} of {cells.path} was measured with {found[measure]['evaluation']}, not {matrix.evaluation}"
                    )
        if found:
            entry = entries.setdefault((one.method, one.objective), Entry(one, label(matrix, one)))
            entry.cells[one.seed] = found
    return list(entries.values())


def label(matrix: Matrix, one: Contender) -> str:
    """What tables call a contender; distillation is named, language modelling is the rule."""
    options = matrix.methods.get(one.method)
    if options is None:
        return _NAMES[one.method]
    if options["method"] == COMPOSED:
        parts = [matrix.methods[part]["num_virtual_tokens"] for part in options["of"]]
        name = f"IDP composed, {' + '.join(map(str, parts))}"
    elif options["method"] == "idp" and options["num_prompts"] == 1:
        name = f"one prompt, {options['num_virtual_tokens']} tokens"
    elif options["method"] == "idp":
        name = f"IDP, {options['num_prompts']} x {options['num_virtual_tokens']}"
    elif options["method"] == "lora":
        name = "LoRA, budget-matched" if options.get("match_budget") else f"LoRA, rank {options['lora_rank']}"
    else:
        name = _NAMES[options["method"]]
        name = f"{name}, intact start" if one.objective == "distillation" else name
    return name if one.objective == "lm" else f"{name}, distillation"


def values(cell: dict, key: str, use: str, seed: int = 0) -> np.ndarray | None:
    """Each item's value under one use of the prompts, float64 `[items]`; `None` where it was not measured.

    Args:
        key (`str`): `"nats"`, `"score"` or `"probability"`.
        seed (`int`): of the halvings behind the cross-fitted best single prompt.
    """
    items = cell["items"]
    if use == ATTENTION:
        own = [item["scores"].get(key) if key == "probability" else item.get(key) for item in items]
        return None if None in own else np.array(own, dtype=np.float64)
    if any(key not in item.get("by_prompt", {}) for item in items):
        return None
    by_prompt = np.array([item["by_prompt"][key] for item in items], dtype=np.float64)  # [items, M]
    if use == LEAST_LOSS:
        return by_prompt[np.arange(len(items)), [item["least_loss_prompt"] for item in items]]
    return other_uses(by_prompt, key == "nats", seed)[use]


def weights(cell: dict) -> np.ndarray:
    return np.array([item.get("tokens", 1) for item in cell["items"]], dtype=np.float64)
