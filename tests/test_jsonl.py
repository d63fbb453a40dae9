"""Files of JSON lines in step order: every short file, cut and searched at every step."""

from __future__ import annotations

import json
from itertools import combinations_with_replacement

import pytest

from scope_fast.jsonl import cut_back, end_of_step, read_jsonl, read_step


def test_cut_back_keeps_whole_lines_only(tmp_path):
    path = tmp_path / "log.jsonl"
    cut_back(path, 3)  # nothing there, nothing made
    assert not path.exists()
    path.write_text('{"step": 0}\n{"step": 3, "name": "é"}\n{"step": 3')
    cut_back(path, 3)
    assert path.read_text() == '{"step": 0}\n{"step": 3, "name": "é"}\n'
    cut_back(path, 2)
    assert path.read_text() == '{"step": 0}\n'


def test_a_step_is_found_by_bisection(tmp_path):
    """Each file of up to five lines of steps 1, 2 and 4, of lengths that differ, whole or torn, as a reader sees it."""
    path = tmp_path / "log.jsonl"
    for count in range(6):
        for steps in combinations_with_replacement((1, 2, 4), count):
            rows = [{"step": step, "pad": "é" * (7 * i % 5)} for i, step in enumerate(steps)]
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            for torn in ("", '{"step": 1', '{"step": 9}'):
                path.write_text(text + torn)
                for step in range(6):
                    kept = "".join(line for line in text.splitlines(True) if json.loads(line)["step"] <= step)
                    assert end_of_step(path, step) == len(kept.encode())
                    assert list(read_step(path, step)) == [row for row in rows if row["step"] == step]


def test_bisection_names_file_and_byte(tmp_path):
    path = tmp_path / "log.jsonl"
    for damage in (b"nonsense", b"\xff"):
        path.write_bytes(b'{"step": 1}\n' + damage + b"\n")
        with pytest.raises(ValueError, match=r"log\.jsonl, byte 12: not JSON"):
            end_of_step(path, 1)


@pytest.mark.parametrize("line", ["nonsense", "[1]", '{"name": 1}', '{"step": "1"}'])
def test_read_jsonl_names_file_and_line(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + '\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2"):
        list(read_jsonl(path))
