"""How much the loss can rise within a box round the weights: Keskar's sharpness, and the scale-invariant one.

Both maximise L over a box |yᵢ - wᵢ| ≤ bᵢ by projected sign-gradient ascent,

    y ← clamp(y + η b sign ∇L(y), w - b, w + b)

η = 2 goes from corner to corner, and for a convex L never downhill. It is halved whenever the loss has not risen. A
corner that the gradient at it points to is a local maximum: what steps remain go on from a random corner.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from hf_lamb.sharpness.objective import LossFn, Objective, check_loss, objective


class Sharpness(NamedTuple):
    """A sharpness, the loss at the weights themselves, the highest loss found nearby, and what the slope accounts for.

    slope: Σ bᵢ|∂L/∂wᵢ|, the value that the gradient alone would give, in the value's unit. Where it is most of the
    value, the weights are not at a minimum, and what was measured is how far training is from having settled.
    """

    value: float
    loss: float
    highest_loss: float
    slope: float


def epsilon_sharpness(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    epsilon: float = 1e-3,
    *,
    subspace: int | None = None,
    steps: int = 20,
    seed: int = 0,
    process_group: ProcessGroup | None = None,
) -> Sharpness:
    """Keskar's sharpness: φ = 100 (max L(w + Az) - L(w)) / (1 + L(w)) over |zᵢ| ≤ ε(|(A⁺w)ᵢ| + 1).

    Not comparable between networks of different size or scale, and not invariant: `alpha_scale` changes it and
    leaves the function as it is (Dinh et al. 2017). `adaptive_sharpness` is the one to judge by.

    Args:
        model: any module; under DistributedDataParallel every process passes its share of the batches.
        loss_fn: `loss_fn(model, batch)` gives the batch's mean loss, or a `BatchLoss`. See `cross_entropy`,
            `labels_loss`.
        batches: the data, fixed; read once.
        epsilon: ε, half the box's width where a weight is zero. The paper has 1e-3 and 5e-4.
        subspace: None for A = I, the whole space; else the number p of columns of a random n x p matrix A with
            standard normal entries (the paper has p = 100 and leaves the distribution open). A is drawn anew
            whenever it is needed, which takes 2np random numbers a step.
        steps: K, gradients over all batches.
        seed: of A, and of the signs to leave a point without a gradient by.
        process_group: processes that share the batches; by default those of a DistributedDataParallel model.

    Returns:
        `Sharpness`, its value in percent of 1 + L(w).

    Raises:
        ValueError: an option out of range; what `objective` refuses. ShardingError: sharded parameters.

    Source: Keskar et al. 2017 (arXiv 1609.04836), Metric 2.1; there with ten iterations of L-BFGS-B.
    """
    _check("epsilon", epsilon, steps)
    with objective(model, loss_fn, batches, process_group) as problem:
        if subspace is None:
            region: Region = WholeSpace(problem, lambda w: w.abs().add_(1).mul_(epsilon), seed)
        else:
            region = RandomSubspace(problem, epsilon, subspace, seed)
        found = ascend(problem, region, steps, f"sharpness, ε = {epsilon:g}")
    percent = 100 / (1 + found.loss)
    return found._replace(value=percent * found.value, slope=percent * found.slope)


def adaptive_sharpness(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    rho: float = 1e-2,
    *,
    steps: int = 20,
    seed: int = 0,
    process_group: ProcessGroup | None = None,
) -> Sharpness:
    """Adaptive sharpness: max L(w + δ) - L(w) over |δᵢ| ≤ ρ|wᵢ|, in nats.

    The box scales with the weights, so that no rescaling that leaves the function as it is, `alpha_scale` among
    them, changes the value. A weight that is zero stays where it is.

    Args:
        rho: ρ, the largest relative change of a weight.
        model, loss_fn, batches, steps, seed, process_group: as for `epsilon_sharpness`, and so are the errors raised.

    Source: Kwon et al. 2021 (arXiv 2102.11600) with the maximum norm; Andriushchenko et al. 2023 (arXiv 2302.07011),
    who find that it does not predict generalisation either.
    """
    _check("rho", rho, steps)
    with objective(model, loss_fn, batches, process_group) as problem:
        region = WholeSpace(problem, lambda w: w.abs().mul_(rho), seed)
        return ascend(problem, region, steps, f"adaptive sharpness, ρ = {rho:g}")


def layer_sharpness(
    model: nn.Module,
    loss_fn: LossFn,
    batches: Iterable[Any],
    rho: float = 1e-2,
    *,
    steps: int = 10,
    seed: int = 0,
) -> dict[str, Sharpness]:
    """`adaptive_sharpness` of each layer by itself, the others staying as they are: `{module's name: Sharpness}`.

    A layer is a module that owns trainable parameters; a tied one counts where it comes first. The parts need not
    add up to the whole. Costs as much as `adaptive_sharpness` for every layer.
    """
    _check("rho", rho, steps)
    found = {}
    with objective(model, loss_fn, batches) as problem:
        layers: dict[str, list[str]] = {}
        for name in problem.weights:
            layers.setdefault(name.rpartition(".")[0], []).append(name)
        whole = problem.weights
        for layer, names in layers.items():
            for name, y in whole.items():
                y.requires_grad_(name in names)
                y.grad = None
            problem.weights = {name: whole[name] for name in names}
            region = WholeSpace(problem, lambda w: w.abs().mul_(rho), seed)
            found[layer] = ascend(problem, region, steps, f"adaptive sharpness of {layer}")
            region.back()
    return found


class Move(NamedTuple):
    """What a step of the ascent has seen and done: Σ bᵢ|gᵢ| along the box's sides, and whether anything moved."""

    slope: float
    moved: bool


