"""Other packages' language-model heads, each through its public API, imported only when it is measured.

Most give logprobs, and the loss is torch's on top (problems.row_losses), as their trainers do it. What one cannot
express it does not get: it then runs the closest equal work on the same hidden states and weight (`kind`, with its own
truth), and `work` says so. The torch losses compute no metrics and, for linear_scope_loss, no entropy: less work than
ours, never more.

Extra packages, none of them needed: liger-kernel, cut-cross-entropy, trl, verl (`pip install --no-deps` suffices).
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.harness import Spec, Variant, flops
from bench.problems import ERROR_LIMITS, HeadProblem, Loss, row_losses, sequences

# (hidden, weight, target) -> logprob (T,), entropy (T,) or None
Stats = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]]
# (hidden, weight) -> loss
HeadLoss = Callable[[Tensor, Tensor], Tensor]

TRL_VOCAB_TILE = 32768  # TRL's own default width


@dataclass(frozen=True)
class Peer:
    """stats: entropy wanted or not -> Stats. loss: problem -> HeadLoss, for what gives no logprobs."""

    name: str
    stats: Callable[[bool], Stats] | None = None
    loss: Callable[[HeadProblem], HeadLoss] | None = None
    kind: str = "scope"
    work: str = ""
    module: str = ""  # what must be importable
    pip: str = ""
    function: str = ""  # what torch.nn.functional must have
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    compiles: bool = False
    flops: int = 6  # in multiples of T*V*D: 8 where the logits are computed twice
    gives_entropy: bool = True

    def missing(self, spec: Spec) -> str:
        """Why it cannot run this problem; empty when it can."""
        if spec.device not in self.devices:
            return f"runs on {', '.join(self.devices)} only"
        if spec.dtype not in self.dtypes:
            return f"takes {', '.join(self.dtypes)} only"
        if self.module and not installed(self.module):
            return f"not installed (pip install {self.pip})"
        if self.function and not hasattr(F, self.function):
            return f"torch {torch.__version__} has no F.{self.function} (2.13 has)"
        return ""


def installed(module: str) -> bool:
    return module in sys.modules or importlib.util.find_spec(module) is not None


def eager_stats(entropy: bool) -> Stats:
    """mm, log_softmax, gather; the softmax of bfloat16 logits in float32, as trainers do it."""

    def stats(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        log_p = (hidden @ weight.T).float().log_softmax(-1)
        logprob = log_p.gather(-1, target.unsqueeze(-1)).squeeze(-1)
        return logprob, -(log_p.exp() * log_p).sum(-1) if entropy else None

    return stats


def compiled_stats(entropy: bool) -> Stats:
    return torch.compile(eager_stats(entropy), dynamic=False)


def compiled_loss(problem: HeadProblem) -> HeadLoss:
    """Head and loss in one graph: the whole of eager compiled."""
    streams, options = problem.kinds["scope"]
    stats = eager_stats(False)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return row_losses(stats(hidden, weight, problem.target)[0], streams, options).sum()

    return torch.compile(loss, dynamic=False)


def torch_linear_cross_entropy(problem: HeadProblem) -> HeadLoss:
    chunked = torch.nn.LinearCrossEntropyOptions()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.linear_cross_entropy(hidden, weight, problem.target, options=chunked)

    return loss


def liger_grpo(problem: HeadProblem) -> HeadLoss:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    streams, options = problem.kinds["grpo"]
    batch = sequences(problem.shape[0])

    def padded(x: Tensor) -> Tensor:
        return x.view(batch, -1)

    module = LigerFusedLinearGRPOLoss(
        beta=options.kl_coef, epsilon_low=options.clip_low, epsilon_high=options.clip_high, loss_type="dapo"
    )
    ratio = (streams.old_logprob - streams.rollout_logprob).exp().clamp(max=options.importance_cap)
    mask = torch.ones_like(padded(problem.target))

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return module(
            hidden.view(batch, -1, hidden.shape[-1]), weight, padded(problem.target), mask,
            padded(streams.advantage)[:, 0], ref_per_token_logps=padded(streams.ref_logprob),
            old_per_token_logps=padded(streams.old_logprob), vllm_is_ratio=padded(ratio),
        )[0]  # fmt: skip

    return loss


def liger_cross_entropy(problem: HeadProblem) -> HeadLoss:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return liger_fused_linear_cross_entropy(hidden, weight, problem.target)

    return loss


def liger_scaled_stats(entropy: bool) -> Stats:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Scaled

    def stats(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        if entropy:
            nll, h = Scaled.apply(hidden, weight, target, 1.0, -100, 1, True)
            return -nll, h
        return -Scaled.apply(hidden, weight, target, 1.0, -100, 1, False), None

    return stats


def cce_stats(impl: str) -> Callable[[bool], Stats]:
    def make(entropy: bool) -> Stats:
        from cut_cross_entropy import linear_cross_entropy

        def stats(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
            return -linear_cross_entropy(hidden, weight, target, reduction="none", impl=impl).float(), None

        return stats

    return make


def trl_stats(entropy: bool) -> Stats:
    from trl.kernels import ChunkedLogProbFunction

    trl_backward_import()
    outputs = ("entropy",) if entropy else ()

    def stats(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        return ChunkedLogProbFunction.apply(
            hidden, weight, None, target, 1.0, TRL_VOCAB_TILE, None, 1.0, outputs
        )[:2]  # fmt: skip

    return stats


def trl_backward_import() -> None:
    """Let TRL's backward import its DeepSpeed context: from TRL, or a null one where TRL's trainers cannot load.

    Without DeepSpeed TRL's own is a null context too, but its module imports accelerate, datasets and pandas.
    """
    try:
        importlib.import_module("trl.trainer.utils")
    except (ImportError, RuntimeError):  # transformers' lazy modules raise RuntimeError for a failed import
        stand_in = types.ModuleType("trl.trainer.utils")
        stand_in.maybe_gather_lm_head_ctx = lambda *parameters: nullcontext()
        sys.modules["trl.trainer.utils"] = stand_in


def verl_import(name: str) -> types.ModuleType:
    """A leaf module of verl; without verl's own __init__ where ray, which only that needs, is absent."""
    if not installed("ray") and "verl" not in sys.modules:
        root = importlib.util.find_spec("verl").submodule_search_locations[0]
        for package in ("", ".utils", ".utils.kernel", ".utils.experimental"):
            bare = types.ModuleType("verl" + package)
            bare.__path__ = [root + package.replace(".", "/")]
            sys.modules["verl" + package] = bare
    return importlib.import_module(f"verl.{name}")


