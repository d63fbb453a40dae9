"""One's own reward model: TRL's data, the gradient of the padded forward, and a folder that the run loads."""

import json
import subprocess
import sys

import pytest
import torch
from factories import byte_level, trajectory
from transformers import AutoModelForTokenClassification, AutoTokenizer, Qwen2Config, Qwen2ForTokenClassification

from scope_fast.prm import train as prm_train
from scope_fast.prm.formats import Encoded
from scope_fast.prm.scorers import TokenClassifierScorer
from scope_fast.scope.steps import TokenBytes, split_steps

ASSETS = "scope_fast/assets/student"
ROW = {"prompt": "What is 1 + 1?", "completions": ["1 + 1 = 2", "Answer: 2"], "labels": [True, False]}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_label_stands_where_the_scorer_reads(tmp_path):
    """The rows of a training example are the step ends of the same text as a rollout."""
    tokenizer = byte_level()
    (example,), too_long = prm_train.read_examples(write(tmp_path / "a.jsonl", [ROW]), tokenizer, 100)
    start = len(prm_train.encode_prompt(tokenizer, ROW["prompt"]))
    response = example.encoded.ids[start:]
    assert tokenizer.decode(response) == "1 + 1 = 2\nAnswer: 2" and too_long == 0
    steps = split_steps(TokenBytes(tokenizer)(response))
    assert example.encoded.rows == [start + end - 1 for _, end in steps] and example.right == [1, 0]
    assert prm_train.read_examples(str(tmp_path / "a.jsonl"), tokenizer, 5) == ([], 1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "completions": ["b"]}, "a.jsonl:1 has no labels: expected prompt, completions and labels"),
        ({**ROW, "labels": [True]}, "a.jsonl:1: 1 labels for 2 completions"),
        ({**ROW, "labels": [True, 2]}, "a.jsonl:1: 'labels' is [True, 2], expected a list of true and false"),
        ({**ROW, "labels": [True, [False]]}, "a.jsonl:1: 'labels' is [True, [False]], expected a list of"),
        ({**ROW, "labels": 1}, "a.jsonl:1: 'labels' is 1, expected a list of true and false"),
        ({**ROW, "completions": ["a", " "]}, "a.jsonl:1: 'completions' is ['a', ' '], expected a list of text"),
        ({**ROW, "completions": ["a", 2]}, "a.jsonl:1: 'completions' is ['a', 2], expected a list of text"),
        ({**ROW, "completions": "ab"}, "a.jsonl:1: 'completions' is 'ab', expected a list of text"),
        ({**ROW, "prompt": 5}, "a.jsonl:1: 'prompt' is 5, expected text or a list of chat messages"),
        ({**ROW, "prompt": ["5"]}, "a.jsonl:1: 'prompt' is ['5'], expected text or a list of chat messages"),
    ],
)
def test_rows_of_another_shape_are_refused_by_name(row, message, tmp_path):
    with pytest.raises(ValueError) as caught:
        prm_train.read_examples(write(tmp_path / "a.jsonl", [row]), byte_level(), 100)
    assert message in str(caught.value)


def test_labels_may_be_numbers(tmp_path):
    file = write(tmp_path / "a.jsonl", [ROW, {**ROW, "labels": [1, 0]}])
    (as_bools, as_numbers), _ = prm_train.read_examples(file, byte_level(), 100)
    assert as_numbers == as_bools


