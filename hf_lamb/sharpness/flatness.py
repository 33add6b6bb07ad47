"""How far the weights can go before the loss has risen by ε: Hochreiter's question, asked along lines."""

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
    """Distances (L2, in weight space) at which the loss has risen by ε; inf where it had not within 10‖w‖.

    random: in each of the random directions. worst: in the worst direction found. weight_norm: ‖w‖, to compare with.
    """

    random: list[float]
    worst: float
    loss: float
    weight_norm: float

    @property
    def median(self) -> float:
        """Of the random directions."""
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
    """The distance t at which L(w + td) = L(w) + ε: for random unit directions d, and for the worst that is found.

    The worst direction is looked for from the steepest one: go to its ε-level, turn to the gradient there, `steps`
    times over. For a quadratic at its minimum that is power iteration, and t = √(2ε/λmax).

    Distances change under `alpha_scale` while the function does not; and Dinh et al. 2017 show that for a rectifier
    network the whole region within ε is unbounded, its volume infinite. So a distance says something about these
    weights, nothing about the function.

    Args:
        epsilon: ε, the rise of the loss, in nats.
        directions: how many random directions, uniform on the sphere.
        steps: turns in the search for the worst direction; 0 for the gradient's own.
        seed: of the random directions.
        model, loss_fn, batches: as for `epsilon_sharpness`, and so are the errors raised.

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
                _randomize(problem, generator)  # at a minimum there is no steepest direction to start from
            distance = _distance(problem, loss + epsilon, weight_norm)
            advance()
            worst = min(worst, distance)
            if math.isinf(distance):
                break
            problem.gradient()
    return Flatness(random, worst, loss, weight_norm)


def _distance(problem: Objective, level: float, weight_norm: float) -> float:
    """The smallest t found with L(w + td) ≥ level, d in `y.grad`: by doubling, then by halving the last interval.

    Leaves the weights at w + td.
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
    """L(w + td), d in `y.grad`."""
    for w, y in problem.pairs():
        y.copy_(w)
        if distance:
            assert y.grad is not None
            y.add_(y.grad, alpha=distance)
    return problem.value()


def _randomize(problem: Objective, generator: torch.Generator) -> None:
    """A random unit direction into `y.grad`."""
    for y in problem.weights.values():
        y.grad = torch.randn(y.shape, generator=generator, device=y.device, dtype=y.dtype)
    _normalize(problem)


def _normalize(problem: Objective) -> bool:
    """Scale `y.grad` to norm 1; False where it is zero."""
    norm = _norm(y.grad for y in problem.weights.values() if y.grad is not None)
    if norm == 0 or not math.isfinite(norm):
        return False
    for y in problem.weights.values():
        assert y.grad is not None
        y.grad.div_(norm)
    return True


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(torch.linalg.vector_norm(x, dtype=torch.float64).item() ** 2 for x in tensors))
