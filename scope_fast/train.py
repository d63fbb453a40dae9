"""`python -m scope_fast.train [CONFIG.yaml] [--dotted.key value ...]`: from a configuration to a run directory.

Without arguments it runs configs/quickstart.yaml. A run directory holds config.yaml, metrics.jsonl, rollouts.jsonl,
tensorboard/, checkpoints/step_N, export/ (a Hugging Face folder) and report.html.

`torchrun --nproc-per-node N -m scope_fast.train ...` runs the same on N ranks: the learner is sharded over them, each
samples its share of the prompts with an engine of its own, rank 0 writes and speaks (a rank says what ends it).

Exit status: 0 when the run is done, or was stopped by SIGTERM or Ctrl-C with a checkpoint; 1 when it cannot go on (a
full disk, updates that keep failing, an error in a step) or a replay differs; 2 for what is asked for and cannot be.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path

import torch
from rich.console import Console
from torch.distributed.elastic.multiprocessing.errors import record
from transformers.utils.logging import disable_progress_bar

from scope_fast import attention, checkpoint, convert_gguf, distributed, health, plan, replay, sharding, warm_start
from scope_fast.config import Config, load, overrides, to_yaml
from scope_fast.data import PromptSource
from scope_fast.files import WriteFailed, sync, write_whole, writing
from scope_fast.interrupt import Interrupt
from scope_fast.learner import Learner
from scope_fast.loading import loading
from scope_fast.metrics import MetricsWriter, RolloutLog
from scope_fast.prm.load import make_scorer
from scope_fast.progress import progress_bars
from scope_fast.report import write_report
from scope_fast.rollout import make_engine
from scope_fast.rollout.base import EngineOptions
from scope_fast.tasks import check_name
from scope_fast.teacher import ModelTeacher, SolverTeacher, Teacher, check_shared_tokenizer
from scope_fast.teacher_endpoint import EndpointTeacher
from scope_fast.trainer import Trainer
from scope_fast.verifier import Verifier

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
USAGE = (
    "python -m scope_fast.train [CONFIG.yaml] [--dotted.key value ...] [--resume auto|never|DIR] [--dry-run]\n"
    "       python -m scope_fast.train --replay RUN/rollouts.jsonl[:STEP] [--dotted.key value ...]"
)
MAY_CHANGE = frozenset(  # between the parts of a resumed run: what places and paces the work, and no formula
    {"steps", "out", "cache", "checkpoint", "logging", "distributed"}
    | {f"learner.{name}" for name in ("token_budget", "max_skipped_updates", "activation_checkpointing", "attention")}
    | {f"learner.{name}" for name in ("liger", "shard_size", "cpu_offload", "peak_tflops")}
    | {f"rollout.{name}" for name in ("engine", "server_url", "server_gpus", "server_workers", "transfer")}
    | {f"rollout.{name}" for name in ("transfer_address", "max_num_seqs", "kv_cache_gib", "sleep_level", "num_threads")}
    | {f"rollout.{name}" for name in ("sync_timeout_s", "start_timeout_s", "generate_timeout_s")}
    | {"rollout.gpu_memory_utilization"}
    | {"verifier.workers", "verifier.timeout_s", "prm.token_budget", "prm.gpu_memory_utilization"}
    | {f"teacher.{name}" for name in ("engine", "gpu_memory_utilization", "timeout_s")}
    | {f"teacher.endpoint.{name}" for name in ("url", "key_variable", "concurrency", "request_timeout_s", "retries")}
    | {f"teacher.endpoint.{name}" for name in ("backoff_s", "max_requests", "max_total_tokens", "cache")}
)
QUIET_CHANGES = frozenset({"steps", "out", "checkpoint", "logging"})  # the others are told: they may change roundings
MODELLESS = (("prm", "exact"), ("teacher", "solver"), ("teacher", "endpoint"))  # roles and their kinds
LAST = ("export", "report.html")  # what is made after the last step, in this order

console = Console(highlight=False, soft_wrap=True)  # a path is not broken in the middle


@record  # under torchrun the reason of the rank that failed first goes on top
def main(argv: list[str] | None = None) -> int:
    distributed.claim_gpu()
    config, resume, dry_run, source = parse(argv)
    with distributed.process_group(config.distributed.timeout_s):
        console.quiet = not distributed.is_main()
        return run(config, resume, dry_run, source)


def run(config: Config, resume: str, dry_run: bool, source: replay.Source | None) -> int:
    """The command's exit status; what a person can understand and mend ends with a message alone, others' with more."""
    begun = False
    try:
        if source is not None:
            return show_replay(config, source)
        if dry_run:
            console.print(to_yaml(config), markup=False, end="")
            console.print(plan.describe(config), markup=False)
            return 0
        start = claim(config, resume)
        if finished(config, start):
            console.print(f"{config.run_dir} has finished its {config.steps} steps: nothing to do", markup=False)
            return 0
        with Interrupt() as interrupt, ExitStack() as stack:
            trainer = build(config, stack)
            begun = True
            train(trainer, start, stack, interrupt)
    except (WriteFailed, health.Unhealthy) as error:
        say(error)
        if isinstance(error, WriteFailed):
            console.print("what was saved before is whole: make room and run the same command again to go on from it")
        return 1
    except (ValueError, FileNotFoundError, ImportError) as error:  # what is asked for cannot be
        if begun or not raised_here(error):
            traceback.print_exc()
        say(error)
        return 1 if begun else 2
    return 0


def raised_here(error: Exception) -> bool:
    """Whether this package raised it, with words for the person. A library's say little without the way to them."""
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return raised_in.is_relative_to(Path(__file__).parent)


