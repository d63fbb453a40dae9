"""The call of LigerFusedLinearGRPOLoss against Liger's own module: losses, gradients, metrics."""

import pytest
import torch

from scope_fast.integrations.liger import LOSS_TYPES, LigerFusedLinearGRPOLoss

B, T, D, V = 4, 7, 16, 50


def problem(seed=0, **changes):
    """Arguments of the call: padded rows, one sequence without a token, one of zero advantage, ratios off 1."""
    r = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return scale * torch.randn(*shape, generator=r)

    mask = torch.ones(B, T, dtype=torch.long)
    mask[1, 4:] = 0
    mask[2] = 0
    advantages = normal(B)
    advantages[3] = 0.0
    hidden, weight = normal(B, T, D).requires_grad_(), normal(V, D, scale=0.3).requires_grad_()
    target = torch.randint(0, V, (B, T), generator=r)
    near = (hidden.detach() @ weight.detach().T).log_softmax(-1).gather(2, target[:, :, None]).squeeze(2)
    arguments = dict(
        _input=hidden, lin_weight=weight, selected_token_ids=target, attention_mask=mask, advantages=advantages,
        old_per_token_logps=near + normal(B, T, scale=0.3), ref_per_token_logps=near + normal(B, T, scale=0.3),
    )  # fmt: skip
    return arguments | changes


def run(module, arguments):
    loss, metrics = module(**arguments)
    leaves = [x for x in arguments.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    (1.7 * loss).backward()
    gradients = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return loss.detach(), tuple(metrics), gradients


def assert_same(options, arguments, has_gradient=True):
    liger = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
    theirs = run(liger.LigerFusedLinearGRPOLoss(compiled=False, **options), arguments)
    mine = run(LigerFusedLinearGRPOLoss(compiled=False, **options), arguments)
    torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)
    assert (theirs[2][0].abs().max() > 1e-3) == has_gradient


@pytest.mark.parametrize("beta", [0.0, 0.04])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_same_numbers(loss_type, beta):
    options = dict(loss_type=loss_type, beta=beta, max_completion_length=9, temperature=0.8, epsilon_high=0.28)
    assert_same(options, problem())


@pytest.mark.parametrize(
    "changes",
    [
        dict(old_per_token_logps=None),
        dict(vllm_is_ratio=torch.rand(B, T, generator=torch.Generator().manual_seed(5)) + 0.5),
        dict(vllm_is_ratio=torch.tensor([0.5, 2.0, 1.0, 1.5])),
        dict(vllm_is_ratio=torch.tensor([[0.5], [2.0], [1.0], [1.5]])),
        dict(num_items_in_batch=torch.tensor(40)),
        dict(num_items_in_batch=0),
        dict(bias=torch.randn(V, generator=torch.Generator().manual_seed(6)).requires_grad_()),
        dict(attention_mask=torch.zeros(B, T, dtype=torch.long)),
    ],
    ids=["on-policy", "ratio", "ratio-B", "ratio-B1", "items", "no-items", "bias", "all-masked"],
)
def test_same_numbers_for_every_argument(changes):
    arguments = problem(**changes)
    assert_same(dict(beta=0.04), arguments, has_gradient="attention_mask" not in changes)


def test_same_numbers_with_the_references_hidden_states():
    r = torch.Generator().manual_seed(7)
    changes = dict(
        ref_per_token_logps=None, ref_input=torch.randn(B, T, D, generator=r), ref_weight=torch.randn(V, D, generator=r)
    )
    assert_same(dict(beta=0.1, loss_type="grpo", temperature=1.3), problem(**changes))


def test_same_numbers_without_a_reference():
    assert_same(dict(beta=0.1, use_ref_model=False), problem(ref_per_token_logps=None))


def test_float32_heads_of_bfloat16_hidden_states():
    """As under autocast; Liger's logits are bfloat16 then, ours float32: equal up to their rounding."""
    liger = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
    r = torch.Generator().manual_seed(7)
    arguments = problem(
        bias=torch.randn(V, generator=r).requires_grad_(), ref_per_token_logps=None,
        ref_input=torch.randn(B, T, D, generator=r).bfloat16(), ref_weight=torch.randn(V, D, generator=r),
    )  # fmt: skip
    arguments["_input"] = arguments["_input"].detach().bfloat16().requires_grad_()
    theirs, mine = (
        run(cls(beta=0.04, compiled=False), arguments)
        for cls in (liger.LigerFusedLinearGRPOLoss, LigerFusedLinearGRPOLoss)
    )
    torch.testing.assert_close(mine, theirs, atol=5e-3, rtol=5e-2)  # dtypes too
    assert theirs[2][0].abs().max() > 2e-2


def test_rows_of_ratio_zero_have_no_gradient_and_are_not_clipped():
    """TRL's sequence masks; in Liger's metric they are."""
    liger = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
    arguments = problem(vllm_is_ratio=torch.tensor([0.0, 1.0, 1.0, 1.0]))
    arguments["old_per_token_logps"] -= 0.3
    theirs, mine = (
        run(cls(beta=0.0, use_ref_model=False, compiled=False), arguments)
        for cls in (liger.LigerFusedLinearGRPOLoss, LigerFusedLinearGRPOLoss)
    )
    torch.testing.assert_close((mine[0], mine[2]), (theirs[0], theirs[2]), atol=1e-6, rtol=1e-4)
    assert mine[1][0] < theirs[1][0]


def test_same_loss_with_two_sided_clipping():
    """The metric differs: ours counts tokens above delta as clipped, which they are, Liger does not."""
    liger = pytest.importorskip("liger_kernel.chunked_loss", reason="liger-kernel is not installed")
    options, arguments = dict(delta=1.3, beta=0.0, use_ref_model=False, compiled=False), problem()
    arguments["old_per_token_logps"] -= 0.5
    theirs, mine = (
        run(cls(**options), arguments) for cls in (liger.LigerFusedLinearGRPOLoss, LigerFusedLinearGRPOLoss)
    )
    torch.testing.assert_close((mine[0], mine[2]), (theirs[0], theirs[2]), atol=1e-6, rtol=1e-4)
    assert mine[1][0] > theirs[1][0]


def test_a_frozen_head_gets_no_gradient():
    arguments = problem()
    arguments["lin_weight"] = arguments["lin_weight"].detach()
    _, _, gradients = run(LigerFusedLinearGRPOLoss(beta=0.0), arguments)
    assert len(gradients) == 1 and gradients[0].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *((dict(loss_type=name), f"loss_type='{name}' is not supported") for name in ("luspo", "vespo", "sapo", "x")),
        (dict(importance_sampling_level="sequence"), "importance_sampling_level='sequence' is not supported"),
        (dict(use_bias_correction_kl=True), "use_bias_correction_kl=True is not supported"),
        (dict(delta=1.1), "delta=1.1: expected a value above"),
        (dict(loss_type="dr_grpo"), "max_completion_length is None"),
    ],
)
def test_what_it_cannot_do_raises_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        LigerFusedLinearGRPOLoss(**options)


def test_a_kl_without_a_reference_is_refused():
    with pytest.raises(ValueError, match=r"beta=0\.04 needs ref_per_token_logps, or ref_input and ref_weight"):
        LigerFusedLinearGRPOLoss()(**problem(ref_per_token_logps=None))
