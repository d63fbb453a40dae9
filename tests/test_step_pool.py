"""step_pool: scores by hand for every head, the first-error rule, pools, empties and bad boundaries."""

import math

import pytest
import torch
from opcases import Place, places, strided

from scope_fast import PrmHead, step_pool
from scope_fast.ops import dispatch
from scope_fast.ops.step_pool import step_pool_op

on_places = places(cuda="step_pool")
REFERENCE = Place("reference")


def logits(p: float) -> list[float]:
    """Two logits whose softmax gives p to label 1."""
    return [0.0, math.log(p) - math.log1p(-p)]


def run(probs, cu_steps, place=REFERENCE, tau=0.5, dtype=torch.float32):
    """step_pool over hidden states that an identity head turns into `probs`, one step a row."""
    nan = math.nan
    hidden = torch.tensor([[nan, nan] if p != p else logits(p) for p in probs], dtype=dtype).reshape(-1, 2)
    head = PrmHead(torch.eye(2, device=place.device, dtype=dtype))
    index = torch.arange(len(probs), device=place.device)
    return step_pool(
        hidden.to(place.device),
        head,
        index,
        torch.tensor(cu_steps, device=place.device),
        tau=tau,
        backend=place.backend,
    )


@on_places
def test_verdicts_by_hand(place):
    probs = [0.9, 0.8, 0.3, 0.7, 0.6, 0.2, 0.9]
    out = run(probs, [0, 3, 3, 5, 7], place)
    assert out.prob.tolist() == pytest.approx(probs, rel=1e-6)
    assert out.first_error.tolist() == [2, 0, 2, 0]  # third step; no steps; none wrong; first step
    assert out.first_error.dtype == torch.int64
    assert out.min.tolist() == pytest.approx([0.3, 0, 0.6, 0.2], rel=1e-6)
    assert out.mean.tolist() == pytest.approx([2 / 3, 0, 0.65, 0.55], rel=1e-6)
    assert out.prod.tolist() == pytest.approx([0.9 * 0.8 * 0.3, 0, 0.42, 0.18], rel=1e-6)
    assert out.last.tolist() == pytest.approx([0.3, 0, 0.6, 0.9], rel=1e-6)


@on_places
def test_tau_is_inclusive_and_nan_is_an_error(place):
    out = run([0.5, 0.9, 0.9, math.nan, 0.9], [0, 2, 5], place, tau=0.5)
    assert out.first_error.tolist() == [2, 1]
    assert out.min.isnan().tolist() == out.mean.isnan().tolist() == out.prod.isnan().tolist() == [False, True]
    assert out.last.tolist() == pytest.approx([0.9, 0.9], rel=1e-6)
    assert run([0.8, 0.81], [0, 2], place, tau=0.805).first_error.tolist() == [0]


@on_places
@pytest.mark.parametrize("D", [32, 24])  # the second has no rows of whole vectors
def test_an_mlp_head_on_many_steps(place, D):
    """As many as fill the large tiles, and a rest."""
    if place.backend == "cuda":
        pytest.skip("the head with a hidden layer is Triton's")
    S, M, r = 700, 144, torch.Generator().manual_seed(1)
    hidden, hw, hb = (torch.randn(*n, generator=r).bfloat16().double() for n in ((90, D), (M, D), (M,)))
    w, b = (torch.randn(*n, generator=r).bfloat16().double() / 8 for n in ((2, M), (2,)))
    step_end, cu_steps = torch.randint(0, 90, (S,), generator=r), torch.tensor([0, 1, 300, S])
    true = ((hidden[step_end] @ hw.T + hb).relu() @ w.T + b).softmax(1)[:, 1]
    for dtype in place.dtypes:
        inputs = [x.to(place.device, dtype) for x in (hidden, w, b, hw, hb)]
        rest = (step_end.to(place.device), cu_steps.to(place.device))
        prob = step_pool(inputs[0], PrmHead(*inputs[1:]), *rest, backend=place.backend).prob
        # inputs are exact in bfloat16, and every backend multiplies and adds them in float32
        torch.testing.assert_close(prob.double().cpu(), true, rtol=0, atol=1e-4)


