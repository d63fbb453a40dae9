"""What a model must be for packed rows and the fused head, as far as its classes and configuration tell.

The rest `Learner.check` asks the model itself.
"""

from __future__ import annotations

import inspect
import math

from torch import nn

ATTENTIONS = {"full_attention", "sliding_attention", "chunked_attention"}  # of configurations' layer_types
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma 2 and 3, RecurrentGemma, xLSTM
SCALES = {"logits_scaling": -1, "logit_scale": 1, "lm_head_multiplier": 1}  # Granite, Cohere, Falcon-H1; by what power


def logit_scale(model: nn.Module) -> float:
    """What a model multiplies its head's output by. The fused head divides its temperature by it."""
    config = model.config.get_text_config()
    factors = ((getattr(config, name, None), power) for name, power in SCALES.items())
    return math.prod(float(value) ** power for value, power in factors if value is not None)


def capped_logits(model: nn.Module) -> str | None:
    """The configuration field by which a model bends what its head gives, if there is one."""
    config = model.config.get_text_config()
    return next((name for name in CAPS if getattr(config, name, None) is not None), None)


def check_model(model: nn.Module) -> None:
    """Refuses, by name, models whose logits are not a multiple of hidden @ weight.T (+ bias): the fused head would be
    wrong."""
    name = type(model).__name__
    if field := capped_logits(model):
        value = getattr(model.config.get_text_config(), field)
        raise ValueError(f"{name}: {field}={value} is not supported by the fused head")
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise ValueError(f"{name}: the output head is a {type(head).__name__}, expected nn.Linear")
    if any(module is head for module in model.base_model.modules()):
        raise ValueError(f"{name}: its base_model holds the output head too; merge or unload the adapter that wraps it")


def check_packing(model: nn.Module) -> None:
    """Refuses, by name, a model in which sequences of a packed row would run into each other.

    Attention is told by position_ids where each begins. Convolutions over tokens and recurrent states (Mamba, gated
    DeltaNet, lightning attention) are not: log-probabilities of all but the first sequence would be off by tenths.
    """
    body, config = model.base_model, model.config.get_text_config()
    mixers = set(getattr(config, "layer_types", None) or ()) - ATTENTIONS
    mixers |= {"nn.Conv1d" for module in body.modules() if isinstance(module, nn.Conv1d)}
    if mixers:
        named = ", ".join(sorted(mixers))
        raise ValueError(f"{type(model).__name__}: {named} would carry state from one sequence to the next")
    if "position_ids" not in inspect.signature(body.forward).parameters:
        raise ValueError(f"{type(model).__name__}: takes no position_ids, by which packed sequences are told apart")
