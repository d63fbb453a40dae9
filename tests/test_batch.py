"""Packing by hand: what goes where, what is left out, what it is divided by."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scope_fast.batch import (
    LossOptions,
    Segment,
    TokenStreams,
    TrainSequence,
    active_rows,
    bins,
    is_active,
    minibatch_of,
    of_scaled_logits,
    pack,
)

IGNORE, RL, NLL = Segment.IGNORE, Segment.RL, Segment.NLL
PLAIN = LossOptions()


def sequence(prompt, response, segment=None, advantage=None, weight=None, rollout=None):
    n = len(response)
    return TrainSequence(
        list(prompt), list(response), list(segment or [RL] * n), list(advantage or [1.0] * n),
        list(weight or [1.0] * n), list(rollout or [-0.5] * n),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("lengths", "budget", "expected"),
    [
        ([5, 3, 4, 2], 7, [[0, 3], [2, 1]]),  # longest first, each into the first bin with room
        ([3, 3, 3], 6, [[0, 1], [2]]),
        ([2, 9, 2], 4, [[1], [0, 2]]),  # too long for any bin: alone, and never cut
        ([7], 7, [[0]]),
        ([8], 7, [[0]]),
        ([9, 1], 7, [[0], [1]]),  # nothing joins one that is over the budget
        ([], 7, []),
    ],
)
def test_bins(lengths, budget, expected):
    assert bins(lengths, budget) == expected


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 30), max_size=40), st.integers(1, 40))
def test_bins_hold_everything_once_within_the_budget(lengths, budget):
    groups = bins(lengths, budget)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in group) for group in groups]
    assert all(load <= budget or len(group) == 1 for load, group in zip(loads, groups, strict=True))
    assert sum(2 * load <= budget for load in loads) <= 1  # two half-empty bins would have been one


@pytest.mark.parametrize(
    ("segment", "weight", "advantage", "options", "active"),
    [
        (IGNORE, 1.0, 1.0, PLAIN, False),
        (RL, 1.0, 1.0, PLAIN, True),
        (RL, 1.0, -1.0, PLAIN, True),
        (RL, 1.0, 0.0, PLAIN, False),
        (RL, 0.0, 1.0, PLAIN, False),
        (RL, 1.0, 0.0, LossOptions(kl="k3", kl_coef=0.1), True),
        (RL, 1.0, 0.0, LossOptions(entropy_coef=0.1), True),
        (RL, 1.0, 0.0, LossOptions(entropy_coef=-0.1), True),
        (RL, 1.0, 0.0, LossOptions(kl="k3"), False),
        (RL, 0.0, 0.0, LossOptions(entropy_coef=0.1), False),
        (NLL, 1.0, 0.0, PLAIN, True),
        (NLL, -1.0, 0.0, PLAIN, True),
        (NLL, 0.0, 1.0, PLAIN, False),
    ],
)
def test_active(segment, weight, advantage, options, active):
    assert is_active(segment, weight, advantage, options) is active
    made = sequence([1], [7, 8], [IGNORE, segment], [1.0, advantage], [1.0, weight])
    assert active_rows(made, options) == ([1] if active else [])


def test_pack_by_hand():
    first = sequence([1, 2], [3, 4, 5], [RL, IGNORE, RL], [2.0, 2.0, -1.0], rollout=[-0.1, -0.2, -0.3])
    second = sequence([6], [7, 8], [RL, NLL], [0.0, 0.0], [1.0, 0.3], rollout=[-0.4, float("nan")])
    (batch,) = pack([first, second], 8, PLAIN, rl_count=4, nll_count=2)
    assert batch.input_ids.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert batch.rows.tolist() == [1, 3, 6]  # the positions before 3, 5 and 8; 7 has no advantage, 4 no segment
    assert batch.sequence.tolist() == [0, 0, 1]
    streams = batch.streams
    assert streams.target.tolist() == [3, 5, 8]
    assert streams.segment.tolist() == [RL, RL, NLL]
    assert streams.loss_weight.tolist() == pytest.approx([0.25, 0.25, 0.15], rel=1e-6)  # float32
    assert streams.advantage.tolist() == [2.0, -1.0, 0.0]
    assert streams.rollout_logprob[:2].tolist() == pytest.approx([-0.1, -0.3], rel=1e-6)
    assert torch.isnan(streams.rollout_logprob[2])
    assert streams.active.tolist() == [0, 1, 2]
    assert (streams.old_logprob, streams.ref_logprob, streams.temperature) == (None, None, None)
    types = {name: getattr(streams, name).dtype for name in ("target", "segment", "loss_weight", "advantage", "active")}
    assert types == {
        "target": torch.int64, "segment": torch.uint8, "loss_weight": torch.float32, "advantage": torch.float32,
        "active": torch.int64,
    }  # fmt: skip


def test_a_prompt_of_one_token_predicts_the_first_response_token():
    (batch,) = pack([sequence([9], [3]), sequence([8], [4])], 8, PLAIN, 2, 1)
    assert batch.rows.tolist() == [0, 2]
    assert batch.input_ids[batch.rows].tolist() == [9, 8]
    assert batch.streams.target.tolist() == [3, 4]


def test_a_sequence_without_an_active_row_is_left_out_and_still_counts():
    quiet, loud, empty = sequence([1], [2, 3], advantage=[0.0, 0.0]), sequence([4], [5]), sequence([6], [])
    (batch,) = pack([quiet, loud, empty], 100, PLAIN, rl_count=3, nll_count=1)
    assert batch.input_ids.tolist() == [4, 5]
    assert batch.sequence.tolist() == [1]
    assert batch.streams.loss_weight.tolist() == pytest.approx([1 / 3], rel=1e-6)
    assert pack([quiet, empty], 100, PLAIN, 2, 1) == []
    assert pack([], 100, PLAIN, 1, 1) == []


def test_a_sequence_over_the_budget_is_whole_and_alone():
    long, short = sequence([1, 2, 3], [4, 5, 6, 7]), sequence([1], [2])
    batches = pack([short, long, short], 4, PLAIN, 6, 1)
    assert [b.input_ids.tolist() for b in batches] == [[1, 2, 3, 4, 5, 6, 7], [1, 2, 1, 2]]
    assert [b.sequence.tolist() for b in batches] == [[1] * 4, [0, 2]]


def test_every_row_of_every_sequence_is_packed_once():
    made = [sequence(range(1, 2 + i % 3), range(10, 12 + i), advantage=[float(i + 1)] * (2 + i)) for i in range(7)]
    batches = pack(made, 16, PLAIN, 1, 1)
    assert max(len(b.input_ids) for b in batches) <= 16 and len(batches) > 2
    seen = sorted((i, t) for b in batches for i, t in zip(b.sequence.tolist(), b.streams.target.tolist(), strict=True))
    assert seen == sorted((i, t) for i, s in enumerate(made) for t in s.response_ids)


@pytest.mark.parametrize("name", ["segment", "advantage", "loss_weight", "rollout_logprob"])
def test_streams_are_as_long_as_the_response(name):
    values = {"segment": [RL], "advantage": [1.0], "loss_weight": [1.0], "rollout_logprob": [0.0]}
    values[name] = values[name] * 2
    with pytest.raises(ValueError, match=f"{name} has 2 values for 1 response_ids"):
        TrainSequence(prompt_ids=[1], response_ids=[2], **values)


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="prompt_ids is empty: the first response token needs a position"):
        sequence([], [2])


def test_moving_to_a_device_takes_every_tensor_along():
    (batch,) = pack([sequence([1], [2, 3])], 8, PLAIN, 2, 1)
    moved = batch.to("meta")
    tensors = [moved.input_ids, moved.position_ids, moved.rows, moved.sequence]
    tensors += [getattr(moved.streams, name) for name in ("target", "segment", "loss_weight", "advantage", "active")]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert moved.streams.old_logprob is None
    assert len(moved.streams) == len(batch.streams) == 2
    assert isinstance(moved.streams, TokenStreams)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy_loss": "trpo"}, "policy_loss='trpo': expected one of ppo, cispo"),
        ({"kl": "k4"}, "kl='k4': expected one of none, k1, k2, k3"),
        ({"nll_shape": "flat"}, "nll_shape='flat': expected one of constant, shaped, entropy"),
        ({"logits_dtype": "float16"}, "logits_dtype='float16': expected one of float32, bfloat16"),
        ({"clip_low": 1.1}, "clip_low=1.1: expected a value in [0, 1]"),
        ({"clip_high": -0.1}, "clip_high=-0.1: expected a value >= 0"),
        ({"dual_clip": 1.0}, "dual_clip=1.0: expected a value above 1"),
        ({"dual_clip": 3.0, "policy_loss": "cispo"}, "dual_clip=3.0: bounds ppo alone, policy_loss is cispo"),
        ({"importance_cap": 0.0}, "importance_cap=0.0: expected a value above 0"),
        ({"temperature": 0.0}, "temperature=0.0: expected a finite value above 0"),
        ({"temperature": math.inf}, "temperature=inf: expected a finite value above 0"),
        ({"temperature": math.nan}, "temperature=nan: expected a finite value above 0"),
        ({"clip_low": math.nan}, "clip_low=nan: expected a value in [0, 1]"),
        ({"clip_high": math.nan}, "clip_high=nan: expected a value >= 0"),
        ({"dual_clip": math.nan}, "dual_clip=nan: expected a value above 1"),
        ({"importance_cap": math.nan}, "importance_cap=nan: expected a value above 0"),
        ({"kl": "k3", "kl_coef": math.nan}, "kl_coef=nan: expected a finite value"),
        ({"entropy_coef": math.inf}, "entropy_coef=inf: expected a finite value"),
        ({"kl_coef": 0.1}, "kl_coef=0.1 needs kl to be one of k1, k2, k3"),
        ({"chunk_tokens": -1}, "chunk_tokens=-1: expected None, 0 (streaming) or a row count"),
    ],
)
def test_options_that_make_no_sense(changes, message):
    with pytest.raises(ValueError) as caught:
        LossOptions(**changes)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("ranks", "minibatches", "groups"), [(8, 2, 128), (8, 4, 24), (3, 2, 10), (1, 3, 7), (5, 5, 25)]
)
def test_every_rank_has_its_share_of_every_optimiser_step(ranks, minibatches, groups):
    """Ranks take the groups in turn."""
    sizes = [
        [sum(minibatch_of(g, groups, minibatches) == m for g in range(rank, groups, ranks)) for rank in range(ranks)]
        for m in range(minibatches)
    ]
    assert sum(map(sum, sizes)) == groups
    assert all(max(row) - min(row) <= 1 for row in sizes)
    whole = [sum(row) for row in sizes]
    assert max(whole) - min(whole) <= 1


def test_a_scale_of_the_logits_divides_every_row_s_temperature():
    segment = torch.tensor([Segment.RL, Segment.NLL], dtype=torch.uint8)
    streams = TokenStreams(torch.tensor([3, 4]), segment, torch.ones(2))
    assert of_scaled_logits(streams, 0.5, 1.0) is streams
    assert of_scaled_logits(streams, 0.5, 0.25).temperature.tolist() == [2.0, 4.0]
    own = replace(streams, temperature=torch.tensor([3.0, 5.0]))
    assert of_scaled_logits(own, 0.5, 2.0).temperature.tolist() == [1.5, 2.5]
