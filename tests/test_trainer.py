"""The loop when its parts misbehave: nothing is lost silently, and the funnel adds up exactly."""

import json
import math
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace

import pytest
from factories import trajectory

from scope_fast import train
from scope_fast.build import build
from scope_fast.scope.trajectory import Trajectory
from scope_fast.tasks import score
from scope_fast.teacher import Reply, SolverTeacher
from scope_fast.trainer import Trainer
from scope_fast.verifier import Verifier

SETTINGS = {
    "rollout.engine": "transformers", "rollout.prompts_per_step": "10", "rollout.group_size": "4",
    "scope.repair_below": "1.0", "scope.max_repaired_per_group": "4", "prm.kind": "exact", "rollout.max_tokens": "96",
}  # fmt: skip


def make(stack: ExitStack, folder, **changed: str):
    words = [w for k, v in {**SETTINGS, **changed}.items() for w in (f"--{k.replace('__', '.')}", v)]
    config, *_ = train.parse(["--out", str(folder / "run"), *words])
    config.run_dir.mkdir()
    return build(config, stack)


@pytest.fixture
def stack():
    with ExitStack() as stack:
        yield stack


def funnel(metrics) -> tuple[int, ...]:
    counts = tuple(
        int(metrics[name])
        for name in ("scope/selected", "scope/repaired", "teacher/errors", "scope/accepted", "scope/rejected")
    )
    selected, repaired, errors, accepted, rejected = counts
    assert selected == repaired + errors and repaired == accepted + rejected
    return counts


def records(trainer) -> list[dict]:
    return [json.loads(line) for line in (trainer.config.run_dir / "rollouts.jsonl").read_text().splitlines()]


def test_an_exact_reward_model_and_the_solver_repair_all_they_are_given(stack, tmp_path):
    trainer = make(stack, tmp_path)
    metrics = trainer.step()
    selected, _, errors, accepted, rejected = funnel(metrics)
    assert selected == accepted > 0 and errors == rejected == 0
    for r in records(trainer):
        if r["repair"]:
            kept = r["response_ids"][: r["repair"]["kept_tokens"]]
            text = trainer.tokenizer.decode(kept + r["repair"]["suffix_ids"], skip_special_tokens=True)
            assert score(text, {"answer": r["answer"], "metadata": {"source_dataset": r["task"]}})[0] == 1.0
            assert r["repair"]["suffix_ids"][-1] == trainer.tokenizer.eos_token_id


class Awkward:
    """In turn: nothing, the prefix again, an unfinished text, a wrong answer, the solution."""

    def complete(self, requests):
        solved = SolverTeacher().complete(requests)
        kinds = ("empty", "prefix", "unfinished", "wrong", "solved")
        self.given = [kinds[i % 5] for i in range(len(requests))]
        made = {
            "empty": lambda i: Reply(" \n"),
            "prefix": lambda i: Reply(requests[i].prefix + solved[i].text),
            "unfinished": lambda i: Reply(solved[i].text, finished=False),
            "wrong": lambda i: Reply("1 + 1 = 3. Answer: 100000"),
            "solved": lambda i: solved[i],
        }
        self.replies = [made[kind](i) for i, kind in enumerate(self.given)]
        return self.replies


def test_every_way_a_teacher_can_be_useless_is_counted(stack, tmp_path):
    trainer = make(stack, tmp_path)
    trainer.teacher = teacher = Awkward()
    metrics = trainer.step()
    selected, _, errors, accepted, rejected = funnel(metrics)
    assert selected >= 5
    texts = [reply.text for reply, kind in zip(teacher.replies, teacher.given, strict=True) if kind != "empty"]
    written = sum(len(trainer.tokenizer.encode(text, add_special_tokens=False)) for text in texts)
    assert metrics["tokens/teacher"] == written > 0  # what was paid for, used or not
    assert errors == teacher.given.count("empty")
    assert accepted == teacher.given.count("solved")
    assert rejected == selected - errors - accepted
    reasons = {r["repair"]["reason"] for r in records(trainer) if r["repair"]}
    assert reasons == {
        "empty reply", "the suffix repeats the prefix", "the suffix did not finish within its budget",
        "verification: wrong answer", "",
    }  # fmt: skip
    for r in records(trainer):
        if r["repair"] and r["repair"]["status"] != "accepted":  # the failed rollout itself stays in the batch
            assert r["trained"]["response_ids"] == r["response_ids"] and set(r["trained"]["segment"]) == {1}


class Raising:
    def complete(self, requests):
        raise ConnectionError("the endpoint is gone")


class Hanging:
    def complete(self, requests):
        time.sleep(60)


@pytest.mark.parametrize(
    ("teacher", "reason"),
    [(Raising(), "ConnectionError: the endpoint is gone"), (Hanging(), "timed out after 0.2 s")],
)
def test_a_teacher_that_fails_altogether_costs_errors_and_nothing_else(teacher, reason, stack, tmp_path):
    trainer = make(stack, tmp_path, teacher__timeout_s="0.2")
    trainer.teacher = teacher
    selected, repaired, errors, _, _ = funnel(trainer.step())
    assert selected == errors > 0 and repaired == 0
    assert {r["repair"]["reason"] for r in records(trainer) if r["repair"]} == {reason}


