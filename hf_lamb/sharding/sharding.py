"""`Sharding`: finds the local pieces of each layer and adds up sums of a layer over processes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.optim import Optimizer

from hf_lamb.norms import Sum, math_dtype
from hf_lamb.sharding import deepspeed
from hf_lamb.sharding.collectives import Reduction, Reductions, ShardingError, reduction_of, sum_over_processes
from hf_lamb.sharding.deepspeed import DeepSpeed
from hf_lamb.sharding.fsdp1 import FSDP1
from hf_lamb.sharding.layout import Layout, Segment, Sizes, check_layouts
from hf_lamb.sharding.peers import zero_redundancy_group
from hf_lamb.sharding.plain import local_blocks, local_grad, local_shard
from hf_lamb.sharding.runtime import Runtime

# The runtimes whose tensors carry no layout metadata. `attach` uses the first one that wraps the model.
RUNTIMES: tuple[type[Runtime], ...] = (DeepSpeed, FSDP1)


class Block(NamedTuple):
    """The place of a piece in a tensor that holds several."""

    param: Tensor
    layout: Layout
    number: int  # of the piece, among the layout's segments


class Piece(NamedTuple):
    """This process's part of one layer: tensors of one shape, and the layer's step count.

    All pieces of a tensor have the tensor's step count.
    """

    name: str  # of the layer
    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    cut: int | None  # index into `Sharding.cuts`; None if the whole layer is on this process
    place: int  # the layer's index in that `Cut`
    block: Block | None = None  # None if the piece is all of the tensor
    decays: bool = True  # False overrides the group's weight_decay
    adapts: bool = True  # False overrides the group's layer_adaptation
    keeps_norm: bool = True  # False overrides the group's fixed_norm


@dataclass
class Cut:
    """All layers that are sharded over the same process groups, in the same order on every process."""

    reductions: Reductions
    layers: int = 0
    dtype: torch.dtype = torch.float32  # of the all-reduce: float64 if any of the layers is

    def add(self, dtype: torch.dtype) -> int:
        """Count one more layer, whose arithmetic uses `dtype`, and return its index."""
        if dtype == torch.float64:
            self.dtype = dtype
        self.layers += 1
        return self.layers - 1


class Places(NamedTuple):
    """The indices of some layers in a `Cut`, as a list and as a tensor."""

    numbers: list[int]
    tensor: Tensor


class OfBlocks(NamedTuple):
    """The layout of a parameter that holds several layers, and what it was made from."""

    sizes: Sizes
    shape: torch.Size  # of the local tensor
    reductions: Reductions
    layout: Layout


class CutBucket(Protocol):
    """The attributes of a bucket that `Sharding` reads, see `Piece`."""

    cut: int | None
    places: list[int]


class Sharding:
    """Gives the optimizer the local pieces of each layer, and sums over all processes."""

    def __init__(self, shapes: Iterable[torch.Size] = ()) -> None:
        self.shapes = set(shapes)  # of the parameters that the optimizer was built with
        self.runtime: Runtime | None = None
        self.layouts: dict[Tensor, Layout] = {}
        self.peer_group: Reduction | None = zero_redundancy_group()
        self.had_peers = False  # what this is a copy of has a peer group, which a copy cannot have
        self.cuts: list[Cut] = []
        self._attached: set[str] = set()  # the parameters in `layouts`
        self._of_blocks: dict[str, OfBlocks] = {}  # of parameters that hold several layers, by name
        self._splits: dict[Tensor, tuple[Layout, dict[str, Sizes], Layout]] = {}  # of a runtime's: before and after
        self._indices: dict[int, Places] = {}  # by the number of the sharded bucket

    # -- set up ------------------------------------------------------------------------------------------------------

    def attach(self, optimizer: Optimizer, model: Any, process_group: ProcessGroup | None) -> list[Tensor]:
        """Do what `Lamb.attach` documents, and return the parameters whose state must exist from now on."""
        params = _params(optimizer)
        if process_group is not None:
            self.peer_group = reduction_of(process_group, device_of(params))
        if model is None:
            return []
        kind = next((runtime for runtime in RUNTIMES if runtime.wraps(model)), None)
        if kind is None:
            if not isinstance(model, torch.nn.Module):
                raise ValueError(f"Lamb.attach: expected the wrapped model, got {type(model).__name__}")
            return []
        runtime = kind(model, optimizer)
        check_layouts(runtime.layouts)
        self.runtime = runtime
        # A second DeepSpeed engine has new tensors: drop the layouts of the first one's.
        self.layouts = {param: self.layouts[param] for param in params if param in self.layouts} | runtime.layouts
        self._attached = {segment.name for layout in self.layouts.values() for segment in layout.segments}
        return [p for p in params if p in runtime.layouts and p.requires_grad] if runtime.state_from_the_start else []

    def shapes_of_a_copy(self) -> set[torch.Size]:
        """Return `shapes` for a copy of the optimizer: without the flat tensors, which need a new `attach`."""
        return self.shapes - {tensor.shape for tensor in self.layouts}

    def begin_step(self, optimizer: Optimizer) -> bool | None:
        """Return whether this call of `step` is the first one of an optimizer step, or None if it must do nothing.

        DeepSpeed calls `step` several times for one optimizer step, and once with zero gradients while it starts.

        Raises:
            ShardingError: this is a copy, and the process group of the original is not attached to it.
        """
        if self.had_peers and self.peer_group is None:
            raise ShardingError(
                "Lamb: call attach(process_group=...) on this copy of an optimizer that skips and clips together with "
                "other processes: it does not know them"
            )
        engine = deepspeed.calling_engine()
        if engine is not None:
            if deepspeed.is_trial_step(engine):
                return None
            if not isinstance(self.runtime, DeepSpeed) or engine is not self.runtime.engine:
                self.attach(optimizer, engine, None)
        return self.runtime is None or self.runtime.starts_step(_params(optimizer))

    def check_clippable(self) -> None:
        """Raise ShardingError if the runtime clips itself, in the step."""
        if isinstance(self.runtime, DeepSpeed):
            raise ShardingError(
                "Lamb.clip_grad_norm: set gradient_clipping in DeepSpeed's configuration, or max_grad_norm of Lamb: "
                "DeepSpeed gives the gradients to the optimizer only in the step"
            )

    # -- local pieces ------------------------------------------------------------------------------------------------

    def pieces(
        self,
        param_groups: list[dict[str, Any]],
        name_of: Callable[[int, int], str],
        state_of: Callable[[Tensor], dict[str, Tensor]],
    ) -> Iterator[tuple[int, Piece]]:
        """Yield the pieces that have a gradient, each with the index of its group.

        `cuts` counts all sharded layers, also those without a gradient on this process, so that the vectors of the
        all-reduce have the same length on every process.

        Raises:
            ShardingError: a parameter has a shape that this optimizer was not built with, or its layer cannot be put
                together.
            RuntimeError: a gradient is sparse.
        """
        self.cuts = []
        for group_index, group in enumerate(param_groups):
            undecayed, unadapted, unfixed = (set(group.get(key, ())) for key in ("undecayed", "unadapted", "unfixed"))
            sizes_of: dict[str, Sizes] = dict(group.get("split", ()))
            if sizes_of:
                self._check_split_names(group)
            for index, param in enumerate(group["params"]):
                layout = self.layouts.get(param) if self.layouts else None
                name = name_of(group_index, index)
                if layout is None and name not in sizes_of:
                    piece = self._whole_or_dtensor(param, name, state_of)
                    if piece is not None:
                        yield group_index, piece
                elif layout is None:
                    for piece in self._blocks(param, name, sizes_of[name], state_of):
                        yield group_index, piece
                else:
                    if sizes_of:
                        layout = self._split(param, layout, sizes_of)
                    for segment, piece in self._segments(param, name, layout, state_of):
                        yield (
                            group_index,
                            piece._replace(
                                decays=segment.name not in undecayed,
                                adapts=segment.name not in unadapted,
                                keeps_norm=segment.name not in unfixed,
                            ),
                        )

    def _whole_or_dtensor(
        self, param: Tensor, name: str, state_of: Callable[[Tensor], dict[str, Tensor]]
    ) -> Piece | None:
        self._check_shape(param, name)
        local, reductions = local_shard(param, name)
        cut, place = self._place(reductions, math_dtype(local))
        if param.grad is None:
            return None
        grad, exp_avg, exp_avg_sq, step = _grad_and_state(param, local, name, state_of)
        return Piece(name, local, grad, exp_avg, exp_avg_sq, step, cut, place)

    def _blocks(
        self, param: Tensor, name: str, sizes: Sizes, state_of: Callable[[Tensor], dict[str, Tensor]]
    ) -> Iterator[Piece]:
        """Yield the pieces of a whole tensor or DTensor that holds several layers."""
        self._check_shape(param, name)
        local, reductions = local_shard(param, name)
        known = self._of_blocks.get(name)
        if known is None or known.sizes != sizes or known.shape != local.shape or known.reductions != reductions:
            layout = Layout(local_blocks(param, name, sizes), local.numel(), reductions)
            known = self._of_blocks[name] = OfBlocks(sizes, local.shape, reductions, layout)
        places = [self._place(reductions, math_dtype(local)) for _ in sizes]
        if param.grad is not None:
            grad, exp_avg, exp_avg_sq, step = _grad_and_state(param, local, name, state_of)
            tensors = (local, grad, exp_avg, exp_avg_sq)
            yield from (piece for _, piece in _pieces(param, known.layout, tensors, step, places))

    def _check_split_names(self, group: dict[str, Any]) -> None:
        """Raise ShardingError if "split" names a parameter that is not there: it would silently be one layer."""
        params, names = group["params"], group.get("param_names") or ()
        layouts = [self.layouts[param] for param in params if param in self.layouts]
        known = {*names, *self._attached}
        if layouts:
            # A runtime's layers have their names in the whole model, whatever the group calls its parameters. With
            # DeepSpeed a call of `step` may see a part of the group, and no tensor holds what is frozen.
            known = {segment.name for layout in layouts for segment in layout.segments}
            if isinstance(self.runtime, DeepSpeed):
                known |= {*self._attached, *self.runtime.engine.param_names.values()}
            known |= {name for name, param in zip(names, params, strict=False) if param not in self.layouts}
        unknown = [name for name, _ in group["split"] if name not in known]
        if unknown:
            raise ShardingError(
                'Lamb: build the groups with lamb_param_groups of the whole model, and keep "param_names" and "split" '
                f'together (or use split=False): no parameter is named {unknown[0]}, which "split" of a group says '
                "holds several layers"
            )

    def _check_shape(self, param: Tensor, name: str) -> None:
        if param.shape not in self.shapes:
            raise ShardingError(
                f"Lamb: parameter {name} has shape {tuple(param.shape)}, which this optimizer was not built with: "
                "under DeepSpeed ZeRO call optimizer.attach(engine) after deepspeed.initialize; for a resized layer "
                "build a new optimizer"
            )

    def _split(self, param: Tensor, layout: Layout, sizes_of: dict[str, Sizes]) -> Layout:
        """Return a runtime's layout in which the parameters of a group that hold several layers are those layers."""
        known = self._splits.get(param)
        if known is None or known[0] is not layout or known[1] != sizes_of:
            known = self._splits[param] = (layout, sizes_of, layout.split(sizes_of))
        return known[2]

    def _segments(
        self, param: Tensor, name: str, layout: Layout, state_of: Callable[[Tensor], dict[str, Tensor]]
    ) -> Iterator[tuple[Segment, Piece]]:
        if param.numel() != layout.numel:
            raise ShardingError(
                f"Lamb: {name} has {param.numel()} elements here and had {layout.numel} in attach: call step outside "
                "of summon_full_params, and attach again after resharding"
            )
        places = [self._place(layout.reductions, math_dtype(param)) for _ in layout.segments]
        grad = param.grad
        if grad is not None:
            _refuse_sparse(grad, layout.segments[0].name)
            state = state_of(param)
        elif param.numel() == 0 and param.requires_grad and layout.reductions:
            # Other processes hold this layer, and FSDP1 gives this process no gradient of it. Take part in the layer's
            # sums nevertheless: `layer_stats` is then the same on all processes.
            grad = param.detach()
            step = torch.zeros((), dtype=torch.float32, device=param.device)
            state = {"step": step, "exp_avg": grad.to(math_dtype(param)), "exp_avg_sq": grad.to(math_dtype(param))}
        else:
            return
        tensors = (param, grad, state["exp_avg"], state["exp_avg_sq"])
        yield from _pieces(param, layout, tensors, state["step"], places)

    def _place(self, reductions: Reductions, dtype: torch.dtype) -> tuple[int | None, int]:
        """Count a layer in its `Cut`, and return the cut's index and the layer's index in it."""
        if not reductions:
            return None, 0
        index = next((i for i, cut in enumerate(self.cuts) if cut.reductions == reductions), len(self.cuts))
        if index == len(self.cuts):
            self.cuts.append(Cut(reductions))
        return index, self.cuts[index].add(dtype)

    # -- sums over processes -----------------------------------------------------------------------------------------

    def add_up(self, buckets: Sequence[CutBucket], sums: list[Tensor]) -> list[Tensor]:
        """Add up the sums of each layer's pieces over the processes, with one all-reduce per process group.

        Args:
            buckets: all sharded buckets of this step, or one bucket of whole layers.
            sums: for each bucket a tensor `[k, n]`: k named sums for each of its n layers.

        Returns:
            The same for whole layers. A layer without a gradient on this process adds zero.
        """
        device = sums[0].device if sums else None
        whole = {
            cut.reductions: torch.zeros(len(Sum), cut.layers, dtype=cut.dtype, device=device) for cut in self.cuts
        }
        for number, (bucket, here) in enumerate(zip(buckets, sums, strict=True)):
            vectors = whole[self._reductions(bucket)]
            vectors.index_copy_(1, self._index(number, bucket.places, vectors.device), here.to(vectors))
        sum_over_processes(whole)
        return [
            whole[self._reductions(bucket)].index_select(1, self._indices[number].tensor).to(here)
            for number, (bucket, here) in enumerate(zip(buckets, sums, strict=True))
        ]

    def _reductions(self, bucket: CutBucket) -> Reductions:
        return () if bucket.cut is None else self.cuts[bucket.cut].reductions

    def _index(self, number: int, places: list[int], device: torch.device) -> Tensor:
        """Return the places of a bucket's layers as a tensor. It is cached, because copying to a GPU takes time."""
        known = self._indices.get(number)
        if known is None or known.numbers != places or known.tensor.device != device:
            known = self._indices[number] = Places(places, torch.tensor(places, device=device))
        return known.tensor

    def gradient_norm_sq(
        self, buckets: Sequence[CutBucket], squares: Callable[[int], Tensor], device: torch.device
    ) -> Tensor:
        """Return the squared norm of all gradients of all processes, as a 0-dim tensor on `device`.

        Args:
            buckets: the pieces that are here.
            squares: of the n-th bucket, the squared norms of its gradients or of their parts. Not called where the
                runtime has the norm.
            device: where the result is wanted.
        """
        known = self.runtime.gradient_norm_sq(device) if self.runtime is not None else None
        if known is not None:
            return known
        # Of pieces by their process groups, and of whole layers by (). All processes must add up the same.
        squared: dict[Reductions, list[Tensor]] = {(): [], **{cut.reductions: [] for cut in self.cuts}}
        for number, bucket in enumerate(buckets):
            squared[self._reductions(bucket)].append(squares(number).to(device))
        of_whole = squared.pop(())
        parts = {}
        for cut in self.cuts:
            of_cut = squared[cut.reductions] or [torch.zeros(1, dtype=cut.dtype, device=device)]
            parts[cut.reductions] = torch.cat(of_cut).sum().to(cut.dtype).view(1)
        found = [*of_whole, *sum_over_processes(parts).values()]
        norm_sq = torch.cat(found).sum() if found else torch.zeros((), device=device)
        if self.peer_group is not None:
            # All processes must use one dtype, and other processes may have parameters of another dtype.
            norm_sq = sum_over_processes({(self.peer_group,): norm_sq.double()})[(self.peer_group,)]
        return norm_sq

    @property
    def takes_part(self) -> bool:
        """Whether this process must take part in all-reduces, even if it has no gradient."""
        return bool(self.cuts) or self.peer_group is not None


