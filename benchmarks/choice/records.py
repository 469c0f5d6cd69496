"""Result files as arrays, and which of them are seeds of one thing."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Bank:
    """What was measured of one adapter.

    Args:
        record (`dict`): the file.
        nats (`np.ndarray`): float64 `[items, M]`, per token after the context.
        context (`np.ndarray`): float64 `[items, M]`, nats per token of the context.
        sums (`np.ndarray`): float64 `[layers, items, M]`, attention scores of reduction "sum".
    """

    record: dict
    nats: np.ndarray
    context: np.ndarray
    sums: np.ndarray

    @property
    def name(self) -> str:
        return self.record["name"]

    @property
    def lengths(self) -> list[int]:
        return self.record["adapter"]["lengths"]

    def scores(self, reduction: str) -> np.ndarray:
        """Attention scores of every layer, `[layers, items, M]`."""
        return self.sums / np.array(self.lengths) if reduction == "mean" else self.sums


def read(path: Path) -> Bank:
    record = json.loads(path.read_text())
    settings = record["settings"]
    after = settings["block_tokens"] - settings["context_tokens"]
    return Bank(
        record,
        np.array(record["nats_after"]) / after,
        np.array(record["nats_context"]) / (settings["context_tokens"] - 1),
        np.array(record["scores"]),
    )


def group_of(name: str) -> str:
    """The name without its seed."""
    return re.sub(r"[.-]?seed\d+", "", name)


def read_groups(folder: Path) -> dict[str, list[Bank]]:
    """The banks of a folder of result files, by group.

    Raises:
        `ValueError`: where the banks of a group were not measured alike.
    """
    groups: dict[str, list[Bank]] = {}
    for path in sorted(folder.glob("*.json")):
        bank = read(path)
        groups.setdefault(group_of(bank.name), []).append(bank)
    for name, banks in groups.items():
        if any(
            (bank.lengths, bank.record["settings"], bank.record["model"])
            != (banks[0].lengths, banks[0].record["settings"], banks[0].record["model"])
            for bank in banks
        ):
            raise ValueError(
                f"the files of {name!r} must have one model, one set of lengths and one set of settings to be pooled"
            )
    return groups
