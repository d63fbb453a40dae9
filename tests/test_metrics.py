"""The vocabulary, the run-directory writers, the step display, the timer and the diversity metrics, by exact values."""

from __future__ import annotations

import io
import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from scope_fast import metrics, progress
from scope_fast.diversity import distinct_n, diversity_values, unique_answers
from scope_fast.metrics import (
    METRICS,
    MetricsWriter,
    Timer,
    fold,
)
from scope_fast.records import RolloutLog

DESIGN = """
reward/mean reward/pass_rate scope/failed scope/selected scope/repaired scope/accepted scope/rejected
scope/near_miss_rate scope/prefix_ratio scope/first_error loss/rl loss/nll loss/total grad/norm policy/clip_fraction
policy/entropy policy/kl policy/ratio_max sampling/logprob_gap response/length response/truncated diversity/distinct_1
diversity/distinct_4 diversity/unique_answers verifier/timeouts prm/invalid teacher/errors sync/weight_version
time/generate_s time/verify_s time/prm_s time/teacher_s time/learn_s time/sync_s time/step_s tokens/rollout
tokens/trained tokens/skipped perf/tokens_per_s perf/mfu sampling/entropy
"""


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_vocabulary_has_every_name_of_the_design_and_a_known_unit():
    assert set(DESIGN.split()) <= set(METRICS)
    units = {"share", "nats", "tokens", "steps", "s", "count", "ratio", "rate", "loss", "reward", "updates"}
    assert {m.unit for m in METRICS.values()} <= units
    assert all(m.description for m in METRICS.values())
    assert all(METRICS[name].unit == "s" for name in METRICS if name.startswith("time/"))


def test_write_appends_one_line_a_step(tmp_path, capsys):
    with MetricsWriter(tmp_path, 2, "scope", tensorboard=False) as writer:
        writer.write(1, {"reward/mean": torch.tensor(0.5), "scope/failed": torch.tensor([3]), "loss/rl": -0.25})
        assert lines(tmp_path / "metrics.jsonl") == [  # on disk before the writer closes
            {"step": 1, "reward/mean": 0.5, "scope/failed": 3, "loss/rl": -0.25}
        ]
        writer.write(2, {"reward/mean": 1})
        writer.write(2, {"eval/pass_rate": 0.75}, show=False)
    assert lines(tmp_path / "metrics.jsonl")[1:] == [
        {"step": 2, "reward/mean": 1},
        {"step": 2, "eval/pass_rate": 0.75},
    ]
    assert len(capsys.readouterr().out.splitlines()) == 3  # a header and two steps, nothing for the evaluation
    assert not (tmp_path / "tensorboard").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"loss/rl": float("nan")}, "loss/rl is nan"),
        ({"grad/norm": torch.tensor(math.inf)}, "grad/norm is inf"),
        ({"loss/nll": torch.zeros(2, 3)}, r"loss/nll: expected one value, got a tensor of shape \(2, 3\)"),
        ({"reward/means": 0.0}, "unknown metric 'reward/means'; did you mean 'reward/mean'"),
        ({"scope/acepted": 0.0}, "did you mean 'scope/accepted'"),
    ],
)
def test_write_refuses_what_is_no_metric(tmp_path, values, message):
    with MetricsWriter(tmp_path, 1, "scope", tensorboard=False) as writer, pytest.raises(ValueError, match=message):
        writer.write(1, {"reward/mean": 0.5, **values})
    assert (tmp_path / "metrics.jsonl").read_text() == ""  # nothing of the refused line


def test_steps_only_go_on(tmp_path):
    with MetricsWriter(tmp_path, 9, "scope", tensorboard=False) as writer:
        with pytest.raises(ValueError, match="step=-1"):
            writer.write(-1, {})
        writer.write(4, {"reward/mean": 0.5})
        with pytest.raises(ValueError, match="step=3 after step 4"):
            writer.write(3, {"reward/mean": 0.5})


def write_logs(directory: Path, steps: int) -> None:
    with MetricsWriter(directory, steps, "scope") as writer, RolloutLog(directory) as log:
        for step in range(1, steps + 1):
            log.append(json.dumps({"step": step, "sample": 0}))
            log.append(json.dumps({"step": step, "sample": 1}))
            writer.write(step, {"reward/mean": step / 10})


def test_resume_cuts_the_logs_back_and_goes_on(tmp_path):
    write_logs(tmp_path, 4)
    with (tmp_path / "rollouts.jsonl").open("a") as file:
        file.write('{"step": 5, "sam')  # torn by a kill
    with RolloutLog(tmp_path) as log, MetricsWriter(tmp_path, 4, "scope", resume_step=2) as writer:
        log.append(json.dumps({"step": 3, "sample": 7}))  # a log opened before the cut goes on after it
        writer.write(3, {"reward/mean": 0.75})
    assert [(row["step"], row["reward/mean"]) for row in lines(tmp_path / "metrics.jsonl")] == [
        (1, 0.1),
        (2, 0.2),
        (3, 0.75),
    ]
    assert [(row["step"], row["sample"]) for row in lines(tmp_path / "rollouts.jsonl")] == [
        (1, 0), (1, 1), (2, 0), (2, 1), (3, 7),
    ]  # fmt: skip


