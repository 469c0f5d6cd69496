"""How alike two models' activations and attention are, token by token, as sums that grow example by example."""

from __future__ import annotations

import math

import torch

_TINY = torch.finfo(torch.float32).tiny


class TokenSimilarity:
    """Cosine and distance of a model's activations y to the reference's x, as means over tokens.

    distance = mean_t ||y_t - x_t|| / ||x_t||.
    """

    def __init__(self) -> None:
        self.tokens, self._cosine, self._distance = 0, 0.0, 0.0

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """`x`, `y`: `[tokens, hidden]`."""
        self.tokens += len(x)
        x, y = x.double(), y.double()
        norms = x.norm(dim=1).clamp(min=_TINY)
        cosines = (x * y).sum(1) / (norms * y.norm(dim=1).clamp(min=_TINY))
        self._cosine += float(cosines.sum())
        self._distance += float(((y - x).norm(dim=1) / norms).sum())

    def values(self) -> dict[str, float]:
        return {"cosine": self._cosine / self.tokens, "distance": self._distance / self.tokens}


class Moves:
    """The steps that models take from where they start, m = y - c, against the step that would lead to the reference,
    g = x - c, summed over tokens, each token divided by ||x_t|| so that a few huge ones do not decide.

        closed  = <m, g> / <g, g>          0: no nearer, 1: the whole way, negative: away
        aside   = || m - closed g || / ||g||       what is moved across that way
        towards = <m, g> / (||m|| ||g||)           the cosine of the two steps

    What is left of the gap is then sqrt((1 - closed)^2 + aside^2).
    """

    def __init__(self) -> None:
        self._products: torch.Tensor | None = None

    def add(self, x: torch.Tensor, c: torch.Tensor, ys: list[torch.Tensor]) -> None:
        """`x` (reference), `c` (start) and each of `ys` (models): `[tokens, hidden]`."""
        x, c = x.double(), c.double()
        norms = x.norm(dim=1, keepdim=True).clamp(min=_TINY)
        steps = torch.stack([((end - c) / norms).flatten() for end in (x, *ys)])  # [1 + models, tokens * hidden]
        products = steps @ steps.T
        self._products = products if self._products is None else self._products + products

    def values(self, model: int) -> dict[str, float]:
        """Of one model: `closed`, `aside` and `towards`; NaN where the start is the reference (or the model the start)."""
        gap, along, moved = (float(self._products[i, j]) for i, j in ((0, 0), (0, model + 1), (model + 1, model + 1)))
        closed = _ratio(along, gap)
        aside = math.sqrt(max(0.0, _ratio(moved, gap) - closed**2)) if gap > 0 else math.nan
        return {"closed": closed, "aside": aside, "towards": _ratio(along, math.sqrt(gap * moved))}

    def agreement(self, one: int, other: int) -> float:
        """Cosine of the steps that two models take."""
        product, first, second = (self._products[i + 1, j + 1] for i, j in ((one, other), (one, one), (other, other)))
        return _ratio(float(product), math.sqrt(float(first * second)))


class AttentionSimilarity:
    """Distance and cosine of two models' attention, as means over heads and query tokens.

    Attention on a prompt has no counterpart in a model without one, so rows are first made to sum to 1 over the input's
    own positions. `distance` is the Jensen-Shannon distance, the square root of the divergence with logarithms to base 2:
    0 for equal rows, 1 for rows without a key in common.
    """

    def __init__(self) -> None:
        self.rows, self._sums = 0, torch.zeros(2, dtype=torch.float64)

    def add(self, one: torch.Tensor, other: torch.Tensor) -> None:
        """`one`, `other`: `[heads, queries, keys]`, rows that sum to 1."""
        self.rows += one.shape[0] * one.shape[1]
        values = (jensen_shannon(one, other), torch.cosine_similarity(one, other, dim=-1))
        self._sums += torch.stack([value.double().sum() for value in values])

    def values(self) -> dict[str, float]:
        distance, cosine = (self._sums / self.rows).tolist() if self.rows else (math.nan, math.nan)
        return {"distance": distance, "cosine": cosine}


def over_input(attention: torch.Tensor, skip: int) -> torch.Tensor:
    """Attention among the input's tokens from number `skip` on, rows made to sum to 1, of queries with two keys or more.

    Args:
        attention (`torch.Tensor`): `[heads, n, n]`.

    Returns:
        `torch.Tensor`: `[heads, n-skip-1, n-skip]`.
    """
    rows = attention[:, skip + 1 :, skip:]
    return rows / rows.sum(-1, keepdim=True).clamp(min=_TINY)


def jensen_shannon(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon distance along the last dimension, from 0 to 1.

    In u = (p - q) / (p + q), since rows that all but agree would lose their difference in p log p - m log m.
    """
    both = p + q
    u = (p - q) / both.clamp(min=_TINY)
    low = torch.finfo(u.dtype).eps - 1  # log1p(-1) is infinite, and what it is multiplied with 0
    divergence = both / 4 * ((1 + u) * torch.log1p(u.clamp(min=low)) + (1 - u) * torch.log1p((-u).clamp(min=low)))
    return (divergence.sum(-1) / math.log(2)).clamp(0, 1).sqrt()


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan
