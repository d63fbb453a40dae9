"""`python -m scope_fast.train [CONFIG.yaml] [--dotted.key value ...]`: from a configuration to a run directory.

Without arguments it runs configs/quickstart.yaml. A run directory holds config.yaml, environment.jsonl, metrics.jsonl,
rollouts.jsonl, tensorboard/, checkpoints/step_N, export/ (a Hugging Face folder) and report.html.

`torchrun --nproc-per-node N -m scope_fast.train ...` runs the same on N ranks: the learner is sharded over them, each
samples its share of the prompts with an engine of its own, rank 0 writes the files and prints (any rank prints the
error that ends it).

Exit status: 0 when the run is done, or was stopped by SIGTERM or Ctrl-C with a checkpoint; 1 when it cannot go on (a
full disk, updates that keep failing, an error in a step) or a replay differs; 2 when the request itself is invalid.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from torch.distributed.elastic.multiprocessing.errors import record
from transformers.utils.logging import disable_progress_bar

from scope_fast import checkpoint, distributed, environment, health, plan, replay
from scope_fast.build import build, load_student, make_learner, role_folder, to_be_made
from scope_fast.config import Config
from scope_fast.config_files import load, overrides, to_yaml
from scope_fast.files import WriteFailed, sync, writing
from scope_fast.interrupt import Interrupt, Stopped
from scope_fast.metrics import MetricsWriter
from scope_fast.progress import console, progress_bars
from scope_fast.report import write_report
from scope_fast.resume import check_claim, claim, finished, forget_last
from scope_fast.tasks import check_name
from scope_fast.trainer import Trainer

USAGE = (
    "python -m scope_fast.train [CONFIG.yaml] [--dotted.key value ...] [--resume auto|never|DIR] [--dry-run]\n"
    "       python -m scope_fast.train --replay RUN/rollouts.jsonl[:STEP] [--dotted.key value ...]"
)


@record  # under torchrun the reason of the rank that failed first goes on top
def main(argv: list[str] | None = None) -> int:
    try:
        distributed.claim_gpu()  # before `parse`, which asks CUDA what model.dtype auto stands for
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    config, resume, dry_run, source = parse(argv)
    with distributed.process_group(config.distributed.timeout_s):
        console.quiet = not distributed.is_main()
        return run(config, resume, dry_run, source)


def run(config: Config, resume: str, dry_run: bool, source: replay.Source | None) -> int:
    """Runs the command; its exit status. An error a person can fix ends with its message alone, any other with its
    traceback too."""
    begun = False
    try:
        if source is not None:
            return show_replay(config, source)
        if dry_run:
            console.print(to_yaml(config), markup=False, end="")
            console.print("\n".join([plan.describe(config), *to_be_made(config)]), markup=False)
            check_claim(config, resume)
            return 0
        start = claim(config, resume)
        if finished(config, start):
            console.print(f"{config.run_dir} has finished its {config.steps} steps: nothing to do", markup=False)
            return 0
        with Interrupt() as interrupt, ExitStack() as stack:
            trainer = build(config, stack, interrupt.stop_if_told)
            begun = True
            train(trainer, start, stack, interrupt)
    except Stopped as stopped:
        console.print(str(stopped), markup=False)
    except (WriteFailed, health.Unhealthy, TimeoutError) as error:
        if not raised_here(error):
            traceback.print_exc()
        say(error)
        if isinstance(error, WriteFailed):
            console.print("what was saved before is intact: make room and run the same command again to resume from it")
        return 1
    except (ValueError, FileNotFoundError, ImportError) as error:  # what is asked for cannot be
        if begun or not raised_here(error):
            traceback.print_exc()
        say(error)
        return 1 if begun else 2
    return 0


def raised_here(error: Exception) -> bool:
    """Whether this package raised the error, so that its message suffices; a library's needs the traceback."""
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return raised_in.is_relative_to(Path(__file__).parent)


def say(error: Exception) -> None:
    """Prints the message that ends a run; on the otherwise quiet ranks too, since only one of them may have it."""
    if distributed.is_main():
        console.print(f"error: {error}", markup=False)
    else:
        print(f"error on rank {distributed.rank()}: {error}", file=sys.stderr, flush=True)


def parse(argv: list[str] | None) -> tuple[Config, str, bool, replay.Source | None]:
    """(configuration, resume mode, dry run, what to replay) of a command line; exits with 2 and the message if bad."""
    arguments = sys.argv[1:] if argv is None else argv
    # the positional comes first or not at all: argparse would take the value of an unknown option for it
    path = arguments[0] if arguments and not arguments[0].startswith("-") else None
    parser = argparse.ArgumentParser(usage=USAGE, description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--resume",
        default="auto",
        help="auto: go on where the run directory stands; never; or a run directory, with its configuration where none "
        "is named",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="validate, print the resolved configuration and the plan"
    )
    parser.add_argument(
        "--replay", metavar="FILE[:STEP]", help="feed a step's rollouts through the learner alone, and compare"
    )
    known, rest = parser.parse_known_args(arguments[path is not None :])
    try:
        if known.replay is not None:
            if known.dry_run or known.resume != "auto":
                raise ValueError("--replay goes without --dry-run and --resume")
            source = replay.find(known.replay)
            if path is not None:
                raise ValueError(f"--replay takes the run's own configuration, not {path}")
            config = load(source.run_dir / "config.yaml", overrides(rest), of_a_run=True)
            return config.model_copy(update={"out": str(source.run_dir)}), "auto", False, source
        pairs = overrides(rest)
        if known.resume in ("auto", "never"):
            config = load(path, pairs)
        else:
            run = Path(known.resume).expanduser()
            if not (run / "config.yaml").exists():
                raise ValueError(f"--resume {known.resume}: no run there (no config.yaml)")
            out = dict(pairs).get("out", known.resume)
            if Path(out).expanduser().resolve() != run.resolve():
                raise ValueError(f"--resume {known.resume} resumes in that directory, not in --out {out}")
            config = load(path or run / "config.yaml", pairs, of_a_run=path is None)
            config = config.model_copy(update={"out": known.resume})
        if config.data.path is None:
            for name in config.data.tasks:
                check_name(name)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    return config, known.resume, known.dry_run, None


