"""What a rollout engine is: token ids in, token ids and the engine's own log-probabilities out, versioned weights.

Text never passes through an engine: decoding and encoding again would not give back the tokens that were sampled, and
the policy gradient would then be taken at tokens nobody drew.
"""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

TRANSFERS = ("shm", "ipc", "nccl")  # what may carry the weights: transfer.py


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    temperature: divides the logits; 0 = greedy (log-probabilities are then those at temperature 1).
    top_p: nucleus mass kept; below 1 the log-probabilities are renormalised over the nucleus, as they were drawn.
    max_tokens: most tokens of one response.
    stop_token_ids: end a response, beside the end-of-sequence ids of the model's own configuration.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 256
    stop_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.temperature < 0.0:
            raise ValueError(f"temperature={self.temperature}: expected a value >= 0")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p={self.top_p}: expected a value in (0, 1]")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens}: expected at least 1")


@dataclass
class Rollout:
    """One sampled response.

    token_ids: the sampled tokens, the stop token included where one was drawn.
    logprobs: natural log-probability of every token of token_ids under the distribution it was drawn from, as long as
        token_ids.
    finish_reason: "stop" (a stop token was drawn), "length" (max_tokens or the context ran out), or "timeout" (of a
        `LocalEngine` that was given one: without tokens).
    weight_version: the version of the weights that drew the last token.
    weight_versions: runs of tokens by the weights that drew them, (version, start, end), in order and without gaps;
        more than one where weights were switched in flight. None: one version drew all.
    """

    prompt_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    weight_version: int
    weight_versions: tuple[tuple[int, int, int], ...] | None = None


