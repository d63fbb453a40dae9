"""Rows of a data set, from wherever `data.path` points, in one shape: prompt, answer, task, and all other columns.

    *.jsonl                        read here, a row a line
    *.parquet, *.json, *.csv, *.arrow, a folder, a hub name      through Hugging Face `datasets` (extra "data")

Columns are found by the conventions of the field, by what the first row has, or named by `data.prompt_column` and
`data.answer_column` ("a.b" looks inside):
    ours, TRL     prompt (text or chat messages); answer or solution; task, metadata
    verl          prompt (messages), reward_model.ground_truth, data_source
    benchmarks    problem or question; answer, solution or ground_truth
    reasoning-gym question, answer, metadata.source_dataset as the task
Multiple choice: `data.choices_column` holds the options (a list, or ARC's {"text", "label"}), or the answer is one and
`data.distractor_columns` hold the others (GPQA). The options follow the question, and the answer becomes a letter.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from random import Random
from string import ascii_uppercase
from typing import Any

from scope_fast.config import Data

PROMPT_COLUMNS = ("prompt", "problem", "question")
ANSWER_COLUMNS = ("answer", "reward_model.ground_truth", "solution", "ground_truth")
BUILDERS = {".parquet": "parquet", ".json": "json", ".csv": "csv", ".arrow": "arrow"}

Row = dict[str, Any]
Numbered = Iterator[tuple[int, str, Any]]  # (number, where it is, in words, the raw row)


def read_rows(data: Data) -> tuple[list[Row], int]:
    """The rows of `data.path` and how many were duplicates: of a prompt before them, dropped where `data.dedup`.

    A row is {"id", "task", "prompt", "entry"}: entry holds all its columns, "answer" as text and "metadata" as a dict.
    Raises ValueError naming file and row (a line from 1 on, path:3, or an index from 0 on, path[2]) for one without a
    prompt, an answer or a named option; ValueError or FileNotFoundError naming a file that cannot be read; ImportError
    where `datasets` is needed and missing; what `datasets` raises, as it is.
    """
    name, raws = open_rows(data)
    columns: tuple[str, str] | None = None
    rows, seen, duplicates = [], set[str](), 0
    for number, where, raw in raws:
        columns = columns or (_column(raw, data, "prompt"), _column(raw, data, "answer"))
        row = {"id": f"{name}/{number}", **_row(raw, where, number, columns, data, name)}
        key = json.dumps(row["prompt"])
        duplicates += key in seen
        if key not in seen or not data.dedup:
            rows.append(row)
        seen.add(key)
    return rows, duplicates


def open_rows(data: Data) -> tuple[str, Numbered]:
    """(the data set's name: the first half of the ids, and the task of rows that name none; the raw rows)."""
    path = Path(data.path)
    if path.suffix in (".jsonl", *BUILDERS) and not path.is_file():
        raise FileNotFoundError(f"data.path: there is no file {path}")
    if path.suffix == ".jsonl":
        return path.stem, _json_lines(path)
    table, name = _load(data, path), path.stem if path.is_file() else path.name
    return name, ((i, f"{path}[{i}]", raw) for i, raw in enumerate(table))


def _json_lines(path: Path) -> Numbered:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines would cut at U+2028 inside a string
    except UnicodeDecodeError as error:
        raise ValueError(f"data.path: {path} is not UTF-8: {error}") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield number, f"{path}:{number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"data.path: {path}:{number} is not JSON: {error}") from None


def _load(data: Data, path: Path) -> Any:
    """A `datasets.Dataset`: of a file, of a folder that `save_to_disk` wrote, of a folder of files, or of the hub."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        if error.name != "datasets":
            raise
        raise ImportError(
            f"data.path: {path} needs the datasets package: pip install 'scope-fast[data]' (JSONL needs nothing)"
        ) from error
    if path.is_file():
        if path.suffix not in BUILDERS:
            raise ValueError(f"data.path: {path} is none of .jsonl, {', '.join(BUILDERS)}")
        return datasets.load_dataset(BUILDERS[path.suffix], data_files=str(path), split="train")
    if (path / "dataset_dict.json").is_file():
        return datasets.load_from_disk(str(path / data.split))
    if (path / "dataset_info.json").is_file() and (path / "state.json").is_file():
        return datasets.load_from_disk(str(path))
    try:
        return datasets.load_dataset(data.path, data.subset, split=data.split)
    except datasets.exceptions.DatasetsError as error:  # files of several shapes in a folder, say
        raise ValueError(f"data.path: {path} cannot be read as one data set: {error}") from error


def _column(raw: Any, data: Data, kind: str) -> str:
    """The name of the prompt or answer column: the configured one, or the first known one that the row has."""
    named = {"prompt": data.prompt_column, "answer": data.answer_column}[kind]
    known = {"prompt": PROMPT_COLUMNS, "answer": ANSWER_COLUMNS}[kind]
    return named or next((name for name in known if _has(raw, name)), kind)


def _has(raw: Any, dotted: str) -> bool:
    return isinstance(raw, dict) and (dotted in raw or _get(raw, dotted) is not None)


def _get(raw: Any, dotted: str) -> Any:
    """The value of a column, None where there is none; a column's own name may hold a dot."""
    if isinstance(raw, dict) and dotted in raw:
        return raw[dotted]
    for name in dotted.split("."):
        raw = raw.get(name) if isinstance(raw, dict) else None
    return raw


def _empty(value: Any) -> bool:
    if isinstance(value, str):
        return not value.strip()
    if isinstance(value, float):
        return math.isnan(value)  # a gap in a CSV
    return value is None or (isinstance(value, (list, dict)) and not value)


def _row(raw: Any, where: str, number: int, columns: tuple[str, str], data: Data, task: str) -> Row:
    """One row in our shape, but for its id."""
    for column in columns:
        if _empty(_get(raw, column)):
            raise ValueError(f"data.path: {where} has no {column!r}{_hint(raw, column, columns)}")
    prompt, answer = (_get(raw, column) for column in columns)
    if not is_prompt(prompt):
        raise ValueError(f"data.path: {where}: {columns[0]!r} is neither text nor a list of chat messages")
    if data.choices_column or data.distractor_columns:
        prompt, answer = _multiple_choice(raw, where, number, (prompt, answer), data)
    own = _metadata(raw.get("metadata"))
    # a row that reasoning-gym wrote names its generator there
    task = str(raw.get("task") or raw.get("data_source") or own.get("source_dataset") or task)
    entry = {**raw, "answer": _text(answer, where, columns[1]), "metadata": {**own, "source_dataset": task}}
    return {"task": task, "prompt": prompt, "entry": entry}


def _metadata(value: Any) -> dict[str, Any]:
    """The row's metadata as a table: of tables of several shapes parquet and hub data sets hold the JSON. Anything else
    stays there as "value"."""
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except json.JSONDecodeError:
            parsed = None
        value = parsed if isinstance(parsed, dict) else value
    if isinstance(value, dict):
        return value
    return {} if _empty(value) else {"value": value}


def _hint(raw: Any, column: str, columns: tuple[str, str]) -> str:
    """What to do about a column that no convention finds: only said of rows that have something under other names."""
    missing = isinstance(raw, dict) and column not in raw and column.partition(".")[0] not in raw
    others = [name for name in raw if name not in columns] if missing else []
    option = "data.prompt_column" if column == columns[0] else "data.answer_column"
    return f" (it has {', '.join(map(str, others))}; name the column by {option})" if others else ""


def is_prompt(prompt: object) -> bool:
    """Text, or a list of chat messages."""
    if isinstance(prompt, list):
        return all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in prompt)
    return isinstance(prompt, str)


