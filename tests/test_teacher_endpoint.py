"""A teacher behind HTTP: every failure is retried or counted, the key stays where it is, and a real vLLM server goes on
from the student's tokens and from a prefix text alike."""

import asyncio
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import tiny_models
import tiny_prms
import torch
from factories import byte_level, prompt, sentencepiece

from scope_fast import config as cfg
from scope_fast import train
from scope_fast.metrics import METRICS
from scope_fast.rollout.server_process import free_port
from scope_fast.teacher import Reply, Request, TeacherError, ask, counts_of
from scope_fast.teacher_endpoint import EndpointTeacher

pytest.importorskip("httpx", reason="httpx is not installed (pip install 'scope-fast[endpoint]')")

KEY = "sk-sentinel-93c1"
WAYS = ("rate_limit", "server", "bad_json", "empty", "timeout")


def completion(text="so 2", finish_reason="stop", tokens=7):
    return {
        "choices": [{"text": text, "finish_reason": finish_reason}],
        "usage": {"total_tokens": tokens, "prompt_tokens": 3},
    }


class Server(ThreadingHTTPServer):
    """Answers `behave(body, attempt)`, attempt counting the requests of one prompt: (status, text), (status, text,
    headers), or None to hang. most: requests in hand at one time."""

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, behave):
        self.behave, self.attempts, self.seen, self.headers = behave, Counter(), [], []
        self.lock, self.released = threading.Lock(), threading.Event()
        self.in_hand = self.most = 0
        self.times = []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        what = json.dumps(body.get("prompt", body.get("messages")))
        with self.server.lock:
            self.server.seen.append((self.path, body))
            self.server.headers.append(dict(self.headers))
            self.server.attempts[what] += 1
            self.server.times.append(time.monotonic())
            self.server.in_hand += 1
            self.server.most = max(self.server.most, self.server.in_hand)
            attempt = self.server.attempts[what]
        reply = self.server.behave(body, attempt)
        with self.server.lock:
            self.server.in_hand -= 1
        if reply is None:
            self.server.released.wait(30)
            return
        status, text, headers = (*reply, {})[:3]
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *arguments):
        pass


@contextmanager
def serving(behave):
    server = Server(behave)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()


def counted(made):
    """The counts since the last call; each has its name in the metrics, which refuse any other."""
    counts = made.take_counts()
    assert set(counts) <= set(METRICS)
    return counts


def teacher(url, tokenizer="student", timeout_s=60.0, temperature=0.0, max_tokens=16, **endpoint):
    settings = {"request_timeout_s": 30.0, "backoff_s": 0.01, "key_variable": "TEST_TEACHER_KEY", **endpoint}
    server = cfg.Endpoint(url=url, model="m", tokenizer=tokenizer, **settings)
    config = cfg.Teacher(
        kind="endpoint", endpoint=server, timeout_s=timeout_s, temperature=temperature, max_tokens=max_tokens
    )
    return EndpointTeacher(config, byte_level())


def requests_(count):
    return [Request(prompt(ids=(5, i)), [70, 71], "12 + 7 = 19\n") for i in range(count)]


def failing(body, attempt, lasting):
    """Of every 25 prompts five fail, each in another way: the first time, or always."""
    way = body["prompt"][1] % 25
    if way >= 5 or (attempt > 1 and not lasting):
        return 200, json.dumps(completion(f"reply {body['prompt'][1]}"))
    return [
        (429, "slow down"), (500, "oops"), (200, json.dumps(completion())[:20]), (200, '{"choices": []}'), None,
    ][way]  # fmt: skip


