"""Whole tensors and DTensors: one process, DDP, FSDP2, HSDP, tensor parallelism and their combinations."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor

from hf_lamb.sharding.collectives import Reduction, Reductions, ShardingError
from hf_lamb.sharding.layout import Segment, Sizes

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


def local_blocks(param: Tensor, name: str, sizes: Sizes) -> tuple[Segment, ...]:
    """Return the segments of the layers that a parameter holds, in its local tensor.

    A DTensor must be FSDP2's, sharded along one mesh dimension. Tensor parallelism may store rows in another order
    than that of the layers: each process then has a part of each layer.

    Args:
        param: the parameter.
        name: its name.
        sizes: of its layers, which are consecutive in its rows.

    Raises:
        ShardingError: a DTensor is sharded by tensor parallelism, or twice; a layer is cut across its rows; the sizes
            do not add up to the parameter's.
    """
    whole = Segment(name, 0, param.numel(), param.numel())
    if not _is_dtensor(param):
        return tuple(whole.split(sizes))
    mesh, placements = param.device_mesh, param.placements
    cut = [i for i, placement in enumerate(placements) if not placement.is_replicate() and mesh.size(i) > 1]
    if not cut:
        return tuple(whole.split(sizes))
    shard = placements[cut[0]]
    if len(cut) > 1 or type(shard).__name__ != "Shard" or not _is_of_fsdp2(param):
        raise ShardingError(
            f"Lamb: use lamb_param_groups(model, split=False), or FSDP2 alone: {name} holds {len(sizes)} layers and "
            f"has placements {placements}, not FSDP2's; tensor parallelism may store rows in another order"
        )
    local, dim = param.to_local(), shard.dim % param.ndim  # type: ignore[attr-defined]
    if dim == 0:
        rows, row = param.shape[0], math.prod(param.shape[1:])
        first = min(mesh.get_local_rank(cut[0]) * -(-rows // mesh.size(cut[0])), rows)
        return tuple(Segment(name, 0, local.numel(), param.numel(), first * row).split(sizes))
    # Each process has a part of every row, so each layer keeps its share of the elements.
    inner, here = math.prod(param.shape[dim:]), math.prod(local.shape[dim:])
    if any(size % inner for size in sizes):
        raise ShardingError(
            f"Lamb: shard {name} along dimension 0 (FSDP2's shard_placement_fn), or use lamb_param_groups(model, "
            f"split=False): it holds {len(sizes)} layers, which placements {placements} cut"
        )
    parts = tuple(size // inner * here for size in sizes)
    segments = Segment(name, 0, local.numel(), local.numel()).split(parts)
    return tuple(part._replace(size=size) for part, size in zip(segments, sizes, strict=True))


def _is_of_fsdp2(param: Tensor) -> bool:
    """Return whether FSDP2 shards a parameter, and no other means. Only FSDP2's private lists tell."""
    modules = sys.modules.get("torch.distributed._composable_state")
    found = [] if modules is None else [state() for state in modules._module_state_mapping.values()]
    for state in found:
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for group in groups:
            if group is not None and any(own.sharded_param is param for own in group.fsdp_params):
                return True
    return False


def own_class(module: object) -> type:
    """Return the class that a module had before FSDP2 put its own in front of it."""
    kind, fsdp = type(module), sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and issubclass(kind, fsdp.FSDPModule) and kind.__name__.startswith("FSDP"):
        return kind.__bases__[-1]
    return kind


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
