"""A benchmark's results from samples with known verdicts, every number by hand."""

import io
import json

import pytest
from factories import trajectory
from rich.console import Console

from scope_fast.estimators import Estimate
from scope_fast.scorecard import SIMILAR_SAMPLES, average, cell, columns, score_benchmark, tables


def samples(*marks, answers=None):
    """One problem: "+" is correct, "-" wrong, "t" a time-out, "c" a crash. A sample has 2 steps of 2 tokens, an EOS."""
    group = []
    for i, mark in enumerate(marks):
        reward = {"+": 1.0, "-": 0.0}.get(mark)
        t = trajectory(reward=reward, sample=i, answer=answers[i] if answers else mark)
        t.verdict = {"t": "timeout", "c": "crash"}.get(mark, "ok")
        group.append(t)
    return group


def values(groups, ks, similarity=None):
    return {name: column.values for name, column in columns(groups, ks, similarity or {}).items()}


def test_accuracy_pass_and_majority_of_two_problems():
    groups = [samples(*"+---", answers="7889"), samples(*"++--", answers="7756")]
    found = values(groups, (1, 2, 4))
    assert found["avg@n"] == found["pass@1"] == [0.25, 0.5]
    assert found["pass@2"] == pytest.approx([1 / 2, 5 / 6])
    assert found["pass@4"] == [1.0, 1.0]
    assert found["maj@2"] == pytest.approx([1 / 4, 1 / 2])  # blocks (7 8)(8 9) and (7 7)(5 6)
    assert found["maj@4"] == [0.0, 1.0]
    assert "maj@1" not in found


def test_verifier_faults_leave_a_sample_out_and_a_problem_where_too_few_are_left():
    groups = [samples(*"+-tc"), samples(*"+++-"), samples(*"tttt")]
    found = values(groups, (1, 2, 4))
    assert found["avg@n"] == found["pass@1"] == [0.5, 0.75]
    assert found["pass@2"] == [1.0, 1.0]
    assert found["pass@4"] == [1.0]
    assert len(found["response/length"]) == 3
    result = score_benchmark("x", groups, (1, 2, 4))
    assert result.counts == {"verifier/timeouts": 5, "verifier/crashes": 1}
    assert [result.support[name] for name in ("avg@n", "pass@2", "pass@4", "response/length")] == [2, 2, 1, 3]
    assert result.estimates["avg@n"].value == 0.625
    assert result.estimates["pass@4"] == Estimate(1.0, None, None)


def test_near_misses_weigh_by_sample():
    """Steps: 2 each. First problem: errors at step 0, 1, 1; second: none found, and one that was never localised."""
    groups = [samples(*"---+"), samples(*"-+-+")]
    for t, place in zip(groups[0], (0, 1, 1), strict=False):
        t.first_error = place
    groups[1][0].first_error = 2
    column = columns(groups, (1,), {})["scope/near_miss_rate"]
    assert column.values == pytest.approx([2 / 3, 1.0]) and column.weights == [3.0, 1.0]
    assert score_benchmark("x", groups, (1,)).estimates["scope/near_miss_rate"].value == pytest.approx(3 / 4)
    assert "scope/near_miss_rate" not in values([samples("+", "-")], (1,))


def test_length_and_truncation():
    groups = [samples(*"++"), samples(*"++")]
    groups[0][1].token_ids = groups[0][1].token_ids[:2]
    groups[0][1].finish_reason = "length"
    found = values(groups, (1,))
    assert found["response/length"] == [3.5, 5.0]
    assert found["response/truncated"] == [0.5, 0.0]


def test_diversity_of_two_samples():
    """Equal token sequences of 5: 5 of 10 tokens and 2 of 4 4-grams are distinct. The answers differ in the first."""
    groups = [samples(*"+-"), samples(*"++"), samples(*"--")]
    for group in groups:
        for t in group:
            t.text = f"text {t.sample}"
    seen = []

    def similar(texts):
        seen.append(texts)
        return 0.25

    found = columns(groups, (1,), {"diversity/self_bleu": similar})
    assert found["diversity/distinct_1"].values == [0.5] * 3 and found["diversity/distinct_1"].statistic == "median"
    assert found["diversity/distinct_4"].values == [0.5] * 3
    assert found["diversity/unique_answers"].values == [2.0, 1.0, 1.0]
    assert found["diversity/self_bleu"].values == [0.25] * 3 and seen == [["text 0", "text 1"]] * 3
    assert columns([samples(*"+" * 20)], (1,), {"s": lambda texts: len(texts)})["s"].values == [SIMILAR_SAMPLES]


def test_one_sample_has_no_diversity():
    assert list(columns([samples("+")], (1,), {"diversity/self_bleu": lambda texts: 1.0})) == [
        "avg@n", "pass@1", "response/length", "response/truncated",
    ]  # fmt: skip


def test_an_undefined_similarity_is_left_out():
    assert "s" not in columns([samples(*"++")], (1,), {"s": lambda texts: None})


