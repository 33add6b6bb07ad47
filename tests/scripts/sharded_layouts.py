"""Lamb on hand-made layouts: whatever tensors are spread over four processes, the step is the unsharded one.

Run by tests/test_sharding.py: torchrun --nproc_per_node 4 -m tests.scripts.sharded_layouts OUTPUT.json
Writes, for each function named check_*, null or what went wrong on any process.
"""

import contextlib
import copy
import sys
import traceback
from collections.abc import Iterable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullyShardedDataParallel,
    LocalOptimStateDictConfig,
    OptimStateDictConfig,
    ShardedOptimStateDictConfig,
    ShardingStrategy,
    StateDictType,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from hf_lamb import Lamb, lamb_param_groups
from hf_lamb.sharding.collectives import ShardingError, reduction_of
from hf_lamb.sharding.fsdp1 import clean_name
from hf_lamb.sharding.layout import Layout, Segment
from tests.layouts import attach
from tests.scripts.scaffold import from_all, process_group, write_results

STEPS = 10
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
CLIPPED = {"max_grad_norm": 0.1, "eps": 1e-2}  # a large eps, or Adam would undo any factor


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The same on every process; entries of very different size."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (drawn * (3 * torch.rand(shape, generator=generator, dtype=torch.float64)).exp()).to(dtype)


def layouts() -> list[tuple[str, tuple[int, ...], DeviceMesh | None, list[Placement]]]:
    """(what, shape, mesh or None for a plain tensor, placements)."""
    line, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    rows, columns, whole = Shard(0), Shard(1), Replicate()
    return [
        ("plain", (5, 3), None, []),
        ("plain, one entry", (), None, []),
        ("rows, ragged", (7, 3), line, [rows]),
        ("rows, some empty", (2, 5), line, [rows]),
        ("one row", (1, 9), line, [rows]),
        ("no entries", (0, 3), line, [rows]),
        ("columns, ragged", (3, 6), line, [columns]),
        ("replicated", (4, 4), line, [whole]),
        ("replicated, one entry", (), line, [whole]),
        ("rows twice", (9, 2), square, [rows, rows]),
        ("rows and columns", (5, 7), square, [rows, columns]),
        ("columns and rows", (5, 3), square, [columns, rows]),
        ("columns twice, some empty", (2, 3), square, [columns, columns]),
        ("hybrid", (6, 5), square, [whole, rows]),
        ("hybrid the other way", (3, 5), square, [columns, whole]),
        ("replicated twice", (3, 3), square, [whole, whole]),
        ("experts, (dp, ep)", (4, 3, 5), square, [columns, rows]),
        ("dense, dp only", (5, 4), square["dp"], [rows]),
        ("experts, ep only", (4, 2, 3), square["ep"], [rows]),
    ]


def lay_out(tensor: Tensor, mesh: DeviceMesh | None, placements: list[Placement]) -> Tensor:
    return tensor.clone() if mesh is None else distribute_tensor(tensor, mesh, placements)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def distances(sharded: Iterable[Tensor], unsharded: Iterable[Tensor]) -> list[float]:
    """‖Δ‖/‖w‖ of each tensor."""
    return [
        float((whole(a.detach()) - b.detach()).norm() / b.detach().norm().clamp(min=1e-300))
        for a, b in zip(sharded, unsharded, strict=True)
    ]


def same_everywhere(value: Any) -> bool:
    return all(other == value for other in from_all(value))