def test_tensorboard_holds_the_scalars_and_forgets_what_resume_dropped(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write_logs(tmp_path, 4)
    time.sleep(1.0)  # TensorBoard reads files by name: second, process, and a number whose 10 comes before 9
    with MetricsWriter(tmp_path, 4, "scope", resume_step=2) as writer:
        writer.write(3, {"reward/mean": 0.75})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [
        (1, pytest.approx(0.1)),  # TensorBoard stores float32
        (2, pytest.approx(0.2)),
        (3, 0.75),
    ]


def test_a_used_directory_is_not_overwritten_by_accident(tmp_path):
    write_logs(tmp_path, 2)
    with pytest.raises(FileExistsError, match="already holds metrics"):
        MetricsWriter(tmp_path, 2, "scope", tensorboard=False)
    assert len(lines(tmp_path / "metrics.jsonl")) == 2
    MetricsWriter(tmp_path, 2, "scope", tensorboard=False, resume_step=-1)
    assert (tmp_path / "metrics.jsonl").read_text() == ""
    assert (tmp_path / "rollouts.jsonl").read_text() == ""


def test_wandb_missing_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"pip install 'scope-fast\[wandb\]'"):
        MetricsWriter(tmp_path, 1, "scope", wandb={"project": "p"}, tensorboard=False)


