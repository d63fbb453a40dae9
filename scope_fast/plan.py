"""What a run would do and hold, before it starts: tokens a step, micro-batches, and bytes on every GPU by kind.

    weights, gradients, optimiser    4 + 4 + 8 bytes a parameter (float32 masters, AdamW), over the shard group
    gathered                         the root's unit and two blocks (one computing, the next on its way), compute dtype;
                                     of a lone process the copies it casts, whose blocks are kept if not recomputed
    activations                      of the token budget: `activation_bytes`, less what is recomputed
    head                             logits and their gradient, of the token budget or in chunks, and dW
    reward model                     every rank's own copy, in the compute dtype
    engine                           vLLM's share of the GPU, taken for good (weights, KV cache)
    reward engine, teacher engine    the same of a reward model and of a teacher that run in vLLM

An estimate: allocator fragmentation, CUDA contexts and NCCL buffers are one stated reserve. A teacher that samples with
transformers is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from scope_fast.config import Config
from scope_fast.kernels.plan import EXTRA_BYTES

GIB = 1 << 30
RESERVE_BYTES = 4 * GIB  # CUDA context, NCCL buffers, fragmentation: our allowance, not measured
MASTER_BYTES, GRADIENT_BYTES, MOMENT_BYTES = 4, 4, 8


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, by kind."""

    weights: float
    gradients: float
    optimizer: float
    reference: float
    gathered: float
    activations: float
    head: float
    reward_model: float
    engine: float
    reward_engine: float = 0.0
    teacher_engine: float = 0.0
    reserve: float = RESERVE_BYTES

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Sizes:
    """Of a decoder: parameters of the whole model, of one block, and of the root's unit (head, last norm)."""

    parameters: int
    block: int
    root: int
    layers: int
    hidden: int
    intermediate: int
    query: int  # heads times head size
    key: int
    vocabulary: int


def model_sizes(config: Config) -> Sizes:
    """Counted on the model itself, made without storage. ValueError where its architecture cannot be known here."""
    import torch
    from transformers import AutoModelForCausalLM

    from scope_fast.sharding import decoder_layers

    architecture = model_config(config)
    if not hasattr(architecture, "num_attention_heads") or not hasattr(architecture, "intermediate_size"):
        raise ValueError(f"model: {architecture.model_type} has no attention heads or no MLP by the usual names")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture)
    blocks = decoder_layers(model)

    def count(module):
        return sum(p.numel() for p in module.parameters())

    head_dim = getattr(architecture, "head_dim", None) or architecture.hidden_size // architecture.num_attention_heads
    total, in_blocks = count(model), count(blocks)
    outside = 0 if architecture.tie_word_embeddings else model.get_input_embeddings().weight.numel()
    return Sizes(
        total, in_blocks // len(blocks), total - in_blocks - outside, len(blocks), architecture.hidden_size,
        architecture.intermediate_size, architecture.num_attention_heads * head_dim,
        architecture.num_key_value_heads * head_dim, architecture.vocab_size,
    )  # fmt: skip


def model_config(config: Config):
    """The student's transformers configuration: `model.config` where it is given, else the model's own."""
    from transformers import AutoConfig

    if config.model.config:
        try:
            return AutoConfig.for_model(**config.model.config)
        except (TypeError, ValueError) as error:  # transformers': no model_type, or one that it does not know
            why = str(error).split("Should contain")[0]
            raise ValueError(f"model.config: no configuration of transformers' is made of it: {why}") from None
    if config.model.path == "tiny":
        return AutoConfig.for_model("qwen2", **config.warm_start.architecture)
    try:
        return AutoConfig.from_pretrained(config.model.path, local_files_only=True)  # a plan asks no network
    except OSError as error:
        raise ValueError(
            f"model.path: {config.model.path} cannot be read here, so its sizes are unknown; give model.config "
            f"(model_type, hidden_size, ...): {str(error).splitlines()[0]}"
        ) from None


def activation_bytes(sizes: Sizes, dtype_bytes: int) -> int:
    """Bytes that autograd keeps for one token in one block, with an attention that keeps no scores.

    Of each RMSNorm the float32 row, the normalised and the scaled one; rotated queries and keys, values, the
    attention's output; gate, SiLU(gate), up and their product. tests/test_plan.py counts what torch really saves.
    """
    norms = 2 * (4 + 2 * dtype_bytes) * sizes.hidden
    return norms + dtype_bytes * (2 * sizes.query + 2 * sizes.key + 4 * sizes.intermediate)


def reward_model_parameters(config: Config, sizes: Sizes) -> int:
    """Of the process reward model that `prm` puts on every GPU; where it is not here, as many as the student's. One in
    vLLM lies in that engine's share."""
    from transformers import AutoConfig, AutoModel

    own = config.scores_steps and config.prm.kind != "exact" and config.prm.engine != "vllm"
    if not own or config.prm.path == "tiny":
        return 0
    try:
        architecture = AutoConfig.from_pretrained(config.prm.path, local_files_only=True)
    except OSError:
        return sizes.parameters
    import torch

    with torch.device("meta"):
        return sum(p.numel() for p in AutoModel.from_config(architecture).parameters())


