"""Embedded tasks: reasoning-gym generators with worked solutions, one step a line.

reasoning-gym owns the questions and the scoring (`score_answer`). What it does not have, and step-wise correction
needs, is the working: each `Task` here writes it line by line, continues it from any given line, and so can also check
it. The last line carries the answer ("12 + 7 = 19. Answer: 19"). A line can be written in several styles, all of them
right; the first is the one the embedded student was taught. Verifier workers load this module: no torch here.

Every other generator of reasoning-gym can be asked from and scored too, at its own defaults; it has no working, so
nothing here solves it, checks its steps or teaches it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Any

import reasoning_gym  # here, not in the functions: a worker's first item must not pay for the import
from reasoning_gym.arithmetic.leg_counting import ANIMALS
from reasoning_gym.factory import DATASETS as GENERATORS

Entry = dict[str, Any]
Step = Callable[[int | None], tuple[tuple[str, ...], int]]
STYLES = ("plain", "swapped", "worded")

GENERATED = 100_000  # entries of a generator without working, which then repeat: some make all of them beforehand

_ANSWER = re.compile(r"Answer\*{0,2}:(?:\*\*)?[ \t]*(\S[^\n]*)")
_LAST_INTEGER = re.compile(r"= (-?\d+)(?:\. Answer: \S+)?$")


@dataclass(frozen=True)
class Task:
    """A reasoning-gym generator and how its solutions are worked.

    params: arguments of the generator, the sizes the quickstart uses.
    operations(entry): the steps as functions running value -> (the line's left side in each of STYLES, new value), in
        order; the first step gets None.
    generator: reasoning-gym's name; None: the task's own.
    """

    name: str
    params: dict[str, Any]
    operations: Callable[[Entry], list[Step]]
    generator: str | None = None

    def solve(
        self, entry: Entry, slip: Callable[[int], int] = lambda value: value, style: str = STYLES[0]
    ) -> list[str]:
        """The worked solution. `slip` may change a step's result; the later steps go on from the changed value."""
        return self._work(entry, 0, None, slip, style)

    def resume(self, entry: Entry, lines: Sequence[str], style: str = STYLES[0]) -> list[str]:
        """The lines that follow `lines`, going on from the value the last of them arrived at.

        Raises ValueError when there is nothing to go on from: no value in the last line, or no step left.
        """
        if not lines:
            return self.solve(entry, style=style)
        match = _LAST_INTEGER.search(lines[-1])
        if match is None:
            raise ValueError(f"no value to go on from in {lines[-1]!r}")
        if len(lines) >= len(self._operations(entry)):
            raise ValueError(f"no step left after {len(lines)} lines")
        return self._work(entry, len(lines), int(match.group(1)), lambda value: value, style)

    def style_of(self, entry: Entry, lines: Sequence[str]) -> str | None:
        """The style of the last of `lines`, given the value the line before arrived at; None where it has none."""
        before = _LAST_INTEGER.search(lines[-2]) if len(lines) > 1 else None
        operations = self._operations(entry)
        if not lines or len(lines) > len(operations) or (len(lines) > 1 and before is None):
            return None
        sides, _ = operations[len(lines) - 1](None if before is None else int(before.group(1)))
        left = lines[-1].rpartition(" = ")[0]
        return next((style for style, side in zip(STYLES, sides, strict=True) if side == left), None)

    def check(self, entry: Entry, lines: Sequence[str]) -> list[bool]:
        """For each line: does it stand, letter by letter, at its place of the worked solution, in one of the styles?"""
        gold = list(zip(*(self.solve(entry, style=style) for style in STYLES), strict=True))
        return [i < len(gold) and line in gold[i] for i, line in enumerate(lines)]

    def _operations(self, entry: Entry) -> list[Step]:
        """ValueError for an entry that has not what the working is made of, as a row that only bears the name."""
        try:
            return self.operations(entry)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"task {self.name!r}: the entry has no working ({error!r})") from error

    def _work(self, entry: Entry, start: int, value: int | None, slip: Callable[[int], int], style: str) -> list[str]:
        operations, lines = self._operations(entry), []
        for i in range(start, len(operations)):
            sides, result = operations[i](value)
            value = slip(result)
            end = f". Answer: {value}" if i == len(operations) - 1 else ""
            lines.append(f"{sides[STYLES.index(style)]} = {value}{end}")
        return lines


def _chain_sum(entry: Entry) -> list[Step]:
    """`a + b - c` left to right: one line for each operator."""
    first, *rest = entry["metadata"]["expression"].replace("+ ", "+").replace("- ", "-").split()

    def step(term: str, start: int | None) -> Step:
        sign, size = term[0], term[1:]

        def work(value: int | None) -> tuple[tuple[str, ...], int]:
            left = start if value is None else value
            swapped = f"{size if sign == '+' else term} + {left}"
            worded = f"add {size} to {left}" if sign == "+" else f"take {size} from {left}"
            return (f"{left} {sign} {size}", swapped, worded), left + int(term)

        return work

    return [step(term, int(first) if i == 0 else None) for i, term in enumerate(rest)]


