"""Prompts: rows refused by file and line, a cursor that resumes, a held-out set that stays out."""

import copy
import json

import pytest
from factories import byte_level, configured
from tokenizers.processors import TemplateProcessing

from scope_fast.config import Data
from scope_fast.data import HELDOUT_SEED, HELDOUT_SEED_32, GymTasks, PromptSource, Table, encode_prompt
from scope_fast.tasks import GENERATED, dataset

ROWS = [{"prompt": f"question {i}", "answer": str(i)} for i in range(10)]


def plain_tokenizer():
    """Without a chat template, one token a character of "abc"."""
    tokenizer = copy.copy(byte_level())
    tokenizer.chat_template = None
    return tokenizer


def jsonl(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def source(path=None, heldout=2, method="grpo", tokenizer=None, **overrides):
    changes = {"data.heldout": heldout, **overrides}
    if path is not None:
        changes["data.path"] = path
    return PromptSource(configured(method=method, **changes), tokenizer or byte_level())


def table(path, seed=0, heldout=1):
    return Table(Data(path=str(path), heldout=heldout), seed)


def texts(prompts):
    return [prompt.text for prompt in prompts]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "why"}, "data.path: {path}:2 has no 'answer'"),
        ({"prompt": "why", "answer": None}, "data.path: {path}:2 has no 'answer'"),
        ({"prompt": "why", "answer": ""}, "data.path: {path}:2 has no 'answer'"),
        ({"answer": "1"}, "data.path: {path}:2 has no 'prompt'"),
        ({"prompt": [], "answer": "1"}, "data.path: {path}:2 has no 'prompt'"),
        ("[1]", "data.path: {path}:2 has no 'prompt'"),
        ({"prompt": 7, "answer": "1"}, "data.path: {path}:2: 'prompt' is neither text nor a list of chat messages"),
        ({"prompt": ["a"], "answer": "1"}, "data.path: {path}:2: 'prompt' is neither text nor a list of chat messages"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(line, message, tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [ROWS[0], line, ROWS[1]])
    with pytest.raises(ValueError) as caught:
        table(path)
    assert str(caught.value) == message.format(path=path)


def test_what_is_not_json_is_named_by_file_and_line(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [ROWS[0], "", "{'prompt': 1}"])  # the empty line counts, and is no row
    with pytest.raises(ValueError, match=r"rows\.jsonl:3 is not JSON: Expecting property name"):
        table(path)


def test_too_few_rows_to_hold_some_out(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", ROWS[:3])
    with pytest.raises(ValueError, match=r"rows\.jsonl has 3 rows, data\.heldout=3 leaves none to train on"):
        table(path, 0, 3)


def test_rows_as_they_come(tmp_path):
    """A zero is an answer; U+2028 inside a string ends no line; metadata and task are passed on."""
    rows = [
        {"prompt": "one\u2028line", "answer": 0},
        {"prompt": "b", "answer": "2", "task": "chain_sum", "metadata": {"expression": "1 + 1"}, "more": 3},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    rows = table(path)
    assert rows.tasks == ["chain_sum", "rows"]
    first, second = rows.row(0), rows.heldout(9)[0]
    assert (first["id"], first["task"], first["prompt"]) == ("rows/1", "rows", "one\u2028line")
    assert first["entry"]["answer"] == "0" and first["entry"]["metadata"] == {"source_dataset": "rows"}
    assert (second["id"], second["task"]) == ("rows/2", "chain_sum")
    assert second["entry"]["metadata"] == {"expression": "1 + 1", "source_dataset": "chain_sum"}
    assert second["entry"]["more"] == 3


def test_every_epoch_is_shuffled_anew(tmp_path):
    rows = table(jsonl(tmp_path / "rows.jsonl", ROWS), 0, 2)
    epochs = [[rows.row(epoch * 8 + i)["prompt"] for i in range(8)] for epoch in range(4)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(row["prompt"] for row in ROWS[:8])  # each once, the last two never
    assert len({tuple(epoch) for epoch in epochs}) == 4
    backwards = table(tmp_path / "rows.jsonl", 0, 2)
    assert [backwards.row(i)["prompt"] for i in reversed(range(32))] == [
        p for e in reversed(epochs) for p in reversed(e)
    ]
    assert [table(tmp_path / "rows.jsonl", 1, 2).row(i)["prompt"] for i in range(8)] != epochs[0]


@pytest.mark.parametrize("embedded", [True, False])
def test_the_same_cursor_gives_the_same_prompts(embedded, tmp_path):
    path = None if embedded else jsonl(tmp_path / "rows.jsonl", ROWS)
    first = source(path)
    seen = first.next(5) + first.next(9)
    assert first.cursor == 14
    resumed = source(path)
    resumed.cursor = 5
    assert resumed.next(9) == seen[5:]
    assert source(path, seed=1).next(5) != seen[:5]
    assert source(path, seed=1).heldout == first.heldout  # every run is measured on the same prompts


def test_embedded_tasks_take_turns_and_never_repeat():
    prompts = source(heldout=64).next(40)
    assert [p.task for p in prompts] == ["chain_sum", "leg_counting"] * 20
    assert prompts[3].id == "leg_counting/1" and prompts[4].id == "chain_sum/2"
    assert len({p.text for p in prompts}) == 40
    assert all(p.text == p.entry["question"] and p.answer == p.entry["answer"] for p in prompts)
    assert all(byte_level().decode(p.ids) == f"{p.text}\n" for p in prompts)


@pytest.mark.parametrize("name", ["chain_sum", "gcd"])
def test_rows_are_drawn_from_the_seeds_their_ids_name(name):
    """The ids alone would stay apart of rows that do not."""
    kept = HELDOUT_SEED if name == "chain_sum" else HELDOUT_SEED_32
    question = {seed: dataset(name, seed)[5]["question"] for seed in (3_000_000, kept)}
    assert len(set(question.values())) == 2
    assert GymTasks([name], 3).row(5)["prompt"] == question[3_000_000]
    assert [GymTasks([name], seed).heldout(6)[5]["prompt"] for seed in (3, 4)] == [question[kept]] * 2


def test_embedded_runs_of_any_seed_stay_apart():
    rows = [GymTasks(["chain_sum"], seed).row(i) for seed in (0, 1, 2**20 - 1) for i in (0, 999_999)]
    heldout = GymTasks(["chain_sum"], 0).heldout(2)
    assert len({row["id"] for row in rows + heldout}) == 8
    assert [row["id"] for row in heldout] == ["chain_sum/heldout-0", "chain_sum/heldout-1"]
    assert HELDOUT_SEED > 2**20 * 2_000_000  # the largest seed a configuration takes, and as much again


def test_generators_runs_of_any_seed_stay_apart():
    """pool_matrix takes seeds of 32 bits alone; the ranges are of GENERATED seeds each."""
    rows = [GymTasks(["pool_matrix"], seed).row(i) for seed in (0, 4294) for i in (0, GENERATED - 1, GENERATED)]
    assert len({row["id"] for row in rows + GymTasks(["pool_matrix"], 0).heldout(1)}) == 5
    first, last = HELDOUT_SEED_32, HELDOUT_SEED_32 + GENERATED - 1
    assert last < 2**32
    assert not any(seed * 1_000_000 <= last and seed * 1_000_000 + GENERATED > first for seed in range(2**13))


def test_held_out_prompts_are_never_trained_on(tmp_path):
    """The last two rows are set aside, and so is a training row that says the same as one of them."""
    rows = [*ROWS[:5], ROWS[9], *ROWS[5:8], ROWS[9]]
    data = source(jsonl(tmp_path / "rows.jsonl", rows))
    assert texts(data.heldout) == ["question 7", "question 9"]
    trained = texts(data.next(14))  # two epochs of seven
    assert sorted(trained) == sorted([f"question {i}" for i in range(7)] * 2)
    counts = data.take_counts()
    assert counts == {"data/skipped_long": 0, "data/skipped_short": 0, "data/skipped_heldout": 2}
    assert data.take_counts()["data/skipped_heldout"] == 0  # counted once


def test_long_prompts_are_skipped_and_counted(tmp_path):
    """A prompt of context - 1 tokens leaves room for one; one of context tokens leaves none."""
    words = {n: "z" * n for n in (19, 20, 21)}
    tokenizer = plain_tokenizer()
    assert {n: len(tokenizer.encode(text)) for n, text in words.items()} == {19: 19, 20: 20, 21: 21}
    rows = [{"prompt": p, "answer": "1"} for p in (*words.values(), "z")]
    sizes = {"rollout.context": 20, "rollout.max_tokens": 8}
    data = source(jsonl(tmp_path / "rows.jsonl", rows), heldout=1, tokenizer=tokenizer, **sizes)
    assert [len(p.ids) for p in data.next(3)] == [19] * 3
    assert 7 <= data.cursor <= 9  # two epochs of three rows, and the third up to its one usable row
    assert data.take_counts()["data/skipped_long"] == data.cursor - 3


def test_a_prompt_of_one_token(tmp_path):
    rows = [{"prompt": "z", "answer": "1"}, {"prompt": "a", "answer": "1"}]
    (prompt,) = source(jsonl(tmp_path / "rows.jsonl", rows), heldout=1, tokenizer=plain_tokenizer()).next(1)
    assert prompt.text == "z" and len(prompt.ids) == 1


def test_a_prompt_of_no_token(tmp_path):
    """A template that drops what the user wrote."""
    tokenizer = copy.copy(byte_level())
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] | replace('x', '') }}{% endfor %}"
    rows = [{"prompt": p, "answer": "1"} for p in ("x", "b", "c")]
    data = source(jsonl(tmp_path / "rows.jsonl", rows), heldout=1, tokenizer=tokenizer)
    assert texts(data.next(2)) == ["b", "b"]
    assert 3 <= data.cursor <= 4
    assert data.take_counts()["data/skipped_short"] == data.cursor - 2


def test_no_usable_prompt_at_all(tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", [{"prompt": "z" * 30, "answer": "1"}, {"prompt": "z", "answer": "1"}])
    sizes = {"rollout.context": 20, "rollout.max_tokens": 8}
    with pytest.raises(
        ValueError, match=r"0 usable prompts in 1001 rows \(data/skipped_long 1001; rollout.context=20\)"
    ):
        source(path, heldout=1, tokenizer=plain_tokenizer(), **sizes)
    jsonl(path, [{"prompt": "z", "answer": "1"}, {"prompt": "z" * 30, "answer": "1"}])
    with pytest.raises(
        ValueError, match=r"none of 1 held-out prompts is usable \(data/skipped_long 1; rollout.context=20\)"
    ):
        source(path, heldout=1, tokenizer=plain_tokenizer(), **sizes)


def test_a_thousand_useless_rows_before_the_last_one(tmp_path):
    rows = [
        {"prompt": "z", "answer": "1"},
        *[{"prompt": "z" * 30, "answer": "1"}] * 400,
        {"prompt": "y", "answer": "1"},
    ]
    data = source(jsonl(tmp_path / "rows.jsonl", rows), heldout=1, tokenizer=plain_tokenizer(),
                  **{"rollout.context": 20, "rollout.max_tokens": 8})  # fmt: skip
    for _ in range(3):  # at most 401 in turn
        assert texts(data.next(1)) in (["y"], ["z"])


def test_an_answer_of_several_lines_suits_no_response(tmp_path):
    """GSM8K's are whole solutions."""
    path = jsonl(tmp_path / "rows.jsonl", [*ROWS, {"prompt": "why", "answer": "1 + 1 = 2\n#### 2"}])
    with pytest.raises(ValueError, match=r"data\.path: the answer of rows/11 has several lines"):
        source(path)
    scored = {"verifier.score": "scope_fast.math_answers:score"}
    assert source(path, **scored).heldout[1].entry["answer"].endswith("#### 2")


def test_chat_messages_need_a_template(tmp_path):
    messages = [{"role": "system", "content": "add"}, {"role": "user", "content": "1 + 1"}]
    assert byte_level().decode(encode_prompt(byte_level(), messages)) == "add\n1 + 1\n"
    with pytest.raises(ValueError, match=r"data\.examples.*model\.path"):
        encode_prompt(plain_tokenizer(), messages)
    rows = [{"prompt": messages, "answer": "2"}, {"prompt": "b", "answer": "2"}]
    (prompt,) = source(jsonl(tmp_path / "rows.jsonl", rows), heldout=1).next(1)
    assert prompt.text == "add\n1 + 1\n"


def test_text_is_wrapped_by_the_template_and_left_alone_without_one():
    assert byte_level().decode(encode_prompt(byte_level(), "1 + 1")) == "1 + 1\n"
    assert byte_level().decode(encode_prompt(plain_tokenizer(), "1 + 1")) == "1 + 1"


def test_a_template_s_own_special_tokens_are_not_doubled():
    tokenizer = copy.deepcopy(byte_level())
    tokenizer.chat_template = "<|endoftext|>{{ messages[0]['content'] }}"
    assert encode_prompt(tokenizer, "1") == [0, tokenizer.convert_tokens_to_ids("1")]


def test_the_template_opens_the_assistant_s_turn_and_a_tokenizer_s_own_bos_is_not_added_to_it():
    tokenizer = copy.deepcopy(byte_level())
    tokenizer.chat_template = "{{ messages[0]['content'] }}{% if add_generation_prompt %}>{% endif %}"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.eos_token_id)]
    )
    assert tokenizer.encode("1")[0] == tokenizer.eos_token_id
    assert tokenizer.decode(encode_prompt(tokenizer, "1 + 1")) == "1 + 1>"
    tokenizer.chat_template = None
    assert tokenizer.decode(encode_prompt(tokenizer, "1 + 1")) == "<|endoftext|>1 + 1"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"method": "scope"},
            "teacher.kind: the solver cannot work task 'rows' of data.path; use teacher.kind: model",
        ),
        ({"method": "sft"}, "teacher.kind: the solver cannot work task 'rows'"),
        ({"method": "grpo", "prm.kind": "exact"}, "prm.kind: task 'rows' of data.path has no exact checker"),
        ({"method": "prm_reward", "prm.kind": "exact", "prm.monitor": "false"}, "has no exact checker"),
        ({"method": "grpo", "prm.kind": "exact", "prm.monitor": "false"}, None),
        ({"method": "scope", "teacher.kind": "model"}, None),
        ({"method": "grpo"}, None),
    ],
)
def test_parts_that_work_embedded_tasks_only(overrides, message, tmp_path):
    path = jsonl(tmp_path / "rows.jsonl", ROWS)
    if message is None:
        assert len(source(path, **overrides).next(3)) == 3
    else:
        with pytest.raises(ValueError) as caught:
            source(path, **overrides)
        assert message in str(caught.value)


