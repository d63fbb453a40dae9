"""scope_loss from logprobs, forward and backward: elementwise, so bytes count.

    bytes per row: logprob 4, segment 1, loss_weight, old, advantage, ref, rollout 4 each read; dlogprob 4 written: 29

Baseline: a copy that moves as many bytes. shape: (T, -, -) rows; the other two numbers are not read.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from bench import harness
from bench.harness import OURS, Formula, Spec, Tensors, Variant
from bench.problems import OPTIONS, row_losses, widened
from scope_fast import Segment, TokenStreams, scope_loss

STEM = "scope_loss"
ROW_BYTES = 29


def specs(device: str, shape: tuple[int, int, int] | None, dtypes: tuple[str, ...] | None, peers: bool) -> list[Spec]:
    rows = shape or ((1 << 20 if device == "cpu" else 1 << 23), 1, 1)
    return [Spec(STEM, "forward+backward", rows, "float32", device, ("time", "memory"), peers)]


def make_problem(spec: Spec, exact: bool = True) -> Tensors:
    """logprob (T,), a leaf, and its streams."""
    T = spec.shape[0]
    new = {"generator": torch.Generator(spec.device).manual_seed(0), "device": spec.device}

    def near(x: torch.Tensor, scale: float) -> torch.Tensor:
        return x + scale * torch.randn(T, **new)

    logprob = -5 * torch.rand(T, **new)
    nll = torch.rand(T, **new) < 0.2
    streams = TokenStreams(
        torch.zeros(T, dtype=torch.int64, device=spec.device),
        torch.where(nll, int(Segment.NLL), int(Segment.RL)).to(torch.uint8),
        torch.full((T,), 1.0 / T, device=spec.device),
        old_logprob=near(logprob, 0.2), advantage=torch.randn(T, **new), ref_logprob=near(logprob, 0.3),
        rollout_logprob=near(logprob, 0.05),
    )  # fmt: skip
    return Tensors(spec=spec, logprob=logprob.requires_grad_(), streams=streams)


def formula(spec: Spec) -> Formula:
    return Formula(ROW_BYTES * spec.shape[0], "GB/s", f"{ROW_BYTES} bytes a row")


def gradient(problem: Tensors, loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return loss.detach(), torch.autograd.grad(loss, problem.logprob)[0]


def our_call(problem: Tensors, backend: str):
    return lambda: gradient(problem, scope_loss(problem.logprob, problem.streams, OPTIONS, backend=backend)[0])


def torch_call(problem: Tensors, compiled: bool):
    def loss(logprob: torch.Tensor) -> torch.Tensor:
        return row_losses(logprob, problem.streams, OPTIONS).sum()

    loss = torch.compile(loss, dynamic=False) if compiled else loss
    return lambda: gradient(problem, loss(problem.logprob))


def errors(problem: Tensors, output) -> dict[str, float]:
    logprob = problem.logprob.detach().double().requires_grad_()
    rows = row_losses(logprob, widened(problem.streams), OPTIONS)
    (true,) = torch.autograd.grad(rows.sum(), logprob)
    loss, got = output
    error = abs(loss.item() - rows.sum().item()) / rows.abs().sum().item()
    return {"loss": error, "dlogprob": ((got.double() - true).norm() / true.norm()).item()}


def variants(spec: Spec) -> list[Variant]:
    checked = {"check": errors, "limits": {"loss": 1e-4, "dlogprob": 1e-4}}

    def ours(backend: str) -> list[Variant]:
        return [Variant(f"{OURS} {backend}", "ours", lambda problem: our_call(problem, backend), **checked)]

    found = [harness.copy_limit(int(formula(spec).amount), spec.device)]
    found += harness.ours(STEM, spec.device, ours)
    found.append(Variant("eager torch", "peer", lambda p: torch_call(p, False), work="no metrics", **checked))
    if spec.peers:
        compiled = Variant("torch.compile", "peer", lambda p: torch_call(p, True), work="no metrics", **checked)
        found.append(replace(compiled, compiles=True))
    return found


def test_scope_loss(benchmark, prepared):
    benchmark.pedantic(prepared, rounds=5)
