"""Weights from the learner into a vLLM engine, through vLLM's native weight-transfer API, by a file in shared memory.

`ShmSender` runs beside the learner, `ShmReceiver` inside the vLLM worker (the same process, or another one on the same
machine). `register()` gives both to vLLM under the backend name "shm". vLLM's own "ipc" and "nccl" backends follow the
same protocol with another init object in the place of `ShmInit`.

This module imports vLLM only inside functions, so that the learner's half works where vLLM is absent.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch.distributed.tensor import DTensor

from scope_fast.ops import weight_bucket
from scope_fast.rollout.base import ParamMeta, WeightSource
from scope_fast.rollout.sharded_source import ShardedSource, wire_dtype

BACKEND = "shm"


class ModuleSource:
    """`WeightSource` over the parameters of an unsharded module, tied ones under each of their names.

    The names are those of `named_parameters`, which for the decoder models of transformers are the checkpoint's.
    dtype: what floating parameters travel in, cast where they lie: of a bfloat16 engine's weights half the bytes leave
        the GPU. None: their own.
    """

    def __init__(self, module: torch.nn.Module, dtype: torch.dtype | None = None) -> None:
        self._module, self._dtype = module, dtype

    def metadata(self) -> list[ParamMeta]:
        named = self._module.named_parameters(remove_duplicate=False)
        return [ParamMeta(name, wire_dtype(p, self._dtype), tuple(p.shape)) for name, p in named]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self._module.named_parameters(remove_duplicate=False):
            yield name, parameter.detach().to(wire_dtype(parameter, self._dtype))


def as_source(
    weights: torch.nn.Module | WeightSource,
    dtype: torch.dtype | None = None,
    bucket_bytes: int = 64 << 20,
    reuse_memory: bool = False,
) -> WeightSource:
    """A module becomes a source, its floating parameters cast to `dtype`: `ShardedSource` if it is sharded, with these
    options, else `ModuleSource`."""
    if not isinstance(weights, torch.nn.Module):
        return weights
    if any(isinstance(parameter, DTensor) for parameter in weights.parameters()):
        return ShardedSource(weights, dtype, bucket_bytes, reuse_memory)
    return ModuleSource(weights, dtype)


@dataclass
class ShmInit:
    """Trainer-side init of the "shm" backend.

    rank: of this process among those that share ONE engine: 0 sends, the others only read the source along. Where every
        rank of the learner has an engine of its own, every one is the 0 of its engine.
    bucket_bytes: size of the shared file, cut to the model's size and grown to its largest tensor.
    """

    backend: ClassVar[str] = BACKEND
    rank: int = 0
    bucket_bytes: int = 64 << 20

    @property
    def is_sender(self) -> bool:
        return self.rank == 0


@dataclass
class ShmWorkerInit:
    """Worker-side init: the file to map, and its size in bytes."""

    path: str
    num_bytes: int


@dataclass
class ShmUpdate:
    """One bucket: tensor i has names[i], dtypes[i] and shapes[i] and starts at byte offsets[i] of the file."""

    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    offsets: list[int]


def bucket_bytes_of(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Bytes one tensor takes in a bucket, alignment included."""
    return weight_bucket.layout([torch.empty(shape, dtype=dtype, device="meta")])[1]


class ShmSender:
    """The learner's half. The timeline of a sync:

        learner (ShmSender)                              vLLM worker (ShmReceiver)
        ---------------------------------------------    ------------------------------------------------------
        once: create the file; init_weight_transfer  ->  map the file
              remove the file's name (both maps stay)
        start_weight_update                          ->  parameters become empty, in checkpoint layout; the old
                                                         kernels' tensors are kept aside
        per bucket: copy tensors into the file
                    update_weights(names, offsets)   ->  private copies -> model.load_weights; a layer that is
                                                         complete is repacked into its old kernel's tensors
        finish_weight_update(version)                ->  every parameter was loaded, or it raises; attention layers
                                                         are finished; the version is set
        get_weight_version() == version, or raise
        reset_prefix_cache()                         ->  keys and values of the old weights are forgotten

    The last two lines are the engine's (`VllmEngine.update_weights`): vLLM does neither by itself. Every call returns
    when the worker is done with it, so one bucket can be used again and again. After an exception between start and
    finish the worker's weights are neither old nor new: the engine must be thrown away.
    """

    def __init__(self, client: Any, source: WeightSource, is_sender: bool = True) -> None:
        self.client = client
        self.source = source
        self.is_sender = is_sender
        self._bucket: torch.Tensor | None = None

    @classmethod
    def trainer_init(cls, init_info: ShmInit, *, client: Any, source: WeightSource) -> ShmSender:
        """Creates the shared file and hands it to the worker. OSError when shared memory cannot hold the bucket."""
        sender = cls(client=client, source=source, is_sender=init_info.is_sender)
        if sender.is_sender:
            sizes = [bucket_bytes_of(meta.dtype, meta.shape) for meta in source.metadata()]
            num_bytes = max(max(sizes), min(init_info.bucket_bytes, sum(sizes)))
            path = _create_shared_file(num_bytes)
            try:
                sender._bucket = _map(path, num_bytes)
                client.init_weight_transfer_engine({"path": path, "num_bytes": num_bytes})
            finally:
                os.unlink(path)
        return sender

    def send_weights(self) -> None:
        """One full sync; every rank calls it, since reading a sharded source is a collective."""
        if not self.is_sender:
            for _ in self.source:
                pass
            return
        self.client.start_weight_update()
        for update in self._fill_buckets():
            self.client.update_weights(update)
        self.client.finish_weight_update()

    def shutdown(self) -> None:
        """Lets go of the shared file."""
        self._bucket = None

    def _fill_buckets(self) -> Iterator[dict[str, list]]:
        """Copies tensors into the file until it is full, and yields what it holds."""
        held: list[tuple[str, weight_bucket.Entry]] = []
        used = 0
        for name, tensor in self.source:
            (entry,), size = weight_bucket.layout([tensor])
            if size > self._bucket.numel():
                raise ValueError(
                    f"weights: {name} takes {size} bytes, the bucket made for this source has {self._bucket.numel()}"
                )
            if used + size > self._bucket.numel():
                yield _update(held)
                held, used = [], 0
            entry = entry._replace(offset_bytes=used)
            self._copy(tensor, entry)  # now: the source may reuse its memory
            held.append((name, entry))
            used += size
        if held:
            yield _update(held)

    def _copy(self, tensor: torch.Tensor, entry: weight_bucket.Entry) -> None:
        """Into its place in the file, from wherever it lies; done when this returns."""
        if tensor.device == self._bucket.device:
            weight_bucket.pack([tensor], out=self._bucket[entry.offset_bytes :])
            return
        (place,) = weight_bucket.unpack(self._bucket, [entry])
        place.copy_(tensor)  # straight from the GPU, without a copy in host memory on the way


