"""One self-contained HTML page of a run: `python -m scope_fast.report RUN [--out FILE]`.

Reads config.yaml, metrics.jsonl, rollouts.jsonl and environment.jsonl of a run directory, also while the run still
writes them. The page (report.html, report.css and report*.js beside this file) loads nothing: it opens from disk, and
its content-security policy lets no script but its own run, whatever a model wrote.

A line of rollouts.jsonl is one rollout:
    {"step": int, "prompt_id": str, "task": str, "group": int, "sample": int, "prompt": str, "answer": str,
     "prompt_ids": [int], "response": str, "response_ids": [int], "tokens": [str] (text of each response token),
     "logprobs": [float] (the engine's), "reward": float | null, "verdict": "ok" | "timeout" | "crash",
     "verdict_reason": str | null, "finish_reason": "stop" | "length", "weight_version": int,
     "weight_versions": [[version, start, end], ...] | null,
     "steps": [[start, end], ...] (token spans) | null, "step_probs": [float] | null,
     "first_error": int | null (the number of steps where there is none),
     "selection": {"score", "alpha", "beta", "r_step", "r_token"} | null, "selected": bool,
     "repair": null | {"status": "accepted" | "rejected" | "error", "reason": str, "kept_tokens": int,
                       "kept_steps": int, "suffix": str, "suffix_ids": [int], "suffix_tokens": [str],
                       "reward": float | null},   (no suffix_ids: the suffix was refused before verification)
     "trained": null | {"response_ids": [int], "tokens": [str], "segment": [int], "advantage": [float],
                        "loss_weight": [float]}}
`group` and `sample` name the rollout within its step; `trained` is the sequence the learner saw. A number that is not
finite is null, in `trained` the text "nan", "inf" or "-inf".
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import html
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from scope_fast.environment import last
from scope_fast.jsonl import merged_steps, read_jsonl
from scope_fast.metrics import METRICS

MAX_ROLLOUTS = 4000  # embedded in the page
MAX_BYTES = 32 << 20  # of their lines in rollouts.jsonl; less than half of it is embedded
SCRIPTS = ("report_charts.js", "report_detail.js", "report_rollouts.js", "report.js")
FUNNEL = ("scope/failed", "scope/selected", "scope/repaired", "scope/accepted")
PHASES = tuple(f"time/{phase}_s" for phase in ("generate", "verify", "prm", "teacher", "learn", "sync"))
REST = "time/rest"  # what no phase covers; of the page alone


@dataclass(frozen=True)
class Panel:
    """One chart. kind: "line" or "stack" (parts of a whole); scale of the y axis: "linear" or "log"."""

    title: str
    names: tuple[str, ...]
    kind: str = "line"
    scale: str = "linear"


PANELS = (
    Panel("Pass rate and reward", ("reward/pass_rate", "eval/pass_rate", "reward/mean")),
    Panel("Failed rollouts", ("scope/failed",)),
    Panel("Repairs by outcome", ("scope/accepted", "scope/rejected", "teacher/errors"), "stack"),
    Panel("Near-miss share", ("scope/near_miss_rate",)),
    Panel("Share right before the first error", ("scope/prefix_ratio",)),
    Panel("Entropy", ("sampling/entropy", "policy/entropy")),
    Panel("Distinct-4", ("diversity/distinct_4",)),
    Panel("Response length", ("response/length",)),
    Panel("Loss", ("loss/rl", "loss/nll")),
    Panel("Gradient norm", ("grad/norm",)),
    Panel("Engine against learner", ("sampling/logprob_gap",), scale="log"),
    Panel("Time by phase", (*PHASES, REST), "stack"),
)


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """The lines of metrics.jsonl, those of one step merged, in step order."""
    rows = merged_steps(run_dir / "metrics.jsonl")
    return [rows[step] for step in sorted(rows)]


def series(rows: list[dict[str, float]]) -> dict[str, dict[str, Any]]:
    """name -> {unit, description, values}: a value for each row, None where the metric was left out.

    The held-out pass rate before training becomes the first point of eval/pass_rate, and REST is added.
    """
    names = dict.fromkeys(name for row in rows for name in row if name != "step")
    columns = {name: [row.get(name) for row in rows] for name in names}
    before = next((v for v in columns.pop("eval/pass_rate_before", []) if v is not None), None)
    if before is not None:
        after = columns.setdefault("eval/pass_rate", [None] * len(rows))
        after[0] = before if after[0] is None else after[0]
    if "time/step_s" in columns:
        columns[REST] = [_rest(row) for row in rows]
    result = {}
    for name, values in columns.items():
        unit, description = ("s", "Everything else") if name == REST else _meaning(name)
        result[name] = {"unit": unit, "description": description, "values": [_short(v) for v in values]}
    return result


def _rest(row: dict[str, float]) -> float | None:
    if "time/step_s" not in row:
        return None
    return max(0.0, row["time/step_s"] - sum(row.get(name, 0.0) for name in PHASES))


def _meaning(name: str) -> tuple[str, str]:
    metric = METRICS.get(name)  # a run of another version may hold names this one does not know
    return (metric.unit, metric.description) if metric else ("", name)


def panels(names: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
    """{"main": PANELS that have data, "more": a panel for each metric left over}."""
    names = list(names)
    main = [{**asdict(p), "names": kept} for p in PANELS if (kept := [n for n in p.names if n in names])]
    shown = {name for panel in main for name in panel["names"]}
    more = [asdict(Panel(name, (name,))) for name in sorted(names) if name not in shown]
    return {"main": main, "more": more}


def totals(rows: list[dict[str, float]]) -> dict[str, int]:
    """The funnel over the whole run: counts of failed, selected, repaired, accepted, rejected, errors."""
    names = (*FUNNEL, "scope/rejected", "teacher/errors")
    return {name.split("/")[1]: int(sum(row.get(name, 0) for row in rows)) for name in names}


def tiles(rows: list[dict[str, float]]) -> list[dict[str, str]]:
    """The figures at the top of the page: {label, value, note}; those without data are left out."""
    result = []
    before, after = _first(rows, "eval/pass_rate_before"), _first(reversed(rows), "eval/pass_rate")
    if before is not None and after is not None:
        gain = f"{100 * (after - before):+.1f} points"
        result.append(_tile("Held-out pass rate", f"{before:.1%} → {after:.1%}", gain))
    counts = totals(rows)
    if counts["selected"]:
        share = f"{counts['accepted'] / counts['selected']:.0%}"
        note = f"{share}; {counts['rejected']:,} rejected, {counts['errors']:,} teacher errors"
        result.append(_tile("Repairs accepted", f"{counts['accepted']:,} of {counts['selected']:,}", note))
    for name, label, form, whose in (
        ("scope/near_miss_rate", "Near misses among failures", "{:.1%}", ", to the reward model"),
        ("diversity/distinct_4", "Distinct-4", "{:.3f}", ""),
        ("sampling/entropy", "Sampling entropy", "{:.3f}", ""),
    ):
        if values := [row[name] for row in rows if name in row]:
            tenth = max(1, len(values) // 10)
            first, last = fmean(values[:tenth]), fmean(values[-tenth:])
            result.append(_tile(label, f"{form.format(first)} → {form.format(last)}", f"first → last tenth{whose}"))
    if gaps := [row["sampling/logprob_gap"] for row in rows if "sampling/logprob_gap" in row]:
        result.append(_tile("Largest engine–learner gap", f"{max(gaps):.1e}", "nats"))  # noqa: RUF001
    return result


def _tile(label: str, value: str, note: str) -> dict[str, str]:
    return {"label": label, "value": value, "note": note}


def _first(rows: Iterable[dict[str, float]], name: str) -> float | None:
    return next((row[name] for row in rows if name in row), None)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def facts(config: dict[str, Any], rows: list[dict[str, float]], environment: dict[str, Any]) -> list[list[str]]:
    """[label, value] pairs about the run; what neither configuration nor environment (its last) has is left out."""
    done, asked = max((row["step"] for row in rows), default=0), config.get("steps")
    result = [["Method", config.get("method")], ["Model", _dig(config, "model.path")]]
    result.append(["Steps", f"{done}" if asked in (None, done) else f"{done} of {asked}"])
    result += [
        ["Seed", config.get("seed")],
        ["Tasks", _dig(config, "data.path") or ", ".join(_dig(config, "data.tasks") or []) or None],
    ]
    size = (_dig(config, "rollout.prompts_per_step"), _dig(config, "rollout.group_size"))
    result.append(["A step", None if None in size else f"{size[0]} prompts × {size[1]} rollouts"])  # noqa: RUF001
    result += [["Teacher", _dig(config, "teacher.kind")], ["Reward model", _dig(config, "prm.kind")]]
    result.append(["Engine", environment.get("engine", _dig(config, "rollout.engine"))])  # which "auto" chose
    if device := environment.get("device"):
        ranks = environment["ranks"]
        result.append(["Device", device if ranks == 1 else f"{ranks} × {device}"])  # noqa: RUF001
    if seconds := [row["time/step_s"] for row in rows if "time/step_s" in row]:
        result.append(["Time in steps", _duration(sum(seconds))])
    return [[label, str(value)] for label, value in result if value is not None]


def _dig(config: Any, dotted: str) -> Any:
    for key in dotted.split("."):
        config = config.get(key) if isinstance(config, dict) else None
    return config


def choose(steps: Sequence[int], repaired: Sequence[bool], cap: int) -> list[int]:
    """Indices of at most `cap` rollouts, ascending: first and last step (up to half), the repaired, then others.

    Where a kind does not fit, it is thinned evenly over the run.
    """
    if len(steps) <= cap:
        return list(range(len(steps)))
    ends = {steps[0], steps[-1]}
    outer = [i for i, step in enumerate(steps) if step in ends]
    chosen = set(_thin(outer, cap // 2))
    for kind in ([i for i, r in enumerate(repaired) if r], range(len(steps))):
        chosen |= set(_thin([i for i in kind if i not in chosen], cap - len(chosen)))
    return sorted(chosen)


def _thin(items: Sequence[int], count: int) -> list[int]:
    if len(items) <= count:
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]


def status(record: dict[str, Any]) -> str:
    """ "accepted", "rejected" or "error" (a repair), else "passed", "failed" or "unverified"."""
    if record["repair"] is not None:
        return record["repair"]["status"]
    if record["reward"] is None:
        return "unverified"
    return "passed" if record["reward"] > 0 else "failed"


def compact(record: dict[str, Any]) -> dict[str, Any]:
    """What the page needs of a rollout: ids dropped, numbers shortened, per-token streams as [value, run length]."""
    keep = ("step", "prompt_id", "task", "group", "sample", "prompt", "answer", "tokens", "reward", "verdict")
    keep += ("finish_reason", "weight_version", "steps", "first_error", "selected")
    result = {key: record[key] for key in keep} | {"verdict_reason": record.get("verdict_reason")}  # older runs: none
    result["logprobs"] = [_short(v) for v in record["logprobs"]]
    result["step_probs"] = record["step_probs"] and [_short(v) for v in record["step_probs"]]
    result["selection"] = record["selection"] and {k: _short(v) for k, v in record["selection"].items()}
    if repair := record["repair"]:
        # a suffix that could not be spliced has text and no tokens
        dropped = ("suffix_ids", "suffix") if repair["suffix_tokens"] else ("suffix_ids",)
        repair = {key: value for key, value in repair.items() if key not in dropped}
    result["repair"] = repair
    if trained := record["trained"]:
        streams = {key: _runs(trained[key]) for key in ("segment", "advantage", "loss_weight")}
        result["trained"] = {"tokens": None if trained["tokens"] == record["tokens"] else trained["tokens"], **streams}
    else:
        result["trained"] = None
    return result


def _short(value: float | None) -> float | int | None:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _runs(values: Sequence[float]) -> list[list[float]]:
    runs: list[list[float]] = []
    for value in map(_short, values):
        if runs and runs[-1][0] == value:
            runs[-1][1] += 1
        else:
            runs.append([value, 1])
    return runs


def read_rollouts(path: Path, max_rollouts: int = MAX_ROLLOUTS, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """{"total", "index": [[step, group, sample, task, status, score, prompt]], "details": [compact record]}.

    Two passes, so that a long run's file is never in memory: the first chooses, the second reads what was chosen.
    """
    if not path.exists():
        return {"total": 0, "index": [], "details": []}
    lines = [(offset, size, r["step"], r.get("repair") is not None) for offset, size, r in read_jsonl(path)]
    affordable = max_bytes * len(lines) // max(1, sum(line[1] for line in lines))
    chosen = choose([line[2] for line in lines], [line[3] for line in lines], min(max_rollouts, max(1, affordable)))
    index, details = [], []
    with path.open("rb") as file:
        for i in chosen:
            file.seek(lines[i][0])
            record = json.loads(file.read(lines[i][1]))
            try:
                details.append(compact(record))
                score = record["selection"] and _short(record["selection"]["score"])
                index.append([*(record[k] for k in ("step", "group", "sample", "task")), status(record), score])
            except KeyError as error:
                raise ValueError(f"{path}: rollout {i + 1} has no {error.args[0]!r}") from None
    for entry, gist in zip(index, _gists([d["prompt"] for d in details], [e[3] for e in index]), strict=True):
        entry.append(gist)
    return {"total": len(lines), "index": index, "details": details}


def _gists(prompts: Sequence[str], tasks: Sequence[str]) -> list[str]:
    """Each prompt as one short line: no chat template's markers, nothing that all prompts of its task begin with."""
    lines = [" ".join(re.sub(r"<\|[^|<>]*\|>", " ", prompt).split()) for prompt in prompts]
    cuts = {task: _cut([g for g, t in zip(lines, tasks, strict=True) if t == task]) for task in set(tasks)}
    return [("…" if cuts[task] else "") + line[cuts[task] :][:120] for line, task in zip(lines, tasks, strict=True)]


