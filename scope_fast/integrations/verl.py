"""verl 0.9: a policy loss, a loss function for batches whose suffixes a teacher wrote, and the fused head.

    actor_rollout_ref.model.external_lib=scope_fast.integrations.verl      # every worker imports it: registers "scope"
    actor_rollout_ref.actor.policy_loss.loss_mode=scope

verl calls a registered policy loss with log-probabilities, advantages and a mask, and with no segment: so "scope" is
the pure-RL part, the numbers of its vanilla loss for every loss_agg_mode, dual clip and rollout weights included.

Mixed batches go through `set_scope_loss(worker_group, actor_config)`, called once after the workers are up: it has
every worker train with `mixed_loss`, which reads one more entry of the batch,

    "scope_segment": one `Segment` per response token (1 the student's, 2 the teacher's, 0 neither): a tensor, nested or
    padded like `responses`, or lists; or lists of that name in an agent loop's `extra_fields`

The student's tokens keep verl's own ppo_loss (policy loss, KL, entropy bonus); the teacher's add nll_coef times their
weighted likelihood, aggregated by the same loss_agg_mode over the same global counts ("joint" in our words; but
"seq-mean-token-mean" divides each sequence's two parts by their own numbers of tokens).
Of verl's rollout correction take token-level weights alone (algorithm.rollout_correction.rollout_is=token, rollout_rs
null): verl compares old_log_probs and rollout_log_probs over the whole response_mask, and nobody drew the teacher's
tokens from the student, so a weight or a rejection of the whole sequence would be theirs and not the student's.

`patch_fused_head()` puts `linear_logprob` in the place of verl's Triton head (use_fused_kernels=True with
fused_kernel_options.impl_backend=triton); external_lib=scope_fast.integrations.verl_head does both.
Recipe for several nodes on Ray: configs/verl/.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from scope_fast.batch import LossOptions, Segment, TokenStreams
from scope_fast.losses import scope_loss
from scope_fast.ops.linear_logprob import linear_logprob

VERSIONS = "0.9"  # the minor version this was written and tested against


def _import_verl() -> tuple[Any, ...]:
    """verl's modules of policy losses, of loss functions, of padding and of metrics."""
    try:
        import verl
        from verl.trainer.ppo import core_algos
        from verl.utils import metric
        from verl.workers.utils import losses, padding
    except ImportError as error:
        raise ImportError(f"scope_fast.integrations.verl needs verl {VERSIONS} and what it needs: {error}") from error
    if not verl.__version__.startswith(VERSIONS + "."):
        raise ImportError(
            f"scope_fast.integrations.verl is written for verl {VERSIONS}.x, this is verl {verl.__version__}"
        )
    return core_algos, losses, padding, metric


core_algos, losses, padding, metric = _import_verl()


def token_weights(mask: Tensor, loss_agg_mode: str, global_batch_info: dict[str, Any]) -> Tensor:
    """(B, R) float32: what agg_loss multiplies each token's loss by.

    Every mode of agg_loss is linear in the loss matrix, so its gradient is the weights: verl's own numbers for all of
    its modes, with no copy of their formulas here.
    """
    with torch.enable_grad():
        losses_at_zero = torch.zeros(mask.shape, device=mask.device, requires_grad=True)
        total = core_algos.agg_loss(
            loss_mat=losses_at_zero, loss_mask=mask, loss_agg_mode=loss_agg_mode, **global_batch_info
        )
        return torch.autograd.grad(total, losses_at_zero)[0]


