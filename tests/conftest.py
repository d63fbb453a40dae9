"""What every test runs under: nothing is fetched, nothing is reported, and GPU tests say why they skip."""

import os

import pytest
import torch
from fixtures.runs import unbroken_run  # noqa: F401  a fixture of several files

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


# A file's tests stay on one worker: those that run for a minute and more come first, so that none is left at the end.
LONGEST = (
    "test_train", "test_triton_interpreter", "test_distributed", "test_vllm_server", "test_resume", "test_overlap",
    "test_interrupt", "test_weight_sync", "test_trainer", "test_teacher_endpoint", "test_sync_two_ranks",
    "test_bench", "test_prm_formats", "test_packaging", "test_native_cuda",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    order = {stem: place for place, stem in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(LONGEST)))


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
