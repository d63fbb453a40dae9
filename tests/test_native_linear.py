"""The C++ kernels of the losses and linear_logprob where their tiling, threads and fallbacks show.

The contract itself is held by test_linear_scope_loss.py and test_linear_logprob.py, whose "cpu" runs are these kernels.
Tiles: 16 tokens (padding), 64 (panel), 256 (group), 128 vocabulary rows (block), 1024 hidden units (depth).
"""

import math
import os
import subprocess
import sys

import pytest
import torch
from opcases import OPTIONS, Place, all_options, assert_no_worse, gradients, make_case, naive_loss, naive_stats
from test_linear_logprob import check_against_naive as check_logprob
from test_linear_scope_loss import check_against_naive, run
from test_scope_loss import check_every_dtype as check_scope_loss
from torch.profiler import ProfilerActivity, profile

from scope_fast import LossOptions, TokenStreams, linear_logprob, linear_scope_loss, native, scope_loss

KERNELS = ("linear_scope_loss", "linear_logprob", "linear_logprob_backward")
pytestmark = pytest.mark.skipif(not all(native.has(k, "cpu") for k in KERNELS), reason=native.missing())
CPU, REFERENCE = Place("cpu"), Place("reference")
FLOATS = (torch.float32, torch.bfloat16)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# --- float64: the same tiling held to 64 roundings


@all_options
def test_every_option_in_float64(options):
    check_against_naive(make_case(T=29, bias=True), options, CPU, torch.float64)


@pytest.mark.parametrize("logits", ["kept", "streamed"])
@pytest.mark.parametrize(
    ("T", "D", "V"),
    [(1, 1, 2), (15, 3, 127), (16, 4, 128), (17, 5, 129), (63, 8, 300), (65, 33, 257), (257, 6, 131), (300, 65, 2)],
)
def test_tile_edges(T, D, V, logits):
    case = make_case(T, D, V, bias=True, temperature=True, seed=T)
    options = LossOptions(entropy_coef=0.01, chunk_tokens=0 if logits == "streamed" else None)
    for dtype in (torch.float64, *FLOATS):
        check_against_naive(case, options, CPU, dtype)
        check_logprob(case, CPU, dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_deep_hidden(dtype):
    """D above one matmul's depth, and odd: bfloat16 operands are packed in pairs."""
    check_against_naive(make_case(20, 1031, 150), LossOptions(), CPU, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, *FLOATS], ids=str)
@pytest.mark.parametrize("chunk_tokens", [1, 16, 37, 64, 300, 1 << 40])
def test_chunks(chunk_tokens, dtype):
    """Sums over chunks, bfloat16's weight gradient through its float32 copy."""
    case = make_case(T=330, D=9, V=140, bias=True)
    check_against_naive(case, LossOptions(chunk_tokens=chunk_tokens), CPU, dtype)
    check_logprob(case, CPU, dtype, chunk_tokens=chunk_tokens)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_not_contiguous(dtype):
    case = make_case(T=30, D=12, V=40, bias=True).to(dtype)
    expected = gradients(run(case, place=CPU)[0], case)
    strided = case.to(dtype)
    for name in ("hidden", "weight", "bias"):
        x = getattr(strided, name).detach()
        spread = torch.full((*x.shape[:-1], 2 * x.shape[-1]), math.nan, dtype=dtype)[..., ::2]
        setattr(strided, name, spread.copy_(x).requires_grad_())
        assert not getattr(strided, name).is_contiguous()
    s = strided.streams
    streams = {k: torch.stack((v, v), 1)[:, 0] for k, v in vars(s).items() if v is not None}
    strided = strided.with_streams(**streams)
    for ours, true in zip(gradients(run(strided, place=CPU)[0], strided), expected, strict=True):
        assert torch.equal(ours, true)


def test_transposed_weight():
    case = make_case(T=30, D=12, V=40)
    transposed = case.to(torch.float32)
    transposed.weight = case.weight.detach().float().T.contiguous().T.requires_grad_()
    assert run(transposed, place=CPU)[0].equal(run(case.to(torch.float32), place=CPU)[0])


# --- bfloat16 logits


def test_bfloat16_logits_are_rounded_once():
    """The loss is that of rounded logits, exactly the reference's, kept or recomputed."""
    case = make_case(T=70, D=16, V=300).to(torch.bfloat16)
    z = (case.hidden @ case.weight.T).double()
    expected = z.log_softmax(1).gather(1, case.streams.target[:, None])[:, 0]
    out = linear_logprob(case.hidden, case.weight, case.streams.target, logits_dtype="bfloat16", backend="cpu")
    # a logit may round the other way where the two float32 sums straddle a tie: one bfloat16 step of logits below 8
    assert (out.logprob - expected).abs().max() <= 2**-5
    assert (out.logprob - expected).abs().median() < 1e-5
    kept, streamed = (run(case, LossOptions(logits_dtype="bfloat16", chunk_tokens=c), CPU)[0] for c in (None, 0))
    assert torch.equal(kept, streamed)
    for a, b in zip(gradients(kept, case), gradients(streamed, case), strict=True):
        assert torch.equal(a, b)