def run_all_layouts(dtype: torch.dtype, grad_placements: str = "", poisoned: bool = False, **options: Any) -> Lamb:
    """All layouts in one optimizer, and the unsharded run: equal weights, statistics equal on all processes.

    `poisoned`: at every other step there is a NaN in one layer after another, where it is sharded in one shard.
    """
    cases = layouts()
    start = [draw(*shape, seed=i, dtype=dtype) for i, (_, shape, _, _) in enumerate(cases)]
    sharded = [nn.Parameter(lay_out(w, mesh, p)) for w, (_, _, mesh, p) in zip(start, cases, strict=True)]
    unsharded = [nn.Parameter(w.clone()) for w in start]
    names = [what for what, _, _, _ in cases]
    optimizer = Lamb(zip(names, sharded, strict=True), lr=1e-2, **options)
    reference = Lamb(zip(names, unsharded, strict=True), lr=1e-2, **options)
    for step in range(2 * len(cases) if poisoned else STEPS):
        for i, (param, plain) in enumerate(zip(sharded, unsharded, strict=True)):
            _, shape, mesh, placements = cases[i]
            plain.grad = draw(*shape, seed=1000 * (step + 1) + i, dtype=dtype)
            if poisoned and step == 2 * i:
                plain.grad.view(-1)[-1:] = torch.nan
            param.grad = lay_out(plain.grad, mesh, placements)
            if mesh is not None and grad_placements == "partial":
                # A process's part of the sum: this one's share of the whole.
                param.grad = DTensor.from_local(plain.grad / mesh.size(), mesh, [Partial()] * mesh.ndim)
            elif mesh is not None and grad_placements == "replicated":
                param.grad = distribute_tensor(plain.grad, mesh, [Replicate()] * mesh.ndim)
            elif mesh is not None and grad_placements == "none where empty" and not param.to_local().numel():
                param.grad = None
        optimizer.step()
        reference.step()
        stats, expected = optimizer.layer_stats(), reference.layer_stats()
        for name in stats:
            for mine, theirs in zip(stats[name], expected[name], strict=True):
                assert abs(mine - theirs) <= 4 * TOLERANCE[dtype] * abs(theirs), (name, stats[name], expected[name])
        assert grad_placements == "none where empty" or same_everywhere(stats)
    far = dict(zip(names, distances(sharded, unsharded), strict=True))
    assert max(far.values()) <= TOLERANCE[dtype], far
    held = [param.to_local().numel() for param in sharded if isinstance(param, DTensor)]
    assert sum(held) < sum(param.numel() for param in sharded if isinstance(param, DTensor))
    assert optimizer.skipped_steps() == reference.skipped_steps()
    return optimizer


def check_eager() -> None:
    run_all_layouts(torch.float64, foreach=False)


def check_foreach() -> None:
    run_all_layouts(torch.float64, foreach=True)


def check_float32() -> None:
    run_all_layouts(torch.float32, foreach=True)


def check_clipped_by_the_global_norm() -> None:
    run_all_layouts(torch.float64, **CLIPPED)


def check_gradients_that_are_partial_sums() -> None:
    run_all_layouts(torch.float64, grad_placements="partial", **CLIPPED)


def check_gradients_laid_out_otherwise() -> None:
    run_all_layouts(torch.float64, grad_placements="replicated")


def check_no_gradient_where_the_shard_is_empty() -> None:
    """Every process must still name all layers, and send numbers of the same dtype."""
    run_all_layouts(torch.float64, grad_placements="none where empty", **CLIPPED)
    run_all_layouts(torch.float32, grad_placements="none where empty")


def check_layers_without_a_gradient() -> None:
    """Zeros on all processes, in every layout: the weights stay as they are, to the bit, in every step so far.

    A single number on one process is a gradient, of which all processes hear.
    """
    for backend in ({"foreach": False}, {"foreach": True}, {"fused": True}):
        cases = [case for case in layouts() if 0 not in case[1]]
        start = [draw(*shape, seed=i) for i, (_, shape, _, _) in enumerate(cases)]
        sharded = [nn.Parameter(lay_out(w.clone(), mesh, p)) for w, (_, _, mesh, p) in zip(start, cases, strict=True)]
        unsharded = [nn.Parameter(w.clone()) for w in start]
        names = [what for what, _, _, _ in cases]
        optimizer = Lamb(zip(names, sharded, strict=True), lr=1e-2, **backend)
        reference = Lamb(zip(names, unsharded, strict=True), lr=1e-2, **backend)
        for step in range(4):
            for i, (param, plain) in enumerate(zip(sharded, unsharded, strict=True)):
                _, shape, mesh, placements = cases[i]
                plain.grad = torch.zeros(shape, dtype=torch.float64)
                if step >= 2 and i % 2 == 0:
                    plain.grad.view(-1)[-1] = 1e-200  # whose square is zero in float64 too
                param.grad = lay_out(plain.grad, mesh, placements)
            optimizer.step()
            reference.step()
            moved = set(names[::2]) if step >= 2 else set()
            assert set(optimizer.layer_stats()) == set(reference.layer_stats()) == moved
        for i, distance in enumerate(distances(sharded, start)):
            assert (distance > 1e-3) == (i % 2 == 0), names[i]
        assert max(distances(sharded, unsharded)) <= 1e-12
        assert {float(state["step"]) for state in optimizer.state.values()} == {4.0}


