"""Squared norms of tensors, and the trust ratio.

Everything here is a tensor operation: nothing is read back to the host.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

# On CPU, torch's norm adds fp32 squares one after another and falls short as tensors grow:
# python -c "import torch; x = torch.rand(31_000_000); print(x.norm() / x.double().norm() - 1)"   # -1.3e-03
# Norms of rows of this length, squared and summed pairwise, are right to rounding; a few rows need no such care.
_ROW = 4096


class Sum(IntEnum):
    """The sums of a layer, rows of a `[k, n]` tensor; those of its pieces add up."""

    WEIGHT_SQ = 0  # ‖w‖²
    UPDATE_SQ = 1  # ‖u‖²
    NONZERO = 2  # positive where the gradient or the moved m is not all zero; of adapted layers only
    DOT = 3  # ⟨w, u⟩; only with `fixed_norm`, else 0


def math_dtype(param: Tensor) -> torch.dtype:
    """The dtype of the arithmetic and of the state: float64 for float64 parameters, else float32."""
    return torch.float64 if param.dtype == torch.float64 else torch.float32


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


def dots(xs: list[Tensor], ys: list[Tensor]) -> Tensor:
    """sum(x * y) of each pair, shape [len(xs)]; pairwise sums, unlike torch.dot's on a CPU."""
    return torch.stack([product.sum() for product in torch._foreach_mul(xs, ys)])


def layer_ratio(sums: Tensor, options: dict[str, Any]) -> Tensor:
    """Return the trust ratio of each layer by its group's options, shape [n], from the sums `[k, n]`.

    It is 1 without `layer_adaptation`. It is 0 for an adapted layer whose gradient and first moment are all zero:
    otherwise the layer would make a full step of weight decay alone.
    """
    if not options["layer_adaptation"]:
        return torch.ones_like(sums[Sum.WEIGHT_SQ])
    weight_norm, adam_norm = sums[Sum.WEIGHT_SQ].sqrt(), sums[Sum.UPDATE_SQ].sqrt()
    ratio = trust_ratio(weight_norm, adam_norm, options["min_trust_ratio"], options["max_trust_ratio"])
    return torch.where(sums[Sum.NONZERO] > 0, ratio, 0.0)


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


NOTHING_LEFT = 1e-4 - 1  # x of a step that leaves a hundredth of ‖w‖


def norm_keeping(sums: Tensor, step_sizes: Tensor) -> tuple[Tensor, Tensor]:
    """Return steps that keep ‖w‖: w + growth*w - step_size*u = ‖w‖ * (w - a*u) / ‖w - a*u‖ for given step sizes a.

    With x = ‖w - a*u‖² / ‖w‖² - 1 and q = sqrt(1 + x), the factor is 1/q. So step_size = a/q, and growth = 1/q - 1 is
    computed as -x / (q*(1 + q)), which does not cancel. A layer with ‖w‖ = 0 takes the plain step. One of whose
    norm w - a*u would leave less than a hundredth (x <= -0.9999) keeps its weights: rounding would choose where to go.

    Args:
        sums: of each layer, `[k, n]`.
        step_sizes: a of each layer, shape `[n]`.

    Returns:
        The step sizes and growths, shape `[n]` each.

    Source: arXiv 2606.16899 ("Hyperball"), with the norm before this step.
    """
    weight_sq = sums[Sum.WEIGHT_SQ]
    x = step_sizes * (step_sizes * sums[Sum.UPDATE_SQ] - 2 * sums[Sum.DOT]) / weight_sq
    x = torch.where((weight_sq > 0) & (step_sizes != 0), x, 0.0)
    q = (1 + x).sqrt()
    growths = torch.where(x <= NOTHING_LEFT, 0.0, -x / (q * (1 + q)))
    return torch.where(x <= NOTHING_LEFT, 0.0, step_sizes * (1 + growths)), growths
