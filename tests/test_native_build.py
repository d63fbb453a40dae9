"""The built extension: safe on CPUs older than its builder's, and where it is absent that is said, once."""

import importlib.util
import re
import shutil
import subprocess

import pytest
import torch

from scope_fast import native
from scope_fast.ops import dispatch

NAMES = ("linear_scope_loss", "scope_loss", "linear_logprob", "linear_logprob_backward", "weight_bucket_copy")
built = pytest.mark.skipif(bool(native.missing()), reason=native.missing())
WIDE = re.compile(r"%[yz]mm\d|%k[1-7]\b|\sv[a-z0-9]+ps\s")


@pytest.fixture
def absent(monkeypatch):
    """As if the extension had never been built; caches forgotten before and after."""
    caches = (native.missing, native.has, dispatch.resolve)
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    yield
    monkeypatch.undo()
    for cache in caches:
        cache.cache_clear()


@built
def test_every_kernel_is_registered():
    assert all(native.has(name, "cpu") for name in NAMES)
    assert not native.has("step_pool", "cpu")


@built
def test_only_chosen_functions_use_wide_registers():
    """AVX and AVX-512 stay inside the functions that run after the CPU was asked: a wheel must not meet SIGILL."""
    if shutil.which("objdump") is None or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("needs objdump and an x86-64 build")
    path = importlib.util.find_spec("scope_fast._native").origin
    listing = subprocess.run(["objdump", "-d", "--no-show-raw-insn", path], capture_output=True, text=True, check=True)
    offenders, wide, function = set(), 0, ""
    for line in listing.stdout.splitlines():
        if line.endswith(">:"):
            function = line.split("<")[1]
        elif WIDE.search(line):
            wide += 1
            if "_avx512" not in function and "_avx2" not in function:
                offenders.add(function)
    assert wide > 100
    assert not offenders


def test_absence_is_said_once(absent, caplog):
    with caplog.at_level("WARNING", logger="scope_fast"):
        for _ in range(2):
            assert [
                dispatch.resolve(stem, dispatch.AUTO, "cpu") for stem in ("linear_scope_loss", "linear_logprob")
            ] == ["reference"] * 2
    said = [record.getMessage() for record in caplog.records if "_native is not built" in record.getMessage()]
    assert len(said) == 1
    assert "the slower plain PyTorch backend runs instead" in said[0]


def test_an_extension_that_cannot_be_loaded_is_as_good_as_none(absent, monkeypatch, caplog):
    """Built for another torch: "undefined symbol". Said once, with how to build it anew."""

    def broken(name):
        raise ImportError("_native.so: undefined symbol: brgemm")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: "there")
    monkeypatch.setattr(importlib, "import_module", broken)
    with caplog.at_level("WARNING", logger="scope_fast"):
        assert [dispatch.resolve("linear_scope_loss", dispatch.AUTO, "cpu") for _ in range(2)] == ["reference"] * 2
    (said,) = [record.getMessage() for record in caplog.records]
    assert "cannot be loaded: _native.so: undefined symbol: brgemm (pip install" in said
    with pytest.raises(RuntimeError, match=r"backend='cpu' is unavailable for cpu tensors: .* undefined symbol"):
        dispatch.resolve("linear_scope_loss", "cpu", "cpu")


def test_absence_is_named_when_asked_for(absent):
    with pytest.raises(RuntimeError, match="backend='cpu' is unavailable for cpu tensors: the compiled extension"):
        dispatch.resolve("linear_scope_loss", "cpu", "cpu")