@all_options
def test_bfloat16_logits_gradients(options):
    case64 = make_case(T=40, D=16, V=200)
    case, eager = case64.to(torch.bfloat16), case64.to(torch.bfloat16)
    changed = LossOptions(**{**vars(options), "logits_dtype": "bfloat16"})
    truth, _ = naive_loss(case64.hidden, case64.weight, case64.streams, options)
    theirs, _ = naive_loss(eager.hidden, eager.weight, eager.streams, options)
    ours, _ = run(case, changed, CPU)
    assert_no_worse(ours, theirs, truth, torch.bfloat16, "loss")
    names = ("dhidden", "dweight")
    grads = (gradients(x, c) for x, c in ((ours, case), (theirs, eager), (truth, case64)))
    for name, a, b, c in zip(names, *grads, strict=True):
        assert_no_worse(a, b, c, torch.bfloat16, name)


# --- precision


def test_logprob_error_at_a_real_vocabulary():
    """bfloat16 inputs, V = 151936: logprobs within 1e-4 of float64, where eager bfloat16 logits are off by 1e-2."""
    r = torch.Generator().manual_seed(0)
    T, D, V = 12, 256, 151936
    hidden = torch.randn(T, D, generator=r).bfloat16()
    weight = (torch.randn(V, D, generator=r) * 2 * D**-0.5).bfloat16()
    target = torch.randint(0, V, (T,), generator=r)
    with torch.no_grad():
        ours = linear_logprob(hidden, weight, target, backend="cpu")
        truth = naive_stats(hidden.double(), weight.double(), target, torch.ones(T))
    for name, a, b in zip(ours._fields, ours, truth, strict=True):
        assert (a - b).abs().max() < 1e-4, name


def test_exp_is_within_its_bound():
    """The kernels' exp, seen through a gradient: dlogprob/dhidden is -p exactly where p is far below one rounding.

    Logits (0, x), hidden x, weight (0, 1): d logprob[0] / dx = -exp(x) / (1 + exp(x)), and log(1 + exp(x)) rounds to 0.
    """
    bound = 2.0**-23  # relative; one unit in the last place is 2^-24 to 2^-23
    x = torch.linspace(-87.3, -17.0, 1 << 20).requires_grad_()
    weight = torch.tensor([[0.0], [1.0]])
    out = linear_logprob(x[:, None], weight, torch.zeros(x.shape, dtype=torch.int64), backend="cpu")
    (slope,) = torch.autograd.grad(out.logprob.sum(), x)
    exact = x.detach().double().exp()
    assert ((-slope - exact).abs() / exact).max() <= bound
    below = torch.tensor([[-87.4], [-104.0], [-1e4], [-1e30]], requires_grad=True)
    out = linear_logprob(below, weight, torch.zeros(4, dtype=torch.int64), backend="cpu")
    (slope,) = torch.autograd.grad(out.logprob.sum(), below)
    assert slope.eq(0).all()  # no subnormal survives, and none becomes NaN


def test_exp_is_within_its_bound_above_one_too():
    """scope_loss's ratios and weights, seen through a gradient: on policy, advantage 1, it is -exp(-rollout)."""
    x = torch.linspace(-87.3, 88.0, 1 << 20)
    ones, logprob = torch.ones_like(x), torch.zeros_like(x).requires_grad_()
    streams = TokenStreams(x.long(), ones.to(torch.uint8), ones, advantage=ones, rollout_logprob=-x)
    loss, _ = scope_loss(logprob, streams, LossOptions(importance_cap=3e38), backend="cpu")
    (slope,) = torch.autograd.grad(loss, logprob)
    exact = x.double().exp()
    assert ((-slope - exact).abs() / exact).max() <= 2.0**-23


def test_sums_at_a_large_vocabulary_do_not_drift():
    """V equal logits: logsumexp is log V to the last float32 digit, entropy too."""
    V = 1 << 20
    out = linear_logprob(torch.zeros(3, 1), torch.zeros(V, 1), torch.tensor([0, 5, V - 1]), backend="cpu")
    expected = torch.full((3,), math.log(V))
    assert torch.equal(out.logsumexp, expected)
    assert torch.equal(out.entropy, expected)
    assert torch.equal(out.logprob, -expected)


