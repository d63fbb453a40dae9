"""A GRPO batch as a problem: a tiny Qwen2, prompts and completions of a stated spread of lengths, and the truth.

    SEQUENCES sequences in groups of GROUP; lengths run linearly from LOW to HIGH times their mean, longest prompt with
    shortest completion. shape (T, D, V): T completion tokens in all and as many prompt tokens, hidden size, vocabulary.

Loss: DAPO's normalisation (the mean over all completion tokens), TRL's default and ours, clipped ratio against old
log-probabilities off the policy's own, or on policy. TRL is met here and nowhere else in the benchmarks of trainers.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from typing import Any

import torch
from torch import Tensor, nn

from bench.harness import Spec
from scope_fast.batch import Segment, TrainSequence

SEQUENCES, GROUP, LAYERS = 16, 8, 2
LOW, HIGH = 0.25, 1.75
PAD = 1
CLIP = 0.2
SPREAD = f"{SEQUENCES} sequences, prompts and completions {LOW} to {HIGH} times their mean length"


def lengths(total: int, count: int) -> list[int]:
    """`count` lengths (2 at least, where there is room) that run from LOW to HIGH times their mean and sum to total."""
    ends = [LOW + (HIGH - LOW) * i / max(count - 1, 1) for i in range(count)] if count > 1 else [1.0]
    found = [max(1, int(total / count * share)) for share in ends]
    found[-1] += total - sum(found)
    return found


class Completions:
    """model, the padded tensors TRL trains on, and the sequences our learner trains on: one and the same batch.

    still: the share of groups whose rewards are all equal, so that their advantages are zero.
    """

    def __init__(self, spec: Spec, exact: bool, on_policy: bool, still: float = 0.0) -> None:
        from transformers import Qwen2Config, Qwen2ForCausalLM

        num_tokens, dim, vocab = spec.shape
        torch.manual_seed(0)
        heads = max(1, dim // 64)
        config = Qwen2Config(
            vocab_size=vocab, hidden_size=dim, intermediate_size=2 * dim, num_hidden_layers=LAYERS,
            num_attention_heads=heads, num_key_value_heads=heads, initializer_range=0.1, pad_token_id=PAD,
            bos_token_id=None, eos_token_id=0,
        )  # fmt: skip
        self.spec = spec
        self.model = Qwen2ForCausalLM(config).to(spec.device)
        self.rng = torch.Generator().manual_seed(1)
        count = SEQUENCES if num_tokens >= 4 * SEQUENCES else 2
        size = min(GROUP, count)
        advantage = torch.randn(count, generator=self.rng)
        advantage[: round(still * count / size) * size] = 0.0
        responses = lengths(num_tokens, count)
        self.prompts, self.responses = self.tokens(responses[::-1], vocab), self.tokens(responses, vocab)
        self.inputs = self.padded(advantage)
        if not on_policy:
            near = logprobs(self.model, self.inputs)
            noise = 0.2 * torch.randn(near.shape, generator=self.rng).to(near.device)
            self.inputs["old_per_token_logps"] = near + noise
        self.truth = exact_loss(self.model, self.inputs) if exact else None

    def tokens(self, sizes: list[int], vocab: int) -> list[list[int]]:
        return [torch.randint(2, vocab, (size,), generator=self.rng).tolist() for size in sizes]

    def padded(self, advantage: Tensor) -> dict[str, Tensor]:
        """TRL's tensors: prompts padded on the left, completions on the right."""
        prompt, prompt_mask = pad(self.prompts, left=True)
        completion, completion_mask = pad(self.responses, left=False)
        found = {
            "prompt_ids": prompt, "prompt_mask": prompt_mask, "completion_ids": completion,
            "completion_mask": completion_mask, "advantages": advantage, "num_items_in_batch": completion_mask.sum(),
            "scope_segment": completion_mask.to(torch.uint8), "scope_rl_count": completion_mask.sum(),
            "scope_nll_count": torch.tensor(0),
        }  # fmt: skip
        return {name: value.to(self.spec.device) for name, value in found.items()}

    def sequences(self) -> list[TrainSequence]:
        """What our learner trains on; on policy, so that no old log-probability is needed."""
        return [
            TrainSequence(
                prompt, response, [int(Segment.RL)] * len(response), [value] * len(response), [1.0] * len(response),
                [0.0] * len(response),
            )
            for prompt, response, value in zip(
                self.prompts, self.responses, self.inputs["advantages"].tolist(), strict=True
            )
        ]  # fmt: skip

    def copy_of_model(self) -> nn.Module:
        return copy.deepcopy(self.model)

    def errors(self, loss: float, norm: float) -> dict[str, float]:
        """Errors of the loss, relative to the rows' magnitudes, and of the gradient's norm."""
        true_loss, scale, true_norm = self.truth
        return {"loss": abs(loss - true_loss) / scale, "gradient norm": abs(norm - true_norm) / true_norm}

    def forget_truth(self) -> None:
        """Three numbers stay."""