class Region(Protocol):
    """The box that the weights may move in."""

    def move(self, step: float, at_random: bool) -> Move:
        """One step of sign-gradient ascent, `step` half widths of the box, by the gradient in `y.grad`.

        at_random: where the gradient is zero, go up or down by lot; else stay.
        """


class WholeSpace:
    """A box along the coordinates: |yᵢ - wᵢ| ≤ bᵢ, b = `half_width(w)`."""

    def __init__(self, problem: Objective, half_width: Callable[[Tensor], Tensor], seed: int) -> None:
        self.problem = problem
        self.half_width = half_width
        self.random = torch.Generator(problem.device).manual_seed(seed)

    @torch.no_grad()
    def move(self, step: float, at_random: bool) -> Move:
        """See `Region`."""
        slope = torch.zeros((), dtype=torch.float64, device=self.problem.device)
        moved = torch.zeros((), dtype=torch.bool, device=self.problem.device)
        for w, y in self.problem.pairs():
            assert y.grad is not None
            b, g = self.half_width(w), y.grad
            slope += torch.linalg.vector_norm(b * g, ord=1, dtype=torch.float64)
            # In the gradient's place, which is not needed any more: an embedding is a large part of a model.
            offset = _to_signs(g, self.random if at_random else None).mul_(b).mul_(step).add_(y).sub_(w)
            torch.minimum(offset, b, out=offset)
            torch.maximum(offset, b.neg_(), out=offset)
            there = offset.add_(w)
            moved |= (there != y).any()
            y.copy_(there)
        return Move(slope.item(), bool(moved.item()))

    @torch.no_grad()
    def back(self) -> None:
        """To the center."""
        for w, y in self.problem.pairs():
            y.copy_(w)


