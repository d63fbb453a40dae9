"""Which backend carries the weights to a server, and the trainer-side init object that makes vLLM use it.

    shm   a file in shared memory: on CPU                                                     (ours, weight_sync.py)
    ipc   two processes on the same GPU: handles of device memory                            (vLLM's)
    nccl  an engine on GPUs of its own: broadcast from rank 0, on one machine or several      (vLLM's)

An engine in this process takes shm, on a GPU too: CUDA opens no handle in the process that made it. ipc and nccl are
held to the signatures of the installed vLLM by the tests; they were not run on a GPU.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch

from scope_fast.rollout.base import EngineOptions, WeightSource
from scope_fast.rollout.server_process import free_port
from scope_fast.rollout.weight_sync import ShmInit


def for_server(options: EngineOptions, rank: int, on_gpu: bool) -> tuple[Any, str]:
    """(trainer-side init object, reason) for an engine that is a vLLM server: of the backend asked for, or of the one
    that fits.

    rank: of this process under torchrun. Every rank has a server of its own, unless all share one that runs already:
    then rank 0 sends. Raises ValueError for a backend that needs a GPU where the learner has none.
    """
    shared = options.server_url is not None
    backend, reason = options.transfer, "asked for"
    if backend == "auto":
        if not on_gpu:
            backend, reason = "shm", "the learner is on the CPU"
        elif shared or options.server_gpus:
            backend, reason = "nccl", "the engine has GPUs of its own"
        else:
            backend, reason = "ipc", "learner and engine share a GPU"
    if backend != "shm" and not on_gpu:
        raise ValueError(f"transfer={backend!r}: the learner is on the CPU; expected auto or shm")
    make = {"shm": _shm_init, "ipc": _ipc_init, "nccl": _nccl_init}[backend]
    return make(rank if shared else 0, options), reason


def for_vllm(source: WeightSource) -> Any:
    """The source as vLLM's own senders read it: as it is, and from 0.33 on by a property and another iteration."""
    from vllm.distributed import weight_transfer

    if not hasattr(weight_transfer.WeightSource, "iter_full"):
        return source

    class Source(weight_transfer.WeightSource):
        """Every rank reads every parameter, in step: the same as vLLM's default of no owners."""

        @cached_property
        def metadata(self) -> list[Any]:
            return [weight_transfer.ParamMeta(*meta) for meta in source.metadata()]

        def iter_full(self) -> Iterator[tuple[str, torch.Tensor]]:
            return iter(source)

    return Source()


def prepared(init: Any, source: WeightSource) -> Any:
    """The init object for a sender about to be made, one per server: nccl's with a port that is free now (a server that
    comes back meets no old rendezvous), ipc's with a buffer that holds the source's largest tensor.

    ShmInit is grown by its sender, and vLLM's nccl sender warns of a larger tensor, but sends it.
    """
    if init.backend == "nccl":
        return dataclasses.replace(init, master_port=free_port())
    if init.backend != "ipc":
        return init
    largest = max(math.prod(meta.shape) * meta.dtype.itemsize for meta in source.metadata())
    return dataclasses.replace(init, packed_buffer_size_bytes=max(largest, init.packed_buffer_size_bytes))


def _shm_init(rank: int, options: EngineOptions) -> ShmInit:
    return ShmInit(rank=rank, bucket_bytes=options.bucket_bytes)


def _ipc_init(rank: int, options: EngineOptions) -> Any:
    """Not run on a GPU. Packed: vLLM refuses a tensor larger than the buffer, which `prepared` grows."""
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

    return IPCTrainerInitInfo(rank=rank, packed=True, packed_buffer_size_bytes=options.bucket_bytes)


def _nccl_init(rank: int, options: EngineOptions) -> Any:
    """Not run on a GPU. vLLM's default of two buffers of 1 GiB would be taken from the KV cache and the learner.

    From 0.33 on vLLM's receiver has the loads of one buffer wait for what another received; 0.32's has no such order.

    The size is where a buffer is cut, after the tensor that goes beyond it: no tensor is too large.
    """
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    num_workers = len(options.server_gpus) if options.server_gpus else options.server_workers
    return NCCLTrainerInitInfo(
        rank=rank,
        master_address=options.transfer_address,  # of this machine as the engine's workers reach it
        master_port=0,  # of the rendezvous that rank 0 opens, on this machine: chosen when it does (`prepared`)
        world_size=1 + num_workers,
        packed=True,
        packed_buffer_size_bytes=options.bucket_bytes,
        packed_num_buffers=2,
    )
