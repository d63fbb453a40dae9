"""The run's numbers: one vocabulary of metric names, and the writer of metrics.jsonl, TensorBoard and W&B.

metrics.jsonl holds one object a line, {"step": 3, "reward/mean": 0.41, ...}; a metric that is undefined in a step is
left out.
"""

from __future__ import annotations

import difflib
import importlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from scope_fast.files import Log, WriteFailed, writing
from scope_fast.jsonl import cut_back
from scope_fast.progress import StepDisplay


@dataclass(frozen=True)
class Metric:
    """unit: "share" (of 1), "nats", "tokens", "steps", "s", "count", "ratio", "rate", "loss", "reward" or
    "updates"."""

    unit: str
    description: str


METRICS: dict[str, Metric] = {
    "reward/mean": Metric("reward", "Mean reward of what has a verdict, repaired rollouts in the place of failed ones"),
    "reward/pass_rate": Metric("share", "Rollouts whose answer the verifier accepts, before any repair"),
    "eval/pass_rate": Metric("share", "Pass rate on held-out prompts"),
    "eval/pass_rate_before": Metric("share", "Pass rate on held-out prompts before the first step"),
    "scope/failed": Metric("count", "Rollouts without a reward above 0"),
    "scope/selected": Metric("count", "Rollouts chosen for repair: failed ones, of sft the first of every group"),
    "scope/repaired": Metric("count", "Chosen rollouts the teacher gave a suffix for"),
    "scope/accepted": Metric("count", "Repaired rollouts that passed verification"),
    "scope/rejected": Metric("count", "Repaired rollouts that did not"),
    "scope/near_miss_rate": Metric(
        "share", "Failed rollouts of which the judge finds only the last step wrong, or none"
    ),
    "scope/prefix_ratio": Metric("share", "Tokens before the first error over all tokens of a failed rollout"),
    "scope/first_error": Metric("steps", "Steps before the first error of a failed rollout"),
    "scope/empty": Metric("count", "Rollouts with an empty completion"),
    "scope/no_prefix": Metric("count", "Failed rollouts that would keep no step (the first is wrong, or the only one)"),
    "loss/rl": Metric("loss", "Clipped policy gradient on the student's own tokens"),
    "loss/nll": Metric("loss", "Weighted likelihood on the teacher's tokens"),
    "loss/total": Metric("loss", "loss/rl + loss/nll"),
    "grad/norm": Metric("ratio", "Norm of the gradient before clipping"),
    "policy/clip_fraction": Metric("share", "Policy-gradient tokens whose clipped branch is taken"),
    "policy/entropy": Metric("nats", "Entropy at the policy-gradient tokens that reached the head"),
    "policy/kl": Metric("nats", "KL(old || new) of the policy before the update and now, k3 estimate: r - 1 - log r"),
    "policy/ratio_max": Metric("ratio", "Largest probability ratio"),
    "sampling/entropy": Metric("nats", "Minus the engine's mean log-probability of the tokens it sampled"),
    "sampling/logprob_gap": Metric("nats", "Learner against engine: largest difference in a token's log-probability"),
    "sampling/staleness": Metric("updates", "Updates between the weights that drew a token and those it trains, mean"),
    "response/length": Metric("tokens", "Mean response length"),
    "response/truncated": Metric("share", "Responses that ran into the token limit"),
    "diversity/distinct_1": Metric("ratio", "Distinct tokens over all tokens of a prompt's rollouts, prompt median"),
    "diversity/distinct_4": Metric("ratio", "Distinct 4-grams over all 4-grams of a prompt's rollouts, prompt median"),
    "diversity/unique_answers": Metric("count", "Different final answers a prompt, mean"),
    "verifier/timeouts": Metric("count", "Verifications that ran out of time, of rollouts and of repairs"),
    "verifier/crashes": Metric("count", "Verifications that crashed, of rollouts and of repairs"),
    "prm/invalid": Metric("count", "Rollouts with a step probability that is no probability"),
    "teacher/errors": Metric("count", "Chosen rollouts the teacher gave no suffix for"),
    **{
        f"teacher/{name}": Metric("count", f"Endpoint teacher: {name.replace('/', ', ').replace('_', ' ')}")
        for name in (
            "requests",
            "finished",
            "unfinished",
            "cached",
            "retries",
            "no_usage",
            "cache_failed",
            "error/budget",
            "error/cache",
            "error/deadline",
            *(
                f"{kind}/{why}"
                for kind in ("fault", "error")
                for why in (
                    "rate_limit",
                    "server",
                    "timeout",
                    "connection",
                    "bad_json",
                    "empty",
                    "refused",
                    "unexpected",
                )
            ),
        )
    },
    "prompts/dropped": Metric("count", "Prompts without a single verified rollout"),
    "data/skipped_long": Metric("count", "Prompts skipped because they leave no room in the context"),
    "data/skipped_heldout": Metric("count", "Prompts passed over because their text is also a held-out one"),
    "data/skipped_short": Metric("count", "Prompts skipped because they are too short"),
    "learner/lr": Metric("ratio", "Learning rate"),
    "learner/skipped_updates": Metric("count", "Optimiser steps skipped for want of a finite loss and gradient"),
    "learner/out_of_memory": Metric("count", "Halvings of learner.token_budget after an out-of-memory error"),
    "sync/weight_version": Metric("count", "Version of the weights the engine holds"),
    "tokens/rollout": Metric("tokens", "Sampled by the engine"),
    "tokens/trained": Metric("tokens", "Rows of the loss with a gradient"),
    "tokens/skipped": Metric("tokens", "Rows dropped before the head, since nothing can flow from them"),
    "tokens/teacher": Metric("tokens", "Written by the teacher, used or not, in the student's tokens without EOS"),
    "perf/tokens_per_s": Metric("rate", "Tokens sampled, a second of the whole step"),
    "perf/model_flops": Metric("count", "Model FLOPs of the update, all devices together"),
    "perf/mfu": Metric("share", "Model FLOPs over what the devices' peak rate does in the learner's time"),
    "time/generate_s": Metric("s", "Sampling"),
    "time/verify_s": Metric("s", "Verification"),
    "time/prm_s": Metric("s", "Step probabilities"),
    "time/teacher_s": Metric("s", "Repairs"),
    "time/learn_s": Metric("s", "Forward, backward, optimiser"),
    "time/sync_s": Metric("s", "Weights to the engine"),
    "time/step_s": Metric("s", "The whole step"),
}


