"""The public losses: streams and options in, (loss, metrics) out. The arithmetic is in the ops.

The loss is a SUM over rows: loss_weight carries the normaliser (the right global count), so that losses and gradients
add over micro-batches and ranks. Metrics are sums too, and *_max maxima: divide once, after all have been added.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scope_fast.batch import LossOptions, TokenStreams
from scope_fast.ops import checks, dispatch
from scope_fast.ops.linear_logprob import prepare
from scope_fast.ops.linear_scope_loss import linear_scope_loss_op
from scope_fast.ops.options import METRICS, encode
from scope_fast.ops.scope_loss import scope_loss_op

DEFAULT_OPTIONS = LossOptions()


def linear_scope_loss(
    hidden: Tensor,
    weight: Tensor,
    streams: TokenStreams,
    options: LossOptions = DEFAULT_OPTIONS,
    *,
    bias: Tensor | None = None,
    backend: str | None = None,
    check: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped policy gradient on RL rows plus weighted likelihood on NLL rows, straight from hidden states.

    hidden (T, D), weight (V, D), bias (V): bfloat16, float32 or (reference, cpu) float64, one dtype (under autocast:
    cast to autocast's). streams: (T,) each. Gradients of hidden, weight and bias are formed in this forward, for the
    rows that can have one; without `streams.active` those are found at the price of one host sync (two where there is
    no advantage either).

    Returns the loss, a scalar in float32 (float64 for float64), and metrics, device scalars: sums over the active rows
    loss/rl, loss/nll, policy/rows, policy/entropy_sum, policy/kl_sum (k3 of KL(old || new): r - 1 - log r),
    policy/clipped, sampling/gap_sum (|logprob - rollout_logprob|), and the maxima policy/ratio_max, sampling/gap_max.
    No active row: the loss is exactly 0 and its gradients are zeros, so every rank can run its backward.

    Raises ValueError naming the argument and both shapes for input that disagrees, for float16, and for a stream that
    the options need and that is missing (advantage: where its absence shows without a host sync, or with check=True;
    else its rows are NaN). A target outside [0, V) of an active row makes the loss NaN; check=True
    checks values as well (targets, segments, finiteness), which syncs with the device.
    """
    hidden, weight, bias = prepare(hidden, weight, bias)
    checks.validate_streams(streams, options, hidden.shape[0], device=hidden.device)
    if check:
        checks.check_finite("hidden", hidden)
        checks.validate_stream_values(streams, options, weight.shape[0])
    grad = torch.is_grad_enabled()
    loss, metrics, *_ = linear_scope_loss_op(
        hidden, weight, bias, streams.target, streams.segment, streams.loss_weight, streams.old_logprob,
        streams.advantage, streams.ref_logprob, streams.rollout_logprob, streams.temperature, streams.active,
        encode(options), options.logits_dtype, -1 if options.chunk_tokens is None else options.chunk_tokens,
        grad and hidden.requires_grad, grad and weight.requires_grad, grad and bias is not None and bias.requires_grad,
        backend or dispatch.AUTO,
    )  # fmt: skip
    return loss, _named(metrics)


def scope_loss(
    logprob: Tensor,
    streams: TokenStreams,
    options: LossOptions = DEFAULT_OPTIONS,
    *,
    entropy: Tensor | None = None,
    backend: str | None = None,
    check: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of linear_scope_loss from logprob (T,) and, where the options need it, entropy (T,).

    For trainers that already have them (already divided by the temperature: the streams' temperature, target and
    active are not read). Differentiable in both. Returns and raises as linear_scope_loss; without entropy the metric
    policy/entropy_sum is left out.
    """
    for name, value in (("logprob", logprob), ("entropy", entropy)):
        if value is not None and (value.shape != logprob.shape or value.dim() != 1):
            raise ValueError(f"{name} {checks.shape(value)}: expected (T,), like logprob {checks.shape(logprob)}")
        if value is not None and value.dtype not in checks.HIDDEN_DTYPES:
            raise ValueError(f"{name} is {value.dtype}: expected one of {', '.join(map(str, checks.HIDDEN_DTYPES))}")
    checks.validate_streams(streams, options, logprob.shape[0], like="logprob", device=logprob.device)
    if entropy is None and (options.entropy_coef != 0.0 or options.nll_shape == "entropy"):
        raise ValueError(
            f"entropy is None: entropy_coef={options.entropy_coef}, nll_shape={options.nll_shape!r} need it, "
            f"shape {checks.shape(logprob)}"
        )
    if check:
        checks.validate_stream_values(streams, options, vocab_size=None)
    loss, metrics, *_ = scope_loss_op(
        logprob, entropy, streams.segment, streams.loss_weight, streams.old_logprob, streams.advantage,
        streams.ref_logprob, streams.rollout_logprob, encode(options), backend or dispatch.AUTO,
    )  # fmt: skip
    named = _named(metrics)
    if entropy is None:
        del named["policy/entropy_sum"]
    return loss, named


def _named(metrics: Tensor) -> dict[str, Tensor]:
    return dict(zip(METRICS, metrics.detach().unbind(), strict=True))