class Half(nn.Module):
    """Of its two layers, one takes no part."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.used(x))


class Unused(nn.Module):
    """Nor does one unit."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.pooler = Half(), Half(), Half()
        self.double()
        for i, param in enumerate(self.parameters()):
            param.data = draw(*param.shape, seed=i) / 3

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


def check_fsdp1_layers_that_nothing_uses() -> None:
    """FSDP1 hands zeros for them. As unsharded they keep their weights, to the bit, and are in no statistics."""
    for flat in (False, True):
        model, unsharded = Unused(), Unused()
        start = {name: param.detach().clone() for name, param in model.named_parameters()}
        fsdp1 = partial(FullyShardedDataParallel, use_orig_params=not flat, device_id=torch.device("cpu"))
        wrapped = fsdp1(model, auto_wrap_policy=ModuleWrapPolicy({Half}))
        optimizer = Lamb(lamb_param_groups(wrapped), lr=0.05)
        optimizer.attach(wrapped)
        reference = Lamb(lamb_param_groups(unsharded), lr=0.05)
        for step in range(STEPS):
            x = draw(6, 5, seed=100 + step) / 10
            for net in (wrapped, unsharded):
                net.zero_grad()
                net(x).square().mean().backward()
            optimizer.step()
            reference.step()
            stats = optimizer.layer_stats()
            used = {f"{unit}.used.{kind}" for unit in ("first", "second") for kind in ("weight", "bias")}
            assert set(stats) == set(reference.layer_stats()) == used
            assert same_everywhere(stats)
        with FullyShardedDataParallel.summon_full_params(wrapped, writeback=False):
            end = {clean_name(name): param.detach().clone() for name, param in wrapped.named_parameters()}
        for name, param in unsharded.named_parameters():
            if "unused" in name or "pooler" in name:
                assert torch.equal(end[name], start[name]), name
            else:
                torch.testing.assert_close(end[name], param.detach(), rtol=1e-10, atol=0)


def check_a_nan_in_any_shard_skips_the_step_everywhere() -> None:
    optimizer = run_all_layouts(torch.float64, poisoned=True)
    assert optimizer.skipped_steps() == (sum(0 not in shape for _, shape, _, _ in layouts()), 0)


def check_a_gradient_that_only_one_process_has() -> None:
    """The others add nothing to the norms, and nothing hangs: also for float64, where they have no tensor to ask."""
    mesh = init_device_mesh("cpu", (4,))
    start = draw(8, 3, seed=0)
    param, other = (nn.Parameter(distribute_tensor(start, mesh, [Shard(0)])) for _ in range(2))
    optimizer = Lamb([param, other], lr=1e-2, **CLIPPED)
    gradient = draw(8, 3, seed=1)
    if dist.get_rank() == 2:
        param.grad = distribute_tensor(gradient, mesh, [Shard(0)], src_data_rank=None)
    optimizer.step()
    piece = nn.Parameter(start[4:6].clone())
    piece.grad = gradient[4:6].clone()
    reference = Lamb([piece], lr=1e-2, **CLIPPED)
    reference.step()
    after = torch.cat([start[:4], piece.detach(), start[6:]])
    assert torch.equal(other.full_tensor(), start)
    torch.testing.assert_close(param.full_tensor(), after, rtol=1e-14, atol=0)


