"""The loop when its parts misbehave: nothing is lost silently, and the funnel adds up exactly."""

import json
import math
import time
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch
from factories import accepted, byte_level, configured, prompt, trajectory

from scope_fast import distributed, train
from scope_fast.build import build
from scope_fast.health import Unhealthy
from scope_fast.metrics import fold
from scope_fast.rollout.base import Rollout, Sampling
from scope_fast.scope.trajectory import Trajectory
from scope_fast.tasks import score
from scope_fast.teacher import Reply, Request, SolverTeacher
from scope_fast.trainer import Trainer
from scope_fast.verifier import Verdict, Verifier

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
    written = records(trainer)
    logprobs, passed = [x for r in written for x in r["logprobs"]], sum(r["reward"] > 0 for r in written)
    assert metrics["sampling/entropy"] == pytest.approx(-fmean(logprobs), rel=1e-9)
    assert metrics["reward/pass_rate"] == passed / 40 and metrics["reward/mean"] == (passed + accepted) / 40
    assert metrics["perf/tokens_per_s"] == metrics["tokens/rollout"] / metrics["time/step_s"]
    assert metrics["tokens/rollout"] == len(logprobs)
    for r in written:
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


def test_faults_of_the_verifier_on_repairs_are_counted_too(stack, tmp_path):
    trainer = make(stack, tmp_path)
    judge, asked = trainer.verifier.score, []

    def score(items):
        asked.append(len(items))
        return judge(items) if len(asked) == 1 else [Verdict(None, "crash", None, "no")] * len(items)

    trainer.verifier = SimpleNamespace(score=score)
    metrics = trainer.step()
    selected, *_, rejected = funnel(metrics)
    assert metrics["verifier/crashes"] == selected == rejected > 0
    assert {r["repair"]["reason"] for r in records(trainer) if r["repair"]} == {"verification: crash"}
    assert all(r["trained"]["response_ids"] == r["response_ids"] for r in records(trainer))


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


def test_weights_that_have_diverged_end_the_run_by_name(stack, tmp_path):
    trainer = make(stack, tmp_path)
    with torch.no_grad():
        for parameter in trainer.engine._model.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(Unhealthy, match=r"not finite: its weights have diverged \(learner.lr="):
        trainer.step()


def test_weights_that_have_diverged_on_another_rank_end_this_one_too(stack, tmp_path, monkeypatch):
    trainer = make(stack, tmp_path)
    monkeypatch.setattr(distributed, "gather", lambda broken: [broken, True])
    with pytest.raises(Unhealthy, match="its weights have diverged"):
        trainer.sampler.take(0)


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


def test_the_averages_of_a_step_by_hand():
    """Repaired; right by itself, and scored; cut off; without a verdict."""
    repaired = trajectory((2, 2), first_error=1, repair=accepted(1, 2, [7, 0]))
    right = trajectory((4,), first_error=0, reward=1.0)
    cut = trajectory((2, 2, 2), first_error=1, eos=False)
    unjudged = trajectory((2,), first_error=0, reward=None)
    values = fold(Trainer._values(SimpleNamespace(), [[repaired, right], [cut, unjudged]]))
    assert (values["reward/pass_rate"], values["reward/mean"]) == (1 / 3, 2 / 3)
    assert (values["scope/near_miss_rate"], values["scope/first_error"]) == (1 / 2, 1.0)  # of repaired and cut
    assert values["scope/prefix_ratio"] == pytest.approx((2 / 5 + 2 / 6) / 2)
    assert (values["response/length"], values["response/truncated"]) == ((5 + 5 + 6 + 3) / 4, 1 / 4)


def test_the_sums_of_a_step_by_hand():
    whole = trajectory((1,), eos=True, weight_version=1)  # 2 tokens, a step of weights behind
    switched = trajectory((3,), reward=None, eos=False, weight_versions=((0, 0, 1), (2, 1, 3)))
    alone = trajectory((1,), reward=None, eos=False, weight_version=2)
    sums = Trainer._sums(SimpleNamespace(counts=Counter(), done=3), [[whole, switched], [alone]], [whole])
    assert (sums["tokens/rollout"], sums["sampling/entropy"]) == (2 + 3 + 1, 3.0 + 6.0 + 1.0)
    assert sums["sampling/staleness"] == 2 * 1 + 1 * 2 + 2 * 0 + 1 * 0
    assert (sums["prompts/dropped"], sums["scope/failed"], sums["scope/selected"]) == (1, 1, 1)


