"""Whole tensors and DTensors: one process, DDP, FSDP2, HSDP, tensor parallelism and their combinations."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor

from hf_lamb.sharding.collectives import Reduction, Reductions, ShardingError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def local_shard(param: Tensor, name: str) -> tuple[Tensor, Reductions]:
    """Return this process's shard of a parameter, and the process groups of its layer: none for a whole tensor.

    A DTensor counts as sharded along every mesh dimension where it is not replicated. (`isinstance(placement, Shard)`
    would miss `_StridedShard`.)

    Raises:
        ShardingError: a DTensor has partial placements; FSDP1 has sharded the parameter.
    """
    if not _is_dtensor(param):
        if getattr(param, "_fsdp_flattened", False) or getattr(param, "_is_flat_param", False):
            raise ShardingError(
                f"Lamb: parameter {name} is an FSDP1 shard, which has no layout metadata: call "
                "optimizer.attach(model) on the wrapped model, or use FSDP2 (accelerate's fsdp_version 2) or DDP"
            )
        return param, ()
    mesh, placements = param.device_mesh, param.placements
    if any(placement.is_partial() for placement in placements):
        raise ShardingError(
            f"Lamb: parameter {name} has placements {placements}: redistribute it first, LAMB cannot use partial sums"
        )
    cut = (i for i, placement in enumerate(placements) if not placement.is_replicate() and mesh.size(i) > 1)
    return param.to_local(), tuple(Reduction(mesh.get_group(i), mesh.device_type) for i in cut)


def local_grad(param: Tensor, grad: Tensor) -> Tensor:
    """Return this process's shard of a gradient, redistributed to its parameter's placements if they differ.

    Sequence parallelism leaves partial sums, for example.
    """
    if not _is_dtensor(param) or not _is_dtensor(grad):
        return grad
    if grad.placements != param.placements or grad.device_mesh != param.device_mesh:
        grad = grad.redistribute(param.device_mesh, param.placements)
    return local_tensor(grad)


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this process's shard of a DTensor as it is, any other tensor itself."""
    if not _is_dtensor(tensor):
        return tensor
    local: Tensor = tensor.to_local()
    return local


def _is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    module = sys.modules.get("torch.distributed.tensor")  # if it is not imported, no DTensor exists
    return module is not None and isinstance(tensor, module.DTensor)
