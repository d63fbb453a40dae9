"""scope_fast::step_pool: a process reward model's head at step boundaries only, then its per-rollout verdicts.

    p_s = softmax(weight x + bias)[positive]     x = hidden[step_end[s]], or relu(hidden_weight hidden + hidden_bias)
    first_error = index of the first step with not (p >= tau), or the step count

S*D + S*M*D reads and flops against the T rows a token-classification head scores; nothing of size (T, .) is written.
Inference only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from scope_fast.ops import checks, dispatch, reference

STEM, STEM_MLP = "step_pool", "step_pool_mlp"


@dataclass(frozen=True)
class PrmHead:
    """The scoring head of a process reward model.

    weight (C, D) or, with a hidden layer, (C, M); bias (C,); hidden_weight (M, D); hidden_bias (M,).
    C = 2: p = softmax(weight x + bias)[positive]; C = 1: sigmoid, and `positive` is not read.
    """

    weight: Tensor
    bias: Tensor | None = None
    hidden_weight: Tensor | None = None
    hidden_bias: Tensor | None = None
    positive: int = 1

    def __post_init__(self) -> None:
        if self.weight.dim() != 2 or self.weight.shape[0] not in (1, 2):
            raise ValueError(f"weight {checks.shape(self.weight)}: expected (1, D) or (2, D)")
        if self.positive not in (0, 1):
            raise ValueError(f"positive={self.positive}: expected 0 or 1")
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ValueError(f"bias {checks.shape(self.bias)} and weight {checks.shape(self.weight)}: expected (C,)")
        if self.hidden_weight is None:
            if self.hidden_bias is not None:
                raise ValueError(f"hidden_bias {checks.shape(self.hidden_bias)} without hidden_weight")
            return
        if self.hidden_weight.dim() != 2 or self.hidden_weight.shape[0] != self.weight.shape[1]:
            raise ValueError(
                f"hidden_weight {checks.shape(self.hidden_weight)} and weight {checks.shape(self.weight)}: "
                "expected (M, D) and (C, M)"
            )
        if self.hidden_bias is not None and self.hidden_bias.shape != self.hidden_weight.shape[:1]:
            raise ValueError(
                f"hidden_bias {checks.shape(self.hidden_bias)} and hidden_weight {checks.shape(self.hidden_weight)}: "
                "expected (M,)"
            )

    @classmethod
    def from_lm_head(cls, weight: Tensor, negative_id: int, positive_id: int) -> PrmHead:
        """The head of a generative PRM: softmax over the logits of two vocabulary rows of weight (V, D)."""
        for name, token in (("negative_id", negative_id), ("positive_id", positive_id)):
            if not 0 <= token < weight.shape[0]:
                raise ValueError(f"{name}={token}: expected a row of weight {checks.shape(weight)}")
        return cls(torch.stack((weight[negative_id], weight[positive_id])).detach())


class StepPool(NamedTuple):
    """prob (S,) per step; per rollout (R,) first_error int64 and the pools of prob; float32."""

    prob: Tensor
    first_error: Tensor
    min: Tensor
    mean: Tensor
    prod: Tensor
    last: Tensor


def step_pool(
    hidden: Tensor,
    head: PrmHead,
    step_end: Tensor,
    cu_steps: Tensor,
    *,
    tau: float = 0.5,
    backend: str | None = None,
    check: bool = False,
) -> StepPool:
    """Probability of every step and the verdict on every rollout, from hidden (T, D).

    step_end (S,) int64: the row of hidden that scores each step. cu_steps (R+1,) int64: rollout i owns the steps
    cu_steps[i]:cu_steps[i+1]; it ascends from 0 to S. A rollout without steps has first_error 0 and pools 0.
    A NaN probability counts as an error and shows as NaN in the pools. Inference only: nothing is differentiated.
    backend="cuda" takes heads without a hidden layer, "triton" bfloat16 and float32, the others any float dtype.

    Raises ValueError for shapes and dtypes that disagree; check=True checks offsets and boundaries too (a host sync).
    """
    dim = (head.weight if head.hidden_weight is None else head.hidden_weight).shape[1]
    if hidden.dim() != 2 or hidden.shape[1] != dim:
        raise ValueError(f"hidden {checks.shape(hidden)}: expected (T, {dim}), as the head reads")
    if not hidden.is_floating_point():
        raise ValueError(f"hidden is {hidden.dtype}: expected a floating dtype")
    for name, index in (("step_end", step_end), ("cu_steps", cu_steps)):
        if index.dim() != 1 or index.dtype != torch.int64:
            raise ValueError(f"{name} {checks.shape(index)} {index.dtype}: expected one dimension of torch.int64")
        if index.device != hidden.device:
            raise ValueError(f"{name} is on {index.device}, hidden on {hidden.device}")
    if cu_steps.numel() < 1:
        raise ValueError(f"cu_steps {checks.shape(cu_steps)}: expected (R + 1,), a 0 for no rollouts")
    if head.weight.device != hidden.device:
        raise ValueError(f"head is on {head.weight.device}, hidden on {hidden.device}")
    if check:
        checks.check_cu_steps(step_end, cu_steps, hidden.shape[0])
        checks.check_finite("hidden", hidden[step_end])
    with torch.no_grad():
        return StepPool(
            *step_pool_op(
                hidden, step_end, cu_steps, head.weight, head.bias, head.hidden_weight, head.hidden_bias,
                head.positive, tau, backend or dispatch.AUTO,
            )
        )  # fmt: skip


@torch.library.custom_op("scope_fast::step_pool", mutates_args=())
def step_pool_op(
    hidden: Tensor,
    step_end: Tensor,
    cu_steps: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    hidden_weight: Tensor | None,
    hidden_bias: Tensor | None,
    positive: int,
    tau: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(prob, first_error, min, mean, prod, last)."""
    backend = dispatch.resolve(STEM if hidden_weight is None else STEM_MLP, backend, hidden.device.type)
    head = (weight, bias, hidden_weight, hidden_bias)
    with dispatch.body(hidden):
        if backend == "triton":
            from scope_fast.kernels.step_pool import step_pool as launch

            return launch(hidden, step_end, cu_steps, *head, positive, tau)
        if backend == "cuda":
            return torch.ops.scope_fast_native.step_pool(hidden, step_end, cu_steps, *head, positive, tau)
        prob = reference.step_scores(hidden.index_select(0, step_end), *head, positive)
        return prob, *reference.step_pools(prob, cu_steps, tau)


@step_pool_op.register_fake
def _fake(hidden, step_end, cu_steps, *args):
    def per_rollout(dtype):
        return hidden.new_empty((cu_steps.shape[0] - 1,), dtype=dtype)

    prob = hidden.new_empty(step_end.shape, dtype=torch.float32)
    return prob, per_rollout(torch.int64), *(per_rollout(torch.float32) for _ in range(4))