def _text(answer: Any, where: str, column: str) -> str:
    """An answer as text; several of them (OlympiadBench) with commas between."""
    if isinstance(answer, list) and all(isinstance(part, (str, int, float)) for part in answer):
        return ", ".join(map(str, answer))
    if isinstance(answer, (list, dict)):
        raise ValueError(f"data.path: {where}: {column!r} is a {type(answer).__name__}, expected text or a number")
    return str(answer)


def _multiple_choice(raw: Row, where: str, number: int, pair: tuple[Any, Any], data: Data) -> tuple[str, str]:
    """(question with lettered options, the letter of the right one)."""
    question, answer = pair
    if not isinstance(question, str):
        raise ValueError(f"data.path: {where}: options can follow a text, not chat messages")
    if data.distractor_columns:
        options = [str(answer), *_distractors(raw, where, data)]
        order = list(range(len(options)))
        Random(number).shuffle(order)  # the right one must not always come first; the same order in every run
        options, right = [options[i] for i in order], order.index(0)
    else:
        options, right = _choices(raw, where, answer, data)
    if right is None or not 0 <= right < len(options) <= len(ascii_uppercase):
        raise ValueError(f"data.path: {where}: {answer!r} is none of the {len(options)} options")
    lines = [f"{letter}. {option}" for letter, option in zip(ascii_uppercase, options, strict=False)]
    return "\n".join([question, "", *lines]), ascii_uppercase[right]


def _distractors(raw: Row, where: str, data: Data) -> list[str]:
    for name in data.distractor_columns:
        if _empty(_get(raw, name)):
            raise ValueError(f"data.distractor_columns: {where} has no {name!r}")
    return [str(_get(raw, name)) for name in data.distractor_columns]


def _choices(raw: Row, where: str, answer: Any, data: Data) -> tuple[list[str], int | None]:
    """The options and the place of the answer: given by its label, its index (an int), its letter or its text."""
    choices = _get(raw, data.choices_column)
    if _empty(choices):
        raise ValueError(f"data.choices_column: {where} has no {data.choices_column!r}")
    labels = choices.get("label") if isinstance(choices, dict) else None
    options = choices.get("text") if isinstance(choices, dict) else choices
    if not isinstance(options, list) or None in options:
        raise ValueError(
            f"data.choices_column: {where}: {data.choices_column!r} is {choices!r}, expected a list of options, or one "
            'under "text"'
        )
    options, text = [str(option) for option in options], str(answer)
    if labels and text in labels:
        return options, labels.index(text)
    if isinstance(answer, int):
        return options, answer
    if len(text) == 1 and text in ascii_uppercase:
        return options, ascii_uppercase.index(text)
    return options, options.index(text) if text in options else None
