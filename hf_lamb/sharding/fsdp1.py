"""FSDP1 (`FullyShardedDataParallel`): which piece of which layer each process holds, read from its private handles."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_lamb.sharding.collectives import Reduction, Reductions, ShardingError, reduction_of
from hf_lamb.sharding.layout import Layout, Segment

__all__ = ["FSDP1", "clean_name", "flat_tensors", "layouts", "unwrapped", "whole_shapes"]

# What FSDP1 and activation checkpointing put into the names of the modules that they wrap.
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def clean_name(name: str) -> str:
    """The name that a parameter, or a module, has in the model that nothing wraps."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


class FSDP1:
    """A model that FSDP1 has wrapped, or that has parts which it has."""

    state_from_the_start = True  # without any, accelerate 1.15 loads none from a sharded checkpoint, silently

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.layouts = layouts(model)
        params = {id(param) for group in optimizer.param_groups for param in group["params"]}
        if not any(id(tensor) in params for tensor in self.layouts):
            raise ShardingError(
                "Lamb.attach: FSDP1 has put flat tensors in the place of this optimizer's parameters, so it would "
                "train nothing: build Lamb(lamb_param_groups(model)) on the wrapped model, or set use_orig_params=True"
            )

    @staticmethod
    def wraps(model: Any) -> bool:
        """Whether FSDP1 has flattened parameters of this model."""
        return isinstance(model, nn.Module) and any(True for _ in _handles(model))

    def starts_step(self, params: Sequence[Tensor]) -> bool:
        """Every call is a step."""
        return True

    def gradient_norm_sq(self, device: torch.device) -> None:
        """FSDP1 computes no norm by itself."""


def layouts(model: nn.Module) -> dict[Tensor, Layout]:
    """Of every tensor that an optimizer of this model is given by FSDP1; nothing where there is no FSDP1.

    With `use_orig_params=True` those are the layers' own, each cut to the part that is here, else the flat tensors, in
    each of which are the parts of many layers. HYBRID_SHARD's replicas have the same parts, and the same gradients:
    the parts of one replica add up. NO_SHARD's layers are whole.

    Raises:
        ShardingError: FSDP1 on top of tensor parallelism; a version of torch in which these private names are others.
    """
    found: dict[Tensor, Layout] = {}
    groups: dict[tuple[int, ...], Reduction] = {}
    for prefix, handle in _handles(model):
        try:
            flat = handle.flat_param
            if any(extension is not None for extension in flat._param_extensions):
                raise ShardingError(
                    f"Lamb.attach: {prefix}{flat._fqns[0]} is cut by tensor parallelism and by FSDP1, which does not "
                    "say how: use FSDP2 with tensor parallelism"
                )
            reductions = _reductions(handle, groups)
            if handle._use_orig_params:
                for param, segment in zip(flat._params, _segments(prefix, flat), strict=True):
                    here = segment.stop - segment.start
                    found[param] = Layout((segment._replace(start=0, stop=here),), here, reductions)
            else:
                found[flat] = Layout(tuple(_segments(prefix, flat)), flat._sharded_size.numel(), reductions)
        except AttributeError as error:
            raise ShardingError(
                f"Lamb.attach: this version of torch has another FSDP1 than hf_lamb knows (no {error.name}): "
                "use FSDP2 (accelerate's fsdp_version 2), or DDP"
            ) from error
    return found


def flat_tensors(model: nn.Module) -> dict[Tensor, list[tuple[str, nn.Module]]]:
    """The flat tensors of `use_orig_params=False`: of each, the names of its layers and the modules that own them."""
    return {
        handle.flat_param: [
            (name, info.module)
            for name, info in zip(_names(prefix, handle.flat_param), handle.flat_param._param_infos, strict=True)
        ]
        for prefix, handle in _handles(model)
        if not handle._use_orig_params
    }


def whole_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """By name, the shapes that FSDP1's layers have when they are whole."""
    return {
        name: tuple(shape)
        for prefix, handle in _handles(model)
        for name, shape in zip(_names(prefix, handle.flat_param), handle.flat_param._shapes, strict=True)
    }


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside FSDP1, where it has wrapped all of it."""
    module = sys.modules.get("torch.distributed.fsdp.fully_sharded_data_parallel")
    inner: nn.Module = model.module if module and isinstance(model, module.FullyShardedDataParallel) else model
    return inner


def _handles(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """FSDP1's handles of the flat tensors in this model, in its order, and the prefix of their layers' names."""
    module = sys.modules.get("torch.distributed.fsdp.fully_sharded_data_parallel")
    if module is None:  # not imported: there can be no FSDP1
        return
    for name, part in model.named_modules():
        if isinstance(part, module.FullyShardedDataParallel) and part._handle is not None:
            yield clean_name(f"{name}." if name else ""), part._handle


def _names(prefix: str, flat: Any) -> list[str]:
    return [prefix + clean_name(name) for name in flat._fqns]


def _segments(prefix: str, flat: Any) -> Iterator[Segment]:
    infos = zip(_names(prefix, flat), flat._shard_param_infos, flat._numels, strict=True)
    for name, info, size in infos:
        start, here = (info.offset_in_shard, info.numel_in_shard) if info.in_shard else (0, 0)
        yield Segment(name, start, start + here, size)


def _reductions(handle: Any, groups: dict[tuple[int, ...], Reduction]) -> Reductions:
    """The group that the handle's tensor is sharded over. Units may have groups of their own of the same processes."""
    if not handle.uses_sharded_strategy or handle.process_group.size() == 1:
        return ()
    import torch.distributed as dist

    ranks = tuple(dist.get_process_group_ranks(handle.process_group))
    return (groups.setdefault(ranks, reduction_of(handle.process_group, handle.flat_param.device)),)
