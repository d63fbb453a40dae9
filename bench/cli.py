"""python -m bench [STEM ...]: measure, print tables, write a record."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from pathlib import Path

import torch

from bench import harness, report
from bench.environment import environment

PARTS = ("linear_scope_loss", "linear_logprob", "scope_loss", "step_pool", "weight_bucket", "weight_sync")
WHOLE = ("learner_heads", "learner", "trl")  # trainers, measured where they are named
STEMS = (*PARTS, *WHOLE)
DTYPES = ("float32", "bfloat16")


def parse_shape(text: str) -> tuple[int, int, int]:
    parts = text.split(",")
    if len(parts) != 3 or not all(p.strip().isdigit() and int(p) > 0 for p in parts):
        raise argparse.ArgumentTypeError(f"{text!r}: expected three positive integers T,D,V")
    return tuple(int(p) for p in parts)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("python -m bench", description="Measure the ops against their limits and their peers.")
    p.add_argument("stems", nargs="*", metavar="STEM", help=f"of {', '.join(STEMS)}; none: all but {', '.join(WHOLE)}")
    p.add_argument("--peers", action="store_true", help="measure the installed peers too")
    p.add_argument("--json", metavar="FILE", help="write the record here")
    p.add_argument("--shape", type=parse_shape, metavar="T,D,V", help="one shape in the place of the defaults")
    p.add_argument("--dtype", action="append", choices=DTYPES, help="may be repeated")
    p.add_argument("--case", action="append", help="only these cases (forward+backward, variations, memory, ...)")
    p.add_argument("--repeats", type=int, default=7, metavar="N", help="rounds (default 7)")
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    p.add_argument("--budget", type=float, metavar="SECONDS", help="per problem: fewer rounds rather than longer")
    p.add_argument("--no-memory", action="store_true", help="skip the memory measurements")
    p.add_argument("--gpu-suite", action="store_true", help="everything a GPU run needs, into bench/results/")
    p.add_argument("--out", metavar="DIR", help="where --gpu-suite writes (default bench/results)")
    return p


def checked(args: argparse.Namespace, p: argparse.ArgumentParser) -> argparse.Namespace:
    for stem in args.stems:
        if stem not in STEMS:
            p.error(f"unknown stem {stem!r}: expected {', '.join(STEMS)}")
    if args.budget is not None and not args.budget > 0:
        p.error(f"--budget {args.budget:g}: expected seconds, more than 0")
    if args.repeats < 1:
        p.error(f"--repeats {args.repeats}: expected at least 1")
    if (args.gpu_suite or args.device == "cuda") and not torch.cuda.is_available():
        p.error("no CUDA device: --gpu-suite and --device cuda run on an NVIDIA GPU only")
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if args.case:
        known = {spec.case for stem in args.stems or PARTS for spec in specs_of(stem, args)}
        if unknown := sorted({*args.case} - known):
            p.error(f"--case {', '.join(unknown)}: expected {', '.join(sorted(known))}")
    return args


def specs_of(stem: str, args: argparse.Namespace) -> list[harness.Spec]:
    module = importlib.import_module(f"bench.bench_{stem}")
    return module.specs(args.device, args.shape, args.dtype and tuple(args.dtype), args.peers)


def run_cases(args: argparse.Namespace) -> dict:
    """Measure every Spec asked for, printing each table as it is done; the record."""
    record = {"environment": environment(args.device), "cases": []}
    report.print_caution(record["environment"])
    for stem in args.stems or PARTS:
        module = importlib.import_module(f"bench.bench_{stem}")
        for spec in specs_of(stem, args):
            if args.case and spec.case not in args.case:
                continue
            started = time.monotonic()
            case = harness.measure(spec, module, repeats=args.repeats, budget_s=args.budget, memory=not args.no_memory)
            case["measured_in_s"] = time.monotonic() - started
            record["cases"].append(case)
            report.print_case(case)
            if args.json:  # after every case, so that what was measured survives what comes next
                write(record, Path(args.json))
    return record


def write(record: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def main(argv: list[str] | None = None) -> int:
    p = parser()
    args = checked(p.parse_args(argv), p)
    if args.gpu_suite:
        from bench import gpu_suite

        return gpu_suite.main(Path(args.out) if args.out else None)
    record = run_cases(args)
    report.print_environment(record["environment"])
    report.print_targets(record)
    ours = [v for case in record["cases"] for v in case["variants"] if v["role"] == "ours"]
    wrong = [v["name"] for v in ours if "failed" in v or v.get("agrees") is False]
    if wrong:
        print(f"failed, or of another result: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0
