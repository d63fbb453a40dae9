"""The optional compiled extension: C++ kernels registered as `torch.ops.scope_fast_native.*` by `scope_fast._native`.

The package works without it. Every schema of ours has one owner, the Python custom op in `scope_fast/ops`; these are
the private kernels those ops call when the backend is "cpu" or "cuda":

    linear_scope_loss(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor segment, Tensor loss_weight,
        Tensor? old_logprob, Tensor? advantage, Tensor? ref_logprob, Tensor? rollout_logprob, Tensor? temperature,
        Tensor rows, float[] options, str logits_dtype, int chunk_tokens,
        bool need_dhidden, bool need_dweight, bool need_dbias)
        -> (Tensor loss, Tensor metrics, Tensor dhidden, Tensor dweight, Tensor dbias)
        rows: int64, the active rows, always given. options: `ops.options.RowOptions`. metrics: `ops.options.METRICS`.
        chunk_tokens -1: chosen by the kernel. A gradient that is not needed is an empty tensor of shape (0,).
    linear_scope_loss_rows(Tensor logits, Tensor(a!)? dlogits, Tensor? bias, Tensor index, Tensor target,
        Tensor segment, Tensor loss_weight, Tensor? old_logprob, Tensor? advantage, Tensor? ref_logprob,
        Tensor? rollout_logprob, Tensor? temperature, float[] options, Tensor(b!) table, int first_column) -> ()
        the row kernel alone, on CUDA. logits, dlogits (N, V): rows that start on 16 elements and are padded to them, in
        memory of their own or dlogits over the logits; index (N,): rows of the streams; table (9, A): METRICS by row.
    linear_scope_loss_fits() -> bool
        whether the current GPU can run it; only there in a build with CUDA kernels.
    scope_loss(Tensor logprob, Tensor? entropy, Tensor segment, Tensor loss_weight, Tensor? old_logprob,
        Tensor? advantage, Tensor? ref_logprob, Tensor? rollout_logprob, float[] options)
        -> (Tensor loss, Tensor metrics, Tensor g, Tensor h)
        h: shape (0,) without an entropy.
    linear_logprob(Tensor hidden, Tensor weight, Tensor? bias, Tensor target, Tensor? temperature, float scale,
        str logits_dtype, int chunk_tokens) -> (Tensor logprob, Tensor entropy, Tensor logsumexp, Tensor state)
        the row's temperature is temperature[row] where given, else scale. state (2, T): max z, log sum exp(z - max z).
    linear_logprob_backward(Tensor grad_logprob, Tensor grad_entropy, Tensor grad_logsumexp, Tensor hidden,
        Tensor weight, Tensor? bias, Tensor target, Tensor? temperature, float scale, Tensor entropy,
        Tensor state, str logits_dtype, int chunk_tokens, bool need_dhidden, bool need_dweight, bool need_dbias)
        -> (Tensor dhidden, Tensor dweight, Tensor dbias)
    step_pool(Tensor hidden, Tensor step_end, Tensor cu_steps, Tensor weight, Tensor? bias, Tensor? hidden_weight,
        Tensor? hidden_bias, int positive, float tau)
        -> (Tensor prob, Tensor first_error, Tensor min, Tensor mean, Tensor prod, Tensor last)
    weight_bucket_copy(Tensor[] sources, Tensor(a!)[] destinations) -> ()
        destinations[i] (contiguous, views of one byte buffer) = sources[i] (any strides) cast to its dtype.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging

import torch

logger = logging.getLogger("scope_fast")

BUILDS = "pip install --no-build-isolation -e . builds it, where there is a C++ compiler"


@functools.cache
def missing() -> str:
    """Loads the extension. Returns why its kernels are missing, "" if they are there, and logs that once: slower ones
    run instead."""
    if importlib.util.find_spec("scope_fast._native") is None:
        why = f"the compiled extension scope_fast._native is not built ({BUILDS})"
    else:
        try:
            importlib.import_module("scope_fast._native")
        except ImportError as error:  # built for another torch than the one that is there now, or cut short
            why = f"the compiled extension scope_fast._native cannot be loaded: {error} ({BUILDS} anew)"
        else:
            return ""
    logger.warning("%s: on a CPU the slower plain PyTorch backend runs instead, on a GPU Triton's kernels", why)
    return why


@functools.cache
def has(name: str, device_type: str) -> bool:
    """Whether a kernel called `name` is registered for tensors of this device type ("cpu", "cuda")."""
    if missing():
        return False
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device_type)
    return key is not None and torch._C._dispatch_has_kernel_for_dispatch_key(f"scope_fast_native::{name}", key)


def clusters_fit() -> bool:
    """Whether the current GPU can run linear_scope_loss_rows. Other GPUs are not asked: that would open a context, half
    a GiB, on each of them."""
    return torch.ops.scope_fast_native.linear_scope_loss_fits()
