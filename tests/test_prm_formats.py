"""Published reward models: in their own template, at the rows of the steps, equal to the plain forward and to vLLM."""

import json
from dataclasses import replace

import factories
import pytest
import tiny_prms
import torch
from safetensors.torch import save_file

from scope_fast.ops import reference
from scope_fast.prm import text_scorers
from scope_fast.prm.formats import QwenFormat, RlhflowFormat, ShepherdFormat
from scope_fast.prm.vllm_pooling import VllmStepScorer, memory_arguments
from scope_fast.scope.localize import first_error

CPU = torch.device("cpu")


def load(kind, folder, budget=512):
    return text_scorers.load(kind, str(folder), factories.byte_level(), torch.float32, CPU, budget)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    return folder, *tiny_prms.qwen(folder)


@pytest.fixture
def rows(monkeypatch):
    """Shapes of what the head is given, call after call."""
    seen, real = [], reference.step_scores
    monkeypatch.setattr(
        reference, "step_scores", lambda hidden, *a: (seen.append(tuple(hidden.shape)), real(hidden, *a))[1]
    )
    return seen


def texts(rollout):
    student = factories.byte_level()
    return rollout.prompt.text, [student.decode(rollout.token_ids[a:b]).strip() for a, b in rollout.steps]


def test_qwen_s_prompt_is_its_card_s(qwen):
    tokenizer = tiny_prms.byte_level("<|im_start|>", "<|im_end|>", "<extra_0>", template=tiny_prms.CHATML)
    encoded = QwenFormat(tokenizer)("What is 1 + 1?", ["1 + 1 = 2", "Answer: 2"])
    assert tokenizer.decode(encoded.ids) == (
        "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}.<|im_end|>\n"
        "<|im_start|>user\nWhat is 1 + 1?<|im_end|>\n"
        "<|im_start|>assistant\n1 + 1 = 2<extra_0>Answer: 2<extra_0><|im_end|>\n"
    )
    assert tokenizer.convert_ids_to_tokens([encoded.ids[row] for row in encoded.rows]) == ["<extra_0>"] * 2


def test_math_shepherd_s_prompt_numbers_the_steps():
    tokenizer = tiny_prms.shepherd_tokenizer()
    encoded = ShepherdFormat(tokenizer)("What?", ["1+1=2", "Step 2: so 2"])
    assert tokenizer.decode(encoded.ids) == "What? Step 1: 1+1=2 ки\nStep 2: so 2 ки"
    assert [tokenizer.decode([encoded.ids[row]]).strip() for row in encoded.rows] == ["ки"] * 2


def test_rlhflow_is_asked_turn_by_turn():
    """The rows are those RLHFlow's own loop reads: of each conversation so far, the third token from the end."""
    special = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    tokenizer = tiny_prms.byte_level(*special, template=tiny_prms.LLAMA3)
    steps = ["1 + 1 = 2", "2 + 2 = 4", "Answer: 4"]
    encoded = RlhflowFormat(tokenizer)("What is 1 + 1 + 2?", steps)
    conversation = []
    for step, row in zip(steps, encoded.rows, strict=True):
        content = f"What is 1 + 1 + 2? {step}" if not conversation else step
        conversation += [{"role": "user", "content": content}, {"role": "assistant", "content": "+"}]
        text = tokenizer.apply_chat_template(conversation, tokenize=False)
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == encoded.ids[: len(ids)] and row == len(ids) - 3


@pytest.mark.parametrize("budget", [1, 4096])
def test_qwen_equals_its_plain_forward_at_the_step_rows_alone(qwen, rows, budget):
    folder, body, head = qwen
    members = tiny_prms.solutions(factories.byte_level(), 12)
    got = load("qwen2.5-math-prm", folder, budget)(members)
    assert sum(shape[0] for shape in rows) == sum(len(t.steps) for t in members)  # S rows of the head, not T
    fmt = QwenFormat(tiny_prms.byte_level("<|im_start|>", "<|im_end|>", "<extra_0>", template=tiny_prms.CHATML))
    everything = []
    for probs, member in zip(got, members, strict=True):
        encoded = fmt(*texts(member))
        with torch.no_grad():
            full = head(body(torch.tensor([encoded.ids])).last_hidden_state[0]).softmax(-1)[:, 1]
        assert probs == pytest.approx(full[encoded.rows].tolist(), abs=1e-5)
        everything += probs
    assert min(everything) < 0.5 < max(everything)


@pytest.mark.parametrize(("kind", "fmt"), [("math-shepherd", ShepherdFormat), ("rlhflow", RlhflowFormat)])
def test_generative_models_equal_their_logits_and_never_make_them(kind, fmt, tmp_path, rows, monkeypatch):
    model, tokenizer = tiny_prms.causal(tmp_path, kind)
    members = tiny_prms.solutions(factories.byte_level(), 12)
    scorer = load(kind, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "linear", _no_vocabulary(torch.nn.functional.linear, len(tokenizer)))
        got = scorer(members)
    assert sum(shape[0] for shape in rows) == sum(len(t.steps) for t in members)
    for probs, member in zip(got, members, strict=True):
        encoded = fmt(tokenizer)(*texts(member))
        labels = [
            tokenizer.encode("+", add_special_tokens=False)[0],
            tokenizer.encode("-", add_special_tokens=False)[0],
        ]
        with torch.no_grad():
            plus = model(torch.tensor([encoded.ids])).logits[0][:, labels].softmax(-1)[:, 0]
        assert probs == pytest.approx(plus[encoded.rows].tolist(), abs=1e-5)