def say(error: Exception) -> None:
    """The message that ends a run; of ranks that are otherwise quiet too, since one alone may know it."""
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
            source = replay.find(known.replay)
            if path is not None:
                raise ValueError(f"--replay takes the run's own configuration, not {path}")
            config = load(source.run_dir / "config.yaml", overrides(rest))
            return config.model_copy(update={"out": str(source.run_dir)}), "auto", False, source
        named = known.resume if known.resume not in ("auto", "never") else None
        if named is not None and not (Path(named).expanduser() / "config.yaml").exists():
            raise ValueError(f"--resume {named}: no run there (no config.yaml)")
        config = load(path if path or named is None else Path(named).expanduser() / "config.yaml", overrides(rest))
        if named is not None:
            config = config.model_copy(update={"out": named})
        if config.data.path is None:
            for name in config.data.tasks:
                check_name(name)
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    return config, known.resume, known.dry_run, None


def claim(config: Config, resume: str) -> Path | None:
    """Takes the run directory, and returns the checkpoint to go on from, if any.

    Raises ValueError if a run of another configuration began there, or any at all with `--resume never`. What only
    places and paces the work may change between the parts of a run (MAY_CHANGE), and `steps`, unless the learning
    rate's schedule depends on it.
    """
    refusal = None
    if distributed.is_main():
        try:
            _claim_folder(config, resume)
        except (ValueError, WriteFailed) as error:
            refusal = type(error), str(error)
    if refusal := distributed.agree(refusal):
        raise refusal[0](refusal[1])
    return checkpoint.latest(config.run_dir)


def _claim_folder(config: Config, resume: str) -> None:
    folder = config.run_dir
    with writing("the run directory", folder):
        folder.mkdir(parents=True, exist_ok=True)
    stored = folder / "config.yaml"
    if stored.exists() and (folder / "metrics.jsonl").exists():
        if resume == "never":
            raise ValueError(f"out: {folder} already holds a run; choose another directory or --resume auto")
        free = MAY_CHANGE if config.learner.schedule == "constant" else MAY_CHANGE - {"steps"}
        old, new = load(stored).model_dump(), config.model_dump()
        if different := _differences(old, new, free):
            raise ValueError(f"out: {folder} holds a run of another configuration ({', '.join(different)} differ)")
        if changed := _differences(old, new, QUIET_CHANGES):
            console.print(f"{folder} goes on with other values of {', '.join(changed)}", markup=False)
    text = to_yaml(config)
    if not stored.exists() or stored.read_text(encoding="utf-8") != text:
        write_whole(stored, text, "the configuration")


def finished(config: Config, start: Path | None) -> bool:
    """Whether nothing of the run is left to do: its last step is saved, and what follows the last step is there."""
    whole = start is not None and checkpoint.step_of(start) >= config.steps
    return whole and all((config.run_dir / name).exists() for name in LAST[: 1 + config.logging.report])


