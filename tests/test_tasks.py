"""Worked solutions: they end with reasoning-gym's own answer, go on from anywhere, and slips show."""

import itertools
from random import Random

import pytest

from scope_fast.tasks import STYLES, TASKS, check_name, dataset, extract_answer, get_task, score, slipping

NAMES = sorted(TASKS)
CHAIN = {"answer": "15", "metadata": {"source_dataset": "chain_sum", "expression": "12 + 7 - 4"}}
LEGS = {"answer": "22", "metadata": {"source_dataset": "leg_counting", "animals": {"spider": 2, "human": 3}}}


def some(name, count=300):
    data = dataset(name, seed=77)
    return [data[i] for i in range(count)]


def test_chain_sum_by_hand():
    assert get_task("chain_sum").solve(CHAIN) == ["12 + 7 = 19", "19 - 4 = 15. Answer: 15"]


def test_leg_counting_by_hand():
    lines = ["2 spider * 8 = 16, 0 + 16 = 16", "3 human * 2 = 6, 16 + 6 = 22. Answer: 22"]
    assert get_task("leg_counting").solve(LEGS) == lines


def test_styles_by_hand():
    chain, legs = get_task("chain_sum"), get_task("leg_counting")
    assert chain.solve(CHAIN, style="swapped") == ["7 + 12 = 19", "-4 + 19 = 15. Answer: 15"]
    assert chain.solve(CHAIN, style="worded") == ["add 7 to 12 = 19", "take 4 from 19 = 15. Answer: 15"]
    swapped = ["8 * 2 spider = 16, 16 + 0 = 16", "2 * 3 human = 6, 6 + 16 = 22. Answer: 22"]
    assert legs.solve(LEGS, style="swapped") == swapped
    worded = ["2 spider have 16 legs, add 16 to 0 = 16", "3 human have 6 legs, add 6 to 16 = 22. Answer: 22"]
    assert legs.solve(LEGS, style="worded") == worded
    assert legs.resume(LEGS, swapped[:1], "worded") == worded[1:]
    assert legs.check(LEGS, [worded[0], swapped[1]]) == [True, True]  # each line may be in a style of its own
    assert legs.check(LEGS, [worded[1], swapped[1].replace("22", "23")]) == [False, False]


def test_a_line_s_style_is_told_from_the_value_before_it():
    legs = get_task("leg_counting")
    swapped, worded = (legs.solve(LEGS, lambda value: value + 1, style) for style in ("swapped", "worded"))
    assert [legs.style_of(LEGS, swapped[:n]) for n in (1, 2)] == ["swapped", "swapped"]
    assert legs.style_of(LEGS, [worded[0], swapped[1]]) == "swapped"
    assert legs.style_of(LEGS, [*worded[:1], legs.solve(LEGS)[1]]) is None  # goes on from 16, the line before says 17
    for lines in ([], ["so"], ["so", worded[1]], [*worded, worded[1]]):
        assert legs.style_of(LEGS, lines) is None


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", NAMES)
def test_solutions_end_with_the_gym_s_own_answer(name, style):
    task, data = get_task(name), dataset(name, 77)
    seen = set()
    for entry in some(name):
        lines = task.solve(entry, style=style)
        assert all(task.check(entry, lines))
        text = "\n".join(lines)
        assert extract_answer(text) == entry["answer"]
        assert data.score_answer(extract_answer(text), entry) == 1.0
        assert score(text, entry) == (1.0, entry["answer"])
        seen.add(entry["answer"])
    assert len(seen) > 50  # and the answers are not all alike


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("name", NAMES)
def test_any_prefix_is_continued_with_the_rest(name, style):
    task = get_task(name)
    for entry in some(name):
        lines = task.solve(entry, style=style)
        for k in range(len(lines)):
            assert task.resume(entry, lines[:k], style) == lines[k:]


