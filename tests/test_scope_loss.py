"""scope_loss: the same numbers as linear_scope_loss, from logprobs; its gradients, and the edges."""

import math

import pytest
import torch
from opcases import METRIC_NAMES, Place, all_options, assert_no_worse, is_active, make_case, naive_row_loss, places

from scope_fast import LossOptions, TokenStreams, linear_logprob, linear_scope_loss, native, scope_loss
from scope_fast.ops.options import encode
from scope_fast.ops.scope_loss import scope_loss_op

on_places = places("scope_loss")
REFERENCE = Place("reference")


def make_rows(T=200, dtype=torch.float64, device="cpu", **kwargs):
    """(logprob, entropy, streams): leaves that need a gradient."""
    case = make_case(T, **kwargs)
    out = linear_logprob(case.hidden.detach(), case.weight.detach(), case.streams.target, backend="reference")
    rows = (x.to(torch.bfloat16).to(device, dtype).requires_grad_() for x in (out.logprob, out.entropy))
    return *rows, case.streams.to(device)


def naive(logprob, entropy, streams: TokenStreams, options):
    index = is_active(streams, options).nonzero()[:, 0]
    take = {k: None if v is None else v[index] for k, v in vars(streams).items() if k != "active"}
    return naive_row_loss(
        logprob[index].to(torch.promote_types(logprob.dtype, torch.float32)),
        entropy[index].to(torch.promote_types(logprob.dtype, torch.float32)),
        take,
        options,
    )


def grads_of(loss, *leaves):
    return torch.autograd.grad(loss, leaves, materialize_grads=True)


@on_places
@all_options
@pytest.mark.parametrize("on_policy", [False, True], ids=["", "on_policy"])
def test_every_option_in_every_dtype(place, options, on_policy):
    check_every_dtype(place, options, on_policy)


def check_every_dtype(place, options, on_policy=False):
    truth_l, truth_h, streams = make_rows(on_policy=on_policy)
    truth, truth_metrics = naive(truth_l, truth_h, streams, options)
    truth_grads = grads_of(truth, truth_l, truth_h)
    for dtype in place.dtypes:
        eager_l, eager_h, _ = make_rows(dtype=dtype, on_policy=on_policy)
        eager, eager_metrics = naive(eager_l, eager_h, streams, options)
        logprob, entropy, there = make_rows(dtype=dtype, device=place.device, on_policy=on_policy)
        loss, metrics = scope_loss(logprob, there, options, entropy=entropy, backend=place.backend)
        assert_no_worse(loss, eager, truth, loss.dtype, "loss")
        for name in METRIC_NAMES - {"policy/clipped"}:
            assert_no_worse(metrics[name], eager_metrics[name], truth_metrics[name], loss.dtype, name)
        assert metrics["policy/clipped"].item() == truth_metrics["policy/clipped"].item()
        for name, a, b, c in zip(
            ("dlogprob", "dentropy"), grads_of(loss, logprob, entropy), grads_of(eager, eager_l, eager_h),
            truth_grads, strict=True,
        ):  # fmt: skip
            assert a.dtype == dtype
            assert_no_worse(a, b, c, dtype, name)


@on_places
def test_hand_values(place):
    """One RL row whose ratio 1.5 is clipped at 1.2, one NLL row, one ignored row full of garbage."""
    streams = TokenStreams(
        torch.tensor([0, 0, -100]), torch.tensor([1, 2, 0], dtype=torch.uint8), torch.tensor([0.5, 2.0, math.nan]),
        old_logprob=torch.tensor([0.5, math.nan, math.nan]).log(), advantage=torch.tensor([3.0, math.nan, math.nan]),
    ).to(place.device)  # fmt: skip
    logprob = torch.tensor([0.75, 0.25, math.nan], dtype=place.fine, device=place.device).log().requires_grad_()
    loss, metrics = scope_loss(logprob, streams, backend=place.backend)
    assert loss.item() == pytest.approx(-0.5 * 1.2 * 3 + 2 * math.log(4), rel=1e-6)
    assert metrics["policy/clipped"].item() == 1 and metrics["policy/ratio_max"].item() == pytest.approx(1.5, rel=1e-6)
    assert "policy/entropy_sum" not in metrics
    assert set(metrics) == METRIC_NAMES - {"policy/entropy_sum"}
    assert grads_of(loss, logprob)[0].tolist() == [0.0, -2.0, 0.0]


