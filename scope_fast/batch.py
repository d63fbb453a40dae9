"""What a training batch is made of: per-token streams, and the packing of sequences into padding-free micro-batches.

Shape legend, used everywhere in this package:
    N  packed tokens of a micro-batch (prompts and responses)       T  trained tokens (rows of the loss)
    D  hidden size        V  vocabulary        S  reasoning steps    R  rollouts        G  rollouts per prompt (group)

Leaf module: imports torch and nothing of ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from enum import IntEnum
from itertools import pairwise

import torch

POLICY_LOSSES = ("ppo", "cispo")
KL_ESTIMATORS = ("none", "k1", "k2", "k3")
NLL_SHAPES = ("constant", "shaped", "entropy")
LOGITS_DTYPES = ("float32", "bfloat16")


class Segment(IntEnum):
    """What a token is trained with: nothing, the clipped policy gradient, or the weighted likelihood."""

    IGNORE = 0
    RL = 1
    NLL = 2


@dataclass(frozen=True)
class TokenStreams:
    """Per-token inputs of every loss, packed without padding; all of shape (T,) but `active`.

    target: int64, the token each row must predict (anything where segment is 0).
    segment: uint8, a `Segment`.
    loss_weight: float32, the row's coefficient divided by the right global count; losses are sums over rows.
    advantage: float32, required where segment is RL.
    old_logprob: float32 log-probability under the policy the ratio is taken against; None = on-policy, ratio 1.
    ref_logprob: float32, required when a KL coefficient is set.
    rollout_logprob: float32, the engine's own log-probability, for truncated importance sampling and the gap metric.
    temperature: float32, overrides LossOptions.temperature row by row.
    active: int64 (num_active,), ascending indices of the rows that can have a gradient, made on the host where the
        batch is packed. None lets the op find them, at the price of one host sync.

    A stream may hold anything (NaN, -100) where it does not apply: it is masked before any arithmetic.
    """

    target: torch.Tensor
    segment: torch.Tensor
    loss_weight: torch.Tensor
    old_logprob: torch.Tensor | None = None
    advantage: torch.Tensor | None = None
    ref_logprob: torch.Tensor | None = None
    rollout_logprob: torch.Tensor | None = None
    temperature: torch.Tensor | None = None
    active: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.target.shape[0]

    def to(self, device: torch.device | str) -> TokenStreams:
        """The same streams on another device."""
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(device) for k, v in moved.items() if v is not None})


@dataclass(frozen=True)
class LossOptions:
    """Options of the row losses; plain values, so that a kernel can take them as they are.

    clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high]; DAPO clips higher than lower.
    dual_clip: with A < 0 the objective is at least dual_clip * A (must exceed 1); None = off.
    policy_loss: "ppo", or "cispo" (clipped, detached ratio times A times the logprob).
    kl, kl_coef: estimator of KL(policy || reference) on RL rows: "k1", "k2", "k3".
    entropy_coef: entropy bonus on RL rows.
    importance_cap: truncated importance sampling of old against rollout_logprob, capped here; None = off.
    nll_shape: "constant"; "shaped", p / (p + 0.1) in place of the log-likelihood (LUFFY); "entropy", weight exp(-H).
    temperature: logits of RL rows are divided by it (1 for NLL rows); TokenStreams.temperature overrides both.
    logits_dtype: dtype the logits of bfloat16 inputs are kept in between matmul and row kernel.
    chunk_tokens: rows of logits at a time; None = chosen from a byte budget (on a GPU, beyond inputs and gradients, a
        float32 dW and 1 GiB, or less on a small one), 0 = the streaming mode, whose forward never writes logits
        (always float32) and whose gradient forms them by tiles of the vocabulary.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float | None = None
    policy_loss: str = "ppo"
    kl: str = "none"
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    importance_cap: float | None = None
    nll_shape: str = "constant"
    temperature: float = 1.0
    logits_dtype: str = "float32"
    chunk_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in (
            ("policy_loss", POLICY_LOSSES),
            ("kl", KL_ESTIMATORS),
            ("nll_shape", NLL_SHAPES),
            ("logits_dtype", LOGITS_DTYPES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(allowed)}")
        # written so that NaN fails too
        if not 0.0 <= self.clip_low <= 1.0:
            raise ValueError(f"clip_low={self.clip_low}: expected a value in [0, 1]")
        if not self.clip_high >= 0.0:
            raise ValueError(f"clip_high={self.clip_high}: expected a value >= 0")
        if self.dual_clip is not None and not self.dual_clip > 1.0:
            raise ValueError(f"dual_clip={self.dual_clip}: expected a value above 1")
        if self.dual_clip is not None and self.policy_loss != "ppo":
            raise ValueError(f"dual_clip={self.dual_clip}: bounds ppo alone, policy_loss is {self.policy_loss}")
        if self.importance_cap is not None and not self.importance_cap > 0.0:
            raise ValueError(f"importance_cap={self.importance_cap}: expected a value above 0")
        if not 0.0 < self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature}: expected a finite value above 0")
        for name in ("kl_coef", "entropy_coef"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)}: expected a finite value")
        if self.kl == "none" and self.kl_coef != 0.0:
            raise ValueError(f"kl_coef={self.kl_coef} needs kl to be one of k1, k2, k3")
        if self.chunk_tokens is not None and self.chunk_tokens < 0:
            raise ValueError(f"chunk_tokens={self.chunk_tokens}: expected None, 0 (streaming) or a row count")


