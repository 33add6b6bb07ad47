"""The optimizers that the recipes compare, each set up as its users would."""

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_lamb import Lamb, lamb_param_groups
from hf_lamb.scaling import decay_factor

NAMES = {
    "lamb": "LAMB",
    "lamb_fixed_norm": "LAMB (fixed norm)",
    "adamw": "AdamW",
    "adam": "Adam",
    "sgd": "SGD",
    "muon": "Muon",
}


def new_optimizer(
    name: str, model: nn.Module, learning_rate: float, weight_decay: float = 0.01, beta2: float = 0.999
) -> Any:
    """LAMB, LAMB with `fixed_norm`, torch's fused AdamW, Adam without decay, SGD with Nesterov momentum 0.9, or Muon.

    Beta1 is 0.9 and epsilon 1e-6 wherever there are any; biases and norms never decay. Muon steps the matrices whose
    norms LAMB would fix, scaled so that one learning rate serves it and AdamW, which steps all other parameters.
    """
    groups = lamb_param_groups(model, weight_decay, fixed_norm=name in ("lamb_fixed_norm", "muon"))
    betas = (0.9, beta2)
    if name in ("lamb", "lamb_fixed_norm"):
        return Lamb(groups, lr=learning_rate, betas=betas, eps=1e-6)
    plain = [{key: group[key] for key in ("params", "weight_decay")} for group in groups]
    if name == "adamw":
        return torch.optim.AdamW(plain, lr=learning_rate, betas=betas, eps=1e-6, fused=True)
    if name == "muon":
        hidden, others = (
            [part for part, group in zip(plain, groups, strict=True) if group["fixed_norm"] == is_hidden]
            for is_hidden in (True, False)
        )
        return Joined(
            Muon(hidden, lr=learning_rate, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=learning_rate, betas=betas, eps=1e-6, fused=True),
        )
    if name == "adam":
        return torch.optim.Adam(model.parameters(), lr=learning_rate, eps=1e-6, fused=True)
    if name == "sgd":
        return torch.optim.SGD(plain, lr=learning_rate, momentum=0.9, nesterov=True)
    raise ValueError(f"unknown optimizer {name!r}: one of {', '.join(NAMES)}")


class Muon(torch.optim.Muon):
    """torch's Muon, whose Newton-Schulz iteration runs in float32 on CPUs.

    Most CPUs only imitate the bfloat16 that torch uses, which takes ten times as long and is less exact.
    """

    def step(self, closure: Any = None) -> Any:
        with nullcontext() if self.param_groups[0]["params"][0].is_cuda else _InFloat32():
            return super().step(closure)  # type: ignore[no-untyped-call]


class _InFloat32(TorchFunctionMode):
    """`tensor.bfloat16()` gives a copy as it is."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return args[0].clone() if func is Tensor.bfloat16 else func(*args, **(kwargs or {}))


class Joined:
    """Optimizers of different parameters of one model, stepped as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self.optimizers = optimizers
        self.param_groups = [group for optimizer in optimizers for group in optimizer.param_groups]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()


def rate_factor(step: int, steps: int, warmup_ratio: float = 0.1) -> float:
    """What the learning rate is multiplied by at `step` (from 0): linear warm-up, then linear decay to zero."""
    warmup = max(1, math.ceil(warmup_ratio * steps))
    return (step + 1) / warmup if step < warmup else decay_factor(step, steps, warmup)


def set_rate(optimizer: torch.optim.Optimizer | Joined, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


@torch.no_grad()
def trust_ratios(optimizer: torch.optim.Optimizer | Joined, model: nn.Module) -> dict[str, float]:
    """‖w‖/‖u‖ of every weight that decays: what LAMB multiplied the rate by in its last step, or would with AdamW.

    For AdamW, u is computed from its moments and does not change the step. Other optimizers have none.
    """
    if isinstance(optimizer, Lamb):
        return {name: stats.trust_ratio for name, stats in optimizer.layer_stats(adapted_only=True).items()}
    if not isinstance(optimizer, torch.optim.AdamW):
        return {}
    names = {weight: name for name, weight in model.named_parameters()}
    return {
        names[w]: _adamw_ratio(w, optimizer.state[w], group)
        for group in optimizer.param_groups
        if group["weight_decay"] > 0
        for w in group["params"]
        if w in optimizer.state
    }


def _adamw_ratio(w: Tensor, state: dict[str, Tensor], group: dict[str, Any]) -> float:
    beta1, beta2 = group["betas"]
    m = state["exp_avg"] / (1 - beta1 ** state["step"].item())
    v = state["exp_avg_sq"] / (1 - beta2 ** state["step"].item())
    u = m / (v.sqrt() + group["eps"]) + group["weight_decay"] * w
    return float(w.norm() / u.norm())
