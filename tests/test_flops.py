"""Model FLOPs against torch's own counter, and perf/mfu against a peak that is given."""

import pytest
import torch
from test_learner import IGNORE, RL, learner_of, make, sequence
from torch.utils.flop_counter import FlopCounterMode
from transformers import MixtralConfig, MixtralForCausalLM, Qwen2Config, Qwen2ForCausalLM

from scope_fast.batch import LossOptions, pack
from scope_fast.flops import PEAK_TFLOPS, model_flops, peak_tflops


def counted(model, length: int, rows: int) -> int:
    """What torch counts in forward and backward of one sequence and `rows` rows of the head."""
    ids = torch.arange(length)[None] % model.config.vocab_size
    with FlopCounterMode(display=False) as counter:
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, :rows]
        model.get_output_embeddings()(hidden).sum().backward()
    return counter.get_total_flops()


def attend_all(model) -> int:
    """FLOPs of a pair that torch's dense attention computes and the causal one does not, of all blocks."""
    c = model.config
    return 12 * c.num_attention_heads * (c.hidden_size // c.num_attention_heads) * c.num_hidden_layers


@pytest.mark.parametrize("length", [1, 5, 12])
def test_flops_are_what_torch_counts(length):
    model = make(attn_implementation="eager")
    flops, rows = model_flops(model), min(3, length)
    ours = flops.token * length + flops.pair * length * (length + 1) // 2 + flops.row * rows
    masked = length * (length - 1) // 2
    assert ours + masked * attend_all(model) == counted(model, length, rows)


def test_a_frozen_matrix_has_no_gradient_of_its_own():
    model = make(attn_implementation="eager")
    whole = model_flops(model)
    model.lm_head.requires_grad_(False)
    assert model_flops(model).row == whole.row * 4 // 6
    assert model_flops(model).token == whole.token
    frozen = model.model.layers[0].mlp.up_proj.requires_grad_(False)
    assert model_flops(model).token == whole.token - 2 * frozen.weight.numel()


def test_packed_sequences_attend_to_themselves_alone():
    flops = model_flops(make())
    sequences = [sequence(range(1, 4), [5, 6]), sequence([7], [8, 9, 10])]
    (batch,) = pack(sequences, 64, LossOptions(), 1.0, 1.0)
    assert flops.of(batch) == 9 * flops.token + (5 * 6 // 2 + 4 * 5 // 2) * flops.pair + 5 * flops.row


def test_other_architectures_have_no_figure():
    sizes = dict(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    assert model_flops(MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=2))) is None
    windows = Qwen2Config(**sizes, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    assert model_flops(Qwen2ForCausalLM(windows)) is None


@pytest.mark.parametrize("epochs", [1, 2])
def test_the_update_says_what_it_did(epochs):
    model = make()
    flops = model_flops(model)
    ignored = sequence([1], [2, 3], segment=IGNORE)
    trained = sequence([1, 2], [3, 4, 5], segment=[RL, RL, IGNORE])
    done = learner_of(model, epochs=epochs).update([[trained, ignored]])
    assert done["perf/model_flops"] == epochs * (5 * flops.token + 15 * flops.pair + 2 * flops.row)
    assert learner_of(make()).update([[ignored]])["perf/model_flops"] == 0


def test_the_peak_is_the_devices(monkeypatch):
    cuda, bf16 = torch.device("cuda"), torch.bfloat16
    peaks = {"NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA H100 NVL": 835, "Tesla T4": None}
    for name, peak in peaks.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_tflops(cuda, bf16) == peak
    assert peak_tflops(cuda, torch.float32) is None and peak_tflops(torch.device("cpu"), bf16) is None
    assert learner_of(make()).peak_tflops is None
    assert learner_of(make(), peak_tflops=2.5).peak_tflops == 2.5
    names = list(PEAK_TFLOPS)  # the first that fits is taken: a longer name comes before its beginning
    assert not [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if b.startswith(a)]
