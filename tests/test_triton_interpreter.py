"""The Triton kernels on CPU tensors: the op tests again, in a process started with TRITON_INTERPRET=1.

A process of its own, because triton reads the variable when a kernel is decorated, and everything else in that
process that uses triton (vLLM, torch.compile) would be interpreted too. To debug one test:
    TRITON_INTERPRET=1 pytest tests/test_linear_scope_loss.py -k triton
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed on this platform")
TESTS = Path(__file__).parent


STEMS = (
    "linear_scope_loss",
    "linear_scope_loss_autograd",
    "linear_logprob",
    "scope_loss",
    "step_pool",
    "weight_bucket",
    "triton_fuzz",
)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process interprets already")
def test_op_tests_pass_interpreted():
    files = [f"test_{stem}.py" for stem in STEMS]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", *files],
        cwd=TESTS, env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(TESTS.parent)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 250  # all of them ran: none was deselected by a rename
    assert "skipped" not in done.stdout
