"""FSDP1 (`FullyShardedDataParallel`): the layouts of its tensors, read from its private handles."""

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

# FSDP1 and activation checkpointing insert these into the names of the modules that they wrap.
_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def clean_name(name: str) -> str:
    """Return the name that a parameter or module has in the unwrapped model."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


class FSDP1:
    """A model that FSDP1 wraps, as a whole or in parts; a `Runtime`."""

    state_from_the_start = True  # else accelerate 1.15 silently loads no state from a sharded checkpoint

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        self.layouts = layouts(model)
        params = {id(param) for group in optimizer.param_groups for param in group["params"]}
        if not any(id(tensor) in params for tensor in self.layouts):
            raise ShardingError(
                "Lamb.attach: build Lamb(lamb_param_groups(model)) on the wrapped model, or set use_orig_params=True: "
                "FSDP1 has replaced the optimizer's parameters by flat tensors, so it would train nothing"
            )

    @staticmethod
    def wraps(model: Any) -> bool:
        """Return whether FSDP1 has flattened parameters of this model."""
        return isinstance(model, nn.Module) and any(True for _ in _handles(model))

    def starts_step(self, params: Sequence[Tensor]) -> bool:
        """Return True: every call is a step."""
        return True

    def gradient_norm_sq(self, device: torch.device) -> None:
        """Return None: FSDP1 computes no norm, `Lamb` does."""


def layouts(model: nn.Module) -> dict[Tensor, Layout]:
    """Return the layout of every tensor that FSDP1 gives to an optimizer of this model; empty without FSDP1.

    With `use_orig_params=True` there is one tensor for each layer, with this process's shard of it. Otherwise there
    are flat tensors, each with the shards of many layers. With HYBRID_SHARD the replicas have the same shards and the
    same gradients, so the sums go over the processes of one replica. With NO_SHARD layers are whole.

    Raises:
        ShardingError: FSDP1 is combined with tensor parallelism; this version of torch has other private names.
    """
    found: dict[Tensor, Layout] = {}
    groups: dict[tuple[int, ...], Reduction] = {}
    for prefix, handle in _handles(model):
        try:
            flat = handle.flat_param
            if any(extension is not None for extension in flat._param_extensions):
                raise ShardingError(
                    "Lamb.attach: use FSDP2 with tensor parallelism: FSDP1 does not record how it shards "
                    f"{prefix}{flat._fqns[0]}, which tensor parallelism has sharded already"
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
                "Lamb.attach: use FSDP2 (accelerate's fsdp_version 2), or DDP: hf_lamb does not support the FSDP1 of "
                f"this version of torch (no {error.name})"
            ) from error
    return found


def flat_tensors(model: nn.Module) -> dict[Tensor, list[tuple[str, nn.Module]]]:
    """Return, for each flat tensor of `use_orig_params=False`, the name and the owner module of each of its layers."""
    return {
        handle.flat_param: [
            (name, info.module)
            for name, info in zip(_names(prefix, handle.flat_param), handle.flat_param._param_infos, strict=True)
        ]
        for prefix, handle in _handles(model)
        if not handle._use_orig_params
    }


def whole_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the unsharded shape of each layer that FSDP1 has sharded, by name."""
    return {
        name: tuple(shape)
        for prefix, handle in _handles(model)
        for name, shape in zip(_names(prefix, handle.flat_param), handle.flat_param._shapes, strict=True)
    }


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module inside of FSDP1's wrapper, or the model itself if it has no such wrapper."""
    module = sys.modules.get("torch.distributed.fsdp.fully_sharded_data_parallel")
    inner: nn.Module = model.module if module and isinstance(model, module.FullyShardedDataParallel) else model
    return inner


def _handles(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield FSDP1's handle of each flat tensor of this model, after the prefix of the names of its layers."""
    module = sys.modules.get("torch.distributed.fsdp.fully_sharded_data_parallel")
    if module is None:  # if it is not imported, no module is wrapped
        return
    for name, part in model.named_modules():
        if isinstance(part, module.FullyShardedDataParallel) and part._handle is not None:
            yield clean_name(f"{name}." if name else ""), part._handle


def _names(prefix: str, flat: Any) -> list[str]:
    return [prefix + clean_name(name) for name in flat._fqns]


def _segments(prefix: str, flat: Any) -> Iterator[Segment]:
    infos = zip(_names(prefix, flat), flat._shard_param_infos, flat._numels, flat._contiguities, strict=True)
    for name, info, size, in_order in infos:
        start, here = (info.offset_in_shard, info.numel_in_shard) if info.in_shard else (0, 0)
        offset = info.intra_param_start_idx if info.in_shard else 0
        yield Segment(name, start, start + here, size, offset, in_order)


def _reductions(handle: Any, groups: dict[tuple[int, ...], Reduction]) -> Reductions:
    """Return the process group that a handle's tensor is sharded over.

    FSDP1 units may have different groups of the same processes: `groups` keeps one of them, for one all-reduce.
    """
    if not handle.uses_sharded_strategy or handle.process_group.size() == 1:
        return ()
    import torch.distributed as dist

    ranks = tuple(dist.get_process_group_ranks(handle.process_group))
    return (groups.setdefault(ranks, reduction_of(handle.process_group, handle.flat_param.device)),)
