"""linear_scope_loss: per chunk of rows, logits = x W^T; one kernel turns them into dlogits; dX and dW.

A gradient lies over the logits it is made of, or, where that of a longer chunk takes less (plan.rows_at_a_time), in a
buffer of its own that a few rows of logits at a time fill.
6*T*V*D flops on the vendor's matmuls, and per logit 10 bytes of the row kernel's own (float32 logits: two reads and
the bfloat16 gradient; 6 with bfloat16 logits), of which the second read partly hits L2; the row kernel of csrc/cuda,
where there is one, reads them once (6 and 4). dW accumulates in float32.
The streaming mode (chunk_tokens=0) trades 8 flops for scratch: statistics without any logits, then the gradient by
vocabulary tiles of STREAM_BYTES.
"""

import torch
import triton
import triton.language as tl

from . import plan
from .compat import cast
from .linear_logprob import linear_logprob_backward, stream_stats
from .rows import NUM_METRICS, kernel_streams, narrow, reduce_table, row_terms
from .scope_loss import scope_loss
from .softmax import (
    BLOCK,
    NUM_WARPS,
    logit_buffer,
    logit_dtypes,
    memory_bytes,
    mm,
    num_processors,
    require_triton_dtype,
    row_scale,
    softmax_stats,
    target_logprob,
    write_dlogits,
)

SCALE_BLOCK, SCALE_PROGRAMS = 8192, 8  # elements at a time of a program, and programs a processor
CLUSTER_BYTES = 613_376  # the longest row of logits that csrc/cuda/linear_scope_loss.cuh takes: its kMaxRowBytes


