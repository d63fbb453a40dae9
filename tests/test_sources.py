"""Rows of real files in the field's own column conventions, and rows that name what is wrong with them."""

import json
import math
import sys

import pytest

from scope_fast.config import Data
from scope_fast.data import Table
from scope_fast.sources import read_rows

datasets = pytest.importorskip("datasets", reason="pip install 'scope-fast[data]'")

MESSAGES = [{"role": "system", "content": "think"}, {"role": "user", "content": "1 + 1?"}]
VERL = {
    "data_source": "openai/gsm8k",
    "prompt": MESSAGES,
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "2"},
    "extra_info": {"index": 7, "split": "train"},
}
ARC = {
    "id": "Mercury_1",
    "question": "Which is largest?",
    "choices": {"text": ["ant", "cat", "cow"], "label": ["1", "2", "3"]},
    "answerKey": "3",
}
MMLU = {"question": "Which?", "options": ["x", "y"], "answer": "B", "answer_index": 1, "category": "math"}
GPQA = {"Question": "Why?", "Correct Answer": "so", **{f"Incorrect Answer {i}": f"no {i}" for i in (1, 2, 3)}}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parquet(path, rows):
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    return path


def read(path, **settings):
    return read_rows(Data(path=str(path), **settings))[0]


WRITERS = {"jsonl": jsonl, "parquet": parquet}


@pytest.mark.parametrize("kind", WRITERS)
def test_verls_columns(kind, tmp_path):
    (row,) = read(WRITERS[kind](tmp_path / f"train.{kind}", [VERL]))
    assert row["prompt"] == MESSAGES and row["task"] == "openai/gsm8k"
    assert row["entry"]["answer"] == "2" and row["entry"]["metadata"] == {"source_dataset": "openai/gsm8k"}
    assert row["entry"]["extra_info"] == {"index": 7, "split": "train"}  # for a scoring function of verl's kind
    assert row["id"] == {"jsonl": "train/1", "parquet": "train/0"}[kind]


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize(
    ("raw", "prompt", "answer"),
    [
        ({"prompt": "1 + 1?", "answer": 2}, "1 + 1?", "2"),  # TRL
        ({"prompt": MESSAGES, "solution": r"so \boxed{2}"}, MESSAGES, r"so \boxed{2}"),
        ({"problem": "1 + 1?", "solution": "add", "answer": "2"}, "1 + 1?", "2"),  # MATH-500: the answer goes first
        ({"question": "1 + 1?", "answer": "add\n#### 2"}, "1 + 1?", "add\n#### 2"),  # GSM8K
        ({"question": "1 + 1?", "ground_truth": 2.5}, "1 + 1?", "2.5"),
    ],
)
def test_columns_are_found_by_convention(kind, raw, prompt, answer, tmp_path):
    (row,) = read(WRITERS[kind](tmp_path / f"a.{kind}", [raw]))
    assert (row["prompt"], row["entry"]["answer"]) == (prompt, answer)
    assert row["task"] == "a"


def test_a_row_of_reasoning_gym_keeps_its_generator_as_the_task(tmp_path):
    native = {"question": "1 + 1?", "answer": "2", "metadata": {"source_dataset": "chain_sum", "expression": "1 + 1"}}
    rows = [native, {**native, "task": "mine"}, {**native, "data_source": "theirs"}, {**native, "metadata": {"a": 1}}]
    read_ = read(jsonl(tmp_path / "a.jsonl", rows))
    assert [row["task"] for row in read_] == ["chain_sum", "mine", "theirs", "a"]
    assert read_[0]["entry"]["metadata"] == native["metadata"]
    assert [row["entry"]["metadata"]["source_dataset"] for row in read_] == ["chain_sum", "mine", "theirs", "a"]


def test_metadata_that_is_json_text_is_read_and_other_text_is_kept(tmp_path):
    """As parquet and the hub hold tables of several shapes."""
    row, table = {"question": "1 + 1?", "answer": "2"}, {"source_dataset": "chain_sum", "expression": "1 + 1"}
    texts = [json.dumps(table), "[1]", "easy", None, ""]
    read_ = read(jsonl(tmp_path / "a.jsonl", [{**row, "metadata": text} for text in texts]))
    rest = {"source_dataset": "a"}
    kept = [table, {"value": "[1]", **rest}, {"value": "easy", **rest}, rest, rest]
    assert [row["entry"]["metadata"] for row in read_] == kept
    assert read_[0]["task"] == "chain_sum"


