"""The update rules that are called LAMB, in float64: the judge of `hf_lamb.conformance`. It imports no optimizer."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["VARIANTS", "Hyper", "Rule", "clipped", "differences", "golden", "moments", "nearby_rules"]


class Hyper(NamedTuple):
    """The numbers of an optimizer: every rule is compared at these."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decays: tuple[float, ...]  # of each layer


@dataclass(frozen=True)
class Rule:
    """An update rule. The default is Algorithm 2 of the paper's v4 and v5; each field is a way in which others differ.

    Args:
        bias_correction: of which moments. "after" scales the step after the trust ratio.
        epsilon: added beside the root of v, or inside of it.
        decay: in u; outside of the ratio, as AdamW decays; or before the norms are computed.
        adapts: which layers have a trust ratio.
        max_trust_ratio: the upper bound of the ratio.
        min_trust_ratio: the lower bound of the ratio.
        max_weight_norm: the upper bound of ‖w‖ in the ratio.
        max_grad_norm: the norm that all gradients together are clipped to.
        fixed_norm: whether each layer is scaled back to the norm that it had before the step.
        norm: of the weights before the step, or of those that a step without a ratio has updated.
    """

    bias_correction: str = "both"  # "none", "first", "both after", "first after"
    epsilon: str = "beside"  # "inside"
    decay: str = "in u"  # "outside", "before"
    adapts: str = "all"  # "decaying", "none"
    max_trust_ratio: float | None = None
    min_trust_ratio: float | None = None
    max_weight_norm: float | None = None
    max_grad_norm: float | None = None
    fixed_norm: bool = False
    norm: str = "before"  # "updated"

    def after(self, w: Tensor, m: Tensor, v: Tensor, t: Tensor, decay: float, hyper: Hyper) -> Tensor:
        """Return a layer's weights after step t. The layer is the last dimension; others are steps of their own."""
        beta1, beta2 = hyper.betas
        corrections = 1 - beta1**t, (1 - beta2**t).sqrt()
        late: Tensor | float = hyper.lr
        if self.bias_correction in ("both", "first"):
            m = m / corrections[0]
        if self.bias_correction == "both":
            v = v / corrections[1] ** 2
        if self.bias_correction in ("both after", "first after"):
            late = late / corrections[0]
        if self.bias_correction == "both after":
            late = late * corrections[1]
        root = v.sqrt() + hyper.eps if self.epsilon == "beside" else (v + hyper.eps).sqrt()
        u, old = m / root, w
        if self.decay == "before":
            w = w - hyper.lr * decay * w
        elif self.decay == "in u":
            u = u + decay * w
        moved = w - late * self._ratio(w, u, decay, hyper.lr) * u
        if self.decay == "outside":
            moved = moved - hyper.lr * decay * w
        if self.fixed_norm and self._adapts(decay):
            moved = moved * old.norm(dim=-1, keepdim=True) / moved.norm(dim=-1, keepdim=True)
        return moved

    def _adapts(self, decay: float) -> bool:
        return self.adapts == "all" or (self.adapts == "decaying" and decay != 0)

    def _ratio(self, w: Tensor, u: Tensor, decay: float, lr: float) -> Tensor | float:
        if not self._adapts(decay):
            return 1.0
        w = w - lr * u if self.norm == "updated" else w
        w_norm, u_norm = w.norm(dim=-1, keepdim=True), u.norm(dim=-1, keepdim=True)
        ratio = (w_norm if self.max_weight_norm is None else w_norm.clamp(max=self.max_weight_norm)) / u_norm
        if self.min_trust_ratio is not None or self.max_trust_ratio is not None:
            ratio = ratio.clamp(self.min_trust_ratio, self.max_trust_ratio)
        return torch.where((w_norm > 0) & (u_norm > 0), ratio, 1.0)


# The rows of README's table of variants. Of two that are the same at some options, the first one counts.
VARIANTS = {
    "v4/v5": Rule(),
    "AdamW": Rule(adapts="none"),
    "v1": Rule(max_trust_ratio=10.0),
    "v2/v3": Rule(bias_correction="none"),
    "NVLAMB": Rule(max_grad_norm=1.0),
    "apex": Rule(max_grad_norm=1.0, adapts="decaying"),
    "LAMBC": Rule(max_trust_ratio=1.0),
    "fixed norm": Rule(fixed_norm=True),
}

