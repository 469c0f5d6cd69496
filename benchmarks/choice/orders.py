"""Orders of the prompts of a bank, and whether a choice depends on them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice, permutations
from math import factorial

import numpy as np

MOST = 24


def balanced_orders(num_prompts: int) -> list[list[int]]:
    """Orders in which every prompt stands at every place equally often: all rotations, forwards and backwards.

    `order[p]` is the prompt at place p.
    """
    forwards = [[(start + place) % num_prompts for place in range(num_prompts)] for start in range(num_prompts)]
    found = []
    for order in [*forwards, *(order[::-1] for order in forwards)]:
        if order not in found:
            found.append(order)
    return found


def all_orders(num_prompts: int, seed: int = 0) -> list[list[int]]:
    """Every order of the prompts, the bank's own first; of more than 24, the bank's own and 23 random ones."""
    if factorial(num_prompts) <= MOST:
        return [list(order) for order in islice(permutations(range(num_prompts)), MOST)]
    rng = np.random.default_rng(seed)
    return [list(range(num_prompts)), *(rng.permutation(num_prompts).tolist() for _ in range(MOST - 1))]


@dataclass(frozen=True)
class Dependence:
    """How much scores depend on the order of the bank.

    Args:
        largest_difference (`float`): between an item's score of a prompt in one order and in the first one, relative to the
            item's greatest score.
        changing (`float`): share of items whose chosen prompt is not the same in all orders.
        at_place (`list[float]`): share of choices that fell on the prompt at each place, over all orders and items.
    """

    largest_difference: float
    changing: float
    at_place: list[float]


def dependence(scores: np.ndarray, orders: list[list[int]]) -> Dependence:
    """Compare the scores of one layer in several orders.

    Args:
        scores (`np.ndarray`): `[orders, items, M]`, by prompt (not by place).
        orders (`list`): `order[p]` is the prompt at place p.
    """
    chosen = scores.argmax(-1)  # [orders, items]
    gaps = np.abs(scores - scores[:1]).max(-1) / scores[:1].max(-1)
    place_of = np.argsort(orders, axis=1)  # [orders, M]: the place of each prompt
    places = np.take_along_axis(place_of, chosen, axis=1)
    counts = np.bincount(places.ravel(), minlength=scores.shape[-1])
    return Dependence(
        largest_difference=float(gaps.max()),
        changing=float((chosen != chosen[:1]).any(0).mean()),
        at_place=(counts / counts.sum()).tolist(),
    )


def explained(scores: np.ndarray, orders: list[list[int]]) -> dict[str, float]:
    """Shares of the variance of scores within items that the place and the prompt explain; the rest is theirs together
    with the item and its neighbours.

        s[o, b, i] - mean_{o, i} s[o, b, i]  =  place(p) + prompt(i) + rest

    Every prompt stands at every place equally often, so the two parts add up.

    Args:
        scores (`np.ndarray`): `[orders, items, M]`, by prompt.
        orders (`list`): from [`balanced_orders`].

    Raises:
        `ValueError`: where some prompt stands at some place more often than at another.
    """
    prompts = scores.shape[-1]
    place_of = np.argsort(orders, axis=1)  # [orders, M]
    times = np.array([[(place_of[:, i] == p).sum() for p in range(prompts)] for i in range(prompts)])
    if (times != times[0, 0]).any():
        raise ValueError(f"`orders` must have every prompt at every place equally often, got {orders}")
    centred = scores - scores.mean(axis=(0, 2), keepdims=True)
    by_place = np.take_along_axis(centred, np.array(orders)[:, None], axis=2)  # [orders, items, place]
    total = (centred**2).sum()
    if total == 0:
        return {"place": 0.0, "prompt": 0.0}
    cells = scores.shape[0] * scores.shape[1]
    return {
        "place": float(cells * (by_place.mean((0, 1)) ** 2).sum() / total),
        "prompt": float(cells * (centred.mean((0, 1)) ** 2).sum() / total),
    }
