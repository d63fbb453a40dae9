"""The command, with a scripted engine whose every number is known, and with a real one on a tiny random model."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import tiny_prms
import torch
from factories import byte_level
from tiny_models import make
from transformers import AutoModelForCausalLM

from scope_fast import checkpoint, convert_gguf, evaluate, warm_start
from scope_fast.config import Config
from scope_fast.config_files import load, to_yaml
from scope_fast.evaluate_request import locate
from scope_fast.prm import load as prm_load
from scope_fast.rollout.base import Rollout
from scope_fast.suite import load_suite
from scope_fast.tasks import TASKS

PAPER = ["aime24", "aime25", "amc", "math500", "minerva", "olympiadbench", "arc_challenge", "gpqa", "mmlu_pro"]
MATH = {"prompt_column": "problem"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A Hugging Face folder: a random Qwen2 under the embedded models' tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    made, tokenizer = make(), byte_level()
    assert len(tokenizer) <= made.config.vocab_size
    made.config.eos_token_id = made.generation_config.eos_token_id = tokenizer.eos_token_id
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Scripted:
    """An engine that says what `script` (prompt text, sample) returns."""

    name = "scripted"
    version = 0

    def __init__(self, script):
        self.script, self.calls = script, []

    def generate(self, prompts, n, sampling, seeds):
        self.calls.append((len(prompts), n, sampling, seeds))
        return [[self._rollout(ids, i) for i in range(n)] for ids in prompts]

    def _rollout(self, ids, sample):
        text = self.script(byte_level().decode(ids), sample)
        tokens = [*byte_level().encode(text), byte_level().eos_token_id]
        return Rollout(ids, tokens, [-1.0] * len(tokens), "stop", 0)

    def close(self):
        pass


@pytest.fixture
def scripted(monkeypatch):
    def use(script):
        engine = Scripted(script)

        def make_engine(kind, folder, options):
            engine.options = options
            return engine

        monkeypatch.setattr(evaluate, "make_engine", make_engine)
        return engine

    return use


def run(*arguments, tmp_path):
    """(exit status, the JSON file)."""
    file = tmp_path / "result.json"
    status = evaluate.main([str(a) for a in (*arguments, "--json", file, "--verifier.workers", "1")])
    return status, json.loads(file.read_text()) if file.exists() else None


def jsonl(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def values(result, benchmark):
    return {name: metric["value"] for name, metric in result["benchmarks"][benchmark]["metrics"].items()}


def worked(prompt: str, wrong_from: int | None = None) -> str:
    """The worked solution of a chain_sum prompt; its line `wrong_from` is off by that much and one more."""
    expression = prompt.split(":", 1)[1].split("=")[0].strip()
    count, entry = iter(range(100)), {"metadata": {"expression": expression}}
    slip = (
        (lambda value: value)
        if wrong_from is None
        else (lambda value: value + (wrong_from + 1) * (next(count) == wrong_from))
    )
    return "\n".join(TASKS["chain_sum"].solve(entry, slip))


def test_embedded_tasks_through_the_whole_command(model, scripted, tmp_path, capsys):
    """Of four samples the first is right, the second wrong in its last step only, the third from the first on."""
    places = [None, -1, 0]

    def script(prompt, sample):
        if sample == 3:
            return "no idea"
        place = places[sample]
        return worked(prompt, worked(prompt).count("\n") if place == -1 else place)

    engine = scripted(script)
    arguments = [model, "--task", "chain_sum", "--k", "1,4", "--prompts", "6", "--temperature", "0.7"]
    status, result = run(*arguments, "--rollout.top_p", "0.9", tmp_path=tmp_path)
    assert status == 0
    assert result["sampling"]["temperature"] == 0.7 and result["sampling"]["top_p"] == 0.9
    assert result["environment"]["engine"] == "scripted" and result["environment"]["torch"] == torch.__version__
    found = values(result, "chain_sum")
    assert found["avg@n"] == found["pass@1"] == 0.25 and found["pass@4"] == 1.0
    assert found["maj@4"] == pytest.approx(1 / 3)  # three different answers, one vote each
    assert found["scope/near_miss_rate"] == pytest.approx(
        1 / 3
    )  # of three failures: the last step, the first, "no idea"
    assert found["diversity/unique_answers"] == 3.0
    assert found["response/truncated"] == 0.0
    counts = result["benchmarks"]["chain_sum"]["counts"]
    none = ("scope/unchecked", "scope/empty", "prm/invalid", "verifier/timeouts", "verifier/crashes")
    assert counts == dict.fromkeys(none, 0)
    prompts, samples, sampling, seeds = engine.calls[0]
    assert (prompts, samples, sampling.temperature, sampling.top_p) == (6, 4, 0.7, 0.9)
    assert engine.options.max_num_seqs == 24  # all of them at once, however small a step of training would be
    assert len({seed for row in seeds for seed in row}) == 24
    printed = capsys.readouterr().out
    assert "chain_sum: 6 problems x 4 samples" in printed and "25.0 %" in printed and "25.0 % [" not in printed


def test_a_failure_that_is_not_localised_is_counted(model, scripted, tmp_path):
    """Of three samples one is right and one has nothing to localise an error in."""
    scripted(lambda prompt, sample: ["", "no idea", worked(prompt)][sample])
    arguments = [model, "--task", "chain_sum", "--k", "1", "--samples", "3", "--prompts", "4"]
    made = run(*arguments, tmp_path=tmp_path)[1]["benchmarks"]["chain_sum"]
    assert made["counts"]["scope/empty"] == 4 and made["counts"]["scope/unchecked"] == 0
    assert made["metrics"]["scope/near_miss_rate"]["problems"] == 4


def test_self_similarity_is_there_where_its_packages_are(model, scripted, tmp_path, monkeypatch, capsys):
    pytest.importorskip("sacrebleu", reason="pip install 'scope-fast[eval]'")
    pytest.importorskip("rouge_score", reason="pip install 'scope-fast[eval]'")
    scripted(lambda prompt, sample: "the same words again")
    arguments = [model, "--task", "chain_sum", "--k", "2", "--prompts", "2"]
    found = values(run(*arguments, tmp_path=tmp_path)[1], "chain_sum")
    assert found["diversity/self_bleu"] == pytest.approx(1.0) and found["diversity/self_rouge"] == 1.0
    find_spec = evaluate.find_spec
    monkeypatch.setattr(evaluate, "find_spec", lambda name: None if name == "sacrebleu" else find_spec(name))
    capsys.readouterr()
    found = values(run(*arguments, tmp_path=tmp_path)[1], "chain_sum")
    assert "diversity/self_bleu" not in found and "diversity/self_rouge" in found
    expected = "sacrebleu is not installed, so its measure is left out: pip install 'scope-fast[eval]'"
    assert expected in capsys.readouterr().out.replace("\n", " ")


def test_a_run_is_evaluated_on_the_rows_it_held_out(model, scripted, tmp_path):
    """The export and the settings of the run directory; the result stays in it."""
    rows = [{"prompt": f"What is {i}?", "answer": str(i)} for i in range(10)]
    data = jsonl(tmp_path / "rows.jsonl", rows)
    folder = tmp_path / "run"
    config = load(None, [("method", "grpo"), ("data.path", str(data)), ("data.heldout", "4"), ("out", str(folder))])
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "export").symlink_to(model)
    asked = []

    def script(prompt, sample):
        asked.append(prompt)
        return f"Answer: {prompt.split()[-1].rstrip('?')}" if sample == 0 else "Answer: 7"

    scripted(script)
    assert evaluate.main([str(folder), "--k", "1,2"]) == 0
    result = json.loads((folder / "evaluation.json").read_text())
    assert {prompt.strip() for prompt in asked} == {f"What is {i}?" for i in (6, 7, 8, 9)}
    found = values(result, "rows")
    assert result["model"] == str(folder / "export")
    assert found["avg@n"] == (4 + 1) / 8 and found["pass@2"] == 1.0
    assert found["maj@2"] == pytest.approx((3 * 0.5 + 1) / 4)  # ties, but where 7 is right
    assert "scope/near_miss_rate" not in found  # no checker knows these rows
    assert result["benchmarks"]["rows"]["counts"]["scope/unchecked"] == 3
    # of another data set the results go beside them
    before, other = (folder / "evaluation.json").read_text(), tmp_path / "other.v2.jsonl"
    other.write_text(data.read_text())
    assert evaluate.main([str(folder), "--k", "1,2", "--data.path", str(other)]) == 0
    assert (folder / "evaluation.json").read_text() == before
    assert "other.v2" in json.loads((folder / "evaluation_other.v2.json").read_text())["benchmarks"]
    # nor of the embedded tasks
    scripted(lambda prompt, sample: "Answer: 7")
    assert evaluate.main([str(folder), "--k", "1", "--data.path", "null", "--prompts", "4"]) == 0
    assert (folder / "evaluation.json").read_text() == before
    embedded = json.loads((folder / "evaluation_tasks.json").read_text())["benchmarks"]
    assert {name: each["problems"] for name, each in embedded.items()} == {"chain_sum": 2, "leg_counting": 2}


def test_the_checkpoint_of_a_step(model, scripted, tmp_path, monkeypatch):
    """Its weights, under the run's own configuration; the file says which step it is of."""
    folder = tmp_path / "run"
    config = load(None, [("model.path", str(model)), ("out", str(folder))])
    trained = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        trained.model.norm.weight.mul_(1.5)
    checkpoint.save(folder, 3, {"model": trained.state_dict(), "steps": 3})
    (folder / "config.yaml").write_text(to_yaml(config))
    engine, loaded = scripted(lambda prompt, sample: worked(prompt)), []

    def make_engine(kind, path, options):
        loaded.append(AutoModelForCausalLM.from_pretrained(path).state_dict())
        return engine

    monkeypatch.setattr(evaluate, "make_engine", make_engine)
    arguments = ["--task", "chain_sum", "--k", "1", "--prompts", "2", "--verifier.workers", "1"]
    assert evaluate.main([str(folder), "--step", "3", *arguments]) == 0
    result = json.loads((folder / "evaluation_step_3.json").read_text())
    assert result["model"] == f"{folder} step 3"
    assert result["benchmarks"]["chain_sum"]["by_problem"]["pass@1"] == [1.0, 1.0]
    assert torch.equal(loaded[0]["model.norm.weight"], trained.model.norm.weight)


