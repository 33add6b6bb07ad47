"""Checks of an optimizer's state dict before any of it is loaded, and the precision of what is loaded."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from hf_lamb.fused_layers import check_split
from hf_lamb.norms import math_dtype
from hf_lamb.options import check_options

__all__ = [
    "check_loadable",
    "check_state",
    "check_state_dict",
    "restore_precision",
    "state_of",
    "warn_of_other_layers",
]


def check_loadable(
    state_dict: dict[str, Any],
    param_groups: list[dict[str, Any]],
    defaults: dict[str, Any],
    name_of: Callable[[int, int], str],
) -> None:
    """Raise ValueError unless this is the state dict of a Lamb with these groups."""
    check_state_dict(state_dict, "Lamb")
    loaded = state_dict["param_groups"]
    if [len(group["params"]) for group in param_groups] != [len(group["params"]) for group in loaded]:
        return  # torch raises its own error for this
    for group_index, (group, other) in enumerate(zip(param_groups, loaded, strict=True)):
        _check_order(group.get("param_names"), other.get("param_names"))
        if "amsgrad" in other:
            raise ValueError(
                "Lamb: convert the state dict with hf_lamb.convert_state_dict: it is an Adam's (its groups have "
                "amsgrad), and Adam's lr does not suit LAMB"
            )
        check_options({**defaults, **other})
        check_split(other.get("split", ()))
        for index, (param, key) in enumerate(zip(group["params"], other["params"], strict=True)):
            state = state_dict["state"].get(key, {})
            if not state:
                continue
            name = name_of(group_index, index)
            if set(state) != {"step", "exp_avg", "exp_avg_sq"}:
                raise ValueError(
                    f"Lamb: convert the state dict with hf_lamb.convert_state_dict: it is another optimizer's, "
                    f"because the state of {name} has {', '.join(map(str, state))}"
                )
            check_state(state, param, "Lamb", name)
        if "layer_adaptation" not in other:  # RAdam's, or AdamW's of transformers 4: the same state
            raise ValueError(
                "Lamb: convert the state dict with hf_lamb.convert_state_dict: it is another optimizer's (its groups "
                "have no layer_adaptation), whose lr and eps do not suit LAMB"
            )


def warn_of_other_layers(param_groups: list[dict[str, Any]], loaded: list[dict[str, Any]]) -> None:
    """Warn if a state dict, which replaces the options of the groups, has other layers in fused parameters."""
    for group, other in zip(param_groups, loaded, strict=True):
        own, theirs = dict(group.get("split", ())), dict(other.get("split", ()))
        if [*map(tuple, own.values())] != [*map(tuple, theirs.values())]:
            first = next(name for name in (own | theirs) if own.get(name) != theirs.get(name))
            there, here = (len(split.get(first, (0,))) for split in (theirs, own))
            warnings.warn(
                f"Lamb: this run keeps its checkpoint's layers: {first} is {there} there, and {here} in these "
                "groups. Start a new run to change that; to silence this, build the groups with the split of then",
                stacklevel=2,
            )
            return


def check_state_dict(state_dict: Any, who: str) -> None:
    """Raise ValueError unless this looks like what an optimizer's `state_dict()` returns."""
    if not isinstance(state_dict, dict):
        raise ValueError(
            f"{who}: expected an optimizer's state dict, got {type(state_dict).__name__}: torch.load the file first"
        )
    if not {"state", "param_groups"} <= state_dict.keys():
        has = ", ".join([*map(str, state_dict)][:6]) or "nothing"
        raise ValueError(
            f"{who}: pass what optimizer.state_dict() returned: this has {has}. For DeepSpeed ZeRO make a full "
            "checkpoint first (zero_to_fp32 gives weights only)"
        )
    state, groups = state_dict["state"], state_dict["param_groups"]
    whole = isinstance(state, dict) and all(isinstance(entry, dict) for entry in state.values())
    if not whole or not all(isinstance(group, dict) and "params" in group for group in groups):
        raise ValueError(
            f'{who}: use another checkpoint: this state dict is damaged ("state" must hold dicts, and every group '
            'must have "params")'
        )


def check_state(state: dict[str, Any], param: Tensor, who: str, name: str) -> None:
    """Raise ValueError if these moments and this step cannot belong to this parameter."""
    for moment in ("exp_avg", "exp_avg_sq"):
        value = state[moment]
        if not isinstance(value, Tensor) or not value.is_floating_point():
            kind = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"of type {type(value).__name__}"
            raise ValueError(
                f"{who}: use another checkpoint: {moment} of {name} is {kind}, expected a floating-point tensor"
            )
        if value.shape != param.shape:
            raise ValueError(
                f"{who}: {moment} of {name} has shape {tuple(value.shape)}, the parameter {tuple(param.shape)}: load "
                "a state dict of this model with whole tensors, not of flat partitions (ZeRO, FSDP)"
            )
    step = state["step"]
    if not isinstance(step, Real) and not (isinstance(step, Tensor) and step.numel() == 1):
        raise ValueError(f"{who}: use another checkpoint: the step of {name} is {step!r}, expected one number")


def _check_order(own: list[str] | None, loaded: list[str] | None) -> None:
    """Raise ValueError if both have the same names in another order. Other names are fine: modules get renamed."""
    if own and loaded and own != loaded and sorted(own) == sorted(loaded):
        first = next(name for name, other in zip(own, loaded, strict=True) if name != other)
        raise ValueError(
            "Lamb: build the optimizer with its parameters in the order of the state dict: the state dict has the "
            f"same ones in another order, from {first} on"
        )


def restore_precision(state: dict[Any, Any], param_groups: list[dict[str, Any]], given: dict[str, Any]) -> None:
    """Undo torch's cast to the parameters' dtype: moments in `math_dtype`, `step` as a float32 scalar."""
    for group, other in zip(param_groups, given["param_groups"], strict=True):
        for param, key in zip(group["params"], other["params"], strict=True):
            saved = given["state"].get(key)
            if saved:
                step = torch.as_tensor(saved["step"], dtype=torch.float32, device=param.device)
                state[param]["step"] = step.reshape(())
                for moment in ("exp_avg", "exp_avg_sq"):
                    state[param][moment] = saved[moment].to(param.device, math_dtype(param))


def state_of(states: dict[Any, Any], param: Tensor) -> dict[str, Tensor]:
    """Return the state of a parameter; make it if there is none, and move it if the parameter was cast or moved."""
    state: dict[str, Tensor] = states[param]
    if not state:
        # `step` is on the parameter's device, so that no host sync is needed and CUDA graphs can capture it.
        state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
        state["exp_avg"] = torch.zeros_like(param, dtype=math_dtype(param))
        state["exp_avg_sq"] = torch.zeros_like(param, dtype=math_dtype(param))
    elif state["exp_avg"].dtype != math_dtype(param) or state["exp_avg"].device != param.device:
        # The user has cast the model or moved it to another device since the last step.
        state["step"] = state["step"].to(param.device)
        for moment in ("exp_avg", "exp_avg_sq"):
            state[moment] = state[moment].to(param.device, math_dtype(param))
    return state
