"""A run through the learner alone again: the logged loss and gradient norm to the last bit, or a named difference."""

import json
import math
from pathlib import Path

import pytest

from scope_fast import train
from scope_fast.batch import Segment, TrainSequence
from scope_fast.records import TokenTexts, _trained, trained_sequence
from scope_fast.replay import Replayed, find, read_minibatches

SETTINGS = [
    "--rollout.engine=transformers", "--rollout.prompts_per_step=4", "--rollout.group_size=4", "--prm.kind=exact",
    "--rollout.max_tokens=96", "--teacher.max_tokens=96", "--evaluation.prompts=2", "--evaluation.samples=1",
    "--logging.report=false", "--steps=4", "--checkpoint.every=2", "--verifier.workers=1",
    "--learner.minibatches=2", "--loss.importance_cap=2.0",
]  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    assert train.main([f"--out={out}", *SETTINGS]) == 0
    return out


def logged(run, step):
    values = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        values |= record if record["step"] == step else {}
    return values


@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_every_step_comes_out_as_logged(step, run, capsys):
    """From the initial weights (1, 2) and from a checkpoint (3, 4), also with an update in between."""
    assert train.main(["--replay", f"{run}/rollouts.jsonl:{step}"]) == 0
    text = capsys.readouterr().out
    assert f"step {step} replayed: the same" in text
    assert f"step {1 if step < 3 else 3} replayed: the same" in text
    for name in ("loss/rl", "loss/nll", "loss/total", "grad/norm"):
        value = logged(run, step)[name]
        assert f"logged {value!r}" in text and f"now {value!r}" in text
    assert logged(run, step)["grad/norm"] > 0.0


def test_without_a_step_the_last_one_is_replayed(run, capsys):
    assert train.main(["--replay", f"{run}/rollouts.jsonl"]) == 0
    assert "step 4 replayed: the same" in capsys.readouterr().out


def test_differences_are_shown_and_counted_as_failure(run, capsys):
    lines = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    changed = next(r for r in lines if r["step"] == 3 and r["trained"] and any(r["trained"]["advantage"]))
    changed["trained"]["advantage"] = [1.5 * a for a in changed["trained"]["advantage"]]
    folder = run / "edited"
    folder.mkdir()
    copy = folder / "rollouts.jsonl"
    copy.write_text("".join(json.dumps(r) + "\n" for r in lines))
    assert train.main(["--replay", f"{copy}:3"]) == 1
    text = capsys.readouterr().out
    assert "step 3 replayed: differs in " in text and "grad/norm" in text and "<- differs" in text


def test_a_value_that_only_one_side_has_differs():
    logged = {"loss/rl": 1.0, "policy/kl": 0.5, "time/step_s": 2.0, "learner/out_of_memory": 1}
    result = Replayed(3, logged, {"loss/rl": 1.0, "policy/entropy": 0.1, "learner/out_of_memory": 0})
    assert result.differing == ["policy/entropy", "policy/kl"]
    assert "time/step_s" not in result.names


def test_what_cannot_be_replayed_is_said(run, tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        find(str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match=r"no such step, .* holds steps 1 to 4"):
        find(f"{run}/rollouts.jsonl:9")
    with pytest.raises(ValueError, match=r"metrics\.jsonl holds no rollouts; expected a rollouts\.jsonl"):
        find(f"{run}/metrics.jsonl")
    with pytest.raises(ValueError, match=r"rollout\.prompts_per_step=1: .* has more groups in step 2"):
        read_minibatches(Path(f"{run}/rollouts.jsonl"), 2, 1, prompts_per_step=1)
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x.jsonl").write_text('{"step": 1, "group": 0}\n')
    with pytest.raises(ValueError, match="lies in no run directory"):
        find(str(tmp_path / "a" / "b" / "x.jsonl"))


class Letters:
    def decode(self, ids):
        return "x"


def test_a_sequence_survives_its_record_bit_for_bit():
    numbers = [0.1 + 0.2, 1e-320, -1 / 3, math.inf, -math.inf]
    segment = [Segment.RL] * 3 + [Segment.NLL] * 2
    made = TrainSequence([1], [5, 6, 7, 8, 9], segment, numbers, [1.0] * 5, [-0.1, -1e-17, -2.5, math.nan, math.nan])
    line = {"prompt_ids": [1], "logprobs": [-0.1, -1e-17, -2.5, -9.0], "trained": _trained(made, TokenTexts(Letters()))}
    got = trained_sequence(json.loads(json.dumps(line, allow_nan=False)))
    assert (got.advantage, got.loss_weight, got.segment) == (numbers, [1.0] * 5, segment)
    assert got.rollout_logprob[:3] == made.rollout_logprob[:3] and all(map(math.isnan, got.rollout_logprob[3:]))
