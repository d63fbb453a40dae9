"""Checkpoints that survive a crash at any moment, and the export of a finished model.

    checkpoints/step_N/state_R.json         the structure of the state with its plain values, of rank R
                       shard-*.safetensors  its tensors, by torch.distributed.checkpoint: every rank writes its shards,
                                            and reads them under any other sharding
                       MANIFEST.json        size and digest of every file; written last, so it marks completeness
    export/                                 a Hugging Face folder: safetensors, tokenizer, generation config

A checkpoint is written under a temporary name, synced to disk, then renamed: `step_N` is whole or not there. Nothing is
ever pickled, so loading a checkpoint runs no code from it.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import random
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist

from scope_fast.distributed import agree, gather, rank, world_size
from scope_fast.files import WriteFailed, sync, writing

MANIFEST = "MANIFEST.json"
DIGEST_BYTES = 8 << 20  # a digest covers this much of either end of a file: a 7B model must not take minutes to hash
FILE_BYTES = 1 << 30  # of tensors (all ranks together) per file, since the writer holds a file's content in memory


class DamagedCheckpoint(ValueError):
    """A checkpoint folder that is incomplete or not what was written."""


def save(run_dir: Path | str, step: int, state: dict[str, Any], keep: int = 2) -> Path:
    """Writes `run_dir`/checkpoints/step_`step`, then removes all but the newest `keep` checkpoints. Returns its path.

    state: nested dicts (str or int keys), lists and tuples of tensors (DTensors too) and plain values: None, bool, int,
        float, str. Anything else is a TypeError naming its place. Collective: every rank calls it, and plain values
        are kept rank by rank (the RNG differs), tensors once.

    WriteFailed, on every rank, if one of them could not write its part: what was begun is removed, so that the room it
    took is free again, and the older checkpoints stay. One of those that cannot be removed later is named in a printed
    line, and the run goes on: the new one is whole.
    """
    if keep < 1:
        raise ValueError(f"keep={keep}: expected at least 1")
    root = Path(run_dir) / "checkpoints"
    target, temporary = root / f"step_{step}", root / f".tmp-step_{step}"
    try:
        with writing(f"the checkpoint of step {step}", target):
            _write_state(temporary, state)
            with _together():
                if rank() == 0:
                    files = {path.name: _fingerprint(path) for path in sorted(temporary.iterdir())}
                    _write(temporary / MANIFEST, {"step": step, "world_size": world_size(), "files": files})
                    _replace(temporary, target)
    except WriteFailed:
        if rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if rank() == 0:
        try:
            _prune(root, keep, step)
        except OSError as error:
            print(f"checkpoint {target} is whole, but older ones could not be removed: {error}", flush=True)
    return target


def _write_state(folder: Path, state: dict[str, Any]) -> None:
    with _together():
        if rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
    tensors: dict[str, torch.Tensor] = {}
    image = _split(state, "", tensors)
    aliases = agree(_aliases(tensors))
    with _together():
        _write(folder / f"state_{rank()}.json", {"state": image, "aliases": aliases})
    _save_tensors(folder, {place: t.contiguous() for place, t in tensors.items() if place not in aliases})


@contextmanager
def _together() -> Iterator[None]:
    """Every rank leaves the block when all have done their part, or with an OSError if one of them could not."""
    failure = None
    try:
        yield
    except OSError as error:
        failure = error
    failures = [text for text in gather(failure and f"rank {rank()}: {failure.strerror or failure}") if text]
    if failure is not None:
        raise failure
    if failures:
        raise OSError("; ".join(failures))


def load(path: Path | str, like: dict[str, Any] | None = None) -> dict[str, Any]:
    """The state saved in a checkpoint folder; DamagedCheckpoint (a ValueError) naming what is wrong with it.

    like: a state of the same structure whose tensors tell where each loaded one lives and how it is sharded (their
        values are overwritten); tensors that it lacks are loaded whole, on the CPU. Collective.
    """
    path = Path(path)
    if reason := agree(_damage(path) if rank() == 0 else None):
        raise DamagedCheckpoint(f"checkpoint {path}: {reason}")
    own = path / f"state_{rank()}.json"  # a run resumed on more ranks than it was saved from: the first one's values
    saved = json.loads((own if own.exists() else path / "state_0.json").read_text())
    wanted: dict[str, torch.Tensor] = {}
    if like is not None:
        _split(like, "", wanted)
    tensors = _load_tensors(path, wanted)
    tensors |= {place: tensors[other] for place, other in saved["aliases"].items()}
    return _join(saved["state"], tensors)


def latest(run_dir: Path | str, before: int | None = None) -> Path | None:
    """The newest undamaged checkpoint of a run (before a step) or None; prints which it skips and why. Collective."""
    found = None
    if rank() == 0:
        paths = _steps(Path(run_dir) / "checkpoints")
        for path in reversed([path for path in paths if before is None or step_of(path) < before]):
            reason = _damage(path)
            if reason is None:
                found = path
                break
            print(f"checkpoint {path} skipped: {reason}", flush=True)
    return agree(found)


def step_of(path: Path) -> int:
    """The step a checkpoint folder was written after."""
    return int(path.name.removeprefix("step_"))


def capture_rng() -> dict[str, Any]:
    """The state of Python's, numpy's and torch's random generators (CUDA's too once in use), in plain values."""
    name, keys, *rest = numpy.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "python": random.getstate(),
        "numpy": [name, keys.tolist(), *rest],
        "torch": _encode(torch.get_rng_state()),
        "cuda": [_encode(state) for state in cuda],
    }


def restore_rng(state: dict[str, Any]) -> None:
    """Puts back what `capture_rng` returned, also after a trip through JSON."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), *rest))
    torch.set_rng_state(_decode(state["torch"]))
    for device, encoded in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(_decode(encoded), device)