def check_one_name_in_two_groups() -> None:
    """`module.named_parameters()` of two modules: each layer keeps its own norms."""
    mesh = init_device_mesh("cpu", (4,))
    start = [draw(6, 3, seed=0), draw(9, 2, seed=1) * 50]
    sharded = [nn.Parameter(distribute_tensor(w, mesh, [Shard(0)])) for w in start]
    unsharded = [nn.Parameter(w.clone()) for w in start]
    optimizer = Lamb([{"params": [("weight", param)]} for param in sharded], lr=1e-2)
    reference = Lamb(unsharded, lr=1e-2)
    for i, (param, plain) in enumerate(zip(sharded, unsharded, strict=True)):
        plain.grad = draw(*plain.shape, seed=i + 2)
        param.grad = distribute_tensor(plain.grad, mesh, [Shard(0)])
    optimizer.step()
    reference.step()
    assert max(distances(sharded, unsharded)) <= 1e-14


FUSED = {"rows": (9, 5), "vector": (6,), "experts": (2, 4, 3), "row": (1, 8), "columns": (6, 8)}
LAYERS = {"rows": (15, 10, 20), "vector": (2, 2, 2), "experts": (6, 6, 6, 6), "columns": (16, 32)}


def check_fused_layers_wherever_fsdp2_cuts_them() -> None:
    """In a row and between rows, where some processes have nothing, and along the columns."""
    model, plain = nn.Module(), nn.Module()
    for i, (name, shape) in enumerate(FUSED.items()):
        for module in (model, plain):
            module.register_parameter(name, nn.Parameter(draw(*shape, seed=i)))
    fully_shard(model, shard_placement_fn=lambda param: Shard(1) if param.shape == FUSED["columns"] else None)
    for options in ({}, {"fixed_norm": True}, CLIPPED):
        groups = [
            {"params": [*module.named_parameters()], "split": tuple(LAYERS.items())} for module in (model, plain)
        ]
        optimizer, reference = (Lamb([group], lr=1e-2, **options) for group in groups)
        for step in range(STEPS):
            for i, name in enumerate(FUSED):
                whole_grad = draw(*FUSED[name], seed=1000 * step + i)
                plain.get_parameter(name).grad = whole_grad
                param = model.get_parameter(name)
                param.grad = distribute_tensor(whole_grad, param.device_mesh, param.placements)
            optimizer.step()
            reference.step()
            stats, expected = optimizer.layer_stats(), reference.layer_stats()
            assert stats.keys() == expected.keys()
            assert same_everywhere(stats)
            assert all(stats[name] == pytest.approx(expected[name], rel=1e-12) for name in stats), (stats, expected)
        far = distances(model.parameters(), plain.parameters())
        assert max(far) <= TOLERANCE[torch.float64], far
    assert dist.get_rank() == 0 or any(param.to_local().numel() == 0 for param in model.parameters())


def check_fused_layers_are_refused_by_name_under_tensor_parallelism() -> None:
    """Also beside FSDP2, and where FSDP2 cuts layers along their columns; replicated ones are whole."""
    line, square = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    wanted = r"use lamb_param_groups\(model, split=False\), or FSDP2 alone: qkv.weight holds 3 layers.*tensor parallel"

    def one_step(model: nn.Module) -> None:
        optimizer = Lamb(lamb_param_groups(model, split={"qkv": 3}))
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()

    def made() -> nn.Module:
        model = nn.Module()
        model.qkv = nn.Linear(8, 12, bias=False)
        return model

    with pytest.raises(ShardingError, match=wanted):
        one_step(parallelize_module(made(), line, {"qkv": ColwiseParallel()}))
    both = fully_shard(parallelize_module(made(), square["tp"], {"qkv": ColwiseParallel()}), mesh=square["dp"])
    with pytest.raises(ShardingError, match=wanted):
        one_step(both)
    experts = nn.Module()
    experts.qkv = nn.Parameter(torch.ones(3, 8, 4))
    fully_shard(experts, shard_placement_fn=lambda param: Shard(1))
    optimizer = Lamb(lamb_param_groups(experts, split={"qkv": 6}))
    experts.qkv.grad = torch.ones_like(experts.qkv)
    with pytest.raises(ShardingError, match=r"shard qkv along dimension 0 .*holds 6 layers, which placements .* cut"):
        optimizer.step()
    alike = made()
    alike.qkv.weight = nn.Parameter(distribute_tensor(torch.ones(12, 8), line, [Replicate()]))
    one_step(alike)


