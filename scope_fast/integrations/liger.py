"""The call of Liger's LigerFusedLinearGRPOLoss (liger-kernel 0.8), ours inside. Needs no liger-kernel.

    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss              # your line
    from scope_fast.integrations.liger import LigerFusedLinearGRPOLoss          # our line

The same arguments, loss, gradients and metrics for the token-level losses grpo, bnpo, dr_grpo and dapo. Of the clipped
share, Liger's leaves out rows bounded by `delta`, ours those without gradient (vllm_is_ratio 0). Logits are computed
once (6*T*V*D flops in place of 8), and rows that are masked or have no gradient never meet the head: with a KL penalty
all unmasked rows do, and its metric costs one more forward of the head (8).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scope_fast.batch import LossOptions, Segment, TokenStreams
from scope_fast.losses import linear_scope_loss
from scope_fast.ops.linear_logprob import linear_logprob

LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")


class LigerFusedLinearGRPOLoss(nn.Module):
    """Constructor and forward of Liger's module.

    compiled, chunk_size: accepted, and without effect: there is nothing to compile, chunks follow from the vocabulary.
    sapo_*, vespo_*: accepted for the signature's sake; the losses that read them are refused.
    Raises ValueError, by name, for the other loss types, sequence-level ratios, a bias-corrected KL, and a delta that
    does not lie above the clipping range.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ) -> None:
        super().__init__()
        if loss_type not in LOSS_TYPES:
            raise ValueError(f"loss_type={loss_type!r} is not supported: expected one of {', '.join(LOSS_TYPES)}")
        if importance_sampling_level != "token":
            raise ValueError(
                f"importance_sampling_level={importance_sampling_level!r} is not supported: expected token"
            )
        if use_bias_correction_kl and beta:
            raise ValueError("use_bias_correction_kl=True is not supported")
        if delta is not None and delta <= 1.0 + epsilon_high:
            raise ValueError(f"delta={delta}: expected a value above 1 + epsilon_high = {1.0 + epsilon_high}")
        if loss_type == "dr_grpo" and max_completion_length is None:
            raise ValueError("max_completion_length is None: dr_grpo divides by it")
        self.loss_type, self.max_completion_length = loss_type, max_completion_length
        self.beta, self.use_ref_model = beta, use_ref_model
        has_kl = use_ref_model and beta != 0.0  # without a reference Liger's penalty is identically zero
        self.options = LossOptions(
            clip_low=epsilon_low, clip_high=epsilon_high, dual_clip=delta, temperature=temperature,
            kl="k3" if has_kl else "none", kl_coef=beta if has_kl else 0.0,
        )  # fmt: skip

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: Tensor | float | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """_input (B, T, D), selected_token_ids and attention_mask (B, T), advantages (B,).

        Returns the loss and Liger's metrics: the mean KL if beta is not 0, and the share of clipped tokens.
        """
        mask = attention_mask.to(torch.bool)
        hidden, rows = _input.flatten(0, 1), mask.flatten()
        lin_weight, bias = _as(_input.dtype, lin_weight, bias)
        if self.options.kl_coef and ref_per_token_logps is None:
            ref_per_token_logps = self._reference(selected_token_ids, mask, ref_input, ref_weight, ref_bias)
        advantage = advantages.float().unsqueeze(1).expand(mask.shape)
        if vllm_is_ratio is not None:  # not negative, and the clipped objective is linear in the advantage
            advantage = advantage * vllm_is_ratio.view(mask.shape[0], -1)
        streams = TokenStreams(
            target=selected_token_ids.flatten().long(),
            segment=rows.to(torch.uint8) * int(Segment.RL),
            loss_weight=self._weights(mask, num_items_in_batch).flatten(),
            advantage=advantage.flatten(),
            old_logprob=None if old_per_token_logps is None else old_per_token_logps.float().flatten(),
            ref_logprob=None if ref_per_token_logps is None else ref_per_token_logps.float().flatten(),
        )
        loss, metrics = linear_scope_loss(hidden, lin_weight, streams, self.options, bias=bias)
        count = rows.sum().clamp(min=1)
        clipped = metrics["policy/clipped"] / count
        if self.beta == 0.0:
            return loss, (clipped,)
        return loss, (self._kl_sum(hidden, lin_weight, bias, streams, rows) / count, clipped)

    def _weights(self, mask: Tensor, num_items_in_batch: Tensor | float | None) -> Tensor:
        """(B, T) float32: what a token's loss is multiplied by."""
        ones, batch = mask.float(), mask.shape[0]
        if self.loss_type == "grpo":
            return ones / ones.sum(1, keepdim=True).clamp(min=1.0) / batch
        if self.loss_type == "bnpo":
            return ones / ones.sum().clamp(min=1.0)
        if self.loss_type == "dr_grpo":
            return ones / (batch * self.max_completion_length)
        spread = torch.distributed.is_available() and torch.distributed.is_initialized()
        total = ones.sum() if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=mask.device)
        if spread and num_items_in_batch is None:
            torch.distributed.all_reduce(total)
        return ones / (total.float() / (torch.distributed.get_world_size() if spread else 1)).clamp(min=1.0)

    @torch.no_grad()
    def _reference(
        self, target: Tensor, mask: Tensor, ref_input: Tensor | None, ref_weight: Tensor | None, ref_bias: Tensor | None
    ) -> Tensor:
        """Reference log-probabilities (B, T) of the unmasked tokens."""
        if ref_input is None or ref_weight is None:
            raise ValueError(f"beta={self.beta} needs ref_per_token_logps, or ref_input and ref_weight")
        weight, bias = _as(ref_input.dtype, ref_weight, ref_bias)
        scored = linear_logprob(
            ref_input[mask], weight, target[mask].long(), bias=bias, temperature=self.options.temperature
        )
        return scored.logprob.new_zeros(mask.shape).masked_scatter(mask, scored.logprob)

    @torch.no_grad()
    def _kl_sum(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, streams: TokenStreams, rows: Tensor
    ) -> Tensor:
        """Sum over the unmasked rows of the k3 estimate: zero without a reference."""
        if not self.options.kl_coef:
            return hidden.new_zeros((), dtype=torch.float32)
        temperature = self.options.temperature
        logprob = linear_logprob(
            hidden[rows], weight, streams.target[rows], bias=bias, temperature=temperature
        ).logprob  # fmt: skip
        gap = streams.ref_logprob[rows] - logprob
        return (gap.exp() - gap - 1).sum()


def _as(dtype: torch.dtype, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A head in the dtype of its hidden states: Liger takes float32 ones of bfloat16 states, outside autocast too."""
    return weight.to(dtype), None if bias is None else bias.to(dtype)
