"""The scorer that a configuration names."""

from __future__ import annotations

from contextlib import ExitStack, closing

import torch

from scope_fast import attention, distributed
from scope_fast.config import Config
from scope_fast.loading import check_shared_tokenizer, loading, pretrained
from scope_fast.prm import text_scorers
from scope_fast.prm.scorers import ExactScorer, StepScorer, TokenClassifierScorer
from scope_fast.prm.vllm_pooling import VllmStepScorer


def make_scorer(config: Config, folder: str | None, tokenizer, stack: ExitStack | None = None) -> StepScorer:
    """The process reward model `prm.kind` names; `stack` closes one that runs in vLLM."""
    if folder is None:
        return ExactScorer(tokenizer)
    with loading("prm.path", folder):
        made = _load_scorer(config, folder, tokenizer)
    if stack is not None and isinstance(made, VllmStepScorer):
        stack.enter_context(closing(made))
    return made


def check_prm_tokenizer(config: Config, folder: str, tokenizer) -> None:
    """ValueError for a folder of another kind of reward model than `prm.kind`, as far as its tokenizer tells."""
    from transformers import AutoTokenizer

    with loading("prm.path", folder):
        own = AutoTokenizer.from_pretrained(folder)
    if config.prm.kind in text_scorers.FORMATS:
        text_scorers.FORMATS[config.prm.kind](own)  # which looks its separator and labels up
    else:
        check_shared_tokenizer(tokenizer, own, "prm.path")


def _load_scorer(config: Config, folder: str, tokenizer) -> StepScorer:
    settings, dtype = config.prm, getattr(torch, config.model.dtype)
    if settings.engine == "vllm":
        kv_cache_bytes, share = int(config.rollout.kv_cache_gib * 2**30), settings.gpu_memory_utilization
        return VllmStepScorer(tokenizer, folder, config.model.dtype, kv_cache_bytes, share)
    if settings.kind in text_scorers.FORMATS:
        device = distributed.device()
        return text_scorers.load(settings.kind, folder, tokenizer, dtype, device, settings.token_budget)
    from transformers import AutoModelForTokenClassification

    check_prm_tokenizer(config, folder, tokenizer)
    how = {"dtype": dtype, "attn_implementation": attention.implementation(dtype)}
    model = pretrained("prm.path", AutoModelForTokenClassification, folder, **how)
    return TokenClassifierScorer(model.to(distributed.device()), settings.token_budget)
