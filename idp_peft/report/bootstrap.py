"""The paired bootstrap: whole items are drawn again, with replacement, and every model sees the same draws.

For `n` items with sums `v` and weights `w`, one draw takes `n` items and gives `r* = sum v* / sum w*`. An interval is the
2.5 % and 97.5 % quantile over the draws of a difference `r*_left - r*_right`, or of a ratio of differences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from idp_peft.report.statistics import LEVEL, ratio_mean

DRAWS = 10_000
# Nats per token, or accuracy: smaller than what two evaluations of one model in float32 differ by. Without it, rounding
# in the last bit would make two equal models differ "in all draws".
_INDISTINGUISHABLE = 1e-9
_CELLS = 4_000_000  # items x draws held at once: 32 MB


@dataclass(frozen=True)
class Estimate:
    """A number and how sure it is.

    Args:
        value (`float`): the estimate from the items as they are.
        standard_error (`float`, *optional*): `None` where one item gives no error.
        interval (`tuple[float, float]`, *optional*): 95 % bootstrap interval.
        p (`float`, *optional*): for a difference: the smallest level whose interval leaves out 0.
    """

    value: float
    standard_error: float | None = None
    interval: tuple[float, float] | None = None
    p: float | None = None


@dataclass(frozen=True)
class Recovery:
    """Part of the damage that was repaired: 1 is all of it. Without a `value`, `reason` says why there is none."""

    value: float | None = None
    interval: tuple[float, float] | None = None
    reason: str | None = None


class Means:
    """Means of named columns and the same means over the same resampled items.

    Args:
        points (`dict`): name -> mean over the items as they are.
        draws (`dict`): name -> float64 `[draws]`, empty arrays where there are too few items to resample.
    """

    items: int  # how many were resampled

    def __init__(self, points: dict, draws: dict):
        self.points, self.draws = points, draws

    def standard_error(self, left, right=None) -> float | None:
        raise NotImplementedError

    def mean(self, name) -> Estimate:
        return Estimate(self.points[name], self.standard_error(name), interval(self.draws[name]))

    def difference(self, left, right) -> Estimate:
        """`left` minus `right`, paired: what items have in common cancels."""
        gaps = _without_rounding(self.draws[left] - self.draws[right])
        value = float(_without_rounding(np.asarray(self.points[left] - self.points[right])))
        return Estimate(value, self.standard_error(left, right), interval(gaps), _p_value(gaps, self.items))

    def recovery(self, recovered, compressed, dense, higher_is_better: bool) -> Recovery:
        """(recovered - compressed) / (dense - compressed), with the interval of that ratio over the draws.

        There is none when the interval of the damage reaches 0: a percentage of nothing is noise.
        """
        sign = 1.0 if higher_is_better else -1.0
        damage = self.difference(dense, compressed)
        if damage.interval is None:
            return Recovery(reason="too few items")
        low, high = sorted(sign * end for end in damage.interval)
        if low <= 0 <= high:
            return Recovery(reason="damage not distinguishable from 0")
        if high < 0:
            return Recovery(reason="compressed is better than dense")
        lost = self.draws[dense] - self.draws[compressed]
        # A draw without damage has no ratio; there are fewer than 2.5 % of draws on the wrong side of 0, hardly any on it.
        usable = np.abs(lost) > _INDISTINGUISHABLE
        ratios = (self.draws[recovered] - self.draws[compressed])[usable] / lost[usable]
        return Recovery(self.difference(recovered, compressed).value / damage.value, interval(ratios))


class Resampled(Means):
    """Means over one set of items.

    Args:
        columns (`dict`): name -> float64 `[items]`, sums over each item.
        weights (`np.ndarray`): float64 `[items]`, positive: tokens of a document, or ones.
        seed: anything `numpy.random.default_rng` takes; one seed gives one sequence of draws.
        draws (`int`, defaults to `10000`): resamples; the ends of a 95 % interval then move by 1 % of its width.
    """

    def __init__(self, columns: dict, weights: np.ndarray, seed, draws: int = DRAWS):
        self.columns, self.weights, self.items = columns, weights, len(weights)
        points = {name: ratio_mean(values, weights)[0] for name, values in columns.items()}
        resampled = _resampled_means(np.stack(list(columns.values()), 1), weights, seed, draws)  # [draws, columns]
        super().__init__(points, dict(zip(columns, resampled.T, strict=True)))

    def standard_error(self, left, right=None) -> float | None:
        values = self.columns[left] if right is None else self.columns[left] - self.columns[right]
        return ratio_mean(values, self.weights)[1]


class Averaged(Means):
    """The plain mean over several tasks: tasks are fixed, the items of each are resampled.

    Args:
        parts (`list[Means]`): one per task, drawn with different seeds; names that all have are kept.
    """

    def __init__(self, parts: list[Means]):
        self.parts, self.items = parts, sum(part.items for part in parts)
        names = [name for name in parts[0].points if all(name in part.points for part in parts)]
        points = {name: float(np.mean([part.points[name] for part in parts])) for name in names}
        super().__init__(points, {name: _mean_of_draws([part.draws[name] for part in parts]) for name in names})

    def standard_error(self, left, right=None) -> float | None:
        errors = [part.standard_error(left, right) for part in self.parts]
        return None if None in errors else math.sqrt(sum(error**2 for error in errors)) / len(errors)


def interval(draws: np.ndarray) -> tuple[float, float] | None:
    """The 95 % percentile interval of resampled values; `None` without any."""
    if len(draws) == 0:
        return None
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _p_value(gaps: np.ndarray, items: int) -> float | None:
    """2 min(P(gap <= 0), P(gap >= 0)) over the draws, each counted with one draw more, so that it is never 0.

    Nor is it below 2 / 2^items, the chance that as many fair coins all fall alike: draws from a handful of items know
    nothing of the items that were not seen.
    """
    if len(gaps) == 0:
        return None
    fewer = min((gaps <= 0).sum(), (gaps >= 0).sum())
    return float(min(1.0, max(2 * (fewer + 1) / (len(gaps) + 1), 2.0 ** (1 - items))))


def _resampled_means(columns: np.ndarray, weights: np.ndarray, seed, draws: int) -> np.ndarray:
    """Weighted means over resampled items, float64 `[draws, columns]`; `[0, columns]` for fewer than two items."""
    items, means = len(weights), []
    sums = np.column_stack([columns, weights])  # [items, columns + 1]
    rng, at_once = np.random.default_rng(seed), max(1, _CELLS // items)
    for start in range(0, draws if items > 1 else 0, at_once):
        rows = min(at_once, draws - start)
        drawn = rng.integers(0, items, (rows, items)) + items * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * items).reshape(rows, items)  # how often each item was drawn
        totals = times.astype(np.float64) @ sums
        means.append(totals[:, :-1] / totals[:, -1:])
    return np.concatenate(means) if means else np.empty((0, columns.shape[1]))


def _mean_of_draws(draws: list[np.ndarray]) -> np.ndarray:
    """Mean over tasks, draw by draw; empty where a task could not be resampled."""
    return np.mean(draws, axis=0) if all(len(part) for part in draws) else np.empty(0)


def _without_rounding(gaps: np.ndarray) -> np.ndarray:
    return np.where(np.abs(gaps) < _INDISTINGUISHABLE, 0.0, gaps)
