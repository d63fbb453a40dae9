"""Benchmark suites: YAML files that say which data sets an evaluation reads, from where, and how answers are judged.

    config:                        # optional: sections of a training configuration, but for data and verifier.score,
                                   # which every benchmark has for itself; the command line has the last word
      rollout: {max_tokens: 4096, context: 5120, top_p: 0.95}
    benchmarks:
      math500:
        group: in-distribution     # optional: benchmarks of a group are also averaged
        samples: 4                 # optional: how many responses to a problem
        score: scope_fast.math_answers:score
        data: {path: HuggingFaceH4/MATH-500, split: test}
Keys that start with a dot are ignored: a place for YAML anchors.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from scope_fast.config import Data
from scope_fast.config_files import explain, find, parse_yaml

SUFFIXES = (".jsonl", ".parquet", ".json", ".csv")


class Benchmark(BaseModel):
    """One data set, every row of it. score: "module:function", as `verifier.score`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: Data
    score: str
    group: str | None = None
    samples: int | None = Field(None, ge=1)


class Suite(BaseModel):
    """A suite's file. config: what it changes in the configuration, in sections."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    benchmarks: dict[str, Benchmark] = Field(min_length=1)
    config: dict[str, Any] = {}


def load_suite(path: str, local: str | None = None) -> Suite:
    """Reads a suite; a path, or a preset's name ("eval/paper"). Raises ValueError naming file and key for a bad one.

    local: a folder to read every benchmark from, as NAME.jsonl, .parquet, .json or .csv with the hub's columns.
    """
    file = find(path, kind="eval")
    raw = parse_yaml(file.read_text(encoding="utf-8"), str(file))
    if not isinstance(raw, dict):
        raise ValueError(f"{file}: expected a mapping with benchmarks, got {type(raw).__name__}")
    try:
        suite = Suite(**{str(key): value for key, value in raw.items() if not str(key).startswith(".")})
    except ValidationError as error:
        raise ValueError(f"{file}: {explain(error)}") from None
    for name, benchmark in suite.benchmarks.items():
        if benchmark.data.path is None:
            raise ValueError(f"{file}: benchmarks.{name}.data.path is missing")
    for key, _ in dotted(suite.config):
        if set_by_benchmark(key):
            raise ValueError(f"{file}: config.{key}: every benchmark has its own data and score; say it there")
    return suite if local is None else _from_folder(suite, Path(local))


def set_by_benchmark(key: str) -> bool:
    """Whether a configuration key says what a suite's benchmarks say themselves, so that it would change nothing."""
    return key.partition(".")[0] == "data" or key == "verifier.score"


def _from_folder(suite: Suite, folder: Path) -> Suite:
    found = {}
    for name, benchmark in suite.benchmarks.items():
        files = [folder / f"{name}{suffix}" for suffix in SUFFIXES]
        file = next((file for file in files if file.is_file()), None)
        if file is None:
            raise FileNotFoundError(f"{folder} holds no {name}{{{','.join(SUFFIXES)}}}")
        data = benchmark.data.model_copy(update={"path": str(file), "subset": None})
        found[name] = benchmark.model_copy(update={"data": data})
    return suite.model_copy(update={"benchmarks": found})


def dotted(sections: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested sections as (dotted key, JSON value) pairs, the form `config_files.load` takes."""
    pairs = []
    for key, value in sections.items():
        if isinstance(value, dict):
            pairs += dotted(value, f"{prefix}{key}.")
        else:
            pairs.append((f"{prefix}{key}", json.dumps(value, ensure_ascii=False, default=str)))
    return pairs
