"""What a model must be for packed rows and the fused head, as far as its classes and configuration tell.

The rest `Learner.check` asks the model itself.
"""

from __future__ import annotations

import inspect

from torch import nn

ATTENTIONS = {"full_attention", "sliding_attention", "chunked_attention"}  # of configurations' layer_types
RESCALED_LOGITS = {  # configuration fields of models that change the head's output, and the value that changes nothing
    "final_logit_softcapping": None,  # Gemma 2, 3
    "logits_soft_cap": None,  # RecurrentGemma
    "output_logit_soft_cap": None,  # xLSTM
    "logits_scaling": 1.0,  # Granite, MiniCPM
    "logit_scale": 1.0,  # Cohere
    "lm_head_multiplier": 1.0,  # Falcon-H1
}


def rescaled_logits(model: nn.Module) -> str | None:
    """The configuration field by which a model changes what its head gives, if there is one."""
    config = model.config.get_text_config()
    changes = (name for name, neutral in RESCALED_LOGITS.items() if getattr(config, name, None) not in (None, neutral))
    return next(changes, None)


def check_model(model: nn.Module) -> None:
    """Refuses, by name, models whose logits are not hidden @ weight.T (+ bias): the fused head would be wrong."""
    name = type(model).__name__
    if field := rescaled_logits(model):
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
