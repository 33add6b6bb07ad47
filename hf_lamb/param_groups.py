"""Parameter groups: which parameters decay and which adapt. Pure functions over named parameters."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from hf_lamb.fused_layers import known_layers, own_layers, why_not
from hf_lamb.sharding import Sizes
from hf_lamb.sharding.fsdp1 import clean_name, flat_tensors, whole_shapes

__all__ = ["lamb_param_groups", "split_by_adaptation"]


def lamb_param_groups(
    model: nn.Module,
    weight_decay: float = 0.01,
    *,
    adapt_all: bool = False,
    fixed_norm: bool = False,
    split: bool | Mapping[str, int | Sequence[int]] = True,
    exclude_from_weight_decay: Sequence[str] = (),
    exclude_from_layer_adaptation: Sequence[str] = (),
    exclude_from_fixed_norm: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Make parameter groups for `Lamb` in which biases and normalisation parameters neither decay nor adapt.

    A parameter "decays" if weight decay applies to it, and "adapts" if `Lamb` scales its step by the trust ratio.

    Decay: a parameter decays if `transformers.Trainer.get_decay_parameter_names` returns its name. A parameter does
    not decay if it is inside of a `torch.nn.LayerNorm`; if its name, in lower case, contains `bias`, `layernorm` or
    `rmsnorm`; or if a part of its name is `norm` or ends in `_norm`. All others decay, also a BatchNorm2d named `bn1`.

    Adaptation: all parameters adapt except these three kinds:

    * Biases: the last part of the name has the word `bias`: `bias`, `in_proj_bias`, an RNN's `bias_ih_l0`,
      MultiheadAttention's `bias_k`, `pos_bias_u`.
    * Tables of position biases: Swin's `relative_position_bias_table`, T5's embedding
      `relative_attention_bias.weight`, LayoutLMv3's linear `rel_pos_bias.weight`, WavLM's `rel_attn_embed.weight`.
      A layer that computes biases does adapt (`bias_conv.weight`, `continuous_position_bias_mlp.0.weight`).
    * Gains and shifts of normalisations: all parameters of torch's LayerNorm, RMSNorm, BatchNorm, GroupNorm and
      InstanceNorm; `weight`, `gamma`, `scale`, ... of a class named after one of them (`LlamaRMSNorm`); vectors of
      these names in any other class with `norm` in its name; vectors with the name of a norm (`layer_norm_weight`).
      The matrices of a `NormedEmbedding` or a `LayerNormLinear` do adapt.

    So these adapt: all matrices, convolutions and embeddings, including position embeddings and `cls_token`;
    LayerScale's `gamma` and `lambda1`; both tensors of `torch.nn.utils.weight_norm`; Mamba's `A_log` and `D`; scalars
    such as `logit_scale` and gates. A gate that starts at 0 stays close to 0 when it adapts: add it to
    `exclude_from_layer_adaptation`.

    Fixed norm: with `fixed_norm=True`, hidden matrices keep their norms. These are the parameters that adapt, have at
    least two dimensions larger than 1, and are neither embeddings (`torch.nn.Embedding`, the model's output
    embeddings, and what has `embed` in its name) nor a classifier (a part of the name is `classifier`, `score`,
    `qa_outputs` or `seq_relationship`): the norms of those decide how sure the model can be.

    Fused layers: a parameter may hold several layers, one after another in its rows, such as the query, key and value
    of ModernBERT's `Wqkv`. The paper's trust ratio is one of a layer, so `Lamb` gives each of them its own. Their
    names are `NAME[0]`, `NAME[1]`, ... in `layer_stats`. Known are, by model type and class: ModernBERT's `Wqkv` and
    `Wi` (its decoder's `Wi` too), MPT's `Wqkv`, Phi-3's `qkv_proj` and `gate_up_proj`, the latter of GLM too, the
    stacked experts of Mixtral, OLMoE and Qwen2/3-MoE, and torch's `MultiheadAttention`. Add your own with `split`.
    Whole stay the gates in one tensor of torch's RNNs, which is one layer in the paper's experiments.

    A tied parameter appears once, under its first name. A frozen parameter does not appear.

    FSDP1 with `use_orig_params=False` puts weights and biases into one flat tensor, and a tensor can be in one group
    only. Such a group has up to three more keys, "undecayed", "unadapted" and "unfixed": the names of layers that do
    not decay, adapt or keep their norms. `Lamb` uses them once `Lamb.attach` has been called.

    The groups of a model with fused layers have the key "split": `((name, sizes), ...)`, the numbers of elements of
    the layers that each parameter holds. It is in checkpoints, so a resumed run keeps it.

    Args:
        model: the module to train, not wrapped in DDP. FSDP1 may wrap it.
        weight_decay: λ of the parameters that decay. Default 0.01.
        adapt_all: adapt biases and normalisation parameters too, as apex with `use_nvlamb` and optax do. Default
            False.
        fixed_norm: let hidden matrices keep their norms. Default False.
        split: let the layers of fused parameters have trust ratios of their own. True: of those that are known. False:
            of none, so a parameter is a layer. A dict adds others, by regular expressions that are searched in names:
            the number of equal layers or the rows of each, as in `{"attn.qkv": 3, "kv_proj": [256, 512]}`; 1 leaves a
            parameter whole. The layers must lie one after another in the rows. Default True.
        exclude_from_weight_decay: regular expressions. Parameters whose names match one (by `re.search`) do not decay
            either. Default none.
        exclude_from_layer_adaptation: the same for adaptation. Default none.
        exclude_from_fixed_norm: the same for hidden matrices that are not to keep their norms. Default none.

    Returns:
        At most four groups, six with `fixed_norm`, none of them empty: `{"name", "params": [parameter, ...],
        "param_names": [name, ...], "weight_decay", "layer_adaptation"}`, "fixed_norm" if that argument is True,
        "split" if the model has fused layers, and "undecayed", "unadapted" and "unfixed" if there are flat tensors.
        Every optimizer of torch accepts these groups.

    Raises:
        ValueError: `model` is not a module or has no trainable parameter; a pattern is not a regular expression or
            matches no trainable parameter; a string is given instead of a list of patterns; `split` does not fit a
            parameter, or names one whose layers are not blocks of rows.

    Source: the exclusions of the paper's authors (google-research/albert) and of NVIDIA's BERT.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"lamb_param_groups: pass model, not model.parameters(): expected a module, got {type(model).__name__}"
        )
    named = {clean_name(name): param for name, param in model.named_parameters() if param.requires_grad}
    if not named:
        raise ValueError(_nothing_to_train(model))
    layers = [layer for layer in _layers(model) if layer.trains]
    names = [layer.name for layer in layers]
    no_decay = {layer.name for layer in layers if not layer.decays}
    no_decay |= _matching(exclude_from_weight_decay, names, "exclude_from_weight_decay")
    no_adapt = set() if adapt_all else {layer.name for layer in layers if not layer.adapts}
    no_adapt |= _matching(exclude_from_layer_adaptation, names, "exclude_from_layer_adaptation")
    free = _matching(exclude_from_fixed_norm, names, "exclude_from_fixed_norm")
    fixed = {layer.name for layer in layers if layer.is_hidden_matrix} - free if fixed_norm else None

    groups = [
        {
            "name": "no_decay" if excluded else "decay",
            "params": [param for name, param in named.items() if (name in no_decay) == excluded],
            "weight_decay": 0.0 if excluded else weight_decay,
        }
        for excluded in (False, True)
    ]
    return _split(model, groups, no_decay, no_adapt, fixed, layers, _fused(layers, split))


def split_by_adaptation(
    model: nn.Module,
    groups: Iterable[dict[str, Any]] | Iterable[Tensor],
    *,
    adapt_all: bool = False,
    fixed_norm: bool = False,
    split: bool = True,
) -> list[dict[str, Any]]:
    """Split existing parameter groups so that all members of a group adapt or none does, and add names.

    `lamb_param_groups` documents which parameters adapt. A group that has "layer_adaptation" already is not split.
    All other options stay as they are, weight decay included. A parameter that is not in the model adapts. The same
    holds for "fixed_norm", if that argument is True, and for "split".

    Args:
        model: the module that has the parameters.
        groups: parameter groups, or parameters.
        adapt_all: let all parameters adapt. Default False.
        fixed_norm: let hidden matrices keep their norms. Default False.
        split: let the layers of known fused parameters have trust ratios of their own. Default True.

    Returns:
        The groups, as `lamb_param_groups` returns them.

    Raises:
        ValueError: there is no trainable parameter.
    """
    given: list[Any] = list(groups)
    if given and not isinstance(given[0], dict):
        given = [{"params": given}]
    layers = list(_layers(model))
    no_decay = {layer.name for layer in layers if not layer.decays}
    no_adapt = set() if adapt_all else {layer.name for layer in layers if not layer.adapts}
    fixed = {layer.name for layer in layers if layer.is_hidden_matrix} if fixed_norm else None
    found = _split(model, given, no_decay, no_adapt, fixed, layers, _fused(layers, split))
    if not found:
        raise ValueError(_nothing_to_train(model))
    return found


def _nothing_to_train(model: nn.Module) -> str:
    return f"lamb_param_groups: unfreeze some parameters: {type(model).__name__} has no trainable one"


def _split(
    model: nn.Module,
    groups: list[Any],
    no_decay: set[str],
    no_adapt: set[str],
    fixed: set[str] | None,
    layers: list[_Layer],
    fused: dict[str, Sizes] | None,
) -> list[dict[str, Any]]:
    name_of: dict[Tensor, str] = {param: clean_name(name) for name, param in model.named_parameters()}
    flat = flat_tensors(model)
    in_flat = {layer.name for layer in layers if layer.in_flat}
    exceptions = {"undecayed": sorted(no_decay & in_flat), "unadapted": sorted(no_adapt & in_flat)}
    if fixed is not None:
        exceptions["unfixed"] = sorted(in_flat - fixed)
    found = []
    for index, group in enumerate(groups):
        parts: dict[tuple[bool, bool], list[tuple[str, Tensor]]] = {}  # by: adapts, keeps its norm
        given = [group["params"]] if isinstance(group["params"], Tensor) else group["params"]
        for place, item in enumerate(given):
            given_name, param = item if isinstance(item, tuple) else (f"param_groups.{index}.params.{place}", item)
            name = name_of.get(param) or str(given_name)
            adapts = bool(group.get("layer_adaptation", name not in no_adapt))
            keeps = fixed is not None and adapts and (param in flat or name in fixed)
            parts.setdefault((adapts, bool(group.get("fixed_norm", keeps))), []).append((name, param))
        label = group.get("name") or ("decay" if group.get("weight_decay", True) else "no_decay")
        for (adapts, keeps), members in sorted(parts.items(), reverse=True):
            has_flat = any(param in flat for _, param in members)
            names = [name for _, param in members for name, _ in flat.get(param, ())]
            names += [name for name, param in members if param not in flat]
            sizes = tuple((name, fused[name]) for name in names if name in fused) if fused is not None else None
            own = "" if "layer_adaptation" in group else ", adapt" if adapts else ", no_adapt"
            own += ", fixed_norm" if keeps and "fixed_norm" not in group else ""
            found.append(
                {
                    **group,
                    "name": label + own,
                    "params": [param for _, param in members],
                    "param_names": [name for name, _ in members],
                    "layer_adaptation": adapts,
                    **({} if fixed is None else {"fixed_norm": keeps}),
                    **({} if sizes is None or "split" in group else {"split": sizes}),
                    **(exceptions if has_flat and adapts else {}),
                }
            )
    return found


# ---- The rules ------------------------------------------------------------------------------------------------------


class _Layer(NamedTuple):
    name: str  # in the unwrapped model
    decays: bool
    adapts: bool
    is_hidden_matrix: bool
    trains: bool
    in_flat: bool
    shape: Sequence[int]  # unsharded
    known: Sizes | None  # of the layers that the parameter is known to hold
    why_not: str | None  # why they are not blocks of rows


def _layers(model: nn.Module) -> Iterator[_Layer]:
    """Yield every parameter; in place of each of FSDP1's flat tensors, the parameters in it."""
    flat, shapes, head = flat_tensors(model), whole_shapes(model), _output_embeddings(model)
    modules = {clean_name(f"{name}.").removesuffix("."): module for name, module in model.named_modules()}
    layer_norms = [f"{clean_name(name)}." for name, part in model.named_modules() if name and _is_layer_norm(part)]

    def layer(name: str, owner: nn.Module, shape: Sequence[int], trains: bool, in_flat: bool = False) -> _Layer:
        decays = not (_UNDECAYED.search(name.lower()) or name.startswith(tuple(layer_norms)))
        hidden = owner is not head and _is_hidden_matrix(name, owner, shape)
        *_, owner_name, own_name = ("", *name.split("."))
        parent = modules.get(".".join(name.split(".")[:-2])) if owner_name else None
        known = known_layers(own_name, owner, owner_name, parent, shape)
        why = why_not(owner, owner_name, parent)
        return _Layer(name, decays, _adapts(name, owner, shape), hidden, trains, in_flat, shape, known, why)

    for raw, param in model.named_parameters():
        for name, owner in flat.get(param, ()):
            yield layer(name, owner, shapes[name], param.requires_grad, True)
        if param not in flat:
            name = clean_name(raw)
            # DeepSpeed ZeRO-3 replaces a parameter's data by an empty tensor and keeps its shape in `ds_shape`.
            here: Sequence[int] = () if is_lazy(param) else param.shape
            shape = shapes.get(name, getattr(param, "ds_shape", here))
            owner_name, _, own_name = raw.rpartition(".")
            in_parametrized = re.fullmatch(r"(?:(.*)\.)?parametrizations\.([^.]+)", owner_name)
            if in_parametrized and re.fullmatch(r"original\d*", own_name):
                owner_name = in_parametrized[1] or ""
            yield layer(name, model.get_submodule(owner_name), shape, param.requires_grad)


