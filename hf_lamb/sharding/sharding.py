"""Where the layers of an optimizer's parameters lie, and how what is summed over a layer adds up over processes."""

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
from hf_lamb.sharding.layout import Layout, check_layouts
from hf_lamb.sharding.peers import zero_redundancy_group
from hf_lamb.sharding.plain import local_grad, local_shard
from hf_lamb.sharding.runtime import Runtime

# The runtimes that hide where layers lie; the first that wraps the model is asked.
RUNTIMES: tuple[type[Runtime], ...] = (DeepSpeed, FSDP1)


class Piece(NamedTuple):
    """The part of one layer that lies on this process, as tensors of one shape, and the layer's step count."""

    name: str  # of the layer
    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    cut: int | None  # which of `Sharding.cuts` the layer belongs to; None for a layer that is whole here
    place: int  # the layer's place there
    decays: bool = True  # False: it does not, whatever its group says
    adapts: bool = True


@dataclass
class Cut:
    """The layers that are cut over the same process groups, in the same order on every process."""

    reductions: Reductions
    layers: int = 0
    dtype: torch.dtype = torch.float32  # in which processes speak of them: float64 if one of them is

    def add(self, dtype: torch.dtype) -> int:
        """Count one more layer, whose arithmetic has this dtype; its place."""
        if dtype == torch.float64:
            self.dtype = dtype
        self.layers += 1
        return self.layers - 1


class Places(NamedTuple):
    """The places of some layers, as a list and as a tensor."""

    numbers: list[int]
    tensor: Tensor


class CutBucket(Protocol):
    """What a bucket tells of how its layers are cut."""

    cut: int | None
    places: list[int]


