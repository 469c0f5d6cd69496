"""Does choosing help? What other uses of the same prompts would have scored, from every prompt's value on every item.

    random    mean over prompts: a random choice, in expectation
    oracle    best prompt of each item, picked by its own value: a bound that no honest choice can reach
    single    one prompt for all items

The best single prompt picked on the items it is scored on looks better than it is (the luckiest of M). So it is
cross-fitted: picked on one half of the items, scored on the other, both ways, and that averaged over many halvings.
"""

from __future__ import annotations

import numpy as np

HALVINGS = 100

SINGLE = "its best single prompt (cross-fitted)"
SAME_ITEMS = "its best single prompt (picked on these items: optimistic)"
RANDOM = "random choice (expected)"
ORACLE = "oracle choice (bound)"


def other_uses(by_prompt: np.ndarray, is_text: bool, seed) -> dict[str, np.ndarray]:
    """Each item's value under other uses of the prompts.

    Args:
        by_prompt (`np.ndarray`): float64 `[items, num_prompts]`, nats of a document or score of a question.
        is_text (`bool`): nats, where less is better; else scores.
        seed: of the halvings; anything `numpy.random.default_rng` takes.

    Returns:
        `dict[str, np.ndarray]`: use -> float64 `[items]`; without `SINGLE` for a single item, which has no halves.
    """
    cost = by_prompt if is_text else -by_prompt
    uses = {
        SAME_ITEMS: by_prompt[:, cost.sum(0).argmin()],
        RANDOM: by_prompt.mean(1),
        ORACLE: by_prompt[np.arange(len(cost)), cost.argmin(1)],
    }
    if len(by_prompt) > 1:
        uses[SINGLE] = cross_fitted(by_prompt, cost, seed)
    return uses


def cross_fitted(by_prompt: np.ndarray, cost: np.ndarray, seed, halvings: int = HALVINGS) -> np.ndarray:
    """Each item's value under the prompt that the *other* half of the items picks, averaged over seeded halvings.

    Args:
        by_prompt, cost (`np.ndarray`): float64 `[items, num_prompts]`, the value, and what the pick minimises in sum.
        seed: anything `numpy.random.default_rng` takes.
        halvings (`int`, defaults to `100`): how many random halvings; more of them make the split matter less.

    Returns:
        `np.ndarray`: float64 `[items]`.
    """
    rng, items = np.random.default_rng(seed), len(by_prompt)
    total, everything = np.zeros(items), cost.sum(0)
    for _ in range(halvings):
        first = np.zeros(items, dtype=bool)
        first[rng.permutation(items)[: items // 2]] = True
        of_first = cost[first].sum(0)
        picked_on_first, picked_on_second = of_first.argmin(), (everything - of_first).argmin()
        total += np.where(first, by_prompt[:, picked_on_second], by_prompt[:, picked_on_first])
    return total / halvings
