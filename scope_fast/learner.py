"""The learner: packed sequences in, one or more optimiser steps, sums of metrics out. It knows no method.

What makes it cheap: no padding (sequences are told apart by their position_ids), the head is applied to the rows that
can have a gradient and to no others, sequences without such a row never enter the model, and with one optimiser step
per batch the old policy is the current one, so no extra forward is needed. A reference model exists only if there is a
KL coefficient: the weights the learner was made with, frozen.

One process or many (sharding.py): the loss is a sum over rows whose weights carry the counts of all ranks, gradients
are summed over ranks, and every rank runs the same number of micro-batches, an empty one where it has none left. So the
result does not depend on packing, on the split into micro-batches or on the number of ranks.

What goes wrong in a step stays in it: an update without a finite loss and gradient is left out and counted, and the
first out-of-memory error halves the token budget and repeats the pass, which has changed nothing yet.
"""

from __future__ import annotations

import copy
import math
import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from scope_fast import distributed, sharding
from scope_fast.batch import (
    LossOptions,
    MicroBatch,
    Segment,
    TokenStreams,
    TrainSequence,
    empty_micro_batch,
    of_scaled_logits,
    pack,
    split,
)
from scope_fast.config import Learner as LearnerConfig
from scope_fast.flops import model_flops, peak_tflops
from scope_fast.losses import linear_scope_loss
from scope_fast.model_checks import check_model, check_packing, logit_scale
from scope_fast.ops.linear_logprob import linear_logprob

T = TypeVar("T")


def hidden_rows(model: nn.Module, batch: MicroBatch) -> torch.Tensor:
    """Last hidden states (T, D) of the rows of a micro-batch; attention stays inside each packed sequence."""
    return model.base_model(**_inputs(batch)).last_hidden_state[0].index_select(0, batch.rows)