def _fused(layers: list[_Layer], split: Any) -> dict[str, Sizes] | None:
    """Return the layers of fused parameters, by the parameters' names; None if the model has no fused parameter."""
    if not isinstance(split, (bool, Mapping)):
        raise ValueError(
            "lamb_param_groups: split: expected True, False, or a dict of regular expressions and numbers of layers, "
            f"such as {{'attn.Wqkv': 3}}, got {split!r}"
        )
    known = {layer.name: layer.known for layer in layers if layer.known is not None}
    if not known and not isinstance(split, Mapping):
        return None
    if isinstance(split, Mapping):
        shapes = {layer.name: layer.shape for layer in layers}
        known |= own_layers(split, shapes, {layer.name: layer.why_not for layer in layers if layer.why_not})
    return {name: sizes for name, sizes in known.items() if len(sizes) > 1} if split is not False else {}


# transformers' Trainer.get_decay_parameter_names, the same from 5.17 to 5.23.
_UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def _is_layer_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.LayerNorm)


_BIAS = re.compile(r"(?:^|_)bias(?:es)?\d*(?:_|$)")
_COMPUTES = re.compile(r"(?:^|_)(?:weight|kernel|proj|projection|matrix)$")
_POSITION = re.compile(r"(?:^|_)(?:rel|relative|pos|position|positional)_")
_NORM = re.compile(
    r"(?:^|_)(?:norm|layer_?norm|rms_?norm|batch_?norm|group_?norm|ln)\d*_(?:weight|gamma|gain|scale|g)$"
)

