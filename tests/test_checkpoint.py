"""Checkpoints: bitwise round trips, crashes and damage at every moment, sharded saves, and the exported folder."""

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from scope_fast import checkpoint

ROOT = Path(__file__).resolve().parents[1]


def tiny_model(tied=True, dtype=torch.float32):
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).to(dtype)


class Run:
    """A model that trains on random tokens: what it learns depends on every part of the state."""

    def __init__(self):
        self.model = tiny_model()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2, weight_decay=0.1)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1.0 / (1 + step))
        self.cursor = 0

    def step(self):
        ids = torch.randint(32, (2, 6 + random.randrange(3)))
        self.model(input_ids=ids, labels=ids).loss.backward()
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        self.cursor += int(numpy.random.randint(5))

    def state(self):
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "trainer": {"step": 2, "cursor": self.cursor, "rng": checkpoint.capture_rng()},
        }

    def restore(self, state):
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.cursor = state["trainer"]["cursor"]
        checkpoint.restore_rng(state["trainer"]["rng"])


def assert_equal(a, b):
    """Bitwise, types included (but for parameters against tensors, and ordered against plain dicts)."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert isinstance(b, dict) and list(a) == list(b)
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert type(a) is type(b) and len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert type(a) is type(b) and a == b


def load_latest(run_dir):
    return checkpoint.load(checkpoint.latest(run_dir))


def test_a_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path):
    run = Run()
    run.step()
    run.step()
    saved = run.state()
    path = checkpoint.save(tmp_path, 2, saved)
    assert path == tmp_path / "checkpoints" / "step_2"
    loaded = load_latest(tmp_path)
    assert_equal(loaded, saved)
    assert loaded["optimizer"]["state"][0]["exp_avg"].abs().sum() > 0  # AdamW's moments are there, under int keys
    assert loaded["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.999)

    run.step()
    resumed = Run()
    resumed.restore(loaded)
    resumed.step()
    assert_equal(resumed.state(), run.state())


def test_values_of_every_kind(tmp_path):
    weight = torch.randn(3, 4)
    state = {
        "bf16": torch.randn(5).bfloat16(),
        "strided": torch.randn(4, 6).t()[1:],
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "tied": {"embed": weight, "head": weight.detach()},
        "plain": [None, True, 3, -0.1, float("inf"), "text", (1, (2,)), {}, []],
        7: "an int key",
    }
    loaded = checkpoint.load(checkpoint.save(tmp_path, 0, state))
    assert_equal(loaded, state)
    assert loaded["tied"]["embed"] is loaded["tied"]["head"]  # stored once


def test_tensors_spread_over_files(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 100)
    state = {str(i): torch.full((5, 5), float(i)) for i in range(4)}
    path = checkpoint.save(tmp_path, 0, state)
    assert len(list(path.glob("*.safetensors"))) == 4
    assert_equal(checkpoint.load(path), state)


def test_what_cannot_be_saved_is_named(tmp_path):
    with pytest.raises(TypeError, match="state/trainer/rng is a Random"):
        checkpoint.save(tmp_path, 0, {"trainer": {"rng": random.Random()}})
    with pytest.raises(TypeError, match="state/a: keys must be str or int, not tuple"):
        checkpoint.save(tmp_path, 0, {"a": {(1, 2): 3}})
    with pytest.raises(ValueError, match="keep=0"):
        checkpoint.save(tmp_path, 0, {}, keep=0)
    assert checkpoint.latest(tmp_path) is None


def test_the_newest_ones_are_kept(tmp_path):
    for step in (2, 9, 10, 11):
        checkpoint.save(tmp_path, step, {"step": step}, keep=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_10", "step_11"]
    assert load_latest(tmp_path) == {"step": 11}


def test_a_step_saved_again_replaces_the_old_one(tmp_path):
    checkpoint.save(tmp_path, 1, {"value": "old"})
    checkpoint.save(tmp_path, 1, {"value": "new"})
    assert load_latest(tmp_path) == {"value": "new"}
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_1"]


def truncate(path):
    (shard,) = path.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-10])
    return f"{shard.name} has {shard.stat().st_size} bytes, expected {shard.stat().st_size + 10}"


def flip_a_bit(path):
    (shard,) = path.glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    return f"{shard.name} is not what was written (sha256 differs)"


def lose_a_file(path):
    (path / "state_0.json").unlink()
    return "state_0.json is missing"


def lose_the_manifest(path):
    (path / "MANIFEST.json").unlink()
    return "no MANIFEST.json, so it was not written to its end"


def spoil_the_manifest(path):
    (path / "MANIFEST.json").write_text("{")
    return "MANIFEST.json is damaged (JSONDecodeError: "


def put_a_byte_into_the_manifest(path):
    data = (path / "MANIFEST.json").read_bytes()
    (path / "MANIFEST.json").write_bytes(b"\xff" + data[1:])
    return "MANIFEST.json is damaged (UnicodeDecodeError: "


def lose_a_key_of_the_manifest(path):
    text = (path / "MANIFEST.json").read_text()
    (path / "MANIFEST.json").write_text(text.replace('"bytes"', '"byte"'))
    return "MANIFEST.json is damaged (KeyError: 'bytes')"


def empty_the_manifest(path):
    (path / "MANIFEST.json").write_text("[]")
    return "MANIFEST.json is damaged (TypeError: "


def list_the_manifest_s_files(path):
    (path / "MANIFEST.json").write_text('{"files": []}')
    return "MANIFEST.json is damaged (AttributeError: "


@pytest.mark.parametrize(
    "damage",
    [
        truncate, flip_a_bit, lose_a_file, lose_the_manifest, spoil_the_manifest, put_a_byte_into_the_manifest,
        lose_a_key_of_the_manifest, empty_the_manifest, list_the_manifest_s_files,
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_is_skipped_and_named(tmp_path, capsys, damage):
    old = checkpoint.save(tmp_path, 1, {"w": torch.ones(64)})
    new = checkpoint.save(tmp_path, 2, {"w": torch.zeros(64)})
    reason = damage(new)
    assert torch.equal(load_latest(tmp_path)["w"], torch.ones(64))
    assert capsys.readouterr().out.startswith(f"checkpoint {new} skipped: {reason}")
    assert checkpoint.latest(tmp_path) == old
    with pytest.raises(checkpoint.DamagedCheckpoint) as error:
        checkpoint.load(new)
    assert str(error.value).startswith(f"checkpoint {new}: {reason}")


def test_an_older_one_that_cannot_be_removed_is_no_failure_of_the_new_one(tmp_path, monkeypatch, capsys):
    checkpoint.save(tmp_path, 1, {"w": torch.ones(8)})

    def rmtree(path, ignore_errors=False):
        if path.name == "step_1":
            raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint.shutil, "rmtree", rmtree)
    new = checkpoint.save(tmp_path, 2, {"w": torch.zeros(8)}, keep=1)
    line = f"checkpoint {new} is whole, but older ones could not be removed: [Errno 13] Permission denied"
    assert capsys.readouterr().out.startswith(line)
    assert torch.equal(load_latest(tmp_path)["w"], torch.zeros(8))


def test_damaged_ones_do_not_count_as_kept(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, {"w": torch.ones(64)}, keep=2)
    truncate(tmp_path / "checkpoints" / "step_2")
    checkpoint.save(tmp_path, 3, {"w": torch.ones(64)}, keep=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_1", "step_3"]


def test_later_steps_than_the_one_saved_do_not_count_as_kept(tmp_path):
    """Their content is damaged and their size is not, so the run went on from an older one."""
    for step in (1, 5):
        checkpoint.save(tmp_path, step, {"w": torch.ones(64)}, keep=2)
    saved = checkpoint.save(tmp_path, 2, {"w": torch.ones(64)}, keep=1)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_2"] and checkpoint.latest(tmp_path) == saved


@pytest.mark.parametrize("moment", ["_save_tensors", "_fingerprint", "_replace"])
def test_a_crash_while_writing_leaves_the_older_one(tmp_path, moment):
    """The process dies for real: nothing gets a chance to clean up."""
    checkpoint.save(tmp_path, 1, {"w": torch.ones(8)})
    program = (
        "import os, sys, torch\n"
        "from scope_fast import checkpoint\n"
        f"checkpoint.{moment} = lambda *_: os._exit(9)\n"
        "checkpoint.save(sys.argv[1], 2, {'w': torch.zeros(8)})\n"
    )
    died = subprocess.run([sys.executable, "-c", program, tmp_path], cwd=ROOT)
    assert died.returncode == 9
    assert (tmp_path / "checkpoints" / ".tmp-step_2").exists()
    assert torch.equal(load_latest(tmp_path)["w"], torch.ones(8))
    checkpoint.save(tmp_path, 2, {"w": torch.full((8,), 2.0)})
    assert not (tmp_path / "checkpoints" / ".tmp-step_2").exists()
    assert torch.equal(load_latest(tmp_path)["w"], torch.full((8,), 2.0))


def test_rng_state_goes_on_where_it_was():
    def draw():
        return random.random(), numpy.random.rand(), torch.rand(1).item(), random.gauss(0, 1), numpy.random.randn()

    draw()  # leaves a spare gaussian in both generators
    state = checkpoint.capture_rng()
    first = draw()
    assert draw() != first
    checkpoint.restore_rng(state)
    assert draw() == first


def word_tokenizer():
    words = {f"w{i}": i for i in range(32)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w2")), eos_token="w1", pad_token="w0"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_export_loads_bitwise_equal(tmp_path, tied, dtype):
    model = tiny_model(tied, dtype)
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "left-over.txt").write_text("of an older export")
    model.generation_config = GenerationConfig(temperature=0.7, do_sample=True)
    path = checkpoint.export(tmp_path, model, word_tokenizer())
    assert path == tmp_path / "export"
    assert sorted(p.name for p in path.iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["export"]

    loaded = AutoModelForCausalLM.from_pretrained(path)
    assert type(loaded) is Qwen2ForCausalLM
    assert_equal(loaded.state_dict(), model.state_dict())
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert loaded.generation_config.temperature == 0.7
    assert AutoTokenizer.from_pretrained(path).eos_token == "w1"


def test_a_generation_config_that_transformers_would_not_write_is_exported(tmp_path):
    """Vicuna's: it reads a temperature without do_sample with a warning."""
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6}')
    model = tiny_model()
    model.generation_config = GenerationConfig.from_pretrained(tmp_path / "base")
    written = GenerationConfig.from_pretrained(checkpoint.export(tmp_path, model, word_tokenizer()))
    assert (written.temperature, written.top_p, written.do_sample) == (0.9, 0.6, True)


