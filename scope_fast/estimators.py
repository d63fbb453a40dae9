"""Estimators of an evaluation, pure functions: pass@k, maj@k, bootstrap intervals, and ProcessBench's scores of a PRM.

The unit is a problem: every estimator gives one number a problem, and intervals come from drawing problems again with
replacement (Efron's percentile bootstrap), since the samples of one problem are no independent evidence. Where all
draws agree there is no interval: the bootstrap knows no problems but those it has.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
BLOCK = 1 << 22  # drawn indices held at once: 32 MiB


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Probability that k of the samples, drawn without replacement, hold a correct one: 1 - C(n-c, k) / C(n, k).

    The unbiased estimator of Chen et al. 2021 (arXiv 2107.03374), as a product of n-c factors at most 1, which cannot
    overflow. Raises ValueError unless 0 <= num_correct <= num_samples and 1 <= k <= num_samples.
    """
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"num_correct={num_correct}: expected 0 to num_samples={num_samples}")
    _check_k(k, num_samples)
    if num_samples - num_correct < k:
        return 1.0
    none_correct = 1.0
    for i in range(num_samples - num_correct + 1, num_samples + 1):
        none_correct *= 1.0 - k / i
    return 1.0 - none_correct


def majority_at_k(answers: Sequence[Hashable | None], correct: Sequence[bool], k: int) -> float:
    """Share of votes among k samples that the correct answer wins: mean over the len(answers) // k whole blocks of k.

    answers: the answer of each sample; equal ones vote together, None (no answer found) does not vote.
    A tie is decided by lot, so it counts as the expected result: the share of the tied answers that are correct. A
    block without a vote is lost. Where equal answers were judged differently, their share of correct ones counts.
    """
    if len(answers) != len(correct):
        raise ValueError(f"answers has {len(answers)} samples, correct has {len(correct)}")
    _check_k(k, len(answers))
    blocks = range(0, len(answers) - k + 1, k)
    return sum(_vote(answers[i : i + k], correct[i : i + k]) for i in blocks) / len(blocks)


def _vote(answers: Sequence[Hashable | None], correct: Sequence[bool]) -> float:
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    judged = defaultdict(list)
    for answer, right in zip(answers, correct, strict=True):
        judged[answer].append(right)
    most = max(votes.values())
    winners = [answer for answer, count in votes.items() if count == most]
    return sum(sum(judged[answer]) / most for answer in winners) / len(winners)


def _check_k(k: int, num_samples: int) -> None:
    if not 1 <= k <= num_samples:
        raise ValueError(f"k={k}: expected 1 to the {num_samples} samples there are")


class Estimate(NamedTuple):
    """A value and its 95 % interval; low and high are None for a single problem, and where all draws agree."""

    value: float
    low: float | None
    high: float | None


def draws(
    values: Sequence[float],
    weights: Sequence[float] | None = None,
    *,
    statistic: str = "mean",
    seed: int | Sequence[int] = 0,
    resamples: int = RESAMPLES,
) -> np.ndarray:
    """The statistic on `resamples` bootstrap samples of the problems: (resamples,) float64.

    values (P,): one number a problem. weights (P,): of the mean (a ratio of sums over problems: value = the problem's
    ratio, weight = its denominator); a resample whose weights are all 0 is drawn as NaN. statistic: "mean", "median".
    Raises ValueError for an empty or mismatching argument.
    """
    value, weight = _checked(values, weights, statistic)
    generator = np.random.default_rng(seed)
    size = max(1, BLOCK // len(value))
    found = []
    for start in range(0, resamples, size):
        index = generator.integers(0, len(value), (min(size, resamples - start), len(value)))
        found.append(_statistic(value[index], weight[index], statistic))
    return np.concatenate(found)


def point(values: Sequence[float], weights: Sequence[float] | None = None, *, statistic: str = "mean") -> float:
    """The statistic on the problems themselves; arguments as of `draws`."""
    value, weight = _checked(values, weights, statistic)
    return float(_statistic(value[None], weight[None], statistic)[0])


def estimate(value: float, drawn: np.ndarray, num_problems: int) -> Estimate:
    """A value with the percentile interval of its bootstrap draws; none where all draws agree: of what varies nowhere,
    or hardly anywhere, it would claim certainty."""
    if num_problems < 2 or np.isnan(drawn).all() or np.nanmin(drawn) == np.nanmax(drawn):
        return Estimate(value, None, None)
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return Estimate(value, float(low), float(high))


def _checked(values: Sequence[float], weights: Sequence[float] | None, statistic: str) -> tuple[np.ndarray, np.ndarray]:
    value = np.asarray(values, dtype=np.float64)
    weight = np.ones_like(value) if weights is None else np.asarray(weights, dtype=np.float64)
    if value.ndim != 1 or not value.size or weight.shape != value.shape:
        raise ValueError(f"values of shape {value.shape}, weights of shape {weight.shape}: expected (P,) both, P > 0")
    if statistic not in ("mean", "median") or (statistic == "median" and weights is not None):
        raise ValueError(f"statistic={statistic!r}: expected mean, or median without weights")
    return value, weight


def _statistic(values: np.ndarray, weights: np.ndarray, statistic: str) -> np.ndarray:
    """(R, P) values and weights -> (R,)."""
    if statistic == "median":
        return np.median(values, axis=1)
    total = weights.sum(axis=1)
    with np.errstate(invalid="ignore"):
        return (values * weights).sum(axis=1) / total


class ProcessBenchScores(NamedTuple):
    """Scores of first-error predictions; None where no sample of that kind is there.

    acc_error: erroneous samples whose first error is found exactly. acc_correct: correct samples in which none is
    found. f1: their harmonic mean. prefix_safe: erroneous samples whose predicted error is not behind the true one, so
    that the prefix kept before it holds no error (SCOPE's need; a sample passed as correct is not safe).
    """

    acc_error: float | None
    acc_correct: float | None
    f1: float | None
    prefix_safe: float | None


def process_bench(predictions: Sequence[int], labels: Sequence[int]) -> ProcessBenchScores:
    """ProcessBench's scores (Zheng et al. 2024, arXiv 2412.06559), and `prefix_safe`.

    predictions, labels: 0-based index of the first wrong step, -1 where there is none. `first_error_label` makes one
    of `scope.localize.first_error`. Raises ValueError for other lengths or values.
    """
    if len(predictions) != len(labels):
        raise ValueError(f"predictions has {len(predictions)} samples, labels has {len(labels)}")
    if any(index < -1 for index in (*predictions, *labels)):
        raise ValueError("predictions and labels: expected step indices, or -1 for no error")
    pairs = list(zip(predictions, labels, strict=True))
    wrong = [(found, label) for found, label in pairs if label != -1]
    right = [found for found, label in pairs if label == -1]
    acc_error = _share([found == label for found, label in wrong])
    acc_correct = _share([found == -1 for found in right])
    f1 = None
    if acc_error is not None and acc_correct is not None:
        total = acc_error + acc_correct
        f1 = 2.0 * acc_error * acc_correct / total if total else 0.0
    return ProcessBenchScores(acc_error, acc_correct, f1, _share([0 <= found <= label for found, label in wrong]))


def first_error_label(first_error: int, num_steps: int) -> int:
    """ProcessBench's label of a first error given as the number of steps before it: -1 where all steps stand."""
    return first_error if first_error < num_steps else -1


def _share(flags: list[bool]) -> float | None:
    return sum(flags) / len(flags) if flags else None