def check_partial_parameters_are_refused_by_name() -> None:
    mesh = init_device_mesh("cpu", (4,))
    param = nn.Parameter(DTensor.from_local(torch.ones(3), mesh, [Partial()]))
    optimizer = Lamb([("head.weight", param)])
    param.grad = DTensor.from_local(torch.ones(3), mesh, [Partial()])
    with pytest.raises(ShardingError, match=r"head\.weight.*Partial"):
        optimizer.step()


def check_stages_of_a_pipeline() -> None:
    """Attached to the group of all stages: one norm to clip by, and a NaN in one stage skips the step in all."""
    rank = dist.get_rank()
    start = [[draw(3 + stage, 4, seed=10 * stage + i) for i in range(stage + 1)] for stage in range(4)]
    own = [nn.Parameter(w.clone()) for w in start[rank]]
    everything = [[nn.Parameter(w.clone()) for w in stage] for stage in start]
    optimizer, reference = (Lamb(params, lr=1e-2, **CLIPPED) for params in (own, chain(*everything)))
    optimizer.attach(process_group=dist.group.WORLD)
    for step in range(STEPS):
        for stage in range(4):
            for i, plain in enumerate(everything[stage]):
                plain.grad = draw(*plain.shape, seed=1000 * step + 10 * stage + i)
        if step == 3:
            everything[2][0].grad[1, 1] = torch.inf
        if step == 5:  # one stage has no gradients at all
            for plain in everything[1]:
                plain.grad = None
        for param, plain in zip(own, everything[rank], strict=True):
            param.grad = None if plain.grad is None else plain.grad.clone()
        optimizer.step()
        reference.step()
    assert max(distances(own, everything[rank])) <= 1e-14
    assert optimizer.skipped_steps() == reference.skipped_steps() == (1, 0)


def check_sharded_stages_of_a_pipeline() -> None:
    """Two stages, each sharded over two processes; attached to the group along the pipeline."""
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    stage = square.get_local_rank("pp")
    start = [draw(5, 3, seed=0), draw(7, 2, seed=1)]
    own = nn.Parameter(distribute_tensor(start[stage], square["dp"], [Shard(0)], src_data_rank=None))
    everything = [nn.Parameter(w.clone()) for w in start]
    optimizer, reference = Lamb([own], lr=1e-2, **CLIPPED), Lamb(everything, lr=1e-2, **CLIPPED)
    optimizer.attach(process_group=square.get_group("pp"))
    for step in range(STEPS):
        for i, plain in enumerate(everything):
            plain.grad = draw(*plain.shape, seed=10 * step + i)
        if step == 3:
            everything[1].grad[-1, 0] = torch.nan  # on the last process only
        own.grad = distribute_tensor(everything[stage].grad, square["dp"], [Shard(0)], src_data_rank=None)
        optimizer.step()
        reference.step()
    assert max(distances([own], [everything[stage]])) <= 1e-14
    assert optimizer.skipped_steps() == reference.skipped_steps() == (1, 0)


def check_steps_without_any_gradient() -> None:
    """On all processes: nothing happens, and nobody waits for another."""
    mesh = init_device_mesh("cpu", (4,))
    sharded = nn.Parameter(distribute_tensor(draw(5, 3, seed=0), mesh, [Shard(0)]))
    plain = nn.Parameter(draw(5, 3, seed=0))
    attached = Lamb([plain])
    attached.attach(process_group=dist.group.WORLD)
    for optimizer in (Lamb([sharded]), Lamb([sharded], **CLIPPED), attached, ZeroRedundancyOptimizer([plain], Lamb)):
        optimizer.step()
    assert torch.equal(sharded.full_tensor(), plain)
    assert torch.equal(plain, draw(5, 3, seed=0))


