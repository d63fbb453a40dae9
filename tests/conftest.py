"""What every test runs under: nothing is fetched, nothing is reported, and GPU tests say why they skip."""

import os

import pytest
import torch
from fixtures.runs import unbroken_run  # noqa: F401  a fixture of several files

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
