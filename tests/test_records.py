"""The log of rollouts. Records are held against what the learner saw in test_replay.py, and drawn in test_report.py."""

from __future__ import annotations

import json
import math

import pytest

from scope_fast.records import RolloutLog, to_json


def test_rollout_log_writes_json_that_browsers_read(tmp_path):
    with RolloutLog(tmp_path) as log:
        log.append(to_json({"step": 1, "step_probs": [0.5, math.nan], "inner": {"logprobs": (-math.inf, -1.0)}}))
        with pytest.raises(ValueError, match=r"record\['step'\] is None"):
            to_json({"reward": 1.0})
        log.flush()
    assert [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()] == [
        {"step": 1, "step_probs": [0.5, None], "inner": {"logprobs": [None, -1.0]}}
    ]