def check_flat_partitions() -> None:
    """Layers in one flat tensor with padding between and behind them, cut into four: as FSDP1 and ZeRO have it.

    Layers of which one process has all, or four have parts; two of two groups' options; a NaN in one part; garbage in
    the padding. Every process reports every layer.
    """
    for backend in ({"foreach": False}, {"foreach": True}, {"fused": True}):
        run_flat_partitions(**backend)


def run_flat_partitions(**options: Any) -> None:
    rank, reductions = dist.get_rank(), (reduction_of(dist.group.WORLD, torch.device("cpu")),)
    start = {
        "large": draw(11, 5, seed=0),
        "bias": draw(7, seed=1),
        "small": draw(2, 2, seed=2),
        "odd": draw(13, seed=3),
    }
    layers = {name: nn.Parameter(w.clone()) for name, w in start.items()}
    padded = 4 * 25  # 3 before each layer, the rest behind
    places, end = {}, 0
    for name, w in start.items():
        places[name] = (end + 3, end + 3 + w.numel())
        end = places[name][1]

    def part(tensors: dict[str, Tensor]) -> Tensor:
        flat = torch.full((padded,), torch.nan, dtype=torch.float64)
        for name, (first, last) in places.items():
            flat[first:last] = tensors[name].detach().flatten()
        return flat.chunk(4)[rank].clone()

    flat = nn.Parameter(part(start))
    cut = {name: [min(max(i - 25 * rank, 0), 25) for i in place] for name, place in places.items()}
    parts = tuple(Segment(name, *cut[name], start[name].numel()) for name in start)
    exceptions = {"undecayed": ["bias"], "unadapted": ["bias"]}
    optimizer = Lamb([{"params": [nn.Parameter(torch.ones(1))], **exceptions}], lr=1e-2, **CLIPPED, **options)
    optimizer.param_groups[0]["params"] = [flat]  # as DeepSpeed does
    attach(optimizer, {flat: Layout(parts, 25, reductions)})
    named = list(layers.items())
    plain = [named[0], *named[2:]]
    groups = [{"params": plain}, {"params": named[1:2], "weight_decay": 0.0, "layer_adaptation": False}]
    reference = Lamb(groups, lr=1e-2, **CLIPPED, **options)
    for step in range(STEPS):
        for i, layer in enumerate(layers.values()):
            layer.grad = draw(*layer.shape, seed=10 * step + i)
        if step == 3:
            layers["odd"].grad[-1] = torch.inf
        flat.grad = part({name: layer.grad for name, layer in layers.items()})
        optimizer.step()
        reference.step()
        stats, expected = optimizer.layer_stats(), reference.layer_stats()
        assert stats.keys() == expected.keys()
        assert all(stats[name] == pytest.approx(expected[name], rel=1e-12) for name in expected)
        assert same_everywhere(stats)
    want = part(layers)
    assert torch.equal(flat.isnan(), want.isnan())
    torch.testing.assert_close(flat.detach().nan_to_num(), want.detach().nan_to_num(), rtol=1e-13, atol=0)
    assert optimizer.skipped_steps() == reference.skipped_steps() == (1, 0)
    assert int(optimizer.state[flat]["step"]) == STEPS - 1

    wrong = (*parts[:-1], parts[-1]._replace(size=14))
    with pytest.raises(ShardingError, match="all processes together hold 13 elements of odd, which has 14"):
        attach(optimizer, {flat: Layout(wrong, 25, reductions)})


