"""Random shapes, dtypes, segments and options: every backend against the reference in float64, on the same device.

Ten examples a test, the same ones every time; FUZZ_EXAMPLES asks for more:
    FUZZ_EXAMPLES=2000 pytest -m gpu -n 8 tests/test_triton_fuzz.py
"""

import os

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from opcases import Case, gradients, make_case, places, strided

from scope_fast import LossOptions, PrmHead, linear_logprob, linear_scope_loss, scope_loss, step_pool, weight_bucket


@pytest.fixture(autouse=True, scope="module")
def few_rows_of_logits_at_a_time():
    """So that the linear loss keeps the gradient of a few rows in a buffer of its own, as it does for thousands."""
    plan = pytest.importorskip("scope_fast.kernels.plan")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "LOGIT_ROWS", 2)
        yield


fuzzed = settings(max_examples=int(os.environ.get("FUZZ_EXAMPLES", "10")), deadline=None, derandomize=True)

sizes = st.tuples(st.integers(0, 24), st.integers(1, 40), st.integers(2, 300))
dtypes = st.sampled_from([torch.float32, torch.bfloat16])


@st.composite
def loss_options(draw) -> LossOptions:
    kl = draw(st.sampled_from(["none", "k1", "k2", "k3"]))
    policy_loss = draw(st.sampled_from(["ppo", "cispo"]))
    return LossOptions(
        clip_low=draw(st.sampled_from([0.1, 0.2, 1.0])),
        clip_high=draw(st.sampled_from([0.2, 0.28, 5.0])),
        dual_clip=draw(st.sampled_from([None, 1.5, 3.0])) if policy_loss == "ppo" else None,
        policy_loss=policy_loss,
        kl=kl,
        kl_coef=0.0 if kl == "none" else draw(st.sampled_from([0.0, 0.1])),
        entropy_coef=draw(st.sampled_from([0.0, 0.01, -0.1])),
        importance_cap=draw(st.sampled_from([None, 1.0, 2.0])),
        nll_shape=draw(st.sampled_from(["constant", "shaped", "entropy"])),
        temperature=draw(st.sampled_from([0.6, 1.0, 1.7])),
        chunk_tokens=draw(st.sampled_from([None, 0, 1, 7])),
        logits_dtype=draw(st.sampled_from(["float32", "bfloat16"])),
    )


@st.composite
def cases(draw) -> Case:
    T, D, V = draw(sizes)
    return make_case(
        T, D, V, bias=draw(st.booleans()), on_policy=draw(st.booleans()), temperature=draw(st.booleans()),
        segments=draw(st.sampled_from([(0, 1, 2), (0,), (1,), (2,), (0, 1), (1, 2)])), seed=draw(st.integers(0, 99)),
    )  # fmt: skip


def close_to(ours: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype) -> None:
    """Equal up to the rounding of `dtype` at the values' scale: the backends add in different orders."""
    scale = max(1.0, theirs.detach().abs().max().item()) if theirs.numel() else 1.0
    slack = (2e-2 if dtype == torch.bfloat16 else 1e-5) * scale
    torch.testing.assert_close(ours.cpu().double(), theirs.cpu().double(), rtol=0, atol=slack)


@places("linear_scope_loss", reference=False, cuda="linear_scope_loss")
@given(case=cases(), options=loss_options(), dtype=dtypes, given_rows=st.booleans())
@example(
    case=make_case(T=21, D=7, V=150), options=LossOptions(entropy_coef=0.01), dtype=torch.bfloat16, given_rows=False
)
@example(case=make_case(21, 7, 150, segments=(1, 2)), options=LossOptions(), dtype=torch.bfloat16, given_rows=True)
@fuzzed
def test_fuzz_linear_scope_loss(place, case, options, dtype, given_rows):
    if given_rows:  # more than have a gradient, named by every second element of something longer
        case = case.with_streams(active=strided(torch.arange(len(case.streams))))
    rounded = torch.bfloat16 if torch.bfloat16 == dtype and options.logits_dtype == "bfloat16" else torch.float32
    # logits that are rounded on purpose may take a row to the other side of a clip bound: the reference rounds them too
    exact = torch.bfloat16 if rounded == torch.bfloat16 else torch.float64
    ours, theirs = case.to(dtype, place.device), case.to(exact, place.device)
    loss, metrics = linear_scope_loss(
        ours.hidden, ours.weight, ours.streams, options, bias=ours.bias, backend=place.backend
    )
    true, true_metrics = linear_scope_loss(
        theirs.hidden, theirs.weight, theirs.streams, options, bias=theirs.bias, backend="reference"
    )
    close_to(loss, true, rounded)
    for name in metrics.keys() - {"policy/clipped"}:  # a count: a ratio at the bound may fall either way
        close_to(metrics[name], true_metrics[name], rounded)
    for a, b in zip(gradients(loss, ours), gradients(true, theirs), strict=True):
        close_to(a, b, dtype)


