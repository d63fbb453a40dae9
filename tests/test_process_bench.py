"""ProcessBench of a reward model: predictions equal those of its plain forward, nothing that fails is left out."""

import json

import pytest
import tiny_prms
import torch
from factories import byte_level, configured
from transformers import AutoModelForTokenClassification, AutoTokenizer

from scope_fast.prm import process_bench as bench
from scope_fast.prm.formats import QwenFormat
from scope_fast.scope.steps import TokenBytes, split_steps
from scope_fast.tasks import dataset, get_task

ASSETS = "scope_fast/assets/prm"
ROW = {"problem": "1 + 1?", "steps": ["1 + 1 = 2", "Answer: 2"], "label": -1}


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(*arguments, tmp_path):
    file = tmp_path / "made" / "scores.json"
    status = bench.main([str(a) for a in (*arguments, "--json", file)])
    return status, json.loads(file.read_text()) if file.exists() else None


def item(label, steps=3):
    return bench.Item("?", ["step"] * steps, label)


def test_scores_by_hand():
    """Five erroneous items: found, too early, too late, passed as correct, not scored. Three correct ones: one passed,
    one accused, one not scored."""
    items = [item(1)] * 5 + [item(-1)] * 3
    scores = bench.score([1, 0, 2, -1, None, -1, 0, None], items)
    values = {name: found.value for name, found in scores.estimates.items()}
    assert values == pytest.approx({"acc_error": 0.2, "acc_correct": 1 / 3, "f1": 0.25, "prefix_safe": 0.4})
    assert scores.counts == {"items": 8, "erroneous": 5, "correct": 3, "invalid": 2}
    for found in scores.estimates.values():
        assert 0 <= found.low < found.value < found.high <= 1
    assert bench.score([1, 0, 2, -1, None, -1, 0, None], items) == scores  # the same draws every time
    assert bench.score([1, 0, 2, -1, None, -1, 0, None], items, seed=1) != scores


def test_what_no_item_is_of_is_left_out():
    assert set(bench.score([-1, 0], [item(-1)] * 2).estimates) == {"acc_correct"}
    assert set(bench.score([1, None], [item(1)] * 2).estimates) == {"acc_error", "prefix_safe"}
    one = bench.score([1, -1], [item(1), item(-1)]).estimates
    assert one["f1"] == (1.0, None, None)  # one item of each kind says nothing of others
    none = bench.score([0, 0], [item(1), item(-1)]).estimates
    assert none["f1"].value == 0.0
    with pytest.raises(ValueError, match="items is empty"):
        bench.score([], [])


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen")
    return folder, *tiny_prms.qwen(folder)


def solutions(count=40):
    """Random sums of one to six lines under random labels: a random model is right about some of them."""
    rows = []
    for number, member in enumerate(tiny_prms.solutions(byte_level(), count, seed=2)):
        steps = [byte_level().decode(member.token_ids[a:b]).strip() for a, b in member.steps]
        rows.append({"problem": member.prompt.text, "steps": steps, "label": number % (len(steps) + 1) - 1})
    return rows


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_published_model_s_predictions_are_its_plain_forward_s(kind, qwen, tmp_path, capsys):
    folder, body, head = qwen
    rows, path = solutions(), tmp_path / f"rows.{kind}"
    if kind == "parquet":
        pytest.importorskip("datasets").Dataset.from_list(rows).to_parquet(str(path))
    else:
        jsonl(path, rows)
    status, record = run(folder, path, "--prm.kind", "qwen2.5-math-prm", tmp_path=tmp_path)
    assert status == 0
    fmt, found = QwenFormat(AutoTokenizer.from_pretrained(folder)), []
    for row in rows:
        encoded = fmt(row["problem"], row["steps"])
        with torch.no_grad():
            probs = head(body(torch.tensor([encoded.ids])).last_hidden_state[0]).softmax(-1)[encoded.rows, 1]
        found.append(next((i for i, p in enumerate(probs.tolist()) if p < 0.5), -1))
    pairs = [(p, row["label"]) for p, row in zip(found, rows, strict=True)]
    wrong = [(p, label) for p, label in pairs if label >= 0]
    expected = {
        "acc_error": sum(p == label for p, label in wrong) / len(wrong),
        "acc_correct": sum(p == -1 for p, label in pairs if label < 0) / (len(pairs) - len(wrong)),
        "prefix_safe": sum(0 <= p <= label for p, label in wrong) / len(wrong),
    }
    assert 0 < expected["acc_error"] < expected["prefix_safe"] < 1 and expected["acc_correct"] > 0
    a, b = expected["acc_error"], expected["acc_correct"]
    expected["f1"] = 2 * a * b / (a + b)
    assert {name: e["value"] for name, e in record["estimates"].items()} == pytest.approx(expected)
    correct = len(pairs) - len(wrong)
    assert record["counts"] == {"items": 40, "erroneous": len(wrong), "correct": correct, "invalid": 0}
    assert record["prm"] == {"path": str(folder), "kind": "qwen2.5-math-prm", "tau": 0.5}
    printed = capsys.readouterr().out
    assert f"{100 * a:.1f} %" in printed and "95 % interval" in printed and "invalid" in printed