def test_an_unknown_task_is_named():
    with pytest.raises(ValueError, match="task 'sums' is not embedded, nor a generator of reasoning-gym"):
        source(**{"data.tasks": "[sums]"})


def test_any_generator_of_reasoning_gym_gives_prompts():
    mixed = {"data.tasks": "[gcd, chain_sum]", "prm.kind": "token_classifier"}
    prompts = source(**mixed).next(6)
    assert [p.task for p in prompts] == ["gcd", "chain_sum"] * 3
    assert prompts == source(**mixed).next(6) != source(seed=1, **mixed).next(6)
    assert "Greatest Common Divisor" in prompts[0].text and prompts[0].id == "gcd/0"
    held = source(**mixed).heldout
    assert {p.id.split("-")[0] for p in held} == {"gcd/heldout", "chain_sum/heldout"}
    assert not {p.text for p in held} & {p.text for p in prompts}


def test_a_generator_s_entries_come_again(monkeypatch):
    monkeypatch.setattr("scope_fast.data.GENERATED", 5)
    rows = GymTasks(["gcd"], 0)
    assert rows.row(7) == rows.row(2) != rows.row(3)
    assert GymTasks(["chain_sum"], 0).row(7) != GymTasks(["chain_sum"], 0).row(2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"method": "scope"}, "teacher.kind: the solver cannot work task 'gcd' of data.tasks"),
        ({"method": "grpo", "prm.kind": "exact"}, "prm.kind: task 'gcd' of data.tasks has no exact checker"),
    ],
)
def test_what_needs_working_refuses_a_generator_by_name(overrides, message):
    with pytest.raises(ValueError, match=message):
        source(**{"data.tasks": "[chain_sum, gcd]", **overrides})


