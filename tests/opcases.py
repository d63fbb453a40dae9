"""Shared by the op tests: where to run (backends), what to run on (cases, options), and the truth to compare with.

The truth is written here a second time, naively: full logits, one formula a line, gradients by autograd. It calls
nothing of ours but the option and stream types.

One body serves every backend. "triton" runs the kernels on CPU tensors when the process was started with
TRITON_INTERPRET=1 (tests/test_triton_interpreter.py starts such a process); "triton-gpu" runs them on a GPU.
"""

import os
from dataclasses import dataclass, replace

import pytest
import torch

from scope_fast import LossOptions, Segment, TokenStreams, native
from scope_fast.ops import dispatch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
METRIC_NAMES = {
    "loss/rl", "loss/nll", "policy/rows", "policy/entropy_sum", "policy/kl_sum", "policy/clipped",
    "policy/ratio_max", "sampling/gap_sum", "sampling/gap_max",
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A backend and the device its tensors live on."""

    backend: str
    device: str = "cpu"

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """float64 is for the backends that are held to exactness, not speed."""
        exact = (torch.float64,) if self.backend == "reference" else ()
        return (*exact, torch.float32, torch.bfloat16)

    @property
    def fine(self) -> torch.dtype:
        return self.dtypes[0]


def places(*native_kernels: str, reference: bool = True, cuda: str | None = None):
    """Parametrize a test over the backends: all that can run here, or the interpreted one in a process that interprets.

    native_kernels: what the C++ backend of this op must have registered; none: it has no such backend.
    reference=False leaves the reference out. cuda: the stem that csrc/cuda serves, if it does.
    """
    if INTERPRETED:
        return pytest.mark.parametrize("place", [pytest.param(Place("triton"), id="triton")])
    built = all(native.has(name, "cpu") for name in native_kernels)
    no_build = pytest.mark.skipif(not built, reason=f"no C++ kernels {native_kernels} in this build")
    no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
    params = [pytest.param(Place("triton", "cuda"), id="triton-gpu", marks=[pytest.mark.gpu, no_gpu])]
    if cuda is not None:
        reason = dispatch.missing_for(cuda, "cuda", "cuda") if torch.cuda.is_available() else ""
        no_kernel = pytest.mark.skipif(bool(reason), reason=reason)
        params.append(pytest.param(Place("cuda", "cuda"), id="cuda-gpu", marks=[pytest.mark.gpu, no_gpu, no_kernel]))
    if native_kernels:
        params.insert(0, pytest.param(Place("cpu"), id="cpu", marks=no_build))
    if reference:
        params.insert(0, pytest.param(Place("reference"), id="reference"))
    return pytest.mark.parametrize("place", params)


# every option at a value that matters, alone and together
OPTIONS = {
    "ppo": LossOptions(),
    "clip_higher": LossOptions(clip_low=0.1, clip_high=0.4),
    "dual_clip": LossOptions(dual_clip=1.3),
    "cispo": LossOptions(policy_loss="cispo", clip_low=0.3, clip_high=0.5),
    "k1": LossOptions(kl="k1", kl_coef=0.3),
    "k2": LossOptions(kl="k2", kl_coef=0.3),
    "k3": LossOptions(kl="k3", kl_coef=0.3),
    "entropy": LossOptions(entropy_coef=0.05),
    "importance": LossOptions(importance_cap=1.5),
    "temperature": LossOptions(temperature=0.7),
    "shaped": LossOptions(nll_shape="shaped"),
    "nll_entropy": LossOptions(nll_shape="entropy"),
    "all": LossOptions(
        0.2, 0.3, 2.0, "ppo", kl="k3", kl_coef=0.1, entropy_coef=0.02, importance_cap=2.0, nll_shape="shaped",
        temperature=1.3,
    ),
    "all_cispo": LossOptions(
        0.2, 0.3, None, "cispo", kl="k2", kl_coef=0.1, entropy_coef=0.02, importance_cap=2.0, nll_shape="entropy",
        temperature=0.9,
    ),
}  # fmt: skip
all_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same values, every second element of every dimension of a wider tensor; a leaf where `x` is one."""
    wide = x.detach().new_zeros([2 * n for n in x.shape])
    view = wide[tuple(slice(None, None, 2) for _ in x.shape)]
    view.copy_(x.detach())
    return view.requires_grad_(x.requires_grad)


@dataclass
class Case:
    """Inputs of the linear ops; hidden, weight and bias are leaves that require grad."""

    hidden: torch.Tensor  # (T, D)
    weight: torch.Tensor  # (V, D)
    bias: torch.Tensor | None  # (V,)
    streams: TokenStreams

    def leaves(self) -> list[torch.Tensor]:
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None]

    def to(self, dtype: torch.dtype, device: str = "cpu") -> "Case":
        """A copy with leaves of its own."""

        def leaf(x):
            return None if x is None else x.detach().to(device, dtype, copy=True).requires_grad_()

        return Case(leaf(self.hidden), leaf(self.weight), leaf(self.bias), self.streams.to(device))

    def with_streams(self, **changes) -> "Case":
        return Case(self.hidden, self.weight, self.bias, replace(self.streams, **changes))


