"""S = alpha * beta * (r_step + r_token) by hand, and who is chosen."""

import math
from collections import Counter

import pytest
from factories import trajectory

from scope_fast.scope.selection import (
    choose_first,
    choose_near_misses,
    choose_none,
    log_outlier_penalty,
    score,
    success_rate,
)
from scope_fast.scope.trajectory import Repair


def failures(*errors, steps=4, per_step=2):
    """Failed rollouts of equal length whose first errors are these."""
    return [trajectory((per_step,) * steps, first_error=e, sample=i) for i, e in enumerate(errors)]


def samples(chosen):
    return [t.sample for t in chosen]


@pytest.mark.parametrize(
    ("value", "group", "expected"),
    [
        # median 3, deviations 2 1 0 1 2, their median 1: z = (value - 3) / 1.4826
        (3, [1, 2, 3, 4, 5], 0.0),
        (4, [1, 2, 3, 4, 5], -((1 / 1.4826) ** 2) / 2),
        (1, [1, 2, 3, 4, 5], -((2 / 1.4826) ** 2) / 2),
        # median 4.5, deviations 0.5 0.5 0.5 3.5: an outlier does not widen the spread it is measured with
        (8, [4, 4, 5, 8], -((3.5 / (1.4826 * 0.5)) ** 2) / 2),
        (5, [5, 5, 5, 9], 0.0),  # no spread
        (9, [5, 5, 5, 9], 0.0),
        (9, [1, 9], 0.0),  # fewer than three say nothing
        (9, [9], 0.0),
    ],
)
def test_outlier_penalty(value, group, expected):
    assert log_outlier_penalty(value, group) == pytest.approx(expected, rel=1e-12)


def test_the_four_terms_and_their_product():
    group = [
        trajectory((1, 1, 1), sample=0),  # 3 steps, 4 tokens with the EOS
        trajectory((2, 2), sample=1),  # 2 steps, 5 tokens
        trajectory((3, 3, 3, 2), sample=2),  # 4 steps, 12 tokens
    ]
    # steps 3 2 4: median 3, deviations 0 1 1, their median 1.   tokens 4 5 12: median 5, deviations 1 0 7, median 1
    got = score(group[2], group, kept=2)
    alpha, beta = math.exp(-((1 / 1.4826) ** 2) / 2), math.exp(-((7 / 1.4826) ** 2) / 2)
    assert got.r_step == 2 / 4
    assert got.r_token == 6 / 12  # the EOS is a token of the response
    assert got.alpha == pytest.approx(alpha, rel=1e-12)
    assert got.beta == pytest.approx(beta, rel=1e-12)
    assert got.score == pytest.approx(alpha * beta * 1.0, rel=1e-12)
    assert got.log_score == pytest.approx(math.log(alpha * beta), rel=1e-12)
    flat = score(group[2], group, kept=2, length_penalty=False)
    assert (flat.alpha, flat.beta, flat.score) == (1.0, 1.0, 1.0)
    assert score(group[2], group[1:], kept=2).score == 1.0  # a group of two


def test_the_furthest_is_chosen_and_marked():
    group = failures(1, 3, 2)
    assert samples(choose_near_misses(group, budget=1, repair_below=0.5)) == [1]
    assert group[1].repair == Repair(kept_steps=3, kept_tokens=6)
    assert group[0].repair is None and group[2].repair is None
    assert [t.selection.score for t in group] == [1 / 4 + 2 / 9, 3 / 4 + 6 / 9, 2 / 4 + 4 / 9]


@pytest.mark.parametrize(("budget", "expected"), [(1, [1]), (2, [1, 2]), (3, [1, 2, 0]), (9, [1, 2, 0])])
def test_budget(budget, expected):
    assert samples(choose_near_misses(failures(1, 3, 2, 0), budget, 0.5)) == expected


def test_outliers_too_far_for_a_float_are_ranked_all_the_same():
    lengths = [400, 110, 50, 50, 51, 51, 52, 52]
    group = [trajectory((1, n - 2), first_error=1, sample=i) for i, n in enumerate(lengths)]
    assert samples(choose_near_misses(group, 8, 0.5))[-2:] == [1, 0]
    assert group[0].selection.score == group[1].selection.score == 0.0


