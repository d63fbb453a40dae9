"""Teachers: whatever one does wrong costs its requests an error with a message, never an exception or a hang."""

import threading
import time
from contextlib import ExitStack

import pytest
import tiny_models
import torch
from factories import byte_level, configured, prompt, sentencepiece

from scope_fast import build, build_checks
from scope_fast import config as cfg
from scope_fast.loading import check_shared_tokenizer
from scope_fast.rollout.base import Rollout
from scope_fast.scope.rectify import Rejected, splice
from scope_fast.tasks import TASKS
from scope_fast.teacher import ModelTeacher, Reply, Request, SolverTeacher, TeacherError, ask

CHAIN = {"answer": "15", "metadata": {"source_dataset": "chain_sum", "expression": "12 + 7 - 4"}}


class Teacher:
    """Does what it is given to do."""

    def __init__(self, action):
        self.complete = action


def request(prefix="", prefix_ids=(), entry=CHAIN, task="chain_sum", **changes):
    return Request(prompt(entry, task), list(prefix_ids), prefix, **changes)


def errors(replies):
    assert all(isinstance(reply, TeacherError) for reply in replies)
    return [str(reply) for reply in replies]


def raise_(error):
    raise error


@pytest.mark.parametrize(
    ("action", "message"),
    [
        (lambda requests: raise_(ConnectionError("no route")), "ConnectionError: no route"),
        (lambda requests: raise_(KeyError("x")), "KeyError: 'x'"),
        (lambda requests: raise_(TimeoutError("its own")), "TimeoutError: its own"),
        (lambda requests: None, "a NoneType to 2 requests"),
        (lambda requests: "ab", "a str to 2 requests"),
        (lambda requests: [], "0 replies to 2 requests"),
        (lambda requests: [Reply("a")] * 3, "3 replies to 2 requests"),
        (lambda requests: [None, None], "a NoneType instead of a reply"),
        (lambda requests: ["text", "text"], "a str instead of a reply"),
        (lambda requests: [Reply(""), Reply(" \n")], "empty reply"),
        (lambda requests: [Reply("a \ud83d"), Reply("\ude00")], "the reply holds half a character"),
    ],
)
def test_every_failure_becomes_an_error_with_its_message(action, message):
    assert errors(ask(Teacher(action), [request(), request()], 5.0)) == [message, message]


def test_a_failure_costs_only_its_own_request():
    replies = [Reply("a"), TeacherError("refused"), Reply(""), Reply("b", finished=False)]
    got = ask(Teacher(lambda requests: replies), [request()] * 4, 5.0)
    assert (got[0], got[3]) == (Reply("a"), Reply("b", finished=False))
    assert errors(got[1:3]) == ["refused", "empty reply"]


def test_a_hanging_teacher_is_given_up_on():
    release = threading.Event()
    start = time.monotonic()
    try:
        got = ask(Teacher(lambda requests: release.wait(60)), [request()] * 2, 0.2)
        assert time.monotonic() - start < 10  # generous: two cores are shared
        assert errors(got) == ["timed out after 0.2 s"] * 2
    finally:
        release.set()


def test_a_hanging_teacher_does_not_hold_the_exit():
    before, release = set(threading.enumerate()), threading.Event()
    try:
        ask(Teacher(lambda requests: release.wait(60)), [request()], 0.01)
        assert [t.daemon for t in threading.enumerate() if t not in before] == [True]
    finally:
        release.set()


def test_nothing_to_ask_asks_nobody():
    assert ask(Teacher(lambda requests: raise_(AssertionError)), [], 1.0) == []


def test_the_solver_goes_on_from_the_prefix():
    requests = [request(), request("12 + 7 = 19\n"), request("12 + 7 = 20\n\n")]
    assert ask(SolverTeacher(), requests, 5.0) == [
        Reply("12 + 7 = 19\n19 - 4 = 15. Answer: 15"),
        Reply("19 - 4 = 15. Answer: 15"),
        Reply("20 - 4 = 16. Answer: 16"),
    ]


