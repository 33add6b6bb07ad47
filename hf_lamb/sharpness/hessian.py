"""Curvature by Hessian-vector products: the largest eigenvalue, the trace, and the trace weighted by w².

Second derivatives: the metrics here need about four copies of the weights beside the model's own, and the graph of a
batch's gradient. Attention is computed without fused kernels meanwhile, which cannot be differentiated twice. For
spectra see hessian-eigenthings and curvlinops.
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
    """A number made of second derivatives, the loss where they were taken, and whether the iteration had settled.

    For traces `converged` is True always; their error is statistical.
    """

    value: float
    loss: float
    converged: bool = True


def lambda_max(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    *,
    iterations: int = 100,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> Curvature:
    """The largest eigenvalue of the loss's Hessian, by power iteration; of a saddle too.

    Changes under `alpha_scale`, without bound, while the function does not (Dinh et al. 2017, Theorem 4).

    Args:
        iterations: at most so many Hessian-vector products, twice as many where the eigenvalue that is largest in
            magnitude is negative; each about two gradients.
        tolerance: relative change of the estimate at which to stop.
        seed: of the vector to start from.
        model, loss_fn, batches: as for `epsilon_sharpness`, and so are the errors raised.
    """
    _check("iterations", iterations)
    with objective(model, loss_fn, batches) as problem, progress(iterations, "largest eigenvalue") as advance:
        loss = check_loss(problem.scores().loss)
        value, settled = _power_iteration(problem, 0.0, iterations, tolerance, seed, advance)
        if value < 0:  # the most negative eigenvalue: shift it to zero, and the largest one stands out
            value, settled = _power_iteration(problem, value, iterations, tolerance, seed, advance)
    return Curvature(value, loss, settled)


def hessian_trace(
    model: nn.Module, loss_fn: LossFn, batches: Iterable[Any], *, samples: int = 20, seed: int = 0
) -> Curvature:
    """tr H = Σ Hᵢᵢ of the loss, estimated as the mean of zᵀHz over random signs z (Hutchinson).

    Changes under `alpha_scale` while the function does not. Exact where H is diagonal.

    Args:
        samples: Hessian-vector products.
        model, loss_fn, batches, seed: as for `lambda_max`.
    """
    return _weighted(model, loss_fn, batches, samples, seed, lambda w: torch.ones_like(w))


def weighted_trace(
    model: nn.Module, loss_fn: LossFn, batches: Iterable[Any], *, samples: int = 20, seed: int = 0
) -> Curvature:
    """Σ wᵢ² Hᵢᵢ: how the loss curves when every weight changes by a share of itself. `alpha_scale` leaves it alone.

    Estimated as the mean of (wz)ᵀH(wz) over random signs z. Args: as for `hessian_trace`.
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
    """(eigenvalue of H farthest from `shift`, whether it settled): v ← (H - shift)v / ‖(H - shift)v‖."""
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
            return estimate, True  # H v = shift v: a flat direction, or an eigenvector by luck
        _divide(v, norm)
    return estimate, False


def _dot(v: Vector, problem: Objective) -> float:
    """vᵀg, g in `y.grad`, summed in float64."""
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
