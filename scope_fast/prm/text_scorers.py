"""Published process reward models: they read the student's steps as text, in their own template and tokenizer.

In this process the body runs packed and `step_pool` scores the rows of the steps alone, so neither (T, V) nor (T, 2) is
made. Qwen2.5-Math-PRM also runs in vLLM (prm/vllm_pooling.py), whose head scores every token.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from scope_fast import attention
from scope_fast.loading import pretrained
from scope_fast.model_checks import capped_logits, check_packing, logit_scale
from scope_fast.ops.step_pool import PrmHead
from scope_fast.prm.formats import Encoded, Format, QwenFormat, RlhflowFormat, ShepherdFormat
from scope_fast.prm.scorers import packed_scores, scores_of_those_that_fit
from scope_fast.scope.trajectory import Trajectory

FORMATS = {"qwen2.5-math-prm": QwenFormat, "math-shepherd": ShepherdFormat, "rlhflow": RlhflowFormat}
QWEN_HEAD = ("score.0.weight", "score.0.bias", "score.2.weight", "score.2.bias")


class TextScorer:
    """Scores step texts. A rollout that is too long for the model, or spells out a separator, gets another number of
    probabilities than it has steps: the trainer counts it as prm/invalid.

    student: the tokenizer that decodes the rollouts. context: the longest sequence the model takes.
    """

    def __init__(self, student, fmt: Format, context: int) -> None:
        self._student, self._format, self._context = student, fmt, context

    def __call__(self, trajectories: list[Trajectory]) -> list[list[float]]:
        return scores_of_those_that_fit([self._encode(t) for t in trajectories], self._context, self._score)

    def _encode(self, trajectory: Trajectory) -> Encoded:
        ids = trajectory.token_ids
        steps = [self._student.decode(ids[a:b], skip_special_tokens=True).strip() for a, b in trajectory.steps]
        return self._format(question(trajectory), steps)

    def _score(self, sequences: list[Encoded]) -> list[list[float]]:
        raise NotImplementedError


class InProcessScorer(TextScorer):
    """body: a decoder without its head, which `head` replaces."""

    def __init__(self, student, fmt: Format, body: torch.nn.Module, head: PrmHead, token_budget: int) -> None:
        super().__init__(student, fmt, body.config.max_position_embeddings)
        self._body, self._head, self._budget = body.eval(), head, token_budget

    def _score(self, sequences: list[Encoded]) -> list[list[float]]:
        return packed_scores(self._body, self._head, sequences, self._budget)


def load(kind: str, folder: str, student, dtype: torch.dtype, device: torch.device, token_budget: int) -> TextScorer:
    """The scorer of `kind` (a key of FORMATS) in this process, from a Hugging Face folder or hub name.

    Raises ValueError naming a separator or label that is no single token, what the head has that cannot be skipped, or
    weights that the folder lacks.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Model

    fmt = FORMATS[kind](AutoTokenizer.from_pretrained(folder))
    how = {"dtype": dtype, "attn_implementation": attention.implementation(dtype)}
    if kind == "qwen2.5-math-prm":
        body = pretrained("prm.path", Qwen2Model, folder, **how).to(device)
        hidden, hidden_bias, weight, bias = (t.to(device, dtype) for t in read_tensors(folder, QWEN_HEAD))
        head = PrmHead(weight, bias, hidden_weight=hidden, hidden_bias=hidden_bias)
        return InProcessScorer(student, fmt, body, head, token_budget)
    model = pretrained("prm.path", AutoModelForCausalLM, folder, **how).to(device)
    check_packing(model)
    lm_head = model.get_output_embeddings()
    if capped_logits(model) or logit_scale(model) != 1.0:
        raise ValueError(f"prm.path: {type(model).__name__} of this configuration changes its logits after the head")
    if getattr(lm_head, "bias", None) is not None:
        raise ValueError("prm.path: a language model head with a bias is not supported")
    head = PrmHead.from_lm_head(lm_head.weight, fmt.negative_id, fmt.positive_id)
    return InProcessScorer(student, fmt, model.base_model, head, token_budget)


def question(trajectory: Trajectory) -> str:
    """What the last user message asks, without the student's chat template."""
    asked = [message["content"] for message in trajectory.prompt.chat if message["role"] == "user"]
    return asked[-1] if asked else trajectory.prompt.text


def read_tensors(folder: str, names: tuple[str, ...]) -> list[torch.Tensor]:
    """Tensors of a safetensors checkpoint, in one file or in shards. ValueError naming one that is not there."""
    from safetensors import safe_open
    from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

    index = cached_file(folder, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    single = dict.fromkeys(names, SAFE_WEIGHTS_NAME)
    shards = single if index is None else json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
    tensors = []
    for name in names:
        if name not in shards:
            raise ValueError(f"prm.path: {folder} has no tensor {name}")
        with safe_open(cached_file(folder, shards[name]), "pt") as file:
            if name not in file.keys():  # noqa: SIM118  a safetensors handle is no mapping
                raise ValueError(f"prm.path: {folder} has no tensor {name} in {shards[name]}")
            tensors.append(file.get_tensor(name))
    return tensors
