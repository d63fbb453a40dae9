"""One optimiser step of a whole model, with our head and with others in its place: tokens/s, MFU, memory.

    packed tokens over the time of forward, backward, gradient clipping and AdamW; model FLOPs as scope_fast/flops.py

Everything but the head is the same: our learner, FSDP2 over one rank, a Qwen2 with random weights, one micro-batch of
T tokens in sequences of SEQUENCE, three quarters of them responses. A peer's head gives log-probabilities, and
scope_loss makes the loss of them. shape: (T, D, V); on D=896 and 1536 the model is as deep and wide as Qwen2.5-0.5B and
1.5B. Where the time goes: python -m bench.bench_learner_heads T,D,V
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench import peers
from bench.harness import OURS, Formula, Spec, Variant
from bench.problems import ERROR_LIMITS, TRUTH_ROWS
from scope_fast import LossOptions, Segment, attention, scope_loss
from scope_fast.batch import MicroBatch, TrainSequence, pack
from scope_fast.config import Learner as LearnerConfig
from scope_fast.flops import model_flops
from scope_fast.learner import Learner, hidden_rows
from scope_fast.sharding import make_mesh

STEM = "learner_heads"
SEQUENCE, PROMPT_SHARE = 1024, 0.25
DEEP = {  # hidden size -> the rest of Qwen2.5-0.5B and 1.5B
    896: {"num_hidden_layers": 24, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2},
    1536: {"num_hidden_layers": 28, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2},
}
SHAPES = {"cpu": [(1024, 256, 32000)], "cuda": [(16384, 896, 151936), (16384, 1536, 151936)]}
RECOMPUTED_FROM = 1536  # of this width on blocks are recomputed, so that eager logits fit beside them into 80 GB
STILL = 1e-12  # learning rate: every round trains the same weights


def specs(device: str, shape: tuple[int, int, int] | None, dtypes: tuple[str, ...] | None, peers: bool) -> list[Spec]:
    dtypes = dtypes or (("float32",) if device == "cpu" else ("bfloat16",))
    sizes = [shape] if shape else SHAPES[device]
    return [Spec(STEM, "update", size, dtype, device, peers=peers) for size in sizes for dtype in dtypes]


def make_model(spec: Spec):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    _, dim, vocab = spec.shape
    heads = max(1, dim // 64)
    small = {
        "num_hidden_layers": 2, "intermediate_size": 4 * dim, "num_attention_heads": heads, "num_key_value_heads": heads
    }  # fmt: skip
    attend = attention.implementation(getattr(torch, spec.dtype))
    config = Qwen2Config(
        vocab_size=vocab, hidden_size=dim, tie_word_embeddings=True, max_position_embeddings=SEQUENCE,
        attn_implementation=attend, bos_token_id=None, eos_token_id=0, **DEEP.get(dim, small),
    )  # fmt: skip
    return Qwen2ForCausalLM(config)


def make_sequences(spec: Spec) -> list[TrainSequence]:
    """T tokens, on policy; every response token has a gradient, half of them as likelihood."""
    r = torch.Generator().manual_seed(1)
    sequences, left = [], spec.shape[0]
    while left:
        length = min(SEQUENCE, left)
        left -= length
        tokens = torch.randint(2, spec.shape[2], (length,), generator=r).tolist()
        prompt = max(1, int(length * PROMPT_SHARE))
        count, advantage = length - prompt, torch.randn(1, generator=r).item()
        taught = count // 2  # likelihood on the second half: of policy rows alone the loss knows no log-probability
        sequences.append(
            TrainSequence(
                tokens[:prompt], tokens[prompt:],
                [int(Segment.RL)] * (count - taught) + [int(Segment.NLL)] * taught,
                [advantage] * count, [1.0] * count, [0.0] * count,
            )
        )  # fmt: skip
    return sequences


def make_batch(spec: Spec) -> MicroBatch:
    sequences = make_sequences(spec)
    segments = [segment for s in sequences for segment in s.segment]
    counts = (max(1, segments.count(kind)) for kind in (Segment.RL, Segment.NLL))
    (batch,) = pack(sequences, spec.shape[0], LossOptions(), *counts)
    return batch


class Heads:
    """A learner whose head can be exchanged, and what it trains on."""

    def __init__(self, spec: Spec, exact: bool) -> None:
        if not dist.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if spec.device == "cuda" else "gloo"
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        torch.manual_seed(0)
        checkpointing = "full" if spec.shape[1] >= RECOMPUTED_FROM else "none"
        config = LearnerConfig(lr=STILL, token_budget=spec.shape[0], activation_checkpointing=checkpointing)
        self.learner = Learner(
            make_model(spec).to(spec.device), config, LossOptions(), total_steps=1_000_000,
            compute_dtype=getattr(torch, spec.dtype), mesh=make_mesh(),
        )  # fmt: skip
        self.sequences, self.batch = make_sequences(spec), make_batch(spec).to(spec.device)
        self.truth = self.exact() if exact else None

    def use(self, stats: peers.Stats | None) -> None:
        """A peer's head from now on; None: ours."""
        objective = self.learner.objective
        objective.__dict__.pop("forward", None)
        if stats is not None:
            objective.forward = lambda batch, score_only=False: self.peer_loss(stats, batch)

    def peer_loss(self, stats: peers.Stats, batch: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
        model = self.learner.objective.model
        hidden = hidden_rows(model, batch)
        logprob, _ = stats(hidden, model.get_output_embeddings().weight, batch.streams.target)
        backend = "reference" if logprob.dtype == torch.float64 else None
        return scope_loss(logprob, batch.streams, self.learner.options, backend=backend)

    def exact(self) -> tuple[float, float, float]:
        """Of the model's own hidden states through a float64 head: the loss, the sum of its rows' magnitudes, and the
        gradient's norm."""
        found = []

        def rows_of(hidden: Tensor, wide: Tensor, target: Tensor) -> Tensor:
            return (hidden.double() @ wide.T).log_softmax(1).gather(1, target[:, None])[:, 0]

        def stats(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, None]:
            wide = weight.double()  # once: its gradient is summed over the parts in float64
            parts = zip(hidden.split(TRUTH_ROWS), target.split(TRUTH_ROWS), strict=True)
            # recomputed in the backward: float64 logits of all rows are 20 GB at T=16384
            rows = torch.cat([checkpoint(rows_of, h, wide, t, use_reentrant=False) for h, t in parts])
            found.append(rows.detach())
            return rows, None

        loss, norm = (value.item() for value in step(self, stats)())
        streams = self.batch.streams
        # on policy a policy row's loss is minus its advantage
        rows = torch.where(streams.segment == Segment.NLL, found[-1], streams.advantage)
        return loss, (streams.loss_weight * rows).abs().sum().item(), norm

    def forget_truth(self) -> None:
        """Three numbers stay."""


def make_problem(spec: Spec, exact: bool = True) -> Heads:
    return Heads(spec, exact)


def formula(spec: Spec) -> Formula:
    with torch.device("meta"):
        per_token = model_flops(make_model(spec))
    flops = per_token.of(make_batch(spec))
    return Formula(spec.shape[0], "tokens/s", f"packed tokens; {flops:.3g} model FLOPs a step", flops)


def step(problem: Heads, stats: peers.Stats | None):
    def run() -> tuple[Tensor, ...]:
        problem.use(stats)
        done = problem.learner.update([problem.sequences])
        if done["learner/out_of_memory"]:  # in halves it would be another measurement, and so would all that follow
            problem.learner.halvings = 0
            raise torch.OutOfMemoryError("the update went on in halves")
        return torch.tensor(done["loss/total"]), torch.tensor(done["grad/norm"])

    return run


def errors(problem: Heads, output: tuple[Tensor, ...]) -> dict[str, float]:
    loss, scale, norm = problem.truth
    return {"loss": abs(output[0].item() - loss) / scale, "grad_norm": abs(output[1].item() - norm) / norm}


def variants(spec: Spec) -> list[Variant]:
    checked: dict[str, Any] = {"check": errors, "limits": ERROR_LIMITS[spec.dtype]}
    found = [Variant(f"{OURS} head", "ours", lambda problem: step(problem, None), **checked)]
    heads = [peer for peer in peers.PEERS if peer.stats is not None and not peer.compiles] if spec.peers else []
    return found + [
        Variant(
            peer.name, "peer", lambda problem, peer=peer: step(problem, peer.stats(False)), missing=peer.missing(spec),
            work="its log-probabilities, scope_loss", pip=peer.pip, **checked,
        )
        for peer in heads
    ]  # fmt: skip


def profile(spec: Spec) -> str:
    """Where the time of one update goes, by kernel."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if spec.device == "cuda" else []
    run = step(make_problem(spec, exact=False), None)
    for _ in range(2):
        run()
    with torch.profiler.profile(activities=activities) as profiler:
        run()
    order = "self_cuda_time_total" if spec.device == "cuda" else "self_cpu_time_total"
    return profiler.key_averages().table(sort_by=order, row_limit=30, max_name_column_width=80)


def test_learner_heads(benchmark, prepared):
    benchmark.pedantic(prepared, rounds=3)


if __name__ == "__main__":
    from bench.cli import parse_shape

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for described in specs(device, parse_shape(sys.argv[1]) if len(sys.argv) > 1 else None, None, peers=False):
        print(f"{described.label}\n{profile(described)}")
