"""What a loss asks of a row, on the device: the Triton twin of ops/reference.py's row_terms, and the metric reduction.

`row_terms` works on scalars (one program per row, in the linear loss) and on blocks (one lane per row, in scope_loss).
Options are run-time floats (ops/options.py's RowOptions, read by field name), so that none of them recompiles anything;
a stream that is absent is None, which the compiler sees.

A table holds the per-row (or per-block) metrics as (NUM_METRICS, N) and one program per metric folds it: no atomics,
so the sums are the same bits every time.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

NUM_METRICS = 9
NUM_SUMS = tl.constexpr(7)  # metrics 0..6 are sums, the rest maxima
LOG_RATIO_CLAMP = tl.constexpr(20.0)
SHAPED_GAMMA = tl.constexpr(0.1)


class Streams(NamedTuple):
    """Pointers to the streams a row loss reads, (T,) each; None where absent."""

    segment: torch.Tensor
    loss_weight: torch.Tensor
    old_logprob: torch.Tensor | None
    advantage: torch.Tensor | None
    ref_logprob: torch.Tensor | None
    rollout_logprob: torch.Tensor | None


def narrow(x: torch.Tensor | None) -> torch.Tensor | None:
    """A stream as the kernels read it: contiguous float32."""
    return None if x is None else x.to(torch.float32).contiguous()


def kernel_streams(rows) -> Streams:
    """The streams of ops.reference.Rows as kernel arguments."""
    return Streams(rows.segment.contiguous(), *(narrow(getattr(rows, name)) for name in Streams._fields[1:]))


@triton.jit
def load_or(pointer, at, mask, otherwise):
    if pointer is None:
        return otherwise
    else:
        return tl.load(pointer + at, mask=mask, other=0.0)


@triton.jit
def clamped(x, low, high):
    """x bounded, NaN staying NaN (a missing value must show)."""
    return tl.where(x > high, high, tl.where(x < low, low, x))


@triton.jit
def row_terms(logprob, entropy, at, mask, streams, o):
    """The row's (loss_rl, loss_nll, g, h) and its metrics in METRICS' order.

    at: index of the row in the streams; mask: rows that exist. A stream is masked before any arithmetic.
    """
    nan = logprob * 0.0 + float("nan")
    segment = tl.load(streams.segment + at, mask=mask, other=0)
    weight = tl.load(streams.loss_weight + at, mask=mask, other=0.0)
    advantage = load_or(streams.advantage, at, mask, nan)
    flows_always = (o.kl != 0) | (o.entropy_coef != 0)
    is_rl = (segment == 1) & (weight != 0) & ((advantage != 0) | flows_always)
    is_nll = (segment == 2) & (weight != 0)
    weight = tl.where(is_rl | is_nll, weight, 0.0)

    logp = tl.where(is_rl, logprob, 0.0)
    advantage = tl.where(is_rl, advantage, 0.0)
    old = tl.where(is_rl, load_or(streams.old_logprob, at, mask, logprob), 0.0)
    rollout = tl.where(is_rl, load_or(streams.rollout_logprob, at, mask, logprob), 0.0)
    difference = logp - old
    if streams.old_logprob is None:
        difference = tl.where(logp != logp, logp, 0.0)  # not logp - logp: that is NaN for -inf too
    loss, g, log_ratio, clipped = policy_terms(logp, difference, old, rollout, advantage, weight, o)

    ref = tl.where(is_rl, load_or(streams.ref_logprob, at, mask, logprob), 0.0)
    kl, kl_slope = kl_terms(logp - ref, o.kl)
    loss += tl.where(o.kl != 0, weight * o.kl_coef * kl, 0.0)
    g += tl.where(o.kl != 0, weight * o.kl_coef * kl_slope, 0.0)
    entropy_rl = tl.where(is_rl, entropy, 0.0)
    # an entropy that nobody asked for may be anything
    loss -= tl.where(o.entropy_coef != 0, weight * o.entropy_coef * entropy_rl, 0.0)
    loss_rl = tl.where(is_rl, loss, 0.0)
    h = tl.where(is_rl, -weight * o.entropy_coef, 0.0)

    loss_nll, g_nll = nll_terms(tl.where(is_nll, logprob, 0.0), tl.where(is_nll, entropy, 0.0), weight, o.nll_shape)
    loss_nll = tl.where(is_nll, loss_nll, 0.0)
    g = tl.where(is_rl, g, tl.where(is_nll, g_nll, 0.0))

    rows = tl.where(is_rl, 1.0, 0.0)
    ratio = tl.where(is_rl, tl.exp(log_ratio), 0.0)
    old_kl = tl.where(is_rl, ratio - 1.0 - log_ratio, 0.0)
    gap = tl.abs(logp - rollout)
    if streams.rollout_logprob is None:
        gap = tl.zeros_like(logp)
    was_clipped = tl.where(is_rl & clipped, 1.0, 0.0)
    return loss_rl, loss_nll, g, h, rows, entropy_rl, old_kl, was_clipped, gap, ratio


@triton.jit
def policy_terms(logp, difference, old, rollout, advantage, weight, o):
    """Clipped policy objective: (loss, dloss/dlogp, log ratio, clipped branch taken)."""
    log_ratio = clamped(difference, -LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
    ratio = tl.exp(log_ratio)
    bounded = clamped(ratio, 1.0 - o.clip_low, 1.0 + o.clip_high)
    objective = ratio * advantage
    clipped = bounded * advantage < objective
    objective = tl.where(clipped, bounded * advantage, objective)
    floor = o.dual_clip * advantage
    floored = (o.dual_clip != 0) & (advantage < 0) & (floor > objective)
    objective = tl.where(floored, floor, objective)
    clipped = clipped | floored
    flows = (tl.abs(difference) <= LOG_RATIO_CLAMP) & (clipped == 0)
    slope = tl.where(flows, ratio * advantage, 0.0)
    slope = tl.where(objective != objective, objective, slope)  # a missing value shows in the gradient too

    cispo = o.policy_loss != 0
    objective = tl.where(cispo, bounded * advantage * logp, objective)
    slope = tl.where(cispo, bounded * advantage, slope)
    clipped = tl.where(cispo, bounded != ratio, clipped)

    rho = tl.exp(old - rollout)
    rho = tl.where(rho > o.importance_cap, o.importance_cap, rho)
    weight = tl.where(o.importance_cap != 0, weight * rho, weight)
    return -weight * objective, -weight * slope, log_ratio, clipped


@triton.jit
def kl_terms(difference, kl):
    """k1, k2 or k3 of difference = logp - ref, and its slope in logp."""
    c = clamped(-difference, -LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)
    slope = tl.where(tl.abs(difference) <= LOG_RATIO_CLAMP, 1.0 - tl.exp(c), 0.0)
    value = tl.where(kl == 1, difference, tl.where(kl == 2, difference * difference / 2, tl.exp(c) - c - 1.0))
    return value, tl.where(kl == 1, 1.0, tl.where(kl == 2, difference, slope))


@triton.jit
def nll_terms(logp, entropy, weight, nll_shape):
    """Weighted likelihood: (loss, dloss/dlogp)."""
    p = tl.exp(logp)
    shaped = p / (p + SHAPED_GAMMA)
    weight = tl.where(nll_shape == 2, weight * tl.exp(-entropy), weight)
    loss = tl.where(nll_shape == 1, -weight * shaped, -weight * logp)
    slope = tl.where(nll_shape == 1, -weight * SHAPED_GAMMA * shaped / (p + SHAPED_GAMMA), -weight)
    return loss, slope


@triton.jit
def max_or_nan(x):
    """Maximum of a block; NaN if it holds one (tl.max alone drops them)."""
    return tl.where(tl.sum((x != x).to(tl.int32), 0) > 0, float("nan"), tl.max(x, 0))


@triton.jit
def _reduce_table_kernel(table, out, num_columns, BLOCK: tl.constexpr):
    """out[m] = sum or maximum of table[m, :]; one program per metric."""
    metric = tl.program_id(0)
    is_sum = metric < NUM_SUMS
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, num_columns, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(table + metric.to(tl.int64) * num_columns + column, mask=column < num_columns, other=0.0)
        total = tl.where(is_sum, total + x, tl.where((x > total) | (x != x), x, total))
    tl.store(out + metric, tl.where(is_sum, tl.sum(total, 0), max_or_nan(total)))


def reduce_table(table: torch.Tensor) -> torch.Tensor:
    """Metrics (NUM_METRICS,) of a table (NUM_METRICS, N) float32, contiguous; 0 over no columns."""
    out = torch.empty(NUM_METRICS, dtype=torch.float32, device=table.device)
    _reduce_table_kernel[(NUM_METRICS,)](table, out, table.shape[1], BLOCK=1024, num_warps=4, enable_fp_fusion=True)
    return out
