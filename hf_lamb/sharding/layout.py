"""The layout of layers in flat tensors of FSDP1 and DeepSpeed ZeRO, and in parameters that hold several layers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from hf_lamb.sharding.collectives import Reductions, ShardingError, sum_over_processes

__all__ = ["Layout", "Segment", "Sizes", "check_layouts"]

# Of the layers that one parameter holds: their numbers of elements, in order.
Sizes = tuple[int, ...]


class Segment(NamedTuple):
    """The part of a layer in a local tensor; empty if other processes hold the whole layer.

    A layer is an original parameter, or one of several blocks of it.
    """

    name: str  # of the original parameter
    start: int  # first element, in the flattened local tensor
    stop: int  # end (exclusive)
    size: int  # number of elements of the whole layer
    offset: int = 0  # of the first element, in the flattened layer
    in_order: bool = True  # False: the runtime has flattened the parameter in another order than that of its rows
    block: int | None = None  # index among the layers of the parameter; None if the parameter is one layer

    @property
    def layer(self) -> str:
        """The layer's name: `NAME[0]`, `NAME[1]`, ... of a parameter that holds several."""
        return self.name if self.block is None else f"{self.name}[{self.block}]"

    def split(self, sizes: Sizes) -> Iterator[Segment]:
        """Yield the segments of the layers in this one, which must be of a whole parameter.

        Raises:
            ShardingError: the sizes do not add up to the parameter's; its elements are not in the order of its rows.
        """
        if not self.in_order:
            raise ShardingError(
                f"Lamb: call .contiguous() on {self.name} before FSDP1 wraps it, or use lamb_param_groups(model, "
                "split=False): FSDP1 has flattened it in another order than that of its rows, and it holds several "
                "layers"
            )
        if sum(sizes) != self.size:
            raise ShardingError(
                f"Lamb: build the groups with lamb_param_groups of this model: they split {self.name}, which has "
                f"{self.size} elements, into layers of {', '.join(map(str, sizes))}"
            )
        begin, held = 0, self.stop - self.start
        for block, size in enumerate(sizes):
            first = min(max(begin - self.offset, 0), held)
            last = min(max(begin + size - self.offset, 0), held)
            offset = max(self.offset - begin, 0) if last > first else 0
            yield Segment(self.name, self.start + first, self.start + last, size, offset, block=block)
            begin += size


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
    _padded: bool = field(init=False, repr=False, compare=False)  # False: `_cuts` are the segments alone

    def __post_init__(self) -> None:
        cuts, end = [], 0
        for name, start, stop, *_ in self.segments:
            if start == stop:
                start = stop = end
            if not end <= start <= stop <= self.numel:
                raise ShardingError(
                    f"Lamb: use FSDP2 or DDP: this version of the runtime has an unknown layout (elements {start} to "
                    f"{stop} of a tensor of {self.numel} should be {name}, but another layer ends at {end})"
                )
            cuts += [start - end, stop - start]
            end = stop
        cuts.append(self.numel - end)
        padded = any(cuts[::2])
        object.__setattr__(self, "_cuts", cuts if padded else cuts[1::2])
        object.__setattr__(self, "_padded", padded)

    @property
    def is_one_layer(self) -> bool:
        return len(self.segments) == 1 and not self._padded

    def pieces(self, tensor: Tensor) -> Sequence[Tensor]:
        """Return views of the segments in a tensor of this layout: the parameter, its gradient or a moment.

        Of a tensor that is not contiguous they are views if they are whole rows; else they are copies (`copies`).
        """
        if self.is_one_layer:
            return (tensor,)
        if self._in_rows(tensor):
            row = math.prod(tensor.shape[1:])
            return torch.split_with_sizes(tensor, [size // row for size in self._cuts])
        pieces = torch.split_with_sizes(tensor.reshape(-1), self._cuts)
        return pieces[1::2] if self._padded else pieces

    def copies(self, tensor: Tensor) -> bool:
        """Return whether `pieces` may return copies of parts of this tensor, not views."""
        flat = tensor.ndim < 2 or tensor.is_contiguous()
        return not (flat or self.is_one_layer or self._in_rows(tensor))

    def _in_rows(self, tensor: Tensor) -> bool:
        """Return whether all segments are whole rows of this tensor."""
        row = math.prod(tensor.shape[1:])
        return tensor.ndim > 1 and not self._padded and row > 0 and not any(size % row for size in self._cuts)

    def split(self, sizes_of: Mapping[str, Sizes]) -> Layout:
        """Return the layout of the same tensor in which some parameters are several layers.

        Args:
            sizes_of: their layers, by the parameters' names.
        """
        segments: list[Segment] = []
        for segment in self.segments:
            sizes = sizes_of.get(segment.name)
            segments += (segment,) if sizes is None else segment.split(sizes)
        return replace(self, segments=tuple(segments))


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
            reductions: torch.tensor([segment.stop - segment.start for segment in some], device="cpu")
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
