"""Which failed rollouts are worth a teacher's tokens: S = alpha * beta * (r_step + r_token).

SCOPE states the product and what its factors are for; their formulas are our reading; not stated in the sources:
    r_step   steps kept / steps                     r_token  tokens kept / tokens of the response
    alpha    exp(-z^2 / 2) of the step count        beta     exp(-z^2 / 2) of the token count
with z against the group's median in units of its scaled median absolute deviation; 1 where the spread is zero or the
group has fewer than three rollouts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from random import Random
from statistics import median

from scope_fast.scope.localize import kept_steps
from scope_fast.scope.trajectory import Repair, Selection, Trajectory

MAD_TO_SIGMA = 1.4826  # of a normal distribution


def log_outlier_penalty(value: float, group: Sequence[float]) -> float:
    """-z^2 / 2 of `value` against `group`, with a robust z-score; at most 0."""
    if len(group) < 3:
        return 0.0
    centre = median(group)
    spread = MAD_TO_SIGMA * median(abs(x - centre) for x in group)
    return 0.0 if spread == 0.0 else -(((value - centre) / spread) ** 2) / 2


def score(trajectory: Trajectory, group: Sequence[Trajectory], kept: int, length_penalty: bool = True) -> Selection:
    """The selection score of a failed rollout of which `kept` steps, one at least, are kept."""
    steps, tokens = len(trajectory.steps), len(trajectory.token_ids)
    log_alpha = log_beta = 0.0
    if length_penalty:
        log_alpha = log_outlier_penalty(steps, [len(other.steps) for other in group])
        log_beta = log_outlier_penalty(tokens, [len(other.token_ids) for other in group])
    alpha, beta = math.exp(log_alpha), math.exp(log_beta)
    r_step, r_token = kept / steps, trajectory.steps[kept - 1][1] / tokens
    log_score = log_alpha + log_beta + math.log(r_step + r_token)
    return Selection(alpha * beta * (r_step + r_token), log_score, alpha, beta, r_step, r_token)


def success_rate(group: Sequence[Trajectory]) -> float:
    """Share of the verified rollouts of a group that passed; 1 when none could be verified: nothing to repair there."""
    rewards = [t.reward for t in group if t.reward is not None]
    return sum(r > 0 for r in rewards) / len(rewards) if rewards else 1.0


def choose_near_misses(
    group: Sequence[Trajectory],
    budget: int,
    repair_below: float,
    length_penalty: bool = True,
    shuffle: str | None = None,
    keep_prefix: bool = True,
) -> list[Trajectory]:
    """The at most `budget` failed rollouts of a group with the highest score; each gets its `selection` and `repair`.

    Only rollouts with a usable localisation and at least one step to keep are candidates, and only in groups whose
    success rate is below `repair_below`. shuffle: choose at random instead (the ablation), by this seed and the group's
    number, so alike on any number of ranks. keep_prefix False: the same choice, but nothing is kept, so that the
    teacher writes the whole response (the `replace` baseline).
    """
    if success_rate(group) >= repair_below:
        return []
    candidates = []
    for trajectory in group:
        if not trajectory.failed or trajectory.first_error is None:
            continue
        kept = kept_steps(trajectory.first_error, len(trajectory.steps))
        if kept > 0:
            trajectory.selection = score(trajectory, group, kept, length_penalty)
            candidates.append((trajectory, kept))
    if shuffle is not None:
        Random(f"{shuffle}/{group[0].group}").shuffle(candidates)
    else:
        candidates.sort(key=lambda item: -item[0].selection.log_score)  # stable: ties go to the earlier sample
    for trajectory, kept in candidates[:budget]:
        trajectory.repair = Repair(kept, trajectory.steps[kept - 1][1]) if keep_prefix else Repair(0, 0)
    return [trajectory for trajectory, _ in candidates[:budget]]


def choose_first(group: Sequence[Trajectory]) -> list[Trajectory]:
    """The first rollout of a group, whatever its reward, to be rewritten whole: teacher solutions only (`sft`)."""
    group[0].repair = Repair(0, 0)
    return [group[0]]


def choose_none(group: Sequence[Trajectory]) -> list[Trajectory]:
    """No repair."""
    return []


Choose = Callable[[Sequence[Trajectory]], list[Trajectory]]
