"""FSDP2: masked LMs with tied heads, and checkpoints that go from DDP to FSDP2 and back. FSDP1: its checkpoints."""

from __future__ import annotations

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

__all__ = ["tied_heads_in_one_group"]


@contextmanager
def tied_heads_in_one_group(model: nn.Module) -> Iterator[None]:
    """Let `accelerator.prepare(model, optimizer)` shard a masked LM with FSDP2; `LambTrainer` does it by itself.

    accelerate groups the tied embeddings with the output layer, but not with the head around it, which holds the
    output layer's bias a second time in BERT, RoBERTa, ALBERT and most other masked LMs; from 2.13 on torch refuses
    such a model in its first forward pass: "Parameter is shared with a parameter already managed by another FSDP
    group" (https://github.com/huggingface/accelerate/pull/4171 mended it for causal LMs).
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
    """Let a process load a sharded FSDP1 optimizer of which it has no row of some tensor; `LambTrainer` does it.

    There the tensor is not in what torch 2.13 asks the checkpoint for, and so torch takes the checkpoint for one of
    before torch 2.4, in which it then misses "optimizer.param_groups": the token types of BERT are two rows.
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
    """Raise ValueError, before the training, where its checkpoints could never be loaded."""
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    if plugin and plugin.state_dict_type == StateDictType.LOCAL_STATE_DICT and trainer.args.save_strategy != "no":
        raise ValueError(
            "fsdp_state_dict_type LOCAL_STATE_DICT: accelerate 1.15 writes such checkpoints but cannot load them, "
            "so use SHARDED_STATE_DICT"
        )


@contextmanager
def whole_state_dict(trainer: Trainer) -> Iterator[None]:
    """Let `save_model` save the whole model also where checkpoints are sharded, when Trainer's does nothing."""
    plugin = trainer.accelerator.state.fsdp_plugin
    of_checkpoints, plugin.state_dict_type = plugin.state_dict_type, StateDictType.FULL_STATE_DICT
    try:
        yield
    finally:
        plugin.state_dict_type = of_checkpoints


def tie(state_dict: dict[str, Any], model: nn.Module) -> None:
    """Let tied parameters, gathered or copied one by one, be one tensor again, which is written once."""
    first: dict[int, str] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        name = clean_name(name)
        if name in state_dict:
            state_dict[name] = state_dict[first.setdefault(id(param), name)]
    for name, source in getattr(unwrapped(model), "all_tied_weights_keys", {}).items():
        if name in state_dict:  # FSDP1's flat tensors, which hide the others
            state_dict[name] = state_dict[source]


def is_of_another_layout(checkpoint: str, trainer: Trainer) -> bool:
    """Whether one of the two is DDP or one process and the other FSDP2, or they are FSDP2's two layouts."""
    own = None
    if trainer.is_fsdp_enabled:
        plugin = trainer.accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            return False
        own = plugin.state_dict_type
    return own != layout_of(Path(checkpoint))


def layout_of(checkpoint: Path) -> StateDictType | None:
    """How FSDP2 wrote it; None for a checkpoint of whole tensors that no FSDP wrote."""
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
    """An optimizer's own state dict, which counts the parameters, as torch.distributed.checkpoint's, which names them.

    By the names in it, else by the order of the parameters.
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
    """Tied parameters under the names that save_pretrained leaves out."""
    param_of = dict(model.named_parameters(remove_duplicate=False))
    saved = {id(param): state_dict[name] for name, param in param_of.items() if name in state_dict}
    return {n: saved[id(p)] for n, p in param_of.items() if n not in state_dict and id(p) in saved}


def _is_first_process() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _from_first_process() -> StateDictOptions:
    return StateDictOptions(full_state_dict=True, broadcast_from_rank0=dist.is_initialized())
