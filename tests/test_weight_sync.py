"""Weight sync: the order of the protocol on fakes, then real vLLM against an engine freshly loaded from the weights."""

import dataclasses
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import make, perturb

from scope_fast.ops import weight_bucket
from scope_fast.rollout import EngineOptions, Sampling, transfer, vllm_process, weight_sync
from scope_fast.rollout.vllm_engine import VllmEngine
from scope_fast.rollout.watch import PhasedClient
from scope_fast.rollout.weight_sync import ModuleSource, ShmInit, ShmReceiver, ShmSender, ShmUpdate, ShmWorkerInit

needs_vllm = pytest.mark.skipif(not vllm_process.is_installed(), reason="vllm is not installed")


class FakeClient:
    """Records the calls and reads the shared file as a worker would."""

    def __init__(self):
        self.events = []
        self.received = []  # (name, private copy), over all buckets

    def init_weight_transfer_engine(self, init_info):
        self.events.append("init")
        self.path = init_info["path"]
        self.bucket = weight_sync._map(**init_info)

    def start_weight_update(self):
        self.events.append("start")

    def update_weights(self, update_info):
        self.events.append("update")
        pairs = weight_sync._unpack(ShmUpdate(**update_info), self.bucket)
        self.received += [(name, view.clone()) for name, view in pairs]

    def finish_weight_update(self, weight_version=None):
        self.events.append("finish")


class ListSource:
    """A source over named tensors that counts its passes."""

    def __init__(self, named):
        self.named = named
        self.passes = 0

    def metadata(self):
        return [weight_sync.ParamMeta(name, t.dtype, tuple(t.shape)) for name, t in self.named]

    def __iter__(self):
        self.passes += 1
        yield from self.named


def mixed_source():
    torch.manual_seed(0)
    return ListSource(
        [
            ("a", torch.randn(3, 5)),
            ("b", torch.randn(7).bfloat16()),
            ("c", torch.arange(4)),
            ("d", torch.randn(6, 4).t()),  # not contiguous
            ("e", torch.randn(())),
        ]
    )


def test_order_of_events_and_values():
    client, source = FakeClient(), mixed_source()
    sender = ShmSender.trainer_init(ShmInit(), client=client, source=source)
    assert client.events == ["init"]
    assert not Path(client.path).exists()  # both sides hold their maps: nothing is left behind, even by kill -9
    sender.send_weights()
    assert client.events == ["init", "start", "update", "finish"]
    source.named[0][1].add_(1.0)
    sender.send_weights()
    assert client.events[4:] == ["start", "update", "finish"]
    assert [name for name, _ in client.received] == ["a", "b", "c", "d", "e"] * 2
    for (_, got), (_, sent) in zip(client.received[5:], source.named, strict=True):
        assert got.dtype == sent.dtype
        assert torch.equal(got, sent)
    assert torch.equal(client.received[0][1] + 1.0, client.received[5][1])


def test_small_buckets():
    """Tensors take 128 bytes each (the alignment): two a bucket, and the file holds no more than that."""
    client, source = FakeClient(), mixed_source()
    sender = ShmSender.trainer_init(ShmInit(bucket_bytes=300), client=client, source=source)
    sender.send_weights()
    assert client.bucket.numel() == 300
    assert client.events == ["init", "start", "update", "update", "update", "finish"]
    assert all(torch.equal(got, sent) for (_, got), (_, sent) in zip(client.received, source.named, strict=True))


class OnGpu(torch.Tensor):
    """A CPU tensor that says it lies on a GPU and can only be copied to the host, all a sync needs."""

    @staticmethod
    def __new__(cls, held):
        kwargs = {"strides": held.stride(), "dtype": held.dtype, "device": "cuda:0"}
        made = torch.Tensor._make_wrapper_subclass(cls, held.shape, **kwargs)
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, op, types, args, kwargs=None):
        assert op is torch.ops.aten.copy_.default
        assert type(args[0]) is torch.Tensor
        return args[0].copy_(args[1].held)