@on_places
def test_every_head(place):
    """Linear, MLP, sigmoid and lm_head heads against their formulas, in every dtype; boundaries repeat and jump."""
    T, D, M, V = 40, 24, 12, 30
    r = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=r).bfloat16().double()

    hidden, w, b = normal(T, D), normal(2, D) / 4, normal(2)
    hw, hb, w2, lm = normal(M, D) / 4, normal(M), normal(2, M) / 4, normal(V, D) / 4
    step_end, cu_steps = torch.tensor([3, 39, 0, 3, 17]), torch.tensor([0, 2, 5])
    x = hidden[step_end]
    inner = (x @ hw.T + hb).relu()
    cases = {
        "linear": (PrmHead(w, b), (x @ w.T + b).softmax(1)[:, 1]),
        "negative first": (PrmHead(w, b, positive=0), (x @ w.T + b).softmax(1)[:, 0]),
        "mlp": (PrmHead(w2, b, hw, hb), (inner @ w2.T + b).softmax(1)[:, 1]),
        "mlp without bias": (PrmHead(w2, None, hw), ((x @ hw.T).relu() @ w2.T).softmax(1)[:, 1]),
        "sigmoid": (PrmHead(w[:1], b[:1]), (x @ w[0] + b[0]).sigmoid()),
        "lm_head": (PrmHead.from_lm_head(lm, 7, 22), (x @ lm[[7, 22]].T).softmax(1)[:, 1]),
    }
    if place.backend == "cuda":  # refused by name, below
        cases = {name: case for name, case in cases.items() if "mlp" not in name}
    for name, (head, truth) in cases.items():
        for dtype in (torch.float32, torch.bfloat16):
            parts = {k: v.to(place.device, dtype) if isinstance(v, torch.Tensor) else v for k, v in vars(head).items()}
            out = step_pool(
                hidden.to(place.device, dtype), PrmHead(**parts), step_end.to(place.device), cu_steps.to(place.device),
                backend=place.backend,
            )  # fmt: skip
            # inputs are exact in bfloat16 and products accumulate in float32; w / 4 and hw / 4 stay exact too
            torch.testing.assert_close(out.prob.double().cpu(), truth, rtol=0, atol=2e-6, msg=lambda m, n=name: n + m)


@on_places
def test_many_rollouts_of_many_lengths(place):
    """Segments longer than any block, empty ones in between, against a plain loop."""
    r = torch.Generator().manual_seed(3)
    counts = [0, 1, 2, 300, 0, 0, 63, 64, 65, 1, 0]
    probs = (torch.rand(sum(counts), generator=r) * 0.6 + 0.4).tolist()
    cu_steps = [sum(counts[:i]) for i in range(len(counts) + 1)]
    out = run(probs, cu_steps, place, tau=0.45)
    for i, (start, count) in enumerate(zip(cu_steps, counts, strict=False)):
        mine = out.prob[start : start + count].tolist()
        wrong = [j for j, p in enumerate(mine) if not p >= 0.45]
        assert out.first_error[i].item() == (wrong[0] if wrong else count)
        expected = (min(mine), sum(mine) / count, math.prod(mine), mine[-1]) if count else (0.0,) * 4
        assert [out[k][i].item() for k in (2, 3, 4, 5)] == pytest.approx(expected, rel=2e-5, abs=1e-30)


@on_places
def test_no_steps_and_no_rollouts(place):
    out = run([], [0, 0, 0], place)
    assert out.prob.shape == (0,)
    assert out.first_error.tolist() == [0, 0] and out.min.tolist() == out.last.tolist() == [0.0, 0.0]
    out = run([], [0], place)
    assert [x.shape for x in out] == [(0,)] * 6


@on_places
@pytest.mark.parametrize("mlp", [False, True])
def test_non_contiguous_inputs(place, mlp):
    if mlp and place.backend == "cuda":
        pytest.skip("the cuda backend has no kernel for MLP heads")
    r = torch.Generator().manual_seed(5)
    hidden, inner = torch.randn(9, 6, generator=r), torch.randn(7, 6, generator=r)
    parts = [torch.randn(2, 7 if mlp else 6, generator=r), torch.randn(2, generator=r)]
    parts += [inner, torch.randn(7, generator=r)] if mlp else []
    index = [torch.tensor([1, 4, 8, 3]), torch.tensor([0, 1, 4])]
    hidden, *rest = (x.to(place.device) for x in (hidden, *parts, *index))
    plain = step_pool(hidden, PrmHead(*rest[:-2]), *rest[-2:], backend=place.backend)
    rest = [strided(x) for x in rest]
    assert not any(x.is_contiguous() for x in rest)
    for each in (strided(hidden), hidden.T.contiguous().T, hidden):
        out = step_pool(each, PrmHead(*rest[:-2]), *rest[-2:], backend=place.backend)
        for a, b in zip(out, plain, strict=True):
            torch.testing.assert_close(a, b)


