"""scope_fast::scope_loss: the same loss from logprobs, for trainers that already have them.

Elementwise, T rows in and two gradient scalars per row out, formed in the forward; no logits anywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scope_fast.ops import checks, dispatch, reference
from scope_fast.ops.linear_scope_loss import is_one
from scope_fast.ops.options import METRICS, RowOptions

STEM = "scope_loss"


@torch.library.custom_op("scope_fast::scope_loss", mutates_args=())
def scope_loss_op(
    logprob: Tensor,
    entropy: Tensor | None,
    segment: Tensor,
    loss_weight: Tensor,
    old_logprob: Tensor | None,
    advantage: Tensor | None,
    ref_logprob: Tensor | None,
    rollout_logprob: Tensor | None,
    options: list[float],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, metrics (9,), g (T,), h (T,)): g = dloss/dlogprob, h = dloss/dentropy; without an entropy h is (0,)."""
    backend = dispatch.resolve(STEM, backend, logprob.device.type)
    if logprob.device.type == "cpu":
        checks.require_advantage(segment, advantage)
    rows = reference.Rows(  # no target here: any (T,) tensor stands in for it
        segment, segment, loss_weight, old_logprob, advantage, ref_logprob, rollout_logprob, temperature=None
    )
    with dispatch.body(logprob):
        if backend == "triton":
            from scope_fast.kernels.scope_loss import scope_loss

            return scope_loss(logprob, entropy, rows, RowOptions(*options))
        if backend == "cpu":
            return torch.ops.scope_fast_native.scope_loss(
                logprob, entropy, segment, loss_weight, old_logprob, advantage, ref_logprob, rollout_logprob, options
            )
        return reference.scope_loss(logprob, entropy, rows, RowOptions(*options))


@scope_loss_op.register_fake
def _fake(logprob, entropy, *args):
    new = logprob.to(reference.compute_dtype(logprob.dtype)).new_empty
    return new(()), new(len(METRICS)), new(logprob.shape), new((0,) if entropy is None else logprob.shape)


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    logprob, entropy = inputs[:2]
    ctx.dtypes = (logprob.dtype, None if entropy is None else entropy.dtype)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[2:])


def _backward(ctx, grad_loss, *_):
    checks.refuse_second_derivative(STEM)
    gradients = [
        None
        if dtype is None or grad_loss is None or not need
        else (saved if is_one(grad_loss) else saved * grad_loss).to(dtype)
        for saved, dtype, need in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[:2], strict=True)
    ]
    return *gradients, *(None for _ in range(8))


scope_loss_op.register_autograd(_backward, setup_context=_setup_context)
