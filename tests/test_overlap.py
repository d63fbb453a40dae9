"""overlap one_step: the next step's rollouts run while this one is learned from, and every token says whose it is."""

import copy
import json
import threading
from contextlib import ExitStack
from statistics import fmean

import pytest
import torch
from factories import token_versions
from fixtures.server_core import slowed
from tiny_models import response_logprobs
from transformers import AutoTokenizer

from scope_fast import checkpoint, train
from scope_fast.build import build
from scope_fast.config_files import PRESETS
from scope_fast.data import PromptSource
from scope_fast.rollout import Rollout, vllm_process
from scope_fast.sampler import Sampler

STEPS = 7  # each but the first a chance to meet a response in the middle
WORDS = {
    "method": "grpo", "steps": str(STEPS), "rollout.engine": "vllm_server", "rollout.overlap": "one_step",
    "rollout.prompts_per_step": "6", "rollout.max_num_seqs": "4", "rollout.num_threads": "1",
    "loss.importance_cap": "2", "prm.kind": "exact", "learner.lr": "1e-3", "verifier.workers": "1",
}  # fmt: skip


def parse(out, **changed):
    words = {**WORDS, **{name.replace("__", "."): value for name, value in changed.items()}}
    config, *_ = train.parse(["--out", str(out), *(f"--{name}={value}" for name, value in words.items())])
    return config


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rollout__engine": "vllm"}, "one_step needs rollout.engine vllm_server: an engine in this process cannot"),
        ({"loss__importance_cap": "null"}, "which loss.importance_cap corrects for; set it"),
    ],
)
def test_what_cannot_overlap_is_refused(tmp_path, capsys, changed, message):
    with pytest.raises(SystemExit):
        parse(tmp_path, **changed)
    assert message in " ".join(capsys.readouterr().err.split())


class Gate:
    """Sampling ahead stops after 8 requests, and goes on when weights are to be sent; they are when one more is whole.

    A machine that is busy otherwise might sample all of a step before the learner is done, or after. Neighbours answer
    different prompts: the responses to one are equally long here, and all of them would be whole at once.
    """

    def __init__(self, engine, monkeypatch):
        self.generate, self.one, self.send = engine.generate, engine._one, engine.update_weights
        self.ask, self.engine = engine._ask, engine
        self.opened, self.whole, self.left = threading.Event(), threading.Event(), 0
        for name in ("generate", "update_weights", "_one", "_ask"):
            monkeypatch.setattr(engine, name, getattr(self, f"gated_{name.strip('_')}"))

    def gated_generate(self, *arguments):
        self.opened, self.whole, self.left = threading.Event(), threading.Event(), 8
        if threading.current_thread() is threading.main_thread():  # the first step's, before anything is learned
            self.opened.set()
        return self.generate(*arguments)

    def gated_ask(self, bodies):
        order = sorted(range(len(bodies)), key=lambda i: i % 8)
        answers = dict(zip(order, self.ask([bodies[i] for i in order]), strict=True))
        return [answers[i] for i in range(len(bodies))]

    def gated_one(self, *request):
        self.left -= 1
        if self.left >= 0:
            return self.one(*request)
        assert self.opened.wait(120)
        rollout = self.one(*request)
        self.whole.set()
        return rollout

    def gated_update_weights(self, weights, version):
        with slowed(self.engine):
            self.opened.set()
            assert self.whole.wait(120)
            self.send(weights, version)


