"""The learner on a tiny real Qwen2, against plain forwards over one sequence at a time and formulas written out."""

import copy
import math
import random
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from scope_fast import attention
from scope_fast import learner as learner_module
from scope_fast.batch import LossOptions, Segment, TrainSequence, pack, sequence_lengths
from scope_fast.config import Learner as Settings
from scope_fast.learner import Learner, _inputs, hidden_rows
from scope_fast.losses import linear_scope_loss, scope_loss
from scope_fast.model_checks import check_model, check_packing

IGNORE, RL, NLL = Segment.IGNORE, Segment.RL, Segment.NLL
NAN = math.nan
NO_CLIP = 1e9  # of the gradient's norm


def make(dtype=torch.float32, seed=0, **changes):
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.2, "tie_word_embeddings": False,
    }  # fmt: skip
    return Qwen2ForCausalLM(Qwen2Config(**{**sizes, **changes})).to(dtype).eval()


def learner_of(model, options=None, total_steps=10, joint=False, **settings):
    settings = {"lr": 1e-2, "max_grad_norm": NO_CLIP, "token_budget": 64, **settings}
    return Learner(model, Settings(**settings), options or LossOptions(), total_steps, joint)


def sequence(prompt, response, segment=RL, advantage=1.0, weight=1.0, rollout=None):
    n = len(response)
    segment = [segment] * n if isinstance(segment, int) else list(segment)
    advantage = [advantage] * n if isinstance(advantage, float) else list(advantage)
    weight = [weight] * n if isinstance(weight, float) else list(weight)
    rollout = [-4.0 if s == RL else NAN for s in segment] if rollout is None else list(rollout)
    return TrainSequence(list(prompt), list(response), segment, advantage, weight, rollout)


def mixture(count=8, seed=0):
    """Failures, successes, repaired mixtures and sequences with nothing to learn, prompts of one token among them."""
    rng = random.Random(seed)
    made = []
    for i in range(count):
        prompt = [rng.randrange(64) for _ in range(1 if i == 0 else rng.randrange(1, 7))]
        response = [rng.randrange(64) for _ in range(rng.randrange(2, 12))]
        kept = len(response) if i % 3 else len(response) // 2
        rest = len(response) - kept
        advantage = [0.0, 0.75, -0.25][i % 3] if i % 4 else 0.6
        made.append(
            sequence(
                prompt,
                response,
                [RL] * kept + [NLL] * rest,
                [advantage] * kept + [0.0] * rest,
                [1.0] * kept + [0.3] * rest,
            )
        )
    return made


def gradients_of(learner, minibatch):
    """Every parameter's gradient as the optimiser sees it, and the metrics. The weights are not moved."""
    seen = {}

    def step():
        seen.update({name: p.grad.clone() for name, p in learner.model.named_parameters() if p.grad is not None})

    learner.optimizer.step = step
    metrics = learner.update([minibatch])
    return seen, metrics


def logprobs(model, made, temperature=1.0):
    """Log-probability (n,) of every response token, from a plain forward over this sequence alone."""
    ids = torch.tensor([made.prompt_ids + made.response_ids])
    logits = model(input_ids=ids).logits[0, len(made.prompt_ids) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(made.response_ids)[:, None])[:, 0]


def plain_loss(model, minibatch, old=None, temperature=1.0, joint=False, clip=0.2):
    """Clipped policy gradient and likelihood, one formula a line; (rl, nll). old: logprobs per sequence, None: own."""
    count = {s: sum(q.segment.count(s) for q in minibatch) for s in (RL, NLL)}
    nll_count = count[RL] + count[NLL] if joint else count[NLL]
    rl = nll = 0.0
    for i, made in enumerate(minibatch):
        policy, likelihood = logprobs(model, made, temperature), logprobs(model, made)
        before = policy.detach() if old is None else old[i]
        for t, kind in enumerate(made.segment):
            w, a = made.loss_weight[t], made.advantage[t]
            if kind == RL:
                ratio = (policy[t] - before[t]).exp()
                rl = rl - w / count[RL] * torch.minimum(ratio * a, ratio.clamp(1 - clip, 1 + clip) * a)
            elif kind == NLL:
                nll = nll - w / nll_count * likelihood[t]
    return rl, nll