def _leg_counting(entry: Entry) -> list[Step]:
    """One line for each animal: its legs, added to the running total."""

    def step(animal: str, count: int) -> Step:
        def work(value: int | None) -> tuple[tuple[str, ...], int]:
            each, total = ANIMALS[animal], value or 0
            legs = count * each
            plain = f"{count} {animal} * {each} = {legs}, {total} + {legs}"
            swapped = f"{each} * {count} {animal} = {legs}, {legs} + {total}"
            worded = f"{count} {animal} have {legs} legs, add {legs} to {total}"
            return (plain, swapped, worded), total + legs

        return work

    return [step(animal, count) for animal, count in entry["metadata"]["animals"].items()]


_CHAIN = {"min_digits": 1, "max_digits": 2, "allow_negation": False}
_LEGS = {"min_instances": 1, "max_instances": 9}
_EMBEDDED = (
    Task("chain_sum", {"min_terms": 4, "max_terms": 6, **_CHAIN}, _chain_sum),
    Task("leg_counting", {"min_animals": 2, "max_animals": 4, **_LEGS}, _leg_counting),
    # their shorter and their longest problems apart: to train on these and be evaluated on those
    Task("chain_sum_short", {"min_terms": 4, "max_terms": 5, **_CHAIN}, _chain_sum, "chain_sum"),
    Task("chain_sum_long", {"min_terms": 6, "max_terms": 6, **_CHAIN}, _chain_sum, "chain_sum"),
    Task("leg_counting_short", {"min_animals": 2, "max_animals": 3, **_LEGS}, _leg_counting, "leg_counting"),
    Task("leg_counting_long", {"min_animals": 4, "max_animals": 4, **_LEGS}, _leg_counting, "leg_counting"),
)
TASKS = {task.name: task for task in _EMBEDDED}


def get_task(name: str) -> Task:
    """The embedded task of that name, which has working; ValueError with the known names otherwise."""
    if name not in TASKS:
        raise ValueError(f"task {name!r} is not embedded; known: {', '.join(sorted(TASKS))}")
    return TASKS[name]


def check_name(name: str) -> None:
    """ValueError unless `name` is an embedded task or a generator of reasoning-gym."""
    if name not in TASKS and name not in GENERATORS:
        near = difflib.get_close_matches(name, [*TASKS, *GENERATORS], 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(
            f"task {name!r} is not embedded, nor a generator of reasoning-gym{hint} (embedded: "
            f"{', '.join(sorted(TASKS))}; the generators: reasoning_gym.factory.DATASETS)"
        )


@lru_cache(maxsize=64)
def dataset(name: str, seed: int) -> Any:
    """reasoning-gym's data set of an embedded task or of a generator; each entry comes from seed + index.

    Embedded tasks have entries without end, generators have GENERATED. Raises ValueError for an unknown name, and for a
    generator that makes no entry with its defaults.
    """
    check_name(name)
    if name in TASKS:
        task = TASKS[name]
        return reasoning_gym.create_dataset(task.generator or name, seed=seed, size=2**31 - 1, **task.params)
    try:
        made = reasoning_gym.create_dataset(name, seed=seed, size=GENERATED)
        made[0]  # some refuse a seed only here
    except (AssertionError, ValueError) as error:  # how its generators check their settings
        raise ValueError(
            f"task {name!r}: reasoning-gym makes no {GENERATED} entries of it with seed {seed}: {error}"
        ) from error
    return made


@lru_cache(maxsize=64)
def _scorer(name: str) -> Any:
    """The data set whose `score_answer` judges; of a generator with one entry, so that no worker waits for more."""
    return dataset(name, 0) if name in TASKS else reasoning_gym.create_dataset(name, seed=0, size=1)


def slipping(rng: Random, rate: float) -> Callable[[int], int]:
    """A `slip` that gets a result wrong with probability `rate`, the way a careless student would."""
    return lambda value: value + rng.choice((-10, -2, -1, 1, 2, 10)) if rng.random() < rate else value


def extract_answer(response: str) -> str | None:
    """What follows the last "Answer:", bold or not, or None."""
    answer = _after_answer(response)
    if answer is None or not answer.endswith("**"):
        return answer
    return answer.removesuffix("**").removeprefix("**").strip() or None


def _after_answer(response: str) -> str | None:
    found = _ANSWER.findall(response)
    return found[-1].strip() if found else None


def score(response: str, entry: Entry) -> tuple[float, str | None]:
    """The verifier's scoring function: (reward, what follows the last "Answer:").

    1.0 where reasoning-gym gives the answer its full score, or where, for an entry that is not reasoning-gym's (rows of
    `data.path`), it is the row's answer letter by letter; else 0.0. Many generators ask for a grid: for those without
    working the rest of the response may be the answer too, not only the rest of the line.
    """
    answer = extract_answer(response)
    name = entry["metadata"]["source_dataset"]
    if name in GENERATORS and name not in TASKS and len(entry["metadata"]) > 1:  # a row's bare name is no such entry
        rest = response.rpartition("Answer:")[2].strip() if "Answer:" in response else ""
        tries = list(dict.fromkeys(text for text in (answer, rest) if text))
        passed = next((text for text in tries if _scorer(name).score_answer(text, entry) >= 1.0), None)
        return float(passed is not None), passed or answer or rest or None
    if answer is None:
        return 0.0, None
    if name not in TASKS:
        gold = str(entry["answer"]).strip()  # which may end in ** itself
        return (1.0, gold) if gold in (answer, _after_answer(response)) else (0.0, answer)
    return float(_scorer(name).score_answer(answer, entry) >= 1.0), answer
