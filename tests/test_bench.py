"""The bench: its arithmetic by hand, its command through a subprocess, its peers against float64. Nothing is timed."""

import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import opcases
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # bench/ is not installed: a plain `pytest` would not find it

from bench import bench_linear_scope_loss, cli, gpu_suite, harness, memory, peers, quickstart, report, targets, timing  # noqa: E402
from bench.harness import Formula, Spec, Variant  # noqa: E402
from bench.problems import ERROR_LIMITS, HeadProblem  # noqa: E402

SHAPE = (48, 16, 101)
MIB = 1 << 20


def bench(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "bench", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """What the command writes for every stem at a tiny shape."""
    path = tmp_path_factory.mktemp("bench") / "record.json"
    shape = ",".join(map(str, SHAPE))
    done = bench("--shape", shape, "--dtype", "float32", "--repeats", "3", "--no-memory", "--device", "cpu",
                 "--json", str(path))  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text()), done.stdout


def timed_rows(case: dict) -> dict[str, dict]:
    return {row["name"]: row for row in case["variants"] if "samples_s" in row}


def test_record_names_its_machine(record):
    environment = record[0]["environment"]
    device = environment["device"]
    assert device["type"] == "cpu" and device["threads"] == torch.get_num_threads() and device["cores"] >= 1
    assert environment["versions"]["torch"] == torch.__version__
    assert {"date", "commit", "modified", "native_extension", "platform"} <= environment.keys()


def test_record_holds_every_stem_and_case(record):
    cases = [(case["stem"], case["case"]) for case in record[0]["cases"]]
    assert cases == [
        ("linear_scope_loss", "forward+backward"), ("linear_scope_loss", "variations"), ("linear_logprob", "forward"),
        ("linear_logprob", "forward+backward"), ("scope_loss", "forward+backward"), ("step_pool", "MLP head"),
        ("step_pool", "lm_head"), ("weight_bucket", "same dtype"), ("weight_bucket", "cast to bf16"),
        ("weight_sync", "one rank"), ("weight_sync", "two ranks"),
    ]  # fmt: skip


def test_a_learner_trains_the_same_with_every_head(tmp_path):
    path = tmp_path / "record.json"
    done = bench("learner_heads", "--peers", "--shape", "96,64,300", "--dtype", "float32", "--repeats", "3",
                 "--no-memory", "--device", "cpu", "--json", str(path))  # fmt: skip
    assert done.returncode == 0, done.stderr
    (case,) = json.loads(path.read_text())["cases"]
    rows = timed_rows(case)
    assert {"scope_fast head", "eager torch", "liger scaled CE"} <= rows.keys()
    assert not [row["name"] for row in case["variants"] if "failed" in row]
    for row in rows.values():
        assert row["errors"]["loss"] < 1e-6 and row["errors"]["grad_norm"] < 1e-5
        assert row["baseline"] == "scope_fast head"
        # 2 blocks of 4 projections (64 x 64) and 3 matrices (64 x 256), 96 tokens; 72 rows of the head; one sequence
        flops = 6 * (96 * 2 * (4 * 64 * 64 + 3 * 64 * 256) + 72 * 64 * 300) + 12 * 64 * 2 * 96 * 97 // 2
        assert row["model_tflops"] == pytest.approx(flops / row["median_s"] / 1e12)
        assert row["rate"] == pytest.approx(96 / row["median_s"])


def test_ratios_and_rates_follow_from_the_samples(record):
    for case in record[0]["cases"]:
        rows = timed_rows(case)
        assert len(rows) >= 2
        for row in rows.values():
            baseline = rows[row["baseline"]]
            assert baseline["role"] == "limit" and len(row["samples_s"]) == len(baseline["samples_s"]) == 3
            median = statistics.median(row["samples_s"])
            assert row["median_s"] == median > 0
            assert row["ratio"] == pytest.approx(median / statistics.median(baseline["samples_s"]))
            assert row["min_s"] == min(row["samples_s"]) and row["max_s"] == max(row["samples_s"])
        for name, row in rows.items():
            amount = row["rate"] * {"TFLOP/s": 1e12, "GB/s": 1e9}[row["rate_unit"]] * row["median_s"]
            if row["rate_unit"] == "TFLOP/s":
                assert amount == pytest.approx(multiple_of(case, name) * math.prod(case["shape"])), (case["case"], name)
            elif row["rate_formula"] == case["formula"]["text"]:
                assert amount == pytest.approx(case["formula"]["amount"])


