"""linear_scope_loss: values by hand, gradients by gradcheck and against naive autograd, the edges of the contract."""

import math
from dataclasses import replace

import pytest
import torch
from opcases import (
    EXTREMES,
    INTERPRETED,
    METRIC_NAMES,
    Case,
    Place,
    all_options,
    assert_no_worse,
    extreme_case,
    gradients,
    is_active,
    make_case,
    naive_loss,
    places,
    strided,
)

from scope_fast import LossOptions, TokenStreams, linear_scope_loss
from scope_fast.ops import reference
from scope_fast.ops.linear_scope_loss import find_active
from scope_fast.ops.options import RowOptions, encode

on_places = places("linear_scope_loss", cuda="linear_scope_loss")
REFERENCE = Place("reference")


def run(case: Case, options=None, place=REFERENCE, **kwargs):
    return linear_scope_loss(
        case.hidden,
        case.weight,
        case.streams,
        options or LossOptions(),
        bias=case.bias,
        backend=place.backend,
        **kwargs,
    )


def check_against_naive(case64: Case, options: LossOptions, place: Place, dtype: torch.dtype) -> None:
    """Loss, metrics and every gradient in `dtype` are no further from the float64 truth than eager torch's."""
    case, eager = case64.to(dtype, place.device), case64.to(dtype)
    truth, truth_metrics = naive_loss(case64.hidden, case64.weight, case64.streams, options, case64.bias)
    eager_loss, eager_metrics = naive_loss(eager.hidden, eager.weight, eager.streams, options, eager.bias)
    loss, metrics = run(case, options, place)
    assert_no_worse(loss, eager_loss, truth, loss.dtype, "loss")
    for name in METRIC_NAMES - {"policy/clipped"}:  # a count: a ratio at the bound may fall either way
        assert_no_worse(metrics[name], eager_metrics[name], truth_metrics[name], loss.dtype, name)
    for name, ours, theirs, true in zip(
        ("dhidden", "dweight", "dbias"),
        gradients(loss, case),
        gradients(eager_loss, eager),
        gradients(truth, case64),
        strict=False,
    ):
        assert ours.dtype == dtype
        assert_no_worse(ours, theirs, true, dtype, name)


# --- values by hand: two tokens, logits (log 3, 0), so p = (3/4, 1/4) and H = log 4 - 3/4 log 3

LOG, ENTROPY = math.log, math.log(4) - 0.75 * math.log(3)
HAND = {
    # name: (options, segment, advantage, old p, ref p, rollout p, loss per unit weight, g, h)
    "ppo_inside": (LossOptions(), 1, 2.0, 0.7, None, None, -2 * 0.75 / 0.7, -2 * 0.75 / 0.7, 0),
    "ppo_clipped": (LossOptions(), 1, 2.0, 0.5, None, None, -1.2 * 2, 0, 0),
    "ppo_negative_unclipped": (LossOptions(), 1, -1.0, 0.5, None, None, 1.5, 1.5, 0),
    "ppo_negative_clipped": (LossOptions(), 1, -1.0, 1.0, None, None, 0.8, 0, 0),
    "clip_higher": (LossOptions(clip_high=0.6), 1, 2.0, 0.5, None, None, -3.0, -3.0, 0),
    "dual_clip": (LossOptions(dual_clip=1.4), 1, -1.0, 0.5, None, None, 1.4, 0, 0),
    "on_policy": (LossOptions(), 1, 3.0, None, None, None, -3.0, -3.0, 0),
    "cispo": (LossOptions(policy_loss="cispo"), 1, 2.0, 0.5, None, None, -1.2 * 2 * LOG(0.75), -1.2 * 2, 0),
    "importance_capped": (LossOptions(importance_cap=1.25), 1, 2.0, 0.7, None, 0.5, -1.25 * 1.5 / 0.7, -1.875 / 0.7, 0),
    "importance_below_cap": (LossOptions(importance_cap=2), 1, 2.0, 0.7, None, 0.875, -0.8 * 1.5 / 0.7, -1.2 / 0.7, 0),
    "k1": (LossOptions(kl="k1", kl_coef=0.1), 1, 0.0, None, 0.5, None, 0.1 * LOG(1.5), 0.1, 0),
    "k2": (LossOptions(kl="k2", kl_coef=0.1), 1, 0.0, None, 0.5, None, 0.05 * LOG(1.5) ** 2, 0.1 * LOG(1.5), 0),
    "k3": (LossOptions(kl="k3", kl_coef=0.1), 1, 0.0, None, 0.5, None, 0.1 * (2 / 3 + LOG(1.5) - 1), 0.1 / 3, 0),
    "entropy": (LossOptions(entropy_coef=0.1), 1, 0.0, None, None, None, -0.1 * ENTROPY, 0, -0.1),
    "nll": (LossOptions(), 2, math.nan, math.nan, math.nan, math.nan, -LOG(0.75), -1, 0),
    "shaped": (LossOptions(nll_shape="shaped"), 2, 0, 1, None, None, -0.75 / 0.85, -0.1 * 0.75 / 0.85**2, 0),
    "nll_entropy": (
        LossOptions(nll_shape="entropy"), 2, 0, 1, None, None, -math.exp(-ENTROPY) * LOG(0.75), -math.exp(-ENTROPY), 0,
    ),
}  # fmt: skip