@pytest.mark.parametrize("bucket_bytes", [300, 64 << 20])
def test_weights_on_a_gpu_into_the_file(bucket_bytes):
    client, source = FakeClient(), mixed_source()
    on_gpu = ListSource([(name, OnGpu(tensor)) for name, tensor in source.named])
    assert on_gpu.named[0][1].device.type == "cuda"
    ShmSender.trainer_init(ShmInit(bucket_bytes=bucket_bytes), client=client, source=on_gpu).send_weights()
    assert [name for name, _ in client.received] == ["a", "b", "c", "d", "e"]
    assert all(torch.equal(got, sent) for (_, got), (_, sent) in zip(client.received, source.named, strict=True))


@pytest.mark.gpu
def test_weights_really_on_a_gpu_into_the_file():
    client, source = FakeClient(), mixed_source()
    on_gpu = ListSource([(name, tensor.cuda()) for name, tensor in source.named])
    ShmSender.trainer_init(ShmInit(bucket_bytes=300), client=client, source=on_gpu).send_weights()
    assert all(torch.equal(got, sent) for (_, got), (_, sent) in zip(client.received, source.named, strict=True))


def test_parameters_travel_in_the_engines_dtype():
    """Cast before they are copied, integers as they are; what `metadata` says is what comes."""
    module = torch.nn.Linear(3, 2)
    module.steps = torch.nn.Parameter(torch.tensor([70_001]), requires_grad=False)
    source = weight_sync.as_source(module, torch.bfloat16)
    client = FakeClient()
    ShmSender.trainer_init(ShmInit(), client=client, source=source).send_weights()
    assert [(name, t.dtype, tuple(t.shape)) for name, t in client.received] == source.metadata()
    got = dict(client.received)
    assert torch.equal(got["weight"], module.weight.bfloat16())
    assert torch.equal(got["steps"], module.steps)


def test_the_bucket_fits_the_source():
    client = FakeClient()
    ShmSender.trainer_init(ShmInit(bucket_bytes=1), client=client, source=ListSource([("w", torch.zeros(100))]))
    assert client.bucket.numel() == 512  # 400 bytes, aligned to 128: the largest tensor
    ShmSender.trainer_init(ShmInit(bucket_bytes=1 << 30), client=client, source=mixed_source())
    assert client.bucket.numel() == 5 * 128  # never more than the whole model


def test_a_tensor_that_outgrew_the_bucket():
    client, source = FakeClient(), mixed_source()
    sender = ShmSender.trainer_init(ShmInit(), client=client, source=source)
    source.named.append(("big", torch.zeros(1000)))
    with pytest.raises(ValueError, match="big takes 4096 bytes, the bucket made for this source has 640"):
        sender.send_weights()


def test_other_ranks_only_read_along():
    client, source = FakeClient(), mixed_source()
    sender = ShmSender.trainer_init(ShmInit(rank=1), client=client, source=source)
    sender.send_weights()
    assert client.events == []
    assert source.passes == 1


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="the system cannot reserve pages")
def test_no_room_in_shared_memory(monkeypatch, tmp_path):
    def full(descriptor, offset, size):
        raise OSError(errno.ENOSPC, "No space left on device")

    created = []
    mkstemp = weight_sync.tempfile.mkstemp

    def recording(**kwargs):
        made = mkstemp(**{**kwargs, "dir": tmp_path})
        created.append(made[1])
        return made

    monkeypatch.setattr(weight_sync.tempfile, "mkstemp", recording)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="cannot hold 640 bytes of weights in flight; make it larger"):
        ShmSender.trainer_init(ShmInit(), client=FakeClient(), source=mixed_source())
    assert len(created) == 1
    assert not Path(created[0]).exists()


def test_a_tied_head_is_sent_under_its_own_name():
    model = make(tied=True)
    names = [name for name, _ in ModuleSource(model)]
    assert "lm_head.weight" in names
    assert "lm_head.weight" not in dict(model.named_parameters())  # which is what makes it easy to forget
    assert [meta.name for meta in ModuleSource(model).metadata()] == names


