"""A vLLM OpenAI server as a child process: how it is started, and plain HTTP to it. Nothing here imports vLLM.

The child leads a process group of its own and holds the read end of a pipe: when this process ends, however it ends,
the pipe closes and the child kills its group, so that no server and no engine core is left behind.
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import os
import random
import resource
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

import torch

from scope_fast.rollout import weight_sync
from scope_fast.rollout.base import EngineOptions, prefill_tokens_on_cpu
from scope_fast.rollout.vllm_process import IN_PROCESS

PACKAGE_PARENT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {
    "VLLM_SERVER_DEV_MODE": "1",  # opens the routes of the weight sync
    "VLLM_NO_USAGE_STATS": "1",
}


class ServerDiedError(RuntimeError):
    """The server's process has ended, or nobody listens at its address."""


class Http:
    """JSON requests to one server. Each call opens its own connection, so that threads may share an object.

    `close` ends the calls of all of them.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"server_url={url!r}: expected http://HOST:PORT")
        self._connection_class = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self.url = url
        self._host, self._port, self._path = parts.hostname, parts.port, parts.path.rstrip("/")
        self._lock = threading.Lock()  # of the two below
        self._sockets: set[socket.socket] = set()
        self._closed = False

    def get(self, path: str, timeout_s: float) -> Any:
        return self._call("GET", path, None, timeout_s)

    def post(self, path: str, body: dict[str, Any] | None, timeout_s: float) -> Any:
        return self._call("POST", path, body, timeout_s)

    def close(self) -> None:
        """Ends every call that waits for its answer, with ServerDiedError in its thread, and every one that follows.

        Else a thread would wait on for its timeout, and the interpreter's end for the thread.
        """
        with self._lock:
            self._closed = True
            for held in self._sockets:
                with contextlib.suppress(OSError):  # the server has ended it before
                    socket.socket.shutdown(held, socket.SHUT_RDWR)  # TLS or not: its reader sees the end

    @contextlib.contextmanager
    def _endable(self, held: socket.socket) -> Iterator[None]:
        with self._lock:
            if self._closed:
                raise ConnectionAbortedError("closed on this side")
            self._sockets.add(held)
        try:
            yield
        finally:
            with self._lock:
                self._sockets.discard(held)

    def _call(self, method: str, path: str, body: dict[str, Any] | None, timeout_s: float) -> Any:
        """The answer's JSON, None for an empty one. TimeoutError, RuntimeError for an error status, ServerDiedError
        where the connection was refused, broke, or was ended by `close`, OSError where this process may open no more.
        """
        data = None if body is None else json.dumps(body).encode()
        connection = self._connection_class(self._host, self._port, timeout=timeout_s)
        try:
            with contextlib.closing(connection):
                connection.connect()
                with self._endable(connection.sock):
                    connection.request(method, f"{self._path}/{path}", data, {"Content-Type": "application/json"})
                    response = connection.getresponse()
                    answer = response.read()
        except TimeoutError as error:
            raise TimeoutError(f"{method} /{path}: the server gave no answer within {timeout_s:g} s") from error
        except (OSError, http.client.HTTPException) as error:  # refused, broken, or a host that has no address
            if getattr(error, "errno", None) == errno.EMFILE:
                why = f"{error.strerror}: lower rollout.max_num_seqs, or raise the limit (ulimit -n)"
                raise OSError(errno.EMFILE, f"{method} /{path}: {why}") from error
            raise ServerDiedError(f"{method} /{path}: {type(error).__name__}: {error}") from error
        if response.status >= 400:
            raise RuntimeError(f"{method} /{path}: status {response.status}: {answer[:2000].decode(errors='replace')}")
        return json.loads(answer) if answer else None


class ServerProcess:
    """A running server: up when the constructor returns. RuntimeError with the end of its log where it does not start.

    arguments: of vLLM's OpenAI server, without host and port. log: file that takes all it prints.
    """

    def __init__(self, arguments: list[str], environment: dict[str, str], log: Path, timeout_s: float) -> None:
        port = free_port()
        self.url, self._log = f"http://127.0.0.1:{port}", log
        path = os.pathsep.join(filter(None, (str(PACKAGE_PARENT), os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "-m", __name__, "--host", "127.0.0.1", "--port", str(port), *arguments]
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                command,
                env={**_inherited(os.environ), **ENVIRONMENT, **environment, "PYTHONPATH": path},
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait_until_up(timeout_s)
        except BaseException:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        """Of the process that listens, which leads the group of all the server's processes."""
        return self._process.pid

    def has_died(self, within_s: float = 0.0) -> bool:
        """Whether the listening process has ended, or ends in that time."""
        try:
            self._process.wait(within_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def stop(self) -> None:
        """Ends the whole group; what ignores SIGTERM for ten seconds is killed. Calling it twice is harmless."""
        if self._process.stdin.closed:
            return
        if not self.has_died():
            self._process.send_signal(signal.SIGTERM)
            self.has_died(within_s=10.0)
        with contextlib.suppress(ProcessLookupError):  # nobody is left
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        self._process.stdin.close()

    def last_words(self, lines: int = 30) -> str:
        """The end of the log."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:])

    def _wait_until_up(self, timeout_s: float) -> None:
        deadline, api = time.monotonic() + timeout_s, Http(self.url)
        while time.monotonic() < deadline:
            if self.has_died(within_s=0.2):
                status = self._process.returncode
                raise RuntimeError(f"vLLM server: ended with status {status} at its start:\n{self.last_words()}")
            with contextlib.suppress(ServerDiedError, TimeoutError):  # not listening yet
                api.get("health", timeout_s=5.0)
                return
        raise TimeoutError(f"rollout.start_timeout_s: vLLM server not up within {timeout_s:g} s:\n{self.last_words()}")


def server_arguments(model_dir: str, options: EngineOptions, backend: str) -> list[str]:
    """What `python -m vllm.entrypoints.openai.api_server` must be given for this engine, but for host and port."""
    arguments = ["--model", model_dir, "--tokens-only", "--dtype", options.dtype, "--seed", str(options.seed)]
    arguments += ["--max-num-seqs", str(options.max_num_seqs), "--logprobs-mode", "processed_logprobs"]
    arguments += ["--weight-transfer-config", json.dumps({"backend": backend})]
    arguments += ["--disable-uvicorn-access-log"]
    if options.max_model_len is not None:
        arguments += ["--max-model-len", str(options.max_model_len)]
    if backend == weight_sync.BACKEND:
        arguments += ["--worker-extension-cls", "scope_fast.rollout.vllm_worker.WorkerExtension"]
    if options.server_gpus is not None:
        arguments += ["--tensor-parallel-size", str(len(options.server_gpus))]
    if torch.cuda.is_available():
        return [*arguments, "--gpu-memory-utilization", str(options.gpu_memory_utilization)]
    tokens = prefill_tokens_on_cpu(model_dir, options)
    arguments += ["--enforce-eager", "--no-enable-chunked-prefill", "--max-num-batched-tokens", str(tokens)]
    return [*arguments, "--kv-cache-memory-bytes", str(options.kv_cache_bytes)]


def server_environment(options: EngineOptions, backend: str) -> dict[str, str]:
    """What else a server for this engine needs to find in its environment. ValueError for `server_gpus` that this
    process does not see."""
    threads = {} if options.num_threads is None else {"OMP_NUM_THREADS": str(options.num_threads)}
    gpus = {} if options.server_gpus is None else {"CUDA_VISIBLE_DEVICES": ",".join(gpu_names(options.server_gpus))}
    return threads | gpus | ({"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"} if backend == "ipc" else {})


def gpu_names(gpus: tuple[int, ...]) -> list[str]:
    """The devices of this process, as CUDA counts them, by the names they have outside it: numbers or UUIDs. ValueError
    naming `server_gpus` for one that this process does not see."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        names = [str(i) for i in range(torch.cuda.device_count())]
    else:
        names = [name.strip() for name in visible.split(",") if name.strip()]
    if not all(0 <= gpu < len(names) for gpu in gpus):
        raise ValueError(
            f"server_gpus={list(gpus)}: expected devices below {len(names)}, with CUDA_VISIBLE_DEVICES={visible}"
        )
    return [names[gpu] for gpu in gpus]


def allow_open_files(count: int) -> None:
    """Raises the number of files this process may hold open, often 1024, to `count`, or as far as it may itself."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < count:
        most = count if hard == resource.RLIM_INFINITY else min(count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def free_port() -> int:
    """One that nobody listens on, below those that Linux gives away on its own (by default from 32768 on).

    A server binds it only after its imports, and until then no other process's connection may be given it. OSError
    where a hundred tries found none.
    """
    for port in random.Random().sample(range(20000, 32768), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):  # taken: the next
            probe.bind(("", port))
            return port
    raise OSError("no free port between 20000 and 32768")


def _inherited(environment: Mapping[str, str]) -> dict[str, str]:
    """What a server takes over of this process's environment.

    A server started by a rank is no rank: vLLM would take the launcher's rendezvous for its own. And what an engine or
    a reward model in this process needs of vLLM is no server's: servers are set up alike whether there was one or not
    (a person's own VLLM_LOGGING_LEVEL=ERROR cannot be told from ours, and goes too).
    """
    ranks = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "MASTER_ADDR"}
    ranks |= {"MASTER_PORT", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "ROLE_NAME"}
    return {
        name: value
        for name, value in environment.items()
        if name not in ranks and not name.startswith("TORCHELASTIC_") and IN_PROCESS.get(name) != value
    }


def _die_with_parent() -> NoReturn:
    # returns when the parent's end of the pipe is closed; sys.stdin would hold a lock that the interpreter's end wants
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    threading.Thread(target=_die_with_parent, daemon=True).start()
    runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__", alter_sys=True)
