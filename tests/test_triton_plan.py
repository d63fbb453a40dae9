"""The chunk plan: the byte budget holds, sizes fill whole waves, and the anchors' good sizes are found."""

import pytest

plan = pytest.importorskip("scope_fast.kernels.plan")
GIB = 1 << 30


def test_cost_by_hand():
    """1024 rows at D = 4096 on 132 processors: 8 * 16 = 128 tiles, one wave, worth 132 * 128 * 256 / 4096 rows."""
    assert plan.chunk_cost(1024, 4096, 132) == 1024 + 132 * 8 + 1024 + 1064
    assert plan.chunk_cost(1025, 4096, 132) == 1025 + 2 * 132 * 8 + 1025 + 1064  # one tile row more is a second wave


def test_small_batches_are_one_chunk():
    assert plan.chunk_rows(100, 4096, 4 * 151936, 132, GIB) == 100
    assert plan.chunk_rows(1, 64, 8, 132, GIB) == 1
    assert plan.chunk_rows(0, 64, 8, 132, GIB) == 1


@pytest.mark.parametrize("num_rows", [129, 1000, 8192, 100_000])
@pytest.mark.parametrize(("dim", "row_bytes"), [(4096, 4 * 151936), (3584, 2 * 152064), (64, 4 * 151)])
@pytest.mark.parametrize("budget", [1 << 20, GIB, 4 * GIB])
def test_the_budget_holds(num_rows, dim, row_bytes, budget):
    size = plan.chunk_rows(num_rows, dim, row_bytes, 132, budget)
    assert 1 <= size <= num_rows
    assert size == 1 or size * row_bytes <= budget
    assert size % 128 == 0 or size == num_rows or size * row_bytes <= budget < 128 * row_bytes


def test_known_good_sizes():
    """H100, Qwen2.5-7B's head: two chunks of 18-wave-filling rows within 4 GiB; one where bfloat16 logits fit."""
    assert plan.chunk_rows(8192, 3584, 4 * 152064, 132, 4 * GIB) == 4608
    assert plan.chunk_rows(8192, 3584, 2 * 152064, 132, 4 * GIB) == 8192
    assert plan.chunk_rows(32768, 1536, 4 * 151936, 132, 2 * GIB) == 2816


def test_budget_follows_the_device():
    assert plan.budget_bytes(None) == 4 * GIB
    assert plan.budget_bytes(80 * GIB) == 4 * GIB
    assert plan.budget_bytes(40 * GIB) == 2 * GIB