def test_the_solver_writes_in_a_style_drawn_by_the_request_s_seed():
    teacher = SolverTeacher(["swapped", "worded"])
    replies = ask(teacher, [request("12 + 7 = 19\n", seed=seed) for seed in (4, 5)], 5.0)
    assert replies == [Reply("-4 + 19 = 15. Answer: 15"), Reply("take 4 from 19 = 15. Answer: 15")]


def test_the_solver_goes_on_in_the_prefix_s_own_style_where_asked():
    teacher = SolverTeacher(["swapped"], keep_style=True)
    prefixes = ["12 + 7 = 19\n", "7 + 12 = 18\n", "add 7 to 12 = 20\n", "makes = 19\n", ""]
    assert ask(teacher, [request(prefix) for prefix in prefixes], 5.0) == [
        Reply("19 - 4 = 15. Answer: 15"),
        Reply("-4 + 18 = 14. Answer: 14"),
        Reply("take 4 from 20 = 16. Answer: 16"),
        Reply("-4 + 19 = 15. Answer: 15"),
        Reply("7 + 12 = 19\n-4 + 19 = 15. Answer: 15"),
    ]


def test_a_solver_that_cannot_go_on_says_why():
    requests = [
        request("well then\n"),
        request("12 + 7 = 19\n19 - 4 = 15. Answer: 15\n"),
        request("12 + 7 = 19\n"),
        request(task="jsonl"),
    ]
    got = ask(SolverTeacher(), requests, 5.0)
    assert got[2] == Reply("19 - 4 = 15. Answer: 15")
    assert errors([*got[:2], got[3]]) == [
        "no value to go on from in 'well then'",
        "no step left after 2 lines",
        f"task 'jsonl' is not embedded; known: {', '.join(sorted(TASKS))}",
    ]


def test_a_row_that_only_bears_a_task_s_name_costs_its_own_repair():
    bare = {"answer": "1", "metadata": {"source_dataset": "chain_sum"}}
    strange = {"answer": "2", "metadata": {"source_dataset": "chain_sum", "expression": "5 + -3"}}
    requests = [Request(prompt(entry), [], "") for entry in (bare, strange)]
    first, second, third = ask(SolverTeacher(), [*requests, request("12 + 7 = 19\n")], 5.0)
    assert str(first) == "task 'chain_sum': the entry has no working (KeyError('expression'))"
    assert isinstance(second, TeacherError) and third == Reply("19 - 4 = 15. Answer: 15")


class Engine:
    """Answers every prompt with the same tokens, and remembers what it was asked."""

    vocab_size = 300

    def __init__(self, token_ids, finish_reason="stop"):
        self.token_ids, self.finish_reason, self.calls = token_ids, finish_reason, []
        self.late, self.timeouts, self.threads = (), [], []

    def generate(self, prompts, n, sampling, seeds=None, timeout_s=None):
        self.calls.append((prompts, n, sampling, seeds))
        self.timeouts.append(timeout_s)
        self.threads.append(threading.current_thread())
        count = len(self.token_ids)
        ended = [Rollout(p, self.token_ids, [-1.0] * count, self.finish_reason, 0) for p in prompts]
        return [[Rollout(p, [], [], "timeout", 0) if i in self.late else ended[i]] * n for i, p in enumerate(prompts)]


def model_teacher(engine, context=8, seed=3):
    settings = cfg.Teacher(kind="model", temperature=0.5, max_tokens=9, timeout_s=7.0)
    return ModelTeacher(engine, byte_level(), settings, context, seed)


