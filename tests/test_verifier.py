"""Verifier: real hangs, real deaths; one bad item never touches another, and never becomes a zero."""

import os
import subprocess
import sys
import textwrap
import time

import pytest

from scope_fast.verifier import Verdict, Verifier

SCORERS = '''
import ctypes, os, subprocess, sys, time

def echo(response, entry):
    return entry["gold"] == response, response

def act(response, entry):
    """Does what the response says; reward 1.0 for anything else."""
    if response == "hang":
        while True:
            pass
    if response == "exit":
        os._exit(3)
    if response == "segfault":
        ctypes.string_at(0)
    if response == "raise":
        raise KeyError("gold")
    if response == "memory":
        raise MemoryError("too big")
    if response == "nan":
        return float("nan"), None
    if response == "text":
        return "1.0", None
    if response == "bare":
        return 1.0
    if response == "print":
        print("noise from a scorer")
    if response == "child":
        subprocess.Popen([sys.executable, "-c", f"import time; open({entry['file']!r}, 'w').close(); time.sleep(60)"])
        time.sleep(60)
    return 1.0, response

def number(response, entry):
    raise ValueError(f"no number: {response!r}")

def pid(response, entry):
    return float(os.getpid()), None

def meet(response, entry):
    """The scorer's process, once the item it names is being scored too; raises after ten seconds alone."""
    folder, end = entry["folder"], time.monotonic() + 10
    open(os.path.join(folder, response), "w").close()
    while not os.path.exists(os.path.join(folder, entry["other"][response])):
        if time.monotonic() > end:
            raise TimeoutError("nobody came")
        time.sleep(0.005)
    return float(os.getpid()), None

not_callable = 3
'''


@pytest.fixture
def scorers(tmp_path, monkeypatch):
    """The name of a module of scorers that exists for this test only."""
    (tmp_path / "scorers_under_test.py").write_text(SCORERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "scorers_under_test"


def items(*responses, **entry):
    return [(response, entry) for response in responses]


def test_rewards_and_answers_come_back_in_order(scorers):
    wanted = [(str(i), {"gold": str(i) if i % 3 else "other"}) for i in range(50)]
    with Verifier(f"{scorers}:echo") as verifier:
        verdicts = verifier.score(wanted)
        assert verdicts == [Verdict(1.0 if i % 3 else 0.0, "ok", str(i)) for i in range(50)]
        assert verifier.score([]) == []


def test_workers_stay_and_share_the_items(scorers, tmp_path):
    """Two items that wait for each other need two workers at one time; a second pair finds the same two."""
    with Verifier(f"{scorers}:meet", num_workers=2, timeout_s=20.0) as verifier:
        pids = []
        for names in ("ab", "cd"):
            verdicts = verifier.score(
                items(*names, folder=str(tmp_path), other=dict(zip(names, names[::-1], strict=True)))
            )
            assert [verdict.status for verdict in verdicts] == ["ok", "ok"], verdicts
            pids.append({verdict.reward for verdict in verdicts})
    assert len(pids[0]) == 2 and pids[0] == pids[1]  # nobody was restarted
    assert os.getpid() not in pids[0]


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("exit", "the worker died: exit code 3"),
        ("segfault", "the worker died: Segmentation fault"),
        ("raise", "KeyError: 'gold' (SCORERS.py:LINE)"),
        ("memory", "MemoryError: too big (SCORERS.py:LINE)"),
        ("nan", "reward nan is not a finite number"),
        ("text", "reward '1.0' is not a finite number"),
        ("bare", "the scorer returned 1.0, expected (reward, answer)"),
    ],
)
def test_a_crash_is_that_items_alone(scorers, response, reason):
    with Verifier(f"{scorers}:act", num_workers=1) as verifier:
        verdicts = verifier.score(items("a", response, "b", "c", "d", "e"))
        line = next((i for i, text in enumerate(SCORERS.splitlines(), 1) if f'== "{response}"' in text), 0) + 1
        reason = reason.replace("SCORERS", scorers).replace("LINE", str(line))
        assert verdicts[1] == Verdict(None, "crash", None, reason)
        assert [v for i, v in enumerate(verdicts) if i != 1] == [Verdict(1.0, "ok", r) for r in "abcde"]


def test_a_hang_is_killed_and_only_it_times_out(scorers):
    with Verifier(f"{scorers}:act", num_workers=2, timeout_s=0.5) as verifier:
        started = time.monotonic()
        verdicts = verifier.score(items("a", "hang", *["b"] * 20, "hang", "exit", "c"))
        assert time.monotonic() - started > 0.5
        assert [v.status for v in verdicts] == ["ok", "timeout", *["ok"] * 20, "timeout", "crash", "ok"]
        assert verdicts[1] == Verdict(None, "timeout", None, "no verdict within 0.5 s")
        assert [v.reward for v in verdicts if v.status == "ok"] == [1.0] * 22
        assert verifier.score(items("d")) == [Verdict(1.0, "ok", "d")]  # the pool goes on


