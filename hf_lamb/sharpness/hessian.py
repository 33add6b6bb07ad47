"""Curvature by Hessian-vector products: the largest eigenvalue, the trace, and the trace weighted by w².

These metrics need second derivatives: memory for about four more copies of the weights and for the graph of a batch's
gradient. Attention runs without fused kernels, because those cannot be differentiated twice. For whole spectra see
hessian-eigenthings and curvlinops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_lamb.sharpness.ascent import progress
from hf_lamb.sharpness.objective import LossFn, Objective, check_loss, objective

Vector = dict[str, Tensor]


class Curvature(NamedTuple):
    """A measure of second derivatives."""

    value: float
    loss: float  # at the weights, in nats
    converged: bool = True  # whether the power iteration converged; always True for traces, whose error is statistical


def lambda_max(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    iterations: int = 100,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> Curvature:
    """Compute the largest eigenvalue of the loss's Hessian by power iteration, also at a saddle.

    `alpha_scale` can change it to any size although the function stays the same (Dinh et al. 2017, Theorem 4).

    Args:
        iterations: the largest number of Hessian-vector products, each of which costs about two gradients. It is twice
            that number if the eigenvalue with the largest magnitude is negative. Default 100.
        tolerance: stop when the relative change of the estimate is at most this. Default 1e-4.
        seed: of the start vector. Default 0.
        model: see `epsilon_sharpness`, which raises the same errors.
        loss_fn: see `epsilon_sharpness`.
        batches: see `epsilon_sharpness`.

    Returns:
        `Curvature`.
    """
    _check("iterations", iterations)
    with objective(model, loss_fn, batches) as problem, progress(iterations, "largest eigenvalue") as advance:
        loss = check_loss(problem.scores().loss)
        value, settled = _power_iteration(problem, 0.0, iterations, tolerance, seed, advance)
        if value < 0:  # this is the most negative eigenvalue: shift it to zero, then iterate to the largest one
            value, settled = _power_iteration(problem, value, iterations, tolerance, seed, advance)
    return Curvature(value, loss, settled)


def hessian_trace(
    model: nn.Module, loss_fn: LossFn, batches: Iterable[Any], *, samples: int = 20, seed: int = 0
) -> Curvature:
    """Estimate tr H = Σ Hᵢᵢ of the loss as the mean of zᵀHz over random signs z (Hutchinson).

    `alpha_scale` changes it although the function stays the same. The estimate is exact if H is diagonal.

    Args:
        samples: number of Hessian-vector products. Default 20.
        model: see `lambda_max`, which raises the same errors.
        loss_fn: see `lambda_max`.
        batches: see `lambda_max`.
        seed: see `lambda_max`.

    Returns:
        `Curvature`.
    """
    return _weighted(model, loss_fn, batches, samples, seed, lambda w: torch.ones_like(w))


def weighted_trace(
    model: nn.Module, loss_fn: LossFn, batches: Iterable[Any], *, samples: int = 20, seed: int = 0
) -> Curvature:
    """Estimate Σ wᵢ² Hᵢᵢ, the trace for relative changes of the weights. `alpha_scale` does not change it.

    The estimate is the mean of (wz)ᵀH(wz) over random signs z.

    Args:
        model: see `hessian_trace`, which raises the same errors.
        loss_fn: see `hessian_trace`.
        batches: see `hessian_trace`.
        samples: see `hessian_trace`.
        seed: see `hessian_trace`.

    Returns:
        `Curvature`.
    """
    return _weighted(model, loss_fn, batches, samples, seed, lambda w: w)


def _weighted(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    samples: int,
    seed: int,
    scale: Callable[[Tensor], Tensor],
) -> Curvature:
    _check("samples", samples)
    total = 0.0
    with objective(model, loss_fn, batches) as problem, progress(samples, "trace") as advance:
        loss = check_loss(problem.scores().loss)
        generator = torch.Generator(problem.device).manual_seed(seed)
        for _ in range(samples):
            v = {}
            for name, y in problem.weights.items():
                coin = torch.randint(0, 2, y.shape, generator=generator, device=y.device, dtype=y.dtype)
                v[name] = scale(y.detach()) * (2 * coin - 1)
            problem.hessian_times(v)
            total += _dot(v, problem)
            advance()
    return Curvature(total / samples, loss)


def _power_iteration(
    problem: Objective, shift: float, iterations: int, tolerance: float, seed: int, advance: Callable[[], object]
) -> tuple[float, bool]:
    """Return the eigenvalue of H that is farthest from `shift`, and whether v ← (H - shift)v / ‖·‖ converged."""
    generator = torch.Generator(problem.device).manual_seed(seed)
    v = {
        name: torch.randn(y.shape, generator=generator, device=y.device, dtype=y.dtype)
        for name, y in problem.weights.items()
    }
    _divide(v, _norm(v))
    estimate = math.nan
    for _ in range(iterations):
        problem.hessian_times(v)
        previous, estimate = estimate, _dot(v, problem)  # vᵀHv, v of norm 1
        advance()
        if abs(estimate - previous) <= tolerance * abs(estimate):
            return estimate, True
        for name, y in problem.weights.items():
            assert y.grad is not None
            v[name] = v[name].mul_(-shift).add_(y.grad)
        norm = _norm(v)
        if norm == 0:
            return estimate, True  # H v = shift v: v is an eigenvector already
        _divide(v, norm)
    return estimate, False


def _dot(v: Vector, problem: Objective) -> float:
    """Return vᵀg, with g in `y.grad`, summed in float64."""
    total = 0.0
    for name, y in problem.weights.items():
        assert y.grad is not None
        total += torch.sum(v[name] * y.grad, dtype=torch.float64).item()
    return total


def _norm(v: Vector) -> float:
    return math.sqrt(sum(torch.linalg.vector_norm(x, dtype=torch.float64).item() ** 2 for x in v.values()))


def _divide(v: Vector, norm: float) -> None:
    for x in v.values():
        x.div_(norm)


def _check(name: str, count: int) -> None:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"{name}={count!r}: expected a whole number, at least 1")
