"""What the score of each layer says and brings, over the seeds of one bank.

Items are resampled, the same ones for every seed; a pooled number is the mean over the seeds. Holm's correction is over the
layers, for each of the three tests.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from benchmarks.choice.agreement import (
    between_items,
    draw_items,
    permutation_p,
    resampled_two_way,
    two_way,
    within_items,
)
from benchmarks.choice.records import Bank
from idp_peft.report.bootstrap import Estimate, Resampled, interval
from idp_peft.report.choices import ORACLE, RANDOM, SINGLE, cross_fitted, other_uses
from idp_peft.report.statistics import entropy_bits, holm, shares

SEED = 0
BY_CONTEXT = "choice by the context's own loss"
BY_LAYER_0 = "choice by attention, layer 0"
BY_ANY_LAYER = "choice by attention, layer cross-fitted"


@dataclass
class Row:
    """One score: that of a layer, or minus the context's loss.

    Args:
        within (`Estimate`): mean rank correlation within items.
        two_way (`Estimate`): two-way centred correlation; its `p` is the permutation test's.
        over_random, over_single (`Estimate`): nats per token of the choice minus those of a random one, and of the best
            single prompt (cross-fitted).
        between (`list`): per seed, the two-way correlation of each prompt's own column.
        entropy (`float`): of the choices, in bits, mean over seeds.
        counts (`list`): per seed, how many items chose each prompt.
        holm (`dict`): name of a field -> p after Holm's correction over the layers.
    """

    within: Estimate
    two_way: Estimate
    over_random: Estimate
    over_single: Estimate
    between: list[list[float]]
    entropy: float
    counts: list[list[int]]
    holm: dict


@dataclass
class Analysis:
    """All of a group under one reduction: a row per layer, the context's loss, and the uses of its prompts."""

    layers: list[Row]
    context: Row
    uses: Resampled


def analyse(banks: list[Bank], reduction: str) -> Analysis:
    """Analyse the seeds of one bank together."""
    times = draw_items(len(banks[0].nats), SEED)
    by_layer = [chosen_nats(bank.nats, bank.scores(reduction)) for bank in banks]  # [items, layers] each
    by_context = [chosen_nats(bank.nats, -bank.context[None]) for bank in banks]  # [items, 1] each
    columns = {
        use: _mean([other_uses(bank.nats, True, SEED)[use] for bank in banks]) for use in (RANDOM, SINGLE, ORACLE)
    }
    columns |= {layer: values for layer, values in enumerate(_mean(by_layer).T)}
    columns |= {
        BY_LAYER_0: columns[0],
        BY_ANY_LAYER: _mean([cross_fitted(part, part, SEED) for part in by_layer]),
        BY_CONTEXT: _mean(by_context)[:, 0],
    }
    uses = Resampled(columns, np.ones(len(times[0])), SEED)
    logs = [np.log(bank.scores(reduction)) for bank in banks]
    rows = [_row(banks, [log[layer] for log in logs], uses, layer, times) for layer in range(len(logs[0]))]
    context = _row(banks, [-bank.context for bank in banks], uses, BY_CONTEXT, times)
    for test in ("two_way", "over_random", "over_single"):
        for row, p in zip(rows, holm([getattr(row, test).p for row in rows]), strict=True):
            row.holm[test] = p
    return Analysis(rows, context, uses)


def chosen_nats(nats: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Nats of each item under the prompt that each of several scores chooses, `[items, scores]`.

    Args:
        nats (`np.ndarray`): `[items, M]`.
        scores (`np.ndarray`): `[scores, items, M]`.
    """
    return np.take_along_axis(nats, scores.argmax(-1).T, axis=1)


def _row(banks: list[Bank], scores: list[np.ndarray], uses: Resampled, column, times: np.ndarray) -> Row:
    pairs = [(score, -bank.nats) for score, bank in zip(scores, banks, strict=True)]
    within = _mean([within_items(*pair) for pair in pairs])  # [items]
    together = float(np.mean([two_way(*pair) for pair in pairs]))
    drawn = _mean([resampled_two_way(*pair, times) for pair in pairs])
    prompts = banks[0].nats.shape[1]
    chosen = [score.argmax(-1) for score in scores]
    return Row(
        within=Estimate(float(within.mean()), interval=interval(times @ within / len(within))),
        two_way=Estimate(together, interval=interval(drawn), p=permutation_p(pairs, SEED)),
        over_random=uses.difference(column, RANDOM),
        over_single=uses.difference(column, SINGLE),
        between=[between_items(*pair).tolist() for pair in pairs],
        entropy=float(np.mean([entropy_bits(shares(part, prompts)) for part in chosen])),
        counts=[np.bincount(part, minlength=prompts).tolist() for part in chosen],
        holm={},
    )


def _mean(parts: list[np.ndarray]) -> np.ndarray:
    return np.mean(parts, axis=0)