def test_a_wrong_prefix_is_continued_from_where_it_arrived():
    assert get_task("chain_sum").resume(CHAIN, ["12 + 7 = 20"]) == ["20 - 4 = 16. Answer: 16"]
    assert get_task("chain_sum").resume(CHAIN, ["12 + 7 = -3"]) == ["-3 - 4 = -7. Answer: -7"]
    # an answer too early is a value like another
    assert get_task("chain_sum").resume(CHAIN, ["12 + 7 = 19. Answer: 19"]) == ["19 - 4 = 15. Answer: 15"]
    assert get_task("leg_counting").resume(LEGS, ["2 spider * 8 = 16, 0 + 16 = 17"]) == [
        "3 human * 2 = 6, 17 + 6 = 23. Answer: 23"
    ]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["twelve and seven"], "no value to go on from in 'twelve and seven'"),
        (["12 + 7 = 19 or so"], "no value to go on from"),
        (["12 + 7 ="], "no value to go on from"),
        (["12 + 7 = 19", "19 - 4 = 15"], "no step left after 2 lines"),
        (["1 = 1"] * 5, "no step left after 5 lines"),
    ],
)
def test_nothing_to_go_on_from(lines, message):
    with pytest.raises(ValueError, match=message):
        get_task("chain_sum").resume(CHAIN, lines)


def test_checking_letter_by_letter():
    check = get_task("chain_sum").check
    assert check(CHAIN, ["12 + 7 = 19", "19 - 4 = 15. Answer: 15"]) == [True, True]
    assert check(CHAIN, ["12 + 7 = 20", "20 - 4 = 16. Answer: 16"]) == [False, False]  # an error is carried on
    assert check(CHAIN, ["12 + 7 = 19", "19 - 4 = 14. Answer: 14", "more"]) == [True, False, False]
    assert check(CHAIN, ["19 - 4 = 15. Answer: 15"]) == [False]  # a line has its place
    assert check(CHAIN, []) == []


def first_one_too_large():
    errors = itertools.chain([1], itertools.repeat(0))
    return lambda value: value + next(errors)


@pytest.mark.parametrize("name", NAMES)
def test_a_slip_is_carried_on(name):
    """The later steps are right for what they start from, and wrong all the same."""
    task = get_task(name)
    for entry in some(name, 50):
        lines = task.solve(entry, first_one_too_large())
        assert not any(task.check(entry, lines))
        assert task.resume(entry, lines[:1]) == lines[1:]
        assert int(extract_answer("\n".join(lines))) == int(entry["answer"]) + 1
        assert score("\n".join(lines), entry) == (0.0, str(int(entry["answer"]) + 1))


def test_slips_come_at_their_rate_and_change_the_value():
    slip = slipping(Random(0), 0.2)
    changes = [slip(100) - 100 for _ in range(5000)]
    wrong = [change for change in changes if change]
    assert 920 < len(wrong) < 1080  # 1000 expected, standard deviation 28
    assert set(wrong) == {-10, -2, -1, 1, 2, 10}
    assert {slipping(Random(0), 0.0)(value) - value for value in range(100)} == {0}
    assert 0 not in {slipping(Random(0), 1.0)(value) - value for value in range(100)}


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("19 - 4 = 15. Answer: 15", (1.0, "15")),
        ("Answer:15", (1.0, "15")),
        ("**Answer:** 15", (1.0, "15")),
        ("**Answer**: 15", (1.0, "15")),
        ("**Answer: 15**", (1.0, "15")),
        ("Answer: **15**", (1.0, "15")),
        ("**Answer:** **", (0.0, None)),
        ("Answer: 2**3", (0.0, "2**3")),
        ("Answer:  15  \nand so on", (1.0, "15")),
        ("Answer: 3\nno, Answer: 15", (1.0, "15")),  # the last one counts
        ("Answer: 15\nno, Answer: 3", (0.0, "3")),
        ("Answer: 15.5", (0.0, "15.5")),
        ("Answer: the answer is 15", (0.0, "the answer is 15")),  # the gym's partial credit is no pass
        ("Answer:", (0.0, None)),
        ("Answer:\n15", (0.0, None)),
        ("15", (0.0, None)),
        ("", (0.0, None)),
    ],
)
def test_score(response, expected):
    assert score(response, CHAIN) == expected