_TORCH_NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._NormBase,  # BatchNorm, SyncBatchNorm and InstanceNorm in all dimensions
)
# These adapt even if a subclass of one of them has "norm" in its name.
_MATRICES = (nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd, nn.RNNBase)
_NORM_CLASS = re.compile(r"(?:layer|rms|batch|group|instance)_?norm(?:\dd)?(?:gated|activation|act)?$")
_NORM_PARAMETERS = {"weight", "bias", "gamma", "beta", "scale", "shift", "gain", "offset", "g", "b", "w"}
_NORM_PARAMETERS |= {"a_2", "b_2", "temp", "temperature"}


def _adapts(name: str, owner: nn.Module, shape: Sequence[int]) -> bool:
    """Return whether a parameter is neither a bias, nor a table of position biases, nor part of a normalisation."""
    parts = re.sub(r"(?:^|\.)parametrizations\.([^.]+)\.original\d*$", r".\1", name.lower()).strip(".").split(".")
    own, owners = parts[-1], parts[-2] if len(parts) > 1 else ""
    if isinstance(owner, (nn.ParameterList, nn.ParameterDict)):
        own = f"{owners}_{own}"
    if _BIAS.search(own) and not _COMPUTES.search(own):
        return False
    if own == "weight" and _is_bias_table(owners, owner):
        return False
    return not _is_normalisation(own, owner, shape)


