"""From step probabilities to the prefix that is kept."""

from __future__ import annotations

import math
from collections.abc import Sequence


def valid_probs(probs: Sequence[float], num_steps: int) -> bool:
    """Whether a reward model's output can be used: for every step a probability, a number in [0, 1]."""
    return len(probs) == num_steps and all(math.isfinite(p) and 0.0 <= p <= 1.0 for p in probs)


def first_error(probs: Sequence[float], tau: float = 0.5) -> int:
    """Index of the first step with not (p >= tau), so NaN is an error; the number of steps if there is none."""
    return next((i for i, p in enumerate(probs) if not p >= tau), len(probs))


def kept_steps(first_error: int, num_steps: int) -> int:
    """Steps of a FAILED rollout that are kept: those before the first error.

    Where the reward model finds no error although the answer is wrong, the last step is the one that is not believed
    (our reading; not stated in the sources).
    """
    return min(first_error, num_steps - 1) if num_steps else 0


def is_near_miss(first_error: int, num_steps: int) -> bool:
    """A failed rollout of two steps or more, of which only the last is wrong (or none is found wrong)."""
    return num_steps >= 2 and first_error >= num_steps - 1
