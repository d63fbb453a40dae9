"""step_pool: a PRM head at step boundaries, then one verdict per rollout. Two launches, nothing of size (T, .).

1. Scores. The linear head: one program per step gathers its hidden row and takes the 1 or 2 dot products. The MLP
   head: a matmul of gathered rows against tiles of hidden_weight, its relu and second layer folded in registers, so
   that a program writes C partial logits per step and the (S, M) activations never exist.
2. Verdicts. One program per rollout walks its steps: sums the partial logits, softmax, first error, pools.
"""

import torch
import triton
import triton.language as tl

from .compat import dot

MLP_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MANY_STEPS = 512  # from here on rows of steps fill tiles that reuse hidden_weight from shared memory, not from L2
BLOCK_LINEAR = 1024
BLOCK_STEPS = 64


def mlp_blocks(dtype: torch.dtype, num_steps: int, aligned: bool) -> dict[str, int]:
    """Tiles of the MLP head; aligned: its sizes are multiples of 16.

    Few steps: M is split, to fill the GPU. Large tiles want tensor cores, and spill without rows of whole vectors.
    """
    if dtype == torch.float32 or not aligned or num_steps < MANY_STEPS:
        return {"BLOCK_S": 16, "BLOCK_M": 64, "BLOCK_D": 32 if dtype == torch.float32 else 64, "num_warps": 4}
    return {"BLOCK_S": 128, "BLOCK_M": 128, "BLOCK_D": 64, "num_warps": 8}


@triton.jit
def _linear_score_kernel(
    hidden, step_end, weight, partial, dim, stride_h, stride_w, C: tl.constexpr, BLOCK: tl.constexpr
):
    """partial[0, step, c] = weight[c] . hidden[step_end[step]]."""
    step = tl.program_id(0).to(tl.int64)
    row = hidden + tl.load(step_end + step) * stride_h
    first = tl.zeros([BLOCK], tl.float32)
    second = tl.zeros([BLOCK], tl.float32)
    for start in range(0, dim, BLOCK):
        d = start + tl.arange(0, BLOCK)
        x = tl.load(row + d, mask=d < dim, other=0.0).to(tl.float32)
        first += x * tl.load(weight + d, mask=d < dim, other=0.0).to(tl.float32)
        if C == 2:
            second += x * tl.load(weight + stride_w + d, mask=d < dim, other=0.0).to(tl.float32)
    tl.store(partial + step * C, tl.sum(first, 0))
    if C == 2:
        tl.store(partial + step * C + 1, tl.sum(second, 0))


