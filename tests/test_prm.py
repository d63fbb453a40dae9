"""Step scorers: the packed classifier equals the plain forward, NaN stays NaN, the exact checker is the task's own."""

import random

import pytest
import tiny_prms
import torch
from factories import byte_level, configured, prompt, sentencepiece, trajectory
from transformers import LlamaConfig, LlamaForTokenClassification, Qwen2Config, Qwen2ForTokenClassification

from scope_fast.prm.load import make_scorer
from scope_fast.prm.scorers import ExactScorer, TokenClassifierScorer
from scope_fast.scope.localize import first_error, valid_probs
from scope_fast.scope.steps import TokenBytes, split_steps

SIZES = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "initializer_range": 0.3, "pad_token_id": 0,
}  # fmt: skip


def classifier(config=Qwen2Config, model=Qwen2ForTokenClassification, seed=0, **changes):
    torch.manual_seed(seed)
    return model(config(**SIZES, **{"num_labels": 2, **changes}))


def rollouts(count=9, seed=0):
    """Prompts and responses of random tokens, of unlike lengths, with and without an EOS."""
    rng = random.Random(seed)
    made = []
    for i in range(count):
        ids = [rng.randrange(300) for _ in range(rng.randrange(1, 9))]
        lengths = [rng.randrange(1, 5) for _ in range(rng.randrange(1, 6))]
        made.append(trajectory(lengths, eos=rng.random() < 0.5, sample=i, prompt=prompt(ids=ids)))
        made[-1].token_ids = [rng.randrange(300) for _ in made[-1].token_ids]
    return made


@torch.no_grad()
def plain(model, rollout):
    """The model's own forward over one sequence, label 1's probability at each step's last token."""
    ids = torch.tensor([[*rollout.prompt.ids, *rollout.token_ids]])
    probs = model.eval()(input_ids=ids).logits[0].float().softmax(-1)[:, 1]
    return [probs[len(rollout.prompt.ids) + end - 1].item() for _, end in rollout.steps]


@pytest.mark.parametrize("token_budget", [1, 40, 4096])  # one sequence a pass, a few, all
@pytest.mark.parametrize(
    ("config", "model"), [(Qwen2Config, Qwen2ForTokenClassification), (LlamaConfig, LlamaForTokenClassification)]
)
def test_packed_scores_equal_the_plain_forward(config, model, token_budget):
    made = classifier(config, model)
    members = rollouts()
    scores = TokenClassifierScorer(made, token_budget)(members)
    assert [len(s) for s in scores] == [len(t.steps) for t in members]
    for got, member in zip(scores, members, strict=True):
        assert got == pytest.approx(plain(made, member), abs=1e-5)
    everything = [p for s in scores for p in s]
    assert max(everything) - min(everything) > 0.3  # the scores differ: equality says something


def test_dropout_of_training_is_off():
    made = classifier(attention_dropout=0.5, classifier_dropout=0.5).train()
    (member,) = rollouts(1)
    twice = [TokenClassifierScorer(made, 100)([member]) for _ in range(2)]
    assert twice[0] == twice[1]
    assert twice[0][0] == pytest.approx(plain(made, member), abs=1e-5)


def test_nan_weights_give_nan_probabilities_and_leave_the_rest_to_the_caller():
    made = classifier()
    with torch.no_grad():
        made.score.weight.fill_(float("nan"))
    members = rollouts(3)
    for probs, member in zip(TokenClassifierScorer(made, 100)(members), members, strict=True):
        assert len(probs) == len(member.steps)
        assert all(p != p for p in probs)
        assert not valid_probs(probs, len(probs))
        assert first_error(probs) == 0


def test_nothing_to_score():
    assert TokenClassifierScorer(classifier(), 100)([]) == []
    assert ExactScorer(byte_level())([]) == []


def test_scoring_leaves_no_graph_and_no_trace():
    made = classifier()
    TokenClassifierScorer(made, 100)(rollouts(2))
    assert all(p.grad is None for p in made.parameters())
    assert torch.is_grad_enabled()


def test_what_is_no_classifier_of_two_labels_is_refused():
    with pytest.raises(ValueError, match=r"prm\.path: a classifier of 3 labels, expected 2"):
        TokenClassifierScorer(classifier(num_labels=3), 100)
    headless = classifier()
    headless.score = torch.nn.Sequential(torch.nn.Linear(32, 2))
    with pytest.raises(ValueError, match=r"prm\.path: Qwen2ForTokenClassification has no linear `score` head"):
        TokenClassifierScorer(headless, 100)


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("12 + 7 = 19\n19 - 4 = 15. Answer: 15", [1.0, 1.0]),
        ("12 + 7 = 19\n19 - 4 = 14. Answer: 14", [1.0, 0.0]),
        ("12 + 7 = 20\n20 - 4 = 16. Answer: 16", [0.0, 0.0]),
        ("\n 12 + 7 = 19 \n\n19 - 4 = 15. Answer: 15\n", [1.0, 1.0]),  # white space around a line is no mistake
        ("well, 12 + 7 = 19", [0.0]),
    ],
)
def test_the_exact_checker(response, expected):
    tokenizer = byte_level()
    entry = {"answer": "15", "metadata": {"source_dataset": "chain_sum", "expression": "12 + 7 - 4"}}
    ids = [*tokenizer.encode(response), tokenizer.eos_token_id]
    steps = split_steps(TokenBytes(tokenizer)(ids), trailing_eos=True)
    made = trajectory((1,) * (len(ids) - 1), prompt=prompt(entry), token_ids=ids, steps=steps)
    assert ExactScorer(tokenizer)([made]) == [expected]
    made.prompt = prompt({"answer": "15", "metadata": {"source_dataset": "chain_sum"}})  # nothing to work from
    assert ExactScorer(tokenizer)([made]) == [[]]


@pytest.mark.parametrize("kind", ["token_classifier", "math-shepherd", "qwen2.5-math-prm"])
def test_a_model_that_is_not_there_is_named(kind, tmp_path):
    config = configured(**{"prm.kind": kind, "prm.path": tmp_path / "nowhere"})
    with pytest.raises(ValueError, match=r"prm\.path: .*nowhere cannot be loaded: "):
        make_scorer(config, config.prm.path, byte_level())


def test_a_checkpoint_of_another_kind_of_model_is_refused(tmp_path):
    """transformers would draw the head at random, and every score be noise."""
    made, tokenizer = tiny_prms.causal(tmp_path, "rlhflow")
    config = configured(**{"prm.path": tmp_path})  # a token classifier
    lacks = r"^prm\.path: .* is no checkpoint of LlamaForTokenClassification: it lacks score\.bias and 1 more$"
    with pytest.raises(ValueError, match=lacks):
        make_scorer(config, config.prm.path, tokenizer)
    config = configured(**{"prm.kind": "rlhflow", "prm.path": tmp_path})
    make_scorer(config, config.prm.path, byte_level())
    made.model.save_pretrained(tmp_path)  # without lm_head
    with pytest.raises(ValueError, match=r"^prm\.path: .* LlamaForCausalLM: it lacks lm_head\.weight$"):
        make_scorer(config, config.prm.path, byte_level())


def test_another_tokenizer_than_the_student_s_is_refused(tmp_path):
    sentencepiece().save_pretrained(tmp_path)
    config = configured(**{"prm.path": tmp_path})
    with pytest.raises(ValueError, match=r"prm\.path: its tokenizer differs from the student's"):
        make_scorer(config, config.prm.path, byte_level())