def test_a_model_is_given_the_student_s_own_tokens():
    tokenizer = byte_level()
    engine = Engine([*tokenizer.encode("1 + 1"), tokenizer.eos_token_id])
    got = model_teacher(engine).complete([request("x", [70, 71]), request("y", [72])])
    assert got == [Reply("1 + 1"), Reply("1 + 1")]  # without the EOS, which `splice` appends
    ((prompts, n, sampling, seeds),) = engine.calls
    assert prompts == [[5, 6, 7, 70, 71], [5, 6, 7, 72]]
    assert (n, sampling.temperature, sampling.max_tokens) == (1, 0.5, 9)
    assert sampling.stop_token_ids == (tokenizer.eos_token_id,)
    assert [len(row) for row in seeds] == [1, 1]
    assert all(0 <= row[0] < 2**63 for row in seeds)


def test_a_model_s_special_tokens_in_the_middle_are_not_passed_over():
    """`splice` rejects them: left out of the text, nobody would know that they were written."""
    tokenizer = byte_level()
    (special,) = {1} & set(tokenizer.all_special_ids)
    engine = Engine([*tokenizer.encode("1"), special, *tokenizer.encode("2"), tokenizer.eos_token_id])
    (got,) = model_teacher(engine).complete([request("x", [70])])
    assert got == Reply("1" + tokenizer.convert_ids_to_tokens(special) + "2")
    with pytest.raises(Rejected, match="spells out a special token"):
        splice(tokenizer, [70], got.text, 9)


def test_a_model_that_does_not_come_to_an_end():
    (got,) = model_teacher(Engine([66, 67], "length")).complete([request("x", [70])])
    assert got == Reply(byte_level().decode([66, 67]), finished=False)


def test_a_prefix_that_fills_the_teacher_s_context():
    engine = Engine([66, 0])
    got = model_teacher(engine).complete([request("x", [70] * 5), request("y", [70] * 4)])
    assert errors(got[:1]) == ["the prefix fills the teacher's context"]
    assert got[1] == Reply(byte_level().decode([66]))
    assert engine.calls[0][0] == [[5, 6, 7, 70, 70, 70, 70]]
    assert errors(model_teacher(engine).complete([request("x", [70] * 9)])) == [
        "the prefix fills the teacher's context"
    ]
    assert len(engine.calls) == 1  # nothing fits: nothing is generated


def test_a_prefix_beyond_the_teacher_s_vocabulary_costs_itself():
    """Models of one tokenizer pad their embeddings to different sizes; an engine refuses the whole call."""
    engine = Engine([66, 0])
    beyond, fine = model_teacher(engine).complete([request("x", [300]), request("y", [299])])
    assert errors([beyond]) == ["the prefix holds token id 300, the teacher knows 300"]
    assert fine == Reply(byte_level().decode([66])) and engine.calls[0][0] == [[5, 6, 7, 299]]


def test_draws_depend_on_the_request_and_on_nothing_beside_it():
    def draws(*requests, seed=3, before=0):
        engine = Engine([66, 0])
        teacher = model_teacher(engine, seed=seed)
        for _ in range(before):
            teacher.complete([request()])
        teacher.complete(list(requests))
        return [row[0] for row in engine.calls[-1][3]]

    zero, one = draws(request(), request(seed=1))
    assert draws(request(seed=1), request(), before=3) == [one, zero]  # as on another rank, or after a resume
    assert len({zero, one, *draws(request(), seed=4)}) == 3


def test_a_model_that_is_late_costs_what_has_not_ended():
    """In the caller's thread: nothing goes on beside the student's engine."""
    engine = Engine([66, 0])
    engine.late = {1}
    got = ask(model_teacher(engine), [request(seed=seed) for seed in range(3)], 0.001)
    assert errors(got[1:2]) == ["timed out after 7 s"]  # its own time, which it was made with
    assert got[::2] == [Reply(byte_level().decode([66]))] * 2
    assert engine.timeouts == [7.0] and engine.threads == [threading.current_thread()]


