"""What is measured, and how: every variant of a problem on the same tensors, interleaved, so that drift hits all alike.

The figure is the median over rounds, and a ratio is one of two medians of the same rounds (timing.py). Before any
timing the result of each variant with a check is compared with the truth. A variant that cannot run says why in the
record; nothing is left out in silence.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace
from typing import Any

import torch

from bench.timing import FAILURES, ORDER_SEED, failure, interleaved, summary, synchronize, works
from scope_fast.flops import peak_tflops
from scope_fast.ops import dispatch

PREPARE_SHARE = 0.7
PIECE_BYTES = 1 << 30
OURS = "scope_fast"


@dataclass(frozen=True)
class Spec:
    """One problem; plain values, so that a subprocess can build it again.

    shape: (T, D, V) of a head; the other stems say what their three numbers mean. measures: of "time" and "memory".
    """

    stem: str
    case: str
    shape: tuple[int, int, int]
    dtype: str = "float32"
    device: str = "cpu"
    measures: tuple[str, ...] = ("time", "memory")
    peers: bool = False

    @property
    def label(self) -> str:
        return f"{self.stem} {self.case} {'x'.join(map(str, self.shape))} {self.dtype} {self.device}"


@dataclass(frozen=True)
class Formula:
    """How much work one call is, in units of a rate, and the words that say so."""

    amount: float
    unit: str  # "TFLOP/s", "GB/s" or "tokens/s"
    text: str
    model_flops: int | None = None  # of a trainer's step

    def rate(self, seconds: float) -> float:
        return self.amount / seconds / {"TFLOP/s": 1e12, "GB/s": 1e9, "tokens/s": 1.0}[self.unit]


def flops(spec: Spec, multiple: int) -> Formula:
    """Of a head: `multiple` of T*V*D, two for each product that is computed."""
    T, D, V = spec.shape
    return Formula(multiple * T * V * D, "TFLOP/s", f"{multiple}*T*V*D")


@dataclass(frozen=True)
class Variant:
    """One way of doing the work of a Spec.

    prepare: the problem's tensors -> the call to be timed; what the call returns (a tuple of tensors or None) is its
    output, whose bytes do not count as extra memory. check: (problem, output) -> errors against the float64 truth.
    missing: why it cannot run here. work: what differs from the work of the others, for the table.
    """

    name: str
    role: str  # "limit", "ours" or "peer"
    prepare: Callable[[Any], Callable[[], Any]]
    check: Callable[[Any, Any], dict[str, float]] | None = None
    missing: str = ""
    work: str = ""
    pip: str = ""
    compiles: bool = False  # needs a warm-up at the full shape before its memory can be read
    limits: dict[str, float] = field(default_factory=dict)  # an error above its limit means a different result
    formula: Formula | None = None  # where it differs from the case's


class Tensors(SimpleNamespace):
    """A problem as plain named tensors, whose truth is computed in the check."""

    def forget_truth(self) -> None:
        """Nothing is kept."""


def copy_call(num_bytes: int, device: str) -> Callable[[], None]:
    """The bandwidth limit: num_bytes moved, half of them read and half written, in copies of PIECE_BYTES at most."""
    times = max(1, round(num_bytes / 2 / PIECE_BYTES))
    source = torch.ones(num_bytes // 2 // times, dtype=torch.uint8, device=device)
    destination = torch.zeros_like(source)

    def run() -> None:
        for _ in range(times):
            destination.copy_(source)

    return run


def copy_limit(num_bytes: int, device: str, formula: Formula | None = None) -> Variant:
    """The variant "copy": as many bytes as the call must move. formula: of its throughput, where not the spec's."""
    return Variant("copy", "limit", lambda p: copy_call(num_bytes, device), work="as many bytes", formula=formula)


def available_backends(stem: str, device: str) -> tuple[list[str], dict[str, str]]:
    """Backends worth timing on this device, and the reasons of the others."""
    usable, missing = [], {}
    for backend in dispatch.BACKENDS:
        if reason := dispatch.missing_for(stem, backend, device):
            missing[backend] = reason
        elif (serves := dispatch.resolve(stem, backend, device)) != backend:
            missing[backend] = f"served by {serves}: {stem} has no C++ kernel"
        elif backend == "triton" and device == "cpu":
            missing[backend] = "interpreted on CPU tensors: for correctness, not for timing"
        else:
            usable.append(backend)
    return usable, missing


def ours(
    stem: str, device: str, make: Callable[[str], list[Variant]], reference: bool = True, chosen: bool = False
) -> list[Variant]:
    """The variants make(backend) of every backend, unavailable ones included with their reason.

    reference=False leaves the plain PyTorch backend out where another one runs; chosen=True leaves all out but the one
    that runs where none is named.
    """
    usable, missing = available_backends(stem, device)
    if not reference and len(usable) > 1:
        usable.remove("reference")
    if chosen:
        usable = [dispatch.resolve(stem, dispatch.AUTO, device)]
    variants = [variant for backend in usable for variant in make(backend)]
    return variants + [
        Variant(f"{OURS} {backend}", "ours", prepare=lambda problem: None, missing=reason)
        for backend, reason in missing.items()
    ]


