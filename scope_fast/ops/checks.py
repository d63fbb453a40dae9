"""Input checks of the ops. Shapes and dtypes always; values, which need a host sync, only where the caller asks."""

from __future__ import annotations

import torch

from scope_fast.batch import LOGITS_DTYPES, LossOptions, Segment, TokenStreams

HIDDEN_DTYPES = (torch.bfloat16, torch.float32, torch.float64)
STREAM_DTYPES = (torch.float32, torch.float64)
OPTIONAL_STREAMS = ("old_logprob", "advantage", "ref_logprob", "rollout_logprob", "temperature")


def shape(tensor: torch.Tensor) -> str:
    return str(tuple(tensor.shape))


def check_linear(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """hidden (T, D), weight (V, D), bias (V) or None: one supported dtype, one device."""
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden {shape(hidden)} and weight {shape(weight)}: expected (T, D) and (V, D)")
    if weight.shape[0] < 1 or weight.shape[1] < 1:
        raise ValueError(f"weight {shape(weight)}: expected (V, D) with V and D at least 1")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {shape(bias)} and weight {shape(weight)}: expected (V,) and (V, D)")
    if hidden.dtype == torch.float16:
        raise ValueError("hidden is float16: gradients formed in the forward would underflow; use bfloat16 or float32")
    if hidden.dtype not in HIDDEN_DTYPES:
        raise ValueError(f"hidden is {hidden.dtype}: expected one of {', '.join(map(str, HIDDEN_DTYPES))}")
    for name, other in (("weight", weight), ("bias", bias)):
        if other is None:
            continue
        if other.dtype != hidden.dtype:
            raise ValueError(f"{name} is {other.dtype}, hidden is {hidden.dtype}: cast one, or run under autocast")
        if other.device != hidden.device:
            raise ValueError(f"{name} is on {other.device}, hidden on {hidden.device}")


def check_logits_dtype(logits_dtype: str) -> None:
    if logits_dtype not in LOGITS_DTYPES:
        raise ValueError(f"logits_dtype={logits_dtype!r}: expected one of {', '.join(LOGITS_DTYPES)}")


def check_target(target: torch.Tensor, num_rows: int, like: str) -> None:
    if target.shape != (num_rows,):
        raise ValueError(f"target {shape(target)}: expected ({num_rows},), one per row of {like}")
    if target.dtype != torch.int64:
        raise ValueError(f"target is {target.dtype}: expected torch.int64")


def check_finite(name: str, values: torch.Tensor) -> None:
    """Value check (host sync): every element is finite."""
    bad = ~torch.isfinite(values)
    if bad.any():
        raise ValueError(f"{name} {shape(values)} holds {int(bad.sum())} non-finite values")


def check_target_range(target: torch.Tensor, vocab_size: int) -> None:
    """Value check (host sync): every target is a vocabulary row."""
    bad = (target < 0) | (target >= vocab_size)
    if bad.any():
        raise ValueError(f"target holds {int(target[bad][0])}: expected values in [0, {vocab_size})")


def validate_streams(
    streams: TokenStreams, options: LossOptions, num_rows: int, *, like: str = "hidden", device: torch.device
) -> None:
    """Shapes, dtypes, devices, and that every stream the options read is there. Never syncs."""
    check_target(streams.target, num_rows, like)
    named = {name: getattr(streams, name) for name in ("target", "segment", "loss_weight", *OPTIONAL_STREAMS)}
    for name, value in named.items():
        if value is None:
            continue
        if value.shape != streams.target.shape:
            raise ValueError(f"{name} {shape(value)}: expected {shape(streams.target)}, like target")
        if value.device != device:
            raise ValueError(f"{name} is on {value.device}, {like} on {device}")
        if name not in ("target", "segment") and value.dtype not in STREAM_DTYPES:
            raise ValueError(f"{name} is {value.dtype}: expected torch.float32 or torch.float64")
    if streams.segment.dtype != torch.uint8:
        raise ValueError(f"segment is {streams.segment.dtype}: expected torch.uint8")
    active = streams.active
    if active is not None and (active.dim() != 1 or active.dtype != torch.int64 or active.device != device):
        raise ValueError(f"active {shape(active)} {active.dtype} on {active.device}: expected (n,) int64 on {device}")
    if options.kl_coef != 0.0 and streams.ref_logprob is None:
        raise ValueError(f"ref_logprob is None: kl_coef={options.kl_coef} needs it, shape {shape(streams.target)}")
    if options.importance_cap is not None and streams.rollout_logprob is None:
        raise ValueError(
            f"rollout_logprob is None: importance_cap={options.importance_cap} needs it, shape {shape(streams.target)}"
        )


def validate_stream_values(streams: TokenStreams, options: LossOptions, vocab_size: int | None) -> None:
    """The value checks of `check=True`: each one syncs with the device.

    Looks only where a stream applies: targets and weights of RL and NLL rows, the policy streams of RL rows.
    """
    segment = streams.segment
    if (segment > max(Segment)).any():
        raise ValueError(f"segment holds {int(segment.max())}: expected 0 (ignore), 1 (RL) or 2 (NLL)")
    trained, rl = segment != Segment.IGNORE, segment == Segment.RL
    check_finite("loss_weight", streams.loss_weight[trained])
    if vocab_size is not None:
        check_target_range(streams.target[trained], vocab_size)
    require_advantage(streams.segment, streams.advantage)
    used = ["advantage", "old_logprob", "rollout_logprob"] + (["ref_logprob"] if options.kl_coef != 0.0 else [])
    for name in used:
        if getattr(streams, name) is not None:
            check_finite(name, getattr(streams, name)[rl])
    if streams.temperature is not None:
        temperature = streams.temperature[trained]
        check_finite("temperature", temperature)
        if (temperature <= 0).any():
            raise ValueError(f"temperature holds {float(temperature.min())}: expected values above 0")
    active = streams.active
    if active is not None and active.numel():
        if (active[1:] <= active[:-1]).any():
            raise ValueError(f"active {shape(active)} is not strictly ascending")
        if active[0] < 0 or active[-1] >= len(streams):
            outside = int(active[0]) if active[0] < 0 else int(active[-1])
            raise ValueError(f"active holds {outside}: expected rows in [0, {len(streams)})")


def require_advantage(segment: torch.Tensor, advantage: torch.Tensor | None) -> None:
    """RL rows need an advantage (host sync)."""
    if advantage is None and (segment == Segment.RL).any():
        raise ValueError(f"advantage is None, but segment {shape(segment)} has RL rows: expected {shape(segment)}")


def check_cu_steps(step_end: torch.Tensor, cu_steps: torch.Tensor, num_rows: int) -> None:
    """Value check (host sync): offsets ascend from 0 to S, and every boundary is a row of hidden."""
    if (cu_steps[1:] < cu_steps[:-1]).any():
        raise ValueError(f"cu_steps {shape(cu_steps)} is not ascending")
    if int(cu_steps[0]) != 0 or int(cu_steps[-1]) != step_end.numel():
        raise ValueError(
            f"cu_steps runs from {int(cu_steps[0])} to {int(cu_steps[-1])}: expected 0 to {step_end.numel()}, "
            f"the length of step_end {shape(step_end)}"
        )
    if step_end.numel() and (int(step_end.min()) < 0 or int(step_end.max()) >= num_rows):
        raise ValueError(
            f"step_end runs from {int(step_end.min())} to {int(step_end.max())}: expected rows in [0, {num_rows})"
        )


def refuse_second_derivative(stem: str) -> None:
    """Called in a backward whose gradients were formed in the forward: create_graph=True would get zeros for theirs."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{stem} can be differentiated once: its backward does not support create_graph=True")
