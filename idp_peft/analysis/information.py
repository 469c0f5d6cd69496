"""Entropy and mutual information of the choices."""

from __future__ import annotations

import numpy as np

_SHUFFLES = 200


def entropy(counts: np.ndarray) -> float:
    """-sum_i p_i log p_i in nats, of counts `[M]`: 0 where one prompt takes all, log M where all are chosen alike."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum()) + 0.0  # no minus zero


def joint_counts(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """How often each pair occurs, int64 `shape`."""
    return np.bincount(rows * shape[1] + columns, minlength=shape[0] * shape[1]).reshape(shape)


def mutual_information(joint: np.ndarray) -> float:
    """I(group; prompt) in nats of joint counts `[groups, M]`: 0 where the group says nothing about the prompt."""
    return max(0.0, entropy(joint.sum(0)) + entropy(joint.sum(1)) - entropy(joint.ravel()))


def chance_information(rows: np.ndarray, columns: np.ndarray, shape: tuple[int, int], seed: int = 0) -> float:
    """The mutual information that shuffled groups have, on average: in few examples it is not 0."""
    rng = np.random.default_rng(seed)
    shuffled = [mutual_information(joint_counts(rng.permutation(rows), columns, shape)) for _ in range(_SHUFFLES)]
    return float(np.mean(shuffled))
