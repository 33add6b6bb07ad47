"""Which rule an optimizer follows, and where it departs first from the nearest one that has a name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_lamb.conformance.probe import LAYERS, Maker, Probe, gradients
from hf_lamb.conformance.rules import VARIANTS, Rule, clipped, differences, moments, nearby_rules

__all__ = ["Departure", "Identity", "identify"]

# Of a step. Other rules differ by more than 1e-4 of one at least once; some LAMBs add an epsilon to ‖u‖, 1e-6 of it.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-3}


@dataclass(frozen=True)
class Departure:
    """Where an optimizer first does something else than a rule, both from the same weights."""

    step: int  # from 1
    layer: str  # the one that departs most
    size: float  # the norm of the difference over that of the rule's step

    def __str__(self) -> str:
        return f"step {self.step}, layer {self.layer}, by {self.size:.1e} of the step"


@dataclass(frozen=True)
class Identity:
    """What `identify` finds.

    Args:
        variant: the name in VARIANTS; None if the optimizer is none of them.
        nearest: the variant with the fewest differences, or, where no rule fits, the one it follows for longest.
        differences: from the nearest variant, in words; empty where no rule fits.
        departure: from the nearest variant; None if it is that variant.
        dtype: of the weights that were compared: float32 for an optimizer that takes no float64.
    """

    variant: str | None
    nearest: str
    differences: tuple[str, ...]
    departure: Departure | None
    dtype: torch.dtype

    def __str__(self) -> str:
        name = "no LAMB: AdamW" if self.nearest == "AdamW" else self.nearest
        if self.variant is not None:
            return name
        if self.differences:
            return f"{name}, but {'; '.join(self.differences)}"
        return f"none of the known rules; it follows {self.nearest} for longest"


def identify(make: Maker, options: dict[str, Any] | None = None, device: str = "cpu") -> Identity:
    """Find the rule that an optimizer follows.

    Every step is compared with what the rules make of the same weights and gradients, at the optimizer's own rate,
    betas, epsilon and weight decay. Two rules that are the same at these options cannot be told apart; the first one
    of VARIANTS counts.

    Args:
        make: an optimizer class, or a function, of parameter groups and options.
        options: of the optimizer. Those that `hf_lamb.conformance.probe` sets: lr and weight_decay, 0.02 each.
        device: where the optimizer runs.

    Raises:
        ValueError: the optimizer cannot be built, or cannot step.
    """
    runs, failed = [], None
    for dtype in TOLERANCE:
        try:
            runs.append((_Observed(make, options or {}, dtype, device), dtype))
        except Exception as error:  # what other people's optimizers raise is not known
            failed = failed or error
            continue
        if found := _fitting(*runs[-1]):  # in float32 too: some compute in float32 whatever the weights are
            return found
    if not runs:
        raise ValueError(f"{type(failed).__name__}: {' '.join(str(failed).split())}") from failed
    departures = {
        (name, dtype): departure
        for observed, dtype in runs
        for name, rule in VARIANTS.items()
        if (departure := observed.departure(rule))
    }
    nearest = max(departures, key=lambda key: (departures[key].step, -departures[key].size))
    return Identity(None, nearest[0], (), departures[nearest], nearest[1])


def _fitting(observed: _Observed, dtype: torch.dtype) -> Identity | None:
    """Return the first rule that the optimizer follows, the variants before all others."""
    for name, rule in [*VARIANTS.items(), *nearby_rules()]:
        if rule.adapts == "decaying" and not any(observed.hyper.weight_decays):
            continue  # without decay no layer adapts: it is Adam
        if observed.fits(rule):
            if rule == VARIANTS[name]:
                return Identity(name, name, (), None, dtype)
            return Identity(None, name, differences(rule, name), observed.departure(VARIANTS[name]), dtype)
    return None


class _Observed:
    """What the optimizer does in ten steps, to be compared with rules."""

    def __init__(self, make: Maker, options: dict[str, Any], dtype: torch.dtype, device: str) -> None:
        probe = Probe(make, options, dtype, device)
        path = [probe.read()]
        for grads in gradients():
            probe.step(grads)
            path.append(probe.read())
        layers = [torch.stack([w.flatten() for w in layer]) for layer in zip(*path, strict=True)]
        self.before, self.after = [w[:-1] for w in layers], [w[1:] for w in layers]
        self.hyper, self.tolerance = probe.hyper, TOLERANCE[dtype]
        given = [torch.stack([g.flatten() for g in layer]) for layer in zip(*gradients(), strict=True)]
        limits = {rule.max_grad_norm for rule in VARIANTS.values()}
        self.moments = {limit: [moments(g, self.hyper.betas) for g in clipped(given, limit)] for limit in limits}
        self.t = torch.arange(1, len(given[0]) + 1, dtype=torch.float64)[:, None]

    def fits(self, rule: Rule) -> bool:
        """Return whether the optimizer follows a rule."""
        return all(bool((sizes <= self.tolerance).all()) for sizes in self._sizes(rule))

    def departure(self, rule: Rule) -> Departure | None:
        """Return where the optimizer first departs from a rule, or None."""
        table = torch.stack(list(self._sizes(rule)), dim=1)  # [steps, layers]
        departs = (table > self.tolerance).any(dim=1).nonzero()
        if not len(departs):
            return None
        step = int(departs[0])
        layer = int(table[step].argmax())
        return Departure(step + 1, list(LAYERS)[layer], float(table[step, layer]))

    def _sizes(self, rule: Rule) -> Iterator[Tensor]:
        """Yield for each layer how far off the rule each step is."""
        layers = zip(self.before, self.after, self.moments[rule.max_grad_norm], self.hyper.weight_decays, strict=True)
        for before, after, (m, v), decay in layers:
            expected = rule.after(before, m, v, self.t, decay, self.hyper)
            size = (after - expected).norm(dim=-1) / (expected - before).norm(dim=-1)
            yield size.nan_to_num(torch.inf, torch.inf)
