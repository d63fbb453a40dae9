"""What a configuration asks that cannot be here: found before it has cost a model, an engine or a step."""

from __future__ import annotations

import torch
from transformers import AutoConfig, AutoTokenizer

from scope_fast import attention, distributed
from scope_fast.config import Config
from scope_fast.loading import check_shared_tokenizer, loading
from scope_fast.metrics import import_wandb
from scope_fast.ops import dispatch
from scope_fast.rollout import vllm_process
from scope_fast.rollout.server_process import gpu_names


def check_here(config: Config) -> None:
    """ValueError for what these ranks and devices cannot do, ImportError for a package that is not installed."""
    ranks, device = distributed.world_size(), distributed.device().type
    rollout, learner = config.rollout, config.learner
    if rollout.prompts_per_step < ranks:
        raise ValueError(f"rollout.prompts_per_step={rollout.prompts_per_step}: at least one for each of {ranks} ranks")
    if rollout.server_gpus and ranks > 1:
        raise ValueError(
            f"rollout.server_gpus: each of {ranks} ranks would start a server on them; start one and name it as "
            "rollout.server_url"
        )
    try:
        gpu_names(tuple(rollout.server_gpus or ()))
    except ValueError as error:
        raise ValueError(f"rollout.{error}") from None
    if rollout.transfer in ("ipc", "nccl") and device == "cpu":
        raise ValueError(f"rollout.transfer={rollout.transfer}: the learner is on the CPU; take auto or shm")
    if learner.cpu_offload and (ranks == 1 or device == "cpu"):
        raise ValueError("learner.cpu_offload: it is FSDP2's of weights sharded over GPUs")
    if learner.shard_size and ranks > 1 and ranks % learner.shard_size:
        raise ValueError(f"learner.shard_size={learner.shard_size}: {ranks} ranks are no multiple of it")
    if learner.attention == "flex_attention" and device == "cpu":
        raise ValueError("learner.attention: flex_attention has no backward on a CPU")
    attention.implementation(getattr(torch, config.model.dtype), learner.attention)
    if learner.liger and device == "cpu":
        raise ValueError("learner.liger: liger-kernel's layers need a CUDA GPU")
    if config.logging.wandb_project and distributed.is_main():
        import_wandb()
    if backend := config.loss.backend:
        for stem in ("linear_scope_loss", "linear_logprob"):
            if missing := dispatch.missing_for(stem, backend, device):
                raise ValueError(f"loss.backend={backend}: {missing}")


def check_context(config: Config, folder: str) -> None:
    """ValueError for a context that the student has no positions for."""
    own = AutoConfig.from_pretrained(folder).get_text_config()
    rope = getattr(own, "rope_parameters", None) or {}
    longest = getattr(own, "max_position_embeddings", None)
    # what a scaled RoPE, or one for each kind of layer, makes of its positions, the engine knows
    plain = rope.get("rope_type", "default") == "default" and not any(isinstance(v, dict) for v in rope.values())
    if longest and plain and config.rollout.context > longest:
        raise ValueError(f"rollout.context={config.rollout.context}: the model at model.path allows {longest}")


def check_teacher_tokenizer(config: Config, folder: str, tokenizer) -> None:
    """ValueError for a teacher whose token ids mean other tokens than the student's."""
    with loading("teacher.path", folder):
        own = AutoTokenizer.from_pretrained(folder)
    check_shared_tokenizer(tokenizer, own, "teacher.path")


def check_sampled_by(engine: str, student) -> None:
    """ValueError for a mixture of experts sampled by vLLM: the weight sync does not update its experts correctly."""
    if engine == "transformers" or (engine == "auto" and not vllm_process.is_installed()):
        return
    if any("experts" in name and p.dim() == 3 for name, p in student.base_model.named_parameters()):
        raise ValueError(
            f"rollout.engine: the experts of {type(student).__name__} do not reach vLLM by the weight sync; take "
            "transformers"
        )


def check_classes(engine, key: str, folder: str, instead: str) -> None:
    """ValueError for an engine whose model runs on transformers' own classes, changed for the whole process."""
    if engine.changes_transformers:
        raise ValueError(
            f"{key}: vLLM serves {folder} by transformers' own classes, which it changes in the whole process, the "
            f"learner's too; take {instead}"
        )
