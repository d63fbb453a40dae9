"""Steps of a run through the learner alone, from what the run left behind: the same loss and gradient norm, or why not.

    python -m scope_fast.train --replay RUN/rollouts.jsonl:7        step 7; without a number the file's last step
    python -m scope_fast.train --replay RUN/failed/step_7.jsonl     a batch without a finite loss and gradient

rollouts.jsonl holds every sequence the learner saw, so the state before any step can be had again: from the newest
checkpoint before it, or the initial weights, and the updates in between. No engine, verifier, teacher or reward model
takes part, so what differs from metrics.jsonl lies in the learner, its configuration or the machine (another number of
threads or ranks adds in another order).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from scope_fast import checkpoint, distributed
from scope_fast.batch import TrainSequence, minibatch_of
from scope_fast.jsonl import merged_steps, read_jsonl, read_step
from scope_fast.learner import Learner
from scope_fast.records import trained_sequence

OF_LEARNER = ("loss/", "policy/", "grad/", "learner/", "tokens/trained", "tokens/skipped", "sampling/logprob_gap")
OF_THE_MACHINE = "learner/out_of_memory"  # not of the batch: the only value of the learner that is not compared


@dataclass(frozen=True)
class Source:
    """What to replay: a step of a file of rollouts, and the run it belongs to."""

    file: Path
    step: int
    run_dir: Path


@dataclass(frozen=True)
class Replayed:
    """A step's metrics of the learner: as the run wrote them and as they came out now."""

    step: int
    logged: dict[str, float]
    now: dict[str, float]

    @property
    def names(self) -> list[str]:
        """Of what the learner said then or says now."""
        return sorted({*self.now, *(name for name in self.logged if name.startswith(OF_LEARNER))})

    @property
    def differing(self) -> list[str]:
        """Names whose values are not the same number, or that only one side has."""
        compared = [name for name in self.names if name != OF_THE_MACHINE]
        return [name for name in compared if self.logged.get(name) != self.now.get(name)]


def find(text: str) -> Source:
    """The meaning of FILE[:STEP]. ValueError where there is no such file, no run around it, or no such step in it."""
    match = re.fullmatch(r"(.+):(\d+)", text)
    file, step = (Path(match[1]), int(match[2])) if match else (Path(text), None)
    if not file.is_file():
        raise ValueError(f"--replay {text}: there is no file {file}")
    run_dir = next((folder for folder in file.absolute().parents[:2] if (folder / "config.yaml").is_file()), None)
    if run_dir is None:
        raise ValueError(f"--replay {text}: {file} lies in no run directory (no config.yaml beside or above it)")
    steps = set()
    for _, _, record in read_jsonl(file):
        if "group" not in record:
            raise ValueError(f"--replay {text}: {file} holds no rollouts; expected a rollouts.jsonl, or one of failed/")
        steps.add(record["step"])
    if not steps or step not in {None, *steps}:
        held = f"steps {min(steps)} to {max(steps)}" if steps else "nothing"
        raise ValueError(f"--replay {text}: no such step, {file} holds {held}")
    return Source(file, max(steps) if step is None else step, run_dir)


def replay(learner: Learner, source: Source, prompts_per_step: int) -> Iterator[Replayed]:
    """The steps from the newest checkpoint before the wanted one to the wanted one, each as it comes out. Collective.

    learner: as a run makes it, with the initial weights. prompts_per_step: groups of a step, of all ranks. Under
    torchrun each rank takes the groups it had in a run of as many ranks. ValueError for steps that rollouts.jsonl or
    metrics.jsonl lack.
    """
    start = checkpoint.latest(source.run_dir, before=source.step)
    done = 0
    if start is not None:
        learner.load_state_dict(checkpoint.load(start, learner.state_dict()))
        done = checkpoint.step_of(start)
    metrics = merged_steps(source.run_dir / "metrics.jsonl")
    for step in range(done + 1, source.step + 1):
        file = source.file if step == source.step else source.run_dir / "rollouts.jsonl"
        logged = metrics.get(step, {})
        if "grad/norm" not in logged:
            raise ValueError(f"{source.run_dir / 'metrics.jsonl'} lacks step {step}: nothing to compare with")
        if logged.get(OF_THE_MACHINE):
            learner.halvings = 1
        minibatches = read_minibatches(file, step, learner.config.minibatches, prompts_per_step)
        yield Replayed(step, logged, learner.update(minibatches))


def read_minibatches(file: Path, step: int, count: int, prompts_per_step: int) -> list[list[TrainSequence]]:
    """What the learner was given at a step, dealt out as Trainer.minibatches does. ValueError without such records."""
    dealt: list[list[TrainSequence]] = [[] for _ in range(count)]
    found = False
    for record in read_step(file, step):
        found = True
        if record["group"] >= prompts_per_step:
            raise ValueError(f"rollout.prompts_per_step={prompts_per_step}: {file} has more groups in step {step}")
        if record["group"] % distributed.world_size() == distributed.rank():
            sequence = trained_sequence(record)
            dealt[minibatch_of(record["group"], prompts_per_step, count)] += [] if sequence is None else [sequence]
    if not found:
        raise ValueError(f"{file} lacks step {step}, which lies between the checkpoint and the step to replay")
    return dealt
