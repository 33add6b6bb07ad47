"""Files that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["atomic_write"]


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Where to write what shall replace `path`, which happens in one rename when the block ends.

    If it fails, `path` is what it was and nothing is left over. An OSError then names `path`: that of a full disk
    names no file by itself.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield unfinished
        unfinished.replace(path)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror or error}; not written", str(path)) from error
    finally:
        unfinished.unlink(missing_ok=True)