class RandomSubspace:
    """The box |zᵢ| ≤ ε(|(A⁺w)ᵢ| + 1) in the span of a random matrix A, y = w + Az; A is never held as a whole."""

    def __init__(self, problem: Objective, epsilon: float, columns: int, seed: int) -> None:
        size = sum(y.numel() for y in problem.weights.values())
        if not 1 <= columns <= size:
            raise ValueError(f"subspace={columns}: expected between 1 and {size}, the number of trainable weights")
        self.problem = problem
        self.columns = columns
        self.seed = seed
        self.random = torch.Generator(problem.device).manual_seed(seed + 1)
        gram = torch.zeros(columns, columns, dtype=torch.float64, device=problem.device)
        projected = torch.zeros(columns, dtype=torch.float64, device=problem.device)
        for (w, _), rows, a in self._blocks():
            gram += (a.T @ a).double()
            projected += (a.T @ w.flatten()[rows]).double()
        self.b = epsilon * (torch.linalg.solve(gram, projected).abs() + 1)
        self.z = torch.zeros_like(self.b)

    @torch.no_grad()
    def move(self, step: float, at_random: bool) -> Move:
        """See `Region`."""
        gradient = torch.zeros_like(self.z)  # Aᵀ∇L
        for (_, y), rows, a in self._blocks():
            assert y.grad is not None
            gradient += (a.T @ y.grad.flatten()[rows]).double()
        before, slope = self.z, torch.sum(self.b * gradient.abs()).item()
        signs = _to_signs(gradient, self.random if at_random else None)
        self.z = torch.clamp(before + step * self.b * signs, -self.b, self.b)
        for (w, y), rows, a in self._blocks():
            y.view(-1)[rows] = w.flatten()[rows] + a @ self.z.to(a.dtype)
        return Move(slope, not torch.equal(self.z, before))

    def _blocks(self, rows: int = 8192) -> Iterator[tuple[tuple[Tensor, nn.Parameter], slice, Tensor]]:
        """((w, y), rows, A's entries for them), drawn from the same seed every time."""
        generator = torch.Generator(self.problem.device).manual_seed(self.seed)
        for w, y in self.problem.pairs():
            for start in range(0, y.numel(), rows):
                stop = min(start + rows, y.numel())
                shape = (stop - start, self.columns)
                yield (
                    (w, y),
                    slice(start, stop),
                    torch.randn(shape, generator=generator, device=y.device, dtype=y.dtype),
                )


def ascend(problem: Objective, region: Region, steps: int, description: str) -> Sharpness:
    """From the center up: the value is the highest L met on the way less that at the center."""
    loss = highest = previous = check_loss(problem.gradient())
    slope, step = 0.0, 2.0
    with progress(steps, description) as advance:
        for k in range(steps):
            # At a minimum there is no slope to follow, so the first step goes by lot where there is none.
            move = region.move(step, at_random=k == 0)
            slope = slope if k else move.slope
            if not move.moved:
                for y in problem.weights.values():
                    y.grad = torch.zeros_like(y)
                region.move(2.0, at_random=True)
                previous, step = -math.inf, 2.0
            # The last point needs no gradient to go on from.
            here = problem.gradient() if k < steps - 1 else problem.value()
            advance()
            if not math.isfinite(here):
                return Sharpness(math.inf, loss, math.inf, slope)
            highest = max(highest, here)
            step = step if here > previous else step / 2
            previous = here
    return Sharpness(highest - loss, loss, highest, slope)


@contextmanager
def progress(total: int, description: str) -> Iterator[Callable[[], object]]:
    """A bar on a terminal, on the first process only; yields the function that advances it by one."""
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    with tqdm(total=total, desc=description, leave=False, disable=None if first else True) as bar:
        yield bar.update


def _to_signs(gradient: Tensor, random: torch.Generator | None) -> Tensor:
    """Make it its own signs, in place; where it is zero, a random sign, unless `random` is None."""
    signs = gradient.sign_()
    if random is not None:
        coin = torch.empty_like(signs).bernoulli_(0.5, generator=random).mul_(2).sub_(1)
        signs.add_(coin.mul_(signs == 0))
    return signs


def _check(name: str, radius: float, steps: int) -> None:
    if not (isinstance(radius, int | float) and 0 < radius < math.inf):
        raise ValueError(f"{name}={radius!r}: expected a positive number")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps={steps!r}: expected a whole number, at least 1")