def train(trainer: Trainer, start: Path | None, stack: ExitStack, interrupt: Interrupt) -> None:
    """The run: evaluation before, the steps, evaluation after, export and report; or what a checkpoint left of it.

    A signal ends it between two steps, after a checkpoint; what follows the last step then waits for the next start.
    """
    config, out = trainer.config, trainer.config.run_dir
    if start is not None:
        trainer.load_state_dict(checkpoint.load(start, trainer.state_dict()))
        console.print(f"resumed from {start} at step {trainer.done}", markup=False)
    elif (out / "metrics.jsonl").exists():
        console.print(f"{out} holds no checkpoint: starting over", markup=False)
    resume_step = -1 if start is None else trainer.done
    write = metrics_writer(config, resume_step, stack)
    if distributed.is_main():
        write_environment(out, resume_step, trainer.engine.name)
    if start is None:
        if config.rollout.server_url is not None:  # an earlier run may have left it other weights, or paused
            trainer.engine.update_weights(trainer.learner.model, 0)
        write(0, {"eval/pass_rate_before": held_out(trainer, "before")}, show=False)
    if interrupt.requested():
        console.print("stopped before its next step: nothing to save")
        return
    for step, metrics in trainer.run():
        write(step, metrics)
        stopped = interrupt.requested()
        if step == config.steps:
            forget_last(out)
        if stopped or step == config.steps or (config.checkpoint.every and step % config.checkpoint.every == 0):
            save(trainer)
        if stopped:
            console.print(f"stopped after step {step}, which is saved: the same command goes on from there")
            return
    write(config.steps, {"eval/pass_rate": held_out(trainer, "after")}, show=False)
    checkpoint.export(out, trainer.learner.model, trainer.tokenizer)
    if config.logging.report and distributed.is_main():
        with writing("the report", out / "report.html"):
            console.print(f"report: {write_report(out)}", markup=False)


def write_environment(out: Path, resume_step: int, engine: str) -> None:
    """What the steps that follow run with; says what of it is no longer as it was."""
    path = out / "environment.jsonl"
    with writing("the environment", path):
        changed = environment.record(path, resume_step, environment.now(engine))
    if changed:
        console.print(f"{out} resumes in another environment: {'; '.join(changed)}", markup=False)


def save(trainer: Trainer) -> None:
    """A checkpoint of where the run stands, once the logs it would be resumed with are on the disk. Collective."""
    out = trainer.config.run_dir
    if distributed.is_main():
        for name in ("metrics.jsonl", "rollouts.jsonl"):
            with writing(name, out / name):
                sync(out / name)
    checkpoint.save(out, trainer.done, trainer.state_dict(), trainer.config.checkpoint.keep)


def show_replay(config: Config, source: replay.Source) -> int:
    """Replays a step and prints what the learner said then and says now: 0 if both are the same, else 1."""
    disable_progress_bar()
    folder = None
    if distributed.is_main():
        with progress_bars(console) as progress:
            folder = role_folder(config, "student", progress)
    student = load_student(config, distributed.agree(folder))
    status = 0
    for result in replay.replay(make_learner(config, student), source, config.rollout.prompts_per_step):
        status |= bool(result.differing)
        verdict = f"differs in {', '.join(result.differing)}" if result.differing else "the same"
        console.print(f"step {result.step} replayed: {verdict}", markup=False)
    for name in result.names:
        mark = "  <- differs" if name in result.differing else ""
        line = f"{name:26} logged {result.logged.get(name)!r:24} now {result.now.get(name)!r:24}{mark}"
        console.print(line, markup=False)
    return status


def metrics_writer(config: Config, resume_step: int, stack: ExitStack) -> Callable[..., None]:
    """`MetricsWriter.write` on rank 0; on the others a function that writes nothing."""
    if not distributed.is_main():
        return lambda step, metrics, show=True: None
    wandb = None
    if config.logging.wandb_project:  # what may change between the parts of a run, does so in W&B's copy too
        whole = config.model_dump(mode="json")
        wandb = {"project": config.logging.wandb_project, "config": whole, "allow_val_change": True}
        wandb["name"] = config.run_dir.name
    health.forget_failed(config.run_dir, max(resume_step, 0))
    writer = MetricsWriter(config.run_dir, config.steps, config.method, wandb, resume_step=resume_step)
    return stack.enter_context(writer).write


def held_out(trainer: Trainer, when: str) -> float:
    """Pass rate on the held-out prompts, printed."""
    settings = trainer.config.evaluation
    prompts = trainer.data.heldout[: settings.prompts]
    samples = settings.samples if settings.temperature > 0.0 else 1  # the others would be the same
    rate, lost = trainer.pass_rate(prompts, samples, settings.temperature)
    console.print(
        f"held-out pass rate {when}: {100 * rate:.1f} % ({len(prompts)} prompts x {samples}, "
        f"temperature {settings.temperature:g}{f', {lost} without a verdict' if lost else ''}"
        f"{''.join(f', {name} {count}' for name, count in trainer.data.heldout_counts.items())})"
    )
    return rate


if __name__ == "__main__":
    end = distributed.leave if distributed.under_torchrun() else sys.exit
    end(main())
