"""scope_fast::linear_scope_loss: the SCOPE loss straight from hidden states, gradients formed in the forward.

One pass at 6*T*V*D flops (logits 2, dX 2, dW 2); recomputing the logits in the backward would make it 8. The price is
that the gradients are held from forward to backward: T*D and V*D elements, against the T*V logits they replace.
The rows that cannot have a gradient are dropped before the first matmul.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scope_fast.ops import checks, dispatch, reference
from scope_fast.ops.options import METRICS, RowOptions

STEM = "linear_scope_loss"


def find_active(rows: reference.Rows, active: Tensor | None, options: RowOptions) -> Tensor:
    """Indices of the rows to compute. The caller's, or found here at the price of one host sync."""
    if active is None or rows.segment.device.type == "cpu":
        checks.require_advantage(rows.segment, rows.advantage)
    if active is not None:
        return active
    rl, nll = reference.active_masks(rows, options)
    return (rl | nll).nonzero().squeeze(1)


@torch.library.custom_op("scope_fast::linear_scope_loss", mutates_args=())
def linear_scope_loss_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    segment: Tensor,
    loss_weight: Tensor,
    old_logprob: Tensor | None,
    advantage: Tensor | None,
    ref_logprob: Tensor | None,
    rollout_logprob: Tensor | None,
    temperature: Tensor | None,
    active: Tensor | None,
    options: list[float],
    logits_dtype: str,
    chunk_tokens: int,
    need_dhidden: bool,
    need_dweight: bool,
    need_dbias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(loss, metrics (9,), dhidden (T, D), dweight (V, D), dbias (V)); a gradient that is not needed has shape (0,)."""
    rows = reference.Rows(
        target, segment, loss_weight, old_logprob, advantage, ref_logprob, rollout_logprob, temperature
    )
    row_options = RowOptions(*options)
    index = find_active(rows, active, row_options)
    needs = (need_dhidden, need_dweight, need_dbias)
    with dispatch.body(hidden):
        backend = dispatch.resolve(STEM, backend, hidden.device.type)
        if backend in ("triton", "cuda"):
            from scope_fast.kernels.linear_scope_loss import linear_scope_loss

            return linear_scope_loss(
                hidden, weight, bias, rows, index, row_options, logits_dtype, chunk_tokens, needs, backend == "cuda"
            )
        if backend == "cpu":
            return torch.ops.scope_fast_native.linear_scope_loss(
                hidden, weight, bias, *rows, index, options, logits_dtype, chunk_tokens, *needs
            )
        return reference.linear_scope_loss(
            hidden, weight, bias, rows, index, row_options, logits_dtype, chunk_tokens, needs
        )


@linear_scope_loss_op.register_fake
def _fake(hidden, weight, bias, *args):
    need_dhidden, need_dweight, need_dbias = args[-4:-1]
    accumulate = reference.compute_dtype(hidden.dtype)
    loss = hidden.new_empty((), dtype=accumulate)
    metrics = hidden.new_empty(len(METRICS), dtype=accumulate)
    dhidden = hidden.new_empty(hidden.shape if need_dhidden else (0,))
    dweight = weight.new_empty(weight.shape if need_dweight else (0,))
    return loss, metrics, dhidden, dweight, weight.new_empty(weight.shape[:1] if need_dbias else (0,))


def _setup_context(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.needs, ctx.backend = inputs[-4:-1], inputs[-1]
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[2:])


def _backward(ctx, grad_loss, *_):
    checks.refuse_second_derivative(STEM)
    gradients = [
        _scaled(saved, grad_loss, ctx.backend) if need and grad_loss is not None else None
        for saved, need in zip(ctx.saved_tensors, ctx.needs, strict=True)
    ]
    return *gradients, *(None for _ in range(16))


def _scaled(saved: Tensor, grad_loss: Tensor, backend: str) -> Tensor:
    """saved * grad_loss; a second backward over the same graph must find the saved gradients unscaled.

    So it is a new tensor where the graph is retained, or captured and perhaps replayed. Elsewhere it is the saved one,
    scaled in place: another (V, D) costs 2 to 7 % of the call on an H100 (the kernel leaves it alone where the factor
    is 1), and 5 % on a CPU (V 32000, D 512, float32).
    """
    if not is_plain(grad_loss) or not saved.is_contiguous() or _may_be_read_again(saved):
        return scaled_op(saved, grad_loss, backend)
    if is_one(grad_loss):
        return saved
    torch.autograd.graph.increment_version(saved)  # Triton does not: a backward interrupted here cannot be tried again
    return _scale(saved, grad_loss, backend, saved)


def _may_be_read_again(saved: Tensor) -> bool:
    captured = saved.is_cuda and torch.cuda.is_current_stream_capturing()
    return captured or torch._C._autograd._get_current_graph_task_keep_graph()


def is_plain(grad_loss: Tensor) -> bool:
    """Whether its memory holds its one value: nothing traces it, it is no batch of factors (`is_grads_batched`), and no
    negation (or zero) that torch has put off."""
    if type(grad_loss) is not Tensor or torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch
    batched = functorch.is_functorch_wrapped_tensor(grad_loss) or functorch.is_legacy_batchedtensor(grad_loss)
    return not batched and not grad_loss.is_neg() and not grad_loss._is_zerotensor()


def is_one(grad_loss: Tensor) -> bool:
    """Whether the factor is exactly 1, as `loss.backward()` starts; asked on a CPU alone, where looking is free."""
    return is_plain(grad_loss) and grad_loss.device.type == "cpu" and grad_loss.item() == 1.0


@torch.library.custom_op("scope_fast::scaled", mutates_args=())
def scaled_op(x: Tensor, factor: Tensor, backend: str) -> Tensor:
    """x times factor, of one element, in the dtype of x: multiplied in float32 (float64) and rounded once."""
    x = x.contiguous()
    return _scale(x, factor, backend, torch.empty_like(x))


def _scale(x: Tensor, factor: Tensor, backend: str, out: Tensor) -> Tensor:
    """scaled_op's body into out, which may be x; both contiguous."""
    with dispatch.body(x):
        if x.device.type == "cpu":  # a 0-dim factor leaves the dtype alone, and is not rounded to it first
            return torch.mul(x, factor.reshape(()), out=out)
        if x.dtype != torch.float64 and dispatch.resolve(STEM, backend, x.device.type) != "reference":
            from scope_fast.kernels.linear_scope_loss import scale

            return scale(x, factor, out)
        # on a GPU it is rounded: a dimension makes the product float32, rounded once as it is stored
        return torch.mul(x, factor.reshape([1] * x.dim()), out=out)


@scaled_op.register_fake
def _fake_scaled(x, factor, backend):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


linear_scope_loss_op.register_autograd(_backward, setup_context=_setup_context)