@pytest.mark.parametrize("lasting", [False, True])
def test_of_200_requests_a_fifth_failing_in_five_ways_none_is_lost(lasting, monkeypatch, tmp_path, caplog, capsys):
    monkeypatch.setenv("TEST_TEACHER_KEY", KEY)
    caplog.set_level(logging.DEBUG)
    with serving(lambda body, attempt: failing(body, attempt, lasting)) as server:
        made = teacher(server.url, retries=2, request_timeout_s=3.0, cache=str(tmp_path / "cache"))
        replies = ask(made, requests_(200), 60.0)
        counts = counts_of(made)
        sent = len(server.seen)
        assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    lost = {i for i in range(200) if i % 25 < 5 and (lasting or i % 25 == 3)}  # an empty choice is not asked for again
    for i, reply in enumerate(replies):
        if i in lost:
            assert isinstance(reply, TeacherError) and reply.category == WAYS[i % 25]
        else:
            assert reply == Reply(f"reply {i}")
    attempts = {way: 8 * (1 if not lasting or way == "empty" else 3) for way in WAYS}
    expected = {f"teacher/fault/{way}": n for way, n in attempts.items()}
    expected |= {f"teacher/error/{way}": 8 for way in WAYS if lasting or way == "empty"}
    expected |= {"teacher/finished": 200 - len(lost), "teacher/retries": 64 if lasting else 32}
    expected["teacher/requests"] = sent
    assert counts == expected
    assert sent == counts["teacher/finished"] + sum(attempts.values())
    assert sum(isinstance(r, Reply) for r in replies) + sum(isinstance(r, TeacherError) for r in replies) == 200
    files = list((tmp_path / "cache").rglob("*.json"))
    assert len(files) == 200 - len(lost)
    written = "".join(file.read_text() for file in files) + caplog.text + "".join(capsys.readouterr())
    assert KEY not in written and KEY not in repr(made.__dict__["_config"])


def test_finished_replies_come_from_the_cache_and_nothing_else_is_kept(tmp_path):
    def behave(body, attempt):
        cut = body["prompt"][1] == 1
        return 200, json.dumps(completion("cut" if cut else "whole", "length" if cut else "stop"))

    with serving(behave) as server:
        first, again = (teacher(server.url, cache=str(tmp_path)) for _ in range(2))
        replies = first.complete(requests_(2))
        assert replies == [Reply("whole"), Reply("cut", finished=False)]
        assert again.complete(requests_(2)) == replies
        assert again.take_counts() == {"teacher/cached": 1, "teacher/requests": 1, "teacher/unfinished": 1}
        assert len(server.seen) == 3
        (file,) = tmp_path.rglob("*.json")
        file.write_text('{"te')
        damaged = again.complete(requests_(1))[0]
    assert damaged.category == "cache" and "is damaged" in str(damaged)


def test_the_cache_answers_no_other_question(tmp_path):
    """Of another server, temperature, budget, prompt or prefix."""
    answers = ["first", "other server", "warmer", "longer", "other prompt", "other prefix"]
    asked = requests_(2)

    def behave(body, attempt):
        return 200, json.dumps(completion(answers.pop(0)))

    with serving(behave) as server, serving(behave) as other:

        def ask_one(request, url=server.url, **changed):
            (reply,) = teacher(url, cache=str(tmp_path), **changed).complete([request])
            return reply.text

        for _ in range(2):  # the second time from the cache
            assert ask_one(asked[0]) == "first"
            assert ask_one(asked[0], other.url) == "other server"
            assert ask_one(asked[0], temperature=0.5) == "warmer"
            assert ask_one(asked[0], max_tokens=32) == "longer"
            assert ask_one(asked[1]) == "other prompt"
            assert ask_one(replace(asked[0], prefix_ids=[70], prefix="12")) == "other prefix"


def test_a_draw_is_of_the_run_the_request_and_the_prompt():
    """A resumed run asks the same; nothing else does."""
    config, (request,) = teacher("http://x/v1", temperature=0.5)._config, requests_(1)

    def seed(request, run=3):
        return EndpointTeacher(config, byte_level(), seed=run).body(request)["seed"]

    elsewhere = replace(request, prompt=replace(request.prompt, id="chain_sum/1"))
    assert seed(request) == seed(request)
    assert len({seed(request), seed(request, run=4), seed(replace(request, seed=1)), seed(elsewhere)}) == 4


@pytest.mark.parametrize("reason", ["length", "content_filter", "tool_calls", None])
def test_what_did_not_end_by_itself_is_unfinished(reason):
    with serving(lambda body, attempt: (200, json.dumps(completion(finish_reason=reason)))) as server:
        made = teacher(server.url)
        assert made.complete(requests_(1)) == [Reply("so 2", finished=False)]
    assert counted(made) == {"teacher/requests": 1, "teacher/unfinished": 1}


