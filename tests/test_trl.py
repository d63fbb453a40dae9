"""The TRL drop-in against TRL itself: real trainers, the same tiny model, seed and completions, step by step."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from factories import byte_level
from transformers import Qwen2Config, Qwen2ForCausalLM

from scope_fast import LossOptions, Segment, TokenStreams, linear_scope_loss

if importlib.util.find_spec("trl") is None:
    pytest.skip("trl is not installed (pip install -e '.[trl]')", allow_module_level=True)

VOCAB = 300
PROMPTS = ["1 + 2 = ?", "a longer prompt: 17 + 4 + 9 = ?", "x", "30 - 7 = ?"]


@pytest.fixture(scope="module", autouse=True)
def imported():
    """TRL, met only by the worker that runs these tests, and without the vllm it would import for 20 s."""
    global Dataset, GRPOConfig, GRPOTrainer, ours
    hide = "vllm" not in sys.modules
    if hide:
        sys.modules["vllm"] = None
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from scope_fast.integrations import trl as ours

    if hide:
        del sys.modules["vllm"]


def tiny_model(seed=0, **changes):
    torch.manual_seed(seed)
    config = dict(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, eos_token_id=0, pad_token_id=1, bos_token_id=None, initializer_range=0.15,
    )  # fmt: skip
    return Qwen2ForCausalLM(Qwen2Config(**config | changes))


def reward(completion_ids, **columns):
    """Something completions differ in: the share of tokens below 100."""
    return [sum(token < 100 for token in ids) / len(ids) for ids in completion_ids]


def config(tmp_path, cls=None, **changes):
    settings = dict(
        output_dir=str(tmp_path), per_device_train_batch_size=8, num_generations=4, max_completion_length=10,
        gradient_accumulation_steps=2, num_iterations=2, max_steps=4, learning_rate=3e-3, temperature=0.9,
        report_to="none", use_cpu=True, bf16=False, seed=3, logging_steps=1, save_strategy="no", disable_tqdm=True,
        gradient_checkpointing=False, model_init_kwargs={"dtype": "float32"},
    )  # fmt: skip
    return (cls or GRPOConfig)(**settings | changes)


def recording(base):
    """A trainer that keeps what each call of compute_loss was given and gave."""

    class Recording(base):
        def compute_loss(self, model, inputs, *args, **kwargs):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            self.__dict__.setdefault("seen", []).append((loss.item(), dict(inputs)))
            return loss

    return Recording


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny model on disk: TRL loads its reference from there."""
    path = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(path)
    return str(path)


def train(base, folder, args, **changes):
    """The trainer after training, with every loss, and its log."""
    data = Dataset.from_dict({"prompt": PROMPTS * 4})
    trainer = recording(base)(
        folder, reward_funcs=reward, args=args, train_dataset=data, processing_class=byte_level(), **changes
    )
    trainer.train()
    return trainer