def distance(got, expected):
    """Relative L2 over all parameters together."""
    assert got.keys() == expected.keys()
    error = sum((got[name] - expected[name]).double().square().sum().item() for name in got)
    return math.sqrt(error / sum(g.double().square().sum().item() for g in expected.values()))


STREAM = 2e-7  # loss weights travel in float32, each off by up to 6e-8: so is a float64 gradient against the formula


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    # fp32: the order of the sums alone moves a gradient by 1e-6; fp64: nothing but that is left
    ("dtype", "packing", "formula"),
    [(torch.float32, 1e-5, 1e-5), (torch.float64, 1e-10, STREAM)],
)
def test_packing_changes_nothing(dtype, packing, formula, temperature):
    """One sequence a micro-batch, a few, all at once: the same gradients, and those of plain forwards one at a time."""
    minibatch, truth, options = mixture(), make(dtype), LossOptions(temperature=temperature)
    rl, nll = plain_loss(truth, minibatch, temperature=temperature)
    (rl + nll).backward()
    expected = {name: p.grad for name, p in truth.named_parameters()}
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in expected.values()))
    single, one = gradients_of(learner_of(make(dtype), options, token_budget=1), minibatch)
    assert distance(single, expected) <= formula
    assert one["loss/rl"] == pytest.approx(rl.item(), rel=formula)
    assert one["loss/nll"] == pytest.approx(nll.item(), rel=formula)
    assert one["loss/total"] == pytest.approx((rl + nll).item(), rel=formula)
    assert one["grad/norm"] == pytest.approx(norm, rel=formula)
    for budget in (20, 40, 10_000):
        got, metrics = gradients_of(learner_of(make(dtype), options, token_budget=budget), minibatch)
        assert distance(got, single) <= packing
        assert metrics == pytest.approx(one, rel=packing, abs=packing)


def test_the_order_of_the_sequences_changes_nothing():
    minibatch = mixture()
    expected, _ = gradients_of(learner_of(make(torch.float64)), minibatch)
    got, _ = gradients_of(learner_of(make(torch.float64)), minibatch[::-1])
    assert distance(got, expected) <= 1e-10


def test_a_tied_head_and_a_biased_head():
    minibatch = mixture()
    for model in (make(torch.float64, tie_word_embeddings=True), biased(torch.float64)):
        truth = copy.deepcopy(model)
        sum(plain_loss(truth, minibatch)).backward()
        got, _ = gradients_of(learner_of(model, token_budget=40), minibatch)
        assert distance(got, {name: p.grad for name, p in truth.named_parameters()}) <= STREAM


def biased(dtype):
    model = make(dtype)
    model.lm_head.bias = nn.Parameter(torch.linspace(-1, 1, 64, dtype=dtype))
    return model


def test_the_old_policy_of_a_biased_head_has_its_bias_too():
    """The weights hardly move, so neither does a ratio."""
    learner = learner_of(biased(torch.float64), lr=1e-12, minibatches=2)
    metrics = learner.update([[sequence([1, 2], [3, 4, 5])], [sequence([6], [7, 8])]])
    assert metrics["policy/ratio_max"] == pytest.approx(1.0, abs=1e-6) and metrics["policy/kl"] < 1e-9


@pytest.mark.parametrize("kind", ["packed_sdpa", "sdpa", "eager"])
def test_attention_does_not_leak_between_packed_sequences(kind):
    """Whatever stands before a sequence in the pack, its hidden states keep their bits."""
    model = make(attn_implementation=attention.implementation(torch.float32, kind))
    target = sequence([1, 2], [3, 4, 5, 6])

    def rows(*before):
        (batch,) = pack([*before, target], 100, LossOptions(), 1, 1)
        return hidden_rows(model, batch)[batch.sequence == len(before)]

    neighbours = [sequence([7, 8, 9], [10, 11, 12]), sequence([60, 61, 62], [63, 50, 51])]
    first, second = (rows(other) for other in neighbours)
    assert torch.equal(first, second)
    alone = model.model(input_ids=torch.tensor([[1, 2, 3, 4, 5, 6]])).last_hidden_state[0, 1:5]
    torch.testing.assert_close(first, alone, rtol=1e-5, atol=1e-5)
    assert (first - rows()).abs().max() < 1e-5