@on_places
def test_deterministic_bit_for_bit(place):
    r = torch.Generator().manual_seed(6)
    hidden, weight = torch.randn(400, 96, generator=r), torch.randn(2, 96, generator=r)
    end, cu_steps = torch.randint(0, 400, (300,), generator=r), torch.tensor([0, 1, 131, 300])
    inputs = [x.to(place.device) for x in (hidden, weight, end, cu_steps)]
    runs = [step_pool(inputs[0], PrmHead(inputs[1]), *inputs[2:], backend=place.backend) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@on_places
def test_opcheck(place):
    head = PrmHead(torch.eye(2, device=place.device), torch.zeros(2, device=place.device))
    hidden = torch.randn(5, 2, device=place.device)
    index = torch.tensor([0, 2], device=place.device)
    args = (hidden, index, torch.tensor([0, 1, 2], device=place.device), head.weight, head.bias, None, None, 1, 0.5)
    torch.library.opcheck(step_pool_op, (*args, place.backend))


@on_places
def test_compile_fullgraph(place):
    head = PrmHead(torch.eye(2, device=place.device), torch.zeros(2, device=place.device))
    hidden = torch.randn(5, 2, device=place.device, generator=torch.Generator(place.device).manual_seed(0))
    index, cu_steps = (torch.tensor(x, device=place.device) for x in ([0, 2, 4], [0, 1, 3]))

    def verdicts(hidden):
        return step_pool(2 * hidden, head, index, cu_steps, backend=place.backend)

    torch._dynamo.reset()
    compiled = torch.compile(verdicts, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(hidden), verdicts(hidden), strict=True))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_an_mlp_head_is_not_for_the_cuda_backend(device):
    """Asked for by name it raises, and says so; chosen by device it is never cuda."""
    with pytest.raises(RuntimeError, match=r"step_pool_mlp: backend='cuda' is unavailable .*has no cuda kernel"):
        head = PrmHead(torch.eye(2, device=device), None, torch.eye(2, device=device))
        index = torch.tensor([0, 1], device=device)
        step_pool(torch.ones(1, 2, device=device), head, index[:1], index, backend="cuda")
    assert dispatch.resolve("step_pool_mlp", dispatch.AUTO, device) in ("triton", "reference")


def test_inference_only():
    hidden = torch.randn(3, 2, requires_grad=True)
    out = step_pool(hidden, PrmHead(torch.eye(2)), torch.tensor([0, 2]), torch.tensor([0, 2]))
    assert not out.prob.requires_grad


def test_errors_name_the_argument():
    hidden, head = torch.randn(4, 2), PrmHead(torch.eye(2))
    end, cu = torch.tensor([1, 3]), torch.tensor([0, 2])
    for message, call in {
        r"hidden \(4, 3\): expected \(T, 2\)": lambda: step_pool(torch.randn(4, 3), head, end, cu),
        r"step_end \(2,\) torch.int32": lambda: step_pool(hidden, head, end.int(), cu),
        r"cu_steps \(0,\): expected \(R \+ 1,\)": lambda: step_pool(hidden, head, end, cu[:0]),
        r"cu_steps \(3,\) is not ascending": lambda: step_pool(hidden, head, end, torch.tensor([0, 2, 1]), check=True),
        "cu_steps runs from 0 to 1: expected 0 to 2": lambda: step_pool(
            hidden, head, end, torch.tensor([0, 1]), check=True
        ),
        r"step_end runs from 1 to 4: expected rows in \[0, 4\)": lambda: step_pool(
            hidden, head, torch.tensor([1, 4]), cu, check=True
        ),
        "holds 2 non-finite values": lambda: step_pool(hidden * math.nan, head, end[:1], cu // 2, check=True),
        r"weight \(3, 2\): expected \(1, D\) or \(2, D\)": lambda: PrmHead(torch.zeros(3, 2)),
        "positive=2: expected 0 or 1": lambda: PrmHead(torch.eye(2), positive=2),
        r"bias \(3,\) and weight \(2, 2\)": lambda: PrmHead(torch.eye(2), torch.zeros(3)),
        r"hidden_weight \(3, 5\) and weight \(2, 2\)": lambda: PrmHead(torch.eye(2), None, torch.zeros(3, 5)),
        r"hidden_bias \(3,\) without hidden_weight": lambda: PrmHead(torch.eye(2), None, None, torch.zeros(3)),
        r"positive_id=9: expected a row of weight \(4, 2\)": lambda: PrmHead.from_lm_head(hidden, 1, 9),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