def assert_same_training(mine, theirs, tolerance=1e-5):
    """Same completions, losses to 1e-5 at every step, and the same weights and metrics in the end."""
    assert len(mine.seen) == len(theirs.seen) >= 8
    for (loss, inputs), (expected, their_inputs) in zip(mine.seen, theirs.seen, strict=True):
        assert torch.equal(inputs["completion_ids"], their_inputs["completion_ids"])
        assert loss == pytest.approx(expected, abs=tolerance)
    assert max(abs(loss) for loss, _ in theirs.seen) > 1e-2  # there was something to compare
    weights = dict(theirs.model.named_parameters())
    for name, value in mine.model.named_parameters():
        torch.testing.assert_close(value, weights[name], atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_training_gives_trls_own_losses(folder, tmp_path, loss_type):
    args = dict(loss_type=loss_type, beta=0.05, scale_rewards="none")
    theirs = train(GRPOTrainer, folder, config(tmp_path, **args))
    mine = train(ours.ScopeGRPOTrainer, folder, config(tmp_path, **args))
    assert_same_training(mine, theirs)
    for name in ("entropy", "kl", "grad_norm", "clip_ratio/region_mean"):
        logged, expected = ([row[name] for row in t.state.log_history if name in row] for t in (mine, theirs))
        assert logged == pytest.approx(expected, abs=1e-5) and len(logged) == 4, name


@pytest.mark.parametrize(
    "args",
    [
        dict(loss_type="grpo", importance_sampling_level="sequence"),
        dict(loss_type="cispo", epsilon_high=2.0),
        dict(loss_type="dapo", entropy_coef=0.02, top_entropy_quantile=0.5),
        dict(loss_type="sapo"),
        dict(loss_type="luspo", importance_sampling_level="sequence"),
        dict(loss_type="vespo"),
    ],
    ids=["gspo", "cispo", "entropy", "sapo", "luspo", "vespo"],
)
def test_the_losses_trl_alone_has_run_on_our_head(folder, tmp_path, args):
    theirs = train(GRPOTrainer, folder, config(tmp_path, **args))
    assert_same_training(train(ours.ScopeGRPOTrainer, folder, config(tmp_path, **args)), theirs)


def test_scope_without_teacher_tokens_is_dapo(folder, tmp_path):
    args = dict(beta=0.05, use_bias_correction_kl=False, delta=1.5, epsilon_high=0.28)
    theirs = train(GRPOTrainer, folder, config(tmp_path, loss_type="dapo", **args))
    mine = train(ours.ScopeGRPOTrainer, folder, config(tmp_path, ours.ScopeGRPOConfig, **args))
    assert_same_training(mine, theirs)
    assert [row["scope/loss_nll"] for row in mine.state.log_history if "scope/loss_nll" in row] == [0.0] * 4


# -- mixed completions ------------------------------------------------------------------------------------------------


def rollout(prompts, trainer):
    """Every other completion ends in a teacher's suffix, of a length of its own."""
    r = torch.Generator().manual_seed(trainer.state.global_step)
    completions, segments, logprobs = [], [], []
    for i in range(len(prompts)):
        length = 4 + int(torch.randint(0, 6, (), generator=r))
        prefix = length if i % 2 else 2
        completions.append(torch.randint(2, VOCAB, (length,), generator=r).tolist())
        segments.append([1] * prefix + [2] * (length - prefix))
        logprobs.append([-5.0] * length)  # the teacher's are no business of TRL's correction of the sampler
    prompt_ids = [trainer.processing_class(p)["input_ids"] for p in prompts]
    return {
        "prompt_ids": prompt_ids, "completion_ids": completions, "logprobs": logprobs, "scope_segment": segments,
    }  # fmt: skip


def expected_loss(model, trainer, batches):
    """Loss of one optimiser step, written sequence by sequence on full logits: own normalisers, coefficient 0.3."""
    args = trainer.args
    num_rl, num_nll = (sum(int((b["scope_segment"] == kind).sum()) for b in batches) for kind in (1, 2))
    total = 0.0
    for batch in batches:
        for i, segment in enumerate(batch["scope_segment"]):
            prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()]
            completion = batch["completion_ids"][i][batch["completion_mask"][i].bool()]
            logits = model(input_ids=torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1]
            scaled = {1: logits / args.temperature, 2: logits}
            for t, token in enumerate(completion):
                kind = int(segment[t])
                logp = scaled[kind][t].log_softmax(-1)[token]
                if kind == Segment.NLL:
                    total = total - args.nll_coef * logp / num_nll
                    continue
                ratio, a = torch.exp(logp - batch["old_per_token_logps"][i, t]), batch["advantages"][i]
                clipped = ratio.clamp(1 - args.epsilon, 1 + args.epsilon)
                total = total - torch.minimum(ratio * a, clipped * a) / num_rl
    return total


