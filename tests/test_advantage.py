"""The stamps of every method by hand: segment, advantage, weight and engine logprob of every token."""

import math
from dataclasses import replace
from statistics import stdev

import pytest
from factories import accepted, configured, prompt, trajectory

from scope_fast.batch import Segment
from scope_fast.config import Loss
from scope_fast.scope.advantage import (
    STD_FLOOR,
    baseline,
    method,
    stamp_mixture,
    stamp_process_reward,
    stamp_teacher_only,
)
from scope_fast.scope.trajectory import Repair

RL, NLL = Segment.RL, Segment.NLL
PLAIN = Loss(nll_coef=0.3)


def group_of(*rewards):
    return [trajectory((2, 2), reward=r, sample=i) for i, r in enumerate(rewards)]


def advantages(stamped):
    """Each sequence's advantages, which are one value here."""
    values = []
    for sequence in stamped:
        assert sequence is None or len(set(sequence.advantage)) == 1
        values.append(None if sequence is None else sequence.advantage[0])
    return values


@pytest.mark.parametrize(
    ("values", "mean", "scale"),
    [
        ([0.0, 0.0, 0.0, 1.0], 0.25, 1 / (0.5 + STD_FLOOR)),  # sample variance (3/16 + 9/16) / 3 = 1/4
        ([1.0, 0.0], 0.5, 1 / (math.sqrt(0.5) + STD_FLOOR)),
        ([0.1] * 3, 0.1, 1.0),
        ([0.7], 0.7, 1.0),
        ([], 0.0, 1.0),
    ],
)
def test_baseline(values, mean, scale):
    got = baseline(values)
    assert got[0] == mean
    assert got[1] == pytest.approx(scale, rel=1e-12)


def test_equal_rewards_leave_exactly_no_advantage():
    """fmean([0.1] * 3) is not 0.1; an advantage of 1e-17 would cost a whole forward, and Adam would follow it."""
    for reward in (0.1, 0.7, 1.0 / 3.0):
        for size in range(1, 12):
            assert advantages(stamp_mixture(group_of(*[reward] * size), Loss(advantage_std=True))) == [0.0] * size


def test_grpo():
    stamped = stamp_mixture(group_of(0.0, 0.0, 0.0, 1.0), PLAIN)
    assert advantages(stamped) == [-0.25, -0.25, -0.25, 0.75]
    for sequence in stamped:
        assert sequence.prompt_ids == [5, 6, 7]
        assert sequence.response_ids == [100, 101, 102, 103, 104]  # the EOS is the student's token, and trained
        assert sequence.segment == [RL] * 5
        assert sequence.loss_weight == [1.0] * 5
        assert sequence.rollout_logprob == [-1.0, -2.0, -3.0, -4.0, -5.0]


def test_grpo_over_the_standard_deviation():
    stamped = stamp_mixture(group_of(0.0, 0.0, 0.0, 1.0), Loss(advantage_std=True))
    assert advantages(stamped) == pytest.approx([-0.5, -0.5, -0.5, 1.5], rel=1e-5)  # the floor of 1e-6 is in there
    assert stamped[3].advantage[0] == pytest.approx(0.75 / (0.5 + STD_FLOOR), rel=1e-12)


@pytest.mark.parametrize(
    ("includes", "others", "repaired"),
    [(True, [-0.5, -0.5, 0.5], 0.5), (False, [-0.25, -0.25, 0.75], 0.75)],  # means 2/4 and 1/4
)
def test_scope_mixes_the_student_s_prefix_with_the_teacher_s_suffix(includes, others, repaired):
    group = group_of(0.0, 0.0, 1.0, 0.0)
    group[3].repair = accepted(1, 2, [7, 8, 0])
    *rest, mixed = stamp_mixture(group, Loss(nll_coef=0.3, baseline_includes_repaired=includes))
    assert advantages(rest) == others
    assert mixed.response_ids == [100, 101, 7, 8, 0]
    assert mixed.segment == [RL, RL, NLL, NLL, NLL]
    assert mixed.advantage == [repaired, repaired, 0.0, 0.0, 0.0]
    assert mixed.loss_weight == [1.0, 1.0, 0.3, 0.3, 0.3]
    assert mixed.rollout_logprob[:2] == [-1.0, -2.0]
    assert all(math.isnan(x) for x in mixed.rollout_logprob[2:])


@pytest.mark.parametrize("shape", ["constant", "shaped", "entropy"])
def test_only_the_advantage_weighs_here_the_other_shapes_belong_to_the_loss(shape):
    group = group_of(0.0, 1.0)
    group[0].repair = accepted(1, 2, [7, 0])
    assert stamp_mixture(group, Loss(nll_coef=0.5, nll_weight=shape))[0].loss_weight == [1.0, 1.0, 0.5, 0.5]


