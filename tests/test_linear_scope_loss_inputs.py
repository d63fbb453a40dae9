"""linear_scope_loss: what it accepts (autocast, backends) and what it refuses, each message naming the argument."""

import math

import pytest
import torch
from opcases import INTERPRETED, Case, gradients, make_case

from scope_fast import LossOptions, linear_scope_loss
from scope_fast.ops import dispatch


def run(case: Case, options=None, **kwargs):
    return linear_scope_loss(
        case.hidden, case.weight, case.streams, options or LossOptions(), bias=case.bias, backend="reference", **kwargs
    )


def test_autocast_casts_the_inputs():
    case = make_case().to(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = run(case)
    grads = gradients(loss, case)
    cast = case.to(torch.bfloat16)
    expected, _ = run(cast)
    assert torch.equal(loss, expected)
    for ours, true in zip(grads, gradients(expected, cast), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, true.float())


def test_mixed_dtypes_are_fine_under_autocast_only():
    case = make_case()
    mixed = (case.hidden.bfloat16(), case.weight.float())
    with pytest.raises(ValueError, match=r"weight is torch\.float32, hidden is torch.bfloat16"):
        linear_scope_loss(*mixed, case.streams)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert linear_scope_loss(*mixed, case.streams)[0].isfinite()


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"target": torch.zeros(4, dtype=torch.int64)}, {}, r"target \(4,\): expected \(13,\), one per row of hidden"),
        ({"target": torch.zeros(13)}, {}, "target is torch.float32: expected torch.int64"),
        ({"segment": torch.zeros(13)}, {}, "segment is torch.float32: expected torch.uint8"),
        ({"old_logprob": torch.zeros(12)}, {}, r"old_logprob \(12,\): expected \(13,\), like target"),
        ({"loss_weight": torch.zeros(13, dtype=torch.int64)}, {}, "loss_weight is torch.int64: expected torch.float32"),
        ({"advantage": None}, {}, r"advantage is None, but segment \(13,\) has RL rows"),
        ({"ref_logprob": None}, {"kl": "k1", "kl_coef": 0.1}, "ref_logprob is None: kl_coef=0.1 needs it"),
        ({"rollout_logprob": None}, {"importance_cap": 2.0}, "rollout_logprob is None: importance_cap=2.0 needs it"),
        ({"active": torch.zeros(3)}, {}, r"active \(3,\) torch.float32 on cpu: expected \(n,\) int64"),
    ],
)
def test_bad_streams_are_named(change, options, message):
    with pytest.raises(ValueError, match=message):
        run(make_case().with_streams(**change), LossOptions(**options))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": torch.full((13,), 19)}, r"target holds 19: expected values in \[0, 19\)"),
        ({"target": torch.full((13,), -1)}, "target holds -1"),
        ({"segment": torch.full((13,), 3, dtype=torch.uint8)}, "segment holds 3"),
        ({"loss_weight": torch.full((13,), math.inf)}, r"loss_weight \(\d+,\) holds \d+ non-finite values"),
        ({"advantage": torch.full((13,), math.nan)}, "advantage .* non-finite"),
        ({"old_logprob": torch.full((13,), math.nan)}, "old_logprob .* non-finite"),
        ({"temperature": torch.zeros(13)}, "temperature holds 0.0: expected values above 0"),
        ({"active": torch.tensor([2, 1])}, "active .* not strictly ascending"),
        ({"active": torch.tensor([2, 13])}, r"active holds 13: expected rows in \[0, 13\)"),
    ],
)
def test_check_names_bad_values(change, message):
    with pytest.raises(ValueError, match=message):
        run(make_case(segments=(1, 2)).with_streams(**change), check=True)


def test_check_passes_good_values_and_garbage_where_it_does_not_apply():
    case = make_case(T=30, temperature=True)
    s, idle, rl = case.streams, case.streams.segment == 0, case.streams.segment == 1
    dirty = case.with_streams(
        target=torch.where(idle, -100, s.target),
        loss_weight=torch.where(idle, math.nan, s.loss_weight),
        temperature=torch.where(idle, math.nan, s.temperature),
        advantage=torch.where(rl, s.advantage, math.nan),
        rollout_logprob=torch.where(rl, s.rollout_logprob, math.nan),
    )
    assert torch.equal(run(dirty, check=True)[0], run(dirty)[0])