def test_mixed_completions_give_the_loss_written_out(folder, tmp_path):
    args = config(tmp_path, ours.ScopeGRPOConfig, max_steps=2, learning_rate=0.05)
    seen = []

    class Checked(ours.ScopeGRPOTrainer):
        def training_step(self, model, inputs, num_items_in_batch):
            if not seen or len(seen[-1][0]) == 2:  # the weights as they are at the first micro-batch of a step
                seen.append(([], {k: v.clone() for k, v in self.model.state_dict().items()}))
            return super().training_step(model, inputs, num_items_in_batch)

        def compute_loss(self, model, inputs, **kwargs):
            loss = super().compute_loss(model, inputs, **kwargs)
            seen[-1][0].append((loss.item(), dict(inputs)))
            return loss

    trainer = train(Checked, folder, args, rollout_func=rollout)
    assert len(seen) == 2  # the second step is off-policy: num_iterations is 2
    ratios_moved = []
    for micro_batches, weights in seen:
        model = tiny_model()
        model.load_state_dict(weights)
        batches = [inputs for _, inputs in micro_batches]
        with torch.no_grad():
            expected = expected_loss(model, trainer, batches)
        assert sum(loss for loss, _ in micro_batches) == pytest.approx(expected.item(), abs=1e-5)
        for batch in batches:
            students = batch["scope_segment"] == Segment.RL
            assert torch.equal(~batch["sampling_per_token_logps"].isnan(), students | ~batch["completion_mask"].bool())
        ratios_moved.append(expected.item())
        assert all(int((b["scope_segment"] == kind).sum()) for b in batches for kind in (1, 2))
    assert ratios_moved[0] != pytest.approx(ratios_moved[1], abs=1e-3)
    logged = [row["scope/loss_rl"] + row["scope/loss_nll"] for row in trainer.state.log_history if "loss" in row]
    assert logged == pytest.approx(ratios_moved, abs=1e-5)


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        (None, "scope_segment of completion 1: missing, expected one for each of its 3 tokens"),
        ([1, 1], "scope_segment of completion 1: 2 values, expected one for each of its 3 tokens"),
        ([1] * 5, "scope_segment of completion 1: 5 values, expected"),
        ([1, 2, 3], r"scope_segment of completion 1 holds \[1, 2, 3\]: expected 0, 1 and 2"),
    ],
)
def test_segments_that_do_not_fit_are_refused(segment, message):
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    rows = [{"scope_segment": [1, 1, 2, 2]}, {} if segment is None else {"scope_segment": segment}]
    with pytest.raises(ValueError, match=message):
        ours.segments(rows, mask, mask)


def test_segments_are_as_long_as_the_completion():
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    rows = [{"scope_segment": [1, 1, 2, 2]}, {"scope_segment": [1, 2, 2]}]
    with pytest.raises(ValueError, match="scope_segment of completion 1: 3 values, expected one for each of its 2"):
        ours.segments(rows, mask, mask)
    truncated = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])  # TRL masked it out, its length is not known any more
    assert ours.segments(rows, truncated, truncated).tolist() == [[1, 1, 2, 2], [0, 0, 0, 0]]


def test_segments_follow_the_mask():
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    loss_mask = torch.tensor([[1, 0, 1], [1, 1, 0]])  # a tool's token in the first row
    assert ours.segments([{"prompt": "a"}, {}], mask, loss_mask).tolist() == [[1, 0, 1], [1, 1, 0]]
    rows = [{"scope_segment": [1, 2, 2]}, {"scope_segment": [0, 2]}]
    assert ours.segments(rows, mask, loss_mask).tolist() == [[1, 0, 2], [0, 2, 0]]


def test_images_reach_the_model_in_our_loss_too(folder, tmp_path):
    """What TRL hands to the model in its own losses: a vision model without its images has other log-probabilities."""
    args = config(tmp_path, ours.ScopeGRPOConfig, max_steps=1)
    images = {"pixel_values": torch.ones(2, 3), "token_type_ids": torch.zeros(2, 4)}
    got = []

    class Seen(ours.ScopeGRPOTrainer):
        def _compute_loss(self, model, inputs):
            def listening(**arguments):
                got.append({name: arguments.pop(name, None) for name in images})
                return model(**arguments)

            return super()._compute_loss(listening, {**inputs, **images, "image_sizes": None})

    train(Seen, folder, args, rollout_func=rollout)
    assert got and all(seen[name] is value for seen in got for name, value in images.items())


