"""The loss on the straight line between two networks, and rescaled weights that compute the same function."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_lamb.sharpness.ascent import progress
from hf_lamb.sharpness.objective import LossFn, objective, preserved_random_state, unwrapped

ALPHAS = tuple(-1 + 3 * i / 24 for i in range(25))


class Point(NamedTuple):
    """Loss and accuracy at (1 - alpha) a + alpha b."""

    alpha: float
    loss: float  # in nats
    accuracy: float | None  # None if the loss function returns no accuracy


def interpolate(
    a: nn.Module, b: nn.Module, loss_fn: LossFn, batches: Iterable[Any], alphas: Sequence[float] = ALPHAS
) -> list[Point]:
    """Measure loss and accuracy at (1 - α)a + αb: Keskar's parametric plot of two networks of the same shape.

    α = 0 is a (the small batch, in the paper), α = 1 is b; the line continues beyond both. The loss between them tells
    nothing about a or b: there is also a hill between a network and the same network with permuted hidden units, or
    with signs flipped by `alpha_scale(-1)`.

    Buffers (running statistics of batch norm) are interpolated too; outside of [0, 1] they are those of the nearer
    end.

    Args:
        a: the first network.
        b: the second one.
        alphas: the values of α. Default: 25 from -1 to 2, as in the paper.
        loss_fn: see `epsilon_sharpness`, which raises the same errors.
        batches: see `epsilon_sharpness`.

    Returns:
        One `Point` for each α.

    Raises:
        ValueError: the parameters have different names or shapes.

    Source: Keskar et al. 2017 (arXiv 1609.04836), figure 3; Goodfellow et al. 2015 (arXiv 1412.6544).
    """
    check_one_architecture(a, b)
    ends = {name: p.detach() for name, p in unwrapped(b).named_parameters()}
    stops = {name: buffer for name, buffer in unwrapped(b).named_buffers() if buffer.is_floating_point()}
    points = []
    with objective(a, loss_fn, batches) as problem, progress(len(alphas), "parametric plot") as advance:
        buffers = {name: buffer for name, buffer in problem.model.named_buffers() if name in stops}
        starts = {name: buffer.clone() for name, buffer in buffers.items()}
        for alpha in alphas:
            with torch.no_grad():
                for (w, y), name in zip(problem.pairs(), problem.weights, strict=True):
                    y.copy_((1 - alpha) * w + alpha * ends[name].to(y))
                for name, buffer in buffers.items():
                    share = min(max(alpha, 0.0), 1.0)
                    buffer.copy_((1 - share) * starts[name] + share * stops[name].to(buffer))
            points.append(Point(alpha, *problem.scores()))
            advance()
    return points


def check_one_architecture(a: nn.Module, b: nn.Module) -> None:
    """Raise ValueError if the parameters of two networks differ in names or shapes."""
    here, there = ({name: tuple(p.shape) for name, p in unwrapped(model).named_parameters()} for model in (a, b))
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            raise ValueError(
                f"give two networks of the same architecture: {name} has shape {here.get(name, 'none')} in one and "
                f"{there.get(name, 'none')} in the other"
            )


def alpha_scale(
    model: nn.Module, alpha: float, first: str, second: str, inputs: Tensor | Mapping[str, Any]
) -> nn.Module:
    """Apply Dinh's transform: return a copy of the model with (αA, B/α) in place of (A, B), the same function.

    A and its bias belong to the layer `first`, B is the weight of the layer `second` that follows it. The function f
    between them must satisfy f(αx) = αf(x). For α > 0 that holds for rectifiers, leaky ones too, for max- and
    mean-pooling and for the identity; for α = -1 it holds for odd functions such as tanh. In a transformer `value` and
    the attention's output projection are such a pair for any α.

    Args:
        model: the model; it is not changed.
        alpha: α, any number except zero.
        first: the name of a module with a `weight`, as in `model.named_modules()`.
        second: that of the module after it.
        inputs: inputs to test with: the outputs of the model and of the copy must be the same.

    Returns:
        A deep copy.

    Raises:
        ValueError: there is no such module; α is 0; the outputs differ by more than 1e-4 of their largest entry.

    Source: Dinh et al. 2017 (arXiv 1703.04933), Definition 5.
    """
    if alpha == 0:
        raise ValueError("alpha=0: expected a number that is not zero")
    scaled = copy.deepcopy(model)
    modules = dict(scaled.named_modules())
    for name in (first, second):
        if not isinstance(getattr(modules.get(name), "weight", None), Tensor):
            having = [n for n, m in modules.items() if isinstance(getattr(m, "weight", None), Tensor)]
            raise ValueError(f"{name!r} is no module with a weight: choose one of {', '.join(having)}")
    with torch.no_grad():
        modules[first].weight.mul_(alpha)
        if isinstance(getattr(modules[first], "bias", None), Tensor):
            modules[first].bias.mul_(alpha)
        modules[second].weight.div_(alpha)
    before, after = _outputs(model, inputs), _outputs(scaled, inputs)
    difference, largest = (after - before).abs().max().item(), before.abs().max().item()
    if not difference <= 1e-4 * largest:
        raise ValueError(
            f"choose two layers with a function between them that the factor passes, such as a rectifier: {first!r} "
            f"times {alpha:g} and {second!r} divided by it is another function (outputs differ by {difference:.2g}, "
            f"the largest is {largest:.2g})"
        )
    return scaled


def _outputs(model: nn.Module, inputs: Tensor | Mapping[str, Any]) -> Tensor:
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad(), preserved_random_state():
            outputs = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    finally:
        for module, training in modes:
            module.training = training
    logits = getattr(outputs, "logits", outputs)
    if not isinstance(logits, Tensor):
        raise ValueError(f"the model gives {type(outputs).__name__}: expected a tensor, or outputs with logits")
    return logits