@pytest.mark.parametrize("blank", [" ", math.nan])
def test_a_blank_answer_is_none(blank, tmp_path):
    with pytest.raises(ValueError, match=r"data\.path: .*:1 has no 'answer'"):
        read(jsonl(tmp_path / "a.jsonl", [{"prompt": "1 + 1?", "answer": blank}]))


def test_columns_are_named_by_the_configuration(tmp_path):
    raw = {"Problem": "1 + 1?", "gold": {"final": ["2"]}, "prompt": "not this", "answer": "nor this"}
    (row,) = read(jsonl(tmp_path / "a.jsonl", [raw]), prompt_column="Problem", answer_column="gold.final")
    assert (row["prompt"], row["entry"]["answer"]) == ("1 + 1?", "2")


def test_several_answers_are_joined(tmp_path):
    (row,) = read(
        jsonl(tmp_path / "a.jsonl", [{"question": "?", "final_answer": ["1", "2"]}]), answer_column="final_answer"
    )
    assert row["entry"]["answer"] == "1, 2"


@pytest.mark.parametrize("kind", ["csv", "json", "arrow", "folder", "splits"])
def test_other_files_and_folders(kind, tmp_path):
    made = datasets.Dataset.from_list([{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2"}])
    path, settings = tmp_path / f"a.{kind}", {}
    if kind == "csv":
        made.to_csv(str(path))
    elif kind == "json":
        made.to_json(str(path))
    elif kind == "folder":
        made.save_to_disk(str(path))
    elif kind == "splits":
        datasets.DatasetDict({"test": made, "train": made.select([0])}).save_to_disk(str(path))
        settings = {"split": "test"}
    else:
        made.save_to_disk(str(tmp_path / "disk"))
        path = next((tmp_path / "disk").glob("*.arrow")).rename(path)
    rows = read(path, **settings)
    assert [(row["prompt"], row["entry"]["answer"]) for row in rows] == [("a", "1"), ("b", "2")]


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": None}], {}, r"a\.parquet\[1\] has no 'answer'$"),
        ([{"prompt": "a", "answer": "1"}, {"prompt": "", "answer": "2"}], {}, r"a\.parquet\[1\] has no 'prompt'$"),
        ([{"text": "a", "label": "1"}], {}, r"no 'prompt' \(it has text, label; name .* data\.prompt_column\)"),
        ([{"prompt": "a", "label": "1"}], {}, r"no 'answer' \(it has label; name the column by data\.answer_column\)"),
        ([{"prompt": "a", "answer": "1"}], {"answer_column": "gold"}, r"\[0\] has no 'gold' \(it has answer; name"),
        ([{"prompt": 3, "answer": "1"}], {}, "'prompt' is neither text nor a list of chat messages"),
        ([{"prompt": "a", "answer": {"x": 1}}], {}, "'answer' is a dict, expected text or a number"),
        ([{"prompt": "a", "answer": [["1"]]}], {}, "'answer' is a list, expected text or a number"),
        ([VERL, VERL | {"reward_model": {"ground_truth": ""}}], {}, r"\[1\] has no 'reward_model.ground_truth'$"),
        ([MMLU | {"answer": "C"}], {"choices_column": "options"}, "'C' is none of the 2 options"),
        ([MMLU], {"choices_column": "option"}, r"data\.choices_column: .*a\.parquet\[0\] has no 'option'$"),
        ([MMLU, MMLU | {"options": []}], {"choices_column": "options"}, r"choices_column: .*\[1\] has no 'options'$"),
        ([MMLU | {"options": ["x", None]}], {"choices_column": "options"}, r"'options' is \['x', None\], expected"),
        ([MMLU | {"options": "xy"}], {"choices_column": "options"}, r"'options' is 'xy', expected a list of options"),
        ([MMLU], {"distractor_columns": ["wrong"]}, r"data\.distractor_columns: .*\[0\] has no 'wrong'$"),
        ([MMLU, {**MMLU, "category": None}], {"distractor_columns": ["category"]}, r"\[1\] has no 'category'"),
        ([MMLU | {"category": " "}], {"distractor_columns": ["category"]}, r"_columns: .*\[0\] has no 'category'$"),
        ([MMLU | {"answer": "z"}], {"choices_column": "options"}, "'z' is none of the 2 options"),
        ([{"prompt": MESSAGES, "answer": "A", "options": ["x"]}], {"choices_column": "options"}, "not chat messages"),
    ],
)  # fmt: skip
def test_a_bad_row_is_named_by_file_and_index(rows, settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read(parquet(tmp_path / "a.parquet", rows), **settings)


def test_an_empty_answer_in_the_first_row_does_not_move_the_answer_to_another_column(tmp_path):
    rows = [{"prompt": "a", "answer": None, "solution": "work"}, {"prompt": "b", "answer": "2", "solution": "work"}]
    with pytest.raises(ValueError, match=r"a\.jsonl:1 has no 'answer'"):
        read(jsonl(tmp_path / "a.jsonl", rows))


def test_arcs_options_and_labels(tmp_path):
    (row,) = read(parquet(tmp_path / "arc.parquet", [ARC]), choices_column="choices", answer_column="answerKey")
    assert row["prompt"] == "Which is largest?\n\nA. ant\nB. cat\nC. cow" and row["entry"]["answer"] == "C"


@pytest.mark.parametrize("answer", ["B", 1, "y"])
def test_options_with_the_answer_as_letter_index_or_text(answer, tmp_path):
    (row,) = read(jsonl(tmp_path / "a.jsonl", [MMLU | {"answer": answer}]), choices_column="options")
    assert row["prompt"] == "Which?\n\nA. x\nB. y" and row["entry"]["answer"] == "B"


def test_gpqas_wrong_options_are_shuffled_in_alike_every_time(tmp_path):
    settings = {
        "prompt_column": "Question",
        "answer_column": "Correct Answer",
        "distractor_columns": [f"Incorrect Answer {i}" for i in (1, 2, 3)],
    }
    path = parquet(tmp_path / "gpqa.parquet", [GPQA] * 40)
    rows = read(path, **settings)
    for row in rows:
        options = dict(line.split(". ") for line in row["prompt"].split("\n\n")[1].split("\n"))
        assert sorted(options.values()) == ["no 1", "no 2", "no 3", "so"]
        assert options[row["entry"]["answer"]] == "so"
    assert {row["entry"]["answer"] for row in rows} == set("ABCD")
    assert rows == read(path, **settings)


def test_duplicates_are_counted_and_dropped_when_asked(tmp_path, capsys):
    prompts = ["a", "b", "a", MESSAGES, "a", MESSAGES, "c"]
    path = jsonl(tmp_path / "a.jsonl", [{"prompt": p, "answer": i} for i, p in enumerate(prompts)])
    rows, duplicates = read_rows(Data(path=str(path)))
    assert (len(rows), duplicates) == (7, 3)
    rows, duplicates = read_rows(Data(path=str(path), dedup=True))
    assert [row["prompt"] for row in rows] == ["a", "b", MESSAGES, "c"] and duplicates == 3
    assert [row["entry"]["answer"] for row in rows] == ["0", "1", "3", "6"]  # the first of each stays
    Table(Data(path=str(path), heldout=1, dedup=True), 0)
    assert capsys.readouterr().out == f"data: {path}: 3 rows and 1 held out; 3 duplicates dropped\n"
    Table(Data(path=str(path), heldout=1), 0)
    assert "6 rows and 1 held out; 3 duplicates kept (data.dedup drops them)" in capsys.readouterr().out


def test_a_missing_file_is_not_looked_for_on_the_hub(tmp_path):
    for name in ("a.parquet", "a.jsonl"):
        with pytest.raises(FileNotFoundError, match=f"^data.path: there is no file {tmp_path}/{name}$"):
            read(tmp_path / name)


def test_lines_that_are_no_utf_8_are_named_by_their_file(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"prompt": "één", "answer": "1"}\n'.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"^data\.path: {tmp_path}/a\.jsonl is not UTF-8: .* position 12"):
        read(tmp_path / "a.jsonl")


def test_an_unknown_kind_of_file(tmp_path):
    (tmp_path / "a.xlsx").write_text("")
    with pytest.raises(ValueError, match=r"a\.xlsx is none of \.jsonl, \.parquet, \.json, \.csv, \.arrow"):
        read(tmp_path / "a.xlsx")


def test_a_hub_name_goes_to_datasets_with_its_subset_and_split(monkeypatch):
    asked = []

    def load_dataset(*arguments, **named):
        asked.append((arguments, named))
        return datasets.Dataset.from_list([{"question": "?", "answer": "1"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (row,) = read("openai/gsm8k", subset="main", split="test")
    assert asked == [(("openai/gsm8k", "main"), {"split": "test"})]
    assert (row["id"], row["task"]) == ("gsm8k/0", "gsm8k")


def test_without_the_datasets_package_jsonl_still_reads_and_the_rest_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert len(read(jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "answer": "1"}]))) == 1
    with pytest.raises(ImportError, match=r"needs the datasets package: pip install 'scope-fast\[data\]'"):
        read("org/name")