def try_once(variant: Variant, problem: Any, device: str) -> tuple[Callable[[], Any], dict[str, float]]:
    """The prepared call and its errors against the truth, after the first call (which also compiles and warms up)."""
    run = variant.prepare(problem)
    output = run()
    synchronize(device)
    return run, ({} if variant.check is None else variant.check(problem, output))


def agrees(errors: dict[str, float], limits: dict[str, float]) -> bool:
    """Every error within its limit; NaN is not."""
    return all(errors[name] <= limit for name, limit in limits.items() if name in errors)


def measure(
    spec: Spec, stem_module: Any, *, repeats: int, budget_s: float | None = None, memory: bool = True
) -> dict[str, Any]:
    """The record of one Spec. The first limit among the variants, or else the first, is the baseline of all ratios.

    budget_s: a target, not a bound. Peers not reached within PREPARE_SHARE of it are left out, saying so; rounds
    stop at its end, or after the rest of it where the preparation took longer.
    """
    started = time.monotonic()
    variants = stem_module.variants(spec)
    rows = {v.name: {"name": v.name, "role": v.role, "work": v.work, "pip": v.pip} for v in variants}
    for variant in variants:
        if variant.missing:
            rows[variant.name]["unavailable"] = variant.missing
    present = [v for v in variants if not v.missing]
    here = "time" in spec.measures or "error" in spec.measures or spec.device == "cuda"
    if here:
        until = None if budget_s is None else started + PREPARE_SHARE * budget_s
        runs = prepare_all(spec, stem_module.make_problem(spec), present, rows, until)
    else:
        runs = {v.name: None for v in present}  # each is built in a process of its own
    if "time" in spec.measures:
        # a peer that was compiling when its time was over takes none of the rounds'
        left = None
        if budget_s is not None:
            left = max((1 - PREPARE_SHARE) * budget_s, started + budget_s - time.monotonic())
        time_rows(spec, stem_module.formula(spec), variants, rows, runs, repeats, left)
    if memory and "memory" in spec.measures:
        memory_rows(spec, variants, rows, runs)
    return asdict(spec) | {
        "formula": asdict(stem_module.formula(spec)), "order_seed": ORDER_SEED, "variants": list(rows.values())
    }  # fmt: skip


def prepare_all(
    spec: Spec, problem: Any, variants: list[Variant], rows: dict[str, dict], until: float | None
) -> dict[str, Callable[[], Any]]:
    """The calls of the variants that work, in the variants' order, and their errors or failures into the rows.

    What compiles for long comes last, and what is not ours or a limit not at all once `until` (monotonic) has passed.
    """
    runs: dict[str, Callable[[], Any]] = {}
    for variant in sorted(variants, key=lambda v: v.compiles):
        row = rows[variant.name]
        if until is not None and variant.role == "peer" and time.monotonic() > until:
            row["unavailable"] = "not reached in the time given"
            continue
        try:
            runs[variant.name], row["errors"] = try_once(variant, problem, spec.device)
        except FAILURES as error:
            row["failed"] = failure(error)
            continue
        if row["errors"]:
            row["agrees"] = agrees(row["errors"], variant.limits)
        release(spec.device)
    problem.forget_truth()
    return {variant.name: runs[variant.name] for variant in variants if variant.name in runs}


def time_rows(
    spec: Spec, formula: Formula, variants: list[Variant], rows: dict[str, dict], runs: dict, repeats: int, budget_s
) -> None:
    """Fill samples, their summary and the rate into the rows of the variants that ran."""
    failed: dict[str, str] = {}
    samples = interleaved(runs, spec.device, repeats, budget_s, failed)
    for name, reason in failed.items():
        rows[name]["failed"] = reason
    ran = sorted((v for v in variants if v.name in samples), key=lambda v: v.role != "limit")
    baseline = ran[0].name if ran else None
    for variant in variants:
        if variant.name not in samples:
            continue
        row, taken = rows[variant.name], samples[variant.name]
        row |= {"samples_s": taken} | summary(taken, samples[baseline])
        amount = variant.formula or formula
        row |= {"rate": amount.rate(row["median_s"]), "rate_unit": amount.unit, "rate_formula": amount.text}
        if amount.model_flops:
            row["model_tflops"] = amount.model_flops / row["median_s"] / 1e12
            if peak := peak_tflops(torch.device(spec.device), getattr(torch, spec.dtype)):
                row["mfu"] = row["model_tflops"] / peak
        row["baseline"] = baseline


def memory_rows(spec: Spec, variants: list[Variant], rows: dict[str, dict], runs: dict) -> None:
    """Fill the peak extra memory into the rows of our variants and of the peers that ran."""
    from bench import memory

    if not works(spec.device):
        return
    for variant in variants:
        if variant.role == "limit" or variant.name not in runs or "failed" in rows[variant.name]:
            continue
        try:
            rows[variant.name]["extra_bytes"] = memory.extra_bytes(spec, variant, runs[variant.name])
        except FAILURES as error:
            rows[variant.name]["memory_failed"] = failure(error)
        release(spec.device)


def release(device: str) -> None:
    gc.collect()
    if device == "cuda" and works(device):
        torch.cuda.empty_cache()