def _differences(old: dict, new: dict, free: frozenset[str] = frozenset(), prefix: str = "") -> list[str]:
    found = []
    for key in (key for key in new if f"{prefix}{key}" not in free):
        if isinstance(new[key], dict):
            found += _differences(old[key], new[key], free, prefix=f"{prefix}{key}.")
        elif old[key] != new[key]:
            found.append(f"{prefix}{key}")
    return found


def build(config: Config, stack: ExitStack) -> Trainer:
    """All parts of a run, the made ones cached; `stack` closes them. Collective."""
    ranks = distributed.world_size()
    if config.rollout.prompts_per_step < ranks:
        raise ValueError(
            f"rollout.prompts_per_step={config.rollout.prompts_per_step}: at least one for each of {ranks} ranks"
        )
    if config.rollout.server_gpus is not None and ranks > 1:
        raise ValueError(
            f"rollout.server_gpus: each of {ranks} ranks would start a server on them; start one and name it as "
            "rollout.server_url"
        )
    disable_progress_bar()  # of transformers' loading: ours is enough
    folders = None
    if distributed.is_main():  # the others find what rank 0 made
        with progress_bars(console) as progress:
            folders = {role: role_folder(config, role, progress) for role in ("student", "prm", "teacher")}
    folders = distributed.agree(folders)
    torch.manual_seed(config.seed + distributed.rank())
    # what can be wrong with data, verifier and teacher shows before a model is loaded and an engine is up
    tokenizer = load_tokenizer(folders["student"])
    data = PromptSource(config, tokenizer)
    verifier = Verifier(config.verifier.score, config.verifier.workers, config.verifier.timeout_s)
    stack.enter_context(verifier)
    teacher = None if folders["teacher"] else make_teacher(config, None, tokenizer, stack)
    student = load_student(config, folders["student"])
    engine = stack.enter_context(
        closing(make_engine(config.rollout.engine, str(folders["student"]), engine_options(config)))
    )
    learner = make_learner(config, student)
    return Trainer(
        config,
        tokenizer,
        data,
        engine,
        verifier,
        make_scorer(config, folders["prm"], tokenizer, stack),
        teacher or make_teacher(config, folders["teacher"], tokenizer, stack),
        learner,
        stack.enter_context(RolloutLog(config.run_dir)),
    )


def make_learner(config: Config, student) -> Learner:
    """The learner of a run, sharded where there are several ranks."""
    return Learner(
        student,
        config.learner,
        config.loss.options(config.rollout.temperature),
        total_steps=config.steps,
        joint_normalizer=config.loss.nll_normalizer == "joint",
        backend=config.loss.backend,
        compute_dtype=DTYPES[config.model.dtype],
        mesh=(
            sharding.make_mesh(config.learner.shard_size, config.distributed.timeout_s)
            if distributed.world_size() > 1
            else None
        ),
    )


def role_folder(config: Config, role: str, progress) -> str | None:
    """The model folder of a role: the configured path, a warm-started one, or None where the role has no model, or the
    method does not ask it."""
    section = {"student": config.model, "prm": config.prm, "teacher": config.teacher}[role]
    asked = {"student": True, "prm": config.scores_steps, "teacher": config.repairs}[role]
    if not asked or (role, getattr(section, "kind", None)) in MODELLESS:
        return None
    if section.path == "tiny":
        return str(warm_start.ensure(config, role, progress))
    return str(convert_gguf.ensure(config.cache)) if section.path == convert_gguf.NAME else section.path


def load_tokenizer(folder: str):
    """The student's. ValueError for a folder or hub name that has none, or one without an end-of-sequence token."""
    from transformers import AutoTokenizer

    with loading("model.path", folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model.path: the tokenizer of {folder} has no EOS token, which ends every response")
    return tokenizer


def load_student(config: Config, folder: str):
    """The student's model. ValueError for a folder or hub name that has none."""
    from transformers import AutoModelForCausalLM

    attend = attention.implementation(DTYPES[config.model.dtype], config.learner.attention)
    # float32 whatever model.dtype says: a bfloat16 weight would lose an update of 1e-6: the learner casts instead
    with loading("model.path", folder):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attend)
    if config.learner.liger:
        sharding.use_liger(model)
    # one of several ranks keeps its shards only: the whole model stays in host memory until they are cut
    return model if distributed.world_size() > 1 else model.to(distributed.device())