@places("linear_logprob", "linear_logprob_backward", reference=False)
@pytest.mark.parametrize(
    ("dtype", "logits_dtype"),
    [(torch.float32, "float32"), (torch.bfloat16, "float32"), (torch.bfloat16, "bfloat16")],
    ids=["float32", "bfloat16", "bfloat16 logits"],
)
@given(case=cases(), chunk_tokens=st.sampled_from([None, 0, 3]))
@fuzzed
def test_fuzz_linear_logprob(place, case, dtype, logits_dtype, chunk_tokens):
    rounded = torch.bfloat16 if logits_dtype == "bfloat16" else torch.float32
    results = []
    for backend, kept in ((place.backend, dtype), ("reference", torch.float64)):
        each = case.to(kept, place.device)
        temperature = 1.0 if each.streams.temperature is None else each.streams.temperature
        out = linear_logprob(
            each.hidden, each.weight, each.streams.target, bias=each.bias, temperature=temperature,
            chunk_tokens=chunk_tokens, logits_dtype=logits_dtype, backend=backend,
        )  # fmt: skip
        results.append((out, gradients((out[0] - 0.3 * out[1] + 0.1 * out[2]).sum(), each)))
    (out, grads), (true, true_grads) = results
    for a, b in zip(out, true, strict=True):
        close_to(a, b, rounded)
    for a, b in zip(grads, true_grads, strict=True):
        close_to(a, b, dtype)


@places("scope_loss", reference=False)
@given(case=cases(), options=loss_options())
@fuzzed
def test_fuzz_scope_loss(place, case, options):
    results = []
    for backend, dtype in ((place.backend, torch.float32), ("reference", torch.float64)):
        each = case.to(torch.float32, place.device)
        stats = linear_logprob(each.hidden, each.weight, each.streams.target, backend="reference")
        leaves = [x.detach().to(dtype).requires_grad_() for x in stats[:2]]
        loss, metrics = scope_loss(leaves[0], each.streams, options, entropy=leaves[1], backend=backend)
        results.append([loss, *metrics.values(), *torch.autograd.grad(loss, leaves)])
    for a, b in zip(*results, strict=True):
        close_to(a, b, torch.float32)


@places(reference=False, cuda="step_pool")
@given(
    counts=st.lists(st.integers(0, 70), max_size=6),
    dims=st.tuples(st.integers(1, 40), st.integers(1, 70), st.sampled_from([1, 2]), st.booleans()),
    dtype=dtypes,
    seed=st.integers(0, 99),
)
@fuzzed
def test_fuzz_step_pool(place, counts, dims, dtype, seed):
    D, M, C, mlp = dims
    mlp = mlp and place.backend != "cuda"
    r = torch.Generator().manual_seed(seed)
    S, T = sum(counts), 50
    hidden, end = torch.randn(T, D, generator=r).to(dtype), torch.randint(0, T, (S,), generator=r)
    cu_steps = torch.tensor([0, *counts]).cumsum(0)
    width = M if mlp else D
    parts = [torch.randn(C, width, generator=r), torch.randn(C, generator=r)]
    parts += [torch.randn(M, D, generator=r), torch.randn(M, generator=r)] if mlp else []
    parts = [x.to(dtype) for x in parts]
    results = []
    for backend, kept in ((place.backend, dtype), ("reference", torch.float64)):
        rows, *head = (x.to(place.device, kept) for x in (hidden, *parts))
        where = (end.to(place.device), cu_steps.to(place.device))
        results.append(step_pool(rows, PrmHead(*head), *where, backend=backend))
    ours, true = results
    for a, b in zip((ours.prob, *ours[2:]), (true.prob, *true[2:]), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-5)
    sure = (true.prob - 0.5).abs().min() > 1e-4 if S else True
    assert not sure or torch.equal(ours.first_error, true.first_error)


@places("weight_bucket_copy", reference=False, cuda="weight_bucket")
@given(
    shapes=st.lists(st.lists(st.integers(0, 60), max_size=3), max_size=6),
    source=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8]),
    wire=st.sampled_from([None, torch.float32, torch.bfloat16, torch.float16]),
    transposed=st.booleans(),
    first=st.sampled_from([0, 8, 16, 24]),
    seed=st.integers(0, 99),
)
@fuzzed
def test_fuzz_weight_bucket(place, shapes, source, wire, transposed, first, seed):
    r = torch.Generator().manual_seed(seed)
    tensors = [(100 * torch.randn(shape, generator=r)).abs().to(source).to(place.device) for shape in shapes]
    if transposed:
        tensors = [x.permute(tuple(reversed(range(x.dim())))) for x in tensors]
    _, size_bytes = weight_bucket.layout(tensors, wire)
    buckets = []
    for backend in (place.backend, "reference"):
        whole = torch.full((first + size_bytes + 8,), 255, dtype=torch.uint8, device=place.device)
        buffer, _ = weight_bucket.pack(tensors, wire, out=whole[first:], backend=backend)
        assert buffer.storage_offset() == first
        buckets.append(whole)
    assert torch.equal(*buckets)
