"""Model FLOPs of an update, and what a GPU could do at most: the two halves of perf/mfu.

    2 a weight and token in every matrix of the blocks       2 * V * D a row of the head
    4 * heads * head size a block and pair of tokens that attend: scores and weighted values of causal attention

for the forward; the backward computes the gradient of each product's inputs for as much again, and of its weights,
where they are trained. "Model" as in PaLM (arXiv 2204.02311, appendix B): what is recomputed, or computed twice, or
masked away, does not count, so that the figure compares implementations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from scope_fast.batch import MicroBatch, sequence_lengths

# dense bfloat16 matrix products in TFLOP/s, by the beginning of the device's name; NVIDIA's and AMD's data sheets
PEAK_TFLOPS = {
    "NVIDIA A100": 312, "NVIDIA A800": 312, "NVIDIA H100 PCIe": 756, "NVIDIA H100 NVL": 835, "NVIDIA H100": 989,
    "NVIDIA H800": 989, "NVIDIA H200": 989, "NVIDIA GH200": 989, "NVIDIA B200": 2250, "NVIDIA L40S": 362,
    "AMD Instinct MI300X": 1307,
}  # fmt: skip


@dataclass(frozen=True)
class ModelFlops:
    """Of forward and backward together: for a token in the blocks, a pair that attends, a row of the head."""

    token: int
    pair: int
    row: int

    def of(self, batch: MicroBatch) -> int:
        """The FLOPs of one micro-batch that is still on the host."""
        pairs = sum(n * (n + 1) // 2 for n in sequence_lengths(batch.position_ids))
        return self.token * len(batch.input_ids) + self.pair * pairs + self.row * len(batch.streams)


def model_flops(model: nn.Module) -> ModelFlops | None:
    """Of a dense decoder; None where it has something else: experts, convolutions, windows of attention."""
    config = model.config.get_text_config()
    layers = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    others = any(p.dim() > 2 for p in model.base_model.parameters())
    experts = any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    if others or experts or set(layers) != {"full_attention"}:
        return None
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    matrices = [m.weight for m in model.base_model.modules() if isinstance(m, nn.Linear)]
    return ModelFlops(
        token=sum(map(_product, matrices)),
        pair=3 * 4 * config.num_attention_heads * head_dim * len(layers),
        row=_product(model.get_output_embeddings().weight),
    )


def _product(weight: torch.Tensor) -> int:
    """Of one row through a matrix and back."""
    return (4 + 2 * weight.requires_grad) * weight.numel()


def peak_tflops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The data sheet's dense bfloat16 rate of a GPU; None for an unknown one, a CPU, or another dtype."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((float(peak) for known, peak in PEAK_TFLOPS.items() if name.startswith(known)), None)