def test_score_of_a_task_that_is_not_embedded():
    entry = {"answer": " x + 1 ", "metadata": {"source_dataset": "jsonl"}}
    assert score("so Answer: x + 1", entry) == (1.0, "x + 1")
    assert score("so Answer: 1 + x", entry) == (0.0, "1 + x")
    assert score("x + 1", entry) == (0.0, None)


def test_an_answer_may_end_in_asterisks_itself():
    entry = {"answer": "2**", "metadata": {"source_dataset": "jsonl"}}
    assert score("Answer: 2**", entry) == score("**Answer:** 2**", entry) == (1.0, "2**")
    assert score("Answer: 2", entry) == (0.0, "2")


def test_an_entry_is_drawn_from_the_seed_and_its_number():
    data = dataset("chain_sum", 5)
    assert dataset("chain_sum", 6)[2]["question"] == data[3]["question"]  # entry i is drawn from seed + i
    assert dataset("chain_sum", 5) is data


def test_an_unknown_task_is_named():
    with pytest.raises(
        ValueError, match="task 'algebra' is not embedded; known: chain_sum, chain_sum_long, chain_sum_short"
    ):
        get_task("algebra")
    for ask in (check_name, lambda name: dataset(name, 0)):
        with pytest.raises(ValueError, match=r"'algebra' is not embedded, nor a generator .*embedded: chain_sum, "):
            ask("algebra")
    with pytest.raises(ValueError, match="did you mean basic_arithmetic"):
        check_name("basic_arithmetics")
    check_name("chain_sum_long")
    check_name("basic_arithmetic")


@pytest.mark.parametrize("name", ["gcd", "basic_arithmetic", "puzzle24"])
def test_any_generator_is_scored_by_reasoning_gym(name):
    data = dataset(name, 3)
    seen = set()
    for i in range(20):
        entry = data[i]
        assert score(f"so\nAnswer: {entry['answer']}", entry) == (1.0, entry["answer"])
        assert score(f"Answer: 0\nAnswer: {entry['answer']}\nSure.", entry) == (1.0, entry["answer"])
        assert score(f"Answer: so {entry['answer']} or so", entry)[0] == 0.0  # the gym gives a part of its score
        assert score(entry["answer"], entry) == (0.0, None)
        seen.add(entry["answer"])
    assert len(seen) > 3
    if name == "puzzle24":  # more than one answer is right: this one's is not compared letter by letter
        swapped = {
            "question": "",
            "answer": "(1 + 2 + 3) * 4",
            "metadata": {**entry["metadata"], "numbers": [1, 2, 3, 4]},
        }
        assert score("Answer: 1 * 2 * 3 * 4", swapped) == (1.0, "1 * 2 * 3 * 4")


def test_an_answer_of_several_lines_is_read_to_the_end():
    entry = dataset("rotate_matrix", 0)[0]
    assert "\n" in entry["answer"]
    for text in (f"Answer: {entry['answer']}\n", f"Answer:\n{entry['answer']}"):
        assert score(text, entry) == (1.0, entry["answer"])
    assert score(f"Answer: {entry['answer']}\n9 9 9", entry)[0] == 0.0


def test_a_row_that_only_bears_a_generator_s_name_is_compared_letter_by_letter():
    entry = {"answer": "8", "metadata": {"source_dataset": "gcd"}}  # from a file gcd.parquet, say
    assert score("Answer: 8", entry) == (1.0, "8") and score("Answer: 8.0", entry) == (0.0, "8.0")


@pytest.mark.parametrize(("name", "message"), [("composite", "at least one dataset"), ("word_ladder", "too large")])
def test_a_generator_that_makes_nothing_is_named(name, message):
    with pytest.raises(
        ValueError, match=f"{name}.: reasoning-gym makes no 100000 entries of it with seed 0: .*{message}"
    ):
        dataset(name, 0)