def test_every_row_of_a_data_set_named_on_the_command_line(model, scripted, tmp_path, capsys):
    rows = [{"problem": "6 / 12?", "answer": r"\frac{1}{2}"}, {"problem": "x" * 300, "answer": "0"}]
    data = jsonl(tmp_path / "fractions.jsonl", [*rows, rows[0]])
    pytest.importorskip("math_verify", reason="pip install 'scope-fast[eval]'")
    engine = scripted(lambda prompt, sample: r"so \boxed{0.5}")
    status, result = run(
        model, "--k", "1", "--data.path", data, "--verifier.score", "scope_fast.math_answers:score",
        "--data.instruction", "Box it.", tmp_path=tmp_path,
    )  # fmt: skip
    assert status == 0 and engine.calls[0][:2] == (2, 1)
    assert values(result, "fractions")["avg@n"] == 1.0
    counts = result["benchmarks"]["fractions"]["counts"]
    assert counts["data/skipped_long"] == 1 and counts["data/duplicates"] == 1
    jsonl(data, rows[1:])
    assert run(model, "--data.path", data, "--k", "1", tmp_path=tmp_path)[0] == 2
    assert "fractions.jsonl: no usable prompt in 1 rows (data/skipped_long 1)" in capsys.readouterr().out


def test_only_rows_on_the_way_to_the_prompts_count_as_passed_over(model, scripted, tmp_path):
    """Of a data set, and of the rows that a run held out."""
    sizes = [1, 300, 2, 300, 3, 300]
    data = jsonl(tmp_path / "a.jsonl", [{"prompt": "z" * size, "answer": "1"} for size in [9, *sizes]])
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    config = load(None, [("method", "grpo"), ("data.path", str(data)), ("data.heldout", "6")])
    (run_dir / "config.yaml").write_text(to_yaml(config))
    (run_dir / "export").symlink_to(model)
    scripted(lambda prompt, sample: "Answer: 1")
    for arguments, name, most, problems, skipped in (
        ([run_dir], "a", 1, 1, 0),
        ([run_dir], "a", 2, 2, 1),
        ([run_dir], "a", 9, 3, 3),
        ([model, "--data.path", data], "a", 3, 3, 1),
        ([model, "--data.path", data], "a", 9, 4, 3),
    ):
        made = run(*arguments, "--k", "1", "--prompts", most, tmp_path=tmp_path)[1]["benchmarks"][name]
        assert made["problems"] == problems and made["counts"].get("data/skipped_long", 0) == skipped