_WORDS: dict[tuple[str, Any], str] = {
    ("bias_correction", "both"): "both moments are corrected for their bias, in u",
    ("bias_correction", "none"): "no bias correction",
    ("bias_correction", "first"): "no bias correction of the second moment",
    ("bias_correction", "both after"): "the bias corrections scale the step after the trust ratio",
    (
        "bias_correction",
        "first after",
    ): "only the first moment's bias correction, after the trust ratio",
    ("epsilon", "beside"): "epsilon beside the root",
    ("epsilon", "inside"): "epsilon inside the root",
    ("decay", "in u"): "weight decay in u",
    ("decay", "outside"): "weight decay outside of the trust ratio",
    ("decay", "before"): "weight decay before the norms, outside of the trust ratio",
    ("adapts", "all"): "a trust ratio in every layer",
    ("adapts", "decaying"): "a trust ratio only in layers with weight decay",
    ("adapts", "none"): "no trust ratio",
    ("max_trust_ratio", None): "no upper bound of the trust ratio",
    ("max_trust_ratio", 10.0): "a trust ratio of at most 10",
    ("max_trust_ratio", 1.0): "a trust ratio of at most 1",
    ("min_trust_ratio", None): "no lower bound of the trust ratio",
    ("min_trust_ratio", 0.01): "a trust ratio of at least 0.01",
    ("max_weight_norm", None): "no bound of ‖w‖",
    ("max_weight_norm", 10.0): "‖w‖ counts as at most 10",
    ("max_grad_norm", None): "no gradient clipping",
    ("max_grad_norm", 1.0): "gradients clipped to a norm of 1",
    ("fixed_norm", False): "norms of layers may change",
    ("fixed_norm", True): "layers keep their norms",
    ("norm", "before"): "the trust ratio of the weights before the step",
    ("norm", "updated"): "the trust ratio of the updated weights",
}


def differences(rule: Rule, variant: str) -> tuple[str, ...]:
    """Return in words what a rule does differently from a variant."""
    named = VARIANTS[variant]
    values = ((field.name, getattr(rule, field.name), getattr(named, field.name)) for field in fields(Rule))
    return tuple(_WORDS[name, value] for name, value, its in values if value != its)


MOST = 3  # differences: of those that are known, pytorch_optimizer's LAMB has as many


@cache
def nearby_rules() -> tuple[tuple[str, Rule], ...]:
    """Return the rules with at most MOST differences from their nearest variant, those with fewest first."""

    def all_rules() -> Iterator[tuple[int, str, Rule]]:
        names = [field.name for field in fields(Rule)]
        choices = [[value for name, value in _WORDS if name == of] for of in names]
        variants = [(name, tuple(getattr(rule, n) for n in names)) for name, rule in VARIANTS.items()]
        for values in itertools.product(*choices):
            rule = Rule(*values)
            if rule.adapts == "none" and rule != replace(Rule(*values[:4]), max_grad_norm=rule.max_grad_norm):
                continue  # what is said of the ratio changes nothing
            counts = {name: sum(a != b for a, b in zip(values, its, strict=True)) for name, its in variants}
            nearest = min(counts, key=lambda name: counts[name])
            if counts[nearest] <= MOST:
                yield counts[nearest], nearest, rule

    return tuple((nearest, rule) for _, nearest, rule in sorted(all_rules(), key=lambda found: found[0]))


def moments(grads: Tensor, betas: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Return m and v of a layer after every step; `grads` are [steps, elements]."""
    m, v = [torch.zeros_like(grads[0])], [torch.zeros_like(grads[0])]
    for g in grads:
        m.append(betas[0] * m[-1] + (1 - betas[0]) * g)
        v.append(betas[1] * v[-1] + (1 - betas[1]) * g**2)
    return torch.stack(m[1:]), torch.stack(v[1:])


def clipped(grads: Sequence[Tensor], max_norm: float | None) -> list[Tensor]:
    """Return the layers' gradients, [steps, elements] each, where all of a step together have at most this norm."""
    if max_norm is None:
        return list(grads)
    norms = sum((g**2).sum(-1, keepdim=True) for g in grads)
    return [g / (torch.as_tensor(norms).sqrt() / max_norm).clamp(min=1) for g in grads]


def golden(rule: Rule, weights: Sequence[Tensor], grads: Sequence[Tensor], hyper: Hyper) -> list[Tensor]:
    """Return the rule's float64 trajectory: for each layer its weights before and after every step.

    Args:
        rule: one of VARIANTS' or another.
        weights: of each layer, as a vector.
        grads: of each layer, [steps, elements].
        hyper: the options.
    """
    trajectory = []
    for w, g, decay in zip(weights, clipped(grads, rule.max_grad_norm), hyper.weight_decays, strict=True):
        m, v = moments(g, hyper.betas)
        path = [w]
        for step in range(len(g)):
            t = torch.tensor([step + 1.0], dtype=torch.float64)
            path.append(rule.after(path[-1], m[step], v[step], t, decay, hyper))
        trajectory.append(torch.stack(path))
    return trajectory
