"""Does a score that chooses a prompt agree with what the prompts are worth? Two correlations over `[items, M]` tables.

    within items    r_b = Spearman_i(s[b, i], v[b, i]), and its mean over items. A score that knows which prompt of the bank is
                    best in general does well here, though it need not look at the item for that.
    two-way         r = Pearson over all (b, i) of s and v, each centred by item and by prompt:
                    x[b, i] - mean_i x[b, i] - mean_b x[b, i] + mean x. What is left is how an item differs from other
                    items: only a score that varies *with the input* as the prompts' worth does can do well here.

`v` is minus the nats of a block. Attention scores enter as logarithms: whether an item attends to prompts much or little is
then an item's mean, and goes with it.
"""

from __future__ import annotations

import numpy as np

from idp_peft.report.bootstrap import DRAWS


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1 along the last axis, the mean rank where values are equal."""
    above = values[..., :, None] > values[..., None, :]
    equal = values[..., :, None] == values[..., None, :]
    return above.sum(-1) + (equal.sum(-1) + 1) / 2


def within_items(score: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Spearman's correlation of each item over its prompts, `[items]`; 0 where one side does not tell prompts apart."""
    left, right = (part - part.mean(-1, keepdims=True) for part in (ranks(score), ranks(value)))
    scale = np.sqrt((left**2).sum(-1) * (right**2).sum(-1))
    return np.divide((left * right).sum(-1), scale, out=np.zeros(scale.shape), where=scale > 0)


def centred(table: np.ndarray) -> np.ndarray:
    """A table `[items, M]` without the means of its rows and of its columns."""
    return table - table.mean(1, keepdims=True) - table.mean(0, keepdims=True) + table.mean()


def two_way(score: np.ndarray, value: np.ndarray) -> float:
    """The two-way centred correlation; 0 where nothing is left on one side."""
    left, right = centred(score), centred(value)
    scale = np.sqrt((left**2).sum() * (right**2).sum())
    return float((left * right).sum() / scale) if scale > 0 else 0.0


def between_items(score: np.ndarray, value: np.ndarray) -> np.ndarray:
    """The same for each prompt alone: correlation over items of what is left of its column, `[M]`."""
    left, right = centred(score), centred(value)
    scale = np.sqrt((left**2).sum(0) * (right**2).sum(0))
    return np.divide((left * right).sum(0), scale, out=np.zeros(scale.shape), where=scale > 0)


def resampled_two_way(score: np.ndarray, value: np.ndarray, times: np.ndarray) -> np.ndarray:
    """The two-way correlation over resampled items, centred anew in every draw: float64 `[draws]`.

    Args:
        times (`np.ndarray`): `[draws, items]`, how often each item was drawn; every row sums to the number of items.
    """
    rows = [table - table.mean(1, keepdims=True) for table in (score, value)]  # an item's mean stays what it is

    def product(left: np.ndarray, right: np.ndarray) -> np.ndarray:
        means = [times @ part / times.sum(1, keepdims=True) for part in (left, right)]  # [draws, M]
        return times @ (left * right).sum(1) - times.sum(1) * (means[0] * means[1]).sum(1)

    scale = np.sqrt(np.clip(product(rows[0], rows[0]) * product(rows[1], rows[1]), 0, None))
    return np.divide(product(*rows), scale, out=np.zeros(scale.shape), where=scale > 0)


def draw_items(items: int, seed: int = 0, draws: int = DRAWS) -> np.ndarray:
    """How often each item is drawn in resamples of as many items, int64 `[draws, items]`."""
    return np.random.default_rng(seed).multinomial(items, np.full(items, 1 / items), draws)


def permutation_p(pairs: list[tuple[np.ndarray, np.ndarray]], seed: int = 0, draws: int = DRAWS) -> float:
    """Two-sided p of the two-way correlation, averaged over several banks: scores are dealt to other items.

    If how an item's scores differ from other items' says nothing about its own losses, any other item's scores would
    do as well. Centring is not touched by the dealing. All banks are dealt alike: their items are the same.

    Args:
        pairs (`list`): `(score, value)` of each bank, `[items, M]` each.
    """
    total = np.zeros((len(pairs[0][0]),) * 2)  # [item of the scores, item of the losses]
    for score, value in pairs:
        left, right = centred(score), centred(value)
        scale = np.sqrt((left**2).sum() * (right**2).sum())
        total += left @ right.T / scale if scale > 0 else 0
    rng, items = np.random.default_rng(seed), np.arange(len(total))
    dealt = rng.permuted(np.tile(items, (draws, 1)), axis=1)
    statistics, observed = total[dealt, items].sum(1), np.trace(total)
    # A draw that repeats the items' own order may differ in the last bits.
    at_least = (np.abs(statistics) >= np.abs(observed) - 1e-12).sum()
    return float((at_least + 1) / (draws + 1))
