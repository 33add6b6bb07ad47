"""The interface of the backends."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from hf_lamb.backends.bucket import Bucket
from hf_lamb.norms import squared_norms


class Backend(Protocol):
    """One way to update a bucket, in two visits to its tensors. Each optimizer has its own object.

    `step` calls `update` for whole layers. For sharded layers it calls `direction`, adds up the sums over the
    processes, and calls `step_sizes` and `apply`.
    """

    def takes(self, bucket: Bucket) -> bool:
        """Return whether the backend can update these tensors: their dtypes, device and `contiguous` decide."""
        return True

    def squared_gradients(self, bucket: Bucket) -> Tensor:
        """Return squared norms of the gradients, or of their parts, as a vector that adds up to the bucket's."""
        return squared_norms(bucket.grads)

    def direction(self, bucket: Bucket) -> tuple[Tensor, Any]:
        """Do the first visit: add 1 to t, update m and v.

        Returns:
            The sums `[k, n]` that `hf_lamb.norms.Sum` names, in the dtype of the arithmetic, on the bucket's device;
            and anything else that `apply` needs, such as u.
        """
        ...

    def step_sizes(self, bucket: Bucket, sums: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what `Bucket.step_sizes` does, from sums over all processes; for `apply`."""
        return bucket.step_sizes(sums)

    def apply(self, bucket: Bucket, held: Any, step_sizes: Tensor, growths: Tensor | None) -> None:
        """Do the second visit: w += growths[i]*w - step_sizes[i]*u. A layer whose step size is zero does not change.

        Args:
            bucket: the bucket of the first visit.
            held: the second result of `direction`.
            step_sizes, growths: of each layer, shape `[n]`, from `Bucket.step_sizes`; growths of None are zero.
        """
        ...

    def update(self, bucket: Bucket) -> Tensor:
        """Do both visits, for layers that are whole; return the sums of the first."""
        sums, held = self.direction(bucket)
        self.apply(bucket, held, *self.step_sizes(bucket, sums))
        return sums