@pytest.mark.parametrize("recomputed", ["none", "full"])
def test_lengths_are_asked_of_the_device_once_a_micro_batch(recomputed, monkeypatch):
    asked = []

    def lengths(position_ids):
        asked.append(position_ids)
        return sequence_lengths(position_ids)

    monkeypatch.setattr(attention, "sequence_lengths", lengths)
    model = make(attn_implementation=attention.implementation(torch.float32, "packed_sdpa"))
    learner = learner_of(model, token_budget=12, activation_checkpointing=recomputed)
    minibatch = [sequence([1, 2, 3], [4, 5, 6]) for _ in range(5)]
    learner.update([minibatch])
    assert len(asked) == 3  # of two sequences each at most
    learner.update([minibatch])
    assert len(asked) == 6


def test_normalisers_by_hand():
    """On policy every ratio is 1: the policy loss is minus the mean advantage. Likelihood has its own count, or all."""
    minibatch = [
        sequence([1], [2, 3, 4], advantage=0.5),
        sequence([5], [6] * 5, advantage=-0.25),
        sequence([7], [8, 9, 10, 11], [RL, RL, NLL, NLL], [1.0, 1.0, 0.0, 0.0], [1.0, 1.0, 0.3, 0.3]),
        sequence([7], [8, 9], advantage=0.0),  # no gradient, but counted: 12 RL tokens, 2 NLL tokens
    ]
    model = make()
    likelihood = logprobs(model, minibatch[2])[2:].sum().item()
    own = gradients_of(learner_of(make()), minibatch)[1]
    joint = gradients_of(learner_of(make(), joint=True), minibatch)[1]
    assert own["loss/rl"] == pytest.approx(-(3 * 0.5 - 5 * 0.25 + 2 * 1.0) / 12, rel=1e-6)
    assert joint["loss/rl"] == own["loss/rl"]
    assert own["loss/nll"] == pytest.approx(-0.3 * likelihood / 2, rel=1e-5)
    assert joint["loss/nll"] == pytest.approx(-0.3 * likelihood / 14, rel=1e-5)
    assert (own["tokens/trained"], own["tokens/skipped"]) == (12, 2)
    assert own["policy/clip_fraction"] == 0.0 and own["policy/ratio_max"] == 1.0 and own["policy/kl"] == 0.0
    rows = [(made, t) for made in minibatch[:3] for t, s in enumerate(made.segment) if s == RL]
    entropy = sum(entropies(model, made)[t] for made, t in rows) / 10
    assert own["policy/entropy"] == pytest.approx(entropy, rel=1e-5)


def entropies(model, made):
    ids = torch.tensor([made.prompt_ids + made.response_ids])
    log_p = model(input_ids=ids).logits[0, len(made.prompt_ids) - 1 : -1].log_softmax(-1)
    return (-(log_p.exp() * log_p).sum(-1)).tolist()


def test_sequences_without_a_gradient_never_enter_the_model():
    minibatch = [sequence([1, 2], [3, 4]), sequence([5] * 9, [6] * 9, advantage=0.0)]
    learner = learner_of(make())
    seen = watch(learner.model)
    metrics = learner.update([minibatch])
    assert seen == [4]  # two sequences, one of four tokens computed, and no pass for old log-probabilities
    assert (metrics["tokens/trained"], metrics["tokens/skipped"]) == (2, 9)


def watch(model):
    """The number of tokens of every pass through the body, as they come."""
    seen = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    return seen


@pytest.mark.parametrize(
    "minibatch",
    [
        [sequence([1], [2, 3], advantage=0.0), sequence([4], [5], NLL, weight=0.0), sequence([6], [])],
        [sequence([1], [2, 3], IGNORE)],
        [],
    ],
)
def test_a_batch_without_a_gradient_leaves_every_weight_alone(minibatch):
    """Bit for bit, also with momentum, weight decay and a step behind it."""
    learner = learner_of(make(), weight_decay=0.1)
    learner.update([mixture()])
    before = copy.deepcopy(learner.model.state_dict())
    metrics = learner.update([minibatch])
    assert all(torch.equal(before[name], value) for name, value in learner.model.state_dict().items())
    zero = {"loss/rl": 0.0, "loss/nll": 0.0, "loss/total": 0.0, "grad/norm": 0.0, "tokens/trained": 0}
    assert {name: metrics[name] for name in zero} == zero
    assert metrics["tokens/skipped"] == sum(s != IGNORE for made in minibatch for s in made.segment)
    assert not any(name.startswith(("policy/", "sampling/")) for name in metrics)  # undefined: left out