def multiple_of(case: dict, name: str) -> int:
    """Of T*V*D: two for each product that a variant of a head computes."""
    if case["case"] in ("forward", "logprob error") or name == "one matmul":
        return 2
    if case["stem"] == "linear_logprob" and name.startswith("scope_fast"):
        return 8  # logits computed again in the backward
    return {"half": 3, "frozen head": 4}.get(name.split(", ")[1] if ", " in name else "", 6)


def test_work_of_the_head_is_six_matmul_halves(record):
    T, D, V = SHAPE
    formula = {"amount": 6 * T * V * D, "unit": "TFLOP/s", "text": "6*T*V*D", "model_flops": None}
    assert record[0]["cases"][0]["formula"] == formula


def test_every_backend_is_measured_or_says_why_not(record):
    for case in record[0]["cases"]:
        names = [row["name"] for row in case["variants"]]
        for backend in ("reference", "triton", "cpu", "cuda"):
            rows = [row for row in case["variants"] if row["name"].startswith(f"scope_fast {backend}")]
            if backend == "reference" and case["case"] == "variations" and not rows:
                continue  # left out there beside a faster backend
            assert rows, (backend, names)
            assert all("samples_s" in row or row.get("unavailable") for row in rows), rows


def test_our_results_agree_with_float64(record):
    for case in record[0]["cases"]:
        for row in case["variants"]:
            if row["role"] == "ours" and "samples_s" in row:
                assert row["agrees"] and row["errors"], row


