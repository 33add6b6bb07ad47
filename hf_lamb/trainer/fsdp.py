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
from torch.distributed.checkpoint.api import CheckpointException
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

from hf_lamb.fsdp1 import clean_name, unwrapped
from hf_lamb.trainer.checkpoints import CheckpointError

__all__ = ["ShardedTrainer", "tied_heads_in_one_group"]


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
def no_older_checkpoints() -> Iterator[None]:
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


class ShardedTrainer(Trainer):
    """`transformers.Trainer`, and what FSDP1 and FSDP2 need.

    * Masked LMs with tied heads train, see `tied_heads_in_one_group`.
    * A run goes on from a checkpoint of another layout: DDP or one process, FSDP2 with SHARDED_STATE_DICT or with
      FULL_STATE_DICT. Trainer's only know their own.
    * `save_model` saves the whole model also where checkpoints are sharded, when Trainer's does nothing.
    * Sharded checkpoints of FSDP1 load on any number of processes; local ones, which never load, are refused before
      the training (ValueError).
    """

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        assert self.model is not None
        plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin and plugin.state_dict_type == StateDictType.LOCAL_STATE_DICT and self.args.save_strategy != "no":
            raise ValueError(
                "fsdp_state_dict_type LOCAL_STATE_DICT: accelerate 1.15 writes such checkpoints but cannot load them, "
                "so use SHARDED_STATE_DICT"
            )
        with tied_heads_in_one_group(self.model):
            return super()._prepare_for_training(*args, **kwargs)  # type: ignore[no-untyped-call]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if _internal_call or not self.is_fsdp_enabled:
            super().save_model(output_dir, _internal_call)
            return
        plugin = self.accelerator.state.fsdp_plugin
        of_checkpoints, plugin.state_dict_type = plugin.state_dict_type, StateDictType.FULL_STATE_DICT
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            plugin.state_dict_type = of_checkpoints

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        # Gathered or copied one by one: tied parameters would be written twice.
        if (self.is_fsdp_enabled or self.is_deepspeed_enabled) and state_dict:
            assert self.model is not None
            first: dict[int, str] = {}
            for name, param in self.model.named_parameters(remove_duplicate=False):
                name = clean_name(name)
                if name in state_dict:
                    state_dict[name] = state_dict[first.setdefault(id(param), name)]
            for name, source in getattr(unwrapped(self.model), "all_tied_weights_keys", {}).items():
                if name in state_dict:  # FSDP1's flat tensors, which hide the others
                    state_dict[name] = state_dict[source]
        super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        try:
            if self._is_of_another_layout(resume_from_checkpoint):
                model = model or self.model
                assert model is not None
                load_model(model, Path(resume_from_checkpoint))
            else:
                super()._load_from_checkpoint(resume_from_checkpoint, model)
        except CheckpointException as error:  # which is no Exception
            fault, _ = next(iter(error.failures.values()))
            raise CheckpointError(
                f"{resume_from_checkpoint} is of another model: {fault}; resume with the options it was saved with"
            ) from None

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and self._is_of_another_layout(checkpoint):
            assert self.model is not None
            assert self.optimizer is not None
            assert self.lr_scheduler is not None
            load_optimizer(self.model, self.optimizer, Path(checkpoint))
            self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, "scheduler.pt"), weights_only=True))
        else:
            with no_older_checkpoints():
                super()._load_optimizer_and_scheduler(checkpoint)

    def _is_of_another_layout(self, checkpoint: str) -> bool:
        own = None
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
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