def make_case(
    T: int = 13,
    D: int = 7,
    V: int = 19,
    *,
    segments: tuple[int, ...] = (0, 1, 2),
    bias: bool = False,
    on_policy: bool = False,
    temperature: bool = False,
    seed: int = 0,
) -> Case:
    """A float64 case whose values are exact in bfloat16, so that every dtype sees the same problem.

    Ratios straddle both clip bounds; weights are positive, zero and negative; some advantages are zero.
    """
    r = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape, generator=r) * scale).bfloat16().double()

    hidden, weight = normal(T, D), normal(V, D, scale=D**-0.5)
    b = normal(V, scale=0.5) if bias else None
    target = torch.randint(0, V, (T,), generator=r)
    segment = torch.tensor(segments, dtype=torch.uint8)[torch.randint(0, len(segments), (T,), generator=r)]
    loss_weight = torch.rand(T, generator=r) + 0.1
    if T > 4:
        loss_weight[3::7], loss_weight[4::7] = 0.0, -0.5
    advantage = torch.randn(T, generator=r)
    advantage[2::5] = 0.0
    with torch.no_grad():
        z = hidden @ weight.T if b is None else hidden @ weight.T + b
        logprob = z.log_softmax(1).gather(1, target[:, None])[:, 0].float() if T else torch.empty(0)

    def near(scale):
        return logprob + scale * torch.randn(T, generator=r)

    streams = TokenStreams(
        target,
        segment,
        loss_weight,
        old_logprob=None if on_policy else near(0.4),
        advantage=advantage,
        ref_logprob=near(0.5),
        rollout_logprob=near(0.3),
        temperature=torch.rand(T, generator=r) + 0.5 if temperature else None,
    )
    case = Case(hidden, weight, b, streams)
    return case.to(torch.float64)


EXTREMES = ("equal", "huge", "huge_negative", "excluded", "certain")


def extreme_case(kind: str, T: int = 6, V: int = 11) -> Case:
    """Equal logits, +-1e4, all very negative, a -inf column, or one token of probability 1; half RL, half NLL."""
    z, bias = torch.zeros(T, V, dtype=torch.float64), torch.zeros(V, dtype=torch.float64)
    if kind == "huge":
        z[:, ::2], z[:, 1::2] = 1e4, -1e4
    elif kind == "huge_negative":
        z[:] = -1e4 - torch.arange(V)
    elif kind == "excluded":
        bias[3] = -torch.inf
    elif kind == "certain":
        z[:, 0] = 1e4
    segment = torch.tensor([1, 2], dtype=torch.uint8).repeat(T)[:T]
    streams = TokenStreams(torch.arange(T) % 3, segment, torch.ones(T), advantage=torch.ones(T))
    return Case(z, torch.eye(V, dtype=torch.float64), bias, streams).to(torch.float64)


def is_active(streams: TokenStreams, options: LossOptions) -> torch.Tensor:
    """(T,) bool: design section 4's active row."""
    always = options.kl_coef != 0 or options.entropy_coef != 0
    has_advantage = torch.tensor(always) if streams.advantage is None else (streams.advantage != 0) | always
    rl = (streams.segment == Segment.RL) & (streams.loss_weight != 0) & has_advantage
    return rl | ((streams.segment == Segment.NLL) & (streams.loss_weight != 0))


def naive_stats(hidden, weight, target, temperature, bias=None):
    """(logprob, entropy, logsumexp) from full logits, in the inputs' dtype with a float32 (float64) softmax."""
    z = hidden @ weight.T
    z = z if bias is None else z + bias
    z = z if z.dtype == torch.float64 else z.float()
    z = z / temperature.to(z)[:, None]
    log_p = z.log_softmax(1)
    finite = log_p.clamp(min=-1e30)
    return log_p.gather(1, target[:, None])[:, 0], -(finite.exp() * finite).sum(1), z.logsumexp(1)


