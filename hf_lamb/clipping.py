"""What `Lamb.clip_grad_norm` finds in the gradients, for the step after it, and the factor that clips them."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from weakref import ref

import torch
from torch import Tensor

from hf_lamb.backends import Bucket
from hf_lamb.sharding import local_tensor

__all__ = ["Look", "skip_and_clip"]


class Look:
    """A threshold, and the squared norms of gradients as `Backend.squared_gradients` found them.

    It keeps no gradient alive: under fp16 the step may never be made, and the next gradients need the memory.

    Args:
        max_norm: what the norm of all gradients shall be at most.
        grads: the gradients of all parameters, `None` where there is none.
        buckets: what they were packed into.
        squares: of each bucket.
    """

    def __init__(
        self, max_norm: float, grads: Sequence[Tensor | None], buckets: Sequence[Bucket], squares: list[Tensor]
    ) -> None:
        self.max_norm = max_norm
        self._squares = squares
        self._buckets = [(bucket, bucket.key, bucket.grads, addresses(bucket.grads)) for bucket in buckets]
        # torch.compile traces neither weak references nor addresses.
        self._grads = [] if torch.compiler.is_compiling() else [grad if grad is None else ref(grad) for grad in grads]
        self._versions = [] if torch.compiler.is_compiling() else versions(grads)

    def squares_of(self, grads: Sequence[Tensor | None], buckets: Sequence[Bucket]) -> list[Tensor] | None:
        """Return what was found if these are the same gradients and nothing was written to them since, else None.

        A write that leaves their `_version` as it is cannot be seen: through `.data`, or by an all-reduce.

        If the gradients are where they were, their buckets get the lists of then: a backend knows by the list that its
        table of addresses is that of this step, and during the capture of a CUDA graph it can make only one. Copies of
        a gradient, which layers that are no whole rows of it take, are elsewhere.
        """
        if torch.compiler.is_compiling() or len(self._grads) != len(grads):
            return None
        known = [grad if grad is None else grad() for grad in self._grads]  # None too if it exists no more
        now = versions(grads)
        if not all(map(operator.is_, known, grads)) or now[0] != self._versions[0]:
            return None
        if [key for _, key, *_ in self._buckets] != [bucket.key for bucket in buckets]:
            return None
        for bucket, (before, _, gradients, places) in zip(buckets, self._buckets, strict=True):
            # The same bucket: its parameters and moments are where they were, too.
            if bucket is before and addresses(bucket.grads) == places:
                gradients[:] = bucket.grads
                bucket.grads = gradients
        return self._squares if now == self._versions else None


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    """Return where the tensors are; nothing under torch.compile, which traces no addresses."""
    return [] if torch.compiler.is_compiling() else [*map(Tensor.data_ptr, tensors)]


def versions(grads: Sequence[Tensor | None]) -> list[list[int]]:
    """Return the gradients' addresses, and what changes if they are written to."""
    present = [grad for grad in grads if grad is not None]
    # A user may write to a DTensor's shard, which leaves the DTensor's own version.
    here = present if {*map(type, present)} <= {Tensor} else [local_tensor(grad) for grad in present]
    return [[grad.data_ptr() for grad in here], [grad._version for grad in here], [grad._version for grad in present]]


def skip_and_clip(buckets: Iterable[Bucket], norm_sq: Tensor, finite: Tensor, max_norm: float) -> None:
    """Tell each bucket whether this step is skipped and how much its gradients are clipped.

    Args:
        buckets: all buckets of the step.
        norm_sq: the squared norm of all gradients, 0-dim.
        finite: whether it is finite.
        max_norm: the threshold of `Lamb.clip_grad_norm`; inf if there is none.
    """
    factors: dict[float | None, Tensor | None] = {}
    for bucket in buckets:
        if bucket.group["skip_nonfinite"]:
            bucket.finite = finite.to(bucket.device)
        max_grad_norm = bucket.group["max_grad_norm"]
        if max_grad_norm not in factors:
            factors[max_grad_norm] = clip_factor(norm_sq, max_norm, max_grad_norm)
        factor = factors[max_grad_norm]
        if factor is not None:
            bucket.clip_factor = factor.to(bucket.device, bucket.math_dtype)


def clip_factor(norm_sq: Tensor, max_norm: float, max_grad_norm: float | None) -> Tensor | None:
    """Return what gradients are multiplied with to clip them by `max_norm`, then by the option; None if none clips."""
    if max_norm == torch.inf and max_grad_norm is None:
        return None
    norm, factor = norm_sq.sqrt(), None
    if max_norm < torch.inf:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1)  # with torch's 1e-6
        norm = norm * factor
    if max_grad_norm is not None:
        own = (norm / max_grad_norm).clamp(min=1).reciprocal()  # 1 / ... would be two operations
        factor = own if factor is None else factor * own
    return factor
