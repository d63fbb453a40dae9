"""scope_fast::linear_logprob: logprob, entropy and logsumexp of a target under the output layer, without the logits.

    z = (hidden @ weight.T + bias) / temperature      logsumexp = log sum exp z
    logprob = z[target] - logsumexp                   entropy = -sum p log p

Forward 2*T*V*D flops, backward 6 (logits again, dX, dW): an ordinary autograd op, for sequence-level ratios and for
other trainers' losses. Replaces log_softmax over a (T, V) tensor and its saved copies.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from scope_fast.ops import checks, dispatch, reference

STEM = "linear_logprob"


class LinearLogprob(NamedTuple):
    """One value per row (T,), float32 (float64 for float64 inputs)."""

    logprob: Tensor
    entropy: Tensor
    logsumexp: Tensor


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    logits_dtype: str = "float32",
    chunk_tokens: int | None = None,
    backend: str | None = None,
    check: bool = False,
) -> LinearLogprob:
    """Log-probability of target under softmax((hidden @ weight.T + bias) / temperature), its entropy and logsumexp.

    hidden (T, D), weight (V, D), bias (V): bfloat16, float32 or (reference, cpu) float64; target (T,) int64;
    temperature: float, or (T,), not differentiated. logits_dtype: dtype the logits of bfloat16 inputs are kept in.
    chunk_tokens: rows whose logits exist at a time; None = from a byte budget, 0 = none at all in the forward (the
    streaming mode of the triton backend, always of float32 logits; the others then choose).
    Differentiable in hidden, weight and bias, through all three outputs.

    A target outside [0, V) has logprob NaN; check=True names it, and non-finite hidden, at the price of a host sync.
    Raises ValueError for shapes and dtypes that disagree and for float16.
    """
    hidden, weight, bias = prepare(hidden, weight, bias)
    checks.check_target(target, hidden.shape[0], "hidden")
    checks.check_logits_dtype(logits_dtype)
    if chunk_tokens is not None and chunk_tokens < 0:
        raise ValueError(f"chunk_tokens={chunk_tokens}: expected None, 0 (streaming) or a row count")
    per_row = temperature if isinstance(temperature, Tensor) else None
    if per_row is not None and per_row.shape != target.shape:
        raise ValueError(f"temperature {checks.shape(per_row)}: expected {checks.shape(target)}, like target")
    if per_row is not None and (per_row.device != hidden.device or not per_row.is_floating_point()):
        found = f"{per_row.dtype} on {per_row.device}"
        raise ValueError(f"temperature is {found}: expected a float dtype on {hidden.device}, like hidden")
    if per_row is None and not temperature > 0:
        raise ValueError(f"temperature={temperature}: expected a value above 0")
    if check:
        checks.check_finite("hidden", hidden)
        checks.check_target_range(target, weight.shape[0])
        if per_row is not None and not (per_row > 0).all():
            raise ValueError(f"temperature holds {float(per_row.min())}: expected values above 0")
    scale = 1.0 if per_row is not None else float(temperature)
    chunk = -1 if chunk_tokens is None else chunk_tokens
    outputs = linear_logprob_op(
        hidden, weight, bias, target, per_row, scale, logits_dtype, chunk, backend or dispatch.AUTO
    )
    return LinearLogprob(*outputs[:3])


def prepare(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The head's inputs as plain tensors of one dtype: gathered if sharded, cast under autocast, then checked."""
    hidden, weight = plain(hidden), plain(weight)
    bias = None if bias is None else plain(bias)
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    checks.check_linear(hidden, weight, bias)
    return hidden, weight, bias