def test_an_answer_of_several_lines_suits_no_response(model, scripted, tmp_path, capsys):
    """Under the default verifier it would be a zero for every response, wherever the rows come from."""
    row = {"question": "1 + 1?", "answer": "1 + 1 = 2\n#### 2"}
    data = jsonl(tmp_path / "gsm8k.jsonl", [row, row])
    run_dir, suite = tmp_path / "run", tmp_path / "suite.yaml"
    run_dir.mkdir()
    config = load(None, [("method", "grpo"), ("data.path", str(data)), ("data.heldout", "1")])
    (run_dir / "config.yaml").write_text(to_yaml(config))
    (run_dir / "export").symlink_to(model)
    suite.write_text(f"benchmarks: {{a: {{data: {{path: {data}}}, score: 'scope_fast.tasks:score'}}}}\n")
    scripted(lambda prompt, sample: "Answer: 2")
    for arguments in ([model, "--data.path", data], [run_dir], [model, "--suite", suite]):
        assert run(*arguments, "--k", "1", tmp_path=tmp_path) == (2, None)
        printed = " ".join(capsys.readouterr().out.split())
        assert "error: data.path: the answer of gsm8k/1 has several lines, and verifier.score compares" in printed
    judged = ["--verifier.score", "fixtures.judges:by_length"]
    assert run(model, "--data.path", data, *judged, "--k", "1", tmp_path=tmp_path)[0] == 0


