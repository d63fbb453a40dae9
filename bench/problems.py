"""The language-model head as a problem: tensors, streams, the losses each variant can express, and the float64 truth.

Rows look like sampled tokens, not like noise: the target's logit is lifted so that its probability runs from rare to
near certain, while the other logits are normal with deviation LOGIT_STD. That matters to what is measured: bfloat16
logits err in proportion to their size, and gradient filters pay where distributions are peaked.

A loss KIND is what the rows are trained with:
    scope   RL 80 %, NLL 20 %: clipped ratio against old_logprob, truncated importance sampling, k3 KL to a reference
    plain   the same without KL, so that rows of zero advantage have no gradient
    half    plain, with the advantage of half of all rows zero
    grpo    every row RL, one advantage per sequence of a padded batch: all Liger's chunked GRPO can express
    nll     every row NLL with equal weight: all a cross entropy can express
    logprob every row a fixed random weight: the backward of a logprob op
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from bench.harness import Spec
from scope_fast import LossOptions, Segment, TokenStreams
from scope_fast.batch import is_active

LOGIT_STD = 2.0
OPTIONS = LossOptions(clip_low=0.2, clip_high=0.28, kl="k3", kl_coef=0.02, importance_cap=2.0)
PLAIN = replace(OPTIONS, kl="none", kl_coef=0.0)
RL = int(Segment.RL)  # torch.compile does not take the enumeration itself
NLL_SHARE = 0.2
# above these a variant computed something else, and is marked: a thousand roundings of float32; in bfloat16 one
# rounding of a logit of 20 is 0.06, and a row that near a clip bound takes the other branch, gradient or none
ERROR_LIMITS = {
    "float32": {"loss": 1e-4, "dhidden": 1e-4, "dweight": 1e-4, "logprob": 1e-3, "entropy": 1e-3, "grad_norm": 1e-4},
    "bfloat16": {"loss": 5e-2, "dhidden": 0.15, "dweight": 0.15, "logprob": 0.2, "entropy": 0.2, "grad_norm": 0.05},
}
TRUTH_ROWS = 512  # rows of float64 logits at a time: 0.6 GB at V=152064


class Loss(NamedTuple):
    """Output of a head variant: a scalar and the two gradients (dweight None where the head is frozen)."""

    loss: Tensor
    dhidden: Tensor | None
    dweight: Tensor | None


class Truth(NamedTuple):
    """The float64 result; gradients kept in float32, whose rounding is far below any error measured."""

    loss: float
    scale: float  # sum of the rows' absolute losses: what an error of the loss, which may cancel to 0, is relative to
    dhidden: Tensor
    dweight: Tensor


def sequences(num_rows: int) -> int:
    """How many equal sequences a padded batch of num_rows tokens is cut into."""
    return next(n for n in (8, 4, 2, 1) if num_rows % n == 0)


def row_losses(logprob: Tensor, streams: TokenStreams, options: LossOptions | None) -> Tensor:
    """The loss of each row in plain torch, as a trainer with a fused head writes it: what every logprob peer is given.

    options None: every row NLL.
    """
    s = streams
    if options is None:
        return -s.loss_weight * logprob
    ratio = (logprob - s.old_logprob).clamp(-20, 20).exp()
    clipped = ratio.clamp(1 - options.clip_low, 1 + options.clip_high)
    rho = (s.old_logprob - s.rollout_logprob).exp().clamp(max=options.importance_cap)
    policy = -rho * torch.minimum(ratio * s.advantage, clipped * s.advantage)
    if options.kl_coef:
        gap = s.ref_logprob - logprob
        policy = policy + options.kl_coef * (gap.exp() - gap - 1)
    return s.loss_weight * torch.where(s.segment == RL, policy, -logprob)


class HeadProblem:
    """hidden (T, D) and weight (V, D), leaves that require grad; target (T,); streams by loss kind."""

    def __init__(self, spec: Spec, exact: bool = True) -> None:
        T, D, V = spec.shape
        self.spec, self.shape = spec, spec.shape
        r = self.generator = torch.Generator(spec.device).manual_seed(0)
        new = {"generator": r, "device": spec.device}
        dtype = getattr(torch, spec.dtype)
        weight = torch.randn(V, D, **new).mul_(LOGIT_STD * D**-0.5)
        self.target = torch.randint(0, V, (T,), **new)
        rows = weight[self.target]
        # log V + variance / 2 is the expected logsumexp of the other logits
        lift = torch.rand(T, **new) * 8 - 2 + torch.log(torch.tensor(float(V))).item() + LOGIT_STD**2 / 2
        hidden = torch.randn(T, D, **new) + rows * (lift / rows.square().sum(1)).unsqueeze(1)
        self.hidden = hidden.to(dtype).requires_grad_()
        self.weight = weight.to(dtype).requires_grad_()
        self.truths: dict[str, Truth] = {}
        self.logprob64, self.entropy64 = self.forward64() if exact else (None, None)
        near = torch.full((T,), -3.0, device=spec.device) if self.logprob64 is None else self.logprob64.float()
        self.kinds = self.make_kinds(near)

    def make_kinds(self, near: Tensor) -> dict[str, tuple[TokenStreams, LossOptions | None]]:
        """Streams and options of every kind; old, ref and rollout lie around near (T,), the policy's logprobs."""
        T = self.shape[0]
        new = {"generator": self.generator, "device": near.device}

        def normal(scale: float) -> Tensor:
            return scale * torch.randn(T, **new)

        nll = torch.rand(T, **new) < NLL_SHARE
        segment = torch.where(nll, int(Segment.NLL), int(Segment.RL)).to(torch.uint8)
        counts = torch.where(nll, nll.sum(), (~nll).sum())
        streams = TokenStreams(
            self.target, segment, 1.0 / counts.float(), old_logprob=near + normal(0.2), advantage=normal(1.0),
            ref_logprob=near + normal(0.3), rollout_logprob=near + normal(0.05),
            active=torch.arange(T, device=near.device),
        )  # fmt: skip
        half = streams.advantage.clone()
        half[(~nll).nonzero()[: T // 2, 0]] = 0.0
        flows = [is_active(*row, PLAIN) for row in zip(segment.tolist(), [1.0] * T, half.tolist(), strict=True)]
        active = torch.tensor(flows, device=near.device).nonzero()[:, 0]
        num = sequences(T)
        every, equal = torch.ones_like(segment), torch.full((T,), 1.0 / T, device=near.device)
        per_sequence = torch.randn(num, **new).repeat_interleave(T // num)
        all_nll = replace(streams, segment=every * int(Segment.NLL), loss_weight=equal)
        return {
            "scope": (streams, OPTIONS),
            "plain": (streams, PLAIN),
            "half": (replace(streams, advantage=half, active=active), PLAIN),
            "grpo": (replace(streams, segment=every, loss_weight=equal, advantage=per_sequence), OPTIONS),
            "nll": (all_nll, None),
            "logprob": (replace(all_nll, loss_weight=normal(1.0)), None),
        }

    def ours(self, kind: str, **changes) -> tuple[TokenStreams, LossOptions]:
        """Streams and options of a kind as our ops take them."""
        streams, options = self.kinds[kind]
        return streams, replace(options or PLAIN, **changes)

    def gradients(self, loss: Tensor, frozen: bool = False) -> Loss:
        leaves = [self.hidden] if frozen else [self.hidden, self.weight]
        dhidden, *dweight = torch.autograd.grad(loss, leaves)
        return Loss(loss.detach(), dhidden, dweight[0] if dweight else None)

    @torch.no_grad()
    def forward64(self) -> tuple[Tensor, Tensor]:
        """The true logprob and entropy, (T,) each."""
        weight, logprob, entropy = self.weight.double(), [], []
        for x, t in zip(self.hidden.split(TRUTH_ROWS), self.target.split(TRUTH_ROWS), strict=True):
            rows = (x.double() @ weight.T).log_softmax(1)
            logprob.append(rows.gather(1, t.unsqueeze(1)).squeeze(1))
            entropy.append(-(rows.exp() * rows).sum(1))
        return torch.cat(logprob), torch.cat(entropy)

    def truth(self, kind: str) -> Truth:
        """Loss and gradients in float64: autograd down to the logprobs, then the softmax's own gradient."""
        if kind in self.truths:
            return self.truths[kind]
        streams, options = self.kinds[kind]
        slope = self.logprob64.clone().requires_grad_()
        rows = row_losses(slope, widened(streams), options)
        (g,) = torch.autograd.grad(rows.sum(), slope)
        with torch.no_grad():
            weight = self.weight.double()
            dweight, dhidden = torch.zeros_like(weight), []
            for x, t, gt in zip(*(c.split(TRUTH_ROWS) for c in (self.hidden, self.target, g)), strict=True):
                x = x.double()
                dz = (x @ weight.T).softmax(1).mul_(-gt.unsqueeze(1))
                dz.scatter_add_(1, t.unsqueeze(1), gt.unsqueeze(1))
                dhidden.append((dz @ weight).float())
                dweight.addmm_(dz.T, x)
        self.truths[kind] = Truth(rows.sum().item(), rows.abs().sum().item(), torch.cat(dhidden), dweight.float())
        return self.truths[kind]

    def errors(self, output: Loss, kind: str) -> dict[str, float]:
        """Relative errors: of the loss to the sum of the rows' magnitudes, of the gradients in the Frobenius norm."""
        truth = self.truth(kind)
        errors = {"loss": abs(output.loss.item() - truth.loss) / truth.scale}
        for name in ("dhidden", "dweight"):
            got, true = getattr(output, name), getattr(truth, name)
            if got is not None:
                errors[name] = ((got.float() - true).norm() / true.norm()).item()
        return errors

    def forget_truth(self) -> None:
        """Drop the truth's gradients, which would crowd a GPU's memory during timing."""
        self.truths.clear()


def widened(streams: TokenStreams) -> TokenStreams:
    """The same streams with their float values in float64."""
    wide = {k: v.double() for k, v in vars(streams).items() if v is not None and v.is_floating_point()}
    return replace(streams, **wide)
