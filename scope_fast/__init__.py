"""scope_fast: step-wise corrected RLVR post-training, with fused kernels where the time and the memory go.

Names are loaded when they are first used: the verifier's worker processes import this package without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from scope_fast.batch import LossOptions, Segment, TokenStreams
    from scope_fast.losses import linear_scope_loss, scope_loss
    from scope_fast.ops import weight_bucket
    from scope_fast.ops.linear_logprob import LinearLogprob, linear_logprob
    from scope_fast.ops.step_pool import PrmHead, StepPool, step_pool

_HOMES = {
    "LinearLogprob": "scope_fast.ops.linear_logprob",
    "LossOptions": "scope_fast.batch",
    "PrmHead": "scope_fast.ops.step_pool",
    "Segment": "scope_fast.batch",
    "StepPool": "scope_fast.ops.step_pool",
    "TokenStreams": "scope_fast.batch",
    "linear_logprob": "scope_fast.ops.linear_logprob",
    "linear_scope_loss": "scope_fast.losses",
    "scope_loss": "scope_fast.losses",
    "step_pool": "scope_fast.ops.step_pool",
}
_MODULES = {"weight_bucket": "scope_fast.ops.weight_bucket"}

__all__ = [
    "LinearLogprob",
    "LossOptions",
    "PrmHead",
    "Segment",
    "StepPool",
    "TokenStreams",
    "linear_logprob",
    "linear_scope_loss",
    "scope_loss",
    "step_pool",
    "weight_bucket",
]


def __getattr__(name: str):
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
    elif name in _MODULES:
        value = import_module(_MODULES[name])
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
