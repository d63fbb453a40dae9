"""What the records of `python -m bench.paper` say: values with intervals, differences in pairs, tables.

Two arms share seeds (prompts, order) and held-out problems, so their difference is taken in pairs: every bootstrap draw
resamples the seeds and the problems of each task, the same ones for both arms. A split's value is the mean of its
tasks'; a task's is the mean over problems (diversity/distinct_*: the median), then over seeds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean

import numpy as np
from rich.table import Table

from scope_fast.diversity import distinct_n

SERIES = (
    "reward/pass_rate", "sampling/entropy", "response/length", "diversity/distinct_1", "diversity/distinct_4",
    "scope/near_miss_rate", "scope/selected", "scope/accepted", "tokens/rollout", "tokens/teacher", "grad/norm",
    "time/generate_s", "time/verify_s", "time/prm_s", "time/teacher_s", "time/learn_s", "time/sync_s", "time/step_s",
)  # fmt: skip
METRICS = (
    "pass@1", "pass@4", "pass@10", "diversity/distinct_1", "diversity/distinct_4", "diversity/self_bleu",
    "diversity/self_rouge", "diversity/unique_answers", "response/length",
)  # fmt: skip
SHARES = ("scope/near_miss_rate",)  # of a run's failures together: seeds are resampled, problems are not
COMPARED = "scope"
START = "start"  # the student before any training
SPLITS = {"id": ("chain_sum_short", "leg_counting_short"), "ood": ("chain_sum_long", "leg_counting_long")}
TITLES = {"id": "like the training's", "ood": "longer than those"}
RESAMPLES = 4000

Records = dict[str, dict[int, dict]]  # arm, seed


def series(rows: list[dict]) -> dict[str, list[float | None]]:
    """The named metrics of every step, out of the lines of metrics.jsonl."""
    steps = [row for row in rows if "reward/pass_rate" in row]
    found = {name: [row.get(name) for row in steps] for name in SERIES}
    return {name: values for name, values in found.items() if any(value is not None for value in values)}


def varieties(rollouts: Iterable[dict], steps: range) -> dict[str, float | None]:
    """How the student's rollouts of `steps` differ by whether they are right, from the lines of rollouts.jsonl.

    distinct-4 of the first two right and of the first two wrong rollouts of a prompt, and the share of different texts
    among its right ones, each the mean over prompts that have two: distinct-4 of all counts mistakes as variety.
    """
    groups: dict[tuple[int, int], dict[bool, list[tuple[int, ...]]]] = {}
    for row in rollouts:
        if row["step"] in steps and row["reward"] is not None:  # no verdict: neither right nor wrong
            kinds = groups.setdefault((row["step"], row["group"]), {True: [], False: []})
            kinds[row["reward"] > 0.5].append(tuple(row["response_ids"]))
    right, wrong = ([group[kind] for group in groups.values() if len(group[kind]) > 1] for kind in (True, False))
    found = {
        "distinct_4 of two right": [distinct_n(texts[:2], 4) for texts in right],
        "distinct_4 of two wrong": [distinct_n(texts[:2], 4) for texts in wrong],
        "different texts of the right": [len(set(texts)) / len(texts) for texts in right],
    }
    defined = {name: [value for value in values if value is not None] for name, values in found.items()}
    return {name: fmean(values) if values else None for name, values in defined.items()}


def read(files: Iterable[Path]) -> Records:
    """Records by arm and seed; the student's before training has seed 0."""
    found: Records = {}
    for path in files:
        record = json.loads(path.read_text())
        found.setdefault(record["arm"], {})[record.get("seed", 0)] = record
    return found


def last_step(record: dict) -> str:
    return max(record["evaluations"], key=int)


def values(records: dict[int, dict], seeds: Iterable[int], task: str, metric: str) -> np.ndarray | None:
    """(seeds, problems) of a metric at the end of training; None where a record lacks it."""
    rows = []
    for seed in seeds:
        benchmark = records[seed]["evaluations"][last_step(records[seed])][task]
        if metric in SHARES:
            if metric not in benchmark["metrics"]:
                return None
            rows.append([benchmark["metrics"][metric]["value"]])
        else:
            if metric not in benchmark["by_problem"]:
                return None
            rows.append(benchmark["by_problem"][metric])
    return np.asarray(rows)


