"""The engine over a vLLM server: HTTP that hangs or breaks on plain sockets, then one real server, used by all tests in
the order of the file, synced, switched in flight, killed and brought back."""

import http.server
import json
import os
import resource
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from factories import token_versions
from fixtures.server_core import processes_of, slowed
from tiny_models import make, perturb, response_logprobs

from scope_fast.rollout import (
    EngineOptions,
    Sampling,
    make_engine,
    server_process,
    transfer,
    vllm_process,
    vllm_server,
)
from scope_fast.rollout.base import joined_spans
from scope_fast.rollout.server_process import (
    Http,
    ServerDiedError,
    ServerProcess,
    server_arguments,
    server_environment,
)
from scope_fast.rollout.server_sync import HostCopy, json_safe
from scope_fast.rollout.vllm_engine import VllmEngine
from scope_fast.rollout.vllm_server import VllmServerEngine
from scope_fast.rollout.weight_sync import ModuleSource, ShmInit

needs_vllm = pytest.mark.skipif(not vllm_process.is_installed(), reason="vllm is not installed")
GAP = 2e-5  # as in test_rollout.py
CONTEXT = 512
PROMPTS = [[5, 6, 7], [9], list(range(3, 203))]  # the last is longer than a block of the prefix cache
OPTIONS = EngineOptions(max_model_len=CONTEXT, max_num_seqs=16, num_threads=1)


class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/weight_info":
            self.answer({"weight_version": self.server.version})
            return
        if self.path == "/hang":
            self.server.released.wait(30)
            return
        if self.path == "/break":
            self.connection.close()
            return
        body = b'{"path": "%s"}' % self.path.encode() if self.path != "/empty" else b""
        self.send_response(500 if self.path == "/error" else 200)
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        """A server that takes a weight sync, or hangs in one phase of it, and samples one token from what it has."""
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or "null")
        if self.path == "/inference/v1/generate" and body["token_ids"] == self.server.refuses:
            self.send_error(400, "refused")
            return
        if self.server.hangs_at and self.path.startswith(self.server.hangs_at):
            self.server.released.wait(30)
            return
        if self.path in ("/update_weight_version", "/finish_weight_update"):
            self.server.version = body.get("new_version", body.get("weight_version"))
        if self.path == "/inference/v1/generate":
            spans = [{"version": self.server.version, "start": 0, "end": 1}]
            logprobs = {"content": [{"token_id": 7, "logprob": -1.0}]}
            choice = {"token_ids": [7], "logprobs": logprobs, "finish_reason": "stop", "weight_versions": spans}
            self.answer({"choices": [choice]})
        else:
            self.answer({"success": True})

    def answer(self, body):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *arguments):
        pass


@pytest.fixture
def http_server():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.released, server.hangs_at, server.version, server.refuses = threading.Event(), None, "default", None
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


def test_http_says_what_went_wrong(http_server):
    http = Http(http_server.url)
    assert http.get("fine", 5.0) == {"path": "/fine"}
    assert http.get("empty", 5.0) is None
    with pytest.raises(RuntimeError, match=r"GET /error: status 500: \{\"path\": \"/error\"\}"):
        http.get("error", 5.0)
    with pytest.raises(TimeoutError, match=r"GET /hang: the server gave no answer within 0.2 s"):
        http.get("hang", 0.2)
    with pytest.raises(ServerDiedError, match="GET /break: RemoteDisconnected"):
        http.get("break", 5.0)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(ServerDiedError, match="POST /x: ConnectionRefusedError"):
            Http(f"http://127.0.0.1:{unused.getsockname()[1]}").post("x", {}, 5.0)


def test_a_server_that_is_too_old_is_refused_by_name():
    """0.31 says nothing of versions, and of its tokens only the text."""
    choice = {"token_ids": [7], "logprobs": {"content": [{"token": "x", "logprob": -1.0}]}, "finish_reason": "stop"}
    with pytest.raises(RuntimeError, match=r"no weight_versions: vllm 0\.32 or newer is needed"):
        vllm_server._rollout([1], choice)


