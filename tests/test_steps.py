"""Steps in token space: a token belongs to the step holding its first byte, and to exactly one step."""

import copy
import random

import pytest
from factories import byte_level, sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import AddedToken, PreTrainedTokenizerFast

from scope_fast.scope.steps import TokenBytes, split_steps

TEXTS = [
    "12 + 7 = 19\n19 - 4 = 15. Answer: 15",
    "a b  c   d",
    " leads with a space",
    "trailing \n\n",
    "naïve façade, 数学 \U0001f600\tand\r\n½",
    "==12ab 12 ab==",
    "",
    " ",
    "\n",
]


@pytest.mark.parametrize(
    ("tokens", "spans"),
    [
        ([b"a", b"\nb", b"\n", b"c"], [(0, 2), (2, 3), (3, 4)]),  # "\nb" begins in the first step
        ([b"a", b"\n", b"b", b"\n", b"c"], [(0, 2), (2, 4), (4, 5)]),
        ([b"a\n", b"b\n", b"c\n"], [(0, 1), (1, 2), (2, 3)]),  # the last separator opens no step
        ([b"a", b"\n", b" \n", b"\n", b"b"], [(0, 4), (4, 5)]),  # empty lines behind a separator close the step
        ([b"a", b"\n", b"  ", b" b"], [(0, 2), (2, 4)]),  # an indented line is the next step's, its first word too
        ([b"a", b"\n ", b" b"], [(0, 2), (2, 3)]),
        ([b"a", b" ", b"\n", b"b"], [(0, 3), (3, 4)]),
        ([b"\n", b"\n", b"a", b"\n", b"b"], [(0, 4), (4, 5)]),  # leading white space opens no step
        ([b"  \n a", b"\nb"], [(0, 2)]),  # a token that only ends in a step is none of its tokens
        ([b"a\nb\nc", b"d"], [(0, 1), (1, 2)]),  # two steps inside a token leave one, the third has a token left
        ([b"a\nb\nc"], [(0, 1)]),
        ([b"a"], [(0, 1)]),
        ([b"\xe2", b"\x82", b"\xac\n", b"\xc3", b"\xa9"], [(0, 3), (3, 5)]),  # characters over several tokens
        ([b"a", b"", b"\n", b"b", b""], [(0, 3), (3, 5)]),  # tokens without bytes go with their neighbours
        ([b"a\n", b"", b"b"], [(0, 1), (1, 3)]),
        ([], []),
        ([b""], []),
        ([b" ", b"\n", b"\t"], []),
    ],
)
def test_spans_by_hand(tokens, spans):
    assert split_steps(tokens) == spans


def test_a_trailing_eos_belongs_to_no_step():
    assert split_steps([b"a", b"\n", b"b", b""], trailing_eos=True) == [(0, 2), (2, 3)]
    assert split_steps([b""], trailing_eos=True) == []
    assert split_steps([b"\n", b""], trailing_eos=True) == []
    assert split_steps([], trailing_eos=True) == []


def test_another_separator():
    assert split_steps([b"a\n", b"b", b"\n\n", b"c"], separator=b"\n\n") == [(0, 3), (3, 4)]
    assert split_steps([b"a.", b"b"], separator=b".") == [(0, 1), (1, 2)]  # taken literally, not as a pattern
    assert split_steps([b"a", b".", b" b", b".", b" "], separator=b".") == [(0, 2), (2, 5)]
    assert split_steps([b"a", b".", b" b", b".", b"5"], separator=b". ") == [(0, 2), (2, 5)]
    assert split_steps([b"a", b".", b"\n", b"  ", b" b"], separator=b".") == [(0, 3), (3, 5)]
    assert split_steps([b"a", b" ", b" ", b"b"], separator=b"  ") == [(0, 1), (1, 4)]


def steps_of_bytes(data):
    """The step of every byte, read line by line: a line with content opens a step behind the first, if lines follow."""
    owners, step, content = [], 0, False
    for line in data.splitlines(keepends=True):
        if line.strip():
            step += content
            content = True
        owners += [step] * len(line)
    return owners