@pytest.mark.parametrize(
    "content", [b"\xff\xfe", b"[1]", b'"text"', b"{}", b'{"text": null}', b'{"text": 3}', b'{"text": " "}']
)
def test_a_damaged_cache_costs_its_own_request_and_not_the_others(content, tmp_path):
    with serving(lambda body, attempt: (200, json.dumps(completion("whole")))) as server:
        made = teacher(server.url, cache=str(tmp_path))
        made.complete(requests_(1))
        (file,) = tmp_path.rglob("*.json")
        file.write_bytes(content)
        made.take_counts()
        damaged, whole = made.complete(requests_(2))
    assert damaged.category == "cache" and f"{file} is damaged" in str(damaged) and whole == Reply("whole")
    assert counted(made) == {"teacher/error/cache": 1, "teacher/finished": 1, "teacher/requests": 1}


def test_a_reply_that_cannot_be_stored_is_not_lost(tmp_path, capsys):
    (tmp_path / "cache").write_text("a file, where the folder should be")
    with serving(lambda body, attempt: (200, json.dumps(completion()))) as server:
        made = teacher(server.url, cache=str(tmp_path / "cache" / "replies"))
        assert made.complete(requests_(3)) == [Reply("so 2")] * 3
    assert counted(made) == {"teacher/cache_failed": 3, "teacher/finished": 3, "teacher/requests": 3}
    assert capsys.readouterr().err.count("teacher.endpoint.cache: replies are not stored: ") == 1


def test_a_body_that_does_not_decode_is_asked_for_again():
    """httpx: a DecodingError, which is no TransportError."""

    def behave(body, attempt):
        broken = {"Content-Encoding": "gzip"} if body["prompt"][1] == 0 and attempt == 1 else {}
        return 200, json.dumps(completion()), broken

    with serving(behave) as server:
        made = teacher(server.url)
        assert made.complete(requests_(3)) == [Reply("so 2")] * 3
    counts = counted(made)
    assert (counts["teacher/fault/connection"], counts["teacher/retries"], counts["teacher/requests"]) == (1, 1, 4)
    broken = (200, "{}", {"Content-Encoding": "gzip"})
    refused = pytest.raises(ValueError, match=r"teacher\.endpoint: .*: DecodingError")
    with serving(lambda body, attempt: broken) as server, refused:
        teacher(server.url).check()


def test_what_nobody_foresaw_in_one_request_is_that_request_s_error(monkeypatch):
    monkeypatch.setenv("TEST_TEACHER_KEY", KEY)
    with serving(lambda body, attempt: (200, json.dumps(completion(f"reply {body['prompt'][1]}")))) as server:
        made = teacher(server.url)
        read = made._read

        def fragile(text):
            if "reply 1" in text:
                raise RuntimeError(f"no {KEY}")
            return read(text)

        made._read = fragile
        first, error, last = made.complete(requests_(3))
    assert (first, last) == (Reply("reply 0"), Reply("reply 2"))
    assert isinstance(error, TeacherError) and error.category == "unexpected"
    assert str(error) == "RuntimeError: no ***"
    expected = {"teacher/error/unexpected": 1, "teacher/fault/unexpected": 1}
    assert counted(made) == {**expected, "teacher/finished": 2, "teacher/requests": 3}


def test_a_cancellation_is_no_failure(monkeypatch):
    made = teacher("http://127.0.0.1:9/v1")

    async def cancelled(*arguments):
        raise asyncio.CancelledError

    monkeypatch.setattr(made, "_post", cancelled)
    with pytest.raises(asyncio.CancelledError):
        made.complete(requests_(2))


@pytest.mark.parametrize("usage", ["none", None, [], 3, {}, {"total_tokens": "7"}, {"total_tokens": None}])
def test_a_reply_without_a_count_of_tokens_is_a_reply(usage):
    answer = {"choices": completion()["choices"]} | ({} if usage == "none" else {"usage": usage})
    with serving(lambda body, attempt: (200, json.dumps(answer))) as server:
        made = teacher(server.url, max_total_tokens=5)
        assert made.complete(requests_(2)) == [Reply("so 2")] * 2
    assert counted(made) == {"teacher/finished": 2, "teacher/no_usage": 2, "teacher/requests": 2}


@pytest.mark.parametrize("text", ["", " \n", None])
@pytest.mark.parametrize("tokenizer", ["student", None])
def test_a_reply_without_text_is_empty(text, tokenizer):
    choice = {"text": text, "message": {"content": text}, "finish_reason": "stop"}
    with serving(lambda body, attempt: (200, json.dumps({"choices": [choice]}))) as server:
        made = teacher(server.url, tokenizer=tokenizer)
        (error,) = made.complete(requests_(1))
    assert isinstance(error, TeacherError) and error.category == "empty"
    assert counted(made) == {"teacher/error/empty": 1, "teacher/fault/empty": 1, "teacher/requests": 1}