def test_tables_show_names_and_units(record):
    for text in (
        "linear_scope_loss: forward+backward, 48 x 16 x 101, float32, cpu",
        "three matmuls",
        "6*T*V*D",
        "GB/s",
    ):
        assert text in record[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("linear_scope",), "unknown stem 'linear_scope'"),
        (("--shape", "1,2"), "expected three positive integers T,D,V"),
        (("--shape", "1,0,3"), "expected three positive integers T,D,V"),
        (("--repeats", "0"), "expected at least 1"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(arguments))
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_gpu_suite_needs_a_gpu(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--gpu-suite"])
    assert stopped.value.code == 2 and "no CUDA device" in capsys.readouterr().err


def test_summary_by_hand():
    got = timing.summary([4.0, 2.0, 3.0, 7.0, 5.0], baseline=[2.0, 1.0, 4.0])
    # quartiles of 2 3 4 5 7 (exclusive method): 2.5 and 6
    assert got == {
        "median_s": 4.0,
        "min_s": 2.0,
        "max_s": 7.0,
        "spread": 3.5 / 4.0,
        "ratio": 2.0,
        "ratio_of_minima": 2.0,
    }


def test_variants_take_turns(monkeypatch):
    calls = []
    monkeypatch.setattr(timing.Clock, "calls_per_sample", lambda self, run: 1)
    samples = timing.interleaved({name: lambda name=name: calls.append(name) for name in "ABC"}, "cpu", 40)
    assert [len(taken) for taken in samples.values()] == [40, 40, 40]
    rounds = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert rounds[0] == "ABC" and len(rounds) == 41  # one to warm up
    assert {"".join(sorted(each)) for each in rounds} == {"ABC"}
    assert len(set(rounds)) == 6  # nobody has always the same one before it


def test_a_spent_budget_keeps_three_rounds(monkeypatch):
    monkeypatch.setattr(timing.Clock, "calls_per_sample", lambda self, run: 1)
    assert len(timing.interleaved({"A": lambda: None}, "cpu", 50, budget_s=0.0)["A"]) == timing.MIN_ROUNDS


def test_agreement():
    assert harness.agrees({"loss": 1e-3, "dhidden": 1.0}, {"loss": 1e-3})
    assert not harness.agrees({"loss": 2e-3}, {"loss": 1e-3})
    assert not harness.agrees({"loss": math.nan}, {"loss": 1e-3})


def raising(problem):
    raise RuntimeError("no such kernel\nand a trace")


def fake_stem(*variants: Variant) -> SimpleNamespace:
    return SimpleNamespace(
        variants=lambda spec: list(variants), make_problem=lambda spec: harness.Tensors(),
        formula=lambda spec: Formula(1e9, "GB/s", "1 GB"),
    )  # fmt: skip


def test_wrong_failing_and_absent_variants_are_recorded():
    limit = Variant("limit", "limit", lambda problem: lambda: None)
    wrong = Variant("wrong", "peer", lambda p: lambda: None, lambda p, out: {"loss": 1.0}, limits={"loss": 0.5})
    broken = Variant("broken", "ours", raising)
    absent = Variant("absent", "peer", raising, missing="not installed (pip install it)", pip="it")
    spec = Spec("fake", "case", (1, 1, 1), measures=("time",))
    case = harness.measure(spec, fake_stem(limit, wrong, broken, absent), repeats=1)
    rows = {row["name"]: row for row in case["variants"]}
    assert rows["wrong"]["agrees"] is False and rows["wrong"]["errors"] == {"loss": 1.0}
    assert rows["broken"]["failed"] == "RuntimeError: no such kernel" and "samples_s" not in rows["broken"]
    assert rows["absent"]["unavailable"] == "not installed (pip install it)"
    assert report.cells(rows["wrong"])[6] == "DISAGREES: loss 1.0e+00"
    assert report.cells(rows["broken"])[1] == "failed"


def test_peers_out_of_time_are_named():
    limit = Variant("limit", "limit", lambda problem: lambda: None)
    late = Variant("late", "peer", lambda problem: lambda: None)
    case = harness.measure(
        Spec("fake", "case", (1, 1, 1), measures=("time",)), fake_stem(limit, late), repeats=1, budget_s=0.0
    )
    rows = {row["name"]: row for row in case["variants"]}
    assert rows["late"]["unavailable"] == "not reached in the time given" and "samples_s" in rows["limit"]


PEAK = """
import ctypes, torch
from bench import memory
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def call():
    block = libc.malloc(ctypes.c_size_t(32 << 20))  # what a C++ kernel would take, unseen by torch
    ctypes.memset(block, 1, 32 << 20)
    scratch = torch.ones(64 << 20, dtype=torch.uint8)
    del scratch
    libc.free(ctypes.c_void_p(block))
    kept = torch.ones(80 << 20, dtype=torch.uint8)
    return kept[:1], kept[1:]
torch.ones(200 << 20, dtype=torch.uint8)  # a higher mark before the call does not count
print(memory.resident_peak(call) / 2**20)
"""


def test_peak_memory_by_hand():
    if not os.path.exists("/proc/self/clear_refs"):
        pytest.skip("no /proc/self/clear_refs on this system")
    environment = os.environ | memory.GIVE_BACK
    done = subprocess.run([sys.executable, "-c", PEAK], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # 96 MiB at the peak, 80 MiB of them under what is returned; huge pages and the allocator round by a few
    assert float(done.stdout) == pytest.approx(96 - 80, abs=4)


def test_peak_memory_of_a_variant():
    if not os.path.exists("/proc/self/clear_refs"):
        pytest.skip("no /proc/self/clear_refs on this system")
    spec = Spec("linear_scope_loss", "memory", (1024, 16, 8192), "float32", "cpu", ("memory",))
    eager = next(v for v in bench_linear_scope_loss.variants(spec) if v.name == "eager torch")
    # log-probabilities and two gradients of their size (32 MiB each) live at once in eager's backward
    assert 64 * MIB < memory.extra_bytes(spec, eager, None) < 140 * MIB


def test_distinct_storages_are_counted_once():
    x = torch.zeros(10, dtype=torch.float32)
    assert memory.output_bytes((x, x[2:], None)) == 40
    assert memory.output_bytes(None) == 0


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def problem(request):
    return HeadProblem(Spec("linear_scope_loss", "forward+backward", SHAPE, request.param, "cpu", ("time",), True))


def test_truth_is_the_tests_truth(problem):
    for kind in ("scope", "plain", "half"):
        case = opcases.Case(problem.hidden, problem.weight, None, problem.kinds[kind][0]).to(torch.float64)
        streams, options = problem.ours(kind)
        loss, _ = opcases.naive_loss(case.hidden, case.weight, streams, options)
        truth = problem.truth(kind)
        assert truth.loss == pytest.approx(loss.item(), abs=1e-7 * truth.scale)
        for got, true in zip(truth[2:], opcases.gradients(loss, case), strict=True):
            assert (got.double() - true).norm() < 1e-6 * true.norm()


def test_half_of_the_rows_are_inactive(problem):
    assert problem.kinds["half"][0].active.numel() == SHAPE[0] // 2
    assert problem.kinds["plain"][0].active.numel() == SHAPE[0]


def test_rows_look_sampled(problem):
    """Targets from rare to near certain, as a policy's own tokens are; uniform ones would all sit near -log V - 2."""
    p = problem.logprob64.exp()
    assert p.max() > 0.9 and p.min() < 0.2 and problem.logprob64.min() > -math.log(SHAPE[2]) - 4


@pytest.mark.parametrize("peer", peers.PEERS, ids=lambda peer: peer.name)
def test_peer_agrees_with_float64(problem, peer):
    spec = problem.spec
    if reason := peer.missing(spec):
        pytest.skip(reason)
    if peer.compiles and spec.dtype == "bfloat16":
        pytest.skip("compiled once, in float32, to keep the tests quick")
    variant = next(v for v in peers.loss_variants(spec) if v.name == peer.name)
    _, errors = harness.try_once(variant, problem, "cpu")
    assert set(errors) == {"loss", "dhidden", "dweight"} and harness.agrees(errors, ERROR_LIMITS[spec.dtype]), errors


def head_case(case: str, **medians_s: float) -> dict:
    rows = [{"name": name, "role": "ours", "median_s": s} for name, s in medians_s.items()]
    return {
        "stem": "linear_scope_loss", "case": case, "dtype": "float32", "shape": targets.CPU_SHAPE, "variants": rows,
    }  # fmt: skip


def test_targets_by_hand():
    times = {"three matmuls": 1.0, "scope_fast cpu": 1.1, "eager torch": 1.2, "trl ChunkedLogProb": 1.21,
             "liger scaled CE": 5.0, "torch.compile": 1.1}  # fmt: skip
    half = {"scope_fast cpu": 1.0, "scope_fast cpu, half": 0.7}
    cases = [head_case("forward+backward", **times), head_case("variations", **half)]
    got = {t.text: t for t in targets.evaluate({"environment": {"device": {"type": "cpu"}}, "cases": cases})}
    ours = "scope_fast cpu, float32: "
    assert {text.removeprefix(ours): (round(t.value, 3), t.met) for text, t in got.items()} == {
        "time / three matmuls": (1.1, True),
        "times faster than eager torch": (1.091, False),
        "times faster than trl ChunkedLogProb": (1.1, False),
        "time / torch.compile's": (1.0, True),
        "half of the rows zero-gradient / all": (0.7, False),
    }


def test_a_call_that_fails_in_the_rounds_costs_itself_alone(monkeypatch):
    monkeypatch.setattr(timing.Clock, "calls_per_sample", lambda self, run: 1)
    calls, failed = [], {}

    def fails():
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("out of something\nmore")

    samples = timing.interleaved({"A": lambda: None, "B": fails}, "cpu", 5, failed=failed)
    assert samples.keys() == {"A"} and len(samples["A"]) == 5
    assert failed == {"B": "RuntimeError: out of something"}
    monkeypatch.setattr(timing, "works", lambda device: False)  # as after an illegal access
    calls.clear()
    samples = timing.interleaved({"A": lambda: None, "B": fails, "C": lambda: None}, "cpu", 5)
    # B failed in its second round: whoever came before it there has two samples, and nobody has more
    assert samples.keys() == {"A", "C"} and {len(taken) for taken in samples.values()} <= {1, 2}


def test_memory_beyond_a_float32_dweight():
    device, shape = {"memory_bytes": 80 << 30, "processors": 132}, [8192, 3584, 152064]
    assert targets.in_chunks(device, [32768, 1536, 151936], 4) and not targets.in_chunks(device, shape, 4)
    assert targets.beyond_dweight({"extra_bytes": 3584 * 152064 * 4 + (1 << 29)}, shape) == 0.5
    assert targets.beyond_dweight(None, shape) is None


def test_roofline_by_hand():
    rows = {"three matmuls": {"median_s": 0.030}, "copy": {"median_s": 1.0, "rate": 2000.0}}  # GB/s
    # T V (4 + 2) + V D 10 bytes = 1e9 * 6e-3 ... : 1000 * 2e6 * 6 + 2e6 * 100 * 10 = 14e9 bytes at 2e12 bytes/s
    assert targets.roofline_s(rows, [1000, 100, 2_000_000], 4) == pytest.approx(0.030 + 0.007)


def test_gpu_suite_fits_its_time_and_merges(monkeypatch, tmp_path):
    assert sum(part.budget_s * part.problems for part in gpu_suite.PARTS) <= gpu_suite.TOTAL_S < 540

    def run_part(part, path, seconds):
        if part.stem == "step_pool":
            return "stopped after 1 s"
        path.write_text(json.dumps({"environment": {"date": path.stem}, "cases": [{"stem": part.stem}]}))
        return ""

    monkeypatch.setattr(gpu_suite, "run_part", run_part)
    records, wrong = gpu_suite.run_parts(tmp_path)
    assert len(records["linear_scope_loss"]["cases"]) == 8 and len(records["linear_logprob"]["cases"]) == 2
    dates = [case["environment"]["date"] for case in records["linear_logprob"]["cases"]]
    assert dates == ["0", "6"] and records["linear_logprob"]["environment"]["date"] == "0"
    assert "step_pool" not in records and wrong == ["step_pool: stopped after 1 s"]


def test_a_quickstart_run_in_one_row():
    lines = [{"step": 0, "eval/pass_rate_before": 0.25}]
    for accepted, gap in ((3, 1e-5), (1, 2e-5)):
        lines.append({"loss/total": 0.1, "scope/accepted": accepted, "scope/selected": 5, "time/step_s": 1.5,
                      "sampling/logprob_gap": gap})  # fmt: skip
    with pytest.raises(ValueError, match="no evaluation after its last step"):
        quickstart.summary(lines)
    assert quickstart.summary([*lines, {"step": 2, "eval/pass_rate": 0.5}]) == {
        "before": 0.25, "after": 0.5, "steps": 2, "selected": 10, "accepted": 4, "least_accepted": 1,
        "most_logprob_gap": 2e-5, "steps_s": 3.0,
    }  # fmt: skip


def test_quickstart_runs_and_leaves_its_record(tmp_path, capfd):
    settings = ["--steps", "1", "--rollout.engine", "transformers", "--rollout.prompts_per_step", "4"]
    settings += ["--evaluation.prompts", "4", "--data.heldout", "8", "--logging.report", "false"]
    assert quickstart.main(["--seeds", "3", "--json", str(tmp_path / "record.json"), *settings]) == 0
    record = json.loads((tmp_path / "record.json").read_text())
    (row,) = record["runs"]
    assert (
        record["settings"] == settings and (row["seed"], row["steps"]) == (3, 1) and 0 < row["steps_s"] < row["run_s"]
    )
    assert f"{row['before']:.1%}" in capfd.readouterr().out


def test_pytest_collects_the_same_variants():
    command = [sys.executable, "-m", "pytest", "bench", "-q", "-p", "no:cacheprovider", "--benchmark-disable"]
    command += ["-k", "test_weight_bucket and same and (reference or triton)"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    if torch.cuda.is_available():
        assert done.returncode == 0, done.stdout
    else:
        assert "1 passed, 1 skipped" in done.stdout, done.stdout


@pytest.mark.parametrize(("cores", "cautions"), [(1, True), (2, False)])
def test_more_threads_than_cores_is_said(cores, cautions, capsys):
    report.print_caution({"device": {"type": "cpu", "threads": 2, "cores": cores}})
    assert capsys.readouterr().out.startswith("CAUTION: 2 threads on 1 cores") == cautions