@pytest.mark.skipif(not vllm_process.is_installed(), reason="vllm is not installed")
def test_every_token_is_of_the_version_it_says(tmp_path, monkeypatch):
    config = parse(tmp_path / "run")
    config.run_dir.mkdir()
    with ExitStack() as stack:
        trainer = build(config, stack)
        Gate(trainer.engine, monkeypatch)
        weights, metrics = {0: copy.deepcopy(trainer.learner.model)}, []
        for _ in range(STEPS - 2):
            metrics.append(trainer.step())
            weights[trainer.done] = copy.deepcopy(trainer.learner.model)
        state = trainer.state_dict()  # waits for the rollouts of the last step but one
        path = checkpoint.save(config.run_dir, trainer.done, state, keep=1)
        metrics.append(trainer.step())
        weights[trainer.done] = copy.deepcopy(trainer.learner.model)
        metrics.append(trainer.step())

        trainer.load_state_dict(checkpoint.load(path, trainer.state_dict()))
        assert trainer.engine.version == trainer.done == STEPS - 2
        trainer.step()  # once more, from the rollouts that were kept
    *lines, last = steps_of(config.run_dir)
    assert [line["step"] for line in last] == [STEPS - 1] * 6 * 8
    for kept in ("response_ids", "logprobs", "weight_versions", "trained"):
        assert [line[kept] for line in last] == [line[kept] for line in lines[STEPS - 2]]

    assert [m["sync/weight_version"] for m in metrics] == list(range(1, STEPS + 1))
    for step, (line, measured) in enumerate(zip(lines, metrics, strict=True)):
        rollouts = [as_rollout(record) for record in line]
        versions = [version for r in rollouts for version in token_versions(r)]
        assert set(versions) <= {max(step - 1, 0), step}
        assert measured["sampling/staleness"] == pytest.approx(fmean(step - version for version in versions))
        for rollout in (r for i, r in enumerate(rollouts) if i % 4 == 0 or len(r.weight_versions) > 1):
            by_version = {v: response_logprobs(weights[v], rollout) for v in set(token_versions(rollout))}
            truth = torch.stack([by_version[v][i] for i, v in enumerate(token_versions(rollout))])
            assert (truth - torch.tensor(rollout.logprobs)).abs().max() < 2e-4
    assert metrics[0]["sampling/staleness"] == 0.0
    crossing = [
        (step, as_rollout(r)) for step in range(1, STEPS) for r in lines[step] if len(r["weight_versions"]) == 2
    ]
    assert crossing  # a step's rollouts were running when the update of the step before came
    gaps = [response_logprobs(weights[step - 1], r) - response_logprobs(weights[step], r) for step, r in crossing]
    assert max(gap.abs().max() for gap in gaps) > 1e-2  # and the versions can be told apart


def test_what_a_resumed_run_draws_again_is_not_counted_again(tmp_path):
    """Every second row is too long; the step before the checkpoint has said so."""
    rows = [
        {"question": text, "answer": "1"}
        for text in [f"{i} - {tail}" for i in range(20) for tail in ("1", "0 + " * 600 + "1")]
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = parse(
        tmp_path / "run", data__path=str(tmp_path / "rows.jsonl"), data__heldout="2", method="grpo",
        rollout__prompts_per_step="5", verifier__score="scope_fast.math_answers:score", prm__kind="token_classifier",
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(PRESETS.parent / "assets" / "student")
    data = PromptSource(config, tokenizer)
    sampler = Sampler(config, tokenizer, data, engine=None)
    sampler.load_state_dict({"cursor": 0, "ahead": {"world_size": 1, "rollouts": [[]] * 5}})
    assert data.cursor > 5  # rows were passed over
    assert not any(data.take_counts().values())


def test_a_failure_of_what_is_sampled_ahead_costs_no_finished_step(tmp_path, capsys):
    """The server dies for good while step 0 is learned from: its checkpoint is saved, and step 1 drawn again."""

    class Engine:
        fails = False

        def generate(self, prompts, n, sampling, seeds):
            if self.fails:
                raise RuntimeError("no restart is left")
            self.fails = True
            return [[Rollout(prompt, [5], [-1.0], "stop", 0)] * n for prompt in prompts]

    config = parse(tmp_path / "run")
    tokenizer = AutoTokenizer.from_pretrained(PRESETS.parent / "assets" / "student")
    data = PromptSource(config, tokenizer)
    sampler = Sampler(config, tokenizer, data, Engine())
    assert len(sampler.take(0)) == 6
    assert sampler.state_dict() == {"cursor": 6, "ahead": None} and data.cursor == 12
    assert "saved without the rollouts sampled ahead, which failed: no restart is left" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="no restart is left"):
        sampler.take(1)


def steps_of(folder):
    """The records of every step, in the order they were written."""
    groups = []
    for text in (folder / "rollouts.jsonl").read_text().splitlines():
        record = json.loads(text)
        if not groups or groups[-1][-1]["step"] != record["step"]:
            groups.append([])
        groups[-1].append(record)
    return groups


def as_rollout(record):
    spans = tuple(tuple(span) for span in record["weight_versions"])
    ids, logprobs = record["response_ids"], record["logprobs"]
    return Rollout(record["prompt_ids"], ids, logprobs, record["finish_reason"], record["weight_version"], spans)
