"""The methods: each one function from a group's trajectories to sequences whose every token is stamped.

A stamp returns one entry per trajectory, in order; None where the method does not train on it. Weights are not divided
by any count here: the learner does that, over the whole optimiser step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean, stdev

from scope_fast.batch import Segment, TrainSequence
from scope_fast.config import Config, Loss
from scope_fast.scope import selection
from scope_fast.scope.trajectory import Trajectory

NAN = float("nan")
STD_FLOOR = 1e-6  # added to the standard deviation, as verl does

Stamped = list[TrainSequence | None]


def baseline(values: Sequence[float]) -> tuple[float, float]:
    """(mean, 1 / sample standard deviation) of a group's rewards, the latter as TRL and verl take it.

    Values that are all equal have exactly themselves for a mean, since an advantage made of rounding error would be
    trained on, and a scale of 1: a repaired reward measured against an all-failed group must not be divided by zero.
    """
    if len(set(values)) <= 1:
        return (values[0] if values else 0.0), 1.0
    return fmean(values), 1.0 / (stdev(values) + STD_FLOOR)


def stamp_mixture(group: Sequence[Trajectory], loss: Loss) -> Stamped:
    """`grpo`, `scope` and `replace`: group-relative advantage on the student's tokens, likelihood on the teacher's.

    A repaired rollout stands in the failed one's place with the repair's reward. The baseline is the mean reward after
    replacement, or (baseline_includes_repaired: false) before it. A = reward - baseline (Dr. GRPO), over the standard
    deviation of the same rewards if advantage_std. Rollouts without a verdict take no part.
    """
    rewards = [t.final_reward if loss.baseline_includes_repaired else t.reward for t in group]
    mean, scale = baseline([reward for reward in rewards if reward is not None])
    scale = scale if loss.advantage_std else 1.0
    return [None if t.final_reward is None else _mixed(t, (t.final_reward - mean) * scale, loss) for t in group]


def _mixed(trajectory: Trajectory, advantage: float, loss: Loss) -> TrainSequence:
    kept, suffix = len(trajectory.token_ids), []
    if trajectory.repaired:
        kept, suffix = trajectory.repair.kept_tokens, trajectory.repair.suffix_ids
    weight = loss.nll_coef * (max(advantage, 0.0) if loss.nll_weight == "advantage" else 1.0)
    n = len(suffix)
    return TrainSequence(
        prompt_ids=list(trajectory.prompt.ids),
        response_ids=trajectory.token_ids[:kept] + suffix,
        segment=[int(Segment.RL)] * kept + [int(Segment.NLL)] * n,
        advantage=[advantage] * kept + [0.0] * n,
        loss_weight=[1.0] * kept + [weight] * n,
        rollout_logprob=trajectory.logprobs[:kept] + [NAN] * n,
    )


def stamp_process_reward(group: Sequence[Trajectory], loss: Loss) -> Stamped:
    """`prm_reward`: step probabilities as dense rewards, process supervision as in DeepSeekMath (arXiv 2402.03300).

    Rewards are normalised over all steps of the group; a token's advantage is the sum of the normalised rewards of its
    own step and of all later ones. A trailing EOS belongs to no step and has none to come: 0. Rollouts without a
    verdict take no part, and neither do those without usable probabilities.
    """
    scored = [bool(t.step_probs) and t.reward is not None for t in group]
    mean, scale = baseline([p for t, usable in zip(group, scored, strict=True) if usable for p in t.step_probs])
    return [_dense(t, mean, scale) if usable else None for t, usable in zip(group, scored, strict=True)]


def _dense(trajectory: Trajectory, mean: float, scale: float) -> TrainSequence:
    n = len(trajectory.token_ids)
    advantages, to_come = [0.0] * n, 0.0
    for (start, end), p in reversed(list(zip(trajectory.steps, trajectory.step_probs, strict=True))):
        to_come += (p - mean) * scale
        advantages[start:end] = [to_come] * (end - start)
    return TrainSequence(
        prompt_ids=list(trajectory.prompt.ids),
        response_ids=trajectory.token_ids,
        segment=[int(Segment.RL)] * n,
        advantage=advantages,
        loss_weight=[1.0] * n,
        rollout_logprob=trajectory.logprobs,
    )


def stamp_teacher_only(group: Sequence[Trajectory], loss: Loss) -> Stamped:
    """`sft`: the teacher's verified solutions and nothing else; the coefficient is 1, there is nothing to balance."""
    plain = loss.model_copy(update={"nll_coef": 1.0, "nll_weight": "constant"})
    return [_mixed(t, 0.0, plain) if t.repaired else None for t in group]


@dataclass(frozen=True)
class Method:
    """How the loop treats a method.

    choose: rollouts of a group to be repaired. stamp: the group's training sequences.
    scores: which rollouts the reward model must score: "all", "failed" or "none" (prm.monitor adds the failed ones).
    """

    choose: selection.Choose
    stamp: Callable[[Sequence[Trajectory], Loss], Stamped]
    scores: str


def method(config: Config, step: int) -> Method:
    """The method a configuration names. step: of the run, of which the `random` ablation of the selection is drawn."""
    near_misses = partial(
        selection.choose_near_misses,
        budget=config.scope.max_repaired_per_group,
        repair_below=config.scope.repair_below,
        length_penalty=config.scope.length_penalty,
        shuffle=f"{config.seed}/{step}" if config.scope.selection == "random" else None,
    )
    return {
        "scope": Method(near_misses, stamp_mixture, "failed"),
        "replace": Method(partial(near_misses, keep_prefix=False), stamp_mixture, "failed"),
        "grpo": Method(selection.choose_none, stamp_mixture, "none"),
        "prm_reward": Method(selection.choose_none, stamp_process_reward, "all"),
        "sft": Method(selection.choose_first, stamp_teacher_only, "none"),
    }[config.method]
