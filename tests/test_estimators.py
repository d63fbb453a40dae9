"""Estimators against numbers worked out by hand, exact fractions, and enumeration of all subsets."""

from fractions import Fraction
from itertools import combinations
from math import comb

import numpy as np
import pytest

from scope_fast.estimators import (
    Estimate,
    ProcessBenchScores,
    draws,
    estimate,
    first_error_label,
    majority_at_k,
    pass_at_k,
    point,
    process_bench,
)


@pytest.mark.parametrize(
    ("n", "c", "k", "value"),
    [
        (4, 1, 1, 1 / 4),
        (4, 1, 2, 1 / 2),  # the correct one is in 3 of 6 pairs
        (5, 2, 2, 7 / 10),  # 3 of 10 pairs miss both
        (5, 2, 4, 1.0),  # three wrong ones cannot fill four places
        (5, 0, 3, 0.0),
        (5, 5, 1, 1.0),
        (1, 0, 1, 0.0),
        (1, 1, 1, 1.0),
    ],
)
def test_pass_at_k_by_hand(n, c, k, value):
    assert pass_at_k(n, c, k) == pytest.approx(value, abs=1e-15)


def test_pass_at_k_counts_the_subsets_with_a_correct_sample():
    flags = [True, False, False, True, False, False, False]
    for k in range(1, 8):
        subsets = list(combinations(flags, k))
        assert pass_at_k(7, 2, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


def test_pass_at_k_is_exact_where_factorials_overflow():
    exact = 1 - Fraction(comb(99_990, 5_000), comb(100_000, 5_000))
    assert pass_at_k(100_000, 10, 5_000) == pytest.approx(float(exact), rel=1e-12)


@pytest.mark.parametrize(
    ("n", "c", "k", "message"),
    [(4, 5, 1, "num_correct=5"), (4, -1, 1, "num_correct=-1"), (4, 1, 5, "k=5: expected 1 to the 4"), (4, 1, 0, "k=0")],
)
def test_pass_at_k_refuses_what_cannot_be(n, c, k, message):
    with pytest.raises(ValueError, match=message):
        pass_at_k(n, c, k)


@pytest.mark.parametrize(
    ("answers", "right", "k", "value"),
    [
        (["7", "7", "8"], "7", 3, 1.0),
        (["7", "8", "8"], "7", 3, 0.0),
        (["7", "8"], "7", 2, 1 / 2),  # a tie by lot
        (["7", "8", "9"], "7", 3, 1 / 3),
        (["7", "7", "8", "8", "9"], "7", 5, 1 / 2),
        (["7", None, None], "7", 3, 1.0),  # no answer, no vote
        ([None, None], "7", 2, 0.0),
        (["7", "8", "8", "8"], "7", 2, 1 / 4),  # blocks (7, 8) and (8, 8)
        (["7", "8", "7", "8", "9"], "7", 2, 1 / 2),  # the fifth sample fills no block
        (["7", "8", "7", "8"], "7", 1, 1 / 2),  # k = 1 is the mean
    ],
)
def test_majority_by_hand(answers, right, k, value):
    assert majority_at_k(answers, [answer == right for answer in answers], k) == pytest.approx(value)


def test_majority_of_an_answer_judged_differently_is_its_share():
    assert majority_at_k(["7", "7", "7", "8"], [True, False, True, True], 4) == pytest.approx(2 / 3)


def test_majority_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="answers has 2 samples, correct has 1"):
        majority_at_k(["7", "8"], [True], 1)
    with pytest.raises(ValueError, match="k=3: expected 1 to the 2"):
        majority_at_k(["7", "8"], [True, False], 3)


def test_points_by_hand():
    assert point([0.0, 1.0, 1.0, 0.5]) == 0.625
    assert point([1 / 4, 1 / 2], [4, 2]) == pytest.approx(2 / 6)  # 1 of 4 and 1 of 2
    assert point([3.0, 1.0, 9.0], statistic="median") == 3.0


def test_draws_of_two_problems_take_the_three_values_with_their_chances():
    """Two problems, 0 and 1: a resample's mean is 0, 1/2 or 1 with chance 1/4, 1/2, 1/4."""
    drawn = draws([0.0, 1.0], seed=3, resamples=20_000)
    assert set(drawn.tolist()) == {0.0, 0.5, 1.0}
    for value, chance in ((0.0, 0.25), (0.5, 0.5), (1.0, 0.25)):
        # four standard deviations of a share of 20,000
        assert (drawn == value).mean() == pytest.approx(chance, abs=4 * (chance * (1 - chance) / 20_000) ** 0.5)