def test_the_server_says_how_long_to_wait():
    def behave(body, attempt):
        return (429, "busy", {"Retry-After": "1"}) if attempt == 1 else (200, json.dumps(completion()))

    with serving(behave) as server:
        assert teacher(server.url, backoff_s=0.001).complete(requests_(1)) == [Reply("so 2")]
        first, second = server.times
    assert second - first >= 1.0


def test_the_wait_doubles_at_every_retry():
    """backoff_s, then twice that, each times a draw from [0.5, 1]."""
    with serving(lambda body, attempt: (500, "down")) as server:
        (error,) = teacher(server.url, backoff_s=0.2, retries=2).complete(requests_(1))
        first, second, third = server.times
    assert error.category == "server"
    assert second - first >= 0.1 and third - second >= 0.2


def test_a_wait_beyond_the_step_s_time_is_not_begun():
    with serving(lambda body, attempt: (429, "busy", {"Retry-After": "100"})) as server:
        start = time.monotonic()
        (error,) = teacher(server.url).complete(requests_(1))
        assert time.monotonic() - start < 30 and len(server.seen) == 1
    assert error.category == "rate_limit"


def test_as_many_requests_are_in_flight_as_concurrency_and_no_more():
    three = threading.Barrier(3)

    def behave(body, attempt):
        three.wait(20)  # with fewer in flight it breaks, and the request with it
        time.sleep(0.05)  # time for one too many to come
        return 200, json.dumps(completion())

    with serving(behave) as server:
        made = teacher(server.url, concurrency=3)
        assert made.complete(requests_(12)) == [Reply("so 2")] * 12
        assert server.most == 3


@pytest.mark.parametrize(
    ("prefix", "text", "expected"),
    [
        ("1 + 1 = 2\n", "\nso 2", "so 2"),  # the template stripped the line's end, and the model wrote it again
        ("1 + 1 = 2\n\n", "\n\nso 2", "so 2"),
        ("1 + 1 = 2\n", "\n\nso 2", "\nso 2"),
        ("1 + 1 = 2\n\n", "\nso 2", "\nso 2"),  # not what the prefix ended with: left as it is
        ("1 + 1 = 2\n", "so 2", "so 2"),
        ("1 + 1 =", " 2", " 2"),
    ],
)
def test_white_space_at_the_prefix_s_end_is_not_there_twice(prefix, text, expected, tmp_path):
    def behave(body, attempt):
        choice = {"text": text, "message": {"content": text}, "finish_reason": "stop"}
        return 200, json.dumps({"choices": [choice]})

    with serving(behave) as server:
        asked = [Request(prompt(), [70], prefix)]
        chat = teacher(server.url, tokenizer=None, cache=str(tmp_path))
        assert chat.complete(asked) == [Reply(expected)]
        assert chat.complete(asked) == [Reply(expected)] and chat.counts["cached"] == 1
        assert teacher(server.url).complete(asked) == [Reply(text)]  # of token ids nothing is stripped


def test_the_served_model_s_tokenizer_decides_the_route(tmp_path, capsys):
    for name, tokenizer in {"same": byte_level(), "other": sentencepiece()}.items():
        tokenizer.save_pretrained(tmp_path / name)
    same, other = (teacher("http://x/v1", tokenizer=str(tmp_path / name)) for name in ("same", "other"))
    assert same.sends_tokens and same._route == "completions"
    assert not other.sends_tokens and other._route == "chat/completions"
    said = "teacher: the endpoint gets {}\n"
    assert capsys.readouterr().out == said.format("the student's token ids") + said.format("messages and text prefixes")


def test_a_tokenizer_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"teacher\.endpoint\.tokenizer: .*nowhere cannot be loaded: "):
        teacher("http://x/v1", tokenizer=str(tmp_path / "nowhere"))


def test_the_server_s_own_words_are_passed_on_without_the_key(monkeypatch):
    monkeypatch.setenv("TEST_TEACHER_KEY", KEY)
    with serving(lambda body, attempt: (401, f"Incorrect API key provided: {KEY}")) as server:
        made = teacher(server.url)
        (error,) = made.complete(requests_(1))
        assert str(error) == "HTTP 401: Incorrect API key provided: ***" and error.category == "refused"
        assert len(server.seen) == 1  # asking again would not help
        with pytest.raises(ValueError, match=r"HTTP 401: Incorrect API key provided: \*\*\*"):
            made.check()


