"""The plan of memory: counted where torch can be asked, else by hand; what cannot fit is refused."""

import pytest
import torch
from factories import configured
from transformers import Qwen2Config, Qwen2ForCausalLM

from scope_fast import plan, warm_start
from scope_fast.config_files import load
from scope_fast.plan import GIB, Sizes

ARCHITECTURE = {
    "model_type": "qwen2", "vocab_size": 64, "hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip


def small(**changes) -> Qwen2Config:
    sizes = {k: v for k, v in {**ARCHITECTURE, **changes}.items() if k != "model_type"}
    return Qwen2Config(**sizes)


def saved_bytes(dtype: torch.dtype, layers: int, tokens: int) -> int:
    """Bytes of the storages that autograd keeps in a forward, parameters aside."""
    model = Qwen2ForCausalLM(small(num_hidden_layers=layers)).to(dtype)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.arange(tokens)[None]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        output = model.model(input_ids=ids % 64, position_ids=ids, use_cache=False).last_hidden_state
    assert output.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


@pytest.mark.parametrize(("dtype", "dtype_bytes"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_the_activations_of_a_block_are_what_torch_saves(dtype, dtype_bytes):
    """Beside them a few float32 statistics a row: under half a percent."""
    counted = (saved_bytes(dtype, 3, 256) - saved_bytes(dtype, 2, 256)) / 256
    sizes = Sizes(0, 0, 0, 3, 256, 640, query=256, key=128, vocabulary=64)
    assert plan.activation_bytes(sizes, dtype_bytes) == pytest.approx(counted, rel=0.005)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ({"hidden_size": 8}, "model.config: no configuration of transformers' is made of it: "),
        ({"model_type": "nosuch"}, "model.config: no configuration of transformers' is made of it: "),
        ({"model_type": "mamba"}, "model: mamba has no attention heads or no MLP by the usual names"),
    ],
)
def test_what_no_plan_can_be_made_of_is_said(architecture, message):
    with pytest.raises(ValueError) as caught:
        plan.model_sizes(configured(**{"model.config": architecture}))
    assert str(caught.value).startswith(message) and len(str(caught.value)) < 200


@pytest.mark.parametrize("tied", [False, True])
def test_sizes_are_counted_on_the_model_itself(tied):
    sizes = plan.model_sizes(configured(**{"model.config": {**ARCHITECTURE, "tie_word_embeddings": tied}}))
    model = Qwen2ForCausalLM(small(tie_word_embeddings=tied))
    assert sizes.parameters == sum(p.numel() for p in model.parameters())
    assert sizes.block == sum(p.numel() for p in model.model.layers[0].parameters())
    assert sizes.root == 64 * 256 + 256  # the head, which may be the embedding too, and the last norm
    assert (sizes.layers, sizes.query, sizes.key) == (3, 256, 128)


def test_the_shipped_student_s_sizes_need_no_hub():
    """README's parameter count, which is the file's."""
    student = Qwen2ForCausalLM.from_pretrained(warm_start.ASSETS / "student")
    assert plan.model_sizes(load()).parameters == sum(p.numel() for p in student.parameters()) == 491_136


SIZES = Sizes(1000, 100, 200, 8, 16, 32, query=16, key=8, vocabulary=500)


def test_bytes_by_hand():
    config = configured(**{"learner.token_budget": 10, "distributed.gpu_memory_gib": 40, "model.dtype": "bfloat16"})
    held = plan.memory(config, SIZES, ranks=4)
    assert (held.weights, held.gradients, held.optimizer) == (1000, 1000, 2000)
    assert held.gathered == 2 * (200 + 2 * 100)
    token = 2 * 8 * 16 + 2 * (2 * 16 + 2 * 8 + 4 * 32)
    assert held.activations == 10 * 8 * token
    assert held.head == 10 * 500 * (4 + 2) + 500 * 16 * 2
    assert held.engine == 0.4 * 40 * GIB
    alone = plan.memory(config, SIZES, ranks=1)  # keeps a bfloat16 copy of each block for its backward
    assert alone.gathered == 2 * (200 + 8 * 100)
    recomputed = configured(**{"model.dtype": "bfloat16", "learner.activation_checkpointing": "full"})
    assert plan.memory(recomputed, SIZES, ranks=1).gathered == 2 * (200 + 2 * 100)
    assert plan.memory(configured(**{"model.dtype": "float32"}), SIZES, ranks=1).gathered == 0


def test_shards_are_those_of_a_node_unless_said_otherwise():
    """What sharding.make_mesh does: 16 GPUs of two nodes hold two copies."""
    config = {"model.dtype": "bfloat16"}
    assert plan.memory(configured(**config), SIZES, ranks=16).weights == 4 * 1000 / 8
    assert plan.memory(configured(**config, **{"distributed.gpus_per_node": 4}), SIZES, ranks=16).weights == 1000
    assert plan.memory(configured(**config, **{"learner.shard_size": 16}), SIZES, ranks=16).weights == 4 * 1000 / 16


def test_the_model_that_kl_is_taken_against_takes_room():
    assert plan.memory(configured(), SIZES, ranks=4).reference == 0
    assert plan.memory(configured(**{"loss.kl_coef": 0.1, "loss.kl": "k3"}), SIZES, ranks=4).reference == 1000


def test_a_reward_model_lies_on_every_gpu(tmp_path):
    unknown = configured(**{"prm.kind": "qwen2.5-math-prm", "prm.path": str(tmp_path / "not here")})
    assert plan.reward_model_parameters(unknown, SIZES) == SIZES.parameters
    small(vocab_size=32).save_pretrained(tmp_path / "prm")
    known = configured(**{"prm.kind": "qwen2.5-math-prm", "prm.path": str(tmp_path / "prm"), "model.dtype": "bfloat16"})
    count = sum(p.numel() for p in Qwen2ForCausalLM(small(vocab_size=32)).model.parameters())
    assert plan.reward_model_parameters(known, SIZES) == count
    assert plan.memory(known, SIZES, 4, count).reward_model == 2 * count
    assert plan.reward_model_parameters(configured(**{"prm.kind": "exact"}), SIZES) == 0


def test_every_engine_that_shares_the_gpu_takes_its_share(tmp_path):
    in_vllm = {
        "distributed.gpu_memory_gib": 40, "prm.kind": "qwen2.5-math-prm", "prm.path": str(tmp_path),
        "prm.engine": "vllm", "prm.gpu_memory_utilization": 0.1,
        "teacher.kind": "model", "teacher.engine": "vllm",
    }  # fmt: skip
    config = configured(**in_vllm)
    assert plan.reward_model_parameters(config, SIZES) == 0  # they lie in the engine's share
    held = plan.memory(config, SIZES, ranks=1)
    assert held.reward_engine == pytest.approx(0.1 * 40 * GIB)
    assert held.teacher_engine == pytest.approx(0.2 * 40 * GIB)
    alone = plan.memory(configured(**{"distributed.gpu_memory_gib": 40}), SIZES, ranks=1)
    assert (alone.reward_engine, alone.teacher_engine) == (0, 0)
    assert held.total - alone.total == pytest.approx(0.3 * 40 * GIB)
    sampled = {"teacher.kind": "model", "teacher.engine": "transformers"}
    assert plan.memory(configured(**sampled), SIZES, ranks=1).teacher_engine == 0
    base = {"model.config": ARCHITECTURE, "distributed.gpus": 8, **in_vllm, "rollout.gpu_memory_utilization": 0.3}
    with pytest.raises(ValueError, match=r"most of it reward_engine: lower prm\.gpu_memory_utilization"):
        plan.describe(configured(**{**base, "prm.gpu_memory_utilization": 0.6}))
    with pytest.raises(ValueError, match=r"most of it teacher_engine: lower teacher\.gpu_memory_utilization"):
        plan.describe(configured(**{**base, "teacher.gpu_memory_utilization": 0.6}))


def test_the_plan_counts_tokens_and_micro_batches():
    asked = {"rollout.prompts_per_step": 24, "rollout.group_size": 8, "rollout.context": 256}
    asked |= {"model.config": ARCHITECTURE, "distributed.gpus": 5, "learner.token_budget": 1024}
    assert "at most 49,152 tokens a step, 10 micro-batches on each" in plan.describe(configured(**asked))  # 9.6
    with pytest.raises(ValueError, match=r"learner\.shard_size=2: 5 GPUs are no multiple of it"):
        plan.describe(configured(**asked, **{"learner.shard_size": 2}))


def test_what_is_elsewhere_or_not_asked_takes_no_memory():
    gpu = {"distributed.gpu_memory_gib": 40}
    assert plan.memory(configured(**gpu), SIZES, ranks=1).engine == pytest.approx(0.4 * 40 * GIB)
    for away in ({"rollout.server_url": "http://node:8000"}, {"rollout.server_gpus": [1]}):
        config = configured(**gpu, **away, **{"rollout.engine": "vllm_server"})
        assert plan.memory(config, SIZES, ranks=1).engine == 0
    shared = configured(
        **gpu, **{"rollout.engine": "vllm_server", "rollout.server_gpus": [0, 1], "rollout.transfer": "shm"}
    )
    assert plan.memory(shared, SIZES, ranks=1).engine == pytest.approx(0.4 * 40 * GIB)
    assert plan.memory(configured(**gpu, **{"rollout.engine": "transformers"}), SIZES, ranks=1).engine == 0
    prm = {"prm.kind": "qwen2.5-math-prm", "prm.path": "nowhere", "prm.monitor": False, "teacher.kind": "model"}
    asks_none = configured(method="grpo", **prm, **{"teacher.engine": "vllm"})
    assert plan.reward_model_parameters(asks_none, SIZES) == 0
    assert plan.memory(asks_none, SIZES, ranks=1).teacher_engine == 0


def test_the_7b_preset_fits_its_gpus():
    text = plan.describe(load("qwen2.5-math-7b"))
    assert "7,615,616,512 parameters on 8 GPUs of 80 GiB" in text
    with pytest.raises(ValueError, match=r"distributed\.gpu_memory_gib=40: the plan needs"):
        plan.describe(load("qwen2.5-math-7b", [("distributed.gpu_memory_gib", "40")]))


def test_recomputation_and_offload_by_hand():
    token = 2 * 8 * 16 + 2 * (2 * 16 + 2 * 8 + 4 * 32)
    base = {"learner.token_budget": 10, "model.dtype": "bfloat16"}
    full = plan.memory(configured(**base, **{"learner.activation_checkpointing": "full"}), SIZES, 2)
    assert full.activations == 10 * (8 * 2 * 16 + token)
    half = plan.memory(configured(**base, **{"learner.activation_checkpointing": "selective"}), SIZES, 2)
    assert half.activations == 10 * (4 * token + 4 * 2 * 16 + token)
    away = plan.memory(configured(**base, **{"learner.cpu_offload": True}), SIZES, 2)
    assert away.weights == away.gradients == away.optimizer == 0
    alone = plan.memory(configured(**base, **{"learner.cpu_offload": True}), SIZES, 1)  # nothing is sharded, nor away
    assert alone.weights == 4 * 1000


def test_a_plan_that_cannot_fit_is_refused_with_what_to_change():
    base = {"model.config": ARCHITECTURE, "distributed.gpus": 8, "rollout.gpu_memory_utilization": 0.3}
    text = plan.describe(configured(**base))
    assert "parameters on 8 GPUs of 80 GiB" in text and "total" in text
    with pytest.raises(ValueError, match=r"distributed\.gpu_memory_gib=5: the plan needs .* most of it reserve"):
        plan.describe(configured(**base, **{"distributed.gpu_memory_gib": 5}))
    tokens = {"learner.token_budget": 20_000_000, "loss.chunk_tokens": 64}
    with pytest.raises(ValueError, match=r"most of it activations: lower learner\.token_budget, or set learner\.act"):
        plan.describe(configured(**base, **tokens))


def test_a_model_that_is_not_here_needs_its_configuration(tmp_path):
    with pytest.raises(ValueError, match=r"model\.path: .*nowhere cannot be read here.* give model\.config"):
        plan.describe(configured(**{"model.path": str(tmp_path / "nowhere"), "distributed.gpus": 2}))
