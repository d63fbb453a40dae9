"""What a setting names and cannot be loaded is a mistake in the setting: a sentence, no traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def loading(key: str, folder: str) -> Iterator[None]:
    """Turns the block's OSError (transformers': no such folder, file or hub name) into ValueError naming the key."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"{key}: {folder} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