def test_streams_lie_where_a_token_is_predicted():
    inputs = {
        "prompt_ids": torch.zeros(2, 3, dtype=torch.long),
        "completion_ids": torch.tensor([[7, 8], [9, 1]]),
        "scope_segment": torch.tensor([[1, 2], [1, 0]], dtype=torch.uint8),
        "advantages": torch.tensor([2.0, -1.0]),
        "importance_sampling_ratio": torch.tensor([[0.5, 9.0], [3.0, 9.0]]),
    }
    streams = ours.scope_streams(inputs, torch.tensor(0.25), torch.tensor(0.1))
    assert streams.target.view(2, 5).tolist() == [[0, 0, 7, 8, 0], [0, 0, 9, 1, 0]]
    assert streams.segment.view(2, 5).tolist() == [[0, 0, 1, 2, 0], [0, 0, 1, 0, 0]]
    assert streams.advantage.view(2, 5)[:, 2].tolist() == [1.0, -3.0]  # scaled by TRL's ratio
    assert streams.loss_weight.view(2, 5)[0, 2:4].tolist() == pytest.approx([0.25, 0.1])
    assert streams.old_logprob is None and streams.ref_logprob is None


# -- the edges --------------------------------------------------------------------------------------------------------


def test_an_all_masked_batch_is_a_zero_that_can_be_differentiated():
    model = tiny_model()
    trl_head(model)
    ids = torch.randint(2, VOCAB, (2, 6))
    output = model(input_ids=ids, labels=torch.full_like(ids, -100), fused_lm_head=True)
    assert output.loss == 0 and not output.log_probs.any()
    output.loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert model.lm_head.weight.grad is not None


def trl_head(model, temperature=0.9, **kwargs):
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(model, temperature=temperature, outputs=("log_probs", "entropy"))
    ours.replace_fused_head(model, temperature, False, **kwargs)


def test_the_head_scores_as_trls_and_the_rest_of_the_model_is_as_it_was():
    from trl.trainer.utils import add_fused_lm_head

    ids = torch.randint(2, VOCAB, (3, 9), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :4] = -100
    labels[1, 6:] = -100
    mine, theirs = tiny_model(), tiny_model()
    trl_head(mine)
    add_fused_lm_head(theirs, temperature=0.9, outputs=("log_probs", "entropy"))
    grads = []
    for model in (mine, theirs):
        output = model(input_ids=ids, labels=labels, fused_lm_head=True)
        (output.loss + 0.1 * output.entropy.sum()).backward()
        grads.append((output, [p.grad for p in model.parameters()]))
    for name in ("loss", "log_probs", "entropy"):
        torch.testing.assert_close(*(getattr(o, name) for o, _ in grads), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(grads[0][1], grads[1][1], atol=1e-5, rtol=1e-4)
    plain = tiny_model()(input_ids=ids, labels=ids)
    torch.testing.assert_close(mine(input_ids=ids, labels=ids).loss, plain.loss)
    assert torch.equal(mine.generate(ids, max_new_tokens=3, do_sample=False)[:, :9], ids)


def test_the_scope_call_is_linear_scope_loss_on_the_hidden_states():
    model = tiny_model()
    trl_head(model)
    ids = torch.randint(2, VOCAB, (2, 7), generator=torch.Generator().manual_seed(2))
    new = {"generator": torch.Generator().manual_seed(3)}
    streams = TokenStreams(
        torch.randint(2, VOCAB, (14,), **new), torch.randint(0, 3, (14,), **new).to(torch.uint8),
        torch.rand(14, **new), advantage=torch.randn(14, **new),
    )  # fmt: skip
    loss, metrics = model(input_ids=ids, fused_lm_head=True, scope=(streams, LossOptions(temperature=0.9)))
    hidden = tiny_model().model(input_ids=ids).last_hidden_state.flatten(0, 1)
    expected, _ = linear_scope_loss(hidden, tiny_model().lm_head.weight, streams, LossOptions(temperature=0.9))
    torch.testing.assert_close(loss, expected)
    assert metrics["policy/rows"] == (streams.segment == Segment.RL).sum()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(importance_sampling_level="sequence"), "importance_sampling_level=sequence is not supported"),
        (dict(top_entropy_quantile=0.2), "top_entropy_quantile=0.2 is not supported"),
        (dict(off_policy_mask_threshold=0.5), "off_policy_mask_threshold=0.5 is not supported"),
        (dict(entropy_coef=0.1), "entropy_coef=0.1 is not supported"),
        (dict(beta=0.1, use_bias_correction_kl=True), "use_bias_correction_kl=True is not supported"),
        (dict(delta=1.1), "delta=1.1: expected a value above 1 \\+ epsilon_high = 1.2"),
        (dict(nll_normalizer="all"), "nll_normalizer='all': expected own or joint"),
        (dict(nll_shape="flat"), "nll_shape='flat': expected one of constant, shaped, entropy"),
    ],
)
def test_options_scope_cannot_express_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, ours.ScopeGRPOConfig, **changes)


