"""What `Lamb.clip_grad_norm` finds in the gradients, for the step after it, and the factor that clips them."""

from __future__ import annotations

import operator
from collections.abc import Hashable, Sequence
from weakref import ref

import torch
from torch import Tensor

from hf_lamb.sharding import local_tensor

__all__ = ["Look", "clip_factor"]


class Look:
    """A threshold, and the squared norms of gradients as `Backend.squared_gradients` found them.

    It keeps no gradient alive: under fp16 the step may never be made, and the next gradients need the memory.
    """

    def __init__(
        self, max_norm: float, grads: Sequence[Tensor | None], buckets: Sequence[Hashable], squares: list[Tensor]
    ) -> None:
        """Remember in what `squares` were found.

        Args:
            max_norm: what the norm of all gradients shall be at most.
            grads: the gradients of all parameters, `None` where there is none.
            buckets: the keys of the buckets that they were packed into.
            squares: of each bucket.
        """
        self.max_norm = max_norm
        self.squares = squares
        self._buckets = list(buckets)
        # torch.compile traces neither weak references nor addresses.
        self._grads = [] if torch.compiler.is_compiling() else [grad if grad is None else ref(grad) for grad in grads]
        self._versions = [] if torch.compiler.is_compiling() else versions(grads)

    def is_of(self, grads: Sequence[Tensor | None], buckets: Sequence[Hashable]) -> bool:
        """Return whether these are the same gradients, in the same buckets, and nothing was written to them since.

        A write that leaves their `_version` as it is cannot be seen: through `.data`, or by an all-reduce.
        """
        if torch.compiler.is_compiling() or self._buckets != list(buckets) or len(self._grads) != len(grads):
            return False
        known = [grad if grad is None else grad() for grad in self._grads]  # None too if it exists no more
        return all(map(operator.is_, known, grads)) and self._versions == versions(grads)


def versions(grads: Sequence[Tensor | None]) -> list[list[int]]:
    """Return what changes if a gradient is written to, gets other memory, or comes or goes."""
    present = [grad for grad in grads if grad is not None]
    # A user may write to a DTensor's shard, which leaves the DTensor's own version.
    here = present if {*map(type, present)} <= {Tensor} else [local_tensor(grad) for grad in present]
    return [[grad.data_ptr() for grad in here], [grad._version for grad in here], [grad._version for grad in present]]


def clip_factor(norm_sq: Tensor, max_norm: float, max_grad_norm: float | None) -> Tensor | None:
    """Return what the gradients are multiplied with, 0-dim; None if nothing clips.

    Args:
        norm_sq: the squared norm of all gradients.
        max_norm: the threshold of `Lamb.clip_grad_norm`; inf if there is none. It comes first.
        max_grad_norm: the group's option.
    """
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
