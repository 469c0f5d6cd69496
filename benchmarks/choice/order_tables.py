"""What the order of the bank does to a choice, in words and as a table."""

from __future__ import annotations

import numpy as np

from benchmarks.choice.orders import dependence, explained
from benchmarks.choice.records import Bank
from benchmarks.common.markdown import head, row


def order_sentence(banks: list[Bank]) -> str:
    """Whether IDP's own choice depends on the order of the bank."""
    parts = [bank.record["orders"]["idp"] for bank in banks]
    changing = sum(value > 0 for part in parts for value in part["changing"])
    largest = max(max(part["largest_difference"]) for part in parts)
    return (
        f"IDP, {parts[0]['orders']} orders of the bank, {banks[0].record['settings']['every_order_blocks']} blocks, every "
        f"layer: scores differ by at most {largest:.1e} of the greatest; in {changing} of "
        f"{sum(len(part['changing']) for part in parts)} layers the choice of some block depends on the order."
    )


def naive_table(banks: list[Bank]) -> str:
    """What the order of the bank does in the naive view, mean over seeds."""
    orders, layers = (banks[0].record["orders"]["naive"][name] for name in ("orders", "layers"))
    scores = [np.array(bank.record["orders"]["naive"]["scores"]) for bank in banks]  # [orders, layers, items, M] each
    lines = [
        f"Naive view, {len(orders)} balanced orders, {scores[0].shape[2]} blocks: how many choose "
        "another prompt in some order; how often the choice is the prompt at the first and at the last place; what of the "
        "scores' variance within items the place and the prompt explain; and what of the attention on prompts falls on the "
        "very first token. Beside it, IDP: what of the attention on a prompt falls on that prompt's own first token.",
        "",
        *head(
            [
                "layer",
                "choice depends on the order",
                "first place",
                "last place",
                "variance: place",
                "prompt",
                "first token",
                "IDP: first tokens",
            ]
        ),
    ]
    for index, layer in enumerate(layers):
        seen = [dependence(part[:, index], orders) for part in scores]
        parts = [explained(part[:, index], orders) for part in scores]
        values = [
            np.mean([one.changing for one in seen]),
            *np.mean([[one.at_place[0], one.at_place[-1]] for one in seen], axis=0),
            np.mean([one["place"] for one in parts]),
            np.mean([one["prompt"] for one in parts]),
            np.mean([np.array(bank.record["orders"]["naive"]["first_token"])[:, index] for bank in banks]),
            np.mean([bank.record["orders"]["idp"]["first_token"][layer] for bank in banks]),
        ]
        lines.append(row([str(layer), *(f"{100 * value:.0f} %" for value in values)]))
    return "\n".join(lines)
