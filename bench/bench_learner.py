"""One optimiser step: our learner against TRL's GRPOTrainer, same tiny model, completions and loss (GRPO, no repair).

    tokens/s of prompts and completions, padding not counted: forward, backward, gradient clipping, AdamW

On policy, the mean over all completion tokens (TRL: loss_type "dapo", its default). Cases: every group has a gradient;
half of the groups have equal rewards, as in a run whose prompts are too easy or too hard: then our learner leaves them
out, TRL trains on zeros. shape: (T, D, V), see bench/completions.py for the spread of lengths.
"""

from __future__ import annotations

import torch

from bench.completions import ERROR_LIMITS, SPREAD, Completions, make_trainer
from bench.harness import OURS, Formula, Spec, Variant
from bench.peers import installed
from scope_fast.batch import LossOptions
from scope_fast.config import Learner as LearnerConfig
from scope_fast.learner import Learner

STEM = "learner"
CASES = {"all groups": 0.0, "half of the groups equal": 0.5}  # name -> share of groups without a gradient
SHAPES = {"cpu": (1024, 256, 32000), "cuda": (8192, 1024, 151936)}
TOKEN_BUDGET = {"cpu": 1024, "cuda": 16384}
FOREVER = 1_000_000  # optimiser steps of the schedule, which is constant


def specs(device: str, shape: tuple[int, int, int] | None, dtypes: tuple[str, ...] | None, peers: bool) -> list[Spec]:
    dtypes = dtypes or (("float32",) if device == "cpu" else ("bfloat16",))
    sizes = shape or SHAPES[device]
    return [Spec(STEM, case, sizes, dtype, device, peers=peers) for dtype in dtypes for case in CASES]


def make_problem(spec: Spec, exact: bool = True) -> Completions:
    return Completions(spec, exact, on_policy=True, still=CASES[spec.case])


def formula(spec: Spec) -> Formula:
    return Formula(2 * spec.shape[0], "tokens/s", "prompt and completion tokens a step")


def our_step(problem: Completions):
    config = LearnerConfig(lr=1e-6, token_budget=TOKEN_BUDGET[problem.spec.device])
    learner = Learner(
        problem.copy_of_model(), config, LossOptions(), FOREVER, compute_dtype=getattr(torch, problem.spec.dtype)
    )
    batch = [problem.sequences()]

    def run() -> tuple[torch.Tensor, ...]:
        stats = learner.update(batch)
        return torch.tensor(stats["loss/total"]), torch.tensor(stats["grad/norm"])

    return run


def trl_step(problem: Completions):
    trainer = make_trainer(problem, ours=False)
    inputs = {name: value for name, value in problem.inputs.items() if not name.startswith("scope_")}

    def run() -> tuple[torch.Tensor, ...]:
        loss = trainer.training_step(trainer.model, inputs, None)
        norm = trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return loss, norm

    return run


def errors(problem: Completions, output: tuple[torch.Tensor, ...]) -> dict[str, float]:
    return problem.errors(*(float(value) for value in output))


def variants(spec: Spec) -> list[Variant]:
    checked = {"check": errors, "limits": ERROR_LIMITS[spec.dtype]}
    found = [Variant(f"{OURS} learner", "ours", our_step, work=f"packed; {SPREAD}", **checked)]
    if spec.peers:
        missing = "" if installed("trl") else "not installed (pip install trl)"
        found.append(Variant("trl GRPOTrainer", "peer", trl_step, work="padded", missing=missing, pip="trl", **checked))
    return found


def test_learner(benchmark, prepared):
    benchmark.pedantic(prepared, rounds=3)
