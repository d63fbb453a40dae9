"""The C++ copies of weight_bucket where shares, casts and threads show; the contract is in test_weight_bucket.py."""

import pytest
import torch

from scope_fast import native, weight_bucket

pytestmark = pytest.mark.skipif(not native.has("weight_bucket_copy", "cpu"), reason=native.missing())
SHARE_ELEMENTS = (256 << 10) // 2  # a thread's least share, in bfloat16


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def ragged(dtype: torch.dtype) -> list[torch.Tensor]:
    """Sizes around a thread's share, around a vector, and nothing; the values are a count, so that a shift shows."""
    sizes = (0, 1, 15, 17, SHARE_ELEMENTS - 1, 3, SHARE_ELEMENTS + 1, 4 * SHARE_ELEMENTS + 7, 2)
    ends = torch.tensor(sizes).cumsum(0).tolist()
    count = torch.arange(ends[-1], dtype=torch.float64) % 1021 / 7
    return [count[end - size : end].to(dtype) for size, end in zip(sizes, ends, strict=True)]


@pytest.mark.parametrize("num_threads", [1, 2, 7])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("wire", [None, torch.float32, torch.bfloat16], ids=str)
def test_every_share_of_every_cast(threads, source, wire, num_threads):
    threads(num_threads)
    tensors = ragged(source)
    buffer, table = weight_bucket.pack(tensors, wire, backend="cpu")
    for tensor, back in zip(tensors, weight_bucket.unpack(buffer, table), strict=True):
        assert torch.equal(back, tensor.to(wire or source))


def test_rounding_is_torchs():
    """Every bfloat16 tie and its neighbours, subnormals, infinities and NaN: the same bits as Tensor.to."""
    r = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1 << 20,), generator=r).int()
    ties = (bits & ~0xFFFF) | torch.tensor([0x7FFF, 0x8000, 0x8001], dtype=torch.int32).repeat(1 << 19)[: 1 << 20]
    for pattern in (bits, ties):
        x = pattern.view(torch.float32)
        buffer, table = weight_bucket.pack([x], torch.bfloat16, backend="cpu")
        (back,) = weight_bucket.unpack(buffer, table)
        number = ~x.isnan()
        assert torch.equal(back.view(torch.int16)[number], x.bfloat16().view(torch.int16)[number])
        assert back[~number].isnan().all()


def test_all_bfloat16_widen_exactly():
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    buffer, table = weight_bucket.pack([x], torch.float32, backend="cpu")
    (back,) = weight_bucket.unpack(buffer, table)
    assert torch.equal(back.view(torch.int32), x.float().view(torch.int32))


def test_unaligned_sources():
    """A view that starts in the middle of a vector."""
    base = torch.arange(100_003, dtype=torch.float32)
    for start in (1, 2, 3, 5):
        buffer, table = weight_bucket.pack([base[start:]], torch.bfloat16, backend="cpu")
        assert torch.equal(weight_bucket.unpack(buffer, table)[0], base[start:].bfloat16())


def test_lists_that_disagree_raise():
    with pytest.raises(ValueError, match="2 sources for 1 destinations"):
        torch.ops.scope_fast_native.weight_bucket_copy([torch.ones(1)] * 2, [torch.ones(1)])