def test_likelihood_alone_has_no_policy_metrics():
    metrics = learner_of(make()).update([[sequence([1], [2, 3], NLL)]])
    assert metrics["loss/rl"] == 0.0 and metrics["loss/nll"] > 0.0 and metrics["grad/norm"] > 0.0
    assert not any(name.startswith(("policy/", "sampling/")) for name in metrics)


def test_minibatches_and_epochs_follow_a_plain_loop():
    """Old log-probabilities are those before the first of four optimiser steps; fp64, so that Adam's division by a
    small gradient's own size does not blow rounding up."""
    minibatches = [mixture(seed=1), mixture(seed=2)]
    settings = {"lr": 3e-3, "max_grad_norm": 0.5, "weight_decay": 0.1, "minibatches": 2, "epochs": 2}
    learner = learner_of(make(torch.float64), token_budget=40, **settings)
    metrics = learner.update(minibatches)

    truth = make(torch.float64)
    optimizer = torch.optim.AdamW(truth.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    with torch.no_grad():
        old = [[logprobs(truth, made) for made in minibatch] for minibatch in minibatches]
    losses, norms = [], []
    for _ in range(2):
        for minibatch, before in zip(minibatches, old, strict=True):
            rl, nll = plain_loss(truth, minibatch, before)
            optimizer.zero_grad()
            (rl + nll).backward()
            norms.append(float(nn.utils.clip_grad_norm_(truth.parameters(), 0.5)))
            optimizer.step()
            losses.append((rl.item(), nll.item()))
    weights = dict(truth.named_parameters())
    assert distance(dict(learner.model.named_parameters()), weights) < 1e-6
    assert metrics["loss/rl"] == pytest.approx(sum(rl for rl, _ in losses) / 4, rel=1e-6)
    assert metrics["loss/nll"] == pytest.approx(sum(nll for _, nll in losses) / 4, rel=1e-6)
    assert metrics["grad/norm"] == pytest.approx(sum(norms) / 4, rel=1e-6)
    assert metrics["policy/ratio_max"] > 1.05 and metrics["policy/kl"] > 0.0  # the policy did move away
    assert metrics["policy/clip_fraction"] > 0.0


def test_several_updates_score_the_old_policy_once():
    learner = learner_of(make(), minibatches=2, token_budget=10_000)
    seen = watch(learner.model)
    learner.update([[sequence([1, 2], [3, 4])], [sequence([5], [6, 7])]])
    assert seen == [4, 3, 4, 3]  # both scored, then both trained


@pytest.mark.parametrize("minibatches", [1, 2])
def test_the_gap_to_the_engine_is_the_largest_before_any_update(minibatches):
    model = make()
    rollout = logprobs(model, sequence([1, 2], [3, 4, 5])).tolist()
    rollout[1] += 0.25
    mixed = sequence([1, 2], [3, 4, 5, 6], [RL, RL, RL, NLL], 1.0, 1.0, [*rollout, NAN])
    metrics = learner_of(model, minibatches=minibatches, lr=0.1).update([[mixed]] * minibatches)
    assert metrics["sampling/logprob_gap"] == pytest.approx(0.25, abs=1e-5)


def test_a_kl_coefficient_brings_a_frozen_reference():
    """The initial weights, at the sampling temperature; rows without an advantage count, for they can drift too."""
    minibatch = [sequence([1, 2], [3, 4, 5]), sequence([6], [7, 8], advantage=0.0)]
    options = LossOptions(kl="k3", kl_coef=0.5, temperature=0.7)
    learner = learner_of(make(torch.float64), options)
    first = learner.update([minibatch])
    assert first["loss/rl"] == pytest.approx(-3 / 5, rel=1e-6)  # no distance yet
    assert first["tokens/trained"] == 5
    initial = make(torch.float64).state_dict()
    assert all(torch.equal(initial[name], value) for name, value in learner.reference.model.state_dict().items())
    with torch.no_grad():
        now = [logprobs(learner.model, made, 0.7) for made in minibatch]
        then = [logprobs(make(torch.float64), made, 0.7) for made in minibatch]
    kl = sum(float(((r - q).exp() - (r - q) - 1).sum()) for q, r in zip(now, then, strict=True)) / 5
    second = learner.update([minibatch])
    assert second["loss/rl"] == pytest.approx(-3 / 5 + 0.5 * kl, rel=1e-6)
    assert kl > 1e-3
    assert learner_of(make()).reference is None


def test_a_gradient_that_is_not_finite_is_not_applied():
    learner = learner_of(make())
    before = copy.deepcopy(learner.model.state_dict())
    metrics = learner.update([[sequence([1], [2, 3], advantage=10.0, weight=3e38)]])
    assert metrics["learner/skipped_updates"] == 1
    assert metrics["grad/norm"] == 0.0  # of the steps taken: none
    assert all(torch.equal(before[name], value) for name, value in learner.model.state_dict().items())
    assert not any(s["step"] or s["exp_avg"].any() for s in learner.optimizer.state.values())
    assert learner.update([mixture()])["learner/skipped_updates"] == 0
    assert not torch.equal(before["lm_head.weight"], learner.model.lm_head.weight)


def test_the_norm_is_clipped_and_reported_unclipped():
    minibatch = mixture()
    free, whole = gradients_of(learner_of(make(torch.float64)), minibatch)
    clipped, metrics = gradients_of(learner_of(make(torch.float64), max_grad_norm=0.01), minibatch)
    assert metrics["grad/norm"] == pytest.approx(whole["grad/norm"], rel=1e-12)
    scale = 0.01 / (whole["grad/norm"] + 1e-6)  # torch's guard against a zero norm
    assert distance(clipped, {name: g * scale for name, g in free.items()}) < 1e-12


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("cosine", [1 / 3, 2 / 3, 1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
    ],
)
def test_schedule(schedule, expected):
    learner = learner_of(make(), total_steps=6, warmup_steps=2, schedule=schedule)
    rates = []
    for i in range(6):
        rates.append(learner.update([[sequence([1], [2], advantage=float(i % 2))]])["learner/lr"])
        if i % 2:  # what is reported is what was used; a step without a gradient uses none, and time goes on
            assert learner.optimizer.param_groups[0]["lr"] == rates[-1]
    assert rates == pytest.approx([1e-2 * x for x in expected], rel=1e-9)


def test_the_schedule_spans_the_optimiser_steps_of_all_minibatches_and_epochs():
    learner = learner_of(make(), total_steps=2, schedule="cosine", minibatches=2, epochs=3)
    made = [[sequence([1], [2])], [sequence([3], [4])]]
    rates = [learner.update(made)["learner/lr"] for _ in range(2)]  # of the last of 6 steps, and of 12
    assert rates == pytest.approx([1e-2 * 0.5 * (1 + math.cos(math.pi * done / 12)) for done in (5, 11)], rel=1e-9)


def test_a_loaded_state_goes_on_bit_for_bit():
    settings = {"schedule": "cosine", "warmup_steps": 1, "weight_decay": 0.1}
    options = LossOptions(kl="k2", kl_coef=0.1)
    learner = learner_of(make(), options, **settings)
    for seed in range(3):
        learner.update([mixture(seed=seed)])
    state = copy.deepcopy(learner.state_dict())
    resumed = learner_of(make(), options, **settings)
    resumed.load_state_dict(state)
    for seed in range(3, 5):
        assert resumed.update([mixture(seed=seed)]) == learner.update([mixture(seed=seed)])
    ours, theirs = learner.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_bfloat16_learns_about_the_same():
    """bfloat16 keeps 8 bits: a few percent on a gradient through two layers."""
    minibatch = mixture()
    expected, _ = gradients_of(learner_of(make()), minibatch)
    got, metrics = gradients_of(learner_of(make(torch.bfloat16)), minibatch)
    assert distance(got, expected) < 0.1
    assert math.isfinite(metrics["loss/total"])


@pytest.mark.parametrize("field", ["final_logit_softcapping", "logits_soft_cap"])
def test_models_that_bend_the_head_s_output_are_refused_by_name(field):
    with pytest.raises(ValueError, match=rf"Qwen2ForCausalLM: {field}=30\.0 is not supported by the fused head"):
        learner_of(make(**{field: 30.0}))
    check_model(make(**{field: None}))


SIZES = {
    "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 64,
    "num_hidden_layers": 2,
}  # fmt: skip
MIXED = {  # model types whose layers, or some of them, are no attention; what they are refused for
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, "conv, nn.Conv1d"),
    "qwen3_next": ({"layer_types": ["linear_attention", "full_attention"]}, "linear_attention, nn.Conv1d"),
    "minimax": ({"layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
    "falcon_h1": ({"mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16}, "hybrid, nn.Conv1d"),
}


@pytest.mark.parametrize("model_type", MIXED)
def test_models_that_carry_state_over_a_packed_row_are_refused_by_name(model_type):
    changed, refused = MIXED[model_type]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES | changed))
    with pytest.raises(ValueError, match=rf"{type(model).__name__}: {refused} would carry state from one sequence"):
        check_packing(model)
    if model_type == "minimax":  # the others' heads are refused first, or too
        with pytest.raises(ValueError, match="would carry state from one sequence to the next"):
            learner_of(model)


def test_a_model_that_takes_no_positions_is_refused():
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", hidden_size=32, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="BloomForCausalLM: takes no position_ids"):
        check_packing(model)


@pytest.mark.parametrize("model_type", ["qwen2", "llama", "mistral", "gemma3_text", "olmo3"])
def test_models_of_attention_alone_are_not(model_type):
    with torch.device("meta"):
        check_packing(AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES)))


