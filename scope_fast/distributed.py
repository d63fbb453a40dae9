"""One process or many: who is who under torchrun, and the few collectives of plain values that the loop needs.

Everything here works without a process group too, where the world is one process: callers never ask which it is.
Tensors of the model never pass through here; sharding.py and the weight sync move those.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def under_torchrun() -> bool:
    """Whether this process was started by torchrun as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def claim_gpu() -> None:
    """Under torchrun, leaves this rank the one GPU that is its own. Before anything has asked CUDA for its devices.

    vLLM takes the first GPU it sees for an engine of one, whatever device is current: all ranks' engines, and the
    servers they start, would share GPU 0. Where the launcher gave each rank its own, there is nothing to do.
    """
    if not under_torchrun():
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")  # "": none, and it stays so
    names = [str(i) for i in range(ranks_per_node())] if visible is None else visible.split(",")
    if len(names) > 1:
        local = int(os.environ["LOCAL_RANK"])
        if local >= len(names):
            raise ValueError(f"CUDA_VISIBLE_DEVICES={visible}: no GPU for local rank {local}")
        os.environ["CUDA_VISIBLE_DEVICES"] = names[local]


@contextmanager
def process_group(timeout_s: float) -> Iterator[None]:
    """The default process group of a torchrun job while the body runs; nothing in a lone process.

    timeout_s: longest wait of any collective, after which it raises. gloo serves CPU tensors and plain values, NCCL the
    GPU's. Made before any engine: vLLM makes a group of its own where it finds none.
    """
    if not under_torchrun():
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    try:
        yield
    finally:
        dist.destroy_process_group()


def leave(status: int) -> NoReturn:
    """Ends this process after its exit handlers, without the interpreter's shutdown: what one of several ranks does.

    A gloo thread may still hold the last collective's tensor, and letting go of it takes the interpreter's lock: during
    a shutdown that ends the thread, and the process with it, by abort() (torch 2.13, ProcessGroupGloo::runLoop; a
    barrier before destroy_process_group does not help, as a mesh keeps those threads). torchrun would take a rank that
    ends so for a failure, and stop the others, rank 0 and its report among them. Other threads are not waited for.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Rank 0 writes files and talks to the person."""
    return rank() == 0


def ranks_per_node() -> int:
    """Ranks that torchrun started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size())))


def device() -> torch.device:
    """Where this rank's learner and reward model live: the one GPU it sees after `claim_gpu`."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def barrier() -> None:
    """Waits for every rank."""
    if dist.is_initialized():
        dist.barrier()


def agree(value: T) -> T:
    """Rank 0's value, on every rank."""
    box = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(box, src=0)
    return box[0]


def gather_on_main(value: T) -> list[T] | None:
    """Every rank's value, in the order of the ranks, on rank 0; None on the others."""
    if not dist.is_initialized():
        return [value]
    values: list | None = [None] * world_size() if is_main() else None
    dist.gather_object(value, values, dst=0)
    return values


def gather(value: T) -> list[T]:
    """Every rank's value, in the order of the ranks, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