@pytest.mark.parametrize("bad", [math.nan, -0.1, 1.5])
def test_an_invalid_probability_makes_a_rollout_unrepairable_and_is_counted(bad, stack, tmp_path):
    trainer = make(stack, tmp_path)
    exact = trainer.scorer

    def scorer(trajectories: list[Trajectory]) -> list[list[float]]:
        probs = exact(trajectories)
        probs[0][-1] = bad
        return probs

    trainer.scorer = scorer
    metrics = trainer.step()
    assert metrics["prm/invalid"] == 1
    funnel(metrics)
    unscored = [r for r in records(trainer) if r["reward"] == 0.0 and r["steps"] and r["step_probs"] is None]
    assert len(unscored) == 1 and not unscored[0]["selected"]


def test_a_hanging_and_a_crashing_verifier_leave_no_reward_behind(stack, tmp_path):
    trainer = make(stack, tmp_path)
    trainer.verifier = stack.enter_context(Verifier("fixtures.scorers:awkward", 2, timeout_s=0.5))
    metrics = trainer.step()
    lost = [r for r in records(trainer) if r["reward"] is None]
    verdicts = [r["verdict"] for r in lost]
    assert metrics["verifier/timeouts"] >= verdicts.count("timeout") > 0
    assert metrics["verifier/crashes"] >= verdicts.count("crash") > 0
    assert all(r["trained"] is None and not r["selected"] for r in lost)
    funnel(metrics)


def test_every_response_may_lack_a_verdict(stack, tmp_path):
    trainer = make(stack, tmp_path)
    trainer.verifier = stack.enter_context(Verifier("fixtures.scorers:parses", 2))
    assert trainer.step()["verifier/crashes"] == 40
    assert {record["verdict_reason"][-15:] for record in records(trainer)} == {"(scorers.py:11)"}


def test_prompts_that_fill_the_context_are_skipped_and_counted(stack, tmp_path):
    trainer = make(stack, tmp_path, rollout__context="40", rollout__max_tokens="16", teacher__max_tokens="16")
    lengths = []
    metrics = trainer.step()
    for r in records(trainer):
        lengths.append(len(r["prompt_ids"]) + len(r["response_ids"]))
    assert max(lengths) <= 40 and metrics["data/skipped_long"] > 0


def test_empty_responses_are_failures_that_cannot_be_repaired(stack, tmp_path, monkeypatch):
    trainer = make(stack, tmp_path)
    generate, end = trainer.engine.generate, trainer.tokenizer.eos_token_id
    (newline,) = trainer.tokenizer.encode("\n", add_special_tokens=False)

    def with_empty_ones(*arguments):
        first, *others = generate(*arguments)
        for i, ids in enumerate(([end], [newline, end])):
            first[i] = replace(first[i], token_ids=ids, logprobs=[-1.0] * len(ids), weight_versions=())
        return [first, *others]

    monkeypatch.setattr(trainer.engine, "generate", with_empty_ones)
    metrics = trainer.step()
    assert metrics["scope/empty"] == 2 and metrics["prompts/dropped"] == 0
    funnel(metrics)
    written = records(trainer)
    assert len(written) == 40 and [r["response_ids"] for r in written[:2]] == [[end], [newline, end]]
    assert all(r["reward"] == 0.0 and r["repair"] is None and r["trained"] for r in written[:2])


def test_what_would_keep_no_step_is_counted():
    """The first step is wrong, or the only one is the one that is not believed; neither is ever repaired."""
    wrong_first, wrong_later = trajectory((2, 2), first_error=0), trajectory((2, 2), first_error=1)
    only_one, all_right = trajectory((4,), first_error=1), trajectory((2, 2), first_error=2)
    right, unjudged = trajectory((4,), reward=1.0), trajectory((), first_error=None)
    group = [wrong_first, wrong_later, only_one, all_right, right, unjudged]
    sums = Trainer._sums(SimpleNamespace(counts=Counter(), done=1), [group], [])
    assert sums["scope/failed"] == 5 and sums["scope/no_prefix"] == 2


def test_two_minibatches_use_old_logprobs_and_stay_close_to_the_policy(stack, tmp_path):
    trainer = make(stack, tmp_path, learner__minibatches="2", learner__epochs="2", learner__lr="1e-4")
    metrics = trainer.step()
    assert metrics["policy/ratio_max"] > 1.0 and metrics["policy/kl"] > 0.0
    assert trainer.learner.steps == 4


def test_rollouts_are_written_as_often_as_asked(stack, tmp_path, monkeypatch):
    trainer = make(stack, tmp_path, logging__rollouts_every="2", steps="4")
    update = trainer.learner.update
    monkeypatch.setattr(trainer.learner, "update", lambda batches: {**update(batches), "learner/skipped_updates": 1})
    for _ in range(3):
        trainer.step()
    assert {r["step"] for r in records(trainer)} == {2}
    failed = sorted(path.name for path in (trainer.config.run_dir / "failed").iterdir())
    assert failed == ["step_1.jsonl", "step_2.jsonl", "step_3.jsonl"]  # kept whether due or not
