"""python -m bench.quickstart [--seeds 0,1,2] [--json FILE] [--dotted.key value ...]: what the quickstart gains.

Each seed is the command a newcomer runs, `python -m scope_fast.train`, in a directory of its own; the record is what
the runs' own metrics.jsonl say, and where they were made.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.cli import write
from bench.environment import environment

COLUMNS = {  # of a seed's row: title, form
    "seed": ("seed", "{}"), "before": ("before", "{:.1%}"), "after": ("after", "{:.1%}"), "steps": ("steps", "{}"),
    "selected": ("selected", "{}"), "accepted": ("accepted", "{}"), "least_accepted": ("in a step", ">= {}"),
    "most_logprob_gap": ("gap", "<= {:.1e}"), "steps_s": ("steps, s", "{:.0f}"), "run_s": ("run, s", "{:.0f}"),
}  # fmt: skip


def summary(lines: list[dict]) -> dict:
    """A run's metrics.jsonl in one row; repairs selected and accepted, in all and in the step that had fewest.

    Raises ValueError for a run that did not end with an evaluation.
    """
    values: dict[str, list[float]] = {}
    for line in lines:
        for name, value in line.items():
            values.setdefault(name, []).append(value)
    if "eval/pass_rate" not in values:
        raise ValueError("the run has no evaluation after its last step")
    return {
        "before": values["eval/pass_rate_before"][0],
        "after": values["eval/pass_rate"][-1],
        "steps": len(values["loss/total"]),
        "least_accepted": min(values["scope/accepted"]),
        "accepted": sum(values["scope/accepted"]),
        "selected": sum(values["scope/selected"]),
        "most_logprob_gap": max(values.get("sampling/logprob_gap", [0.0])),
        "steps_s": sum(values["time/step_s"]),
    }


def run(seed: int, folder: Path, settings: list[str]) -> dict:
    """A row of the record: the run of one seed. Raises CalledProcessError, with what it printed shown, if it fails."""
    out = folder / f"seed{seed}"
    command = [sys.executable, "-m", "scope_fast.train", "--seed", str(seed), "--out", str(out), *settings]
    started = time.monotonic()
    subprocess.run(command, check=True)
    seconds = time.monotonic() - started
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {"seed": seed, **summary(lines), "run_s": seconds}


def seeds_of(text: str) -> list[int]:
    if not all(part.strip().isdigit() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r}: expected integers, comma-separated")
    return [int(part) for part in text.split(",")]


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser("python -m bench.quickstart", description=__doc__.splitlines()[0], allow_abbrev=False)
    p.add_argument("--seeds", default="0,1,2", type=seeds_of, help="comma-separated (default 0,1,2)")
    p.add_argument("--json", metavar="FILE", help="write the record here")
    args, settings = p.parse_known_args(argv)
    if refused := {word.partition("=")[0] for word in settings} & {"--seed", "--out"}:
        p.error(f"{', '.join(sorted(refused))}: the runs' own; --seeds names the seeds")
    record = {"environment": environment("cpu"), "settings": settings, "runs": []}
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:
            try:
                record["runs"].append(run(seed, Path(folder), settings))
            except subprocess.CalledProcessError as error:  # it has said why
                return error.returncode
            if args.json:
                write(record, Path(args.json))
    table = Table(*(title for title, _ in COLUMNS.values()))
    for row in record["runs"]:
        table.add_row(*(form.format(row[name]) for name, (_, form) in COLUMNS.items()))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
