"""vLLM in this process: how it is imported, and what it may do to the process it shares.

vLLM is imported when the first engine is made, never by importing this module. Just before, these variables are set;
the last two only where the environment does not set them already:

    VLLM_ENABLE_V1_MULTIPROCESSING=0   the engine runs in this process: up in seconds, weights go by memory
    VLLM_LOGGING_LEVEL=ERROR           one line of ours instead of a hundred of vLLM's
    VLLM_NO_USAGE_STATS=1              nothing is sent anywhere

One C++ line about NUMA stays on stderr unless TORCH_CPP_LOG_LEVEL=ERROR is set before torch is imported.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import random
import warnings
import weakref
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

TOO_OLD = "vllm 0.32 or newer is needed: it says of every token which version of the weights drew it"
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}  # a server is not started with them


def is_installed() -> bool:
    """Whether a package named vllm can be imported (a folder of that name on the path is not one)."""
    spec = find_spec("vllm")
    return spec is not None and spec.origin is not None


def import_vllm() -> Any:
    """vLLM, with the environment it needs. Whatever is wrong with an installed vLLM is raised, not hidden."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = IN_PROCESS["VLLM_ENABLE_V1_MULTIPROCESSING"]
    os.environ.setdefault("VLLM_LOGGING_LEVEL", IN_PROCESS["VLLM_LOGGING_LEVEL"])
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # vLLM sets its level only after it has logged a warning or two.
    logging.getLogger("vllm").setLevel(os.environ["VLLM_LOGGING_LEVEL"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # vLLM's own use of torch
        import vllm
        from vllm.outputs import CompletionOutput

        if "weight_versions" not in CompletionOutput.__dataclass_fields__:
            raise ImportError(f"vllm {vllm.__version__}: {TOO_OLD}")
        return vllm


class _Process:
    """What the engines of this process share: vLLM's parallel state, and the default torch.distributed group."""

    open_engines = 0
    group_is_vllms = False


def own_shutdown(owner: Any, llm: Any, group_existed: bool) -> weakref.finalize:
    """Takes the place of vLLM's shutdown, which destroys the default torch.distributed group, a learner's included,
    and the parallel state under every other engine of the process."""
    if _Process.open_engines == 0:
        _Process.group_is_vllms = not group_existed
    _Process.open_engines += 1
    client = llm.llm_engine.engine_core
    client._finalizer.detach()
    return weakref.finalize(owner, _shutdown, client.engine_core)


def _shutdown(core: Any) -> None:
    from vllm.distributed import parallel_state

    core.structured_output_manager.clear_backend()
    core.model_executor.shutdown()
    core.scheduler.shutdown()
    gc.unfreeze()  # vLLM froze the heap at its start
    _Process.open_engines -= 1
    if _Process.open_engines:
        return
    parallel_state.destroy_model_parallel()
    if _Process.group_is_vllms:
        parallel_state.destroy_distributed_environment()
    else:
        parallel_state._WORLD.destroy()
        parallel_state._WORLD = parallel_state._NODE_COUNT = None


@contextlib.contextmanager
def preserved_random_state() -> Iterator[None]:
    """vLLM seeds the process at its start and draws from torch's global generator at every step on CPU."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)


@contextlib.contextmanager
def undisturbed_caller() -> Iterator[None]:
    """Undoes what vLLM's start does to the process it shares: its CPU worker replaces torch.set_num_threads by a
    no-op, which would bind the learner too, and two variables would reach the learner and its child processes."""
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    variables = {name: os.environ.get(name) for name in ("LOCAL_WORLD_SIZE", "LD_PRELOAD")}
    with preserved_random_state(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        try:
            yield
        finally:
            torch.set_num_threads = set_num_threads
            torch.set_num_threads(num_threads)
            for name, value in variables.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
