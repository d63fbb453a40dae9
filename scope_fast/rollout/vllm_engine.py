"""Rollouts from vLLM, in this process."""

from __future__ import annotations

import contextlib
import gc
import itertools
import random
import time
from collections.abc import Iterator
from typing import Any

import torch

from scope_fast.rollout import watch, weight_sync
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
    prefill_tokens_on_cpu,
    torch_threads,
)
from scope_fast.rollout.vllm_process import import_vllm, own_shutdown, preserved_random_state, undisturbed_caller


class SyncClient:
    """The four calls of vLLM's weight-sync protocol on an engine in this process.

    vLLM's own senders finish without saying a version, so the engine leaves it here before it has them send.
    """

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self.version: str | None = None

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        self._llm.start_weight_update()

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        self._llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._llm.finish_weight_update(self.version if weight_version is None else weight_version)


class VllmEngine:
    """`RolloutEngine` on vLLM in this process, from a Hugging Face model folder.

    Weights come through a file in shared memory (`weight_sync`), on a GPU too: CUDA opens no handle in its own process.

    vLLM creates a default torch.distributed group of one process if there is none: a learner with more ranks must
    create its group first. A group that was there, the caller's random state and torch's threads are left as found.
    Several engines may live in one process.

    On CPU nothing is compiled: vLLM's one torch.compile'd helper would cost the first call 2 s and need a C++ compiler.
    """

    name = "vllm"

    def __init__(self, model_dir: str, options: EngineOptions | None = None) -> None:
        vllm = import_vllm()
        options = options or EngineOptions()
        weight_sync.register()
        self._sampling_params, self._request_names = vllm.SamplingParams, itertools.count()
        self._stop_ids = eos_token_ids(str(model_dir))
        self._seeds = random.Random(options.seed)
        self._num_threads, self._bucket_bytes = options.num_threads, options.bucket_bytes
        self._dtype = getattr(torch, options.dtype)
        with undisturbed_caller():
            group_existed = torch.distributed.is_initialized()
            self._llm = vllm.LLM(**_llm_arguments(str(model_dir), options))
        self._finalizer = own_shutdown(self, self._llm, group_existed)
        model_config = self._llm.model_config
        self._context = model_config.max_model_len
        self.vocab_size = model_config.get_vocab_size()
        served, _ = model_config.registry.resolve_model_cls(model_config.architectures, model_config)
        # its fallback, for what it has no model of its own for: it wraps __call__ and __init__ of transformers' classes
        self.changes_transformers = served.__module__.startswith("vllm.model_executor.models.transformers")
        self._on_cpu = self._llm.llm_engine.vllm_config.device_config.device_type == "cpu"
        self._rank = torch.distributed.get_rank() if group_existed else 0
        self._sync_timeout_s = options.sync_timeout_s
        self._sleep_level, self._asleep = options.sleep_level, False
        self._inner_client = SyncClient(self._llm)
        self._client = watch.PhasedClient(self._inner_client, self._rank)
        self._sender: Any = None
        self._version: int | None = 0
        self._llm.update_weight_version("0")

    @property
    def version(self) -> int:
        self._check_usable()
        return self._version

    def generate(
        self,
        prompts: list[list[int]],
        n: int,
        sampling: Sampling,
        seeds: list[list[int]] | None = None,
        timeout_s: float | None = None,
    ) -> list[list[Rollout]]:
        self._check_usable()
        if self._asleep:
            raise RuntimeError("the engine sleeps until the next update_weights")
        version = self._version
        check_request(prompts, n, seeds, self._context, self.vocab_size)
        if seeds is None:
            seeds = draw_seeds(self._seeds, len(prompts), n)
        requests = [prompt for prompt in prompts for _ in range(n)]
        params = [self._params(sampling, seed) for row in seeds for seed in row]
        with preserved_random_state(), self._working():
            outputs = self._run(requests, params, deadline_of(timeout_s))
        rollouts = [
            Rollout(list(prompt), [], [], "timeout", version) if output is None else _rollout(output, version)
            for prompt, output in zip(requests, outputs, strict=True)
        ]
        return [rollouts[i * n : (i + 1) * n] for i in range(len(prompts))]

    def _run(self, prompts: list[list[int]], params: list[Any], deadline: float) -> list[Any]:
        """vLLM's outputs; None for what had not ended at the deadline. `LLM.generate` by hand, since that cannot be
        stopped; nothing is left in the engine, whatever ends this."""
        engine, outputs, waiting = self._llm.llm_engine, [None] * len(prompts), {}
        try:
            for i, (prompt, param) in enumerate(zip(prompts, params, strict=True)):
                name = str(next(self._request_names))
                waiting[name] = i  # first: a request that was half taken in is given up too
                engine.add_request(name, {"prompt_token_ids": prompt}, param)
            while waiting and engine.has_unfinished_requests() and time.monotonic() <= deadline:
                for output in engine.step():
                    if output.finished:
                        outputs[waiting.pop(output.request_id)] = output
            if waiting and not engine.has_unfinished_requests():
                raise RuntimeError(f"vLLM has nothing left to do, and {len(waiting)} requests without an output")
        finally:
            if waiting:
                engine.abort_request(list(waiting))
        return outputs

    def update_weights(self, weights: torch.nn.Module | WeightSource, version: int) -> None:
        """The timeline is in `weight_sync.ShmSender`. After `sync_timeout_s` the process ends, see `watch.watchdog`."""
        check_version(version)
        self._check_usable()
        source = weight_sync.as_source(weights, self._dtype, self._bucket_bytes, reuse_memory=True)
        with watch.watchdog(self._sync_timeout_s, self._rank, lambda: self._client.phase), self._working():
            if self._sender is None:
                self._sender = self._make_sender(source)
            self._sender.source = source
            self._version = None
            if self._asleep:
                with watch.named_phase(self._rank, "wake up"):
                    self._llm.wake_up(["weights"])  # the cache's memory comes last: the sync needs some of its own
            self._inner_client.version = str(version)
            self._sender.send_weights()
            with watch.named_phase(self._rank, "version check"):
                reported = self._llm.get_weight_version()
                if reported != str(version):
                    raise RuntimeError(f"sent version {version}, the engine reports {reported!r}")
                if not self._llm.reset_prefix_cache():
                    raise RuntimeError("vLLM did not reset its prefix cache (are requests still running?)")
            if self._asleep:
                with watch.named_phase(self._rank, "wake up"):
                    self._llm.wake_up(["kv_cache"])
                self._asleep = False
        self._version = version

    def sleep(self) -> None:
        """vLLM drops its prefix cache with it."""
        self._check_usable()
        if self._sleep_level and not self._asleep:
            self._llm.sleep(self._sleep_level)
            self._asleep = True

    def close(self) -> None:
        if self._finalizer.alive:
            if self._sender is not None:
                self._sender.shutdown()
            self._finalizer()
            self._llm = self._client = self._inner_client = self._sender = None
            gc.collect()

    def _check_usable(self) -> None:
        if not self._finalizer.alive:
            raise RuntimeError("the engine is closed")
        if self._version is None:
            raise RuntimeError("the last weight sync failed half-way: the engine's weights are neither old nor new")

    @contextlib.contextmanager
    def _working(self) -> Iterator[None]:
        """How torch is set while vLLM computes in this process."""
        stance = torch.compiler.set_stance("force_eager") if self._on_cpu else contextlib.nullcontext()
        with stance, torch_threads(self._num_threads):
            yield

    def _make_sender(self, source: WeightSource) -> Any:
        init = weight_sync.ShmInit(bucket_bytes=self._bucket_bytes)
        return weight_sync.ShmSender.trainer_init(init, client=self._client, source=source)

    def _params(self, sampling: Sampling, seed: int) -> Any:
        from vllm.sampling_params import RequestOutputKind

        return self._sampling_params(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            seed=seed,
            stop_token_ids=sorted({*self._stop_ids, *sampling.stop_token_ids}),
            ignore_eos=True,  # the stop ids above are the whole truth
            output_kind=RequestOutputKind.FINAL_ONLY,
            logprobs=0,  # the sampled token's own
            flat_logprobs=True,
            detokenize=False,
        )


