"""No wait of a weight sync is endless, and every one that fails says on which rank and in which phase.

What can raise in time does: HTTP requests carry timeouts, collectives run into their process group's. `watchdog` is for
the rest: a call into an engine of this process, or an NCCL kernel, cannot be interrupted, so it ends the process.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import get_error_handler


@contextlib.contextmanager
def named_phase(rank: int, phase: str) -> Iterator[None]:
    """Puts rank and phase in front of what a RuntimeError or TimeoutError of the body says."""
    try:
        yield
    except (RuntimeError, TimeoutError) as error:
        kind = type(error) if type(error) in (RuntimeError, TimeoutError) else RuntimeError
        raise kind(f"weight sync: rank {rank}, {phase}: {error}") from error


class PhasedClient:
    """A client of vLLM's weight-sync protocol that knows in which phase it is. It wraps any, for any backend."""

    def __init__(self, client: Any, rank: int) -> None:
        self._client, self._rank = client, rank
        self._updates = 0
        self.phase = "gather"

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._run("init", self._client.init_weight_transfer_engine, init_info)

    def start_weight_update(self) -> None:
        self._updates = 0
        self._run("start", self._client.start_weight_update)

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        self._run(f"update of bucket {self._updates}", self._client.update_weights, update_info)
        self._updates += 1

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._run("finish", self._client.finish_weight_update, weight_version)

    def _run(self, phase: str, call: Callable[..., None], *arguments: Any) -> None:
        self.phase = phase
        with named_phase(self._rank, phase):
            call(*arguments)
        self.phase = "gather"  # between two calls the source is read


@contextlib.contextmanager
def watchdog(timeout_s: float, rank: int, phase: Callable[[], str]) -> Iterator[None]:
    """Ends the process with status 1 where the body takes longer, after saying why and where every thread stands."""
    done = threading.Event()

    def watch() -> None:
        if done.wait(timeout_s):
            return
        message = f"weight sync: rank {rank}, {phase()}: not done within {timeout_s:g} s"
        print(f"{message}; ending the process", file=sys.stderr, flush=True)
        get_error_handler().record_exception(TimeoutError(message))  # under torchrun: what its summary shows
        faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
        os._exit(1)

    threading.Thread(target=watch, name="weight sync watchdog", daemon=True).start()
    try:
        yield
    finally:
        done.set()
