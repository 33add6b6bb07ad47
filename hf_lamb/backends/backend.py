"""What every backend does."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from torch import Tensor

from hf_lamb.backends.bucket import Bucket


class Backend(Protocol):
    """One way to update a bucket, in two visits; one object for each optimizer, with what it keeps between steps.

    Between the visits lies the only thing that needs other processes: adding up the sums of layers that are cut.
    """

    def takes(self, bucket: Bucket) -> bool:
        """Whether it can update these tensors; the dtypes, the device and `contiguous` decide."""
        return True

    def prepare(self, bucket: Bucket) -> Iterable[Bucket]:
        """Get ready for this step; return the bucket in the parts that the visits are made with.

        Each part gets both visits before the next one gets its first. A bucket whose layers are cut is one part.
        """
        return [bucket]

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