def _of(values: np.ndarray, metric: str) -> np.ndarray:
    """(..., seeds, problems) -> (...): the value of a task."""
    middle = np.median if metric.startswith("diversity/distinct") else np.mean
    return middle(values, axis=-1).mean(axis=-1)


def draws(tasks: list[list[np.ndarray]], metric: str, seed: int = 0) -> np.ndarray:
    """(arms, RESAMPLES): a split's value under resampled seeds and problems, the same ones for all arms.

    tasks: of each task the arms' (seeds, problems). One seed alone is not resampled.
    """
    generator = np.random.default_rng(seed)
    arms, num_seeds = len(tasks[0]), len(tasks[0][0])
    chosen = generator.integers(0, num_seeds, (RESAMPLES, num_seeds, 1))
    total = np.zeros((arms, RESAMPLES))
    for task in tasks:
        problems = task[0].shape[1]
        index = generator.integers(0, problems, (RESAMPLES, 1, problems))
        for i, arm in enumerate(task):
            total[i] += _of(arm[chosen, index], metric)
    return total / len(tasks)


def interval(drawn: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def summarize(found: Records, splits: dict[str, tuple[str, ...]]) -> dict:
    """Every arm's values with 95 % intervals, and those of `scope` less every other's, over the seeds both have."""
    summary = {"arms": {}, "differences": {}}
    for arm, records in found.items():
        seeds = sorted(records)
        summary["arms"][arm] = {
            "seeds": seeds,
            **{split: _split_values(records, seeds, tasks) for split, tasks in splits.items()},
            "training": _training(records),
        }
    for arm, records in found.items():
        shared = sorted(set(records) & set(found.get(COMPARED, {})))
        if arm in (COMPARED, START) or not shared:
            continue
        summary["differences"][arm] = {
            "seeds": shared,
            **{split: _differences(found[COMPARED], records, shared, tasks) for split, tasks in splits.items()},
        }
    return summary


def _split_values(records: dict[int, dict], seeds: list[int], tasks: tuple[str, ...]) -> dict:
    result = {}
    for metric in (*METRICS, *SHARES):
        arrays = [values(records, seeds, task, metric) for task in tasks]
        if all(array is not None for array in arrays):
            low, high = interval(draws([[array] for array in arrays], metric)[0])
            value = fmean(float(_of(array, metric)) for array in arrays)
            result[metric] = {"value": value, "low": low, "high": high}
    return result


def _differences(ours: dict[int, dict], theirs: dict[int, dict], seeds: list[int], tasks: tuple[str, ...]) -> dict:
    result = {}
    for metric in (*METRICS, *SHARES):
        pairs = [[values(records, seeds, task, metric) for records in (ours, theirs)] for task in tasks]
        if all(array is not None for pair in pairs for array in pair):
            drawn = draws(pairs, metric)
            low, high = interval(drawn[0] - drawn[1])
            first, second = (fmean(float(_of(pair[i], metric)) for pair in pairs) for i in (0, 1))
            result[metric] = {
                "value": first - second, "low": low, "high": high,
                "relative": (first - second) / second if second else None,
            }  # fmt: skip
    return result


def _training(records: dict[int, dict]) -> dict:
    """Per seed on average: tokens, time by phase, and what the last eighth of the steps looked like."""
    metrics = [record["metrics"] for record in records.values() if "metrics" in record]
    result = {}
    for name in SERIES:
        columns = [[v for v in m[name] if v is not None] for m in metrics if name in m]
        columns = [column for column in columns if column]
        if not columns:
            continue
        if name.startswith(("tokens/", "time/", "scope/selected", "scope/accepted")):
            result[f"{name} (sum)"] = fmean(sum(column) for column in columns)
        else:
            result[f"{name} (end)"] = fmean(fmean(column[-max(1, len(column) // 8) :]) for column in columns)
    ends = [record["varieties"] for record in records.values() if "varieties" in record]
    for name in ends[0] if ends else ():
        if all(end[name] is not None for end in ends):
            result[f"{name} (end)"] = fmean(end[name] for end in ends)
    return result


def tables(summary: dict) -> list[Table]:
    """Arms down, metrics across: values, then `scope` less each; intervals are of 95 %."""
    made = []
    for split, title in TITLES.items():
        table = Table(title=f"held-out problems {title}: value [95 % interval]")
        shown = [m for m in (*METRICS[:5], *SHARES) if any(m in arm[split] for arm in summary["arms"].values())]
        table.add_column("arm (seeds)", no_wrap=True)
        for metric in shown:
            table.add_column(metric.removeprefix("diversity/").removeprefix("scope/"), no_wrap=True)
        for arm, held in summary["arms"].items():
            table.add_row(f"{arm} ({len(held['seeds'])})", *(cell(held[split].get(metric)) for metric in shown))
        for arm, held in summary["differences"].items():
            row = (cell(held[split].get(metric), signed=True) for metric in shown)
            table.add_row(f"{COMPARED} - {arm} ({len(held['seeds'])})", *row, style="cyan")
        made.append(table)
    table = Table(title="training, the mean of the seeds")
    names = list(dict.fromkeys(name for arm in summary["arms"].values() for name in arm["training"]))
    table.add_column("", no_wrap=True)
    arms = [arm for arm, held in summary["arms"].items() if held["training"]]
    for arm in arms:
        table.add_column(arm)
    for name in names:
        cells = (summary["arms"][arm]["training"].get(name) for arm in arms)
        table.add_row(name, *("-" if value is None else f"{value:,.4g}" for value in cells))
    return [*made, table]


def cell(found: dict | None, signed: bool = False) -> str:
    if found is None:
        return "-"
    sign = "+" if signed else ""
    return f"{found['value']:{sign}.3f} [{found['low']:{sign}.3f}, {found['high']:{sign}.3f}]"


def pass_rates(record: dict) -> list[np.ndarray]:
    """Of each task like the training's: (problems,), the share of a problem's samples that are right, at the end."""
    benchmarks = record["evaluations"][last_step(record)]
    return [np.asarray(benchmarks[task]["by_problem"]["pass@1"]) for task in SPLITS["id"]]


def choose(tries: list[dict]) -> dict:
    """The try that an arm carries: of those whose pass@1 is within a standard error of the best, the smallest step.

    The error is that of the difference to the best in pairs, problem by problem. Smallest: learner.lr, then
    loss.nll_coef, then fewer settings.
    """
    rates = [pass_rates(record) for record in tries]
    best = max(rates, key=lambda tasks: fmean(task.mean() for task in tasks))

    def is_tied(tasks: list[np.ndarray]) -> bool:
        gaps = [b - t for b, t in zip(best, tasks, strict=True)]
        error = np.sqrt(sum(gap.var(ddof=1) / gap.size for gap in gaps)) / len(gaps)
        return fmean(gap.mean() for gap in gaps) <= error

    def size(record: dict) -> tuple:
        settings = record["settings"]
        return settings["learner.lr"], settings.get("loss.nll_coef", 0.0), len(settings)

    return min((record for record, tasks in zip(tries, rates, strict=True) if is_tied(tasks)), key=size)


def tuning_table(records: list[dict]) -> Table:
    """Each tuning run's held-out pass@1 on problems like the training's, which decides, and its distinct-4."""
    arms: dict[str, list[dict]] = {}
    for record in records:
        arms.setdefault(record["arm"].rpartition("_try")[0], []).append(record)
    chosen = [choose(tries)["arm"] for tries in arms.values()]
    table = Table(title="tuning: held-out problems like the training's")
    for name in ("try", "settings", "pass@1", "distinct_4", ""):
        table.add_column(name, no_wrap=True)
    for record in records:
        benchmarks = record["evaluations"][last_step(record)]
        both = [benchmarks[task]["metrics"] for task in SPLITS["id"]]
        cells = (fmean(m[name]["value"] for m in both) for name in ("pass@1", "diversity/distinct_4"))
        settings = ", ".join(
            f"{k.split('.')[-1]} {v}" for k, v in record["settings"].items() if k.startswith(("learner.", "loss."))
        )
        mark = "chosen" if record["arm"] in chosen else ""
        table.add_row(record["arm"], settings, *(f"{value:.3f}" for value in cells), mark)
    return table
