"""Which backend runs an op: asked for by name, or chosen by device. The one place that knows.

    reference  plain PyTorch, any device                  triton  CUDA and ROCm tensors (CPU under TRITON_INTERPRET=1)
    cpu        the compiled extension on CPU tensors    cuda    the compiled extension on CUDA tensors

`backend="cuda"` of linear_scope_loss is triton with another row kernel, for GPUs whose clusters of blocks hold a row.
`backend="cpu"` of a stem that has no C++ kernel by design is the reference.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
from collections.abc import Iterator

import torch

from scope_fast import native

logger = logging.getLogger("scope_fast")

BACKENDS = ("reference", "triton", "cpu", "cuda")
AUTO = ""  # the schema's word for backend=None

# the native kernels a backend needs, by stem; an empty tuple: the stem has none and the reference serves
_NATIVE = {
    "linear_logprob": {"cpu": ("linear_logprob", "linear_logprob_backward")},
    "linear_scope_loss": {"cpu": ("linear_scope_loss",), "cuda": ("linear_scope_loss_rows",)},
    "scope_loss": {"cpu": ("scope_loss",)},
    "step_pool": {"cpu": (), "cuda": ("step_pool",)},
    "step_pool_mlp": {"cpu": ()},  # the head with a hidden layer is a matmul: Triton's, not csrc/cuda's
    "weight_bucket": {"cpu": ("weight_bucket_copy",), "cuda": ("weight_bucket_copy",)},
}
# the module of kernels/ that serves a stem
_TRITON = {stem: stem for stem in ("linear_logprob", "linear_scope_loss", "scope_loss", "step_pool", "weight_bucket")}
_TRITON["step_pool_mlp"] = "step_pool"
_CUDA_FIRST = ("linear_scope_loss", "weight_bucket")  # csrc/cuda is faster at most shapes (bench/NOTES.md)
CLUSTERS = (9, 10)  # major compute capabilities with clusters and 227 KiB of shared memory a block (sm_120 has 99)


@functools.cache
def resolve(stem: str, backend: str, device_type: str) -> str:
    """The backend to run `stem` with on `device_type`; AUTO chooses the fastest one there is.

    Raises ValueError for an unknown name and RuntimeError, naming what is missing, for one that cannot run here.
    """
    if backend != AUTO:
        if backend not in BACKENDS:
            raise ValueError(f"backend={backend!r}: expected None or one of {', '.join(BACKENDS)}")
        if missing := missing_for(stem, backend, device_type):
            raise RuntimeError(f"{stem}: backend={backend!r} is unavailable for {device_type} tensors: {missing}")
        return "reference" if backend == "cpu" and not _NATIVE[stem]["cpu"] else backend
    order = ("cuda", "triton") if stem in _CUDA_FIRST else ("triton", "cuda")
    if device_type == "cpu":
        order = ("cpu",)
    reasons = []
    for candidate in order:
        missing = missing_for(stem, candidate, device_type)
        if not missing:
            chosen = "reference" if candidate == "cpu" and not _NATIVE[stem]["cpu"] else candidate
            passed_over = f" ({'; '.join(reasons)})" if reasons else ""
            logger.info("%s on %s tensors: backend %s%s", stem, device_type, chosen, passed_over)
            return chosen
        reasons.append(f"{candidate}: {missing}")
    # a cuda tensor without kernels is slow for no reason of the user's: said once, since the answer is cached
    level = logging.INFO if device_type == "cpu" else logging.WARNING
    logger.log(level, "%s on %s tensors: backend reference (%s)", stem, device_type, "; ".join(reasons))
    return "reference"


@contextlib.contextmanager
def body(tensor: torch.Tensor) -> Iterator[None]:
    """Around an op's body: no autocast (its float32 is meant), and kernels launch on the tensor's own device."""
    with torch.autocast(tensor.device.type, enabled=False), torch.cuda.device_of(tensor):
        yield


def missing_for(stem: str, backend: str, device_type: str) -> str:
    """What keeps `backend` from running `stem` on this device; empty when nothing does."""
    if backend == "reference":
        return ""
    if backend == "triton":
        return _missing_triton(stem, device_type)
    if backend not in _NATIVE[stem]:
        return f"{stem} has no {backend} kernel"
    if device_type != backend:
        return f"it takes {backend} tensors"
    names = _NATIVE[stem][backend]
    if not all(native.has(name, device_type) for name in names):
        return native.missing() or f"scope_fast._native was built without {backend} kernels"
    return _missing_around_rows() if (stem, backend) == ("linear_scope_loss", "cuda") else ""


def _missing_around_rows() -> str:
    """What the row kernel of csrc/cuda needs beside itself."""
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        if major not in CLUSTERS:
            return f"its clusters are for compute capability 9.0 and 10.x, and GPU {i} has {major}.{minor}"
    if not native.clusters_fit():
        return "scope_fast._native was built without clusters for this GPU (TORCH_CUDA_ARCH_LIST), or they do not fit"
    return _missing_triton("linear_scope_loss", "cuda")


def _missing_triton(stem: str, device_type: str) -> str:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if importlib.util.find_spec(f"scope_fast.kernels.{_TRITON[stem]}") is None:
        return f"scope_fast/kernels/{_TRITON[stem]}.py is not in this installation"
    if device_type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "Triton runs CPU tensors only under TRITON_INTERPRET=1"
    if device_type not in ("cpu", "cuda"):
        return "it takes CUDA or ROCm tensors"
    if device_type == "cuda" and not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return ""
