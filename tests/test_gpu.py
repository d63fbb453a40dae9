"""What only a GPU can show: offsets beyond 32 bits, CUDA graphs, inductor, no wait for it, the same bits every time."""

import pytest
import torch

from scope_fast import LossOptions, PrmHead, TokenStreams, linear_logprob, linear_scope_loss, step_pool
from scope_fast.kernels import plan
from scope_fast.ops import dispatch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def problem(T: int, D: int, V: int, dtype: torch.dtype = torch.bfloat16):
    """hidden, weight and streams of all kinds of rows; which of them are active is known, so nobody has to look."""
    r = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(T, D, generator=r, device="cuda").to(dtype).requires_grad_()
    weight = (torch.randn(V, D, generator=r, device="cuda") * D**-0.5).to(dtype).requires_grad_()
    segment = (torch.arange(T, device="cuda") % 4).clamp(max=2).to(torch.uint8)
    streams = TokenStreams(
        torch.randint(0, V, (T,), generator=r, device="cuda"),
        segment,
        torch.full((T,), 1.0 / T, device="cuda"),
        advantage=torch.randn(T, generator=r, device="cuda"),
        active=segment.nonzero()[:, 0],
    )
    return hidden, weight, streams


def step(hidden, weight, streams, backend=None, **kwargs):
    options = LossOptions(entropy_coef=0.01, **kwargs)
    loss, metrics = linear_scope_loss(hidden, weight, streams, options, backend=backend)
    loss.backward()
    return loss, metrics


def take_gradients(*leaves):
    gradients = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return gradients


def test_logits_of_more_than_two_to_the_31_elements(monkeypatch):
    T, D, V = 16640, 64, 152064  # in one chunk 2.5e9 logits, 10 GB
    hidden, weight, streams = problem(T, D, V)
    monkeypatch.setattr(plan, "rows_at_a_time", lambda num_rows, *_: (num_rows, 1024))  # by itself it would take chunks
    results = []
    for chunk_tokens in (T, 1024, None):
        loss, _ = step(hidden, weight, streams, chunk_tokens=chunk_tokens)
        results.append((loss.detach(), *take_gradients(hidden, weight)))
    for whole, chunked, by_rows in zip(*results, strict=True):
        assert whole.isfinite().all()
        torch.testing.assert_close(whole, chunked, rtol=2e-2, atol=1e-6)  # matmuls of other shapes sum in other orders
        torch.testing.assert_close(by_rows, chunked, rtol=2e-2, atol=1e-6)
    last = slice(T - 64, T)
    whole = linear_logprob(hidden, weight, streams.target, chunk_tokens=T).logprob[last]
    alone = linear_logprob(hidden[last], weight, streams.target[last]).logprob
    torch.testing.assert_close(whole, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("logits_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("V", [33024, 33001, 150_001])
def test_rows_of_many_blocks_against_float64(V, logits_dtype, backend):
    """The gradient goes over the logits it is made of, block by block, in whole vectors; of the CUDA kernel's rows the
    clusters have one, two, four and eight blocks: against something else."""
    if reason := dispatch.missing_for("linear_scope_loss", backend, "cuda"):
        pytest.skip(reason)
    hidden, weight, streams = problem(300, 256, V)
    loss, metrics = step(hidden, weight, streams, backend, logits_dtype=logits_dtype)
    found = [loss.detach(), *take_gradients(hidden, weight)]
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    truth, _ = linear_scope_loss(*exact, streams, LossOptions(entropy_coef=0.01), backend="reference")
    truth.backward()
    rounding = 1e-2 if logits_dtype == "bfloat16" else 4e-3  # of the logits, or of the gradients alone
    for got, true in zip(found, [truth.detach(), *take_gradients(*exact)], strict=True):
        assert (got.double() - true).norm() <= rounding * true.norm()
    assert metrics["policy/rows"] == 75


def test_a_cuda_graph_replays_forward_and_backward():
    hidden, weight, streams = problem(256, 128, 1000)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # kernels are compiled and workspaces made before the capture
        for _ in range(3):
            step(hidden, weight, streams)
            take_gradients(hidden, weight)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, _ = step(hidden, weight, streams)
    in_graph = take_gradients(hidden, weight)
    with torch.no_grad():
        hidden.mul_(-0.5)
    graph.replay()
    loss, _ = step(hidden, weight, streams)
    assert torch.equal(captured, loss)
    for replayed, eager in zip(in_graph, take_gradients(hidden, weight), strict=True):
        assert torch.equal(replayed, eager)


@pytest.mark.parametrize("chunk_tokens", [-1, 64, 0])
def test_nothing_waits_for_the_device(chunk_tokens):
    hidden, weight, streams = problem(256, 128, 1000)
    chunks = {} if chunk_tokens < 0 else {"chunk_tokens": chunk_tokens}
    step(hidden, weight, streams, **chunks)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, _ = step(hidden, weight, streams, **chunks)
        with torch.no_grad():
            linear_logprob(hidden, weight, streams.target, **chunks)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()


def test_inductor_takes_the_loss_in_one_graph():
    hidden, weight, streams = problem(256, 128, 1000)

    @torch.compile(fullgraph=True)
    def compiled(hidden, weight):
        loss, metrics = linear_scope_loss(hidden * 1.0, weight, streams, LossOptions(entropy_coef=0.01))
        return loss * 1.0, metrics["policy/entropy_sum"]

    loss, entropy = compiled(hidden, weight)
    loss.backward()
    in_graph = take_gradients(hidden, weight)
    eager, metrics = step(hidden, weight, streams)
    assert torch.equal(loss, eager) and torch.equal(entropy, metrics["policy/entropy_sum"])
    for compiled_gradient, gradient in zip(in_graph, take_gradients(hidden, weight), strict=True):
        torch.testing.assert_close(compiled_gradient, gradient)


@pytest.mark.parametrize("chunk_tokens", [None, 512, 0])
def test_twenty_runs_give_the_same_bits(chunk_tokens):
    hidden, weight, streams = problem(2048, 512, 32000)
    first = None
    for _ in range(20):
        loss, metrics = step(hidden, weight, streams, chunk_tokens=chunk_tokens)
        found = [loss, *metrics.values(), *take_gradients(hidden, weight)]
        stats = linear_logprob(hidden, weight, streams.target, chunk_tokens=chunk_tokens)
        (stats.logprob - 0.1 * stats.entropy).sum().backward()
        found += [*stats, *take_gradients(hidden, weight)]
        first = first or found
        assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True))


def test_twenty_verdicts_are_the_same_bits():
    r = torch.Generator("cuda").manual_seed(0)
    hidden, weight = (torch.randn(n, 512, generator=r, device="cuda").bfloat16() for n in (8192, 512))
    head = PrmHead(weight[:2], None, weight, None)
    step_end = torch.arange(49, 8192, 50, device="cuda")
    cu_steps = torch.tensor([0, 40, 41, len(step_end)], device="cuda")
    runs = [step_pool(hidden, head, step_end, cu_steps) for _ in range(20)]
    assert all(torch.equal(a, b) for run in runs for a, b in zip(runs[0], run, strict=True))
