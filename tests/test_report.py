"""What the report reads, chooses and embeds, by exact values. Its page in a browser: test_report_page.py."""

from __future__ import annotations

import fnmatch
import json
import re
import tomllib
from pathlib import Path

import pytest
from fixtures.records import METRIC_ROWS, record, repair, run_with

from scope_fast import report

ROOT = Path(__file__).parents[1]


def embedded(page: str, name: str) -> str:
    return re.search(rf'<script type="[^"]*" id="{name}">(.*?)</script>', page, re.S)[1]


def test_metrics_lines_of_a_step_are_merged(tmp_path):
    run_with(
        tmp_path, [], [{"step": 1, "reward/mean": 0.5}, {"step": 2, "reward/mean": 1.0}, {"step": 2, "loss/rl": 0.0}]
    )
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rew')  # a run that still writes
    assert report.read_metrics(tmp_path) == [
        {"step": 1, "reward/mean": 0.5},
        {"step": 2, "reward/mean": 1.0, "loss/rl": 0.0},
    ]


def test_series_have_a_value_or_none_for_each_step():
    columns = report.series(METRIC_ROWS)
    assert columns["reward/pass_rate"]["values"] == [None, 0.5, 0.75]
    assert columns["eval/pass_rate"]["values"] == [0.25, None, 0.375]  # before training: the first point
    assert "eval/pass_rate_before" not in columns
    assert columns["time/rest"]["values"] == [None, 0.5, 60.0]
    assert columns["learner/lr"]["values"][2] == 0.00012346  # five digits
    assert (
        columns["scope/failed"]["unit"] == "count"
        and columns["scope/failed"]["description"] == "Rollouts without a reward above 0"
    )


def test_a_metric_of_another_version_is_still_drawn():
    columns = report.series([{"step": 1, "future/metric": 2.0}])
    assert columns["future/metric"] == {"unit": "", "description": "future/metric", "values": [2.0]}
    assert [p["names"] for p in report.panels(columns)["more"]] == [("future/metric",)]


def test_panels_hold_what_the_run_has_and_lose_nothing():
    names = set(report.series(METRIC_ROWS))
    panels = report.panels(names)
    by_title = {p["title"]: p for p in panels["main"]}
    assert by_title["Pass rate and reward"]["names"] == ["reward/pass_rate", "eval/pass_rate"]
    assert by_title["Time by phase"]["names"] == ["time/generate_s", "time/learn_s", "time/rest"]
    assert by_title["Engine against learner"]["scale"] == "log"
    assert "Loss" not in by_title
    shown = [name for group in panels.values() for panel in group for name in panel["names"]]
    assert sorted(shown) == sorted(names)  # each exactly once
    more = {p["title"] for p in panels["more"]}
    assert more == {"learner/lr", "scope/repaired", "scope/selected", "time/step_s"}


def test_totals_and_tiles():
    counts = {"failed": 6, "selected": 3, "repaired": 2, "accepted": 2, "rejected": 0, "errors": 1}
    assert report.totals(METRIC_ROWS) == counts
    tiles = {t["label"]: (t["value"], t["note"]) for t in report.tiles(METRIC_ROWS)}
    assert tiles == {
        "Held-out pass rate": ("25.0% → 37.5%", "+12.5 points"),
        "Repairs accepted": ("2 of 3", "67%; 0 rejected, 1 teacher errors"),
        "Near misses among failures": ("50.0% → 50.0%", "first → last tenth, to the reward model"),
        "Largest engine–learner gap": ("3.1e-06", "nats"),  # noqa: RUF001
    }
    assert report.tiles([]) == []


