"""Runs that are told to stop, or run out of disk: what they leave behind goes on bit for bit."""

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest
from fixtures.runs import STEPS, command, finish, result, start, wait_for

from scope_fast import interrupt


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_saves_it(number, unbroken_run, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    process = start(command(out, checkpoint__every=0), log)
    assert wait_for(lambda: re.search(r"^ +2/12 ", log.read_text(), re.M), process)
    process.send_signal(number)
    assert process.wait(timeout=60) == 0, log.read_text()
    (saved,) = (out / "checkpoints").iterdir()
    step = saved.name.removeprefix("step_")
    assert f"{number.name}: stopping after the step under way" in log.read_text()
    assert f"stopped after step {step}, which is saved" in log.read_text()
    assert not (out / "export").exists() and int(step) < STEPS
    if number == signal.SIGINT:
        return  # the same state, and 20 s
    text = finish(command(out, "--resume=auto", checkpoint__every=0), log)
    assert f"at step {step}" in text
    assert result(out) == unbroken_run[:2]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_making_of_a_model(number, tmp_path):
    """Minutes before the first step; nothing of it stays."""
    out, log, cache = tmp_path / "run", tmp_path / "log", tmp_path / "cache"
    process = start(command(out, cache=cache, warm_start__seed=1), log)
    assert wait_for(lambda: cache.exists() and any(cache.glob(".student-*")), process)
    assert "student: none is there yet for tasks chain_sum, leg_counting" in log.read_text()
    process.send_signal(number)
    assert process.wait(timeout=30) == 0, log.read_text()
    assert f"{number.name}: stopped before the first step" in log.read_text()
    assert list(cache.iterdir()) == []


def test_a_second_signal_stops_at_once(tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    process = start(command(out, rollout__prompts_per_step=256, checkpoint__every=0), log)  # a step of many seconds
    assert wait_for(lambda: "held-out pass rate before" in log.read_text(), process)
    process.send_signal(signal.SIGTERM)
    assert wait_for(lambda: "stopping after the step under way" in log.read_text(), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == -signal.SIGTERM
    assert not (out / "checkpoints").exists()


def test_one_of_several_ranks_hears_a_signal_twice(monkeypatch):
    """From the launcher, and from whoever signals every process of a job."""
    sent, now = [], [100.0]
    monkeypatch.setattr(interrupt.distributed, "world_size", lambda: 2)
    monkeypatch.setattr(interrupt.time, "monotonic", lambda: now[0])
    with interrupt.Interrupt() as told:
        os.kill(os.getpid(), signal.SIGTERM)
        now[0] += interrupt.SAME_S / 2
        os.kill(os.getpid(), signal.SIGTERM)
        assert told.requested()
        now[0] += interrupt.SAME_S
        monkeypatch.setattr(interrupt.os, "kill", lambda *who: sent.append(who))
        signal.raise_signal(signal.SIGTERM)
        assert sent == [(os.getpid(), signal.SIGTERM)] and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 MB of its own."""
    if os.geteuid() != 0:
        pytest.skip("only root may mount a tmpfs")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no tmpfs to be had: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(disk: Path, room: int) -> Path:
    """Takes all but `room` bytes."""
    free = os.statvfs(disk)
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - room)))
    return ballast


@pytest.mark.parametrize(
    ("room", "what"),
    [(1 << 20, r"the checkpoint of step \d+ could not be written to \S+/checkpoints/step_\d+"), (0, r"\S+ could not")],
)
def test_a_full_disk_ends_the_run_and_costs_nothing_saved(room, what, unbroken_run, small_disk, tmp_path):
    out, log = small_disk / "run", tmp_path / "log"
    process = start(command(out), log)
    assert wait_for((out / "checkpoints/step_2").exists, process)
    process.send_signal(signal.SIGSTOP)  # it writes too, and would take what was counted as free
    ballast = fill(small_disk, room)
    process.send_signal(signal.SIGCONT)
    assert process.wait(timeout=120) == 1, log.read_text()
    text = log.read_text()
    assert re.search(f"^error: {what}.*: .*No space left on device", text, re.M), text
    assert str(out) in text and "make room and run the same command again" in text
    ballast.unlink()
    if room == 0:
        return  # the same state, and 20 s
    assert re.search(r"resumed from \S+/step_\d+ at step", finish(command(out), log))
    assert result(out) == unbroken_run[:2]
