"""csrc/cuda without a GPU: nvcc compiles the device code, g++ the torch files, and a CPU runs the kernels' own bodies.

tests/cuda_on_cpu stands in for the launch: every thread of a cluster's blocks is a fiber that waits at shuffles and
barriers. On a GPU the op tests run them as backend="cuda" (their ids "cuda-gpu").
"""

import ctypes
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from opcases import OPTIONS, is_active, make_case, naive_row_loss
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, include_paths

from scope_fast import LossOptions
from scope_fast.kernels.linear_scope_loss import CLUSTER_BYTES
from scope_fast.ops import reference
from scope_fast.ops.options import METRICS, encode

ROOT = Path(__file__).parent.parent
STANDIN = ROOT / "tests" / "cuda_on_cpu"
ELEMENTS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]  # in the order of csrc/cuda's Element
BITS = {1: 4, 2: 5, 4: 6, 8: 7}  # element size -> Element
KERNELS = len(ELEMENTS) ** 2 + 1 + 3  # step_pool by the types of hidden and weight; weight_bucket's; the row kernel's

pytestmark = [
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs the CUDA toolkit (nvcc is not on PATH)"),
    pytest.mark.skipif(sys.platform != "linux", reason="the fibers of the stand-in are ucontext's"),
]


def toolkit_include() -> Path:
    """Where nvcc looks for its headers; asked, since nvcc on PATH may be a link or a script."""
    done = subprocess.run(["nvcc", "--dryrun", "-c", "x.cu"], capture_output=True, text=True)
    return Path(re.search(r"^#\$ TOP=(.+)$", done.stderr, re.M)[1]) / "include"