class ShmReceiver:
    """The worker's half; `register` joins it with vLLM's base class, which parses the dicts and names the model.

    Loading goes through vLLM's layer-wise reload: Linear weights live in the kernels' own layout, so a plain
    `load_weights` fails or changes nothing. The loader keeps references to what it is given until a layer is complete,
    hence the private copies: the shared file is overwritten by the next bucket.
    """

    init_info_cls = ShmWorkerInit
    update_info_cls = ShmUpdate
    supports_draft_weight_update = False

    def init_transfer_engine(self, init_info: ShmWorkerInit) -> None:
        self._bucket = _map(init_info.path, init_info.num_bytes)

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        initialize_layerwise_reload(self.model)
        self._missing = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: ShmUpdate) -> None:
        copies = [(name, view.to(self.device, copy=True)) for name, view in _unpack(update_info, self._bucket)]
        self._missing -= self.model.load_weights(copies)

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        # Without this check a forgotten tensor would leave its layer at the old weights, with a log line at most.
        if self._missing:
            raise RuntimeError(f"weight sync left parameters without new values: {sorted(self._missing)}")
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        self._bucket = None


def register() -> None:
    """Makes "shm" known to vLLM's two factories, in this process; calling it again changes nothing."""
    from vllm.distributed.weight_transfer import (
        TrainerWeightTransferEngine,
        WeightTransferEngine,
        WeightTransferEngineFactory,
        WeightTransferTrainerFactory,
    )

    if BACKEND in WeightTransferEngineFactory._registry:
        return
    receiver = type("ShmWeightTransferEngine", (ShmReceiver, WeightTransferEngine), {})
    sender = type("ShmTrainerWeightTransferEngine", (ShmSender, TrainerWeightTransferEngine), {})
    WeightTransferEngineFactory.register_engine(BACKEND, receiver)
    WeightTransferTrainerFactory.register_engine(BACKEND, sender)


def _update(held: list[tuple[str, weight_bucket.Entry]]) -> dict[str, list]:
    """An `ShmUpdate` as plain values, which any transport can carry."""
    return {
        "names": [name for name, _ in held],
        "dtypes": [str(entry.dtype).removeprefix("torch.") for _, entry in held],
        "shapes": [list(entry.shape) for _, entry in held],
        "offsets": [entry.offset_bytes for _, entry in held],
    }


def _unpack(update: ShmUpdate, bucket: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    rows = zip(update.offsets, map(tuple, update.shapes), (getattr(torch, d) for d in update.dtypes), strict=True)
    return zip(update.names, weight_bucket.unpack(bucket, list(rows)), strict=True)


def _create_shared_file(num_bytes: int) -> str:
    """A file of that size in memory where the system has such a folder; its pages are reserved now, since running out
    of them later would kill the process with SIGBUS instead of raising."""
    folder = "/dev/shm" if Path("/dev/shm").is_dir() else tempfile.gettempdir()
    descriptor, path = tempfile.mkstemp(prefix="scope_fast_", dir=folder)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, num_bytes)
        else:
            os.truncate(descriptor, num_bytes)
    except OSError as error:
        os.unlink(path)
        raise OSError(
            error.errno,
            f"{folder} cannot hold {num_bytes} bytes of weights in flight; make it larger (a container's: --shm-size)",
            path,
        ) from error
    finally:
        os.close(descriptor)
    return path


def _map(path: str, num_bytes: int) -> torch.Tensor:
    return torch.from_file(path, shared=True, size=num_bytes, dtype=torch.uint8)
