"""The results of a benchmark: from verified samples to estimates with intervals, and a table of them.

    avg@n        share of correct samples, over all n samples of a problem (avg@k has the same expectation for every k)
    pass@k       some of k samples is correct          maj@k   the majority of k samples votes for a correct answer
    scope/near_miss_rate          failed samples of which only the last step is wrong
    response/length, response/truncated                tokens; share that ran into the limit
    diversity/*  distinct_1 and distinct_4 over tokens (median problem), unique_answers,
                 self_bleu and self_rouge of a problem's first samples (SIMILAR_SAMPLES at most)
A sample whose verification failed (time-out or crash) has no reward: it is left out of the first three and counted, and
a problem with fewer than k verified samples is left out at k. Each estimate carries how many problems it rests on.
A failed sample without a first error is left out of the near-miss share, and counted by why there is none:
    scope/unchecked   its task has no checker, and no model is there for it (--prm)
    scope/empty       it has no step                prm/invalid       a step probability that is no probability
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from scope_fast.diversity import distinct_n, unique_answers
from scope_fast.estimators import Estimate, draws, estimate, majority_at_k, pass_at_k, point
from scope_fast.scope.localize import is_near_miss
from scope_fast.scope.trajectory import Trajectory

Group = Sequence[Trajectory]  # the samples of one problem
SIMILAR_SAMPLES = 8  # self-BLEU depends on their number and costs its square
NAME_WIDTH, CELL_WIDTH = 24, 26  # characters, borders included


class Column(NamedTuple):
    """One number a problem, and how they are put together (arguments of `estimators.draws`)."""

    values: list[float]
    weights: list[float] | None = None
    statistic: str = "mean"


@dataclass(frozen=True)
class Result:
    """A benchmark, or a group of them. samples: of every problem; 0 for a group."""

    name: str
    problems: int
    samples: int
    estimates: dict[str, Estimate]
    support: dict[str, int]  # problems each estimate rests on
    counts: dict[str, int] = field(default_factory=dict)
    group: str | None = None
    drawn: dict[str, np.ndarray] = field(default_factory=dict, repr=False)
    by_problem: dict[str, list[float]] = field(default_factory=dict, repr=False)

    def to_json(self) -> dict[str, Any]:
        """Plain values; by_problem: what each problem counts for, in their order, for comparisons in pairs."""
        metrics = {
            name: {"value": e.value, "low": e.low, "high": e.high, "problems": self.support[name]}
            for name, e in self.estimates.items()
        }
        own = {"group": self.group, "problems": self.problems, "samples": self.samples}
        return {**own, "metrics": metrics, "counts": self.counts, "by_problem": self.by_problem}


def columns(
    groups: Sequence[Group], ks: Sequence[int], similarity: dict[str, Callable[[list[str]], float | None]]
) -> dict[str, Column]:
    """What is measured of every problem, by name; what is undefined is left out.

    similarity: diversity/* names and functions of a problem's texts.
    """
    verified = [[t for t in group if t.reward is not None] for group in groups]
    found = {"avg@n": Column([fmean(_correct(group)) for group in verified if group])}
    enough = {k: [group for group in verified if len(group) >= k] for k in ks}
    for k in ks:
        found[f"pass@{k}"] = Column([pass_at_k(len(group), sum(_correct(group)), k) for group in enough[k]])
    for k in ks:
        if k > 1:
            votes = [majority_at_k([t.answer for t in group], _correct(group), k) for group in enough[k]]
            found[f"maj@{k}"] = Column(votes)
    found["scope/near_miss_rate"] = _near_misses(groups)
    found["response/length"] = Column([fmean(len(t.token_ids) for t in group) for group in groups])
    found["response/truncated"] = Column([fmean(t.finish_reason == "length" for t in group) for group in groups])
    if max(len(group) for group in groups) > 1:
        found |= _diversity(groups, similarity)
    return {name: column for name, column in found.items() if column.values}


def _correct(group: Group) -> list[bool]:
    return [t.reward > 0.0 for t in group]


def _near_misses(groups: Sequence[Group]) -> Column:
    """The share is of all failed samples together, so a problem weighs as many as it has."""
    located = [found for group in groups if (found := [t for t in group if t.failed and t.first_error is not None])]
    shares = [fmean(is_near_miss(t.first_error, len(t.steps)) for t in group) for group in located]
    return Column(shares, [float(len(group)) for group in located])


def _diversity(
    groups: Sequence[Group], similarity: dict[str, Callable[[list[str]], float | None]]
) -> dict[str, Column]:
    found = {}
    for n in (1, 4):
        shares = [share for group in groups if (share := distinct_n([t.token_ids for t in group], n)) is not None]
        found[f"diversity/distinct_{n}"] = Column(shares, statistic="median")
    found["diversity/unique_answers"] = Column([float(unique_answers([t.answer for t in g])) for g in groups])
    for name, function in similarity.items():
        values = [function([t.text for t in group[:SIMILAR_SAMPLES]]) for group in groups]
        found[name] = Column([value for value in values if value is not None])
    return found


def score_benchmark(
    name: str,
    groups: Sequence[Group],
    ks: Sequence[int],
    *,
    similarity: dict[str, Callable[[list[str]], float | None]] | None = None,
    counts: dict[str, int] | None = None,
    group: str | None = None,
    seed: int = 0,
) -> Result:
    """The estimates of a benchmark. groups: the samples of each problem, as many for each, verified.

    counts: what was counted on the way; the verifier's faults are added. Raises ValueError without any problem.
    """
    if not groups or not all(groups):
        raise ValueError(f"{name}: no sample to evaluate")
    found = columns(groups, ks, similarity or {})
    own_seed = (seed, zlib.crc32(name.encode()))  # another benchmark's draws must be independent of these
    drawn = {key: draws(c.values, c.weights, statistic=c.statistic, seed=own_seed) for key, c in found.items()}
    estimates = {
        key: estimate(point(c.values, c.weights, statistic=c.statistic), drawn[key], len(c.values))
        for key, c in found.items()
    }
    verdicts = Counter(t.verdict for samples in groups for t in samples)
    faults = {"verifier/timeouts": verdicts["timeout"], "verifier/crashes": verdicts["crash"]}
    support = {key: len(c.values) for key, c in found.items()}
    by_problem = {key: c.values for key, c in found.items() if len(c.values) == len(groups)}
    return Result(
        name, len(groups), len(groups[0]), estimates, support, {**(counts or {}), **faults}, group, drawn, by_problem
    )  # fmt: skip


def average(name: str, results: Sequence[Result]) -> Result:
    """The mean over benchmarks of what all of them have, each weighing the same; counts are summed."""
    shared = [key for key in results[0].estimates if all(key in result.estimates for result in results)]
    drawn = {key: np.mean([result.drawn[key] for result in results], axis=0) for key in shared}
    support = {key: sum(result.support[key] for result in results) for key in shared}
    fewest = {key: min(result.support[key] for result in results) for key in shared}  # one problem has no interval
    estimates = {
        key: estimate(fmean(result.estimates[key].value for result in results), drawn[key], fewest[key])
        for key in shared
    }
    counts = Counter[str]()
    for result in results:
        counts.update(result.counts)
    problems = sum(result.problems for result in results)
    return Result(name, problems, 0, estimates, support, dict(counts), name, drawn)


def tables(results: Sequence[Result], width: int) -> list[Table]:
    """Metrics down, benchmarks across, as many to a table as `width` characters hold: the value and its interval."""
    made, size = [], max(1, (width - NAME_WIDTH) // CELL_WIDTH)
    for start in range(0, len(results), size):
        shown = results[start : start + size]
        table = Table()
        table.add_column("", no_wrap=True)
        for result in shown:
            table.add_column(_heading(result), no_wrap=True)
        for name in dict.fromkeys(key for result in shown for key in result.estimates):
            table.add_row(name, *(cell(name, result.estimates.get(name)) for result in shown))
        for name in dict.fromkeys(key for result in shown for key, count in result.counts.items() if count):
            table.add_row(name, *(str(result.counts.get(name, 0)) for result in shown), style="yellow")
        made.append(table)
    return made


def _heading(result: Result) -> str:
    samples = f" x {result.samples}" if result.samples else ""
    return f"{result.name}\n{result.problems} problems{samples}"


def cell(name: str, found: Estimate | None) -> str:
    """A value and its interval as text: shares of correct answers in percent."""
    if found is None:
        return "-"
    percent = name.startswith(("avg@", "pass@", "maj@"))
    scale, digits = (100.0, 1) if percent else (1.0, 1 if name == "response/length" else 3)
    value = f"{scale * found.value:.{digits}f}{' %' if percent else ''}"
    if found.low is None:
        return value
    return f"{value} [{scale * found.low:.{digits}f}, {scale * found.high:.{digits}f}]"
