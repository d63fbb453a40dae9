"""The rollouts of a step: prompts off the cursor, seeded requests, trajectories; sampled one step ahead if asked to.

    overlap one_step          this thread                          another one
    take(n)                   waits for the rollouts of step n
                              draws the prompts of step n + 1      samples them: weights n
                              verdicts, repairs, update of step n  ..
                              weights n + 1, in flight             goes on, exactly, with weights n + 1
    take(n + 1)               ..

A rollout of step n + 1 is then of weights n, of n + 1, or of n up to some token and of n + 1 from there. The engine
says which, and its own log-probabilities are those of the weights that drew each token: truncated importance sampling
(`loss.importance_cap`) corrects for the difference to the learner's.
"""

from __future__ import annotations

import math
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from scope_fast import distributed, health
from scope_fast.config import Config
from scope_fast.data import PromptSource
from scope_fast.rollout.base import Rollout, RolloutEngine, Sampling
from scope_fast.scope.steps import TokenBytes, split_steps
from scope_fast.scope.trajectory import Prompt, Trajectory
from scope_fast.seeds import seed_of

Group = list[Trajectory]
Numbered = list[tuple[int, Prompt]]


@dataclass(frozen=True)
class Ahead:
    """Rollouts that are being sampled. cursor: of the data, before their prompts were drawn."""

    cursor: int
    prompts: Numbered
    outputs: Future[list[list[Rollout]]]


class Sampler:
    """Groups of trajectories, this rank's share of every step's."""

    def __init__(self, config: Config, tokenizer, data: PromptSource, engine: RolloutEngine) -> None:
        self._config, self._tokenizer, self._data, self._engine = config, tokenizer, data, engine
        self._token_bytes = TokenBytes(tokenizer)
        self._ahead: Ahead | None = None
        overlaps = config.rollout.overlap == "one_step"
        self._thread = ThreadPoolExecutor(1, "sampler") if overlaps else None

    def take(self, step: int) -> list[Group]:
        """The rollouts of a step, which must be asked for in order. Raises what the engine raised."""
        if self._ahead is None:
            prompts = self._draw()
            outputs = self._sample(step, prompts)
        else:
            prompts, outputs = self._ahead.prompts, self._ahead.outputs.result()
            self._ahead = None
        if self._thread is not None and step + 1 < self._config.steps:
            cursor, following = self._data.cursor, self._draw()
            self._ahead = Ahead(cursor, following, self._thread.submit(self._sample, step + 1, following))
        self._check_finite(step, outputs)
        return [
            [self._trajectory(prompt, number, i, rollout) for i, rollout in enumerate(rollouts)]
            for (number, prompt), rollouts in zip(prompts, outputs, strict=True)
        ]

    def _check_finite(self, step: int, outputs: list[list[Rollout]]) -> None:
        """Unhealthy, on every rank, where the model's probabilities are no numbers: its weights have diverged."""
        total = sum(sum(r.logprobs) for rollouts in outputs for r in rollouts)  # a NaN or an infinity stays in it
        broken = not math.isfinite(total)
        if any(distributed.gather(broken)):
            raise health.Unhealthy(
                f"the model of step {step} gives tokens log-probabilities that are not finite: its weights have "
                f"diverged (learner.lr={self._config.learner.lr:g}). A checkpoint of that step goes on from them: "
                "remove it to go on from an earlier one"
            )

    def _draw(self) -> Numbered:
        """This rank's share of the next step's prompts, each with its number; every rank moves the same cursor."""
        prompts = list(enumerate(self._data.next(self._config.rollout.prompts_per_step)))
        return prompts[distributed.rank() :: distributed.world_size()]

    def _sample(self, step: int, numbered: Numbered) -> list[list[Rollout]]:
        """G rollouts of every prompt, each request seeded by what it is, so that a resumed run draws the same."""
        settings = self._config.rollout
        sampling = Sampling(settings.temperature, settings.top_p, settings.max_tokens, (self._tokenizer.eos_token_id,))
        # numbered too: a small file of prompts may bring one twice in a step
        seeds = [
            [seed_of(self._config.seed, step, "rollout", number, prompt.id, i) for i in range(settings.group_size)]
            for number, prompt in numbered
        ]
        return self._engine.generate([list(p.ids) for _, p in numbered], settings.group_size, sampling, seeds)

    def _trajectory(self, prompt: Prompt, group: int, sample: int, rollout: Rollout) -> Trajectory:
        ids = rollout.token_ids
        separator = self._config.scope.step_separator.encode()
        return Trajectory(
            prompt, group, sample, ids, rollout.logprobs, rollout.finish_reason, rollout.weight_version,
            weight_versions=rollout.weight_versions,
            text=self._tokenizer.decode(ids, skip_special_tokens=True),
            steps=split_steps(self._token_bytes(ids), separator, rollout.finish_reason == "stop"),
        )  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        """The cursor and what was sampled ahead, which is waited for. Where that failed, nothing: the step that is done
        is saved without, and a run that goes on samples it again."""
        if self._ahead is None:
            return {"cursor": self._data.cursor, "ahead": None}
        if (error := self._ahead.outputs.exception()) is not None:
            print(f"saved without the rollouts sampled ahead, which failed: {error}", file=sys.stderr, flush=True)
            return {"cursor": self._ahead.cursor, "ahead": None}
        outputs = self._ahead.outputs.result()
        ahead = {
            "world_size": distributed.world_size(),
            "rollouts": [[asdict(rollout) for rollout in rollouts] for rollouts in outputs],
        }
        return {"cursor": self._ahead.cursor, "ahead": ahead}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of `state_dict`. On another number of ranks, what was sampled ahead is sampled again."""
        self._ahead, self._data.cursor = None, state["cursor"]
        ahead = state["ahead"]
        if ahead is None:
            return
        if ahead["world_size"] != distributed.world_size():
            if distributed.is_main():
                print(
                    f"saved by {ahead['world_size']} ranks: the rollouts sampled ahead are sampled again by "
                    f"{distributed.world_size()}",
                    flush=True,
                )
            return
        outputs: Future[list[list[Rollout]]] = Future()
        outputs.set_result([[Rollout(**values) for values in rollouts] for rollouts in ahead["rollouts"]])
        self._ahead = Ahead(state["cursor"], self._draw(), outputs)
        self._data.take_counts()  # the step before the checkpoint has already reported this draw's counts
