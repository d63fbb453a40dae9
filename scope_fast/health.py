"""When updates fail: their batch is kept for a replay, and a run in which they keep failing ends.

The learner leaves an update without a finite loss and gradient out (learner.py). One such batch in ten thousand is
worth a look; several in a row mean that nothing is learnt any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from scope_fast.files import write_whole, writing


class Unhealthy(RuntimeError):
    """The run cannot go on as it is; the message says why, and what to look at."""


def failed_file(run_dir: Path, step: int) -> Path:
    """Where the rollouts of a step with a failed update are kept: lines of rollouts.jsonl, as a replay reads them."""
    return run_dir / "failed" / f"step_{step}.jsonl"


def keep_failed(run_dir: Path, step: int, lines: Sequence[str]) -> None:
    """Writes the rollouts of a step with a failed update, and says so."""
    path = failed_file(run_dir, step)
    with writing("the batch of a failed update", path):
        path.parent.mkdir(exist_ok=True)
    write_whole(path, "".join(f"{line}\n" for line in lines), "the batch of a failed update")
    print(f"step {step}: loss or gradient not finite, update left out, batch kept in {path}", flush=True)


def forget_failed(run_dir: Path, step: int) -> None:
    """Removes the batches of steps after `step`: a resumed run does these again."""
    for path in (run_dir / "failed").glob("step_*.jsonl"):
        if int(path.stem.removeprefix("step_")) > step:
            path.unlink()


def check(run_dir: Path, step: int, skipped_in_a_row: int, limit: int) -> None:
    """Unhealthy once `limit` (learner.max_skipped_updates) optimiser steps in a row were left out."""
    if skipped_in_a_row >= limit:
        raise Unhealthy(
            f"{skipped_in_a_row} optimiser steps in a row without a finite loss and gradient, the last in step {step} "
            f"(learner.max_skipped_updates={limit}); none was applied. To see the last batch fail again: "
            f"python -m scope_fast.train --replay {failed_file(run_dir, step)}"
        )
