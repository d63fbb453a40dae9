"""What a run leaves on disk: every failure says which file and what it was to hold, and nothing is left half-written.

A full disk is an ordinary event of a long run. It must end the run with a sentence, and with all that was saved before
still good: so files are written under another name and renamed, and a log holds nothing back that could fail later.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class WriteFailed(OSError):
    """A file of the run could not be written; the message says what it was, where, and why."""


@contextmanager
def writing(what: str, path: Path | str) -> Iterator[None]:
    """Turns an OSError of the block into WriteFailed, naming `what` was being written to which path."""
    try:
        yield
    except WriteFailed:  # of a block inside, which knows better
        raise
    except OSError as error:
        raise WriteFailed(f"{what} could not be written to {path}: {error.strerror or error}") from error


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str, what: str) -> None:
    """Writes a text file that is there as a whole, on disk, or not at all (an older one then stays)."""
    partial = path.with_name(f".tmp-{path.name}")
    with writing(what, path):
        with partial.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)


def publish(partial: Path, folder: Path) -> None:
    """Gives a folder that was made under another name its own. One that another process made meanwhile stays."""
    try:
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


class Log:
    """A text file that is only appended to, past every buffer of this process. WriteFailed names it as `what`."""

    def __init__(self, path: Path, what: str) -> None:
        self.path, self.what = path, what
        with writing(what, path):
            self._file = path.open("ab", buffering=0)

    def write(self, text: str) -> None:
        """Hands the text to the operating system; on a full disk the part that fits is written, then WriteFailed."""
        rest = memoryview(text.encode("utf-8"))
        with writing(self.what, self.path):
            while rest:
                rest = rest[self._file.write(rest) :]

    def close(self) -> None:
        self._file.close()
