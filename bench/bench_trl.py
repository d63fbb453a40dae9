"""compute_loss and backward of TRL's GRPOTrainer, with and without our head, on the same tiny model and completions.

    6*T*V*D flops of the head on T completion tokens; baseline: the model's body, forward and backward

Three trainers: TRL's; ours under TRL's DAPO loss (the head alone differs); ours with loss_type "scope", which equals
DAPO here. On CPU TRL's head scores every position, prompts and padding included; on a GPU the completion tokens alone.
shape: (T, D, V), see bench/completions.py for the spread of lengths.
"""

from __future__ import annotations

import torch

from bench.completions import ERROR_LIMITS, SPREAD, Completions, make_trainer
from bench.harness import OURS, Formula, Spec, Variant
from bench.peers import installed

STEM = "trl"
CASE = "compute_loss+backward"
SHAPES = {"cpu": (1024, 256, 32000), "cuda": (8192, 1024, 151936)}


def specs(device: str, shape: tuple[int, int, int] | None, dtypes: tuple[str, ...] | None, peers: bool) -> list[Spec]:
    dtypes = dtypes or (("float32",) if device == "cpu" else ("bfloat16",))
    return [Spec(STEM, CASE, shape or SHAPES[device], dtype, device) for dtype in dtypes]


def make_problem(spec: Spec, exact: bool = True) -> Completions:
    return Completions(spec, exact, on_policy=False)


def formula(spec: Spec) -> Formula:
    T, D, V = spec.shape
    return Formula(6 * T * V * D, "TFLOP/s", "6*T*V*D of the head")


def body(problem: Completions):
    """The model without its head, forward and backward, over the padded batch."""
    model = problem.copy_of_model().model
    ids = torch.cat([problem.inputs["prompt_ids"], problem.inputs["completion_ids"]], dim=1)
    mask = torch.cat([problem.inputs["prompt_mask"], problem.inputs["completion_mask"]], dim=1)

    def run():
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=problem.spec.dtype == "bfloat16"):
            hidden = model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return torch.autograd.grad(hidden.sum(), list(model.parameters()))

    return run


def step(problem: Completions, ours: bool, loss_type: str = "dapo"):
    trainer = make_trainer(problem, ours, loss_type)
    parameters = list(trainer.model.parameters())

    def run():
        """(loss, gradients of all parameters)."""
        loss = trainer.compute_loss(trainer.model, problem.inputs)
        return loss.detach(), *torch.autograd.grad(loss, parameters)

    return run


def errors(problem: Completions, output) -> dict[str, float]:
    loss, *gradients = output
    return problem.errors(loss.item(), torch.stack([g.float().norm() for g in gradients]).norm().item())


def variants(spec: Spec) -> list[Variant]:
    missing = "" if installed("trl") else "not installed (pip install trl)"
    checked = {"check": errors, "limits": ERROR_LIMITS[spec.dtype], "missing": missing, "pip": "trl"}
    return [
        Variant("the model's body", "limit", body, work="no head"),
        Variant("trl GRPOTrainer", "peer", lambda p: step(p, False), work=f"dapo; {SPREAD}", **checked),
        Variant(f"{OURS} head", "ours", lambda p: step(p, True), work="TRL's dapo loss on linear_logprob", **checked),
        Variant(f"{OURS} loss", "ours", lambda p: step(p, True, "scope"), work="linear_scope_loss", **checked),
    ]


def test_trl(benchmark, prepared):
    benchmark.pedantic(prepared, rounds=3)