@core_algos.register_policy_loss("scope")
def scope_policy_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """The clipped policy gradient of all tokens in response_mask; (B, R) each. Loss and metrics as "vanilla"."""
    low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
    high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
    options = LossOptions(clip_low=low, clip_high=high, dual_clip=config.get("clip_ratio_c", 3.0))
    weights = token_weights(response_mask, loss_agg_mode, config.global_batch_info)
    # rollout weights are not negative, and the clipped objective is linear in the advantage
    scaled = advantages if rollout_is_weights is None else advantages * rollout_is_weights
    streams = TokenStreams(
        target=torch.zeros(log_prob.numel(), dtype=torch.int64, device=log_prob.device),
        segment=response_mask.flatten().to(torch.uint8),  # Segment.RL is 1
        loss_weight=weights.flatten(),
        old_logprob=old_log_prob.flatten().float(),
        advantage=scaled.flatten().float(),
    )
    loss, _ = scope_loss(log_prob.flatten(), streams, options)
    return loss, _policy_metrics(log_prob.detach() - old_log_prob, advantages, response_mask, options)


def _policy_metrics(log_ratio: Tensor, advantages: Tensor, mask: Tensor, options: LossOptions) -> dict[str, float]:
    """The three metrics of verl's vanilla loss, under its names."""
    log_ratio = log_ratio.clamp(-20.0, 20.0)
    ratio = log_ratio.exp()
    bounded = ratio.clamp(1 - options.clip_low, 1 + options.clip_high)
    objective = torch.minimum(ratio * advantages, bounded * advantages)
    floored = (advantages < 0) & (objective < options.dual_clip * advantages)
    count = mask.sum().clamp(min=1)
    values = (bounded * advantages < ratio * advantages, -log_ratio, floored)
    means = torch.stack([torch.where(mask.bool(), value.float(), 0.0).sum() / count for value in values])
    return dict(zip(("actor/pg_clipfrac", "actor/ppo_kl", "actor/pg_clipfrac_lower"), means.tolist(), strict=True))


def set_scope_loss(worker_group: Any, actor_config: Any, nll_coef: float = 0.3, nll_shape: str = "constant") -> None:
    """Have every worker of an actor worker group (anything with verl's set_loss_fn) train with mixed_loss."""
    worker_group.set_loss_fn(partial(mixed_loss, config=actor_config, nll_coef=nll_coef, nll_shape=nll_shape))


def mixed_loss(
    config: Any, model_output: dict, data: Any, dp_group: Any = None, nll_coef: float = 0.3, nll_shape: str = "constant"
) -> tuple[Tensor, dict[str, Any]]:
    """verl's ppo_loss on the student's tokens of a micro-batch, plus nll_coef * NLL on the teacher's.

    Raises KeyError for a batch without "scope_segment", ValueError where it has another shape than the responses, or a
    row that is too short or holds anything but segments.
    """
    mask = _padded(data["response_mask"]).bool()
    segment = _segments(data, mask)
    rl = data.copy()  # a shallow copy: the batch itself keeps its mask
    rl["response_mask"] = _like(data["response_mask"], mask & (segment == Segment.RL))
    policy_loss, metrics = losses.ppo_loss(config, model_output, rl, dp_group)

    nll = mask & (segment == Segment.NLL)
    log_prob = padding.no_padding_2_padding(model_output["log_probs"], data)
    entropy = model_output.get("entropy")
    if nll_shape == "entropy" and entropy is None:
        raise ValueError('nll_shape="entropy" needs the entropies: set actor.calculate_entropy=True')
    weights = token_weights(nll, config.loss_agg_mode, config.global_batch_info)
    streams = TokenStreams(
        target=torch.zeros(nll.numel(), dtype=torch.int64, device=nll.device),
        segment=nll.flatten().to(torch.uint8) * int(Segment.NLL),
        loss_weight=nll_coef * weights.flatten(),
    )
    entropy = None if entropy is None else padding.no_padding_2_padding(entropy, data).flatten()
    nll_loss, _ = scope_loss(log_prob.flatten(), streams, LossOptions(nll_shape=nll_shape), entropy=entropy)
    metrics["actor/nll_loss"] = metric.Metric(value=nll_loss.detach(), aggregation=metrics["actor/pg_loss"].aggregation)
    metrics["actor/nll_tokens"] = metric.Metric(value=nll.sum(), aggregation=metric.AggregationType.SUM)
    return policy_loss + nll_loss, metrics


