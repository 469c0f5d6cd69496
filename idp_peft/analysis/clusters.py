"""What inputs each prompt is for, in words: the tokens that tell its contexts from the others', and those most like its centroid."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_SHOWN = 8


@dataclass(frozen=True)
class Cluster:
    """The contexts that chose one prompt.

    Args:
        tokens (`list`): its most telling tokens, the most telling first: token ids, or texts where a tokenizer is known.
        examples (`list[int]`): the numbers of the examples nearest to its centroid, the nearest first.
    """

    tokens: list
    examples: list[int]


def describe_clusters(
    contexts: Sequence[Sequence[int]], prompt_ids: np.ndarray, scores: np.ndarray, tokenizer=None
) -> list[Cluster]:
    """One [`Cluster`] per prompt.

    A token tells a cluster by `n (log p - log q)`: n, how many of the cluster's contexts hold it; p and q, the share of
    contexts in the cluster and outside of it that do (with one more context on either side, so that none is zero).

    Args:
        contexts (`Sequence`): the context tokens of each of N examples.
        prompt_ids (`np.ndarray`): int64 `[N]`, which prompt each chose.
        scores (`np.ndarray`): float32 `[N, M]`.
        tokenizer (*optional*): to write tokens as text.
    """
    held = [set(context) for context in contexts]
    everywhere = Counter(token for tokens in held for token in tokens)
    clusters = []
    for prompt in range(scores.shape[1]):
        inside = np.flatnonzero(prompt_ids == prompt)
        counts = Counter(token for example in inside for token in held[example])
        telling = {}
        for token, count in counts.items():
            share = (count + 1) / (len(inside) + 1)
            elsewhere = (everywhere[token] - count + 1) / (len(held) - len(inside) + 1)
            telling[token] = count * np.log(share / elsewhere)
        tokens = sorted(telling, key=lambda token: (-telling[token], token))[:_SHOWN]
        nearest = inside[np.argsort(-scores[inside, prompt], kind="stable")][:_SHOWN]
        words = tokens if tokenizer is None else [tokenizer.decode([token]) for token in tokens]
        clusters.append(Cluster(list(words), nearest.tolist()))
    return clusters
