"""The optimizers that the recipes compare, each set up as its users would."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from hf_lamb import Lamb, lamb_param_groups
from hf_lamb.scaling import decay_factor

NAMES = {"lamb": "LAMB", "adamw": "AdamW", "adam": "Adam", "sgd": "SGD"}


def new_optimizer(name: str, model: nn.Module, learning_rate: float, weight_decay: float = 0.01) -> Any:
    """LAMB, torch's fused AdamW, Adam without decay, or SGD with Nesterov momentum 0.9; biases and norms never decay.

    Betas 0.9 and 0.999 and epsilon 1e-6 wherever there are any.
    """
    groups = lamb_param_groups(model, weight_decay)
    if name == "lamb":
        return Lamb(groups, lr=learning_rate, eps=1e-6)
    plain = [{key: group[key] for key in ("params", "weight_decay")} for group in groups]
    if name == "adamw":
        return torch.optim.AdamW(plain, lr=learning_rate, eps=1e-6, fused=True)
    if name == "adam":
        return torch.optim.Adam(model.parameters(), lr=learning_rate, eps=1e-6, fused=True)
    if name == "sgd":
        return torch.optim.SGD(plain, lr=learning_rate, momentum=0.9, nesterov=True)
    raise ValueError(f"unknown optimizer {name!r}: one of {', '.join(NAMES)}")


def rate_factor(step: int, steps: int, warmup_ratio: float = 0.1) -> float:
    """What the learning rate is multiplied by at `step` (from 0): linear warm-up, then linear decay to zero."""
    warmup = max(1, math.ceil(warmup_ratio * steps))
    return (step + 1) / warmup if step < warmup else decay_factor(step, steps, warmup)


def set_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


@torch.no_grad()
def trust_ratios(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, float]:
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
