"""Configuration: wrong keys and values are refused by name, files and overrides layer, what is saved loads again."""

import pytest
import torch
import yaml
from factories import configured
from pydantic import ValidationError

from scope_fast.batch import LossOptions
from scope_fast.config import Config, Loss, digest
from scope_fast.config_files import PRESETS, find, load, to_yaml


def refusal(*overrides, path=None):
    with pytest.raises(ValueError) as caught:
        load(path, overrides)
    assert not isinstance(caught.value, ValidationError)  # ours, in one line
    return str(caught.value)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("loss.clip_hihg", "unknown key loss.clip_hihg; did you mean loss.clip_high?"),
        ("metod", "unknown key metod; did you mean method?"),
        ("loss.grop_size", "unknown key loss.grop_size; did you mean rollout.group_size?"),
        ("group_size", "unknown key group_size; did you mean rollout.group_size?"),
        ("tau", "unknown key tau; did you mean prm.tau?"),
        ("learner.tau", "unknown key learner.tau; did you mean prm.tau?"),
        ("lr", "unknown key lr; did you mean warm_start.lr or learner.lr?"),
        ("learner.learning_rate", "unknown key learner.learning_rate; known here: learner.lr, learner.betas, "),
        ("rolout.temperature", "unknown key rolout; did you mean rollout?"),
        ("checkpoint.zzz", "unknown key checkpoint.zzz; known here: checkpoint.every, checkpoint.keep"),
    ],
)
def test_unknown_keys_name_the_nearest(key, message):
    assert refusal((key, "1")).startswith(message)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("method", "scop", "did you mean scope?"),
        ("method", "scop", "method: Input should be 'scope', 'grpo', 'replace', 'prm_reward' or 'sft', got 'scop'"),
        ("loss.kl", "k9", "loss.kl: Input should be 'none', 'k1', 'k2' or 'k3', got 'k9'; did you mean k3?"),
        ("loss.backend", "tritn", "did you mean triton?"),
        ("rollout.group_size", "1", "rollout.group_size: Input should be greater than or equal to 2, got 1"),
        ("rollout.temperature", "0", "rollout.temperature: Input should be greater than 0, got 0"),
        ("steps", "many", "steps: Input should be a valid integer"),
        ("steps", "2.5", "steps: Input should be a valid integer"),
        ("seed", "-1", "seed: Input should be greater than or equal to 0"),  # Random(-1) is Random(1)
        ("prm.tau", "1.5", "prm.tau: Input should be less than or equal to 1, got 1.5"),
        ("prm.tau", ".nan", "prm.tau: Input should be a finite number"),
        ("learner.lr", ".inf", "learner.lr: Input should be a finite number"),
        ("data.tasks", "[]", "data.tasks: List should have at least 1 item"),
        ("data.tasks", "chain_sum", "data.tasks: Input should be a valid list, got 'chain_sum'; write '[chain_sum]'"),
        ("loss", "3", "loss: expected a section, got 3"),
        ("steps.more", "3", "--steps.more: steps is a value, not a section"),
        ("loss.clip_low", "2", "loss.clip_low=2.0: expected a value in [0, 1]"),
        ("loss.kl_coef", "0.1", "loss.kl_coef=0.1 needs kl to be one of k1, k2, k3"),
        ("loss.dual_clip", "0.9", "loss.dual_clip=0.9: expected a value above 1"),
        ("rollout.context", "128", "rollout.max_tokens=128 leaves no room for a prompt in rollout.context=128"),
        ("learner.minibatches", "25", "learner.minibatches=25 exceeds rollout.prompts_per_step=24"),
        (
            "rollout.server_url",
            "http://a:1",
            "rollout.server_url: only rollout.engine vllm_server has a server, it is auto",
        ),
        ("rollout.transfer", "nccl", "rollout.transfer: only rollout.engine vllm_server has a server"),
        ("rollout", "{engine: vllm_server, sleep_level: 2}", "rollout.sleep_level: only vLLM in this process sleeps"),
        (
            "rollout",
            "{engine: vllm_server, server_url: 'http://a:1', server_gpus: [0]}",
            "rollout.server_gpus: the server at rollout.server_url has its own",
        ),
        ("rollout", "{engine: vllm_server, server_gpus: [1, 1]}", "rollout.server_gpus: expected devices from 0 on"),
        ("rollout", "{engine: vllm_server, server_gpus: [-3]}", "each once, got [-3]"),
        (
            "rollout",
            "{engine: vllm_server, server_gpus: [0, 1]}",
            "rollout.server_gpus=[0, 1]: 0 is the learner's, and NCCL takes a GPU once",
        ),
        (
            "rollout",
            "{engine: vllm_server, server_workers: 2}",
            "rollout.server_workers: of the server at rollout.server_url",
        ),
        ("learner.betas", "[0.9, 1.5]", "learner.betas"),
        ("loss.kl", "k3", "loss.kl=k3 without loss.kl_coef would do nothing"),
        ("out", "runs/{metod}", "out='runs/{metod}': only {method} and {seed} are filled in"),
        ("out", "runs/{", "out='runs/{': only {method} and {seed} are filled in"),
        ("loss.clip_low", "[1", "--loss.clip_low: not YAML"),
    ],
)
def test_wrong_values_are_named(key, value, message):
    assert message in refusal(("steps", "3"), (key, value))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([("steps", "true")], "steps: expected another value than true or false, got True"),
        ([("learner.epochs", "yes")], "learner.epochs: expected another value than true or false"),
        ([("checkpoint.every", "off")], "checkpoint.every: expected another value"),
        ([("warm_start.num_heads", "3")], "warm_start.hidden_size=128: expected an even number for each of num_heads"),
        ([("warm_start.num_kv_heads", "3")], "warm_start.num_heads=4: expected a multiple of num_kv_heads=3"),
        ([("warm_start.vocab_size", "10")], "warm_start.vocab_size: Input should be greater than or equal to 258"),
        ([("data.prompt_column", "question")], "data.prompt_column: of a data set at data.path, and none is named"),
        ([("data.distractor_columns", "[a]")], "data.distractor_columns: of a data set at data.path"),
        (
            [("data.path", "a.jsonl"), ("data.choices_column", "c"), ("data.distractor_columns", "[d]")],
            "data.choices_column: the options are there, or in distractor_columns",
        ),
        (
            [("data.min_prompt_tokens", "100"), ("data.max_prompt_tokens", "10")],
            "data.max_prompt_tokens=10 < min_prompt_tokens=100",
        ),
        ([("rollout.kv_cache_gib", "1e-11")], "rollout.kv_cache_gib: Input should be greater"),
        (
            [("rollout.engine", "vllm_server"), ("rollout.server_url", "localhost:8000")],
            "rollout.server_url: expected http://HOST:PORT, got 'localhost:8000'",
        ),
        ([("teacher.path", "there")], "teacher.path: only kind model is loaded from one, and kind is solver"),
        ([("teacher.endpoint.url", "http://a/v1")], "teacher.endpoint.url: only kind endpoint asks it"),
        ([("prm.kind", "exact"), ("prm.path", "there")], "prm.path: kind exact is the task's own checker"),
        ([("method", "sft"), ("loss.kl", "k3"), ("loss.kl_coef", "1")], "loss.kl: of the policy gradient, and sft"),
        ([("method", "sft"), ("loss.entropy_coef", "0.1")], "loss.entropy_coef: of the policy gradient, and sft"),
        ([("out", "{method.x}")], "out='{method.x}': only {method} and {seed} are filled in"),
    ],
)
def test_what_would_do_nothing_or_cannot_be_is_refused(overrides, message):
    assert message in refusal(*overrides)


