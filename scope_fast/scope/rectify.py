"""Splicing a teacher's suffix behind the student's prefix, in token space."""

from __future__ import annotations

from scope_fast.scope.steps import special_ids


class Rejected(ValueError):
    """A suffix that cannot be used; its message is the reason that ends up in the records."""


def splice(tokenizer, prefix_ids: list[int], suffix: str, max_tokens: int) -> list[int]:
    """Token ids of `suffix`, encoded without the prefix, plus the student's EOS.

    prefix_ids: the student's own tokens, unchanged. max_tokens: room for the suffix and its EOS.
    Raises Rejected if the suffix is empty, repeats the prefix, spells out a special token, does not fit, or if decoding
    prefix and suffix together does not give the text of the prefix followed by the suffix.
    """
    if not suffix.strip():
        raise Rejected("empty suffix")
    prefix = _decode(tokenizer, prefix_ids)
    if _repeats(suffix.strip(), prefix.strip()):
        raise Rejected("the suffix repeats the prefix")
    suffix_ids = tokenizer.encode(suffix, add_special_tokens=False)
    decodes = _decode(tokenizer, prefix_ids + suffix_ids) == prefix + suffix
    if not decodes:
        suffix_ids = _behind_a_line(tokenizer, suffix)
        decodes = _decode(tokenizer, prefix_ids + suffix_ids) == prefix + suffix
    if not special_ids(tokenizer).isdisjoint(suffix_ids):  # text like "</s>": an EOS in the middle
        raise Rejected("the suffix spells out a special token")
    if len(suffix_ids) + 1 > max_tokens:
        raise Rejected(f"suffix of {len(suffix_ids)} tokens and EOS exceed the budget of {max_tokens}")
    if not decodes:
        raise Rejected("prefix and suffix do not decode to their own text")
    return [*suffix_ids, tokenizer.eos_token_id]


def _behind_a_line(tokenizer, suffix: str) -> list[int]:
    """The suffix as a tokenizer writes it that puts a space before what it encodes (Llama 2's): after a line break."""
    line, whole = (tokenizer.encode(text, add_special_tokens=False) for text in ("\n", f"\n{suffix}"))
    return whole[len(line) :]


def _decode(tokenizer, token_ids: list[int]) -> str:
    return tokenizer.decode(token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _repeats(suffix: str, prefix: str) -> bool:
    """Whether `suffix` starts with `prefix` and a line or word ends there ("1" does not repeat in "12 + 3")."""
    return bool(prefix) and suffix.startswith(prefix) and not suffix[len(prefix) :][:1].strip()
