"""The README is true: its example runs as it stands, and every file and command it names exists."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_training_loop_runs_as_printed():
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    (example,) = [block for block in blocks if block.startswith("import torch")]
    assert example.count("\n") <= 40
    result = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    first, second, third = (ast.literal_eval(line[2:]) for line in result.stdout.splitlines())
    # ratio 1 at the first update: the policy loss is exactly minus the mean advantage, and 16 rows are on policy
    assert first["loss/rl"] == -0.5 and first["policy/rows"] == 16.0 and first["policy/ratio_max"] == 1.0
    assert second["policy/ratio_max"] > 1.0 and second["loss/rl"] < -0.5  # what has an advantage became likelier
    assert first["loss/nll"] > second["loss/nll"] > third["loss/nll"]


def test_own_data_and_verifier_run_as_printed(tmp_path):
    (block,) = (text for text in re.findall(r"```bash\n(.*?)```", README, re.S) if "my_verifier.py" in text)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-ec", block], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    records = [json.loads(line) for line in (tmp_path / "runs/mine/rollouts.jsonl").read_text().splitlines()]
    assert len(records) == 2 * 2 * 8 and {record["reward"] for record in records} <= {0.0, 1.0}
    assert (tmp_path / "runs/mine/report.html").exists()


def test_every_file_of_the_tour_exists():
    tour = README.split("## Tour")[1]
    rows = re.findall(r"^\| (`[^|]+) \|", tour, re.M)
    assert len(rows) > 10
    for row in rows:
        for name in re.findall(r"`([^`]+)`", row):
            assert (ROOT / name).exists(), name


def test_every_module_it_runs_exists():
    for module in set(re.findall(r"python -m ([a-z_.]+)", README)):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
