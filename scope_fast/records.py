"""A rollout as one line of rollouts.jsonl: all the report shows and all a replay needs. The schema is in report.py."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from scope_fast.batch import Segment, TrainSequence
from scope_fast.files import Log
from scope_fast.scope.trajectory import Trajectory


class TokenTexts:
    """Each token's own text, for display: bytes that are no character alone show as U+FFFD."""

    def __init__(self, tokenizer) -> None:
        self._tokenizer = tokenizer
        self._cache: dict[int, str] = {}  # a decode takes a third of a millisecond, thousands of times a step

    def __call__(self, token_ids: list[int]) -> list[str]:
        for token in set(token_ids) - self._cache.keys():
            self._cache[token] = self._tokenizer.decode([token])
        return [self._cache[token] for token in token_ids]


def record(step: int, trajectory: Trajectory, sequence: TrainSequence | None, texts: TokenTexts) -> dict[str, Any]:
    """The record of a trajectory at a step. sequence: what was trained on in its place, None if nothing was."""
    prompt, repair = trajectory.prompt, trajectory.repair
    return {
        "step": step,
        "prompt_id": prompt.id,
        "task": prompt.task,
        "group": trajectory.group,
        "sample": trajectory.sample,
        "prompt": prompt.text,
        "answer": prompt.answer,
        "prompt_ids": list(prompt.ids),
        "response": trajectory.text,
        "response_ids": trajectory.token_ids,
        "tokens": texts(trajectory.token_ids),
        "logprobs": trajectory.logprobs,
        "reward": trajectory.reward,
        "verdict": trajectory.verdict,
        "verdict_reason": trajectory.verdict_reason,
        "finish_reason": trajectory.finish_reason,
        "weight_version": trajectory.weight_version,
        "weight_versions": trajectory.weight_versions,
        "steps": trajectory.steps,
        "step_probs": trajectory.step_probs,
        "first_error": trajectory.first_error,
        "selection": None if trajectory.selection is None else asdict(trajectory.selection),
        "selected": repair is not None,
        "repair": None if repair is None else {**asdict(repair), "suffix_tokens": texts(repair.suffix_ids)},
        "trained": None if sequence is None else _trained(sequence, texts),
    }


def _trained(sequence: TrainSequence, texts: TokenTexts) -> dict[str, Any]:
    return {
        "response_ids": sequence.response_ids,
        "tokens": texts(sequence.response_ids),
        "segment": sequence.segment,
        "advantage": _exact(sequence.advantage),
        "loss_weight": _exact(sequence.loss_weight),
    }


def _exact(values: list[float]) -> list[float | str]:
    """JSON writes a float with all its digits but knows no NaN and no infinity, which a replay must see: as text."""
    return [value if math.isfinite(value) else str(value) for value in values]


def trained_sequence(record: dict[str, Any]) -> TrainSequence | None:
    """What the learner was given, out of a rollout's record: the inverse of `record`, bit for bit. None if nothing."""
    trained = record["trained"]
    if trained is None:
        return None
    own = [math.nan if value is None else value for value in record["logprobs"]]  # the student's tokens come first
    return TrainSequence(
        prompt_ids=record["prompt_ids"],
        response_ids=trained["response_ids"],
        segment=trained["segment"],
        advantage=[float(value) for value in trained["advantage"]],
        loss_weight=[float(value) for value in trained["loss_weight"]],
        rollout_logprob=[own[i] if s == Segment.RL else math.nan for i, s in enumerate(trained["segment"])],
    )


def to_json(record: Mapping[str, Any]) -> str:
    """A rollout's line of rollouts.jsonl. JSON knows no NaN: a number that is not finite becomes null.

    Raises ValueError for a record without an integer step.
    """
    if not isinstance(record.get("step"), int):
        raise ValueError(f"record['step'] is {record.get('step')!r}: expected an int")
    try:
        return json.dumps(record, allow_nan=False)
    except ValueError:  # cleaning walks every number: only where there is something to clean
        return json.dumps(_without_nan(record), allow_nan=False)


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return value


class RolloutLog:
    """Appends rollouts to rollouts.jsonl in `out_dir`, in step order. A context manager.

    The MetricsWriter cuts the file back in place when a run is resumed, before or after this opens it. The schema is
    in report.py.
    """

    def __init__(self, out_dir: str | Path) -> None:
        self._file = Log(Path(out_dir) / "rollouts.jsonl", "rollouts")
        self._lines: list[str] = []

    def __enter__(self) -> RolloutLog:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        self.flush()
        self._file.close()

    def append(self, line: str) -> None:
        """Adds one rollout that `to_json` made a line of, on this rank or another."""
        self._lines.append(line + "\n")

    def flush(self) -> None:
        """Hands what was appended to the operating system; call it once a step."""
        text, self._lines = "".join(self._lines), []  # emptied first: what fails now would fail again at the closing
        self._file.write(text)
