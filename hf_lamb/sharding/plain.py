"""Whole tensors and DTensors: one process, DDP, FSDP2, HSDP, tensor parallelism and their combinations."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor

from hf_lamb.sharding.collectives import Reduction, Reductions, ShardingError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def local_shard(param: Tensor, name: str) -> tuple[Tensor, Reductions]:
    """This process's piece of a parameter, and the groups over which its layer is cut: none for a whole tensor.

    A DTensor is cut along every dimension of its mesh along which it is not replicated, whatever the kind of shard
    (`_StridedShard` is no `Shard`).

    Raises:
        ShardingError: a DTensor with partial placements; a parameter of FSDP1.
    """
    if not _is_dtensor(param):
        if getattr(param, "_fsdp_flattened", False) or getattr(param, "_is_flat_param", False):
            raise ShardingError(
                f"Lamb: parameter {name} is an FSDP1 shard, and nothing on it says where the rest of its layer is: "
                "call optimizer.attach(model) on the wrapped model, or use FSDP2 (accelerate's fsdp_version 2) or DDP"
            )
        return param, ()
    mesh, placements = param.device_mesh, param.placements
    if any(placement.is_partial() for placement in placements):
        raise ShardingError(
            f"Lamb: parameter {name} has placements {placements}: a partial sum is no weight, so redistribute it first"
        )
    cut = (i for i, placement in enumerate(placements) if not placement.is_replicate() and mesh.size(i) > 1)
    return param.to_local(), tuple(Reduction(mesh.get_group(i), mesh.device_type) for i in cut)


def local_grad(param: Tensor, grad: Tensor) -> Tensor:
    """This process's piece of a gradient, laid out as its parameter (sequence parallelism leaves partial sums)."""
    if not _is_dtensor(param) or not _is_dtensor(grad):
        return grad
    if grad.placements != param.placements or grad.device_mesh != param.device_mesh:
        grad = grad.redistribute(param.device_mesh, param.placements)
    local: Tensor = grad.to_local()
    return local


def _is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    module = sys.modules.get("torch.distributed.tensor")  # not imported: there can be no DTensor
    return module is not None and isinstance(tensor, module.DTensor)