def test_facts_leave_out_what_the_configuration_lacks():
    assert report.facts({"method": "grpo", "steps": 9, "seed": 0}, METRIC_ROWS, {}) == [
        ["Method", "grpo"], ["Steps", "2 of 9"], ["Seed", "0"], ["Time in steps", "1 min 4 s"],
    ]  # fmt: skip
    whole = {
        "method": "scope", "steps": 2, "model": {"path": "tiny"}, "data": {"tasks": ["a", "b"]},
        "rollout": {"prompts_per_step": 16, "group_size": 8, "engine": "vllm"}, "teacher": {"kind": "solver"},
    }  # fmt: skip
    facts = dict(report.facts(whole, METRIC_ROWS, {}))
    assert facts["Steps"] == "2" and facts["Model"] == "tiny" and facts["Tasks"] == "a, b"
    assert facts["A step"] == "16 prompts × 8 rollouts" and facts["Teacher"] == "solver"  # noqa: RUF001
    assert facts["Engine"] == "vllm" and "Device" not in facts
    whole["data"]["path"] = "rows.jsonl"
    assert dict(report.facts(whole, METRIC_ROWS, {}))["Tasks"] == "rows.jsonl"
    facts = dict(report.facts(whole, METRIC_ROWS, {"engine": "transformers", "device": "H100", "ranks": 8}))
    assert facts["Engine"] == "transformers" and facts["Device"] == "8 × H100"  # noqa: RUF001
    assert dict(report.facts({}, [], {"device": "H100", "ranks": 1}))["Device"] == "H100"
    assert report._duration(7384) == "2 h 3 min" and report._duration(59.4) == "59 s"


def test_a_folder_is_no_page(tmp_path, capsys):
    run_with(tmp_path / "run", [])
    (tmp_path / "folder").mkdir()
    with pytest.raises(SystemExit) as ended:
        report.main([str(tmp_path / "run"), "--out", str(tmp_path / "folder")])
    assert ended.value.code == 2 and "that is a folder, expected a file" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_choose_keeps_both_ends_then_the_repaired_then_others():
    steps = [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    repaired = [i in (2, 6) for i in range(10)]
    assert report.choose(steps, repaired, 10) == list(range(10))
    assert report.choose(steps, repaired, 8) == [0, 1, 2, 3, 5, 6, 8, 9]  # 3 and 5: of 3 4 5 7, thinned evenly
    assert report.choose(steps, repaired, 6) == [0, 1, 2, 3, 6, 8]  # three of 0 1 8 9, both repaired, one other
    assert report.choose([1] * 6, [False] * 6, 3) == [0, 1, 3]  # one step, so no more than half as an end
    assert report.choose([], [], 3) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"reward": 1.0}, "passed"),
        ({}, "failed"),
        ({"reward": None, "verdict": "timeout"}, "unverified"),
        ({"repair": repair("accepted")}, "accepted"),
        ({"repair": repair("rejected")}, "rejected"),
        ({"repair": repair("error")}, "error"),
    ],
)
def test_status(change, expected):
    assert report.status(record(**change)) == expected


def test_compact_shortens_without_losing_what_is_shown():
    trained = {"response_ids": [1, 7], "tokens": ["1 + 2", " = 3"], "segment": [1, 2], "advantage": [0.5, 0.0],
               "loss_weight": [1.0, 1.0]}  # fmt: skip
    small = report.compact(record(repair=repair("accepted"), trained=trained))
    assert small["logprobs"] == [-0.12346, -1.0, 0.0]
    assert small["trained"] == {
        "tokens": ["1 + 2", " = 3"], "segment": [[1, 1], [2, 1]], "advantage": [[0.5, 1], [0.0, 1]],
        "loss_weight": [[1.0, 2]],
    }  # fmt: skip
    assert "suffix" not in small["repair"] and small["repair"]["suffix_tokens"] == [" = 3"]
    assert not {"prompt_ids", "response_ids", "response"} & set(small)
    same = {**trained, "tokens": record()["tokens"]}
    assert report.compact(record(trained=same))["trained"]["tokens"] is None  # the response itself
    refused = repair("rejected", suffix_ids=[], suffix_tokens=[], suffix="cannot be spliced")
    assert report.compact(record(repair=refused))["repair"]["suffix"] == "cannot be spliced"


def test_list_shows_where_prompts_differ():
    prompts = [
        "<|im_start|>user\nWhat is the sum of\n1 + 2?",
        "<|im_start|>user\nWhat is the sum of\n13 + 2?",
        "Short a",
        "Short b",
    ]
    assert report._gists(prompts, ["sum", "sum", "other", "other"]) == ["…1 + 2?", "…13 + 2?", "Short a", "Short b"]
    assert report._gists(["What is the sum of 1 + 2 here?"] * 2, ["sum"] * 2) == ["What is the sum of 1 + 2 here?"] * 2