def _is_bias_table(name: str, module: nn.Module) -> bool:
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return bool(_BIAS.search(name)) or name == "rel_attn_embed"
    # A linear layer without bias that is applied to one-hot positions is a table too.
    is_lookup = isinstance(module, nn.Linear) and module.bias is None
    return is_lookup and bool(_POSITION.search(name)) and name.endswith("_bias")


def _is_normalisation(own: str, module: nn.Module, shape: Sequence[int]) -> bool:
    kind = type(module).__name__.lower()
    if isinstance(module, _TORCH_NORMS):
        return True
    if isinstance(module, _MATRICES):
        return False
    if _NORM_CLASS.search(kind) and own in _NORM_PARAMETERS:
        return True  # any shape: Cohere's norm has a gain for each head and channel
    # (C,) or, for images, (1, C, 1, 1) is a vector; (1, C) is a matrix with one row.
    is_vector = len(shape) != 2 and max(shape, default=1) == torch.Size(shape).numel()
    in_norm = ("norm" in kind or kind.endswith("grn")) and own in _NORM_PARAMETERS
    return is_vector and (in_norm or bool(_NORM.search(own)))


_EMBEDDING_OR_CLASSIFIER = re.compile(r"embed|(?:^|\.)(?:classifier|score|qa_outputs|seq_relationship)(?:\.|$)")


def _is_hidden_matrix(name: str, owner: nn.Module, shape: Sequence[int]) -> bool:
    """Return whether a parameter has two dimensions or more, and is neither an embedding nor a classifier."""
    is_matrix = sum(size > 1 for size in shape) > 1
    is_embedding = isinstance(owner, (nn.Embedding, nn.EmbeddingBag))
    return is_matrix and not is_embedding and not _EMBEDDING_OR_CLASSIFIER.search(name.lower())


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    """Return the layer that a transformers model ends with; None if it names none."""
    find = getattr(model, "get_output_embeddings", None)
    try:
        return find() if callable(find) else None
    except (AttributeError, NotImplementedError):  # transformers' way to say that this model has none
        return None


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
