"""A setting that names something which cannot be loaded is the user's mistake: one sentence, no traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def loading(key: str, folder: str) -> Iterator[None]:
    """Turns the block's OSError (transformers': no such folder, file or hub name) into ValueError naming the key. A
    path that cannot be a hub name is not looked up there."""
    if folder == "tiny":
        raise ValueError(f"{key}: tiny names embedded models that are not made here; expected a folder or hub name")
    is_path = str(folder).startswith((".", "/", "~")) or str(folder).count("/") > 1
    if is_path and not Path(folder).exists():
        raise ValueError(f"{key}: {folder} cannot be loaded: there is no such folder")
    try:
        yield
    except OSError as error:
        raise ValueError(f"{key}: {folder} cannot be loaded: {str(error).strip().splitlines()[0]}") from error


def pretrained(key: str, made_by: type, folder: str, **how: Any) -> Any:
    """made_by.from_pretrained(folder, **how): a transformers model that is wholly the checkpoint's.

    Raises ValueError naming the key for what cannot be loaded, and for a checkpoint that lacks weights of the model,
    which transformers draws at random: the folder of another kind of model.
    """
    with loading(key, folder):
        model, report = made_by.from_pretrained(folder, output_loading_info=True, **how)
    if missing := sorted(report["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{key}: {folder} is no checkpoint of {type(model).__name__}: it lacks {missing[0]}{more}")
    return model


def check_shared_tokenizer(student, other, name: str) -> None:
    """Raises ValueError naming the setting `name` unless both tokenizers map the same tokens to the same ids."""
    if student.get_vocab() != other.get_vocab():
        raise ValueError(f"{name}: its tokenizer differs from the student's; token ids cannot be passed on")