def test_caps_say_how_many_of_how_many(tmp_path):
    path = run_with(tmp_path, [record(step=s, sample=i) for s in range(1, 11) for i in range(4)]) / "rollouts.jsonl"
    kept = report.read_rollouts(path, max_rollouts=12)
    assert kept["total"] == 40 and len(kept["index"]) == len(kept["details"]) == 12
    assert [(e[0], e[2]) for e in kept["index"]][:3] == [(1, 0), (1, 1), (1, 2)]
    assert kept["index"][0] == [1, 0, 0, "sum", "failed", None, "1 + 2 ="]
    line = len(json.dumps(record())) + 1
    assert len(report.read_rollouts(path, max_bytes=9 * line)["index"]) == 8  # steps of two digits are longer lines


def test_what_a_model_wrote_is_never_markup(tmp_path):
    evil = "</script><script>document.title = 'owned'</script><!-- & \u2028 \ud800"
    run_with(tmp_path, [record(prompt=evil, tokens=[evil, "a", "b"], task=evil, answer=evil)])
    page = report.write_report(tmp_path).read_text(encoding="utf-8")
    assert page.count("</script>") == 3 and "<!--" not in page
    detail = json.loads(embedded(page, "rollout-data"))
    assert detail["prompt"] == detail["answer"] == detail["tokens"][0] == evil
    assert json.loads(embedded(page, "run-data"))["index"][0][3] == evil


def test_braces_in_the_data_are_not_placeholders(tmp_path):
    run_with(tmp_path, [record(prompt="{{script}} {{title}}")])
    assert json.loads(embedded(report.render(tmp_path), "rollout-data"))["prompt"] == "{{script}} {{title}}"


def test_page_needs_nothing_but_itself(tmp_path):
    page = report.write_report(run_with(tmp_path, [record()])).read_text()
    assert not re.search(r"\b(?:src|href)\s*=\s*[\"'](?!#)", page)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|innerHTML|insertAdjacentHTML|document\.write", page)
    assert set(re.findall(r"https?://[^\s'\"]+", page)) == {
        "http://www.w3.org/2000/svg"
    }  # the name of SVG, not an address


def test_a_run_without_rollouts_still_has_its_curves(tmp_path):
    (run_with(tmp_path, []) / "rollouts.jsonl").unlink()
    run = json.loads(embedded(report.render(tmp_path), "run-data"))
    assert run["total"] == 0 and run["steps"] == [0, 1, 2]


def test_errors_name_what_is_wrong(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match=r"is no run directory: it has no config\.yaml"):
        report.write_report(tmp_path)
    broken = record()
    del broken["logprobs"]
    run_with(tmp_path, [record(), broken])
    with pytest.raises(ValueError, match=r"rollouts\.jsonl: rollout 2 has no 'logprobs'"):
        report.write_report(tmp_path)
    assert not list(tmp_path.glob("*report.html*"))
    with pytest.raises(SystemExit) as stop:
        report.main([str(tmp_path / "nowhere")])
    assert stop.value.code == 2 and "is no run directory" in capsys.readouterr().err


def test_command_line_writes_where_it_is_told(tmp_path, capsys):
    run_with(tmp_path / "run", [record()])
    report.main([str(tmp_path / "run"), "--out", str(tmp_path / "new" / "page.html")])
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'new' / 'page.html'} (")
    assert (tmp_path / "new" / "page.html").read_text().startswith("<!doctype html>")
    report.main([str(tmp_path / "run")])
    assert (tmp_path / "run" / "report.html").read_text() == (tmp_path / "new" / "page.html").read_text()


def test_the_page_s_parts_are_package_data():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["scope_fast"]
    parts = ("report.html", "report.css", *report.SCRIPTS)
    assert [part for part in parts if not any(fnmatch.fnmatch(part, glob) for glob in data)] == []