@pytest.mark.parametrize(
    ("hangs_at", "phase"),
    [
        ("/pause", "pause"), ("/init", "init"), ("/start", "start"), ("/update_weights", "update of bucket 0"),
        ("/finish", "finish"),
    ],
)  # fmt: skip
def test_a_hanging_sync_names_rank_and_phase(hangs_at, phase, http_server, tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    # of every call before the hanging one too: on a machine with much to do 0.3 s were not enough for their answers
    options = EngineOptions(sync_timeout_s=3.0, server_url=http_server.url)
    engine = VllmServerEngine(str(tmp_path), options)
    http_server.hangs_at = hangs_at
    with pytest.raises(TimeoutError, match=f"weight sync: rank 0, {phase}: POST .* no answer within 3 s"):
        engine.update_weights(model, 1)
    with pytest.raises(RuntimeError, match="neither old nor new"):
        engine.generate([[5]], 1, Sampling())
    engine.close()


def test_a_shared_servers_old_weights_are_no_version_of_this_run(http_server, tmp_path):
    """An earlier run left its version 0 there: no rank may take it for this run's."""
    model = make()
    model.save_pretrained(tmp_path)
    http_server.version = "0"
    options = EngineOptions(server_url=http_server.url)
    sender, late = VllmServerEngine(str(tmp_path), options), VllmServerEngine(str(tmp_path), options, ShmInit(rank=1))
    early = VllmServerEngine(str(tmp_path), replace(options, sync_timeout_s=3.0), ShmInit(rank=1))
    with pytest.raises(RuntimeError, match="sent version 0, the engine reports 'from before the first sync'"):
        early.update_weights(model, 0)
    for engine in (sender, late):
        with pytest.raises(RuntimeError, match="the server at server_url has no weights of this run yet"):
            engine.generate([[5]], 1, Sampling())
    sender.update_weights(model, 0)
    late.update_weights(model, 0)
    for engine in (sender, late):
        [[rollout]] = engine.generate([[5]], 1, Sampling())
        assert (rollout.token_ids, rollout.weight_version) == ([7], 0)
    for engine in (sender, early, late):
        engine.close()


def test_close_ends_the_requests_that_wait(http_server, tmp_path):
    """A server that stays paused after a failed sync answers none; their threads would keep the interpreter."""
    model = make()
    model.save_pretrained(tmp_path)
    engine = VllmServerEngine(str(tmp_path), EngineOptions(server_url=http_server.url, max_num_seqs=2))
    engine.update_weights(model, 0)
    http_server.hangs_at = "/inference"
    with ThreadPoolExecutor(1) as threads:
        sampled = threads.submit(engine.generate, [[5]], 9, Sampling())  # four wait for an answer, five for a thread
        deadline = time.monotonic() + 10.0
        while len(engine._sampling_http._sockets) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        start = time.monotonic()
        engine.close()
        # a request that was sent, was about to be, or had no connection yet
        reasons = "RemoteDisconnected|BrokenPipeError|ConnectionAbortedError"
        with pytest.raises(ServerDiedError, match=f"POST /inference/v1/generate: ({reasons})"):
            sampled.result(timeout=10.0)
    assert time.monotonic() - start < 5.0  # with all threads joined, where the server would hang for 30
    assert engine._http._sockets == engine._sampling_http._sockets == set()
    with pytest.raises(ServerDiedError, match="GET /fine: ConnectionAbortedError: closed on this side"):
        engine._http.get("fine", 5.0)


def test_a_request_that_fails_ends_those_that_wait(http_server, tmp_path):
    """The last of nine is refused; the eight before it, whose answers are asked for first, would hang for 30 s."""
    model = make()
    model.save_pretrained(tmp_path)
    engine = VllmServerEngine(str(tmp_path), EngineOptions(server_url=http_server.url, max_num_seqs=5))
    engine.update_weights(model, 0)
    http_server.refuses, http_server.hangs_at = [6], "/inference"
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"(?s)POST /inference/v1/generate: status 400: .*refused"):
        engine.generate([[5]] * 8 + [[6]], 1, Sampling())
    assert time.monotonic() - start < 15.0
    http_server.hangs_at = None
    assert [rollout.token_ids for (rollout,) in engine.generate([[5]] * 2, 1, Sampling())] == [[7]] * 2  # and goes on
    engine.close()


def test_too_many_open_files_name_the_setting(http_server, tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
        engine = VllmServerEngine(str(tmp_path), EngineOptions(server_url=http_server.url, max_num_seqs=100))
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(200 + vllm_server.OTHER_FILES, hard), hard)
        engine.update_weights(model, 0)
        with socket.socket() as lowest_free:
            limit = lowest_free.fileno()
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        with pytest.raises(OSError, match=r"Too many open files: lower rollout\.max_num_seqs, or raise") as caught:
            engine._http.get("fine", 5.0)
        assert not isinstance(caught.value, ServerDiedError)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    engine.close()