def test_receiver_makes_private_copies(tmp_path):
    """What the loader keeps must survive the next bucket in the same bytes."""

    class Model(torch.nn.Linear):
        kept = ()

        def load_weights(self, weights):
            self.kept += tuple(weights)
            return {name for name, _ in weights}

    class Receiver(ShmReceiver):
        def __init__(self):
            self.model, self.device = Model(2, 2), torch.device("cpu")
            self._missing = {"weight", "bias"}

    path = tmp_path / "bucket"
    path.write_bytes(bytes(256))
    bucket = weight_sync._map(str(path), 256)
    receiver = Receiver()
    receiver.init_transfer_engine(ShmWorkerInit(str(path), 256))
    for name, tensor in [("weight", torch.ones(2, 2)), ("bias", torch.zeros(2))]:
        _, (entry,) = weight_bucket.pack([tensor], out=bucket)
        receiver.receive_weights(ShmUpdate(**weight_sync._update([(name, entry)])))
    assert torch.equal(receiver.model.kept[0][1], torch.ones(2, 2))
    assert torch.equal(receiver.model.kept[1][1], torch.zeros(2))
    assert receiver._missing == set()


def test_what_fails_names_rank_and_phase():
    class Failing(FakeClient):
        def update_weights(self, update_info):
            if self.events.count("update"):
                raise RuntimeError("no room")
            super().update_weights(update_info)

        def finish_weight_update(self, weight_version=None):
            raise TimeoutError("no answer")

    client = PhasedClient(Failing(), rank=3)
    sender = ShmSender.trainer_init(ShmInit(bucket_bytes=300), client=client, source=mixed_source())
    with pytest.raises(RuntimeError, match="weight sync: rank 3, update of bucket 1: no room"):
        sender.send_weights()
    assert client.phase == "update of bucket 1"
    with pytest.raises(TimeoutError, match="weight sync: rank 3, finish: no answer"):
        client.finish_weight_update()
    client.start_weight_update()
    assert client.phase == "gather"  # what happens between two calls


HANGING = """
import time
from torch.distributed.elastic.multiprocessing.errors import record
from scope_fast.rollout.watch import PhasedClient, watchdog

class Client:
    def start_weight_update(self):
        time.sleep(60)

@record
def main():
    client = PhasedClient(Client(), rank=2)
    with watchdog(30.0, 2, lambda: client.phase):
        pass  # in time: nothing happens
    with watchdog(0.3, 2, lambda: client.phase):
        client.start_weight_update()

main()
"""


def test_a_call_that_hangs_ends_the_process(tmp_path):
    """As an engine of this process would, or NCCL: nothing in Python can interrupt those."""
    env = {**os.environ, "TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json")}
    done = subprocess.run([sys.executable, "-c", HANGING], env=env, capture_output=True, text=True, timeout=50)
    message = "weight sync: rank 2, start: not done within 0.3 s"
    assert done.returncode == 1
    assert f"{message}; ending the process" in done.stderr
    assert "in start_weight_update" in done.stderr  # where it hung
    assert json.loads((tmp_path / "error.json").read_text())["message"]["message"] == f"TimeoutError: {message}"


def test_bad_transfers():
    with pytest.raises(ValueError, match="transfer='nccl': the learner is on the CPU"):
        transfer.for_server(EngineOptions(transfer="nccl"), 0, on_gpu=False)
    with pytest.raises(ValueError, match="transfer='rdma': expected auto, shm, ipc, nccl"):
        EngineOptions(transfer="rdma")
    with pytest.raises(ValueError, match="server_gpus: the server at server_url has its own"):
        EngineOptions(server_url="http://node:8000", server_gpus=(1,))


def test_a_servers_transfer_on_cpu():
    init, reason = transfer.for_server(EngineOptions(bucket_bytes=1 << 20), rank=1, on_gpu=False)
    assert (init.backend, init.is_sender, init.bucket_bytes) == ("shm", True, 1 << 20)  # every rank's own server
    assert reason == "the learner is on the CPU"
    init, _ = transfer.for_server(EngineOptions(server_url="http://node:8000"), rank=1, on_gpu=False)
    assert not init.is_sender  # all share one: rank 0 sends


