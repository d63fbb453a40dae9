r"""Final answers: how they are found in a response, and scoring functions that compare them as text.

A scoring function takes (response, entry) and returns (reward 0.0 or 1.0, the answer it found); entry["answer"] is the
gold answer. `verifier.score` names one:
    scope_fast.answers:text          the same text, after `canonical`
    scope_fast.answers:choice        the same letter of a multiple-choice question
    scope_fast.math_answers:score    equal as mathematics (needs math-verify)
The answer of a response is its last complete \boxed{...}, else what follows its last "Answer:"; a response with neither
has none, and is wrong. Verifier workers load this module: standard library only.
"""

from __future__ import annotations

import re
from typing import Any

from scope_fast.tasks import extract_answer

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)  # an escaped brace is no brace
_WRAPPED = re.compile(r"\$\$(.*)\$\$|\$(.*)\$|\\\((.*)\\\)|\\\[(.*)\\\]", re.DOTALL)
_SPACING = re.compile(r"\\(?:left|right)(?![a-zA-Z])|\\[!,;:]")
_THOUSANDS = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_LETTER = re.compile(r"\W*(?:\\(?:text|math)(?:rm|bf|it|sf)?\{)?\W*([A-Za-z])(?:[\s*)}\].]*$|[.):])")


def boxed(text: str) -> str | None:
    r"""What the last complete \boxed{...} holds, braces balanced; None where there is none."""
    for match in reversed(list(_BOX.finditer(text))):
        end = _closing(text, match.end())
        if end is not None:
            return text[match.end() : end].strip()
    return None


def _closing(text: str, start: int) -> int | None:
    """The place of the brace that closes the one before `start`."""
    depth = 1
    for match in _BRACE.finditer(text, start):
        depth += {"{": 1, "}": -1}.get(match.group(), 0)
        if depth == 0:
            return match.start()
    return None


def final_answer(response: str) -> str | None:
    r"""The last complete \boxed{...} of a response, else what follows the last "Answer:", else None."""
    answer = boxed(response)
    if answer is None:
        answer = extract_answer(response)
    # bold or in code, with the sentence's full stop inside or outside
    return (answer or "").strip("*` ").rstrip(".").strip("*` ") or None


def gold_answer(entry: dict[str, Any]) -> str:
    r"""The gold answer of a row: what its last \boxed{...} holds (a whole solution), what follows "####" (GSM8K), or
    all of it; canonical. ValueError where nothing is left: no response can be right then."""
    text = str(entry["answer"])
    inner = boxed(text)
    if inner is None:
        inner = text.rpartition("####")[2]
    gold = canonical(inner)
    if not gold:
        raise ValueError(f"entry['answer'] holds no answer: {text!r}")
    return gold


def canonical(answer: str) -> str:
    r"""An answer without what does not change it: spaces, the dollars or brackets around it, a full stop at its end,
    \left and \right, thin spaces, \dfrac, and the commas of 12,345. Votes are counted on this form."""
    text = answer.strip().rstrip(".").strip()
    if (match := _WRAPPED.fullmatch(text)) and "$" not in (inner := next(g for g in match.groups() if g is not None)):
        text = inner.strip().rstrip(".")
    text = _SPACING.sub("", text).replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac")
    text = " ".join(text.split())
    return text.replace(",", "") if _THOUSANDS.fullmatch(text) else text


def text(response: str, entry: dict[str, Any]) -> tuple[float, str | None]:
    """Scoring function: the same text as the gold answer, both in canonical form, letter case aside."""
    answer = final_answer(response)
    if answer is None:
        return 0.0, None
    answer = canonical(answer)
    return float(answer.casefold() == gold_answer(entry).casefold()), answer


def choice(response: str, entry: dict[str, Any]) -> tuple[float, str | None]:
    r"""Scoring function: the letter the answer consists of or begins with ("B", "(b)", "\text{B}", "B. Paris")."""
    match = _LETTER.match(canonical(final_answer(response) or ""))
    if match is None:
        return 0.0, None
    letter = match.group(1).upper()
    return float(letter == gold_answer(entry).upper()), letter