def test_the_verifiers_faults_are_counted_apart(model, scripted, tmp_path):
    """A gold answer that cannot be crashes the scorer: one problem of two has no verdict at all."""
    data = jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "answer": "####"}, {"prompt": "b", "answer": "B"}])
    scripted(lambda prompt, sample: "Answer: B")
    _, result = run(
        model, "--k", "1,2", "--data.path", data, "--verifier.score", "scope_fast.answers:choice", tmp_path=tmp_path
    )
    metrics, counts = result["benchmarks"]["a"]["metrics"], result["benchmarks"]["a"]["counts"]
    assert metrics["avg@n"] == metrics["pass@2"] == {"value": 1.0, "low": None, "high": None, "problems": 1}
    assert metrics["response/length"]["problems"] == 2
    assert counts["verifier/crashes"] == 2 and counts["verifier/timeouts"] == 0


def test_a_real_engine_a_users_judge_and_the_same_numbers_again(model, tmp_path):
    data = jsonl(tmp_path / "a.jsonl", [{"prompt": f"{i} + {i}", "answer": "1"} for i in range(8)])
    settings = ["--k", "1,2,4", "--engine", "transformers", "--data.path", data, "--rollout.num_threads", "1"]
    settings += ["--rollout.max_tokens", "12", "--verifier.score", "fixtures.judges:by_length"]
    status, first = run(model, *settings, tmp_path=tmp_path)
    assert status == 0
    metrics = first["benchmarks"]["a"]["metrics"]
    assert 0.2 < metrics["avg@n"]["value"] < 0.8  # 32 coins: 0.2 and 0.8 are 3.4 standard deviations away
    assert metrics["avg@n"]["low"] < metrics["avg@n"]["value"] < metrics["avg@n"]["high"]
    passes = [metrics[f"pass@{k}"]["value"] for k in (1, 2, 4)]
    assert passes == sorted(passes) and passes[0] == metrics["avg@n"]["value"] and passes[2] > passes[0]
    assert metrics["response/length"]["value"] <= 12.0 and metrics["response/truncated"]["value"] > 0.5
    assert run(model, *settings, tmp_path=tmp_path)[1] == first
    other = run(model, *settings, "--seed", "1", tmp_path=tmp_path)[1]
    assert other["benchmarks"]["a"]["metrics"]["response/length"] != metrics["response/length"]


def test_a_server_that_runs_already_gets_the_weights_first(model, scripted, tmp_path):
    """It holds what a run left it."""
    sent, engine = [], scripted(lambda prompt, sample: "The answer is 1.")
    engine.update_weights = lambda weights, version: sent.append((weights.lm_head.weight.clone(), version))
    run(str(model), "--prompts", "2", "--k", "1", tmp_path=tmp_path)
    assert not sent
    server = ["--rollout.engine", "vllm_server", "--rollout.server_url", "http://node:8000"]
    run(str(model), "--prompts", "2", "--k", "1", *server, tmp_path=tmp_path)
    ((head, version),) = sent
    assert version == 0
    assert torch.equal(head, AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).lm_head.weight)


