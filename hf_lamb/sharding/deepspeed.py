"""DeepSpeed ZeRO: the layouts of the flat partitions that the optimizer updates in place of the parameters.

ZeRO-1 and 2 concatenate the parameters of a group and give each process one partition of the result. ZeRO-3 partitions
every parameter and concatenates the partitions of a sub-group. Both add padding, and both call `step` once for each
flat tensor. DeepSpeed documents none of this, so this module checks the layouts against the model's weights.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from types import FrameType
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from hf_lamb.sharding.collectives import ShardingError, reduction_of
from hf_lamb.sharding.layout import Layout, Segment

__all__ = ["DeepSpeed", "calling_engine", "is_trial_step", "layouts"]

TESTED = "0.19"


class DeepSpeed:
    """A DeepSpeed engine; a `Runtime`.

    With ZeRO, one optimizer step is several calls of `step`: one for each parameter group (ZeRO-1, 2) or sub-group
    (ZeRO-3), always in the same order.
    """

    state_from_the_start = False

    def __init__(self, engine: Any, optimizer: Optimizer) -> None:
        self.engine = engine
        self.layouts = layouts(engine, optimizer)
        self._first = next(iter(self.layouts)) if engine.zero_optimization() else None

    @staticmethod
    def wraps(model: Any) -> bool:
        """Return whether `model` is an engine of `deepspeed.initialize`."""
        module = sys.modules.get("deepspeed")
        return module is not None and isinstance(model, module.DeepSpeedEngine)

    def starts_step(self, params: Sequence[Tensor]) -> bool:
        """Return whether a call with these parameters is the first one of a step."""
        return self._first is None or any(param is self._first for param in params)

    def gradient_norm_sq(self, device: torch.device) -> Tensor | None:
        """Return the squared norm of all gradients of all processes, after DeepSpeed's clipping; None without ZeRO.

        It is infinite if a gradient is not finite. (DeepSpeed may give -1 as the norm then.)
        """
        if self._first is None:
            return None
        zero = self.engine.optimizer
        norm = torch.as_tensor(zero._global_grad_norm, dtype=torch.float32, device=device)
        norm = torch.where(norm < 0, torch.inf, norm)
        if zero.clip_grad > 0:
            norm = torch.where(norm.isfinite(), norm.clamp(max=zero.clip_grad), norm)
        return norm.square()


class Whole(NamedTuple):
    """A layer in the tensor that ZeRO-1 and 2 partition."""

    name: str
    offset: int  # index of its first element
    size: int  # number of elements


def cut_together(layers: Sequence[Whole], start: int, stop: int) -> tuple[Segment, ...]:
    """Return the segments in elements `start` to `stop` of a group's flat tensor (ZeRO-1, 2).

    There is one for each layer; it is empty for layers outside of that range.
    """
    return tuple(
        Segment(
            name,
            _within(offset, start, stop) - start,
            _within(offset + size, start, stop) - start,
            size,
            _within(start - offset, 0, size),
        )
        for name, offset, size in layers
    )


def cut_one_by_one(names: Sequence[str], sizes: Sequence[int], parts: Sequence[int], rank: int) -> tuple[Segment, ...]:
    """Return the segments of a sub-group on a process (ZeRO-3): the rank-th partition of each layer, concatenated.

    The last partition of a layer may end with padding.
    """
    starts = accumulate(parts, initial=0)
    return tuple(
        Segment(name, start, start + _within(size - rank * part, 0, part), size, min(rank * part, size))
        for name, size, part, start in zip(names, sizes, parts, starts, strict=False)
    )


def _within(x: int, low: int, high: int) -> int:
    return min(max(x, low), high)


# -- reading an engine -----------------------------------------------------------------------------------------------


Names = Mapping[Tensor, str]


class Flat(NamedTuple):
    """A tensor that the optimizer updates under DeepSpeed."""

    tensor: Tensor
    group: ProcessGroup | None  # the processes that hold the rest of its layers; None if layers are whole
    segments: tuple[Segment, ...]
    weights: list[Tensor]  # for each segment, the model's weights that should be in it


def layouts(engine: Any, optimizer: Optimizer) -> dict[Tensor, Layout]:
    """Return the layouts of the tensors that `optimizer` updates under a DeepSpeed engine.

    The result is empty if DeepSpeed lets the optimizer update the parameters themselves.

    Raises:
        ShardingError: the engine steps with another optimizer; it has MoE layers, tensor or pipeline parallelism, or
            offloads to NVMe or in part; its type is unknown; an option of the optimizer needs the gradient norm, and
            DeepSpeed does not compute it; the weights are not where the layouts say.
    """
    _check_optimizer(engine, optimizer)
    zero, names = engine.optimizer, engine.param_names
    kind = type(zero).__name__
    if kind not in _READERS:
        if engine.zero_optimization():
            raise ShardingError(f"Lamb: DeepSpeed's {kind} is not supported: {_WAY_OUT}")
        return {}
    _check_engine(engine)
    if engine.zero_optimization():
        _check_norm(zero, optimizer)
    version = sys.modules["deepspeed"].__version__
    if not version.startswith(f"{TESTED}."):
        warnings.warn(
            f"Lamb: hf_lamb was tested with DeepSpeed {TESTED}, this is {version}. The layouts of layers are checked "
            "against the weights; other private parts of DeepSpeed are not checked",
            stacklevel=2,
        )
    try:
        flats = list(_READERS[kind](zero, names))
        for flat in flats:
            _check_weights(flat)
    except (AttributeError, IndexError, KeyError, TypeError, RuntimeError) as error:
        if isinstance(error, ShardingError):
            raise
        raise ShardingError(
            f"Lamb: pip install 'deepspeed=={TESTED}.*': DeepSpeed {version} differs from it, and hf_lamb does not "
            f"know it ({error})"
        ) from error
    return {
        tensor: Layout(segments, tensor.numel(), () if group is None else (reduction_of(group, tensor.device),))
        for tensor, group, segments, _ in flats
    }


_WAY_OUT = "use ZeRO-1, 2 or 3 without it, or FSDP2 (accelerate's fsdp_version 2)"


def _stage_1_and_2(zero: Any, names: Names) -> Iterator[Flat]:
    """Do not use `_hp_mapping`: with round-robin gradients its order is not that of the flat tensor."""
    for tensor, group, params, offsets in zip(
        zero.single_partition_of_fp32_groups,
        zero.real_dp_process_group,
        zero.round_robin_bit16_groups,
        zero.round_robin_bit16_offsets,
        strict=True,
    ):
        yield _together(names, tensor, group, params, offsets)


def _bf16(zero: Any, names: Names) -> Iterator[Flat]:
    for tensor, group, params in zip(
        zero.fp32_groups_flat_partition, zero.real_dp_process_group, zero.bf16_groups, strict=True
    ):
        offsets = accumulate((param.numel() for param in params), initial=0)
        yield _together(names, tensor, group, params, list(offsets)[:-1])


def _together(
    names: Names, tensor: Tensor, group: ProcessGroup, params: Sequence[Tensor], offsets: Sequence[int]
) -> Flat:
    start = dist.get_rank(group) * tensor.numel()
    layers = [Whole(names[p], offset, p.numel()) for p, offset in zip(params, offsets, strict=True)]
    segments = cut_together(layers, start, start + tensor.numel())
    weights = [
        param.detach().reshape(-1)[segment.offset : segment.offset + segment.stop - segment.start]
        for param, segment in zip(params, segments, strict=True)
    ]
    return Flat(tensor, group, segments, weights)


def _stage_3(zero: Any, names: Names) -> Iterator[Flat]:
    """Do not use `padding_size`: it counts the padding of the last process only."""
    for tensor, group, params in zip(
        zero.fp32_partitioned_groups_flat, zero.sub_group_process_groups, zero.fp16_groups, strict=True
    ):
        sizes, parts = [param.ds_numel for param in params], [param.partition_numel() for param in params]
        segments = cut_one_by_one([names[param] for param in params], sizes, parts, dist.get_rank(group))
        weights = [
            param.ds_tensor.detach().reshape(-1)[: segment.stop - segment.start]
            for param, segment in zip(params, segments, strict=True)
        ]
        yield Flat(tensor, group, segments, weights)


def _unfused(zero: Any, names: Names) -> Iterator[Flat]:
    """ZeRO-0 in bf16 or fp16: whole fp32 copies of the trainable parameters, so `param_names` of the groups differ."""
    for tensors, params in zip(zero.fp32_groups, zero.fp16_groups, strict=True):
        for tensor, param in zip(tensors, params, strict=True):
            segment = Segment(names[param], 0, param.numel(), param.numel())
            yield Flat(tensor, None, (segment,), [param.detach().reshape(-1)])


_READERS = {
    "FP16_UnfusedOptimizer": _unfused,
    "DeepSpeedZeroOptimizer": _stage_1_and_2,
    "BF16_Optimizer": _bf16,
    "DeepSpeedZeroOptimizer_Stage3": _stage_3,
}


# -- what is not supported -------------------------------------------------------------------------------------------


def _check_optimizer(engine: Any, optimizer: Optimizer) -> None:
    if engine.basic_optimizer is not optimizer:
        raise ShardingError(
            'Lamb: set "zero_force_ds_cpu_optimizer": false in the DeepSpeed configuration: DeepSpeed steps with '
            f"{type(engine.basic_optimizer).__name__}, not with this Lamb, because accelerate replaces an offloaded "
            "optimizer by CPU-Adam"
        )


def _check_engine(engine: Any) -> None:
    offloads = (engine.zero_offload_optimizer(), engine.zero_offload_param())
    if engine.has_moe_layers:
        what = "experts (MoE)"
    elif engine.autotp_size() > 1 or getattr(engine.optimizer, "model_parallel_world_size", 1) > 1:
        what = "tensor parallelism"
    elif engine.pipeline_parallelism:
        what = "pipeline parallelism"
    elif any(offload is not None and offload.device == "nvme" for offload in offloads):
        what = "offloading to NVMe"
    elif offloads[0] is not None and engine.zero_partial_offload() != 1:
        what = f"offloading in part (ratio {engine.zero_partial_offload():g}; the rest is stepped by AdamW)"
    elif engine.zero_hpz_partition_size() > 1:
        what = "hierarchical partitions (zero_hpz_partition_size)"
    else:
        return
    raise ShardingError(f"Lamb: DeepSpeed ZeRO with {what} is not supported: {_WAY_OUT}")


def _check_norm(zero: Any, optimizer: Optimizer) -> None:
    """Raise ShardingError if an option needs the norm of all gradients and DeepSpeed does not compute it.

    DeepSpeed steps one flat tensor after the other, so `Lamb` cannot compute this norm itself.
    """
    if getattr(zero, "compute_grad_norm", True):
        return
    for option, off in (("max_grad_norm", None), ("skip_nonfinite", False)):
        if any(group[option] != off for group in optimizer.param_groups):
            raise ShardingError(
                f'Lamb: set "compute_grad_norm": true in the DeepSpeed configuration, or {option}={off}: {option} '
                "needs the norm of all gradients"
            )


def _check_weights(flat: Flat) -> None:
    for segment, weight in zip(flat.segments, flat.weights, strict=True):
        held = flat.tensor.detach().view(-1)[segment.start : segment.stop]
        if held.shape != weight.shape or not torch.equal(held.to(weight.dtype), weight.to(held.device)):
            raise ShardingError(
                "Lamb: load weights before deepspeed.initialize; if you did, hf_lamb does not know this version: "
                f"pip install 'deepspeed=={TESTED}.*' (the weights of {segment.name} are not where DeepSpeed ZeRO "
                "should have them)"
            )


# -- who is calling --------------------------------------------------------------------------------------------------


def calling_engine() -> Any:
    """Return the DeepSpeed engine that is calling `step`, or None; found on the call stack."""
    if "deepspeed" not in sys.modules or torch.compiler.is_compiling():
        return None
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "deepspeed.runtime.engine":
            return frame.f_locals["self"]
        frame = frame.f_back
    return None


def is_trial_step(engine: Any) -> bool:
    """Return whether DeepSpeed is still building its optimizer: without ZeRO it then does a step with zero gradients.

    `Lamb` must ignore this step: it would count as the first one and apply weight decay to layers without adaptation.
    """
    return engine.optimizer is None
