"""Files of JSON lines in step order, {"step": 3, ...} a line: read, found by step, and cut back where a run goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read_jsonl(path: str | Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """(byte offset, byte length, object) of each line.

    A last line without its newline is one being written, or torn by a kill: it is left out. Raises ValueError naming
    file and line for any other line that is not a JSON object with a "step".
    """
    offset = 0
    with Path(path).open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                return
            yield offset, len(line), _parsed(line, f"{path}:{number}")
            offset += len(line)


def merged_steps(path: str | Path) -> dict[int, dict[str, Any]]:
    """step -> its lines' keys together; a later line of a step has the last word."""
    steps: dict[int, dict[str, Any]] = {}
    for _, _, record in read_jsonl(path):
        steps.setdefault(record["step"], {}).update(record)
    return steps


def read_step(path: str | Path, step: int) -> Iterator[dict[str, Any]]:
    """The objects of one step's lines, of a file in step order, found by bisection; nothing where it has none."""
    begin, end = end_of_step(path, step - 1), end_of_step(path, step)
    with Path(path).open("rb") as file:
        file.seek(begin)
        while (offset := file.tell()) < end:
            yield _parsed(file.readline(), f"{path}, byte {offset}")


def end_of_step(path: str | Path, step: int) -> int:
    """Where the whole lines up to `step` end, in bytes: by bisection, as a long run's rollouts.jsonl has gigabytes.

    Lines are in step order, as the writers here keep them. Raises ValueError as `read_jsonl`, for the lines it meets.
    """
    with Path(path).open("rb") as file:
        low, high = 0, file.seek(0, os.SEEK_END)  # lines that begin before low are kept, from high on they are not
        while low < high:
            middle = (low + high) // 2
            file.seek(max(middle - 1, 0))
            if middle:
                file.readline()  # to the first line that begins at middle or later
            begin = file.tell()
            line = file.readline() if begin < high else b""
            if line.endswith(b"\n") and _parsed(line, f"{path}, byte {begin}")["step"] <= step:
                low = file.tell()
            else:
                high = middle
    return low


def _parsed(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:  # not JSON, or no UTF-8
        raise ValueError(f"{where}: not JSON ({error})") from None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise ValueError(f"{where}: expected an object with an integer step")
    return record


def cut_back(path: str | Path, step: int) -> None:
    """Truncates a JSON-lines file, in place, before its first line of a step after `step`; a missing file stays so.

    Lines are in step order, as the writers here keep them. A torn last line goes too.
    """
    path = Path(path)
    if path.exists():
        os.truncate(path, end_of_step(path, step))
