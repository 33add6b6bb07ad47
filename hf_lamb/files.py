"""Writing a file completely or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

__all__ = ["atomic_write"]


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; when the block ends, rename it to `path`.

    If the block fails, `path` is unchanged and the temporary file is deleted.

    Raises:
        OSError: writing or renaming failed. Its message names `path`, which the error of a full disk does not.
    """
    # Not by process number: containers on several machines have the same ones, and may share a folder.
    unfinished = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        yield unfinished
        unfinished.replace(path)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror or error}; not written", str(path)) from error
    finally:
        unfinished.unlink(missing_ok=True)
