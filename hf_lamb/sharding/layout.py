"""Where the layers lie in the tensors of FSDP1 and DeepSpeed ZeRO, which flatten or cut them and say nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from hf_lamb.sharding.collectives import Reductions, ShardingError, sum_over_processes

__all__ = ["Layout", "Segment", "check_layouts"]


class Segment(NamedTuple):
    """The part of a layer (an original parameter) that is in a local tensor; empty where it is on other processes."""

    name: str  # of the layer
    start: int  # in the flattened local tensor, the elements from here
    stop: int  # to here
    size: int  # elements of the whole layer


@dataclass(frozen=True)
class Layout:
    """What one tensor that the optimizer is given holds.

    Args:
        segments: every layer of which any process holds a part, in the same order on all of them, which is also their
            order here. Elements in no segment are padding: never updated, in no norm, their gradient not looked at.
        numel: elements of the local tensor, padding too.
        reductions: the process groups over which the parts of a layer add up to all of it; none for whole layers.

    Raises:
        ShardingError: segments that overlap or lie outside of the tensor.
    """

    segments: tuple[Segment, ...]
    numel: int
    reductions: Reductions = ()
    _cuts: list[int] = field(init=False, repr=False, compare=False)  # sizes: padding, segment, padding, ...

    def __post_init__(self) -> None:
        cuts, end = [], 0
        for name, start, stop, _ in self.segments:
            if start == stop:
                start = stop = end
            if not end <= start <= stop <= self.numel:
                raise ShardingError(
                    f"Lamb: elements {start} to {stop} of a tensor of {self.numel} should be {name}'s, but those up "
                    f"to {end} are another layer's: this version of the runtime is not understood, so use FSDP2 or DDP"
                )
            cuts += [start - end, stop - start]
            end = stop
        object.__setattr__(self, "_cuts", [*cuts, self.numel - end])

    @property
    def is_one_layer(self) -> bool:
        return len(self.segments) == 1 and self._cuts[1] == self.numel

    def pieces(self, tensor: Tensor) -> Sequence[Tensor]:
        """Views of the segments in a tensor that lies as the one described: it, its gradient or its moments."""
        return (tensor,) if self.is_one_layer else torch.split(tensor.view(-1), self._cuts)[1::2]


def check_layouts(layouts: dict[Tensor, Layout]) -> None:
    """See that the processes' segments add up to the layers; a collective, which all processes must call.

    Raises:
        ShardingError: naming a layer of which the processes hold more or less than there is.
    """
    segments: dict[Reductions, list[Segment]] = {}
    for layout in layouts.values():
        segments.setdefault(layout.reductions, []).extend(layout.segments)
    held = sum_over_processes(
        {
            reductions: torch.tensor([segment.stop - segment.start for segment in some])
            for reductions, some in segments.items()
        }
    )
    for reductions, some in segments.items():
        for segment, elements in zip(some, held[reductions].tolist(), strict=True):
            if elements != segment.size:
                raise ShardingError(
                    f"Lamb.attach: all processes together hold {elements} elements of {segment.name}, which has "
                    f"{segment.size}: this version of the runtime is not understood, so use FSDP2 or DDP"
                )