def export(run_dir: Path | str, model: Any, tokenizer: Any) -> Path:
    """Writes `run_dir`/export for `from_pretrained`, in the place of an older one. Returns its path. Collective.

    WriteFailed where it cannot be written; nothing is left of it then. A generation configuration that transformers
    reads but refuses to write (a temperature without do_sample) gets do_sample=True.
    """
    from safetensors import SafetensorError

    root = Path(run_dir)
    target, temporary = root / "export", root / ".tmp-export"
    weights = _full_weights(model)
    with writing("the exported model", target), _together():
        if rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            try:
                generation = _writable(model.generation_config)
                model.generation_config = generation  # save_pretrained writes it too
                model.save_pretrained(temporary, state_dict=weights)
                tokenizer.save_pretrained(temporary)
                generation.save_pretrained(temporary)
                _replace(temporary, target)
            except SafetensorError as error:  # a full disk
                raise OSError(str(error)) from error
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return target


def _writable(generation: Any) -> Any:
    try:
        generation.validate(strict=True)
    except ValueError:
        generation = copy.deepcopy(generation)
        generation.do_sample = True
    return generation


def _full_weights(model: Any) -> dict[str, torch.Tensor] | None:
    """All weights on rank 0, less a tied head, which is no weight of its own. None in a single process."""
    if not dist.is_initialized():
        return None
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    for name in getattr(model, "_tied_weights_keys", None) or () if model.config.tie_word_embeddings else ():
        weights.pop(name, None)
    return weights


# --- the state as plain values and tensors -------------------------------------------------------------------------


