"""The loop: rollouts, verdicts, first errors, repairs, one update, one weight sync. `Trainer.step` is all of it.

The five methods share this file: what differs is a `Method` (scope/advantage.py), made from the configuration. Under
torchrun every rank runs it on its share of the step's prompts; the learner and the weight sync join them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from statistics import fmean

import torch

from scope_fast import distributed, health
from scope_fast.batch import TrainSequence, minibatch_of
from scope_fast.checkpoint import capture_rng, restore_rng
from scope_fast.config import Config
from scope_fast.data import PromptSource
from scope_fast.diversity import diversity_values
from scope_fast.learner import Learner
from scope_fast.metrics import Timer, fold
from scope_fast.prm.scorers import StepScorer
from scope_fast.records import RolloutLog, TokenTexts, record, to_json
from scope_fast.rollout.base import RolloutEngine, Sampling
from scope_fast.sampler import Group, Sampler
from scope_fast.scope.advantage import Stamped, method
from scope_fast.scope.localize import first_error, is_near_miss, kept_steps, valid_probs
from scope_fast.scope.rectify import Rejected, splice
from scope_fast.scope.trajectory import Prompt, Trajectory
from scope_fast.seeds import seed_of
from scope_fast.teacher import Reply, Request, Teacher, TeacherError, ask, counts_of
from scope_fast.verifier import Verifier


class Trainer:
    """Owns the loop's parts and its step counter; `step()` is one iteration and returns the metrics of it."""

    def __init__(
        self,
        config: Config,
        tokenizer,
        data: PromptSource,
        engine: RolloutEngine,
        verifier: Verifier,
        scorer: StepScorer,
        teacher: Teacher,
        learner: Learner,
        log: RolloutLog,
    ) -> None:
        self.config, self.tokenizer, self.data, self.engine = config, tokenizer, data, engine
        self.verifier, self.scorer, self.teacher, self.learner, self.log = verifier, scorer, teacher, learner, log
        self.done = 0  # steps
        self.sampler, self.token_texts = Sampler(config, tokenizer, data, engine), TokenTexts(tokenizer)
        synchronize = torch.cuda.synchronize if learner.device.type == "cuda" else None
        self.timer, self.counts = Timer(synchronize), Counter[str]()

    def step(self) -> dict[str, float]:
        """One iteration (design: the loop fits a screen)."""
        self.counts.clear()
        self.timer.metrics()  # what happened between two steps belongs to neither
        mode = method(self.config, self.done)
        with self.timer("generate"):
            groups = self.sampler.take(self.done)
            self.engine.sleep()  # until the sync its GPU memory may be the learner's
            self.counts["scope/empty"] = sum(not t.steps for group in groups for t in group)
        with self.timer("verify"):
            self.verify(groups)
        with self.timer("prm"):
            self.localize(groups, mode.scores)
        chosen = [trajectory for group in groups for trajectory in mode.choose(group)]
        with self.timer("teacher"):
            self.repair(chosen)
        with self.timer("learn"):
            stamped = [mode.stamp(group, self.config.loss) for group in groups]
            learned = self.learner.update(self.minibatches(groups, stamped))
        self.done += 1
        with self.timer("sync"):
            self.engine.update_weights(self.learner.model, version=self.done)
        self.record(groups, stamped, failed=learned["learner/skipped_updates"] > 0)
        return self.metrics(groups, chosen, learned)

    def verify(self, groups: list[Group]) -> None:
        """A reward for every rollout; one that hangs or crashes the verifier keeps None and is not trained on."""
        members = [t for group in groups for t in group]
        verdicts = self.verifier.score([(t.text, t.prompt.entry) for t in members])
        for trajectory, verdict in zip(members, verdicts, strict=True):
            trajectory.reward, trajectory.verdict, trajectory.answer = verdict.reward, verdict.status, verdict.answer
            trajectory.verdict_reason = verdict.reason
            self._count_verdict(verdict)

    def _count_verdict(self, verdict) -> None:
        self.counts["verifier/timeouts"] += verdict.status == "timeout"
        self.counts["verifier/crashes"] += verdict.status == "crash"

    def localize(self, groups: list[Group], scores: str) -> None:
        """Step probabilities and first errors, where the method (or prm.monitor) asks for them."""
        wanted = scores if scores != "none" or not self.config.prm.monitor else "failed"
        members = [t for group in groups for t in group if t.steps and (wanted == "all" or t.failed)]
        if wanted == "none" or not members:
            return
        for trajectory, probs in zip(members, self.scorer(members), strict=True):
            if valid_probs(probs, len(trajectory.steps)):
                trajectory.step_probs = probs
                trajectory.first_error = first_error(probs, self.config.prm.tau)
            else:
                self.counts["prm/invalid"] += 1  # the rollout stays in the batch, as a failure that cannot be repaired

    def repair(self, chosen: Group) -> None:
        """The teacher's suffixes, spliced and verified: chosen = accepted + rejected + errors."""
        requests = [self._request(t) for t in chosen]
        replies = ask(self.teacher, requests, self.config.teacher.timeout_s)
        self.counts["scope/repaired"] += sum(isinstance(reply, Reply) for reply in replies)
        pending = [
            t for t, request, reply in zip(chosen, requests, replies, strict=True) if self._splice(t, request, reply)
        ]
        verdicts = self.verifier.score([self._verifier_item(t) for t in pending])
        for trajectory, verdict in zip(pending, verdicts, strict=True):
            self._count_verdict(verdict)
            repair, repair.reward = trajectory.repair, verdict.reward
            passed = verdict.reward is not None and verdict.reward > 0.0
            repair.status = "accepted" if passed else "rejected"
            repair.reason = (
                "" if passed else f"verification: {verdict.status if verdict.reward is None else 'wrong answer'}"
            )
        for trajectory in chosen:
            self.counts[f"repair/{trajectory.repair.status}"] += 1

    def _request(self, trajectory: Trajectory) -> Request:
        prefix = trajectory.token_ids[: trajectory.repair.kept_tokens]
        seed = self._seed("teacher", trajectory.group, trajectory.prompt.id, trajectory.sample)
        room = self.config.rollout.context - len(trajectory.prompt.ids) - len(prefix)
        return Request(trajectory.prompt, prefix, self.tokenizer.decode(prefix), seed, room)

    def _splice(self, trajectory: Trajectory, request: Request, reply: Reply | TeacherError) -> bool:
        """Whether there is a suffix to verify; otherwise the repair says why not."""
        repair = trajectory.repair
        if isinstance(reply, TeacherError):
            repair.status, repair.reason = "error", str(reply)
            return False
        repair.suffix = reply.text
        try:
            if not reply.finished:
                raise Rejected("the suffix did not finish within its budget")
            budget = min(request.room, self.config.teacher.max_tokens)
            repair.suffix_ids = splice(self.tokenizer, request.prefix_ids, reply.text, budget)
        except Rejected as rejection:
            repair.status, repair.reason = "rejected", str(rejection)
            self.counts["tokens/teacher"] += len(self.tokenizer.encode(reply.text, add_special_tokens=False))
            return False
        self.counts["tokens/teacher"] += len(repair.suffix_ids) - 1
        return True

    def _verifier_item(self, trajectory: Trajectory) -> tuple[str, dict]:
        kept = trajectory.token_ids[: trajectory.repair.kept_tokens]
        text = self.tokenizer.decode(kept + trajectory.repair.suffix_ids, skip_special_tokens=True)
        return text, trajectory.prompt.entry

    def minibatches(self, groups: list[Group], stamped: list[Stamped]) -> list[list[TrainSequence]]:
        """Groups dealt out to `learner.minibatches` optimiser steps by their number in the step, on whatever rank they
        are; a group is never split."""
        dealt: list[list[TrainSequence]] = [[] for _ in range(self.config.learner.minibatches)]
        for group, sequences in zip(groups, stamped, strict=True):
            step = minibatch_of(group[0].group, self.config.rollout.prompts_per_step, len(dealt))
            dealt[step] += [s for s in sequences if s is not None]
        return dealt

    def _seed(self, *what: object) -> int:
        return seed_of(self.config.seed, self.done, *what)

    def record(self, groups: list[Group], stamped: list[Stamped], failed: bool) -> None:
        """One line of rollouts.jsonl for every rollout, in the order of the prompts; rank 0 writes all ranks' lines.

        failed: the update was skipped, at least in part: the lines go to failed/ too, even at a step that logs none.
        """
        due = self.done % self.config.logging.rollouts_every == 0
        if not (due or failed):
            return
        lines = {
            (trajectory.group, trajectory.sample): to_json(record(self.done, trajectory, sequence, self.token_texts))
            for group, sequences in zip(groups, stamped, strict=True)
            for trajectory, sequence in zip(group, sequences, strict=True)
        }
        parts = distributed.gather_on_main(lines)
        if parts is None:
            return
        every = {key: line for part in parts for key, line in part.items()}
        for key in sorted(every) if due else ():
            self.log.append(every[key])
        self.log.flush()
        if failed:
            health.keep_failed(self.config.run_dir, self.done, [every[key] for key in sorted(every)])

    def pass_rate(self, prompts: list[Prompt], samples: int, temperature: float) -> tuple[float, int]:
        """Share of verified samples that pass, and how many got no verdict. health.Unhealthy when none did."""
        mine = prompts[distributed.rank() :: distributed.world_size()]
        settings = self.config.rollout
        sampling = Sampling(temperature, settings.top_p, settings.max_tokens, (self.tokenizer.eos_token_id,))
        seeds = [[seed_of("heldout", p.id, i) for i in range(samples)] for p in mine]
        outputs = self.engine.generate([list(p.ids) for p in mine], samples, sampling, seeds)
        items = [
            (self.tokenizer.decode(rollout.token_ids, skip_special_tokens=True), prompt.entry)
            for prompt, rollouts in zip(mine, outputs, strict=True)
            for rollout in rollouts
        ]
        verdicts = [(v.reward, v.reason) for v in self.verifier.score(items)]
        verdicts = [verdict for part in distributed.gather(verdicts) for verdict in part]
        rewards = [reward for reward, _ in verdicts if reward is not None]
        if not rewards:
            raise health.Unhealthy(
                f"verifier.score: no verdict on any of {len(verdicts)} held-out responses; the first: {verdicts[0][1]}"
            )
        return fmean(reward > 0 for reward in rewards), len(verdicts) - len(rewards)

    def metrics(self, groups: list[Group], chosen: Group, learned: dict[str, float]) -> dict[str, float]:
        """The step's metrics, of all ranks; what is undefined is left out."""
        mine = (self._sums(groups, chosen), self._values(groups), self.timer.metrics())
        sums, values, seconds = zip(*distributed.gather(mine), strict=True)
        asked = distributed.gather(counts_of(self.teacher))  # a rank that asked nothing counts nothing
        result = {
            **learned,
            **{name: sum(part[name] for part in sums) for name in sums[0]},
            **fold({name: [v for part in values for v in part[name]] for name in values[0]}),
            **self.data.take_counts(),  # the same on every rank
            **{name: sum(part.get(name, 0) for part in asked) for name in sorted(set().union(*asked))},
            "sync/weight_version": self.engine.version,
            **{name: max(part[name] for part in seconds) for name in seconds[0]},  # the others wait for the slowest
        }
        for name in ("sampling/entropy", "sampling/staleness"):  # means over tokens
            result[name] /= max(result["tokens/rollout"], 1)
        result["perf/tokens_per_s"] = result["tokens/rollout"] / result["time/step_s"]
        if "perf/model_flops" in result and self.learner.peak_tflops:
            possible = result["time/learn_s"] * distributed.world_size() * self.learner.peak_tflops * 1e12
            result["perf/mfu"] = result["perf/model_flops"] / possible
        return result

    def _sums(self, groups: list[Group], chosen: Group) -> dict[str, float]:
        """What adds up over ranks; the funnel: selected = repaired + errors, repaired = accepted + rejected."""
        failed = [t for group in groups for t in group if t.failed]
        counted = ("verifier/timeouts", "verifier/crashes", "prm/invalid", "scope/empty", "scope/repaired")
        return {
            **{name: self.counts[name] for name in counted},
            "prompts/dropped": sum(all(t.reward is None for t in group) for group in groups),
            "scope/failed": len(failed),
            "scope/selected": len(chosen),
            "scope/accepted": self.counts["repair/accepted"],
            "scope/rejected": self.counts["repair/rejected"],
            "teacher/errors": self.counts["repair/error"],
            "scope/no_prefix": sum(
                t.first_error is not None and kept_steps(t.first_error, len(t.steps)) == 0 for t in failed
            ),
            "tokens/rollout": sum(len(t.token_ids) for group in groups for t in group),
            "sampling/entropy": -sum(sum(t.logprobs) for group in groups for t in group),
            "sampling/staleness": sum(
                (self.done - 1 - version) * (end - start)
                for group in groups
                for t in group
                for version, start, end in t.weight_versions or ((t.weight_version, 0, len(t.token_ids)),)
            ),
            "tokens/teacher": self.counts["tokens/teacher"],
        }

    def _values(self, groups: list[Group]) -> dict[str, list[float]]:
        """What is averaged over rollouts (diversity/distinct_*: the median over prompts)."""
        members = [t for group in groups for t in group]
        verified = [t for t in members if t.reward is not None]
        located = [t for t in members if t.failed and t.first_error is not None]
        return {
            "reward/pass_rate": [t.reward > 0 for t in verified],
            "reward/mean": [t.final_reward for t in verified],
            "scope/near_miss_rate": [is_near_miss(t.first_error, len(t.steps)) for t in located],
            "scope/first_error": [t.first_error for t in located],
            "scope/prefix_ratio": [prefix_share(t) for t in located],
            "response/length": [len(t.token_ids) for t in members],
            "response/truncated": [t.finish_reason == "length" for t in members],
            **diversity_values([[t.token_ids for t in g] for g in groups], [[t.answer for t in g] for g in groups]),
        }

    def state_dict(self) -> dict[str, object]:
        """All a run needs to go on bit for bit. Requests are seeded by step and prompt, so the engine has no state."""
        state = {"sampler": self.sampler.state_dict(), "done": self.done, "rng": capture_rng()}
        return {**self.learner.state_dict(), "trainer": state}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """The inverse of `state_dict`; the engine gets the weights too."""
        self.learner.load_state_dict(state)
        self.sampler.load_state_dict(state["trainer"]["sampler"])
        self.done = state["trainer"]["done"]
        self.engine.update_weights(self.learner.model, version=self.done)
        restore_rng(state["trainer"]["rng"])

    def run(self) -> Iterator[tuple[int, dict[str, float]]]:
        """Steps up to `config.steps`, from where the run stands. Unhealthy after too many failed updates in a row."""
        while self.done < self.config.steps:
            metrics = self.step()
            yield self.done, metrics
            skipped, limit = self.learner.skipped_in_a_row, self.config.learner.max_skipped_updates
            health.check(self.config.run_dir, self.done, skipped, limit)


def prefix_share(trajectory: Trajectory) -> float:
    """Tokens before the first error over all tokens of the response."""
    before = trajectory.steps[trajectory.first_error - 1][1] if trajectory.first_error else 0
    return before / len(trajectory.token_ids)