def memory(config: Config, sizes: Sizes, ranks: int, reward_parameters: int = 0) -> Memory:
    """Of one of `ranks` GPUs."""
    learner, dtype_bytes = config.learner, {"float32": 4, "bfloat16": 2}[config.model.dtype]
    shards = min(learner.shard_size or config.distributed.gpus_per_node, ranks)
    resident = 0 if learner.cpu_offload and ranks > 1 else sizes.parameters / shards
    kept = {"none": sizes.layers, "selective": sizes.layers // 2, "full": 0}[learner.activation_checkpointing]
    token = activation_bytes(sizes, dtype_bytes)
    # a recomputed block keeps its input, and is whole again, alone, in its own backward
    activations = (
        kept * token + (sizes.layers - kept) * dtype_bytes * sizes.hidden + (token if kept < sizes.layers else 0)
    )
    blocks = 2 if ranks > 1 else max(kept, 2)  # sharded ones are gathered again for the backward
    gathered = (sizes.root + blocks * sizes.block) * dtype_bytes if ranks > 1 or dtype_bytes < 4 else 0
    gpu_bytes = config.distributed.gpu_memory_gib * GIB
    head_weights = sizes.vocabulary * sizes.hidden
    head = EXTRA_BYTES + 4 * head_weights
    head = min(head, learner.token_budget * sizes.vocabulary * (4 + dtype_bytes)) + dtype_bytes * head_weights
    # "auto" is vLLM wherever it is installed
    teaches = config.repairs and config.teacher.kind == "model" and config.teacher.engine != "transformers"
    rollout = config.rollout
    scores = config.scores_steps and config.prm.engine == "vllm"
    elsewhere = (
        rollout.engine == "transformers" or rollout.server_url is not None or 0 not in (rollout.server_gpus or [0])
    )
    return Memory(
        weights=MASTER_BYTES * resident,
        gradients=GRADIENT_BYTES * resident,
        optimizer=MOMENT_BYTES * resident,
        reference=(config.loss.kl_coef > 0) * MASTER_BYTES * resident,
        gathered=gathered,
        activations=activations * learner.token_budget,
        head=head,
        reward_model=dtype_bytes * reward_parameters,
        engine=(not elsewhere) * rollout.gpu_memory_utilization * gpu_bytes,
        reward_engine=scores * config.prm.gpu_memory_utilization * gpu_bytes,
        teacher_engine=teaches * config.teacher.gpu_memory_utilization * gpu_bytes,
    )


def describe(config: Config) -> str:
    """The plan in words; ValueError naming what to change where it cannot fit `distributed.gpu_memory_gib`."""
    rollout, learner, ranks = config.rollout, config.learner, config.distributed.gpus
    rollouts = rollout.prompts_per_step * rollout.group_size
    lines = [
        f"plan: {config.steps} steps of {config.method}, each {rollouts} rollouts "
        f"({rollout.prompts_per_step} prompts x {rollout.group_size}) of at most {rollout.max_tokens} tokens, "
        f"{learner.minibatches * learner.epochs} optimiser step(s), micro-batches of {learner.token_budget} tokens",
        f"run directory: {config.run_dir}",
    ]
    if ranks is not None:
        lines[1:1] = _memory_lines(config, model_sizes(config), ranks)
    return "\n".join(lines)


def _memory_lines(config: Config, sizes: Sizes, ranks: int) -> list[str]:
    if config.learner.shard_size and ranks % config.learner.shard_size:
        raise ValueError(f"learner.shard_size={config.learner.shard_size}: {ranks} GPUs are no multiple of it")
    tokens = config.rollout.prompts_per_step * config.rollout.group_size * config.rollout.context
    micro_batches = -(-tokens // (ranks * config.learner.token_budget))
    held = memory(config, sizes, ranks, reward_model_parameters(config, sizes))
    limit = config.distributed.gpu_memory_gib
    lines = [
        f"{sizes.parameters:,} parameters on {ranks} GPUs of {limit:g} GiB; at most {tokens:,} tokens a step, "
        f"{micro_batches} micro-batches on each",
        "GiB on each GPU:",
        *(f"  {field.name:14} {getattr(held, field.name) / GIB:6.1f}" for field in fields(held)),
        f"  {'total':14} {held.total / GIB:6.1f}",
        f"host memory while loading: {ranks * sizes.parameters * MASTER_BYTES / GIB:.0f} GiB on all ranks together",
    ]
    if held.total > limit * GIB:
        largest = max((f.name for f in fields(held)), key=lambda name: getattr(held, name))
        raise ValueError(
            "\n".join(lines) + f"\ndistributed.gpu_memory_gib={limit:g}: the plan needs {held.total / GIB:.1f} GiB, "
            f"most of it {largest}: {_remedy(largest)}"
        )
    return lines


def _remedy(kind: str) -> str:
    return {
        "activations": "lower learner.token_budget, or set learner.activation_checkpointing: full",
        "engine": "lower rollout.gpu_memory_utilization",
        "reward_engine": "lower prm.gpu_memory_utilization",
        "teacher_engine": "lower teacher.gpu_memory_utilization",
        "head": "lower learner.token_budget",
    }.get(kind, "use more GPUs, or set learner.cpu_offload")