def test_an_item_that_cannot_be_scored_is_counted_and_missed(qwen, tmp_path):
    rows = [
        ROW,
        {**ROW, "steps": ["1 + 1 = 2<extra_0>", "Answer: 2"]},
        {**ROW, "steps": ["1 + 1 = 2", " "]},
        {**ROW, "problem": "word " * 600},
    ]
    kind = ("--prm.kind", "qwen2.5-math-prm", "--prm.tau", "0")  # the model passes whatever it can read
    _, record = run(qwen[0], jsonl(tmp_path / "a.jsonl", rows), *kind, tmp_path=tmp_path)
    assert record["counts"] == {"items": 4, "erroneous": 0, "correct": 4, "invalid": 3}
    assert record["estimates"]["acc_correct"]["value"] == 0.25
    long = [ROW, {**ROW, "problem": "word " * 2000}]
    _, record = run(ASSETS, jsonl(tmp_path / "b.jsonl", long), "--prm.tau", "0", tmp_path=tmp_path)
    assert record["counts"]["invalid"] == 1 and record["estimates"]["acc_correct"]["value"] == 0.5


def slip_at(index):
    """Gets the result of step `index` wrong and no other."""
    calls = iter(range(100))
    return lambda value: value + 10 * (next(calls) == index)


def test_the_embedded_classifier_on_worked_solutions(tmp_path):
    """Steps encoded one by one are the run's own tokens and spans, and the shipped model knows some of the errors."""
    task, rows = get_task("leg_counting"), []
    for number in range(60):
        entry = dataset("leg_counting", 1 << 55)[number]
        gold = task.solve(entry)
        label = -1 if number % 3 == 0 else number % len(gold)
        steps = task.solve(entry, slip_at(label))
        assert next((i for i, (a, b) in enumerate(zip(steps, gold, strict=True)) if a != b), -1) == label
        rows.append({"problem": entry["question"], "steps": steps, "label": label})
    path = jsonl(tmp_path / "a.jsonl", rows)
    status, record = run(ASSETS, path, tmp_path=tmp_path)
    assert status == 0 and record["counts"] == {"items": 60, "erroneous": 40, "correct": 20, "invalid": 0}
    tokenizer = AutoTokenizer.from_pretrained(ASSETS)
    model = AutoModelForTokenClassification.from_pretrained(ASSETS, dtype=torch.float32).eval()
    found = []
    for row in rows:
        made = bench.encode(tokenizer, bench.Item(**row), "\n")
        text = "\n".join(row["steps"])
        assert made.token_ids == tokenizer.encode(text, add_special_tokens=False)
        assert made.steps == split_steps(TokenBytes(tokenizer)(made.token_ids))
        ids = torch.tensor([[*made.prompt.ids, *made.token_ids]])
        with torch.no_grad():
            probs = model(ids).logits[0].softmax(-1)[:, 1]
        ends = [len(made.prompt.ids) + end - 1 for _, end in made.steps]
        found.append(next((i for i, end in enumerate(ends) if probs[end] < 0.5), -1))
    expected = bench.score(found, [bench.Item(**row) for row in rows])
    assert {name: e["value"] for name, e in record["estimates"].items()} == {
        name: e.value for name, e in expected.estimates.items()
    }
    assert record["estimates"]["acc_error"]["value"] > 0 and record["estimates"]["acc_correct"]["value"] > 0.5


