"""The first error, the prefix kept, near misses; and that step_pool finds the same first error."""

import math
import random
from itertools import pairwise

import pytest
import torch

from scope_fast import PrmHead, step_pool
from scope_fast.scope.localize import first_error, is_near_miss, kept_steps, valid_probs

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("probs", "tau", "expected"),
    [
        ([0.9, 0.8, 0.7], 0.5, 3),
        ([0.9, 0.4, 0.7], 0.5, 1),
        ([0.4, 0.9], 0.5, 0),
        ([0.5, 0.5], 0.5, 2),  # p == tau stands
        ([0.5, math.nextafter(0.5, 0)], 0.5, 1),
        ([0.9, NAN, 0.9], 0.5, 1),
        ([0.0], 0.0, 1),
        ([1.0, 0.999], 1.0, 1),
        ([], 0.5, 0),
    ],
)
def test_first_error(probs, tau, expected):
    assert first_error(probs, tau) == expected


def test_tau_is_half_by_default():
    assert first_error([0.5, 0.49]) == 1


@pytest.mark.parametrize("bad", [NAN, INF, -INF, -1e-9, math.nextafter(1.0, 2)])
def test_what_is_no_probability(bad):
    assert not valid_probs([0.5, bad], 2)
    assert not valid_probs([bad], 1)


def test_what_is_one():
    assert valid_probs([0.0, 1.0, 0.5], 3) and not valid_probs([0.0, 1.0, 0.5], 2)
    assert valid_probs([], 0) and not valid_probs([], 1)


@pytest.mark.parametrize(
    ("error", "steps", "kept"),
    [
        (0, 3, 0),
        (1, 3, 1),
        (2, 3, 2),
        (3, 3, 2),  # nothing found wrong, yet the answer is: the last step is not believed
        (1, 1, 0),
        (0, 1, 0),
        (0, 0, 0),
    ],
)
def test_kept_steps(error, steps, kept):
    assert kept_steps(error, steps) == kept


@pytest.mark.parametrize(
    ("error", "steps", "near"),
    [
        (1, 2, True),
        (2, 2, True),
        (0, 2, False),
        (2, 4, False),
        (3, 4, True),
        (0, 1, False),
        (1, 1, False),
        (0, 0, False),
    ],
)
def test_a_near_miss_has_only_its_last_step_wrong(error, steps, near):
    assert is_near_miss(error, steps) is near


def test_step_pool_finds_the_same_first_error():
    """1000 random lists through the op, a one-dimensional hidden state being the logit; ties with tau included."""
    rng = random.Random(0)
    lists = [[rng.choice((0.0, rng.gauss(1.0, 1.0), NAN)) for _ in range(rng.randrange(8))] for _ in range(1000)]
    logits = torch.tensor([z for values in lists for z in values])
    ends = torch.tensor([0] + [len(values) for values in lists]).cumsum(0)
    pooled = step_pool(logits[:, None], PrmHead(torch.ones(1, 1)), torch.arange(len(logits)), ends, tau=0.5)
    probs = [pooled.prob[a:b].tolist() for a, b in pairwise(ends)]
    assert pooled.first_error.tolist() == [first_error(values, 0.5) for values in probs]
    assert sum(p == 0.5 for values in probs for p in values) > 500
    assert len(set(pooled.first_error.tolist())) > 5
