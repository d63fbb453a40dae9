"""weight_bucket: copy and cast many tensors into views of one buffer, one launch per pair of dtypes.

A table of addresses travels to the device once (24 bytes a tensor); each program finds its tensor by bisection of the
first blocks and copies BLOCK elements. Reads and writes every byte once.
"""

import torch
import triton
import triton.language as tl

from .compat import cast

BLOCK = 8192
NAMED = {  # what Triton copies; it casts between those that are no integers
    torch.float64: tl.float64, torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16,
    torch.int8: tl.int8, torch.int16: tl.int16, torch.int32: tl.int32, torch.int64: tl.int64,
}  # fmt: skip
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def _copy_kernel(
    table, num_tensors, source_type: tl.constexpr, target_type: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):
    """table (4, num_tensors) int64: source address, target address, elements, first block."""
    block = tl.program_id(0).to(tl.int64)
    low = block * 0
    high = low + num_tensors
    while high - low > 1:  # the last tensor whose first block is not beyond this one
        middle = (low + high) // 2
        before = tl.load(table + 3 * num_tensors + middle) <= block
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    source = tl.load(table + low).to(tl.pointer_type(source_type))
    target = tl.load(table + num_tensors + low).to(tl.pointer_type(target_type))
    if ALIGNED:
        source, target = tl.multiple_of(source, 16), tl.multiple_of(target, 16)
    first = (block - tl.load(table + 3 * num_tensors + low)) * BLOCK
    size = tl.load(table + 2 * num_tensors + low) - first
    at = tl.arange(0, BLOCK)
    source, target = source + first, target + first
    if size >= BLOCK:  # without a mask the loads and stores are 16 bytes wide
        tl.store(target + at, cast(tl.load(source + at), target_type))
    else:
        tl.store(target + at, cast(tl.load(source + at, mask=at < size), target_type), mask=at < size)


def copy(sources: list[torch.Tensor], targets: list[torch.Tensor]) -> None:
    """targets[i] (contiguous, of sources[i]'s shape) = sources[i], cast; all on one device."""
    groups: dict[tuple[torch.dtype, torch.dtype, bool], list[tuple[torch.Tensor, torch.Tensor]]] = {}
    for source, target in zip(sources, targets, strict=True):
        if source.dtype == target.dtype and source.dtype not in NAMED:  # moved as words
            source, target = (x.contiguous().view(-1).view(WORDS[min(8, x.dtype.itemsize)]) for x in (source, target))
        elif not {source.dtype, target.dtype} <= NAMED.keys():
            target.copy_(source)  # a cast that Triton does not have
            continue
        if target.numel():
            source = source.contiguous()
            # a bucket may start in the middle of somebody's buffer
            group = (source.dtype, target.dtype, (source.data_ptr() | target.data_ptr()) % 16 == 0)
            groups.setdefault(group, []).append((source, target))
    for (source_dtype, target_dtype, aligned), pairs in groups.items():
        rows, num_blocks = [], 0
        for source, target in pairs:
            rows.append((source.data_ptr(), target.data_ptr(), target.numel(), num_blocks))
            num_blocks += triton.cdiv(target.numel(), BLOCK)
        table = torch.tensor(rows, dtype=torch.int64).T.contiguous()
        if targets[0].is_cuda:
            table = table.pin_memory().to(targets[0].device, non_blocking=True)
        _copy_kernel[(num_blocks,)](
            table, len(pairs), NAMED[source_dtype], NAMED[target_dtype], ALIGNED=aligned,
            BLOCK=BLOCK, num_warps=8, enable_fp_fusion=True,
        )  # fmt: skip
