"""Pack and gather of a weight sync: an FSDP2 model's float32 shards out of `ShardedSource` as full bfloat16 tensors.

    bytes: 4 read + 2 written per parameter, whatever moves between the ranks on the way

case "one rank": against a plain copy of as many bytes. case "two ranks": gloo, this process and one it starts; against
a full_tensor per parameter, which is what a sync without buckets does (and moves 4 bytes a parameter, not 2).
A call of two ranks is a collective: `Pair.run` tells rank 1 which call to make, then it is made here.
shape: (L, D, M) as in bench_weight_bucket: by default 64 MiB in the wire dtype, one bucket.
"""

from __future__ import annotations

import atexit
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from bench import bench_weight_bucket, harness
from bench.harness import OURS, Formula, Spec, Tensors, Variant
from scope_fast.ops import dispatch
from scope_fast.rollout.sharded_source import ShardedSource

STEM = "weight_sync"
WIRE = torch.bfloat16
CASES = ("one rank", "two ranks")
CALLS = ("buckets", "full_tensor")
STOP = -1


def specs(device: str, shape: tuple[int, int, int] | None, dtypes: tuple[str, ...] | None, peers: bool) -> list[Spec]:
    """On CPU only: two ranks of a GPU run need two GPUs and NCCL."""
    if device != "cpu":
        return []
    size, room = shape or (2, 896, 4864), bench_weight_bucket.BUCKET_BYTES[device]
    problem = Spec(STEM, CASES[0], size, "bfloat16", device)
    num_bytes = WIRE.itemsize * sum(torch.Size(s).numel() for s in bench_weight_bucket.shapes(problem))
    if num_bytes > room:  # a second bucket's tensors are handed out in the first's
        raise ValueError(f"--shape: {STEM} takes one bucket of {room >> 20} MiB, these are {num_bytes >> 20} MiB")
    return [Spec(STEM, case, size, "bfloat16", device, ("time",), peers) for case in CASES]


def model(case: str, shape: tuple[int, int, int]) -> torch.nn.Module:
    """This rank's shards, equal on both ranks; "one rank": each holds everything."""
    two = case == "two ranks"
    mesh = init_device_mesh("cpu", (2,) if two else (2, 1))
    placements = [Shard(0)] if two else [Replicate(), Shard(0)]
    r = torch.Generator().manual_seed(0)
    module = torch.nn.Module()
    for i, size in enumerate(bench_weight_bucket.shapes(Spec(STEM, case, shape))):
        full = torch.empty(size).uniform_(generator=r)
        local = full.chunk(2)[dist.get_rank()].clone() if two else full
        sharded = DTensor.from_local(local, mesh, placements, run_check=False, shape=full.shape, stride=full.stride())
        module.register_parameter(f"p{i}", torch.nn.Parameter(sharded))
    return module


def calls(module: torch.nn.Module) -> list[Callable[[], list[torch.Tensor]]]:
    """In the order of CALLS; what a call returns are the full tensors in the wire dtype."""
    source = ShardedSource(module, WIRE, bench_weight_bucket.BUCKET_BYTES["cpu"], reuse_memory=True)
    parameters = [parameter.detach() for parameter in module.parameters()]
    return [
        lambda: [tensor for _, tensor in source],
        lambda: [parameter.full_tensor().to(WIRE) for parameter in parameters],
    ]


class Pair:
    """Rank 0 of two: this process. Rank 1 is a child that follows until it is told to stop."""

    def __init__(self) -> None:
        store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
        command = [sys.executable, "-m", "bench.bench_weight_sync", str(store.port), str(torch.get_num_threads())]
        self.child = subprocess.Popen(command)
        join(store, rank=0)
        atexit.register(self.stop)

    def run(self, call: int) -> None:
        dist.broadcast(torch.tensor([call]), src=0)

    def stop(self) -> None:
        self.run(STOP)
        self.child.wait(60)
        dist.destroy_process_group()


@cache
def pair() -> Pair:
    return Pair()


def join(store: dist.Store, rank: int) -> None:
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=300))


def follow(port: int, num_threads: int) -> None:
    """Rank 1: the model whose case and shape it is told (100 + case, L, D, M), then the calls it is told."""
    torch.set_num_threads(num_threads)
    join(dist.TCPStore("127.0.0.1", port, 2, is_master=False), rank=1)
    known: list[Callable] = []
    order = torch.zeros(1, dtype=torch.int64)
    while True:
        dist.broadcast(order, src=0)
        if int(order) == STOP:
            return dist.destroy_process_group()
        if int(order) >= 100:
            shape = torch.zeros(3, dtype=torch.int64)
            dist.broadcast(shape, src=0)
            known = calls(model(CASES[int(order) - 100], tuple(shape.tolist())))
        else:
            known[int(order)]()


def make_problem(spec: Spec, exact: bool = True) -> Tensors:
    pair().run(100 + CASES.index(spec.case))
    dist.broadcast(torch.tensor(spec.shape), src=0)
    return Tensors(spec=spec, calls=calls(model(spec.case, spec.shape)))


def formula(spec: Spec) -> Formula:
    count = sum(torch.Size(s).numel() for s in bench_weight_bucket.shapes(spec))
    return Formula(count * 6, "GB/s", "4 bytes read + 2 written per parameter")


def both_ranks(p: Tensors, name: str) -> Callable[[], list[torch.Tensor]]:
    number = CALLS.index(name)

    def run() -> list[torch.Tensor]:
        if p.spec.case == "two ranks":  # one rank has nothing to wait for: rank 1 would only take half of the memory
            pair().run(number)
        return p.calls[number]()

    return run


def errors(p: Tensors, output: list[torch.Tensor]) -> dict[str, float]:
    """Tensors that are not the cast parameter's, bit for bit."""
    r = torch.Generator().manual_seed(0)
    truth = [torch.empty(s).uniform_(generator=r).to(WIRE) for s in bench_weight_bucket.shapes(p.spec)]
    return {"bytes": float(sum(not torch.equal(got, t) for got, t in zip(output, truth, strict=True)))}


def variants(spec: Spec) -> list[Variant]:
    checked = {"check": errors, "limits": {"bytes": 0.0}}
    chosen = dispatch.resolve("weight_bucket", dispatch.AUTO, spec.device)
    found = [harness.copy_limit(int(formula(spec).amount), spec.device)]
    found.append(Variant(f"{OURS} {chosen}", "ours", lambda p: both_ranks(p, "buckets"), **checked))
    found += [
        Variant(f"{OURS} {other}", "ours", lambda p: None, missing=f"a sync packs with the device's own: {chosen}")
        for other in dispatch.BACKENDS
        if other != chosen
    ]
    return [*found, Variant("full_tensor", "peer", lambda p: both_ranks(p, "full_tensor"), **checked)]


def test_weight_sync(benchmark, prepared):
    benchmark.pedantic(prepared, rounds=5)


if __name__ == "__main__":
    follow(int(sys.argv[1]), int(sys.argv[2]))
