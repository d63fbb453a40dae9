"""A teacher's text behind a student's tokens: encoded alone, ended once, or rejected with its reason."""

import copy

import pytest
from factories import byte_level, sentencepiece
from transformers import AddedToken

from scope_fast.scope.rectify import Rejected, splice

PREFIX = "12 + 7 = 19\n"
SUFFIX = "19 - 4 = 15. Answer: 15"
EOS = 0


@pytest.fixture
def tokenizer():
    return byte_level()


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def rejection(tokenizer, prefix_ids, suffix, max_tokens=99):
    with pytest.raises(Rejected) as caught:
        splice(tokenizer, prefix_ids, suffix, max_tokens)
    return str(caught.value)


def test_the_suffix_alone_and_one_eos(tokenizer):
    suffix_ids = splice(tokenizer, encode(tokenizer, PREFIX), SUFFIX, 99)
    assert suffix_ids == [*encode(tokenizer, SUFFIX), EOS]
    assert suffix_ids.count(EOS) == 1
    assert tokenizer.decode(encode(tokenizer, PREFIX) + suffix_ids) == f"{PREFIX}{SUFFIX}<|endoftext|>"


def test_no_prefix_at_all(tokenizer):
    assert splice(tokenizer, [], SUFFIX, 99) == [*encode(tokenizer, SUFFIX), EOS]


def test_the_student_s_own_tokens_are_not_encoded_again(tokenizer):
    """A prefix cut where the tokenizer would not cut: one token a byte."""
    one_by_one = [tokenizer.convert_tokens_to_ids(c) for c in "12\u0120+\u01207\u0120=\u012019\u010a"]
    assert tokenizer.decode(one_by_one) == PREFIX and one_by_one != encode(tokenizer, PREFIX)
    assert splice(tokenizer, one_by_one, SUFFIX, 99) == [*encode(tokenizer, SUFFIX), EOS]


@pytest.mark.parametrize("suffix", ["", " ", "\n\t "])
def test_an_empty_suffix(tokenizer, suffix):
    assert rejection(tokenizer, encode(tokenizer, PREFIX), suffix) == "empty suffix"


@pytest.mark.parametrize("suffix", [PREFIX + SUFFIX, PREFIX, "12 + 7 = 19", f"\n{PREFIX}{SUFFIX}"])
def test_the_prefix_again(tokenizer, suffix):
    assert rejection(tokenizer, encode(tokenizer, PREFIX), suffix) == "the suffix repeats the prefix"


def test_a_likeness_is_no_repetition(tokenizer):
    """The first step was "1"; a line that begins with "12" does not say it again."""
    assert splice(tokenizer, encode(tokenizer, "1\n"), "12 + 7 = 19", 99)[-1] == EOS
    assert splice(tokenizer, encode(tokenizer, "\n"), "12", 99)[-1] == EOS  # white space can be repeated


def test_the_budget_counts_the_eos(tokenizer):
    length = len(encode(tokenizer, SUFFIX))
    assert len(splice(tokenizer, encode(tokenizer, PREFIX), SUFFIX, length + 1)) == length + 1
    message = f"suffix of {length} tokens and EOS exceed the budget of {length}"
    assert rejection(tokenizer, encode(tokenizer, PREFIX), SUFFIX, length) == message
    assert "the budget of -3" in rejection(tokenizer, encode(tokenizer, PREFIX), SUFFIX, -3)


@pytest.mark.parametrize("special", ["<|endoftext|>", "<|pad|>", "<|turn|>"])
def test_text_that_spells_a_special_token(tokenizer, special):
    """It would be encoded as that token: an EOS in the middle of the response."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens([AddedToken("<|turn|>", special=True)])
    message = "the suffix spells out a special token"
    assert rejection(tokenizer, encode(tokenizer, PREFIX), f"19 - 4{special} = 15") == message
    assert rejection(tokenizer, encode(tokenizer, PREFIX), SUFFIX + special) == message


def test_a_tokenizer_that_puts_a_space_before_what_it_encodes():
    """Llama 2's way: the suffix alone would not be what follows the prefix."""
    tokenizer = sentencepiece("first")
    prefix_ids = encode(tokenizer, "12 + 3\n")
    assert tokenizer.decode(prefix_ids + encode(tokenizer, "12 + 2")) == "12 + 3\n 12 + 2"
    *suffix_ids, end = splice(tokenizer, prefix_ids, "12 + 2", 99)
    assert tokenizer.decode(prefix_ids + suffix_ids) == "12 + 3\n12 + 2" and end == 1
    assert prefix_ids + suffix_ids == encode(tokenizer, "12 + 3\n12 + 2")
    assert splice(tokenizer, prefix_ids, " 12 + 2", 99) == [*encode(tokenizer, " 12 + 2"), 1]
    plain = sentencepiece("never")
    assert splice(plain, encode(plain, "12 + 3\n"), "12 + 2", 99) == [*encode(plain, "12 + 2"), 1]


def test_a_prefix_cut_inside_a_character():
    """Byte tokens are decoded as one run: half a character spoils the whole one that follows it."""
    tokenizer = sentencepiece("never")
    half = encode(tokenizer, "é")[:1]
    assert rejection(tokenizer, half, "é") == "prefix and suffix do not decode to their own text"
    assert splice(tokenizer, half, "12", 99) == [*encode(tokenizer, "12"), 1]  # what follows is untouched here
