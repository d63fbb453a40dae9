"""Runs that are killed at any moment go on bit for bit; a longer run goes on, and a finished one is left alone."""

import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from fixtures.runs import command, finish, result, start, wait_for

ENGINE = "auto"  # of the killed runs and of the unbroken one: vLLM where it is installed


def kill(process: subprocess.Popen) -> bool:
    """kill -9; False if the run had ended before."""
    alive = process.poll() is None
    if alive:
        process.send_signal(signal.SIGKILL)
    process.wait()
    return alive


def killed_and_resumed(folder: Path, kills: int, length_s: float, rng: random.Random) -> tuple[list[Path], int]:
    """Kills `kills` living runs, a third while a checkpoint is being written, the others at any moment of an unbroken
    run's life; each goes on from there. Another begins when one reaches its end. (All of them, finished; how many kills
    found a checkpoint half-written.)"""
    runs, hit, half_written = [folder / "run0"], 0, 0
    while hit < kills:
        out = runs[-1]
        process = start(command(out, rollout__engine=ENGINE), folder / "log")
        if hit % 3 == 2:
            known = set(out.glob("checkpoints/.tmp-*"))
            wait_for(lambda out=out, known=known: set(out.glob("checkpoints/.tmp-*")) - known, process)
            time.sleep(rng.uniform(0.0, 0.005))
        else:
            end = time.monotonic() + rng.uniform(0.0, length_s)
            wait_for(lambda end=end: time.monotonic() > end, process)
        if kill(process):
            hit += 1
            half_written += any(out.glob("checkpoints/.tmp-*"))
        else:
            assert process.returncode == 0, (folder / "log").read_text()[-3000:]
            runs.append(folder / f"run{len(runs)}")
    finish(command(runs[-1], rollout__engine=ENGINE), folder / "log")
    return runs, half_written


def check_kills(unbroken_run, folder: Path, kills: int, seed: int) -> int:
    """How many kills left a half-written checkpoint."""
    steps, files, length_s = unbroken_run
    runs, half_written = killed_and_resumed(folder, kills, length_s, random.Random(seed))
    print(f"{kills} kills of {len(runs)} runs, {half_written} of them left a half-written checkpoint")
    for out in runs:
        got_steps, got_files = result(out)
        assert got_steps == steps
        assert got_files == files
    return half_written


def test_three_kills_change_nothing(unbroken_run, tmp_path):
    check_kills(unbroken_run, tmp_path, kills=3, seed=4)


@pytest.mark.kill
def test_twenty_kills_change_nothing(unbroken_run, tmp_path):
    assert check_kills(unbroken_run, tmp_path, kills=20, seed=20)


def test_a_longer_run_goes_on_and_a_finished_one_is_left_alone(tmp_path):
    """The schedule is constant: under a cosine a longer run is another run, and refused."""
    short, long = tmp_path / "short", tmp_path / "long"
    constant = {"learner__schedule": "constant"}
    finish(command(short, steps=2, **constant), tmp_path / "log")
    process = start(command(short, steps=4, **constant), tmp_path / "log")
    assert wait_for(lambda: (short / "checkpoints/step_4").exists(), process) and kill(process)
    assert not (short / "export").exists()  # the shorter run's would pass for this one's
    finish(command(short, steps=4, **constant), tmp_path / "log")
    finish(command(long, steps=4, **constant), tmp_path / "log")
    (extended, files), (steps, expected) = result(short), result(long)
    assert extended[2].pop("eval/pass_rate") >= 0.0  # the shorter run's own end
    assert extended == steps and files == expected
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in long.rglob("*") if path.is_file()}
    assert "nothing to do" in finish(command(long, steps=4, **constant), tmp_path / "log")
    again = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in long.rglob("*") if path.is_file()}
    assert again == before
