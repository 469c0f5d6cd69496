"""Statistics of paired measurements, each with its formula or its source.

Items (documents, questions) are the independent units; nothing here assumes more than that.
"""

from __future__ import annotations

import math

import numpy as np

LEVEL = 0.95


def ratio_mean(values: np.ndarray, weights: np.ndarray) -> tuple[float, float | None]:
    """Weighted mean of items and its standard error, by the ratio estimator.

        r = sum v / sum w          SE = sqrt( n / (n - 1) * sum (v - r w)^2 ) / sum w

    `v` is an item's *sum* (nats of a document), `w` its weight (its tokens): every token counts the same, and the error
    allows for documents of different lengths. With all weights 1 this is the usual mean and its usual error.

    Args:
        values (`np.ndarray`): float64 `[items]`, sums over each item.
        weights (`np.ndarray`): float64 `[items]`, positive.

    Returns:
        The mean, and its standard error (`None` for a single item).

    Raises:
        `ValueError`: without items.
    """
    count = len(values)
    if count == 0:
        raise ValueError("`values` must hold at least one item, got 0")
    mean = values.sum() / weights.sum()
    if count == 1:
        return float(mean), None
    residuals = values - mean * weights
    return float(mean), float(math.sqrt(count / (count - 1) * (residuals**2).sum()) / weights.sum())


def wilson(successes: int, trials: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion (Wilson 1927): it stays inside 0..1 and is honest for few items.

    Raises:
        `ValueError`: unless `0 <= successes <= trials` and `trials >= 1`.
    """
    from scipy.stats import binomtest

    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"`successes` must be from 0 to `trials` and `trials` at least 1, got {successes} of {trials}")
    low, high = binomtest(successes, trials).proportion_ci(LEVEL, method="wilson")
    return float(low), float(high)


def mcnemar(left: np.ndarray, right: np.ndarray) -> float:
    """McNemar's exact two-sided p-value: do two models get different shares of the same questions right?

    Only questions that exactly one of the two gets right count. If the models are alike, each of them is a fair coin.

    Args:
        left, right (`np.ndarray`): `[items]`, 0 or 1, the same questions in the same order.

    Raises:
        `ValueError`: for arrays of different lengths, or scores other than 0 and 1.
    """
    from scipy.stats import binomtest

    left, right = np.asarray(left), np.asarray(right)
    if left.shape != right.shape:
        raise ValueError(f"`left` and `right` must score the same items, got {len(left)} and {len(right)} of them")
    if not (is_binary(left) and is_binary(right)):
        raise ValueError("`left` and `right` must be 0 or 1 for McNemar's test, got other scores")
    only_left, only_right = int((left > right).sum()), int((right > left).sum())
    return float(binomtest(only_left, only_left + only_right).pvalue) if only_left + only_right else 1.0


def is_binary(scores: np.ndarray) -> bool:
    """Whether every score is 0 or 1."""
    return bool(np.isin(scores, (0, 1)).all())


def holm(p_values: list[float]) -> list[float]:
    """Holm's step-down correction (Holm 1979): with it, the chance of even one false claim in the family is 5 %.

    p'_(k) = max_{j <= k} min(1, (m - j + 1) p_(j))        p_(1) <= ... <= p_(m)
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected


def shares(prompts: np.ndarray, num_prompts: int) -> np.ndarray:
    """Share of items that chose each prompt: float64 `[num_prompts]`; items without a prompt (-1) do not count."""
    counts = np.bincount(prompts[prompts >= 0], minlength=num_prompts)
    return counts / max(1, counts.sum())


def entropy_bits(probabilities: np.ndarray) -> float:
    """Entropy of the choice in bits: 0 when one prompt is always chosen, log2 M when all are equally often."""
    from scipy.stats import entropy

    return float(entropy(probabilities, base=2)) if probabilities.sum() else 0.0
