"""What happens to one rollout on its way from the engine to the learner, filled in stage by stage."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """A question. id: stable and unique in a run. entry: what the verifier's scoring function needs.

    text: the user's text; of chat messages, the whole prompt as the student reads it. messages: where the row had them.
    """

    id: str
    task: str
    text: str
    ids: tuple[int, ...]
    entry: dict[str, Any]
    messages: list[dict[str, str]] | None = None

    @property
    def chat(self) -> list[dict[str, str]]:
        """The prompt as chat messages, for models of another template."""
        return self.messages or [{"role": "user", "content": self.text}]

    @property
    def answer(self) -> str:
        return str(self.entry["answer"])


@dataclass(frozen=True)
class Selection:
    """The selection score S = alpha * beta * (r_step + r_token) and its terms (scope/selection.py).

    log_score: log S, by which rollouts are ranked; of a far outlier S itself may be 0 in floating point.
    """

    score: float
    log_score: float
    alpha: float
    beta: float
    r_step: float
    r_token: float


@dataclass
class Repair:
    """What the teacher made of a failed rollout.

    status: "pending" until verified, then "accepted" or "rejected"; "error" when the teacher gave nothing.
    kept_tokens, kept_steps: the student's prefix. suffix_ids: the teacher's tokens, the student's EOS included.
    """

    kept_steps: int
    kept_tokens: int
    status: str = "pending"
    reason: str = ""
    suffix: str = ""
    suffix_ids: list[int] = field(default_factory=list)
    reward: float | None = None


@dataclass
class Trajectory:
    """A rollout and all that is found out about it.

    token_ids, logprobs: the student's response and the engine's log-probability of each token.
    weight_version, weight_versions: whose tokens they are, as in `rollout.base.Rollout`.
    reward: None when the verifier could not say (verdict "timeout" or "crash"): such a rollout is not trained on.
    steps: token spans [start, end), covering the response but for a trailing EOS.
    step_probs: the reward model's probability per step. first_error: index of the first wrong step, len(steps) if none.
    """

    prompt: Prompt
    group: int
    sample: int
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    weight_version: int
    weight_versions: tuple[tuple[int, int, int], ...] | None = None
    text: str = ""
    reward: float | None = None
    verdict: str = "ok"
    verdict_reason: str | None = None
    answer: str | None = None
    steps: list[tuple[int, int]] = field(default_factory=list)
    step_probs: list[float] | None = None
    first_error: int | None = None
    selection: Selection | None = None
    repair: Repair | None = None

    @property
    def failed(self) -> bool:
        return self.reward is not None and self.reward <= 0.0

    @property
    def repaired(self) -> bool:
        """Whether a verified repair takes this rollout's place."""
        return self.repair is not None and self.repair.status == "accepted"

    @property
    def final_reward(self) -> float | None:
        """The reward after replacement."""
        return self.repair.reward if self.repaired else self.reward
