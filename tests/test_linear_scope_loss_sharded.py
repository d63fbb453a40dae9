"""A DTensor head: every rank's tokens reach the whole weight, and its gradient is the sum over ranks, sharded again."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from opcases import Case, make_case
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from scope_fast import LossOptions, TokenStreams, distributed, linear_logprob, linear_scope_loss

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
T, RANKS = 12, 2


def part_of(case: Case, rank: int) -> tuple[torch.Tensor, TokenStreams]:
    """Rank 0 takes 3 rows, rank 1 the other 9."""
    rows = slice(0, 3) if rank == 0 else slice(3, T)
    streams = TokenStreams(**{k: None if v is None else v[rows] for k, v in vars(case.streams).items()})
    return case.hidden.detach()[rows].requires_grad_(), streams


def run_rank(rank: int, meeting_point: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=RANKS)
    case = make_case(T)
    mesh = init_device_mesh("cpu", (RANKS,))
    weight = distribute_tensor(case.weight.detach(), mesh, [Shard(0)]).requires_grad_()
    hidden, streams = part_of(case, rank)
    loss, _ = linear_scope_loss(hidden, weight, streams, LossOptions(), backend="reference")
    loss.backward()

    whole, _ = linear_scope_loss(case.hidden, case.weight, case.streams, LossOptions(), backend="reference")
    dhidden, dweight = torch.autograd.grad(whole, case.leaves())
    rows = slice(0, 3) if rank == 0 else slice(3, T)
    torch.testing.assert_close(hidden.grad, dhidden[rows])
    torch.testing.assert_close(weight.grad.full_tensor(), dweight)

    hidden.grad = weight.grad = None
    linear_logprob(hidden, weight, streams.target, backend="reference").logprob.square().sum().backward()
    whole = linear_logprob(case.hidden, case.weight, case.streams.target, backend="reference").logprob.square().sum()
    dhidden, dweight = torch.autograd.grad(whole, case.leaves())
    torch.testing.assert_close(hidden.grad, dhidden[rows])
    torch.testing.assert_close(weight.grad.full_tensor(), dweight)
    dist.destroy_process_group()
    distributed.leave(0)


def test_gradient_is_the_sum_over_ranks(tmp_path):
    mp.spawn(run_rank, args=(str(tmp_path / "rendezvous"),), nprocs=RANKS)
