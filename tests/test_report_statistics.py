"""The report's statistics against published values, brute force and simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from idp_peft.report import choices
from idp_peft.report.bootstrap import Averaged, Resampled, interval
from idp_peft.report.choices import cross_fitted, other_uses
from idp_peft.report.statistics import entropy_bits, holm, mcnemar, ratio_mean, shares, wilson


def test_mcnemar_equals_the_enumeration_of_all_coin_tosses():
    for only_left, only_right in itertools.product(range(6), range(6)):
        left = np.array([1] * only_left + [0] * only_right + [1, 1, 0])
        right = np.array([0] * only_left + [1] * only_right + [1, 1, 0])
        total, gap = only_left + only_right, abs(only_left - only_right)
        tosses = [abs(2 * sum(toss) - total) >= gap for toss in itertools.product((0, 1), repeat=total)]
        assert mcnemar(left, right) == pytest.approx(np.mean(tosses))


def test_mcnemar_stays_exact_for_thousands_of_questions():
    left = np.repeat([1, 0], [1100, 1000])
    z = (100 - 1) / math.sqrt(2100)  # the normal approximation with continuity correction
    assert mcnemar(left, 1 - left) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)


def test_mcnemar_refuses_what_it_is_not_made_for():
    with pytest.raises(ValueError, match="must score the same items, got 2 and 3"):
        mcnemar(np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match="must be 0 or 1 for McNemar's test"):
        mcnemar(np.array([0.5]), np.array([1.0]))


def test_wilson_gives_the_published_intervals():
    # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3.
    published = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (successes, trials), ends in published.items():
        assert wilson(successes, trials) == pytest.approx(ends, abs=5e-5)
    with pytest.raises(ValueError, match=r"from 0 to `trials`.*got 3 of 2"):
        wilson(3, 2)


def test_holm_gives_the_textbook_correction_in_any_order():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_entropy_and_shares_count_only_items_that_chose():
    share = shares(np.array([0, 0, 1, -1, 2]), 4)
    assert share.tolist() == [0.5, 0.25, 0.25, 0.0]
    assert entropy_bits(share) == pytest.approx(1.5)
    assert entropy_bits(np.array([1.0, 0.0])) == 0.0


def documents(rng, count: int, true_gap: float):
    """Documents of unequal length whose two models differ by `true_gap` nats per token; longer ones differ more."""
    tokens = rng.integers(50, 500, count).astype(float)
    common = tokens * (3 + rng.standard_normal(count))
    gap = tokens * (true_gap + 0.1 * rng.standard_normal(count))
    return common + gap, common, tokens


def test_the_ratio_error_is_the_spread_over_repeated_studies():
    rng = np.random.default_rng(1)
    made = []
    for _ in range(2000):
        left, right, tokens = documents(rng, 60, 0.05)
        made.append(ratio_mean(left - right, tokens))
    means, errors = np.array(made).T
    assert means.mean() == pytest.approx(0.05, abs=0.001)
    assert errors.mean() == pytest.approx(means.std(), rel=0.05)
    assert ratio_mean(np.array([6.0]), np.array([2.0])) == (3.0, None)


def test_bootstrap_intervals_hold_the_truth_as_often_as_they_say():
    rng, held, false_alarms = np.random.default_rng(2), 0, 0
    for study in range(1000):
        left, right, tokens = documents(rng, 60, 0.0)
        gap = Resampled({"left": left, "right": right}, tokens, study, draws=400).difference("left", "right")
        held += gap.interval[0] <= 0 <= gap.interval[1]
        false_alarms += gap.p < 0.05
    # 95 % +- 0.7 % (one sigma of 1,000 studies); percentile intervals of 60 documents run about 1 % short.
    assert 0.92 <= held / 1000 <= 0.97
    assert 0.03 <= false_alarms / 1000 <= 0.08


def test_the_bootstrap_is_the_literal_one_and_pairs_its_columns():
    left, right, tokens = documents(np.random.default_rng(3), 30, 0.05)
    fast = Resampled({"l": left, "r": right}, tokens, 0, draws=4000)
    rng, slow = np.random.default_rng(4), []
    for _ in range(4000):
        drawn = rng.integers(0, 30, 30)
        slow.append((left[drawn].sum() - right[drawn].sum()) / tokens[drawn].sum())
    error = fast.difference("l", "r").standard_error
    assert np.std(fast.draws["l"] - fast.draws["r"]) == pytest.approx(np.std(slow), rel=0.05)
    assert fast.difference("l", "r").interval == pytest.approx(interval(np.array(slow)), abs=0.15 * error)
    again = Resampled({"l": left, "r": right}, tokens, 0, draws=4000)
    assert np.array_equal(fast.draws["l"], again.draws["l"])


def test_draws_in_several_blocks_are_as_many_as_asked_for(monkeypatch):
    monkeypatch.setattr("idp_peft.report.bootstrap._CELLS", 100)
    means = Resampled({"a": np.arange(30.0)}, np.ones(30), 0, draws=10)
    assert means.draws["a"].shape == (10,)
    assert len(set(means.draws["a"].tolist())) > 5


def test_recovery_is_the_ratio_and_its_interval_that_of_the_ratio():
    rng = np.random.default_rng(5)
    compressed, dense, tokens = documents(rng, 60, 0.25)
    noise = tokens * 0.02 * rng.standard_normal(60)
    columns = {"dense": dense, "compressed": compressed, "recovered": 0.6 * compressed + 0.4 * dense + noise}
    found = Resampled(columns, tokens, 0).recovery("recovered", "compressed", "dense", higher_is_better=False)
    assert found.value == pytest.approx(0.4, abs=0.05)
    assert found.interval[0] < 0.4 < found.interval[1]
    assert found.interval[1] - found.interval[0] < 0.1  # the errors of numerator and denominator are shared
    scores = {name: -values for name, values in columns.items()}
    mirrored = Resampled(scores, tokens, 0).recovery("recovered", "compressed", "dense", higher_is_better=True)
    assert mirrored.value == pytest.approx(found.value)


def test_there_is_no_recovery_of_a_damage_that_cannot_be_seen():
    left, right, tokens = documents(np.random.default_rng(6), 60, 0.0)
    means = Resampled({"dense": left, "compressed": right, "recovered": left}, tokens, 0)
    assert means.recovery("recovered", "compressed", "dense", False).value is None
    assert means.recovery("recovered", "compressed", "dense", False).reason == "damage not distinguishable from 0"
    better, dense, tokens = documents(np.random.default_rng(6), 60, -0.3)
    means = Resampled({"dense": dense, "compressed": better}, tokens, 0)
    assert means.recovery("compressed", "compressed", "dense", False).reason == "compressed is better than dense"


def test_equal_models_do_not_differ_whatever_the_rounding():
    values = np.random.default_rng(7).random(50) * 300
    means = Resampled({"a": values, "b": (values * 7) / 7 + 1e-13}, np.full(50, 200.0), 0)
    assert means.difference("a", "b").p == 1.0
    assert means.difference("a", "b").interval == (0.0, 0.0)


def test_one_item_has_a_mean_but_no_interval():
    means = Resampled({"a": np.array([2.0]), "b": np.array([1.0])}, np.ones(1), 0)
    gap = means.difference("a", "b")
    assert (gap.value, gap.standard_error, gap.interval, gap.p) == (1.0, None, None, None)
    assert Averaged([means, means]).difference("a", "b").interval is None


def test_the_mean_over_tasks_counts_every_task_the_same():
    rng = np.random.default_rng(8)
    parts = [Resampled({"a": rng.random(n), "b": np.zeros(n)}, np.ones(n), n) for n in (20, 200)]
    mean = Averaged(parts)
    assert mean.points["a"] == pytest.approx((parts[0].points["a"] + parts[1].points["a"]) / 2)
    gap = mean.difference("a", "b")
    assert np.std(mean.draws["a"]) == pytest.approx(gap.standard_error, rel=0.1)


def test_random_oracle_and_same_items_single_prompt_are_what_they_say():
    nats = np.array([[1.0, 2.0, 9.0], [5.0, 1.0, 9.0], [1.0, 2.0, 9.0]])
    uses = other_uses(nats, is_text=True, seed=0)
    assert uses[choices.RANDOM].tolist() == [4.0, 5.0, 4.0]
    assert uses[choices.ORACLE].tolist() == [1.0, 1.0, 1.0]
    assert uses[choices.SAME_ITEMS].tolist() == [2.0, 1.0, 2.0]
    scores = other_uses(-nats, is_text=False, seed=0)
    assert scores[choices.ORACLE].tolist() == [-1.0, -1.0, -1.0]
    assert choices.SINGLE not in other_uses(nats[:1], is_text=True, seed=0)


def test_the_cross_fitted_single_prompt_is_not_flattered_by_its_own_items():
    rng, honest, flattered = np.random.default_rng(9), [], []
    for study in range(200):  # twenty prompts that are all alike: the best one is luck
        values = 3 + rng.standard_normal((40, 20))
        honest.append(cross_fitted(values, values, study, halvings=10).mean())
        flattered.append(other_uses(values, True, study)[choices.SAME_ITEMS].mean())
    assert np.mean(honest) == pytest.approx(3.0, abs=0.03)
    assert np.mean(flattered) < 2.8


def test_the_cross_fitted_single_prompt_is_the_good_one_where_there_is_one():
    values = np.random.default_rng(10).random((31, 4)) + np.array([1, 1, 0, 1])
    assert np.allclose(cross_fitted(values, values, 0), values[:, 2])
    assert np.allclose(cross_fitted(-values, values, 0), -values[:, 2])


def test_the_weighted_mean_and_its_error_allow_for_the_length_of_each_item():
    tokens = np.array([10.0, 100.0, 1000.0])
    assert ratio_mean(3 * tokens, tokens)[1] == pytest.approx(0.0, abs=1e-12)
    assert np.allclose(Resampled({"a": 3 * tokens}, tokens, 0).draws["a"], 3.0)


def test_four_items_that_agree_prove_nothing():
    gap = Resampled({"a": np.full(4, 2.0), "b": np.zeros(4)}, np.ones(4), 0).difference("a", "b")
    assert gap.p == 0.125