def _padded(values: Tensor) -> Tensor:
    """(B, R) of a nested or already padded tensor; padding is 0."""
    return torch.nested.to_padded_tensor(values, 0) if values.is_nested else values


def _like(original: Tensor, padded: Tensor) -> Tensor:
    """`padded` (B, R) in the layout and dtype of `original`."""
    padded = padded.to(original.dtype)
    return padding.response_to_nested(padded, original) if original.is_nested else padded


def _segments(data: Any, mask: Tensor) -> Tensor:
    """(B, R) uint8 from the batch's "scope_segment", wherever it is and whatever it is made of."""
    if "scope_segment" in data:
        found = data["scope_segment"]
    elif "extra_fields" in data and all("scope_segment" in row for row in data["extra_fields"]):
        found = [row["scope_segment"] for row in data["extra_fields"]]
    else:
        raise KeyError('the batch has no "scope_segment": one Segment per response token; without repairs use ppo_loss')
    if not isinstance(found, Tensor):
        if len(found) != len(mask):
            raise ValueError(f"scope_segment: {len(found)} rows, expected {len(mask)}, like response_mask")
        # the rows that verl adds to fill a batch are masked copies of another, with that one's longer list
        trained = mask.any(1).tolist()
        kept = (row if is_trained else () for row, is_trained in zip(found, trained, strict=True))
        rows = [torch.tensor(list(row), dtype=torch.float64) for row in kept]
        found = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=torch.nan)
    found = found.to(mask.device, torch.float64)  # NaN: no segment there
    found = torch.nested.to_padded_tensor(found, torch.nan) if found.is_nested else found
    found = torch.nn.functional.pad(found, (0, max(0, mask.shape[1] - found.shape[1])), value=torch.nan)
    if found.shape != mask.shape:
        raise ValueError(f"scope_segment {tuple(found.shape)}: expected {tuple(mask.shape)}, like response_mask")
    _check_segments(found, mask)
    return found.nan_to_num(0).to(torch.uint8)


def _check_segments(found: Tensor, mask: Tensor) -> None:
    """ValueError naming the row: cast to bytes, a wrong value would be another segment or none, without a word."""
    known = torch.tensor(list(map(float, Segment)), dtype=found.dtype, device=found.device)
    absent = found.isnan()
    bad = torch.where(absent, mask, ~torch.isin(found, known)).any(1)
    if bad.any():  # one wait for the device
        row = int(bad.nonzero()[0])
        if (absent[row] & mask[row]).any():
            raise ValueError(f"scope_segment: row {row} is shorter than its response, whose tokens each need a Segment")
        raise ValueError(f"scope_segment: row {row} holds a value that is no Segment (0, 1 or 2)")


def fused_head(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float = 1.0, reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """verl.utils.kernel.linear_cross_entropy.linear_cross_entropy: (logprob, entropy), each of labels' shape.

    hidden (..., D), weight (V, D), labels (...). Raises ValueError for a reduction and for a vocabulary split over a
    process group (Megatron's tensor parallelism), which this head does not have.
    """
    if reduction != "none":
        raise ValueError(f"reduction={reduction!r} is not supported: expected none")
    if dist_process_group is not None:
        raise ValueError("dist_process_group is set: a vocabulary split over ranks is not supported by this head")
    scored = linear_logprob(hidden.reshape(-1, hidden.shape[-1]), weight, labels.flatten(), temperature=temperature)
    return scored.logprob.view(labels.shape), scored.entropy.view(labels.shape)


def patch_fused_head() -> None:
    """Replaces verl's Triton head for the models that import it when they run (FSDP: dense and vision models).

    Megatron's fused forward binds the name earlier and keeps verl's kernel.
    """
    from verl.utils.kernel import linear_cross_entropy

    linear_cross_entropy.linear_cross_entropy = fused_head
