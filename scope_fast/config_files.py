"""Configurations from files and command lines, and back: read, merged, checked key by key, explained.

YAML file or preset (`find`)  <-  `--dotted.key value` pairs (`overrides`)  ->  `load`  ->  a `config.Config`
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable
from pathlib import Path
from types import NoneType
from typing import Any

import torch
import yaml
from pydantic import BaseModel, ValidationError

from scope_fast.config import Config, plain_types

PRESETS = Path(__file__).parent / "configs"


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that `load` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def load(path: str | Path | None = None, overrides: Iterable[tuple[str, str]] = (), of_a_run: bool = False) -> Config:
    """A `Config` from a YAML file (None: the quickstart) and (dotted key, YAML value) pairs, later ones winning.

    of_a_run: the file is a run's own, maybe an older version's: options that do nothing are no error there.

    Raises ValueError naming the key: unknown ones with the nearest valid name, wrong values with what is expected;
    FileNotFoundError when `path` is neither a file nor the name of a preset.
    """
    file = find(path)
    raw = parse_yaml(file.read_text(encoding="utf-8"), str(file)) or {}
    if not isinstance(raw, dict):
        raise ValueError(f"{file}: expected a mapping of keys, got {type(raw).__name__}")
    for key, text in overrides:
        _set(raw, key, read_value(key, text))
    _reject_unknown(raw, Config, "")
    try:
        config = Config.model_validate(raw, context={"of_a_run": of_a_run})
    except ValidationError as error:
        raise ValueError(explain(error)) from None
    if config.model.dtype != "auto":
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"dtype": native_dtype()})})


def native_dtype() -> str:
    """What model.dtype auto stands for: bfloat16 where the GPU, or else the CPU, has instructions for it.

    A CPU without them (AVX512-BF16, AMX, Arm's BF16) takes many times longer for a bfloat16 product than for a float32.
    """
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}  # new in torch 2.12
    return "bfloat16" if any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")) else "float32"


def overrides(arguments: list[str]) -> list[tuple[str, str]]:
    """`--a.b value` and `--a.b=value` as pairs. ValueError for anything else."""
    pairs, rest = [], list(arguments)
    while rest:
        key = rest.pop(0)
        if not key.startswith("--"):
            raise ValueError(f"unexpected argument {key!r}: overrides are written --dotted.key value")
        key, equals, value = key[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ValueError(f"--{key} needs a value, say true or false where it is a switch")
            value = rest.pop(0)
        pairs.append((key, value))
    return pairs


def find(path: str | Path | None, kind: str = "") -> Path:
    """The file behind a configuration argument: a path, a preset's name, or None for the quickstart.

    A preset is also found as configs/NAME.yaml, its place in the repository, from everywhere.
    kind: the presets folder whose contents the FileNotFoundError lists.
    """
    name = str(path or "quickstart")
    preset = name.removeprefix("configs/").removesuffix(".yaml")
    for candidate in (Path(name), PRESETS / f"{preset}.yaml"):
        if candidate.is_file():
            return candidate
    inside = PRESETS / kind
    presets = ", ".join(sorted(str(p.relative_to(PRESETS).with_suffix("")) for p in inside.glob("*.yaml")))
    raise FileNotFoundError(f"no configuration file {name}; presets: {presets}")


def parse_yaml(text: str, where: str) -> Any:
    """ValueError naming `where` the text comes from if it is no YAML."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{where}: not YAML: {error}") from None


def read_value(key: str, text: str) -> Any:
    """What the text behind `--key` stands for: YAML, but for an option that is a text: that is taken as it stands, as
    "####" or "Finish with Answer: N", unless it is quoted or, where the option may be left out, empty or null."""
    kinds = _kinds(key)
    if kinds is None or not kinds <= {str, NoneType} or (text in ("", "null", "~") and NoneType in kinds):
        return parse_yaml(text, f"--{key}")
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        with contextlib.suppress(yaml.YAMLError):  # "a" and "b": no quoted text, but one that holds quotes
            if isinstance(quoted := yaml.safe_load(text), str):
                return quoted
    return text


def _kinds(key: str) -> set[type] | None:
    """The types that an option takes; None for a section, or where there is no such option."""
    section: Any = Config
    for name in key.split("."):
        if not (isinstance(section, type) and issubclass(section, BaseModel) and name in section.model_fields):
            return None
        section = section.model_fields[name].annotation
    return None if isinstance(section, type) and issubclass(section, BaseModel) else set(plain_types(section))


def _set(raw: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        if raw.get(parent) is None:  # absent, or a section whose every key is commented out
            raw[parent] = {}
        raw = raw[parent]
        if not isinstance(raw, dict):
            raise ValueError(f"--{dotted}: {parent} is a value, not a section")
    raw[last] = value


def _reject_unknown(raw: dict[str, Any], section: type[BaseModel], prefix: str) -> None:
    for key, value in raw.items():
        if key not in section.model_fields:
            here = ", ".join(f"{prefix}{name}" for name in section.model_fields)
            near = _nearest(prefix, str(key), section.model_fields)
            hint = f"did you mean {near}?" if near else f"known here: {here}"
            raise ValueError(f"unknown key {prefix}{key}; {hint}")
        child = section.model_fields[key].annotation
        if isinstance(child, type) and issubclass(child, BaseModel):
            if value is None:  # a section whose every key is commented out
                raw[key] = value = {}
            if not isinstance(value, dict):
                raise ValueError(f"{prefix}{key}: expected a section, got {value!r}")
            _reject_unknown(value, child, f"{prefix}{key}.")


def _nearest(prefix: str, key: str, here: Iterable[str]) -> str:
    """What was most likely meant: a key of the same section, else nearly that name in others; "" if nothing is near."""
    if near := difflib.get_close_matches(key, here, 1, 0.6):
        return prefix + near[0]
    everywhere = [(name.split(".")[-1], name) for name in _all_keys(Config)]
    near = difflib.get_close_matches(key, [last for last, _ in everywhere], 1, 0.8)  # else a list beats a wrong guess
    return " or ".join(name for last, name in everywhere if near and last == near[0])


def _all_keys(section: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, info in section.model_fields.items():
        keys.append(f"{prefix}{name}")
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            keys += _all_keys(info.annotation, f"{prefix}{name}.")
    return keys


def explain(error: ValidationError) -> str:
    """What is wrong with each key, what was given, and what may have been meant."""
    parts = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        message = problem["msg"].removeprefix("Value error, ")
        given = f", got {problem['input']!r}" if where and not isinstance(problem["input"], dict) else ""
        near = ""
        if problem["type"] == "literal_error":
            names = [name.strip(" '") for name in problem["ctx"]["expected"].replace(" or ", ",").split(",")]
            close = difflib.get_close_matches(str(problem["input"]), names, 1, 0.5)
            near = f"; did you mean {close[0]}?" if close else ""
        if problem["type"] == "list_type" and isinstance(problem["input"], str):
            near = f"; write '[{problem['input']}]'"
        # a section's own check begins with the key it is about
        between = "." if problem["type"] == "value_error" and isinstance(problem["input"], dict) else ": "
        parts.append(f"{where}{between}{message}{given}{near}" if where else message)
    return "; ".join(parts)
