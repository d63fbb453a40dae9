"""FSDP2 over a Hugging Face causal LM with its loss inside: parameters, gradients and optimiser state in shards.

    unit                                   gathered                             freed
    each decoder block                     before its forward and backward      after either
    an untied embedding                    before its forward                   after it
    the root (final norm, output head,     before the first block               at the end of the backward
    a tied embedding with them)

The loss runs inside the root's forward, so the head is gathered once, with the root, and its gradient leaves through
the same reduce-scatter as everybody's. (`head.full_tensor()` outside would give each rank a slice of its LOCAL
gradient.) A tied embedding and head are one parameter and must share a unit: torch >= 2.13 refuses anything else.

Losses are sums whose weights carry the global counts, so gradients are SUMMED over ranks, not averaged: divide factor
1, and plain SUM as the collective's reduction, which gloo needs and NCCL does not mind.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard

from scope_fast import distributed


def make_mesh(shard_size: int | None = None, timeout_s: float = 1800.0) -> DeviceMesh:
    """All ranks in one mesh: 1-D, or (replicate, shard) where shard groups are smaller than the world (HSDP).

    shard_size: ranks that share one copy of the model; None: those of a node, so that only gradients leave it.
    timeout_s: longest wait of a collective of the smaller groups, which do not inherit the default group's.
    Raises ValueError where the world is no multiple of it.
    """
    world = distributed.world_size()
    size = shard_size or min(distributed.ranks_per_node(), world)
    if world % size:
        raise ValueError(f"learner.shard_size={size}: the world of {world} ranks is no multiple of it")
    kind = distributed.device().type
    if size == world:
        return init_device_mesh(kind, (world,), mesh_dim_names=("shard",))
    ranks, timeout = torch.arange(world).view(-1, size), timedelta(seconds=timeout_s)
    mine = [dist.new_subgroups_by_enumeration(rows.tolist(), timeout)[0] for rows in (ranks.T, ranks)]
    return DeviceMesh.from_group(mine, kind, mesh=ranks, mesh_dim_names=("replicate", "shard"))


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks of a transformers model. ValueError where they are not found under the usual name."""
    layers = getattr(model.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(
            f"{type(model).__name__}: base_model.layers is no ModuleList, so it cannot be sharded by block"
        )
    return layers


def shard(root: nn.Module, model: nn.Module, mesh: DeviceMesh, compute_dtype: torch.dtype, offload: bool) -> None:
    """Shards `root`, which holds the Hugging Face `model` and runs the loss in its forward, in place.

    compute_dtype: of gathered parameters, activations and the head; gradients are reduced in the dtype of the weights
    (float32 for float32 master weights). offload: shards and optimiser state live in host memory.
    """
    dtype = next(model.parameters()).dtype
    lower = compute_dtype if compute_dtype != dtype and dtype != torch.float64 else None
    policy = MixedPrecisionPolicy(param_dtype=lower, reduce_dtype=dtype)
    # of the root nothing is cast: streams are float32 whatever the model computes in
    root_policy = MixedPrecisionPolicy(param_dtype=lower, reduce_dtype=dtype, cast_forward_inputs=False)
    placement = {"offload_policy": CPUOffloadPolicy()} if offload else {}
    for block in decoder_layers(model):
        fully_shard(block, mesh=mesh, mp_policy=policy, **placement)
    if not model.config.tie_word_embeddings:
        fully_shard(model.get_input_embeddings(), mesh=mesh, mp_policy=policy, **placement)
    fully_shard(root, mesh=mesh, mp_policy=root_policy, **placement)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def use_liger(model: nn.Module) -> None:
    """Puts liger-kernel's RMSNorm, RoPE and SwiGLU into the model; the head stays ours. Not run on a GPU yet.

    ValueError without a CUDA GPU (they are Triton kernels) and for a model it has none for, ImportError without the
    package.
    """
    if not torch.cuda.is_available():
        raise ValueError("learner.liger: liger-kernel's layers need a CUDA GPU")
    try:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ModuleNotFoundError as error:
        raise ImportError("learner.liger needs liger-kernel: pip install 'scope-fast[gpu]'") from error
    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:  # which it would leave as they are
        raise ValueError(f"learner.liger: liger-kernel has no layers for model type {model.config.model_type}")
    _apply_liger_kernel_to_instance(model, fused_linear_cross_entropy=False, cross_entropy=False)


def checkpoint_activations(model: nn.Module, kind: str) -> None:
    """Recomputes blocks in the backward instead of keeping their activations: "full" all of them, "selective" every
    other one, "none" keeps everything. About 4/3 of the time ("selective": 7/6), for keeping only a recomputed block's
    input.
    """
    if kind == "none":
        return
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for i, block in enumerate(decoder_layers(model)):
        block.gradient_checkpointing = kind == "full" or i % 2 == 0
        # transformers recomputes only blocks in training mode; their children stay in eval mode, so nothing drops out
        block.training = True
