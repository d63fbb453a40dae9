"""Peak extra memory of one call: its high-water mark, less what was there before it and less what it returns.

CUDA: the caching allocator's own peak. CPU: the resident set's high-water mark (VmHWM) in a fresh process, reset
(/proc/self/clear_refs) just before the call. Unlike an accounting of torch allocations it also sees what C++ kernels
and the matmul library allocate; glibc is told to give every block above 64 KiB back at once, so that memory freed by
the warm-up cannot be reused unseen. Good to about 2 MiB. The warm-up has few rows, so that lazily created state is
there but nothing of the size of the problem is; a variant that compiles is warmed up at the full shape.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import torch

from bench.environment import ROOT
from bench.harness import Spec, Variant

GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 16), "MALLOC_TRIM_THRESHOLD_": str(1 << 16)}
WARM_ROWS = 8
TIMEOUT_S = 600


def output_bytes(output: Any) -> int:
    """Bytes of the distinct tensors in a call's output."""
    tensors = [x for x in output or () if isinstance(x, torch.Tensor)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def extra_bytes(spec: Spec, variant: Variant, run: Callable[[], Any]) -> int:
    """Peak extra memory of `run` (CUDA) or of the same variant in a process of its own (CPU)."""
    if spec.device == "cuda":
        return cuda_extra_bytes(run)
    command = [sys.executable, "-m", "bench.memory", json.dumps(asdict(spec)), variant.name]
    env = os.environ | GIVE_BACK
    try:
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"not done after {TIMEOUT_S} s") from error
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])["extra_bytes"]


def cuda_extra_bytes(run: Callable[[], Any]) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    output = run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - output_bytes(output)


def resident_bytes(field: str) -> int:
    """VmRSS or VmHWM of this process."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith(field))


def settle() -> None:
    """Give everything that is free back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def resident_peak(run: Callable[[], Any]) -> int:
    """How far the resident set rises above its present size while `run` runs, less what it returns."""
    settle()
    with open("/proc/self/clear_refs", "w") as reset:
        reset.write("5")
    before = resident_bytes("VmRSS")
    output = run()
    return resident_bytes("VmHWM") - before - output_bytes(output)


def cpu_extra_bytes(spec: Spec, name: str) -> int:
    """In a fresh process: warm up, build the problem, reset the high-water mark, call once."""
    stem = importlib.import_module(f"bench.bench_{spec.stem}")
    variant = next(v for v in stem.variants(spec) if v.name == name)
    problem = stem.make_problem(spec, exact=False)
    if variant.compiles:
        variant.prepare(problem)()
    else:
        small = stem.make_problem(replace(spec, shape=(WARM_ROWS, *spec.shape[1:])), exact=False)
        variant.prepare(small)()
        del small
    return resident_peak(variant.prepare(problem))


if __name__ == "__main__":
    fields = json.loads(sys.argv[1])
    described = Spec(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
    print(json.dumps({"extra_bytes": cpu_extra_bytes(described, sys.argv[2])}))
