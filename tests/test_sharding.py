"""Two ranks against one process: the same losses, gradients and metrics, whatever is tied, frozen or recomputed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from fixtures.sharded_learner import CASES, gradients_of, learner_of, minibatches_of
from test_learner import distance, make, mixture
from transformers import AutoConfig, AutoModelForCausalLM

from scope_fast import attention, sharding
from scope_fast.batch import LossOptions, pack

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
ROOT = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory):
    """The folder of results of all cases, from one torchrun."""
    folder = tmp_path_factory.mktemp("sharded")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    script = ROOT / "tests/fixtures/sharded_learner.py"
    done = subprocess.run([*TORCHRUN, script, folder], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("case", [case for case in CASES if case != "computed in bf16"])
def test_two_ranks_are_one_process(case, on_two_ranks):
    dtype, changes, *_ = CASES[case]
    sharded = torch.load(on_two_ranks / f"{case}.pt", weights_only=True)
    plain = gradients_of(learner_of(case, make(getattr(torch, dtype), **changes)), minibatches_of(case, mixture(10)))
    assert ("lm_head.weight" in plain["gradients"]) == (case != "frozen head" and not changes)
    limit = 1e-10 if dtype == "float64" else 1e-5
    assert distance(sharded["gradients"], plain["gradients"]) < limit
    assert sharded["metrics"].keys() == plain["metrics"].keys()
    for name, value in plain["metrics"].items():
        # metrics of a micro-batch are float64 sums for float64 models; old logprobs travel in float32
        close = 1e-6 if case == "two minibatches" else max(limit, 1e-12)
        assert sharded["metrics"][name] == pytest.approx(value, rel=close, abs=1e-9), name


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_pass_in_bfloat16_has_the_gradients_of_float32_roughly_and_sums_them_in_float32(ranks, on_two_ranks):
    """The passes are rounded (by autocast in one process, by FSDP's policy on two ranks), the sums over micro-batches
    and ranks are not: float32 gradients that bfloat16 could not hold."""
    case, minibatches = "computed in bf16", minibatches_of("computed in bf16", mixture(10))
    wide = gradients_of(learner_of("fp32", make(torch.float32)), minibatches)
    if ranks == 1:
        rounded = gradients_of(learner_of(case, make(torch.float32)), minibatches)
    else:
        rounded = torch.load(on_two_ranks / f"{case}.pt", weights_only=True)
    assert wide["head_dtypes"] == ["torch.float32"] and rounded["head_dtypes"] == ["torch.bfloat16"]
    assert 1e-3 < distance(rounded["gradients"], wide["gradients"]) < 0.1  # half an ulp of bfloat16 is 2e-3
    assert rounded["metrics"]["loss/total"] == pytest.approx(wide["metrics"]["loss/total"], rel=0.1)
    assert {grad.dtype for grad in rounded["gradients"].values()} == {torch.float32}
    for name in ("lm_head.weight", "model.layers.0.mlp.down_proj.weight"):
        grad = rounded["gradients"][name]
        assert not torch.equal(grad, grad.bfloat16().float()), name


def test_recomputation_changes_nothing_in_one_process():
    got = {
        kind: gradients_of(learner_of("fp64", make(torch.float64)), [mixture(10)])["gradients"]
        if kind == "none"
        else gradients_of(learner_of(f"{kind} recomputation", make(torch.float64)), [mixture(10)])["gradients"]
        for kind in ("none", "selective", "full")
    }
    assert distance(got["full"], got["none"]) < 1e-12 and distance(got["selective"], got["none"]) < 1e-12


def test_recomputation_keeps_no_activations_of_a_block():
    """Counted, since time says little: the tensors that autograd saves for the backward."""
    saved = {}
    for case in ("fp64", "selective recomputation", "full recomputation"):
        learner, sizes = learner_of(case, make(torch.float64, num_hidden_layers=4)), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=sizes: (s.append(t.numel()), t)[1], lambda t: t):
            learner.update([mixture(10)])
        saved[case] = sum(sizes)
    assert saved["full recomputation"] < saved["selective recomputation"] < saved["fp64"]


def scores(model, budget):
    """Log-probabilities of every trained token of the mixture by sequence and place, in packs of at most `budget`."""
    learner, found = learner_of("fp32", model), {}
    for batch in pack(mixture(10), budget, LossOptions(entropy_coef=1.0), 1, 1):
        with torch.no_grad():
            values = learner.objective(batch, score_only=True)
        for owner, value in zip(batch.sequence.tolist(), values.tolist(), strict=True):
            found.setdefault(owner, []).append(value)
    return [value for owner in sorted(found) for value in found[owner]]


@pytest.mark.parametrize("kind", ["eager", "packed_sdpa", "sdpa", "flex_attention"])
def test_every_attention_keeps_packed_sequences_apart(kind):
    """Against one sequence at a time through eager attention. (flex_attention has no backward on CPU; uncompiled it
    runs the same masks without half a minute of compilation.)"""
    model = make(torch.float32)
    alone = scores(model, 1)
    model.set_attn_implementation(attention.implementation(torch.float32, kind))
    with torch.compiler.set_stance("force_eager"):
        assert scores(model, 64) == pytest.approx(alone, abs=1e-5)


def test_packed_attention_keeps_to_a_sliding_window():
    windows = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1, "num_hidden_layers": 3}
    model = make(torch.float64, **windows)
    assert model.config.layer_types.count("sliding_attention") == 2
    ids, positions = torch.arange(1, 16)[None], torch.tensor([[*range(9), *range(6)]])
    outputs = {}
    for kind in ("eager", "packed_sdpa"):
        model.set_attn_implementation(attention.implementation(torch.float32, kind))
        outputs[kind] = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(outputs["packed_sdpa"], outputs["eager"], rtol=1e-4, atol=1e-5)  # its softmax is float32
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
    whole = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    assert (whole - outputs["packed_sdpa"]).abs().max() > 0.1


def test_packed_attention_wants_one_row():
    model = make(torch.float32)
    model.set_attn_implementation(attention.implementation(torch.float32, "packed_sdpa"))
    with pytest.raises(ValueError, match=r"packed_sdpa needs one row .* got query \(2, 2, 3, 16\)"):
        model(input_ids=torch.ones(2, 3, dtype=torch.int64))


def test_a_mask_that_a_model_makes_itself_is_not_left_out():
    """Doge's attention computes one from its values."""
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    kind = attention.implementation(torch.float32, "packed_sdpa")
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("doge", vocab_size=64, **sizes))
    model.set_attn_implementation(kind)
    with pytest.raises(ValueError, match=r"packed_sdpa leaves out the mask that DogeAttention makes itself"):
        model(input_ids=torch.ones(1, 3, dtype=torch.int64), position_ids=torch.arange(3)[None], use_cache=False)


def test_a_model_that_liger_has_no_layers_for_is_refused(monkeypatch):
    pytest.importorskip("liger_kernel.transformers", reason="liger-kernel is not installed")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("stablelm", num_hidden_layers=1))
    with pytest.raises(ValueError, match=r"learner\.liger: liger-kernel has no layers for model type stablelm"):
        sharding.use_liger(model)


def test_what_needs_a_gpu_is_refused_by_name():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ValueError, match=r"learner\.attention: flash_attention_2 needs a CUDA GPU"):
        attention.implementation(torch.float32, "flash_attention_2")
    with pytest.raises(ValueError, match=r"learner\.liger: .* need a CUDA GPU"):
        sharding.use_liger(make())
    assert attention.implementation(torch.float32) == "packed_sdpa"
