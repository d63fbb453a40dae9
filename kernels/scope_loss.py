"""scope_loss: one elementwise kernel, a row per lane, and the fold of its block sums.

Reads at most 8 values a row and writes g, and h where there is an entropy: 29 to 37 bytes, bound by memory and, below a
million rows, by launches.
"""

import torch
import triton
import triton.language as tl

from .rows import NUM_METRICS, kernel_streams, max_or_nan, reduce_table, row_terms
from .softmax import require_triton_dtype

BLOCK = 1024


@triton.jit
def _scope_loss_kernel(logprob, entropy, streams, o, g_out, h_out, table, num_rows, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < num_rows
    logp = tl.load(logprob + at, mask=mask, other=0.0).to(tl.float32)
    if entropy is None:
        h_row = tl.zeros_like(logp)
    else:
        h_row = tl.load(entropy + at, mask=mask, other=0.0).to(tl.float32)
    loss_rl, loss_nll, g, h, rows, entropy_rl, old_kl, clipped, gap, ratio = row_terms(
        logp, h_row, at, mask, streams, o
    )
    tl.store(g_out + at, g, mask=mask)
    if h_out is not None:
        tl.store(h_out + at, h, mask=mask)

    columns = tl.num_programs(0)
    column = table + tl.program_id(0)
    tl.store(column, tl.sum(loss_rl, 0))
    tl.store(column + columns, tl.sum(loss_nll, 0))
    tl.store(column + 2 * columns, tl.sum(rows, 0))
    tl.store(column + 3 * columns, tl.sum(entropy_rl, 0))
    tl.store(column + 4 * columns, tl.sum(old_kl, 0))
    tl.store(column + 5 * columns, tl.sum(clipped, 0))
    tl.store(column + 6 * columns, tl.sum(gap, 0))
    tl.store(column + 7 * columns, max_or_nan(ratio))
    tl.store(column + 8 * columns, max_or_nan(gap))


def scope_loss(
    logprob: torch.Tensor, entropy: torch.Tensor | None, rows, options
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(loss, metrics (9,), g (T,), h (T,)) in float32; rows: ops.reference.Rows, options: ops.options.RowOptions.

    Without an entropy h has shape (0,).
    """
    require_triton_dtype("logprob", logprob)
    num_rows, device = logprob.shape[0], logprob.device
    g = torch.empty(num_rows, dtype=torch.float32, device=device)
    h = g.new_empty(0 if entropy is None else num_rows)
    num_blocks = triton.cdiv(num_rows, BLOCK)
    table = torch.empty(NUM_METRICS, num_blocks, dtype=torch.float32, device=device)
    if num_blocks:
        _scope_loss_kernel[(num_blocks,)](
            logprob.contiguous(), None if entropy is None else entropy.contiguous(), kernel_streams(rows),
            options, g, None if entropy is None else h, table, num_rows, BLOCK=BLOCK, num_warps=4,
            enable_fp_fusion=True,
        )  # fmt: skip
    metrics = reduce_table(table)
    return metrics[0] + metrics[1], metrics, g, h
