"""DeepSpeed ZeRO: where the layers lie in the flat partitions that it gives the optimizer instead of parameters.

ZeRO-1 and 2 lay the parameters of a group end to end and cut the whole into one partition a process; ZeRO-3 cuts every
parameter for itself and lays the pieces of a sub-group end to end. Both pad, and both call `step` once for each flat
tensor. None of this is public in DeepSpeed: what is read here is compared with the weights before it is believed.
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
    """An engine of DeepSpeed.

    With ZeRO one of its steps is several calls of `step`, one for each parameter group (ZeRO-1, 2) or sub-group
    (ZeRO-3), always in the same order.
    """

    state_from_the_start = False

    def __init__(self, engine: Any, optimizer: Optimizer) -> None:
        self.engine = engine
        self.layouts = layouts(engine, optimizer)
        self._first = next(iter(self.layouts)) if engine.zero_optimization() else None

    @staticmethod
    def wraps(model: Any) -> bool:
        """Whether it is an engine of `deepspeed.initialize`."""
        module = sys.modules.get("deepspeed")
        return module is not None and isinstance(model, module.DeepSpeedEngine)

    def starts_step(self, params: Sequence[Tensor]) -> bool:
        """Whether a call with these parameters is the first of a step."""
        return self._first is None or any(param is self._first for param in params)

    def gradient_norm_sq(self, device: torch.device) -> Tensor | None:
        """Of all gradients of all processes, as this step's calls get them: DeepSpeed has clipped them, if it clips.

        Infinite where one is not finite, of which DeepSpeed may make a -1. None without ZeRO.
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
    """A layer: its name, where it starts in the tensor that is cut into partitions, its elements."""

    name: str
    offset: int
    size: int


def cut_together(layers: Sequence[Whole], start: int, stop: int) -> tuple[Segment, ...]:
    """What elements `start` to `stop` of a group's flat tensor hold (ZeRO-1, 2); nothing of layers elsewhere."""
    return tuple(
        Segment(name, _within(offset, start, stop) - start, _within(offset + size, start, stop) - start, size)
        for name, offset, size in layers
    )


def cut_one_by_one(names: Sequence[str], sizes: Sequence[int], parts: Sequence[int], rank: int) -> tuple[Segment, ...]:
    """What a process holds of a sub-group (ZeRO-3): of each layer its rank-th part, end to end, the last padded."""
    starts = accumulate(parts, initial=0)
    return tuple(
        Segment(name, start, start + _within(size - rank * part, 0, part), size)
        for name, size, part, start in zip(names, sizes, parts, starts, strict=False)
    )


def _within(x: int, low: int, high: int) -> int:
    return min(max(x, low), high)


# -- reading an engine -----------------------------------------------------------------------------------------------


Names = Mapping[Tensor, str]


class Flat(NamedTuple):
    """A tensor that DeepSpeed lets the optimizer update, and the processes with the rest of its layers, if any.

    With its segments, and beside each the model's weights that should be in it.
    """

    tensor: Tensor
    group: ProcessGroup | None
    segments: tuple[Segment, ...]
    weights: list[Tensor]


def layouts(engine: Any, optimizer: Optimizer) -> dict[Tensor, Layout]:
    """The layouts of the tensors that a DeepSpeed engine lets `optimizer` update; none where they are the parameters.

    Raises:
        ShardingError: an engine that steps with another optimizer, that has MoE layers, tensor or pipeline
            parallelism, offloads to NVMe or in part, or is of another kind than those tested; options of the optimizer
            that DeepSpeed has to serve; weights that are not where they should be.
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
            f"Lamb: this is DeepSpeed {version}, but {TESTED} was tested: where layers lie has been compared with the "
            "weights, the rest of what is private there has not",
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
            f"Lamb: DeepSpeed {version} differs from {TESTED}, which was tested ({error}): "
            f"pip install 'deepspeed=={TESTED}.*'"
        ) from error
    return {
        tensor: Layout(segments, tensor.numel(), () if group is None else (reduction_of(group, tensor.device),))
        for tensor, group, segments, _ in flats
    }


_WAY_OUT = "use ZeRO-1, 2 or 3 without it, or FSDP2 (accelerate's fsdp_version 2)"


def _stage_1_and_2(zero: Any, names: Names) -> Iterator[Flat]:
    """Not by `_hp_mapping`, which is in another order than the flat tensor where gradients go round robin."""
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
    places = (max(start - layer.offset, 0) for layer in layers)
    weights = [
        param.detach().reshape(-1)[place : place + segment.stop - segment.start]
        for param, place, segment in zip(params, places, segments, strict=True)
    ]
    return Flat(tensor, group, segments, weights)


def _stage_3(zero: Any, names: Names) -> Iterator[Flat]:
    """Not by `padding_size`, which knows of the last process' padding only."""
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
    """ZeRO-0 in bf16 or fp16: whole fp32 copies, of trainable parameters only, so the groups' names do not fit."""
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


# -- what cannot be done right ---------------------------------------------------------------------------------------


def _check_optimizer(engine: Any, optimizer: Optimizer) -> None:
    if engine.basic_optimizer is not optimizer:
        raise ShardingError(
            f"Lamb: DeepSpeed steps with {type(engine.basic_optimizer).__name__}, not with this Lamb. accelerate puts "
            'CPU-Adam in its place where the optimizer is offloaded: set "zero_force_ds_cpu_optimizer": false in the '
            "DeepSpeed configuration"
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
    """DeepSpeed steps one flat tensor after the other: what needs all gradients is taken from the norm it computes."""
    if getattr(zero, "compute_grad_norm", True):
        return
    for option, off in (("max_grad_norm", None), ("skip_nonfinite", False)):
        if any(group[option] != off for group in optimizer.param_groups):
            raise ShardingError(
                f"Lamb: {option} needs the norm of all gradients, which DeepSpeed has been told not to compute: set "
                f'"compute_grad_norm": true in its configuration, or {option}={off}'
            )


def _check_weights(flat: Flat) -> None:
    for segment, weight in zip(flat.segments, flat.weights, strict=True):
        held = flat.tensor.detach().view(-1)[segment.start : segment.stop]
        if held.shape != weight.shape or not torch.equal(held.to(weight.dtype), weight.to(held.device)):
            raise ShardingError(
                f"Lamb: the weights of {segment.name} are not where DeepSpeed ZeRO should have them: load weights "
                "before deepspeed.initialize; if they were, this version is not understood: "
                f"pip install 'deepspeed=={TESTED}.*'"
            )


# -- who is calling --------------------------------------------------------------------------------------------------


def calling_engine() -> Any:
    """The DeepSpeed engine whose step this is, if it is one's."""
    if "deepspeed" not in sys.modules or torch.compiler.is_compiling():
        return None
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__") == "deepspeed.runtime.engine":
            return frame.f_locals["self"]
        frame = frame.f_back
    return None


def is_trial_step(engine: Any) -> bool:
    """Whether DeepSpeed is still building its optimizer: without ZeRO it then does a step with gradients of zero.

    It would count as the first step, and take what is not adapted the share lr*λ closer to zero.
    """
    return engine.optimizer is None