def test_models_with_rescaled_logits_are_refused():
    model = tiny_model()
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match=r"final_logit_softcapping=30\.0 is not supported by the fused head"):
        ours.replace_fused_head(model, 1.0, False)


def test_a_model_s_own_scale_of_its_logits_is_folded_into_the_temperature():
    """Cohere's, on another model: the head alone knows of it here."""
    ids = torch.randint(2, VOCAB, (3, 9), generator=torch.Generator().manual_seed(1))
    scaled, plain = tiny_model(), tiny_model()
    scaled.config.logit_scale = 0.25
    trl_head(scaled, 0.5)
    trl_head(plain, 2.0)
    mine, other = (model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs for model in (scaled, plain))
    assert torch.equal(mine, other)


def test_nor_is_the_training_loss_another_with_it():
    """Rows of both kinds: the likelihood is at temperature 1 of the model's own logits."""
    ids = torch.randint(2, VOCAB, (1, 9), generator=torch.Generator().manual_seed(1))
    segment = torch.tensor([Segment.RL, Segment.NLL] * 4 + [Segment.IGNORE], dtype=torch.uint8)
    streams = TokenStreams(ids[0].roll(-1), segment, torch.ones(9), advantage=torch.full((9,), 0.5),
                           old_logprob=torch.full((9,), -3.0))  # fmt: skip
    bare = torch.where(segment == Segment.RL, 0.5 / 0.25, 1 / 0.25)
    scaled, plain = tiny_model(), tiny_model()
    scaled.config.logit_scale = 0.25
    trl_head(scaled)
    trl_head(plain)
    options = LossOptions(temperature=0.5)
    losses = [
        model(input_ids=ids, labels=ids, fused_lm_head=True, scope=(given, options))[0]
        for model, given in ((scaled, streams), (plain, replace(streams, temperature=bare)), (plain, streams))
    ]
    assert losses[0] == losses[1] != losses[2]


def test_another_trl_is_refused_by_name():
    found = {name: getattr(GRPOTrainer, name.split(".")[-1], None) for name in ours.HOOKS if "." in name}
    from trl.trainer import utils

    found |= {name: getattr(utils, name) for name in ours.HOOKS if "." not in name}
    ours.check_hooks("1.16.3", found)
    with pytest.raises(ImportError, match=r"written for trl 1\.16\.x, this is trl 1\.17\.0"):
        ours.check_hooks("1.17.0", found)
    with pytest.raises(ImportError, match=r"GRPOTrainer\._compute_loss of trl 1\.16\.0 takes \(self, model, batch\)"):
        ours.check_hooks("1.16.0", found | {"GRPOTrainer._compute_loss": lambda self, model, batch: None})
    del found["add_fused_lm_head"]
    with pytest.raises(ImportError, match=r"trl 1\.16\.0 has no add_fused_lm_head"):
        ours.check_hooks("1.16.0", found)


def test_without_trl_the_import_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(ImportError, match=r"needs trl 1\.16 \(pip install 'scope-fast\[trl\]'\)"):
        ours._import_trl()


@pytest.mark.parametrize("stem", ["trl", "learner"])
def test_the_benchmark_measures_equal_work(monkeypatch, stem):
    """python -m bench trl, learner: every trainer's loss and gradient norm against float64, at a tiny shape."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1]))
    from bench import harness

    module = importlib.import_module(f"bench.bench_{stem}")
    for spec in module.specs("cpu", (96, 64, 300), None, peers=True):
        case = harness.measure(spec, module, repeats=1, memory=False)
        trainers = [row for row in case["variants"] if row["role"] != "limit"]
        assert len(trainers) == {"trl": 3, "learner": 2}[stem]
        assert all(row["agrees"] and row["errors"]["loss"] < 1e-5 for row in trainers), trainers
