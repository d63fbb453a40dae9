"""Rollouts from a vLLM server: its own process, its own GPUs, tokens in and tokens out over HTTP.

    POST /inference/v1/generate    one response per request, sampled with the request's seed    (--tokens-only)
    POST /pause .. /resume         the weight sync's bracket                                    (VLLM_SERVER_DEV_MODE=1)

The weights go through vLLM's native transfer API, over the same HTTP routes. vLLM is not imported in this process,
unless the transfer backend is one of vLLM's own ("ipc", "nccl").
"""

from __future__ import annotations

import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, TypeVar

import torch

from scope_fast.rollout import transfer as transfers
from scope_fast.rollout import watch, weight_sync
from scope_fast.rollout.base import (
    EngineOptions,
    Rollout,
    Sampling,
    WeightSource,
    check_request,
    check_version,
    draw_seeds,
    eos_token_ids,
    joined_spans,
)
from scope_fast.rollout.server_process import (
    Http,
    ServerDiedError,
    ServerProcess,
    allow_open_files,
    server_arguments,
    server_environment,
)
from scope_fast.rollout.server_sync import HostCopy, HttpSyncClient
from scope_fast.rollout.vllm_process import TOO_OLD

T = TypeVar("T")
UNKNOWN = "from before the first sync"  # what a shared server's weights are called until this run sends some
OTHER_FILES = 1024  # what a run may hold open beside its requests to a server
DEATH_S = 10.0  # a server whose engine died answers with an error first and ends within this time