@on_places
@pytest.mark.parametrize("name", HAND)
def test_hand_values(name, place):
    options, segment, advantage, old, ref, rollout, loss_, g, h = HAND[name]
    weight_of_row = 0.5

    def stream(p):
        return None if p is None else torch.tensor([p]).log()

    streams = TokenStreams(
        torch.tensor([0]), torch.tensor([segment], dtype=torch.uint8), torch.tensor([weight_of_row]),
        stream(old), torch.tensor([float(advantage)]), stream(ref), stream(rollout),
    )  # fmt: skip
    hidden = torch.tensor([[LOG(3), 0.0]], dtype=place.fine)
    case = Case(hidden, torch.eye(2, dtype=place.fine), None, streams).to(place.fine, place.device)
    loss, metrics = run(case, options, place)
    close = {"rel": 2e-6, "abs": 2e-7}  # the streams are float32
    assert loss.item() == pytest.approx(weight_of_row * loss_, **close)
    assert metrics["loss/rl" if segment == 1 else "loss/nll"].item() == pytest.approx(weight_of_row * loss_, **close)
    dz = [g * (1 - 0.75) - h * 0.75 * (LOG(0.75) + ENTROPY), -g * 0.25 - h * 0.25 * (LOG(0.25) + ENTROPY)]
    dhidden, dweight = gradients(loss, case)
    assert dhidden[0].tolist() == pytest.approx([weight_of_row * x for x in dz], **close)
    expected = [weight_of_row * x * y for x in dz for y in (LOG(3), 0.0)]
    assert dweight.flatten().tolist() == pytest.approx(expected, **close)


@on_places
def test_metrics_by_hand(place):
    # rows: RL clipped (ratio 1.5), RL inside (ratio 0.75/0.7), RL without advantage (not computed), NLL, ignored
    streams = TokenStreams(
        torch.tensor([0, 0, 0, 1, -100]),
        torch.tensor([1, 1, 1, 2, 0], dtype=torch.uint8),
        torch.tensor([1.0, 2.0, 1.0, 3.0, math.nan]),
        old_logprob=torch.tensor([0.5, 0.7, 0.5, math.nan, math.nan]).log(),
        advantage=torch.tensor([1.0, 1.0, 0.0, math.nan, math.nan]),
        rollout_logprob=torch.tensor([0.7, 0.5, 0.1, math.nan, math.nan]).log(),
    )
    hidden = torch.tensor([[LOG(3), 0.0]], dtype=place.fine).repeat(5, 1)
    _, metrics = run(
        Case(hidden, torch.eye(2, dtype=place.fine), None, streams).to(place.fine, place.device), place=place
    )
    kl = [r - 1 - LOG(r) for r in (0.75 / 0.5, 0.75 / 0.7)]  # k3 of KL(old || new): the tokens are old's
    gaps = [LOG(0.75 / 0.7), LOG(0.75 / 0.5)]
    expected = {
        "loss/rl": -1.2 - 2 * 0.75 / 0.7,
        "loss/nll": -3 * LOG(0.25),
        "policy/rows": 2,
        "policy/entropy_sum": 2 * ENTROPY,
        "policy/kl_sum": sum(kl),
        "policy/clipped": 1,
        "policy/ratio_max": 1.5,
        "sampling/gap_sum": sum(gaps),
        "sampling/gap_max": gaps[1],
    }
    assert set(metrics) == METRIC_NAMES
    assert {k: v.item() for k, v in metrics.items()} == pytest.approx(expected, rel=2e-6)


