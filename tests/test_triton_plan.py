"""The chunk plan: the byte budget holds, sizes fill whole waves, and the anchors' good sizes are found."""

import itertools

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


def test_one_chunk_where_a_float32_dweight_would_have_been():
    """Qwen2.5-7B's head, 8192 rows: 2.3 GiB of gradient and 0.6 of logits, where 2.0 of dW and 1 are allowed."""
    assert plan.LOGIT_ROWS == 1024

    def rows(num_rows, dim, size, *itemsizes, memory=80 * GIB):
        return plan.rows_at_a_time(num_rows, dim, size, *itemsizes, 132, memory)

    assert rows(8192, 3584, 152064, 4, 2) == (8192, 1024)
    assert rows(8192, 3584, 152064, 2, 2) == (8192, 8192)  # in place: one dtype
    assert rows(8192, 3584, 152064, 4, 4) == (4608, 4608)
    assert rows(2048, 3584, 152064, 4, 2) == (2048, 2048)  # 2048 * 2 + 1024 * 4 = 2048 * 4
    assert rows(2049, 3584, 152064, 4, 2) == (2049, 1024)
    assert rows(32768, 1536, 151936, 4, 2) == (2816, 1024)
    assert rows(0, 3584, 152064, 4, 2) == (1, 1)
    assert rows(8192, 3584, 152064, 4, 2, memory=40 * GIB)[0] < 8192  # of which 2 GiB may be used


@pytest.mark.parametrize("memory", [None, 1 << 30, 24 * GIB, 80 * GIB])
@pytest.mark.parametrize(("logit_bytes", "gradient_bytes"), [(4, 2), (2, 2), (4, 4)])
def test_no_plan_takes_more_than_a_float32_dweight_and_extra(memory, logit_bytes, gradient_bytes):
    shapes = itertools.product((1, 129, 2049, 8192, 100_000), (64, 1536, 3584), (151, 32000, 152064), (True, False))
    for num_rows, dim, size, dense in shapes:
        beside = 0 if dense else 4 * dim
        chunk, rows = plan.rows_at_a_time(num_rows, dim, size, logit_bytes, gradient_bytes, 132, memory, beside)
        assert 1 <= rows <= chunk <= num_rows
        buffers = size * (rows * logit_bytes + (rows < chunk) * chunk * gradient_bytes) + chunk * beside
        assert memory is None or buffers <= memory // plan.SHARE or chunk == 1
        if chunk < num_rows and gradient_bytes < 4:
            buffers += size * dim * (4 - gradient_bytes)  # the sum, before the gradient that is returned exists
        assert buffers <= plan.EXTRA_BYTES + 4 * size * dim or chunk == 1


def test_the_budget_follows_the_device():
    assert plan.within(4 * GIB, None) == 4 * GIB
    assert plan.within(4 * GIB, 80 * GIB) == 4 * GIB
    assert plan.within(4 * GIB, 40 * GIB) == 2 * GIB
