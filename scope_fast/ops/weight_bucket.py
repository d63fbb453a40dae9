"""scope_fast::weight_bucket_pack: many tensors in one flat byte buffer with a table, and back.

For weight sync: each rank packs its local shards in the wire dtype, one collective moves the bucket, the receiver
unpacks views. A launch for a hundred tensors and one message, instead of one of each per parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from scope_fast.ops import checks, dispatch

STEM = "weight_bucket"
ALIGNMENT_BYTES = 128  # a GPU's cache line: every tensor starts on a fresh one, and vector loads stay aligned


class Entry(NamedTuple):
    """Where one tensor lies in a bucket, and what it is there."""

    offset_bytes: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def layout(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> tuple[list[Entry], int]:
    """The table of `tensors` in order, and the bucket's size in bytes. Integer tensors keep their dtype."""
    table, end = [], 0
    for tensor in tensors:
        cast = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        entry = Entry(end, tuple(tensor.shape), cast)
        table.append(entry)
        end += -(-entry.size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return table, end


def pack(
    tensors: Sequence[Tensor],
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
    *,
    backend: str | None = None,
    check: bool = False,
) -> tuple[Tensor, list[Entry]]:
    """Copy `tensors` (any shapes, strides and dtypes, one device) into one uint8 buffer; returns (buffer, table).

    dtype: what floating tensors are cast to; None keeps each one's. out: a contiguous uint8 buffer to write into, at
    least as long as the bucket; the returned buffer is its head. Bytes between tensors are zero, so that equal
    tensors make equal buckets. check=True refuses non-finite values (a host sync).

    Raises ValueError for tensors on different devices and for an `out` of another dtype, device or too short.
    """
    device = out.device if out is not None else (tensors[0].device if tensors else torch.device("cpu"))
    for i, tensor in enumerate(tensors):
        if tensor.device != device:
            raise ValueError(f"tensors[{i}] is on {tensor.device}, the bucket on {device}")
        if check and tensor.is_floating_point():
            checks.check_finite(f"tensors[{i}]", tensor)
    table, size_bytes = layout(tensors, dtype)
    if out is None:
        out = torch.empty(size_bytes, dtype=torch.uint8, device=device)
    if out.dtype != torch.uint8 or out.dim() != 1 or not out.is_contiguous() or out.numel() < size_bytes:
        raise ValueError(f"out {checks.shape(out)} {out.dtype}: expected a contiguous uint8 buffer of ({size_bytes},)")
    buffer = out[:size_bytes]
    if tensors:
        with torch.no_grad():
            weight_bucket_pack_op(list(tensors), buffer, dtype, backend or dispatch.AUTO)
    return buffer, table


def unpack(buffer: Tensor, table: Sequence[Entry]) -> list[Tensor]:
    """The tensors of a bucket, as views of `buffer` (uint8): no copy. Entries may also be plain (offset, shape, dtype).

    Raises ValueError when the buffer is not a byte buffer or ends before the table does.
    """
    if buffer.dtype != torch.uint8 or buffer.dim() != 1 or not buffer.is_contiguous():
        raise ValueError(f"buffer {checks.shape(buffer)} {buffer.dtype}: expected a contiguous one of torch.uint8")
    views = []
    for entry in (Entry(*row) for row in table):
        end = entry.offset_bytes + entry.size_bytes
        if end > buffer.numel():
            raise ValueError(f"buffer {checks.shape(buffer)} ends before the tensor {entry.shape}: expected ({end},)")
        views.append(buffer[entry.offset_bytes : end].view(entry.dtype).view(entry.shape))
    return views


@torch.library.custom_op("scope_fast::weight_bucket_pack", mutates_args=("buffer",))
def weight_bucket_pack_op(tensors: list[Tensor], buffer: Tensor, dtype: torch.dtype | None, backend: str) -> None:
    """Fill buffer (layout(tensors, dtype) bytes) with tensors, and the gaps between them with zeros."""
    backend = dispatch.resolve(STEM, backend, buffer.device.type)
    table, size_bytes = layout(tensors, dtype)
    views = unpack(buffer, table)
    starts = [entry.offset_bytes for entry in table[1:]] + [size_bytes]
    with dispatch.body(buffer):
        ends = [entry.offset_bytes + entry.size_bytes for entry in table]
        gaps = [buffer[end:start] for end, start in zip(ends, starts, strict=True) if end < start]
        if gaps:
            torch._foreach_zero_(gaps)  # all of them in one launch
        if backend == "triton":
            from scope_fast.kernels.weight_bucket import copy

            copy(tensors, views)
        elif backend in ("cpu", "cuda"):
            torch.ops.scope_fast_native.weight_bucket_copy(tensors, views)
        else:
            for tensor, view in zip(tensors, views, strict=True):
                view.copy_(tensor)


@weight_bucket_pack_op.register_fake
def _fake(tensors, buffer, dtype, backend):
    return None