class Mixture(nn.Module):
    """Parts in a row, to be wrapped in every way."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("plain", "nested", "flat", "whole", "partly"):
            setattr(self, name, nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 5)))
        self.double()
        for i, param in enumerate(self.parameters()):
            param.data = draw(*param.shape, seed=i) / 3

    def forward(self, x: Tensor) -> Tensor:
        for part in self.children():
            x = x + part(x)
        return x


def wrap_mixture(model: Mixture, flat: bool) -> None:
    """A unit in a unit, one with a process group of its own, NO_SHARD, one with an ignored module; one left plain."""
    fsdp1 = partial(FullyShardedDataParallel, use_orig_params=not flat, device_id=torch.device("cpu"))
    model.nested = fsdp1(nn.Sequential(fsdp1(model.nested[0]), *model.nested[1:]))
    # All processes take the same batch, so that the mean of two gradients is that of four.
    model.flat = fsdp1(model.flat, process_group=init_device_mesh("cpu", (2, 2)).get_group(1))
    model.whole = fsdp1(model.whole, sharding_strategy=ShardingStrategy.NO_SHARD)
    model.partly = fsdp1(model.partly, ignored_modules=[model.partly[1]])


def check_fsdp1_units_of_all_kinds() -> None:
    """The groups of `lamb_param_groups`, before and after wrapping."""
    run_fsdp1_units(flat=False, built_first=True)
    run_fsdp1_units(flat=False, built_first=False)
    run_fsdp1_units(flat=True, built_first=False)


def run_fsdp1_units(flat: bool, built_first: bool) -> None:
    model, unsharded = Mixture(), Mixture()
    early = Lamb(lamb_param_groups(model), lr=1e-2, **CLIPPED)
    wrap_mixture(model, flat)
    optimizer = early if built_first else Lamb(lamb_param_groups(model), lr=1e-2, **CLIPPED)
    optimizer.attach(model)
    reference = Lamb(lamb_param_groups(unsharded), lr=1e-2, **CLIPPED)
    for step in range(STEPS):
        x = draw(6, 5, seed=100 + step) / 10
        for net in (model, unsharded):
            net.zero_grad()
            net(x).square().mean().backward()
        optimizer.step()
        reference.step()
        stats, expected = optimizer.layer_stats(), reference.layer_stats()
        assert stats.keys() == expected.keys()
        assert all(stats[name] == pytest.approx(expected[name], rel=1e-10) for name in expected)
        assert same_everywhere(stats)
    weights: dict[str, Tensor] = {}
    with contextlib.ExitStack() as stack:
        for part in (model.nested, model.flat, model.whole, model.partly):
            stack.enter_context(FullyShardedDataParallel.summon_full_params(part, writeback=False))
        weights = {clean_name(name): param.detach().clone() for name, param in model.named_parameters()}
    plain = dict(unsharded.named_parameters())
    assert max(distances([weights[name] for name in plain], plain.values())) <= TOLERANCE[torch.float64]


def check_fsdp1_refusals() -> None:
    """Each before anything is wrong, and with the way out."""
    fsdp1 = partial(FullyShardedDataParallel, device_id=torch.device("cpu"))
    model: nn.Module = nn.Linear(9, 7)
    early = Lamb(model.parameters())
    with pytest.raises(ShardingError, match=r"build Lamb\(lamb_param_groups\(model\)\) on the wrapped"):
        early.attach(fsdp1(model, use_orig_params=False))

    model = fsdp1(nn.Linear(9, 7), use_orig_params=True)
    flat = model._handle.flat_param
    optimizer = Lamb(model.parameters())
    model(torch.ones(2, 9)).sum().backward()
    with pytest.raises(
        ShardingError, match=r"is an FSDP1 shard.*call optimizer\.attach\(model\) on the wrapped model"
    ):
        optimizer.step()
    with (
        mock.patch.object(flat, "_param_extensions", [object(), None]),
        pytest.raises(ShardingError, match=r"use FSDP2 with tensor parallelism.*weight, which tensor parallelism"),
    ):
        optimizer.attach(model)
    infos = flat._shard_param_infos
    del flat._shard_param_infos
    with pytest.raises(ShardingError, match=r"use FSDP2.*FSDP1 of this version of torch \(no _shard_param_infos\)"):
        optimizer.attach(model)
    fewer = [info._replace(numel_in_shard=1) if info.in_shard else info for info in infos]
    flat._shard_param_infos = fewer
    with pytest.raises(ShardingError, match=r"all processes together hold \d elements of weight, which has 63"):
        optimizer.attach(model)
    flat._shard_param_infos = infos
    optimizer.attach(model)
    optimizer.step()
    with (
        FullyShardedDataParallel.summon_full_params(model),
        pytest.raises(ShardingError, match=r"in attach: call step outside of summon_full_params"),
    ):
        optimizer.step()


def check_fsdp1_state_dicts() -> None:
    """Full, sharded and local ones of torch's own, in memory: the run goes on bit for bit."""
    for flat in (True, False):
        for kind, config in {
            StateDictType.FULL_STATE_DICT: FullOptimStateDictConfig,
            StateDictType.SHARDED_STATE_DICT: ShardedOptimStateDictConfig,
            StateDictType.LOCAL_STATE_DICT: LocalOptimStateDictConfig,
        }.items():
            if kind == StateDictType.LOCAL_STATE_DICT and not flat:
                continue  # torch cannot load the model's then
            # "Offloaded" from a CPU, both moments would be one tensor (torch 2.13, AdamW's too).
            run_fsdp1_state_dicts(flat, kind, config(offload_to_cpu=False))


