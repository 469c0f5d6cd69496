"""The measures of the pattern comparison against their definitions, written out slowly."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from idp_peft.analysis.cka import Moments, cka
from idp_peft.analysis.similarity import AttentionSimilarity, Moves, TokenSimilarity, jensen_shannon, over_input


def features(tokens=30, width=8, seed=0, offset=3.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, width, generator=generator) + offset


def related(x: torch.Tensor, width=8, seed=1) -> torch.Tensor:
    """Features that share some of what `x` says."""
    generator = torch.Generator().manual_seed(seed)
    return x @ torch.randn(x.shape[1], width, generator=generator) + 2 * features(len(x), width, seed)


def fast(x, y, debiased=False, batches=(30,)) -> float:
    moments = [Moments() for _ in range(3)]
    for part_x, part_y in zip(x.split(batches), y.split(batches), strict=True):
        for sums, (one, other) in zip(moments, ((part_x, part_x), (part_x, part_y), (part_y, part_y)), strict=True):
            sums.add(one, other)
    return cka(*moments, debiased=debiased)


def gram(x: torch.Tensor) -> np.ndarray:
    return (x.double() @ x.double().T).numpy()


def slow_cka(x, y) -> float:
    """Kornblith et al. 2019, equation 3 and section 3: centred Gram matrices `[tokens, tokens]`."""
    n = len(x)
    centre = np.eye(n) - np.ones((n, n)) / n

    def hsic(k, l):  # noqa: E741
        return np.trace(k @ centre @ l @ centre) / (n - 1) ** 2

    k, l = gram(x), gram(y)  # noqa: E741
    return hsic(k, l) / math.sqrt(hsic(k, k) * hsic(l, l))


def slow_debiased_cka(x, y) -> float:
    """Nguyen et al. 2020, equation 3, token pair by token pair."""
    n = len(x)
    one = np.ones(n)

    def hsic(k, l):  # noqa: E741
        between = (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
        return (np.trace(k @ l) + between - 2 / (n - 2) * (one @ k @ l @ one)) / (n * (n - 3))

    k, l = gram(x), gram(y)  # noqa: E741
    np.fill_diagonal(k, 0)
    np.fill_diagonal(l, 0)
    return hsic(k, l) / math.sqrt(hsic(k, k) * hsic(l, l))


@pytest.mark.parametrize("width", [5, 8, 40])  # of the second set: other widths than the first's, more than tokens
def test_cka_is_its_definition_with_gram_matrices(width):
    x = features()
    y = related(x, width)
    assert 0.05 < slow_cka(x, y) < 0.95
    assert fast(x, y) == pytest.approx(slow_cka(x, y), rel=1e-9)
    assert fast(x, y, debiased=True) == pytest.approx(slow_debiased_cka(x, y), rel=1e-9)


@pytest.mark.parametrize("debiased", [False, True])
def test_cka_does_not_depend_on_the_batches(debiased):
    x = features()
    y = related(x)
    assert fast(x, y, debiased, (1, 9, 20)) == pytest.approx(fast(x, y, debiased), rel=1e-12)


@pytest.mark.parametrize("debiased", [False, True])
def test_cka_ignores_rotation_scale_and_shift_and_nothing_else(debiased):
    x = features()
    y = related(x)
    rotation = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(3)))[0]
    for changed in (y @ rotation, -4.5 * y, y + torch.arange(8)):
        assert fast(x, changed, debiased) == pytest.approx(fast(x, y, debiased), rel=1e-5)
        assert fast(y, changed, debiased) == pytest.approx(1, abs=1e-6)
    stretched = y * torch.tensor([20.0, 1, 1, 1, 1, 1, 1, 0.1])
    assert abs(fast(x, stretched, debiased) - fast(x, y, debiased)) > 0.01
    assert fast(y, stretched, debiased) < 0.95


def test_cka_keeps_its_digits_beside_a_large_mean():
    """Residual streams have features whose mean is thousands of times their spread."""
    x, y = features(offset=0), related(features(offset=0))
    assert fast(x.double() + 3000, y.double() + 3000) == pytest.approx(slow_cka(x, y), rel=1e-5)
    assert fast(x.double() + 3000, y.double() + 3000, True) == pytest.approx(slow_debiased_cka(x, y), rel=1e-4)


def test_with_few_tokens_the_debiased_cka_of_unrelated_features_is_near_zero_and_the_biased_one_is_not():
    pairs = [(features(30, 100, seed), features(30, 100, 100 + seed)) for seed in range(5)]
    assert min(fast(x, y) for x, y in pairs) > 0.5
    assert abs(np.mean([fast(x, y, debiased=True) for x, y in pairs])) < 0.05


def test_cka_of_too_little_is_not_a_number():
    x = features(3)
    assert math.isnan(fast(x, x, debiased=True, batches=(3,)))
    assert math.isnan(fast(torch.zeros(30, 8), features()))


def test_cosine_and_distance_are_means_over_tokens():
    x, sums = features(), TokenSimilarity()
    y = related(x)
    sums.add(x[:10], y[:10])
    sums.add(x[10:], y[10:])
    pairs = list(zip(x.double().numpy(), y.double().numpy(), strict=True))
    norm = np.linalg.norm
    assert sums.values() == pytest.approx(
        {
            "cosine": np.mean([a @ b / norm(a) / norm(b) for a, b in pairs]),
            "distance": np.mean([norm(b - a) / norm(a) for a, b in pairs]),
        }
    )


def moves(x, start, *ys) -> Moves:
    sums = Moves()
    sums.add(x[:10], start[:10], [y[:10] for y in ys])
    sums.add(x[10:], start[10:], [y[10:] for y in ys])
    return sums


def test_a_step_is_split_into_the_way_to_the_reference_and_what_goes_aside():
    x, start = features(), features(seed=1)
    half, away, there = start + (x - start) / 2, start - (x - start), x
    along = ((x - start) / x.norm(dim=1, keepdim=True)).flatten()
    step = torch.randn(along.shape, generator=torch.Generator().manual_seed(2))
    step = (step - step @ along / (along @ along) * along).view_as(x) * x.norm(dim=1, keepdim=True)  # across the way
    sums = moves(x, start, half, away, there, start + step, start)
    found = [sums.values(i) for i in range(5)]
    assert [f["closed"] for f in found] == pytest.approx([0.5, -1, 1, 0, 0], abs=1e-6)
    across = float((step / x.norm(dim=1, keepdim=True)).norm() / along.norm())
    assert [f["aside"] for f in found] == pytest.approx([0, 0, 0, across, 0], abs=1e-3)
    assert [f["towards"] for f in found[:4]] == pytest.approx([1, -1, 1, 0], abs=1e-6)
    assert math.isnan(found[4]["towards"])
    assert sums.agreement(0, 1) == pytest.approx(-1)
    assert sums.agreement(0, 3) == pytest.approx(0, abs=1e-6)
    assert math.isnan(sums.agreement(0, 4))


def test_every_token_counts_by_its_own_length():
    """A token a thousand times as long decides nothing alone."""
    x, start = features(), features(seed=1)
    y = start + 0.5 * (x - start)
    y[0] = start[0]  # this one does not move
    found = moves(x, start, y).values(0)["closed"]
    x, start, y = (torch.cat([1000 * part[:1], part[1:]]) for part in (x, start, y))
    assert moves(x, start, y).values(0)["closed"] == pytest.approx(found, rel=1e-5)
    gaps = ((x - start).norm(dim=1) / x.norm(dim=1)).square()
    assert found == pytest.approx(0.5 * float(gaps[1:].sum() / gaps.sum()), rel=1e-5)


def test_steps_without_a_gap_have_no_direction():
    x = features()
    assert all(math.isnan(value) for value in moves(x, x, related(x)).values(0).values())


def slow_jensen_shannon(p, q) -> float:
    middle = (p + q) / 2
    terms = [a * math.log2(a / m) / 2 for row in (p, q) for a, m in zip(row, middle, strict=True) if a > 0]
    return math.sqrt(sum(terms))


def test_the_jensen_shannon_distance_is_its_definition():
    p, q = torch.rand(2, 6, 5, generator=torch.Generator().manual_seed(0))
    p[0, 1] = q[0, 2] = q[1, 1] = p[1, 1] = 0  # keys that one or neither looks at
    p, q = (rows / rows.sum(-1, keepdim=True) for rows in (p, q))
    for distance, one, other in zip(jensen_shannon(p, q), p.double().numpy(), q.double().numpy(), strict=True):
        assert distance == pytest.approx(slow_jensen_shannon(one, other), rel=1e-5)
    assert jensen_shannon(p, p).tolist() == [0.0] * 6
    assert jensen_shannon(torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 0.5, 0.5])) == 1.0


def test_rows_that_all_but_agree_have_a_small_distance_and_not_a_rounding_error():
    p = torch.rand(200, generator=torch.Generator().manual_seed(0))
    p = p / p.sum()
    q = p + 1e-6 * p.mean() * torch.tensor([1.0, -1.0]).repeat(100)
    exact = slow_jensen_shannon(p.double().numpy(), q.double().numpy())
    assert exact < 1e-6
    assert jensen_shannon(p, q) < 2e-6


def attention(seed=0, heads=2, n=5, prompt=0.0) -> torch.Tensor:
    logits = torch.randn(heads, n, n, generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(n, n).tril().bool()
    return (1 - prompt) * logits.masked_fill(~mask, -torch.inf).softmax(-1)


@pytest.mark.parametrize("skip", [0, 2])
def test_attention_is_compared_over_the_inputs_own_positions(skip):
    one, other = attention(0), attention(1, prompt=0.7)
    sums = AttentionSimilarity()
    sums.add(over_input(one, skip), over_input(other, skip))
    distances, cosines = [], []
    for head in range(2):
        for query in range(skip + 1, 5):  # one with a single key has nothing to decide
            p, q = (rows[head, query, skip : query + 1].double().numpy() for rows in (one, other))
            p, q = p / p.sum(), q / q.sum()
            distances.append(slow_jensen_shannon(p, q))
            cosines.append(p @ q / np.linalg.norm(p) / np.linalg.norm(q))
    assert len(distances) == 2 * (4 - skip)
    assert sums.values() == pytest.approx({"distance": np.mean(distances), "cosine": np.mean(cosines)}, rel=1e-5)


def test_attention_of_no_query_with_a_choice_is_not_a_number():
    sums = AttentionSimilarity()
    sums.add(over_input(attention(0), 4), over_input(attention(1), 4))
    assert math.isnan(sums.values()["distance"])