def test_a_generator_that_is_not_embedded(model, scripted, tmp_path):
    """No worked solutions, so nothing is localised; reasoning-gym scores."""
    scripted(lambda prompt, sample: f"Answer: {math.gcd(*map(int, re.findall(r'[0-9]+', prompt)))}")
    status, made = run(model, "--task", "gcd", "--k", "1", "--prompts", "6", tmp_path=tmp_path)
    assert status == 0 and made["benchmarks"]["gcd"]["metrics"]["avg@n"]["value"] == 1.0
    scripted(lambda prompt, sample: "Answer: 0")
    _, made = run(model, "--data.tasks", "[gcd, chain_sum]", "--k", "1", "--prompts", "6", tmp_path=tmp_path)
    assert set(made["benchmarks"]) == {"gcd", "chain_sum"}
    assert made["benchmarks"]["gcd"]["metrics"]["avg@n"]["value"] == 0.0


def test_a_reward_model_of_ones_own_finds_the_near_misses(model, scripted, tmp_path):
    """A classifier that believes nothing: every failed rollout has its first error at once, so none is a near miss."""
    import torch
    from transformers import Qwen2Config, Qwen2ForTokenClassification

    config = Qwen2Config(
        vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, num_labels=2,
    )  # fmt: skip
    prm = Qwen2ForTokenClassification(config)
    with torch.no_grad():
        prm.score.weight.zero_()
        prm.score.bias.copy_(torch.tensor([1.0, -1.0]))
    prm.save_pretrained(tmp_path / "prm")
    byte_level().save_pretrained(tmp_path / "prm")
    data = jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "answer": "5"}, {"prompt": "b", "answer": "6"}])
    scripted(lambda prompt, sample: "one\ntwo\nAnswer: 5")
    arguments = [model, "--k", "1", "--data.path", data, "--prm", tmp_path / "prm"]
    metric = run(*arguments, tmp_path=tmp_path)[1]["benchmarks"]["a"]["metrics"]["scope/near_miss_rate"]
    assert metric["value"] == 0.0 and metric["problems"] == 1
    with torch.no_grad():
        prm.score.bias.copy_(torch.tensor([-1.0, 1.0]))  # and one that believes everything
    prm.save_pretrained(tmp_path / "prm")
    metric = run(*arguments, tmp_path=tmp_path)[1]["benchmarks"]["a"]["metrics"]["scope/near_miss_rate"]
    assert metric["value"] == 1.0


def test_first_errors_by_the_run_s_own_threshold_and_separator(model, scripted, tmp_path, monkeypatch):
    """Of three wrong answers, cut off by the limit, one has an error in the middle, one a number that is none."""
    probs = {"a": [0.95, 0.8, 0.95], "b": [0.95, 2.0, 0.95], "c": [0.95, 0.95, 0.8]}

    def scorer(trajectories):
        assert all(t.steps[-1][1] == len(t.token_ids) for t in trajectories)  # no EOS to leave out
        return [probs[t.prompt.text] for t in trajectories]

    monkeypatch.setattr(evaluate, "make_scorer", lambda *arguments: scorer)
    engine = scripted(lambda prompt, sample: "one;two;Answer: 5")
    whole = engine.generate

    def cut(*arguments):
        return [
            [replace(r, token_ids=r.token_ids[:-1], logprobs=r.logprobs[:-1], finish_reason="length") for r in rollouts]
            for rollouts in whole(*arguments)
        ]

    engine.generate = cut
    data = jsonl(tmp_path / "a.jsonl", [{"prompt": prompt, "answer": "6"} for prompt in probs])
    settings = ["--prm", "x", "--prm.tau", "0.9", "--scope.step_separator", ";", "--data.path", data, "--k", "1"]
    made = run(model, *settings, tmp_path=tmp_path)[1]["benchmarks"]["a"]
    assert made["counts"]["prm/invalid"] == 1 and made["counts"]["scope/empty"] == 0
    found = made["metrics"]["scope/near_miss_rate"]
    assert (found["value"], found["problems"]) == (0.5, 2)
    assert made["metrics"]["response/truncated"]["value"] == 1.0


def test_a_published_reward_model_is_named_by_prm_alone(model, scripted, tmp_path):
    tiny_prms.qwen(tmp_path)
    data = jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "answer": "5"}, {"prompt": "b", "answer": "6"}])
    scripted(lambda prompt, sample: "one\ntwo\nAnswer: 5")
    arguments = [model, "--k", "1", "--data.path", data, "--prm", tmp_path, "--prm.kind", "qwen2.5-math-prm"]
    made = run(*arguments, tmp_path=tmp_path)[1]["benchmarks"]["a"]
    assert made["counts"]["prm/invalid"] == 0 and made["metrics"]["scope/near_miss_rate"]["problems"] == 1


