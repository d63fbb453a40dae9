"""linear_logprob: logprob and entropy of the target, forward alone and with the backward of the logprob.

    forward 2*T*V*D flops, against one bare matmul
    forward + backward 8*T*V*D, 6 where the logits are kept, against three

Cases: `forward`, `forward+backward`, and `logprob error`, whose shape has a real vocabulary: the largest error of a
logprob against float64, the number a clip range of 0.2 is compared with.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench import harness, peers
from bench.bench_linear_scope_loss import limits as three_matmul_limits
from bench.bench_linear_scope_loss import matmuls
from bench.harness import OURS, Formula, Spec, Variant, flops
from bench.problems import ERROR_LIMITS, HeadProblem
from scope_fast import linear_logprob

STEM = "linear_logprob"
ERROR_CASE = "logprob error"


def specs(device: str, shape: tuple[int, int, int] | None, dtypes: tuple[str, ...] | None, peers: bool) -> list[Spec]:
    main = shape or ((1024, 512, 32000) if device == "cpu" else (8192, 3584, 152064))
    dtypes = dtypes or (("float32", "bfloat16") if device == "cpu" else ("bfloat16",))
    cases = ("forward", "forward+backward")
    # on a CPU the memory of each variant costs a process of its own: read once, with the backward
    measures = {
        "forward": ("time", "memory") if device == "cuda" else ("time",),
        "forward+backward": ("time", "memory"),
    }
    found = [Spec(STEM, case, main, dtype, device, measures[case], peers) for dtype in dtypes for case in cases]
    if not shape:
        found.append(Spec(STEM, ERROR_CASE, (64, 256, 151936), "bfloat16", device, ("error",), peers))
    return found


def make_problem(spec: Spec, exact: bool = True) -> HeadProblem:
    return HeadProblem(spec, exact)


def with_backward(spec: Spec) -> bool:
    return spec.case == "forward+backward"


def formula(spec: Spec) -> Formula:
    return flops(spec, 8 if with_backward(spec) else 2)


def call(problem: HeadProblem, stats: peers.Stats):
    """Forward of a Stats function, and in the forward+backward case the gradient of its weighted logprobs."""
    weights = problem.kinds["logprob"][0].loss_weight

    def forward() -> tuple[Tensor, Tensor | None]:
        with torch.no_grad():
            return stats(problem.hidden, problem.weight, problem.target)

    def both():
        logprob, _ = stats(problem.hidden, problem.weight, problem.target)
        return problem.gradients(-(weights * logprob).sum())

    return both if with_backward(problem.spec) else forward


def errors(problem: HeadProblem, output) -> dict[str, float]:
    if with_backward(problem.spec):
        return problem.errors(output, "logprob")
    found = {"logprob": (output[0].double() - problem.logprob64).abs().max().item()}
    if output[1] is not None:
        found["entropy"] = (output[1].double() - problem.entropy64).abs().max().item()
    return found


def our_stats(backend: str, logits_dtype: str, chunk_tokens: int | None) -> peers.Stats:
    def stats(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        options = {"logits_dtype": logits_dtype, "chunk_tokens": chunk_tokens, "backend": backend}
        return linear_logprob(hidden, weight, target, **options)[:2]

    return stats


def variant(spec: Spec, name: str, role: str, make, multiple: int = 8, **rest) -> Variant:
    """make: () -> Stats."""
    return Variant(
        name, role, prepare=lambda problem: call(problem, make()), check=errors, limits=ERROR_LIMITS[spec.dtype],
        formula=flops(spec, multiple) if with_backward(spec) else None, **rest,
    )  # fmt: skip


def our_variants(spec: Spec, backend: str) -> list[Variant]:
    modes = {"": ("float32", None)}
    if spec.dtype == "bfloat16":
        modes = {", fp32 logits": ("float32", None), ", bf16 logits": ("bfloat16", None)}
    if backend == "triton":
        modes[", streaming"] = ("float32", 0)
    return [
        variant(spec, f"{OURS} {backend}{suffix}", "ours", lambda mode=mode: our_stats(backend, *mode))
        for suffix, mode in modes.items()
    ]


def peer_variants(spec: Spec) -> list[Variant]:
    return [
        variant(
            spec, peer.name, "peer", lambda peer=peer: peer.stats(True), peer.flops, missing=peer.missing(spec),
            work="no entropy" if not peer.gives_entropy else "", pip=peer.pip, compiles=peer.compiles,
        )
        for peer in peers.PEERS
        if peer.stats is not None
    ]  # fmt: skip


def limits(spec: Spec) -> list[Variant]:
    if with_backward(spec):
        return three_matmul_limits(spec)
    return [Variant("one matmul", "limit", lambda problem: matmuls(problem)[0], work="into an existing buffer")]


def variants(spec: Spec) -> list[Variant]:
    found = limits(spec) if "time" in spec.measures else []
    reference = spec.device == "cpu"  # a GPU's would take most of the time
    found += harness.ours(STEM, spec.device, lambda backend: our_variants(spec, backend), reference)
    others = peer_variants(spec)
    return found + (others if spec.peers else others[:1])


def test_linear_logprob(benchmark, prepared):
    benchmark.pedantic(prepared, rounds=5)
