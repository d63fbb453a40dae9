"""weight_bucket: what is packed comes back bit for bit or cast once, from any layout."""

import pytest
import torch
from opcases import places

from scope_fast import weight_bucket
from scope_fast.ops.weight_bucket import ALIGNMENT_BYTES, weight_bucket_pack_op

on_places = places("weight_bucket_copy", cuda="weight_bucket")


def make_tensors(device="cpu"):
    r = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(3, 5, generator=r),
        torch.randn(1000, generator=r).bfloat16(),
        torch.randn((), generator=r),
        torch.empty(0, 7),
        torch.randn(130, 70, generator=r, dtype=torch.float64),
        torch.arange(9),
        torch.tensor([True, False]),
        torch.randn(64, 33, generator=r).T,  # not contiguous
        torch.randn(40, 40, generator=r)[::2, 1::3],
    ]
    return [x.to(device) for x in tensors]


@on_places
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32, torch.float16])
def test_round_trip(place, dtype):
    tensors = make_tensors(place.device)
    buffer, table = weight_bucket.pack(tensors, dtype, backend=place.backend)
    assert buffer.dtype == torch.uint8
    for tensor, back in zip(tensors, weight_bucket.unpack(buffer, table), strict=True):
        assert torch.equal(back, tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor)


@on_places
@pytest.mark.parametrize(
    ("source", "wire"),
    [
        (torch.float8_e4m3fn, None),
        (torch.float8_e4m3fn, torch.bfloat16),
        (torch.float32, torch.float8_e5m2),
        (torch.complex64, None),
        (torch.complex128, None),
    ],
)
def test_dtypes_that_kernels_have_no_arithmetic_for(place, source, wire):
    tensor = torch.tensor([1.0, 2.0, -0.5], device=place.device).to(source)
    buffer, table = weight_bucket.pack([tensor, tensor[0]], wire, backend=place.backend)
    for packed, back in zip((tensor, tensor[0]), weight_bucket.unpack(buffer, table), strict=True):
        expected = packed.to(wire) if wire else packed
        assert back.dtype == expected.dtype
        assert torch.equal(back.to(torch.complex128), expected.to(torch.complex128))


