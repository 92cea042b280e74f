"""Atomic writes: a reader sees the old file or the new one, also after a crash."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` when the block ends; if it fails, what was there stays. Raises OSError."""
    if path.is_dir():  # else the error would name the temporary
        raise IsADirectoryError(errno.EISDIR, "is a folder, expected a file", str(path))
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, text: str) -> None:
    """Write a text file atomically. Raises OSError."""
    with whole_file(path) as file:
        file.write(text.encode(errors="replace"))  # a class may be named by bytes that are no text
