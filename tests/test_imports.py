"""Imports run one way, heavy dependencies are met late, and the package's door stays light.

LEVELS is the rule: a module imports from lower levels, or from its own package, and from nothing beside it. A new
module must be given its place here.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "scope_fast"

LEVELS = [
    "kernels batch native verifier distributed diversity progress tasks estimators files loading model_checks jsonl "
    "seeds",
    "config ops answers checkpoint sharding health interrupt flops attention convert_gguf environment",
    "losses scope rollout metrics math_answers sources config_files",
    "__init__ learner teacher data records report scorecard plan suite",
    "prm sampler",
    "trainer replay warm_start integrations teacher_endpoint build_checks",
    "build resume",
    "train evaluate_request",
    "evaluate",
]
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names.split()}

VLLM_HOMES = {f"rollout.{name}" for name in ("vllm_process", "vllm_engine", "vllm_server", "transfer", "weight_sync")}
VLLM_HOMES |= {"prm.vllm_pooling"}
# A verifier worker imports these: a second of torch in each of them would be paid at every restart.
WITHOUT_TORCH = {"verifier", "tasks", "answers", "math_answers"}
HEAVY = ("vllm", "reasoning_gym", "pydantic", "tensorboard", "rich", "wandb", "trl", "verl")


def modules():
    """Dotted name inside the package -> file; ops/__init__.py is "ops"."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")) + sorted((ROOT / "kernels").glob("*.py")):
        inside = path.relative_to(PACKAGE if path.is_relative_to(PACKAGE) else ROOT)
        parts = inside.with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


class Imports(ast.NodeVisitor):
    """All imports of a module as (full dotted name, whether at the top level), relative ones resolved."""

    def __init__(self, name, source):
        self.name, self.found, self.depth = name, [], 0
        self.visit(ast.parse(source))

    def visit_FunctionDef(self, node):
        self.depth += 1
        self.generic_visit(node)
        self.depth -= 1

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Import(self, node):
        self.found += [(alias.name, self.depth == 0) for alias in node.names]

    def visit_ImportFrom(self, node):
        base = node.module or ""
        if node.level:
            package = ["scope_fast", *self.name.split(".")[: -node.level]]
            base = ".".join(package + ([base] if base else []))
        self.found += [(f"{base}.{alias.name}", self.depth == 0) for alias in node.names]


def place(imported):
    """The unit of the package that a dotted name of ours belongs to; the package itself is "__init__"."""
    parts = imported.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in LEVEL_OF else "__init__"


def violations(name, source):
    """What a module imports against the rules, in words."""
    unit, problems = name.split(".")[0], []
    if unit not in LEVEL_OF:
        return [f"{name} has no place in LEVELS"]
    for imported, at_top in Imports(name, source).found:
        outer = imported.split(".")[0]
        if outer == "scope_fast":
            target = place(imported)
            if target != unit and LEVEL_OF[target] >= LEVEL_OF[unit]:
                problems.append(f"{name} imports {imported}: {target} is not below {unit}")
        elif unit == "kernels" and outer not in {"torch", "triton", *sys.stdlib_module_names}:
            problems.append(f"{name} imports {imported}: kernels need torch and triton alone")
        if outer == "vllm" and (name not in VLLM_HOMES or at_top):
            problems.append(f"{name} imports {imported}: only {sorted(VLLM_HOMES)} may, inside functions")
        if outer in {"torch", "transformers"} and name in WITHOUT_TORCH and at_top:
            problems.append(f"{name} imports {imported}: verifier workers load this module")
    return problems


def test_every_module_keeps_the_directions():
    files = modules()
    assert {"ops.linear_scope_loss", "scope.advantage", "kernels.scope_loss", "__init__", "rollout"} <= set(files)
    assert [p for name, path in files.items() for p in violations(name, path.read_text())] == []


@pytest.mark.parametrize(
    ("name", "source", "problem"),
    [
        ("batch", "from scope_fast.ops import checks", "ops.checks: ops is not below batch"),
        ("config", "import scope_fast", "imports scope_fast: __init__ is not below config"),
        ("scope.steps", "def f():\n import scope_fast.rollout.base", "rollout.base: rollout is not below scope"),
        ("kernels.x", "from ..batch import Segment", "scope_fast.batch.Segment: batch is not below kernels"),
        ("kernels.x", "import numpy", "numpy: kernels need torch and triton alone"),
        ("rollout.vllm_engine", "import vllm", "may, inside functions"),
        ("trainer", "def f():\n from vllm import LLM", "may, inside functions"),
        ("tasks", "import torch", "tasks imports torch: verifier workers load this module"),
        ("novelty", "", "novelty has no place in LEVELS"),
    ],
)
def test_the_rules_find_what_they_forbid(name, source, problem):
    (found,) = violations(name, source)
    assert found.endswith(problem)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("ops.x", "from scope_fast.kernels.x import f\nfrom . import checks"),
        ("rollout.vllm_engine", "def f():\n import vllm"),
        ("kernels.x", "import torch, math\nimport triton.language as tl\nfrom .rows import f"),
        ("train", "from scope_fast import checkpoint, linear_logprob"),
    ],
)
def test_the_rules_let_the_rest_pass(name, source):
    assert violations(name, source) == []


def test_importing_the_package_stays_light():
    program = f"import sys, scope_fast; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
