"""What the cells say: means over people, recovery and paired comparisons, from the JSON files alone.

People are what is drawn again by the bootstrap, all five facts of one with them, for facts of one person are not
independent. Seeds are averaged: the intervals cover the luck of the people, not that of the seed, so each seed is shown too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.common.cells import all_cells
from idp_peft.report.bootstrap import Averaged, Means, Resampled
from idp_peft.report.statistics import holm

NAMES = {
    None: "not repaired",
    "idp": "IDP, 4 x 16",
    "one-prompt": "one prompt of 64",
    "lora-same-size": "LoRA of the same size",
    "lora-rank-16": "LoRA, rank 16",
}
DENSE = "dense"
RECALL = ("seen", "answer")  # template and column of `recall.measure`


@dataclass(frozen=True)
class Cell:
    """One cell: which seed, which model, which repair of it (`None`: as it is), and everybody's answers."""

    seed: int
    strength: str
    repair: tuple[str, str] | None  # method, objective
    people: dict[str, dict]

    @classmethod
    def of(cls, content: dict) -> Cell:
        settings = content["settings"]
        repair = None if settings["method"] is None else (settings["method"], settings["objective"])
        return cls(settings["seed"], settings["strength"], repair, content["people"])

    def sums(self, group: str, measure: tuple[str, str]) -> dict[str, float]:
        """Person -> sum over facts."""
        template, column = measure
        return {
            name: float(sum(entry[template][column])) for name, entry in self.people.items() if entry["group"] == group
        }


def read_cells(folder: Path) -> list[Cell]:
    """Every cell of every seed below a folder of results, in the order of their names."""
    return [Cell.of(content) for _, _, content in all_cells(folder, "seed-*/*.jsonl")]


def key(cell: Cell) -> tuple:
    """The column of a cell: `(strength, repair)`, with the same meaning in every seed."""
    return cell.strength, cell.repair


class Summary:
    """Means over people of one group and one measure, seed by seed and averaged.

    Args:
        cells (`list[Cell]`): of any number of seeds. Only what every seed has is averaged.
        group (`str`): whose recall.
        measure (`tuple[str, str]`): template and column of `recall.measure`.
        facts (`int`): per person.

    Raises:
        `ValueError`: where two cells of a seed asked different people.
    """

    def __init__(self, cells: Iterable[Cell], group: str, measure: tuple[str, str] = RECALL, facts: int = 5) -> None:
        by_seed: dict[int, list[Cell]] = {}
        for cell in cells:
            by_seed.setdefault(cell.seed, []).append(cell)
        self.seeds = sorted(by_seed)
        self.per_seed: dict[int, Means] = {
            seed: self._resampled(seed, by_seed[seed], group, measure, facts) for seed in self.seeds
        }
        self.all = Averaged(list(self.per_seed.values()))

    @staticmethod
    def _resampled(seed: int, cells: list[Cell], group: str, measure, facts: int) -> Resampled:
        names, columns = None, {}
        for cell in cells:
            sums = cell.sums(group, measure)
            names = names or list(sums)
            if set(sums) != set(names):
                raise ValueError(f"the cells of seed {seed} must ask the same people of the group {group!r}")
            columns[key(cell)] = np.array([sums[name] for name in names])
        return Resampled(columns, np.full(len(names), float(facts)), [seed, len(group)])

    def recovery(self, strength: str, repair: tuple[str, str], means: Means | None = None):
        """(recovered - compressed) / (dense - compressed)."""
        return (means or self.all).recovery((strength, repair), (strength, None), (DENSE, None), True)

    def recoveries(self, strength: str, repair: tuple[str, str]) -> list:
        """The same, seed by seed."""
        return [self.recovery(strength, repair, means) for means in self.per_seed.values()]


def comparisons(
    summary: Summary, strengths: list[str], repairs: list[tuple[str, str]], first: tuple[str, str]
) -> list[dict]:
    """Every repair against the compressed model, and `first` against the other repairs, corrected together by Holm's method."""
    wanted = []
    for strength in strengths:
        wanted += [(strength, repair, None) for repair in repairs]
        wanted += [(strength, first, repair) for repair in repairs if repair != first]
    made = []
    for strength, left, right in wanted:
        difference = summary.all.difference((strength, left), (strength, right))
        made.append({"strength": strength, "left": left, "right": right, "difference": difference})
    for comparison, p in zip(made, holm([one["difference"].p for one in made]), strict=True):
        comparison["p_holm"] = p
    return made
