"""Rollouts from a transformers model: the fallback where vLLM is not installed, and a second opinion on it.

Sequences are decoded in left-padded batches with a KV cache. Every response draws all its uniforms from a generator of
its own seed before the first step, one for each token, and a step turns them into tokens by inverting the cumulative
distribution: one vectorised operation for the batch, and no response depends on the order or the size of the batch.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

import torch

from scope_fast import distributed
from scope_fast.loading import pretrained
from scope_fast.rollout.base import (
    EngineOptions,
    Rollout,
    Sampling,
    WeightSource,
    check_request,
    check_version,
    deadline_of,
    draw_seeds,
    eos_token_ids,
    torch_threads,
)
from scope_fast.rollout.weight_sync import as_source


@dataclass
class _Request:
    prompt_ids: list[int]
    uniforms: torch.Tensor  # (budget,) float64 in [0, 1), one per token it may sample
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str = ""


class TransformersEngine:
    """`RolloutEngine` on a Hugging Face causal language model, on the GPU where there is one."""

    name = "transformers"
    changes_transformers = False

    def __init__(self, model_dir: str, options: EngineOptions | None = None) -> None:
        self._options = options or EngineOptions()
        dtype = getattr(torch, self._options.dtype)
        device = distributed.device()
        self._model = _load_quietly(str(model_dir), dtype).to(device).eval()
        config = self._model.config
        self._context = self._options.max_model_len or config.max_position_embeddings
        if self._context > config.max_position_embeddings:
            raise ValueError(f"max_model_len={self._context}: the model allows {config.max_position_embeddings}")
        self.vocab_size = config.vocab_size
        self._stop_ids = eos_token_ids(str(model_dir))
        self._seeds = random.Random(self._options.seed)
        self._version: int | None = 0

    @property
    def version(self) -> int:
        self._check_usable()
        return self._version

    @torch.no_grad()
    def generate(
        self,
        prompts: list[list[int]],
        n: int,
        sampling: Sampling,
        seeds: list[list[int]] | None = None,
        timeout_s: float | None = None,
    ) -> list[list[Rollout]]:
        self._check_usable()
        version, deadline = self._version, deadline_of(timeout_s)
        check_request(prompts, n, seeds, self._context, self.vocab_size)
        if seeds is None:
            seeds = draw_seeds(self._seeds, len(prompts), n)
        requests = [
            self._request(prompt, seed, sampling) for prompt, row in zip(prompts, seeds, strict=True) for seed in row
        ]
        with torch_threads(self._options.num_threads):
            for start in range(0, len(requests), self._options.max_num_seqs):
                self._decode(requests[start : start + self._options.max_num_seqs], sampling, deadline)
        rollouts = [Rollout(list(r.prompt_ids), r.token_ids, r.logprobs, r.finish_reason, version) for r in requests]
        return [rollouts[i * n : (i + 1) * n] for i in range(len(prompts))]

    @torch.no_grad()
    def update_weights(self, weights: torch.nn.Module | WeightSource, version: int) -> None:
        """Copies every tensor in place; ValueError for names or shapes that are not the model's own."""
        check_version(version)
        self._check_usable()
        self._version = None
        own = dict(self._model.named_parameters(remove_duplicate=False))
        missing = set(own)
        for name, tensor in as_source(weights, reuse_memory=True):
            if name not in own:
                raise ValueError(f"weights: {name} is not a parameter of the engine's model")
            if own[name].shape != tensor.shape:
                raise ValueError(f"weights: {name} is {tuple(tensor.shape)}, the engine's {tuple(own[name].shape)}")
            own[name].copy_(tensor)
            missing.discard(name)
        if missing:
            raise RuntimeError(f"weight sync left parameters without new values: {sorted(missing)}")
        self._version = version

    def sleep(self) -> None:
        """Nothing: it holds no memory between two calls but its weights."""

    def close(self) -> None:
        self._model = None

    def _check_usable(self) -> None:
        if self._model is None:
            raise RuntimeError("the engine is closed")
        if self._version is None:
            raise RuntimeError("the last weight sync failed half-way: the engine's weights are neither old nor new")

    def _request(self, prompt: list[int], seed: int, sampling: Sampling) -> _Request:
        budget = min(sampling.max_tokens, self._context - len(prompt))
        generator = torch.Generator().manual_seed(seed)
        return _Request(prompt, torch.rand(budget, generator=generator, dtype=torch.float64), [], [])

    def _decode(self, requests: list[_Request], sampling: Sampling, deadline: float) -> None:
        """Samples until every request has ended; the batch is cut once half of its rows have."""
        from transformers import DynamicCache

        device = self._model.device
        stop_ids = {*self._stop_ids, *sampling.stop_token_ids}
        tokens, mask = _left_padded([r.prompt_ids for r in requests], device)  # (B, L), (B, L)
        positions = (mask.cumsum(1) - 1).clamp_(min=0)
        cache = DynamicCache(config=self._model.config)
        running = list(requests)
        while True:
            if time.monotonic() > deadline:
                for request in running:
                    if not request.finish_reason:
                        request.token_ids, request.logprobs, request.finish_reason = [], [], "timeout"
                return
            logits = self._model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                logits_to_keep=1,
            ).logits[:, -1]  # (B, V)
            uniforms = torch.stack([r.uniforms[min(len(r.token_ids), len(r.uniforms) - 1)] for r in running])
            sampled, logprobs = sample(logits, uniforms.to(device), sampling)
            for request, token, logprob in zip(running, sampled.tolist(), logprobs.tolist(), strict=True):
                _append(request, token, logprob, stop_ids)
            alive = [i for i, r in enumerate(running) if not r.finish_reason]
            if not alive:
                return
            tokens, positions = sampled[:, None], positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(running), 1)], dim=1)
            if len(alive) <= len(running) // 2:
                keep = torch.tensor(alive, device=device)
                cache.batch_select_indices(keep)
                tokens, positions, mask = tokens[keep], positions[keep], mask[keep]
                running = [running[i] for i in alive]


