"""The learner: packed sequences in, one or more optimiser steps, sums of metrics out. It knows no method.

What makes it cheap: no padding (sequences are told apart by their position_ids), the head is applied to the rows that
can have a gradient and to no others, sequences without such a row never enter the model, and with one optimiser step
per batch the old policy is the current one, so no extra forward is needed. A reference model exists only if there is a
KL coefficient: the weights the learner was made with, frozen.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from scope_fast.batch import LossOptions, MicroBatch, Segment, TokenStreams, TrainSequence, pack
from scope_fast.config import Learner as LearnerConfig
from scope_fast.losses import linear_scope_loss
from scope_fast.ops.linear_logprob import linear_logprob

RESCALED_LOGITS = {  # configuration fields of models that change the head's output, and the value that changes nothing
    "final_logit_softcapping": None,  # Gemma 2, 3
    "logits_soft_cap": None,  # RecurrentGemma
    "output_logit_soft_cap": None,  # xLSTM
    "logits_scaling": 1.0,  # Granite, MiniCPM
    "logit_scale": 1.0,  # Cohere
    "lm_head_multiplier": 1.0,  # Falcon-H1
}


def check_model(model: nn.Module) -> None:
    """Refuses, by name, models whose logits are not hidden @ weight.T (+ bias): the fused head would be wrong."""
    name, config = type(model).__name__, model.config.get_text_config()
    for field, neutral in RESCALED_LOGITS.items():
        if getattr(config, field, None) not in (None, neutral):
            raise ValueError(f"{name}: {field}={getattr(config, field)} is not supported by the fused head")
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise ValueError(f"{name}: the output head is a {type(head).__name__}, expected nn.Linear")
    if any(module is head for module in model.base_model.modules()):
        raise ValueError(f"{name}: its base_model holds the output head too; merge or unload the adapter that wraps it")


def hidden_rows(model: nn.Module, batch: MicroBatch) -> torch.Tensor:
    """Last hidden states (T, D) of the rows of a micro-batch; attention stays inside each packed sequence."""
    output = model.base_model(
        input_ids=batch.input_ids[None], position_ids=batch.position_ids[None], attention_mask=None, use_cache=False
    )
    return output.last_hidden_state[0].index_select(0, batch.rows)


class Learner:
    """Owns the model, the optimiser and the schedule.

    model: a Hugging Face causal LM. total_steps: optimiser steps the schedule spans. options: of the loss.
    joint_normalizer: NLL weights are divided by all trained tokens instead of by the NLL tokens alone.
    compute_dtype: what forward and backward run in (autocast), whatever the dtype of the weights the optimiser holds.
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
    ) -> None:
        check_model(model)
        self.model, self.config, self.options = model, config, options
        self.joint_normalizer, self.backend = joint_normalizer, backend
        self.device = next(model.parameters()).device
        lower = compute_dtype != torch.float32
        self.autocast = partial(torch.autocast, self.device.type, compute_dtype, enabled=lower)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
        )
        steps = total_steps * config.minibatches * config.epochs
        self.factor = _schedule(config, steps)
        self.reference = copy.deepcopy(model).requires_grad_(False) if options.kl_coef else None
        self.steps = 0  # optimiser steps taken or skipped for want of an active row: the schedule goes by these

    def update(self, minibatches: list[list[TrainSequence]]) -> dict[str, float]:
        """One optimiser step for each minibatch, `epochs` times over.

        Returns loss/rl, loss/nll, loss/total and grad/norm (means over the optimiser steps), policy/* and
        sampling/logprob_gap where they are defined, tokens/trained and tokens/skipped (zero-gradient rows), and
        learner/skipped_updates: optimiser steps left out because their gradient was not finite.
        """
        packed = [self._pack(sequences) for sequences in minibatches]
        trained = sum(len(batch.streams) for minibatch in packed for batch in minibatch)
        wanted = sum(s != Segment.IGNORE for minibatch in minibatches for q in minibatch for s in q.segment)
        on_policy = len(packed) == 1 and self.config.epochs == 1
        packed = [[self._scored(batch, on_policy) for batch in minibatch] for minibatch in packed]
        totals: dict[str, float] = defaultdict(float)
        norms = []
        for minibatch in packed * self.config.epochs:
            norms.append(self._step(minibatch, totals))
        if not on_policy and totals:  # measured before the updates: afterwards it would show how far they went
            totals["sampling/gap_max"] = max(_gap(batch.streams) for minibatch in packed for batch in minibatch)
        finite = [norm for norm in norms if math.isfinite(norm)]
        return {
            **_means(totals, len(norms)),
            "grad/norm": sum(finite) / max(len(finite), 1),
            "learner/lr": self.config.lr * self.factor(self.steps - 1),
            "learner/skipped_updates": len(norms) - len(finite),
            "tokens/trained": trained,
            "tokens/skipped": wanted - trained,
        }

    def _pack(self, sequences: list[TrainSequence]) -> list[MicroBatch]:
        segments = [s for q in sequences for s in q.segment]
        rl, nll = segments.count(Segment.RL), segments.count(Segment.NLL)
        nll_count = rl + nll if self.joint_normalizer else nll
        batches = pack(sequences, self.config.token_budget, self.options, max(rl, 1), max(nll_count, 1))
        return [batch.to(self.device) for batch in batches]

    def _step(self, batches: Iterable[MicroBatch], totals: dict[str, float]) -> float:
        """Gradients of all micro-batches, clipped and applied if they are finite; their norm before clipping.

        No host sync before the last micro-batch.
        """
        sums: list[dict[str, torch.Tensor]] = []
        head = self.model.get_output_embeddings()
        for batch in batches:
            with self.autocast():
                loss, metrics = linear_scope_loss(
                    hidden_rows(self.model, batch), head.weight, batch.streams, self.options,
                    bias=head.bias, backend=self.backend,
                )  # fmt: skip
            loss.backward()
            sums.append(metrics)
        norm = 0.0
        if sums:
            norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm))
        if sums and math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.lr * self.factor(self.steps)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1
        for metrics in sums if math.isfinite(norm) else ():  # a skipped update has no loss to report
            for name, value in metrics.items():
                merge = max if name.endswith("_max") else float.__add__
                totals[name] = merge(totals[name], float(value))
        return norm

    def _scored(self, batch: MicroBatch, on_policy: bool) -> MicroBatch:
        """The micro-batch with the log-probabilities its loss is taken against: none, most often."""
        old = batch.streams.old_logprob if on_policy else self._logprob(self.model, batch)
        reference = None if self.reference is None else self._logprob(self.reference, batch)
        return replace(batch, streams=replace(batch.streams, old_logprob=old, ref_logprob=reference))

    @torch.no_grad()
    def _logprob(self, model: nn.Module, batch: MicroBatch) -> torch.Tensor:
        head, options = model.get_output_embeddings(), self.options
        return linear_logprob(
            hidden_rows(model, batch), head.weight, batch.streams.target, bias=head.bias,
            temperature=options.temperature, logits_dtype=options.logits_dtype, backend=self.backend,
        ).logprob  # fmt: skip

    def state_dict(self) -> dict[str, object]:
        """Model, optimiser and place in the schedule, for a checkpoint."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, object]) -> None:
        """The inverse of `state_dict`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.steps = state["steps"]


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
    return float(torch.where(streams.segment == Segment.RL, gap, 0.0).amax())


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