def scaled(model):
    """Weights of a size at which tokens matter to each other."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(float("norm" in name), 0.2, generator=torch.Generator().manual_seed(p.numel()))
    return model


@pytest.mark.parametrize(
    ("model_type", "changed"), [("granite", {"logits_scaling": 8.0}), ("cohere", {"logit_scale": 3.0})]
)
def test_a_model_that_scales_its_logits_is_that_at_another_temperature(model_type, changed):
    """By its own logits; and its gradient is that of the same loss on them."""
    config = AutoConfig.for_model(model_type, **SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2, **changed)
    how = attention.implementation(torch.float32)
    model = scaled(AutoModelForCausalLM.from_config(config, attn_implementation=how)).double()
    learner = Learner(model, Settings(), LossOptions(temperature=0.7), 1)
    learner.check()
    (batch,) = pack(mixture(), 10_000, learner.options, 1, 1)
    got = torch.autograd.grad(learner.objective(batch)[0], model.parameters(), allow_unused=True)
    logits = model(**_inputs(batch)).logits[0].index_select(0, batch.rows)
    policy = (batch.streams.segment == RL)[:, None]  # the likelihood is at temperature 1
    logprob = torch.where(policy, logits / 0.7, logits).log_softmax(-1).gather(1, batch.streams.target[:, None])[:, 0]
    loss, _ = scope_loss(logprob, batch.streams, learner.options)
    expected = torch.autograd.grad(loss, model.parameters(), allow_unused=True)
    for one, other in zip(got, expected, strict=True):
        assert (one is None) == (other is None)
        assert one is None or (one - other).norm() <= 1e-6 * other.norm()  # a stream's temperature is a float32


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["qwen2", "gemma3_text", "olmoe"])
def test_models_that_a_packed_row_suits_pass_the_check(model_type, compute):
    config = AutoConfig.for_model(model_type, **SIZES, pad_token_id=0, num_experts=4, num_experts_per_tok=2)
    model = scaled(AutoModelForCausalLM.from_config(config, attn_implementation=attention.implementation(compute)))
    Learner(model, Settings(), LossOptions(temperature=0.7), 1, compute_dtype=compute).check()


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_a_model_whose_packed_sequences_see_each_other_is_refused(compute):
    """gpt_oss makes its masks without position_ids, and takes no other attention on a CPU."""
    config = AutoConfig.for_model("gpt_oss", **SIZES, head_dim=16, num_local_experts=4, pad_token_id=0)
    learner = Learner(scaled(AutoModelForCausalLM.from_config(config, attn_implementation="eager")), Settings(),
                      LossOptions(), 1, compute_dtype=compute)  # fmt: skip
    with pytest.raises(ValueError, match=r"GptOssForCausalLM: .* the sequence before it .* learner\.attention eager"):
        learner.check()


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_a_model_whose_head_is_more_than_its_last_layer_is_refused(compute):
    """ModernBERT's decoder has a dense layer, an activation and a norm before it."""
    config = AutoConfig.for_model("modernbert-decoder", **SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                                  cls_token_id=1, sep_token_id=2)  # fmt: skip
    how = attention.implementation(torch.float32)
    learner = Learner(scaled(AutoModelForCausalLM.from_config(config, attn_implementation=how)), Settings(),
                      LossOptions(), 1, compute_dtype=compute)  # fmt: skip
    with pytest.raises(ValueError, match=r"ModernBertDecoderForCausalLM: .* the place of hidden @ weight\.T"):
        learner.check()


