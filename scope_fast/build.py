"""A run's parts from its configuration: models, data, engine, learner, judge, teacher; and the `Trainer` of all."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, closing

import torch
from transformers import AutoConfig, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from scope_fast import attention, convert_gguf, distributed, sharding, warm_start
from scope_fast.build_checks import check_classes, check_context, check_here, check_sampled_by, check_teacher_tokenizer
from scope_fast.config import Config
from scope_fast.data import PromptSource
from scope_fast.interrupt import Stopped
from scope_fast.learner import Learner
from scope_fast.loading import loading, pretrained
from scope_fast.prm.load import check_prm_tokenizer, make_scorer
from scope_fast.progress import console, progress_bars
from scope_fast.records import RolloutLog
from scope_fast.rollout import make_engine
from scope_fast.rollout.base import EngineOptions
from scope_fast.teacher import ModelTeacher, SolverTeacher, Teacher
from scope_fast.teacher_endpoint import EndpointTeacher
from scope_fast.trainer import Trainer
from scope_fast.verifier import Verifier

ROLES = ("student", "prm", "teacher")
MODELLESS = (("prm", "exact"), ("teacher", "solver"), ("teacher", "endpoint"))  # roles and their kinds


def build(config: Config, stack: ExitStack, between: Callable[[], None] = lambda: None) -> Trainer:
    """All parts of a run, the made ones cached; `stack` closes them. Collective.

    between: called at every optimiser step of a model that is made; may raise Stopped.
    """
    check_here(config)
    disable_progress_bar()  # of transformers' loading: ours is enough
    folders = role_folders(config, between)
    torch.manual_seed(config.seed + distributed.rank())
    # what can be wrong with data, verifier and teacher shows before a model is loaded and an engine is up
    tokenizer = load_tokenizer(folders["student"])
    data = PromptSource(config, tokenizer)
    try:
        verifier = Verifier(config.verifier.score, config.verifier.workers, config.verifier.timeout_s)
    except ValueError as error:
        raise ValueError(f"verifier.{error}") from None
    stack.enter_context(verifier)
    check_context(config, folders["student"])
    for role, check in (("prm", check_prm_tokenizer), ("teacher", check_teacher_tokenizer)):
        if folders[role] is not None:
            with loading(f"{role}.path", folders[role]):
                AutoConfig.from_pretrained(folders[role])
            check(config, folders[role], tokenizer)
    teacher = None if folders["teacher"] else make_teacher(config, None, tokenizer, stack)
    student = load_student(config, folders["student"])
    check_sampled_by(config.rollout.engine, student)
    engine = stack.enter_context(
        closing(make_engine(config.rollout.engine, str(folders["student"]), engine_options(config)))
    )
    check_classes(engine, "rollout.engine", folders["student"], "vllm_server")
    learner = make_learner(config, student)
    trainer = Trainer(
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
    learner.check()  # beside all engines
    return trainer


def make_learner(config: Config, student) -> Learner:
    """The learner of a run, sharded where there are several ranks."""
    return Learner(
        student,
        config.learner,
        config.loss_options(),
        total_steps=config.steps,
        joint_normalizer=config.loss.nll_normalizer == "joint",
        backend=config.loss.backend,
        compute_dtype=getattr(torch, config.model.dtype),
        mesh=(
            sharding.make_mesh(config.learner.shard_size, config.distributed.timeout_s)
            if distributed.world_size() > 1
            else None
        ),
    )


def role_folders(config: Config, between: Callable[[], None]) -> dict[str, str | None]:
    """Every role's `role_folder`: rank 0 makes what is to be made, the others find it. What `between` raises while
    models are made (Stopped) ends all ranks. Collective."""
    folders = stopped = None
    if distributed.is_main():
        with progress_bars(console) as bars:

            def progress(*at: object) -> None:
                between()
                bars(*at)

            try:
                folders = {role: role_folder(config, role, progress) for role in ROLES}
            except Stopped as told:
                stopped = told
    folders, stopped = distributed.agree((folders, stopped))
    if stopped is not None:
        raise stopped
    return folders


def role_folder(config: Config, role: str, progress) -> str | None:
    """The model folder of a role: the configured path, a warm-started one, or None where the role has no model, or the
    method does not ask it."""
    path = _role_path(config, role)
    if path == "tiny":
        return str(warm_start.ensure(config, role, progress))
    return str(convert_gguf.ensure(config.cache)) if path == convert_gguf.NAME else path


def to_be_made(config: Config) -> list[str]:
    """A line for each model that a run would make first."""
    tiny = [role for role in ROLES if _role_path(config, role) == "tiny"]
    return [warm_start.making(config, role) for role in tiny if not warm_start.find(config, role).is_dir()]


def _role_path(config: Config, role: str) -> str | None:
    section = {"student": config.model, "prm": config.prm, "teacher": config.teacher}[role]
    asked = {"student": True, "prm": config.scores_steps, "teacher": config.repairs}[role]
    return None if not asked or (role, getattr(section, "kind", None)) in MODELLESS else section.path


def load_tokenizer(folder: str):
    """The student's. ValueError for a folder or hub name that has none, or one without an end-of-sequence token."""
    with loading("model.path", folder):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"model.path: the tokenizer of {folder} has no EOS token, which ends every response")
    return tokenizer


def load_student(config: Config, folder: str):
    """The student's model. ValueError for a folder or hub name that has none, or not all of its weights."""
    from transformers import AutoModelForCausalLM

    attend = attention.implementation(getattr(torch, config.model.dtype), config.learner.attention)
    # float32 whatever model.dtype says: a bfloat16 weight would lose an update of 1e-6: the learner casts instead
    how = {"dtype": torch.float32, "attn_implementation": attend}
    model = pretrained("model.path", AutoModelForCausalLM, folder, **how)
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
    options = EngineOptions(
        dtype=config.model.dtype,
        max_model_len=config.rollout.context,
        num_threads=config.rollout.num_threads,
        kv_cache_bytes=int(config.rollout.kv_cache_gib * 2**30),
        gpu_memory_utilization=settings.gpu_memory_utilization,
    )
    engine = stack.enter_context(closing(make_engine(settings.engine, folder, options, role="teacher")))
    check_classes(engine, "teacher.engine", folder, "transformers")
    return ModelTeacher(engine, tokenizer, settings, config.rollout.context, config.seed)
