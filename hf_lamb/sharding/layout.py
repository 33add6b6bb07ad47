"""The layout of layers in the tensors of FSDP1 and DeepSpeed ZeRO, which carry no layout metadata."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from hf_lamb.sharding.collectives import Reductions, ShardingError, sum_over_processes

__all__ = ["Layout", "Segment", "check_layouts"]


class Segment(NamedTuple):
    """The part of a layer (an original parameter) in a local tensor; empty if other processes hold the whole layer."""

    name: str  # of the layer
    start: int  # first element, in the flattened local tensor
    stop: int  # end (exclusive)
    size: int  # number of elements of the whole layer


@dataclass(frozen=True)
class Layout:
    """The layers in one tensor that the optimizer updates.

    Args:
        segments: one for each layer of which any process holds a part, in the order of the tensor's elements, and in
            the same order on all processes. Elements in no segment are padding: `Lamb` neither updates nor reads them.
        numel: number of elements of the local tensor, including padding.
        reductions: the process groups over which a layer's segments add up to the layer. Default: none, for whole
            layers.

    Raises:
        ShardingError: segments overlap or lie outside of the tensor.
    """

    segments: tuple[Segment, ...]
    numel: int
    reductions: Reductions = ()
    _cuts: list[int] = field(init=False, repr=False, compare=False)  # sizes of: padding, segment, padding, ...

    def __post_init__(self) -> None:
        cuts, end = [], 0
        for name, start, stop, _ in self.segments:
            if start == stop:
                start = stop = end
            if not end <= start <= stop <= self.numel:
                raise ShardingError(
                    f"Lamb: use FSDP2 or DDP: this version of the runtime has an unknown layout (elements {start} to "
                    f"{stop} of a tensor of {self.numel} should be {name}, but another layer ends at {end})"
                )
            cuts += [start - end, stop - start]
            end = stop
        object.__setattr__(self, "_cuts", [*cuts, self.numel - end])

    @property
    def is_one_layer(self) -> bool:
        return len(self.segments) == 1 and self._cuts[1] == self.numel

    def pieces(self, tensor: Tensor) -> Sequence[Tensor]:
        """Return views of the segments in a tensor of this layout: the parameter, its gradient or a moment."""
        return (tensor,) if self.is_one_layer else torch.split(tensor.view(-1), self._cuts)[1::2]


def check_layouts(layouts: dict[Tensor, Layout]) -> None:
    """Check that the segments of all processes add up to the layers. A collective: all processes must call it.

    Raises:
        ShardingError: the processes together hold more or fewer elements of a layer than it has.
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
                    "Lamb.attach: use FSDP2 or DDP: this version of the runtime has an unknown layout (all processes "
                    f"together hold {elements} elements of {segment.name}, which has {segment.size})"
                )
