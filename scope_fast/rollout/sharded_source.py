"""An FSDP2 model as a stream of full tensors: bucket by bucket, one all-gather each, instead of one per parameter.

    every rank                                       out of it
    pack its LOCAL shards, cast to the wire dtype    one byte buffer a rank            (weight_bucket)
    all-gather the buffers of the shard group        every rank's shards, one message
    concatenate each parameter's parts               full tensors, under all of their names

A pass moves 2 bytes a parameter for a bfloat16 engine where float32 masters gathered one by one move 4, and a bucket's
worth of parameters share one launch. In flight are at most 2 * bucket_bytes: the gathered bucket, and the tensors made
of it (more only for a tensor that is larger than a bucket).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard

from scope_fast.ops import weight_bucket
from scope_fast.rollout.base import ParamMeta


class ShardedSource:
    """`WeightSource` over a module whose parameters are DTensors, split along their first dimension.

    dtype: what floating parameters travel in; None: their own. bucket_bytes: of full tensors, gathered at once.
    reuse_memory: a tensor is valid only until the next one is asked for: every bucket lies where the last one lay.
        Fresh pages would cost as much as the copy. For readers that copy each tensor at once; vLLM's do not.
    A pass is a collective: every rank of the shard group reads it to its end. With replicas (HSDP) each group reads on
    its own. Raises ValueError for a parameter that is sharded in another way, RuntimeError naming rank and bucket when
    a gather fails or runs into the process group's timeout.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        dtype: torch.dtype | None = None,
        bucket_bytes: int = 64 << 20,
        reuse_memory: bool = False,
    ) -> None:
        self._dtype, self._bucket_bytes, self._reuse_memory = dtype, bucket_bytes, reuse_memory
        self._memory: dict[str, torch.Tensor] = {}  # by what lies in it
        self._names: dict[torch.Tensor, list[str]] = {}  # a tied parameter is gathered once, and comes under all names
        for name, parameter in module.named_parameters(remove_duplicate=False):
            _check_placement(name, parameter)
            self._names.setdefault(parameter, []).append(name)

    def metadata(self) -> list[ParamMeta]:
        return [
            ParamMeta(name, wire_dtype(parameter, self._dtype), tuple(parameter.shape))
            for parameter, names in self._names.items()
            for name in names
        ]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for number, bucket in enumerate(self._buckets()):
            try:
                tensors = self._gather_bucket([parameter.detach() for parameter in bucket])
            except RuntimeError as error:  # of gloo and NCCL alike; they know neither the rank nor the phase
                where = f"rank {dist.get_rank()}, gather of bucket {number}"
                raise RuntimeError(f"weight sync: {where}: {error}") from error
            for parameter, tensor in zip(bucket, tensors, strict=True):
                for name in self._names[parameter]:
                    yield name, tensor

    def _buckets(self) -> Iterator[list[torch.Tensor]]:
        """Parameters in order, cut where their full tensors would exceed bucket_bytes."""
        held, used = [], 0
        for parameter in self._names:
            size = parameter.numel() * wire_dtype(parameter, self._dtype).itemsize
            if held and used + size > self._bucket_bytes:
                yield held
                held, used = [], 0
            held.append(parameter)
            used += size
        if held:
            yield held

    def _gather_bucket(self, parameters: list[torch.Tensor]) -> list[torch.Tensor]:
        """Full tensors of DTensors that share a shard group, with one all-gather; plain tensors as they are, cast."""
        sharded = [p for p in parameters if isinstance(p, DTensor)]
        full = iter(self._gather(sharded) if sharded else ())
        return [next(full) if isinstance(p, DTensor) else p.to(wire_dtype(p, self._dtype)) for p in parameters]

    def _gather(self, parameters: list[DTensor]) -> list[torch.Tensor]:
        mesh = parameters[0].device_mesh
        shard_dim = mesh.ndim - 1
        group, ranks = mesh.get_group(shard_dim), mesh.size(shard_dim)
        locals_ = [p.to_local() for p in parameters]
        table, num_bytes = weight_bucket.layout(parameters, self._dtype)  # of the full tensors
        full = self._bytes("full", num_bytes, locals_[0].device, keep=self._reuse_memory)
        if ranks == 1:
            weight_bucket.pack(locals_, self._dtype, out=full)
            return weight_bucket.unpack(full, table)
        # the parts of rank 0 are the largest, so its bucket is: every rank knows every rank's table without being told
        tables = [weight_bucket.layout(_parts(parameters, ranks, r), self._dtype) for r in range(ranks)]
        slots = self._bytes("slots", ranks * tables[0][1], locals_[0].device, keep=True).view(ranks, -1)
        mine = slots[mesh.get_local_rank(shard_dim)]  # packed where it will lie: only the others' parts are moved
        weight_bucket.pack(locals_, self._dtype, out=mine)
        _all_gather(slots, mine, group)
        parts = [weight_bucket.unpack(slots[r], table) for r, (table, _) in enumerate(tables)]
        tensors = weight_bucket.unpack(full, table)
        for tensor, pieces in zip(tensors, zip(*parts, strict=True), strict=True):
            torch.cat(pieces, out=tensor)
        return tensors

    def _bytes(self, what: str, count: int, device: torch.device, keep: bool) -> torch.Tensor:
        """(count,) uint8 of memory; keep: the same memory again, where there is enough of it."""
        if not keep:
            return torch.empty(count, dtype=torch.uint8, device=device)
        if what not in self._memory or self._memory[what].numel() < count:
            self._memory[what] = torch.empty(count, dtype=torch.uint8, device=device)
        return self._memory[what][:count]


def _all_gather(slots: torch.Tensor, mine: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Every rank's slot on every rank; `mine` is this rank's, in its place.

    gloo's own all-gather takes three times as long as a broadcast from every rank (bench/NOTES.md).
    """
    if slots.device.type != "cpu":
        dist.all_gather_into_tensor(slots.view(-1), mine, group=group)
        return
    sent = [dist.broadcast(slot, group=group, group_src=r, async_op=True) for r, slot in enumerate(slots)]
    for work in sent:
        work.wait()


def _parts(parameters: list[DTensor], ranks: int, rank: int) -> list[torch.Tensor]:
    """Stand-ins without data for what `rank` holds: FSDP2 gives every rank ceil(rows / ranks) rows while there are."""
    parts = []
    for p in parameters:
        rows = -(-p.shape[0] // ranks)
        own = min(rows, max(0, p.shape[0] - rank * rows))
        parts.append(torch.empty((own, *p.shape[1:]), dtype=p.dtype, device="meta"))
    return parts


def wire_dtype(parameter: torch.Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """What a parameter travels in where floating ones travel in `dtype`; None: each in its own."""
    return dtype if dtype is not None and parameter.is_floating_point() else parameter.dtype


def _check_placement(name: str, parameter: torch.Tensor) -> None:
    if not isinstance(parameter, DTensor):
        return
    *outer, inner = parameter.placements
    if inner != Shard(0) or any(placement != Replicate() for placement in outer):
        raise ValueError(f"weights: {name} is placed as {parameter.placements}: expected Shard(0) on the last mesh dim")
