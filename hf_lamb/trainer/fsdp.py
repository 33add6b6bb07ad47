"""FSDP2: masked LMs with tied heads, and checkpoints that DDP and FSDP2 can both load. FSDP1: sharded checkpoints."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.fsdp as fsdp
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint import default_planner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_shards
from torch.distributed.fsdp import StateDictType
from torch.optim import Optimizer
from transformers import Trainer

from hf_lamb.sharding.fsdp1 import clean_name, unwrapped
from hf_lamb.state import warn_of_other_layers

__all__ = ["tied_heads_in_one_group"]


@contextmanager
def tied_heads_in_one_group(model: nn.Module) -> Iterator[None]:
    """Make `accelerator.prepare(model, optimizer)` in this block work for a masked LM under FSDP2.

    `LambTrainer` uses it already. In a loop of your own: `with tied_heads_in_one_group(model):
    accelerator.prepare(...)`.

    accelerate puts the tied embeddings and the output layer into one FSDP group, but not the head around the output
    layer. In BERT, RoBERTa, ALBERT and most other masked LMs the head holds the output layer's bias too. torch 2.13
    and newer refuse such a model in the first forward pass: "Parameter is shared with a parameter already managed by
    another FSDP group" (https://github.com/huggingface/accelerate/pull/4171 fixed it for causal LMs).

    Args:
        model: the model that is prepared in the block.
    """
    stock = fsdp.fully_shard

    def fully_shard(module: nn.Module | list[nn.Module], **options: Any) -> Any:
        if isinstance(module, list):
            shared = {id(param) for part in module for param in part.parameters()}
            holders = [m for m in model.modules() if any(id(p) in shared for p in m.parameters(recurse=False))]
            module = list(dict.fromkeys(module + holders))
        return stock(module, **options)

    fsdp.fully_shard = fully_shard
    try:
        yield
    finally:
        fsdp.fully_shard = stock


@contextmanager
def force_current_dcp_format() -> Iterator[None]:
    """Make torch load sharded optimizers of FSDP1 as its current format, in this block.

    A process may have no row of some tensor: the token types of BERT are two rows. Then torch 2.13 does not find that
    tensor in the checkpoint, takes the checkpoint for one written before torch 2.4, and fails because
    "optimizer.param_groups" is missing.
    """
    stock = default_planner.DefaultLoadPlanner.create_local_plan

    def create_local_plan(self: default_planner.DefaultLoadPlanner) -> Any:
        assert self.metadata is not None
        strict = not self.allow_partial_load
        return default_planner.create_default_local_load_plan(self.state_dict, self.metadata, strict)

    default_planner.DefaultLoadPlanner.create_local_plan = create_local_plan  # type: ignore[method-assign]
    try:
        yield
    finally:
        default_planner.DefaultLoadPlanner.create_local_plan = stock  # type: ignore[method-assign]


def refuse_local_checkpoints(trainer: Trainer) -> None:
    """Raise ValueError before training if the checkpoints of this run could not be loaded."""
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    if plugin and plugin.state_dict_type == StateDictType.LOCAL_STATE_DICT and trainer.args.save_strategy != "no":
        raise ValueError(
            "use SHARDED_STATE_DICT instead of fsdp_state_dict_type LOCAL_STATE_DICT: accelerate 1.15 writes such "
            "checkpoints but cannot load them"
        )


@contextmanager
def whole_state_dict(trainer: Trainer) -> Iterator[None]:
    """Make `save_model` save the whole model in this block. With sharded checkpoints Trainer's saves nothing."""
    plugin = trainer.accelerator.state.fsdp_plugin
    of_checkpoints, plugin.state_dict_type = plugin.state_dict_type, StateDictType.FULL_STATE_DICT
    try:
        yield
    finally:
        plugin.state_dict_type = of_checkpoints


def tie(state_dict: dict[str, Any], model: nn.Module) -> None:
    """Replace copies of tied parameters in a state dict by one tensor, which is then written once."""
    first: dict[int, str] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        name = clean_name(name)
        if name in state_dict:
            state_dict[name] = state_dict[first.setdefault(id(param), name)]
    for name, source in getattr(unwrapped(model), "all_tied_weights_keys", {}).items():
        if name in state_dict:  # needed with FSDP1's flat tensors, where `named_parameters` has no tied parameters
            state_dict[name] = state_dict[source]


def is_of_another_layout(checkpoint: str, trainer: Trainer) -> bool:
    """Return whether the checkpoint and the run differ in layout: whole tensors, or FSDP2's full or sharded one."""
    own = None
    if trainer.is_fsdp_enabled:
        plugin = trainer.accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            return False
        own = plugin.state_dict_type
    return own != layout_of(Path(checkpoint))


def layout_of(checkpoint: Path) -> StateDictType | None:
    """Return the layout in which FSDP wrote a checkpoint; None if it has whole tensors and FSDP did not write it."""
    if (checkpoint / "pytorch_model_fsdp_0").is_dir():
        return StateDictType.SHARDED_STATE_DICT
    return StateDictType.FULL_STATE_DICT if (checkpoint / "pytorch_model_fsdp.bin").exists() else None