@on_places
@all_options
def test_equals_the_linear_loss(place, options):
    """One contract, two ops: through linear_logprob it is linear_scope_loss, in value and gradient."""
    case = make_case(T=40).to(place.fine, place.device)
    s = case.streams
    default = torch.where(s.segment == 1, options.temperature, 1.0)
    out = linear_logprob(case.hidden, case.weight, s.target, temperature=default, backend="reference")
    loss, metrics = scope_loss(out.logprob, s, options, entropy=out.entropy, backend=place.backend)
    linear, linear_metrics = linear_scope_loss(case.hidden, case.weight, s, options, backend="reference")
    close = {"rtol": 2e-5, "atol": 2e-5}
    torch.testing.assert_close(loss, linear, **close)
    for name in METRIC_NAMES - {"policy/clipped"}:
        torch.testing.assert_close(metrics[name], linear_metrics[name], **close)
    for a, b in zip(grads_of(loss, *case.leaves()), grads_of(linear, *case.leaves()), strict=True):
        torch.testing.assert_close(a, b, **close)


@on_places
@pytest.mark.parametrize("T", [0, 1, 1023, 1024, 1025, 3000])
def test_sizes(place, T):
    logprob, entropy, streams = make_rows(T, dtype=place.fine, device=place.device)
    loss, metrics = scope_loss(logprob, streams, entropy=entropy, backend=place.backend)
    truth_l, truth_h, there = make_rows(T)
    truth, truth_metrics = naive(truth_l, truth_h, there, LossOptions())
    assert loss.item() == pytest.approx(truth.item(), rel=1e-5, abs=1e-6)
    assert metrics["sampling/gap_max"].item() == pytest.approx(truth_metrics["sampling/gap_max"].item(), rel=1e-5)
    assert grads_of(loss, logprob)[0].shape == (T,)


@on_places
@pytest.mark.parametrize("segments", [(0,), (1,), (2,)], ids=["ignored", "rl", "nll"])
def test_missing_components_are_exactly_zero(place, segments):
    logprob, entropy, streams = make_rows(dtype=place.fine, device=place.device, segments=segments)
    loss, metrics = scope_loss(logprob, streams, LossOptions(entropy_coef=0.1), entropy=entropy, backend=place.backend)
    for segment, name in ((1, "loss/rl"), (2, "loss/nll")):
        assert (metrics[name].item() == 0.0) == (segment not in segments)
    assert (loss.item() == 0.0) == (segments == (0,))
    assert (grads_of(loss, logprob)[0].abs().sum().item() == 0.0) == (segments == (0,))


@on_places
@all_options
def test_garbage_never_leaks(place, options):
    logprob, entropy, streams = make_rows(dtype=place.fine, device=place.device)
    s, rl, idle = streams, streams.segment == 1, streams.segment == 0
    dirty = TokenStreams(
        torch.where(idle, -100, s.target),
        s.segment,
        torch.where(idle, math.nan, s.loss_weight),
        **{
            name: torch.where(rl, getattr(s, name), math.nan)
            for name in ("old_logprob", "advantage", "ref_logprob", "rollout_logprob")
        },
    )
    spoiled = [torch.where(idle, math.inf, x.detach()).requires_grad_() for x in (logprob, entropy)]
    clean_loss, clean_metrics = scope_loss(logprob, s, options, entropy=entropy, backend=place.backend)
    loss, metrics = scope_loss(spoiled[0], dirty, options, entropy=spoiled[1], backend=place.backend)
    assert torch.equal(loss, clean_loss)
    assert all(torch.equal(metrics[k], clean_metrics[k]) for k in METRIC_NAMES)
    for a, b in zip(grads_of(loss, *spoiled), grads_of(clean_loss, logprob, entropy), strict=True):
        assert torch.equal(a, b)