def test_a_head_that_is_no_plain_linear_is_refused():
    class LoraLinear(nn.Linear):
        """As an adapter library replaces a layer it adapts."""

    model = make()
    model.lm_head = LoraLinear(32, 64, bias=False)
    with pytest.raises(ValueError, match=r"Qwen2ForCausalLM: the output head is a LoraLinear, expected nn\.Linear"):
        check_model(model)


def test_a_wrapper_whose_body_is_the_whole_model_is_refused():
    """As a PEFT model: its base_model gives logits, not hidden states."""

    class PeftModel(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.base_model, self.config = model, model.config

        def get_output_embeddings(self):
            return self.base_model.get_output_embeddings()

    with pytest.raises(ValueError, match="PeftModel: its base_model holds the output head too; merge or unload"):
        check_model(PeftModel(make()))


def test_a_model_without_a_head_is_refused():
    model = make()
    model.get_output_embeddings = lambda: None
    with pytest.raises(ValueError, match=r"the output head is a NoneType, expected nn\.Linear"):
        check_model(model)


def test_a_composite_model_is_judged_by_its_text_part():
    text = SimpleNamespace(final_logit_softcapping=30.0)
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text))
    with pytest.raises(ValueError, match=r"final_logit_softcapping=30\.0"):
        check_model(model)