def verl_torch_stats(entropy: bool) -> Stats:
    return verl_import("utils.experimental.torch_functional").FusedLinearForPPO()


def verl_triton_stats(entropy: bool) -> Stats:
    apply = verl_import("utils.kernel.linear_cross_entropy").linear_cross_entropy

    def stats(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor | None]:
        return apply(hidden, weight, target, 1.0, "none")

    return stats


ALL_RL = "all rows RL, one advantage per sequence, padded (B, T): it has no NLL rows"
ALL_NLL = "all rows NLL, equal weights: a cross entropy"
PEERS = (
    Peer("eager torch", stats=eager_stats),
    Peer("torch.compile", stats=compiled_stats, loss=compiled_loss, compiles=True),
    Peer(
        "torch linear_cross_entropy", loss=torch_linear_cross_entropy, kind="nll", work=ALL_NLL,
        function="linear_cross_entropy",
    ),
    Peer(
        "liger chunked GRPO", loss=liger_grpo, kind="grpo", work=ALL_RL, module="liger_kernel", pip="liger-kernel",
        compiles=True, flops=8,
    ),
    Peer(
        "liger scaled CE", stats=liger_scaled_stats, work="torch loss on top; on CPU its 512-token torch fallback",
        module="liger_kernel", pip="liger-kernel[cutedsl]", flops=8,
    ),
    Peer(
        "liger fused CE", loss=liger_cross_entropy, kind="nll", work=ALL_NLL, module="liger_kernel",
        pip="liger-kernel", devices=("cuda",),
    ),
    Peer(
        "cut-cross-entropy", stats=cce_stats("cce"), work="torch loss on top; gradient filter on, no entropy",
        module="cut_cross_entropy", pip="cut-cross-entropy", devices=("cuda",), flops=8, gives_entropy=False,
    ),
    Peer(
        "cut-cross-entropy torch_compile", stats=cce_stats("torch_compile"), work="torch loss on top; no entropy",
        module="cut_cross_entropy", pip="cut-cross-entropy", devices=("cpu",), compiles=True, gives_entropy=False,
    ),
    Peer(
        "trl ChunkedLogProb", stats=trl_stats, work="torch loss on top; on CPU its torch tiles", module="trl",
        pip="trl", flops=8,
    ),
    Peer(
        "verl FusedLinearForPPO", stats=verl_torch_stats, work="torch loss on top; always computes entropy",
        module="verl", pip="verl", flops=8,
    ),
    Peer(
        "verl linear_cross_entropy", stats=verl_triton_stats, work="torch loss on top; always computes entropy",
        module="verl", pip="verl", devices=("cuda",), flops=8,
    ),
)  # fmt: skip


def loss_call(peer: Peer, problem: HeadProblem) -> Callable[[], Loss]:
    """Forward and backward of the peer's loss."""
    if peer.loss is not None:
        loss = peer.loss(problem)
        return lambda: problem.gradients(loss(problem.hidden, problem.weight))
    stats = peer.stats(False)
    streams, options = problem.kinds[peer.kind]

    def run() -> Loss:
        logprob, _ = stats(problem.hidden, problem.weight, problem.target)
        return problem.gradients(row_losses(logprob, streams, options).sum())

    return run


def loss_variants(spec: Spec) -> list[Variant]:
    """Every peer as a variant of linear_scope_loss, forward and backward."""
    return [
        Variant(
            peer.name, "peer", prepare=lambda problem, peer=peer: loss_call(peer, problem),
            check=lambda problem, output, peer=peer: problem.errors(output, peer.kind),
            missing=peer.missing(spec), work=peer.work, pip=peer.pip, compiles=peer.compiles,
            limits=ERROR_LIMITS[spec.dtype],
            formula=flops(spec, peer.flops),
        )
        for peer in PEERS
    ]  # fmt: skip