@pytest.mark.parametrize(
    "changed",
    [
        {"prm": {"kind": "exact", "path": "there"}},
        {"teacher": {"path": "there"}},
        {"teacher": {"endpoint": {"url": "http://a/v1"}}},
        {"method": "sft", "loss": {"kl": "k3", "kl_coef": 1.0}},
        {"data": {"prompt_column": "question"}},
        {"rollout": {"server_workers": 2}},
    ],
)
def test_a_run_of_an_older_version_is_read_as_it_was(changed, tmp_path):
    """What does nothing was no error once."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(changed))
    with pytest.raises(ValueError):
        load(tmp_path / "config.yaml")
    config = load(tmp_path / "config.yaml", of_a_run=True)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load(tmp_path / "config.yaml", of_a_run=True) == config


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("data.instruction", "Put the final answer after ####", "Put the final answer after ####"),
        ("data.instruction", "Finish with #1: N", "Finish with #1: N"),
        ("data.instruction", "", ""),
        ("data.instruction", '"a\\tb"', "a\tb"),
        ("data.instruction", '"A" or "B"', '"A" or "B"'),
        ("data.path", "null", None),
        ("data.path", "", None),
        ("data.path", "~", None),
        ("data.path", "'null'", "null"),
        ("data.path", "007", "007"),
        ("scope.step_separator", " ", " "),
        ("scope.step_separator", "#", "#"),
        ("out", "runs/a #1", "runs/a #1"),
        ("data.tasks", "[a, b]", ["a", "b"]),
        ("steps", "3 # not many", 3),
    ],
)
def test_a_text_is_taken_as_it_stands(key, text, value):
    config = load(None, [(key, text)])
    for name in key.split("."):
        config = getattr(config, name)
    assert config == value


def test_all_wrong_values_at_once():
    message = refusal(("steps", "0"), ("rollout.group_size", "1"))
    assert "steps: " in message and "; rollout.group_size: " in message


def test_files_and_overrides_layer(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("method: grpo\nsteps: 7\nloss:\n  clip_high: 0.28\n  nll_coef: 0.5\n")
    config = load(file, [("loss.nll_coef", "0.7"), ("steps", "9"), ("steps", "11"), ("prm.kind", "exact")])
    assert (config.method, config.steps, config.loss.clip_high, config.loss.nll_coef) == ("grpo", 11, 0.28, 0.7)
    assert config.prm.kind == "exact"
    assert config.loss.clip_low == Loss().clip_low == 0.2  # neither says: the default
    assert load(file).steps == 7


def test_a_home_directory_is_written_as_in_a_shell(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    keys = ("model.path", "prm.path", "teacher.path", "data.path", "teacher.endpoint.tokenizer")
    config = load(None, [("teacher.kind", "model"), *((key, f"~/of/{key}") for key in keys)])
    found = (config.model.path, config.prm.path, config.teacher.path, config.data.path)
    assert (*found, config.teacher.endpoint.tokenizer) == tuple(f"/home/ada/of/{key}" for key in keys)
    assert load(None, [("model.path", "Qwen/a~b")]).model.path == "Qwen/a~b"


def test_overrides_are_yaml():
    config = load(None, [("data.tasks", "[chain_sum]"), ("loss.dual_clip", "3"), ("learner.betas", "[0.8, 0.9]")])
    assert (config.data.tasks, config.loss.dual_clip, config.learner.betas) == (["chain_sum"], 3.0, (0.8, 0.9))
    assert load(None, [("loss.dual_clip", "null"), ("learner.lr", "1e-5")]).learner.lr == 1e-5  # a string to YAML


def test_a_separator_is_read_as_a_shell_hands_it_over():
    for text in (r"\n\n", r'"\n\n"', r"'\n\n'"):
        config = load(None, [("scope.step_separator", text)])
        assert config.scope.step_separator == "\n\n"
    assert load(None, [("scope.step_separator", "Step")]).scope.step_separator == "Step"


@pytest.mark.parametrize(
    ("method", "monitor", "repairs", "scores"),
    [
        ("scope", False, True, True), ("replace", False, True, True), ("sft", False, True, False),
        ("sft", True, True, True), ("grpo", False, False, False), ("grpo", True, False, True),
        ("prm_reward", False, False, True),
    ],
)  # fmt: skip
def test_what_a_method_asks(method, monitor, repairs, scores):
    config = configured(method=method, **{"prm.monitor": monitor})
    assert (config.repairs, config.scores_steps) == (repairs, scores)


def test_what_is_saved_loads_again(tmp_path):
    changes = {"data.tasks": "[leg_counting]", "loss.importance_cap": 2, "learner.betas": "[0.5, 0.6]"}
    config = configured(method="replace", seed=3, **changes)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load(tmp_path / "config.yaml") == config
    assert load(tmp_path / "config.yaml", [("seed", "4")]) != config


def test_a_section_with_nothing_in_it_is_the_default(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("loss:\n# clip_high: 0.3\nrollout:\n")
    assert load(file) == Config()
    assert load(file, [("loss.clip_high", "0.3")]).loss.clip_high == 0.3
    file.write_text("")
    assert load(file) == Config()


def test_files_that_are_no_configuration(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("- a\n- b\n")
    assert refusal(path=file) == f"{file}: expected a mapping of keys, got list"
    file.write_text("a: [")
    assert refusal(path=file).startswith(f"{file}: not YAML")
    file.write_text("1: 2\n")
    assert refusal(path=file).startswith("unknown key 1; ")


def test_presets_all_load_by_name_and_by_their_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = sorted(path.stem for path in PRESETS.glob("*.yaml"))
    assert "quickstart" in names
    for name in names:
        assert load(name) == load(f"configs/{name}.yaml") == load(PRESETS / f"{name}.yaml")
    assert find(None) == PRESETS / "quickstart.yaml"


def test_a_path_that_leads_nowhere_is_no_preset(tmp_path):
    for path in (tmp_path / "quickstart.yaml", "elsewhere/quickstart.yaml", "quikstart"):
        with pytest.raises(FileNotFoundError, match=r"no configuration file .*; presets: .*quickstart"):
            load(path)


def test_the_run_directory():
    assert str(configured(method="grpo", seed=2).run_dir) == "runs/grpo-seed2"
    assert configured(out="~/x").run_dir.is_absolute()
    assert str(configured(out="x").run_dir) == "x"


def test_options_of_the_loss():
    """Every option the operator has is set by the configuration, or by the sampling temperature."""
    loss = Loss(
        clip_low=0.1, clip_high=0.3, dual_clip=None, policy_loss="cispo", kl="k3", kl_coef=0.1, entropy_coef=0.01,
        importance_cap=1.5, nll_weight="shaped", logits_dtype="bfloat16", chunk_tokens=64,
    )  # fmt: skip
    assert loss.options(0.7) == LossOptions(
        0.1, 0.3, None, "cispo", "k3", 0.1, 0.01, 1.5, "shaped", 0.7, "bfloat16", 64
    )  # fmt: skip
    shapes = {weight: Loss(nll_weight=weight).options(1.0).nll_shape for weight in ("constant", "advantage", "entropy")}
    assert shapes == {"constant": "constant", "advantage": "constant", "entropy": "entropy"}
    assert Loss().options(1.0) == LossOptions() and Loss(dual_clip=2.0).options(1.0) == LossOptions(dual_clip=2.0)


def test_sft_trains_on_the_plain_likelihood():
    settings = [("loss.nll_weight", "shaped"), ("rollout.temperature", "0.7")]
    shapes = {m: load(None, [*settings, ("method", m)]).loss_options() for m in ("scope", "replace", "sft")}
    assert {m: o.nll_shape for m, o in shapes.items()} == {"scope": "shaped", "replace": "shaped", "sft": "constant"}
    assert {o.temperature for o in shapes.values()} == {0.7}


@pytest.mark.parametrize(
    ("gpu", "capabilities", "dtype"),
    [
        (None, {"avx2": True, "avx512_f": True, "avx512_bf16": False}, "float32"),
        (None, {"avx512_bf16": True}, "bfloat16"),
        (None, {"neon": True, "bf16": True}, "bfloat16"),
        (True, {}, "bfloat16"),
        (False, {"avx512_bf16": True}, "float32"),
    ],
)
def test_dtype_auto_is_what_the_machine_has_instructions_for(gpu, capabilities, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu is not None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: gpu)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert load(None, [("model.dtype", "auto")]).model.dtype == dtype
    assert load(None, [("model.dtype", "bfloat16")]).model.dtype == "bfloat16"  # named: as named


def test_a_digest_names_settings():
    warm = Config().warm_start.model_dump()
    assert digest(warm, "student") == digest(dict(reversed(warm.items())), "student")  # the order of keys says nothing
    assert len(digest(warm, "student")) == 16
    assert len({digest(warm, "student"), digest(warm, "prm"), digest({**warm, "seed": 1}, "student")}) == 3


def test_a_configuration_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Config().loss.clip_low = 0.3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([("prm.kind", "rlhflow")], "prm.path: kind rlhflow needs a Hugging Face folder or hub name"),
        (
            [("prm.kind", "math-shepherd"), ("prm.path", "x"), ("prm.engine", "vllm")],
            "prm.engine: vllm pools the steps of qwen2.5-math-prm alone, not of math-shepherd",
        ),
        ([("teacher.kind", "endpoint")], "teacher.endpoint: kind endpoint needs endpoint.url and endpoint.model"),
        ([("prm.kind", "rlhflo")], "did you mean rlhflow?"),
    ],
)
def test_roles_that_lack_what_they_need(overrides, message):
    with pytest.raises(ValueError) as caught:
        load(None, overrides)
    assert message in str(caught.value)