def test_the_kind_of_a_reward_model_may_be_the_suites(model, tmp_path):
    data = jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "answer": "5"}])
    suite = tmp_path / "suite.yaml"
    suite.write_text(
        "config: {prm: {kind: qwen2.5-math-prm, path: there}}\n"
        f"benchmarks: {{a: {{score: 'scope_fast.answers:text', data: {{path: {data}}}}}}}\n"
    )
    for more, kind in (([], "qwen2.5-math-prm"), (["--prm.kind", "rlhflow"], "rlhflow")):
        asked = evaluate.parse([str(model), "--suite", str(suite), "--prm", "mine", *more], "")
        assert (asked.config.prm.kind, asked.config.prm.path) == (kind, "mine")
    asked = evaluate.parse([str(model), "--data.path", str(data), "--prm.kind", "exact", "--prm", "mine"], "")
    assert asked.config.prm.kind == "token_classifier"


def test_any_text_reaches_the_prompts(model, scripted, tmp_path):
    data, asked = jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "answer": "5"}]), []
    scripted(lambda prompt, sample: asked.append(prompt) or "Answer: 5")
    instruction = "😀 ends in ####"
    run(model, "--data.path", data, "--k", "1", "--data.instruction", instruction, tmp_path=tmp_path)
    assert instruction in asked[0]


def test_a_reward_model_in_vllm_is_closed(model, scripted, tmp_path, monkeypatch):
    events = []

    class Scorer:
        def __init__(self, *arguments):
            events.append("made")

        def __call__(self, trajectories):
            events.append("asked")
            return [[1.0] * len(t.steps) for t in trajectories]

        def close(self):
            events.append("closed")

    monkeypatch.setattr(prm_load, "VllmStepScorer", Scorer)
    data = jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "answer": "5"}, {"prompt": "b", "answer": "6"}])
    scripted(lambda prompt, sample: "one\ntwo\nAnswer: 5")
    vllm = ["--prm", tmp_path, "--prm.kind", "qwen2.5-math-prm", "--prm.engine", "vllm"]
    run(model, "--k", "1", "--data.path", data, *vllm, tmp_path=tmp_path)
    assert events == ["made", "asked", "closed"]


PAPER_ROWS = {
    **{name: {"problem": "What?", "solution": "...", "answer": "204"} for name in ("aime24", "aime25", "math500")},
    "amc": {"id": 0, "question": "What?", "answer": "204.0", "url": "u"},
    "minerva": {"question": "What?", "answer": "204"},
    "olympiadbench": {"id": 1, "question": "What?", "solution": ["..."], "final_answer": ["$204$"], "unit": None},
    "arc_challenge": {
        "id": "M", "question": "What?", "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]},
        "answerKey": "2",
    },
    "gpqa": {"Question": "What?", "Correct Answer": "y", **{f"Incorrect Answer {i}": f"n{i}" for i in (1, 2, 3)}},
    "mmlu_pro": {"question": "What?", "options": list("abcdefghij"), "answer": "B", "answer_index": 1, "src": "s"},
}  # fmt: skip


def test_the_papers_suite_from_local_files_of_the_hubs_columns(model, scripted, tmp_path):
    """Hub names cannot be reached here; files with their columns can."""
    datasets = pytest.importorskip("datasets", reason="pip install 'scope-fast[data]'")
    pytest.importorskip("math_verify", reason="pip install 'scope-fast[eval]'")
    suite = load_suite("eval/paper")
    assert list(suite.benchmarks) == PAPER
    folder = tmp_path / "data"
    folder.mkdir()
    for i, (name, row) in enumerate(PAPER_ROWS.items()):
        if i % 2:
            datasets.Dataset.from_list([row]).to_parquet(str(folder / f"{name}.parquet"))
        else:
            jsonl(folder / f"{name}.jsonl", [row])

    def script(prompt, sample):
        assert "Please reason step by step" in prompt
        if "A. " not in prompt:
            return r"so it is \boxed{204}" if sample % 2 == 0 else r"so it is \boxed{205}"
        options = dict(line.split(". ") for line in prompt.strip().split("\n")[2:-1])
        return f"so it is \\boxed{{{next(k for k, v in options.items() if v in 'by')}}}"

    engine = scripted(script)
    status, result = run(model, "--suite", "eval/paper", "--data-dir", folder, tmp_path=tmp_path)
    assert status == 0 and list(result["benchmarks"]) == PAPER
    assert [call[1] for call in engine.calls] == [32, 32, 32, 4, 4, 4, 1, 4, 1]
    assert engine.calls[0][2].temperature == 0.6 and engine.calls[0][2].max_tokens == 8192
    for name in PAPER:
        expected = 0.5 if result["benchmarks"][name]["group"] == "in-distribution" else 1.0
        assert values(result, name)["avg@n"] == expected, name
    assert set(result["averages"]) == {"in-distribution", "out-of-distribution"}
    assert result["averages"]["in-distribution"]["metrics"]["avg@n"]["value"] == 0.5
    only = run(
        model, "--suite", "eval/paper", "--data-dir", folder, "--task", "gpqa,amc", "--samples", "1", "--k", "1",
        "--temperature", "0", tmp_path=tmp_path,
    )[1]  # fmt: skip
    assert list(only["benchmarks"]) == ["amc", "gpqa"] and only["sampling"]["temperature"] == 0.0


