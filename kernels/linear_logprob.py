"""linear_logprob: logprob, entropy and logsumexp of a target under the output layer; its gradient; the streaming mode.

Forward, by row chunks: one matmul and one kernel that reads the chunk once. Streaming: one kernel that multiplies and
folds the vocabulary online, so that no logit is ever written; split over the vocabulary where rows alone do not fill
the GPU, the splits merged by a second kernel (no atomics).
Backward, by vocabulary tiles of all rows: the logits again, their gradient in place from the saved statistics,
dW of the tile in one matmul (no read-modify-write of (V, D)), dX accumulated in float32 (T, D) over few tiles.
"""

import torch
import triton
import triton.language as tl

from . import plan
from .compat import dot
from .rows import narrow
from .softmax import (
    BLOCK,
    LOWEST,
    NUM_WARPS,
    at_most_zero,
    logit_buffer,
    logit_dtypes,
    memory_bytes,
    merged,
    mm,
    num_processors,
    online,
    require_triton_dtype,
    row_scale,
    softmax_stats,
    target_logprob,
    write_dlogits,
)

# logits of a chunk of rows, and of a vocabulary tile in the backward; on an H100 1 GiB is 7 % slower, 5 as fast
TILE_BYTES = 2 << 30
STREAM_BYTES = 64 << 20  # the same in the streaming mode, where a tile of STREAM_WIDTH takes no more
STREAM_WIDTH = 2048  # narrower ones would spend their time on dX, which is read and written for each
TILE_ALIGN = 256
ROW_ALIGN = 128  # of chunks of rows: slices of the outputs start on 16 bytes, and matmuls have whole tiles
MERGED_SPLITS = 16  # at a time: hundreds at once (few rows on many processors) do not fit into registers


@triton.jit(do_not_specialize=["num_rows"])
def _row_stats_kernel(
    logits, bias, target, temperature, default, logprob, entropy, logsumexp, state, num_rows, size, stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64)
    row = logits + r * stride
    scale = row_scale(temperature, None, r, default)
    top, log_s, h = softmax_stats(row, bias, size, scale, BLOCK)
    tl.store(logprob + r, target_logprob(row, bias, tl.load(target + r), size, scale, top, log_s))
    tl.store(entropy + r, h)
    tl.store(logsumexp + r, top + log_s)
    tl.store(state + r, top)
    tl.store(state + num_rows + r, log_s)