def own_logprobs(model: nn.Module, batch: MicroBatch, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities (T,) of a micro-batch's targets from the model's own full logits, and the largest absolute
    logit after the temperature."""
    logits = model(**_inputs(batch)).logits[0].index_select(0, batch.rows).double() / temperature
    return logits.log_softmax(-1).gather(1, batch.streams.target[:, None])[:, 0], logits.abs().max()


def _inputs(batch: MicroBatch) -> dict[str, object]:
    row, positions = batch.input_ids[None], batch.position_ids[None]
    return {"input_ids": row, "position_ids": positions, "attention_mask": None, "use_cache": False}


class Objective(nn.Module):
    """The model with what the learner asks of it inside one forward, as sharding wants it.

    autocast: a context manager around the forward, for weights that are kept wider than what is computed in.
    """

    def __init__(self, model: nn.Module, options: LossOptions, backend: str | None, autocast: Callable) -> None:
        super().__init__()
        self.model, self.options, self.backend, self.autocast = model, options, backend, autocast
        self.scale = logit_scale(model)

    def forward(self, batch: MicroBatch, score_only: bool = False, own_logits: bool = False):
        """(loss, metrics) of a micro-batch; score_only: the log-probabilities (T,) of its targets, without gradient;
        own_logits: `own_logprobs` instead."""
        head, options = self.model.get_output_embeddings(), self.options
        with self.autocast():
            if own_logits:
                return own_logprobs(self.model, batch, options.temperature)
            hidden = hidden_rows(self.model, batch)
            if score_only:
                return linear_logprob(
                    hidden, head.weight, batch.streams.target, bias=head.bias,
                    temperature=options.temperature / self.scale,
                    logits_dtype=options.logits_dtype, backend=self.backend,
                ).logprob  # fmt: skip
            streams = of_scaled_logits(batch.streams, options.temperature, self.scale)
            return linear_scope_loss(hidden, head.weight, streams, options, bias=head.bias, backend=self.backend)


class Learner:
    """Owns the model, the optimiser and the schedule.

    model: a Hugging Face causal LM, on the device where it is to live; the same weights on every rank. total_steps:
    optimiser steps the schedule spans. options: of the loss.
    joint_normalizer: NLL weights are divided by all trained tokens instead of by the NLL tokens alone.
    compute_dtype: what forward and backward run in, whatever the dtype of the weights the optimiser holds.
    mesh: the ranks to shard over (sharding.make_mesh); None: this process holds everything. All methods are then
    collective, and `update` returns the metrics of all ranks on each of them.
    The weights given here are the reference of a KL coefficient, also when a checkpoint is loaded afterwards.
    """

    def __init__(
        self,
        model: nn.Module,
        config: LearnerConfig,
        options: LossOptions,
        total_steps: int,
        joint_normalizer: bool = False,
        backend: str | None = None,
        compute_dtype: torch.dtype = torch.float32,
        mesh: DeviceMesh | None = None,
    ) -> None:
        check_model(model)
        check_packing(model)
        self.model, self.config, self.options = model, config, options
        self.joint_normalizer, self.mesh = joint_normalizer, mesh
        lower = compute_dtype != torch.float32 and mesh is None  # sharded weights are cast as they are gathered
        device_type = next(model.parameters()).device.type if mesh is None else mesh.device_type
        # no cache: it would keep a cast copy of every weight until the end of the forward, recomputed blocks' too
        autocast = partial(torch.autocast, device_type, compute_dtype, enabled=lower, cache_enabled=False)
        self.flops = model_flops(model)
        self.peak_tflops = config.peak_tflops or peak_tflops(torch.device(device_type), compute_dtype)
        frozen = copy.deepcopy(model).requires_grad_(False) if options.kl_coef else None
        sharding.checkpoint_activations(model, config.activation_checkpointing)
        self.compute_dtype = compute_dtype
        self.objective = Objective(model, options, backend, autocast)
        self.reference = None if frozen is None else Objective(frozen, options, backend, autocast)
        for objective in (self.objective, self.reference):
            if mesh is not None and objective is not None:
                sharding.shard(objective, objective.model, mesh, compute_dtype, config.cpu_offload)
        self.device = torch.device(device_type) if mesh is None else distributed.device()
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, config.lr, config.betas, weight_decay=config.weight_decay)
        for p in trained:  # as its first step would: a checkpoint is loaded into shards that must be there
            moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            self.optimizer.state[p] = {"step": torch.zeros(()), **moments}
        steps = total_steps * config.minibatches * config.epochs
        self.factor = _schedule(config, steps)
        self.steps = 0  # the schedule goes by these; those without an active row or a finite gradient count too
        self.skipped_in_a_row = 0  # optimiser steps without a finite loss and gradient
        self.halvings = 0  # of the token budget, after an out-of-memory error: at most one

    @torch.no_grad()
    def check(self) -> None:
        """Asks the model for the log-probabilities of a few random tokens, packed in three ways and by its own head.

        Raises ValueError if packed sequences see each other, or if the logits are more than hidden @ weight.T; no
        configuration says either. Collective.
        """
        draw = random.Random(0)
        vocab = self.model.config.get_text_config().vocab_size
        first, other, last = ([draw.randrange(vocab) for _ in range(12)] for _ in range(3))

        def batch_of(*sequences: list[int]) -> MicroBatch:
            trained = [TrainSequence(ids[:4], ids[4:], [Segment.NLL] * 8, *[[1.0] * 8] * 3) for ids in sequences]
            (batch,) = pack(trained, 12 * len(sequences), self.options, 1, 1)
            return batch.to(self.device)

        def logprobs(*sequences: list[int]) -> torch.Tensor:
            """Of the last sequence's tokens but its first four."""
            return self.objective(batch_of(*sequences), score_only=True)[-8:].double()

        alone, packed, otherwise = logprobs(last), logprobs(first, last), logprobs(other, last)
        own, largest = self.objective(batch_of(last), own_logits=True)
        # a logit is rounded by half an eps of itself, the target's and those of the sum; twice that, and 0.01
        rounding = 0.01 + 2 * torch.finfo(self.compute_dtype).eps * largest.item()
        name, how = type(self.model).__name__, self.model.config._attn_implementation
        for gap, most, what in (
            (packed - otherwise, rounding, f"the sequence before it in a packed row, with learner.attention {how}"),
            # another place in the row, other tiles of the matmuls: of bfloat16 a tenth more
            (packed - alone, rounding + 12 * torch.finfo(self.compute_dtype).eps, "its place in a packed row"),
            (own - alone, rounding, "the model's own logits in the place of hidden @ weight.T"),
        ):
            if not (off := gap.abs().max().item()) < most:
                raise ValueError(f"{name}: a token's log-probability changes by {off:.2g} with {what}")

    @property
    def token_budget(self) -> int:
        """Packed tokens of a micro-batch, now."""
        return max(1, self.config.token_budget >> self.halvings)

    def update(self, minibatches: list[list[TrainSequence]]) -> dict[str, float]:
        """One optimiser step for each minibatch, `epochs` times over; of this rank's sequences, with all ranks' others.

        Returns loss/rl, loss/nll, loss/total and grad/norm (means over the optimiser steps), policy/* and
        sampling/logprob_gap where they are defined, tokens/trained and tokens/skipped (zero-gradient rows),
        learner/skipped_updates: optimiser steps left out because their loss or gradient was not finite,
        learner/out_of_memory: halvings of the token budget, and perf/model_flops of the updates' own passes (what only
        scores does not count), where the architecture's are known.
        """
        halvings = self.halvings
        packed = [self._pack(sequences) for sequences in minibatches]
        trained = sum(len(batch.streams) for minibatch in packed for batch in minibatch)
        wanted = sum(s != Segment.IGNORE for minibatch in minibatches for q in minibatch for s in q.segment)
        work = {} if self.flops is None else {"perf/model_flops": self.config.epochs * self._work(packed)}
        packed = [[batch.to(self.device) for batch in minibatch] for minibatch in packed]
        on_policy = len(packed) == 1 and self.config.epochs == 1
        score = partial(self._scored, on_policy=on_policy)
        packed = [self._within_memory(score, minibatch) for minibatch in packed]
        totals: dict[str, float] = defaultdict(float)
        norms = []
        for minibatch in packed * self.config.epochs:
            norms.append(self._step(minibatch, totals))
        if not on_policy and totals:  # measured before the updates: afterwards it would show how far they went
            gaps = [_gap(batch.streams) for minibatch in packed for batch in minibatch]
            # NaN: of an update that is skipped, and counted
            totals["sampling/gap_max"] = max((gap for gap in gaps if math.isfinite(gap)), default=0.0)
        totals |= {"tokens/trained": trained, "tokens/wanted": wanted} | work
        totals = _merged(distributed.gather(dict(totals)))
        finite = [norm for norm in norms if math.isfinite(norm)]
        return {
            **_means(totals, len(finite)),
            "grad/norm": sum(finite) / max(len(finite), 1),
            "learner/lr": self.config.lr * self.factor(self.steps - 1),
            "learner/skipped_updates": len(norms) - len(finite),
            "learner/out_of_memory": self.halvings - halvings,
            "tokens/trained": totals["tokens/trained"],
            "tokens/skipped": totals["tokens/wanted"] - totals["tokens/trained"],
            **{name: totals[name] for name in work},
        }

    def _pack(self, sequences: list[TrainSequence]) -> list[MicroBatch]:
        """This rank's micro-batches of one optimiser step, weighted by all ranks' counts, as many as on any rank; on
        the host."""
        segments = [s for q in sequences for s in q.segment]
        counts = distributed.gather((segments.count(Segment.RL), segments.count(Segment.NLL)))
        rl, nll = (sum(column) for column in zip(*counts, strict=True))
        nll_count = rl + nll if self.joint_normalizer else nll
        # alone, a halved budget cuts what the whole one packed: the step that ran out of memory is replayed to the bit
        budget = self.config.token_budget if distributed.world_size() == 1 else self.token_budget
        batches = pack(sequences, budget, self.options, max(rl, 1), max(nll_count, 1))
        most = max(distributed.gather(len(batches)))
        return batches + [empty_micro_batch() for _ in range(most - len(batches))]

    def _work(self, packed: list[list[MicroBatch]]) -> int:
        """Model FLOPs of one epoch over micro-batches on the host; those that keep step with other ranks do none."""
        return sum(self.flops.of(batch) for minibatch in packed for batch in minibatch if len(batch.streams))

    def _step(self, batches: list[MicroBatch], totals: dict[str, float]) -> float:
        """Gradients of all micro-batches, clipped and applied if they are finite; their norm before clipping.

        NaN for the norm if the loss is not finite. No host sync before the last micro-batch.
        """
        sums = self._within_memory(self._gradients, batches)
        norm = 0.0
        if sums:
            norm = _number(nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm))
            losses = [float(metrics["loss/rl"] + metrics["loss/nll"]) for metrics in sums]
            if not all(distributed.gather(all(map(math.isfinite, losses)))):
                norm = math.nan
            self.skipped_in_a_row = 0 if math.isfinite(norm) else self.skipped_in_a_row + 1
        if sums and math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.lr * self.factor(self.steps)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        for metrics in sums if math.isfinite(norm) else ():  # a skipped update has no loss to report
            for name, value in metrics.items():
                totals[name] = _merge(name)(totals[name], float(value))
        return norm

    def _gradients(self, batches: list[MicroBatch]) -> list[dict[str, torch.Tensor]]:
        """Forward and backward of every micro-batch, gradients from zero; the metrics of each."""
        self.optimizer.zero_grad(set_to_none=True)
        sums = []
        for batch in batches:
            loss, metrics = self.objective(batch)
            loss.backward()
            sums.append(metrics)
        return sums

    def _within_memory(self, work: Callable[[list[MicroBatch]], T], batches: list[MicroBatch]) -> T:
        """`work`, which must leave the learner as it was until it returns; after a first out-of-memory error once more,
        on halves. Only a lone process can: the other ranks wait in the collectives that this one has left."""
        try:
            return work(self._fitting(batches))
        except torch.OutOfMemoryError as error:
            if self.halvings or distributed.world_size() > 1:
                error.add_note(
                    f"rank {distributed.rank()} ran out of memory at learner.token_budget={self.token_budget}: start "
                    "the run again with half of it, it goes on from its last checkpoint"
                )
                raise
        self.halvings = 1  # out here, where the exception no longer keeps the activations of its frames
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        print(
            f"out of memory: learner.token_budget halved to {self.token_budget} for the rest of the run; the update is "
            "repeated",
            flush=True,
        )
        return work(self._fitting(batches))

    def _fitting(self, batches: list[MicroBatch]) -> list[MicroBatch]:
        return [part for batch in batches for part in split(batch, self.token_budget)]

    def _scored(self, batches: list[MicroBatch], on_policy: bool) -> list[MicroBatch]:
        """The micro-batches with the log-probabilities their loss is taken against: none, most often."""
        scored = []
        for batch in batches:
            with torch.no_grad():
                old = batch.streams.old_logprob if on_policy else self.objective(batch, score_only=True)
                reference = None if self.reference is None else self.reference(batch, score_only=True)
            scored.append(replace(batch, streams=replace(batch.streams, old_logprob=old, ref_logprob=reference)))
        return scored

    def state_dict(self) -> dict[str, object]:
        """Model, optimiser (by parameter name, so that it loads under any sharding) and place in the schedule."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        counters = {"steps": self.steps, "skipped_in_a_row": self.skipped_in_a_row, "halvings": self.halvings}
        return {"model": model, "optimizer": optimizer, **counters}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """The inverse of `state_dict`."""
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.steps, self.skipped_in_a_row = state["steps"], state["skipped_in_a_row"]
        self.halvings = state["halvings"]


def _number(value: torch.Tensor) -> float:
    """A norm as a number; of sharded gradients it is a DTensor that every rank holds a part of."""
    return float(value.full_tensor() if isinstance(value, DTensor) else value)


def _merge(name: str) -> Callable[[float, float], float]:
    """How two values of a metric become one: maxima are compared, everything else adds up."""
    return max if name.endswith("_max") else float.__add__


def _merged(parts: list[dict[str, float]]) -> dict[str, float]:
    """The ranks' totals as one."""
    result: dict[str, float] = defaultdict(float)
    for part in parts:
        for name, value in part.items():
            result[name] = _merge(name)(result[name], float(value))
    return result