def test_a_key_from_a_file_ends_with_a_line_break_and_is_no_secret_less(monkeypatch):
    monkeypatch.setenv("TEST_TEACHER_KEY", f"{KEY}\n")
    with serving(lambda body, attempt: (200, json.dumps(completion()))) as server:
        assert teacher(server.url).complete(requests_(1)) == [Reply("so 2")]
        assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    monkeypatch.setenv("TEST_TEACHER_KEY", f"{KEY}\n{KEY}")
    with pytest.raises(ValueError, match="TEST_TEACHER_KEY holds what no HTTP header can carry") as refused:
        teacher("http://x/v1")
    assert KEY not in str(refused.value)


@pytest.mark.parametrize("key", ["1", "o", "text"])
def test_a_short_key_is_not_cut_out_of_the_teacher_s_words(key, monkeypatch):
    """A server of one's own takes any."""
    monkeypatch.setenv("TEST_TEACHER_KEY", key)
    with serving(lambda body, attempt: (200, json.dumps(completion("so 10 of text")))) as server:
        assert teacher(server.url).complete(requests_(1)) == [Reply("so 10 of text")]


def test_no_key_in_the_environment_sends_none(monkeypatch):
    monkeypatch.delenv("TEST_TEACHER_KEY", raising=False)
    with serving(lambda body, attempt: (200, json.dumps(completion()))) as server:
        teacher(server.url).complete(requests_(1))
        assert "Authorization" not in server.headers[0]


@pytest.mark.parametrize(
    ("limit", "message"), [({"max_requests": 3}, "max_requests=3"), ({"max_total_tokens": 20}, "max_total_tokens=20")]
)
def test_a_budget_that_is_spent_is_an_error_of_its_own(limit, message):
    with serving(lambda body, attempt: (200, json.dumps(completion(tokens=7)))) as server:
        made = teacher(server.url, concurrency=1, **limit)
        replies = made.complete(requests_(5))
        assert len(server.seen) == 3
    assert replies[:3] == [Reply("so 2")] * 3
    assert {str(error) for error in replies[3:]} == {f"teacher.endpoint.{message} is spent"}
    assert counted(made) == {"teacher/error/budget": 2, "teacher/finished": 3, "teacher/requests": 3}


def test_a_server_that_hangs_costs_its_own_requests_and_not_the_others():
    """`teacher.timeout_s` runs out: what has arrived by then is kept."""
    with serving(lambda body, attempt: None if body["prompt"][1] else (200, json.dumps(completion()))) as server:
        made = teacher(server.url, timeout_s=5.0, request_timeout_s=60.0)
        start = time.monotonic()
        replies = ask(made, requests_(4), 5.0)  # as the loop does: the teacher ends shortly before
        assert time.monotonic() - start < 15
    assert replies[0] == Reply("so 2") and [error.category for error in replies[1:]] == ["timeout"] * 3


def test_a_slow_look_up_of_the_server_s_name_costs_its_own_request(monkeypatch):
    """A resolver stalls in a thread that nobody can end; the replies that are there do not wait for it."""
    look_up, asked, go_on = socket.getaddrinfo, [], threading.Event()

    def stalls(host, *arguments, **named):
        asked.append(host)
        if len(asked) == 2:
            go_on.wait(30.0)
        return look_up(host, *arguments, **named)

    monkeypatch.setattr(socket, "getaddrinfo", stalls)
    with serving(lambda body, attempt: (200, json.dumps(completion()))) as server:
        made = teacher(server.url.replace("127.0.0.1", "localhost"), timeout_s=2.0, concurrency=2, retries=0)
        start = time.monotonic()
        replies = ask(made, requests_(6), 20.0)
        assert time.monotonic() - start < 15.0
        go_on.set()
    assert [type(reply) for reply in replies].count(Reply) == 5
    assert counted(made)["teacher/error/timeout"] == 1


def test_nobody_there():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        made = teacher(f"http://127.0.0.1:{held.getsockname()[1]}/v1", retries=1)
        (error,) = made.complete(requests_(1))
        assert error.category == "connection" and made.counts["fault/connection"] == 2
        with pytest.raises(ValueError, match=r"teacher\.endpoint: http://127.*ConnectError"):
            made.check()


