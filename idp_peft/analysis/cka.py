"""Linear CKA of two sets of features (Kornblith et al. 2019, arXiv 1905.00414), from sums over tokens.

    CKA(X, Y) = HSIC(X, Y) / sqrt(HSIC(X, X) HSIC(Y, Y))        X `[tokens, d]`, Y `[tokens, e]`, one token per row

It is 1 where Y is X rotated, mirrored or scaled, and does not change when either is; other linear maps do change it.
"""

from __future__ import annotations

import math

import torch


class Moments:
    """Sums over tokens of two sets of features, float64, from which both HSICs follow exactly, whatever the batches were:
    `[d, e]` numbers instead of `[tokens, tokens]`.

    With kernels K = X X' and L = Y Y' it keeps the sums over tokens i of x_i, y_i, x_i y_i', k_ii, l_ii, k_ii l_ii,
    x_i l_ii and y_i k_ii. Features are first shifted by the mean of those that come first, which changes neither HSIC and
    keeps digits: some features of residual streams have a mean of thousands of times their spread.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._shift: tuple[torch.Tensor, torch.Tensor] | None = None
        self._sums: list[torch.Tensor] | None = None

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Count in some tokens: `x` `[tokens, d]`, `y` `[tokens, e]`."""
        x, y = x.double(), y.double()
        self._shift = (x.mean(0), y.mean(0)) if self._shift is None else self._shift
        x, y = x - self._shift[0], y - self._shift[1]
        k, l = x.square().sum(1), y.square().sum(1)  # noqa: E741  [tokens], the kernels' diagonals
        new = [x.sum(0), y.sum(0), x.T @ y, k.sum(), l.sum(), k @ l, l @ x, k @ y]
        self.tokens += len(x)
        self._sums = new if self._sums is None else [old + more for old, more in zip(self._sums, new, strict=True)]

    def hsic(self) -> float:
        """The biased estimator up to its factor: || Xc' Yc ||_F^2 of centred features."""
        x, y, xy, *_ = self._sums
        return float((xy - torch.outer(x, y) / self.tokens).square().sum())

    def debiased_hsic(self) -> float:
        """The unbiased estimator up to its factor (Song et al. 2012; Nguyen et al. 2020, arXiv 2010.15327, equation 3):

            tr(K L) + 1'K1 1'L1 / ((n-1) (n-2)) - 2 / (n-2) 1'K L1,      diagonals of K and L set to 0

        Needs n > 3 tokens, else it is NaN.
        """
        n = self.tokens
        if n < 4:
            return math.nan
        x, y, xy, k, l, kl, xl, yk = self._sums  # noqa: E741
        trace = xy.square().sum() - kl
        sums = (x @ x - k) * (y @ y - l)
        products = x @ xy @ y - x @ xl - y @ yk + kl
        return float(trace + sums / ((n - 1) * (n - 2)) - 2 / (n - 2) * products)


def cka(xx: Moments, xy: Moments, yy: Moments, debiased: bool = False) -> float:
    """Linear CKA from the moments of both sets with themselves and with each other.

    Args:
        debiased (`bool`): with unbiased HSICs. The biased one is too high where tokens are not many more than features;
            the debiased one can come out slightly below 0.

    Returns:
        `float`: NaN where a set does not vary at all, or (debiased) there are fewer than four tokens.
    """
    between, of_x, of_y = (m.debiased_hsic() if debiased else m.hsic() for m in (xy, xx, yy))
    scale = of_x * of_y
    return between / math.sqrt(scale) if scale > 0 else math.nan
