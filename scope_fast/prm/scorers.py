"""Scorers: probability that each step of a response is right, one list of probabilities per trajectory."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Protocol

import torch

from scope_fast.batch import bins
from scope_fast.model_checks import check_packing
from scope_fast.ops.step_pool import PrmHead, step_pool
from scope_fast.prm.formats import Encoded
from scope_fast.scope.trajectory import Trajectory
from scope_fast.tasks import get_task


class StepScorer(Protocol):
    def __call__(self, trajectories: list[Trajectory]) -> list[list[float]]:
        """One probability per step of each trajectory; all of them have steps."""


class ExactScorer:
    """The task's own checker: 1.0 where a step stands in the worked solution, else 0.0.

    A row that bears a task's name without what its working is made of gets no probability: prm/invalid counts it.
    """

    def __init__(self, tokenizer) -> None:
        self._tokenizer = tokenizer

    def __call__(self, trajectories: list[Trajectory]) -> list[list[float]]:
        return [[float(ok) for ok in self._check(t)] for t in trajectories]

    def _check(self, trajectory: Trajectory) -> list[bool]:
        lines = [self._tokenizer.decode(trajectory.token_ids[a:b]).strip() for a, b in trajectory.steps]
        try:
            return get_task(trajectory.prompt.task).check(trajectory.prompt.entry, lines)
        except ValueError:
            return []


class TokenClassifierScorer:
    """A Hugging Face token classifier read at each step's last token, through `step_pool`: the head sees nothing else.

    model: a ...ForTokenClassification of two labels, label 1 = right, that shares the student's tokenizer.
    Responses are packed without padding into passes of at most `token_budget` tokens. One that is too long for the
    model gets no probability: the trainer counts it as prm/invalid.
    """

    def __init__(self, model: torch.nn.Module, token_budget: int) -> None:
        if model.config.num_labels != 2:
            raise ValueError(f"prm.path: a classifier of {model.config.num_labels} labels, expected 2")
        if type(getattr(model, "score", None)) is not torch.nn.Linear:
            raise ValueError(f"prm.path: {type(model).__name__} has no linear `score` head")
        check_packing(model)
        self._body, self._budget = model.base_model.eval(), token_budget
        self._context = model.config.max_position_embeddings
        self._head = PrmHead(
            model.score.weight.detach(), None if model.score.bias is None else model.score.bias.detach()
        )

    def __call__(self, trajectories: list[Trajectory]) -> list[list[float]]:
        sequences = []
        for t in trajectories:
            ids = [*t.prompt.ids, *t.token_ids[: t.steps[-1][1]]]
            sequences.append(Encoded(ids, [len(t.prompt.ids) + end - 1 for _, end in t.steps]))
        return scores_of_those_that_fit(
            sequences, self._context, lambda fitting: packed_scores(self._body, self._head, fitting, self._budget)
        )


def scores_of_those_that_fit(
    sequences: list[Encoded], context: int, score: Callable[[list[Encoded]], list[list[float]]]
) -> list[list[float]]:
    """`score` of the sequences that have rows and at most `context` tokens, in place; no probability for the others."""
    probs: list[list[float]] = [[] for _ in sequences]
    if fits := [i for i, sequence in enumerate(sequences) if sequence.rows and len(sequence.ids) <= context]:
        for i, values in zip(fits, score([sequences[i] for i in fits]), strict=True):
            probs[i] = values
    return probs


@torch.inference_mode()
def packed_scores(
    body: torch.nn.Module, head: PrmHead, sequences: list[Encoded], token_budget: int
) -> list[list[float]]:
    """The head's probability at the rows of each sequence, packed without padding into passes of `token_budget`."""
    probs: list[list[float]] = [[] for _ in sequences]
    for group in bins([len(sequence.ids) for sequence in sequences], token_budget):
        for i, values in zip(group, _one_pass(body, head, [sequences[i] for i in group]), strict=True):
            probs[i] = values
    return probs


def _one_pass(body: torch.nn.Module, head: PrmHead, sequences: list[Encoded]) -> list[list[float]]:
    device = head.weight.device
    ids = torch.tensor([token for sequence in sequences for token in sequence.ids], device=device)
    positions = torch.cat([torch.arange(len(sequence.ids)) for sequence in sequences]).to(device)
    ends, cu_steps, start = [], [0], 0
    for sequence in sequences:
        ends += [start + row for row in sequence.rows]
        cu_steps.append(len(ends))
        start += len(sequence.ids)
    output = body(input_ids=ids[None], position_ids=positions[None], attention_mask=None, use_cache=False)
    pooled = step_pool(
        output.last_hidden_state[0],
        head,
        torch.tensor(ends, dtype=torch.int64, device=device),
        torch.tensor(cu_steps, device=device),
    )
    prob = pooled.prob.tolist()
    return [prob[a:b] for a, b in pairwise(cu_steps)]
