"""linear_logprob: values by hand, gradients of all three outputs, and the edges."""

import math

import pytest
import torch
from opcases import (
    EXTREMES,
    INTERPRETED,
    Case,
    Place,
    assert_no_worse,
    extreme_case,
    gradients,
    make_case,
    naive_stats,
    places,
    strided,
)

from scope_fast import TokenStreams, linear_logprob, native
from scope_fast.ops.linear_logprob import linear_logprob_op

on_places = places("linear_logprob", "linear_logprob_backward")
REFERENCE = Place("reference")
OUTPUTS = ("logprob", "entropy", "logsumexp")


def run(case: Case, place=REFERENCE, **kwargs):
    kwargs.setdefault("temperature", 1.0 if case.streams.temperature is None else case.streams.temperature)
    return linear_logprob(
        case.hidden, case.weight, case.streams.target, bias=case.bias, backend=place.backend, **kwargs
    )


def truth_of(case: Case):
    T = case.hidden.shape[0]
    temperature = torch.ones(T) if case.streams.temperature is None else case.streams.temperature
    return naive_stats(case.hidden, case.weight, case.streams.target, temperature, case.bias)


def upstream(T: int) -> torch.Tensor:
    """(3, T): a gradient of its own for every output and row, some zero, some negative."""
    grad = torch.randn(3, T, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    grad[:, ::4] = 0.0
    return grad


def weighted(outputs) -> torch.Tensor:
    grad = upstream(outputs[0].shape[0]).to(outputs[0])
    return sum((g * out).sum() for g, out in zip(grad, outputs, strict=True))


def precisions(place: Place) -> list[tuple[torch.dtype, str]]:
    """(dtype, logits_dtype) of all that a backend computes differently."""
    return [*((dtype, "float32") for dtype in place.dtypes), (torch.bfloat16, "bfloat16")]


def check_against_naive(
    case64: Case, place: Place, dtype: torch.dtype, logits_dtype: str = "float32", **kwargs
) -> None:
    case, eager = case64.to(dtype, place.device), case64.to(dtype)
    truth, theirs, ours = truth_of(case64), truth_of(eager), run(case, place, logits_dtype=logits_dtype, **kwargs)
    for name, a, b, c in zip(OUTPUTS, ours, theirs, truth, strict=True):
        assert a.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        # eager torch rounds bfloat16's logits too, each to another side
        assert_no_worse(a, b, c, torch.bfloat16 if logits_dtype == "bfloat16" else a.dtype, name)
    names = ("dhidden", "dweight", "dbias")[: len(case.leaves())]
    grads = (gradients(weighted(out), each) for out, each in ((ours, case), (theirs, eager), (truth, case64)))
    for name, a, b, c in zip(names, *grads, strict=True):
        assert a.dtype == dtype
        assert_no_worse(a, b, c, dtype, name)


@on_places
def test_hand_values(place):
    """Logits (log 3, 0) at temperature 1 and 2: p = (3/4, 1/4), then p = sqrt 3 / (1 + sqrt 3)."""
    hidden = torch.tensor([[math.log(3), 0.0]] * 2, dtype=place.fine)
    streams = TokenStreams(torch.tensor([1, 0]), torch.zeros(2), torch.zeros(2), temperature=torch.tensor([1.0, 2.0]))
    case = Case(hidden, torch.eye(2, dtype=place.fine), None, streams).to(place.fine, place.device)
    out = run(case, place)
    p = math.sqrt(3) / (1 + math.sqrt(3))
    assert out.logprob.tolist() == pytest.approx([math.log(0.25), math.log(p)], rel=1e-6)
    entropy = [math.log(4) - 0.75 * math.log(3), -p * math.log(p) - (1 - p) * math.log(1 - p)]
    assert out.entropy.tolist() == pytest.approx(entropy, rel=1e-6)
    assert out.logsumexp.tolist() == pytest.approx([math.log(4), math.log(1 + math.sqrt(3))], rel=1e-6)
    (dhidden,) = torch.autograd.grad(out.logprob.sum(), case.hidden)
    assert dhidden.flatten().tolist() == pytest.approx([-0.75, 0.75, (1 - p) / 2, (p - 1) / 2], rel=1e-6)


@on_places
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("temperature", [False, True], ids=["", "temperature"])
@pytest.mark.parametrize("chunk_tokens", [None, 0, 4])
def test_every_dtype(place, bias, temperature, chunk_tokens):
    case = make_case(T=15, bias=bias, temperature=temperature)
    for dtype, logits_dtype in precisions(place):
        check_against_naive(case, place, dtype, logits_dtype, chunk_tokens=chunk_tokens)


@on_places
@pytest.mark.parametrize("chunk_tokens", [None, 0])
@pytest.mark.parametrize(("T", "D", "V"), [(1, 1, 2), (1, 5, 7), (3, 129, 2), (33, 17, 1000), (65, 64, 257)])
def test_odd_shapes(place, T, D, V, chunk_tokens):
    check_against_naive(make_case(T, D, V, bias=True, seed=T), place, place.fine, chunk_tokens=chunk_tokens)


@on_places
def test_vocabulary_of_several_blocks(place):
    case = make_case(T=4, D=8, V=9001, bias=True, temperature=True)
    for dtype, logits_dtype in precisions(place):
        check_against_naive(case, place, dtype, logits_dtype)


@places(reference=False)
@pytest.mark.parametrize("chunk_tokens", [None, 0])
def test_gradient_in_several_vocabulary_tiles(place, chunk_tokens, monkeypatch):
    """700 columns in tiles of 256: targets fall inside, before and after a tile."""
    for name in ("TILE_BYTES", "STREAM_BYTES"):
        monkeypatch.setattr(f"scope_fast.kernels.linear_logprob.{name}", 1)
    case = make_case(T=9, D=8, V=700, bias=True)
    for dtype, logits_dtype in precisions(place):
        check_against_naive(case, place, dtype, logits_dtype, chunk_tokens=chunk_tokens)


@on_places
@pytest.mark.parametrize("chunk_tokens", [None, 0])
@pytest.mark.parametrize("kind", EXTREMES)
def test_extreme_logits(place, kind, chunk_tokens):
    check_against_naive(extreme_case(kind), place, torch.float32, chunk_tokens=chunk_tokens)


@on_places
@pytest.mark.parametrize("chunk_tokens", [None, 0])
@pytest.mark.parametrize("height", [-1000.0, 88.7, 1000.0])
def test_a_bias_beyond_what_exp_can_take(place, height, chunk_tokens):
    """A row has no more tokens than itself: what pads it to a tile must add nothing, and no infinity times zero."""
    case = make_case(T=3, D=4, V=6, bias=True)
    with torch.no_grad():
        case.bias.fill_(height)
    check_against_naive(case, place, place.fine, chunk_tokens=chunk_tokens)


@on_places
@pytest.mark.parametrize("chunk_tokens", [None, 0])
def test_no_probability_is_above_one(place, chunk_tokens):
    """A scaled logit is rounded in one place and fused in another: of a sure token the difference must not show."""
    case = make_case(T=300, D=64, V=50).to(torch.float32, place.device)
    sure = (case.hidden @ case.weight.T).argmax(1)
    out = run(case.with_streams(target=sure), place, chunk_tokens=chunk_tokens, temperature=0.01)
    assert out.logprob.max() <= 0.0 and out.entropy.min() >= 0.0


@on_places
@pytest.mark.parametrize("chunk_tokens", [None, 0])
def test_excluded_target_has_logprob_minus_infinity(place, chunk_tokens):
    case = make_case(T=4, bias=True)
    with torch.no_grad():
        case.bias[2] = -math.inf
    case = case.with_streams(target=torch.tensor([2, 1, 2, 3])).to(place.fine, place.device)
    out = run(case, place, chunk_tokens=chunk_tokens)
    assert out.logprob.isinf().tolist() == [True, False, True, False]
    assert out.entropy.isfinite().all() and out.logsumexp.isfinite().all()


@on_places
@pytest.mark.parametrize("chunk_tokens", [None, 0])
def test_target_out_of_range_is_nan_not_a_neighbour(place, chunk_tokens):
    case = make_case(T=4).with_streams(target=torch.tensor([-100, 1, 19, 3])).to(place.fine, place.device)
    out = run(case, place, chunk_tokens=chunk_tokens)
    assert out.logprob.isnan().tolist() == [True, False, True, False]
    assert out.entropy.isfinite().all()


@on_places
@pytest.mark.parametrize("chunk_tokens", [None, 0])
def test_ignored_rows_under_a_mask_have_no_gradient(place, chunk_tokens):
    """Targets of -100 that the caller masks: the gradients are those of the other rows alone, and finite."""
    case64 = make_case(T=9, bias=True)
    keep = torch.arange(9) % 3 != 0
    masked = case64.with_streams(target=torch.where(keep, case64.streams.target, -100)).to(place.fine, place.device)
    kept = case64.to(place.fine, place.device)
    ours = run(masked, place, chunk_tokens=chunk_tokens).logprob
    theirs = run(kept, place, chunk_tokens=chunk_tokens).logprob
    on, zero = keep.to(place.device), ours.new_zeros(())
    for a, b in zip(
        gradients(torch.where(on, ours, zero).sum(), masked), gradients((theirs * on).sum(), kept), strict=True
    ):
        assert torch.equal(a, b)


@on_places
@pytest.mark.parametrize("chunk_tokens", [None, 3, 0])
def test_non_contiguous_inputs(place, chunk_tokens):
    plain = make_case(T=10, D=8, V=12, bias=True, temperature=True).to(place.fine, place.device)
    streams = {name: strided(getattr(plain.streams, name)) for name in ("target", "temperature")}
    other = Case(*(strided(x) for x in plain.leaves()), plain.streams).with_streams(**streams)
    assert not any(x.is_contiguous() for x in (*other.leaves(), *streams.values()))
    ours, theirs = (
        run(case, place, temperature=case.streams.temperature, chunk_tokens=chunk_tokens) for case in (other, plain)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(gradients(weighted(ours), other), gradients(weighted(theirs), plain), strict=True):
        torch.testing.assert_close(a, b)


@on_places
@pytest.mark.parametrize("chunk_tokens", [None, 0])
def test_deterministic_bit_for_bit(place, chunk_tokens):
    case = make_case(T=50, V=300).to(torch.bfloat16, place.device)
    runs = []
    for _ in range(2):
        out = run(case, place, chunk_tokens=chunk_tokens)
        runs.append([*out, *gradients(weighted(out), case)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@on_places
def test_empty(place):
    case = make_case(T=0, bias=True).to(place.fine, place.device)
    out = run(case, place)
    assert [x.shape for x in out] == [(0,)] * 3
    out.logprob.sum().backward()
    assert case.weight.grad.eq(0).all() and case.bias.grad.eq(0).all()


@on_places
def test_temperature_scalar_is_the_stream_of_it(place):
    case = make_case(T=9).to(place.fine, place.device)
    stream = torch.full((9,), 0.5, device=place.device)
    for a, b in zip(run(case, place, temperature=0.5), run(case, place, temperature=stream), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_gradcheck(backend):
    if backend == "cpu" and not native.has("linear_logprob_backward", "cpu"):
        pytest.skip("no C++ kernels here")
    case = make_case(T=5, D=3, V=6, bias=True, temperature=True)

    def stats(hidden, weight, bias):
        return tuple(run(Case(hidden, weight, bias, case.streams), Place(backend)))

    assert torch.autograd.gradcheck(stats, case.leaves())


@on_places
def test_backward_twice(place):
    case = make_case().to(place.fine, place.device)
    loss = weighted(run(case, place))
    first = torch.autograd.grad(loss, case.leaves(), retain_graph=True)
    torch.autograd.grad(2 * loss, case.leaves(), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, case.leaves()), strict=True))


@on_places
def test_unused_outputs_have_zero_gradient(place):
    """Only the entropy is used: the gradient is the entropy's alone, not garbage of the others."""
    case64 = make_case()
    case, eager = case64.to(place.fine, place.device), case64.to(place.fine)
    ours = gradients(run(case, place).entropy.sum(), case)
    truth = gradients(truth_of(case64)[1].sum(), case64)
    theirs = gradients(truth_of(eager)[1].sum(), eager)
    for a, b, c in zip(ours, theirs, truth, strict=True):
        assert_no_worse(a, b, c, place.fine, "entropy gradient")


@on_places
@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_frozen_inputs_get_no_gradient(place, frozen):
    case = make_case(bias=True).to(place.fine, place.device)
    expected = dict(zip(("hidden", "weight", "bias"), gradients(weighted(run(case, place)), case), strict=True))
    getattr(case, frozen).requires_grad_(False)
    weighted(run(case, place)).backward()
    for name, true in expected.items():
        grad = getattr(case, name).grad
        assert grad is None if name == frozen else torch.equal(grad, true)


@on_places
def test_opcheck(place):
    case = make_case(T=9, bias=True).to(place.fine, place.device)
    args = (case.hidden, case.weight, case.bias, case.streams.target, None, 1.0, "float32", -1, place.backend)
    torch.library.opcheck(linear_logprob_op, args, atol=1e-5, rtol=1e-5)


@on_places
def test_compile_fullgraph(place):
    case = make_case().to(place.fine, place.device)

    grad = upstream(13).to(place.device, torch.float32)

    def loss(hidden, weight, target):
        out = linear_logprob(2 * hidden, weight, target, backend=place.backend)
        return (grad * torch.stack(out)).sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    inputs = (case.hidden, case.weight, case.streams.target)
    for a, b in zip(gradients(compiled(*inputs), case), gradients(loss(*inputs), case), strict=True):
        torch.testing.assert_close(a, b)


@on_places
def test_bf16_precision_at_a_large_vocabulary(place):
    """bfloat16 inputs, float32 logits: logprobs within 1e-4 of float64 where bfloat16 logits are off by 1e-2."""
    V, D = 20011, 64
    case64 = make_case(4, D, V)
    truth = truth_of(case64)[0]
    for chunk_tokens in (None, 0):
        ours = run(case64.to(torch.bfloat16, place.device), place, chunk_tokens=chunk_tokens).logprob
        assert (ours.cpu() - truth).abs().max() < 1e-4
    rounded = run(case64.to(torch.bfloat16, place.device), place, logits_dtype="bfloat16").logprob
    assert 1e-4 < (rounded.cpu() - truth).abs().max() < 2e-2


def test_autocast_reaches_forward_and_backward():
    case = make_case().to(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = run(case)
        grads = gradients(weighted(out), case)
    cast = case.to(torch.bfloat16)
    expected = run(cast)
    assert torch.equal(out.logprob, expected.logprob)
    for a, b in zip(grads, gradients(weighted(expected), cast), strict=True):
        assert torch.equal(a, b.float())


@places(reference=False)
def test_triton_refuses_float64(place):
    case = make_case().to(torch.float64, place.device)
    with pytest.raises(ValueError, match="float64: the triton backend takes bfloat16 and float32"):
        run(case, place)


def test_errors_name_the_argument():
    case = make_case()
    h, w, t = case.hidden, case.weight, case.streams.target
    for message, call in {
        r"hidden \(13, 7\) and weight \(19, 6\)": lambda: linear_logprob(h, w[:, :6], t),
        r"weight \(19, 0\): expected \(V, D\) with V and D at least 1": lambda: linear_logprob(h[:, :0], w[:, :0], t),
        r"target \(12,\): expected \(13,\)": lambda: linear_logprob(h, w, t[:12]),
        "target is torch.int32: expected torch.int64": lambda: linear_logprob(h, w, t.int()),
        r"temperature \(12,\): expected \(13,\)": lambda: linear_logprob(h, w, t, temperature=torch.ones(12)),
        "temperature=0.0: expected a value above 0": lambda: linear_logprob(h, w, t, temperature=0.0),
        "temperature=nan: expected a value above 0": lambda: linear_logprob(h, w, t, temperature=math.nan),
        "temperature is torch.int64 on cpu": lambda: linear_logprob(h, w, t, temperature=torch.ones_like(t)),
        "temperature holds -1.0: expected values above 0": lambda: linear_logprob(
            h, w, t, temperature=torch.linspace(-1, 1, 13), check=True
        ),
        "logits_dtype='half': expected one of": lambda: linear_logprob(h, w, t, logits_dtype="half"),
        "chunk_tokens=-1: expected None, 0": lambda: linear_logprob(h, w, t, chunk_tokens=-1),
        "float16: gradients formed": lambda: linear_logprob(h.half(), w.half(), t),
        r"target holds 19: expected values in \[0, 19\)": lambda: linear_logprob(h, w, t.clamp(19), check=True),
        r"hidden \(13, 7\) holds 91 non-finite": lambda: linear_logprob(h * math.nan, w, t, check=True),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.skipif(not INTERPRETED, reason="of the interpreted kernel alone: on a GPU few rows are split as often")
def test_triton_merges_more_splits_than_fit_at_once(monkeypatch):
    from scope_fast.kernels import linear_logprob as kernel

    monkeypatch.setattr(kernel, "num_processors", lambda device: 100)
    case = make_case(T=3, V=40 * 32 + 5).to(torch.float32)
    split = linear_logprob(case.hidden, case.weight, case.streams.target, chunk_tokens=0, backend="triton")
    whole = linear_logprob(case.hidden, case.weight, case.streams.target, backend="reference")
    for ours, expected in zip(split, whole, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