def test_excluded_tokens_by_the_block():
    """Whole vocabulary blocks at -inf, before and after tokens whose logits are far below 0."""
    V = 700
    bias = torch.full((V,), -math.inf)
    bias[300:303] = torch.tensor([-2e4, -2e4 + math.log(3), -2e4])
    target = torch.tensor([301, 300, 5])
    hidden, weight = torch.zeros(3, 4, requires_grad=True), torch.ones(V, 4)
    out = linear_logprob(hidden, weight, target, bias=bias, backend="cpu")
    entropy = 0.6 * math.log(5 / 3) + 0.4 * math.log(5)
    # logits near 2e4 have a float32 step of 2^-9
    torch.testing.assert_close(out.logprob, torch.tensor([math.log(0.6), math.log(0.2), -math.inf]), atol=2e-3, rtol=0)
    torch.testing.assert_close(out.entropy, torch.full((3,), entropy), atol=2e-3, rtol=0)
    (slope,) = torch.autograd.grad(out.entropy.sum(), hidden)
    assert slope.isfinite().all()


def test_loss_overflows_to_infinity():
    case = make_case(T=8, segments=(2,)).with_streams(loss_weight=torch.full((8,), 3e38)).to(torch.float32)
    loss, metrics = run(case, place=CPU)
    assert loss.isinf() and metrics["loss/nll"].isinf()


def test_bfloat16_where_onednn_is_switched_off():
    """Its products are oneDNN's, which torch asks for at every one of them; ours are float32's then."""
    case = make_case(T=8, D=6, V=9).to(torch.bfloat16)
    arguments = (case.hidden, case.weight, case.streams.target)
    with_it = linear_logprob(*arguments, backend="cpu").logprob
    with torch.backends.mkldnn.flags(enabled=False):
        without = linear_logprob(*arguments, backend="cpu").logprob
    torch.testing.assert_close(with_it, without, rtol=1e-4, atol=1e-5)


# --- threads


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_deterministic_for_a_thread_count(threads, dtype, num_threads):
    threads(num_threads)
    case = make_case(T=300, D=40, V=900, bias=True).to(dtype)
    results = []
    for _ in range(3):
        loss, metrics = run(case, LossOptions(entropy_coef=0.1, chunk_tokens=128), CPU)
        results.append([loss, *metrics.values(), *gradients(loss, case)])
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


def test_scratch_does_not_grow_with_the_threads(threads):
    """Every thread sums dX for itself: a chunk of 1024 tokens would take 128 MiB of 32 threads."""
    threads(32)
    case = make_case(T=1024, D=1024, V=4096).to(torch.float32)

    def update():
        loss, _ = run(case, LossOptions(chunk_tokens=0), CPU)
        gradients(loss, case)

    def logprobs():
        out = linear_logprob(case.hidden, case.weight, case.streams.target, backend="cpu")
        torch.autograd.grad(out.logprob.sum(), (case.hidden, case.weight))

    for call in (update, logprobs):
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            call()
        assert 32 * 2**20 < max(event.self_cpu_memory_usage for event in profiler.events()) <= 64 * 2**20


def test_threads_change_only_the_order_of_sums(threads):
    case = make_case(T=100, D=24, V=900)
    for num_threads in (1, 2, 5):
        threads(num_threads)
        check_against_naive(case, LossOptions(entropy_coef=0.1), CPU, torch.float32)


def test_one_openmp_runtime():
    """Two would be two thread pools, fighting, and torch.set_num_threads would reach only one of them."""
    code = (  # a process of its own: other tests import packages that bring a copy each
        "import torch; from scope_fast import native; assert not native.missing(); "
        "print(*{line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line or 'libiomp' in line})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(done.stdout.split()) <= 1, done.stdout


# --- what CPUs without AVX-512, or without bfloat16 instructions, run

LIMITS = {
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "baseline": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "avx512 without bfloat16": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
}


def check_here() -> None:
    """In a subprocess under one of LIMITS: the ops in both dtypes against the float64 truth."""
    torch.set_num_threads(1)
    case = make_case(T=70, D=33, V=300, bias=True, temperature=True)
    for dtype in FLOATS:
        for name in ("ppo", "all"):
            check_against_naive(case, OPTIONS[name], CPU, dtype)
        check_against_naive(case, LossOptions(chunk_tokens=16, logits_dtype="bfloat16"), CPU, torch.float32)
        check_logprob(case, CPU, dtype)
    for options in OPTIONS.values():
        check_scope_loss(CPU, options)
    rounded = LossOptions(logits_dtype="bfloat16")
    coarse = case.to(torch.bfloat16)
    loss, _ = linear_scope_loss(coarse.hidden, coarse.weight, case.streams, rounded, bias=coarse.bias, backend="cpu")
    exact, _ = run(coarse, LossOptions(), REFERENCE)
    assert abs(loss.item() / exact.item() - 1) < 2e-2


@pytest.mark.parametrize("limit", LIMITS)
def test_older_cpus(limit):
    here = os.path.dirname(__file__)
    path = os.pathsep.join([here, os.path.dirname(here), *sys.path])
    environment = os.environ | LIMITS[limit] | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    code = "import test_native_linear; test_native_linear.check_here()"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