def test_the_interval_agrees_with_the_normal_one_where_that_is_right():
    values = [float(i % 10 < 3) for i in range(1000)]  # 300 of 1000
    low, high = estimate(0.3, draws(values, seed=1), 1000)[1:]
    half = 1.96 * (0.3 * 0.7 / 1000) ** 0.5
    assert low == pytest.approx(0.3 - half, abs=0.003) and high == pytest.approx(0.3 + half, abs=0.003)


def test_a_ratio_is_of_sums_and_a_resample_without_weight_is_left_out():
    drawn = draws([0.5, 0.0], [2, 0], seed=0, resamples=4000)
    assert set(drawn[~np.isnan(drawn)].tolist()) == {0.5}
    assert np.isnan(drawn).mean() == pytest.approx(0.25, abs=0.03)
    assert estimate(0.5, drawn, 2) == Estimate(0.5, None, None)  # what never varied has no interval
    assert estimate(0.5, np.append(drawn, [0.4, 0.6] * 1000), 2) == Estimate(0.5, 0.4, 0.6)


def test_draws_follow_their_seed_and_large_inputs_go_in_blocks(monkeypatch):
    values = np.arange(10.0)
    assert (draws(values, seed=5) == draws(values, seed=5)).all()
    assert (draws(values, seed=5) != draws(values, seed=6)).any()
    monkeypatch.setattr("scope_fast.estimators.BLOCK", 1)
    one_by_one = draws(values, seed=5, resamples=50)
    assert one_by_one.shape == (50,) and len(set(one_by_one.tolist())) > 10


def test_one_problem_has_no_interval():
    assert estimate(0.7, draws([0.7]), 1) == Estimate(0.7, None, None)


def test_the_median_interval_is_made_of_values_or_their_midpoints():
    low, high = estimate(2.0, draws([1.0, 2.0, 3.0], statistic="median"), 3)[1:]
    assert (low, high) == (1.0, 3.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"values": []}, r"values of shape \(0,\)"),
        ({"values": [1.0], "weights": [1.0, 2.0]}, r"weights of shape \(2,\)"),
        ({"values": [1.0], "statistic": "mode"}, "statistic='mode'"),
        ({"values": [1.0], "weights": [1.0], "statistic": "median"}, "median without weights"),
    ],
)
def test_bad_input_to_the_bootstrap(arguments, message):
    with pytest.raises(ValueError, match=message):
        draws(**arguments)


def test_process_bench_by_hand():
    """Erroneous: found exactly, too early, too late, not at all, exactly. Correct: passed, passed, accused."""
    labels = [2, 2, 2, 2, 0, -1, -1, -1]
    predictions = [2, 1, 3, -1, 0, -1, -1, 4]
    scores = process_bench(predictions, labels)
    assert scores.acc_error == pytest.approx(2 / 5)
    assert scores.acc_correct == pytest.approx(2 / 3)
    assert scores.f1 == pytest.approx(2 * (2 / 5) * (2 / 3) / (2 / 5 + 2 / 3))  # = 1/2
    assert scores.f1 == pytest.approx(0.5)
    assert scores.prefix_safe == pytest.approx(3 / 5)


def test_process_bench_at_its_edges():
    assert process_bench([1, -1], [0, -1]) == ProcessBenchScores(0.0, 1.0, 0.0, 0.0)
    assert process_bench([1, 0], [0, -1]) == ProcessBenchScores(0.0, 0.0, 0.0, 0.0)
    assert process_bench([0], [3]) == ProcessBenchScores(0.0, None, None, 1.0)
    assert process_bench([-1], [-1]) == ProcessBenchScores(None, 1.0, None, None)
    assert process_bench([], []) == ProcessBenchScores(None, None, None, None)
    with pytest.raises(ValueError, match="predictions has 1 samples, labels has 2"):
        process_bench([1], [1, 2])
    with pytest.raises(ValueError, match="or -1 for no error"):
        process_bench([-2], [1])


def test_a_first_error_becomes_a_label():
    assert [first_error_label(i, 3) for i in range(4)] == [0, 1, 2, -1]
    assert first_error_label(0, 0) == -1
