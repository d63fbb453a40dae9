"""Scorers: probability that each step of a response is right, one list of probabilities per trajectory."""

from __future__ import annotations

from itertools import pairwise
from typing import Protocol

import torch

from scope_fast.batch import bins
from scope_fast.ops.step_pool import PrmHead, step_pool
from scope_fast.scope.trajectory import Trajectory
from scope_fast.tasks import get_task


class StepScorer(Protocol):
    def __call__(self, trajectories: list[Trajectory]) -> list[list[float]]:
        """One probability per step of each trajectory; all of them have steps."""


class ExactScorer:
    """The task's own checker: 1.0 where a step stands in the worked solution, else 0.0."""

    def __init__(self, tokenizer) -> None:
        self._tokenizer = tokenizer

    def __call__(self, trajectories: list[Trajectory]) -> list[list[float]]:
        return [[float(ok) for ok in self._check(t)] for t in trajectories]

    def _check(self, trajectory: Trajectory) -> list[bool]:
        lines = [self._tokenizer.decode(trajectory.token_ids[a:b]).strip() for a, b in trajectory.steps]
        return get_task(trajectory.prompt.task).check(trajectory.prompt.entry, lines)


class TokenClassifierScorer:
    """A Hugging Face token classifier read at each step's last token, through `step_pool`: the head sees nothing else.

    model: a ...ForTokenClassification of two labels, label 1 = right, that shares the student's tokenizer.
    Responses are packed without padding into passes of at most `token_budget` tokens.
    """

    def __init__(self, model: torch.nn.Module, token_budget: int) -> None:
        if model.config.num_labels != 2:
            raise ValueError(f"prm.path: a classifier of {model.config.num_labels} labels, expected 2")
        if type(getattr(model, "score", None)) is not torch.nn.Linear:
            raise ValueError(f"prm.path: {type(model).__name__} has no linear `score` head")
        self._body, self._budget = model.base_model.eval(), token_budget
        self._head = PrmHead(
            model.score.weight.detach(), None if model.score.bias is None else model.score.bias.detach()
        )

    @torch.inference_mode()
    def __call__(self, trajectories: list[Trajectory]) -> list[list[float]]:
        if not trajectories:
            return []
        tokens = [[*t.prompt.ids, *t.token_ids[: t.steps[-1][1]]] for t in trajectories]
        probs: list[list[float]] = [[] for _ in trajectories]
        for group in bins([len(ids) for ids in tokens], self._budget):
            for i, values in zip(
                group, self._score([tokens[i] for i in group], [trajectories[i] for i in group]), strict=True
            ):
                probs[i] = values
        return probs

    def _score(self, tokens: list[list[int]], trajectories: list[Trajectory]) -> list[list[float]]:
        device = self._head.weight.device
        ids = torch.tensor([token for sequence in tokens for token in sequence], device=device)
        positions = torch.cat([torch.arange(len(sequence)) for sequence in tokens]).to(device)
        ends, cu_steps, start = [], [0], 0
        for sequence, trajectory in zip(tokens, trajectories, strict=True):
            ends += [start + len(trajectory.prompt.ids) + end - 1 for _, end in trajectory.steps]
            cu_steps.append(len(ends))
            start += len(sequence)
        output = self._body(input_ids=ids[None], position_ids=positions[None], attention_mask=None, use_cache=False)
        pooled = step_pool(
            output.last_hidden_state[0],
            self._head,
            torch.tensor(ends, device=device),
            torch.tensor(cu_steps, device=device),
        )
        prob = pooled.prob.tolist()
        return [prob[a:b] for a, b in pairwise(cu_steps)]
