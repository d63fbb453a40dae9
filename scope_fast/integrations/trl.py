"""TRL's GRPOTrainer with our output layer, and with the SCOPE loss on completions whose suffix a teacher wrote.

    from scope_fast.integrations.trl import ScopeGRPOConfig, ScopeGRPOTrainer      # for GRPOConfig, GRPOTrainer

Every loss type: log-probabilities and entropies come from `linear_logprob`, of the scored rows alone (prompts, padding
and masked tokens never meet the head); the body of the model, the loss and its metrics stay TRL's.

`loss_type="scope"`: one `linear_scope_loss` over the completion tokens, 6*T*V*D flops in place of 8 and without the
rows of zero advantage. RL tokens are normalised as TRL's "dapo"; with no NLL token the loss equals it. A `rollout_func`
says which tokens are whose through one extra entry of its result,

    "scope_segment": one list per completion, one `Segment` per token (1 the student's, 2 the teacher's, 0 neither)

and whatever its `logprobs` say of the teacher's tokens is read as NaN: their distance to the student's would be taken
for the sampler's, and with it the gradient from the whole completion. Without that entry every token is the student's.

The private methods of TRL used here are listed in HOOKS; its version and their signatures are checked at import. Not
supported, refused by name: MoE auxiliary losses, DeepSpeed ZeRO-3, models whose logits are rescaled, adapters on the
head. Run in the tests in one process on CPU; the wrapped forward is TRL's own extension point, so DDP and FSDP should
behave as with TRL's head, but have not been run.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scope_fast.batch import NLL_SHAPES, LossOptions, Segment, TokenStreams, of_scaled_logits
from scope_fast.losses import linear_scope_loss
from scope_fast.model_checks import check_model, logit_scale
from scope_fast.ops.linear_logprob import linear_logprob

VERSIONS = "1.16"  # written and tested against this minor version: every hook below is private
# Overridden: _compute_loss (for "scope") and _generate_and_score_completions (carries the segments). Replaced on the
# model: the forward that add_fused_lm_head gave it, called by _get_per_token_logps_and_entropies.
HOOKS = {
    "GRPOTrainer._compute_loss": ("self", "model", "inputs"),
    "GRPOTrainer._generate_and_score_completions": ("self", "inputs"),
    "GRPOTrainer._get_per_token_logps_and_entropies": (
        "self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size", "compute_entropy",
        "compute_aux_loss", "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes",
        "num_tiles", "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
    ),
    "add_fused_lm_head": ("model", "temperature", "cast_lm_head_to_fp32", "outputs"),
    "FusedCausalLMOutput": (
        "loss", "log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1", "label_mask", "aux_loss",
    ),
}  # fmt: skip
SCORING = HOOKS["GRPOTrainer._get_per_token_logps_and_entropies"]
# the model's own inputs beside tokens and mask, as TRL's losses hand them on (two are for cutting batches only)
MULTIMODAL = set(SCORING[SCORING.index("pixel_values") :]) - {"num_images", "num_tiles"}


def check_hooks(version: str, found: Mapping[str, Callable]) -> None:
    """Raises ImportError, naming what differs, unless TRL is what this module was written against."""
    if not version.startswith(VERSIONS + "."):
        raise ImportError(f"scope_fast.integrations.trl is written for trl {VERSIONS}.x, this is trl {version}")
    for name, expected in HOOKS.items():
        if name not in found:
            raise ImportError(f"scope_fast.integrations.trl: trl {version} has no {name}")
        actual = tuple(inspect.signature(found[name]).parameters)
        if actual != expected:
            raise ImportError(
                f"scope_fast.integrations.trl: {name} of trl {version} takes ({', '.join(actual)}), "
                f"expected ({', '.join(expected)})"
            )


def _import_trl() -> tuple[type, type, type]:
    """GRPOConfig, GRPOTrainer and FusedCausalLMOutput of a TRL that passed check_hooks."""
    try:
        import trl
        from trl import GRPOConfig, GRPOTrainer
        from trl.trainer import utils
    except ImportError as error:
        raise ImportError(
            f"scope_fast.integrations.trl needs trl {VERSIONS} (pip install 'scope-fast[trl]')"
        ) from error
    owners = {"GRPOTrainer": GRPOTrainer}
    found = {}
    for name in HOOKS:
        owner, _, attribute = name.rpartition(".")
        value = getattr(owners.get(owner, utils), attribute, None)
        if value is not None:
            found[name] = value
    check_hooks(trl.__version__, found)
    return GRPOConfig, GRPOTrainer, utils.FusedCausalLMOutput


GRPOConfig, GRPOTrainer, FusedCausalLMOutput = _import_trl()


@dataclass
class ScopeGRPOConfig(GRPOConfig):
    """GRPOConfig with loss_type "scope" and the weight of the teacher's tokens; the other fields mean what they did."""

    loss_type: str = field(default="scope", metadata={"help": '"scope", or any of TRL\'s own'})
    nll_coef: float = field(default=0.3, metadata={"help": "scale of the likelihood on the teacher's tokens"})
    nll_shape: str = field(default="constant", metadata={"help": f"one of {', '.join(NLL_SHAPES)} (LossOptions)"})
    nll_normalizer: str = field(
        default="own", metadata={"help": "divide NLL by the count of NLL tokens (own) or of all trained tokens (joint)"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nll_normalizer not in ("own", "joint"):
            raise ValueError(f"nll_normalizer={self.nll_normalizer!r}: expected own or joint")
        if self.loss_type == "scope":
            scope_options(self)


def scope_options(args: GRPOConfig) -> LossOptions:
    """The loss TRL's arguments describe. Raises ValueError for those that linear_scope_loss cannot express."""
    refused = {
        "importance_sampling_level": args.importance_sampling_level != "token",
        "top_entropy_quantile": args.top_entropy_quantile < 1.0,
        "off_policy_mask_threshold": args.off_policy_mask_threshold is not None,
        "use_bias_correction_kl": args.beta != 0.0 and args.use_bias_correction_kl,  # TRL's default: set it to False
        "use_adaptive_entropy": args.use_adaptive_entropy,
        "entropy_coef": args.entropy_coef != 0.0,  # TRL means it over a micro-batch, whatever normalises the policy
    }
    for name, is_set in refused.items():
        if is_set:
            raise ValueError(f'{name}={getattr(args, name)} is not supported by loss_type="scope"')
    high = args.epsilon if args.epsilon_high is None else args.epsilon_high
    if args.delta is not None and args.delta <= 1.0 + high:
        raise ValueError(f"delta={args.delta}: expected a value above 1 + epsilon_high = {1.0 + high}")
    return LossOptions(
        clip_low=args.epsilon,
        clip_high=high,
        dual_clip=args.delta,
        kl="k3" if args.beta else "none",
        kl_coef=args.beta,
        nll_shape=getattr(args, "nll_shape", "constant"),
        temperature=args.temperature,
    )


def replace_fused_head(
    model: nn.Module, temperature: float, cast_lm_head_to_fp32: bool, backend: str | None = None
) -> None:
    """`model(..., labels=, fused_lm_head=True)` scores through linear_logprob; with scope= it returns (loss, metrics).

    model: one that add_fused_lm_head was called on; every other call goes to the forward it has. scope: (streams of
    all B * L positions, options), for linear_scope_loss. Raises ValueError for heads that are not hidden @ weight.T.
    """
    check_model(model)
    scale = logit_scale(model)
    forward = model.forward

    def rows_of(self: nn.Module, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor, Tensor | None]:
        """Hidden states (B, L, D), weight and bias; looked up at each call, since wrappers replace modules."""
        if kwargs.get("output_router_logits"):
            raise ValueError("output_router_logits: the MoE auxiliary loss is not supported by this head")
        hidden = self.base_model(*args, **kwargs, use_cache=False).last_hidden_state
        head = self.get_output_embeddings()
        if hasattr(head.weight, "ds_id"):
            raise ValueError("DeepSpeed ZeRO-3 partitions the head between forward and backward: not supported")
        return (hidden.float() if cast_lm_head_to_fp32 else hidden), head.weight, head.bias

    @functools.wraps(type(model).forward)  # generate() validates its arguments against this signature
    def scoring_forward(self, *args, fused_lm_head: bool = False, labels=None, scope=None, **kwargs):
        if not fused_lm_head:
            return forward(*args, **kwargs) if labels is None else forward(*args, labels=labels, **kwargs)
        hidden, weight, bias = rows_of(self, args, kwargs)
        enabled = torch.is_autocast_enabled(hidden.device.type) and not cast_lm_head_to_fp32
        with torch.autocast(hidden.device.type, torch.get_autocast_dtype(hidden.device.type), enabled=enabled):
            if scope is not None:
                streams, options = scope
                streams = of_scaled_logits(streams, options.temperature, scale)
                return linear_scope_loss(hidden.flatten(0, 1), weight, streams, options, bias=bias, backend=backend)
            return _score(hidden, weight, bias, labels, temperature / scale, backend)

    model.forward = types.MethodType(scoring_forward, model)


def _score(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, temperature: float, backend: str | None
):
    """FusedCausalLMOutput of the labels that are not -100; every per-token field is (B, L - 1), zero elsewhere."""
    mask = labels[:, 1:] != -100
    scored = linear_logprob(
        hidden[:, :-1][mask], weight, labels[:, 1:][mask], bias=bias, temperature=temperature, backend=backend
    )
    # masked_scatter keeps an all-masked micro-batch connected to the model: a zero that can be differentiated
    logprob, entropy = (x.new_zeros(mask.shape).masked_scatter(mask, x) for x in scored[:2])
    return FusedCausalLMOutput(
        loss=-logprob.sum() / mask.sum().clamp(min=1), log_probs=logprob, entropy=entropy, label_mask=mask
    )


def without_suffix_logprobs(rollout_func: Callable) -> Callable:
    """`rollout_func`, with NaN for the log-probability of every token that is not the student's by "scope_segment".

    TRL corrects by the ratio of the trainer's to the sampler's probability, of whole sequences by default, and takes a
    NaN for 1. Lists of another length than their segments are left for `segments` to refuse.
    """

    @functools.wraps(rollout_func)
    def wrapped(prompts, trainer):
        output = rollout_func(prompts, trainer)
        if output.get("scope_segment") is None or output.get("logprobs") is None:
            return output
        pairs = zip(output["logprobs"], output["scope_segment"], strict=True)
        return {**output, "logprobs": [_students(row, segment) for row, segment in pairs]}

    return wrapped


def _students(logprobs: list[Any], segment: list[int] | None) -> list[Any]:
    if segment is None or len(segment) != len(logprobs):
        return logprobs
    return [value if kind == Segment.RL else float("nan") for value, kind in zip(logprobs, segment, strict=True)]


def segments(inputs: list[dict[str, Any]], completion_mask: Tensor, loss_mask: Tensor) -> Tensor:
    """(B, C) uint8 from the lists a rollout_func returned as "scope_segment"; zero where loss_mask is.

    completion_mask: (B, C), 1 for a completion's tokens; a row of zeros (mask_truncated_completions) says nothing of
    its length. Raises ValueError naming the row whose list is missing, too short or too long, or holds anything but 0,
    1 and 2.
    """
    if not any("scope_segment" in row for row in inputs):
        return loss_mask.to(torch.uint8)  # Segment.RL is 1
    padded = torch.zeros(completion_mask.shape, dtype=torch.uint8)
    for i, row in enumerate(inputs):
        values, length = row.get("scope_segment"), int(completion_mask[i].sum())
        if values is None or len(values) > padded.shape[1] or (length and len(values) != length):
            found = "missing" if values is None else f"{len(values)} values"
            raise ValueError(f"scope_segment of completion {i}: {found}, expected one for each of its {length} tokens")
        if not set(map(int, values)) <= set(Segment):
            raise ValueError(f"scope_segment of completion {i} holds {sorted(set(values))}: expected 0, 1 and 2")
        padded[i, : len(values)] = torch.tensor([int(v) for v in values], dtype=torch.uint8)
    return padded.to(loss_mask.device) * loss_mask.to(torch.uint8)


def scope_streams(inputs: Mapping[str, Tensor], rl_weight: Tensor, nll_weight: Tensor) -> TokenStreams:
    """Streams over all B * L positions of prompt and completion, so that no hidden state is copied to be dropped.

    rl_weight, nll_weight: the loss_weight of a token of that kind. TRL's importance-sampling ratio, which is not
    negative, scales the advantage: the clipped objective is linear in it, and the KL term stays outside.
    """
    prompt, completion, segment = inputs["prompt_ids"], inputs["completion_ids"], inputs["scope_segment"]

    def place(values: Tensor) -> Tensor:
        """(B, C) to (B * L,): the state before a completion's token predicts it."""
        return F.pad(values, (prompt.shape[1] - 1, 1)).flatten()

    advantage = inputs["advantages"].float()
    advantage = advantage.unsqueeze(1) if advantage.dim() == 1 else advantage
    if "importance_sampling_ratio" in inputs:
        advantage = advantage * inputs["importance_sampling_ratio"]
    optional = {
        "old_logprob": inputs.get("old_per_token_logps"),
        "ref_logprob": inputs.get("ref_per_token_logps"),
    }
    return TokenStreams(
        target=place(completion),
        segment=place(segment),
        loss_weight=place(torch.where(segment == Segment.NLL, nll_weight, rl_weight)),
        advantage=place(advantage.expand(segment.shape)),
        **{name: place(value.float()) for name, value in optional.items() if value is not None},
    )


class ScopeGRPOMixin:
    """What ScopeGRPOTrainer adds to GRPOTrainer, for subclasses of it that somebody else wrote: put it first."""

    scope_backend: str | None = None  # of our ops; None chooses by device

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if self.aux_loss_enabled:
            raise ValueError("output_router_logits=True: the MoE auxiliary loss is not supported by this head")
        self.scope_options = scope_options(self.args) if self.loss_type == "scope" else None
        if self.scope_options is not None and self.rollout_func is not None:
            self.rollout_func = without_suffix_logprobs(self.rollout_func)
        for model in (self.model, self.ref_model):
            if model is not None:
                model = self.accelerator.unwrap_model(model)
                base = model.get_base_model() if hasattr(model, "peft_config") else model
                replace_fused_head(base, self.temperature, self.args.cast_lm_head_to_fp32, self.scope_backend)

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if self.loss_type != "scope":
            return output
        mask = output["completion_mask"]
        loss_mask = mask * output["tool_mask"] if "tool_mask" in output else mask
        segment = output["scope_segment"] = segments(inputs, mask, loss_mask)
        counts = torch.stack([(segment == kind).sum() for kind in (Segment.RL, Segment.NLL)])
        output["scope_rl_count"], output["scope_nll_count"] = self.accelerator.reduce(counts, reduction="sum").unbind()
        return output

    def _compute_loss(self, model, inputs):
        if self.loss_type != "scope":
            return super()._compute_loss(model, inputs)
        mode = "train" if self.model.training else "eval"
        rl_count, nll_count = inputs["scope_rl_count"], inputs["scope_nll_count"]
        if getattr(self.args, "nll_normalizer", "own") == "joint":
            nll_count = rl_count + nll_count
        # the counts are those of all processes and of the generation batch; DDP and FSDP average over processes
        share = 1.0 / self.accelerator.num_processes
        if mode == "train":
            share *= self.current_gradient_accumulation_steps / self.args.steps_per_generation
        rl_weight = 1.0 / (rl_count.clamp(min=1) * share)
        nll_weight = getattr(self.args, "nll_coef", 0.3) / (nll_count.clamp(min=1) * share)
        streams = scope_streams(inputs, rl_weight, nll_weight)
        with self.accelerator.autocast():
            loss, metrics = model(
                input_ids=torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
                attention_mask=torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
                fused_lm_head=True,
                scope=(streams, self.scope_options),
                **{name: inputs[name] for name in MULTIMODAL if inputs.get(name) is not None},
            )
        self._log_scope(mode, metrics)
        return loss

    def _log_scope(self, mode: str, metrics: dict[str, Tensor]) -> None:
        """Sums over the rows computed, of all processes, as means: one host sync, as TRL's own metrics cost."""
        names = ("loss/rl", "loss/nll", "policy/rows", "policy/entropy_sum", "policy/kl_sum", "policy/clipped")
        sums = self.accelerator.reduce(torch.stack([metrics[name] for name in names]), reduction="sum")
        rl, nll, rows, entropy, kl, clipped = sums.tolist()
        logged = self._metrics[mode]
        # each micro-batch of an accumulated step holds a share of the loss, and TRL logs their mean
        shares = self.current_gradient_accumulation_steps if mode == "train" else 1
        logged["scope/loss_rl"].append(shares * rl / self.accelerator.num_processes)
        logged["scope/loss_nll"].append(shares * nll / self.accelerator.num_processes)
        if rows:
            logged["entropy"].append(entropy / rows)
            logged["scope/kl_old"].append(kl / rows)
            logged["clip_ratio/region_mean"].append(clipped / rows)


class ScopeGRPOTrainer(ScopeGRPOMixin, GRPOTrainer):
    """GRPOTrainer on our output layer. Takes GRPOConfig for TRL's losses, ScopeGRPOConfig for loss_type "scope"."""
