"""Teachers: given a prompt and the student's prefix, the text that follows. No hint, no answer is passed to them."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from scope_fast import config as cfg
from scope_fast.rollout.base import LocalEngine, Sampling
from scope_fast.scope.trajectory import Prompt
from scope_fast.seeds import seed_of
from scope_fast.tasks import STYLES, get_task


@dataclass(frozen=True)
class Request:
    """A response to be continued: the student's own tokens so far, and their text. seed: for teachers that sample.
    room: most of the student's tokens that may follow, EOS too, whatever the teacher's own budget."""

    prompt: Prompt
    prefix_ids: list[int]
    prefix: str
    seed: int = 0
    room: int | None = None


@dataclass(frozen=True)
class Reply:
    """text: the continuation, without the prefix and without EOS. finished: it ended by itself, within the budget."""

    text: str
    finished: bool = True


class TeacherError(RuntimeError):
    """The teacher gave nothing for one request; the message says why, the category says it in a word."""

    def __init__(self, message: str, category: str = "teacher") -> None:
        super().__init__(message)
        self.category = category


class Teacher(Protocol):
    """A teacher whose `in_process` is true computes in this process, where nothing can stop it from outside: it keeps
    to the time limit itself."""

    def complete(self, requests: list[Request]) -> list[Reply | TeacherError]:
        """One reply or error per request, in order. May block; `ask` puts a bound on it."""


class SolverTeacher:
    """The task's own worked solution, going on from the value the prefix arrived at, right or wrong.

    styles: of tasks.STYLES; each request's seed draws the one its lines are written in.
    keep_style: a prefix is continued in the style of its last line instead, as a language model would.
    """

    def __init__(self, styles: Sequence[str] = STYLES[:1], keep_style: bool = False) -> None:
        self._styles, self._keep_style = tuple(styles), keep_style

    def complete(self, requests: list[Request]) -> list[Reply | TeacherError]:
        return [self._one(request) for request in requests]

    def _one(self, request: Request) -> Reply | TeacherError:
        lines = [line.strip() for line in request.prefix.splitlines() if line.strip()]
        entry, drawn = request.prompt.entry, self._styles[request.seed % len(self._styles)]
        try:
            task = get_task(request.prompt.task)
            style = task.style_of(entry, lines) if self._keep_style else None
            rest = task.resume(entry, lines, style or drawn)
        except ValueError as error:
            return TeacherError(str(error))
        return Reply("\n".join(rest))


class ModelTeacher:
    """A stronger model that shares the student's tokenizer, continued from the student's own token ids.

    The draw depends on what is asked and on nothing beside it, so that a resumed run is told the same. What has not
    ended within `teacher.timeout_s` is given up, the rest is kept.
    """

    # vLLM keeps what a forward pass works on in globals: one that went on beside the student's would corrupt both
    in_process = True

    def __init__(self, engine: LocalEngine, tokenizer, config: cfg.Teacher, context: int, seed: int) -> None:
        self._engine, self._tokenizer, self._seed = engine, tokenizer, seed
        self._timeout_s = config.timeout_s
        # the student's EOS too: a teacher's own configuration may name another, which ends its turn as well
        self._sampling = Sampling(config.temperature, 1.0, config.max_tokens, (tokenizer.eos_token_id,))
        self._context = context

    def complete(self, requests: list[Request]) -> list[Reply | TeacherError]:
        prompts = [[*request.prompt.ids, *request.prefix_ids] for request in requests]
        refused = [self._refusal(prompt) for prompt in prompts]
        fits = [i for i, reason in enumerate(refused) if not reason]
        replies: list[Reply | TeacherError] = [TeacherError(reason) for reason in refused]
        if fits:
            seeds = [[seed_of(self._seed, requests[i].seed, requests[i].prompt.id)] for i in fits]
            rollouts = self._engine.generate([prompts[i] for i in fits], 1, self._sampling, seeds, self._timeout_s)
            for i, (rollout,) in zip(fits, rollouts, strict=True):
                if rollout.finish_reason == "timeout":
                    replies[i] = timed_out(self._timeout_s)
                    continue
                finished = rollout.finish_reason == "stop"
                ids = rollout.token_ids[:-1] if finished else rollout.token_ids
                # special tokens in the middle stay, for `splice` to reject
                text = self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
                replies[i] = Reply(text, finished)
        return replies

    def _refusal(self, prompt: list[int]) -> str:
        """Why the engine would refuse all of a call that holds this prompt; "" where it would not."""
        if len(prompt) >= self._context:
            return "the prefix fills the teacher's context"
        if max(prompt) >= self._engine.vocab_size:  # models of one tokenizer pad their embeddings to different sizes
            return f"the prefix holds token id {max(prompt)}, the teacher knows {self._engine.vocab_size}"
        return ""


def ask(teacher: Teacher, requests: list[Request], timeout_s: float) -> list[Reply | TeacherError]:
    """`teacher.complete` under a bound of `timeout_s` seconds for the whole call; in its own thread, unless it computes
    in this process and keeps to its time itself.

    A teacher that raises, takes too long, answers the wrong number of requests, or answers one with nothing costs its
    requests a TeacherError each, never an exception here: the caller counts them.
    """
    if not requests:
        return []
    future: Future[list[Reply | TeacherError]] = Future()

    def work() -> None:
        try:
            future.set_result(teacher.complete(requests))
        except Exception as error:  # noqa: BLE001  whatever a teacher raises is counted and named by the caller
            future.set_exception(error)

    if getattr(teacher, "in_process", False):
        work()
    else:  # daemon: one that hangs must not hold the exit
        threading.Thread(target=work, daemon=True, name="teacher").start()
    try:
        error = future.exception(timeout_s)
    except TimeoutError:
        return [timed_out(timeout_s)] * len(requests)
    if error is not None:
        return [TeacherError(f"{type(error).__name__}: {error}")] * len(requests)
    replies = future.result()
    if not isinstance(replies, list) or len(replies) != len(requests):
        given = f"{len(replies)} replies" if isinstance(replies, list) else f"a {type(replies).__name__}"
        return [TeacherError(f"{given} to {len(requests)} requests")] * len(requests)
    return [_usable(reply) for reply in replies]


def timed_out(timeout_s: float) -> TeacherError:
    return TeacherError(f"timed out after {timeout_s:g} s")


def counts_of(teacher: Teacher) -> dict[str, int]:
    """What a teacher counts beside its replies since it was last asked, by metric name; most count nothing."""
    return teacher.take_counts() if hasattr(teacher, "take_counts") else {}


def _usable(reply: object) -> Reply | TeacherError:
    if isinstance(reply, TeacherError):
        return reply
    if not isinstance(reply, Reply):
        return TeacherError(f"a {type(reply).__name__} instead of a reply")
    try:
        reply.text.encode()
    except UnicodeEncodeError:  # JSON can spell half a surrogate pair, which no tokenizer takes
        return TeacherError("the reply holds half a character")
    return reply if reply.text.strip() else TeacherError("empty reply")