def compile_with(*command, source: Path) -> str:
    done = subprocess.run([*map(str, command), str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


@pytest.mark.parametrize("target", ["sm_80", "sm_90a"])
def test_device_code_compiles_without_spills(tmp_path, target):
    source = tmp_path / "kernels.cu"
    files = sorted((ROOT / "csrc/cuda").glob("*_*.cuh"))
    source.write_text("".join(f'#include "cuda/{path.name}"\n' for path in files))
    log = compile_with(
        "nvcc", "-std=c++17", "-O3", f"-arch={target}", "-Xptxas", "-v", *COMMON_NVCC_FLAGS, "-I", ROOT / "csrc",
        "-c", "-o", tmp_path / "kernels.o", source=source,
    )  # fmt: skip
    assert "warning" not in log
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert spills == [("0", "0", "0")] * KERNELS
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", log)]
    # two blocks of 512 threads on a multiprocessor, or three of 256
    assert len(registers) == KERNELS and max(registers) <= 64


def test_torch_files_compile(tmp_path):
    """g++ and the stand-in's launch, since a CPU build of torch lacks one generated header of its CUDA build."""
    generated = tmp_path / "include" / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h"
    generated.parent.mkdir(parents=True)
    generated.touch()
    source = tmp_path / "torch_files.cpp"
    source.write_text("".join(f'#include "cuda/{path.name}"\n' for path in sorted((ROOT / "csrc/cuda").glob("*.cu"))))
    systems = [tmp_path / "include", *include_paths(), toolkit_include()]
    compile_with(
        "g++", "-std=c++20", "-fsyntax-only", "-I", STANDIN, "-I", ROOT / "csrc",
        *(f"-isystem{path}" for path in systems), source=source,
    )  # fmt: skip


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> ctypes.CDLL:
    """The launchers of csrc/cuda on CPU memory."""
    library = tmp_path_factory.mktemp("cuda_on_cpu") / "kernels.so"
    compile_with(
        "g++", "-std=c++17", "-O2", "-shared", "-fPIC", "-I", STANDIN, "-I", ROOT / "csrc", "-isystem",
        toolkit_include(), "-o", library, source=STANDIN / "kernels.cpp",
    )  # fmt: skip
    loaded = ctypes.CDLL(str(library))
    p, i32, i64, f32 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float
    loaded.step_pool.argtypes = [p, i32, p, i32, p, p, p, i64, i64, i64, i32, i32, f32, p, p, p, p, p, p]
    loaded.weight_bucket.argtypes = [p, i64]
    loaded.linear_scope_loss_rows.argtypes = [p, i32, p, i32, *[p] * 12, *[i64] * 6]
    loaded.max_row_bytes.restype = i64
    loaded.step_pool.restype = loaded.weight_bucket.restype = loaded.linear_scope_loss_rows.restype = i64
    return loaded


def step_pool(kernels, hidden, weight, bias, step_end, cu_steps, positive=1, tau=0.5):
    """(prob, first_error, min, mean, prod, last), and the launches it took."""
    num_rollouts = cu_steps.numel() - 1
    out = [torch.full(step_end.shape, -1.0), torch.full((num_rollouts,), -1)]
    out += [torch.full((num_rollouts,), -1.0) for _ in range(4)]
    launches = kernels.step_pool(
        hidden.data_ptr(), ELEMENTS.index(hidden.dtype), weight.data_ptr(), ELEMENTS.index(weight.dtype),
        None if bias is None else bias.data_ptr(), step_end.data_ptr(), cu_steps.data_ptr(), num_rollouts,
        hidden.shape[1], hidden.stride(0), weight.shape[0], positive, tau, *(x.data_ptr() for x in out),
    )  # fmt: skip
    return out, launches


def reference_step_pool(hidden, weight, bias, step_end, cu_steps, positive=1, tau=0.5):
    prob = reference.step_scores(hidden[step_end], weight, bias, None, None, positive)
    return prob, *reference.step_pools(prob, cu_steps, tau)


@pytest.mark.parametrize("head_dtype", ELEMENTS, ids=str)
@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
def test_step_pool_is_the_reference(kernels, dtype, head_dtype):
    """Rows of whole packets and ragged ones, one row and two, either label, segments empty, short and long."""
    r = torch.Generator().manual_seed(0)
    cu_steps = torch.tensor([0, 0, 3, 4, 44, 44])
    for D, classes, positive, biased in ((8, 2, 1, True), (600, 2, 0, False), (37, 1, 1, True), (256, 1, 0, False)):
        hidden = torch.randn(30, D, generator=r).to(dtype)
        weight = (torch.randn(classes, D, generator=r) / D**0.5).to(head_dtype)
        bias = torch.randn(classes, generator=r).to(head_dtype) if biased else None
        step_end = torch.randint(0, 30, (44,), generator=r)
        ours, launches = step_pool(kernels, hidden, weight, bias, step_end, cu_steps, positive)
        true = reference_step_pool(hidden, weight, bias, step_end, cu_steps, positive)
        assert launches == 1
        assert (true[0] - 0.5).abs().min() > 1e-4 and torch.equal(ours[1], true[1])
        for a, b in zip((ours[0], *ours[2:]), (true[0], *true[2:]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


def test_step_pool_verdicts_by_hand(kernels):
    """tau is inclusive, NaN is an error and stays NaN in the pools, infinite logits decide, no steps give 0."""
    z = [0.0, 9.0, math.nan, 9.0, math.inf, -math.inf]
    hidden, weight = torch.tensor([[0.0, x] for x in z]), torch.tensor([[0.0, 1.0]])
    cu_steps = torch.tensor([0, 2, 4, 4, 6])
    (prob, first_error, *pools), _ = step_pool(kernels, hidden, weight, None, torch.arange(6), cu_steps)
    assert prob[0] == 0.5 and prob[2].isnan() and prob[4:].tolist() == [1.0, 0.0]
    assert first_error.tolist() == [2, 0, 0, 1]
    low, mean, product, last = (pool.tolist() for pool in pools)
    assert low[0] == 0.5 and low[2:] == [0.0, 0.0] and math.isnan(low[1])
    assert mean[2:] == [0.0, 0.5] and math.isnan(mean[1])
    assert product[2:] == [0.0, 0.0] and math.isnan(product[1])
    assert last[1] == pytest.approx(torch.tensor(9.0).sigmoid().item()) and last[2:] == [0.0, 0.0]


def test_step_pool_of_rows_in_a_wider_tensor(kernels):
    """Rows apart from each other, a first row that starts on no packet, and rows that end in the middle of one."""
    whole = torch.randn(5, 40, generator=torch.Generator().manual_seed(1))
    ends, cu_steps = torch.tensor([4, 0, 2]), torch.tensor([0, 3])
    for first, dim in ((0, 16), (1, 16), (8, 16), (0, 13)):
        hidden = whole[:, first : first + dim]
        weight = torch.ones(1, 16)[:, :dim]  # ones beyond its end too: reading there would show
        ours, _ = step_pool(kernels, hidden, weight, None, ends, cu_steps)
        torch.testing.assert_close(ours[0], hidden[ends].sum(1).sigmoid(), rtol=1e-5, atol=1e-6)


def test_step_pool_of_nothing(kernels):
    nothing = torch.empty(0, dtype=torch.int64)
    assert step_pool(kernels, torch.ones(1, 8), torch.ones(2, 8), None, nothing, torch.tensor([0]))[1] == 0
    out, launches = step_pool(kernels, torch.ones(1, 8), torch.ones(2, 8), None, nothing, torch.tensor([0, 0]))
    assert launches == 1 and [x.tolist() for x in out] == [[], [0], [0.0], [0.0], [0.0], [0.0]]


def row_kernel(kernels, logits, streams, index, options, grad_dtype, bias=None, first_column=0, expected=1):
    """(table, dlogits) of linear_scope_loss's row kernel, dlogits over the logits as in kernels/softmax.logit_buffer;
    what is between two rows is NaN before, and the table's other columns are -1."""
    N, V = logits.shape
    stride = -(-V // 16) * 16
    buffer = torch.full((N, stride), math.nan, dtype=logits.dtype)
    buffer[:, :V] = logits
    wide = logits.dtype.itemsize // grad_dtype.itemsize
    dlogits = buffer.view(grad_dtype)[:, (wide - 1) * stride :][:, :V]
    table = torch.full((len(METRICS), first_column + N + 1), -1.0)
    held = [None if x is None else x.float() for x in (
        bias, streams.loss_weight, streams.old_logprob, streams.advantage, streams.ref_logprob,
        streams.rollout_logprob, streams.temperature, torch.tensor(encode(options)),
    )]  # fmt: skip
    bias, *floats = (None if x is None else x.data_ptr() for x in held)
    launches = kernels.linear_scope_loss_rows(
        buffer.data_ptr(), ELEMENTS.index(logits.dtype), dlogits.data_ptr(), ELEMENTS.index(grad_dtype), bias,
        index.data_ptr(), streams.target.data_ptr(), streams.segment.data_ptr(), *floats, table.data_ptr(),
        N, V, stride, dlogits.stride(0), first_column, table.shape[1],
    )  # fmt: skip
    assert launches == expected
    return table, dlogits


def naive_rows(logits, streams, index, options, bias=None):
    """(metrics, dlogits) in float64 by autograd."""
    take = {k: None if v is None else v[index] for k, v in vars(streams).items() if k != "active"}
    z = logits.double().requires_grad_()
    default = torch.where(take["segment"] == 1, options.temperature, 1.0)
    temperature = default if take["temperature"] is None else take["temperature"]
    log_p = ((z if bias is None else z + bias.double()) / temperature.double()[:, None]).log_softmax(1)
    finite = log_p.clamp(min=-1e30)
    logprob, entropy = log_p.gather(1, take["target"][:, None])[:, 0], -(finite.exp() * finite).sum(1)
    active = is_active(streams, options)[index]
    loss, metrics = naive_row_loss(
        logprob[active], entropy[active], {k: None if v is None else v[active] for k, v in take.items()}, options
    )
    loss.backward()
    return metrics, z.grad


PAIRS = [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)]


@pytest.mark.parametrize("options", ["ppo", "all", "all_cispo", "temperature"])
@pytest.mark.parametrize(("logit_dtype", "grad_dtype"), PAIRS, ids=str)
@pytest.mark.parametrize("V", [5, 1000, 25_001, 152_064])  # of a block, of one and two blocks, of four and eight
def test_row_kernel_is_autograd(kernels, V, logit_dtype, grad_dtype, options):
    T = 12 if V < 100_000 else 3
    case = make_case(T, 3, V, temperature=options == "all", on_policy=options == "temperature", seed=V)
    r = torch.Generator().manual_seed(V)
    logits = (4 * torch.randn(T - 1, V, generator=r)).to(logit_dtype)
    bias = torch.randn(V, generator=r) if options == "all_cispo" else None
    index = torch.randperm(T, generator=r)[: T - 1].sort().values
    table, dlogits = row_kernel(
        kernels, logits, case.streams, index, OPTIONS[options], grad_dtype, bias, first_column=3
    )
    metrics, true = naive_rows(logits, case.streams, index, OPTIONS[options], bias)
    assert (table[:, :3] == -1).all() and (table[:, T + 2 :] == -1).all()
    rows = table[:, 3 : T + 2]
    found = [*rows[:7].double().sum(1), *rows[7:].max(1).values]
    for name, value in zip(METRICS, found, strict=True):
        assert value.item() == pytest.approx(metrics[name].item(), rel=2e-5, abs=1e-5), name
    rounding = 4e-3 if grad_dtype == torch.bfloat16 else 3e-6
    assert (dlogits.double() - true).norm() <= rounding * true.norm()


def test_row_kernel_keeps_what_is_missing_visible(kernels):
    """NaN and +inf logits, a target outside the vocabulary and a stream that is not there: NaN, in that row alone.
    Excluded tokens (-inf) have gradient 0; a row of nothing else is NaN."""
    case = make_case(6, 3, 40, segments=(1,))
    streams = case.with_streams(loss_weight=torch.ones(6), advantage=torch.ones(6)).streams
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    logits[1, 7], logits[2, 9], logits[3, ::2], logits[4] = math.nan, math.inf, -math.inf, -math.inf
    streams.target[:] = torch.tensor([1, 1, 1, 1, 1, 40])
    table, dlogits = row_kernel(kernels, logits, streams, torch.arange(6), OPTIONS["entropy"], torch.float32)
    bad = torch.tensor([False, True, True, False, True, True])
    assert torch.equal(table[0, :6].isnan(), bad) and torch.equal(dlogits.isnan().all(1), bad)
    assert (dlogits[3, ::2] == 0).all() and dlogits[~bad].isfinite().all()
    without = case.with_streams(advantage=None).streams
    table, dlogits = row_kernel(kernels, logits[:1], without, torch.tensor([0]), LossOptions(), torch.float32)
    assert table[0, 0].isnan() and dlogits.isnan().all()


def test_row_kernel_takes_the_rows_it_is_given_and_no_longer_ones(kernels):
    case, longest = make_case(1, 3, 5), CLUSTER_BYTES // 4
    assert kernels.max_row_bytes() == CLUSTER_BYTES
    for V, launches in ((longest, 1), (longest + 1, -1)):
        arguments = (torch.zeros(1, V), case.streams, torch.tensor([0]), LossOptions(), torch.float32)
        row_kernel(kernels, *arguments, expected=launches)


class Piece(ctypes.Structure):
    _fields_ = (
        ("source", ctypes.c_void_p), ("target", ctypes.c_void_p), ("count", ctypes.c_int64),
        ("first_block", ctypes.c_int32), ("source_type", ctypes.c_int16), ("target_type", ctypes.c_int16),
    )  # fmt: skip


def copy(kernels, sources, targets) -> int:
    """The launches that copying sources into targets took."""
    pieces = []
    for source, target in zip(sources, targets, strict=True):
        if source.dtype == target.dtype:
            types = [BITS[source.itemsize]] * 2
        else:
            types = [ELEMENTS.index(source.dtype), ELEMENTS.index(target.dtype)]
        pieces.append(Piece(source.data_ptr(), target.data_ptr(), source.numel(), 0, *types))
    return kernels.weight_bucket((Piece * len(pieces))(*pieces), len(pieces))


def guarded(size: int, dtype: torch.dtype, first: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A tensor of `size` that starts `first` elements into its storage, and all of it: 16 bytes of 0x7F around."""
    whole = torch.full(((size + first) * dtype.itemsize + 16,), 0x7F, dtype=torch.uint8)
    whole = whole[: len(whole) // dtype.itemsize * dtype.itemsize]
    return whole.view(dtype)[first : first + size], whole


SIZES = (1, 7, 4096, 8192, 8191, 20_001)  # around a tile of every pair of types


@pytest.mark.parametrize("target", ELEMENTS, ids=str)
@pytest.mark.parametrize("source", ELEMENTS, ids=str)
@pytest.mark.parametrize("first", [0, 1])
def test_weight_bucket_casts_as_torch(kernels, source, target, first):
    """Aligned and not; one launch for all; not one byte beside them is touched."""
    count = torch.arange(sum(SIZES), dtype=torch.float64) % 1021 / 7
    sources = [x.to(source) for x in count.split(SIZES)]
    targets, wholes = zip(*(guarded(size, target, first) for size in SIZES), strict=True)
    assert copy(kernels, sources, targets) == 1
    for a, b, whole in zip(sources, targets, wholes, strict=True):
        assert torch.equal(b, a.to(target))
        assert whole[: first * target.itemsize].eq(0x7F).all()
        assert whole[(first + len(a)) * target.itemsize :].eq(0x7F).all()


def test_weight_bucket_rounds_as_torch(kernels):
    """Every bfloat16 tie and its neighbours, subnormals and infinities: the bits of Tensor.to; NaN stays NaN."""
    r = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1 << 15,), generator=r).int()
    ties = (bits & ~0xFFFF) | torch.tensor([0x7FFF, 0x8000, 0x8001], dtype=torch.int32).repeat(1 << 14)[: 1 << 15]
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0, 1e-40, 3.4e38, 65519.0, 65520.0, 6e-8])
    x = torch.cat((bits.view(torch.float32), ties.view(torch.float32), special))
    for dtype in (torch.bfloat16, torch.float16):
        back = torch.empty_like(x, dtype=dtype)
        copy(kernels, [x], [back])
        number = ~x.isnan()
        assert torch.equal(back.view(torch.int16)[number], x.to(dtype).view(torch.int16)[number])
        assert back[~number].isnan().all()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.bool, torch.int64], ids=str)
def test_weight_bucket_moves_bits(kernels, dtype):
    source = (torch.arange(40_003) % 251).to(dtype)
    target, _ = guarded(len(source), dtype, 0)
    assert copy(kernels, [source], [target]) == 1
    assert torch.equal(source, target)


def test_weight_bucket_of_more_tensors_than_a_table_holds(kernels):
    sources = [torch.arange(i + 1.0) for i in range(300)]
    targets = [torch.empty_like(x, dtype=torch.bfloat16) for x in sources]
    assert copy(kernels, sources, targets) == 3
    assert all(torch.equal(b, a.bfloat16()) for a, b in zip(sources, targets, strict=True))
    assert kernels.weight_bucket(None, 0) == 0


def test_weight_bucket_refuses_types_it_does_not_know(kernels):
    x = torch.zeros(1)
    assert kernels.weight_bucket((Piece * 1)(Piece(x.data_ptr(), x.data_ptr(), 1, 0, 1, 6)), 1) == -1
