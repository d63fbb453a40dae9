"""Every Triton kernel compiles ahead of time for every target, without a GPU, and spills no register on sm_90.

The table of shared memory, registers and spills is printed: `pytest -s tests/test_triton_compile.py`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed on this platform")
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def records() -> list[dict]:
    """One record per kernel, variant and target, from a process that does not interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/triton_aot.py")], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_every_kernel_compiles_for_every_target(records):
    kernels = {
        line.split("def ")[1].split("(")[0]
        for path in (ROOT / "kernels").glob("*.py")
        for line in path.read_text().splitlines()
        if line.startswith("def _") and "_kernel(" in line
    }
    assert len(kernels) == 12
    for target in ("sm_80", "sm_90", "sm_100", "gfx942"):
        assert {r["kernel"] for r in records if r["target"] == target} == kernels


def test_no_spills_on_sm_90(records):
    header = f"{'kernel':28} {'variant':14} {'target':8} {'shared':>8} {'registers':>10} {'spills':>7}"
    rows = [
        f"{r['kernel']:28} {r['variant']:14} {r['target']:8} {r['shared']:>8} {r['registers']:>10} {r['spills']:>7}"
        for r in records
    ]
    print("\n".join(["", header, *rows]))
    assert [r for r in records if r["target"] == "sm_90" and r["spills"]] == []


def test_row_kernels_leave_room_for_five_programs_a_processor(records):
    """65,536 registers a processor: 8 warps of up to 48 registers fit five times, which keeps 40 KB of logits (float32)
    on their way and hides the reductions."""
    row_kernels = ("_linear_scope_loss_kernel", "_row_stats_kernel", "_dlogits_kernel")
    seen = [r for r in records if r["target"] == "sm_90" and r["kernel"] in row_kernels]
    assert len(seen) == 18
    assert max(r["registers"] for r in seen) <= 48


def test_row_kernels_move_whole_vectors_whatever_the_vocabulary_s_size(records):
    full = [r for r in records if r["target"] == "sm_90" and r["variant"].startswith("full ")]
    for kernel, moved in (("_row_stats_kernel", ["ld"]), ("_dlogits_kernel", ["ld", "st"])):
        assert [r["wide"] for r in full if r["kernel"] == kernel] == [moved] * (2 if moved == ["ld"] else 3)
    heads = {r["variant"].rsplit(" ", 1)[1]: r["wide"] for r in full if r["kernel"] == "_linear_scope_loss_kernel"}
    assert heads == {"True": ["ld", "st"], "False": ["ld"]}
