"""python -m bench.paper [ARM ...]: does repairing near-misses beat discarding them, and beat replacing them whole?

Every arm of paper_arms.yaml is trained from the same student on the same prompts, as many rollouts each, and evaluated
on held-out problems like those of the training and on longer ones. A finished run leaves its record in
bench/results/paper/ARM_seedN.json; what has one is not run again, and a run that was stopped goes on from its last
checkpoint. With all records there: tables on the terminal, bench/results/paper_summary.json and the plots.

    python -m bench.paper                         all arms                  --jobs 2   runs side by side
    python -m bench.paper grpo scope --seeds 2    these, fewer seeds        --tune     the tuning runs, before
    python -m bench.paper --quick --out DIR       a smoke run, minutes      --tables   only what the records say
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import yaml
from rich.console import Console

from bench import paper_plots, paper_stats
from bench.environment import ROOT, environment
from bench.paper_stats import SPLITS, START
from scope_fast.config_files import load
from scope_fast.suite import dotted

ARMS = Path(__file__).with_name("paper_arms.yaml")
BASE = ROOT / "configs" / "paper.yaml"
RESULTS = Path(__file__).with_name("results") / "paper"
MODELS = RESULTS / "models"  # the student comes along: another machine would make one that rounds otherwise
QUICK = {
    "steps": 2, "rollout.prompts_per_step": 4, "rollout.group_size": 4, "rollout.max_tokens": 32,
    "rollout.engine": "transformers", "evaluation.prompts": 4, "data.heldout": 16, "checkpoint.every": 2,
    "warm_start.student_steps": 5, "warm_start.batch_sequences": 16,
}  # fmt: skip
NO_OUTCOME = {"out", "cache", "checkpoint", "logging", "distributed"}  # sections that decide nothing of it
# one thread each: runs side by side would only wait for each other
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}

console = Console(highlight=False, width=None if sys.stdout.isatty() else 300)  # its tables are wide


@dataclass(frozen=True)
class Evaluation:
    """How a model is evaluated. problems: of each task of the splits; samples: responses to each."""

    splits: tuple[str, ...] = tuple(SPLITS)
    problems: int = 60
    samples: int = 16
    ks: tuple[int, ...] = (1, 4, 10)

    def arguments(self) -> list[str]:
        tasks = [task for split in self.splits for task in SPLITS[split]]
        return [
            "--task", ",".join(tasks), "--prompts", str(self.problems * len(tasks)), "--samples", str(self.samples),
            "--k", ",".join(map(str, self.ks)), "--temperature", "1.0",
        ]  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One arm under one seed. settings: dotted keys over configs/paper.yaml."""

    arm: str
    seed: int
    settings: dict[str, object]
    folder: Path
    record: Path

    @property
    def overrides(self) -> list[tuple[str, str]]:
        values = {"cache": str(MODELS), **self.settings, "seed": self.seed, "out": str(self.folder)}
        return [(key, yaml.safe_dump(value, default_flow_style=True).split("\n")[0]) for key, value in values.items()]

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    def config(self, **options) -> dict[str, object]:
        """Everything that decides the outcome but the code; options: of pydantic's model_dump."""
        of_start = {"warm_start", "rollout"} if self.arm == START else None  # an untrained student knows no method
        options |= {"mode": "json", "include": of_start, "exclude": NO_OUTCOME}
        return load(str(BASE), self.overrides).model_dump(**options)

    def is_done(self) -> bool:
        """Whether its record is there and of these settings. A key that the record's time did not know decided then
        what its default decides now."""
        if not self.record.exists():
            return False
        kept, now = (dict(dotted(c)) for c in (json.loads(self.record.read_text())["config"], self.config()))
        new = dict(dotted(self.config(exclude_defaults=True))).keys() - kept.keys()
        return not new and all(name in now and now[name] == value for name, value in kept.items())


def runs_of(arms: dict, names: list[str], seeds: int | None, out: Path, records: Path, extra: dict) -> list[Run]:
    """Seed by seed, so that comparisons can be drawn before all is done."""
    most = max(arms[name]["seeds"] for name in names)
    return [
        Run(name, seed, {**arms[name]["set"], **extra}, out / f"{name}_seed{seed}", records / f"{name}_seed{seed}.json")
        for seed in range(most)
        for name in names
        if seed < min(arms[name]["seeds"], most if seeds is None else seeds)
    ]


def tuning_runs(spec: dict, names: list[str], out: Path, records: Path, extra: dict) -> list[Run]:
    """The tries of the arms of `names` that are tuned, on a seed of their own; the first of each first."""
    seed, tries = spec["tuning"]["seed"], spec["tuning"]["tries"]
    most = max(map(len, tries.values()))
    return [
        Run(
            f"{name}_try{i}",
            seed,
            {**spec["arms"][name]["set"], "checkpoint.every": 0, **tries[name][i], **extra},
            out / f"tune_{name}_try{i}",
            records / "tuning" / f"{name}_try{i}.json",
        )
        for i in range(most)
        for name in tries
        if name in names and i < len(tries[name])
    ]