class Sharding:
    """What the optimizer asks: which pieces of which layers are here, and what sums are over all processes."""

    def __init__(self, shapes: Iterable[torch.Size] = ()) -> None:
        self.shapes = set(shapes)  # of the parameters that the optimizer was built with
        self.runtime: Runtime | None = None
        self.layouts: dict[Tensor, Layout] = {}
        self.peer_group: Reduction | None = zero_redundancy_group()
        self.cuts: list[Cut] = []
        self._indices: dict[int, Places] = {}  # of the n-th bucket that is cut

    # -- what it is told ---------------------------------------------------------------------------------------------

    def attach(self, optimizer: Optimizer, model: Any, process_group: ProcessGroup | None) -> list[Tensor]:
        """As `Lamb.attach`, and returns the parameters whose state must exist from now on."""
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
        # An engine that replaces another one has other tensors.
        self.layouts = {param: self.layouts[param] for param in params if param in self.layouts} | runtime.layouts
        return [p for p in params if p in runtime.layouts and p.requires_grad] if runtime.state_from_the_start else []

    def shapes_of_a_copy(self) -> set[torch.Size]:
        """The shapes that a copy of the optimizer was built with: its flat tensors are others, to be attached anew."""
        return self.shapes - {tensor.shape for tensor in self.layouts}

    def begin_step(self, optimizer: Optimizer) -> bool | None:
        """Whether this call of `step` begins an optimizer step; None where it is no step at all.

        DeepSpeed steps a few tensors a call, and tries a step with zero gradients while it starts.
        """
        engine = deepspeed.calling_engine()
        if engine is not None:
            if deepspeed.is_trial_step(engine):
                return None
            if not isinstance(self.runtime, DeepSpeed) or engine is not self.runtime.engine:
                self.attach(optimizer, engine, None)
        return self.runtime is None or self.runtime.starts_step(_params(optimizer))

    # -- which pieces are here ---------------------------------------------------------------------------------------

    def pieces(
        self,
        param_groups: list[dict[str, Any]],
        name_of: Callable[[int, int], str],
        state_of: Callable[[Tensor], dict[str, Tensor]],
    ) -> Iterator[tuple[int, Piece]]:
        """The pieces that have a gradient, each with the index of its group.

        `cuts` counts all layers that are cut, with a gradient here or not, so that all processes speak of the same.

        Raises:
            ShardingError: a parameter that this optimizer was not built with, or whose layer nobody can put together.
            RuntimeError: a sparse gradient.
        """
        self.cuts = []
        for group_index, group in enumerate(param_groups):
            undecayed, unadapted = set(group.get("undecayed", ())), set(group.get("unadapted", ()))
            for index, param in enumerate(group["params"]):
                layout = self.layouts.get(param) if self.layouts else None
                name = name_of(group_index, index)
                if layout is None:
                    piece = self._whole_or_dtensor(param, name, state_of)
                    if piece is not None:
                        yield group_index, piece
                    continue
                for piece in self._segments(param, name, layout, state_of):
                    decays, adapts = piece.name not in undecayed, piece.name not in unadapted
                    yield group_index, piece._replace(decays=decays, adapts=adapts)

    def _whole_or_dtensor(
        self, param: Tensor, name: str, state_of: Callable[[Tensor], dict[str, Tensor]]
    ) -> Piece | None:
        if param.shape not in self.shapes:
            raise ShardingError(
                f"Lamb: parameter {name} has shape {tuple(param.shape)}, which this optimizer was not built with: "
                "under DeepSpeed ZeRO call optimizer.attach(engine) after deepspeed.initialize; for a resized layer "
                "build a new optimizer"
            )
        local, reductions = local_shard(param, name)
        cut, place = self._place(reductions, math_dtype(local))
        if param.grad is None:
            return None
        _refuse_sparse(param.grad, name)
        state = state_of(param)
        grad = local_grad(param, param.grad)
        exp_avg, exp_avg_sq = (local_shard(state[moment], name)[0] for moment in ("exp_avg", "exp_avg_sq"))
        if not local.shape == grad.shape == exp_avg.shape == exp_avg_sq.shape:
            raise ShardingError(
                f"Lamb: parameter {name} has shape {tuple(local.shape)} here, its gradient {tuple(grad.shape)} "
                f"and its moments {tuple(exp_avg.shape)}: for a resized layer build a new optimizer"
            )
        return Piece(name, local, grad, exp_avg, exp_avg_sq, state["step"], cut, place)

    def _segments(
        self, param: Tensor, name: str, layout: Layout, state_of: Callable[[Tensor], dict[str, Tensor]]
    ) -> Iterator[Piece]:
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
            # Other processes have the layer, and FSDP1 hands no gradient of it here. Take part in its sums all the
            # same: layer_stats is then alike on all processes.
            grad = param.detach()
            step = torch.zeros((), dtype=torch.float32, device=param.device)
            state = {"step": step, "exp_avg": grad.to(math_dtype(param)), "exp_avg_sq": grad.to(math_dtype(param))}
        else:
            return
        # One step counts for all of the tensor: the first segment advances it, the others copies.
        steps = [state["step"], *state["step"].repeat(len(layout.segments) - 1).unbind()]
        pieces = (layout.pieces(tensor) for tensor in (param, grad, state["exp_avg"], state["exp_avg_sq"]))
        for segment, w, g, m, v, step, (cut, place) in zip(layout.segments, *pieces, steps, places, strict=True):
            yield Piece(segment.name, w, g, m, v, step, cut, place)

    def _place(self, reductions: Reductions, dtype: torch.dtype) -> tuple[int | None, int]:
        """The cut of a layer, and its place there."""
        if not reductions:
            return None, 0
        index = next((i for i, cut in enumerate(self.cuts) if cut.reductions == reductions), len(self.cuts))
        if index == len(self.cuts):
            self.cuts.append(Cut(reductions))
        return index, self.cuts[index].add(dtype)

    # -- sums over processes -----------------------------------------------------------------------------------------

    def add_up(self, buckets: Sequence[CutBucket], sums: list[Tensor]) -> list[Tensor]:
        """The sums `[k, n]` of whole layers, from those of the pieces in each bucket: one all-reduce a process group.

        A layer without a gradient on this process adds nothing to it.
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
        """The places of a bucket's layers as a tensor, made when they change: a copy to a GPU costs a launch."""
        known = self._indices.get(number)
        if known is None or known.numbers != places or known.tensor.device != device:
            known = self._indices[number] = Places(places, torch.tensor(places, device=device))
        return known.tensor

    def gradient_norm_sq(
        self, buckets: Sequence[CutBucket], squares: Callable[[int], Tensor], device: torch.device
    ) -> Tensor:
        """Squared norm of all gradients of all processes, 0-dim, on `device`.

        Args:
            buckets: the pieces that are here.
            squares: of the n-th bucket, the squared norms of its gradients or of their parts. Not called where the
                runtime has the norm.
            device: where the result is wanted.
        """
        known = self.runtime.gradient_norm_sq(device) if self.runtime is not None else None
        if known is not None:
            return known
        parts = {cut.reductions: torch.zeros(1, dtype=cut.dtype, device=device) for cut in self.cuts}
        of_whole = [torch.zeros(1, device=device)] if not buckets or self.cuts else []
        for number, bucket in enumerate(buckets):
            squared = squares(number).to(device)
            if bucket.cut is None:
                of_whole.append(squared)
            else:
                reductions = self._reductions(bucket)
                parts[reductions] = parts[reductions] + squared.sum().reshape(1)  # 0-dim, it would not promote
        norm_sq = torch.cat([*of_whole, *sum_over_processes(parts).values()]).sum()
        if self.peer_group is not None:
            # In one dtype whatever this process has: others have other parameters.
            norm_sq = sum_over_processes({(self.peer_group,): norm_sq.double()})[(self.peer_group,)]
        return norm_sq

    @property
    def takes_part(self) -> bool:
        """Whether other processes wait for this one, even where it has no gradient."""
        return bool(self.cuts) or self.peer_group is not None


def _params(optimizer: Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def device_of(params: Sequence[Tensor]) -> torch.device:
    """Of the first parameter; ZeroRedundancyOptimizer may leave a process without any."""
    return params[0].device if params else torch.device("cpu")


def _refuse_sparse(grad: Tensor, name: str) -> None:
    if grad.is_sparse:
        raise RuntimeError(
            f"Lamb: the gradient of {name} is sparse, which LAMB's norms do not support: "
            "use sparse=False in the embedding"
        )