def _cut(lines: Sequence[str]) -> int:
    """How many characters to drop: the words all lines begin with, if they are long and not everything."""
    first, last = min(lines), max(lines)  # what these two share, all share
    shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), 0)
    return first.rfind(" ", 0, shared) + 1 if shared > 20 else 0


def render(run_dir: Path) -> str:
    """The page, as text."""
    config_text = (run_dir / "config.yaml").read_text(encoding="utf-8")
    config, rows = yaml.safe_load(config_text) or {}, read_metrics(run_dir)
    columns, rollouts = series(rows), read_rollouts(run_dir / "rollouts.jsonl")
    environment = last(run_dir / "environment.jsonl") or {}  # none: a run of an older version
    run = {
        "name": run_dir.resolve().name,
        "facts": facts(config, rows, environment),
        "config": config_text,
        "tau": _dig(config, "prm.tau"),
        "tiles": tiles(rows),
        "totals": totals(rows),
        "steps": [row["step"] for row in rows],
        "series": columns,
        "panels": panels(columns),
        "total": rollouts["total"],
        "index": rollouts["index"],
    }
    script = "(() => {\n'use strict';\n" + "\n".join(map(_asset, SCRIPTS)) + "\n})();"
    style = _asset("report.css")
    parts = {
        "title": html.escape(f"{run['name']} · scope_fast"),
        "policy": f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}",
        "style": style,
        "script": script,
        "run": _embed(run),
        "rollouts": "\n".join(map(_embed, rollouts["details"])),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _asset("report.html"))


def _asset(name: str) -> str:
    return resources.files("scope_fast").joinpath(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _embed(value: Any) -> str:
    """JSON that may stand inside a script element: nothing in it can end the element or open a comment."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e")


def write_report(run_dir: str | Path, out: str | Path | None = None) -> Path:
    """Writes the page of a run to `out` (default: report.html in the run directory) and returns its path.

    Raises FileNotFoundError naming the file that makes `run_dir` no run directory, ValueError for a line that cannot
    be read.
    """
    run_dir = Path(run_dir)
    for name in ("config.yaml", "metrics.jsonl"):
        if not (run_dir / name).is_file():
            raise FileNotFoundError(f"{run_dir} is no run directory: it has no {name}")
    out = Path(out) if out else run_dir / "report.html"
    if out.is_dir():
        raise ValueError(f"--out {out}: that is a folder, expected a file")
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    partial.write_text(render(run_dir), encoding="utf-8")
    partial.replace(out)  # a reader never meets half a page
    return out


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m scope_fast.report", description="Write a run's report.html.")
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--out", type=Path, help="the page to write (default: RUN/report.html)")
    options = parser.parse_args(arguments)
    try:
        out = write_report(options.run, options.out)
    except (FileNotFoundError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    print(f"{out} ({out.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