# --- against the naive truth


@on_places
@all_options
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_every_option_in_every_dtype(place, options, bias):
    case = make_case(T=15, bias=bias, temperature=options.temperature == 1.0 and bias)
    for dtype in place.dtypes:
        check_against_naive(case, options, place, dtype)


@on_places
@all_options
def test_on_policy(place, options):
    """old_logprob None: the ratio is 1 in value and differentiates like one."""
    check_against_naive(make_case(on_policy=True), options, place, place.fine)


@on_places
@pytest.mark.parametrize(("T", "D", "V"), [(1, 1, 2), (1, 5, 7), (3, 129, 2), (33, 17, 1000), (65, 64, 257)])
def test_odd_shapes(place, T, D, V):
    check_against_naive(make_case(T, D, V, bias=True, seed=T), LossOptions(entropy_coef=0.01), place, place.fine)


@on_places
def test_vocabulary_of_several_blocks(place):
    """Rows longer than a kernel's block: in bfloat16 the gradient overwrites the logits that it is made of."""
    case = make_case(T=5, D=8, V=9001, segments=(1, 2), bias=True)
    for dtype in place.dtypes:
        check_against_naive(case, LossOptions(entropy_coef=0.1), place, dtype)


@on_places
@pytest.mark.parametrize("chunk_tokens", [1, 4, 1000, 0])
def test_chunks_do_not_matter(place, chunk_tokens):
    case = make_case(T=21, bias=True)
    whole, _ = run(case.to(place.fine, place.device), place=place)
    chunked = case.to(place.fine, place.device)
    loss, _ = run(chunked, LossOptions(chunk_tokens=chunk_tokens), place)
    assert loss.item() == pytest.approx(whole.item(), rel=1e-5)
    check_against_naive(case, LossOptions(chunk_tokens=chunk_tokens), place, place.fine)


@places(reference=False, cuda="linear_scope_loss")
@pytest.mark.parametrize("chunk", [13, 21])
@pytest.mark.parametrize("segments", [(0, 1, 2), (1, 2)], ids=["some rows", "all rows"])
def test_a_chunk_may_have_its_logits_a_few_rows_at_a_time(place, chunk, segments, monkeypatch):
    """Where they are wider than their gradient: the chunk is still one product for dX and one for dW."""
    from scope_fast.kernels import linear_scope_loss as kernel

    made, mm = [], kernel.mm
    monkeypatch.setattr(kernel, "mm", lambda a, b, out, **how: (made.append(tuple(out.shape)), mm(a, b, out, **how))[1])
    monkeypatch.setattr(kernel.plan, "rows_at_a_time", lambda num_rows, *_: (min(chunk, num_rows), 4))
    T, D, V = 21, 5, 37
    case, options = make_case(T, D, V, bias=True, segments=segments), LossOptions(entropy_coef=0.1)
    check_against_naive(case, options, place, torch.bfloat16)
    active = int(is_active(case.streams, options).sum())
    chunks = [min(chunk, active - at) for at in range(0, active, chunk)]
    assert [m for m, n in made if n == V] == [min(4, n - at) for n in chunks for at in range(0, n, 4)]
    assert [m for m, n in made if n == D and m != V] == chunks and made.count((V, D)) == len(chunks)


@on_places
def test_dweight_is_summed_in_float32_over_chunks(place):
    """In bfloat16, 160 chunks of a row lose no more than one chunk does, chance aside: the sum is rounded once."""
    case64 = make_case(T=160, D=5, V=11, segments=(2,))
    (truth,) = torch.autograd.grad(
        naive_loss(case64.hidden, case64.weight, case64.streams, LossOptions())[0], case64.weight
    )
    errors = {}
    for chunk_tokens in (1, 160):
        case = case64.to(torch.bfloat16, place.device)
        (dweight,) = torch.autograd.grad(run(case, LossOptions(chunk_tokens=chunk_tokens), place)[0], case.weight)
        errors[chunk_tokens] = ((dweight.cpu().double() - truth).norm() / truth.norm()).item()
    assert 0 < errors[1] <= 1.2 * errors[160] < 5e-3


