"""Compiles `lamb.c` with the system's C compiler at first use, and keeps the library for the next process.

The file's name is a hash of the source, the compiler, its flags and the CPU, so that none is ever out of date. It is
moved to its place when it is whole. No folder or file is loaded that another user can write.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

from hf_lamb.files import atomic_write

__all__ = ["library"]

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("lamb.c")
# Without errno sqrt is one instruction. -ffast-math is out: it breaks isnan, and linked in, it sets flush-to-zero for
# the whole process.
FLAGS = ("-O3", "-march=native", "-std=c11", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
TIMEOUT = 120  # seconds, for a compiler that hangs


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel; None without a compiler, where it fails, or with `HF_LAMB_NO_COMPILE=1`.

    The reason is a line of the log, at level debug.
    """
    try:
        if os.environ.get("HF_LAMB_NO_COMPILE", "0") not in ("", "0"):
            raise OSError("HF_LAMB_NO_COMPILE is set")
        return _load()
    except (OSError, subprocess.SubprocessError, AttributeError) as error:
        logger.debug("Lamb: no compiled kernel on this CPU, but torch's operations: %s", error)
        return None


def _load() -> ctypes.CDLL:
    compiler = shutil.which(os.environ.get("CC") or "cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise OSError("no C compiler: install gcc or clang, or name it in CC")
    folder = _folder()
    path = folder / f"lamb-{_key(compiler)}.so"
    if not path.exists():
        _compile(compiler, path)
    _check_private(path)
    try:
        return _opened(path)
    except (OSError, AttributeError):  # damaged, as on a disk that was full
        _compile(compiler, path)
        return _opened(path)


def _opened(path: Path) -> ctypes.CDLL:
    kernel = ctypes.CDLL(str(path))
    for function in (kernel.lamb_begin, kernel.lamb_run):
        function.argtypes, function.restype = (ctypes.c_void_p,), None
    return kernel


def _key(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=TIMEOUT).stdout
    parts = (SOURCE.read_bytes(), " ".join(FLAGS).encode(), compiler.encode(), version, _cpu().encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]


def _cpu() -> str:
    """What -march=native goes by: a home directory may be shared by machines with other CPUs."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "model\t", "cpu family", "flags", "Features", "CPU part", "CPU implementer")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))


def _folder() -> Path:
    """Where compiled files are kept: the user's cache, or where that cannot be written a folder for this process."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_lamb"
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_private(cache)
        if os.access(cache, os.W_OK):
            return cache
        reason = "read-only"
    except (OSError, RuntimeError) as error:  # no home
        reason = str(error)
    logger.debug("Lamb: the compiled kernel is kept for this process only: %s: %s", cache, reason)
    return Path(_own_folder().name)


@functools.cache
def _own_folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="hf_lamb-")


def _check_private(path: Path) -> None:
    """Refuse what another user could have put there."""
    status = path.stat()
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError(f"other users can write {path}: remove it, or chmod go-w it")


def _compile(compiler: str, path: Path) -> None:
    """Write the library completely or not at all: several processes may do so at once."""
    with atomic_write(path) as unfinished:
        command = [compiler, *FLAGS, "-o", str(unfinished), str(SOURCE), "-lm"]
        result = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT)
        if result.returncode:
            raise subprocess.SubprocessError(f"{compiler} failed: {result.stderr.strip()[:500]}")
        unfinished.chmod(0o700)
