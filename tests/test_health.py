"""Updates that fail: left out, kept for a replay, counted, and the end of the run when they do not stop."""

import copy
import json
import math

import pytest
import torch
from test_learner import NLL, RL, biased, distance, gradients_of, learner_of, make, mixture, sequence
from test_train import read_metrics

from scope_fast import distributed, train
from scope_fast.batch import LossOptions, pack, split
from scope_fast.scope import advantage

SETTINGS = [
    "--rollout.engine=transformers", "--rollout.prompts_per_step=2", "--rollout.group_size=2", "--prm.kind=exact",
    "--rollout.max_tokens=96", "--teacher.max_tokens=96", "--evaluation.prompts=2", "--evaluation.samples=1",
    "--logging.report=false", "--steps=6", "--checkpoint.every=1", "--verifier.workers=1", "--method=grpo",
]  # fmt: skip


def spoil(monkeypatch, spoilt_steps):
    """NaN advantages in these steps, stamped as a defective method would."""
    stamp, calls = advantage.stamp_mixture, []

    def stamped(group, loss):
        calls.append(group)
        made = stamp(group, loss)
        if (len(calls) + 1) // 2 in spoilt_steps:  # two groups a step
            for q in made:
                q.advantage = [math.nan] * len(q.advantage)
        return made

    monkeypatch.setattr(advantage, "stamp_mixture", stamped)


def test_a_failed_update_is_kept_counted_and_replayed(tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, {2, 4, 5})
    assert train.main([f"--out={tmp_path}", *SETTINGS]) == 0  # never three in a row
    _, *steps = read_metrics(tmp_path)
    assert [s["learner/skipped_updates"] for s in steps] == [0, 1, 0, 1, 1, 0]
    assert steps[1]["grad/norm"] == 0.0 and steps[1]["loss/total"] == 0.0
    kept = sorted(path.name for path in (tmp_path / "failed").iterdir())
    assert kept == ["step_2.jsonl", "step_4.jsonl", "step_5.jsonl"]
    lines = (tmp_path / "rollouts.jsonl").read_text().splitlines(keepends=True)
    failed = "".join(line for line in lines if json.loads(line)["step"] == 4)
    assert (tmp_path / "failed" / "step_4.jsonl").read_text() == failed and '"nan"' in failed
    capsys.readouterr()
    assert train.main(["--replay", f"{tmp_path}/failed/step_4.jsonl"]) == 0
    text = capsys.readouterr().out
    assert "step 4 replayed: the same" in text
    assert [line.split() for line in text.splitlines() if "skipped_updates" in line] == [
        ["learner/skipped_updates", "logged", "1", "now", "1"]
    ]


def test_failures_in_a_row_end_the_run(tmp_path, monkeypatch, capsys):
    spoil(monkeypatch, {2, 3, 4, 5})
    assert train.main([f"--out={tmp_path}", "--learner.max_skipped_updates=2", *SETTINGS]) == 1
    text = capsys.readouterr().out
    assert "error: 2 optimiser steps in a row without a finite loss and gradient, the last in step 3" in text
    assert f"--replay {tmp_path}/failed/step_3.jsonl" in text
    assert read_metrics(tmp_path)[-1]["step"] == 3  # written before the run ended


def test_failures_in_a_row_are_counted_across_a_resume():
    learner = learner_of(make())
    learner.update([[sequence([1], [2, 3], advantage=math.nan)]])
    resumed = learner_of(make())
    resumed.load_state_dict(learner.state_dict())
    resumed.update([[sequence([1], [2, 3], advantage=math.nan)]])
    assert resumed.skipped_in_a_row == 2
    resumed.update([[]])  # nothing to learn is neither a failure nor a success
    assert resumed.skipped_in_a_row == 2
    resumed.update([mixture()])
    assert resumed.skipped_in_a_row == 0


def test_a_skipped_update_does_not_dilute_the_loss_of_the_others():
    good, bad = mixture(), [sequence([1], [2, 3], advantage=math.nan)]
    alone = learner_of(make()).update([good])
    both = learner_of(make(), minibatches=2).update([good, bad])
    assert both["learner/skipped_updates"] == 1 and alone["loss/rl"] != 0.0
    for name in ("loss/rl", "loss/nll", "loss/total", "grad/norm"):
        assert both[name] == pytest.approx(alone[name], rel=1e-6)


def test_a_loss_that_is_not_finite_is_enough():
    """The head is so sure of its token that no gradient is left, while the loss overflows."""
    model = biased(torch.float32)
    with torch.no_grad():
        model.lm_head.bias[3] = 1e4
    learner = learner_of(model)
    before = copy.deepcopy(model.state_dict())
    metrics = learner.update([[sequence([1], [3, 3, 3, 3], advantage=3e38), sequence([1], [3] * 4, advantage=3e38)]])
    assert metrics["loss/total"] == pytest.approx(-3e38, rel=1e-6) and metrics["grad/norm"] == 0.0  # finite: no failure
    huge = sequence([1], [3, 3], advantage=3e38, weight=8.0)
    assert learner.update([[huge]])["learner/skipped_updates"] == 1
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def out_of_memory(learner, monkeypatch, above, times):
    """The objective fails on micro-batches of more than `above` tokens, after its forward, so often."""
    forward, failures = learner.objective.forward, []

    def limited(batch, score_only=False):
        result = forward(batch, score_only)
        if len(batch.input_ids) > above and len(failures) < times:
            failures.append(len(batch.input_ids))
            raise torch.OutOfMemoryError("CUDA out of memory (injected)")
        return result

    monkeypatch.setattr(learner.objective, "forward", limited)
    return failures


