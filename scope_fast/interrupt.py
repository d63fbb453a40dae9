"""SIGTERM and Ctrl-C: the first one ends the run after the step under way, the second one at once.

So a preempted job, or a person at a terminal, loses nothing: the step is finished, a checkpoint is written and the run
exits with 0. The decision is taken between steps by all ranks together, since the signal may reach only one of them.
Before the first step, while rank 0 makes a model, there is nothing to finish: `stop_if_told` raises Stopped there.
"""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

from scope_fast import distributed

SIGNALS = (signal.SIGTERM, signal.SIGINT)
SAME_S = 2.0  # under torchrun: signals so close together are one, which came on two ways


class Stopped(Exception):
    """The run was told to stop before its first step."""


class Interrupt:
    """A context manager; inside it a first signal is remembered, and the next has the system's own effect
    (with several ranks: the next that comes more than SAME_S later).

    A signal that was ignored before (as a shell does with Ctrl-C for jobs in the background) stays ignored. To be
    entered in the main thread, the only one Python delivers signals to.
    """

    def __init__(self) -> None:
        self._received: signal.Signals | None = None
        self._when = 0.0

    def __enter__(self) -> Interrupt:
        found = {number: signal.getsignal(number) for number in SIGNALS}
        self._previous = {number: handler for number, handler in found.items() if handler is not signal.SIG_IGN}
        for number in self._previous:
            signal.signal(number, self._remember)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._received is None:
            self._received, self._when = signal.Signals(number), time.monotonic()
            if distributed.world_size() == 1:  # even in the middle of a long call
                for each in self._previous:
                    signal.signal(each, signal.SIG_DFL)
            # not print: a signal may come in the middle of one, and a buffered file cannot be entered twice
            name = self._received.name
            os.write(
                2, f"\n{name}: stopping after the step under way, with a checkpoint; again stops at once\n".encode()
            )
        elif time.monotonic() - self._when >= SAME_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def stop_if_told(self) -> None:
        """Stopped where this rank was told to stop."""
        if self._received is not None:
            raise Stopped(f"{self._received.name}: stopped before the first step; the same command starts over")

    def requested(self) -> bool:
        """Whether any rank was told to stop; the same answer on all of them. Collective."""
        return any(distributed.gather(self._received is not None))
