"""Where and with what a record was made."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path

import torch

from scope_fast import native
from scope_fast.environment import device_name, versions

PEERS = ("liger-kernel", "nvidia-cutlass-dsl", "cut-cross-entropy", "trl", "verl")  # the DSL: of Liger's CuTe backend

ROOT = Path(__file__).parent.parent


def output_of(*command: str) -> str:
    """What a command prints; "unknown" where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def device_info(device: str) -> dict:
    if device == "cpu":
        return {
            "name": device_name("cpu"),
            "threads": torch.get_num_threads(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "load_average": os.getloadavg()[0],
        }
    fields = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit"
    queried = output_of("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader")
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "processors": properties.multi_processor_count,
        "nvidia_smi": dict(zip(fields.split(","), (x.strip() for x in queried.split(",")), strict=False)),
        "cuda": torch.version.cuda,
        "clocks": "as found, not locked; variants are interleaved instead",
    }


def environment(device: str) -> dict:
    """Device, versions, commit and date: everything a record needs to be read by somebody else."""
    state = output_of("git", "status", "--porcelain", "--", "scope_fast", "kernels", "csrc", "bench")
    commit = os.environ.get("BENCH_COMMIT") or output_of("git", "rev-parse", "HEAD")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "modified": None if state == "unknown" else bool(state),
        "device": {"type": device} | device_info(device),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "triton": None}
        | versions(("triton", *PEERS)),
        "native_extension": not native.missing(),
        "platform": platform.platform(),
    }
