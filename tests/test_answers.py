r"""Finding and comparing final answers; the real math-verify, and LaTeX that really makes it hang."""

import signal
import threading
import time

import pytest

from scope_fast.answers import boxed, canonical, choice, final_answer, gold_answer, text
from scope_fast.verifier import Verifier

HANGS = r"9^{9^{9^{9}}}"  # compared with a number for longer than anybody waited


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        (r"so $\boxed{42}$.", "42"),
        (r"\boxed{1} no, \boxed{2}", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),  # escaped braces are no braces
        (r"\boxed {7} and \fbox{8}", "8"),
        (r"\boxed{1} then \boxed{2 + \frac{3", "1"),  # the last is cut off
        (r"\boxed{", None),
        ("no box", None),
        (r"\boxed{}", ""),
    ],
)
def test_what_a_box_holds(response, answer):
    assert boxed(response) == answer


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("3 + 4 = 7. Answer: 7", "7"),
        ("Answer: 7\nAnswer: 8", "8"),
        ("**Answer:** 7", "7"),
        ("**Answer**: 7", "7"),
        ("**Answer: 7.**", "7"),
        ("Answer: **7**.", "7"),
        ("Answer: `7`", "7"),
        ("Answer: .5", ".5"),
        (r"Answer: 8 or \boxed{7}", "7"),
        (r"\boxed{} Answer: 8", None),  # the box decides, also when it is empty
        ("Answer:", None),
        ("", None),
    ],
)
def test_the_final_answer(response, answer):
    assert final_answer(response) == answer


@pytest.mark.parametrize(
    ("answer", "form"),
    [
        (" $ 7 $ ", "7"),
        ("$$7$$.", "7"),
        (r"\(7\)", "7"),
        (r"\[7\].", "7"),
        ("7.", "7"),
        ("7.5", "7.5"),
        (r"\left( 1,\, 2 \right)", "( 1, 2 )"),
        (r"\leftarrow", r"\leftarrow"),
        (r"\dfrac12", r"\frac12"),
        ("12,345", "12345"),
        ("-1,234,567.5", "-1234567.5"),
        ("1,2", "1,2"),
        ("12,3456", "12,3456"),
        ("$1$ and $2$", "$1$ and $2$"),
        ("$$$", "$$$"),
        ("a \n b", "a b"),
    ],
)
def test_the_canonical_form(answer, form):
    assert canonical(answer) == form


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("7", "7"),
        (7, "7"),
        (r"We get $x = 3$, so \boxed{3}.", "3"),
        ("Natalia sold 48/2 = 24 clips.\n#### 1,072", "1072"),
    ],
)
def test_the_gold_answer_of_the_usual_data_sets(answer, gold):
    assert gold_answer({"answer": answer}) == gold


@pytest.mark.parametrize("answer", ["", " . ", r"so \boxed{}", "####"])
def test_a_gold_answer_that_is_none_is_an_error_and_not_a_zero(answer):
    with pytest.raises(ValueError, match="holds no answer"):
        gold_answer({"answer": answer})


def test_text_is_compared_in_canonical_form():
    assert text(r"\boxed{ Paris. }", {"answer": "paris"}) == (1.0, "Paris")
    assert text("Answer: Lyon", {"answer": "Paris"}) == (0.0, "Lyon")
    assert text("Paris", {"answer": "Paris"}) == (0.0, None)


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"), ("(B)", "B"), ("b", "B"), ("B. Paris", "B"), ("B) Paris", "B"), ("(B) Paris", "B"), ("**B**", "B"),
        (r"\text{B}", "B"), (r"\textbf{(B)}", "B"), (r"\mathrm{B}", "B"),
        (r"\mathbf{(B)}", "B"), (r"\textit{B}", "B"), ("**B**.", "B"), ("$B$", "B"),
        ("Because", None), ("7", None), ("AB", None), ("A dog", None),
    ],
)  # fmt: skip
def test_the_letter_of_a_choice(answer, letter):
    expected = (0.0, None) if letter is None else (1.0, letter)
    assert choice(f"Answer: {answer}", {"answer": "B"}) == expected
    assert choice(f"\\boxed{{{answer}}}", {"answer": "C"})[0] == 0.0


math_verify = pytest.importorskip("math_verify", reason="pip install 'scope-fast[eval]'")


@pytest.fixture(scope="module")
def score():
    from scope_fast.math_answers import score

    return score