ERROR_LIMITS = {
    "float32": {"loss": 1e-5, "gradient norm": 1e-4},
    "bfloat16": {"loss": 5e-2, "gradient norm": 0.1},
}


def pad(rows: list[list[int]], left: bool) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), PAD), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return ids, mask


def logprobs(model: nn.Module, inputs: dict[str, Tensor], grad: bool = False) -> Tensor:
    """(B, C) of the completion tokens, from full logits."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
    keep = inputs["completion_ids"].shape[1]
    with torch.set_grad_enabled(grad):
        logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=keep + 1).logits[:, :-1]
        return logits.log_softmax(-1).gather(2, inputs["completion_ids"][..., None]).squeeze(2)


def exact_loss(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[float, float, float]:
    """Loss, the sum of the rows' magnitudes and the norm of the gradient, in float64."""
    model = copy.deepcopy(model).double()
    logp = logprobs(model, inputs, grad=True)
    old, mask = inputs.get("old_per_token_logps", logp.detach()), inputs["completion_mask"]
    advantage = inputs["advantages"].double()[:, None]
    ratio = (logp - old).exp()
    rows = -torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage) * mask / mask.sum()
    rows.sum().backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    return rows.sum().item(), rows.abs().sum().item(), norm.item()


def import_trl() -> Any:
    """trl with its GRPOTrainer; without the vllm that it would import for 20 s wherever that is installed."""
    hide = "vllm" not in sys.modules
    if hide:
        sys.modules["vllm"] = None
    try:
        import trl

        assert trl.GRPOTrainer  # lazily imported
    finally:
        if hide:
            del sys.modules["vllm"]
    return trl


def make_trainer(problem: Completions, ours: bool, loss_type: str = "dapo") -> Any:
    """A GRPOTrainer, TRL's or ours, on a copy of the problem's model, that trains on the inputs it is given."""
    trl = import_trl()
    from datasets import Dataset
    from transformers import AutoTokenizer

    from scope_fast.config_files import PRESETS

    base = trl.GRPOTrainer
    if ours:
        from scope_fast.integrations.trl import ScopeGRPOTrainer as base

    class Given(base):
        """Its batches are ready: nothing is generated."""

        def _prepare_inputs(self, inputs):
            return inputs

    device = problem.spec.device
    args = trl.GRPOConfig(
        output_dir=tempfile.gettempdir(), per_device_train_batch_size=SEQUENCES, num_generations=GROUP, beta=0.0,
        epsilon=CLIP, loss_type=loss_type, learning_rate=1e-6, report_to="none", use_cpu=device == "cpu",
        bf16=problem.spec.dtype == "bfloat16", gradient_checkpointing=False, max_grad_norm=1.0, temperature=1.0,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(PRESETS.parent / "assets" / "student")
    trainer = Given(
        problem.copy_of_model(), reward_funcs=lambda completions, **columns: [0.0] * len(completions), args=args,
        train_dataset=Dataset.from_dict({"prompt": ["1"] * SEQUENCES}), processing_class=tokenizer,
    )  # fmt: skip
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # set by Trainer's loop
    trainer.create_optimizer()
    return trainer