class Process:
    """A `ServerProcess` that has died whenever it is asked; `http_server` answers for it and for what follows it."""

    url = pid = None

    def __init__(self, arguments, environment, log, timeout_s):
        pass

    def has_died(self, within_s=0.0):
        return True

    def last_words(self, lines=30):
        return "out of memory"

    def stop(self):
        pass


def dying_once(engine, monkeypatch):
    """The engine's next request fails as one to a dead server does."""
    one, failures = engine._one, [ServerDiedError("refused")]
    monkeypatch.setattr(engine, "_one", lambda *request: one(*request) if not failures else raised(failures.pop()))


def raised(error):
    raise error


def test_a_restart_ends_the_old_sender(http_server, tmp_path, monkeypatch):
    """It may hold a communicator with workers that are gone. The new one sends the last sync's weights."""
    model = make()
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(vllm_server, "ServerProcess", Process)
    monkeypatch.setattr(Process, "url", http_server.url)
    engine = VllmServerEngine(str(tmp_path), EngineOptions())
    engine.update_weights(model, 3)
    old, ended = engine._sender, []
    monkeypatch.setattr(old, "shutdown", lambda: ended.append("shut down"))
    dying_once(engine, monkeypatch)
    [[rollout]] = engine.generate([[5]], 1, Sampling())
    assert rollout.weight_version == 3
    assert ended == ["shut down"]
    assert engine._sender is not old
    dying_once(engine, monkeypatch)
    with pytest.raises(ServerDiedError, match="no restart is left"):
        engine.generate([[5]], 1, Sampling())
    engine.close()


def test_close_during_a_restart_leaves_no_server(http_server, tmp_path, monkeypatch):
    """Another thread's restart is not waited for: it ends what it has started itself."""
    make().save_pretrained(tmp_path)
    starting, closed, stopped = threading.Event(), threading.Event(), []

    class Watched(Process):
        url = http_server.url

        def stop(self):
            stopped.append(self)

    class Slow(Watched):
        def __init__(self, *arguments):
            starting.set()
            assert closed.wait(30)

    monkeypatch.setattr(vllm_server, "ServerProcess", Watched)
    engine = VllmServerEngine(str(tmp_path), EngineOptions())
    first = engine._process
    monkeypatch.setattr(vllm_server, "ServerProcess", Slow)
    dying_once(engine, monkeypatch)
    with ThreadPoolExecutor(1) as threads:
        sampled = threads.submit(engine.generate, [[5]], 1, Sampling())
        assert starting.wait(30)
        engine.close()
        closed.set()
        with pytest.raises(ServerDiedError, match="the engine was closed while it started again"):
            sampled.result(timeout=30)
    assert stopped[0] is first
    assert engine._process is not first and stopped[-1] is engine._process


@needs_vllm
def test_ipc_of_several_ranks_is_never_restarted(http_server, tmp_path, monkeypatch):
    """vLLM's sender would wait in a collective for the ranks whose servers live."""
    make().save_pretrained(tmp_path)
    monkeypatch.setattr(vllm_server, "ServerProcess", Process)
    monkeypatch.setattr(Process, "url", http_server.url)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    ipc = transfer.for_server(EngineOptions(transfer="ipc"), 0, on_gpu=True)[0]
    engine = VllmServerEngine(str(tmp_path), EngineOptions(), ipc)
    dying_once(engine, monkeypatch)
    with pytest.raises(ServerDiedError, match=r"(?s)died in generate, no restart is left.*out of memory"):
        engine.generate([[5]], 1, Sampling())
    engine.close()
    with pytest.raises(ValueError, match="transfer='ipc': several ranks cannot share the server at server_url"):
        VllmServerEngine(str(tmp_path), EngineOptions(server_url=http_server.url), ipc)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://nowhere.invalid:8000"])
def test_a_server_that_is_not_there_is_named(url, tmp_path):
    make().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=rf"rollout\.server_url: {url} is no vLLM server to train with: POST /update"):
        VllmServerEngine(str(tmp_path), EngineOptions(server_url=url))


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://"])
def test_a_url_that_is_none(url):
    with pytest.raises(ValueError, match="expected http://HOST:PORT"):
        Http(url)


