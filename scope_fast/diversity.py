"""How different the rollouts of one prompt are: distinct-n, unique answers, self-BLEU, self-ROUGE. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from itertools import combinations, islice
from statistics import fmean

INSTALL = "pip install 'scope-fast[eval]'"


def distinct_n(sequences: Sequence[Sequence[Hashable]], n: int) -> float | None:
    """Distinct n-grams over all n-grams of `sequences` together (Li et al. 2016, arXiv 1510.03055), in (0, 1].

    sequences: token ids (or strings) of the rollouts of one prompt. n-grams do not cross sequences.
    None where no sequence is n tokens long: the share is undefined. Raises ValueError for n < 1.
    """
    if n < 1:
        raise ValueError(f"n={n}: expected an n-gram length of at least 1")
    seen: set[tuple[Hashable, ...]] = set()
    total = 0
    for sequence in sequences:
        count = len(sequence) - n + 1
        if count > 0:
            total += count
            seen.update(zip(*(sequence[i : i + count] for i in range(n)), strict=True))
    return len(seen) / total if total else None


def unique_answers(answers: Sequence[str | None]) -> int:
    """How many different final answers there are, ignoring surrounding spaces; None (no answer found) is not one."""
    return len({answer.strip() for answer in answers if answer is not None})


def diversity_values(
    groups: Sequence[Sequence[Sequence[Hashable]]], answers: Sequence[Sequence[str | None]]
) -> dict[str, list[float]]:
    """diversity/{distinct_1,distinct_4,unique_answers} of every prompt (metrics.fold makes one value of them).

    groups[i], answers[i]: the token sequences and the final answers of prompt i's rollouts. distinct-n is taken within
    each prompt; prompts where it is undefined are left out. Raises ValueError where groups and answers count different
    prompts.
    """
    if len(groups) != len(answers):
        raise ValueError(f"groups has {len(groups)} prompts, answers has {len(answers)}")
    result: dict[str, list[float]] = {}
    for n in (1, 4):
        shares = (distinct_n(group, n) for group in groups)
        result[f"diversity/distinct_{n}"] = [share for share in shares if share is not None]
    result["diversity/unique_answers"] = [float(unique_answers(given)) for given in answers]
    return result


def self_bleu(texts: Sequence[str]) -> float | None:
    """Mean BLEU-4 of each text with the others as its references (Zhu et al. 2018, arXiv 1802.01886), in [0, 1]: 1 for
    equal texts. It grows with the number of texts, so compare equal numbers. None for fewer than two.

    sacrebleu's sentence BLEU over 100: 13a tokens, exponential smoothing, effective order. ImportError without it.
    """
    try:
        from sacrebleu.metrics import BLEU
    except ModuleNotFoundError as error:
        raise ImportError(f"self-BLEU needs sacrebleu: {INSTALL}") from error
    if len(texts) < 2:
        return None
    bleu = BLEU(effective_order=True)
    others = [[*texts[:i], *texts[i + 1 :]] for i in range(len(texts))]
    return fmean(
        1.0 if text in rest else bleu.sentence_score(text, rest).score / 100.0
        for text, rest in zip(texts, others, strict=True)
    )


def self_rouge(texts: Sequence[str], max_words: int = 256) -> float | None:
    """Mean ROUGE-L F1 over all pairs of texts, in [0, 1]: 1 for equal texts. None for fewer than two.

    Only the first `max_words` words of a text are compared: the longest common subsequence costs their product, in
    Python (rouge-score; words of letters and digits of any script in lower case, each Chinese character and kana
    one, no stemming). ImportError without it.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ModuleNotFoundError as error:
        raise ImportError(f"self-ROUGE needs rouge-score: {INSTALL}") from error
    if len(texts) < 2:
        return None
    scorer = RougeScorer(["rougeL"], tokenizer=_Words(max_words))
    return fmean(1.0 if a == b else scorer.score(a, b)["rougeL"].fmeasure for a, b in combinations(texts, 2))


class _Words:
    """The first words of a text. rouge-score's own tokenizer keeps [a-z0-9] alone, to which two texts in another script
    are two empty ones."""

    CJK = "\u3040-\u30ff\u3400-\u9fff"  # scripts without spaces: each character is a word

    def __init__(self, most: int) -> None:
        self._most, self._word = most, re.compile(f"[{self.CJK}]|[^\\W_{self.CJK}]+")

    def tokenize(self, text: str) -> list[str]:
        return [match[0] for match in islice(self._word.finditer(text.lower()), self._most)]