def test_the_embedded_student_by_its_name(model, scripted, tmp_path, monkeypatch):
    monkeypatch.setattr(warm_start, "ensure", lambda config, role, progress: model if role == "student" else None)
    scripted(lambda prompt, sample: "Answer: 1")
    _, result = run("tiny", "--k", "1", "--prompts", "4", tmp_path=tmp_path)
    assert result["model"] == str(model)
    assert [b["problems"] for b in result["benchmarks"].values()] == [2, 2]
    assert result["averages"]["all"]["problems"] == 4


def test_a_converted_model_by_its_name(model, scripted, tmp_path, monkeypatch):
    monkeypatch.setattr(convert_gguf, "ensure", lambda cache: model)
    scripted(lambda prompt, sample: "Answer: 1")
    _, result = run(convert_gguf.NAME, "--k", "1", "--prompts", "2", tmp_path=tmp_path)
    assert result["model"] == str(model) and result["benchmarks"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: python -m scope_fast.evaluate MODEL_OR_RUN"),
        (["--k", "1"], "usage: python -m scope_fast.evaluate MODEL_OR_RUN"),
        (["MODEL", "--k", "0,1"], "--k 0,1: expected numbers from 1 on, say 1,4,8"),
        (["MODEL", "--k", "4", "--samples", "2"], "--k 4 needs at least as many samples, --samples is 2"),
        (["MODEL", "--samples", "0"], "--samples 0: expected at least 1"),
        (["MODEL", "--prompts", "0"], "--prompts 0: expected at least 1"),
        (["MODEL", "--task", "sums"], "--task sums: known here: chain_sum, chain_sum_long, chain_sum_short"),
        (["MODEL", "--suite", "eval/paper", "--task", "sums"], "--task sums: known here: aime24, aime25, amc"),
        (["MODEL", "--suite", "eval/nothing"], "no configuration file eval/nothing"),
        (["MODEL", "--suite", "eval/paper", "--data-dir", "/nowhere"], "/nowhere holds no aime24{.jsonl,.parquet"),
        (["MODEL", "--suite", "eval/paper", "--data.path", "a.jsonl"], "--data.path: every benchmark of --suite"),
        (["MODEL", "--suite", "eval/paper", "--data.dedup=true"], "--data.dedup: every benchmark of --suite"),
        (["MODEL", "--suite", "eval/paper", "--verifier.score", "a:b"], "--verifier.score: every benchmark of --suite"),
        (["MODEL", "--suite", "eval/paper", "--verifier", "{score: a:b}"], "--verifier.score: every benchmark of"),
        (["MODEL", "--data", "{path: /nowhere/x.jsonl}"], "error: data.path: there is no file /nowhere/x.jsonl"),
        (["MODEL", "--json", "/dev"], "--json /dev: that is a folder, expected a file"),
        (["MODEL", "--evaluation.samples", "5"], "--evaluation.samples is a run's: an evaluation is told by --samples"),
        (["MODEL", "--prm.path", "there"], "--prm.path is a run's: an evaluation is told by --prm"),
        (["MODEL", "--model.path", "there"], "--model.path is a run's: an evaluation is told by MODEL_OR_RUN"),
        (["MODEL", "--data-dir", "/nowhere"], "--data-dir holds the files of a suite: name it with --suite"),
        (["MODEL", "--data.path", "x.jsonl", "--task", "chain_sum"], "data.path is neither"),
        (["MODEL", "--temperature", "0"], "temperature 0 draws the same response every time: add --k 1 --samples 1"),
        (["MODEL", "--verifier.score", "json:nothing"], "score='json:nothing': AttributeError"),
        (["MODEL", "--rollout.topp", "1"], "unknown key rollout.topp; did you mean rollout.top_p?"),
        (["MODEL", "--engine", "vlm"], "rollout.engine: "),
        (["MODEL", "--data.path", "/nowhere/x.jsonl"], "error: data.path: there is no file /nowhere/x.jsonl"),
        (["MODEL", "--step", "3"], "--step 3: "),
        (["/dev"], "/dev is neither a run directory (config.yaml) nor a Hugging Face folder (config.json)"),
        (["no/such-model-anywhere"], "no/such-model-anywhere"),
    ],
)
def test_bad_command_lines_end_with_a_message(arguments, message, model, scripted, capsys):
    scripted(lambda prompt, sample: "")
    assert evaluate.main([str(model) if a == "MODEL" else a for a in arguments]) == 2
    printed = " ".join(capsys.readouterr().out.split())
    assert message in printed and "Traceback" not in printed