def check_name(name: str) -> None:
    """Raises ValueError for a name outside METRICS, with the nearest one."""
    if name not in METRICS:
        near = difflib.get_close_matches(name, METRICS, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown metric {name!r}; did you mean {near!r}? (names are in scope_fast.metrics.METRICS)")


def scalar(name: str, value: float | torch.Tensor) -> float | int:
    """A finite Python number out of a number or a one-element tensor; ValueError naming the metric otherwise."""
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name}: expected one value, got a tensor of shape {tuple(value.shape)}")
        value = value.item()
    if not isinstance(value, (int, float)):
        value = float(value)  # numpy scalars
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}: an undefined metric is left out, anything else is a defect")
    return value


def fold(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """One value a metric: the mean, of distinct-n the median (the paper's table says so); without values, none."""
    medians = ("diversity/distinct_1", "diversity/distinct_4")
    return {
        name: float(median(each)) if name in medians else fmean(map(float, each))
        for name, each in values.items()
        if each
    }


class MetricsWriter:
    """Writes each step's metrics to metrics.jsonl, TensorBoard and, when asked, W&B, and shows a line for it.

    out_dir: the run directory, made if missing. total_steps, method: for the display.
    wandb: arguments of wandb.init (project, name, mode, ...), or None for no W&B.
    resume_step: the last step to keep. metrics.jsonl and rollouts.jsonl are cut back to it, TensorBoard is told. None
        starts a run: FileExistsError if out_dir already holds metrics. -1 starts over, dropping what is there.

    One process writes (rank 0). A context manager: the display lives inside it, and leaving it closes the files.
    Raises ImportError where wandb is asked for and missing.
    """

    def __init__(
        self,
        out_dir: str | Path,
        total_steps: int,
        method: str,
        wandb: dict[str, Any] | None = None,
        tensorboard: bool = True,
        resume_step: int | None = None,
    ) -> None:
        self.out_dir = Path(out_dir)
        self.out_dir.mkdir(parents=True, exist_ok=True)
        wandb_module = None if wandb is None else import_wandb()
        self.last_step = self._prepare(resume_step)
        self._stack = ExitStack()
        self._file = Log(self.out_dir / "metrics.jsonl", "metrics")
        self._stack.callback(self._file.close)
        self._tensorboard = self._wandb = None
        self._events = self.out_dir / "tensorboard"
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            purge = None if resume_step is None else resume_step + 1
            with writing("TensorBoard's events", self._events):
                self._tensorboard = SummaryWriter(str(self._events), purge_step=purge)
            self._stack.callback(self._close_tensorboard)
        if wandb_module is not None:
            self._wandb = self._start_wandb(wandb_module, wandb, resuming=resume_step is not None)
        self._display = StepDisplay(total_steps, method, done=max(self.last_step, 0))

    def _prepare(self, resume_step: int | None) -> int:
        path = self.out_dir / "metrics.jsonl"
        if resume_step is None:
            if path.exists() and path.stat().st_size:
                raise FileExistsError(
                    f"{path} already holds metrics: resume it, choose another run directory, "
                    "or start over with resume_step=-1"
                )
            return -1
        cut_back(path, resume_step)
        cut_back(self.out_dir / "rollouts.jsonl", resume_step)
        return resume_step

    def _close_tensorboard(self) -> None:
        with writing("TensorBoard's events", self._events):
            self._tensorboard.close()

    def _start_wandb(self, module: Any, options: dict[str, Any], resuming: bool) -> Any:
        # the run's id is kept beside its metrics, so that a resumed run goes on in the same W&B run
        id_file = self.out_dir / "wandb_id"
        known = {"id": id_file.read_text().strip(), "resume": "allow"} if resuming and id_file.exists() else {}
        run = module.init(**{"dir": str(self.out_dir), **known, **options})
        id_file.write_text(f"{run.id}\n")
        return run

    def __enter__(self) -> MetricsWriter:
        self._stack.enter_context(self._display)
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        try:
            self._stack.close()
        except WriteFailed:
            if kind is None:  # else what ended the run counts; on a full disk every file fails again at its closing
                raise
        if self._wandb is not None:
            self._wandb.finish(exit_code=0 if kind is None else 1)

    def write(self, step: int, metrics: Mapping[str, float | torch.Tensor], *, show: bool = True) -> None:
        """Appends one line for `step` and flushes it; show=False leaves the display alone (an evaluation, say).

        Values are numbers or one-element tensors. A second write of the same step adds to it. Raises ValueError for an
        unknown name (with the nearest), a value that is not finite or not one value, and a step that goes back.
        """
        if step < max(self.last_step, 0):
            raise ValueError(f"step={step} after step {self.last_step}: steps only go on")
        for name in metrics:
            check_name(name)
        values = {name: scalar(name, value) for name, value in metrics.items()}
        self.last_step = step
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        if self._tensorboard is not None:
            with writing("TensorBoard's events", self._events):
                for name, value in values.items():
                    self._tensorboard.add_scalar(name, value, step)
                self._tensorboard.flush()
        if self._wandb is not None:
            self._wandb.log(values, step=step)
        if show:
            self._display.step(step, values)


def import_wandb() -> Any:
    """wandb, or ImportError with what to install."""
    try:
        return importlib.import_module("wandb")
    except ModuleNotFoundError as error:
        if error.name != "wandb":
            raise
        raise ImportError("W&B logging needs the wandb package: pip install 'scope-fast[wandb]'") from error


class Timer:
    """Seconds by phase: `with timer("generate"): ...`, then `metrics()` once a step.

    synchronize: called before a phase's clock is read (torch.cuda.synchronize on a GPU, where work is queued).
    """

    def __init__(self, synchronize: Callable[[], None] | None = None) -> None:
        self._synchronize = synchronize or (lambda: None)
        self._seconds: dict[str, float] = {}
        self._begun = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Adds the block's seconds to time/<phase>_s; ValueError for a phase that is no metric."""
        name = f"time/{phase}_s"
        check_name(name)
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._synchronize()
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - begun

    def metrics(self) -> dict[str, float]:
        """time/<phase>_s of the phases since the last call, and time/step_s, the seconds since then; starts anew."""
        now = time.perf_counter()
        result = {**self._seconds, "time/step_s": now - self._begun}
        self._seconds, self._begun = {}, now
        return result
