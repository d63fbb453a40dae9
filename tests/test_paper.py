"""The paper's table: arms as data, differences in pairs by hand, and two arms from training to plots."""

import importlib
import io
import json

import numpy as np
import pytest
import yaml
from rich.console import Console

from bench import paper, paper_stats
from scope_fast.config_files import load

SPLITS = {"id": ("a", "b"), "ood": ("c",)}


def test_every_arm_is_a_valid_configuration_that_changes_what_it_says(tmp_path):
    spec = yaml.safe_load(paper.ARMS.read_text())
    runs = paper.runs_of(spec["arms"], list(spec["arms"]), None, tmp_path, tmp_path, {})
    assert len(runs) == sum(arm["seeds"] for arm in spec["arms"].values())
    base = load(str(paper.BASE))
    for run in runs:
        config = load(str(paper.BASE), run.overrides)
        assert config.warm_start.model_copy(update={"teacher_steps": 300}) == base.warm_start  # one student for all
        assert (config.rollout, config.data, config.steps) == (base.rollout, base.data, base.steps)
        assert config.seed == run.seed
    assert len({str(run.config()) for run in runs}) == len(runs)
    assert [run.seed for run in runs[: len(spec["arms"])]] == [0] * len(spec["arms"])  # seed by seed
    tuned = paper.tuning_runs(spec, list(spec["arms"]), tmp_path, tmp_path, {})
    assert len(tuned) == 20 and len({str(run.config()) for run in tuned}) == 20
    assert {len(tries) for tries in spec["tuning"]["tries"].values()} == {4}  # equal effort for every arm
    assert {run.seed for run in tuned}.isdisjoint(range(5))


def test_a_record_of_other_settings_is_none(tmp_path):
    run = paper.Run("scope", 0, {}, tmp_path / "run", tmp_path / "scope_seed0.json")
    assert not run.is_done()
    paper.write_record(run.record, {"config": run.config()})
    assert run.is_done()
    assert not paper.Run("scope", 0, {"learner.lr": 1e-4}, run.folder, run.record).is_done()
    older = run.config()
    del older["learner"]["shard_size"]  # new since then
    paper.write_record(run.record, {"config": older})
    assert run.is_done()
    assert not paper.Run("scope", 0, {"learner.shard_size": 2}, run.folder, run.record).is_done()
    paper.write_record(run.record, {"config": {**run.config(), "of_old": 1}})
    assert not run.is_done()


def test_the_committed_records_are_of_the_settings_of_now(tmp_path):
    """All figures of README's comparison: a change of the configuration that orphans them must not pass unseen."""
    spec = yaml.safe_load(paper.ARMS.read_text())
    arms = list(spec["arms"])
    runs = [paper.Run(paper.START, 0, {}, tmp_path, paper.RESULTS / f"{paper.START}.json")]
    runs += paper.runs_of(spec["arms"], arms, None, tmp_path, paper.RESULTS, {})
    runs += paper.tuning_runs(spec, arms, tmp_path, paper.RESULTS, {})
    assert [run.record.name for run in runs if not run.is_done()] == []


def record(arm, seed, **by_task):
    """by_task: pass@1 of every problem; distinct-4 is half of it."""
    benchmarks = {
        task: {
            "metrics": {"scope/near_miss_rate": {"value": 0.25}},
            "by_problem": {"pass@1": column, "diversity/distinct_4": [x / 2 for x in column]},
        }
        for task, column in by_task.items()
    }
    metrics = {"tokens/rollout": [10, 30], "reward/pass_rate": [0.0] * 8 + [0.5] * 8, "time/step_s": [1.0, 2.0]}
    return {"arm": arm, "seed": seed, "evaluations": {"2": {}, "10": benchmarks}, "metrics": metrics}


def written(folder, *records):
    for r in records:
        paper.write_record(folder / f"{r['arm']}_seed{r['seed']}.json", r)
    return paper_stats.read(sorted(folder.glob("*.json")))


def test_values_and_differences_by_hand(tmp_path):
    """A difference that is the same for every problem and seed has no width in pairs, wide as each value is."""
    low, high = [0.0, 0.2, 0.4, 0.8], [0.1, 0.3, 0.5, 0.9]
    found = written(
        tmp_path,
        record("grpo", 0, a=low, b=low, c=low),
        record("grpo", 1, a=low[::-1], b=low, c=low),
        record("scope", 0, a=high, b=high, c=low),
        record("scope", 1, a=high[::-1], b=high, c=low),
        record("scope", 2, a=[1.0] * 4, b=[1.0] * 4, c=[1.0] * 4),  # no grpo run to compare with
    )
    summary = paper_stats.summarize(found, SPLITS)
    held = summary["arms"]["grpo"]["id"]
    assert held["pass@1"]["value"] == pytest.approx(0.35)
    assert held["diversity/distinct_4"]["value"] == pytest.approx(0.15)  # the median of 0, 0.1, 0.2, 0.4
    assert held["pass@1"]["low"] < 0.3 < 0.4 < held["pass@1"]["high"]
    assert held["scope/near_miss_rate"] == {"value": 0.25, "low": 0.25, "high": 0.25}
    difference = summary["differences"]["grpo"]
    assert difference["seeds"] == [0, 1]
    gap = difference["id"]["pass@1"]
    assert [gap["value"], gap["low"], gap["high"]] == pytest.approx([0.1] * 3)
    assert gap["relative"] == pytest.approx(0.1 / 0.35)
    assert difference["ood"]["pass@1"]["value"] == difference["ood"]["pass@1"]["high"] == 0.0
    assert set(summary["differences"]) == {"grpo"}
    training = summary["arms"]["scope"]["training"]
    assert training == {"tokens/rollout (sum)": 40, "time/step_s (sum)": 3.0, "reward/pass_rate (end)": 0.5}
    assert "pass@4" not in held
    assert "+0.100 [+0.100, +0.100]" in text_of(paper_stats.tables(summary))