# Real vLLM from here on.


@needs_vllm
def test_init_objects_are_those_of_the_installed_vllm():
    """Nothing is sent, there is no GPU: the objects exist, vLLM knows their backends, and rank 1 needs no more."""
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory, WeightTransferTrainerFactory

    own = EngineOptions(server_gpus=(4, 5))
    away = EngineOptions(server_url="http://node:8000", server_workers=8, transfer_address="10.0.0.1")
    (ipc, why_ipc), (near, _), (nccl, why_nccl) = (
        transfer.for_server(options, 1, on_gpu=True) for options in (EngineOptions(), own, away)
    )
    assert (ipc.backend, ipc.packed, ipc.packed_buffer_size_bytes, ipc.is_sender) == ("ipc", True, 64 << 20, True)
    assert why_ipc == "learner and engine share a GPU" and why_nccl == "the engine has GPUs of its own"
    assert (near.backend, near.world_size, near.is_sender) == ("nccl", 3, True)
    assert (nccl.backend, nccl.world_size, nccl.master_address, nccl.packed) == ("nccl", 9, "10.0.0.1", True)
    assert nccl.packed_buffer_size_bytes * nccl.packed_num_buffers == 128 << 20
    assert not nccl.is_sender
    shm, why = transfer.for_server(EngineOptions(transfer="shm", bucket_bytes=1 << 20), 1, on_gpu=True)
    assert (shm.backend, shm.bucket_bytes, shm.is_sender, why) == ("shm", 1 << 20, True, "asked for")
    weight_sync.register()
    for made in (nccl, ipc, shm):
        assert made.backend in WeightTransferEngineFactory._registry
        assert made.backend in WeightTransferTrainerFactory._registry
    source = transfer.for_vllm(mixed_source())
    reader = WeightTransferTrainerFactory.trainer_init(nccl, client=FakeClient(), source=source)
    assert not reader.is_sender  # rank 1: no communicator, so this much runs without a GPU
    reader.send_weights()
    assert list(read(source)) == ["a", "b", "c", "d", "e"]


def read(source):
    """name -> tensor of a pass, as the installed vLLM makes it."""
    return dict(source.iter_full() if hasattr(source, "iter_full") else source)


class From033:
    """What vLLM's WeightSource is from 0.33 on, as far as its senders read one."""

    @property
    def metadata(self):
        raise NotImplementedError

    def iter_full(self):
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class ParamMetaFrom033:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    owners: tuple[int, ...] | None = None


@needs_vllm
def test_a_source_speaks_to_the_vllm_that_is_there(monkeypatch):
    """0.32 calls `metadata()` and iterates; 0.33 reads `metadata`, of what knows owners, and calls `iter_full`."""
    from vllm.distributed import weight_transfer

    source = mixed_source()
    monkeypatch.setattr(weight_transfer, "WeightSource", From033)
    monkeypatch.setattr(weight_transfer, "ParamMeta", ParamMetaFrom033)
    adapted = transfer.for_vllm(source)
    assert isinstance(adapted, From033) and adapted.metadata is adapted.metadata
    assert [(m.name, m.dtype, m.shape, m.owners) for m in adapted.metadata] == [(*m, None) for m in source.metadata()]
    for _ in range(2):
        for (name, tensor), (other, expected) in zip(adapted.iter_full(), source.named, strict=True):
            assert name == other and tensor is expected
    assert source.passes == 2
    monkeypatch.setattr(weight_transfer, "WeightSource", type("Until032", (), {}))
    assert transfer.for_vllm(source) is source


@needs_vllm
def test_a_vllm_that_is_too_old_is_refused_by_name(monkeypatch):
    from vllm.outputs import CompletionOutput

    fields = {name: f for name, f in CompletionOutput.__dataclass_fields__.items() if name != "weight_versions"}
    monkeypatch.setattr(CompletionOutput, "__dataclass_fields__", fields)
    with pytest.raises(ImportError, match=r"vllm \S+: vllm 0\.32 or newer is needed"):
        vllm_process.import_vllm()