def test_likelihood_weighted_by_the_advantage():
    group = group_of(0.0, 0.0, 1.0, 0.0)
    group[3].repair = accepted(1, 2, [7, 0])
    weighted = Loss(nll_coef=0.3, nll_weight="advantage")
    assert stamp_mixture(group, weighted)[3].loss_weight == [1.0, 1.0, 0.15, 0.15]  # 0.3 * (1 - 2/4)
    apart = Loss(nll_coef=0.3, nll_weight="advantage", baseline_includes_repaired=False)
    assert stamp_mixture(group, apart)[3].loss_weight == pytest.approx([1.0, 1.0, 0.225, 0.225], rel=1e-12)
    group[0].reward = group[1].reward = 1.0
    assert stamp_mixture(group, weighted)[3].loss_weight == [1.0, 1.0, 0.0, 0.0]  # nothing to gain over the group


def test_a_repair_worth_less_than_the_group_is_not_pushed_away():
    """A verifier with graded rewards may accept it all the same; a likelihood with a negative weight has no bound."""
    group = group_of(0.0, 1.0, 1.0, 1.0)
    group[0].repair = replace(accepted(1, 2, [7, 0]), reward=0.1)
    stamped = stamp_mixture(group, Loss(nll_weight="advantage"))[0]
    assert stamped.advantage[0] < 0.0 and stamped.loss_weight[2:] == [0.0, 0.0]


def test_an_all_failed_group_measured_before_its_repair():
    """No spread to divide by: the repaired rollout's advantage is 1, not a million."""
    group = group_of(0.0, 0.0, 0.0)
    group[1].repair = accepted(1, 2, [7, 0])
    loss = Loss(advantage_std=True, baseline_includes_repaired=False, nll_weight="advantage", nll_coef=0.3)
    stamped = stamp_mixture(group, loss)
    assert [sequence.advantage[0] for sequence in stamped] == [0.0, 1.0, 0.0]
    assert stamped[1].loss_weight == [1.0, 1.0, 0.3, 0.3]


@pytest.mark.parametrize("status", ["rejected", "error", "pending"])
def test_a_repair_that_was_not_accepted_leaves_the_failure(status):
    group = group_of(0.0, 1.0)
    group[0].repair = Repair(1, 2, status, suffix_ids=[7, 0], reward=0.0)
    stamped = stamp_mixture(group, PLAIN)
    assert advantages(stamped) == [-0.5, 0.5]
    assert stamped[0].response_ids == [100, 101, 102, 103, 104]
    assert stamped[0].segment == [RL] * 5


def test_replace_is_likelihood_from_the_first_token():
    group = group_of(0.0, 1.0)
    group[0].repair = accepted(0, 0, [7, 8, 0])
    replaced = stamp_mixture(group, PLAIN)[0]
    assert replaced.response_ids == [7, 8, 0]
    assert replaced.segment == [NLL] * 3
    assert (replaced.advantage, replaced.loss_weight) == ([0.0] * 3, [0.3] * 3)


def test_rollouts_without_a_verdict_take_no_part():
    stamped = stamp_mixture(group_of(None, 1.0, 0.0, None), PLAIN)
    assert advantages(stamped) == [None, 0.5, -0.5, None]
    assert stamp_mixture(group_of(None, None), PLAIN) == [None, None]
    assert stamp_process_reward([trajectory((2,), probs=[0.5], reward=None)], PLAIN) == [None]


def test_empty_completions_are_stamped_like_any():
    group = [trajectory((), eos=False), trajectory((), eos=True), trajectory((2,), reward=1.0)]
    nothing, only_eos, _ = stamp_mixture(group, PLAIN)
    assert nothing.response_ids == nothing.segment == nothing.advantage == []
    assert only_eos.response_ids == [100] and only_eos.advantage == pytest.approx([-1 / 3], rel=1e-15)