def test_nothing_is_left_of_an_export_that_fails(tmp_path, monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(model, "save_pretrained", None)
    with pytest.raises(TypeError):
        checkpoint.export(tmp_path, model, word_tokenizer())
    assert list(tmp_path.iterdir()) == []


SHARDED = """
import sys, torch, torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from scope_fast import checkpoint, distributed
from test_checkpoint import assert_equal, tiny_model, word_tokenizer

dist.init_process_group("gloo")
folder, rank = sys.argv[1], dist.get_rank()

def start(seed):
    model = tiny_model()
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    torch.manual_seed(seed)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-2)

def train(model, optimizer):
    ids = torch.randint(32, (2, 8))
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()

model, optimizer = start(rank)
train(model, optimizer)
weights, moments = get_state_dict(model, optimizer)
checkpoint.save(folder, 1, {"model": weights, "optimizer": moments, "rng": checkpoint.capture_rng(), "rank": rank})
train(model, optimizer)

again, fresh = start(99)
weights, moments = get_state_dict(again, fresh)
state = checkpoint.load(checkpoint.latest(folder), like={"model": weights, "optimizer": moments})
assert state["rank"] == rank
set_state_dict(again, fresh, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
checkpoint.restore_rng(state["rng"])
train(again, fresh)
for a, b in zip(model.parameters(), again.parameters()):
    assert torch.equal(a.to_local(), b.to_local())
checkpoint.export(folder, model, word_tokenizer())
full = {name: p.full_tensor() for name, p in model.named_parameters()}
if rank == 0:
    torch.save(full, folder + "/full.pt")
dist.destroy_process_group()
distributed.leave(0)
"""


def test_sharded_save_load_and_export_on_two_ranks(tmp_path):
    (tmp_path / "sharded.py").write_text(SHARDED)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, tmp_path / "sharded.py", tmp_path / "run"], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]

    files = [p.name for p in (tmp_path / "run" / "checkpoints" / "step_1").iterdir()]
    assert {"state_0.json", "state_1.json"} < set(files) and sum(n.startswith("shard-") for n in files) == 2
    one = load_latest(tmp_path / "run")  # written by two ranks, read whole by one process
    assert one["rank"] == 0
    assert {name: t.shape for name, t in one["model"].items()} == {
        name: t.shape for name, t in tiny_model().state_dict().items()
    }

    full = torch.load(tmp_path / "run" / "full.pt", weights_only=True)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "export")
    assert_equal(
        {name: p.detach() for name, p in exported.named_parameters()}, {n: p.detach() for n, p in full.items()}
    )
    assert exported.lm_head.weight is exported.model.embed_tokens.weight
