"""linear_scope_loss, forward and backward, against three bare matmuls (logits, dX, dW) of the same shape.

    6*T*V*D flops for what computes the logits once, 8*T*V*D for what computes them twice

Cases: `forward+backward` (RL 80 %, NLL 20 %, every stream on, peers beside it), `variations` (half of the rows without
gradient, frozen head, small chunks, beside the full work), `memory` (its own larger shape).
"""

from __future__ import annotations

from dataclasses import replace

import torch

from bench import harness, peers
from bench.harness import OURS, Formula, Spec, Variant, flops
from bench.problems import ERROR_LIMITS, HeadProblem, Loss
from scope_fast import linear_scope_loss
from scope_fast.kernels import plan

STEM = "linear_scope_loss"
COPY_BYTES = 2 << 30
SMALL_CHUNK = {"cpu": 64, "cuda": 512}
LARGE_BYTES = 5 << 30


def specs(device: str, shape: tuple[int, int, int] | None, dtypes: tuple[str, ...] | None, peers: bool) -> list[Spec]:
    """The problems of a run: the defaults of the device, or one shape."""
    main = [shape] if shape else [(1024, 512, 32000)] if device == "cpu" else [(8192, 3584, 152064)]
    dtypes = dtypes or (("float32", "bfloat16") if device == "cpu" else ("bfloat16",))
    found = []
    for size in main:
        for dtype in dtypes:
            found.append(Spec(STEM, "forward+backward", size, dtype, device, ("time", "memory"), peers))
            measures = ("time", "memory") if device == "cuda" else ("time",)
            found.append(Spec(STEM, "variations", size, dtype, device, measures))
    if not shape:
        large = (4096, 512, 64000)
        found += [Spec(STEM, "memory", large, dtype, device, ("memory",), peers) for dtype in dtypes if device == "cpu"]
    return found


def make_problem(spec: Spec, exact: bool = True) -> HeadProblem:
    return HeadProblem(spec, exact)


def formula(spec: Spec) -> Formula:
    return flops(spec, 6)