def _split(value: Any, place: str, tensors: dict[str, torch.Tensor]) -> Any:
    """A JSON-able image of a state; its tensors go into `tensors` under their place in it."""
    if isinstance(value, torch.Tensor):
        if value.dim() == 0:  # optimisers keep one counter per parameter as a tensor
            return {"scalar": value.item(), "dtype": str(value.dtype).removeprefix("torch.")}
        tensors[place] = value.detach()
        return {"tensor": place}
    if isinstance(value, dict):
        if wrong := [key for key in value if not isinstance(key, str | int)]:
            raise TypeError(f"state{place}: keys must be str or int, not {type(wrong[0]).__name__}")
        return {"dict": [[key, _split(item, f"{place}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_split(item, f"{place}/{i}", tensors) for i, item in enumerate(value)]}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"state{place} is a {type(value).__name__}: only tensors and plain values can be saved")


def _join(image: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The inverse of `_split`."""
    if not isinstance(image, dict):
        return image
    if "tensor" in image:
        return tensors[image["tensor"]]
    if "scalar" in image:
        return torch.tensor(image["scalar"], dtype=getattr(torch, image["dtype"]))
    ((kind, items),) = image.items()
    if kind == "dict":
        return {key: _join(item, tensors) for key, item in items}
    return {"list": list, "tuple": tuple}[kind](_join(item, tensors) for item in items)


def _aliases(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Place -> the earlier place that holds the same memory (a tied head): stored once, and tied again when loaded."""
    first: dict[tuple, str] = {}
    result = {}
    for place, tensor in tensors.items():
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        if local.numel():
            key = (local.data_ptr(), local.dtype, local.shape, local.stride())
            if first.setdefault(key, place) != place:
                result[place] = first[key]
    return result


def _save_tensors(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    from torch.distributed import checkpoint as dcp

    file_of, total_bytes = {}, 0
    for place, tensor in tensors.items():
        file_of[place] = 1 + total_bytes // FILE_BYTES
        total_bytes += tensor.numel() * tensor.element_size()
    writer = dcp.HuggingFaceStorageWriter(str(folder), fqn_to_index_mapping=file_of, save_distributed=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.save(tensors, storage_writer=writer)
        except dcp.api.CheckpointException as error:  # on every rank, whichever failed
            causes = [cause for cause, _ in error.failures.values() if isinstance(cause, OSError)]
            raise causes[0] if causes else error from None


def _load_tensors(folder: Path, wanted: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from torch.distributed import checkpoint as dcp

    reader = dcp.HuggingFaceStorageReader(str(folder))
    stored = reader.read_metadata().state_dict_metadata
    result = {
        place: wanted[place] if place in wanted else torch.empty(entry.size, dtype=entry.properties.dtype)
        for place, entry in stored.items()
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(result, storage_reader=reader)
    return result


def _encode(tensor: torch.Tensor) -> str:
    return base64.b64encode(tensor.numpy().tobytes()).decode()


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


# --- files ---------------------------------------------------------------------------------------------------------


def _steps(root: Path) -> list[Path]:
    """The checkpoint folders, oldest first."""
    return sorted((path for path in root.glob("step_*") if re.fullmatch(r"step_\d+", path.name)), key=step_of)


def _fingerprint(path: Path) -> dict[str, Any]:
    """Size and digest of a file: of all of it, or of both ends where it is larger than those."""
    size, digest = path.stat().st_size, hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(DIGEST_BYTES))
        if size > DIGEST_BYTES:
            file.seek(max(DIGEST_BYTES, size - DIGEST_BYTES))
            digest.update(file.read())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _damage(path: Path, deep: bool = True) -> str | None:
    """What is wrong with a checkpoint folder, None if nothing is. `deep` compares the digests as well as the sizes."""
    if not (path / MANIFEST).exists():
        return f"no {MANIFEST}, so it was not written to its end"
    try:
        for name, expected in json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"].items():
            file = path / name
            if not file.exists():
                return f"{name} is missing"
            if file.stat().st_size != expected["bytes"]:
                return f"{name} has {file.stat().st_size} bytes, expected {expected['bytes']}"
            if deep and _fingerprint(file) != expected:
                return f"{name} is not what was written (sha256 differs)"
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # not JSON, or JSON of another shape
        return f"{MANIFEST} is damaged ({type(error).__name__}: {error})"
    return None


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def _replace(temporary: Path, target: Path) -> None:
    """Syncs a finished folder to disk and gives it its name, in the place of an older one."""
    for path in [*temporary.rglob("*"), temporary]:
        sync(path)
    old = target.with_name(f".old-{target.name}")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _prune(root: Path, keep: int, step: int) -> None:
    """Leaves the newest `keep` whole checkpoints, and no leftovers of interrupted writes.

    One of a step after `step`, which was just saved, is one that the run could not be resumed from.
    """
    whole = [path for path in _steps(root) if step_of(path) <= step and _damage(path, deep=False) is None]
    kept = whole[-keep:]
    for path in [*_steps(root), *root.glob(".tmp-step_*"), *root.glob(".old-step_*")]:
        if path not in kept:
            shutil.rmtree(path)
