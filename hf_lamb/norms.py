"""Squared norms of parameters and updates, over whole layers wherever their shards lie, and the trust ratio.

Everything here is a tensor operation: nothing is read back to the host.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NamedTuple, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# On CPU, torch's norm adds fp32 squares one after another and falls short as tensors grow:
# python -c "import torch; x = torch.rand(31_000_000); print(x.norm() / x.double().norm() - 1)"   # -1.3e-03
# Norms of rows of this length, squared and summed pairwise, are right to rounding; a few rows need no such care.
_ROW = 4096


def _norm_by_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    flat = x.reshape(-1)
    whole = flat.numel() - flat.numel() % _ROW
    rows = flat[:whole].view(-1, _ROW)
    # Of another dtype, torch would copy all of a tensor: not more than 256 rows at a time.
    some = (rows,) if x.dtype == dtype else torch.split(rows, 256)
    norms = [torch.linalg.vector_norm(y, dim=1, dtype=dtype) for y in some]
    if whole < flat.numel():
        norms.append(torch.linalg.vector_norm(flat[whole:], dtype=dtype).view(1))
    norm: Tensor = torch.linalg.vector_norm(torch.cat(norms) if len(norms) > 1 else norms[0])
    return norm


def squared_norms(tensors: list[Tensor]) -> Tensor:
    """sum(x * x) of each tensor, shape [len(tensors)]; all on one device and of one dtype.

    float64 for float64 tensors, else float32.
    """
    dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    by_rows = [x.device.type == "cpu" and x.numel() > 4 * _ROW for x in tensors]
    others = [x for x, rows in zip(tensors, by_rows, strict=True) if not rows]
    their_norms = iter(torch._foreach_norm(others, 2, dtype) if others else ())
    norms = [_norm_by_rows(x, dtype) if rows else next(their_norms) for x, rows in zip(tensors, by_rows, strict=True)]
    return torch.stack(norms).square_()


def any_nonzero(tensors: list[Tensor]) -> Tensor:
    """Which tensors hold anything but zeros, shape [len(tensors)]; all on one device and of one dtype.

    Not by a sum of squares, which is zero for a tensor of 1e-23s in float32.
    """
    nothing = tensors[0].new_zeros(())
    if nothing.device.type == "cpu":  # where an infinity norm takes 25 times as long
        pairs = [torch.aminmax(x) if x.numel() else (nothing, nothing) for x in tensors]
        extremes = torch.stack([extreme for pair in pairs for extreme in pair]).view(-1, 2)
        return (extremes != 0).any(dim=1)
    full = [x for x in tensors if x.numel()]
    largest = iter(torch._foreach_norm(full, torch.inf) if full else ())
    found: Tensor = torch.stack([next(largest) if x.numel() else nothing for x in tensors]) != 0
    return found


def trust_ratio(
    weight_norm: Tensor,
    adam_norm: Tensor,
    min_trust_ratio: float | None = None,
    max_trust_ratio: float | None = None,
) -> Tensor:
    """r = ‖w‖ / ‖u‖ where both norms are positive, else 1; then clamped where bounds are given.

    A weight that is all zero (a fresh bias) must be able to move, and an update that is all zero has no
    direction to scale: both take the plain Adam step. Arguments and result have one shape, one entry a layer.
    Source: You et al. 2020 (arXiv 1904.00962), Algorithm 2 with φ = identity; bounds as in v1 and LAMBC.
    """
    both = (weight_norm > 0) & (adam_norm > 0)
    ratio = torch.where(both, weight_norm / adam_norm, 1.0)
    if min_trust_ratio is not None or max_trust_ratio is not None:
        ratio = ratio.clamp(min_trust_ratio, max_trust_ratio)
    return ratio


# -- sharded parameters ----------------------------------------------------------------------------------------------


class ShardingError(RuntimeError):
    """A parameter whose layer cannot be put together, so that its norm would be another algorithm's."""


class Reduction(NamedTuple):
    """A process group over which the sums of squares of a layer's parts add up, each part exactly once."""

    group: ProcessGroup
    device_type: str  # where its communication happens: CPU-offloaded shards go there and back


Reductions = tuple[Reduction, ...]


def local_shard(param: Tensor, name: str) -> tuple[Tensor, Reductions]:
    """This process's part of a parameter, and the groups over which its layer is spread: none for a whole tensor.

    A DTensor is spread over every dimension of its mesh along which it is not replicated: FSDP2, HSDP, tensor
    parallelism and their combinations, whatever the kind of shard (`_StridedShard` is no `Shard`).

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
    spread = (i for i, placement in enumerate(placements) if not placement.is_replicate() and mesh.size(i) > 1)
    return param.to_local(), tuple(Reduction(mesh.get_group(i), mesh.device_type) for i in spread)


def local_grad(param: Tensor, grad: Tensor) -> Tensor:
    """This process's part of a gradient, laid out as its parameter (sequence parallelism leaves partial sums)."""
    if not _is_dtensor(param) or not _is_dtensor(grad):
        return grad
    if grad.placements != param.placements or grad.device_mesh != param.device_mesh:
        grad = grad.redistribute(param.device_mesh, param.placements)
    local: Tensor = grad.to_local()
    return local


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


def reduction_of(group: ProcessGroup, device: torch.device) -> Reduction:
    """A sum over a process group of what lies on a device, done there if the group can."""
    types = [device.type for device in group._device_types]
    return Reduction(group, device.type if device.type in types else types[0])


def _is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    module = sys.modules.get("torch.distributed.tensor")  # not imported: there can be no DTensor
    return module is not None and isinstance(tensor, module.DTensor)
