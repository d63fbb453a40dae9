"""Scoring of responses in worker processes that can be killed: a scorer that hangs or dies costs its own item only.

The parent process holds an inference engine and its threads, so workers are never forked from it: each is a fresh
interpreter that runs this very file (standard library only, so it starts in 0.1 s plus whatever the scorer imports).
The parent sends a worker a chunk of items; the worker answers item by item, so the parent always knows which one is
being scored and for how long: one event loop, no threads, exact deadlines per item although items travel in chunks.

A failed item has reward None and says why. It is never a silent zero: the caller decides, and counts it.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import numbers
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, Literal, NamedTuple

START_TIMEOUT_S = 120.0  # for the imports of the scorer's module
MOST_TOLD = 5  # distinct reasons for a missing verdict that are printed; every verdict carries its own
CHUNKS_PER_WORKER = 4  # small enough that slow items spread over the workers, large enough to amortise a message


class Verdict(NamedTuple):
    """What became of one item. reward is None unless status is "ok"; reason explains a "timeout" or a "crash"."""

    reward: float | None
    status: Literal["ok", "timeout", "crash"]
    answer: str | None = None
    reason: str | None = None


class Verifier:
    """A pool of `num_workers` processes that call `score`, for at most `timeout_s` seconds an item.

    score: "module:function" of a `fn(response: str, entry: dict) -> (reward: float, answer: str | None)`, importable
    by a fresh interpreter with this one's sys.path. Use as a context manager, or call `close`.

    Raises ValueError naming the argument for a `score` that cannot be imported, whatever its module raises then, and
    RuntimeError when a worker dies or takes more than START_TIMEOUT_S before it has imported it.
    """

    def __init__(self, score: str, num_workers: int = 2, timeout_s: float = 5.0) -> None:
        if num_workers < 1:
            raise ValueError(f"num_workers={num_workers}: expected at least 1")
        if not timeout_s > 0:
            raise ValueError(f"timeout_s={timeout_s}: expected more than 0 seconds")
        if not all(score.partition(":")):
            raise ValueError(f"score={score!r}: expected 'module:function'")
        self.timeout_s = timeout_s
        self._score = score
        self._told: set[str] = set()
        self._workers: list[_Worker] = []
        try:
            for _ in range(num_workers):
                self._workers.append(_Worker(score))
            self._workers[0].wait_until_ready()  # so that a wrong `score` shows here, not after the first rollouts
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kills the workers."""
        while self._workers:
            self._workers.pop().kill()

    def score(self, items: list[tuple[str, dict[str, Any]]]) -> list[Verdict]:
        """One verdict for each (response, entry), in order. Why items got none is printed, the first MOST_TOLD reasons
        of this verifier's life."""
        if not self._workers:
            raise RuntimeError("the verifier is closed")
        verdicts: dict[int, Verdict] = {}
        size = max(1, math.ceil(len(items) / (CHUNKS_PER_WORKER * len(self._workers))))
        numbered = [(index, *item) for index, item in enumerate(items)]
        chunks = deque(numbered[start : start + size] for start in range(0, len(items), size))
        try:
            while len(verdicts) < len(items):
                self._hand_out(chunks)
                self._collect(verdicts, chunks)
        except BaseException:  # a worker left in the middle of its chunk would answer the next call with it
            self.close()
            raise
        in_order = [verdicts[index] for index in range(len(items))]
        for verdict in in_order:
            if verdict.status != "ok" and len(self._told) < MOST_TOLD and verdict.reason not in self._told:
                self._told.add(verdict.reason)
                print(f"verifier: no verdict on a response: {verdict.reason[:500]}", file=sys.stderr, flush=True)
        return in_order

    def _hand_out(self, chunks: deque[list]) -> None:
        for slot, worker in enumerate(self._workers):
            if chunks and worker.idle:
                if worker.send(chunks[0], self.timeout_s):
                    chunks.popleft()
                else:
                    self._workers[slot] = self._replace(worker)

    def _collect(self, verdicts: dict[int, Verdict], chunks: deque[list]) -> None:
        """Waits for the next message or deadline, takes the results in and replaces the workers that failed."""
        deadline = min(worker.deadline for worker in self._workers if not worker.idle)
        ready = wait([worker.connection for worker in self._workers], max(0.0, deadline - time.monotonic()))
        for slot, worker in enumerate(self._workers):
            failure = worker.receive(verdicts, self.timeout_s) if worker.connection in ready else None
            if failure is None and not worker.idle and time.monotonic() > worker.deadline:
                failure = worker.overdue(self.timeout_s)
            if failure is not None:
                if worker.chunk:
                    verdicts[worker.chunk[0][0]] = failure
                if worker.chunk[1:]:
                    chunks.appendleft(worker.chunk[1:])
                self._workers[slot] = self._replace(worker)

    def _replace(self, worker: _Worker) -> _Worker:
        worker.kill()
        return _Worker(self._score)


