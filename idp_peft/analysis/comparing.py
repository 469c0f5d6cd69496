"""The sums of a comparison of patterns, example by example, and what follows from them."""

from __future__ import annotations

from itertools import combinations

import numpy as np

from idp_peft.analysis.cka import Moments, cka
from idp_peft.analysis.pattern_comparison import PatternComparison
from idp_peft.analysis.similarity import AttentionSimilarity, Moves, TokenSimilarity, over_input
from idp_peft.analysis.taps import ATTENTION, ExamplePatterns


class _Activations:
    """One layer's activations of one part: the reference's against all models'."""

    def __init__(self, models: int, start: int | None, with_cka: bool) -> None:
        self.start = start
        self.tokens = [TokenSimilarity() for _ in range(models)]
        self.moves = None if start is None else Moves()
        self.of_reference = Moments() if with_cka else None
        self.of_models = [(Moments(), Moments()) for _ in range(models if with_cka else 0)]

    def add(self, x, ys: list) -> None:
        for similarity, y in zip(self.tokens, ys, strict=True):
            similarity.add(x, y)
        if self.moves is not None:
            self.moves.add(x, ys[self.start], ys)
        if self.of_reference is not None:
            self.of_reference.add(x, x)
        for (between, own), y in zip(self.of_models, ys, strict=False):
            between.add(x, y)
            own.add(y, y)

    def values(self, model: int) -> dict[str, float]:
        found = self.tokens[model].values()
        if self.of_reference is not None:
            moments = self.of_reference, *self.of_models[model]
            found |= {"cka": cka(*moments), "cka_debiased": cka(*moments, debiased=True)}
        if self.moves is not None and model != self.start:
            found |= self.moves.values(model)
        return found


class _Attention:
    """One layer's attention in one model: how far from others' it is, and where it goes."""

    def __init__(self) -> None:
        self.distances = {"reference": AttentionSimilarity(), "start": AttentionSimilarity()}
        self._rows, self._on_prompt, self._on_first = 0, 0.0, 0.0

    def add(self, own, on_prompt, skip: int, **others) -> None:
        """`own` `[heads, n, n]`, `on_prompt` `[heads, n]`; `others`: what it is compared with, by name."""
        rows = over_input(own, skip)
        for name, other in others.items():
            self.distances[name].add(over_input(other, skip), rows)
        queries = slice(skip + 1, None)
        self._rows += rows.shape[0] * rows.shape[1]
        self._on_prompt += float(on_prompt[:, queries].double().sum())
        self._on_first += float(own[:, queries, 0].double().sum())

    def shares(self) -> dict[str, float]:
        rows = self._rows or float("nan")
        return {"prompt_share": self._on_prompt / rows, "first_token_share": self._on_first / rows}

    def values(self, moves: bool) -> dict[str, float]:
        moved = {"moved": self.distances["start"].values()["distance"]} if moves else {}
        return self.distances["reference"].values() | moved | self.shares()


class Comparing:
    """See [`compare_patterns`], whose arguments these are."""

    def __init__(self, models: list[str], start: str | None, skip: int, with_cka: bool) -> None:
        self.models, self.start, self.skip, self.with_cka = models, start, skip, with_cka
        self.tokens = 0
        self._activations: dict[str, list[_Activations]] = {}
        self._attention: list[list[_Attention]] = []  # [models + 1][layers], the reference's own last

    def add(self, reference: ExamplePatterns, models: list[ExamplePatterns]) -> None:
        """One example, as the reference and each model have it."""
        self._check_shapes(reference, models)
        self.tokens += reference.tokens - self.skip
        start = None if self.start is None else self.models.index(self.start)
        for part, layers in reference.activations.items():
            if part not in self._activations:
                self._activations[part] = [_Activations(len(models), start, self.with_cka) for _ in layers]
            for layer, sums in enumerate(self._activations[part]):
                x, *ys = (each.activations[part][layer][self.skip :] for each in (reference, *models))
                sums.add(x, ys)
        if reference.attention is not None:
            self._add_attention(reference, models, start)

    def _add_attention(self, reference: ExamplePatterns, models: list[ExamplePatterns], start: int | None) -> None:
        if not self._attention:
            self._attention = [[_Attention() for _ in reference.attention] for _ in (*models, reference)]
        for number, (each, layers) in enumerate(zip((*models, reference), self._attention, strict=True)):
            for layer, sums in enumerate(layers):
                others = {} if each is reference else {"reference": reference.attention[layer]}
                if others and start is not None and number != start:
                    others["start"] = models[start].attention[layer]
                sums.add(each.attention[layer], each.prompt_attention[layer], self.skip, **others)

    def _check_shapes(self, reference: ExamplePatterns, models: list[ExamplePatterns]) -> None:
        expected = _shape(reference)
        for name, model in zip(self.models, models, strict=True):
            if _shape(model) != expected:
                raise ValueError(
                    f"{name!r} must have the reference's layers, width and heads {expected}, got {_shape(model)}: activations "
                    "are compared layer by layer and feature by feature"
                )

    def result(self, **more) -> PatternComparison:
        """What is known after all examples."""
        activations = {
            part: _by_measure({n: [s.values(i) for s in layers] for i, n in enumerate(self.models)})
            for part, layers in self._activations.items()
        }
        attention = _by_measure(
            {
                name: [sums.values(moves=self.start not in (None, name)) for sums in layers]
                for name, layers in zip(self.models, self._attention, strict=False)
            }
        )
        if self._attention:
            shares = np.array([sums.shares()["first_token_share"] for sums in self._attention[-1]])
            attention["first_token_share"] = {"reference": shares, **attention["first_token_share"]}
        return PatternComparison(
            models=self.models,
            start=self.start,
            skip=self.skip,
            tokens=self.tokens,
            activations=activations,
            attention=attention,
            agreement={part: self._agreements(layers) for part, layers in self._activations.items()},
            **more,
        )

    def _agreements(self, layers: list[_Activations]) -> dict[str, np.ndarray]:
        if self.start is None:
            return {}
        movers = [(i, name) for i, name in enumerate(self.models) if name != self.start]
        return {
            f"{one} / {other}": np.array([sums.moves.agreement(i, j) for sums in layers])
            for (i, one), (j, other) in combinations(movers, 2)
        }


def _shape(patterns: ExamplePatterns) -> dict[str, tuple[int, ...]]:
    found = {part: (len(layers), layers[0].shape[-1]) for part, layers in patterns.activations.items()}
    if patterns.attention is not None:
        found[ATTENTION] = (len(patterns.attention), patterns.attention[0].shape[0])
    return found


def _by_measure(models: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, np.ndarray]]:
    """From model -> per layer measure -> number, to measure -> model -> `[layers]`."""
    turned: dict[str, dict[str, np.ndarray]] = {}
    for name, layers in models.items():
        for measure in layers[0]:
            turned.setdefault(measure, {})[name] = np.array([layer[measure] for layer in layers])
    return turned