@pytest.mark.parametrize("minibatches", [1, 2])
def test_out_of_memory_halves_the_budget_and_repeats_the_update(minibatches, monkeypatch, capsys):
    """Also in the middle of a batch, with gradients of the micro-batches before it, and while scoring."""
    batches = [mixture(seed=seed) for seed in range(minibatches)]
    expected, learner = (learner_of(make(torch.float64), token_budget=60, minibatches=minibatches) for _ in range(2))
    expected.update(batches)
    failures = out_of_memory(learner, monkeypatch, above=30, times=1)
    metrics = learner.update(batches)
    assert len(failures) == 1 and metrics["learner/out_of_memory"] == 1
    assert "out of memory: learner.token_budget halved to 30 for the rest of the run" in capsys.readouterr().out
    assert distance(dict(learner.model.named_parameters()), dict(expected.model.named_parameters())) < 1e-6
    assert learner.update(batches)["learner/out_of_memory"] == 0 and learner.token_budget == 30
    resumed = learner_of(make(torch.float64), token_budget=60, minibatches=minibatches)
    resumed.load_state_dict(learner.state_dict())
    assert resumed.token_budget == 30


@pytest.mark.parametrize("seed", range(6))
def test_a_learner_halved_from_the_start_gives_the_same_bits(seed, monkeypatch):
    """What a replay of the step that ran out of memory is."""
    batches = [mixture(seed=seed)]
    ran, again = (learner_of(make(torch.float32), token_budget=60) for _ in range(2))
    out_of_memory(ran, monkeypatch, above=30, times=1)
    logged = ran.update(batches)
    again.halvings = 1
    assert logged.pop("learner/out_of_memory") == 1
    assert again.update(batches) == logged | {"learner/out_of_memory": 0}
    for name, value in again.model.state_dict().items():
        assert torch.equal(ran.model.state_dict()[name], value), name


def test_a_second_out_of_memory_error_is_raised(monkeypatch):
    learner = learner_of(make(), token_budget=60)
    out_of_memory(learner, monkeypatch, above=10, times=2)
    before = copy.deepcopy(learner.model.state_dict())
    with pytest.raises(torch.OutOfMemoryError):
        learner.update([mixture()])
    assert all(torch.equal(before[name], value) for name, value in learner.model.state_dict().items())


def test_one_of_several_ranks_cannot_repeat_and_says_what_to_do(monkeypatch):
    learner = learner_of(make(), token_budget=60)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)

    def work(batches):
        raise torch.OutOfMemoryError("CUDA out of memory (injected)")

    with pytest.raises(torch.OutOfMemoryError) as raised:
        learner._within_memory(work, [])
    (note,) = raised.value.__notes__
    assert "rank 0 ran out of memory at learner.token_budget=60: start the run again with half of it" in note
    assert learner.halvings == 0


def test_gradients_survive_a_split():
    """Parts of a micro-batch are what packing under the smaller budget could have made: same tokens and streams."""
    minibatch = [q for q in mixture() if any(s in (RL, NLL) for s in q.segment)]
    (batch,) = pack(minibatch, 10_000, LossOptions(), 10, 10)
    parts = split(batch, 25)
    assert len(parts) > 2 and all(len(part.input_ids) <= 25 for part in parts)
    assert torch.equal(torch.cat([part.input_ids for part in parts]), batch.input_ids)
    for name in ("target", "segment", "loss_weight", "advantage"):
        whole = getattr(batch.streams, name)
        assert torch.equal(torch.cat([getattr(part.streams, name) for part in parts]), whole)
    for part in parts:
        assert part.position_ids[0] == 0 and torch.equal(part.streams.active, torch.arange(len(part.streams)))
        assert torch.equal(part.input_ids[part.rows + 1], part.streams.target)  # a row predicts the token after it
    assert split(batch, 10_000) == [batch]
    (longest,) = split(pack([sequence([1] * 9, [2] * 9)], 5, LossOptions(), 1, 1)[0], 5)
    assert len(longest.input_ids) == 18  # never cut


def test_a_halved_budget_gives_the_same_gradients():
    expected, _ = gradients_of(learner_of(make(torch.float64), token_budget=60), mixture())
    halved = learner_of(make(torch.float64), token_budget=60)
    halved.halvings = 1
    got, _ = gradients_of(halved, mixture())
    assert distance(got, expected) <= 1e-10