class _Worker:
    """The parent's end of one worker process. `chunk` holds the items sent and not yet answered, in order."""

    def __init__(self, score: str) -> None:
        self.score, self.chunk, self.ready = score, [], False
        self.connection, theirs = Pipe()
        self.deadline = time.monotonic() + START_TIMEOUT_S
        self.process = subprocess.Popen(
            # -P: this file's folder must not come first on the worker's path, where `data` or `metrics` live
            [sys.executable, "-P", __file__, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=2,  # what a scorer prints must not mix with the run's own output
            env={"OMP_NUM_THREADS": "1", **os.environ},
            start_new_session=True,  # kill() reaches the scorer's own children; Ctrl-C is the parent's to handle
        )
        theirs.close()
        self.connection.send((score, sys.path))

    @property
    def idle(self) -> bool:
        return self.ready and not self.chunk

    def send(self, chunk: list, timeout_s: float) -> bool:
        """Hands out a chunk; False if the worker died while it was idle."""
        if self.process.poll() is not None:
            return False
        try:
            self.connection.send(chunk)
        except (BrokenPipeError, ConnectionResetError):
            return False
        self.chunk, self.deadline = chunk, time.monotonic() + timeout_s
        return True

    def receive(self, verdicts: dict[int, Verdict], timeout_s: float) -> Verdict | None:
        """Takes in what the worker has sent; if it died instead, the verdict on the item it was scoring."""
        try:
            while self.connection.poll():
                message = self.connection.recv()
                if self.ready:
                    verdicts[self.chunk[0][0]] = Verdict(*message)
                    self.chunk, self.deadline = self.chunk[1:], time.monotonic() + timeout_s
                elif message is None:
                    self.ready = True
                else:
                    raise ValueError(f"score={self.score!r}: {message}")
        except (EOFError, ConnectionResetError):
            if not self.ready:
                raise RuntimeError(f"a verifier worker died importing {self.score!r}: {self._ending()}") from None
            return Verdict(None, "crash", None, f"the worker died: {self._ending()}")
        return None

    def overdue(self, timeout_s: float) -> Verdict:
        """The verdict on the item whose time is up; RuntimeError if it is the start that takes too long."""
        if not self.ready:
            raise RuntimeError(f"a verifier worker has not imported {self.score!r} within {START_TIMEOUT_S:g} s")
        return Verdict(None, "timeout", None, f"no verdict within {timeout_s:g} s")

    def wait_until_ready(self) -> None:
        while not self.ready:
            if self.connection.poll(max(0.0, self.deadline - time.monotonic())):
                self.receive({}, 0.0)
            else:
                self.overdue(0.0)

    def _ending(self) -> str:
        try:
            code = self.process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return "it closed its connection"
        return f"exit code {code}" if code >= 0 else f"{signal.strsignal(-code)}"

    def kill(self) -> None:
        """Ends the process and whatever it has started."""
        with contextlib.suppress(ProcessLookupError):  # dead already, and its group with it
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.connection.close()


def _serve(connection: Connection) -> None:
    """The worker's side: imports the scorer, then answers every item of every chunk with the fields of a Verdict."""
    score, sys.path[:] = connection.recv()
    threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()
    module, _, name = score.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # noqa: BLE001 - foreign code runs when its module is imported
        connection.send(_in_words(error))
        return
    connection.send(None if callable(function) else f"{name} is a {type(function).__name__}, not a function")
    while True:
        try:
            chunk = connection.recv()
        except EOFError:
            return
        for _, response, entry in chunk:
            connection.send(_score_one(function, response, entry))


def _exit_with_parent(parent: int) -> None:
    """A worker whose scorer hangs must not outlive a parent that was killed."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def _score_one(function: Callable, response: str, entry: dict[str, Any]) -> tuple:
    try:
        result = function(response, entry)
    except Exception as error:  # noqa: BLE001 - foreign code: whatever it raises is the verdict on this item
        return None, "crash", None, _in_words(error)
    if not isinstance(result, tuple) or len(result) != 2:
        return None, "crash", None, f"the scorer returned {result!r}, expected (reward, answer)"
    reward, answer = result
    if not isinstance(reward, numbers.Real) or not math.isfinite(reward):
        return None, "crash", None, f"reward {reward!r} is not a finite number"
    return float(reward), "ok", None if answer is None else str(answer), None


def _in_words(error: Exception) -> str:
    """What was raised, and where: a message of foreign code says little without its file and line."""
    ours = (__file__, importlib.__file__)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(("<frozen", *ours))]
    where = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
