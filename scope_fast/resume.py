"""A run directory and what may go on in it: claimed by the same configuration, finished, or made unfinished again."""

from __future__ import annotations

import shutil
from pathlib import Path

from scope_fast import checkpoint, distributed
from scope_fast.config import Config
from scope_fast.config_files import load, to_yaml
from scope_fast.files import WriteFailed, write_whole, writing
from scope_fast.jsonl import read_jsonl
from scope_fast.progress import console

MAY_CHANGE = frozenset(  # between the parts of a resumed run: what places and paces the work, and no formula
    {"steps", "out", "cache", "checkpoint", "logging", "distributed", "model.config"}
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
LAST = ("export", "report.html")  # what is made after the last step, in this order


def claim(config: Config, resume: str) -> Path | None:
    """Takes the run directory, and returns the checkpoint to go on from, if any.

    Raises ValueError if a run of another configuration began there, or any at all with `--resume never`; if it went
    further than `steps`, or its checkpoints are lost. What only places and paces the work may change between the parts
    of a run (MAY_CHANGE), and `steps`, unless the learning rate's schedule depends on it.
    """
    start, refusal = checkpoint.latest(config.run_dir), None
    if distributed.is_main():
        try:
            _claim_folder(config, resume, start)
        except (ValueError, WriteFailed) as error:
            refusal = type(error), str(error)
    if refusal := distributed.agree(refusal):
        raise refusal[0](refusal[1])
    return start


def _claim_folder(config: Config, resume: str, start: Path | None) -> None:
    folder = config.run_dir
    with writing("the run directory", folder):
        folder.mkdir(parents=True, exist_ok=True)
    old = check_claim(config, resume)
    if old is not None:
        _check_progress(config, start)
        if finished(config, start):  # its configuration stays what it ran with
            return
        if changed := _differences(old, config.model_dump(), QUIET_CHANGES):
            console.print(f"{folder} resumes with other values of {', '.join(changed)}", markup=False)
    stored, text = folder / "config.yaml", to_yaml(config)
    if not stored.exists() or stored.read_text(encoding="utf-8") != text:
        write_whole(stored, text, "the configuration")


def check_claim(config: Config, resume: str) -> dict | None:
    """The configuration of the run that the directory holds, None where it holds none; writes nothing. ValueError for a
    run that this configuration cannot go on with."""
    folder = config.run_dir
    stored = folder / "config.yaml"
    if stored.exists() and (folder / "metrics.jsonl").exists():
        if resume == "never":
            raise ValueError(f"out: {folder} already holds a run; choose another directory or --resume auto")
        free = MAY_CHANGE if config.learner.schedule == "constant" else MAY_CHANGE - {"steps"}
        old, new = load(stored, of_a_run=True).model_dump(), config.model_dump()
        if different := _differences(old, new, free):
            names, why = ", ".join(different), ""
            if "steps" in different:
                why = ", and under learner.schedule every update depends on steps"
            raise ValueError(
                f"out: {folder} holds a run of another configuration (other values of {names}{why}); choose another "
                "directory: --out DIR"
            )
        return old
    return None


def _check_progress(config: Config, start: Path | None) -> None:
    """ValueError for a run that is further than it should go, or whose logs would be emptied though it was once saved:
    its checkpoints are damaged, or they are gone and its export is there."""
    folder = config.run_dir
    if start is not None:
        if (done := checkpoint.step_of(start)) > config.steps:
            raise ValueError(f"steps={config.steps}: the run in {folder} has already done {done}")
        return
    if any((folder / "checkpoints").glob("step_*")) or (folder / "export").exists():
        logged = max((record["step"] for _, _, record in read_jsonl(folder / "metrics.jsonl")), default=0)
        raise ValueError(
            f"out: {folder} holds {logged} steps and no whole checkpoint to go on from; move it away to start over, or "
            "choose another directory"
        )


def finished(config: Config, start: Path | None) -> bool:
    """Whether nothing of the run is left to do: its last step is saved, and what follows the last step is there."""
    whole = start is not None and checkpoint.step_of(start) >= config.steps
    return whole and all((config.run_dir / name).exists() for name in LAST[: 1 + config.logging.report])


def forget_last(out: Path) -> None:
    """Removes what followed the last step of a shorter run: `finished` must not take it for this one's."""
    if distributed.is_main():
        with writing("the removal of an older export", out):
            if (out / "export").exists():
                shutil.rmtree(out / "export")
            (out / "report.html").unlink(missing_ok=True)


def _differences(old: dict, new: dict, free: frozenset[str] = frozenset(), prefix: str = "") -> list[str]:
    found = []
    for key in (key for key in new if f"{prefix}{key}" not in free):
        if isinstance(new[key], dict) and isinstance(old[key], dict) and new[key].keys() == old[key].keys():
            found += _differences(old[key], new[key], free, prefix=f"{prefix}{key}.")
        elif old[key] != new[key]:
            found.append(f"{prefix}{key}")
    return found
