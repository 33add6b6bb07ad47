"""Checks of Lamb's options and parameters. Each error is one line with the value and the remedy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

__all__ = ["check_iterable", "check_max_norm", "check_options", "check_params", "name_in_group", "python_numbers"]

_NUMBERS = ("lr", "eps", "weight_decay", "min_trust_ratio", "max_trust_ratio", "max_grad_norm")


def check_options(options: dict[str, Any]) -> None:
    """Check types and ranges of all options of a group.

    Raises:
        ValueError: an option has the wrong type or is out of range; the message holds the value and what is expected.
        RuntimeError: `fused` and `foreach` are both `True`.
    """
    lr, betas = options["lr"], options["betas"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Invalid learning rate: a tensor lr must have one element, got shape {tuple(lr.shape)}")
    _check_number("learning rate", lr, lambda x: 0.0 <= x < math.inf, "a number that is not negative", tensor=True)
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"Invalid betas: {betas}: expected two numbers, (beta1, beta2)")
    for index, beta in enumerate(betas):
        _check_number(f"beta parameter at index {index}", beta, lambda x: 0.0 <= x < 1.0, "a number in [0, 1)")
    for option in ("eps", "weight_decay"):
        value = options[option]
        _check_number(f"{option} value", value, lambda x: 0.0 <= x < math.inf, "a number that is not negative")
    low, high, max_grad_norm = options["min_trust_ratio"], options["max_trust_ratio"], options["max_grad_norm"]
    if low is not None:
        _check_number("min_trust_ratio", low, lambda x: 0.0 <= x < math.inf, "None or a number that is not negative")
    if high is not None:
        _check_number("max_trust_ratio", high, lambda x: x > 0.0, "None or a positive number")
    if low is not None and high is not None and low > high:
        raise ValueError(
            f"Invalid trust ratio bounds: min_trust_ratio {low} is above max_trust_ratio {high}: exchange them"
        )
    if max_grad_norm is not None:
        _check_number("max_grad_norm", max_grad_norm, lambda x: x > 0.0, "a positive number, or None for no clipping")
    for option in ("bias_correction", "layer_adaptation", "fixed_norm", "skip_nonfinite", "maximize"):
        _check_choice(option, options[option], (True, False), "True or False")
    for option in ("foreach", "fused"):
        _check_choice(option, options[option], (True, False, None), "True, False or None")
    if options["fused"] and options["foreach"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")


def check_max_norm(max_norm: Any) -> float:
    """Return the argument of `Lamb.clip_grad_norm`; raise ValueError if it is no threshold."""
    _check_number("max_norm", max_norm, lambda x: x > 0.0, "a positive number, or inf to compute the norm only")
    return float(max_norm)


def python_numbers(options: dict[str, Any]) -> dict[str, Any]:
    """Return the numeric options as Python floats, so that backends and checkpoints hold no NumPy numbers.

    An lr that is a tensor stays a tensor, so that users can change it in place.

    Raises:
        ValueError: an option other than lr is a tensor.
    """
    numbers = {name: options[name] for name in _NUMBERS if options.get(name) is not None}
    if "betas" in options:
        numbers |= dict(zip(("beta1", "beta2"), options["betas"], strict=True))
    for name, value in numbers.items():
        if not isinstance(value, Tensor):
            numbers[name] = float(value)
        elif name != "lr":
            raise ValueError(f"Invalid {name}: {value!r}: expected a number{_NO_TENSOR}")
    if "betas" in options:
        numbers["betas"] = (numbers.pop("beta1"), numbers.pop("beta2"))
    return numbers


# Reading a tensor's value would synchronise with the device in every step.
_NO_TENSOR = ", not a tensor, which only lr may be: pass its .item()"


def _check_number(
    what: str, value: Any, in_range: Callable[[float], bool], expected: str, tensor: bool = False
) -> None:
    """Accept Python's and NumPy's numbers. Refuse True and text, which float() would accept."""
    refused = (bool, str, bytes) if tensor else (bool, str, bytes, Tensor)
    try:
        good = not isinstance(value, refused) and in_range(float(value))
    except (TypeError, ValueError, RuntimeError, OverflowError):
        good = False
    if not good:
        hint = ", not text (in YAML, write 1.0e-3 for 1e-3)" if isinstance(value, str) else ""
        hint = _NO_TENSOR if isinstance(value, Tensor) and not tensor else hint
        raise ValueError(f"Invalid {what}: {value!r}: expected {expected}{hint}")


def _check_choice(what: str, value: Any, choices: tuple[bool | None, ...], expected: str) -> None:
    try:
        good = not isinstance(value, Tensor) and value in choices
    except ValueError:  # NumPy arrays cannot be compared with `in`
        good = False
    if not good:
        raise ValueError(f"Invalid {what}: {value!r}: expected {expected}")


def check_iterable(params: Any) -> None:
    """Raise TypeError, with the remedy, for what is not parameters or groups, such as a model."""
    module = isinstance(params, torch.nn.Module) and not isinstance(params, torch.nn.ParameterList)
    if module or isinstance(params, dict) or not isinstance(params, (Tensor, Iterable)):
        group = isinstance(params, dict) and "params" in params
        raise TypeError(
            f"Lamb: expected parameters or groups of them, got {type(params).__name__}: "
            f"pass {'a list of such dicts' if group else 'lamb_param_groups(model) or model.parameters()'}"
        )


def name_in_group(names: list[str] | None, group_index: int, index: int) -> str:
    """Return the name that a parameter was given with, or its place `param_groups.I.params.J`."""
    return names[index] if names else f"param_groups.{group_index}.params.{index}"


def check_params(params: list[Tensor], names: list[str] | None, group_index: int) -> None:
    """Raise ValueError if LAMB cannot train a parameter, or if there are not as many names as parameters."""
    if names is not None and len(names) != len(params):
        raise ValueError(
            f"Lamb: a parameter group has {len(params)} parameters and {len(names)} param_names: remove the same "
            "entries from both"
        )
    for index, param in enumerate(params):
        kind = _unfit(param)
        if kind is not None:
            raise ValueError(f"Lamb: parameter {name_in_group(names, group_index, index)} is {kind}")


def _unfit(param: Tensor) -> str | None:
    """Return why LAMB cannot train a parameter and what to do, or None if it can."""
    if isinstance(param, torch.nn.parameter.UninitializedParameter):
        return "not initialised yet (a lazy module's): run the model on a batch before you build the optimizer"
    if param.layout != torch.strided:
        return f"of layout {param.layout}, which LAMB's norms do not support: make it dense, with .to_dense()"
    if param.is_floating_point() and not param.is_meta:
        return None
    kind = "on the meta device" if param.is_meta else f"of dtype {param.dtype}"
    return f"{kind}: it takes real floating-point tensors that hold data"
