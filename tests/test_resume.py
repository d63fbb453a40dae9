"""Runs that are killed, told to stop, or out of disk: what they leave behind goes on bit for bit.

Real runs of the command line, in processes of their own, with vLLM where it is installed.
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

STEPS = 12
SMALL = {
    "rollout.prompts_per_step": 4, "rollout.group_size": 4, "rollout.max_tokens": 96, "teacher.max_tokens": 96,
    "evaluation.prompts": 4, "evaluation.samples": 1, "prm.kind": "exact", "checkpoint.every": 2, "verifier.workers": 1,
    "logging.report": "false",
}  # fmt: skip


def command(out: Path, *words: str, steps: int = STEPS, **changed) -> list[str]:
    settings = {"steps": steps, "out": out, **SMALL, **{k.replace("__", "."): v for k, v in changed.items()}}
    return [sys.executable, "-m", "scope_fast.train", *words, *(f"--{k}={v}" for k, v in settings.items())]


def start(arguments: list[str], log: Path) -> subprocess.Popen:
    with log.open("wb") as file:
        return subprocess.Popen(arguments, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)


def finish(arguments: list[str], log: Path) -> str:
    process = start(arguments, log)
    assert process.wait(timeout=300) == 0, log.read_text()[-3000:]
    return log.read_text()


def wait_for(condition, process: subprocess.Popen, timeout_s: float = 120.0) -> bool:
    """Whether the condition came true while the process lived."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, "the run does not get on"
        time.sleep(0.002)
    return True


def result(out: Path) -> tuple[dict, bytes]:
    """Every metric but times, by step, and the final weights."""
    steps: dict[int, dict] = {}
    for line in (out / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        kept = {name: value for name, value in record.items() if not name.startswith(("time/", "perf/"))}
        steps.setdefault(record["step"], {}).update(kept)
    return steps, (out / "export/model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An unbroken run and its length in seconds."""
    out = tmp_path_factory.mktemp("whole") / "run"
    begun = time.monotonic()
    finish(command(out), out.with_suffix(".log"))
    steps, weights = result(out)
    assert sorted(steps) == list(range(STEPS + 1)) and steps[STEPS]["loss/total"] != 0.0
    return steps, weights, time.monotonic() - begun


def kill(process: subprocess.Popen) -> bool:
    """kill -9; False if the run had ended before."""
    alive = process.poll() is None
    if alive:
        process.send_signal(signal.SIGKILL)
    process.wait()
    return alive


def killed_and_resumed(out: Path, kills: int, length_s: float, rng: random.Random) -> tuple[int, int]:
    """Runs to the end through `kills` kills: a third while a checkpoint is being written, the others at any moment of
    an unbroken run's life. (How many hit a living run, how many found a checkpoint half-written.)"""
    hit = half_written = 0
    for number in range(kills):
        log = out.with_suffix(f".{number}.log")
        process = start(command(out), log)
        if number % 3 == 2:
            known = set(out.glob("checkpoints/.tmp-*"))
            wait_for(lambda known=known: set(out.glob("checkpoints/.tmp-*")) - known, process)
            time.sleep(rng.uniform(0.0, 0.02))
        else:
            end = time.monotonic() + rng.uniform(0.0, length_s)
            wait_for(lambda end=end: time.monotonic() > end, process)
        hit += kill(process)
        half_written += any(out.glob("checkpoints/.tmp-*"))
    finish(command(out), out.with_suffix(".last.log"))
    return hit, half_written


def check_kills(whole, out: Path, kills: int, seed: int) -> None:
    steps, weights, length_s = whole
    hit, half_written = killed_and_resumed(out, kills, length_s, random.Random(seed))
    print(f"{hit} of {kills} kills hit a living run, {half_written} left a half-written checkpoint")
    got_steps, got_weights = result(out)
    assert got_steps == steps
    assert got_weights == weights
    assert hit


def test_three_kills_change_nothing(whole, tmp_path):
    check_kills(whole, tmp_path / "run", kills=3, seed=4)


@pytest.mark.kill
def test_twenty_kills_change_nothing(whole, tmp_path):
    check_kills(whole, tmp_path / "run", kills=20, seed=20)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_step_and_saves_it(number, whole, tmp_path):
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
    text = finish(command(out, "--resume=auto", checkpoint__every=0), log)
    assert f"at step {step}" in text
    assert result(out) == whole[:2]


def test_a_second_signal_stops_at_once(tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    process = start(command(out, rollout__prompts_per_step=256, checkpoint__every=0), log)  # a step of many seconds
    assert wait_for(lambda: "held-out pass rate before" in log.read_text(), process)
    process.send_signal(signal.SIGTERM)
    assert wait_for(lambda: "stopping after the step under way" in log.read_text(), process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == -signal.SIGTERM
    assert not (out / "checkpoints").exists()


def test_a_longer_run_goes_on_and_a_finished_one_is_left_alone(tmp_path):
    """The schedule is constant: under a cosine a longer run is another run, and refused."""
    short, long = tmp_path / "short", tmp_path / "long"
    constant = {"learner__schedule": "constant"}
    finish(command(short, steps=2, **constant), tmp_path / "log")
    finish(command(short, steps=4, **constant), tmp_path / "log")
    finish(command(long, steps=4, **constant), tmp_path / "log")
    (extended, weights), (steps, expected) = result(short), result(long)
    assert extended[2].pop("eval/pass_rate") >= 0.0  # the shorter run's own end
    assert extended == steps and weights == expected
    files = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in long.rglob("*") if path.is_file()}
    assert "nothing to do" in finish(command(long, steps=4, **constant), tmp_path / "log")
    again = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in long.rglob("*") if path.is_file()}
    assert again == files


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
def test_a_full_disk_ends_the_run_and_costs_nothing_saved(room, what, whole, small_disk, tmp_path):
    out, log = small_disk / "run", tmp_path / "log"
    process = start(command(out), log)
    assert wait_for((out / "checkpoints/step_2").exists, process)
    ballast = fill(small_disk, room)
    assert process.wait(timeout=120) == 1, log.read_text()
    text = log.read_text()
    assert re.search(f"^error: {what}.*: .*No space left on device", text, re.M), text
    assert str(out) in text and "make room and run the same command again" in text
    ballast.unlink()
    assert re.search(r"resumed from \S+/step_\d+ at step", finish(command(out), log))
    assert result(out) == whole[:2]