class ParamMeta(NamedTuple):
    """Name, dtype and full shape of one tensor, under the name it has in a checkpoint."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class WeightSource(Protocol):
    """The learner's weights as a stream that can be read again and again.

    `metadata()` says what a pass yields, in order, without moving any data. `iter(source)` starts a fresh pass of
    (name, full tensor) pairs; a tensor may be valid only until the next is asked for. With sharded weights a pass is a
    collective: every rank reads it to the end, in step.
    A tied output head is yielded under its own name too: engines keep a private, repacked copy of it.
    """

    def metadata(self) -> list[ParamMeta]: ...

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]: ...


class RolloutEngine(Protocol):
    """A sampler with weights that can be replaced. One caller at a time, but for `update_weights` of a vLLM server."""

    name: str  # as a configuration's `engine` names it
    changes_transformers: bool  # transformers' model classes in this process, which breaks other models made of them

    @property
    def version(self) -> int:
        """Version of the weights in use: 0 until the first update. RuntimeError after an update that failed."""

    def generate(
        self, prompts: list[list[int]], n: int, sampling: Sampling, seeds: list[list[int]] | None = None
    ) -> list[list[Rollout]]:
        """`n` responses to every prompt, in the order of the prompts.

        seeds: one non-negative integer per response, len(prompts) lists of n. A response depends on its prompt, its
            seed and the weights, and on its neighbours in the batch only through rounding. None: drawn from the
            engine's own seed, different at every call.
        Raises ValueError naming `prompts` for an empty prompt, or one that leaves no room for a token in the context.
        """

    def update_weights(self, weights: torch.nn.Module | WeightSource, version: int) -> None:
        """Replaces all weights; called on every rank of a sharded learner. RuntimeError if the engine disagrees."""

    def sleep(self) -> None:
        """Gives `EngineOptions.sleep_level`'s share of GPU memory to others until the next `update_weights`, before
        which nothing can be generated. Engines that share no GPU do nothing."""

    def close(self) -> None:
        """Frees the engine. Calling it twice is harmless; every other method then raises RuntimeError."""


class LocalEngine(RolloutEngine, Protocol):
    """An engine that computes in this process, where nobody else can stop it."""

    vocab_size: int  # of the model: token ids from here on are refused

    def generate(
        self,
        prompts: list[list[int]],
        n: int,
        sampling: Sampling,
        seeds: list[list[int]] | None = None,
        timeout_s: float | None = None,
    ) -> list[list[Rollout]]:
        """timeout_s: responses that have not ended by then are given up between two tokens, with finish_reason
        "timeout"."""


@dataclass(frozen=True)
class EngineOptions:
    """Options of every engine.

    dtype: "float32" or "bfloat16", of the engine's weights and activations (logits are always float32).
    max_model_len: context in tokens, prompt and response together; None = what the model allows.
    max_num_seqs: most sequences decoded at once.
    seed: of the requests that are given none.
    num_threads: torch's threads while the engine works on CPU; None = as many as there are. More than one costs a small
        model dearly when anything else wants a core: 64 sequences of a 128-wide model, 2 cores, one of them busy:
        1 thread 10-12k tokens/s, 2 threads 2-4k (14k when nothing else runs).
    kv_cache_bytes: vLLM on CPU: size of the KV cache.        gpu_memory_utilization: vLLM on GPU: its share of the GPU.
    sleep_level: kind "vllm" on a GPU, what `sleep` frees: 0 nothing; 1 the KV cache, weights go to host memory; 2 both
        (the next sync brings the weights anyway). vLLM ignores it on CPU. Not run on a GPU.
    bucket_bytes: weight sync: most bytes in flight (grown to the largest tensor).
    sync_timeout_s: longest wait of a weight sync, after which it ends with an error naming rank and phase.
    server_url: kind "vllm_server": a server that runs already, as http://HOST:PORT; None starts one.
    server_gpus: kind "vllm_server": CUDA devices of a server started here, a worker each, as this process counts those
        it sees (CUDA_VISIBLE_DEVICES=4,5: 1 is the machine's 5); None: the learner's GPU.
    server_workers: of the server at server_url, for transfer "nccl".
    transfer: kind "vllm_server", what carries the weights: "shm", "ipc", "nccl", or "auto" (transfer.for_server).
    transfer_address: "nccl": of this machine as the server reaches it.
    start_timeout_s, generate_timeout_s: kind "vllm_server": longest wait for a server to be up, and for one response.
    """

    dtype: str = "float32"
    max_model_len: int | None = None
    max_num_seqs: int = 128
    seed: int = 0
    num_threads: int | None = None
    kv_cache_bytes: int = 1 << 30
    gpu_memory_utilization: float = 0.4
    sleep_level: int = 0
    bucket_bytes: int = 64 << 20
    sync_timeout_s: float = 600.0
    server_url: str | None = None
    server_gpus: tuple[int, ...] | None = None
    server_workers: int = 1
    transfer: str = "auto"
    transfer_address: str = "127.0.0.1"
    start_timeout_s: float = 600.0
    generate_timeout_s: float = 3600.0

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype={self.dtype!r}: expected float32 or bfloat16")
        if self.transfer not in ("auto", *TRANSFERS):
            raise ValueError(f"transfer={self.transfer!r}: expected auto, {', '.join(TRANSFERS)}")
        if self.server_url is not None and self.server_gpus is not None:
            raise ValueError("server_gpus: the server at server_url has its own")
        if self.sleep_level not in (0, 1, 2):
            raise ValueError(f"sleep_level={self.sleep_level}: expected 0, 1 or 2")
        for name in ("max_num_seqs", "num_threads", "kv_cache_bytes", "bucket_bytes", "server_workers"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected at least 1")
        for name in ("sync_timeout_s", "start_timeout_s", "generate_timeout_s"):
            if getattr(self, name) <= 0.0:
                raise ValueError(f"{name}={getattr(self, name)}: expected more than 0")


def check_request(prompts: list[list[int]], n: int, seeds: list[list[int]] | None, context: int, vocab: int) -> None:
    """Raises ValueError for a call of `RolloutEngine.generate` that cannot be served."""
    if n < 1:
        raise ValueError(f"n={n}: expected at least one response per prompt")
    for i, prompt in enumerate(prompts):
        if not 1 <= len(prompt) <= context - 1:
            raise ValueError(
                f"prompts[{i}] has {len(prompt)} tokens: expected 1 to {context - 1} (context of {context}, less one "
                "for the response)"
            )
        if min(prompt) < 0 or max(prompt) >= vocab:
            raise ValueError(f"prompts[{i}] holds a token id outside the vocabulary of {vocab}")
    if seeds is None:
        return
    if len(seeds) != len(prompts) or any(len(row) != n for row in seeds):
        raise ValueError(f"seeds: expected {len(prompts)} lists of n={n}, got lengths {[len(row) for row in seeds]}")
    if any(seed < 0 or seed >= 1 << 63 for row in seeds for seed in row):
        raise ValueError("seeds: expected integers in [0, 2**63)")


def joined_spans(spans: Iterable[tuple[str, int, int]], length: int) -> tuple[tuple[int, int, int], ...]:
    """An engine's (version, start, end) of a response of that length, checked to cover it once, in order.

    RuntimeError otherwise, or for a version that is no number: nobody but us names an engine's weights.
    """
    spans, at = tuple(spans), 0
    for version, start, end in spans:
        if start != at or not version.isdecimal():
            break
        at = end
    if at != length:
        raise RuntimeError(f"vLLM reported weight versions {spans} for {length} tokens")
    return tuple((int(version), start, end) for version, start, end in spans)


def draw_seeds(generator: random.Random, num_prompts: int, n: int) -> list[list[int]]:
    """Seeds for a call that brought none."""
    return [[generator.getrandbits(62) for _ in range(n)] for _ in range(num_prompts)]


@contextlib.contextmanager
def torch_threads(num_threads: int | None) -> Iterator[None]:
    """Runs the body with that many torch threads, and puts the number back; None changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def deadline_of(timeout_s: float | None) -> float:
    """On time.monotonic's clock."""
    return math.inf if timeout_s is None else time.monotonic() + timeout_s


def check_version(version: int) -> None:
    """Raises ValueError for a version that cannot be one."""
    if version < 0:
        raise ValueError(f"version={version}: expected an integer >= 0")


def prefill_tokens_on_cpu(model_dir: str, options: EngineOptions) -> int:
    """vLLM's `max_num_batched_tokens` on a CPU, where chunked prefill must be off: the longest prompt fits in one pass.

    A prompt split over two makes vLLM rewind the request's generator, which CPU generators cannot do.
    """
    from transformers import AutoConfig

    context = options.max_model_len or AutoConfig.from_pretrained(model_dir).max_position_embeddings
    return max(context, 8192)


def eos_token_ids(model_dir: str) -> tuple[int, ...]:
    """End-of-sequence ids of a Hugging Face folder: its generation configuration's, else its model configuration's."""
    from transformers import AutoConfig, GenerationConfig
    from transformers.utils import GENERATION_CONFIG_NAME, cached_file

    has_own = cached_file(model_dir, GENERATION_CONFIG_NAME, _raise_exceptions_for_missing_entries=False) is not None
    eos = GenerationConfig.from_pretrained(model_dir).eos_token_id if has_own else None
    if eos is None:
        eos = AutoConfig.from_pretrained(model_dir).eos_token_id
    if eos is None:
        return ()
    return (eos,) if isinstance(eos, int) else tuple(eos)