@on_places
def test_layout_by_hand(place):
    a, b = torch.tensor([1.0, 2.0], device=place.device), torch.tensor([3.0], device=place.device)
    buffer, table = weight_bucket.pack([a, b], backend=place.backend)
    assert [tuple(e) for e in table] == [(0, (2,), torch.float32), (ALIGNMENT_BYTES, (1,), torch.float32)]
    expected = torch.zeros(2 * ALIGNMENT_BYTES // 4)
    expected[:2], expected[ALIGNMENT_BYTES // 4] = torch.tensor([1.0, 2.0]), 3.0
    assert torch.equal(buffer.view(torch.float32).cpu(), expected)


@on_places
def test_equal_tensors_make_equal_bytes_in_a_dirty_buffer(place):
    tensors = make_tensors(place.device)
    fresh, table = weight_bucket.pack(tensors, backend=place.backend)
    dirty = torch.full((fresh.numel() + 100,), 255, dtype=torch.uint8, device=place.device)
    again, same_table = weight_bucket.pack(tensors, out=dirty, backend=place.backend)
    assert torch.equal(fresh, again) and table == same_table
    assert again.data_ptr() == dirty.data_ptr()
    assert dirty[fresh.numel() :].eq(255).all()


def test_all_gaps_are_cleared_at_once(monkeypatch):
    """On a GPU each call is a launch, and a hundred tensors are to take one."""
    clear, cleared = torch._foreach_zero_, []

    def counted(gaps):
        cleared.append(len(gaps))
        clear(gaps)

    monkeypatch.setattr(torch, "_foreach_zero_", counted)
    monkeypatch.setattr(torch.Tensor, "zero_", None)
    tensors = [torch.ones(33) for _ in range(100)]
    dirty = torch.full((100 * 2 * ALIGNMENT_BYTES,), 255, dtype=torch.uint8)
    buffer, _ = weight_bucket.pack(tensors, out=dirty)
    assert cleared == [100]
    rows = buffer.view(torch.float32).view(100, -1)
    assert rows[:, :33].eq(1.0).all() and rows[:, 33:].eq(0.0).all() and rows.shape[1] > 33


@on_places
def test_a_bucket_in_the_middle_of_a_buffer(place):
    """Starts on no vector's boundary, so nothing may be moved 16 bytes at a time; the bytes around it stay."""
    tensors = [torch.arange(9000.0, device=place.device), torch.arange(7.0, device=place.device)]
    _, size_bytes = weight_bucket.layout(tensors)
    whole = torch.full((size_bytes + 8,), 255, dtype=torch.uint8, device=place.device)
    bucket, table = weight_bucket.pack(tensors, out=whole[4:-4], backend=place.backend)
    assert bucket.data_ptr() % 16 == 4
    for tensor, back in zip(tensors, weight_bucket.unpack(bucket, table), strict=True):
        assert torch.equal(back, tensor)
    assert whole[:4].eq(255).all() and whole[-4:].eq(255).all()


@on_places
def test_views_share_the_buffer(place):
    buffer, table = weight_bucket.pack([torch.zeros(4, device=place.device)], backend=place.backend)
    weight_bucket.unpack(buffer, table)[0].fill_(1.0)
    assert torch.equal(buffer[:16].view(torch.float32).cpu(), torch.ones(4))


@on_places
def test_special_values_survive(place):
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0, 1e-40, 3.4e38], device=place.device)
    for dtype in (None, torch.bfloat16):
        buffer, table = weight_bucket.pack([special], dtype, backend=place.backend)
        (back,) = weight_bucket.unpack(buffer, table)
        torch.testing.assert_close(
            back, special if dtype is None else special.to(dtype), equal_nan=True, rtol=0, atol=0
        )
        assert back[3].signbit()


def test_parameters_are_packed_without_a_graph():
    parameter = torch.nn.Parameter(torch.ones(3))
    buffer, table = weight_bucket.pack([parameter])
    assert not buffer.requires_grad
    assert torch.equal(weight_bucket.unpack(buffer, table)[0], torch.ones(3))


def test_nothing_to_pack():
    buffer, table = weight_bucket.pack([])
    assert buffer.numel() == 0 and table == [] and weight_bucket.unpack(buffer, table) == []


@on_places
def test_opcheck(place):
    tensors = [torch.ones(3, device=place.device), torch.ones(2, 2, device=place.device)]
    _, size_bytes = weight_bucket.layout(tensors)
    buffer = torch.zeros(size_bytes, dtype=torch.uint8, device=place.device)
    torch.library.opcheck(weight_bucket_pack_op, (tensors, buffer, None, place.backend))


def test_errors_name_the_argument():
    tensors = [torch.ones(3)]
    buffer, table = weight_bucket.pack(tensors)
    for message, call in {
        r"out \(4,\) torch.uint8: expected a contiguous uint8 buffer of \(128,\)": lambda: weight_bucket.pack(
            tensors, out=torch.empty(4, dtype=torch.uint8)
        ),
        r"out \(200,\) torch.float32": lambda: weight_bucket.pack(tensors, out=torch.empty(200)),
        r"tensors\[1\] is on meta, the bucket on cpu": lambda: weight_bucket.pack(
            [*tensors, torch.ones(1, device="meta")]
        ),
        r"tensors\[0\] \(1,\) holds 1 non-finite": lambda: weight_bucket.pack([torch.tensor([torch.nan])], check=True),
        r"buffer \(8,\) ends before the tensor \(3,\): expected \(12,\)": lambda: weight_bucket.unpack(
            buffer[:8], table
        ),
        r"buffer \(32,\) torch.float32": lambda: weight_bucket.unpack(buffer.view(torch.float32), table),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