def test_autocast_keeps_no_copies_of_recomputed_weights(monkeypatch):
    """Its cache would: a bfloat16 copy of every weight until the end of the forward, two bytes a parameter."""
    copies, alive = [], []

    class Casts(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten._to_copy.default and isinstance(args[0], nn.Parameter):
                copies.append(weakref.ref(out.untyped_storage()))
            return out

    def head(*args, **kwargs):  # what comes last in the forward
        alive.append(sum(copy() is not None for copy in copies))
        return linear_scope_loss(*args, **kwargs)

    monkeypatch.setattr(learner_module, "linear_scope_loss", head)
    for checkpointing in ("full", "none"):
        settings = Settings(token_budget=64, activation_checkpointing=checkpointing)
        made = Learner(make(), settings, LossOptions(), 10, compute_dtype=torch.bfloat16)
        with Casts():
            made.update([mixture(count=3)])
        copies.clear()
    assert alive[0] == 0 < alive[-1]  # without recomputation the backward wants them


def test_a_minibatch_that_is_not_finite_does_not_hide_the_gap_of_another():
    model = make()
    with torch.no_grad():
        model.model.embed_tokens.weight[63] = math.inf
    alone = learner_of(copy.deepcopy(model), epochs=2)  # off policy, as with two minibatches
    both = learner_of(model, minibatches=2)
    fine, broken = sequence([1, 2, 3], [5, 6, 7]), sequence([1, 2, 63], [5, 6, 7])
    expected = alone.update([[fine]])["sampling/logprob_gap"]
    metrics = both.update([[broken], [fine]])
    assert metrics["learner/skipped_updates"] == 1
    assert metrics["sampling/logprob_gap"] == pytest.approx(expected, rel=1e-6) and expected > 0.1