def test_what_is_sent_holds_no_hint_and_no_answer():
    request = Request(prompt({"answer": "SECRET", "metadata": {"source_dataset": "x"}}), [70, 71], "12 + 7 = 19\n", 5)
    ids = teacher("http://x/v1").body(request)
    assert ids == {"model": "m", "max_tokens": 16, "temperature": 0.0, "prompt": [5, 6, 7, 70, 71]}
    narrow = replace(request, room=3)  # in the student's tokens, which the other route does not count in
    assert teacher("http://x/v1").body(narrow)["max_tokens"] == 3
    assert teacher("http://x/v1").body(replace(request, room=99))["max_tokens"] == 16
    assert teacher("http://x/v1", tokenizer=None).body(narrow)["max_tokens"] == 16
    chat = teacher("http://x/v1", tokenizer=None, temperature=0.5).body(request)
    assert chat.pop("seed") >= 0
    assert chat == {
        "model": "m", "max_tokens": 16, "temperature": 0.5, "continue_final_message": True,
        "add_generation_prompt": False,
        "messages": [{"role": "user", "content": "question"}, {"role": "assistant", "content": "12 + 7 = 19\n"}],
    }  # fmt: skip
    fresh = teacher("http://x/v1", tokenizer=None).body(Request(request.prompt, [], ""))
    assert fresh["messages"] == [{"role": "user", "content": "question"}] and "continue_final_message" not in fresh


def test_a_server_that_can_do_neither_is_refused():
    """It ignores the flag: a prompt is as long with it as without. And one that takes token ids for text."""
    with serving(lambda body, attempt: (200, json.dumps(completion()))) as server:
        with pytest.raises(ValueError, match=r"\(chat/completions\): ignores continue_final_message"):
            teacher(server.url, tokenizer=None).check()
        with pytest.raises(ValueError, match=r"\(completions\): read \d+ token ids as 3 tokens"):
            teacher(server.url).check()


def test_a_whole_run_with_published_roles(tmp_path, monkeypatch):
    """Math-Shepherd and a server: every repair asked for is accounted for, and the key is in no file of the run."""
    tiny_prms.causal(tmp_path, "math-shepherd")

    def solve(body, attempt):
        if attempt == 1 and len(body["prompt"]) % 3 == 0:
            return 500, "busy"
        return 200, json.dumps(completion("1 + 1 = 2. Answer: 2"))

    with serving(solve) as server:
        settings = {
            "steps": 2, "out": tmp_path / "run", "rollout.engine": "transformers", "rollout.prompts_per_step": 8,
            "rollout.group_size": 4, "evaluation.prompts": 4, "evaluation.samples": 1, "prm.kind": "math-shepherd",
            "prm.path": tmp_path, "prm.tau": 0.0, "teacher.kind": "endpoint", "teacher.endpoint.url": server.url,
            "teacher.endpoint.model": "m", "teacher.endpoint.tokenizer": "student", "teacher.endpoint.backoff_s": 0.01,
            "teacher.endpoint.cache": tmp_path / "run" / "replies", "scope.repair_below": 1.0,
            "teacher.endpoint.key_variable": "TEST_TEACHER_KEY",
        }  # fmt: skip
        arguments = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
        monkeypatch.setattr(EndpointTeacher, "check", lambda self: None)  # this server counts no tokens
        monkeypatch.setenv("TEST_TEACHER_KEY", KEY)
        assert train.main(arguments) == 0
        sent = len(server.seen)
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [step for step in steps if "scope/selected" in step]
    assert (
        sum(step.get("teacher/requests", 0) for step in steps)
        == sent
        > sum(step["scope/selected"] for step in steps)
        > 0
    )
    for step in steps:
        assert step["prm/invalid"] == 0
        assert step["scope/selected"] == step["scope/accepted"] + step["scope/rejected"] + step["teacher/errors"]
        assert step.get("teacher/finished", 0) + step.get("teacher/cached", 0) == step["scope/repaired"]
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert len(files) > 8 and not [file for file in files if KEY.encode() in file.read_bytes()]


