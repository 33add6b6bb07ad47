"""What a backend gets: local tensors of one group, one device and the same dtypes, sharded over the same processes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hf_lamb.norms import any_nonzero, dots, layer_ratio, math_dtype, norm_keeping


@dataclass(slots=True)
class Bucket:
    """Parallel lists of local tensors, the options of their group, and this step's decisions for all of them."""

    group: dict[str, Any]  # the options
    key: Any = None  # identifies the bucket in its optimizer; the same in every step
    cut: int | None = None  # index in `Sharding.cuts`; None if the layers are not sharded
    contiguous: bool = True  # all of the tensors below
    names: list[str] = field(default_factory=list)
    places: list[int] = field(default_factory=list)  # the layers' indices in that cut
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    # 0-dim tensors on this bucket's device; None if the option is off.
    finite: Tensor | None = None
    clip_factor: Tensor | None = None

    def add(
        self, name: str, place: int, param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor
    ) -> None:
        """Append one layer's piece."""
        self.names.append(name)
        self.places.append(place)
        self.params.append(param)
        self.grads.append(grad)
        self.exp_avgs.append(exp_avg)
        self.exp_avg_sqs.append(exp_avg_sq)
        self.steps.append(step)

    def parts(self, size: int) -> Iterator[Bucket]:
        """Yield the bucket in parts of at most `size` elements; a larger tensor is a part of its own."""
        start, elements = 0, 0
        for stop, param in enumerate(self.params):
            if stop > start and elements + param.numel() > size:
                yield self._part(slice(start, stop))
                start, elements = stop, 0
            elements += param.numel()
        yield self._part(slice(start, None))

    def _part(self, part: slice) -> Bucket:
        lists = ("names", "places", "params", "grads", "exp_avgs", "exp_avg_sqs", "steps")
        return replace(self, **{name: getattr(self, name)[part] for name in lists})

    @property
    def device(self) -> torch.device:
        return self.params[0].device

    @property
    def math_dtype(self) -> torch.dtype:
        """The dtype of the arithmetic and of the state: float64 for float64 parameters, else float32."""
        return math_dtype(self.params[0])

    def advance(self) -> None:
        """Add 1 to the step counts, unless this step is skipped."""
        if self.finite is None:
            torch._foreach_add_(self.steps, 1.0)
        else:
            # A list, because the overload for one tensor reads it back to the host on CPU.
            torch._foreach_add_(self.steps, [self.finite.to(torch.float32)] * len(self.steps))

    @property
    def betas(self) -> tuple[float | Tensor, float | Tensor]:
        """(beta1, beta2); both are 1 if this step is skipped, so that the moments do not change."""
        beta1, beta2 = self.group["betas"]
        if self.finite is None:
            return beta1, beta2
        one = torch.ones((), dtype=self.math_dtype, device=self.device)
        return torch.where(self.finite, beta1, one), torch.where(self.finite, beta2, one)

    @property
    def eps(self) -> float | Tensor:
        """eps. If eps is 0 and this step is skipped, it is 1: this keeps u finite, because 0·NaN is NaN."""
        eps: float = self.group["eps"]
        if eps > 0 or self.finite is None:
            return eps
        return torch.where(self.finite, 0.0, torch.ones((), dtype=self.math_dtype, device=self.device))

    def gradient(self, grad: Tensor) -> Tensor:
        """Return `grad` in the dtype of the arithmetic, signed and clipped; zero if this step is skipped.

        `grad` itself is never written to.
        """
        grad = grad.to(self.math_dtype)
        if self.group["maximize"]:
            grad = -grad
        if self.clip_factor is not None:
            grad = grad * self.clip_factor
        return grad if self.finite is None else torch.where(self.finite, grad, 0.0)

    def nonzero(self, grads: list[Tensor], exp_avgs: list[Tensor]) -> Tensor:
        """`Sum.NONZERO` of tensors of this bucket, from their gradients as given and their moved first moments.

        Of the gradients too, because (1 - beta1)*g may underflow, or cancel what was in m.
        """
        if not self.group["layer_adaptation"]:
            return torch.zeros(len(grads), dtype=self.math_dtype, device=self.device)
        return (any_nonzero(grads) | any_nonzero(exp_avgs)).to(self.math_dtype)

    @property
    def fixes_norms(self) -> bool:
        """Whether the layers keep their norms: `fixed_norm` is for layers that adapt."""
        return bool(self.group["fixed_norm"] and self.group["layer_adaptation"])

    def dots(self, weights: list[Tensor], updates: list[Tensor]) -> Tensor:
        """`Sum.DOT` of tensors of this bucket."""
        if not self.fixes_norms:
            return torch.zeros(len(weights), dtype=self.math_dtype, device=self.device)
        return dots(weights, updates)

    def at_rest(self, u: Tensor, step_size: Tensor) -> Tensor:
        """Return u, or zero if the step size is zero: with eps 0, u may be 0/0, and 0·NaN is NaN."""
        return u if self.group["eps"] > 0 else torch.where(step_size == 0, 0.0, u)

    def step_sizes(self, sums: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return step size and growth of each layer, shape [n] each: w = w + growth·w - step_size·u.

        The step size is lr·r, and there is no growth (None), unless the layers keep their norms. Both are zero if this
        step is skipped.
        """
        lr, ratio = self.group["lr"], layer_ratio(sums, self.group)
        if isinstance(lr, Tensor):
            lr = lr.reshape(())  # a one-element tensor would broadcast as well, but a 0-dim one may live on the CPU
            if lr.device.type != "cpu":
                lr = lr.to(ratio.device)  # some parameters may be elsewhere
        sizes: Tensor = lr * ratio
        if self.finite is not None:
            sizes = sizes * self.finite
        return norm_keeping(sums, sizes) if self.fixes_norms else (sizes, None)

    def bias_corrections(self) -> tuple[Tensor, Tensor]:
        """Return 1 - beta1**t and 1 - beta2**t of each parameter, shape [n]; ones without bias_correction."""
        # If its first step is skipped, t is still 0. The update is not applied, but it must be finite.
        t = torch.stack(self.steps).to(self.math_dtype).clamp_(min=1)
        if not self.group["bias_correction"]:
            return torch.ones_like(t), torch.ones_like(t)
        beta1, beta2 = self.group["betas"]
        return one_minus_power(beta1, t), one_minus_power(beta2, t)


def one_minus_power(beta: float, t: Tensor) -> Tensor:
    """1 - beta**t without cancellation: in fp32, 1 - 0.999**1 is off by 1.3e-5, this by one rounding."""
    return -torch.expm1(t * (math.log(beta) if beta > 0 else -math.inf))