# The last prompt is longer than a block of vLLM's KV cache (128 tokens on CPU), so that the prefix cache can hold it.
PROMPTS = [[5, 6, 7], [9], list(range(3, 203))]
OPTIONS = EngineOptions(max_model_len=256, num_threads=1)


def draw(engine):
    """Greedy and sampled responses, as plain values."""
    greedy = engine.generate(PROMPTS, 1, Sampling(temperature=0.0, max_tokens=16))
    sampled = engine.generate(PROMPTS, 2, Sampling(max_tokens=16), [[1, 2], [3, 4], [5, 6]])
    return [(r.token_ids, r.logprobs) for groups in (greedy, sampled) for group in groups for r in group]


def saved(model, folder):
    model.save_pretrained(folder)
    return str(folder)


def fresh_draw(model, folder, options):
    engine = VllmEngine(saved(model, folder), options)
    drawn = draw(engine)
    engine.close()
    return drawn


@needs_vllm
@pytest.mark.parametrize(
    ("tied", "dtype", "bucket_bytes"),
    [(True, "float32", 64 << 20), (False, "float32", 100_000), (True, "bfloat16", 100_000)],
)
def test_a_synced_engine_equals_a_fresh_one_bitwise(tied, dtype, bucket_bytes, tmp_path):
    """Several rounds of new weights, in one bucket and in many; two engines live in this process at the end."""
    options = EngineOptions(max_model_len=256, num_threads=1, dtype=dtype, bucket_bytes=bucket_bytes)
    model = make(tied=tied)
    engine = VllmEngine(saved(model, tmp_path / "first"), options)
    drawn = [draw(engine)]
    for version in (1, 2, 3):
        perturb(model, seed=version)
        engine.update_weights(model, version)
        assert engine.version == version
        drawn.append(draw(engine))
    assert len({str(d) for d in drawn}) == 4
    assert drawn[3] == fresh_draw(model, tmp_path / "last", options)
    assert draw(engine) == drawn[3]  # the other engine's end took nothing away from this one
    engine.close()
    engine.close()
    with pytest.raises(RuntimeError, match="the engine is closed"):
        engine.generate([[5]], 1, Sampling(max_tokens=1))
    with pytest.raises(RuntimeError, match="the engine is closed"):
        engine.update_weights(model, 4)
    assert not torch.distributed.is_initialized()  # the group was vLLM's, and it is gone with the last engine


@needs_vllm
def test_what_a_sync_must_not_forget(tmp_path, monkeypatch):
    """One engine, four sabotages in turn: each is either seen in the results or raises."""
    model = make(tied=True)
    engine = VllmEngine(saved(model, tmp_path / "first"), OPTIONS)
    events = record(engine, monkeypatch)
    draw(engine)  # fills the prefix cache with the first weights

    with monkeypatch.context() as patch:  # 1. the prefix cache is not reset: stale keys and values, wrong logprobs
        patch.setattr(engine._llm, "reset_prefix_cache", lambda: True)
        perturb(model, seed=1)
        engine.update_weights(model, 1)
        stale = draw(engine)
    engine.update_weights(model, 2)
    right = draw(engine)
    assert right != stale
    gap = max(abs(a - b) for a, b in zip(stale[2][1][:1], right[2][1][:1], strict=True))
    assert gap > 0.01  # not rounding: the first token's logprob after a cached prompt
    assert events == ["init", "start", "update", "finish", "start", "update", "finish", "reset"]

    with monkeypatch.context() as patch:  # 2. the prefix cache refuses
        patch.setattr(engine._llm, "reset_prefix_cache", lambda: False)
        with pytest.raises(RuntimeError, match="vLLM did not reset its prefix cache"):
            engine.update_weights(model, 3)
    with pytest.raises(RuntimeError, match="neither old nor new"):
        engine.generate([[5]], 1, Sampling(max_tokens=1))
    engine._version = 3

    with monkeypatch.context() as patch:  # 3. the engine ends at another version than was sent
        finish = engine._llm.finish_weight_update
        patch.setattr(engine._llm, "finish_weight_update", lambda version: finish("11"))
        with pytest.raises(RuntimeError, match="sent version 4, the engine reports '11'"):
            engine.update_weights(model, 4)
    engine._version = 4
    with pytest.raises(RuntimeError, match=r"sampled with weights \['11'\], expected version 4"):
        engine.generate([[5]], 1, Sampling(max_tokens=1))

    # 4. a tied head that is not sent under its own name would stay at the old weights
    without_head = ListSource([(name, tensor) for name, tensor in ModuleSource(model) if name != "lm_head.weight"])
    with pytest.raises(RuntimeError, match=r"left parameters without new values: \['lm_head.weight'\]"):
        engine.update_weights(without_head, 5)
    with pytest.raises(RuntimeError, match="neither old nor new"):
        _ = engine.version
    engine.close()


