"""How well a process reward model finds first errors: ProcessBench (Zheng et al. 2024, arXiv 2412.06559).

    python -m scope_fast.prm.process_bench PRM_FOLDER DATA [--prm.kind KIND] [--json FILE] [--dotted.key value ...]

DATA: rows with "problem" (text), "steps" (a list of text) and "label" (0-based index of the first wrong step, -1 for
none): JSONL, or with the extra "data" whatever `datasets` reads; of the hub, `Qwen/ProcessBench --data.split gsm8k`.
Any configuration key may follow: prm.kind (default token_classifier), prm.tau, prm.token_budget, model.dtype, and for a
token classifier scope.step_separator, which stands between the steps it reads.

An item that the model cannot score (too long for it, a separator spelled out in a step, a step without text, NaN)
is counted as invalid, and as missed: it is in every share's denominator and in no numerator.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from scope_fast.config import Config
from scope_fast.config_files import load, overrides
from scope_fast.data import encode_prompt
from scope_fast.estimators import Estimate, draws, estimate, first_error_label, process_bench
from scope_fast.loading import loading
from scope_fast.prm.load import make_scorer
from scope_fast.prm.scorers import StepScorer
from scope_fast.scope.localize import first_error, valid_probs
from scope_fast.scope.trajectory import Prompt, Trajectory
from scope_fast.sources import open_rows

USAGE = "python -m scope_fast.prm.process_bench PRM_FOLDER DATA [--json FILE] [--dotted.key value ...]"

console = Console(highlight=False)


class Item(NamedTuple):
    """A solution. label: 0-based index of its first wrong step, -1 where there is none."""

    problem: str
    steps: list[str]
    label: int


class Scores(NamedTuple):
    """estimates: acc_error, acc_correct, f1, prefix_safe; those without an item of their kind are left out."""

    estimates: dict[str, Estimate]
    counts: dict[str, int]


def read_items(config: Config) -> list[Item]:
    """The rows of `data.path`. ValueError naming file, row and column for one of another shape."""
    return [_item(raw, where) for _, where, raw in open_rows(config.data)[1]]


def _item(raw: Any, where: str) -> Item:
    problem, steps, label = (raw.get(name) if isinstance(raw, dict) else None for name in Item._fields)
    if not isinstance(problem, str) or not problem.strip():
        raise ValueError(f"{where}: 'problem' is {problem!r}, expected text")
    if not isinstance(steps, list) or not steps or not all(isinstance(step, str) for step in steps):
        raise ValueError(f"{where}: 'steps' is {steps!r}, expected a list of text")
    if type(label) is not int or not -1 <= label < len(steps):
        raise ValueError(f"{where}: 'label' is {label!r}, expected the index of one of {len(steps)} steps, or -1")
    return Item(problem, steps, label)


def encode(tokenizer, item: Item, separator: str) -> Trajectory:
    """The item as a response: each step is encoded alone, so that its span is exact; what looks like a special token in
    it is text."""
    ids, spans = list[int](), []
    for i, step in enumerate(item.steps):
        text = step.strip() + (separator if i + 1 < len(item.steps) else "")
        start = len(ids)
        ids += tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        spans.append((start, len(ids)))
    prompt = Prompt("", "process_bench", item.problem, tuple(encode_prompt(tokenizer, item.problem)), {})
    return Trajectory(prompt, 0, 0, ids, [0.0] * len(ids), "stop", 0, steps=spans)


def predict(scorer: StepScorer, tokenizer, items: Sequence[Item], config: Config) -> list[int | None]:
    """The first error found in each item, as ProcessBench labels it; None where it could not be scored."""
    usable = [i for i, item in enumerate(items) if all(step.strip() for step in item.steps)]
    found: list[int | None] = [None] * len(items)
    encoded = [encode(tokenizer, items[i], config.scope.step_separator) for i in usable]
    for i, probs in zip(usable, scorer(encoded), strict=True):
        count = len(items[i].steps)
        if valid_probs(probs, count):
            found[i] = first_error_label(first_error(probs, config.prm.tau), count)
    return found


def score(predictions: Sequence[int | None], items: Sequence[Item], seed: int = 0) -> Scores:
    """ProcessBench's scores with 95 % bootstrap intervals, erroneous and correct items each drawn among their own.

    predictions: None counts as missed. ValueError where there is no item.
    """
    if not items:
        raise ValueError("items is empty: expected at least one")
    labels = [item.label for item in items]
    # an index behind the last step is right for no item, and safe for none
    found = [len(item.steps) if p is None else p for p, item in zip(predictions, items, strict=True)]
    values = process_bench(found, labels)._asdict()
    wrong = [(p, label) for p, label in zip(found, labels, strict=True) if label != -1]
    flags = {
        "acc_error": [float(p == label) for p, label in wrong],
        "acc_correct": [float(p == -1) for p, label in zip(found, labels, strict=True) if label == -1],
        "prefix_safe": [float(0 <= p <= label) for p, label in wrong],
    }
    seeds = {"acc_error": 0, "acc_correct": 1, "prefix_safe": 0}  # those of the same items are drawn alike
    drawn = {name: draws(flags[name], seed=(seed, seeds[name])) for name in flags if flags[name]}
    sizes = {name: len(flags[name]) for name in drawn}
    if "acc_error" in drawn and "acc_correct" in drawn:
        total = drawn["acc_error"] + drawn["acc_correct"]
        product = 2.0 * drawn["acc_error"] * drawn["acc_correct"]
        drawn["f1"] = np.divide(product, total, out=np.zeros_like(total), where=total > 0)
        sizes["f1"] = min(sizes["acc_error"], sizes["acc_correct"])
    estimates = {name: estimate(values[name], drawn[name], sizes[name]) for name in values if name in drawn}
    counts = {
        "items": len(items),
        "erroneous": len(wrong),
        "correct": len(items) - len(wrong),
        "invalid": sum(p is None for p in predictions),
    }
    return Scores(estimates, counts)


def evaluate(config: Config, stack: ExitStack) -> Scores:
    """Scores the model at `prm.path` on `data.path`; `stack` closes one that runs in vLLM. ValueError for what cannot
    be."""
    from transformers import AutoTokenizer

    items = read_items(config)
    if not items:
        raise ValueError(f"{config.data.path} has no row")
    with loading("PRM_FOLDER", config.prm.path):
        tokenizer = AutoTokenizer.from_pretrained(config.prm.path)
    scorer = make_scorer(config, config.prm.path, tokenizer, stack)
    console.print(f"{config.prm.path} on {config.data.path}: {len(items)} items", markup=False, soft_wrap=True)
    return score(predict(scorer, tokenizer, items, config), items, config.seed)


def table(scores: Scores) -> Table:
    """Percentages with their intervals, then the counts."""
    made = Table("", "", "95 % interval")
    for name, found in scores.estimates.items():
        interval = "-" if found.low is None else f"{100 * found.low:.1f} - {100 * found.high:.1f} %"
        made.add_row(name, f"{100 * found.value:.1f} %", interval)
    made.add_section()
    for name, count in scores.counts.items():
        made.add_row(name, str(count), "", style="yellow" if name == "invalid" and count else None)
    return made


def parse(arguments: Sequence[str]) -> tuple[Config, Path | None]:
    """(configuration, where the JSON goes) of a command line. ValueError for what cannot be; --help exits."""
    parser = argparse.ArgumentParser(
        usage=USAGE, description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where the results go too")
    if arguments and arguments[0] in ("-h", "--help"):
        parser.print_help()
        raise SystemExit(0)
    if len(arguments) < 2 or arguments[0].startswith("-") or arguments[1].startswith("-"):
        raise ValueError(f"usage: {USAGE}")
    options, rest = parser.parse_known_args(arguments[2:])
    if options.json is not None and options.json.is_dir():
        raise ValueError(f"--json {options.json}: that is a folder, expected a file")
    paths = (json.dumps(path, ensure_ascii=False) for path in arguments[:2])
    named = list(zip(("prm.path", "data.path"), paths, strict=True))
    return load(None, [*overrides(rest), *named]), options.json


def main(argv: list[str] | None = None) -> int:
    with ExitStack() as stack:
        try:
            config, file = parse(sys.argv[1:] if argv is None else argv)
            scores = evaluate(config, stack)
        except (ValueError, FileNotFoundError, ImportError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    console.print(table(scores))
    if file is not None:
        estimates = {name: found._asdict() for name, found in scores.estimates.items()}
        record = {
            "prm": {"path": config.prm.path, "kind": config.prm.kind, "tau": config.prm.tau},
            "data": {"path": config.data.path, "subset": config.data.subset, "split": config.data.split},
            "seed": config.seed,
            "estimates": estimates,
            "counts": scores.counts,
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        console.print(f"written: {file}", markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