def test_a_failed_call_costs_its_own_requests():
    engine = Engine([66, 0])
    teacher = model_teacher(engine)
    engine.generate, works = (lambda *arguments: raise_(MemoryError("full"))), engine.generate
    assert errors(ask(teacher, [request()], 5.0)) == ["MemoryError: full"]
    engine.generate = works
    assert ask(teacher, [request()], 5.0) == [Reply(byte_level().decode([66]))]


def test_token_ids_are_passed_on_only_between_like_tokenizers():
    check_shared_tokenizer(byte_level(), byte_level(), "teacher.path")
    with pytest.raises(ValueError, match=r"teacher\.path: its tokenizer differs from the student's"):
        check_shared_tokenizer(byte_level(), sentencepiece(), "teacher.path")


@pytest.fixture
def teacher_folder(tmp_path):
    """A tiny random model of the student's tokenizer, saved; (folder, model)."""
    model, tokenizer = tiny_models.make(), byte_level()
    for settings in (model.config, model.generation_config):
        settings.eos_token_id, settings.bos_token_id = tokenizer.eos_token_id, None
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return str(tmp_path), model


@torch.no_grad()
def greedy(model, ids, count, eos):
    out = list(ids)
    while len(out) < len(ids) + count and out[-1] != eos:
        out.append(model(torch.tensor([out])).logits[0, -1].argmax().item())
    return out[len(ids) :]


def test_a_model_goes_on_from_the_student_s_tokens(teacher_folder):
    """`build.make_teacher` with a real engine: the reply is the model's own greedy continuation."""
    folder, model = teacher_folder
    config = configured(**{"teacher.kind": "model", "teacher.path": folder, "teacher.max_tokens": 12})
    tokenizer = byte_level()
    prefixes = ["12 + 7 = 19\n", "12 + 7 ="]
    asked = [request(prefix, tokenizer.encode(prefix)) for prefix in prefixes]
    with ExitStack() as stack:
        replies = build.make_teacher(config, folder, tokenizer, stack).complete(asked)
    for one, reply in zip(asked, replies, strict=True):
        truth = greedy(model, [*one.prompt.ids, *one.prefix_ids], 12, tokenizer.eos_token_id)
        ended = truth[-1] == tokenizer.eos_token_id
        assert reply == Reply(tokenizer.decode(truth, skip_special_tokens=True), ended)
    assert replies[0].text != replies[1].text


def test_a_model_of_another_tokenizer_or_none_is_refused(tmp_path):
    sentencepiece().save_pretrained(tmp_path)
    for path, message in ((tmp_path, "its tokenizer differs from the student's"), (tmp_path / "no", ".*no cannot be")):
        config = configured(**{"teacher.kind": "model", "teacher.path": path})
        with pytest.raises(ValueError, match=rf"teacher\.path: {message}"):
            build_checks.check_teacher_tokenizer(config, str(path), byte_level())


def test_a_teacher_s_engine_is_told_what_it_may_use(teacher_folder, monkeypatch):
    folder, _ = teacher_folder
    seen = []

    class Engine:
        changes_transformers = False

        def close(self):
            pass

    def make_engine(kind, path, options, role):
        assert role == "teacher"
        seen.append((kind, options))
        return Engine()

    monkeypatch.setattr(build, "make_engine", make_engine)
    settings = {"rollout.kv_cache_gib": 0.5, "rollout.num_threads": 1, "teacher.gpu_memory_utilization": 0.15}
    config = configured(**{"teacher.kind": "model", "teacher.engine": "vllm", **settings})
    with ExitStack() as stack:
        build.make_teacher(config, folder, byte_level(), stack)
    ((kind, options),) = seen
    assert (kind, options.kv_cache_bytes, options.num_threads) == ("vllm", 1 << 29, 1)
    assert options.gpu_memory_utilization == 0.15 and options.max_model_len == config.rollout.context
    Engine.changes_transformers = True
    with ExitStack() as stack, pytest.raises(ValueError, match=r"teacher\.engine: vLLM serves .* take transformers"):
        build.make_teacher(config, folder, byte_level(), stack)
