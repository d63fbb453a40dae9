"""A teacher behind any OpenAI-compatible server: concurrent, retried, bounded, cached; nothing is lost uncounted.

    tokenizers match    POST /completions        prompt = the student's own token ids, prefix included
    else                POST /chat/completions   the same messages and the prefix as the assistant's unfinished turn, in
                                                 the server's own template (continue_final_message: vLLM, SGLang)

Neither carries a hint or the answer. `check` refuses a server that can do neither: one that ignores the flag would
begin a new answer, and the splice would be of two unrelated texts.

Every attempt and every request is counted once:    requests = finished + unfinished + the sum of fault/*
                                                    asked = cached + finished + unfinished + the sum of error/*
Beside them: no_usage, replies that the token budget cannot see; cache_failed, finished replies that were not stored.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from scope_fast import config as cfg
from scope_fast import distributed
from scope_fast.loading import loading
from scope_fast.seeds import seed_of
from scope_fast.teacher import Reply, Request, TeacherError

RETRIED = frozenset({"rate_limit", "server", "timeout", "connection", "bad_json"})
Outcome = Reply | TeacherError
T = TypeVar("T")


class EndpointTeacher:
    """`Teacher` on a server. counts: since `take_counts`; the budget is a run's, those of a resumed run start anew.

    The key comes from the environment, goes into one header, and is cut out of every error that the server or the
    client words. Raises ImportError without httpx, ValueError for a key that no header can carry.
    """

    def __init__(self, config: cfg.Teacher, tokenizer, seed: int = 0) -> None:
        self._httpx = _httpx()
        self._config, self._server, self._seed = config, config.endpoint, seed
        self._key = os.environ.get(self._server.key_variable, "").strip()  # a mounted secret ends with its file
        if not (self._key.isascii() and self._key.isprintable()):
            raise ValueError(
                f"teacher.endpoint.key_variable: {self._server.key_variable} holds what no HTTP header can carry"
            )
        self.sends_tokens = _shares_tokenizer(self._server, tokenizer)
        self._route = "completions" if self.sends_tokens else "chat/completions"
        self._probe_ids = tokenizer.encode("1 + 1 = 2", add_special_tokens=False)
        self._jitter = random.Random()  # of waits only: two clients must not come back at the same moment
        self.counts: Counter[str] = Counter()
        self._spent_requests = self._spent_tokens = 0
        self._deadline, self._cache_warned = 0.0, False

    def complete(self, requests: list[Request]) -> list[Outcome]:
        """All requests at once, `concurrency` in flight. Whatever is not there shortly before `teacher.timeout_s` is a
        timeout of its own request: `ask` would give up on all of them."""
        return _run(self._complete(requests))

    def check(self) -> None:
        """Asks the server for one token or two. ValueError where it cannot continue a prefix, or does not answer."""
        _run(self._check())

    def take_counts(self) -> dict[str, int]:
        """teacher/requests, teacher/error/timeout, ... since the last call."""
        counts = {f"teacher/{name}": count for name, count in sorted(self.counts.items())}
        self.counts.clear()
        return counts

    def body(self, request: Request) -> dict[str, Any]:
        """What is sent. No seed where nothing is drawn, so that the cache finds the same question again.
        max_tokens is cut to the room left, where the server counts in the student's tokens."""
        budget = self._config.max_tokens
        if self.sends_tokens and request.room is not None:
            budget = max(1, min(budget, request.room))
        body: dict[str, Any] = {
            "model": self._server.model,
            "max_tokens": budget,
            "temperature": self._config.temperature,
        }
        if self._config.temperature > 0.0:
            # JSON's integers are exact below 2^53
            body["seed"] = seed_of(self._seed, request.seed, request.prompt.id) >> 8
        if self.sends_tokens:
            return {**body, "prompt": [*request.prompt.ids, *request.prefix_ids]}
        if not request.prefix:
            return {**body, "messages": request.prompt.chat}
        return {**body, **continued(request.prompt.chat, request.prefix)}

    async def _complete(self, requests: list[Request]) -> list[Outcome]:
        bound = self._config.timeout_s
        self._deadline = asyncio.get_running_loop().time() + bound - min(1.0, 0.1 * bound)
        slots = asyncio.Semaphore(self._server.concurrency)
        async with self._client() as client:
            tasks = [self._one(client, slots, request) for request in requests]
            results = await asyncio.gather(*tasks, return_exceptions=True)
        return [self._settled(result) for result in results]

    def _settled(self, result: Outcome | BaseException) -> Outcome:
        """What nobody foresaw in one request is that request's error; the others keep their replies."""
        if isinstance(result, Reply | TeacherError):
            return result
        if not isinstance(result, Exception):  # a cancellation is no failure
            raise result
        self.counts["error/unexpected"] += 1
        return TeacherError(self._clean(f"{type(result).__name__}: {result}"), "unexpected")

    def _client(self):
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        limits = self._httpx.Limits(max_connections=self._server.concurrency)
        return self._httpx.AsyncClient(headers=headers, limits=limits, timeout=self._server.request_timeout_s)

    async def _one(self, client, slots: asyncio.Semaphore, request: Request) -> Outcome:
        """A request to its end: from the cache, or attempt after attempt."""
        body = self.body(request)
        cached = self._cached(body)
        if cached is not None:
            self.counts["cached" if isinstance(cached, Reply) else f"error/{cached.category}"] += 1
            return self._without_repeated_space(request, cached) if isinstance(cached, Reply) else cached
        for attempt in range(self._server.retries + 1):
            async with slots:
                outcome, retry_after = await self._attempt(client, body)
            if isinstance(outcome, Reply):
                self._store(body, outcome)
                return self._without_repeated_space(request, outcome)
            wait = self._server.backoff_s * 2**attempt * self._jitter.uniform(0.5, 1.0)
            wait = max(wait, retry_after)
            late = asyncio.get_running_loop().time() + wait >= self._deadline
            if outcome.category not in RETRIED or attempt == self._server.retries or late:
                break
            self.counts["retries"] += 1
            await asyncio.sleep(wait)
        self.counts[f"error/{outcome.category}"] += 1
        return outcome

    async def _attempt(self, client, body: dict[str, Any]) -> tuple[Outcome, float]:
        """(what came of it, seconds the server asks to wait)."""
        left = self._deadline - asyncio.get_running_loop().time()
        if left <= 0.0:
            return TeacherError(f"no time left of teacher.timeout_s={self._config.timeout_s:g}", "deadline"), 0.0
        if spent := self._budget_spent():
            return TeacherError(spent, "budget"), 0.0
        self._spent_requests += 1
        self.counts["requests"] += 1
        try:
            outcome, retry_after = await self._post(client, body, min(left, self._server.request_timeout_s))
        except Exception:  # only counted here: `_settled` makes it the request's error
            self.counts["fault/unexpected"] += 1
            raise
        if isinstance(outcome, Reply):
            self.counts["finished" if outcome.finished else "unfinished"] += 1
        else:
            self.counts[f"fault/{outcome.category}"] += 1
        return outcome, retry_after

    async def _post(self, client, body: dict[str, Any], timeout_s: float) -> tuple[Outcome, float]:
        url = f"{self._server.url.rstrip('/')}/{self._route}"
        try:
            async with asyncio.timeout(timeout_s):  # of the whole exchange: httpx bounds each read alone
                response = await client.post(url, json=body)
        except (TimeoutError, self._httpx.TimeoutException):
            return TeacherError(f"no reply within {timeout_s:.3g} s", "timeout"), 0.0
        except self._httpx.RequestError as error:  # lost connections, and bodies that do not decode
            return TeacherError(self._clean(f"{type(error).__name__}: {error}"), "connection"), 0.0
        if response.status_code != 200:
            text = self._clean(response.text)
            kind = {429: "rate_limit"}.get(response.status_code, "server" if response.status_code >= 500 else "refused")
            return TeacherError(f"HTTP {response.status_code}: {text[:200]}", kind), _seconds(response.headers)
        return self._read(response.text), 0.0

    def _read(self, text: str) -> Outcome:
        """A reply of status 200."""
        try:
            answer = json.loads(text)
        except json.JSONDecodeError as error:
            return TeacherError(f"not JSON: {error}", "bad_json")
        tokens = _total_tokens(answer)
        self._spent_tokens += tokens or 0
        try:
            choice = answer["choices"][0]
            content = choice["text"] if self.sends_tokens else choice["message"]["content"]
            finished = choice["finish_reason"] == "stop"
        except (KeyError, IndexError, TypeError) as error:
            return TeacherError(f"no choice in the reply ({type(error).__name__}: {error})", "empty")
        if not isinstance(content, str) or not content.strip():
            return TeacherError("empty reply", "empty")
        if tokens is None:
            self.counts["no_usage"] += 1
        return Reply(content, finished)

    def _without_repeated_space(self, request: Request, reply: Reply) -> Reply:
        """A chat template may strip the prefix (Llama 3's `| trim`); a model that goes on from there writes the white
        space at its end again, which the student's text has already."""
        ending = request.prefix[len(request.prefix.rstrip()) :]
        return reply if self.sends_tokens else replace(reply, text=reply.text.removeprefix(ending))

    def _budget_spent(self) -> str:
        """Why nothing more may be sent; "" while it may. Requests in flight may overrun the budget of tokens."""
        for name, spent in (("max_requests", self._spent_requests), ("max_total_tokens", self._spent_tokens)):
            limit = getattr(self._server, name)
            if limit is not None and spent >= limit:
                return f"teacher.endpoint.{name}={limit} is spent"
        return ""

    def _clean(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text

    def _file(self, body: dict[str, Any]) -> Path | None:
        if self._server.cache is None:
            return None
        name = cfg.digest(self._server.url, self._route, body)
        return Path(self._server.cache).expanduser() / name[:2] / f"{name}.json"

    def _cached(self, body: dict[str, Any]) -> Outcome | None:
        file = self._file(body)
        if file is None or not file.is_file():
            return None
        try:
            text = json.loads(file.read_text(encoding="utf-8"))["text"]
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"its text is {text!r}")
        except (OSError, ValueError, KeyError, TypeError) as error:  # ValueError: no JSON, no UTF-8
            return TeacherError(f"teacher.endpoint.cache: {file} is damaged ({error}); delete it", "cache")
        return Reply(text)

    def _store(self, body: dict[str, Any], reply: Reply) -> None:
        """Only finished replies: another attempt at the others may do better. Whole or not at all; a full disk costs
        the cache its copy and nobody the reply."""
        file = self._file(body)
        if file is None or not reply.finished:
            return
        partial = file.with_suffix(f".{os.getpid()}.tmp")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps({"text": reply.text}), encoding="utf-8")
            partial.replace(file)
        except OSError as error:
            self.counts["cache_failed"] += 1
            if not self._cache_warned:
                self._cache_warned = True
                print(f"teacher.endpoint.cache: replies are not stored: {error}", file=sys.stderr, flush=True)

    async def _check(self) -> None:
        async with self._client() as client:
            if self.sends_tokens:
                count = await self._prompt_tokens(client, {"prompt": self._probe_ids})
                if count != len(self._probe_ids):
                    raise self._refusal(f"read {len(self._probe_ids)} token ids as {count} tokens")
                return
            chat, start = [{"role": "user", "content": "1 + 1 ="}], "1 + 1 = 2, since"
            whole = [*chat, {"role": "assistant", "content": start}]
            closed = await self._prompt_tokens(client, {"messages": whole, "add_generation_prompt": True})
            opened = await self._prompt_tokens(client, continued(chat, start))
            if opened >= closed:  # an unfinished turn has neither an end nor a new turn's beginning
                raise self._refusal("ignores continue_final_message, so it cannot go on from a prefix")

    async def _prompt_tokens(self, client, body: dict[str, Any]) -> int:
        """How long the server finds a prompt."""
        request = {"model": self._server.model, "max_tokens": 1, "temperature": 0.0, **body}
        try:
            response = await client.post(f"{self._server.url.rstrip('/')}/{self._route}", json=request)
        except self._httpx.RequestError as error:
            raise self._refusal(self._clean(f"{type(error).__name__}: {error}")) from None
        if response.status_code != 200:
            raise self._refusal(f"HTTP {response.status_code}: {self._clean(response.text)[:200]}")
        try:
            return int(response.json()["usage"]["prompt_tokens"])
        except (ValueError, KeyError, TypeError) as error:
            raise self._refusal(f"no usage.prompt_tokens in the reply ({type(error).__name__})") from None

    def _refusal(self, why: str) -> ValueError:
        return ValueError(f"teacher.endpoint: {self._server.url} ({self._route}): {why}")