def test_results_follow_their_seed_and_their_name():
    groups = [samples(*("+" * (i % 5) + "-" * (4 - i % 5))) for i in range(20)]
    first, again = (score_benchmark("x", groups, (1, 4), seed=3) for _ in range(2))
    assert first.to_json() == again.to_json()
    other = score_benchmark("y", groups, (1, 4), seed=3)
    assert other.estimates["avg@n"].value == first.estimates["avg@n"].value
    assert (other.drawn["avg@n"] != first.drawn["avg@n"]).any()
    estimate = first.estimates["avg@n"]
    assert estimate.low < estimate.value < estimate.high
    assert estimate.value == pytest.approx(0.5)


def test_no_sample_is_an_error():
    with pytest.raises(ValueError, match="x: no sample to evaluate"):
        score_benchmark("x", [], (1,))
    with pytest.raises(ValueError, match="x: no sample to evaluate"):
        score_benchmark("x", [samples("+"), []], (1,))


def test_the_average_weighs_benchmarks_alike_and_keeps_what_all_have():
    """3 problems at 100 %, and 1 at 0 % with too few samples for pass@2."""
    one = score_benchmark("one", [samples(*"++")] * 3, (1, 2), group="g", counts={"data/duplicates": 2})
    two = score_benchmark("two", [samples("-")], (1,), group="g", counts={"data/duplicates": 1})
    both = average("g", [one, two])
    assert both.estimates["avg@n"].value == both.estimates["pass@1"].value == 0.5
    assert "pass@2" not in both.estimates and "diversity/distinct_1" not in both.estimates
    assert (both.problems, both.samples, both.group, both.support["avg@n"]) == (4, 0, "g", 4)
    assert both.counts == {"data/duplicates": 3, "verifier/timeouts": 0, "verifier/crashes": 0}


def test_benchmarks_of_one_problem_each_say_nothing_of_others():
    right, wrong = (score_benchmark(name, [samples(mark)], (1,)) for name, mark in (("right", "+"), ("wrong", "-")))
    both = average("both", [right, wrong]).estimates["avg@n"]
    assert (both.value, both.low, both.high) == (0.5, None, None)


def test_a_benchmark_of_one_problem_leaves_the_average_without_an_interval():
    one = score_benchmark("one", [samples("+")], (1,))
    many = score_benchmark("many", [samples("+"), samples("-")] * 4, (1,))
    assert average("both", [one, many]).estimates["avg@n"] == Estimate(0.75, None, None)


def test_the_average_s_interval_is_that_of_independent_benchmarks():
    """Two benchmarks of 400 problems at 50 %: the variance of their mean is half of one's."""
    groups = [samples("+"), samples("-")] * 200
    one, two = (score_benchmark(name, groups, (1,)) for name in ("one", "two"))
    both = average("both", [one, two]).estimates["avg@n"]
    half = 1.96 * (0.5 * 0.5 / 400 / 2) ** 0.5
    assert both.value == 0.5
    assert (both.low, both.high) == pytest.approx((0.5 - half, 0.5 + half), abs=0.006)


def test_json_is_plain_and_finite():
    result = score_benchmark("x", [samples(*"+-"), samples(*"--")], (1, 2), counts={"data/skipped_long": 1}, group="g")
    loaded = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert loaded["metrics"]["pass@2"] == {"value": 0.5, "low": 0.0, "high": 1.0, "problems": 2}
    assert loaded["counts"] == {"data/skipped_long": 1, "verifier/timeouts": 0, "verifier/crashes": 0}
    assert (loaded["group"], loaded["problems"], loaded["samples"]) == ("g", 2, 2)


@pytest.mark.parametrize(
    ("name", "estimate", "text"),
    [
        ("pass@8", Estimate(0.4125, 0.3, 0.5), "41.2 % [30.0, 50.0]"),
        ("avg@n", Estimate(1.0, None, None), "100.0 %"),
        ("response/length", Estimate(12.34, 11.0, 13.0), "12.3 [11.0, 13.0]"),
        ("diversity/self_bleu", Estimate(0.25, 0.2, 0.3), "0.250 [0.200, 0.300]"),
        ("pass@8", None, "-"),
    ],
)
def test_a_cell_of_the_table(name, estimate, text):
    assert cell(name, estimate) == text


@pytest.mark.parametrize(("width", "tables_made"), [(80, 2), (160, 1), (20, 4)])
def test_tables_fit_the_screen_and_show_counts_that_are_not_zero(width, tables_made):
    results = [score_benchmark(f"bench{i}", [samples(*"+t"), samples(*"-t")], (1,)) for i in range(4)]
    made = tables(results, width)
    assert len(made) == tables_made
    console = Console(width=max(width, 60), record=True, file=io.StringIO())
    for table in made:
        console.print(table)
    text = console.export_text()
    assert all(f"bench{i}" in text for i in range(4)) and "2 problems x 2" in text
    assert "…" not in text and "50.0 % [0.0, 100.0]" in text
    assert "verifier/timeouts" in text and "verifier/crashes" not in text