@triton.jit(do_not_specialize=["first", "num_rows"])  # they differ from step to step
def _linear_scope_loss_kernel(
    logits, dlogits, bias, target, streams, temperature, index, o, table, first, num_rows, size, stride, dstride,
    GRADIENT: tl.constexpr, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row of the chunk: statistics, row terms into column first + row of the table, then dlogits."""
    r = tl.program_id(0).to(tl.int64)
    at = tl.load(index + r)
    row = logits + r * stride
    scale = row_scale(temperature, streams.segment, at, o.temperature)
    top, log_s, entropy = softmax_stats(row, bias, size, scale, BLOCK)
    token = tl.load(target + at)
    logprob = target_logprob(row, bias, token, size, scale, top, log_s)
    loss_rl, loss_nll, g, h, rows, entropy_rl, old_kl, clipped, gap, ratio = row_terms(
        logprob, entropy, at, at >= 0, streams, o
    )
    cell = table + first + r
    tl.store(cell, loss_rl)
    tl.store(cell + num_rows, loss_nll)
    tl.store(cell + 2 * num_rows, rows)
    tl.store(cell + 3 * num_rows, entropy_rl)
    tl.store(cell + 4 * num_rows, old_kl)
    tl.store(cell + 5 * num_rows, clipped)
    tl.store(cell + 6 * num_rows, gap)
    tl.store(cell + 7 * num_rows, ratio)
    tl.store(cell + 8 * num_rows, gap)
    if GRADIENT:
        out = dlogits + r * dstride
        write_dlogits(row, out, bias, token, size, scale, top, log_s, entropy, g, h, 0.0, ENTROPY, BLOCK)


def linear_scope_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    rows,
    index: torch.Tensor,
    options,
    logits_dtype: str,
    chunk_tokens: int,
    needs: tuple[bool, bool, bool],
    clusters: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, metrics (9,), dhidden (T, D), dweight (V, D), dbias (V)) over the rows `index`.

    rows: ops.reference.Rows; options: ops.options.RowOptions; index (A,) int64, ascending; hidden (T, D), weight (V, D)
    and bias (V): bfloat16 or float32. A gradient that is not needed has shape (0,). clusters: csrc/cuda's row kernel in
    the place of the one here, but for rows longer than CLUSTER_BYTES.
    """
    require_triton_dtype("hidden", hidden)
    bias, index = None if bias is None else bias.contiguous(), index.contiguous()
    if chunk_tokens == 0:
        return _streaming(hidden, weight, bias, rows, index, options, needs)
    num_rows, (size, dim), device = index.numel(), weight.shape, hidden.device
    kept, dense = logit_dtypes(hidden.dtype, logits_dtype), num_rows == hidden.shape[0]
    if chunk_tokens < 0:
        gradient = hidden.dtype if needs[1] else kept  # a buffer of its own spares dW's sums: without dW, nothing
        beside = 0 if dense else 2 * dim * hidden.itemsize  # of rows of hidden, and of their gradient
        chunk_tokens, logit_rows = plan.rows_at_a_time(
            num_rows, dim, size, kept.itemsize, gradient.itemsize, num_processors(device), memory_bytes(device), beside
        )
    else:
        chunk_tokens = logit_rows = max(1, min(chunk_tokens, num_rows))
    grads = Gradients(hidden, weight, needs, dense=dense, once=chunk_tokens >= num_rows)
    launch = _rows
    if clusters and size * kept.itemsize <= CLUSTER_BYTES:
        launch, bias = _cluster_rows, narrow(bias)  # what it reads: one conversion, in the place of two a row
    buffers = logit_buffer(chunk_tokens, size, kept, hidden.dtype, device, logit_rows)
    table = _by_chunks(hidden, weight, bias, rows, index, options, buffers, grads, launch)
    del buffers  # before dW is cast
    metrics = reduce_table(table)
    return metrics[0] + metrics[1], metrics, *grads.result()


def _by_chunks(hidden, weight, bias, rows, index, options, buffers, grads, launch) -> torch.Tensor:
    """The metrics of every row, (NUM_METRICS, A); the gradients go into grads.

    buffers: logit_buffer's (L, V) and (C, V), for chunks of C rows with L rows of logits at a time. launch: of the row
    kernel.
    """
    num_rows, (logits, dlogits) = index.numel(), buffers
    table = torch.empty(NUM_METRICS, num_rows, dtype=torch.float32, device=hidden.device)
    shared = (rows.target.contiguous(), kernel_streams(rows), _temperature(rows), options, table)
    for first in range(0, num_rows, dlogits.shape[0]):
        chunk = index[first : first + dlogits.shape[0]]
        n = chunk.numel()
        x = hidden[first : first + n] if grads.dense else hidden.index_select(0, chunk)
        for start in range(0, n, logits.shape[0]):
            part = slice(start, min(start + logits.shape[0], n))
            z, dz = logits[: part.stop - start], dlogits[part]
            mm(x[part], weight.T, z)
            launch(z, dz, bias, chunk[part], first + start, any(grads.needs), *shared)
        grads.add(x, dlogits[:n], weight, chunk, first)
    return table


def _rows(z, dz, bias, index, first: int, gradient: bool, target, streams, temperature, options, table) -> None:
    """A chunk's logits z (C, V) -> columns `first` on of the table, and where asked dlogits dz (C, V)."""
    (num_rows, size), columns = z.shape, table.shape[1]
    _linear_scope_loss_kernel[(num_rows,)](
        z, dz, bias, target, streams, temperature, index, options, table, first, columns, size,
        z.stride(0), dz.stride(0), GRADIENT=gradient, ENTROPY=options.entropy_coef != 0, BLOCK=BLOCK,
        num_warps=NUM_WARPS, enable_fp_fusion=True,
    )  # fmt: skip


def _cluster_rows(z, dz, bias, index, first: int, gradient: bool, target, streams, temperature, options, table) -> None:
    """The same by csrc/cuda/linear_scope_loss.cuh."""
    torch.ops.scope_fast_native.linear_scope_loss_rows(
        z, dz if gradient else None, bias, index, target, *streams, temperature, options, table, first
    )


@triton.jit
def _scale_kernel(x, factor, out, size, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
    by = tl.load(factor).to(tl.float32)
    if (not IN_PLACE) | (by != 1.0):  # NaN is not 1
        for first in range(tl.program_id(0).to(tl.int64) * BLOCK, size, tl.num_programs(0).to(tl.int64) * BLOCK):
            at = first + tl.arange(0, BLOCK)
            value = tl.load(x + at, mask=at < size, other=0.0).to(tl.float32) * by
            tl.store(out + at, cast(value, out.dtype.element_ty), mask=at < size)


def scale(x: torch.Tensor, factor: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out = x times factor (one element), multiplied in float32 and rounded once; x and out contiguous, of one dtype.

    out may be x: nothing is then read or written where the factor is 1, which the device finds for itself. Torch's own
    kernel for mixed dtypes moves two bytes at a time.
    """
    if x.numel():
        programs = min(triton.cdiv(x.numel(), SCALE_BLOCK), SCALE_PROGRAMS * num_processors(x.device))
        _scale_kernel[(programs,)](
            x, factor, out, x.numel(), IN_PLACE=out.data_ptr() == x.data_ptr(), BLOCK=SCALE_BLOCK, num_warps=8,
            enable_fp_fusion=True,
        )  # fmt: skip
    return out


class Gradients:
    """dhidden, dweight and dbias, filled chunk by chunk.

    dense: every row of hidden is computed, in order. once: there is one chunk, so dweight needs no float32 sum.
    """

    def __init__(self, hidden, weight, needs, dense: bool, once: bool) -> None:
        device = hidden.device
        need_dhidden, need_dweight, need_dbias = needs
        self.needs, self.dense, self.dtype = needs, dense, weight.dtype
        # rows that are not computed have gradient zero; where all are, every one is written
        make = torch.empty if dense else torch.zeros
        self.dhidden = make(hidden.shape if need_dhidden else (0,), dtype=hidden.dtype, device=device)
        wide = weight.dtype if once else torch.float32
        self.dweight = torch.empty(weight.shape if need_dweight else (0,), dtype=wide, device=device)
        self.dbias = torch.zeros(weight.shape[:1] if need_dbias else (0,), dtype=torch.float32, device=device)
        self.untouched = True

    def add(self, x, dz, weight, chunk, first: int) -> None:
        """x (C, D), dz (C, V) of the rows `chunk` (C,), the ones from `first` on."""
        need_dhidden, need_dweight, need_dbias = self.needs
        if need_dhidden and self.dense:
            mm(dz, weight, self.dhidden[first : first + x.shape[0]])
        elif need_dhidden:
            self.dhidden.index_copy_(0, chunk, mm(dz, weight, torch.empty_like(x)))
        if need_dweight:
            mm(dz.T, x, self.dweight, accumulate=not self.untouched)
        if need_dbias:
            self.dbias += dz.sum(0, dtype=torch.float32)
        self.untouched = False

    def result(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if self.untouched:
            self.dweight.zero_()
        return self.dhidden, self.dweight.to(self.dtype), self.dbias.to(self.dtype)


def _temperature(rows) -> torch.Tensor | None:
    """The stream, 1 where the row is ignored: there it may hold NaN, which 0 times the gradient would keep.

    Here and not in the row kernel, which has no register left for it.
    """
    temperature = narrow(rows.temperature)
    return None if temperature is None else temperature.masked_fill(rows.segment == 0, 1.0)


def _streaming(hidden, weight, bias, rows, index, options, needs):
    """The same five results with no (C, V) scratch in the forward, and vocabulary tiles in the gradient."""
    dense = index.numel() == hidden.shape[0]
    x, part = (hidden, rows) if dense else (hidden.index_select(0, index), rows.take(index))
    temperature = _temperature(part)
    if temperature is None:
        one = torch.ones_like(part.loss_weight, dtype=torch.float32)
        temperature = torch.where(part.segment == 1, options.temperature, one)
    logprob, entropy, _, state = stream_stats(x, weight, bias, part.target, temperature, 1.0)
    loss, metrics, g, h = scope_loss(logprob, entropy, part, options)
    if not any(needs):
        return loss, metrics, *(hidden.new_empty(0) for _ in needs)
    grads = (g, h, torch.zeros_like(g))
    dx, dweight, dbias = linear_logprob_backward(
        grads, x, weight, bias, part.target, temperature, 1.0, entropy, state, "float32", 0, needs
    )
    if needs[0] and not dense:
        dx = torch.zeros_like(hidden).index_copy_(0, index, dx)
    return loss, metrics, dx, dweight, dbias
