"""What is measured, and how: every variant of a problem on the same tensors, interleaved, so that drift hits all alike.

A round calls each variant once, in an order drawn anew (ORDER_SEED): what stood before a call in every round has moved
bare matmuls by a tenth on an H100. The figure is the median over rounds, and a ratio is one of two medians of the same
rounds. CUDA: events around each call, the L2 cache overwritten before it. CPU: perf_counter, a short call repeated
until a sample lasts MIN_SAMPLE_S. Before any timing the result of each variant with a check is compared with the truth.
A variant that cannot run says why in the record; nothing is left out in silence.
"""

from __future__ import annotations

import gc
import importlib.util
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch

from scope_fast.flops import peak_tflops
from scope_fast.ops import dispatch

if importlib.util.find_spec("triton") is not None:
    from triton.errors import TritonError
else:
    TritonError = RuntimeError

MIN_SAMPLE_S = 0.02  # perf_counter and the scheduler are good to some 10 us: 0.1 % of this
MAX_INNER = 200
MAX_HEAD_START_S, CYCLES_PER_S = 0.02, 2e9
MIN_ROUNDS = 3
ORDER_SEED = 0
PREPARE_SHARE = 0.7
FLUSH_BYTES = 256 << 20  # five times an H100's L2
PIECE_BYTES = 1 << 30
OURS = "scope_fast"

# what a peer or a backend may fail with; recorded by name, never passed over (KeyboardInterrupt and the like pass)
FAILURES = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError,
    subprocess.SubprocessError, TritonError, TypeError, ValueError,
)  # fmt: skip


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


def available_backends(stem: str, device: str) -> tuple[list[str], dict[str, str]]:
    """Backends worth timing on this device, and the reasons of the others."""
    usable, missing = [], {}
    for backend in dispatch.BACKENDS:
        try:
            resolved = dispatch.resolve(stem, backend, device)
        except RuntimeError as error:
            missing[backend] = str(error).split("tensors: ", 1)[-1]
            continue
        if resolved != backend:
            missing[backend] = f"served by {resolved}: {stem} has no C++ kernel"
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


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Clock:
    """Times single calls on one device, in seconds."""

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
            self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]

    def calls_per_sample(self, run: Callable[[], Any]) -> int:
        """On a CPU: as many as make a sample of MIN_SAMPLE_S."""
        start = time.perf_counter()
        run()
        once = time.perf_counter() - start
        return max(1, min(MAX_INNER, round(MIN_SAMPLE_S / max(once, 1e-9))))

    def head_start(self, run: Callable[[], Any]) -> int:
        """On a GPU: cycles it is kept busy before a sample, so that the host has asked for everything by then; else the
        events around a call of a few microseconds would time Python."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        asked_s = time.perf_counter() - start
        torch.cuda.synchronize()
        return int(min(1.5 * asked_s + 5e-5, MAX_HEAD_START_S) * CYCLES_PER_S)

    def sampler(self, run: Callable[[], Any]) -> Callable[[], float]:
        """A call of it is one sample, in seconds of one call of `run`."""
        if self.device == "cuda":
            return partial(self._by_events, run, self.head_start(run))
        return partial(self._by_clock, run, self.calls_per_sample(run))

    def _by_events(self, run: Callable[[], Any], cycles: int) -> float:
        start, end = self.events
        self.flush.zero_()
        torch.cuda._sleep(cycles)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def _by_clock(self, run: Callable[[], Any], calls: int) -> float:
        start_s = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start_s) / calls


def interleaved(
    runs: dict[str, Callable[[], Any]],
    device: str,
    repeats: int,
    budget_s: float | None = None,
    failed: dict[str, str] | None = None,
) -> dict[str, list[float]]:
    """Samples in seconds of each call, round by round; fewer rounds (MIN_ROUNDS at least) when budget_s runs out.

    A call that fails is left out, its reason in `failed`; where the device fails with it, what was sampled is all.
    """
    clock, failed, order = Clock(device), {} if failed is None else failed, random.Random(ORDER_SEED)
    samplers: dict[str, Callable[[], float]] = {}
    samples: dict[str, list[float]] = {name: [] for name in runs}

    def attempt(name: str, what: Callable[[], Any]) -> Any:
        try:
            return what()
        except FAILURES as error:
            failed[name] = failure(error)
            samplers.pop(name, None)
            del samples[name]
            return None

    for name, run in runs.items():
        if (sampler := attempt(name, partial(clock.sampler, run))) is not None:
            samplers[name] = sampler
    for name in list(samplers):  # memory freed since the first calls is taken again, outside the samples
        attempt(name, samplers[name])
    started = time.monotonic()
    for done in range(repeats):
        for name in order.sample(list(samplers), len(samplers)):
            if (seconds := attempt(name, samplers[name])) is not None:
                samples[name].append(seconds)
            elif not works(device):
                return {name: taken for name, taken in samples.items() if taken}
        if budget_s is not None and done + 1 >= MIN_ROUNDS and time.monotonic() - started > budget_s:
            break
    return samples


def works(device: str) -> bool:
    """Whether the device still does after a call has failed: an illegal access leaves a GPU's process useless."""
    try:
        synchronize(device)
    except FAILURES:
        return False
    return True


def summary(samples: list[float], baseline: list[float]) -> dict[str, float]:
    """Median, extremes, relative interquartile spread, and ratios to the baseline's samples of the same rounds."""
    median = statistics.median(samples)
    quartiles = statistics.quantiles(samples, n=4) if len(samples) > 1 else [median] * 3
    return {
        "median_s": median,
        "min_s": min(samples),
        "max_s": max(samples),
        "spread": (quartiles[2] - quartiles[0]) / median,
        "ratio": median / statistics.median(baseline),
        "ratio_of_minima": min(samples) / min(baseline),
    }


def failure(error: BaseException) -> str:
    text = str(error).strip() or "no message"
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}"


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

    budget_s: a wish. Peers not reached within PREPARE_SHARE of it are left out, saying so; rounds stop at its end, or
    after the rest of it where the preparation took longer.
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
