"""weight_bucket.pack: a model's tensors into flat buckets, against a plain copy of as many bytes.

    bytes: what is read plus what is written

shape: (L, D, M): L transformer layers of Qwen2's shapes with hidden size D and intermediate size M. The default on a
CPU fills 64 MiB in the wire dtype; on a GPU it is the parameter list of Qwen2.5-7B in buckets of 256 MiB.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench import harness
from bench.harness import OURS, Formula, Spec, Tensors, Variant
from scope_fast import weight_bucket

STEM = "weight_bucket"
KV_SHARE = 7  # query heads per key-value head
VOCAB_SIZE = 152064
BUCKET_BYTES = {"cpu": 64 << 20, "cuda": 256 << 20}
CASES = {"same dtype": lambda dtype: dtype, "cast to bf16": lambda dtype: "float32"}  # the parameters' dtype


def specs(device: str, shape: tuple[int, int, int] | None, dtypes: tuple[str, ...] | None, peers: bool) -> list[Spec]:
    size = shape or ((2, 896, 4864) if device == "cpu" else (28, 3584, 18944))
    return [Spec(STEM, case, size, "bfloat16", device, ("time",), peers) for case in CASES]


def shapes(spec: Spec) -> list[tuple[int, ...]]:
    """The parameters of L layers in order, with their biases and norms; on a GPU with embedding, head and last norm."""
    L, D, M = spec.shape
    kv = max(D // KV_SHARE, 1)
    layer = [(D, D), (D,), (kv, D), (kv,), (kv, D), (kv,), (D, D), (M, D), (M, D), (D, M), (D,), (D,)]
    ends = [(VOCAB_SIZE, D), (VOCAB_SIZE, D), (D,)] if spec.device == "cuda" and L >= 28 else []
    return layer * L + ends


def make_problem(spec: Spec, exact: bool = True) -> Tensors:
    """buckets: lists of tensors, each list packed into `out` in the dtype `wire`."""
    r = torch.Generator(spec.device).manual_seed(0)
    source = getattr(torch, CASES[spec.case](spec.dtype))
    wire = getattr(torch, spec.dtype)
    tensors = [torch.empty(s, dtype=source, device=spec.device).uniform_(generator=r) for s in shapes(spec)]
    buckets: list[list[torch.Tensor]] = [[]]
    room = BUCKET_BYTES[spec.device]
    for tensor in tensors:
        size = tensor.numel() * wire.itemsize
        if size > room and buckets[-1]:
            buckets.append([])
            room = BUCKET_BYTES[spec.device]
        buckets[-1].append(tensor)
        room -= size
    largest = max(weight_bucket.layout(bucket, wire)[1] for bucket in buckets)
    out = torch.zeros(largest, dtype=torch.uint8, device=spec.device)
    return Tensors(spec=spec, buckets=buckets, out=out, wire=wire)


def formula(spec: Spec) -> Formula:
    count = sum(torch.Size(s).numel() for s in shapes(spec))
    read, written = getattr(torch, CASES[spec.case](spec.dtype)).itemsize, getattr(torch, spec.dtype).itemsize
    return Formula(count * (read + written), "GB/s", f"{read} bytes read + {written} written per parameter")


Pack = Callable[[list[torch.Tensor]], torch.Tensor | None]  # of one bucket, into `out` or into what it returns


def packs(p: Tensors, backend: str) -> Pack:
    def pack(bucket: list[torch.Tensor]) -> None:
        weight_bucket.pack(bucket, p.wire, p.out, backend=backend)

    return pack


def copies(p: Tensors) -> Pack:
    """What a sync without buckets starts from: one copy_ per parameter."""
    tables = {id(bucket): weight_bucket.layout(bucket, p.wire)[0] for bucket in p.buckets}

    def pack(bucket: list[torch.Tensor]) -> None:
        for view, tensor in zip(weight_bucket.unpack(p.out, tables[id(bucket)]), bucket, strict=True):
            view.copy_(tensor)

    return pack


def flat_cat(p: Tensors) -> Pack:
    """torch.cat of the flattened, cast tensors of each bucket."""
    return lambda bucket: torch.cat([x.to(p.wire).view(-1) for x in bucket])


def every_bucket(p: Tensors, pack: Pack) -> Callable[[], None]:
    def run() -> None:
        for bucket in p.buckets:
            pack(bucket)

    return run


def errors(p: Tensors, pack: Pack) -> dict[str, float]:
    """Parameters whose bytes are not the cast tensor's, each bucket packed over bytes that are nobody's."""
    wrong = 0
    for bucket in p.buckets:
        p.out.fill_(255)
        flat = pack(bucket)
        if flat is None:
            views = weight_bucket.unpack(p.out, weight_bucket.layout(bucket, p.wire)[0])
        else:
            views = flat.split([x.numel() for x in bucket])
        wrong += sum(
            not torch.equal(view.view(-1), x.to(p.wire).view(-1)) for view, x in zip(views, bucket, strict=True)
        )
    return {"bytes": float(wrong)}


def variant(name: str, role: str, make: Callable[[Tensors], Pack], work: str = "") -> Variant:
    return Variant(
        name, role, lambda p: every_bucket(p, make(p)), lambda p, _: errors(p, make(p)), work=work,
        limits={"bytes": 0.0},
    )  # fmt: skip


def variants(spec: Spec) -> list[Variant]:
    def ours(backend: str) -> list[Variant]:
        return [variant(f"{OURS} {backend}", "ours", lambda p: packs(p, backend))]

    found = [harness.copy_limit(int(formula(spec).amount), spec.device)]
    found += harness.ours(STEM, spec.device, ours)
    found.append(variant("copy_ per tensor", "peer", copies))
    return [*found, variant("torch.cat", "peer", flat_cat, "allocates the bucket")] if spec.peers else found


def test_weight_bucket(benchmark, prepared):
    benchmark.pedantic(prepared, rounds=5)