def run_fsdp1_state_dicts(flat: bool, kind: StateDictType, config: OptimStateDictConfig) -> None:
    def build(seed: int) -> tuple[FullyShardedDataParallel, Lamb]:
        net = nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 5)).double()
        for i, param in enumerate(net.parameters()):
            param.data = draw(*param.shape, seed=seed + i) / 3
        model = FullyShardedDataParallel(net, use_orig_params=not flat, device_id=torch.device("cpu"))
        optimizer = Lamb(lamb_param_groups(model), lr=1e-2)
        optimizer.attach(model)
        return model, optimizer

    def steps(model: nn.Module, optimizer: Lamb, first: int, last: int) -> None:
        for step in range(first, last):
            optimizer.zero_grad()
            model(draw(6, 5, seed=100 + step) / 10).square().mean().backward()
            optimizer.step()

    model, optimizer = build(0)
    steps(model, optimizer, 0, 3)
    with FullyShardedDataParallel.state_dict_type(model, kind, None, config):
        weights = copy.deepcopy(model.state_dict())
        state = copy.deepcopy(FullyShardedDataParallel.optim_state_dict(model, optimizer))
    steps(model, optimizer, 3, 6)

    again, other = build(50)
    with FullyShardedDataParallel.state_dict_type(again, kind, None, config):
        again.load_state_dict(weights)
        other.load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(again, other, state))
    steps(again, other, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)), (flat, kind)


def check_zero_redundancy_skips_and_clips_together() -> None:
    """Each process's optimizer has some of the parameters, and only one of them meets the NaN."""
    for layers in (6, 2):  # two leave two processes without any
        run_zero_redundancy(layers)


def run_zero_redundancy(layers: int) -> None:
    start = [draw(4, 3, seed=i) for i in range(layers)]
    shared, unsharded = ([nn.Parameter(w.clone()) for w in start] for _ in range(2))
    optimizer = ZeroRedundancyOptimizer(shared, Lamb, lr=1e-2, **CLIPPED)
    reference = Lamb(unsharded, lr=1e-2, **CLIPPED)
    assert len(optimizer.optim.param_groups[0]["params"]) < len(shared)
    for step in range(STEPS):
        for i, (param, plain) in enumerate(zip(shared, unsharded, strict=True)):
            plain.grad = draw(*plain.shape, seed=10 * step + i)
            if step == 3 and i == layers - 1:
                plain.grad[0, 0] = torch.nan
            param.grad = plain.grad.clone()
        optimizer.step()
        reference.step()
    assert max(distances(shared, unsharded)) <= 1e-14
    assert optimizer.optim.skipped_steps() == (1, 0)


def main(output: Path) -> None:
    results = {}
    for name, check in [(name, value) for name, value in globals().items() if name.startswith("check_")]:
        torch.manual_seed(0)
        problem = None
        try:
            check()
        except Exception:  # told to the test, which names the check
            problem = traceback.format_exc()
        results[name] = "\n".join(f"process {i}: {p}" for i, p in enumerate(from_all(problem)) if p) or None
    write_results(output, results)


if __name__ == "__main__":
    with process_group():
        main(Path(sys.argv[1]))