@dataclass
class TrainSequence:
    """One sequence to learn from, with a value of every stream per response token.

    prompt_ids: context only, never trained.    response_ids: the student's tokens, then a teacher's suffix if any.
    segment, advantage, loss_weight, rollout_logprob: one value per response token; loss_weight is not yet divided by
    any count. rollout_logprob is NaN on the teacher's tokens.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    segment: list[int]
    advantage: list[float]
    loss_weight: list[float]
    rollout_logprob: list[float]

    def __post_init__(self) -> None:
        for name in ("segment", "advantage", "loss_weight", "rollout_logprob"):
            if len(getattr(self, name)) != len(self.response_ids):
                raise ValueError(
                    f"{name} has {len(getattr(self, name))} values for {len(self.response_ids)} response_ids"
                )
        if not self.prompt_ids:
            raise ValueError("prompt_ids is empty: the first response token needs a position that predicts it")


@dataclass
class MicroBatch:
    """Packed sequences: position_ids restart at every sequence, which is all attention needs to tell them apart."""

    input_ids: torch.Tensor  # (N,) int64
    position_ids: torch.Tensor  # (N,) int64
    rows: torch.Tensor  # (T,) int64, positions of input_ids whose hidden state predicts a response token
    streams: TokenStreams  # (T,)
    sequence: torch.Tensor  # (T,) int64, index into the packed list of sequences, for per-sequence write-back

    def to(self, device: torch.device | str) -> MicroBatch:
        """The same micro-batch on another device."""
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self)}
        return MicroBatch(**moved)


def of_scaled_logits(streams: TokenStreams, temperature: float, scale: float) -> TokenStreams:
    """The streams of a model whose logits are `scale` times its head's output, for that head: every row's temperature
    (its stream's, else `temperature` on RL rows and 1 on NLL rows) over the scale."""
    if scale == 1.0:
        return streams
    rows = streams.temperature
    if rows is None:
        rows = torch.ones_like(streams.loss_weight).masked_fill_(streams.segment == Segment.RL, temperature)
    return replace(streams, temperature=rows / scale)


def minibatch_of(group: int, num_groups: int, minibatches: int) -> int:
    """The optimiser step a group of a step's num_groups belongs to: blocks of neighbours, since ranks take groups in
    turn, and each is to have its share of every optimiser step."""
    return group * minibatches // num_groups


def is_active(segment: int, weight: float, advantage: float, options: LossOptions) -> bool:
    """Can a gradient flow from this row? The definition every backend shares (rows that fail it are dropped)."""
    if weight == 0.0 or segment == Segment.IGNORE:
        return False
    return segment == Segment.NLL or advantage != 0.0 or options.kl_coef != 0.0 or options.entropy_coef != 0.0


def active_rows(sequence: TrainSequence, options: LossOptions) -> list[int]:
    """Indices of the response tokens of `sequence` that are active."""
    columns = zip(sequence.segment, sequence.loss_weight, sequence.advantage, strict=True)
    return [i for i, (s, w, a) in enumerate(columns) if is_active(s, w, a, options)]


def bins(lengths: list[int], token_budget: int) -> list[list[int]]:
    """First-fit-decreasing: indices grouped so that each group's lengths sum to at most `token_budget`.

    A length above the budget gets a group of its own: sequences are never cut.
    """
    groups: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        slot = next((g for g, free in enumerate(room) if free >= lengths[i]), None)
        if slot is None:
            groups.append([])
            room.append(token_budget)
            slot = len(groups) - 1
        groups[slot].append(i)
        room[slot] -= lengths[i]
    return groups


def pack(
    sequences: list[TrainSequence],
    token_budget: int,
    options: LossOptions,
    rl_count: float,
    nll_count: float,
) -> list[MicroBatch]:
    """Sequences to padding-free micro-batches of at most `token_budget` packed tokens.

    Only active rows become rows of the loss, and a sequence without one is left out altogether: the caller's counts
    (`rl_count`, `nll_count`: what RL and NLL weights are divided by) include them, so leaving them out changes nothing.
    """
    rows = [active_rows(sequence, options) for sequence in sequences]
    kept = [i for i, active in enumerate(rows) if active]
    lengths = [len(sequences[i].prompt_ids) + len(sequences[i].response_ids) for i in kept]
    scale = {Segment.RL: rl_count, Segment.NLL: nll_count}
    groups = [[kept[j] for j in group] for group in bins(lengths, token_budget)]
    return [_concatenate(sequences, rows, sorted(group), scale) for group in groups]


def _concatenate(
    sequences: list[TrainSequence], rows: list[list[int]], group: list[int], scale: dict[Segment, float]
) -> MicroBatch:
    ids, positions, where, owner = [], [], [], []
    target, segment, weight, advantage, rollout = [], [], [], [], []
    for i in group:
        sequence, start = sequences[i], len(ids) + len(sequences[i].prompt_ids) - 1
        tokens = sequence.prompt_ids + sequence.response_ids
        ids += tokens
        positions += range(len(tokens))
        for t in rows[i]:
            where.append(start + t)  # the state before token t predicts it
            owner.append(i)
            target.append(sequence.response_ids[t])
            segment.append(sequence.segment[t])
            weight.append(sequence.loss_weight[t] / scale[Segment(sequence.segment[t])])
            advantage.append(sequence.advantage[t])
            rollout.append(sequence.rollout_logprob[t])
    streams = TokenStreams(
        target=torch.tensor(target),
        segment=torch.tensor(segment, dtype=torch.uint8),
        loss_weight=torch.tensor(weight, dtype=torch.float32),
        advantage=torch.tensor(advantage, dtype=torch.float32),
        rollout_logprob=torch.tensor(rollout, dtype=torch.float32),
        active=torch.arange(len(target)),
    )
    return MicroBatch(torch.tensor(ids), torch.tensor(positions), torch.tensor(where), streams, torch.tensor(owner))


def sequence_lengths(position_ids: torch.Tensor) -> list[int]:
    """Lengths of the packed sequences whose position_ids (N,) are these; a GPU's cost a host sync."""
    starts = torch.nonzero(position_ids[1:] == 0)[:, 0] + 1
    return [end - start for start, end in pairwise([0, *starts.tolist(), len(position_ids)])]


def split(batch: MicroBatch, token_budget: int) -> list[MicroBatch]:
    """A micro-batch cut between its sequences into ones of at most `token_budget` tokens; itself where it fits.

    All streams go along, scored ones too. A sequence above the budget stays whole, as in `bins`.
    """
    if len(batch.input_ids) <= token_budget:
        return [batch]
    cuts, start = [0], 0
    for length in sequence_lengths(batch.position_ids):
        if start + length - cuts[-1] > token_budget and start > cuts[-1]:
            cuts.append(start)
        start += length
    return [_part(batch, begin, end) for begin, end in zip(cuts, [*cuts[1:], len(batch.input_ids)], strict=True)]


def _part(batch: MicroBatch, begin: int, end: int) -> MicroBatch:
    """Tokens begin..end of a micro-batch and their rows."""
    first, last = torch.searchsorted(batch.rows, torch.tensor([begin, end], device=batch.rows.device)).tolist()
    streams = {f.name: getattr(batch.streams, f.name) for f in fields(batch.streams)}
    streams = {name: stream[first:last] for name, stream in streams.items() if stream is not None}
    active = batch.streams.active
    if active is not None:
        streams["active"] = active[(active >= first) & (active < last)] - first
    return MicroBatch(
        batch.input_ids[begin:end],
        batch.position_ids[begin:end],
        batch.rows[first:last] - begin,
        TokenStreams(**streams),
        batch.sequence[first:last],
    )


def empty_micro_batch() -> MicroBatch:
    """One token of context and no row: for a rank that has nothing left but must take part in every collective."""
    context, none, values = torch.zeros(1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    streams = TokenStreams(none, none.to(torch.uint8), values, advantage=values, rollout_logprob=values, active=none)
    return MicroBatch(context, context, none, streams, none)