@on_places
@pytest.mark.parametrize("segments", [(0,), (1,), (2,), (0, 1), (0, 2)], ids=["ignored", "rl", "nll", "rl0", "nll0"])
def test_missing_components(place, segments):
    case = make_case(segments=segments)
    check_against_naive(case, LossOptions(kl="k3", kl_coef=0.1, entropy_coef=0.01), place, place.fine)
    loss, metrics = run(case.to(place.fine, place.device), place=place)
    if 1 not in segments:
        assert metrics["loss/rl"].item() == 0.0
    if 2 not in segments:
        assert metrics["loss/nll"].item() == 0.0
    if segments == (0,):
        assert loss.item() == 0.0


@on_places
@pytest.mark.parametrize("active", [False, True])
def test_no_rows_still_backpropagates(place, active):
    case = make_case(T=0, bias=True).to(place.fine, place.device)
    if active:
        case = case.with_streams(active=torch.empty(0, dtype=torch.int64, device=place.device))
    loss, metrics = run(case, place=place)
    assert loss.item() == 0.0
    assert all(value.item() == 0.0 for value in metrics.values())
    loss.backward()
    assert case.hidden.grad.shape == (0, 7)
    assert case.weight.grad.eq(0).all() and case.bias.grad.eq(0).all()


@on_places
@all_options
def test_garbage_never_leaks(place, options):
    """NaN and -100 where a stream does not apply change no bit of the loss, the metrics or the gradients."""
    case = make_case(T=15, temperature=True)
    s, active = case.streams, is_active(case.streams, options)
    rl, trained = active & (s.segment == 1), active
    idle = s.segment == 0
    dirty = case.with_streams(
        target=torch.where(idle, -100, s.target),
        loss_weight=torch.where(idle, math.nan, s.loss_weight),
        temperature=torch.where(trained, s.temperature, math.nan),
        advantage=torch.where(s.segment == 1, s.advantage, math.nan),
        **{k: torch.where(rl, getattr(s, k), math.nan) for k in ("old_logprob", "ref_logprob", "rollout_logprob")},
    )
    results = []
    for each in (case, dirty):
        each = each.to(place.fine, place.device)
        loss, metrics = run(each, options, place)
        results.append([loss, *(metrics[k] for k in sorted(metrics)), *gradients(loss, each)])
    for clean, soiled in zip(*results, strict=True):
        assert torch.equal(clean, soiled)


@on_places
def test_rows_that_cannot_be_active_get_no_gradient_and_do_not_matter(place):
    case = make_case(T=40)
    dead = ~is_active(case.streams, LossOptions())
    hidden = case.hidden.detach().clone()
    hidden[dead] = math.nan
    poisoned = Case(hidden, case.weight, None, case.streams).to(place.fine, place.device)
    loss, _ = run(poisoned, place=place)
    dhidden, dweight = gradients(loss, poisoned)
    assert dhidden[dead].eq(0).all()
    clean = case.to(place.fine, place.device)
    assert torch.equal(dweight, gradients(run(clean, place=place)[0], clean)[1])


@on_places
def test_active_rows_given_or_found(place):
    case = make_case(T=40).to(place.fine, place.device)
    active = is_active(case.streams, LossOptions()).nonzero()[:, 0]
    found, given = run(case, place=place), run(case.with_streams(active=active), place=place)
    assert torch.equal(found[0], given[0])
    assert all(torch.equal(found[1][k], given[1][k]) for k in METRIC_NAMES)


@on_places
@pytest.mark.parametrize("chunk_tokens", [4, 0])
def test_an_ignored_row_that_the_caller_names_active_may_hold_garbage(place, chunk_tokens):
    case = make_case(T=15, temperature=True)
    s, idle = case.streams, case.streams.segment == 0
    dirty = case.with_streams(
        target=torch.where(idle, -100, s.target),
        **{
            name: torch.where(idle, math.nan, getattr(s, name))
            for name in ("loss_weight", "temperature", "advantage", "old_logprob", "ref_logprob", "rollout_logprob")
        },
    )
    results = []
    for each in (case, dirty):
        each = each.with_streams(active=torch.arange(15)).to(place.fine, place.device)
        loss, _ = run(each, LossOptions(chunk_tokens=chunk_tokens), place)
        results.append([loss, *gradients(loss, each)])
    for clean, soiled in zip(*results, strict=True):
        assert torch.equal(clean, soiled)