# A real server: one, for all that follows.

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n---\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@pytest.fixture(scope="module")
def vllm_server(tmp_path_factory):
    """(url, model, tokenizer, folder) of `vllm.entrypoints.openai.api_server` on a tiny model."""
    pytest.importorskip("vllm")
    folder = tmp_path_factory.mktemp("served")
    model, tokenizer = tiny_models.make(), byte_level().__class__.from_pretrained(_saved(byte_level(), folder))
    for settings in (model.config, model.generation_config):
        settings.eos_token_id = tokenizer.eos_token_id
        settings.bos_token_id = None
    tokenizer.chat_template = TEMPLATE
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    port = free_port()
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    arguments = ["--model", str(folder), "--served-model-name", "m", "--port", str(port), "--host", "127.0.0.1"]
    log = open(folder / "log", "w")  # noqa: SIM115  the process owns it
    process = subprocess.Popen(
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments, "--enforce-eager",
         "--dtype", "float32", "--max-model-len", "256", "--api-key", KEY],
        env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        _wait(f"http://127.0.0.1:{port}/health", process, folder / "log")
        yield f"http://127.0.0.1:{port}/v1", model, tokenizer, folder
    finally:
        process.terminate()
        process.wait(60)
        log.close()


def _saved(tokenizer, folder):
    tokenizer.save_pretrained(folder)
    return folder


def _wait(url, process, log, limit_s=240):
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(url, timeout=2)
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    raise AssertionError(f"no server after {limit_s} s: {log.read_text()[-3000:]}")


@torch.no_grad()
def greedy(model, ids, count, eos):
    out = list(ids)
    for _ in range(count):
        out.append(model(torch.tensor([out])).logits[0, -1].argmax().item())
        if out[-1] == eos:
            break
    return out[len(ids) :]


@pytest.mark.parametrize("route", ["tokens", "chat"])
def test_a_real_server_goes_on_from_the_prefix(vllm_server, route, monkeypatch):
    monkeypatch.setenv("TEST_TEACHER_KEY", KEY)
    url, model, tokenizer, folder = vllm_server
    made = teacher(url, tokenizer=str(folder) if route == "tokens" else None, request_timeout_s=60.0)
    assert made.sends_tokens is (route == "tokens")
    made.check()
    prefixes = ["12 + 7 = 19\n", "1 + 1 = 2\n2 + 3 ="]
    asked = [Request(prompt(ids=(5, 6, 7), text="1 + 1?"), tokenizer.encode(p), p) for p in prefixes]
    replies = ask(made, asked, 120.0)
    for request, reply in zip(asked, replies, strict=True):
        ids = [*request.prompt.ids, *request.prefix_ids]
        if route == "chat":
            ids = tokenizer.encode(f"user: 1 + 1?\n---\nassistant: {request.prefix}")
        truth = greedy(model, ids, 16, tokenizer.eos_token_id)
        assert isinstance(reply, Reply), reply
        text = tokenizer.decode(truth, skip_special_tokens=True)
        assert reply.text.rstrip("\ufffd") == text.rstrip("\ufffd")  # vLLM holds a half character back at the end
        assert reply.finished is (truth[-1] == tokenizer.eos_token_id)


def test_a_real_server_s_refusals_are_told(vllm_server, monkeypatch):
    url, *_ = vllm_server
    monkeypatch.setenv("TEST_TEACHER_KEY", "sk-wrong")
    (error,) = teacher(url, request_timeout_s=60.0).complete(requests_(1))
    assert error.category == "refused" and "HTTP 401" in str(error)
    monkeypatch.setenv("TEST_TEACHER_KEY", KEY)
    long = Request(prompt(ids=(5,) * 300), [], "")
    (error,) = teacher(url, request_timeout_s=60.0).complete([long])
    assert error.category == "refused" and "HTTP 400" in str(error)


def test_a_real_server_ends_by_itself_or_at_the_budget(vllm_server, monkeypatch):
    monkeypatch.setenv("TEST_TEACHER_KEY", KEY)
    url, *_ = vllm_server
    made = teacher(url, temperature=1.0, max_tokens=150, request_timeout_s=60.0)
    replies = made.complete([Request(prompt(ids=(5, 6)), [70], "x", seed) for seed in range(40)])
    counts = counted(made)
    assert counts["teacher/finished"] + counts["teacher/unfinished"] == 40 == counts["teacher/requests"]
    assert counts["teacher/finished"] == sum(reply.finished for reply in replies) > 0 < counts["teacher/unfinished"]
    assert len({reply.text for reply in replies}) > 30  # each request has a seed of its own
