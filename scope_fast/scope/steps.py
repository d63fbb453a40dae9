"""Reasoning steps in token space: a cut falls between two sampled tokens, which are never decoded and encoded again."""

from __future__ import annotations

import re
from bisect import bisect_right
from itertools import accumulate

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def special_ids(tokenizer) -> set[int]:
    """The tokens that decoding with skip_special_tokens leaves out: the named ones, and those added as special."""
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(token for token, entry in added if entry.special)}


class TokenBytes:
    """The bytes each token of a Hugging Face fast tokenizer stands for; b"" for special tokens.

    Joined, they are the UTF-8 of the decoded text. One thing is the text's and not a token's: SentencePiece decoders
    drop a leading space, which is here part of the first token.

    Reads the tokenizer's own decoder: byte-level BPE (GPT-2, Qwen, Llama 3) and SentencePiece with byte fallback
    (Llama 2, Mistral). Raises ValueError for other kinds, rather than guess at their bytes.
    """

    def __init__(self, tokenizer) -> None:
        if not tokenizer.is_fast:
            raise ValueError(
                f"tokenizer: {type(tokenizer).__name__} is not a fast tokenizer: the bytes of its tokens cannot be read"
            )
        self._tokenizer = tokenizer
        self._special = special_ids(tokenizer)
        kind = repr(tokenizer.backend_tokenizer.decoder)
        if "ByteLevel" in kind:
            self._alphabet: dict[str, int] | None = _byte_alphabet()
        elif "ByteFallback" in kind or "Metaspace" in kind:
            self._alphabet = None
        else:
            raise ValueError(f"tokenizer: cannot tell the bytes of tokens decoded by {kind[:80]}")
        self._cache: dict[int, bytes] = {}

    def __call__(self, token_ids: list[int]) -> list[bytes]:
        return [self._one(token) for token in token_ids]

    def _one(self, token: int) -> bytes:
        if token not in self._cache:
            self._cache[token] = self._read(token)
        return self._cache[token]

    def _read(self, token: int) -> bytes:
        text = self._tokenizer.convert_ids_to_tokens(token)
        if token in self._special or text is None:  # None: a padded row of the embedding, no token at all
            return b""
        if self._alphabet is not None and all(c in self._alphabet for c in text):  # as the decoder decides
            return bytes(self._alphabet[c] for c in text)
        if self._alphabet is None and (byte := _BYTE_TOKEN.fullmatch(text)):
            return bytes([int(byte.group(1), 16)])
        return text.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's byte alphabet, inverted: printable bytes stand for themselves, the others for U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if chr(byte) not in alphabet)
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(list(others))}


def split_steps(
    token_bytes: list[bytes], separator: bytes = b"\n", trailing_eos: bool = False
) -> list[tuple[int, int]]:
    """Token spans [start, end) of the steps of a response, in order, covering every token once.

    A step ends after `separator` and the line breaks behind it. Spaces there, the separator's own included, open the
    next step: the tokens of most vocabularies hold the space before a word, and a token belongs to the step holding its
    first byte. White space before the first step belongs to it. trailing_eos: the last token is an EOS and belongs to
    no step. A response of white space only has no step.
    """
    tokens = token_bytes[:-1] if trailing_eos else token_bytes
    text = b"".join(tokens)
    if not text.strip():
        return []
    lead = len(text) - len(text.lstrip())
    ends = re.finditer(re.escape(separator) + rb"\s*", text)
    starts = [0] + [m.start() + len(m[0].rstrip(b" \t")) for m in ends if lead < m.end() < len(text)]
    first_bytes = [0, *accumulate(len(b) for b in tokens)][:-1]
    owner = [bisect_right(starts, first) for first in first_bytes]
    cuts = [i for i in range(1, len(tokens)) if owner[i] != owner[i - 1]]
    return list(zip([0, *cuts], [*cuts, len(tokens)], strict=True))