def test_spans_cover_a_response_once():
    assert joined_spans([("3", 0, 2), ("4", 2, 5)], 5) == ((3, 0, 2), (4, 2, 5))
    for spans in ([("3", 0, 2)], [("3", 1, 5)], [("3", 0, 2), ("4", 3, 5)], [("default", 0, 5)], []):
        with pytest.raises(RuntimeError, match="for 5 tokens"):
            joined_spans(spans, 5)


def test_a_host_copy_is_a_copy():
    model, copy = make(tied=True), HostCopy()
    copy.fill(ModuleSource(model), 1)
    before = dict(copy)
    assert [meta.name for meta in copy.metadata()] == [name for name, _ in ModuleSource(model)]
    kept = {name: tensor.clone() for name, tensor in copy}
    perturb(model, seed=1)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in copy)
    copy.fill(ModuleSource(model), 2)
    assert all(torch.equal(tensor, dict(ModuleSource(model))[name]) for name, tensor in copy)
    assert all(tensor is before[name] for name, tensor in copy)  # in the same memory


@needs_vllm
def test_ipc_handles_travel_as_vllm_takes_them(monkeypatch):
    from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferUpdateInfo

    environment = server_environment(EngineOptions(num_threads=2), "ipc")
    assert environment == {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1", "OMP_NUM_THREADS": "2"}
    assert server_environment(EngineOptions(), "shm") == {}
    two = EngineOptions(server_gpus=(4, 5), max_model_len=CONTEXT)
    arguments = server_arguments("folder", two, "nccl")
    assert arguments[arguments.index("--tensor-parallel-size") + 1] == "2"
    monkeypatch.setattr("vllm.envs.VLLM_ALLOW_INSECURE_SERIALIZATION", True, raising=False)  # read once a process
    update = {"names": ["w"], "dtype_names": ["float32"], "shapes": [[2]], "tensor_sizes": [8]}
    sent = json.loads(json.dumps(json_safe(update | {"ipc_handles": {"GPU-1": (b"handle", 3)}})))
    assert IPCWeightTransferUpdateInfo(**sent).ipc_handles == {"GPU-1": (b"handle", 3)}
    assert json_safe(update) is update


@needs_vllm
@pytest.mark.parametrize(("bucket_bytes", "expected"), [(1 << 10, 300 * 128 * 4), (64 << 20, 64 << 20)])
def test_ipcs_buffer_holds_the_largest_tensor(bucket_bytes, expected, http_server, tmp_path, monkeypatch):
    """vLLM refuses a larger one; the embedding of a small model is 272 MB."""
    from vllm.distributed.weight_transfer import WeightTransferTrainerFactory

    handed = []
    monkeypatch.setattr(WeightTransferTrainerFactory, "trainer_init", lambda init, **_: handed.append(init))
    model = make()
    model.save_pretrained(tmp_path)
    assert max(p.numel() for p in model.parameters()) == 300 * 128
    init = transfer.for_server(EngineOptions(transfer="ipc", bucket_bytes=bucket_bytes), 0, on_gpu=True)[0]
    engine = VllmServerEngine(str(tmp_path), EngineOptions(server_url=http_server.url), init)
    engine._weights.fill(ModuleSource(model), 1)
    engine._make_sender()
    assert [(made.backend, made.packed, made.packed_buffer_size_bytes) for made in handed] == [("ipc", True, expected)]
    engine.close()


@needs_vllm
def test_nccl_meets_at_a_port_of_its_own_at_every_start(monkeypatch):
    monkeypatch.setattr(transfer, "free_port", iter([21000, 21001]).__next__)
    nccl = transfer.for_server(EngineOptions(transfer="nccl"), 0, on_gpu=True)[0]
    first, second = (transfer.prepared(nccl, ModuleSource(make())) for _ in range(2))
    assert (first.master_port, second.master_port) == (21000, 21001)
    assert replace(first, master_port=21001) == second


@pytest.mark.parametrize(
    ("visible", "gpus", "names"),
    [
        (None, (1, 2), "1,2"), ("4,5", (1,), "5"), ("4, 5", (1, 0), "5,4"), ("GPU-a,GPU-b", (1,), "GPU-b"),
        ("MIG-x", (0,), "MIG-x"),
    ],
)  # fmt: skip
def test_a_servers_gpus_are_those_of_this_process(visible, gpus, names, monkeypatch):
    show(visible, monkeypatch)
    assert server_environment(EngineOptions(server_gpus=gpus), "nccl") == {"CUDA_VISIBLE_DEVICES": names}


@pytest.mark.parametrize(
    ("visible", "gpus", "seen"), [("4,5", (4, 5), 2), ("4,5", (-1,), 2), ("", (0,), 0), (None, (0, 3), 3)]
)
def test_a_gpu_that_this_process_does_not_see(visible, gpus, seen, monkeypatch):
    show(visible, monkeypatch)
    with pytest.raises(ValueError, match=rf"server_gpus=\[.*\]: expected devices below {seen}, with CUDA_VISIBLE"):
        server_environment(EngineOptions(server_gpus=gpus), "nccl")


def show(visible, monkeypatch):
    """A machine of three GPUs, with that CUDA_VISIBLE_DEVICES."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)


@needs_vllm
def test_what_a_server_inherits(monkeypatch):
    """The same, whether an engine was made in this process before or not."""
    ours = {"RANK": "1", "TORCHELASTIC_RUN_ID": "x", "HF_HOME": "/hub"}
    assert server_process._inherited(ours) == {"HF_HOME": "/hub"}
    vllm_process.import_vllm()  # vLLM sets some variables too, and will in the server
    for name in vllm_process.IN_PROCESS:
        monkeypatch.delenv(name, raising=False)
    before = server_process._inherited(os.environ)
    vllm_process.import_vllm()
    assert os.environ["VLLM_LOGGING_LEVEL"] == "ERROR"
    assert server_process._inherited(os.environ) == before
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")  # a person's own
    assert server_process._inherited(os.environ) == before | {"VLLM_LOGGING_LEVEL": "DEBUG"}


@needs_vllm
def test_a_server_that_cannot_start_says_why(tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)ended with status 2 at its start:.*no-such-argument"):
        ServerProcess(["--no-such-argument"], {}, tmp_path / "log", timeout_s=120.0)
    with pytest.raises(TimeoutError, match=r"not up within 0\.5 s"):
        ServerProcess([], {}, tmp_path / "log", timeout_s=0.5)


# One real server from here on.


@pytest.fixture(scope="module")
def model():
    return make(tied=True)


@pytest.fixture(scope="module")
def engine(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server") / "model"
    model.save_pretrained(folder)
    made = make_engine("vllm_server", str(folder), OPTIONS)
    yield made
    made.close()


def one_by_one(engine):
    """Greedy and sampled responses, a batch each, so that no neighbour changes the rounding."""
    drawn = []
    for i, prompt in enumerate(PROMPTS):
        greedy = engine.generate([prompt], 1, Sampling(temperature=0.0, max_tokens=12))
        sampled = engine.generate([prompt], 1, Sampling(max_tokens=12), [[i]])
        drawn += [(r.token_ids, r.logprobs) for groups in (greedy, sampled) for r in groups[0]]
    return drawn


def gap(model, rollout, start=0, end=None):
    """Largest difference to the learner's own log-probabilities over a range of the response."""
    return float((torch.tensor(rollout.logprobs) - response_logprobs(model, rollout))[start:end].abs().max())


def assert_gone(leader: int) -> None:
    """No process of the group is left, a moment after its end: what was killed is reaped by others."""
    deadline = time.monotonic() + 10.0
    while processes_of(leader) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_of(leader) == []


class Sampled(threading.Thread):
    """`engine.generate` on another thread; `mid_way` returns when the first of many responses is whole."""

    def __init__(self, engine, monkeypatch, requests):
        super().__init__()
        self.engine, self.requests, self.groups, self.first = engine, requests, [], threading.Event()
        one = engine._one

        def noted(*request):
            rollout = one(*request)
            self.first.set()
            return rollout

        monkeypatch.setattr(engine, "_one", noted)
        self.start()

    def run(self):
        seeds = [[i] for i in range(self.requests)]
        self.groups += self.engine.generate([[5, 6]] * self.requests, 1, Sampling(max_tokens=CONTEXT), seeds)

    def mid_way(self):
        assert self.first.wait(120)


@needs_vllm
def test_tokens_in_tokens_out(engine, model):
    assert engine.version == 0
    seeds = [[1, 2], [3, 4], [5, 6]]
    groups = engine.generate(PROMPTS, 2, Sampling(max_tokens=12, stop_token_ids=tuple(range(100, 130))), seeds)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for r in group:
            assert r.prompt_ids == prompt
            assert gap(model, r) < GAP
            assert (r.finish_reason == "stop") == (r.token_ids[-1] in (2, *range(100, 130)))
            assert token_versions(r) == [0] * len(r.token_ids)
        assert group[0].token_ids != group[1].token_ids
    with pytest.raises(ValueError, match=r"prompts\[0\] has 512 tokens"):
        engine.generate([[5] * CONTEXT], 1, Sampling())
    with pytest.raises(ValueError, match="version=-1"):
        engine.update_weights(model, -1)


@needs_vllm
def test_a_synced_server_equals_a_fresh_engine_bitwise(engine, model, tmp_path):
    drawn = [one_by_one(engine)]  # fills the prefix cache with the first weights
    for version in (1, 2):
        perturb(model, seed=version)
        engine.update_weights(model, version)
        assert engine.version == version
        drawn.append(one_by_one(engine))
    assert len({str(d) for d in drawn}) == 3
    model.save_pretrained(tmp_path / "export")
    fresh = VllmEngine(str(tmp_path / "export"), OPTIONS)
    assert one_by_one(fresh) == drawn[2]
    fresh.close()


@needs_vllm
def test_weights_switched_in_flight(engine, model, monkeypatch):
    """Every token's log-probability is exactly that of the version the engine says drew it."""
    old = make(tied=True)
    for _ in range(6):  # whatever the machine does beside it
        version = engine.version + 1
        old.load_state_dict(model.state_dict())
        with slowed(engine):
            sampled = Sampled(engine, monkeypatch, requests=128)  # eight times what is decoded at once
            sampled.mid_way()
            perturb(model, seed=version)
            engine.update_weights(model, version)
        sampled.join()
        rollouts = [group[0] for group in sampled.groups]
        if crossing := [r for r in rollouts if len(r.weight_versions) == 2]:
            break
    assert crossing, [r.weight_versions for r in rollouts]
    for r in crossing:
        (first, _, switch), (second, _, end) = r.weight_versions
        assert (first, second, end) == (version - 1, version, len(r.token_ids))
        assert r.weight_version == version
        assert gap(old, r, 0, switch) < GAP
        assert gap(model, r, switch) < GAP
    switches = [(r, r.weight_versions[0][2]) for r in crossing]
    assert max(gap(model, r, 0, switch) for r, switch in switches) > 0.01  # and not the other's
    assert max(gap(old, r, switch) for r, switch in switches) > 0.1


@needs_vllm
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="counts processes through /proc")
def test_a_killed_server_comes_back_once(engine, model, capfd, monkeypatch):
    before, first, version = one_by_one(engine), engine.pid, engine.version
    # more than the engine has in flight: some are answered at the kill, some in the server, some not yet sent
    requests = 3 * OPTIONS.max_num_seqs
    sampling, seeds = Sampling(max_tokens=48), [[i] for i in range(requests)]
    undisturbed = engine.generate([[5, 6]] * requests, 1, sampling, seeds)
    perturb(model, seed=9)  # the learner is ahead by now: it must not be asked again
    one, alive = engine._one, threading.Semaphore(1)

    def killing(*request):
        rollout = one(*request)
        if alive.acquire(blocking=False):
            os.kill(first, signal.SIGKILL)
        return rollout

    monkeypatch.setattr(engine, "_one", killing)
    drawn = engine.generate([[5, 6]] * requests, 1, sampling, seeds)
    perturb(model, seed=9)
    assert "vLLM server: died in generate; starting another" in capfd.readouterr().err
    assert [r.token_ids for g in drawn for r in g] == [r.token_ids for g in undisturbed for r in g]
    assert {r.weight_version for g in drawn for r in g} == {version} == {engine.version}
    assert one_by_one(engine) == before
    assert engine.pid != first
    assert_gone(first)

    second = engine.pid
    assert len(processes_of(second)) > 1
    os.kill(second, signal.SIGKILL)
    with pytest.raises(ServerDiedError, match="died in weight sync, no restart is left"):
        engine.update_weights(model, version + 1)
    with pytest.raises(RuntimeError, match="neither old nor new"):
        engine.generate([[5]], 1, Sampling())
    engine.close()
    engine.close()
    assert_gone(second)
    with pytest.raises(RuntimeError, match="the engine is closed"):
        _ = engine.version


def test_bad_options():
    with pytest.raises(ValueError, match=r"sync_timeout_s=0\.0: expected more than 0"):
        EngineOptions(sync_timeout_s=0.0)