def buffers(problem: HeadProblem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, dX and dW for the limits to write into, one set for all of them: at T=32768 the logits are 10 GB."""
    if not hasattr(problem, "buffers"):
        x, w = problem.hidden.detach(), problem.weight.detach()
        logits = torch.zeros(x.shape[0], w.shape[0], dtype=x.dtype, device=x.device)
        problem.buffers = logits, torch.empty_like(x), torch.empty_like(w)
    return problem.buffers


def matmuls(problem: HeadProblem):
    """The three products as calls without allocation and page faults."""
    x, w = problem.hidden.detach(), problem.weight.detach()
    logits, dx, dw = buffers(problem)
    return (
        lambda: torch.mm(x, w.T, out=logits),
        lambda: torch.mm(logits, w, out=dx),
        lambda: torch.mm(logits.T, x, out=dw),
    )


def three_matmuls(problem: HeadProblem):
    """Nothing between the products."""
    products = matmuls(problem)

    def run() -> None:
        for product in products:
            product()

    return run


def single_matmuls(spec: Spec) -> list[Variant]:
    """Each of the three alone, for its own rate."""
    return [
        Variant(f"matmul {name}", "limit", lambda problem, i=i: matmuls(problem)[i], formula=flops(spec, 2))
        for i, name in enumerate(("logits", "dX", "dW"))
    ]


def three_matmuls_allocating(problem: HeadProblem):
    x, w = problem.hidden.detach(), problem.weight.detach()

    def run() -> None:
        logits = x @ w.T
        return logits @ w, logits.T @ x

    return run


def limits(spec: Spec) -> list[Variant]:
    six = flops(spec, 6)
    bare = Variant("three matmuls", "limit", three_matmuls, work="into existing buffers", formula=six)
    if spec.device == "cuda":
        moved = Formula(COPY_BYTES, "GB/s", f"{COPY_BYTES >> 30} GiB, half read, half written")
        return [bare, *single_matmuls(spec), harness.copy_limit(COPY_BYTES, "cuda", moved)]
    fresh = Variant("three matmuls, allocating", "limit", three_matmuls_allocating, work="x @ w.T etc.", formula=six)
    return [bare, fresh]


def our_call(problem: HeadProblem, kind: str, backend: str, frozen: bool = False, **options):
    streams, options = problem.ours(kind, **options)
    weight = problem.weight.detach() if frozen else problem.weight

    def run() -> Loss:
        loss, _ = linear_scope_loss(problem.hidden, weight, streams, options, backend=backend)
        return problem.gradients(loss, frozen)

    return run


def our_errors(problem: HeadProblem, output: Loss, kind: str, backend: str, **options) -> dict[str, float]:
    """Errors of loss and gradients, and of the logprobs inside: the gap metric against the true ones (RL rows)."""
    errors = problem.errors(output, kind)
    streams, options = problem.ours(kind, **options)
    probe = replace(streams, rollout_logprob=problem.logprob64.float())
    with torch.no_grad():
        _, metrics = linear_scope_loss(problem.hidden, problem.weight, probe, options, backend=backend)
    return errors | {"logprob": metrics["sampling/gap_max"].item()}


def our_variant(
    spec: Spec, backend: str, suffix: str, kind: str, work: str = "", frozen=False, multiple: int = 6, **options
) -> Variant:
    """multiple: of T*V*D, the flops it does."""
    name = f"{OURS} {backend}{suffix}"
    if spec.dtype == "bfloat16":
        name += ", bf16 logits" if options["logits_dtype"] == "bfloat16" else ", fp32 logits"
    return Variant(
        name, "ours",
        prepare=lambda problem: our_call(problem, kind, backend, frozen, **options),
        check=lambda problem, output: our_errors(problem, output, kind, backend, **options),
        limits=ERROR_LIMITS[spec.dtype], work=work, formula=flops(spec, multiple),
    )  # fmt: skip


def our_variants(spec: Spec, backend: str) -> list[Variant]:
    logits = ("float32", "bfloat16") if spec.dtype == "bfloat16" else ("float32",)
    if spec.case != "variations":
        return [our_variant(spec, backend, "", "scope", logits_dtype=dtype) for dtype in logits]
    idle = f"{spec.shape[0] // 2} rows of advantage 0: no gradient"
    streaming = {"chunk_tokens": 0, "logits_dtype": "float32"}
    extra = [our_variant(spec, "triton", ", streaming", "plain", "no logits", multiple=8, **streaming)]
    return (extra if backend in ("triton", "cuda") else []) + [  # Triton's under either name
        variant
        for dtype in logits
        for variant in (
            our_variant(spec, backend, "", "plain", "all rows", logits_dtype=dtype),
            our_variant(spec, backend, ", half", "half", idle, multiple=3, logits_dtype=dtype),
            our_variant(spec, backend, ", frozen head", "plain", "no dW", frozen=True, multiple=4, logits_dtype=dtype),
            *(
                our_variant(spec, backend, f", chunk {rows}", "plain", work, chunk_tokens=rows, logits_dtype=dtype)
                for rows, work in chunks(spec, dtype).items()
            ),
        )
    ]


def chunks(spec: Spec, logits_dtype: str) -> dict[int, str]:
    """Rows of a chunk, and why: the least memory, and on a GPU what the plan would take with LARGE_BYTES for logits."""
    T, D, V = spec.shape
    found = {min(SMALL_CHUNK[spec.device], T): "least memory"}
    if spec.device == "cuda":
        row_bytes = V * getattr(torch, logits_dtype).itemsize
        processors = torch.cuda.get_device_properties("cuda").multi_processor_count
        rows = plan.chunk_rows(T, D, row_bytes, processors, LARGE_BYTES)
        found.setdefault(rows, f"{LARGE_BYTES >> 30} GiB of logits")
    return found


def variants(spec: Spec) -> list[Variant]:
    found = limits(spec) if "time" in spec.measures else []
    # on a GPU the reference's chunks take a second, twenty times ours: rounds of which nothing is learned
    reference, chosen = spec.device == "cpu", spec.case == "variations"
    found += harness.ours(STEM, spec.device, lambda b: our_variants(spec, b), reference=reference, chosen=chosen)
    eager = peers.loss_variants(spec)
    return found + (eager if spec.peers else eager[:1] if spec.case != "variations" else [])


def test_linear_scope_loss(benchmark, prepared):
    benchmark.pedantic(prepared, rounds=5)
