r"""The scoring function for mathematical answers, `scope_fast.math_answers:score`: equal by math-verify (sympy).

A module of its own, so that a missing math-verify shows when the verifier starts and not at every response, and so that
the seconds sympy takes to import do not count against the first one.

math-verify's own time limits are off: they use SIGALRM, which works in the main thread only, cannot interrupt a long
operation in C, and turns a time-out into a silent "wrong". The verifier kills the worker at its deadline for a response
instead, and counts it. A caller outside the verifier needs a deadline of its own: comparing 9^{9^{9^9}} never ends.
"""

from __future__ import annotations

import logging
from functools import lru_cache
from typing import Any

from scope_fast.answers import canonical, final_answer, gold_answer

try:
    from math_verify import parse, verify
except ModuleNotFoundError as error:
    raise ImportError(f"{error}: mathematical answers need it: pip install 'scope-fast[eval]'") from error

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of the time limits that are off on purpose


def score(response: str, entry: dict[str, Any]) -> tuple[float, str | None]:
    r"""1.0 where the response's \boxed{} or "Answer:" equals entry["answer"] as mathematics, else 0.0; and the answer.

    LaTeX that cannot be read, or compared, is a wrong answer, whatever math-verify makes of it. A gold answer that is
    empty raises ValueError: no silent zero.
    """
    gold, found = gold_answer(entry), final_answer(response)
    if found is None:
        return 0.0, None
    tries = [canonical(found)]
    if "," in gold:  # of several answers: the comma of 100,200 is then between two
        tries.append(canonical(found.replace(",", ", ")))
    equal = (t for t in tries if t == gold or verify(_read(gold), _read(t), timeout_seconds=None))
    passed = next(equal, None)
    return float(passed is not None), passed or tries[0]


@lru_cache(maxsize=256)  # the responses of a group share their gold answer
def _read(answer: str) -> list:
    return parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
