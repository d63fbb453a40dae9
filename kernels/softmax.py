"""A row of logits, on the device: its softmax statistics in one read, and its gradient in place in another.

    z = (logit + bias) * scale        scale = 1 / temperature
    top = max z,  s = sum exp(z - top),  u = sum (z - top) exp(z - top)         (one pass, online, 16 bytes at a time)
    logprob = z[target] - top - log s        entropy = log s - u / s        logsumexp = top + log s
    dlogit = scale * (p * (k - g - h * (log p + entropy)) + g * [target])       (g, h, k: gradients of the three)

One program walks one row, so no program waits for another. The gradient walks the row backwards: what the first pass
read last is still in L2. It is written as bfloat16 over the upper half of the float32 logits it is made from
(`logit_buffer`): every write lands at or above the bytes still to be read. Or, of many rows, into a buffer of its own.
"""

import torch
import triton
import triton.language as tl

from .compat import cast

LOWEST = tl.constexpr(-3.0e38)  # a running maximum that no logit reached yet: finite, so that differences are not NaN
BLOCK = 2048  # 4096 takes up to 64 registers, which leave four programs a processor, and is as fast (bench/NOTES.md)
NUM_WARPS = 8
# elements: logit rows start on 32 bytes (bfloat16) or 64 (float32), what tensor cores load at full speed
ALIGN = tl.constexpr(16)


@triton.jit
def row_scale(temperature, segment, at, default):
    """1 / temperature of a row: its stream's; else the default on RL rows (segment 1, or no segments) and 1 on NLL."""
    if temperature is None:
        value = default
        if segment is not None:
            value = tl.where(tl.load(segment + at) == 1, default, 1.0)
        return 1.0 / value
    else:
        return 1.0 / tl.load(temperature + at)


@triton.jit
def padded(size):
    """Up to here a row may be read and written (see logit_buffer): whole vectors, whatever the vocabulary's size."""
    return (size + ALIGN - 1) // ALIGN * ALIGN


@triton.jit
def load_logits(row, bias, column, size, scale):
    z = tl.load(row + column, mask=column < padded(size), other=float("-inf")).to(tl.float32)
    if bias is not None:
        z += tl.load(bias + column, mask=column < size, other=0.0).to(tl.float32)
    return tl.where(column < size, z * scale, float("-inf"))


@triton.jit
def online(top, s, u, z):
    """Running (max, sum, weighted sum), (N,) each, with z (N, K) joined to them: moved to a new maximum once for K."""
    new_top = tl.maximum(top, tl.max(z, 1))
    shrink = tl.exp(top - new_top)
    u = shrink * (u + (top - new_top) * s)
    d = z - new_top[:, None]
    d = tl.where(d < -1e30, -1e30, d)  # an excluded token (-inf) adds 0 * 1e30, not NaN
    e = tl.exp(d)
    return new_top, shrink * s + tl.sum(e, 1), u + tl.sum(d * e, 1)


@triton.jit
def at_most_zero(x):
    """A log-probability. A scaled logit may be rounded in one place and not in another (fused multiply-add), so that
    the largest has one of an ulp above 0. NaN stays."""
    return tl.where(x > 0, 0.0, x)


@triton.jit
def merged(top, s, u, axis: tl.constexpr):
    """The running statistics of all lanes along an axis as one."""
    total_top = tl.max(top, axis, keep_dims=True)
    shrink = tl.exp(top - total_top)
    u = tl.sum(shrink * (u + (top - total_top) * s), axis)
    return tl.max(top, axis), tl.sum(shrink * s, axis), u


@triton.jit
def softmax_stats(row, bias, size, scale, BLOCK: tl.constexpr):
    """(top, log s, entropy) of one row of logits."""
    VECTOR: tl.constexpr = 128 // row.dtype.element_ty.primitive_bitwidth  # what a thread loads at once
    LANES: tl.constexpr = BLOCK // VECTOR
    column = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]
    top = tl.full([LANES], LOWEST, tl.float32)
    s = tl.zeros([LANES], tl.float32)
    u = tl.zeros([LANES], tl.float32)
    for start in range(0, size, BLOCK):
        top, s, u = online(top, s, u, load_logits(row, bias, start + column, size, scale))
    row_top, row_s, row_u = merged(top, s, u, 0)
    log_s = tl.log(row_s)
    return row_top, log_s, -at_most_zero(row_u / row_s - log_s)