def test_process_rewards():
    """DeepSeekMath's process supervision: normalise over all steps of the group, sum from one's own step on."""
    group = [
        trajectory((2, 1), probs=[0.9, 0.3], reward=0.0),
        trajectory((1, 1, 2), probs=[0.8, 0.6, 0.4], reward=1.0, eos=False),
    ]
    mean, scale = 0.6, 1 / (stdev([0.9, 0.3, 0.8, 0.6, 0.4]) + STD_FLOOR)  # deviations 0.3 -0.3 0.2 0 -0.2
    first, second = stamp_process_reward(group, PLAIN)
    assert mean == pytest.approx(sum([0.9, 0.3, 0.8, 0.6, 0.4]) / 5)
    near = {"rel": 1e-9, "abs": 1e-9}
    assert first.advantage == pytest.approx([0.0, 0.0, -0.3 * scale, 0.0], **near)  # 0.3 - 0.3, -0.3, EOS
    assert first.advantage[3] == 0.0  # nothing comes after the end
    assert second.advantage == pytest.approx([0.0, -0.2 * scale, -0.2 * scale, -0.2 * scale], **near)
    assert scale == pytest.approx(1 / math.sqrt(0.26 / 4), rel=1e-5)
    for sequence, t in zip((first, second), group, strict=True):
        assert sequence.response_ids == t.token_ids
        assert sequence.segment == [RL] * 4
        assert sequence.loss_weight == [1.0] * 4
        assert sequence.rollout_logprob == t.logprobs


def test_process_rewards_of_a_group_without_any_spread_or_any_probability():
    alike = [trajectory((1, 1), probs=[0.1, 0.1]), trajectory((2,), probs=[0.1])]
    assert [s.advantage for s in stamp_process_reward(alike, PLAIN)] == [[0.0] * 3, [0.0] * 3]
    assert stamp_process_reward([trajectory((2,)), trajectory(())], PLAIN) == [None, None]
    one_left = [trajectory((2,)), trajectory((1, 1), probs=[0.2, 0.8], reward=1.0)]
    assert stamp_process_reward(one_left, PLAIN)[0] is None
    assert stamp_process_reward(one_left, PLAIN)[1] is not None


def test_sft_trains_on_the_teacher_s_verified_solutions_alone():
    group = group_of(0.0, 1.0, 0.0)
    group[0].repair = accepted(0, 0, [7, 8, 0])
    group[2].repair = Repair(0, 0, "rejected", suffix_ids=[7, 0], reward=0.0)
    solution, *others = stamp_teacher_only(group, Loss(nll_coef=0.3, nll_weight="advantage"))
    assert others == [None, None]
    assert solution.response_ids == [7, 8, 0]
    assert solution.segment == [NLL] * 3
    assert solution.loss_weight == [1.0] * 3  # the coefficient balances two losses; there is one


ONE_REPAIR = {"scope.max_repaired_per_group": 1}  # a group


@pytest.mark.parametrize(
    ("name", "stamp", "scores", "repairs"),
    [
        ("grpo", stamp_mixture, "none", {}),
        ("scope", stamp_mixture, "failed", {1: (3, 6)}),
        ("replace", stamp_mixture, "failed", {1: (0, 0)}),
        ("prm_reward", stamp_process_reward, "all", {}),
        ("sft", stamp_teacher_only, "none", {0: (0, 0)}),
    ],
)
def test_what_a_method_is_made_of(name, stamp, scores, repairs):
    made = method(configured(method=name, **ONE_REPAIR), step=0)
    assert (made.stamp, made.scores) == (stamp, scores)
    group = [trajectory((2,) * 4, first_error=e, sample=i, prompt=prompt()) for i, e in enumerate((1, 3, 2))]
    assert [t.sample for t in made.choose(group)] == list(repairs)
    got = {t.sample: (t.repair.kept_steps, t.repair.kept_tokens) for t in group if t.repair}
    assert got == repairs


def test_the_configuration_reaches_the_selection():
    def chosen(**overrides):
        group = [
            trajectory((2,) * n, first_error=e, sample=i) for i, (n, e) in enumerate([(4, 2), (4, 3), (5, 2), (9, 8)])
        ]
        group[2].reward = 1.0
        made = method(configured(method="scope", **{**ONE_REPAIR, **overrides}), step=1)
        return [t.sample for t in made.choose(group)]

    assert chosen() == [1]
    assert chosen(**{"scope.max_repaired_per_group": 2}) == [1, 0]
    assert chosen(**{"scope.length_penalty": "false"}) == [3]
    assert chosen(**{"scope.repair_below": 0.25}) == []
    for draws in (
        {drawn(step=step) for step in range(20)},
        {drawn(seed=seed) for seed in range(20)},
        {drawn(number=number) for number in range(20)},
    ):
        assert draws == {0, 1, 2}


def drawn(step=3, seed=0, number=0):
    """Who is chosen at random from group `number` of a step."""
    made = method(configured(seed=seed, **{**ONE_REPAIR, "scope.selection": "random"}), step)
    made.choose([trajectory((9,), first_error=1, group=99)])  # other groups of this rank make no difference
    return made.choose([trajectory((2, 2), first_error=1, sample=i, group=number) for i in range(3)])[0].sample
