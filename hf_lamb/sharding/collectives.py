"""Adding up over processes."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


class ShardingError(RuntimeError):
    """A parameter whose layer cannot be put together, so that its norm would be another algorithm's."""


class Reduction(NamedTuple):
    """A process group over which the sums of a layer's pieces add up, each piece exactly once."""

    group: ProcessGroup
    device_type: str  # where its communication happens: CPU-offloaded shards go there and back


# Of a layer that is cut along several dimensions of a mesh; empty for a layer that is whole on every process.
Reductions = tuple[Reduction, ...]


def reduction_of(group: ProcessGroup, device: torch.device) -> Reduction:
    """A sum over a process group of what lies on a device, done there if the group can."""
    types = [device.type for device in group._device_types]
    return Reduction(group, device.type if device.type in types else types[0])


def sum_over_processes(parts: dict[Reductions, Tensor]) -> dict[Reductions, Tensor]:
    """Add up what the processes hold of each tensor, over the groups it is filed under; one all-reduce per group.

    All processes must file tensors of the same shapes under corresponding groups, in the same order.
    """
    for reduction in dict.fromkeys(reduction for reductions in parts for reduction in reductions):
        concerned = [reductions for reductions in parts if reduction in reductions]
        vector = torch.cat([parts[reductions].flatten() for reductions in concerned])
        home, vector = vector.device, vector.to(reduction.device_type)
        dist.all_reduce(vector, group=reduction.group)
        sizes = [parts[reductions].numel() for reductions in concerned]
        for reductions, summed in zip(concerned, torch.split(vector.to(home), sizes), strict=True):
            parts[reductions] = summed.view_as(parts[reductions])
    return parts