def test_wandb_gets_the_metrics_and_resumes_its_run(tmp_path, monkeypatch):
    calls = []
    run = SimpleNamespace(
        id="abc",
        log=lambda values, step: calls.append(("log", step, values)),
        finish=lambda exit_code: calls.append(("finish", exit_code)),
    )
    fake = SimpleNamespace(init=lambda **options: calls.append(("init", options)) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with MetricsWriter(tmp_path, 2, "scope", wandb={"project": "p"}, tensorboard=False) as writer:
        writer.write(1, {"reward/mean": 0.5})
    resumed = MetricsWriter(tmp_path, 2, "scope", wandb={"project": "p"}, tensorboard=False, resume_step=1)
    with pytest.raises(KeyboardInterrupt), resumed:
        raise KeyboardInterrupt
    folder = str(tmp_path)
    assert calls == [
        ("init", {"dir": folder, "project": "p"}),
        ("log", 1, {"reward/mean": 0.5}),
        ("finish", 0),
        ("init", {"dir": folder, "project": "p", "id": "abc", "resume": "allow"}),
        ("finish", 1),
    ]


STEP = {
    "reward/pass_rate": 0.40625, "reward/mean": 0.5, "scope/failed": 38, "scope/selected": 12, "scope/accepted": 9,
    "loss/rl": -0.0012, "loss/nll": 0.5, "grad/norm": 0.75, "sampling/entropy": 0.25, "sampling/logprob_gap": 1.5e-6,
    "perf/tokens_per_s": 12345.6, "time/step_s": 4.84,
}  # fmt: skip


def test_plain_lines_where_stdout_is_no_terminal():
    out = io.StringIO()
    with progress.StepDisplay(120, "scope", console=Console(file=out, width=40)) as display:
        display.step(7, STEP)
        display.step(8, {"reward/pass_rate": 0.5, "scope/failed": 3})
    header, first, second = out.getvalue().splitlines()  # 40 columns, yet no line is broken
    titles = "step pass reward failed→sel→acc loss rl loss nll grad entropy gap tok/s s"
    assert " ".join(header.split()) == titles
    assert " ".join(first.split()) == "7/120 0.406 0.500 38→12→9 -0.0012 +0.5000 0.750 0.250 1.5e-06 12,346 4.8"
    assert second.split() == ["8/120", "0.500", "-", "3→-→-", *["-"] * 7]
    assert len(header) == len(first) == len(second)
    assert "\x1b" not in out.getvalue()


def test_header_returns_while_a_log_scrolls():
    out = io.StringIO()
    display = progress.StepDisplay(60, "scope", console=Console(file=out))
    for step in range(1, 61):
        display.step(step, STEP)
    heads = [i for i, line in enumerate(out.getvalue().splitlines()) if "pass" in line]
    assert heads == [0, 26, 52]


def test_an_ascii_log_does_not_end_the_run():
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    progress.StepDisplay(2, "scope", console=Console(file=out)).step(1, STEP)
    assert b"38?12?9" in raw.getvalue()


def test_terminal_shows_a_bar_and_only_the_columns_that_fit():
    out = io.StringIO()
    console = Console(file=out, width=64, force_terminal=True, color_system=None, highlight=False)
    with progress.StepDisplay(10, "scope", done=4, console=console) as display:
        display.step(5, STEP)
    text = out.getvalue()
    assert [c.title for c in display.columns] == ["pass", "failed→sel→acc", "loss rl", "loss nll", "s"]
    assert "38→12→9" in text and "5/10" in text and "━" in text and "left" in text
    assert "entropy" not in text


def test_columns_are_dropped_by_importance():
    assert progress.fit_columns(7, None) == progress.COLUMNS
    assert [c.title for c in progress.fit_columns(7, 30)] == ["pass", "s"]
    assert [c.title for c in progress.fit_columns(7, 5)] == ["s"]  # one stays, whatever the width


def test_warm_start_reports_in_tenths_without_a_terminal(monkeypatch):
    clock = iter([0.0, 1.0, 2.0, *range(3, 60)])
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    out = io.StringIO()
    with progress.progress_bars(Console(file=out)) as report:
        for step in range(1, 31):
            report("student", step, 30, note=f"loss {step}")
        report("teacher", 1, 1)
    said = out.getvalue().splitlines()
    assert said[0].startswith("student: 3/30 (10 %), ") and said[0].endswith(" s  loss 3")
    assert [line.split()[1] for line in said] == [f"{n}/30" for n in range(3, 31, 3)] + ["1/1"]


def test_warm_start_bars_on_a_terminal():
    out = io.StringIO()
    with progress.progress_bars(Console(file=out, width=90, force_terminal=True, color_system=None)) as report:
        report("warm start: student", 150, 300, note="loss 1.25")
        report("warm start: teacher", 10, 600)
    text = out.getvalue()
    for expected in ("warm start: student", "150/300", "loss 1.25", "warm start: teacher", "10/600"):
        assert expected in text


def test_timer_adds_up_phases_and_starts_anew(monkeypatch):
    #               made  gen        gen        learn       metrics  metrics
    clock = iter([10.0, 11.0, 13.0, 20.0, 20.5, 30.0, 34.0, 40.0, 42.0])
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    synchronized = []
    timer = Timer(lambda: synchronized.append(True))
    for phase in ("generate", "generate", "learn"):
        with timer(phase):
            pass
    assert timer.metrics() == {"time/generate_s": 2.5, "time/learn_s": 4.0, "time/step_s": 30.0}
    assert timer.metrics() == {"time/step_s": 2.0}
    assert len(synchronized) == 3
    wrong = pytest.raises(ValueError, match="unknown metric 'time/generat_s'; did you mean 'time/generate_s'")
    with wrong, timer("generat"):
        pass


def test_timer_keeps_the_time_of_a_phase_that_raises(monkeypatch):
    clock = iter([0.0, 1.0, 4.0, 5.0])
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    timer = Timer()
    with pytest.raises(RuntimeError, match="engine"), timer("generate"):
        raise RuntimeError("engine")
    assert timer.metrics() == {"time/generate_s": 3.0, "time/step_s": 5.0}


def test_distinct_n_by_hand():
    assert distinct_n([[1, 2, 1, 2], [2, 1]], 1) == 2 / 6
    assert distinct_n([[1, 2, 1, 2], [2, 1]], 2) == 2 / 4  # (1,2) (2,1) (1,2) and (2,1)
    assert distinct_n([[1, 2, 3, 4], [1, 2, 3, 5]], 4) == 1.0
    assert distinct_n([[1, 2], [3, 4]], 2) == 1.0  # (2, 3) would cross from one sequence into the next
    assert distinct_n([["a", "a", "a"]], 2) == 1 / 2
    assert distinct_n([[1, 2, 3], []], 4) is None
    with pytest.raises(ValueError, match="n=0"):
        distinct_n([[1]], 0)


def test_unique_answers_by_hand():
    assert unique_answers(["12", " 12", "-12", None, None]) == 2
    assert unique_answers([None]) == 0


def diversity_metrics(groups, answers):
    return fold(diversity_values(groups, answers))


def test_diversity_takes_the_median_prompt():
    same, half, different = [[1, 1, 1, 1, 1]], [[1, 2, 3, 4], [1, 2, 3, 4]], [[1, 2, 3, 4], [5, 6, 7, 8]]
    answers = [["1", "1"], ["1", "2"], ["1", "2", "3", None]]
    assert diversity_metrics([same, half, different], answers) == {
        "diversity/distinct_1": 0.5,  # of 1/5, 4/8, 8/8
        "diversity/distinct_4": 0.5,  # of 1/2, 1/2, 2/2
        "diversity/unique_answers": 2.0,  # of 1, 2, 3
    }
    assert diversity_metrics([[[1, 2]]], [[None]]) == {"diversity/distinct_1": 1.0, "diversity/unique_answers": 0.0}
    assert diversity_metrics([], []) == {}
    with pytest.raises(ValueError, match="groups has 1 prompts, answers has 0"):
        diversity_metrics([[[1]]], [])
