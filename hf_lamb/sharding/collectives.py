"""All-reduces of the sums of layers."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


class ShardingError(RuntimeError):
    """The shards of a layer cannot be put together, so `Lamb` cannot compute the layer's norm. Nothing was updated."""


class Reduction(NamedTuple):
    """A process group that holds each piece of a layer exactly once, so that an all-reduce sums over the layer."""

    group: ProcessGroup
    device_type: str  # the device that the group communicates on; CPU-offloaded sums are copied there and back


# The process groups of a layer: several if it is sharded along several mesh dimensions, none if it is whole.
Reductions = tuple[Reduction, ...]


def reduction_of(group: ProcessGroup, device: torch.device) -> Reduction:
    """Return a `Reduction` that communicates on `device` if the group can, else on the group's first device type."""
    types = [device.type for device in group._device_types]
    return Reduction(group, device.type if device.type in types else types[0])


def sum_over_processes(parts: dict[Reductions, Tensor]) -> dict[Reductions, Tensor]:
    """Sum each tensor over the process groups that are its key, with one all-reduce per group.

    All processes must call it with tensors of the same shapes, under corresponding groups, in the same order.

    Args:
        parts: the local tensors, by the groups to sum over; the sums replace them.

    Returns:
        `parts`.
    """
    for reduction in dict.fromkeys(reduction for reductions in parts for reduction in reductions):
        concerned = [reductions for reductions in parts if reduction in reductions]
        flat = [parts[reductions].flatten() for reductions in concerned]
        vector = flat[0] if len(flat) == 1 else torch.cat(flat)
        home, vector = vector.device, vector.to(reduction.device_type)
        dist.all_reduce(vector, group=reduction.group)
        sizes = [parts[reductions].numel() for reductions in concerned]
        for reductions, summed in zip(concerned, torch.split(vector.to(home), sizes), strict=True):
            parts[reductions] = summed.view_as(parts[reductions])
    return parts