# --- sums: the result does not depend on packing, micro-batches or the order of rows


@on_places
@all_options
def test_micro_batches_add_up(place, options):
    case = make_case(T=14).to(place.fine, place.device)
    whole, metrics = run(case, options, place)
    expected = gradients(whole, case)
    losses, parts = [], []
    for rows in (slice(0, 1), slice(1, 6), slice(6, 14)):
        streams = TokenStreams(**{k: None if v is None else v[rows] for k, v in vars(case.streams).items()})
        loss, part = run(Case(case.hidden[rows], case.weight, None, streams), options, place)
        losses.append(loss)
        parts.append(part)
    close = {"rtol": 1e-5, "atol": 1e-5 if place.fine == torch.float32 else 1e-12}
    torch.testing.assert_close(sum(losses), whole, **close)
    for ours, true in zip(gradients(sum(losses), case), expected, strict=True):
        torch.testing.assert_close(ours, true, **close)
    for name, value in metrics.items():
        combine = max if name.endswith("_max") else sum
        torch.testing.assert_close(torch.as_tensor(combine([p[name] for p in parts])), value, **close)


@on_places
def test_row_order_does_not_matter(place):
    case = make_case(T=30)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    streams = TokenStreams(**{k: None if v is None else v[order] for k, v in vars(case.streams).items()})
    shuffled = Case(case.hidden.detach()[order], case.weight, None, streams).to(place.fine, place.device)
    case = case.to(place.fine, place.device)
    a, b = run(case, place=place)[0], run(shuffled, place=place)[0]
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients(a, case)[0][order], gradients(b, shuffled)[0], rtol=1e-5, atol=1e-6)


# --- extreme values


@on_places
@pytest.mark.parametrize("kind", EXTREMES)
def test_extreme_logits(place, kind):
    check_against_naive(extreme_case(kind), LossOptions(entropy_coef=0.1), place, torch.float32)


@on_places
def test_extreme_ratios_stay_finite(place):
    """Log ratios beyond the clamp at +-20, in both clipping directions."""
    case = make_case(T=20, segments=(1,))
    far = torch.where(torch.arange(20) % 2 == 0, -500.0, 300.0)
    for options in (LossOptions(), LossOptions(policy_loss="cispo"), LossOptions(kl="k3", kl_coef=0.1)):
        moved = case.with_streams(old_logprob=far, ref_logprob=-far / 2)
        moved = moved.with_streams(advantage=case.streams.advantage * 1e-6)  # exp(20) times this fits float32's sums
        check_against_naive(moved, options, place, place.fine)


@on_places
@pytest.mark.parametrize("chunk_tokens", [None, 3, 0])
def test_non_contiguous_inputs(place, chunk_tokens):
    """Everything an op takes, the rows to compute included, as every second element of something else."""
    plain = make_case(T=10, D=8, V=12, bias=True, temperature=True).to(place.fine, place.device)
    rows = reference.Rows(*(getattr(plain.streams, name) for name in reference.Rows._fields))
    active = find_active(rows, None, RowOptions(*encode(LossOptions(chunk_tokens=chunk_tokens))))
    assert 2 < active.numel() < 10
    plain = plain.with_streams(active=active)
    streams = {k: strided(v) for k, v in vars(plain.streams).items() if v is not None}
    ours = Case(*(strided(x) for x in plain.leaves()), replace(plain.streams, **streams))
    assert not any(x.is_contiguous() for x in (*ours.leaves(), *streams.values()))
    options = LossOptions(chunk_tokens=chunk_tokens, kl="k2", kl_coef=0.1, importance_cap=2.0)
    a, b = run(ours, options, place)[0], run(plain, options, place)[0]
    torch.testing.assert_close(a, b)
    for x, y in zip(gradients(a, ours), gradients(b, plain), strict=True):
        torch.testing.assert_close(x, y)


