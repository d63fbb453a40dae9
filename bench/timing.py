"""How a call is timed: samples of single calls, interleaved rounds, and the figures made of them.

A round calls each variant once, in an order drawn anew (ORDER_SEED): what stood before a call in every round has moved
bare matmuls by a tenth on an H100. CUDA: events around each call, the L2 cache overwritten before it. CPU:
perf_counter, a short call repeated until a sample lasts MIN_SAMPLE_S.
"""

from __future__ import annotations

import importlib.util
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

if importlib.util.find_spec("triton") is not None:
    from triton.errors import TritonError
else:
    TritonError = RuntimeError

MIN_SAMPLE_S = 0.02  # perf_counter and the scheduler are good to some 10 us: 0.1 % of this
MAX_INNER = 200
MAX_HEAD_START_S, CYCLES_PER_S = 0.02, 2e9
MIN_ROUNDS = 3
ORDER_SEED = 0
FLUSH_BYTES = 256 << 20  # five times an H100's L2

# what a peer or a backend may fail with; recorded by name, never passed over (KeyboardInterrupt and the like pass)
FAILURES = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError,
    subprocess.SubprocessError, TritonError, TypeError, ValueError,
)  # fmt: skip


def failure(error: BaseException) -> str:
    text = str(error).strip() or "no message"
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}"


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
    """Whether the device still works after a call has failed: an illegal access leaves a GPU's process useless."""
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
