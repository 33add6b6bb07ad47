"""Flatness along lines, after Hochreiter: how far the weights can move before the loss has risen by ε."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_lamb.sharpness.ascent import progress
from hf_lamb.sharpness.objective import LossFn, Objective, check_loss, objective


class Flatness(NamedTuple):
    """Distances (L2 norm of the change of all weights) at which the loss has risen by ε; inf if beyond 10‖w‖."""

    random: list[float]  # in each of the random directions
    worst: float  # in the worst direction that was found
    loss: float  # at the weights, in nats
    weight_norm: float  # ‖w‖, for comparison

    @property
    def median(self) -> float:
        """The median of the distances in the random directions."""
        return median(self.random)


def epsilon_flatness(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    epsilon: float = 0.1,
    *,
    directions: int = 10,
    steps: int = 10,
    seed: int = 0,
) -> Flatness:
    """Measure the distance t at which L(w + td) = L(w) + ε, for random unit directions d and for a worst direction.

    The search for the worst direction starts with the gradient. In each of `steps` turns it goes to the distance t in
    the present direction, and takes the gradient there as the next direction. For a quadratic loss at its minimum this
    is power iteration, and t = √(2ε/λmax).

    `alpha_scale` changes distances although the function stays the same. Dinh et al. 2017 show that for a rectifier
    network the region within ε is unbounded and has infinite volume. So a distance describes these weights, not the
    function.

    Args:
        epsilon: ε, the rise of the loss, in nats. Default 0.1.
        directions: number of random directions, uniform on the sphere. Default 10.
        steps: turns in the search for the worst direction; 0 uses the gradient's direction. Default 10.
        seed: of the random directions. Default 0.
        model: see `epsilon_sharpness`, which raises the same errors.
        loss_fn: see `epsilon_sharpness`.
        batches: see `epsilon_sharpness`.

    Returns:
        `Flatness`.

    Source: Hochreiter and Schmidhuber 1997, "Flat Minima", who ask for a large region in which the error stays within
    a tolerance; Dinh et al. 2017 (arXiv 1703.04933), Definition 1 and Theorem 2.
    """
    if not (isinstance(epsilon, int | float) and 0 < epsilon < math.inf):
        raise ValueError(f"epsilon={epsilon!r}: expected a positive number")
    for name, count in (("directions", directions), ("steps", steps)):
        if isinstance(count, bool) or not isinstance(count, int) or count < (name == "directions"):
            raise ValueError(f"{name}={count!r}: expected a whole number, at least {int(name == 'directions')}")
    with (
        objective(model, loss_fn, batches) as problem,
        progress(directions + steps + 1, f"flatness, ε = {epsilon:g}") as advance,
    ):
        loss = check_loss(problem.scores().loss)
        weight_norm = _norm(w for w, _ in problem.pairs())
        generator = torch.Generator(problem.device).manual_seed(seed)
        random = []
        for _ in range(directions):
            _randomize(problem, generator)
            random.append(_distance(problem, loss + epsilon, weight_norm))
            advance()
        _go(problem, 0.0)
        worst = math.inf
        problem.gradient()
        for _ in range(steps + 1):
            if not _normalize(problem):
                _randomize(problem, generator)  # the gradient is zero: start from a random direction
            distance = _distance(problem, loss + epsilon, weight_norm)
            advance()
            worst = min(worst, distance)
            if math.isinf(distance):
                break
            problem.gradient()
    return Flatness(random, worst, loss, weight_norm)


def _distance(problem: Objective, level: float, weight_norm: float) -> float:
    """Return the smallest t that was found with L(w + td) ≥ level, with d in `y.grad`; the weights are then at w + td.

    It doubles t until the level is reached, then bisects the last interval.
    """
    low, high = 0.0, 1e-3 * (weight_norm or 1.0)
    while _go(problem, high) < level:
        low, high = high, 2 * high
        if high > 10 * (weight_norm or 1.0):
            return math.inf
    while high - low > 1e-3 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _go(problem, middle) < level else (low, middle)
    _go(problem, high)
    return high


@torch.no_grad()
def _go(problem: Objective, distance: float) -> float:
    """Move the weights to w + td, with d in `y.grad`, and return the loss there."""
    for w, y in problem.pairs():
        y.copy_(w)
        if distance:
            assert y.grad is not None
            y.add_(y.grad, alpha=distance)
    return problem.value()


def _randomize(problem: Objective, generator: torch.Generator) -> None:
    """Write a random unit direction into `y.grad`."""
    for y in problem.weights.values():
        y.grad = torch.randn(y.shape, generator=generator, device=y.device, dtype=y.dtype)
    _normalize(problem)


def _normalize(problem: Objective) -> bool:
    """Scale `y.grad` to norm 1; return False if it is zero or not finite."""
    norm = _norm(y.grad for y in problem.weights.values() if y.grad is not None)
    if norm == 0 or not math.isfinite(norm):
        return False
    for y in problem.weights.values():
        assert y.grad is not None
        y.grad.div_(norm)
    return True


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(torch.linalg.vector_norm(x, dtype=torch.float64).item() ** 2 for x in tensors))