@pytest.mark.parametrize("budget", [1, 4096])
def test_the_gradient_is_that_of_one_sequence_after_another(budget):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = Qwen2ForTokenClassification(
        Qwen2Config(vocab_size=50, num_key_value_heads=1, num_labels=2, classifier_dropout=0.0, **sizes)
    )
    batch = [
        prm_train.Example(Encoded([3, 4, 5, 6, 7], [2, 4]), [1, 0]),
        prm_train.Example(Encoded([9, 8, 7], [1]), [1]),
        prm_train.Example(Encoded([1, 2, 3, 4], [0, 1, 3]), [1, 1, 0]),
    ]
    got = prm_train._backward(model, batch, budget)
    packed = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    losses = []
    for (ids, rows), right in batch:
        logits = model(input_ids=torch.tensor([ids])).logits[0, rows]
        losses += list(torch.nn.functional.cross_entropy(logits, torch.tensor(right), reduction="none"))
    truth = torch.stack(losses).mean()
    truth.backward()
    assert got == pytest.approx(truth.item(), abs=1e-6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(packed[name], p.grad, atol=1e-6, rtol=1e-5)


def test_the_command_leaves_a_folder_that_tells_right_from_wrong(tmp_path):
    """A rule a tiny model learns in seconds: a step that says "bad" is wrong."""
    rows = []
    for i in range(320):
        steps = ["good" if (i >> k) & 1 else "bad" for k in range(1 + i % 3)]
        rows.append({"prompt": f"Go {i % 7}.", "completions": steps, "labels": [step == "good" for step in steps]})
    data = write(tmp_path / "data.jsonl", rows)
    out = tmp_path / "prm"
    arguments = [ASSETS, data, str(out), "--epochs", "4", "--lr", "1e-3", "--heldout", "0.2", "--token-budget", "512"]
    done = subprocess.run([sys.executable, "-m", "scope_fast.prm.train", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "256 to train on, 64 held out, 0 too long" in done.stdout
    assert "held out: 100.0 % of steps, first error 100.0 % of solutions" in done.stdout
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForTokenClassification.from_pretrained(out, dtype=torch.float32)
    ids = tokenizer.encode("good\nbad\ngood")
    made = trajectory((1,) * len(ids), token_ids=ids, steps=split_steps(TokenBytes(tokenizer)(ids)), eos=False)
    (probs,) = TokenClassifierScorer(model, 512)([made])
    assert [p > 0.5 for p in probs] == [True, False, True]


def test_a_special_token_that_a_step_spells_is_text(tmp_path):
    tokenizer = byte_level()
    row = {**ROW, "completions": [f"a {tokenizer.eos_token}", "b"]}
    (example,), _ = prm_train.read_examples(write(tmp_path / "a.jsonl", [row]), tokenizer, 100)
    assert tokenizer.eos_token_id not in example.encoded.ids
    start = len(prm_train.encode_prompt(tokenizer, ROW["prompt"]))
    assert tokenizer.decode(example.encoded.ids[start:]) == f"a {tokenizer.eos_token}\nb"


def test_steps_are_set_apart_as_the_run_will_read_them(tmp_path):
    tokenizer = byte_level()
    data = write(tmp_path / "a.jsonl", [ROW])
    (example,), _ = prm_train.read_examples(data, tokenizer, 100, "\n\n")
    start = len(prm_train.encode_prompt(tokenizer, ROW["prompt"]))
    response = example.encoded.ids[start:]
    assert tokenizer.decode(response) == "1 + 1 = 2\n\nAnswer: 2"
    steps = split_steps(TokenBytes(tokenizer)(response), b"\n\n")
    assert example.encoded.rows == [start + end - 1 for _, end in steps] and len(steps) == 2


def test_the_separator_is_written_with_escapes(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(prm_train, "train", lambda base, data, out, settings: seen.append(settings.step_separator))
    for text in ("\\n\\n", "\n\n", " ки\\n"):
        assert prm_train.main(["base", "data", str(tmp_path), "--step-separator", text]) == 0
    assert prm_train.main(["base", "data", str(tmp_path)]) == 0
    assert seen == ["\n\n", "\n\n", " ки\n", "\n"]


def test_bad_input_ends_with_a_message(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(  # which may take minutes
        AutoModelForTokenClassification, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded first")
    )
    data = write(tmp_path / "a.jsonl", [{"prompt": "a"}])
    assert prm_train.main([ASSETS, data, str(tmp_path / "out")]) == 2
    assert "a.jsonl:1 has no completions, labels" in capsys.readouterr().err
    assert prm_train.main([str(tmp_path / "nowhere"), data, str(tmp_path / "out")]) == 2
    assert f"error: BASE: {tmp_path / 'nowhere'} cannot be loaded: " in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--epochs", "--batch-sequences", "--token-budget"])
def test_counts_below_one_are_refused_by_name(option, tmp_path, capsys):
    data = write(tmp_path / "a.jsonl", [ROW])
    assert prm_train.main([ASSETS, data, str(tmp_path / "out"), option, "0"]) == 2
    assert f"error: {option} 0: expected at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--lr", "0", "--lr 0.0: expected more than 0"),
        ("--lr", "nan", "--lr nan: expected more than 0"),
        ("--lr", "inf", "--lr inf: expected more than 0, and a number"),
        ("--heldout", "1", "--heldout 1.0: expected a share, from 0 to less than 1"),
        ("--heldout", "-0.1", "--heldout -0.1: expected a share"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(option, value, message, tmp_path, capsys):
    data = write(tmp_path / "a.jsonl", [ROW])
    assert prm_train.main([ASSETS, data, str(tmp_path / "out"), f"{option}={value}"]) == 2
    assert f"error: {message}" in capsys.readouterr().err


def test_an_out_that_is_a_file_is_refused_before_the_training(tmp_path, capsys):
    data, out = write(tmp_path / "a.jsonl", [ROW]), tmp_path / "out"
    out.write_text("mine")
    assert prm_train.main([ASSETS, data, str(out)]) == 2
    assert f"error: OUT: {out} is there, and no folder" in capsys.readouterr().err and out.read_text() == "mine"


def test_a_loss_that_is_no_number_ends_it_and_nothing_is_written(tmp_path, capsys):
    data = write(tmp_path / "a.jsonl", [ROW] * 4)
    options = ["--lr", "1e30", "--epochs", "4", "--batch-sequences", "2", "--heldout", "0"]
    assert prm_train.main([ASSETS, data, str(tmp_path / "out"), *options]) == 1
    assert "the loss is nan; lower --lr" in capsys.readouterr().err and not (tmp_path / "out").exists()