@triton.jit
def target_logprob(row, bias, target, size, scale, top, log_s):
    """Log-probability of the target; NaN outside [0, size): never another token's."""
    inside = (target >= 0) & (target < size)
    at = tl.where(inside, target, 0)
    z = tl.load(row + at).to(tl.float32)
    if bias is not None:
        z += tl.load(bias + at).to(tl.float32)
    return tl.where(inside, at_most_zero(z * scale - top - log_s), float("nan"))


@triton.jit
def write_dlogits(
    row, out, bias, target, size, scale, top, log_s, entropy, g, h, k, ENTROPY: tl.constexpr, BLOCK: tl.constexpr
):
    """The row's gradient, from its last block to its first; out may be the upper half of row (see logit_buffer).

    A target outside [0, size) is none of the columns.
    """
    num_blocks = tl.cdiv(size, BLOCK)
    hit = tl.where((target >= 0) & (target < size), target, -1).to(tl.int32)
    for i in range(0, num_blocks):
        column = (num_blocks - 1 - i) * BLOCK + tl.arange(0, BLOCK)
        log_p = load_logits(row, bias, column, size, scale) - top - log_s
        p = tl.exp(log_p)
        slope = k - g
        if ENTROPY:
            slope -= tl.where(p > 0, h * (log_p + entropy), 0.0)
        dz = p * slope + tl.where(column == hit, g, 0.0)
        tl.debug_barrier()  # every lane has read its logits before any lane writes over them
        tl.store(out + column, cast(dz * scale, out.dtype.element_ty), mask=column < padded(size))


def logit_buffer(
    num_rows: int,
    size: int,
    logits: torch.dtype,
    operand: torch.dtype,
    device: torch.device,
    logit_rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits (logit_rows, size), dlogits (num_rows, size)), rows strided, dlogits in the matmuls' dtype. What lies
    between two rows is the kernels' to overwrite. logit_rows: num_rows where None.

    Where they have as many rows they share memory. Of a wider dtype, the gradient is then the upper half of its row of
    logits, so that writing backwards never overtakes: by the barrier of write_dlogits, which on AMD lets loads of other
    wavefronts pass, so there it has its own.
    """
    logit_rows = num_rows if logit_rows is None else logit_rows
    stride = triton.cdiv(size, ALIGN.value) * ALIGN.value
    rows = torch.empty(logit_rows, stride, dtype=logits, device=device)
    if logit_rows < num_rows or (logits != operand and torch.version.hip):
        return rows[:, :size], torch.empty(num_rows, stride, dtype=operand, device=device)[:, :size]
    if logits == operand:
        return rows[:, :size], rows[:, :size]
    return rows[:, :size], rows.view(operand)[:, stride : stride + size]


def mm(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, *, accumulate: bool = False) -> torch.Tensor:
    """out = a @ b, or out += a @ b: summed in float32, and kept in it where out is float32 and the operands are not."""
    if a.dtype == out.dtype:
        return torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
    if not a.is_cuda:  # ATen widens only on GPUs; this is the interpreter's way
        return mm(a.to(out.dtype), b.to(out.dtype), out, accumulate=accumulate)
    if accumulate:
        return torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def memory_bytes(device: torch.device) -> int | None:
    """Of the whole device; None for the interpreter's."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def logit_dtypes(operand: torch.dtype, logits_dtype: str) -> torch.dtype:
    """What the logits are kept in: float32, or the inputs' bfloat16 where asked."""
    return torch.bfloat16 if operand == torch.bfloat16 and logits_dtype == "bfloat16" else torch.float32


def require_triton_dtype(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype == torch.float64:
        raise ValueError(f"{name} is torch.float64: the triton backend takes bfloat16 and float32; use reference")
