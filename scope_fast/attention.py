"""Attention over packed sequences: which implementation transformers is asked for, and the one that is ours.

Sequences lie one behind the other in a batch of one row and are told apart by their position_ids, which start at 0 in
each. flash-attn reads their lengths. SDPA takes a block-diagonal mask and computes all of it, L^2 for a row of L
tokens, masked or not; `packed_sdpa` calls it once for each sequence, causal and without a mask: the sum of the squares.
It must know the lengths on the host, for which a GPU is asked once a micro-batch.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from scope_fast.batch import sequence_lengths

PACKED = "packed_sdpa"
FLASH_DTYPES = (torch.bfloat16, torch.float16)
_lengths = WeakIdKeyDictionary()  # by the position_ids that all layers of a forward, and its recomputation, are given


def implementation(dtype: torch.dtype, kind: str = "auto") -> str:
    """The attention implementation transformers is asked for, for a model that computes in `dtype`.

    "auto": flash-attn where it can run, else `packed_sdpa`. ValueError where the kind that is named cannot run.
    """
    usable = torch.cuda.is_available() and find_spec("flash_attn") is not None and dtype in FLASH_DTYPES
    if kind == "flash_attention_2" and not usable:
        raise ValueError(
            "learner.attention: flash_attention_2 needs a CUDA GPU, the package flash-attn and model.dtype bfloat16"
        )
    if kind == "auto":
        kind = "flash_attention_2" if usable else PACKED
    if kind == PACKED:
        from transformers import AttentionInterface, AttentionMaskInterface

        AttentionInterface.register(PACKED, packed_sdpa)
        AttentionMaskInterface.register(PACKED, lambda *args, **kwargs: None)
    return kind


def packed_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' SDPA, sequence by sequence. query (1, H, L, d), key and value (1, H_kv, L, d) -> (1, L, H, d).

    ValueError for a batch of several rows, if the model does not pass position_ids (1, L) to its attention, or if it
    makes a mask of its own (Doge), which would be ignored.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if position_ids is None or query.shape[0] != 1 or position_ids.shape != (1, query.shape[2]):
        raise ValueError(
            f"learner.attention: {PACKED} needs one row of packed sequences and their position_ids in "
            f"{type(module).__name__}; got query {tuple(query.shape)}"
        )
    if attention_mask is not None:  # what transformers makes for every model is None here
        raise ValueError(f"learner.attention: {PACKED} leaves out the mask that {type(module).__name__} makes itself")
    if position_ids not in _lengths:
        _lengths[position_ids] = sequence_lengths(position_ids[0])
    lengths, outputs = _lengths[position_ids], []
    for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True):
        mask = _window(q, sliding_window)
        outputs.append(sdpa_attention_forward(module, q, k, v, mask, **kwargs)[0])
    return torch.cat(outputs, 1), None


def _window(query: Tensor, window: int | None) -> Tensor | None:
    """The causal mask of a sliding window, for a sequence that is longer; None: plain causal."""
    length = query.shape[2]
    if window is None or length <= window:
        return None
    at = torch.arange(length, device=query.device)
    back = at[:, None] - at[None, :]
    return ((back >= 0) & (back < window))[None, None]