def engine_options(config: Config) -> EngineOptions:
    """What the rollout engine is told."""
    rollout = config.rollout
    return EngineOptions(
        dtype=config.model.dtype,
        max_model_len=rollout.context,
        max_num_seqs=min(rollout.max_num_seqs, rollout.prompts_per_step * rollout.group_size),
        seed=config.seed,
        num_threads=rollout.num_threads,
        kv_cache_bytes=int(rollout.kv_cache_gib * 2**30),
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        sleep_level=rollout.sleep_level,
        sync_timeout_s=rollout.sync_timeout_s,
        start_timeout_s=rollout.start_timeout_s,
        generate_timeout_s=rollout.generate_timeout_s,
        server_url=rollout.server_url,
        server_gpus=None if rollout.server_gpus is None else tuple(rollout.server_gpus),
        server_workers=rollout.server_workers,
        transfer=rollout.transfer,
        transfer_address=rollout.transfer_address,
    )


def make_teacher(config: Config, folder: str | None, tokenizer, stack: ExitStack) -> Teacher:
    """The teacher `teacher.kind` names; a model samples beside the student's engine. A method that repairs nothing asks
    none, and gets the one that costs nothing."""
    settings = config.teacher
    if settings.kind == "solver" or not config.repairs:
        return SolverTeacher(settings.styles, settings.keep_style)
    if settings.kind == "endpoint":
        endpoint = EndpointTeacher(settings, tokenizer, config.seed)
        endpoint.check()
        return endpoint
    from transformers import AutoTokenizer

    with loading("teacher.path", folder):
        check_shared_tokenizer(tokenizer, AutoTokenizer.from_pretrained(folder), "teacher.path")
    options = EngineOptions(
        dtype=config.model.dtype,
        max_model_len=config.rollout.context,
        num_threads=config.rollout.num_threads,
        kv_cache_bytes=int(config.rollout.kv_cache_gib * 2**30),
        gpu_memory_utilization=settings.gpu_memory_utilization,
    )
    engine = stack.enter_context(closing(make_engine(settings.engine, folder, options)))
    return ModelTeacher(engine, tokenizer, settings, config.rollout.context, config.seed)


def train(trainer: Trainer, start: Path | None, stack: ExitStack, interrupt: Interrupt) -> None:
    """The run: evaluation before, the steps, evaluation after, export and report; or what a checkpoint left of it.

    A signal ends it between two steps, after a checkpoint; what follows the last step then waits for the next start.
    """
    config, out = trainer.config, trainer.config.run_dir
    if start is not None:
        trainer.load_state_dict(checkpoint.load(start, trainer.state_dict()))
        console.print(f"resumed from {start} at step {trainer.done}", markup=False)
    elif (out / "metrics.jsonl").exists():
        console.print(f"{out} was stopped before its first checkpoint: starting over")
    write = metrics_writer(config, -1 if start is None else trainer.done, stack)
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


def forget_last(out: Path) -> None:
    """Removes what followed the last step of a shorter run: `finished` must not take it for this one's."""
    if distributed.is_main():
        with writing("the removal of an older export", out):
            if (out / "export").exists():
                shutil.rmtree(out / "export")
            (out / "report.html").unlink(missing_ok=True)


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
    wandb = {"project": config.logging.wandb_project} if config.logging.wandb_project else None
    health.forget_failed(config.run_dir, max(resume_step, 0))
    writer = MetricsWriter(config.run_dir, config.steps, config.method, wandb, resume_step=resume_step)
    return stack.enter_context(writer).write


def held_out(trainer: Trainer, when: str) -> float:
    """Pass rate on the held-out prompts, printed."""
    settings = trainer.config.evaluation
    prompts = trainer.data.heldout[: settings.prompts]
    rate, lost = trainer.pass_rate(prompts, settings.samples, settings.temperature)
    console.print(
        f"held-out pass rate {when}: {100 * rate:.1f} % ({len(prompts)} prompts x {settings.samples}, "
        f"temperature {settings.temperature:g}{f', {lost} without a verdict' if lost else ''}"
        f"{''.join(f', {name} {count}' for name, count in trainer.data.heldout_counts.items())})"
    )
    return rate


if __name__ == "__main__":
    sys.exit(main())