def test_a_run_that_is_not_there_is_not_looked_for_on_the_hub(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/other").mkdir(parents=True)
    assert locate("runs/mine") == (None, "runs/mine", None)  # a name of the hub's, for all that is known
    (tmp_path / "runs/other/config.yaml").write_text("")
    assert evaluate.main(["runs/mine"]) == 2
    assert "error: runs/mine: there is no such run in runs" in capsys.readouterr().out


def test_a_run_that_has_not_finished_says_so(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(to_yaml(Config()))
    assert evaluate.main([str(tmp_path)]) == 2
    assert "is a run without an export: it has not finished" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "expected a mapping with benchmarks, got list"),
        ("a: [", "not YAML"),
        ("benchmarks: {}", "benchmarks: Dictionary should have at least 1 item"),
        ("benchmarks: {a: {data: {path: x}}}", "benchmarks.a.score: Field required"),
        ("benchmarks: {a: {score: 'm:f', data: {}}}", "benchmarks.a.data.path is missing"),
        ("benchmarks: {a: {score: 'm:f', data: {path: x, pth: y}}}", "benchmarks.a.data.pth: Extra inputs"),
        ("benchmarks: {a: {score: 'm:f', samples: 0, data: {path: x}}}", "benchmarks.a.samples: Input should be"),
        (
            "config: {data: {dedup: true}}\nbenchmarks: {a: {score: 'm:f', data: {path: x}}}",
            "config.data.dedup: every benchmark has its own data and score; say it there",
        ),
        ("config: {verifier: {score: x}}\nbenchmarks: {a: {score: 'm:f', data: {path: x}}}", "config.verifier.score"),
        ("1: x\nbenchmarks: {a: {score: 'm:f', data: {path: x}}}", "1: "),
        ("more: 1\nbenchmarks: {a: {score: 'm:f', data: {path: x}}}", "more: Extra inputs"),
    ],
)
def test_a_bad_suite_is_named_by_file_and_key(text, message, tmp_path):
    file = tmp_path / "suite.yaml"
    file.write_text(text)
    with pytest.raises(ValueError) as caught:
        load_suite(str(file))
    assert str(caught.value).startswith(f"{file}: ") and message in str(caught.value)


def test_the_command_line_has_the_last_word_over_a_suite(model, scripted, tmp_path):
    jsonl(tmp_path / "a.jsonl", [{"prompt": "a", "answer": "B"}])
    suite = tmp_path / "suite.yaml"
    suite.write_text(
        "config: {rollout: {max_tokens: 100, top_p: 0.5}, evaluation: {temperature: 0.5}}\n"
        f"benchmarks: {{a: {{score: 'scope_fast.answers:choice', samples: 2, data: {{path: {tmp_path}/a.jsonl}}}}}}\n"
    )
    engine = scripted(lambda prompt, sample: "Answer: B")
    _, result = run(model, "--suite", suite, "--rollout.max_tokens", "50", tmp_path=tmp_path)
    _, samples, sampling, _ = engine.calls[0]
    assert (samples, sampling.max_tokens, sampling.top_p, sampling.temperature) == (2, 50, 0.5, 0.5)
    assert [n for n in values(result, "a") if "@" in n] == ["avg@n", "pass@1"]  # k of 4 and 8 need more samples
    _, result = run(model, "--suite", suite, "--k", "1,3", tmp_path=tmp_path)  # one that was asked for gets them
    assert engine.calls[1][1] == 3 and "pass@3" in values(result, "a")