@pytest.mark.parametrize(
    ("scores", "monitor", "scored"),
    [("all", False, [0, 1]), ("failed", False, [0]), ("none", True, [0]), ("none", False, [])],
)
def test_who_is_scored_and_where_the_first_error_is(scores, monitor, scored):
    group = [trajectory((2, 2, 2)), trajectory((2,), reward=1.0), trajectory((2,), reward=None), trajectory(())]
    group = group[:2] + group[3:] if scores == "all" else group
    probs = {3: [0.95, 0.8, 0.95], 1: [0.9]}
    config = configured(**{"prm.tau": 0.9, "prm.monitor": str(monitor).lower()})
    loop = SimpleNamespace(config=config, counts=Counter(), scorer=lambda ts: [probs[len(t.steps)] for t in ts])
    Trainer.localize(loop, [group], scores)
    assert [i for i, t in enumerate(group) if t.step_probs] == scored
    assert [t.first_error for t in group if t.step_probs] == [1, 1][: len(scored)]  # 0.8 is below; 0.9 is not


@pytest.mark.parametrize(("room", "most", "budget"), [(3, 99, 3), (99, 4, 4)])
def test_a_suffix_fits_the_context_and_the_teacher_s_budget(room, most, budget):
    config = configured(**{"teacher.max_tokens": most, "rollout.context": 40, "rollout.max_tokens": 30})
    loop = SimpleNamespace(config=config, tokenizer=byte_level(), counts=Counter(), _seed=lambda *what: what)
    failed = trajectory((2, 2), repair=accepted(1, 2, []), group=4, sample=2)
    asked = Trainer._request(loop, failed)
    assert (asked.prefix_ids, asked.room) == ([100, 101], 40 - 3 - 2)
    assert asked.seed == ("teacher", 4, "chain_sum/0", 2)
    failed.repair.status = "pending"
    assert not Trainer._splice(loop, failed, Request(failed.prompt, [], "", 0, room), Reply("1 + 1 = 2 and on"))
    assert failed.repair.status == "rejected" and failed.repair.reason.endswith(f"budget of {budget}")


def test_what_is_asked_of_the_engine_and_made_of_its_answer(stack, tmp_path, monkeypatch):
    trainer = make(
        stack, tmp_path, rollout__temperature="0.7", rollout__top_p="0.9", rollout__prompts_per_step="2",
        rollout__group_size="2", scope__step_separator=";",
    )  # fmt: skip
    asked, end = [], trainer.tokenizer.eos_token_id
    ids = trainer.tokenizer.encode("1;2")

    def generate(prompts, n, sampling, seeds):
        asked.append((sampling, [seed for row in seeds for seed in row]))
        ends = (([*ids, end], "stop"), (ids, "length"))
        return [[Rollout(p, made, [-1.0] * len(made), why, 0) for made, why in ends[:n]] for p in prompts]

    monkeypatch.setattr(trainer.engine, "generate", generate)
    monkeypatch.setattr(trainer.data, "next", lambda count: [prompt()] * count)  # a small file brings one twice
    for step in range(2):
        for stopped, cut in trainer.sampler.take(step):
            assert stopped.text == cut.text == "1;2"
            assert [len(t.steps) for t in (stopped, cut)] == [2, 2]
            assert stopped.steps[-1][1] == cut.steps[-1][1] == len(ids)  # an EOS belongs to no step
    assert {sampling for sampling, _ in asked} == {Sampling(0.7, 0.9, 96, (end,))}
    assert len({seed for _, seeds in asked for seed in seeds}) == 2 * 2 * 2

    asked.clear()
    verdicts = [Verdict(1.0, "ok"), Verdict(0.0, "ok"), Verdict(-1.0, "ok"), Verdict(None, "timeout")]
    trainer.verifier = SimpleNamespace(score=lambda items: verdicts[: len(items)])
    two = [prompt(), replace(prompt(), id="chain_sum/1")]
    assert trainer.pass_rate(two, 2, 0.5) == trainer.pass_rate(two, 2, 0.5) == (1 / 3, 1)
    assert [sampling for sampling, _ in asked] == [Sampling(0.5, 0.9, 96, (end,))] * 2
    assert asked[0] == asked[1] and len(set(asked[0][1])) == 4  # the same draws at every evaluation