@on_places
def test_non_contiguous_inputs(place):
    logprob, entropy, s = make_rows(dtype=place.fine, device=place.device)
    options = LossOptions(entropy_coef=0.1, kl="k3", kl_coef=0.1)

    def spread(x):
        return None if x is None else torch.stack((x.detach(), x.detach()), 1)[:, 0]

    leaves = [spread(x).requires_grad_() for x in (logprob, entropy)]
    strided = TokenStreams(**{name: spread(x) for name, x in vars(s).items()})
    assert not leaves[0].is_contiguous() and not strided.advantage.is_contiguous()
    ours, _ = scope_loss(leaves[0], strided, options, entropy=leaves[1], backend=place.backend)
    theirs, _ = scope_loss(logprob, s, options, entropy=entropy, backend=place.backend)
    assert torch.equal(ours, theirs)
    for a, b in zip(grads_of(ours, *leaves), grads_of(theirs, logprob, entropy), strict=True):
        assert torch.equal(a, b)


@on_places
def test_deterministic_bit_for_bit(place):
    logprob, entropy, s = make_rows(3000, dtype=place.fine, device=place.device)
    runs = []
    for _ in range(2):
        loss, metrics = scope_loss(logprob, s, LossOptions(entropy_coef=0.1), entropy=entropy, backend=place.backend)
        runs.append([loss, *metrics.values(), *grads_of(loss, logprob, entropy)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@on_places
@pytest.mark.parametrize("distance", [-500.0, -30.0, 30.0, 500.0])
@all_options
def test_far_from_the_other_policies(place, options, distance):
    """Log ratios beyond the clamp at 20, and importance weights and KL estimates that overflow float32 before a cap."""
    logprob, entropy, s = make_rows(40, dtype=place.fine, device=place.device)
    away = distance * (torch.arange(40, device=place.device) % 3 - 1)  # some the other way, some not at all
    names = ("old_logprob", "ref_logprob", "rollout_logprob")
    far = TokenStreams(**vars(s) | {name: getattr(s, name) + away.roll(i) for i, name in enumerate(names)})
    loss, metrics = scope_loss(logprob, far, options, entropy=entropy, backend=place.backend)
    exact = [x.detach().double().requires_grad_() for x in (logprob, entropy)]
    true, true_metrics = scope_loss(exact[0], far, options, entropy=exact[1], backend="reference")
    close = {"rtol": 1e-4, "atol": 1e-4, "check_dtype": False}
    torch.testing.assert_close([loss, *metrics.values()], [true, *true_metrics.values()], **close)
    torch.testing.assert_close(grads_of(loss, logprob, entropy), grads_of(true, *exact), **close)


@on_places
@pytest.mark.parametrize("name", ["logprob", "advantage", "old_logprob", "loss_weight"])
def test_nan_in_an_active_row_shows(place, name):
    logprob, entropy, s = make_rows(600, dtype=place.fine, device=place.device)
    row = (is_active(s, LossOptions()) & (s.segment == 1)).nonzero()[7]
    with torch.no_grad():
        (logprob if name == "logprob" else getattr(s, name)).index_fill_(0, row, math.nan)
    loss, metrics = scope_loss(logprob, s, entropy=entropy, backend=place.backend)
    assert loss.isnan() and metrics["loss/rl"].isnan() and not metrics["loss/nll"].isnan()
    assert grads_of(loss, logprob)[0].isnan().nonzero().tolist() == [row.tolist()]
    assert metrics["policy/ratio_max"].isnan() == (name in ("logprob", "old_logprob"))


@on_places
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_entropy_that_is_not_asked_for_may_be_anything(place, value):
    """Say -(p log p).sum() over a row with excluded tokens."""
    logprob, entropy, s = make_rows(60, dtype=place.fine, device=place.device)
    clean, _ = scope_loss(logprob, s, entropy=entropy, backend=place.backend)
    loss, _ = scope_loss(logprob, s, entropy=torch.full_like(entropy, value), backend=place.backend)
    assert torch.equal(loss, clean)
    assert torch.equal(*(grads_of(x, logprob)[0] for x in (loss, clean)))


@on_places
@pytest.mark.parametrize("given", [False, True], ids=["", "entropy"])
def test_its_gradient_is_kept_only_where_there_is_an_entropy(place, given):
    logprob, entropy, s = make_rows(30, dtype=place.fine, device=place.device)
    *_, g, h = scope_loss_op(
        logprob, entropy if given else None, s.segment, s.loss_weight, s.old_logprob, s.advantage, s.ref_logprob,
        s.rollout_logprob, encode(LossOptions()), place.backend,
    )  # fmt: skip
    assert g.shape == (30,) and h.shape == ((30,) if given else (0,))


@pytest.mark.skipif(not native.has("scope_loss", "cpu"), reason="no C++ kernel in this build")
@pytest.mark.parametrize("T", [511, 512, 513, 9000, 100_000])
def test_cpu_threads_change_no_bit(T):
    logprob, entropy, s = make_rows(T, dtype=torch.float32, V=8)
    before, runs = torch.get_num_threads(), []
    try:
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            loss, metrics = scope_loss(logprob, s, LossOptions(entropy_coef=0.1), entropy=entropy, backend="cpu")
            runs.append([loss, *metrics.values(), *grads_of(loss, logprob, entropy)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@all_options
def test_gradcheck(options):
    if options.policy_loss == "cispo" or options.nll_shape == "entropy":
        pytest.skip("detached factors: their gradient is not the derivative of the value")
    logprob, entropy, streams = make_rows(12)
    assert torch.autograd.gradcheck(lambda *x: scope_loss(x[0], streams, options, entropy=x[1])[0], (logprob, entropy))


@on_places
def test_backward_twice_and_upstream_gradient(place):
    logprob, _, streams = make_rows(dtype=place.fine, device=place.device)
    loss, _ = scope_loss(logprob, streams, backend=place.backend)
    first = torch.autograd.grad(loss, logprob, retain_graph=True)[0]
    scaled = torch.autograd.grad(-3 * loss, logprob, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, logprob)[0])
    torch.testing.assert_close(scaled, -3 * first)


@on_places
def test_a_batch_of_upstream_gradients(place):
    logprob, _, streams = make_rows(dtype=place.fine, device=place.device)
    loss, _ = scope_loss(logprob, streams, backend=place.backend)
    factors = torch.tensor([1.0, -2.0], dtype=loss.dtype, device=place.device)
    (both,) = torch.autograd.grad(loss, logprob, factors, retain_graph=True, is_grads_batched=True)
    (one,) = torch.autograd.grad(loss, logprob)
    torch.testing.assert_close(both, factors.to(place.fine)[:, None] * one)


@on_places
def test_opcheck(place):
    logprob, entropy, s = make_rows(9, dtype=place.fine, device=place.device)
    args = (
        logprob, entropy, s.segment, s.loss_weight, s.old_logprob, s.advantage, s.ref_logprob, s.rollout_logprob,
        encode(LossOptions(entropy_coef=0.1)), place.backend,
    )  # fmt: skip
    torch.library.opcheck(scope_loss_op, args, atol=1e-5, rtol=1e-5)


@on_places
def test_compile_fullgraph(place):
    logprob, _, streams = make_rows(dtype=place.fine, device=place.device)

    def loss(logprob, streams):
        return scope_loss(2 * logprob, streams, backend=place.backend)[0]

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(grads_of(compiled(logprob, streams), logprob), grads_of(loss(logprob, streams), logprob))


def test_errors_name_the_argument():
    logprob, entropy, streams = make_rows(5)
    for message, call in {
        r"logprob \(5, 1\): expected \(T,\)": lambda: scope_loss(logprob[:, None], streams),
        r"entropy \(4,\): expected \(T,\), like logprob \(5,\)": lambda: scope_loss(
            logprob, streams, entropy=entropy[:4]
        ),
        r"target \(5,\): expected \(4,\), one per row of logprob": lambda: scope_loss(logprob[:4], streams),
        "entropy is None: entropy_coef=0.1": lambda: scope_loss(logprob, streams, LossOptions(entropy_coef=0.1)),
        "entropy is None: .*nll_shape='entropy'": lambda: scope_loss(
            logprob, streams, LossOptions(nll_shape="entropy")
        ),
        "logprob is torch.float16": lambda: scope_loss(logprob.half(), streams),
        "segment holds 9": lambda: scope_loss(
            logprob, TokenStreams(streams.target, streams.segment + 7, streams.loss_weight), check=True
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


@on_places
def test_float64_is_computed_in_float64_or_refused(place):
    logprob, _, streams = make_rows(5, device=place.device)
    if place.backend == "triton":
        with pytest.raises(ValueError, match=r"logprob is torch\.float64: the triton backend takes"):
            scope_loss(logprob, streams, backend="triton")
    else:
        assert scope_loss(logprob, streams, backend=place.backend)[0].dtype == torch.float64
