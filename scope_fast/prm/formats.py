"""How each family of process reward models is asked: a question and step texts to token ids, and the rows that answer.

    qwen2.5-math-prm   chat of three turns, `<extra_0>` after every step; the row of a step is its separator
    math-shepherd      "question Step 1: ... ки\\nStep 2: ... ки"; the row of a step is its `ки`
    rlhflow            a turn a step, each answered by "+"; the row of a step is the one that predicts its "+"

Rows are found by the separators that are really there: a step that spells one out gives a row too many, and its
rollout counts as prm/invalid instead of being scored askew.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol


class Encoded(NamedTuple):
    """ids of one sequence; rows: the index of the row that scores each step, one per separator found."""

    ids: list[int]
    rows: list[int]


class Format(Protocol):
    def __call__(self, question: str, steps: list[str]) -> Encoded: ...


def one_token(tokenizer, text: str, what: str) -> int:
    """The id of `text`. ValueError naming it where the tokenizer has no single token for it."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        found = tokenizer.convert_ids_to_tokens(ids)
        raise ValueError(f"prm.path: the {what} {text!r} is not one token of its tokenizer, but {found}")
    return ids[0]


class QwenFormat:
    """Qwen2.5-Math-PRM, as its card writes it."""

    SEPARATOR = "<extra_0>"
    SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."

    def __init__(self, tokenizer) -> None:
        self._tokenizer = tokenizer
        _need_template(tokenizer)
        self.separator_id = one_token(tokenizer, self.SEPARATOR, "separator")
        _check(self, self.SEPARATOR)

    def __call__(self, question: str, steps: list[str]) -> Encoded:
        messages = [
            {"role": "system", "content": self.SYSTEM},
            {"role": "user", "content": question},
            {"role": "assistant", "content": "".join(step + self.SEPARATOR for step in steps)},
        ]
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
        return _marked(self._tokenizer.encode(text, add_special_tokens=False), self.separator_id)


class ShepherdFormat:
    """Math-Shepherd: steps are numbered, unless they say "Step ..." themselves."""

    SEPARATOR, POSITIVE, NEGATIVE = "ки", "+", "-"

    def __init__(self, tokenizer) -> None:
        self._tokenizer = tokenizer
        self.separator_id = one_token(tokenizer, self.SEPARATOR, "separator")
        self.positive_id = one_token(tokenizer, self.POSITIVE, "label")
        self.negative_id = one_token(tokenizer, self.NEGATIVE, "label")
        _check(self, self.SEPARATOR)

    def __call__(self, question: str, steps: list[str]) -> Encoded:
        numbered = [s if s.startswith("Step ") else f"Step {i}: {s}" for i, s in enumerate(steps, 1)]
        text = f"{question} " + "\n".join(f"{step} {self.SEPARATOR}" for step in numbered)
        return _marked(self._tokenizer.encode(text), self.separator_id)


class RlhflowFormat:
    """RLHFlow's PRMs: one conversation holds every step, each answered "+"; a causal model sees no later turn."""

    POSITIVE, NEGATIVE = "+", "-"

    def __init__(self, tokenizer) -> None:
        self._tokenizer = tokenizer
        _need_template(tokenizer)
        self.positive_id = one_token(tokenizer, self.POSITIVE, "label")
        self.negative_id = one_token(tokenizer, self.NEGATIVE, "label")
        _check(self, self.POSITIVE)

    def __call__(self, question: str, steps: list[str]) -> Encoded:
        messages, answers = [], set()
        for i, step in enumerate(steps):
            messages.append({"role": "user", "content": f"{question} {step}" if i == 0 else step})
            answers.add(len(self._render(messages, add_generation_prompt=True)))  # the place of its "+", in characters
            messages.append({"role": "assistant", "content": self.POSITIVE})
        encoded = self._tokenizer(
            self._render(messages, add_generation_prompt=False), add_special_tokens=False, return_offsets_mapping=True
        )
        tokens = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        rows = [i - 1 for i, (token, span) in enumerate(tokens) if span[0] in answers and token == self.positive_id]
        return Encoded(encoded["input_ids"], rows)

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        return self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )


def _need_template(tokenizer) -> None:
    if tokenizer.chat_template is None:
        raise ValueError("prm.path: its tokenizer has no chat template")


def _marked(ids: list[int], separator_id: int) -> Encoded:
    return Encoded(ids, [i for i, token in enumerate(ids) if token == separator_id])


def _check(fmt: Format, mark: str) -> None:
    """A tokenizer may merge the mark with its neighbours, a template may drop or double it: said before any rollout."""
    rows = fmt("1 = 1?", ["So it is.", "Answer: 1"]).rows
    if len(rows) != 2:
        raise ValueError(f"prm.path: {mark!r} marks {len(rows)} of 2 steps in its tokenizer and template")