def naive_loss(hidden, weight, streams: TokenStreams, options: LossOptions, bias=None):
    """(loss, metrics) by the formulas of the design, over the active rows only; differentiable by autograd."""
    index = is_active(streams, options).nonzero()[:, 0]
    take = {k: None if v is None else v[index] for k, v in vars(streams).items() if k != "active"}
    segment = take["segment"]
    one = torch.ones(segment.shape, dtype=torch.float64, device=segment.device)
    default = torch.where(segment == Segment.RL, options.temperature * one, one)
    temperature = default if take["temperature"] is None else take["temperature"]
    logprob, entropy, _ = naive_stats(hidden[index], weight, take["target"], temperature, bias)
    return naive_row_loss(logprob, entropy, take, options)


def naive_row_loss(logprob, entropy, take: dict, options: LossOptions):
    """The row losses and metrics from logprob and entropy of active rows."""
    o, zero = options, logprob.sum() * 0
    rl, nll = (take["segment"] == s for s in (Segment.RL, Segment.NLL))
    logp, H, w = logprob[rl], entropy[rl], take["loss_weight"][rl].to(logprob.dtype)
    metrics = dict.fromkeys(METRIC_NAMES, zero.detach())
    loss_rl = zero
    if logp.numel():
        A = take["advantage"][rl].to(logp.dtype)
        old = logp.detach() if take["old_logprob"] is None else take["old_logprob"][rl].to(logp.dtype)
        log_ratio = (logp - old).clamp(-20, 20)
        r = log_ratio.exp()
        bounded = r.clamp(1 - o.clip_low, 1 + o.clip_high)
        if o.policy_loss == "ppo":
            objective = torch.minimum(r * A, bounded * A)
            clipped = bounded * A < r * A
            if o.dual_clip is not None:
                floored = (A < 0) & (o.dual_clip * A > objective)
                objective, clipped = torch.where(floored, o.dual_clip * A, objective), clipped | floored
        else:
            objective, clipped = bounded.detach() * A * logp, bounded != r
        rho = torch.ones_like(logp)
        if take["rollout_logprob"] is not None:
            rollout = take["rollout_logprob"][rl].to(logp.dtype)
            gap = (logp - rollout).abs().detach()
            metrics |= {"sampling/gap_sum": gap.sum(), "sampling/gap_max": gap.max()}
            if o.importance_cap is not None:
                rho = (old - rollout).exp().clamp(max=o.importance_cap).detach()
        rows = -w * rho * objective - w * o.entropy_coef * H
        if o.kl != "none":
            d = logp - take["ref_logprob"][rl].to(logp.dtype)
            c = (-d).clamp(-20, 20)
            rows = rows + w * o.kl_coef * {"k1": d, "k2": d**2 / 2, "k3": c.exp() - c - 1}[o.kl]
        loss_rl = rows.sum()
        metrics |= {
            "policy/rows": zero.detach() + logp.numel(),
            "policy/entropy_sum": H.detach().sum(),
            "policy/kl_sum": (log_ratio.exp() - 1 - log_ratio).detach().sum(),
            "policy/clipped": zero.detach() + clipped.sum(),
            "policy/ratio_max": r.detach().max(),
        }
    logp, H, w = logprob[nll], entropy[nll], take["loss_weight"][nll].to(logprob.dtype)
    shapes = {"constant": logp, "shaped": logp.exp() / (logp.exp() + 0.1), "entropy": (-H).exp().detach() * logp}
    likelihood = shapes[o.nll_shape]
    loss_nll = -(w * likelihood).sum()
    metrics |= {"loss/rl": loss_rl.detach(), "loss/nll": loss_nll.detach()}
    return loss_rl + loss_nll, metrics


def gradients(loss: torch.Tensor, case: Case) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, case.leaves()))


def error(ours: torch.Tensor, truth: torch.Tensor) -> float:
    return (ours.detach().double().cpu() - truth.detach().double().cpu()).abs().max().item() if truth.numel() else 0.0


def assert_no_worse(ours, eager, truth, dtype: torch.dtype, what: str) -> None:
    """The tolerance rule: no further from the float64 truth than eager torch in the same dtype, plus a small slack.

    The slack is for sums of tens of terms in another order (64 roundings at the result's scale), in bfloat16, where
    sums are float32, for the one rounding of the result.
    """
    assert ours.isfinite().all(), f"{what} is not finite"
    scale = max(1.0, truth.detach().abs().max().item()) if truth.numel() else 1.0
    roundings = 1 if dtype == torch.bfloat16 else 64
    limit = error(eager, truth) + roundings * torch.finfo(dtype).eps * scale
    assert error(ours, truth) <= limit, f"{what}: {error(ours, truth):.3g} from the truth, limit {limit:.3g}"
