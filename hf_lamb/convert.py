"""Conversion of the state of other Adam-like optimizers to Lamb's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_lamb.lamb import Lamb
from hf_lamb.state import check_state, check_state_dict

__all__ = ["convert_state_dict"]

# Diagnostics in the state of other LAMBs; they are dropped.
_DIAGNOSTICS = {"weight_norm", "adam_norm", "trust_ratio"}
_REASONS = {
    "max_exp_avg_sq": "start with fresh moments: this is AMSGrad's state, and LAMB has no max_exp_avg_sq",
    "state1": "keep training with bitsandbytes, or start with fresh moments: its moments may be quantised",
    "momentum_buffer": "start with fresh moments: this is SGD's state, which has no second moment",
}


def convert_state_dict(state_dict: dict[str, Any], optimizer: Lamb) -> dict[str, Any]:
    """Convert the moments and step counts of another optimizer to a state dict for `optimizer.load_state_dict`.

    It converts the state of torch's Adam and AdamW, timm's and apex's LAMB, DeepSpeed's FusedLamb (with or without its
    FP16 wrapper), and every other optimizer whose state has `exp_avg` and `exp_avg_sq` in each parameter's shape and
    the step in the state or in the group, as a number or a tensor.

    Args:
        state_dict: what the other optimizer's `state_dict()` returned.
        optimizer: the `Lamb` that will load it. Parameters are matched by name if both sides have names, otherwise by
            position in groups of the same sizes.

    Returns:
        A state dict. `load_state_dict` makes the moments float32 (float64 for float64 parameters). The options are
        those of `optimizer`.

    Raises:
        ValueError: the state cannot be converted; the message has the reason (AMSGrad, bitsandbytes, SGD, ZeRO
            partitions, other parameters).
    """
    if not isinstance(optimizer, Lamb):
        raise ValueError(
            f"convert_state_dict: expected the Lamb that will load it, got {type(optimizer).__name__}: unwrap it"
        )
    if isinstance(state_dict, dict) and "optimizer_state_dict" in state_dict:  # DeepSpeed's FP16 wrapper
        state_dict = state_dict["optimizer_state_dict"]
    check_state_dict(state_dict, "convert_state_dict")
    converted = optimizer.state_dict()
    converted["state"] = {}
    others = _match(optimizer, state_dict["param_groups"])
    for group_index, group in enumerate(optimizer.param_groups):
        for index, param in enumerate(group["params"]):
            key, other_group = others[group_index][index]
            state = state_dict["state"].get(key)
            if state:
                name = optimizer.parameter_name(group_index, index)
                own_key = converted["param_groups"][group_index]["params"][index]
                converted["state"][own_key] = _convert(state, other_group, param, name)
    return converted


def _convert(state: dict[str, Any], group: dict[str, Any], param: Tensor, name: str) -> dict[str, Tensor]:
    unknown = state.keys() - {"step", "exp_avg", "exp_avg_sq"} - _DIAGNOSTICS
    missing = {"exp_avg", "exp_avg_sq"} - state.keys()
    if unknown or missing:
        reason = next(
            (_REASONS[key] for key in _REASONS if key in unknown), "start with fresh moments: this is no Adam's state"
        )
        raise ValueError(f"convert_state_dict: {name} has {', '.join(sorted(map(str, state)))}: {reason}")
    step = state.get("step", group.get("step"))
    if step is None:
        raise ValueError(f'convert_state_dict: put the step into the state or the group as "step": {name} has none')
    check_state({**state, "step": step}, param, "convert_state_dict", name)
    return {
        "step": torch.as_tensor(step, dtype=torch.float32).reshape(()).clone(),
        "exp_avg": state["exp_avg"].clone(),
        "exp_avg_sq": state["exp_avg_sq"].clone(),
    }


def _match(optimizer: Lamb, loaded: list[dict[str, Any]]) -> list[list[tuple[Any, dict[str, Any]]]]:
    """Return, for each parameter of each group of `optimizer`, the key of its loaded state and its loaded group."""
    ours = optimizer.param_groups
    if _named(ours) and _named(loaded):
        by_name = {
            name: (key, group)
            for group in loaded
            for name, key in zip(group["param_names"], group["params"], strict=True)
        }
        names = [name for group in ours for name in group["param_names"]]
        different = sorted(set(names) ^ by_name.keys())
        if different:
            raise ValueError(
                f"convert_state_dict: build Lamb on the same parameters: {different[0]} is on one side only"
            )
        return [[by_name[name] for name in group["param_names"]] for group in ours]
    sizes, other_sizes = ([len(group["params"]) for group in groups] for groups in (ours, loaded))
    if sizes != other_sizes:
        raise ValueError(
            f"convert_state_dict: build Lamb with the same groups: the state dict has groups of {other_sizes} "
            f"parameters, Lamb of {sizes}, and there are no names to match by"
        )
    return [[(key, group) for key in group["params"]] for group in loaded]


def _named(groups: list[dict[str, Any]]) -> bool:
    """Return whether every parameter has a unique name (two models in one optimizer may share names)."""
    names = [name for group in groups for name in group.get("param_names") or ()]
    return len(set(names)) == len(names) == sum(len(group["params"]) for group in groups)
