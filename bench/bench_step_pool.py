"""step_pool: a process reward model's head at the step boundaries, against the same head on every token.

    S*D hidden elements read, 2*S*D*M flops for an MLP head (M = D), 2*S*D*2 for two rows of an lm_head; S = T/50

The baseline is what token-classification and vLLM pooling do: score all T rows, keep the boundaries'. For the lm_head
that is its two rows on every token; on a GPU also the whole lm_head on every token, which `model(...).logits` costs.
shape: (T, D, V).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bench import harness
from bench.harness import OURS, Formula, Spec, Tensors, Variant
from scope_fast import PrmHead, step_pool
from scope_fast.ops.step_pool import STEM_MLP

STEM = "step_pool"
TOKENS_PER_STEP = 50
STEPS_PER_ROLLOUT = 8
TAU = 0.5
LOGIT_ROWS = 4096  # rows of full lm_head logits at a time


def specs(device: str, shape: tuple[int, int, int] | None, dtypes: tuple[str, ...] | None, peers: bool) -> list[Spec]:
    size = shape or ((16384, 896, 32000) if device == "cpu" else (65536, 3584, 152064))
    dtypes = dtypes or (("float32",) if device == "cpu" else ("bfloat16",))
    cases = ("MLP head", "lm_head")
    return [Spec(STEM, case, size, dtype, device, ("time", "memory"), peers) for dtype in dtypes for case in cases]


def make_problem(spec: Spec, exact: bool = True) -> Tensors:
    """hidden (T, D), head, step_end (S), cu_steps (R + 1), and lm_head (V, D) in that case."""
    T, D, V = spec.shape
    new = {"generator": torch.Generator(spec.device).manual_seed(0), "device": spec.device}
    dtype = getattr(torch, spec.dtype)

    def normal(*shape: int, scale: float) -> torch.Tensor:
        return torch.randn(*shape, **new).mul_(scale).to(dtype)

    hidden, lm_head = normal(T, D, scale=1.0), None
    if spec.case == "lm_head":
        lm_head = normal(V, D, scale=D**-0.5)
        head = PrmHead.from_lm_head(lm_head, negative_id=0, positive_id=V - 1)
    else:
        head = PrmHead(normal(2, D, scale=D**-0.5), normal(2, scale=0.1), normal(D, D, scale=D**-0.5))
    step = min(TOKENS_PER_STEP, T)
    step_end = torch.arange(step - 1, T, step, device=spec.device)
    num = step_end.shape[0]
    edges = [*range(0, num, STEPS_PER_ROLLOUT), num]
    cu_steps = torch.tensor(edges, device=spec.device)
    rollout = torch.repeat_interleave(cu_steps.diff())
    return Tensors(hidden=hidden, head=head, lm_head=lm_head, step_end=step_end, cu_steps=cu_steps, rollout=rollout)


def formula(spec: Spec) -> Formula:
    T, D, _ = spec.shape
    size = 2 if spec.dtype == "bfloat16" else 4
    return Formula(max(1, T // TOKENS_PER_STEP) * D * size, "GB/s", f"S*D*{size} bytes, S = T/{TOKENS_PER_STEP}")


def our_call(problem: Tensors, backend: str):
    p = problem
    return lambda: step_pool(p.hidden, p.head, p.step_end, p.cu_steps, tau=TAU, backend=backend)


def pooled(p: Tensors, prob: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """First error and pools of the boundaries' probabilities in torch."""
    counts = p.cu_steps.diff()
    step = torch.arange(prob.shape[0], device=prob.device)
    error = torch.where(prob >= TAU, prob.shape[0], step)
    first = torch.full_like(counts, prob.shape[0]).scatter_reduce(0, p.rollout, error, "amin")
    first = torch.minimum(first - p.cu_steps[:-1], counts)
    pools = [torch.segment_reduce(prob, reduce, offsets=p.cu_steps) for reduce in ("min", "mean", "prod")]
    return prob, first, *pools, prob[p.cu_steps[1:] - 1]


def head_on(p: Tensors, rows: torch.Tensor) -> torch.Tensor:
    """The head's probability of every row given, in the rows' dtype as a model's forward has it."""
    head = p.head
    x = rows if head.hidden_weight is None else F.linear(rows, head.hidden_weight, head.hidden_bias).relu()
    return F.linear(x, head.weight, head.bias).float().softmax(-1)[:, 1]


def every_token(p: Tensors):
    @torch.no_grad()
    def run() -> tuple[torch.Tensor, ...]:
        return pooled(p, head_on(p, p.hidden)[p.step_end])

    return run


def full_lm_head(p: Tensors):
    @torch.no_grad()
    def run() -> tuple[torch.Tensor, ...]:
        pairs = [(x @ p.lm_head.T)[:, [0, -1]] for x in p.hidden.split(LOGIT_ROWS)]
        return pooled(p, torch.cat(pairs).float().softmax(-1)[:, 1][p.step_end])

    return run


def errors(p: Tensors, output) -> dict[str, float]:
    """Largest error of a probability against float64, and of what is made of the probabilities against them."""
    head = [None if w is None else w.double() for w in (p.head.weight, p.head.bias, p.head.hidden_weight)]
    x = p.hidden[p.step_end].double()
    x = x if head[2] is None else (x @ head[2].T).relu()
    true = F.linear(x, head[0], head[1]).softmax(-1)[:, 1]
    _, first_error, *pools = pooled(p, output[0].double())
    return {
        "prob": (output[0].double() - true).abs().max().item(),
        "first_error": float((output[1] != first_error).sum()),
        "pools": max((got.double() - pool).abs().max().item() for got, pool in zip(output[2:], pools, strict=True)),
    }


def variants(spec: Spec) -> list[Variant]:
    limits = {"prob": 1e-4 if spec.dtype == "float32" else 5e-2, "first_error": 0.0, "pools": 1e-5}
    checked = {"check": errors, "limits": limits}

    def ours(backend: str) -> list[Variant]:
        return [Variant(f"{OURS} {backend}", "ours", lambda problem: our_call(problem, backend), **checked)]

    found = [Variant("head on every token", "limit", every_token, work="T rows scored, S kept", **checked)]
    found += harness.ours(STEM if spec.case == "lm_head" else STEM_MLP, spec.device, ours)
    if spec.case == "lm_head" and spec.peers and spec.device == "cuda":  # on a CPU: 20 s a call
        work = "all V rows on all T tokens"
        found.append(Variant("whole lm_head on every token", "peer", full_lm_head, work=work, **checked))
    return found


def test_step_pool(benchmark, prepared):
    benchmark.pedantic(prepared, rounds=5)