def load_model(model: nn.Module, checkpoint: Path) -> None:
    """Load the weights of a checkpoint of any layout into a model of any layout."""
    layout = layout_of(checkpoint)
    if layout == StateDictType.SHARDED_STATE_DICT:
        sharded = {"model": get_model_state_dict(model)}
        load_shards(sharded, checkpoint_id=checkpoint / "pytorch_model_fsdp_0")
        set_model_state_dict(model, sharded["model"])
        return
    whole: dict[str, Any] = {}
    if _is_first_process():
        if layout == StateDictType.FULL_STATE_DICT:
            whole = torch.load(checkpoint / "pytorch_model_fsdp.bin", map_location="cpu", weights_only=True)
        else:
            whole = {k: v for file in checkpoint.glob("model*.safetensors") for k, v in load_file(file).items()}
            whole |= _aliases(model, whole)
        for name, param in model.named_parameters():
            if name in whole and whole[name].shape != param.shape:
                has, wants = tuple(whole[name].shape), tuple(param.shape)
                raise RuntimeError(f"size mismatch for {name}: {has} in the checkpoint, {wants} in this model")
    set_model_state_dict(model, whole, options=_from_first_process())


def take_layers(optimizer: Optimizer, checkpoint: Path) -> None:
    """Give the groups the "split" of a checkpoint that FSDP wrote or loads; warn if it was another. A collective.

    It comes before the loading: that takes the keys of groups from the optimizer, not from the checkpoint. A key that
    the checkpoint lacks, as those of older versions do, would crash a sharded one, and stay in force with a full one.
    """
    groups = optimizer.param_groups
    found = _splits(checkpoint)
    if len(found) != len(groups):
        return  # the loading has its own error for this
    if _is_first_process():
        warn_of_other_layers(groups, found)
    for group, of_checkpoint in zip(groups, found, strict=True):
        group.pop("split", None)
        group.update(of_checkpoint)


def _splits(checkpoint: Path) -> list[dict[str, Any]]:
    """Return of each group in a checkpoint of any layout its entry "split", if there is one."""
    layout = layout_of(checkpoint)
    if layout == StateDictType.SHARDED_STATE_DICT:
        folder = checkpoint / "optimizer_0"
        if not (folder / ".metadata").exists():
            return []
        keys = FileSystemReader(folder).read_metadata().state_dict_metadata
        matches = (re.match(r"optimizer\.param_groups\.(\d+)\.", key) for key in keys)
        numbers = [int(match[1]) for match in matches if match]
        names = [f"optimizer.param_groups.{number}.split" for number in range(max(numbers, default=-1) + 1)]
        splits: dict[str, Any] = {name: () for name in names if name in keys}
        if splits:
            load_shards(splits, checkpoint_id=folder)
        return [{"split": splits[name]} if name in splits else {} for name in names]
    found: list[list[dict[str, Any]]] = [[]]
    file = checkpoint / ("optimizer.pt" if layout is None else "optimizer.bin")
    if _is_first_process() and file.exists():
        groups = torch.load(file, map_location="cpu", weights_only=True, mmap=True)["param_groups"]
        found = [[{"split": group["split"]} if "split" in group else {} for group in groups]]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    return found[0]


def load_optimizer(model: nn.Module, optimizer: Optimizer, checkpoint: Path) -> None:
    """Load the optimizer's state of a checkpoint of any layout into an optimizer of any layout."""
    layout = layout_of(checkpoint)
    if layout == StateDictType.SHARDED_STATE_DICT:
        sharded = {"optimizer": get_optimizer_state_dict(model, optimizer)}
        load_shards(sharded, checkpoint_id=checkpoint / "optimizer_0")
        set_optimizer_state_dict(model, optimizer, sharded["optimizer"])
        return
    whole: dict[str, Any] = {}
    if _is_first_process():
        file = "optimizer.bin" if layout == StateDictType.FULL_STATE_DICT else "optimizer.pt"
        whole = torch.load(checkpoint / file, map_location="cpu", weights_only=True)
        if layout is None:
            whole = _by_name(model, optimizer, whole)
    set_optimizer_state_dict(model, optimizer, whole, options=_from_first_process())


def _by_name(model: nn.Module, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Convert an optimizer's state dict to that of torch.distributed.checkpoint: names in place of numbers.

    The names come from `param_names` in the state dict, otherwise from the order of the parameters.
    """
    name_of = {id(param): name for name, param in model.named_parameters()}
    state: dict[str, Any] = {}
    groups = []
    for own, group in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        names = group.get("param_names") or [name_of[id(param)] for param in own["params"]]
        state |= {n: state_dict["state"][k] for n, k in zip(names, group["params"], strict=True)}
        groups.append({**group, "params": names})
    return {"state": state, "param_groups": groups}


def _aliases(model: nn.Module, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return the tied parameters under the names that save_pretrained leaves out."""
    param_of = dict(model.named_parameters(remove_duplicate=False))
    saved = {id(param): state_dict[name] for name, param in param_of.items() if name in state_dict}
    return {n: saved[id(p)] for n, p in param_of.items() if n not in state_dict and id(p) in saved}


def _is_first_process() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _from_first_process() -> StateDictOptions:
    return StateDictOptions(full_state_dict=True, broadcast_from_rank0=dist.is_initialized())
