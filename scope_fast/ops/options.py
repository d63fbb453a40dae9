"""LossOptions as a flat list of floats, and the names of the metric vector: what crosses the op boundary.

A custom op takes plain values. One list keeps the ten numbers out of every signature below the public function, and
a kernel reads them as run-time scalars: changing an option recompiles nothing.
"""

from __future__ import annotations

from typing import NamedTuple

from scope_fast.batch import KL_ESTIMATORS, NLL_SHAPES, POLICY_LOSSES, LossOptions

# Sums first, so that they add over chunks, micro-batches and ranks; then the maxima (0 over no rows).
METRICS = (
    "loss/rl",
    "loss/nll",
    "policy/rows",
    "policy/entropy_sum",
    "policy/kl_sum",
    "policy/clipped",
    "sampling/gap_sum",
    "policy/ratio_max",
    "sampling/gap_max",
)
NUM_SUMS = 7


class RowOptions(NamedTuple):
    """The options of the row losses as floats; enumerations by their index in batch.py, 0 for an option that is off."""

    clip_low: float
    clip_high: float
    dual_clip: float
    policy_loss: float
    kl: float
    kl_coef: float
    entropy_coef: float
    importance_cap: float
    nll_shape: float
    temperature: float


def encode(options: LossOptions) -> list[float]:
    """The options as RowOptions' fields in order; an estimator whose coefficient is 0 is switched off."""
    kl = KL_ESTIMATORS.index(options.kl) if options.kl_coef != 0.0 else 0
    return [
        float(options.clip_low),
        float(options.clip_high),
        float(options.dual_clip or 0.0),
        float(POLICY_LOSSES.index(options.policy_loss)),
        float(kl),
        float(options.kl_coef),
        float(options.entropy_coef),
        float(options.importance_cap or 0.0),
        float(NLL_SHAPES.index(options.nll_shape)),
        float(options.temperature),
    ]