def test_limits_on_the_length_of_a_prompt(tmp_path):
    """3 to 5 tokens, both included; the instruction counts."""
    rows = [{"prompt": "z" * n, "answer": "1"} for n in (1, 2, 3, 4, 2)]
    limits = {"data.min_prompt_tokens": 4, "data.max_prompt_tokens": 5, "data.instruction": '"y"'}
    data = source(jsonl(tmp_path / "rows.jsonl", rows), heldout=1, tokenizer=plain_tokenizer(), **limits)
    assert texts(data.heldout) == ["zz\ny"]
    assert texts(data.next(2)) == ["zzz\ny"] * 2  # "zz" is held out
    counts = data.take_counts()
    assert counts["data/skipped_short"] in (1, 2) and counts["data/skipped_long"] in (1, 2)
    assert sum(counts.values()) == data.cursor - 2


def test_an_instruction_goes_to_the_end_of_the_last_message(tmp_path):
    messages = [{"role": "system", "content": "add"}, {"role": "user", "content": "1 + 1"}]
    rows = [{"prompt": messages, "answer": "2"}, {"prompt": "b", "answer": "2"}]
    data = source(jsonl(tmp_path / "rows.jsonl", rows), heldout=1, **{"data.instruction": "Box it."})
    assert byte_level().decode(data.next(1)[0].ids) == "add\n1 + 1\nBox it.\n"
    assert data.heldout[0].text == "b\nBox it." and messages[1]["content"] == "1 + 1"


def test_worked_examples_are_earlier_turns_behind_the_system_message(tmp_path):
    """The teacher's messages and the student's tokens come from the same list; a plain prompt becomes a turn."""
    messages = [{"role": "system", "content": "add"}, {"role": "user", "content": "1 + 1"}]
    rows = [{"prompt": messages, "answer": "2"}, {"prompt": "b", "answer": "2"}]
    data = source(jsonl(tmp_path / "rows.jsonl", rows), heldout=1, **{"data.examples": '[["2 + 2", "4"]]'})
    (made,) = data.next(1)
    turns = [("system", "add"), ("user", "2 + 2"), ("assistant", "4"), ("user", "1 + 1")]
    assert [(m["role"], m["content"]) for m in made.chat] == turns
    assert byte_level().decode(made.ids) == "add\n2 + 2\n4\n1 + 1\n"
    assert [m["content"] for m in data.heldout[0].chat] == ["2 + 2", "4", "b"]