@on_places
def test_bf16_logprobs_keep_float32_logits(place):
    """With logits_dtype float32 the logits of bfloat16 inputs are not rounded: a loss error of 1e-5, not 1e-2."""
    case64 = make_case(T=16, D=64, V=500, segments=(2,))
    truth, _ = naive_loss(case64.hidden, case64.weight, case64.streams, LossOptions())
    case = case64.to(torch.bfloat16, place.device)
    fine, coarse = (run(case, LossOptions(logits_dtype=d), place)[0].item() for d in ("float32", "bfloat16"))
    assert fine == pytest.approx(truth.item(), rel=1e-5)
    assert 1e-5 < abs(coarse / truth.item() - 1) < 2e-2


@on_places
@pytest.mark.parametrize("where", ["hidden", "one logit"])
@pytest.mark.parametrize("segment", [1, 2], ids=["policy, on policy", "likelihood"])
def test_nan_shows_in_the_loss(place, where, segment):
    """A NaN that reaches an active row is never averaged, clamped or maxed away, not even in one logit of many."""
    case = make_case(T=3, V=5000, segments=(segment,), bias=True, on_policy=True)
    case = case.with_streams(advantage=torch.ones(3))
    with torch.no_grad():
        (case.hidden[1] if where == "hidden" else case.bias[4500:4501]).fill_(math.nan)
    case = case.to(place.fine, place.device)
    loss, _ = run(case, place=place)
    assert loss.isnan()
    assert gradients(loss, case)[0][1].isnan().all()


@on_places
@pytest.mark.parametrize("segment", [1, 2], ids=["policy, on policy", "likelihood"])
def test_target_out_of_range_is_nan_not_a_neighbour(place, segment):
    """On policy too, where the loss is minus the advantage whatever the log-probability."""
    case = make_case(T=4, segments=(segment,), on_policy=True)
    case = case.with_streams(target=torch.tensor([1, 19, 2, 3]), advantage=torch.ones(4), loss_weight=torch.ones(4))
    assert run(case.to(place.fine, place.device), place=place)[0].isnan()


@on_places
def test_missing_value_where_it_applies_is_nan(place):
    case = make_case(segments=(1,))
    for name in ("old_logprob", "rollout_logprob", "ref_logprob"):
        spoiled = case.with_streams(**{name: torch.full_like(case.streams.advantage, math.nan)})
        spoiled = spoiled.to(place.fine, place.device)
        loss, _ = run(spoiled, LossOptions(importance_cap=2.0, kl="k1", kl_coef=0.1), place)
        assert loss.isnan()


@pytest.mark.skipif(not INTERPRETED, reason="Triton's row kernel on a CPU runs where it is interpreted")
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
def test_rows_too_long_for_a_cluster_go_to_triton(dtype, limit, monkeypatch):
    """Where the CUDA row kernel is asked for; it is not there on a CPU, so Triton's notes its calls and stands in."""
    from scope_fast.kernels import linear_scope_loss as kernel

    asked = []
    monkeypatch.setattr(kernel, "_cluster_rows", lambda z, *args: (asked.append(z.shape[1]), kernel._rows(z, *args)))
    longest = kernel.CLUSTER_BYTES // dtype.itemsize
    for V in (longest, longest + 1):
        case = make_case(T=2, D=2, V=V, segments=(2,)).to(dtype)
        rows = reference.Rows(*(getattr(case.streams, name) for name in reference.Rows._fields))
        arguments = (
            case.hidden.detach(), case.weight.detach(), None, rows, torch.arange(2),
            RowOptions(*encode(LossOptions())), "bfloat16", -1, (True, True, False),
        )  # fmt: skip
        found = kernel.linear_scope_loss(*arguments, True)
        for ours, true in zip(found[:4], reference.linear_scope_loss(*arguments)[:4], strict=True):
            assert (ours - true).norm() <= limit * true.norm()
    assert asked == [longest]


def test_no_full_logits_are_made():
    """The largest tensor the reference makes is a chunk of the logits or a gradient, never (T, V)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(x, torch.Tensor):
                    self.numel = max(self.numel, x.numel())
            return out

    case, T, D, V = make_case(T=200, D=3, V=50), 200, 3, 50
    rows = reference.Rows(*(getattr(case.streams, name) for name in reference.Rows._fields))
    options = reference.RowOptions(*encode(LossOptions()))
    with torch.no_grad(), Largest() as largest:
        reference.linear_scope_loss(
            case.hidden, case.weight, None, rows, torch.arange(T), options, "float32", 16, (True, True, False)
        )
    assert largest.numel == max(16 * V, T * D)
