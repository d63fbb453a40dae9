"""Qwen2.5-Math-PRM in vLLM: STEP pooling returns the head's probabilities at the separators.

For a 7B reward model that shares the rollout engine's paged attention and kernels; the in-process scorer gives the same
probabilities to 1e-5 (tests/test_prm_formats.py) and runs the head on the step rows alone.
"""

from __future__ import annotations

import gc
from typing import Any

import torch

from scope_fast.prm.formats import Encoded, QwenFormat
from scope_fast.prm.text_scorers import TextScorer
from scope_fast.rollout.vllm_process import import_vllm, own_shutdown, preserved_random_state, undisturbed_caller


class VllmStepScorer(TextScorer):
    """Qwen2.5-Math-PRM in vLLM's STEP pooling, in this process. Close it.

    kv_cache_bytes: on CPU. gpu_memory_utilization: on a GPU, its share beside the learner and the other engines.
    """

    def __init__(
        self,
        student,
        folder: str,
        dtype: str = "float32",
        kv_cache_bytes: int = 1 << 30,
        gpu_memory_utilization: float = 0.2,
    ) -> None:
        from transformers import AutoTokenizer

        fmt = QwenFormat(AutoTokenizer.from_pretrained(folder))
        vllm = import_vllm()
        from vllm.config import PoolerConfig
        from vllm.platforms import current_platform

        pooler = PoolerConfig(tok_pooling_type="STEP", step_tag_id=fmt.separator_id)
        arguments = {"model": folder, "runner": "pooling", "pooler_config": pooler, "dtype": dtype}
        arguments |= memory_arguments(current_platform.is_cpu(), kv_cache_bytes, gpu_memory_utilization)
        with undisturbed_caller():
            group_existed = torch.distributed.is_initialized()
            self._llm = vllm.LLM(**arguments, skip_tokenizer_init=True, use_tqdm_on_load=False)
        self._finalizer = own_shutdown(self, self._llm, group_existed)
        super().__init__(student, fmt, self._llm.model_config.max_model_len)

    def _score(self, sequences: list[Encoded]) -> list[list[float]]:
        prompts: list[Any] = [{"prompt_token_ids": sequence.ids} for sequence in sequences]
        with preserved_random_state():
            outputs = self._llm.encode(prompts, pooling_task="token_classify", use_tqdm=False)
        return [output.outputs.data[:, 1].tolist() for output in outputs]

    def close(self) -> None:
        if self._finalizer.alive:
            self._finalizer()
            self._llm = None
            gc.collect()


def memory_arguments(on_cpu: bool, kv_cache_bytes: int, gpu_memory_utilization: float) -> dict[str, Any]:
    """What vLLM may hold. On a GPU its own default, 0.92 of it, would leave the learner and the sampler nothing."""
    if on_cpu:
        return {"enforce_eager": True, "kv_cache_memory_bytes": kv_cache_bytes}
    return {"gpu_memory_utilization": gpu_memory_utilization}