@settings(max_examples=400, deadline=None, derandomize=True)
@given(st.lists(st.text("ab \n\té", max_size=4), max_size=12), st.randoms(use_true_random=False), st.booleans())
def test_spans_of_any_cut_of_any_text(words, rng, eos):
    data = "".join(words).encode()
    cuts = sorted(rng.choices(range(len(data) + 1), k=rng.randrange(8)))
    tokens = [data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True)]
    owners, expected, first = steps_of_bytes(data), {}, 0
    for i, token in enumerate(tokens):
        step = owners[min(first, len(data) - 1)] if data else 0
        expected.setdefault(step, []).append(i)
        first += len(token)
    spans = [(members[0], members[-1] + 1) for members in expected.values()] if data.strip() else []
    assert split_steps(tokens + [b""] * eos, trailing_eos=eos) == spans
    assert sum(end - start for start, end in spans) == (len(tokens) if spans else 0)


def texts_of(tokenizer, seed=0):
    rng = random.Random(seed)
    letters = "abcd 0123+=\n\t éß数\U0001f600."
    return TEXTS + ["".join(rng.choices(letters, k=rng.randrange(1, 25))) for _ in range(300)]


def test_bytes_of_a_byte_level_tokenizer_are_those_of_its_text():
    tokenizer = byte_level()
    read = TokenBytes(tokenizer)
    split = 0
    for text in texts_of(tokenizer):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert b"".join(read(ids)) == text.encode() == tokenizer.decode(ids).encode()
        split += len(ids) > len(text) > 0
    assert split > 50  # characters of several tokens were among them


@pytest.mark.parametrize("prepend", ["first", "always", "never"])
def test_bytes_of_a_sentencepiece_tokenizer_are_those_of_its_text(prepend):
    """But for the space Metaspace writes before the first word, which its decoder takes away again."""
    tokenizer = sentencepiece(prepend)
    read = TokenBytes(tokenizer)
    for text in texts_of(tokenizer):
        ids = tokenizer.encode(text, add_special_tokens=False)
        joined = b"".join(read(ids))
        decoded = tokenizer.decode(ids).encode()
        if prepend == "never":
            assert joined == decoded == text.encode()
        else:
            assert joined == text.encode() if text.startswith(" ") else joined == b" " * bool(text) + text.encode()
            assert joined.removeprefix(b" ") == decoded


def test_a_character_split_over_tokens_is_whole_in_its_step():
    tokenizer = byte_level()
    ids = tokenizer.encode("é数\n½", add_special_tokens=False)
    assert TokenBytes(tokenizer)(ids) == [b"\xc3", b"\xa9", b"\xe6", b"\x95", b"\xb0", b"\n", b"\xc2", b"\xbd"]
    assert split_steps(TokenBytes(tokenizer)(ids)) == [(0, 6), (6, 8)]


def test_special_tokens_and_padded_rows_have_no_bytes():
    tokenizer = byte_level()
    newline = tokenizer.convert_tokens_to_ids("\u010a")
    assert TokenBytes(tokenizer)([0, 1, newline, len(tokenizer) + 7]) == [b"", b"", b"\n", b""]
    spare = sentencepiece()
    assert TokenBytes(spare)([1, 2 + 0x0A, 2 + 0xFF]) == [b"", b"\n", b"\xff"]


def test_added_tokens():
    """A special one has no bytes although it is none of the named ones; another's text is its own."""
    tokenizer = copy.deepcopy(byte_level())
    tokenizer.add_tokens([AddedToken("<|turn|>", special=True), "<tool>"])
    ids = tokenizer.encode("1<|turn|><tool>2", add_special_tokens=False)
    assert TokenBytes(tokenizer)(ids) == [b"1", b"", b"<tool>", b"2"]


def test_a_tokenizer_whose_bytes_cannot_be_told_is_refused():
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    backend.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match="tokenizer: cannot tell the bytes of tokens decoded by WordPiece"):
        TokenBytes(PreTrainedTokenizerFast(tokenizer_object=backend))
    backend.decoder = None
    with pytest.raises(ValueError, match="cannot tell the bytes of tokens decoded by None"):
        TokenBytes(PreTrainedTokenizerFast(tokenizer_object=backend))
