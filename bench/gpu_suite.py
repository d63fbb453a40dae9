"""Everything a GPU run needs, in one command under nine minutes: `python -m bench --gpu-suite [--out DIR]`.

Each part is a process of its own, so that one peer's illegal memory access or full memory costs that part alone; its
limits (matmuls, copy) are measured in that same process, in the same rounds. A part writes its record after every
case, and is stopped when its time is spent. The parts of a stem are merged into one file, DEVICE-STEM.json.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from bench import report
from bench.environment import ROOT
from bench.timing import FAILURES, failure
from scope_fast import TokenStreams, scope_loss

TOTAL_S = 530  # of the 540 promised
GRACE_S = 25  # start-up, tables, and the call that is running when the time is spent
QWEN_7B, QWEN_1_5B = "8192,3584,152064", "32768,1536,151936"


class Part(NamedTuple):
    """One process: arguments of `python -m bench`, and seconds per problem it may take."""

    stem: str
    arguments: tuple[str, ...]
    budget_s: int
    problems: int = 1


BOTH, VARIED = ("--case", "forward+backward"), ("--case", "variations")
PARTS = (
    Part("linear_logprob", ("--case", "logprob error"), 15, 1),
    Part("step_pool", (), 12, 2),
    Part("weight_bucket", (), 12, 2),
    Part("scope_loss", (), 12),
    Part("linear_scope_loss", ("--shape", QWEN_7B, *BOTH), 62),
    Part("linear_scope_loss", ("--shape", QWEN_7B, *VARIED), 24),
    Part("linear_logprob", ("--shape", QWEN_7B), 26, 2),
    Part("linear_scope_loss", ("--shape", QWEN_1_5B, *BOTH), 62),
    Part("linear_scope_loss", ("--shape", QWEN_1_5B, *VARIED), 28),
    Part("linear_scope_loss", ("--shape", "8192,4096,131072", *BOTH), 50),
    Part("linear_scope_loss", ("--shape", "8192,4096,131072", *VARIED), 22),
    Part("linear_scope_loss", ("--shape", "2048,3584,152064", *BOTH), 55),  # with 32 half of the peers were not reached
    Part("linear_scope_loss", ("--shape", "2048,3584,152064", *VARIED), 13),
)


def preflight() -> str:
    """Why Triton cannot launch anything (it wants a C compiler and Python's headers at run time); empty if it can."""
    ones = torch.ones(8, device="cuda")
    streams = TokenStreams(ones.long(), ones.to(torch.uint8), ones, advantage=ones)
    try:
        loss, _ = scope_loss(-ones, streams, backend="triton")
        return "" if loss.isfinite() else f"scope_loss gave {loss.item()}"
    except FAILURES as error:
        return failure(error)


def run_part(part: Part, path: Path, seconds: float) -> str:
    """Run one part within `seconds`; what went wrong, or an empty string."""
    command = [sys.executable, "-m", "bench", part.stem, *part.arguments, "--device", "cuda", "--peers"]
    command += ["--repeats", "15", "--budget", str(part.budget_s), "--json", str(path)]
    # one variant's freed memory must be reusable by the next without a cudaMalloc inside a sample
    env = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    try:
        done = subprocess.run(command, cwd=ROOT, env=env, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"stopped after {seconds:.0f} s"
    return f"exit code {done.returncode}" if done.returncode else ""


def run_parts(folder: Path, parts: tuple[Part, ...] = PARTS) -> tuple[dict[str, dict], list[str]]:
    """Records by stem, and the parts that went wrong."""
    deadline = time.monotonic() + TOTAL_S
    records: dict[str, dict] = {}
    problems = []
    for i, part in enumerate(parts):
        left = deadline - time.monotonic()
        what = f"{part.stem} {' '.join(part.arguments)}".strip()
        if left < GRACE_S:
            problems.append(f"{what}: not started, {left:.0f} s left")
            continue
        path = folder / f"{i}.json"
        print(f"--- {what} ({left:.0f} s left)", flush=True)
        if wrong := run_part(part, path, min(left, part.problems * part.budget_s + GRACE_S)):
            problems.append(f"{what}: {wrong}")
        if path.exists():
            merge(records, part.stem, json.loads(path.read_text()))
    return records, problems


def merge(records: dict[str, dict], stem: str, record: dict) -> None:
    """Add a part's cases to its stem's record, each with its part's environment; the first's stands at the head."""
    cases = [case | {"environment": record["environment"]} for case in record["cases"]]
    records.setdefault(stem, record | {"cases": []})["cases"] += cases


def main(out: Path | None = None) -> int:
    out = out or ROOT / "bench" / "results"
    out.mkdir(parents=True, exist_ok=True)
    if wrong := preflight():
        print(f"no kernel runs here: {wrong}", file=sys.stderr)
        return 1
    slug = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()).strip("-")
    with tempfile.TemporaryDirectory() as folder:
        records, problems = run_parts(Path(folder))
    for stem, record in records.items():
        path = out / f"{slug}-{stem}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"wrote {path}")
        report.print_targets(record)
    for problem in problems:
        print(f"PROBLEM: {problem}", file=sys.stderr)
    return 1 if problems else 0
