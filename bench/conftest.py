"""`pytest bench/`: the files bench_*.py under pytest-benchmark, one test per problem and variant of the CLI's own."""

import dataclasses

import pytest
import torch

from bench import harness, timing

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_problem = {}  # the last problem built: variants of one problem follow each other


def pytest_collect_file(file_path, parent):
    if file_path.name.startswith("bench_") and file_path.suffix == ".py":
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_generate_tests(metafunc):
    if "prepared" not in metafunc.fixturenames:
        return
    specs = [s for s in metafunc.module.specs(DEVICE, None, None, peers=True) if "time" in s.measures]
    cases = [(spec, variant) for spec in specs for variant in metafunc.module.variants(spec)]
    ids = [f"{spec.case}-{spec.dtype}-{variant.name}" for spec, variant in cases]
    metafunc.parametrize("prepared", cases, ids=ids, indirect=True)


@pytest.fixture
def prepared(request, benchmark):
    """The call to time, checked against the float64 truth; its errors are in the benchmark's extra_info."""
    spec, variant = request.param
    if variant.missing:
        pytest.skip(variant.missing)
    if _problem.get("spec") != spec:
        _problem.clear()
        _problem.update(spec=spec, problem=request.module.make_problem(spec))
    run, errors = harness.try_once(variant, _problem["problem"], spec.device)
    assert harness.agrees(errors, variant.limits), f"{variant.name} computes something else: {errors}"
    benchmark.group = spec.label
    benchmark.extra_info |= {"errors": errors, "work": variant.work} | dataclasses.asdict(spec)

    def call():
        run()
        timing.synchronize(spec.device)

    return call