def _run(coroutine: Coroutine[Any, Any, T]) -> T:
    """As asyncio.run, which at its end waits for a thread that still looks up the server's name, past any deadline."""
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(coroutine)
    finally:
        loop.close()


def continued(messages: list[dict[str, str]], prefix: str) -> dict[str, Any]:
    """The part of a chat request that has the server go on from `prefix`."""
    whole = [*messages, {"role": "assistant", "content": prefix}]
    return {"messages": whole, "continue_final_message": True, "add_generation_prompt": False}


def _total_tokens(answer: Any) -> int | None:
    """What the server says a reply cost; None where it says nothing that is a count."""
    usage = answer.get("usage") if isinstance(answer, dict) else None
    total = usage.get("total_tokens") if isinstance(usage, dict) else None
    return total if type(total) is int and total >= 0 else None


def _shares_tokenizer(server: cfg.Endpoint, student) -> bool:
    """Whether token ids may be sent: declared, or checked. A tokenizer that differs means the chat route."""
    if server.tokenizer in (None, "student"):
        return server.tokenizer == "student"
    from transformers import AutoTokenizer

    with loading("teacher.endpoint.tokenizer", server.tokenizer):
        same = student.get_vocab() == AutoTokenizer.from_pretrained(server.tokenizer).get_vocab()
    what = "the student's token ids" if same else "messages and text prefixes"
    if distributed.is_main():
        print(f"teacher: the endpoint gets {what}", flush=True)
    return same


def _seconds(headers) -> float:
    """A Retry-After in seconds; dates are not read."""
    value = headers.get("retry-after", "")
    return float(value) if value.isdecimal() else 0.0


def _httpx():
    try:
        import httpx
    except ModuleNotFoundError as error:
        if error.name != "httpx":
            raise
        raise ImportError("teacher.kind: endpoint needs httpx: pip install 'scope-fast[endpoint]'") from error
    return httpx
