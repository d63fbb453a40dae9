"""Self-BLEU and self-ROUGE against numbers worked out by hand, through the real sacrebleu and rouge-score."""

import sys

import pytest

from scope_fast.diversity import self_bleu, self_rouge

ABC = ["a b c d e", "a b c d f"]


@pytest.fixture
def scorers():
    pytest.importorskip("sacrebleu", reason="pip install 'scope-fast[eval]'")
    pytest.importorskip("rouge_score", reason="pip install 'scope-fast[eval]'")


@pytest.mark.usefixtures("scorers")
def test_one_word_of_five_differs():
    """n-gram precisions 4/5, 3/4, 2/3, 1/2, equal lengths; the longest common subsequence is 4 of 5 words."""
    assert self_bleu(ABC) == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25, abs=1e-12)
    assert self_rouge(ABC) == pytest.approx(4 / 5, abs=1e-12)


@pytest.mark.usefixtures("scorers")
def test_a_third_text_counts_as_a_reference_and_in_two_more_pairs():
    """The copies score 1; the stranger shares no word with either."""
    texts = ["a b c d", "a b c d", "w x y z"]
    assert self_bleu(texts) == pytest.approx(2 / 3, abs=1e-12)
    assert self_rouge(texts) == pytest.approx(1 / 3, abs=1e-12)


@pytest.mark.usefixtures("scorers")
def test_the_ends_of_the_scale():
    for equal in (["1 + 2 = 3"] * 3, ["数学 答案"] * 2, ["!?"] * 2, ["", ""]):
        assert self_bleu(equal) == self_rouge(equal) == 1.0
    assert self_bleu(["a b c d", "w x y z"]) == 0.0 and self_rouge(["a b c d", "w x y z"]) == 0.0
    for empty in ([], ["a"]):
        assert self_bleu(empty) is None and self_rouge(empty) is None


@pytest.mark.usefixtures("scorers")
def test_rouge_reads_every_script():
    """The longest common subsequence of two of three words: F1 2/3; rouge-score's own words are [a-z0-9] alone."""
    texts = ["ответ равен 5", "Ответ: 5 _тут_"]
    assert self_rouge(texts) == pytest.approx(2 / 3, abs=1e-12)


def test_rouge_of_scripts_without_spaces():
    """Four characters, three of them the same; of more than there are words no more are read."""
    assert self_rouge(["答案是五", "答案是六"]) == pytest.approx(3 / 4, abs=1e-12)
    assert self_rouge(["字" * 300 + "a", "字" * 300 + "b"]) == 1.0


def test_rouge_reads_the_first_words_only():
    texts = ["a b c d", "a b x y"]
    assert self_rouge(texts) == 0.5 and self_rouge(texts, max_words=2) == 1.0


@pytest.mark.parametrize(
    ("function", "module", "message"),
    [
        (self_bleu, "sacrebleu.metrics", r"self-BLEU needs sacrebleu: pip install 'scope-fast\[eval\]'"),
        (self_rouge, "rouge_score.rouge_scorer", r"self-ROUGE needs rouge-score: pip install 'scope-fast\[eval\]'"),
    ],
)
def test_a_missing_package_is_named(function, module, message, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=message):
        function(ABC)