def _schedule(config: LearnerConfig, steps: int) -> Callable[[int], float]:
    """Multiplier of the learning rate at an optimiser step: linear warm-up, then constant or cosine to zero."""

    def factor(step: int) -> float:
        warm = min(1.0, (step + 1) / (config.warmup_steps + 1))
        if config.schedule == "constant":
            return warm
        done = max(0, step - config.warmup_steps) / max(1, steps - config.warmup_steps)
        return warm * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))

    return factor


def _gap(streams: TokenStreams) -> float:
    """Largest difference between the learner's log-probability of a sampled token and the engine's."""
    gap = (streams.old_logprob - streams.rollout_logprob).abs()
    return float(torch.where(streams.segment == Segment.RL, gap, 0.0).amax()) if len(streams) else 0.0


def _means(totals: dict[str, float], steps: int) -> dict[str, float]:
    """From sums over all rows computed: means over rows for the policy, over optimiser steps for the losses."""
    rl, nll = totals.get("loss/rl", 0.0), totals.get("loss/nll", 0.0)
    result = {"loss/rl": rl / max(steps, 1), "loss/nll": nll / max(steps, 1), "loss/total": (rl + nll) / max(steps, 1)}
    rows = totals.get("policy/rows", 0.0)
    if rows:
        result["policy/entropy"] = totals["policy/entropy_sum"] / rows
        result["policy/kl"] = totals["policy/kl_sum"] / rows
        result["policy/clip_fraction"] = totals["policy/clipped"] / rows
        result["policy/ratio_max"] = totals["policy/ratio_max"]
        result["sampling/logprob_gap"] = totals["sampling/gap_max"]
    return result