def test_the_separator_stands_between_the_steps():
    tokenizer = byte_level()
    made = bench.encode(tokenizer, bench.Item("?", [" a = b\n", "c"], -1), "\n\n")
    assert tokenizer.decode(made.token_ids) == "a = b\n\nc"
    assert [tokenizer.decode(made.token_ids[a:b]) for a, b in made.steps] == ["a = b\n\n", "c"]
    special = tokenizer.eos_token
    made = bench.encode(tokenizer, bench.Item("?", [special], -1), "\n")
    assert tokenizer.eos_token_id not in made.token_ids and tokenizer.decode(made.token_ids) == special


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**ROW, "problem": None}, "a.jsonl:2: 'problem' is None, expected text"),
        ({"steps": ["a"], "label": 0}, "a.jsonl:2: 'problem' is None, expected text"),
        ({**ROW, "steps": "one"}, "a.jsonl:2: 'steps' is 'one', expected a list of text"),
        ({**ROW, "steps": []}, r"a.jsonl:2: 'steps' is \[\], expected a list of text"),
        ({**ROW, "steps": ["a", 3]}, "a.jsonl:2: 'steps' is .*, expected a list of text"),
        ({**ROW, "label": 2}, "a.jsonl:2: 'label' is 2, expected the index of one of 2 steps, or -1"),
        ({**ROW, "label": -2}, "a.jsonl:2: 'label' is -2"),
        ({**ROW, "label": True}, "a.jsonl:2: 'label' is True"),
        ({**ROW, "label": "0"}, "a.jsonl:2: 'label' is '0'"),
        ([1], "a.jsonl:2: 'problem' is None"),
    ],
)
def test_a_row_of_another_shape_is_named_by_file_row_and_column(row, message, tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [ROW, row])
    with pytest.raises(ValueError, match=message):
        bench.read_items(configured(**{"data.path": path}))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: python -m scope_fast.prm.process_bench"),
        ([ASSETS, "--prm.tau", "1"], "usage: "),
        ([ASSETS, "nowhere.jsonl"], "nowhere.jsonl"),
        ([ASSETS, "DATA", "--prm.kind", "exact"], "prm.path: kind exact is the task's own checker and reads no model"),
        ([ASSETS, "DATA", "--prm.kin", "exact"], "unknown key prm.kin; did you mean prm.kind?"),
        (["no/where/at-all", "DATA"], "PRM_FOLDER: no/where/at-all cannot be loaded"),
        ([ASSETS, "EMPTY"], "has no row"),
    ],
)
def test_what_cannot_be_ends_with_a_message(arguments, message, tmp_path, capsys):
    data, empty = jsonl(tmp_path / "a.jsonl", [ROW]), jsonl(tmp_path / "b.jsonl", [])
    named = {"DATA": str(data), "EMPTY": str(empty)}
    assert bench.main([named.get(argument, argument) for argument in arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_split_of_the_hub_s_is_named_by_the_configuration():
    config, _ = bench.parse([ASSETS, "Qwen/ProcessBench", "--data.split", "gsm8k"])
    assert (config.data.path, config.data.split) == ("Qwen/ProcessBench", "gsm8k")
    assert config.prm.path == ASSETS and config.prm.kind == "token_classifier"
