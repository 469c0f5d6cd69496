"""A comparison of patterns as Markdown tables of means over layers."""

from __future__ import annotations

import numpy as np

_TITLES = {
    "hidden": "Residual stream behind each layer",
    "attention_output": "Output of the attention blocks",
    "mlp_output": "Output of the MLP blocks",
}
_COLUMNS = {
    "cosine": "cosine",
    "distance": "distance",
    "cka": "CKA",
    "cka_debiased": "CKA, debiased",
    "closed": "closed",
    "aside": "aside",
    "towards": "towards",
    "moved": "moved",
    "prompt_share": "on the prompt",
    "first_token_share": "on the first token",
}


def tables(comparison) -> str:
    """See [`PatternComparison.to_markdown`]."""
    without = f", the first {comparison.skip} of each left out" if comparison.skip else ""
    lines = [f"{comparison.tokens} tokens of {comparison.examples} examples{without}; means over layers."]
    for part, measures in comparison.activations.items():
        lines += ["", f"**{_TITLES[part]}**", "", *_table(measures, comparison.models)]
    if comparison.attention:
        lines += ["", "**Attention**", "", *_table(comparison.attention, ["reference", *comparison.models])]
    if any(comparison.agreement.values()):
        lines += ["", "**Cosine of the steps from the start**", "", *_agreement(comparison.agreement)]
    return "\n".join(lines) + "\n"


def _table(measures: dict, models: list[str]) -> list[str]:
    measures = {name: measures[name] for name in _COLUMNS if name in measures}
    lines = [f"| | {' | '.join(_COLUMNS[name] for name in measures)} |", "|---|" + "---:|" * len(measures)]
    for model in models:
        cells = [_mean(values[model]) if model in values else "" for values in measures.values()]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return lines


def _agreement(agreement: dict) -> list[str]:
    lines = [f"| | {' | '.join(agreement)} |", "|---|" + "---:|" * len(agreement)]
    for pair in next(iter(agreement.values())):
        lines.append(f"| {pair} | {' | '.join(_mean(pairs[pair]) for pairs in agreement.values())} |")
    return lines


def _mean(values: np.ndarray) -> str:
    known = values[~np.isnan(values)]
    return f"{known.mean():.4f}" if len(known) else ""