class VllmServerEngine:
    """`RolloutEngine` on a vLLM OpenAI server.

    options.server_url None: a server is started from the model folder, on this machine, and ended by `close`. It is
        restarted ONCE when it dies: the weights of the last sync are sent again and the interrupted call is repeated
        with its seeds, so that the rollouts are an undisturbed run's (up to rounding: its batches may differ). Another
        death raises ServerDiedError, and so does the first under transfer "ipc" where the learner has several ranks:
        vLLM's sender does collectives over all of them, and the others know of no restart.
    options.server_url: a server that runs already, from the same model folder, with `server_arguments` and the
        environment of `server_process`; it is never restarted. Whatever an earlier run left in it is no version of
        this one: `generate` raises RuntimeError until the first `update_weights`, and so does another rank's first
        sync before rank 0's. A sync that fails leaves it paused: what its weights are then, neither old nor new,
        should answer nobody; the next sync resumes it.
    transfer: the trainer-side init object of a weight-transfer backend (transfer.py). Default: `ShmInit`. ValueError
        for "ipc" where several ranks share the server: only rank 0 sends, in collectives that the others never join.

    Weights may be switched IN FLIGHT: `update_weights` may be called from another thread while `generate` runs.

        pause, mode keep             running requests stop between two tokens and stay
        start .. finish(version)     as in `weight_sync.ShmSender`
        reset the prefix cache       running requests too: keys and values of the old weights are computed again
        resume                       the rest of every response is drawn, exactly, by the new weights

    `Rollout.weight_versions` says which tokens are whose.
    """

    name = "vllm_server"
    changes_transformers = False

    def __init__(self, model_dir: str, options: EngineOptions | None = None, transfer: Any = None) -> None:
        from transformers import AutoConfig

        self._options = options or EngineOptions()
        self._transfer = transfer or weight_sync.ShmInit(bucket_bytes=self._options.bucket_bytes)
        self._model_dir = str(model_dir)
        config = AutoConfig.from_pretrained(model_dir)
        self._vocab = config.vocab_size
        self._context = self._options.max_model_len or config.max_position_embeddings
        self._stop_ids = eos_token_ids(self._model_dir)
        self._seeds = random.Random(self._options.seed)
        self._rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        # the backends of vLLM's own move memory of a GPU, one tensor of it at a time
        self._weights = HostCopy("cpu" if self._transfer.backend == weight_sync.BACKEND else "cuda")
        self._sender: Any = None
        self._version: int | None = 0
        shared, collective = self._options.server_url is not None, self._sends_in_collectives()
        self._unsent = shared  # a server of our own holds the model folder's weights, version 0
        if shared and collective:
            raise ValueError(
                "transfer='ipc': several ranks cannot share the server at server_url; expected shm or nccl"
            )
        self._restarts_left = 0 if shared or collective else 1
        self._process: ServerProcess | None = None
        self._closed = False
        # a restart and a sync exclude each other: both send what `_weights` holds, and a copy half filled is no weights
        self._lock = threading.RLock()
        self._folder = tempfile.TemporaryDirectory(prefix="scope_fast_server_")
        allow_open_files(self._in_flight + OTHER_FILES)
        self._connect()

    @property
    def version(self) -> int:
        self._check_usable()
        return self._version

    @property
    def pid(self) -> int | None:
        """Of the server, if it was started here."""
        return self._process.pid if self._process else None

    def generate(
        self, prompts: list[list[int]], n: int, sampling: Sampling, seeds: list[list[int]] | None = None
    ) -> list[list[Rollout]]:
        self._check_usable()
        if self._unsent:
            raise RuntimeError("the server at server_url has no weights of this run yet: call update_weights first")
        check_request(prompts, n, seeds, self._context, self._vocab)
        if seeds is None:
            seeds = draw_seeds(self._seeds, len(prompts), n)
        bodies = [self._body(p, sampling, seed) for p, row in zip(prompts, seeds, strict=True) for seed in row]
        rollouts = self._surviving(lambda: self._ask(bodies), "generate")
        return [rollouts[i * n : (i + 1) * n] for i in range(len(prompts))]

    def update_weights(self, weights: torch.nn.Module | WeightSource, version: int) -> None:
        """The timelines are in the class's and in `weight_sync.ShmSender`'s docstring."""
        check_version(version)
        self._check_usable()
        dtype = getattr(torch, self._options.dtype)
        source = weight_sync.as_source(weights, dtype, self._options.bucket_bytes, reuse_memory=True)
        self._version = None
        if self._transfer.is_sender:
            with self._lock:
                self._weights.fill(source, version)
        else:
            for _ in source:  # a collective: the sender needs this rank's part
                pass
        try:
            self._surviving(lambda: self._send_alone(version), "weight sync")
        except TimeoutError as error:
            raise TimeoutError(f"rollout.sync_timeout_s: {error}") from error
        self._version, self._unsent = version, False

    def sleep(self) -> None:
        """Nothing: `sleep_level` is of an engine in this process."""

    def close(self) -> None:
        """A `generate` of another thread ends with ServerDiedError."""
        if self._closed:
            return
        self._closed = True
        for http in (self._http, self._sampling_http):  # a server that a failed sync left paused answers no request
            http.close()
        if self._sender is not None:
            self._sender.shutdown()
        if self._process is not None:
            self._process.stop()
        self._folder.cleanup()

    def _check_usable(self) -> None:
        if self._closed:
            raise RuntimeError("the engine is closed")
        if self._version is None:
            raise RuntimeError("the last weight sync failed half-way: the engine's weights are neither old nor new")

    def _sends_in_collectives(self) -> bool:
        """vLLM's ipc sender gathers its handles over the default group, if that has more ranks than this."""
        if self._transfer.backend != "ipc" or not torch.distributed.is_initialized():
            return False
        return torch.distributed.get_world_size() > 1

    def _connect(self) -> None:
        """A server of our own holds the model folder's weights, version 0; a shared one may hold anybody's."""
        options = self._options
        if options.server_url is None:
            arguments = server_arguments(self._model_dir, options, self._transfer.backend)
            log = Path(self._folder.name) / "server.log"
            environment = server_environment(options, self._transfer.backend)
            self._process = ServerProcess(arguments, environment, log, options.start_timeout_s)
        self._http = self._sampling_http = Http(options.server_url or self._process.url)
        self._inner_client = HttpSyncClient(self._http, options.sync_timeout_s)
        self._client = watch.PhasedClient(self._inner_client, self._rank)
        if self._transfer.is_sender:
            try:
                held = "0" if options.server_url is None else UNKNOWN
                self._http.post("update_weight_version", {"new_version": held}, options.sync_timeout_s)
            except (RuntimeError, TimeoutError) as error:
                if options.server_url is None:
                    raise
                raise ValueError(
                    f"rollout.server_url: {options.server_url} is no vLLM server to train with: {error}"
                ) from error

    def _surviving(self, call: Callable[[], T], what: str) -> T:
        """The call's result; once in the engine's life over the death of its server.

        Two calls may find it dead, one that samples and one that sends: the first brings back another for both.
        """
        process = self._process
        try:
            return call()
        except RuntimeError as error:
            if self._closed or not self._has_died(process):
                raise
            with self._lock:
                if self._closed:
                    raise
                if process is self._process:
                    self._restart(what, error)
        return call()

    def _restart(self, what: str, error: RuntimeError) -> None:
        """Another server, with the weights that were sent last or were about to be."""
        reason = self._process.last_words(5) if self._process else "it was not started here"
        if self._restarts_left == 0:
            raise ServerDiedError(
                f"vLLM server: died in {what}, no restart is left; the end of its log:\n{reason}"
            ) from error
        self._restarts_left -= 1
        print(
            f"vLLM server: died in {what}; starting another, its weights and the interrupted call follow. The end "
            f"of its log:\n{reason}",
            file=sys.stderr,
            flush=True,
        )
        self._process.stop()
        if self._sender is not None:
            self._sender.shutdown()
            self._sender = None
        self._connect()
        if self._closed:  # meanwhile, by another thread, which saw the old one
            self._http.close()
            self._process.stop()
            raise ServerDiedError(f"vLLM server: died in {what}, and the engine was closed while it started again")
        if self._weights.version is not None:
            self._send(self._weights.version)

    def _has_died(self, process: ServerProcess | None) -> bool:
        if process is not None:
            return process.has_died(within_s=DEATH_S)
        try:
            self._http.get("health", timeout_s=DEATH_S)
        except (RuntimeError, TimeoutError):
            return True
        return False

    def _send_alone(self, version: int) -> None:
        with self._lock:
            self._send(version)

    def _send(self, version: int) -> None:
        """All weights into the server, between two tokens of what it is sampling."""
        timeout_s = self._options.sync_timeout_s
        if self._transfer.is_sender:
            with watch.named_phase(self._rank, "pause"):
                self._http.post("pause?mode=keep&clear_cache=false", None, timeout_s)
            # vLLM's own senders wait in NCCL, which no timeout of ours reaches
            with watch.watchdog(2 * timeout_s, self._rank, lambda: self._client.phase):
                if self._sender is None:
                    self._sender = self._make_sender()
                self._inner_client.version = str(version)
                self._sender.send_weights()
        with watch.named_phase(self._rank, "version check"):
            self._await_version(version)
        if self._transfer.is_sender:
            with watch.named_phase(self._rank, "reset and resume"):
                answer = self._http.post("reset_prefix_cache?reset_running_requests=true", None, timeout_s)
                if not answer["success"]:
                    raise RuntimeError("vLLM did not reset its prefix cache")
                self._http.post("resume", None, timeout_s)

    def _await_version(self, version: int) -> None:
        """The server reports the version, at once to the rank that sent it, in time to the others."""
        deadline = time.monotonic() + self._options.sync_timeout_s
        while True:
            reported = self._http.get("weight_info", self._options.sync_timeout_s)["weight_version"]
            if reported == str(version):
                return
            if self._transfer.is_sender or time.monotonic() > deadline:
                raise RuntimeError(f"sent version {version}, the engine reports {reported!r}")
            time.sleep(0.05)

    def _make_sender(self) -> Any:
        if self._transfer.backend == weight_sync.BACKEND:
            return weight_sync.ShmSender.trainer_init(self._transfer, client=self._client, source=self._weights)
        from vllm.distributed.weight_transfer import WeightTransferTrainerFactory

        init = transfers.prepared(self._transfer, self._weights)
        source = transfers.for_vllm(self._weights)
        return WeightTransferTrainerFactory.trainer_init(init, client=self._client, source=source)

    def _ask(self, bodies: list[dict[str, Any]]) -> list[Rollout]:
        """All requests; the first that fails ends those that wait, for their threads are waited for."""
        http = self._sampling_http = Http(self._http.url)  # of its own: what ends these requests ends no sync
        if self._closed:  # meanwhile: what `close` found here was another
            http.close()
        with ThreadPoolExecutor(min(len(bodies), self._in_flight) or 1) as threads:
            asked = [threads.submit(self._one, http, body) for body in bodies]
            try:
                for one in wait(asked, return_when=FIRST_EXCEPTION).done:
                    one.result()  # raises what it raised
                return [one.result() for one in asked]
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                http.close()
                raise

    @property
    def _in_flight(self) -> int:
        """Twice as many requests as the server decodes at once: it has the next at hand when one ends."""
        return 2 * self._options.max_num_seqs

    def _one(self, http: Http, body: dict[str, Any]) -> Rollout:
        try:
            answer = http.post("inference/v1/generate", body, self._options.generate_timeout_s)
        except TimeoutError as error:
            raise TimeoutError(f"rollout.generate_timeout_s: {error}") from error
        return _rollout(body["token_ids"], answer["choices"][0])

    def _body(self, prompt: list[int], sampling: Sampling, seed: int) -> dict[str, Any]:
        return {
            "token_ids": prompt,
            "sampling_params": {
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "max_tokens": min(sampling.max_tokens, self._context - len(prompt)),
                "seed": seed,
                "stop_token_ids": sorted({*self._stop_ids, *sampling.stop_token_ids}),
                "ignore_eos": True,  # the stop ids above are the whole truth
                "logprobs": 0,  # the sampled token's own
                "detokenize": False,
            },
        }


def _rollout(prompt: list[int], choice: dict[str, Any]) -> Rollout:
    """Checks what must hold of every response: one log-probability and one version of weights per token, a natural
    end."""
    if "weight_versions" not in choice:
        raise RuntimeError(f"the server's answer has no weight_versions: {TOO_OLD}")
    token_ids, content = choice["token_ids"], choice["logprobs"]["content"]
    if [entry["token_id"] for entry in content] != token_ids:
        raise RuntimeError(f"vLLM returned {len(content)} log-probabilities for {len(token_ids)} tokens")
    if choice["finish_reason"] not in ("stop", "length"):
        raise RuntimeError(f"vLLM ended a response with {choice['finish_reason']!r}")
    spans = joined_spans(((s["version"], s["start"], s["end"]) for s in choice["weight_versions"]), len(token_ids))
    logprobs = [entry["logprob"] for entry in content]
    return Rollout(list(prompt), token_ids, logprobs, choice["finish_reason"], spans[-1][0], spans)