def test_check_names_non_finite_hidden():
    case = make_case()
    hidden = case.hidden.detach().clone()
    hidden[0, 0] = math.inf
    with pytest.raises(ValueError, match=r"hidden \(13, 7\) holds 1 non-finite values"):
        run(Case(hidden, case.weight, None, case.streams), check=True)


def test_bad_shapes_and_dtypes_are_named():
    case = make_case()
    with pytest.raises(ValueError, match=r"hidden \(13, 7\) and weight \(19, 6\): expected \(T, D\) and \(V, D\)"):
        linear_scope_loss(case.hidden, case.weight[:, :6], case.streams)
    with pytest.raises(ValueError, match=r"bias \(18,\) and weight \(19, 7\)"):
        linear_scope_loss(case.hidden, case.weight, case.streams, bias=torch.zeros(18, dtype=torch.float64))
    with pytest.raises(ValueError, match="float16: gradients formed in the forward would underflow"):
        linear_scope_loss(case.hidden.half(), case.weight.half(), case.streams)
    with pytest.raises(ValueError, match=r"hidden is torch\.int64"):
        linear_scope_loss(case.hidden.long(), case.weight.long(), case.streams)


def test_backend_choice():
    case = make_case()
    with pytest.raises(ValueError, match="backend='fastest': expected None or one of reference, triton, cpu, cuda"):
        linear_scope_loss(case.hidden, case.weight, case.streams, backend="fastest")
    if not INTERPRETED:
        reason = (
            "backend='triton' is unavailable for cpu tensors: Triton runs CPU tensors only under TRITON_INTERPRET=1"
        )
        with pytest.raises(RuntimeError, match=reason):
            linear_scope_loss(case.hidden, case.weight, case.streams, backend="triton")
    with pytest.raises(RuntimeError, match="backend='cuda' is unavailable for cpu tensors"):
        linear_scope_loss(case.hidden, case.weight, case.streams, backend="cuda")
    automatic, _ = linear_scope_loss(case.hidden, case.weight, case.streams)
    torch.testing.assert_close(automatic, run(case)[0])


@pytest.mark.skipif(INTERPRETED, reason="asks for CUDA tensors")
def test_the_cuda_rows_are_for_gpus_that_can_hold_one(monkeypatch, request):
    """Of every GPU: the answer is for all tensors of the process. Triton serves the others."""
    request.addfinalizer(dispatch.resolve.cache_clear)
    monkeypatch.setattr(dispatch.native, "has", lambda name, device_type: True)
    monkeypatch.setattr(dispatch, "_missing_triton", lambda stem, device_type: "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dispatch.native, "clusters_fit", lambda: True)
    for gpus, chosen in (
        ([(9, 0)], "cuda"),
        ([(9, 0), (10, 3)], "cuda"),
        ([(9, 0), (12, 0)], "triton"),
        ([(8, 0)], "triton"),
    ):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: len(gpus))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i, gpus=gpus: gpus[i])
        dispatch.resolve.cache_clear()
        assert dispatch.resolve("linear_scope_loss", dispatch.AUTO, "cuda") == chosen
        if chosen == "triton":
            with pytest.raises(RuntimeError, match=f"GPU {len(gpus) - 1} has {gpus[-1][0]}.0"):
                dispatch.resolve("linear_scope_loss", "cuda", "cuda")
    monkeypatch.setattr(dispatch.native, "clusters_fit", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: (9, 0))
    dispatch.resolve.cache_clear()
    assert dispatch.resolve("linear_scope_loss", dispatch.AUTO, "cuda") == "triton"
    with pytest.raises(RuntimeError, match="built without clusters for this GPU"):
        dispatch.resolve("linear_scope_loss", "cuda", "cuda")


def test_choice_is_logged_once_with_its_reason(caplog):
    dispatch.resolve.cache_clear()
    with caplog.at_level("INFO", logger="scope_fast"):
        chosen = [dispatch.resolve("scope_loss", dispatch.AUTO, "meta") for _ in range(3)]
    assert chosen == ["reference"] * 3
    assert len(caplog.records) == 1
    assert "scope_loss on meta tensors: backend reference (" in caplog.text