@triton.jit(do_not_specialize=["num_rows", "first"])
def _dlogits_kernel(
    logits, dlogits, bias, target, temperature, default, grad_logprob, grad_entropy, grad_logsumexp, entropy, state,
    num_rows, first, size, stride, dstride, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row of a vocabulary tile [first, first + size)."""
    r = tl.program_id(0).to(tl.int64)
    write_dlogits(
        logits + r * stride, dlogits + r * dstride, bias, tl.load(target + r) - first, size,
        row_scale(temperature, None, r, default), tl.load(state + r), tl.load(state + num_rows + r),
        tl.load(entropy + r), tl.load(grad_logprob + r), tl.load(grad_entropy + r), tl.load(grad_logsumexp + r),
        True, BLOCK,
    )  # fmt: skip


@triton.jit
def _stream_kernel(
    hidden, weight, bias, target, temperature, default, partial, num_rows, size, dim, stride_h, stride_w, plane,
    split_size, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Statistics of BLOCK_T rows over one split of the vocabulary into partial (4, splits, T): top, s, u, z[target]."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    split = tl.program_id(1)
    live = t < num_rows
    d = tl.arange(0, BLOCK_D)
    x_row = hidden + t.to(tl.int64)[:, None] * stride_h
    token = tl.load(target + t, mask=live, other=-1)
    if temperature is None:
        scale = tl.full([BLOCK_T], 1.0, tl.float32) / default
    else:
        scale = 1.0 / tl.load(temperature + t, mask=live, other=1.0)
    top = tl.full([BLOCK_T], LOWEST, tl.float32)
    s = tl.zeros([BLOCK_T], tl.float32)
    u = tl.zeros([BLOCK_T], tl.float32)
    z_target = tl.zeros([BLOCK_T], tl.float32)
    for start in range(split * split_size, tl.minimum((split + 1) * split_size, size), BLOCK_V):
        v = start + tl.arange(0, BLOCK_V)
        w_row = weight + v.to(tl.int64)[None, :] * stride_w
        acc = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
        for k in range(0, dim, BLOCK_D):
            inside = k + d < dim
            x = tl.load(x_row + (k + d)[None, :], mask=live[:, None] & inside[None, :], other=0.0)
            w = tl.load(w_row + (k + d)[:, None], mask=(v < size)[None, :] & inside[:, None], other=0.0)
            acc = dot(x, w, acc)
        if bias is not None:
            acc += tl.load(bias + v, mask=v < size, other=0.0).to(tl.float32)[None, :]
        z = tl.where((v < size)[None, :], acc * scale[:, None], float("-inf"))
        z_target += tl.sum(tl.where(v[None, :] == token[:, None], z, 0.0), 1)
        top, s, u = online(top, s, u, z)
    out = partial + split.to(tl.int64) * num_rows + t
    tl.store(out, top, mask=live)
    tl.store(out + plane, s, mask=live)
    tl.store(out + 2 * plane, u, mask=live)
    tl.store(out + 3 * plane, z_target, mask=live)


@triton.jit
def _merge_kernel(
    partial, target, logprob, entropy, logsumexp, state, num_rows, size, plane, num_splits,
    BLOCK_T: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    live = t < num_rows
    top = tl.full([BLOCK_T], LOWEST, tl.float32)
    s = tl.zeros([BLOCK_T], tl.float32)
    u = tl.zeros([BLOCK_T], tl.float32)
    z_target = tl.zeros([BLOCK_T], tl.float32)
    for first in range(0, num_splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        at = partial + split.to(tl.int64)[None, :] * num_rows + t[:, None]
        mask = live[:, None] & (split < num_splits)[None, :]
        next_top, next_s, next_u = merged(
            tl.load(at, mask=mask, other=LOWEST),
            tl.load(at + plane, mask=mask, other=0.0),
            tl.load(at + 2 * plane, mask=mask, other=0.0),
            1,
        )
        z_target += tl.sum(tl.load(at + 3 * plane, mask=mask, other=0.0), 1)
        new_top = tl.maximum(top, next_top)
        shrink, next_shrink = tl.exp(top - new_top), tl.exp(next_top - new_top)
        u = shrink * (u + (top - new_top) * s) + next_shrink * (next_u + (next_top - new_top) * next_s)
        s = shrink * s + next_shrink * next_s
        top = new_top
    token = tl.load(target + t, mask=live, other=0)
    log_s = tl.log(s)
    inside = (token >= 0) & (token < size)
    tl.store(logprob + t, tl.where(inside, at_most_zero(z_target - top - log_s), float("nan")), mask=live)
    tl.store(entropy + t, -at_most_zero(u / s - log_s), mask=live)
    tl.store(logsumexp + t, top + log_s, mask=live)
    tl.store(state + t, top, mask=live)
    tl.store(state + num_rows + t, log_s, mask=live)


def linear_logprob(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    temperature: torch.Tensor | None,
    default: float,
    logits_dtype: str,
    chunk_tokens: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(logprob, entropy, logsumexp), each (T,), and state (2, T), in float32; chunk_tokens 0: the streaming mode."""
    require_triton_dtype("hidden", hidden)
    bias = None if bias is None else bias.contiguous()
    temperature = narrow(temperature)
    if chunk_tokens == 0:
        return stream_stats(hidden, weight, bias, target, temperature, default)
    num_rows, size, device = hidden.shape[0], weight.shape[0], hidden.device
    kept = logit_dtypes(hidden.dtype, logits_dtype)
    if chunk_tokens < 0:
        chunk_tokens = max(1, _tile_bytes(device) // (size * kept.itemsize) // ROW_ALIGN) * ROW_ALIGN
    chunk_tokens = max(1, min(chunk_tokens, num_rows))
    outputs = _outputs(num_rows, device)
    logits, _ = logit_buffer(chunk_tokens, size, kept, kept, device)
    target = target.contiguous()
    for first in range(0, num_rows, chunk_tokens):
        part = slice(first, min(first + chunk_tokens, num_rows))
        z = logits[: part.stop - first]
        mm(hidden[part], weight.T, z)
        _row_stats_kernel[(part.stop - first,)](
            z, bias, target[part], None if temperature is None else temperature[part], default,
            *(x[..., part] for x in outputs), num_rows, size, z.stride(0),
            BLOCK=BLOCK, num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return outputs


def _tile_bytes(device: torch.device) -> int:
    return plan.within(TILE_BYTES, memory_bytes(device))


def _outputs(num_rows: int, device: torch.device):
    state = torch.empty(2, num_rows, dtype=torch.float32, device=device)
    return *(torch.empty(num_rows, dtype=torch.float32, device=device) for _ in range(3)), state


def stream_blocks(operand: torch.dtype, dim: int) -> dict[str, int]:
    """Tiles of the streaming kernel: wgmma-sized in bfloat16; smaller without tensor cores or 16-byte rows."""
    aligned = dim % 16 == 0
    if operand == torch.bfloat16 and aligned:
        return {"BLOCK_T": 128, "BLOCK_V": 128, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_T": 32 if aligned else 16, "BLOCK_V": 32, "BLOCK_D": 32, "num_warps": 4, "num_stages": 2}


def stream_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    temperature: torch.Tensor | None,
    default: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """linear_logprob's outputs without a single logit in memory: scratch is 16 bytes per row and vocabulary split."""
    num_rows, (size, dim), device = hidden.shape[0], weight.shape, hidden.device
    outputs = _outputs(num_rows, device)
    if num_rows == 0:
        return outputs
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    target, blocks = target.contiguous(), stream_blocks(hidden.dtype, dim)
    row_blocks = triton.cdiv(num_rows, blocks["BLOCK_T"])
    vocabulary_blocks = triton.cdiv(size, blocks["BLOCK_V"])
    wanted = triton.cdiv(4 * num_processors(device), row_blocks)  # four programs a processor hide the uneven tail
    split_blocks = triton.cdiv(vocabulary_blocks, min(wanted, vocabulary_blocks))
    num_splits = triton.cdiv(vocabulary_blocks, split_blocks)
    partial = torch.empty(4, num_splits, num_rows, dtype=torch.float32, device=device)
    _stream_kernel[(row_blocks, num_splits)](
        hidden, weight, bias, target, temperature, default, partial, num_rows, size, dim,
        hidden.stride(0), weight.stride(0), partial.stride(0), split_blocks * blocks["BLOCK_V"],
        enable_fp_fusion=True, **blocks,
    )  # fmt: skip
    _merge_kernel[(triton.cdiv(num_rows, 16),)](
        partial, target, *outputs, num_rows, size, partial.stride(0), num_splits,
        BLOCK_T=16, SPLITS=MERGED_SPLITS, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return outputs


def linear_logprob_backward(
    grads: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    temperature: torch.Tensor | None,
    default: float,
    entropy: torch.Tensor,
    state: torch.Tensor,
    logits_dtype: str,
    chunk_tokens: int,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients from those of logprob, entropy and logsumexp (T,) and the forward's statistics, by vocabulary tiles."""
    num_rows, size, device = hidden.shape[0], weight.shape[0], hidden.device
    need_dhidden, need_dweight, need_dbias = needs
    # the streaming forward's statistics are of float32 logits, and p must be too
    kept = logit_dtypes(hidden.dtype, "float32" if chunk_tokens == 0 else logits_dtype)
    least, room = (STREAM_WIDTH, STREAM_BYTES) if chunk_tokens == 0 else (TILE_ALIGN, _tile_bytes(device))
    width = room // (max(num_rows, 1) * kept.itemsize) // TILE_ALIGN * TILE_ALIGN
    width = min(size, max(least, width))
    logits, dlogits = logit_buffer(num_rows, width, kept, hidden.dtype, device)
    dx = torch.zeros(hidden.shape if need_dhidden else (0,), dtype=torch.float32, device=device)
    make = torch.empty if num_rows else torch.zeros  # every tile of dweight is written, where there is a row
    dweight = make(weight.shape if need_dweight else (0,), dtype=weight.dtype, device=device)
    dbias = torch.zeros(weight.shape[:1] if need_dbias else (0,), dtype=weight.dtype, device=device)
    temperature, bias = narrow(temperature), None if bias is None else bias.contiguous()
    target, g, h, k = (x.contiguous() for x in (target, *grads))
    for first in range(0, size if num_rows else 0, width):
        part = slice(first, min(first + width, size))
        n, w = part.stop - first, weight[part]
        z, dz = logits[:, :n], dlogits[:, :n]
        mm(hidden, w.T, z)
        _dlogits_kernel[(num_rows,)](
            z, dz, None if bias is None else bias[part], target, temperature, default, g, h, k, entropy, state,
            num_rows, first, n, z.stride(0), dz.stride(0), BLOCK=BLOCK, num_warps=NUM_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
        if need_dhidden:
            mm(dz, w, dx, accumulate=True)
        if need_dweight:
            mm(dz.T, hidden, dweight[part])
        if need_dbias:
            dbias[part] = dz.sum(0, dtype=torch.float32)
    return dx.to(hidden.dtype), dweight, dbias
