"""What the project promises, held against a record: only at the shapes the promises were made for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from scope_fast.kernels import plan

CPU_SHAPE = [1024, 512, 32000]
CPU_MEMORY_SHAPE = [4096, 512, 64000]
ERROR_SHAPE = [64, 256, 151936]
POOL_SHAPES = {"cpu": [16384, 896, 32000], "cuda": [65536, 3584, 152064]}
BUCKET_SHAPES = {"cpu": [2, 896, 4864], "cuda": [28, 3584, 18944]}
CHUNKED = (
    "torch linear_cross_entropy", "liger chunked GRPO", "liger scaled CE", "liger fused CE", "trl ChunkedLogProb",
    "verl FusedLinearForPPO",
)  # fmt: skip
CROSS_ENTROPIES = ("torch linear_cross_entropy", "liger fused CE")  # not the same loss
GIB = 1 << 30


class Target(NamedTuple):
    text: str
    value: float
    limit: float
    at_most: bool = True

    @property
    def met(self) -> bool:
        return self.value <= self.limit if self.at_most else self.value >= self.limit


Rows = dict[str, dict[str, Any]]


def rows_of(record: dict, stem: str, case: str, dtype: str, shape: list[int] | None = None) -> Rows:
    """The rows of the case that was measured, by variant name; empty when it was not."""
    for found in record["cases"]:
        same = (found["stem"], found["case"], found["dtype"]) == (stem, case, dtype)
        if same and (shape is None or list(found["shape"]) == shape):
            measured = ("median_s", "extra_bytes", "errors")
            return {row["name"]: row for row in found["variants"] if any(key in row for key in measured)}
    return {}


def over(rows: Rows, name: str, other: str, field: str = "median_s") -> float | None:
    """rows[name] / rows[other] of one field; None when either is missing."""
    if field not in rows.get(name, {}) or field not in rows.get(other, {}):
        return None
    return rows[name][field] / rows[other][field]


def fastest(rows: Rows, names: Any) -> str | None:
    timed = [name for name in names if "median_s" in rows.get(name, {}) and rows[name].get("agrees", True)]
    return min(timed, key=lambda name: rows[name]["median_s"], default=None)


def evaluate(record: dict) -> list[Target]:
    """The targets that this record can judge."""
    device = record["environment"]["device"]["type"]
    found = cpu_targets(record) if device == "cpu" else gpu_targets(record)
    return [Target(text, value, *rest) for text, value, *rest in found if value is not None]


def cpu_targets(record: dict) -> Iterator[tuple]:
    yield from cpu_head_targets(record, "float32", "scope_fast cpu", 1.15, 1.1)
    yield from cpu_head_targets(record, "bfloat16", "scope_fast cpu, bf16 logits", 1.3, 1.3)
    for dtype, suffix in (("float32", ""), ("bfloat16", ", bf16 logits"), ("bfloat16", ", fp32 logits")):
        rows = rows_of(record, "linear_scope_loss", "memory", dtype, CPU_MEMORY_SHAPE)
        for peer in ("eager torch", "torch.compile"):
            share = over(rows, f"scope_fast cpu{suffix}", peer, "extra_bytes")
            yield f"T=4096 V=64000 {dtype}{suffix}: extra memory / {peer}'s", share, 1 / 8
    rows = rows_of(record, "linear_logprob", "logprob error", "bfloat16", ERROR_SHAPE)
    ours = rows.get("scope_fast cpu, fp32 logits", {}).get("errors", {})
    yield "logprob error, bf16 inputs, V=151936 D=256", ours.get("logprob"), 1e-4
    for case in ("MLP head", "lm_head"):
        rows = rows_of(record, "step_pool", case, "float32", POOL_SHAPES["cpu"])
        yield f"step_pool {case}: times faster than on every token", over(rows, *pool_pair(rows)), 10, False
    for case in ("same dtype", "cast to bf16"):
        rows = rows_of(record, "weight_bucket", case, "bfloat16", BUCKET_SHAPES["cpu"])
        yield f"weight_bucket {case}: share of the copy bandwidth", over(rows, "copy", "scope_fast cpu"), 0.6, False
    rows = rows_of(record, "weight_sync", "one rank", "bfloat16", BUCKET_SHAPES["cpu"])
    yield "weight_sync one rank: share of the copy bandwidth", over(rows, "copy", "scope_fast cpu"), 0.5, False
    rows = rows_of(record, "weight_sync", "two ranks", "bfloat16", BUCKET_SHAPES["cpu"])
    share = over(rows, "full_tensor", "scope_fast cpu")
    yield "weight_sync two ranks: times faster than a full_tensor per parameter", share, 2, False
    yield from trainer_targets(record, "float32")


def trainer_targets(record: dict, dtype: str) -> Iterator[tuple]:
    rows = rows_of(record, "trl", "compute_loss+backward", dtype)
    for name in ("scope_fast head", "scope_fast loss"):
        ratio = over(rows, "trl GRPOTrainer", name)
        yield f"TRL's compute_loss + backward, {name}: times faster than TRL's own", ratio, 2, False
    for case in ("all groups", "half of the groups equal"):
        ratio = over(rows_of(record, "learner", case, dtype), "trl GRPOTrainer", "scope_fast learner")
        yield f"learner's step, {case}: times the tokens/s of TRL's", ratio, 2, False


def pool_pair(rows: Rows) -> tuple[str, str]:
    return "head on every token", fastest(rows, [name for name in rows if name.startswith("scope_fast")]) or ""


def cpu_head_targets(record: dict, dtype: str, ours: str, matmuls: float, eager: float) -> Iterator[tuple]:
    rows = rows_of(record, "linear_scope_loss", "forward+backward", dtype, CPU_SHAPE)
    yield f"{ours}, {dtype}: time / three matmuls", over(rows, ours, "three matmuls"), matmuls
    yield f"{ours}, {dtype}: times faster than eager torch", over(rows, "eager torch", ours), eager, False
    chunked = fastest(rows, CHUNKED)
    yield f"{ours}, {dtype}: times faster than {chunked}", over(rows, chunked, ours), 1.2, False
    yield f"{ours}, {dtype}: time / torch.compile's", over(rows, ours, "torch.compile"), 1.05
    share = over(rows, ours, "torch.compile", "extra_bytes")
    yield f"{ours}, {dtype}: extra memory / torch.compile's", share, 1 / 8
    rows = rows_of(record, "linear_scope_loss", "variations", dtype, CPU_SHAPE)
    half = ours.replace("scope_fast cpu", "scope_fast cpu, half")
    yield f"{ours}, {dtype}: half of the rows zero-gradient / all", over(rows, half, ours), 0.6


def gpu_targets(record: dict) -> Iterator[tuple]:
    for case in record["cases"]:
        if case["stem"] == "linear_scope_loss":
            yield from gpu_head_targets(record, case)
    for shape in {tuple(c["shape"]) for c in record["cases"] if c["stem"] == "linear_logprob" and c["shape"][1] > 3000}:
        rows = rows_of(record, "linear_logprob", "forward", "bfloat16", list(shape))
        for logits, limit in (("bf16", 1.1), ("fp32", 1.2)):
            name = f"scope_fast triton, {logits} logits"
            yield f"linear_logprob forward {shape}, {logits} logits / one matmul", over(rows, name, "one matmul"), limit
    rows = rows_of(record, "linear_logprob", "logprob error", "bfloat16", ERROR_SHAPE)
    error = rows.get("scope_fast triton, fp32 logits", {}).get("errors", {}).get("logprob")
    yield "logprob error, bf16 inputs, V=151936 D=256", error, 1e-4
    for case in ("MLP head", "lm_head"):
        rows = rows_of(record, "step_pool", case, "bfloat16", POOL_SHAPES["cuda"])
        yield f"step_pool {case}: times faster than on every token", over(rows, *pool_pair(rows)), 20, False
    for case in ("same dtype", "cast to bf16"):
        rows = rows_of(record, "weight_bucket", case, "bfloat16", BUCKET_SHAPES["cuda"])
        ours = next((name for name in ("scope_fast cuda", "scope_fast triton") if "median_s" in rows.get(name, {})), "")
        yield f"weight_bucket {case}: share of the copy bandwidth", over(rows, "copy", ours), 0.8, False


def roofline_s(rows: Rows, shape: list[int], logits_bytes: int, accumulates: bool = True) -> float | None:
    """Three matmuls, a pass over the logits (read, bf16 dlogits written), and dW: written as bf16, after it was written
    and read as float32 where it is summed over chunks."""
    if "median_s" not in rows.get("three matmuls", {}) or "rate" not in rows.get("copy", {}):
        return None
    T, D, V = shape
    moved = T * V * (logits_bytes + 2) + V * D * (2 + 8 * accumulates)
    return rows["three matmuls"]["median_s"] + moved / (rows["copy"]["rate"] * 1e9)


def in_chunks(device: dict, shape: list[int], logits_bytes: int) -> bool:
    """Whether the default plan cuts the rows, so that dW is summed in float32."""
    rows = plan.rows_at_a_time(*shape, logits_bytes, 2, device["processors"], device["memory_bytes"])[0]
    return rows < shape[0]


def beyond_dweight(row: dict | None, shape: list[int]) -> float | None:
    """GiB of extra memory, less those of a float32 dW, held or not: what one chunk saves there it may use elsewhere."""
    if not row or "extra_bytes" not in row:
        return None
    return (row["extra_bytes"] - shape[1] * shape[2] * 4) / GIB


def gpu_head_targets(record: dict, case: dict) -> Iterator[tuple]:
    shape, name = case["shape"], f"linear_scope_loss {case['shape']}"
    rows = rows_of(record, "linear_scope_loss", case["case"], "bfloat16", shape)
    device = record["environment"]["device"]
    for logits, logits_bytes in (("fp32", 4), ("bf16", 2)):
        backend = "cuda" if f"scope_fast cuda, {logits} logits" in rows else "triton"  # what is chosen
        ours = f"scope_fast {backend}, {logits} logits"
        if case["case"] == "variations":
            half, frozen = (f"scope_fast {backend}, {v}, {logits} logits" for v in ("half", "frozen head"))
            yield f"{name} {logits} logits: half of the rows zero-gradient / all", over(rows, half, ours), 0.6
            yield f"{name} {logits} logits: frozen head / trained", over(rows, frozen, ours), 0.75
            small = next((r for r in rows if ", chunk " in r and r.endswith(f"{logits} logits")), "")
            yield f"{name} {small}: GiB beyond a float32 dW", beyond_dweight(rows.get(small), shape), 0.5
            continue
        accumulates = in_chunks(device, shape, logits_bytes)
        roofline = roofline_s(rows, shape, logits_bytes, accumulates)
        share = roofline and "median_s" in rows.get(ours, {}) and roofline / rows[ours]["median_s"]
        yield f"{name} {logits} logits: share of its roofline", share or None, 0.9, False
        others = [r for r, row in rows.items() if row["role"] == "peer" and r not in CROSS_ENTROPIES]
        rival = fastest(rows, others)
        yield f"{name} {logits} logits: times faster than {rival}", over(rows, rival, ours), 1.2, False
        yield f"{name} {logits} logits: GiB beyond a float32 dW", beyond_dweight(rows.get(ours), shape), 1.0
        if logits == "bf16" and shape[0] == 8192:
            yield f"{name} bf16 logits / three matmuls", over(rows, ours, "three matmuls"), 1.15