@triton.jit
def _mlp_score_kernel(
    hidden, step_end, hidden_weight, hidden_bias, weight, partial, num_steps, dim, width, stride_h, stride_m, stride_w,
    C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """partial[tile, step, c] = sum over the tile's m of weight[c, m] relu(hidden_weight[m] . x + hidden_bias[m])."""
    step = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    tile = tl.program_id(1).to(tl.int64)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    live = step < num_steps
    x_row = hidden + tl.load(step_end + step, mask=live, other=0)[:, None] * stride_h
    w_row = hidden_weight + m.to(tl.int64)[None, :] * stride_m
    acc = tl.zeros([BLOCK_S, BLOCK_M], tl.float32)
    for start in range(0, dim, BLOCK_D):
        inside = start + d < dim
        x = tl.load(x_row + (start + d)[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        w = tl.load(w_row + (start + d)[:, None], mask=(m < width)[None, :] & inside[:, None], other=0.0)
        acc = dot(x, w, acc)
    if hidden_bias is not None:
        acc += tl.load(hidden_bias + m, mask=m < width, other=0.0).to(tl.float32)[None, :]
    acc = tl.where(acc > 0, acc, tl.where(acc != acc, acc, 0.0))  # relu, NaN staying NaN
    out = partial + (tile * num_steps + step) * C
    for c in tl.static_range(C):
        w2 = tl.load(weight + c * stride_w + m, mask=m < width, other=0.0).to(tl.float32)
        tl.store(out + c, tl.sum(acc * w2[None, :], 1), mask=live)


@triton.jit
def _product(a, b):
    return a * b


@triton.jit
def _verdict_kernel(
    partial, bias, cu_steps, prob, first_error, low, mean, prod, last, num_steps, num_tiles, tau, positive,
    C: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per rollout: prob of its steps, first_error and pools; BLOCK steps at a time."""
    r = tl.program_id(0)
    start, end = tl.load(cu_steps + r), tl.load(cu_steps + r + 1)
    error_at = tl.full([BLOCK], 0, tl.int64) + (end - start)
    lowest = tl.full([BLOCK], float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    product = tl.full([BLOCK], 1.0, tl.float32)
    nans = tl.zeros([BLOCK], tl.int32)
    final = 0.0
    for offset in range(start, end, BLOCK):
        step = offset + tl.arange(0, BLOCK)
        live = step < end
        p = tl.full([BLOCK], 0.0, tl.float32)
        first = tl.zeros([BLOCK], tl.float32)
        second = tl.zeros([BLOCK], tl.float32)
        for tile in range(0, num_tiles):
            at = partial + (tile * num_steps + step) * C
            first += tl.load(at, mask=live, other=0.0)
            if C == 2:
                second += tl.load(at + 1, mask=live, other=0.0)
        if bias is not None:
            first += tl.load(bias).to(tl.float32)
            if C == 2:
                second += tl.load(bias + 1).to(tl.float32)
        # two labels: the softmax is the sigmoid of the difference
        z = first
        if C == 2:
            z = tl.where(positive == 1, second - first, first - second)
        e = tl.exp(-tl.abs(z))
        p = tl.where(z >= 0, 1.0 / (1.0 + e), e / (1.0 + e))
        tl.store(prob + step, p, mask=live)
        wrong = live & ((p >= tau) == 0)  # NaN >= tau is false: an error
        error_at = tl.minimum(error_at, tl.where(wrong, step - start, end - start))
        lowest = tl.minimum(lowest, tl.where(live, p, float("inf")))
        total += tl.where(live, p, 0.0)
        product *= tl.where(live, p, 1.0)
        nans += (live & (p != p)).to(tl.int32)
        final += tl.sum(tl.where(step == end - 1, p, 0.0), 0)
    some = end > start
    invalid = tl.sum(nans, 0) > 0
    tl.store(first_error + r, tl.min(error_at, 0))
    tl.store(low + r, tl.where(invalid, float("nan"), tl.where(some, tl.min(lowest, 0), 0.0)))
    tl.store(mean + r, tl.where(some, tl.sum(total, 0) / tl.maximum(end - start, 1).to(tl.float32), 0.0))
    tl.store(prod + r, tl.where(some, tl.reduce(product, 0, _product), 0.0))
    tl.store(last + r, final)


def step_pool(
    hidden: torch.Tensor,
    step_end: torch.Tensor,
    cu_steps: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    hidden_weight: torch.Tensor | None,
    hidden_bias: torch.Tensor | None,
    positive: int,
    tau: float,
) -> tuple[torch.Tensor, ...]:
    """(prob (S,), first_error (R,) int64, min, mean, prod, last (R,)) in float32; arguments as the custom op's."""
    device, num_steps, num_rollouts = hidden.device, step_end.numel(), cu_steps.numel() - 1
    if hidden.stride(1) != 1:  # the boundary rows alone are copied, never all of hidden
        hidden, step_end = hidden.index_select(0, step_end), torch.arange(num_steps, device=device)
    step_end, cu_steps, weight = step_end.contiguous(), cu_steps.contiguous(), weight.contiguous()
    bias, hidden_bias = (None if x is None else x.contiguous() for x in (bias, hidden_bias))
    classes = weight.shape[0]
    if hidden_weight is None:
        partial = torch.empty(1, num_steps, classes, dtype=torch.float32, device=device)
        if num_steps:
            _linear_score_kernel[(num_steps,)](
                hidden, step_end, weight, partial, hidden.shape[1], hidden.stride(0), weight.stride(0),
                C=classes, BLOCK=BLOCK_LINEAR, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    else:
        partial = _mlp_scores(hidden, step_end, weight, hidden_weight.contiguous(), hidden_bias)
    prob = torch.empty(num_steps, dtype=torch.float32, device=device)
    first_error = torch.empty(num_rollouts, dtype=torch.int64, device=device)
    pools = [torch.empty(num_rollouts, dtype=torch.float32, device=device) for _ in range(4)]
    if num_rollouts:
        _verdict_kernel[(num_rollouts,)](
            partial, bias, cu_steps, prob, first_error, *pools, num_steps, partial.shape[0], tau, positive,
            C=classes, BLOCK=BLOCK_STEPS, num_warps=1, enable_fp_fusion=True,
        )  # fmt: skip
    return prob, first_error, *pools


def _mlp_scores(hidden, step_end, weight, hidden_weight, hidden_bias) -> torch.Tensor:
    """Partial logits (tiles of M, S, C) of the MLP head."""
    if hidden.dtype != hidden_weight.dtype:
        raise ValueError(
            f"hidden_weight is {hidden_weight.dtype}, hidden is {hidden.dtype}: the triton backend wants one"
        )
    if hidden.dtype not in MLP_DTYPES:
        wanted = ", ".join(map(str, MLP_DTYPES))
        raise ValueError(f"hidden is {hidden.dtype}: an MLP head of the triton backend wants {wanted}")
    num_steps, (width, dim), classes = step_end.numel(), hidden_weight.shape, weight.shape[0]
    aligned = all(n % 16 == 0 for n in (dim, width, hidden.stride(0)))
    blocks = mlp_blocks(hidden.dtype, num_steps, aligned)
    num_tiles = triton.cdiv(width, blocks["BLOCK_M"])
    partial = torch.empty(num_tiles, num_steps, classes, dtype=torch.float32, device=hidden.device)
    if num_steps:
        _mlp_score_kernel[(triton.cdiv(num_steps, blocks["BLOCK_S"]), num_tiles)](
            hidden, step_end, hidden_weight, hidden_bias, weight, partial, num_steps, dim, width,
            hidden.stride(0), hidden_weight.stride(0), weight.stride(0), C=classes,
            enable_fp_fusion=True, **blocks,
        )  # fmt: skip
    return partial