def test_ties_go_to_the_earlier_sample():
    assert samples(choose_near_misses(failures(2, 2, 2), 2, 0.5)) == [0, 1]


def test_without_a_prefix_there_is_no_repair():
    group = failures(0, 0)
    assert choose_near_misses(group, 2, 0.5) == []
    assert all(t.selection is None and t.repair is None for t in group)
    alone = [trajectory((3,), first_error=1)]  # its one step is the one that is not believed
    assert choose_near_misses(alone, 1, 0.5) == []
    assert choose_near_misses([trajectory((), first_error=0)], 1, 0.5) == []


def test_all_right_and_yet_wrong_keeps_all_but_the_last_step():
    (chosen,) = choose_near_misses(failures(4), 1, 0.5)
    assert chosen.repair == Repair(kept_steps=3, kept_tokens=6)
    assert (chosen.selection.r_step, chosen.selection.r_token) == (3 / 4, 6 / 9)


def test_rollouts_without_a_usable_localisation_are_left_alone():
    assert samples(choose_near_misses(failures(None, 1), 2, 0.5)) == [1]


@pytest.mark.parametrize(
    ("passed", "repair_below", "repaired"),
    [(0, 0.5, True), (1, 0.5, True), (2, 0.5, False), (3, 0.5, False), (2, 0.51, True), (3, 1.0, True)],
)
def test_only_groups_below_the_success_rate(passed, repair_below, repaired):
    group = failures(2, 2, 2, 2)
    for t in group[:passed]:
        t.reward = 1.0
    chosen = choose_near_misses(group, 1, repair_below)
    assert samples(chosen) == ([passed] if repaired else [])


def test_unverified_rollouts_neither_pass_nor_fail():
    group = failures(3, 1, 2, 2)
    group[0].reward, group[3].reward = None, 1.0
    assert success_rate(group) == 1 / 3
    assert samples(choose_near_misses(group, 4, 0.5)) == [2, 1]  # the furthest has no verdict: not known to have failed
    assert group[0].selection is None
    for t in group:
        t.reward = None
    assert success_rate(group) == 1.0
    assert choose_near_misses(group, 4, 1.0) == []
    assert success_rate([]) == 1.0


def test_an_outlier_in_length_yields():
    group = [trajectory((2,) * n, first_error=e, sample=i) for i, (n, e) in enumerate([(4, 2), (4, 2), (5, 2), (9, 8)])]
    assert samples(choose_near_misses(group, 1, 0.5)) == [0]
    assert samples(choose_near_misses(group, 1, 0.5, length_penalty=False)) == [3]


def test_replace_makes_the_same_choice_and_keeps_nothing():
    scope, replace = failures(1, 3, 2), failures(1, 3, 2)
    assert samples(choose_near_misses(scope, 2, 0.5)) == [1, 2]
    assert samples(choose_near_misses(replace, 2, 0.5, keep_prefix=False)) == [1, 2]
    assert [t.repair for t in replace] == [None, Repair(0, 0), Repair(0, 0)]
    assert [t.selection for t in replace] == [t.selection for t in scope]


def test_the_random_ablation_draws_among_the_candidates_alone():
    drawn = Counter()
    for seed in range(300):
        group = failures(1, 3, 0, None, 2)
        (chosen,) = choose_near_misses(group, 1, 0.5, shuffle=str(seed))
        drawn[chosen.sample] += 1
        assert chosen.repair.kept_steps == chosen.first_error
    assert set(drawn) == {0, 1, 4}
    assert min(drawn.values()) > 60  # of 100 expected: five standard deviations
    twice = [samples(choose_near_misses(failures(1, 3, 2), 2, 0.5, shuffle="5")) for _ in range(2)]
    assert twice[0] == twice[1]


def test_teacher_only_and_no_repair():
    group = failures(0, 3)
    group[0].reward = 1.0
    assert choose_none(group) == [] and group[0].repair is None
    assert samples(choose_first(group)) == [0]
    assert group[0].repair == Repair(0, 0) and group[1].repair is None