def test_the_limit_is_per_item_not_per_chunk(tmp_path, monkeypatch):
    (tmp_path / "slow_scorer.py").write_text(
        "import time\ndef score(r, e):\n    time.sleep(0.1)\n    return 1.0, None\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with Verifier("slow_scorer:score", num_workers=1, timeout_s=0.5) as verifier:
        verdicts = verifier.score(items(*["x"] * 32))  # chunks of 8 take 0.8 s each
    assert [v.status for v in verdicts] == ["ok"] * 32


def test_a_worker_that_dies_while_idle_costs_nothing(scorers):
    with Verifier(f"{scorers}:pid", num_workers=1) as verifier:
        (first,) = verifier.score(items("x"))
        os.kill(int(first.reward), 9)
        os.waitid(os.P_PID, int(first.reward), os.WEXITED | os.WNOWAIT)
        (second,) = verifier.score(items("x"))
    assert second.status == "ok" and second.reward != first.reward


def test_killing_a_worker_kills_what_it_started(scorers, tmp_path):
    file = tmp_path / "started"
    with Verifier(f"{scorers}:act", num_workers=1, timeout_s=1.5) as verifier:
        (verdict,) = verifier.score(items("child", file=str(file)))
    assert verdict.status == "timeout" and file.exists()
    deadline = time.monotonic() + 5.0
    command = ["ps", "-eo", "args"]
    while str(file) in subprocess.run(command, capture_output=True, text=True, check=True).stdout:
        assert time.monotonic() < deadline, "the scorer's child process outlived its worker"
        time.sleep(0.05)


def test_a_scorers_output_stays_out_of_stdout(scorers, capfd):
    with Verifier(f"{scorers}:act", num_workers=1) as verifier:
        assert verifier.score(items("print"))[0].status == "ok"
    assert "noise" not in capfd.readouterr().out


def test_workers_import_the_scorer_and_not_the_parents_program(tmp_path):
    """An unguarded script is the hard case for spawned workers: importing it again would start workers for ever."""
    (tmp_path / "light.py").write_text(
        "import sys\ndef score(r, e):\n    return float('torch' in sys.modules), ','.join(sorted(e))\n"
    )
    (tmp_path / "script.py").write_text(
        textwrap.dedent("""
        import torch
        from scope_fast.verifier import Verifier
        print(Verifier("light:score", num_workers=1).score([("", {"b": 1, "a": 2})]))
        """)
    )
    path = os.pathsep.join([str(tmp_path), os.path.dirname(os.path.dirname(os.path.abspath(__file__)))])
    done = subprocess.run(
        [sys.executable, "script.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "[Verdict(reward=0.0, status='ok', answer='a,b', reason=None)]\n", done.stderr


@pytest.mark.parametrize(
    ("score", "message"),
    [
        ("no_such_module:score", "score='no_such_module:score': ModuleNotFoundError: No module named 'no_such_module'"),
        ("json:no_such_function", "score='json:no_such_function': AttributeError: .*no_such_function"),
        ("json", "score='json': expected 'module:function'"),
        (":score", "score=':score': expected 'module:function'"),
    ],
)
def test_a_wrong_import_path_names_the_argument(score, message):
    with pytest.raises(ValueError, match=message):
        Verifier(score)


def test_what_is_not_a_function_is_refused(scorers):
    with pytest.raises(ValueError, match=f"score='{scorers}:not_callable': not_callable is a int, not a function"):
        Verifier(f"{scorers}:not_callable")


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import math\n\nTABLE = {}['k']\n", r"KeyError: 'k' \(fails.py:3\)"),
        ("def score(response, entry)\n", r"SyntaxError: expected ':' \(fails.py, line 1\)$"),
    ],
)
def test_what_a_module_raises_on_import_is_said(tmp_path, monkeypatch, code, message):
    (tmp_path / "fails.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=f"score='fails:score': {message}"):
        Verifier("fails:score")


def test_the_first_reasons_are_printed_once(scorers, capfd):
    """Forty responses that fail in as many ways, then one of those again."""
    with Verifier(f"{scorers}:number") as verifier:
        verdicts = verifier.score(items(*(f"x{i}" for i in range(40))))
        verifier.score(items("x0"))
    assert {verdict.status for verdict in verdicts} == {"crash"}
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("verifier: no verdict")]
    assert len(said) == 5
    assert said[0] == f"verifier: no verdict on a response: ValueError: no number: 'x0' ({scorers}.py:34)"


def test_a_scorer_that_dies_on_import_is_an_error_not_an_endless_restart(tmp_path, monkeypatch):
    (tmp_path / "dies.py").write_text("import os\nos._exit(4)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RuntimeError, match="died importing 'dies:score': exit code 4"):
        Verifier("dies:score")


def test_other_arguments_are_checked():
    with pytest.raises(ValueError, match="num_workers=0"):
        Verifier("json:dumps", num_workers=0)
    with pytest.raises(ValueError, match="timeout_s=0"):
        Verifier("json:dumps", timeout_s=0.0)


def test_a_closed_verifier_says_so(scorers):
    verifier = Verifier(f"{scorers}:echo")
    verifier.close()
    with pytest.raises(RuntimeError, match="closed"):
        verifier.score(items("x", gold="x"))
