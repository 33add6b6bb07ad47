"""What an optimizer's state dict must look like before any of it is loaded."""

from __future__ import annotations

from numbers import Real
from typing import Any

from torch import Tensor

__all__ = ["check_order", "check_state", "check_state_dict"]


def check_state_dict(state_dict: Any, who: str) -> None:
    """Refuse what no optimizer's `state_dict` returned."""
    if not isinstance(state_dict, dict):
        raise ValueError(
            f"{who}: expected an optimizer's state dict, got {type(state_dict).__name__}: torch.load the file first"
        )
    if not {"state", "param_groups"} <= state_dict.keys():
        has = ", ".join([*map(str, state_dict)][:6]) or "nothing"
        raise ValueError(
            f"{who}: no optimizer's state dict, it has {has}: give what optimizer.state_dict() returned, and for "
            "DeepSpeed ZeRO make a full checkpoint first (zero_to_fp32 gives weights only)"
        )
    state, groups = state_dict["state"], state_dict["param_groups"]
    whole = isinstance(state, dict) and all(isinstance(entry, dict) for entry in state.values())
    if not whole or not all(isinstance(group, dict) and "params" in group for group in groups):
        raise ValueError(
            f'{who}: a damaged state dict: "state" must hold dicts, and every group have "params": '
            "take another checkpoint"
        )


def check_state(state: dict[str, Any], param: Tensor, who: str, name: str) -> None:
    """Refuse moments and a step that cannot be those of this parameter."""
    for moment in ("exp_avg", "exp_avg_sq"):
        value = state[moment]
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"of type {type(value).__name__}"
            raise ValueError(
                f"{who}: {moment} of {name} is {kind}: expected a floating-point tensor, so take another checkpoint"
            )
        if value.shape != param.shape:
            raise ValueError(
                f"{who}: {moment} of {name} has shape {tuple(value.shape)}, the parameter {tuple(param.shape)}: "
                "another model, or a flat partition (ZeRO, FSDP)"
            )
    step = state["step"]
    if not isinstance(step, Real) and not (isinstance(step, Tensor) and step.numel() == 1):
        raise ValueError(f"{who}: the step of {name} is {step!r}: expected one number, so take another checkpoint")


def check_order(own: list[str] | None, loaded: list[str] | None) -> None:
    """Names may differ (a wrapper's prefix, a renamed module), but not merely in their order."""
    if own and loaded and own != loaded and sorted(own) == sorted(loaded):
        first = next(name for name, other in zip(own, loaded, strict=True) if name != other)
        raise ValueError(
            f"Lamb: the state dict has the same parameters in another order, from {first} on: "
            "build the optimizer with its groups in the order of the state dict"
        )
