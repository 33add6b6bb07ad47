"""Keskar's sharpness and adaptive sharpness: the largest rise of the loss within a box around the weights.

Both maximise L over a box |yᵢ - wᵢ| ≤ bᵢ by projected sign-gradient ascent,

    y ← clamp(y + η b sign ∇L(y), w - b, w + b)

With η = 2 a step goes from corner to corner, and for a convex L it never decreases L. η is halved whenever the loss
has not risen. If the gradient at a corner points to that corner, it is a local maximum; the remaining steps then start
from a random corner.
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
    """A sharpness and what it was computed from.

    Attributes:
        value: the sharpness.
        loss: the loss at the weights, in nats.
        highest_loss: the highest loss that was found in the box, in nats.
        slope: Σ bᵢ|∂L/∂wᵢ|, the sharpness of a linear loss with this gradient, in the unit of `value`. If it is most
            of `value`, the weights are not at a minimum: training has not converged.
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

    Use `adaptive_sharpness` to compare networks. Keskar's sharpness depends on the size and scale of a network, and
    `alpha_scale` changes it although the function stays the same (Dinh et al. 2017).

    Args:
        model: any module. Under DistributedDataParallel every process passes its share of the batches.
        loss_fn: `loss_fn(model, batch)` returns the batch's mean loss or a `BatchLoss`. See `cross_entropy` and
            `labels_loss`.
        batches: the fixed data; read once.
        epsilon: ε, half the box's width where a weight is zero. The paper has 1e-3 and 5e-4. Default 1e-3.
        subspace: the number p of columns of a random n x p matrix A with standard normal entries. (The paper has
            p = 100 and does not name the distribution.) A is drawn again whenever it is needed, which takes 2np random
            numbers per step. Default None: A = I, the whole space.
        steps: number of gradients over all batches. Default 20.
        seed: of A, and of random signs where the gradient is zero. Default 0.
        process_group: processes that share the batches. Default: those of a DistributedDataParallel model.

    Returns:
        `Sharpness`, with `value` in percent of 1 + L(w).

    Raises:
        ValueError: an option is out of range; there are no batches or no trainable parameters; the loss is not finite.
        hf_lamb.ShardingError: parameters are sharded.

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

    The box scales with the weights. Therefore no rescaling that keeps the function, such as `alpha_scale`, changes the
    value. A weight that is zero does not move.

    Args:
        rho: ρ, the largest relative change of a weight. Default 1e-2.
        model: see `epsilon_sharpness`, which raises the same errors.
        loss_fn: see `epsilon_sharpness`.
        batches: see `epsilon_sharpness`.
        steps: see `epsilon_sharpness`.
        seed: see `epsilon_sharpness`.
        process_group: see `epsilon_sharpness`.

    Returns:
        `Sharpness`, with `value` in nats.

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
    """Measure `adaptive_sharpness` of each layer alone, with all other layers fixed.

    A layer is a module that owns trainable parameters; a tied parameter belongs to the first one. The values need not
    add up to the sharpness of the whole network. Each layer costs as much as one `adaptive_sharpness`.

    Args:
        model: see `adaptive_sharpness`, which raises the same errors.
        loss_fn: see `adaptive_sharpness`.
        batches: see `adaptive_sharpness`.
        rho: see `adaptive_sharpness`.
        steps: see `adaptive_sharpness`. Default 10.
        seed: see `adaptive_sharpness`.

    Returns:
        `{name of the module: Sharpness}`.
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
    """The result of one step of the ascent."""

    slope: float  # Σ bᵢ|gᵢ|, with b the half widths of the box
    moved: bool  # whether any weight changed


class Region(Protocol):
    """The box that the weights may move in."""

    def move(self, step: float, at_random: bool) -> Move:
        """Do one step of sign-gradient ascent with the gradient in `y.grad`.

        Args:
            step: the length, in half widths of the box.
            at_random: if the gradient of a weight is zero, move it in a random direction instead of not at all.
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
            # Overwrites the gradient, which is not needed any more, to save memory.
            offset = _to_signs(g, self.random if at_random else None).mul_(b).mul_(step).add_(y).sub_(w)
            torch.minimum(offset, b, out=offset)
            torch.maximum(offset, b.neg_(), out=offset)
            there = offset.add_(w)
            moved |= (there != y).any()
            y.copy_(there)
        return Move(slope.item(), bool(moved.item()))

    @torch.no_grad()
    def back(self) -> None:
        """Move back to the center."""
        for w, y in self.problem.pairs():
            y.copy_(w)


class RandomSubspace:
    """The box |zᵢ| ≤ ε(|(A⁺w)ᵢ| + 1) in the span of a random matrix A, y = w + Az. Memory has only blocks of A."""

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
        """Yield ((w, y), rows, A's entries for these rows), drawn from the same seed every time."""
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
    """Maximise L from the center; the value is the highest L of any step minus L at the center."""
    loss = highest = previous = check_loss(problem.gradient())
    slope, step = 0.0, 2.0
    with progress(steps, description) as advance:
        for k in range(steps):
            # At a minimum the gradient is zero, so the first step is random where the gradient is zero.
            move = region.move(step, at_random=k == 0)
            slope = slope if k else move.slope
            if not move.moved:
                for y in problem.weights.values():
                    y.grad = torch.zeros_like(y)
                region.move(2.0, at_random=True)
                previous, step = -math.inf, 2.0
            # No step follows the last point, so it needs no gradient.
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
    """Show a progress bar on a terminal, on the first process only; yield the function that advances it by one."""
    from tqdm.auto import tqdm

    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    with tqdm(total=total, desc=description, leave=False, disable=None if first else True) as bar:
        yield bar.update


def _to_signs(gradient: Tensor, random: torch.Generator | None) -> Tensor:
    """Replace a gradient by its signs, in place; zeros get a random sign unless `random` is None."""
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