@needs_vllm
def test_the_engine_sleeps_from_its_rollouts_to_the_sync(tmp_path, monkeypatch):
    """On CPU vLLM's worker frees nothing, but the scheduler pauses and the order of the calls is the real one."""
    model = make()
    engine = VllmEngine(saved(model, tmp_path / "model"), EngineOptions(max_model_len=256, sleep_level=2))
    events = record(engine, monkeypatch)
    draw(engine)
    engine.sleep()
    engine.sleep()  # twice is once
    executor = engine._llm.llm_engine.engine_core.engine_core.model_executor
    assert executor.sleeping_tags == {"weights", "kv_cache"}
    with pytest.raises(RuntimeError, match="sleeps until the next update_weights"):
        engine.generate([[5]], 1, Sampling(max_tokens=1))
    perturb(model, seed=1)
    engine.update_weights(model, 1)
    assert events == ["sleep", "init", "wake weights", "start", "update", "finish", "reset", "wake kv_cache"]
    assert not executor.is_sleeping
    drawn = draw(engine)
    engine.close()
    assert drawn == fresh_draw(model, tmp_path / "last", OPTIONS)


def record(engine, monkeypatch):
    """The order of the calls an engine makes to vLLM in a sync."""
    events = []
    for name, label in [
        ("init_weight_transfer_engine", "init"),
        ("start_weight_update", "start"),
        ("update_weights", "update"),
        ("finish_weight_update", "finish"),
        ("reset_prefix_cache", "reset"),
        ("sleep", "sleep"),
        ("wake_up", "wake"),
    ]:
        call = getattr(engine._llm, name)

        def recorded(*args, _call=call, _label=label):
            events.append(f"wake {args[0][0]}" if _label == "wake" else _label)
            return _call(*args)

        monkeypatch.setattr(engine._llm, name, recorded)
    return events


@needs_vllm
def test_a_learners_process_group_survives_the_engine(tmp_path):
    """vLLM's own shutdown destroys the default group, whoever made it."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        engine = VllmEngine(saved(make(), tmp_path / "model"), OPTIONS)
        assert len(engine.generate([[5]], 1, Sampling(max_tokens=3))[0][0].logprobs) >= 1
        engine.close()
        ones = torch.ones(2)
        torch.distributed.all_reduce(ones)
        assert ones.tolist() == [1.0, 1.0]
    finally:
        torch.distributed.destroy_process_group()


@needs_vllm
def test_the_start_leaves_the_process_as_it_was(tmp_path, capfd):
    folder = saved(make(), tmp_path / "model")
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    before = (
        torch.set_num_threads,
        torch.get_num_threads(),
        os.environ.get("LD_PRELOAD"),
        os.environ.get("LOCAL_WORLD_SIZE"),
    )
    engine = VllmEngine(folder, OPTIONS)
    capfd.readouterr()
    assert torch.equal(torch.rand(4), expected)
    assert before == (
        torch.set_num_threads,
        torch.get_num_threads(),
        os.environ.get("LD_PRELOAD"),
        os.environ.get("LOCAL_WORLD_SIZE"),
    )
    engine.generate(PROMPTS, 1, Sampling(max_tokens=3))
    engine.update_weights(make(), 1)
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""
    engine.close()
