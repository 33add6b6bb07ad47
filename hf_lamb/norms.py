"""Squared norms of parameters and updates, and the trust ratio made of them.

Everything here is a tensor operation: nothing is read back to the host.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

# On CPU, torch's norm adds fp32 squares one after another and falls short as tensors grow:
# python -c "import torch; x = torch.rand(31_000_000); print(x.norm() / x.double().norm() - 1)"   # -1.3e-03
# Norms of rows of this length, squared and summed pairwise, are right to rounding.
_ROW = 4096


def squared_norm(x: Tensor) -> Tensor:
    """sum(x * x), 0-dim; float64 for a float64 tensor, else float32."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    flat = x.reshape(-1)
    whole = flat.numel() - flat.numel() % _ROW
    total: Tensor = torch.linalg.vector_norm(flat[whole:], dtype=dtype).square()
    if whole:
        rows: Tensor = torch.linalg.vector_norm(flat[:whole].view(-1, _ROW), dim=1, dtype=dtype)
        total = total + rows.square_().sum()
    return total


def squared_norms(tensors: list[Tensor]) -> Tensor:
    """sum(x * x) of each tensor, shape [len(tensors)]; all on one device and of one dtype."""
    if tensors[0].device.type == "cpu":
        return torch.stack([squared_norm(x) for x in tensors])
    dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    return torch.stack(torch._foreach_norm(tensors, 2, dtype)).square_()


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
    ratio = torch.where(both, weight_norm / torch.where(both, adam_norm, 1.0), 1.0)
    if min_trust_ratio is not None or max_trust_ratio is not None:
        ratio = ratio.clamp(min_trust_ratio, max_trust_ratio)
    return ratio


def refuse_sharded(param: Tensor, name: str) -> None:
    """Raise for a parameter that holds only a piece of its layer: the norm of a piece is another algorithm's."""
    dtensor = sys.modules.get("torch.distributed.tensor")  # not imported: there can be no DTensor
    if dtensor is not None and isinstance(param, dtensor.DTensor):
        kind, remedy = "a DTensor (FSDP2 or tensor parallelism)", "train it with DDP"
    elif getattr(param, "_fsdp_flattened", False) or getattr(param, "_is_flat_param", False):
        kind, remedy = "an FSDP1 shard", "train it with DDP"
    else:
        return
    raise NotImplementedError(
        f"Lamb: parameter {name} is {kind}, and this version computes norms of whole parameters only: {remedy}"
    )
