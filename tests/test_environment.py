"""What a run runs with: this machine's own, and what is said where it changes between the parts of a run."""

from __future__ import annotations

import json

import torch
import transformers

from scope_fast import environment


def test_now_names_what_is_installed_and_the_device():
    present = environment.now("transformers")
    assert present["torch"] == torch.__version__ and present["transformers"] == transformers.__version__
    assert present["engine"] == "transformers" and present["ranks"] == 1 and present["device"]
    assert environment.versions(("torch", "no-such-package")) == {"torch": torch.__version__}
    json.dumps(present)


def test_a_resumed_run_says_what_is_no_longer_as_it_was(tmp_path):
    path = tmp_path / "environment.jsonl"
    first = {"engine": "vllm", "device": "H100", "ranks": 1, "torch": "2.13.0", "flash-attn": "2.8"}
    assert environment.last(path) is None
    assert environment.record(path, -1, first) == []
    assert environment.record(path, 20, first) == []  # the same again
    second = {"engine": "vllm", "device": "H100", "ranks": 2, "torch": "2.14.0"}
    changes = ["ranks: 2 (was 1)", "torch: 2.14.0 (was 2.13.0)", "flash-attn: None (was 2.8)"]
    assert environment.record(path, 40, second) == changes
    assert environment.last(path).items() >= second.items() and environment.last(path)["step"] == 40
    with path.open("a") as file:
        file.write('{"step": 60, "eng')  # torn by a kill
    assert environment.record(path, 30, second) == changes  # step 40 was lost, and its line
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert steps == [0, 20, 30]
    assert environment.record(path, -1, second) == []  # started over: nothing goes on
    assert len(path.read_text().splitlines()) == 1