def test_varieties_by_hand():
    def rollout(step, reward, *ids):
        return {"step": step, "group": 0, "reward": reward, "response_ids": list(ids)}

    rollouts = [
        rollout(1, 1.0, 9, 9, 9, 9),  # of another step
        rollout(2, 1.0, 1, 2, 3, 4),
        rollout(2, 1.0, 1, 2, 3, 4),
        rollout(2, 1.0, 5, 6, 7, 8),  # one more text, no part of the pair
        rollout(2, 0.0, 1, 2, 3, 4, 5),  # the only wrong one
        rollout(3, 0.0, 1, 2),
        rollout(3, 0.0, 1, 2),  # without a 4-gram
    ]
    assert paper_stats.varieties(rollouts, range(2, 4)) == {
        "distinct_4 of two right": 0.5, "distinct_4 of two wrong": None, "different texts of the right": 2 / 3,
    }  # fmt: skip


def test_intervals_cover_seeds_as_well_as_problems(tmp_path):
    """Problems all alike, seeds far apart: the width is the seeds'. Two seeds: a quarter of the draws has one alone."""
    found = written(
        tmp_path, record("scope", 0, a=[0.0] * 5, b=[0.0] * 5), record("scope", 1, a=[1.0] * 5, b=[1.0] * 5)
    )
    held = paper_stats.summarize(found, {"id": ("a", "b"), "ood": ("a",)})["arms"]["scope"]["id"]["pass@1"]
    assert held == {"value": 0.5, "low": 0.0, "high": 1.0}
    drawn = paper_stats.draws([[np.asarray([[0.0], [1.0]])]], "pass@1")
    assert 0.22 < (drawn == 0.0).mean() < 0.28


def a_try(i, pass_rates, **settings):
    columns = dict.fromkeys(paper_stats.SPLITS["id"], pass_rates)
    made = record(f"grpo_try{i}", 100, **columns)
    for benchmark in made["evaluations"]["10"].values():
        value = {"value": float(np.mean(pass_rates))}
        benchmark["metrics"] |= {"pass@1": value, "diversity/distinct_4": value}
    return made | {"settings": {name.replace("__", "."): value for name, value in settings.items()}}


def test_a_tie_goes_to_the_smaller_step():
    """Mean gaps to the best: 0.05 with an error of 0.02 (0, 0.1, 0, 0.1 twice over), then 0.01 with 0.013."""
    best = a_try(0, [0.5, 0.6, 0.7, 0.8], learner__lr=2e-3)
    worse = a_try(1, [0.5, 0.5, 0.7, 0.7], learner__lr=1e-4)
    tied = a_try(2, [0.46, 0.64, 0.67, 0.79], learner__lr=1e-3)
    larger = a_try(3, [0.46, 0.64, 0.67, 0.79], learner__lr=1e-3, loss__advantage_std=True)
    assert paper_stats.choose([best, worse])["arm"] == "grpo_try0"
    assert paper_stats.choose([best, worse, larger, tied])["arm"] == "grpo_try2"
    assert "0.640  │ 0.640      │ chosen" in text_of([paper_stats.tuning_table([best, worse, tied])])
    always = a_try(4, [0.4, 0.5, 0.6, 0.7], learner__lr=1e-4)  # the same gap everywhere is no accident
    assert paper_stats.choose([best, always])["arm"] == "grpo_try0"


def text_of(tables):
    console = Console(width=250, file=io.StringIO())
    for table in tables:
        console.print(table)
    return console.file.getvalue()


def test_two_arms_from_training_to_plots(tmp_path, monkeypatch, capsys):
    """`--quick`, its commands called in this process; a second call finds all records there."""
    pytest.importorskip("matplotlib")
    called = []

    def command(module, *arguments, log):
        called.append(module)
        assert importlib.import_module(module).main(list(arguments)) == 0

    monkeypatch.setattr(paper, "command", command)
    arguments = ["grpo", "scope", "--quick", "--seeds", "1", "--out", str(tmp_path)]
    assert paper.main(arguments) == 0
    assert called == ["scope_fast.evaluate", *["scope_fast.train", "scope_fast.evaluate"] * 2]
    kept = json.loads((tmp_path / "paper" / "scope_seed0.json").read_text())
    assert set(kept["evaluations"]) == {"2"} and len(kept["metrics"]["tokens/rollout"]) == 2
    summary = json.loads((tmp_path / "paper_summary.json").read_text())
    assert set(summary["arms"]) == {"start", "grpo", "scope"} and set(summary["differences"]) == {"grpo"}
    assert "pass@10" in summary["differences"]["grpo"]["ood"]
    for name in ("paper_curves.png", "paper_pass_at_k.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    assert paper.main(arguments) == 0
    assert len(called) == 5
    assert "2 of 2 runs have their record" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["scop"], "unknown arm 'scop': expected of grpo, scope, replace"),
        (["--seeds", "0"], "--seeds 0: expected at least 1"),
        (["--jobs", "0"], "--jobs 0: expected at least 1"),
    ],
)
def test_bad_command_lines(arguments, message, capsys):
    with pytest.raises(SystemExit):
        paper.main(arguments)
    assert message in capsys.readouterr().err
