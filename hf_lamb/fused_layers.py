"""Which parameters hold several layers, one after another in their rows: known ones by their classes, own by name."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from hf_lamb.sharding import Sizes, own_class

__all__ = ["check_split", "known_layers", "layers_of_groups", "own_layers", "why_not"]

# The numbers of rows of the layers, from the module that splits its output, and the parameter's shape.
Rows = Callable[[Any, Sequence[int]], Sequence[int]]


def _equal(layers: int) -> Rows:
    return lambda module, shape: [shape[0] // layers] * layers


def _grouped_query(module: Any, shape: Sequence[int]) -> Sequence[int]:
    key = module.num_key_value_heads * module.head_dim
    return [shape[0] - 2 * key, key, key]


def _experts(layers_of_each: int) -> Rows:
    """Of matrices `[experts, rows, columns]`: the rows of all experts, one after another."""
    return lambda module, shape: [shape[1] // layers_of_each] * (layers_of_each * shape[0])


_STACKED = {"gate_up_proj": _experts(2), "down_proj": _experts(1)}

# By the model type of transformers, whose module defines the class: a name alone is not enough. GPT-NeoX's
# query_key_value, for example, has the query, key and value of one head after those of another.
_KNOWN: dict[tuple[str, str], dict[str, Rows]] = {
    ("modernbert", "ModernBertAttention"): {"Wqkv": _equal(3)},
    ("modernbert", "ModernBertMLP"): {"Wi": _equal(2)},
    ("modernbert_decoder", "ModernBertDecoderMLP"): {"Wi": _equal(2)},
    ("mpt", "MptAttention"): {"Wqkv": _equal(3)},
    ("phi3", "Phi3Attention"): {"qkv_proj": _grouped_query},
    ("phi3", "Phi3MLP"): {"gate_up_proj": _equal(2)},
    ("glm", "GlmMLP"): {"gate_up_proj": _equal(2)},
    ("glm4", "Glm4MLP"): {"gate_up_proj": _equal(2)},
    ("mixtral", "MixtralExperts"): _STACKED,
    ("olmoe", "OlmoeExperts"): _STACKED,
    ("qwen2_moe", "Qwen2MoeExperts"): _STACKED,
    ("qwen3_moe", "Qwen3MoeExperts"): _STACKED,
}
_MULTIHEAD = {"in_proj_weight": _equal(3), "in_proj_bias": _equal(3)}

# What `split` must not name, because the rows are in another order.
_INTERLEAVED = {
    ("bloom", "BloomAttention"): ("query_key_value",),
    ("codegen", "CodeGenAttention"): ("qkv_proj",),
    ("deberta", "DisentangledSelfAttention"): ("in_proj",),
    ("falcon", "FalconAttention"): ("query_key_value",),
    ("falcon", "FalconFlashAttention2"): ("query_key_value",),
    ("gpt_bigcode", "GPTBigCodeAttention"): ("c_attn",),
    ("gpt_neox", "GPTNeoXAttention"): ("query_key_value",),
    ("gpt_neox_japanese", "GPTNeoXJapaneseAttention"): ("query_key_value",),
    ("minimax", "MiniMaxLightningAttention"): ("qkv_proj",),
    ("persimmon", "PersimmonAttention"): ("query_key_value",),
    ("qwen3_next", "Qwen3NextGatedDeltaNet"): ("in_proj_qkvz", "in_proj_ba"),
}


def _key(module: nn.Module | None) -> tuple[str, str] | None:
    """Return the model type and the name of a class of transformers; None for others, a user's subclass too."""
    kind = own_class(module)
    found = re.fullmatch(r"transformers\.models\.(\w+)\.modeling_\w+", kind.__module__)
    return (found[1], kind.__name__) if found else None


def known_layers(
    own_name: str, owner: nn.Module, owner_name: str, parent: nn.Module | None, shape: Sequence[int]
) -> Sizes | None:
    """Return the sizes of the layers that a parameter is known to hold; None if it is one layer as far as is known.

    Args:
        own_name: the parameter's name in its owner, such as `weight`.
        owner: the module that has the parameter.
        owner_name: the owner's name in its parent, such as `Wqkv`.
        parent: the module that has the owner, if any.
        shape: the parameter's shape, unsharded.
    """
    rows = None
    if own_class(owner) is nn.MultiheadAttention:
        rows = _MULTIHEAD.get(own_name)
        module: nn.Module | None = owner
    elif own_class(owner) is nn.Linear and own_name in ("weight", "bias"):
        rows, module = _KNOWN.get(_key(parent) or ("", ""), {}).get(owner_name), parent
    else:
        rows, module = _KNOWN.get(_key(owner) or ("", ""), {}).get(own_name), owner
    if rows is None:
        return None
    counts = rows(module, shape)
    row = math.prod(shape) // sum(counts)
    return tuple(count * row for count in counts)