def _grad_and_state(
    param: Tensor, local: Tensor, name: str, state_of: Callable[[Tensor], dict[str, Tensor]]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the local gradient, exp_avg and exp_avg_sq of a whole tensor or DTensor that has a gradient, and step."""
    assert param.grad is not None
    _refuse_sparse(param.grad, name)
    state = state_of(param)
    grad = local_grad(param, param.grad)
    exp_avg, exp_avg_sq = (local_shard(state[moment], name)[0] for moment in ("exp_avg", "exp_avg_sq"))
    if not local.shape == grad.shape == exp_avg.shape == exp_avg_sq.shape:
        raise ShardingError(
            f"Lamb: parameter {name} has shape {tuple(local.shape)} here, its gradient {tuple(grad.shape)} "
            f"and its moments {tuple(exp_avg.shape)}: for a resized layer build a new optimizer"
        )
    return grad, exp_avg, exp_avg_sq, state["step"]


def _pieces(
    param: Tensor,
    layout: Layout,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor],
    step: Tensor,
    places: list[tuple[int | None, int]],
) -> Iterator[tuple[Segment, Piece]]:
    """Yield the segments of a tensor with their pieces; `tensors` are w, g, m and v of this process.

    Raises:
        ShardingError: the pieces of w, m or v would be copies, so that the update would be lost.
    """
    for tensor, what in zip(tensors, ("", None, "exp_avg of ", "exp_avg_sq of "), strict=True):
        if what is not None and layout.copies(tensor):
            raise ShardingError(
                f"Lamb: call .contiguous() on {what}{layout.segments[0].name}, or use lamb_param_groups(model, "
                "split=False): it holds several layers that are not whole rows, and its elements are not in the order "
                "of its rows"
            )
    views = (layout.pieces(tensor) for tensor in tensors)
    for number, (segment, w, g, m, v, (cut, place)) in enumerate(zip(layout.segments, *views, places, strict=True)):
        block = None if layout.is_one_layer else Block(param, layout, number)
        yield segment, Piece(segment.layer, w, g, m, v, step, cut, place, block)


def _params(optimizer: Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def device_of(params: Sequence[Tensor]) -> torch.device:
    """Return the device of the first parameter; the CPU if ZeroRedundancyOptimizer leaves this process without any."""
    return params[0].device if params else torch.device("cpu")


def _refuse_sparse(grad: Tensor, name: str) -> None:
    if grad.is_sparse:
        raise RuntimeError(
            f"Lamb: the gradient of {name} is sparse, which LAMB's norms do not support: "
            "use sparse=False in the embedding"
        )
