"""The weight sync's side of a vLLM server: its four calls over HTTP, and what a server that comes back is given."""

from __future__ import annotations

import base64
import pickle
from collections.abc import Iterator
from typing import Any

import torch

from scope_fast.rollout.base import ParamMeta, WeightSource
from scope_fast.rollout.server_process import Http


class HttpSyncClient:
    """The four calls of vLLM's weight-sync protocol on a server.

    vLLM's own senders finish without saying a version, so the engine leaves it here before it has them send.
    """

    def __init__(self, http: Http, timeout_s: float) -> None:
        self._http, self._timeout_s = http, timeout_s
        self.version: str | None = None

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._http.post("init_weight_transfer_engine", {"init_info": init_info}, self._timeout_s)

    def start_weight_update(self) -> None:
        self._http.post("start_weight_update", None, self._timeout_s)

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        infos = update_info if isinstance(update_info, list) else [update_info]
        sendable = [json_safe(info) for info in infos]
        body = {"update_info": sendable if isinstance(update_info, list) else sendable[0]}
        self._http.post("update_weights", body, self._timeout_s)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        body = {"weight_version": self.version if weight_version is None else weight_version}
        self._http.post("finish_weight_update", body, self._timeout_s)


def json_safe(update_info: dict[str, Any]) -> dict[str, Any]:
    """The handles of the "ipc" backend are no JSON; vLLM's workers take them pickled, if the server was told that they
    may (`server_environment`)."""
    if update_info.get("ipc_handles") is None:
        return update_info
    pickled = base64.b64encode(pickle.dumps(update_info["ipc_handles"])).decode()
    return {k: v for k, v in update_info.items() if k != "ipc_handles"} | {"ipc_handles_pickled": pickled}


class HostCopy:
    """`WeightSource`: what another one yielded last, kept in host memory, given out on a device.

    A server that dies is given these again. The learner's own weights would not do: of a sharded learner every rank
    would have to gather once more, and a learner that works ahead of the rollouts has newer ones.
    """

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self._tensors: dict[str, torch.Tensor] = {}
        self.version: int | None = None  # None: nothing was read yet

    def fill(self, source: WeightSource, version: int) -> None:
        """Reads one whole pass; the memory of the last one is used again."""
        for name, tensor in source:
            held = self._tensors.get(name)
            if held is None or held.shape != tensor.shape or held.dtype != tensor.dtype:
                self._tensors[name] = tensor.detach().to("cpu", copy=True)
            else:
                held.copy_(tensor)
        self.version = version

    def metadata(self) -> list[ParamMeta]:
        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self._tensors.items()]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((name, tensor.to(self._device)) for name, tensor in self._tensors.items())