def plain(tensor: Tensor) -> Tensor:
    """A DTensor gathered to every rank; its gradient there is one rank's share of a sum (Partial), not a replica."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    from torch.distributed.tensor import Partial

    return tensor.full_tensor(grad_placements=[Partial()] * tensor.device_mesh.ndim)


def _rows_temperature(temperature: Tensor | None, scale: float, hidden: Tensor) -> Tensor:
    dtype = reference.compute_dtype(hidden.dtype)
    if temperature is None:
        return torch.full(hidden.shape[:1], scale, dtype=dtype, device=hidden.device)
    return temperature.to(dtype)


@torch.library.custom_op("scope_fast::linear_logprob", mutates_args=())
def linear_logprob_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    temperature: Tensor | None,
    scale: float,
    logits_dtype: str,
    chunk_tokens: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprob, entropy, logsumexp), each (T,), and state (2, T): max z and log sum exp(z - max z).

    A row's temperature is temperature[row] where given, else scale.
    """
    backend = dispatch.resolve(STEM, backend, hidden.device.type)
    with dispatch.body(hidden):
        if backend == "triton":
            from scope_fast.kernels.linear_logprob import linear_logprob

            return linear_logprob(hidden, weight, bias, target, temperature, scale, logits_dtype, chunk_tokens)
        if backend == "cpu":
            return torch.ops.scope_fast_native.linear_logprob(
                hidden, weight, bias, target, temperature, scale, logits_dtype, chunk_tokens
            )
        per_row = _rows_temperature(temperature, scale, hidden)
        return reference.linear_logprob(hidden, weight, bias, target, per_row, logits_dtype, chunk_tokens)


@linear_logprob_op.register_fake
def _fake(hidden, *args):
    dtype = reference.compute_dtype(hidden.dtype)
    num_rows = hidden.shape[0]
    return *(hidden.new_empty(num_rows, dtype=dtype) for _ in range(3)), hidden.new_empty((2, num_rows), dtype=dtype)


@torch.library.custom_op("scope_fast::linear_logprob_backward", mutates_args=())
def linear_logprob_backward_op(
    grad_logprob: Tensor,
    grad_entropy: Tensor,
    grad_logsumexp: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    temperature: Tensor | None,
    scale: float,
    entropy: Tensor,
    state: Tensor,
    logits_dtype: str,
    chunk_tokens: int,
    need_dhidden: bool,
    need_dweight: bool,
    need_dbias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden, dweight, dbias); one that is not needed has shape (0,)."""
    backend = dispatch.resolve(STEM, backend, hidden.device.type)
    grads, needs = (grad_logprob, grad_entropy, grad_logsumexp), (need_dhidden, need_dweight, need_dbias)
    with dispatch.body(hidden):
        if backend == "triton":
            from scope_fast.kernels.linear_logprob import linear_logprob_backward

            return linear_logprob_backward(
                grads, hidden, weight, bias, target, temperature, scale, entropy, state,
                logits_dtype, chunk_tokens, needs,
            )  # fmt: skip
        if backend == "cpu":
            return torch.ops.scope_fast_native.linear_logprob_backward(
                *grads, hidden, weight, bias, target, temperature, scale, entropy, state,
                logits_dtype, chunk_tokens, *needs,
            )  # fmt: skip
        per_row = _rows_temperature(temperature, scale, hidden)
        return reference.linear_logprob_backward(
            grads, hidden, weight, bias, target, per_row, logits_dtype, chunk_tokens, needs
        )


@linear_logprob_backward_op.register_fake
def _fake_backward(grad_logprob, grad_entropy, grad_logsumexp, hidden, weight, *args):
    need_dhidden, need_dweight, need_dbias = args[-4:-1]
    dhidden = hidden.new_empty(hidden.shape if need_dhidden else (0,))
    dweight = weight.new_empty(weight.shape if need_dweight else (0,))
    return dhidden, dweight, weight.new_empty(weight.shape[:1] if need_dbias else (0,))


def _setup_context(ctx, inputs, output):
    hidden, weight, bias, target, temperature, *ctx.plain = inputs
    _, entropy, _, state = output
    ctx.mark_non_differentiable(state)
    ctx.save_for_backward(hidden, weight, bias, target, temperature, entropy, state)


def _backward(ctx, *grads):
    hidden, weight, bias, target, temperature, entropy, state = ctx.saved_tensors
    scale, logits_dtype, chunk_tokens, backend = ctx.plain
    needs = ctx.needs_input_grad[:3]
    gradients = linear_logprob_backward_op(
        *grads[:3], hidden, weight, bias, target, temperature, scale, entropy, state,
        logits_dtype, chunk_tokens, *needs, backend,
    )  # fmt: skip
    return *(grad if need else None for grad, need in zip(gradients, needs, strict=True)), *(None for _ in range(6))


linear_logprob_op.register_autograd(_backward, setup_context=_setup_context)