def test_a_generative_model_that_rescales_its_logits_is_refused(tmp_path):
    tiny_prms.causal(tmp_path, "math-shepherd")
    config = json.loads((tmp_path / "config.json").read_text())
    for name, value in {"logits_scaling": 8.0, "lm_head_multiplier": 0.5, "logit_scale": 0.1}.items():
        (tmp_path / "config.json").write_text(json.dumps({**config, name: value}))
        with pytest.raises(ValueError, match="changes its logits after the head"):
            load("math-shepherd", tmp_path)


def _no_vocabulary(real, vocab):
    def linear(x, weight, bias=None):
        assert weight.shape[0] != vocab, "the head of the language model ran"
        return real(x, weight, bias)

    return linear


def test_vllm_s_step_pooling_finds_the_same_first_errors(qwen):
    pytest.importorskip("vllm")
    folder, *_ = qwen
    student = factories.byte_level()
    members = tiny_prms.solutions(student, 1000, seed=5)
    mine = load("qwen2.5-math-prm", folder, 4096)(members)
    engine = VllmStepScorer(student, str(folder), kv_cache_bytes=1 << 28)
    try:
        theirs = engine(members)
        assert engine([_spelling_out_a_separator(student)])[0] != []
    finally:
        engine.close()
    flat, other = ([p for probs in all_ for p in probs] for all_ in (mine, theirs))
    assert flat == pytest.approx(other, abs=1e-5)
    errors = [first_error(probs) for probs in mine]
    assert errors == [first_error(probs) for probs in theirs]
    assert len(set(errors)) >= 5  # not all at the first step


def test_vllm_is_told_what_it_may_hold():
    """Its own default on a GPU is 0.92 of it, beside a learner and a sampler."""
    assert memory_arguments(False, 1 << 28, 0.15) == {"gpu_memory_utilization": 0.15}
    assert memory_arguments(True, 1 << 28, 0.15) == {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 28}


def _spelling_out_a_separator(student):
    (member,) = tiny_prms.solutions(student, 1)
    ids = [*student.encode("1 + 1 = 2<extra_0>3"), student.eos_token_id]
    return replace(member, token_ids=ids, steps=[(0, len(ids) - 1)])


def test_another_number_of_separators_shows_as_another_number_of_steps(qwen):
    folder, *_ = qwen
    scorer = load("qwen2.5-math-prm", folder)
    student = factories.byte_level()
    member = _spelling_out_a_separator(student)
    (good,) = tiny_prms.solutions(student, 1, seed=3)
    probs = scorer([member, good])
    assert [len(p) for p in probs] == [2, len(good.steps)]
    long = replace(member, prompt=replace(member.prompt, text="word " * 600))
    assert scorer([long, good]) == [[], pytest.approx(probs[1], abs=1e-5)]  # no room: nothing is scored, nothing is cut


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: QwenFormat(tiny_prms.byte_level(template=tiny_prms.CHATML)),
            "the separator '<extra_0>' is not one token",
        ),
        (lambda: QwenFormat(tiny_prms.byte_level("<extra_0>")), "its tokenizer has no chat template"),
        (lambda: ShepherdFormat(factories.byte_level()), "the separator 'ки' is not one token"),
        (lambda: ShepherdFormat(factories.sentencepiece()), "the separator 'ки' is not one token"),
        (
            lambda: QwenFormat(tiny_prms.byte_level("<extra_0>", template="{{ messages[1]['content'] }}")),
            "'<extra_0>' marks 0 of 2 steps",
        ),
    ],
)
def test_what_cannot_mark_steps_is_refused_by_name(make, message):
    with pytest.raises(ValueError, match=r"prm\.path: ") as caught:
        make()
    assert message in str(caught.value)


def test_a_checkpoint_without_its_head_is_refused(tmp_path):
    save_file({"model.norm.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"^prm\.path: .* has no tensor score\.0\.weight in model\.safetensors$"):
        text_scorers.read_tensors(str(tmp_path), text_scorers.QWEN_HEAD)


def test_a_sharded_checkpoint_without_its_head_is_refused(tmp_path):
    save_file({"score.0.weight": torch.ones(2)}, tmp_path / "model-1.safetensors")
    index = {"weight_map": {"score.0.weight": "model-1.safetensors", "score.0.bias": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (found,) = text_scorers.read_tensors(str(tmp_path), ("score.0.weight",))
    assert torch.equal(found, torch.ones(2))
    with pytest.raises(ValueError, match=r"^prm\.path: .* has no tensor score\.2\.weight$"):  # not in the index
        text_scorers.read_tensors(str(tmp_path), ("score.0.weight", "score.2.weight"))
    with pytest.raises(ValueError, match=r"has no tensor score\.0\.bias in model-1\.safetensors$"):  # nor in its shard
        text_scorers.read_tensors(str(tmp_path), ("score.0.weight", "score.0.bias"))