def _llm_arguments(model_dir: str, options: EngineOptions) -> dict[str, Any]:
    from vllm.config import WeightTransferConfig
    from vllm.platforms import current_platform

    arguments = {
        "model": model_dir,
        "skip_tokenizer_init": True,
        "dtype": options.dtype,
        "max_model_len": options.max_model_len,
        "max_num_seqs": options.max_num_seqs,
        "seed": options.seed,
        "logprobs_mode": "processed_logprobs",
        "weight_transfer_config": WeightTransferConfig(backend=weight_sync.BACKEND),
        "use_tqdm_on_load": False,
    }
    if current_platform.is_cpu():
        arguments |= {
            "enforce_eager": True,
            "kv_cache_memory_bytes": options.kv_cache_bytes,
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": prefill_tokens_on_cpu(model_dir, options),
        }
    else:
        arguments |= {"gpu_memory_utilization": options.gpu_memory_utilization}
        arguments |= {"enable_sleep_mode": options.sleep_level > 0}
    return arguments


def _rollout(output: Any, version: int) -> Rollout:
    """Checks what must hold of every response: one log-probability per token, a natural end, one version of weights."""
    completion = output.outputs[0]
    token_ids = list(completion.token_ids)
    logprobs = list(completion.logprobs.logprobs)
    if len(logprobs) != len(token_ids):
        raise RuntimeError(f"vLLM returned {len(logprobs)} log-probabilities for {len(token_ids)} tokens")
    if completion.finish_reason not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended a response with {completion.finish_reason!r}")
    versions = {span.version for span in completion.weight_versions}
    if versions != {str(version)}:
        raise RuntimeError(f"vLLM sampled with weights {sorted(versions)}, expected version {version}")
    return Rollout(list(output.prompt_token_ids), token_ids, logprobs, completion.finish_reason, version)
