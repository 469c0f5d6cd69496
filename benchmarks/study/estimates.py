"""Means over items and seeds with their intervals: the paired bootstrap of `idp_peft.report`, seeds averaged item by item.

Items are resampled; training seeds are averaged before, and shown one by one beside, since three are too few to resample. A
difference counts as seen only where its interval leaves out 0 (after Holm's correction) and every seed has its sign.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from benchmarks.study.cells import USES, Entry, values, weights
from idp_peft.report.bootstrap import Averaged, Estimate, Means, Recovery, Resampled
from idp_peft.report.statistics import LEVEL, holm

_NOTHING = 1e-9  # nats per token, or accuracy: a difference of rounding alone


class OverSeeds(Means):
    """The means of some columns, averaged over seeds."""

    def __init__(self, means: Means, names: dict) -> None:
        points = {name: float(np.mean([means.points[part] for part in parts])) for name, parts in names.items()}
        draws = {name: np.mean([means.draws[part] for part in parts], axis=0) for name, parts in names.items()}
        super().__init__(points, draws)
        self.items = means.items

    def standard_error(self, left, right=None) -> float | None:
        gaps = self.draws[left] if right is None else self.draws[left] - self.draws[right]
        return float(gaps.std()) if len(gaps) else None


@dataclass
class Compared:
    """`left` minus `right`, over the seeds that both have.

    Args:
        by_seed (`list[float]`): the difference of each common seed alone.
        p_holm (`float`, *optional*): corrected over the family it is reported in.
    """

    left: str
    right: str
    estimate: Estimate
    by_seed: list[float]
    p_holm: float | None = None

    @property
    def seen(self) -> bool:
        """Whether the difference is there on these items, with every seed."""
        signs = {0.0 if abs(gap) < _NOTHING else np.sign(gap) for gap in self.by_seed}
        return self.p_holm is not None and self.p_holm < 1 - LEVEL and len(signs) == 1


class Table:
    """All entries on one text, one task, or the mean over several tasks.

    Args:
        entries (`list[Entry]`): those without one of the measures are left out.
        measures (`list[str]`): one text, or tasks that count alike.
        key (`str`): `"nats"`, `"score"` or `"probability"`.
    """

    def __init__(self, entries: list[Entry], measures: list[str], key: str) -> None:
        self.key, self.higher_is_better = key, key != "nats"
        self.measures = [name for name in measures if _has(entries, name, key)]
        parts = [self._resampled(entries, name) for name in self.measures]
        self.means = Means({}, {}) if not parts else parts[0] if len(parts) == 1 else Averaged(parts)
        self.entries = [entry for entry in entries if self.seeds(entry)]

    def seeds(self, entry: Entry, use: str = "attention") -> list:
        return [seed for seed in entry.seeds if (entry.label, use, seed) in self.means.points]

    def mean(self, entry: Entry, use: str = "attention") -> Estimate | None:
        seeds = self.seeds(entry, use)
        return self._pool({"it": [(entry.label, use, seed) for seed in seeds]}).mean("it") if seeds else None

    def recovery(self, entry: Entry, compressed: Entry, dense: Entry, use: str = "attention") -> Recovery | None:
        seeds = self.seeds(entry, use)
        if not seeds:
            return None
        return self._recovery([(entry.label, use, seed) for seed in seeds], compressed, dense)

    def recovery_by_seed(
        self, entry: Entry, compressed: Entry, dense: Entry, use: str = "attention"
    ) -> list[float | None]:
        names = [(entry.label, use, seed) for seed in self.seeds(entry, use)]
        return [self._recovery([name], compressed, dense).value for name in names]

    def difference(
        self, left: Entry, right: Entry, uses: tuple[str, str] = ("attention", "attention")
    ) -> Compared | None:
        """Over common seeds; an entry without seeds (dense, compressed) is the same for all of the other's."""
        pairs = [
            ((left.label, uses[0], one), (right.label, uses[1], other))
            for one in self.seeds(left, uses[0])
            for other in self.seeds(right, uses[1])
            if one == other or None in (one, other)
        ]
        if not pairs:
            return None
        pooled = self._pool({"left": [a for a, _ in pairs], "right": [b for _, b in pairs]})
        points = self.means.points
        names = [
            entry.label if use == "attention" else f"{entry.label}, {use}"
            for entry, use in zip((left, right), uses, strict=True)
        ]
        return Compared(*names, pooled.difference("left", "right"), [points[a] - points[b] for a, b in pairs])

    def _recovery(self, names: list, compressed: Entry, dense: Entry) -> Recovery:
        parts = {"it": names}
        parts |= {
            role: [(one.label, "attention", None)] for role, one in (("compressed", compressed), ("dense", dense))
        }
        return self._pool(parts).recovery("it", "compressed", "dense", self.higher_is_better)

    def _pool(self, names: dict) -> OverSeeds:
        return OverSeeds(self.means, names)

    def _resampled(self, entries: list[Entry], measure: str) -> Resampled:
        columns, ids, weight = {}, None, None
        for entry in entries:
            for seed in entry.measured(measure):
                cell = entry.cells[seed][measure]
                own = [item["id"] for item in cell["items"]]
                if ids is not None and own != ids:
                    raise ValueError(f"{entry.label}, {measure}: must be measured on the same items as the others")
                ids, weight = own, weights(cell)
                for use in USES:
                    if (found := values(cell, self.key, use)) is not None:
                        columns[entry.label, use, seed] = found
        return Resampled(columns, weight, zlib.crc32(measure.encode()))


def correct(family: list[Compared | None]) -> list[Compared]:
    """Holm's correction over a family of comparisons, in place; those that could not be made are dropped."""
    made = [one for one in family if one is not None]
    tested = [one for one in made if one.estimate.p is not None]
    for one, p in zip(tested, holm([one.estimate.p for one in tested]), strict=True):
        one.p_holm = p
    return made


def _has(entries: list[Entry], measure: str, key: str) -> bool:
    """Whether every entry that has the measure has this key of it: not every task is a choice among several."""
    cells = [entry.cells[seed][measure] for entry in entries for seed in entry.measured(measure)]
    return bool(cells) and all(values(cell, key, "attention") is not None for cell in cells)