EQUAL = [
    (r"\frac{1}{2}", "0.5"), ("1/2", r"\frac12"), ("(1,2)", "(1, 2)"), ("x=5", "5"), (r"2\sqrt{2}", r"\sqrt{8}"),
    (r"\{1,2\}", r"\{2,1\}"), ("x^2+2x+1", "(x+1)^2"), (r"90^\circ", "90"), (r"5 \text{ cm}", "5"), ("6.0", "6"),
    (r"\text{Evelyn}", "Evelyn"), ("12,345", "12345"), ("[1,2)", "[1,2)"), (r"\$18", "18"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
]  # fmt: skip
DIFFERENT = [("3", "4"), ("(1,2)", "(2,1)"), ("[1,2)", "[1,2]"), (r"\sqrt{2}", "1.41"), ("x^2", "y^2"), ("Eve", "Adam")]


@pytest.mark.parametrize(("answer", "gold"), EQUAL)
def test_equal_as_mathematics(score, answer, gold):
    assert score(f"so \\boxed{{{answer}}}", {"answer": gold})[0] == 1.0
    assert score(f"Answer: {answer}", {"answer": f"it is $\\boxed{{{gold}}}$"})[0] == 1.0


@pytest.mark.parametrize(("answer", "gold"), DIFFERENT)
def test_different_as_mathematics(score, answer, gold):
    assert score(f"\\boxed{{{answer}}}", {"answer": gold})[0] == 0.0


def test_a_comma_between_two_answers_is_none_of_a_thousand(score):
    """OlympiadBench's answers are lists, which `sources` joins with a comma."""
    assert score(r"\boxed{100,200}", {"answer": "100, 200"}) == (1.0, "100, 200")
    assert score(r"\boxed{100200}", {"answer": "100, 200"})[0] == 0.0
    assert score(r"\boxed{100,200}", {"answer": "100200"}) == (1.0, "100200")


@pytest.mark.parametrize("answer", [r"\frac{1}{", "}{", r"\\\\", "%", "\x00", "(" * 50, r"\sqrt" * 50, "中" * 50, "$"])
def test_latex_that_cannot_be_read_is_a_wrong_answer(score, answer):
    assert score(f"Answer: {answer}", {"answer": "5"})[0] == 0.0


def test_no_answer_and_no_gold(score):
    assert score("I give up", {"answer": "5"}) == (0.0, None)
    with pytest.raises(ValueError, match="holds no answer"):
        score(r"\boxed{5}", {"answer": " "})


def test_no_signal_is_touched_so_any_thread_may_score(score):
    before, found = signal.getsignal(signal.SIGALRM), []
    rung = threading.Thread(target=lambda: found.append(score(r"\boxed{0.50}", {"answer": r"\frac{2}{4}"})))
    rung.start()
    rung.join()
    assert found == [(1.0, "0.50")]
    assert signal.getsignal(signal.SIGALRM) is before and signal.alarm(0) == 0


def test_latex_that_hangs_is_killed_counted_and_costs_its_own_item_only():
    good, bad = (r"\boxed{\frac{2}{4}}", {"answer": "0.5"}), (f"\\boxed{{{HANGS}}}", {"answer": "2"})
    with Verifier("scope_fast.math_answers:score", num_workers=1, timeout_s=1.0) as verifier:
        start = time.monotonic()
        verdicts = verifier.score([good, bad, good])
        seconds = time.monotonic() - start
    assert [v.status for v in verdicts] == ["ok", "timeout", "ok"]
    assert [v.reward for v in verdicts] == [1.0, None, 1.0]
    assert verdicts[1].reason == "no verdict within 1 s"
    assert 1.0 < seconds < 30.0  # the deadline, and another worker's start


def test_a_missing_gold_answer_is_a_crash_with_its_reason():
    with Verifier("scope_fast.math_answers:score", num_workers=1) as verifier:
        (verdict,) = verifier.score([(r"\boxed{5}", {"answer": ""})])
    assert verdict.status == "crash" and verdict.reward is None
    assert verdict.reason.startswith("ValueError: entry['answer'] holds no answer: '' (answers.py:")


def test_a_missing_math_verify_shows_at_the_start_with_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text("raise ModuleNotFoundError(\"No module named 'math_verify'\")\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=r"No module named 'math_verify': .* pip install 'scope-fast\[eval\]'"):
        Verifier("scope_fast.math_answers:score")
