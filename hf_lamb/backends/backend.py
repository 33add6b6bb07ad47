"""What every backend does."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from hf_lamb.backends.bucket import Bucket
from hf_lamb.norms import squared_norms


class Backend(Protocol):
    """One way to update a bucket, in two visits; one object for each optimizer, with what it keeps between steps.

    `step` calls `update` for layers that are whole. For layers that are cut over processes it calls `direction`, adds
    up the sums over all processes, and calls `apply`.
    """

    def takes(self, bucket: Bucket) -> bool:
        """Whether it can update these tensors; the dtypes, the device and `contiguous` decide."""
        return True

    def squared_gradients(self, bucket: Bucket) -> Tensor:
        """Squared norms of the gradients or of their parts, 1-D: all together add up to the bucket's."""
        return squared_norms(bucket.grads)

    def direction(self, bucket: Bucket) -> tuple[Tensor, Any]:
        """The first visit: t += 1, move m and v.

        Returns:
            The sums `[k, n]` that `hf_lamb.norms.Sum` names, in the dtype of the arithmetic, on the bucket's device;
            and whatever `apply` needs beside, as u.
        """
        ...

    def apply(self, bucket: Bucket, held: Any, step_sizes: Tensor) -> None:
        """The second visit: w -= step_sizes[i] * u, and nothing where a step size is zero. `step_sizes`: `[n]`."""
        ...

    def update(self, bucket: Bucket) -> Tensor:
        """Both visits; return the sums of the first."""
        sums, held = self.direction(bucket)
        self.apply(bucket, held, bucket.step_sizes(sums))
        return sums