def own_layers(
    split: Mapping[str, int | Sequence[int]], shapes: Mapping[str, Sequence[int]], refused: Mapping[str, str]
) -> dict[str, Sizes]:
    """Return the sizes of the layers that `split` of `lamb_param_groups` gives, by the parameters' names.

    Args:
        split: by regular expressions, the number of equal layers, or the number of rows of each.
        shapes: of all trainable parameters, by name.
        refused: why a parameter cannot be split, by name.

    Raises:
        ValueError: a pattern is no regular expression or matches no trainable parameter; the layers do not fit a
            parameter, or its layers are not blocks of rows.
    """
    found: dict[str, Sizes] = {}
    for pattern, layers in split.items():
        counts = list(layers) if isinstance(layers, (list, tuple)) else [layers]
        if not counts or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in counts):
            raise ValueError(
                f"lamb_param_groups: split: {pattern!r}: expected a number of layers, such as 3, or the rows of each, "
                f"such as [768, 256, 256], got {layers!r}"
            )
        try:
            names = [name for name in shapes if re.search(pattern, name)]
        except (re.error, TypeError) as error:
            raise ValueError(f"lamb_param_groups: split: {pattern!r} is no regular expression: {error}") from None
        if not names:
            first = next(iter(shapes))
            raise ValueError(f"lamb_param_groups: split: {pattern!r} matches no trainable parameter, such as {first}")
        for name in names:
            if name in refused:
                raise ValueError(
                    f"lamb_param_groups: split: remove {pattern!r}, which matches {name}: {refused[name]}"
                )
            sizes = _sizes(shapes[name], layers)
            if sizes is None:
                raise ValueError(
                    f"lamb_param_groups: split: {pattern!r}: {layers!r} does not fit {name} of shape "
                    f"{tuple(shapes[name])}: the layers must be whole rows and together all of them"
                )
            found[name] = sizes
    return found


def _sizes(shape: Sequence[int], layers: int | Sequence[int]) -> Sizes | None:
    """Return the sizes of layers; None if they are not all rows. Rows of stacked matrices are those of each matrix."""
    rows = shape[0] if shape else 0
    if not rows or not math.prod(shape):
        return None
    if not isinstance(layers, int):
        return tuple(n * (math.prod(shape) // rows) for n in layers) if sum(layers) == rows else None
    of_each = layers // rows if len(shape) > 2 and layers % rows == 0 else 0
    if rows % layers and not (of_each and shape[1] % of_each == 0):
        return None
    return (math.prod(shape) // layers,) * layers


def why_not(owner: nn.Module, owner_name: str, parent: nn.Module | None) -> str | None:
    """Return why the layers in a module's parameters are not blocks of rows; None if nothing is known of that."""
    kind = own_class(owner)
    if (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D"):
        return "transformers' Conv1D stores its layers as columns, not as rows"
    # With one key and value for all heads, Falcon and GPTBigCode have three blocks.
    is_one_group = getattr(parent, "multi_query", False) and not getattr(parent, "new_decoder_architecture", False)
    if owner_name in _INTERLEAVED.get(_key(parent) or ("", ""), ()) and not is_one_group:
        return f"{own_class(parent).__name__} stores the rows of one attention head after those of another"
    return None


def check_split(split: Any) -> None:
    """Raise ValueError if a group's "split" is not what `lamb_param_groups` makes."""
    good = isinstance(split, (tuple, list)) and all(
        isinstance(entry, (tuple, list))
        and len(entry) == 2
        and isinstance(entry[0], str)
        and isinstance(entry[1], (tuple, list))
        and entry[1]
        and all(isinstance(size, int) and size > 0 for size in entry[1])
        for entry in split
    )
    if not good:
        raise ValueError(
            f'Invalid "split" of a group: {split!r}: expected pairs of a name and sizes, as lamb_param_groups(model, '
            "split=...) makes them"
        )


def layers_of_groups(param_groups: Iterable[Mapping[str, Any]]) -> dict[str, Sizes]:
    """Return the sizes of the layers of all parameters of some groups that hold several, by name."""
    return {name: tuple(sizes) for group in param_groups for name, sizes in group.get("split", ())}
