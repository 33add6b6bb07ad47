"""Which parameters decay and which adapt: pure functions over named parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from hf_lamb.fsdp1 import clean_name, flat_tensors

__all__ = ["lamb_param_groups"]


def lamb_param_groups(
    model: nn.Module,
    weight_decay: float = 0.01,
    *,
    adapt_all: bool = False,
    exclude_from_weight_decay: Sequence[str] = (),
    exclude_from_layer_adaptation: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Parameter groups for `Lamb`: biases and normalisation parameters neither decay nor adapt, all others do both.

    A parameter is a bias when the last part of its name is `bias` or ends in `_bias`, and a normalisation parameter
    when the class of the module that owns it has `norm` in its name (LayerNorm, RMSNorm, BatchNorm2d, ...); the
    number of dimensions plays no part. Tied parameters appear once, frozen ones not at all.

    FSDP1 with `use_orig_params=False` puts weights and biases into one flat tensor, which can be in one group only.
    That group then names its exceptions, "undecayed" and "unadapted", lists of layers; `Lamb` heeds them
    once it is attached to the model.

    Args:
        model: the module to train, not wrapped in DDP; FSDP1 may have wrapped it.
        weight_decay: λ of the parameters that decay. Default 0.01.
        adapt_all: adapt biases and normalisation parameters too, as apex with `use_nvlamb` and optax do.
        exclude_from_weight_decay: regular expressions, searched in the parameters' names, of more parameters that
            do not decay. Default none.
        exclude_from_layer_adaptation: the same for the trust ratio. Default none.

    Returns:
        At most four groups, none empty: `{"name", "params": [(name, parameter), ...], "weight_decay",
        "layer_adaptation"}`, and "undecayed" and "unadapted" where there are flat tensors.

    Raises:
        ValueError: no module; no trainable parameter; a pattern that is no regular expression or matches no
            trainable one; a string where a list of patterns is expected.

    Source: the exclusions of the paper's authors (google-research/albert) and of NVIDIA's BERT.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"lamb_param_groups: expected a module, got {type(model).__name__}: pass model, not model.parameters()"
        )
    named = [(clean_name(name), param) for name, param in model.named_parameters() if param.requires_grad]
    if not named:
        raise ValueError(f"lamb_param_groups: {type(model).__name__} has no trainable parameter: unfreeze some")
    layers_of = flat_tensors(model)
    in_flat = {name: owner for param, layers in layers_of.items() if param.requires_grad for name, owner in layers}
    names = [name for name, param in named if param not in layers_of] + list(in_flat)
    by_rule = {name for name in names if _is_bias(name)} | _normalisation_parameters(model)
    by_rule |= {name for name, owner in in_flat.items() if _is_normalisation(owner)}
    no_decay = by_rule | _matching(exclude_from_weight_decay, names, "exclude_from_weight_decay")
    no_adapt = (set() if adapt_all else by_rule) | _matching(
        exclude_from_layer_adaptation, names, "exclude_from_layer_adaptation"
    )

    groups: dict[tuple[bool, bool], list[tuple[str, Tensor]]] = {}
    for name, param in named:
        groups.setdefault((name not in no_decay, name not in no_adapt), []).append((name, param))
    exceptions = {"undecayed": sorted(no_decay & in_flat.keys()), "unadapted": sorted(no_adapt & in_flat.keys())}
    return [
        {
            "name": f"{'decay' if decays else 'no_decay'}, {'adapt' if adapts else 'no_adapt'}",
            "params": members,
            "weight_decay": weight_decay if decays else 0.0,
            "layer_adaptation": adapts,
            **(exceptions if in_flat and decays and adapts else {}),
        }
        for (decays, adapts), members in sorted(groups.items(), reverse=True)
    ]


def _is_bias(name: str) -> bool:
    last = name.rpartition(".")[2]
    return last == "bias" or last.endswith("_bias")


def _normalisation_parameters(model: nn.Module) -> set[str]:
    return {
        clean_name(f"{prefix}.{name}" if prefix else name)
        for prefix, module in model.named_modules()
        if _is_normalisation(module)
        for name, _ in module.named_parameters(recurse=False)
    }


def _is_normalisation(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _matching(patterns: Iterable[str], names: list[str], option: str) -> set[str]:
    if patterns is None or isinstance(patterns, str) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ValueError(
            f"lamb_param_groups: {option}: expected a list of regular expressions, such as ['embeddings'], "
            f"got {patterns!r}"
        )
    matched: set[str] = set()
    for pattern in patterns:
        try:
            found = {name for name in names if re.search(pattern, name)}
        except re.error as error:
            raise ValueError(f"lamb_param_groups: {option}: {pattern!r} is no regular expression: {error}") from None
        if not found:
            raise ValueError(
                f"lamb_param_groups: {option}: {pattern!r} matches no trainable parameter, such as {names[0]}"
            )
        matched |= found
    return matched