def carry_out(run: Run, evaluation: Evaluation) -> None:
    """Trains, evaluates at the checkpoints, and writes the record. RuntimeError with the command's last words."""
    overrides = [f"--{key}={value}" for key, value in run.overrides]
    command("scope_fast.train", str(BASE), *overrides, log=run.log)
    config = load(str(run.folder / "config.yaml"))
    evaluations = {}
    for step in sorted(int(path.name.removeprefix("step_")) for path in (run.folder / "checkpoints").glob("step_*")):
        result = run.folder / f"evaluation_step_{step}.json"
        asked = ["--step", str(step), *evaluation.arguments(), "--json", str(result)]
        command("scope_fast.evaluate", str(run.folder), *asked, log=run.log)
        evaluations[step] = json.loads(result.read_text())["benchmarks"]
    rows = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    with (run.folder / "rollouts.jsonl").open(encoding="utf-8") as rollouts:
        last = range(config.steps - config.steps // 8 + 1, config.steps + 1)
        varieties = paper_stats.varieties(map(json.loads, rollouts), last)
    write_record(
        run.record,
        {
            "arm": run.arm,
            "seed": run.seed,
            "config": run.config(),
            "settings": run.settings,
            "steps": config.steps,
            "environment": environment("cpu"),
            "evaluations": evaluations,
            "metrics": paper_stats.series(rows),
            "varieties": varieties,
        },
    )


def evaluate_start(run: Run, evaluation: Evaluation) -> None:
    """The student every arm starts from, as the arms are evaluated."""
    config, result = load(str(BASE), run.overrides), run.folder.with_name(f"{START}.json")
    settings = {"warm_start": config.warm_start, "rollout": config.rollout}
    overrides = [f"--{name}={json.dumps(section.model_dump())}" for name, section in settings.items()]
    asked = ["tiny", *evaluation.arguments(), "--json", str(result), f"--cache={config.cache}", *overrides]
    command("scope_fast.evaluate", *asked, log=run.log)
    benchmarks = json.loads(result.read_text())["benchmarks"]
    record = {"arm": START, "config": run.config(), "environment": environment("cpu"), "evaluations": {0: benchmarks}}
    write_record(run.record, record)


def command(module: str, *arguments: str, log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as output:
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT, env={**os.environ, **ONE_THREAD}, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    if done.returncode:
        words = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise RuntimeError(f"{module} ended with {done.returncode}; the end of {log}:\n{words}")


def write_record(path: Path, record: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(record, separators=(",", ":")) + "\n")
    partial.rename(path)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m bench.paper", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    spec = yaml.safe_load(ARMS.read_text())
    parser.add_argument("arms", nargs="*", metavar="ARM", help=f"of {', '.join(spec['arms'])}")
    parser.add_argument("--seeds", type=int, help="at most this many of each arm's")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, one thread each (default 1)")
    parser.add_argument("--tune", action="store_true", help="the tuning runs instead of the arms")
    parser.add_argument("--tables", action="store_true", help="run nothing, show what the records say")
    parser.add_argument("--quick", action="store_true", help="two tiny steps: whether everything works")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "paper", help="run directories (default runs/paper)"
    )
    parser.add_argument(
        "--results", type=Path, help="records, tables and plots (default bench/results; OUT if --quick)"
    )
    args = parser.parse_args(argv)
    for name in args.arms:
        if name not in spec["arms"]:
            parser.error(f"unknown arm {name!r}: expected of {', '.join(spec['arms'])}")
    for name in ("seeds", "jobs"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: expected at least 1")
    args.spec, args.arms = spec, args.arms or list(spec["arms"])
    args.results = args.results or (args.out if args.quick else RESULTS.parent)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    records, out = args.results / "paper", args.out.resolve()
    evaluation = Evaluation(problems=2, samples=10) if args.quick else Evaluation()
    extra = {**QUICK, "cache": str(out / "cache")} if args.quick else {}
    start = Run(START, 0, extra, out / START, records / f"{START}.json")
    every = runs_of(args.spec["arms"], list(args.spec["arms"]), None, out, records, extra)
    if args.tune:
        runs = tuning_runs(args.spec, args.arms, out, records, extra)
    else:
        runs = runs_of(args.spec["arms"], args.arms, args.seeds, out, records, extra)
    if not args.tables:
        todo = [run for run in runs if not run.is_done()]
        console.print(f"{len(runs) - len(todo)} of {len(runs)} runs have their record", markup=False)
        if not start.is_done():
            evaluate_start(start, evaluation)
        if args.tune:  # what the arms are held against out of distribution decides nothing about them
            evaluation = replace(evaluation, splits=("id",))
        if failed := work_off(todo, args.jobs, evaluation):
            return failed
    if args.tune:
        console.print(paper_stats.tuning_table([json.loads(run.record.read_text()) for run in runs if run.is_done()]))
        return 0
    found = paper_stats.read(run.record for run in (start, *every) if run.is_done())  # none of older settings
    if found.keys() <= {START}:
        console.print(f"{records}: no record of any arm under the settings of now", markup=False)
        return 1
    summary = paper_stats.summarize(found, SPLITS)
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "paper_summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    for table in paper_stats.tables(summary):
        console.print(table)
    for path in paper_plots.draw(found, args.results):
        console.print(f"written: {path}", markup=False, soft_wrap=True)
    return 0


def work_off(runs: list[Run], jobs: int, evaluation: Evaluation) -> int:
    """Runs each, `jobs` at a time; how many failed. One that fails does not stop the others."""

    def one(run: Run) -> bool:
        try:
            carry_out(run, evaluation)
        except RuntimeError as error:
            console.print(f"{run.arm} seed {run.seed}: FAILED: {error}", markup=False)
            return False
        console.print(f"{run.arm} seed {run.seed}: {run.record}", markup=False, soft_wrap=True)
        return True

    if jobs == 1:
        return sum(not one(run) for run in runs)
    with ThreadPoolExecutor(jobs) as pool:
        return sum(not done for done in pool.map(one, runs))


if __name__ == "__main__":
    sys.exit(main())
