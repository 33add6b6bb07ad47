"""How the tensors are updated, and which backend updates which bucket.

A backend is a file with a `Backend`; `Backends.choose` has the rule.
"""

from __future__ import annotations

import functools
import warnings

import torch

from hf_lamb.backends.backend import Backend
from hf_lamb.backends.bucket import Bucket
from hf_lamb.backends.compiled import Compiled
from hf_lamb.backends.cpu import CPU
from hf_lamb.backends.eager import Eager
from hf_lamb.backends.foreach import Foreach

__all__ = ["Backend", "Backends", "Bucket"]


class Backends:
    """The backends of one optimizer; the fused one is made when the first bucket needs it."""

    def __init__(self) -> None:
        # These two here, because torch.compile does not trace the making of a Protocol's object.
        self._made: dict[type[Backend], Backend] = {Eager: Eager(), Foreach: Foreach()}

    def choose(self, bucket: Bucket) -> Backend:
        """The backend of a bucket, by its group's `fused` and `foreach`, its device, and what the kernels take."""
        use_foreach, use_fused = bucket.group["foreach"], bucket.group["fused"]
        if use_fused or (use_fused is None and use_foreach is None):
            # torch.compile makes its own kernels, from operations that it can see into.
            for kind in () if torch.compiler.is_compiling() else fused_kinds(bucket.device):
                if (fused := self._backend(kind)).takes(bucket):
                    return fused
            return self._backend(Foreach)
        if use_foreach is None:
            use_foreach = bucket.device.type != "cpu"
        return self._backend(Foreach if use_foreach else Eager)

    def _backend(self, kind: type[Backend]) -> Backend:
        if kind not in self._made:
            self._made[kind] = kind()
        return self._made[kind]


def fused_kinds(device: torch.device) -> tuple[type[Backend], ...]:
    """The fused backends for a kind of device, the fastest first."""
    if device.type == "cpu":
        return (Compiled, CPU)
    kind = triton_kind(device) if device.type == "cuda" and torch.version.hip is None else None
    return () if kind is None else (kind,)


@functools.cache
def triton_kind(device: torch.device) -> type[Backend] | None:
    """The backend that needs Triton, imported for a device's first parameter; None where it cannot be used there."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "Lamb: a CUDA graph is being captured, but no step on this device came before it: call step() once "
            "outside of each capture, as torch.cuda.graph's warm-up does"
        )
    try:
        from hf_lamb.backends import triton

        triton.check(device)
    except ImportError:
        return None
    except Exception as error:  # it compiles a C file here: no compiler, no Python.h, a full disk, ...
        warnings.warn(f"Lamb: no fused kernels on {device}, but foreach: {error}", stacklevel=2)
        return None
    return triton.Triton
