"""What `hf_lamb.conformance` gives to an optimizer: four layers, ten steps of gradients, and the odd cases."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_lamb.conformance.rules import Hyper

__all__ = ["LAYERS", "Probe", "gradients", "weights"]

Maker = Callable[..., Optimizer]

# Shape and scale of the weights. With gradients of about 1 the trust ratios are below 0.01, between 1 and 10, above 10
# (with ‖w‖ above 10), and below 1 in the layer that does not decay.
LAYERS = {"small": ((4, 3), 0.004), "middle": ((3, 5), 2.0), "large": ((4, 4), 30.0), "bias": ((5,), 0.3)}
# Far apart, so that clipping, epsilon and bias corrections show; epsilon shows most where v is small.
SCALES = (0.001, 1.0, 0.01, 10.0, 0.1, 1.0, 3.0, 0.03, 0.3, 1.0)
OPTIONS = {"lr": 0.02, "weight_decay": 0.02}


def weights() -> list[Tensor]:
    """Return the layers before the first step, in float64: the same in every call."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) * size for shape, size in LAYERS.values()]


def gradients() -> list[list[Tensor]]:
    """Return the layers' gradients of each step, in float64: the same in every call."""
    generator = torch.Generator().manual_seed(1)
    return [
        [torch.randn(shape, generator=generator, dtype=torch.float64) * scale for shape, _ in LAYERS.values()]
        for scale in SCALES
    ]


class Probe:
    """An optimizer of the four layers. The last one, "bias", is in a group of its own without weight decay.

    Args:
        make: an optimizer class, or a function, of parameter groups and options.
        options: of the optimizer.
        dtype: of the layers.
        device: of the layers.
        start: the layers' weights. Default: `weights()`.

    Raises:
        ValueError: `make` returns no optimizer, or its groups have no lr or no betas.
    """

    def __init__(
        self,
        make: Maker,
        options: dict[str, Any],
        dtype: torch.dtype = torch.float64,
        device: str = "cpu",
        start: Sequence[Tensor] | None = None,
    ) -> None:
        options = OPTIONS | options
        given = weights() if start is None else start
        self.layers = [torch.nn.Parameter(w.to(device, dtype, copy=True)) for w in given]
        self._make, decay = make, options["weight_decay"]
        groups = [
            {"params": self.layers[:-1], "weight_decay": decay},
            {"params": self.layers[-1:], "weight_decay": 0.0},
        ]
        self.optimizer = make(groups, **options)
        if not isinstance(self.optimizer, Optimizer):
            raise ValueError(
                f"{_name(make)} returns a {type(self.optimizer).__name__}: give a subclass of torch.optim.Optimizer, "
                "or a function of parameter groups and options that returns one"
            )
        self.hyper = Hyper(
            float(self._number("lr")),
            tuple(map(float, self._number("betas"))),  # type: ignore[arg-type]
            float(self._number("eps", 0.0)),
            (*[decay] * (len(self.layers) - 1), 0.0),
        )

    def step(self, grads: Sequence[Tensor]) -> None:
        """Set the gradients and step."""
        for layer, grad in zip(self.layers, grads, strict=True):
            layer.grad = grad.to(layer, copy=True)
        self.optimizer.step()

    def read(self) -> list[Tensor]:
        """Return the weights, in float64, on the CPU."""
        return [layer.detach().to("cpu", torch.float64, copy=True) for layer in self.layers]

    def _number(self, option: str, otherwise: Any = None) -> Any:
        """An option in force: that of the groups, or the default of the class."""
        defaults = inspect.signature(type(self.optimizer)).parameters
        own = defaults[option].default if option in defaults else inspect.Parameter.empty
        value = self.optimizer.param_groups[0].get(option, otherwise if own is inspect.Parameter.empty else own)
        if value is None:
            raise ValueError(
                f"the groups of {_name(self._make)} have no {option}: give an optimizer like Adam or LAMB"
            )
        return value


def _name(make: Any) -> str:
    return getattr(make, "__name__", repr(make))
