"""The result of comparing patterns: numbers per measure, model and layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True, repr=False)
class PatternComparison:
    """How far models are from a reference, layer by layer. `print` it, `plot()` it, or take it apart.

    Every array is float64 `[layers]`, a mean over tokens (of attention: over heads and query tokens), and NaN where a
    number is not defined.

    Args:
        models (`list[str]`): what was compared with the reference.
        start (`str`, *optional*): the model that the others repair.
        skip (`int`): first tokens of each example that were left out.
        tokens (`int`): tokens that were compared.
        examples (`int`): examples they stand in.
        activations (`dict`): part -> measure -> model -> array. Measures: `cosine` (1: same direction), `distance`
            (||y - x|| / ||x|| of each token), `cka` and `cka_debiased` (linear CKA over all tokens, 1: the same up to rotation
            and scale); with `start`, for the others: `closed` (share of the way from the start to the reference that the
            model goes, 1: all of it, negative: away), `aside` (how far it moves across that way, as a multiple of its
            length) and `towards` (cosine of its step and the way).
        attention (`dict`): measure -> model -> array. `distance` (Jensen-Shannon, 0 to 1) and `cosine` of rows made to sum
            to 1 over the input's own positions; `prompt_share` and `first_token_share`, the shares of all attention that
            fall on prompt positions and on the input's first token (`"reference"` is the reference's own); with `start`,
            `moved`: distance from the start's attention.
        agreement (`dict`): part -> `"one / other"` -> array: cosine of the steps that two models take from the start.
        prompt_ids (`dict`): model -> the prompt of each example, for models with an IDP adapter.
    """

    models: list[str]
    start: str | None
    skip: int
    tokens: int
    examples: int
    activations: dict[str, dict[str, dict[str, np.ndarray]]]
    attention: dict[str, dict[str, np.ndarray]]
    agreement: dict[str, dict[str, np.ndarray]]
    prompt_ids: dict[str, list[int]]

    def to_dict(self) -> dict:
        """Plain lists and numbers for a JSON file; what is not defined is `None`. [`from_dict`] reads it again."""
        return _mapped(asdict(self), _to_list)

    @classmethod
    def from_dict(cls, content: dict) -> PatternComparison:
        """The comparison that [`to_dict`] wrote."""
        values = ("activations", "attention", "agreement")
        return cls(**{key: _mapped(value, _to_array) if key in values else value for key, value in content.items()})

    def to_markdown(self) -> str:
        """Tables, each number the mean over layers: one table per part, then attention, then agreement."""
        from idp_peft.analysis.pattern_text import tables

        return tables(self)

    def plot(self, measures: Sequence[str] | None = None):
        """`matplotlib.figure.Figure`: a panel per measure, layers from left to right, one line per model.

        Drawn without pyplot: no window opens, and the caller's figures and backend are left alone. A notebook shows it.

        Args:
            measures (`list[str]`, *optional*, defaults to all of them): of activations `"cosine"`, `"cka_debiased"`,
                `"closed"` and `"aside"`, of attention `"distance"`, `"prompt_share"` and `"first_token_share"`.

        Raises:
            `ValueError`: for others, or where none of them is in this comparison.
        """
        from idp_peft.analysis.pattern_figure import draw

        return draw(self, measures)

    def __str__(self) -> str:
        return self.to_markdown()

    def __repr__(self) -> str:
        return f"PatternComparison({', '.join(self.models)}; {self.tokens} tokens of {self.examples} examples)"


def _mapped(content, of_leaf):
    return (
        {key: _mapped(value, of_leaf) for key, value in content.items()}
        if isinstance(content, dict)
        else of_leaf(content)
    )


def _to_list(value):
    return [None if np.isnan(x) else float(x) for x in value] if isinstance(value, np.ndarray) else value


def _to_array(value) -> np.ndarray:
    return np.array([np.nan if x is None else x for x in value], dtype=np.float64)
