"""What `python -m scope_fast.evaluate` was asked: its command line, understood and checked; nothing is loaded yet."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

from scope_fast.config import Config
from scope_fast.config_files import load, overrides, read_value
from scope_fast.suite import Suite, dotted, load_suite, set_by_benchmark
from scope_fast.tasks import GENERATORS, TASKS

USAGE = "python -m scope_fast.evaluate MODEL_OR_RUN [options] [--dotted.key value ...]"
KS = (1, 4, 8)
INSTEAD = {  # options of a run that an evaluation would not read
    "evaluation.samples": "--samples", "prm.path": "--prm", "model.path": "MODEL_OR_RUN", "method": "MODEL_OR_RUN",
    "out": "--json",
}  # fmt: skip


@dataclass(frozen=True)
class Request:
    """A command line, understood. folder: of the model, or its name on the hub or of an embedded one; empty for the
    checkpoint of a step. run: the run directory, if that is what was named."""

    folder: str
    run: Path | None
    step: int | None
    config: Config
    suite: Suite | None
    ks: tuple[int, ...]
    samples: int | None
    temperature: float
    prompts: int | None
    own_data: bool
    tasks: tuple[str, ...]
    prm: str | None
    json: Path | None
    least_samples: int = 0  # what a --k that was asked for needs, whatever a benchmark's own number is


def parse(arguments: list[str], description: str) -> Request:
    """A command line, validated. ValueError, or FileNotFoundError, for what cannot be; --help exits."""
    parser = argparse.ArgumentParser(
        usage=USAGE, description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--task", help="of the suite's benchmarks, or of reasoning-gym's tasks, only these: a,b")
    add("--k", help=f"k of pass@k and maj@k, say 1,4,8 (default: {','.join(map(str, KS))})")
    add("--step", type=int, help="of a run directory: the checkpoint of that step instead of its export")
    add("--samples", type=int, help="responses to a problem (default: the suite's, or the largest k)")
    add("--temperature", type=float, help="(default: evaluation.temperature)")
    add(
        "--prompts",
        type=int,
        help="most problems of each benchmark of --suite, or of --data.path (default: all rows); with neither, of all "
        "tasks together (default: evaluation.prompts)",
    )
    add("--engine", help="auto, vllm or transformers (default: rollout.engine)")
    add("--seed", type=int, help="of the samples and of the bootstrap")
    add(
        "--prm",
        help="folder or hub name of a process reward model for the near-miss share (default: embedded tasks' own "
        "checkers); --prm.kind says of which kind it is: with exact, and by default, a token classifier",
    )
    add("--suite", help="a suite's YAML file or preset, say eval/paper; it says data.* and verifier.score itself")
    add("--data-dir", help="read the suite's benchmarks from files NAME.jsonl, .parquet, .json or .csv of this folder")
    add("--json", type=Path, help="where the results go (default: in the run directory, see above)")
    if arguments and arguments[0] in ("-h", "--help"):
        parser.print_help()
        raise SystemExit(0)
    if not arguments or arguments[0].startswith("-"):
        raise ValueError(f"usage: {USAGE}")
    options, rest = parser.parse_known_args(arguments[1:])
    if options.data_dir and not options.suite:
        raise ValueError("--data-dir holds the files of a suite: name it with --suite")
    suite = load_suite(options.suite, options.data_dir) if options.suite else None
    pairs = overrides(rest)
    # sections key by key, so that what is in them is seen here
    asked = {name: text for key, value in pairs for name, text in dotted({key: read_value(key, value)})}
    for key in asked if suite else ():
        if set_by_benchmark(key):
            raise ValueError(f"--{key}: every benchmark of --suite {options.suite} has its own; change it in the file")
    for key, instead in INSTEAD.items():
        if key in asked and not (key == "model.path" and options.step is not None):
            raise ValueError(f"--{key} is a run's: an evaluation is told by {instead}")
    named = {"rollout.engine": options.engine, "seed": options.seed, "evaluation.temperature": options.temperature}
    pairs += [(key, str(value)) for key, value in named.items() if value is not None]
    run, folder, base = locate(arguments[0], options.step)
    pairs = [*(dotted(suite.config) if suite else ()), *pairs]
    if options.prm is not None:
        kind = json.loads(dict([*pairs, *asked.items()]).get("prm.kind", "null")) or load(base, of_a_run=True).prm.kind
        named = {"prm.path": options.prm, "prm.kind": "token_classifier" if kind == "exact" else kind}
        pairs += [(key, json.dumps(value, ensure_ascii=False)) for key, value in named.items()]
    config = load(base, pairs, of_a_run=run is not None)
    own_data = suite is None and "data.path" not in asked
    parts = ["evaluation"] if own_data else ["evaluation", Path(options.suite or config.data.path or "tasks").stem]
    results = "_".join([*parts, *([] if options.step is None else [f"step_{options.step}"])]) + ".json"
    return _checked(
        Request(
            folder, run, options.step, config, suite, _ks(options.k), options.samples,
            config.evaluation.temperature, options.prompts, own_data,
            tuple(name.strip() for name in options.task.split(",")) if options.task else (),
            options.prm, options.json or (run / results if run else None),
        )
    )  # fmt: skip


def locate(name: str, step: int | None = None) -> tuple[Path | None, str, Path | None]:
    """(run directory, `Request.folder`, configuration file) of MODEL_OR_RUN."""
    path = Path(name)
    if step is not None:
        if not (path / "checkpoints" / f"step_{step}").is_dir():
            raise ValueError(f"--step {step}: {name} has no checkpoints/step_{step}")
        return path, "", path / "config.yaml"
    if (path / "config.yaml").is_file():
        if not (path / "export" / "config.json").is_file():
            raise ValueError(f"{name} is a run without an export: it has not finished")
        return path, str(path / "export"), path / "config.yaml"
    if not path.exists() and path.parent != Path() and any(path.parent.glob("*/config.yaml")):  # none of the hub's
        raise ValueError(f"{name}: there is no such run in {path.parent}")
    if path.exists() and not (path / "config.json").is_file():
        raise ValueError(f"{name} is neither a run directory (config.yaml) nor a Hugging Face folder (config.json)")
    return None, name, None


def _ks(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    if not all(part.strip().isdigit() and int(part) for part in text.split(",")):
        raise ValueError(f"--k {text}: expected numbers from 1 on, say 1,4,8")
    return tuple(sorted({int(part) for part in text.split(",")}))


def _checked(request: Request) -> Request:
    """Fills in the defaults of --k, and refuses what cannot be evaluated."""
    for name in ("samples", "prompts"):
        if getattr(request, name) is not None and getattr(request, name) < 1:
            raise ValueError(f"--{name} {getattr(request, name)}: expected at least 1")
    ks = request.ks or tuple(k for k in KS if request.samples is None or k <= request.samples)
    if request.samples is not None and request.samples < ks[-1]:
        raise ValueError(f"--k {ks[-1]} needs at least as many samples, --samples is {request.samples}")
    known = list(request.suite.benchmarks) if request.suite else sorted(TASKS)
    for task in request.tasks:
        if task not in known and (request.suite is not None or task not in GENERATORS):
            more = "" if request.suite else ", and reasoning-gym's generators"
            raise ValueError(f"--task {task}: known here: {', '.join(known)}{more}")
    if request.json is not None and request.json.is_dir():
        raise ValueError(f"--json {request.json}: that is a folder, expected a file")
    if request.tasks and request.suite is None and request.config.data.path is not None:
        raise ValueError("--task names embedded tasks or benchmarks of a suite, and data.path is neither")
    return replace(request, ks=ks, least_samples=request.ks[-1] if request.ks else 0)
