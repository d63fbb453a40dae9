"""linear_scope_loss as a node of a graph: gradcheck, opcheck, backward twice, frozen inputs, torch.compile."""

import pytest
import torch
from opcases import Case, Place, all_options, gradients, make_case, naive_loss, places

from scope_fast import LossOptions, linear_scope_loss, native
from scope_fast.ops import reference
from scope_fast.ops.linear_scope_loss import STEM, is_plain, linear_scope_loss_op, scaled_op
from scope_fast.ops.options import encode

on_places = places("linear_scope_loss", cuda="linear_scope_loss")
REFERENCE = Place("reference")


def run(case: Case, options=None, place=REFERENCE):
    return linear_scope_loss(
        case.hidden, case.weight, case.streams, options or LossOptions(), bias=case.bias, backend=place.backend
    )


def assert_equal(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


EXACT = pytest.mark.parametrize(
    "place",
    [
        pytest.param(REFERENCE, id="reference"),
        pytest.param(
            Place("cpu"), id="cpu", marks=pytest.mark.skipif(not native.has(STEM, "cpu"), reason="no C++ kernels here")
        ),
    ],
)


@EXACT
@all_options
def test_gradcheck(options, place):
    if options.policy_loss == "cispo" or options.nll_shape == "entropy":
        pytest.skip(
            "detached factors: their gradient is not the derivative of the value (compared with autograd above)"
        )
    case = make_case(T=6, D=3, V=5, bias=True)

    def loss(hidden, weight, bias):
        return run(Case(hidden, weight, bias, case.streams), options, place)[0]

    assert torch.autograd.gradcheck(loss, case.leaves())


@on_places
def test_backward_twice_and_upstream_gradient(place):
    """A second backward finds the saved gradients unscaled, whatever the first one's upstream gradient was."""
    case = make_case().to(place.fine, place.device)
    loss, _ = run(case, place=place)
    once = torch.autograd.grad(loss, case.leaves(), retain_graph=True)
    thrice = torch.autograd.grad(-3.0 * loss, case.leaves(), retain_graph=True)
    again = torch.autograd.grad(loss, case.leaves())
    for a, b, c in zip(once, thrice, again, strict=True):
        assert torch.equal(a, c)
        torch.testing.assert_close(b, -3.0 * a)


@on_places
def test_the_upstream_gradient_is_not_rounded_to_bfloat16(place):
    """A factor that bfloat16 cannot hold scales every gradient by exactly it, rounded once."""
    case = make_case(T=40, V=60).to(torch.bfloat16, place.device)
    loss, _ = run(case, place=place)
    once = torch.autograd.grad(loss, case.leaves(), retain_graph=True)
    third = torch.autograd.grad(loss * (1 / 3), case.leaves())
    for a, b in zip(once, third, strict=True):
        assert b.dtype == torch.bfloat16
        torch.testing.assert_close(b, (a.double() / 3).bfloat16(), rtol=0, atol=0)


@places(reference=False)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_kernel_that_scales_rounds_once(place, dtype):
    from scope_fast.kernels.linear_scope_loss import SCALE_BLOCK, SCALE_PROGRAMS, scale
    from scope_fast.kernels.softmax import num_processors

    r = torch.Generator().manual_seed(0)
    once = SCALE_PROGRAMS * num_processors(torch.device(place.device))  # blocks; the last shape takes three rounds
    for shape in ((0,), (1,), (3, 5), (SCALE_BLOCK + 7,), (2 * once + 1, SCALE_BLOCK)):
        x = torch.randn(shape, generator=r).to(place.device, dtype)
        for value in (1 / 3, 1.0, float("nan")):
            factor = torch.tensor(value, device=place.device)
            expected = x.float().mul(factor).to(dtype)
            if dtype == torch.bfloat16:
                assert_equal(expected, (x.double() * factor.double()).to(dtype))
            assert_equal(scale(x, factor, torch.empty_like(x)), expected)
            again = x.clone()
            assert scale(again, factor, again) is again
            assert_equal(again, expected)
    torch.library.opcheck(scaled_op, (x, torch.tensor(1 / 3, device=place.device), place.backend))


@on_places
def test_the_gradient_is_scaled_in_place_where_the_graph_goes(place, monkeypatch):
    """No second (V, D) is made, nor multiplied by a factor that is seen to be 1; for a retained graph one is."""
    from scope_fast.ops import linear_scope_loss as op

    calls, scale = [], op._scale
    monkeypatch.setattr(op, "_scale", lambda *args: (calls.append((args[0], args[-1])), scale(*args))[1])
    case = make_case().to(place.fine, place.device)
    loss, _ = run(case, place=place)
    kept = torch.autograd.grad(3.0 * loss, case.leaves(), retain_graph=True)
    saved = [x.data_ptr() for x, out in calls]
    assert len(calls) == len(kept) and all(out.data_ptr() != x.data_ptr() for x, out in calls)
    calls.clear()
    gone = torch.autograd.grad(3.0 * loss, case.leaves())
    assert [out.data_ptr() for _, out in calls] == saved == [x.data_ptr() for x in gone]
    for a, b in zip(kept, gone, strict=True):
        assert torch.equal(a, b)
    calls.clear()
    run(case, place=place)[0].backward()
    assert len(calls) == (0 if case.hidden.device.type == "cpu" else len(kept))


@on_places
def test_a_backward_that_was_interrupted_is_not_tried_again(place, monkeypatch):
    """Its first gradient is scaled already."""
    from scope_fast.ops import linear_scope_loss as op

    case = make_case().to(place.fine, place.device)
    loss, _ = run(case, place=place)
    scale, calls = op._scale, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return scale(*args)

    monkeypatch.setattr(op, "_scale", interrupted)
    with pytest.raises(KeyboardInterrupt):
        (3.0 * loss).backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (3.0 * loss).backward()


@on_places
def test_a_factor_whose_negation_was_put_off(place):
    """As complex arithmetic behind the loss leaves it: the memory holds its opposite."""
    case = make_case().to(place.fine, place.device)
    expected = torch.autograd.grad(-run(case, place=place)[0], case.leaves())
    loss, _ = run(case, place=place)
    imaginary = torch.view_as_real(torch.complex(torch.zeros_like(loss), loss).conj().resolve_conj())[1]
    for a, b in zip(torch.autograd.grad(imaginary, case.leaves()), expected, strict=True):
        assert torch.equal(a, b)


def test_a_factor_that_torch_has_not_computed_is_left_to_torch():
    """A kernel of our own would read the memory as it is."""
    imaginary = torch.complex(torch.zeros(()), torch.ones(())).conj().imag
    assert imaginary.is_neg() and not is_plain(imaginary)
    assert not is_plain(torch._efficientzerotensor(()))
    assert is_plain(torch.ones(()))


@EXACT
def test_a_batch_of_factors(place):
    case = make_case()
    loss, _ = run(case, place=place)
    factors = torch.tensor([1.0, -2.0, 0.5], dtype=loss.dtype)
    batched = torch.autograd.grad(loss, case.leaves(), factors, retain_graph=True, is_grads_batched=True)
    last = torch.autograd.grad(loss, case.leaves(), factors, is_grads_batched=True)
    once = gradients(run(case, place=place)[0], case)
    for a, b, c in zip(batched, last, once, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, torch.stack([factor * c for factor in factors]))


def test_compiled_autograd_takes_the_backward_in_one_graph():
    from torch._dynamo import compiled_autograd

    case = make_case()
    expected = gradients(run(case)[0], case)
    torch._dynamo.reset()
    with compiled_autograd._enable(torch.compile(fullgraph=True, backend="aot_eager")):
        (2.0 * run(case)[0]).backward()
    for leaf, gradient in zip(case.leaves(), expected, strict=True):
        torch.testing.assert_close(leaf.grad, 2.0 * gradient)


@on_places
def test_gradient_accumulates_over_shared_weight(place):
    """Two losses of one weight with different upstream gradients."""
    case = make_case().to(place.fine, place.device)
    first, second = (gradients(run(case, place=place)[0], case)[1] for _ in range(2))
    (0.25 * run(case, place=place)[0] + 2.0 * run(case, place=place)[0]).backward()
    torch.testing.assert_close(case.weight.grad, 0.25 * first + 2.0 * second)


@on_places
def test_gradients_never_share_what_is_saved(place):
    """A factor of 1 may hand out the saved gradient itself: sums must not be made in it, nor go unnoticed."""
    case = make_case().to(place.fine, place.device)
    loss, _ = run(case, place=place)
    expected = [gradient.clone() for gradient in torch.autograd.grad(loss, case.leaves(), retain_graph=True)]
    for times in (1, 2, 3):
        loss.backward(retain_graph=True)
        for leaf, gradient in zip(case.leaves(), expected, strict=True):
            torch.testing.assert_close(leaf.grad, times * gradient)
    other, _ = run(case, place=place)
    for sums, gradient in zip(
        torch.autograd.grad(loss + other, case.leaves(), retain_graph=True), expected, strict=True
    ):
        torch.testing.assert_close(sums, 2 * gradient)
    first = torch.autograd.grad(loss, case.leaves(), retain_graph=True)
    first[0].mul_(5.0)
    try:
        second = torch.autograd.grad(loss, case.leaves())
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
    else:
        assert torch.equal(second[0], expected[0])


@on_places
@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_frozen_inputs_get_no_gradient(place, frozen):
    case = make_case(bias=True).to(place.fine, place.device)
    expected = dict(zip(("hidden", "weight", "bias"), gradients(run(case, place=place)[0], case), strict=True))
    getattr(case, frozen).requires_grad_(False)
    run(case, place=place)[0].backward()
    for name in ("hidden", "weight", "bias"):
        grad = getattr(case, name).grad
        assert grad is None if name == frozen else torch.equal(grad, expected[name])


def test_no_grad_forms_no_gradient(monkeypatch):
    monkeypatch.setattr(reference.Gradients, "add", None)  # would be called to form one
    case = make_case()
    expected, _ = naive_loss(case.hidden, case.weight, case.streams, LossOptions())
    with torch.no_grad():
        loss, _ = run(case)
    assert not loss.requires_grad
    assert loss.item() == pytest.approx(expected.item())


def test_second_derivative_is_refused():
    case = make_case()
    with pytest.raises(RuntimeError, match="differentiated once"):
        torch.autograd.grad(run(case)[0], case.hidden, create_graph=True)


@on_places
def test_opcheck(place):
    case = make_case(T=9, bias=True).to(place.fine, place.device)
    s = case.streams
    args = (
        case.hidden, case.weight, case.bias, s.target, s.segment, s.loss_weight, s.old_logprob, s.advantage,
        s.ref_logprob, s.rollout_logprob, s.temperature, None, encode(LossOptions()), "float32", -1, True, True, True,
        place.backend,
    )  # fmt: skip
    # atomicless and deterministic, but opcheck's own gradient comparison assumes float32 noise
    torch.library.opcheck(linear_scope_loss_op, args, atol=1e-5, rtol=1e-5)


@on_places
def test_compile_fullgraph(place):
    case = make_case().to(place.fine, place.device)

    def loss(hidden, weight, streams):
        return linear_scope_loss(2 * hidden, weight, streams, LossOptions(entropy_coef=0.1), backend=place.backend)[0]

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours = gradients(compiled(case.hidden, case.weight, case.streams), case)
    for a, b in zip(ours, gradients(loss(case.hidden, case.weight, case.streams), case), strict=True):
        torch.testing.assert_close(a, b)


@on_places
def test_deterministic_bit_for_bit(place):
    case = make_case(T=50, V=300).to(torch.bfloat16, place.device)
    runs = []
    for _ in range(2):
        loss, metrics = run(case, LossOptions(entropy_coef=0.1), place)
        runs.append([loss, *metrics.values(), *gradients(loss, case)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