def sample(logits: torch.Tensor, uniforms: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws one token per row: logits (B, V) any float dtype, uniforms (B,) float64 in [0, 1) -> tokens (B,) int64 and
    their log-probabilities (B,) float32 under the distribution they were drawn from."""
    logits = logits.float()
    if sampling.temperature > 0.0:
        logits = logits / sampling.temperature
    if sampling.top_p < 1.0:
        logits = _nucleus(logits, sampling.top_p)
    logprobs = logits.log_softmax(-1)
    if sampling.temperature == 0.0:
        tokens = logits.argmax(-1)
    else:
        cumulative = logprobs.double().exp().cumsum(-1)  # (B, V)
        total = cumulative[:, -1:]
        # Strictly below the total, so that rounding never points past the last token that has mass.
        point = torch.minimum(uniforms[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
        # of NaN the search would point behind the vocabulary; the caller sees their log-probability
        tokens = torch.searchsorted(cumulative, point, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)
    return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1)


def _nucleus(logits: torch.Tensor, top_p: float) -> torch.Tensor:
    """Logits with -inf outside the smallest set of tokens whose mass reaches top_p (the most likely one always in)."""
    ordered, order = logits.sort(-1, descending=True)
    probs = ordered.softmax(-1)
    ordered = ordered.masked_fill(probs.cumsum(-1) - probs >= top_p, -torch.inf)
    return torch.empty_like(logits).scatter_(-1, order, ordered)


def _append(request: _Request, token: int, logprob: float, stop_ids: set[int]) -> None:
    """Records a token, and the end if it is one; the row of a finished request is ignored until the batch is cut."""
    if request.finish_reason:
        return
    request.token_ids.append(token)
    request.logprobs.append(logprob)
    if token in stop_ids:
        request.finish_reason = "stop"
    elif len(request.token_ids) == len(request.uniforms):
        request.finish_reason = "length"


def _load_quietly(model_dir: str, dtype: torch.dtype) -> torch.nn.Module:
    """The model of a folder, without transformers' progress bar."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    had_bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return pretrained("model_dir", AutoModelForCausalLM, model_dir, dtype=dtype)
    finally:
        if had_bar:
            logging.enable_progress_bar()


def _left_padded(prompts: list[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, L) token ids and the (B, L) int64 mask that is 0 on the padding."""
    width = max(len(p) for p in prompts)
    tokens = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    return tokens, mask
