"""Trains a small BERT sharded, and again unsharded in the same process, and measures how far the two are apart.

Or a small ModernBERT, whose layers lie in fused parameters, beside its unsharded twin in which none is fused.

Run by tests/test_sharding.py and tests/scripts/sharding_report.py:
torchrun --nproc_per_node N -m tests.scripts.sharded_lamb CASES.json OUTPUT.json
"""

import importlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    ShardingStrategy,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForMaskedLM
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.modernbert.modeling_modernbert import ModernBertEncoderLayer

from hf_lamb import Lamb, lamb_param_groups
from hf_lamb.sharding import sharding
from hf_lamb.sharding.collectives import Reduction, Reductions
from hf_lamb.sharding.fsdp1 import clean_name
from tests import twins
from tests.scripts.scaffold import NOT_MOVED, Case, Layers, distances, from_all, measure_cases, process_group

VOCAB, WIDTH, INTERMEDIATE, LENGTH, ROWS, STEPS = 503, 36, 130, 24, 8, 10
COLLECTIVES = ("all", "reduce", "broadcast", "gather", "scatter")
POISONED = "bert.encoder.layer.0.intermediate.dense.weight"


# -- model and data --------------------------------------------------------------------------------------------------


def build_model(dtype: torch.dtype) -> BertForMaskedLM:
    """A BERT of ragged sizes with tied weights: no number of processes divides its vocabulary, and four leave some
    without a part of the token types.

    Rows and columns are of very different size: after a random initialisation the norm of a part is nearly that of
    the whole, and hides what is wrong. Key biases are frozen: softmax is invariant to them, so their gradient is
    rounding noise, and Adam makes a direction of it.
    """
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=INTERMEDIATE,
        max_position_embeddings=LENGTH + 3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
    )
    model = BertForMaskedLM(config).to(dtype)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param) * 0.02)  # biases start at zero
            for dim, size in enumerate(param.shape):
                factors = torch.empty(size, dtype=dtype).uniform_(-1.5, 1.5).exp_()
                param.mul_(factors.view([-1 if i == dim else 1 for i in range(param.ndim)]))
    for layer in model.bert.encoder.layer:
        layer.attention.self.key.bias.requires_grad_(False)
    return model


def batch(step: int, part: int = 0, parts: int = 1) -> dict[str, Tensor]:
    """A part of the global batch of a step. All rows have as many labels, so that means of means are the mean."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.rand(ROWS, LENGTH, generator=generator).pow(3).mul(VOCAB).long()
    masked = torch.rand(ROWS, LENGTH, generator=generator).argsort(dim=1) < 4
    rows = slice(part * ROWS // parts, (part + 1) * ROWS // parts)
    return {"input_ids": ids.masked_fill(masked, 1)[rows], "labels": ids.masked_fill(~masked, -100)[rows]}


# -- the ways to shard it --------------------------------------------------------------------------------------------


def shard(model: nn.Module, mode: str) -> tuple[nn.Module, int, int]:
    """The model sharded in place; which part of the global batch this process takes, and of how many."""
    rank, world = dist.get_rank(), dist.get_world_size()
    line = init_device_mesh("cpu", (world,))
    if mode in ("ddp", "zero_redundancy"):
        return DistributedDataParallel(model), rank, world
    if mode == "fsdp2":
        return _fsdp2(model, mesh=line), rank, world
    if mode == "fsdp2_bf16":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        return _fsdp2(model, mesh=line, mp_policy=policy), rank, world
    if mode == "fsdp2_columns":
        return _fsdp2(model, mesh=line, shard_placement_fn=_columns_where_they_divide), rank, world
    if mode == "hsdp":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
        return _fsdp2(model, mesh=mesh), rank, world
    if mode.startswith("fsdp1"):
        return _fsdp1(model, mode), rank, world
    if mode == "tp":
        return parallelize_module(model, line, _tensor_parallel()), 0, 1
    if mode == "tp_sp":
        return parallelize_module(model, line, _sequence_parallel()), 0, 1
    if mode == "fsdp2_tp":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(model, mesh["tp"], _tensor_parallel())
        return _fsdp2(model, mesh=mesh["dp"]), mesh["dp"].get_local_rank(), 2
    raise ValueError(mode)


def _fsdp2(model: nn.Module, **options: Any) -> nn.Module:
    for layer in [*model.modules()]:
        if isinstance(layer, (BertLayer, ModernBertEncoderLayer)):
            fully_shard(layer, **options)
    return fully_shard(model, **options)


def _fsdp1(model: nn.Module, mode: str) -> nn.Module:
    """Layer by layer in units of their own. Frozen parameters do not fit into a flat tensor with others."""
    flat, frozen = mode == "fsdp1_flat", [param for param in model.parameters() if not param.requires_grad]
    options: dict[str, Any] = {"ignored_states": frozen} if flat else {}
    if mode == "fsdp1_hybrid":
        mesh = (dist.get_world_size() // 2, 2)  # FSDP1 that has but one process to shard over adds up no gradients
        options["device_mesh"] = init_device_mesh("cpu", mesh, mesh_dim_names=("replicate", "shard"))
        options["sharding_strategy"] = ShardingStrategy.HYBRID_SHARD
    if mode == "fsdp1_grad_op":
        options["sharding_strategy"] = ShardingStrategy.SHARD_GRAD_OP
    return FullyShardedDataParallel(
        model,
        auto_wrap_policy=ModuleWrapPolicy({BertLayer, ModernBertEncoderLayer}),
        use_orig_params=not flat,
        device_id=torch.device("cpu"),
        **options,
    )


def _columns_where_they_divide(param: nn.Parameter) -> Shard | None:
    return Shard(1) if param.ndim == 2 and param.shape[1] % dist.get_world_size() == 0 else None


def _tensor_parallel() -> dict[str, Any]:
    """Linear layers of the encoder; embeddings, normalisation and head stay plain tensors beside them."""
    return {
        "bert.encoder.layer.*.attention.self.query": ColwiseParallel(),
        "bert.encoder.layer.*.attention.self.key": ColwiseParallel(),
        "bert.encoder.layer.*.attention.self.value": ColwiseParallel(),
        "bert.encoder.layer.*.attention.output.dense": RowwiseParallel(),
        "bert.encoder.layer.*.intermediate.dense": ColwiseParallel(use_local_output=False),  # ragged on 4
        "bert.encoder.layer.*.output.dense": RowwiseParallel(),
    }


def _sequence_parallel() -> dict[str, Any]:
    """The same, and between the linear layers each process has its part of every sequence: the normalisation's
    parameters are replicated, its gradients partial sums."""
    whole, sequence = Replicate(), Shard(1)
    return _tensor_parallel() | {
        "bert.embeddings": PrepareModuleOutput(output_layouts=whole, desired_output_layouts=sequence),
        "bert.encoder.layer.*.attention.self": PrepareModuleInput(input_layouts=sequence, desired_input_layouts=whole),
        "bert.encoder.layer.*.attention.output.dense": RowwiseParallel(output_layouts=sequence),
        "bert.encoder.layer.*.attention.output.LayerNorm": SequenceParallel(use_local_output=True),
        "bert.encoder.layer.*.intermediate.dense": ColwiseParallel(input_layouts=sequence, use_local_output=False),
        "bert.encoder.layer.*.output.dense": RowwiseParallel(output_layouts=sequence),
        "bert.encoder.layer.*.output.LayerNorm": SequenceParallel(use_local_output=True),
        "cls": PrepareModuleInput(input_layouts=sequence, desired_input_layouts=whole, use_local_output=True),
    }


# -- training --------------------------------------------------------------------------------------------------------


class Beside:
    """An unsharded optimizer that is given the gradients of a sharded run, gathered: whole tensors in, whole out.

    For mixed precision: no unsharded model rounds as FSDP's does, and in a run of its own one weight that rounds the
    other way in bf16 changes trust ratios by 1e-3.
    """

    def __init__(self, named: dict[str, nn.Parameter], cls: type[Optimizer], options: dict[str, Any]) -> None:
        self.named = named
        self.whole = {
            name: nn.Parameter(_whole(param.detach()), requires_grad=param.requires_grad)
            for name, param in named.items()
        }
        self.optimizer = cls(self.whole.values(), **options)

    def step(self) -> None:
        for name, whole in self.whole.items():
            grad = self.named[name].grad
            whole.grad = None if grad is None else _whole(grad)
        self.optimizer.step()


class Collectives(TorchDispatchMode):
    """What goes over the wire while it is active: the operator and the bytes of every collective."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it does with its shards comes by here again
        operator = func._opname.replace("_", "")  # "all_reduce" to DTensor is "allreduce_" to torch.distributed
        if func.namespace in ("c10d", "_c10d_functional") and operator.startswith(COLLECTIVES):
            tensors = args[0] if isinstance(args[0], list) else [args[0]]
            self.seen.append((operator, sum(tensor.nbytes for tensor in tensors)))
        return func(*args, **(kwargs or {}))


@dataclass
class Outcome:
    """What a run leaves: the weights, and per step the layers' (‖w‖, ‖u‖, r), and the gradients' norm if it clips."""

    weights: dict[str, Tensor]
    layers: list[Layers]
    skipped: tuple[int, int] | None = None
    collectives: list[tuple[str, int]] = field(default_factory=list)  # of the last step
    evidence: dict[str, Any] = field(default_factory=dict)
    beside: "Outcome | None" = None
    norms: list[float] = field(default_factory=list)


def train(case: Case, sharded: bool) -> Outcome:
    dtype = getattr(torch, case.dtype)
    model: nn.Module = twins.fused_model(dtype) if case.fused else build_model(dtype)
    if case.fused and not sharded:
        model = twins.unfuse(model)
    named = dict(model.named_parameters())
    part, parts, owner = 0, 1, model
    if sharded:
        model, part, parts = shard(model, case.sharding)
        owner = model.module if isinstance(model, DistributedDataParallel) else model
        named = {clean_name(name): param for name, param in owner.named_parameters()}
    options = {"lr": 1e-2, "weight_decay": 0.01, **case.options}
    cls = importlib.import_module(case.optimizer).Lamb
    if sharded and case.mode == "zero_redundancy":
        optimizer: Optimizer = ZeroRedundancyOptimizer(named.values(), optimizer_class=cls, **options)
    elif case.fused:
        optimizer = cls(lamb_param_groups(owner, adapt_all=True), **options)
    else:
        optimizer = cls(named.values(), **options)
    if isinstance(model, FullyShardedDataParallel) and isinstance(optimizer, Lamb):
        optimizer.attach(model)
    beside = Beside(named, cls, options) if sharded and case.mode == "fsdp2_bf16" else None

    layers, layers_beside, norms = [], [], []
    for step in range(STEPS):
        model(**(twins.batch(step) if case.fused else batch(step, part, parts))).loss.backward()
        if case.clip is not None:  # before the NaN, which then makes one process look again, and the others not
            own = _own(optimizer)
            norm = own.clip_grad_norm(case.clip) if sharded else clip_grad_norm_(named.values(), case.clip)
            norms.append(float(norm))
        if step == case.nan_at:
            if isinstance(model, FullyShardedDataParallel):
                _poison_last(model)
            else:
                _poison(named[POISONED])
        if beside:
            beside.step()
            layers_beside.append(_layers(beside.optimizer, beside.whole))
        with mutated(case.mutation), Collectives() as collectives:
            optimizer.step()
        model.zero_grad()
        layers.append(twins.layers_of(optimizer) if case.fused else _layers(optimizer, named))
    weights = _whole_weights(model, named)
    return Outcome(
        weights=twins.in_layers(weights) if case.fused else weights,
        layers=layers,
        skipped=_skipped(optimizer),
        collectives=collectives.seen,
        evidence=_evidence(model, named, optimizer),
        beside=Outcome(beside.whole, layers_beside, _skipped(beside.optimizer)) if beside else None,
        norms=norms,
    )


@torch.no_grad()
def _poison(param: nn.Parameter) -> None:
    """A NaN in the first entry of a gradient: of a sharded one on the process that has it."""
    grad: Any = param.grad
    if isinstance(grad, DTensor):
        coordinate = grad.device_mesh.get_coordinate()
        if any(coordinate[dim] for dim, placement in enumerate(grad.placements) if not placement.is_replicate()):
            return
        grad = grad.to_local()
    grad.view(-1)[0] = torch.nan


@torch.no_grad()
def _poison_last(model: FullyShardedDataParallel) -> None:
    """A NaN in the first entry of what the last process has of the gradients; all replicas have the same."""
    if model.process_group.rank() == model.process_group.size() - 1:
        grad = next(param.grad for param in model.parameters() if param.grad is not None and param.grad.numel())
        grad.view(-1)[0] = torch.nan


def _own(optimizer: Optimizer) -> Optimizer:
    """The optimizer of this process's parameters that ZeroRedundancyOptimizer holds."""
    return optimizer.optim if isinstance(optimizer, ZeroRedundancyOptimizer) else optimizer


def _layers(optimizer: Optimizer, named: dict[str, nn.Parameter]) -> Layers:
    """The last step's norms and ratios by the model's names; of all processes' layers with ZeroRedundancyOptimizer."""
    own = _own(optimizer)
    if not isinstance(own, Lamb):
        return {}
    names = {id(param): name for name, param in named.items()}
    stats = own.layer_stats()
    if own is optimizer and own.parameter_name(0, 0) not in stats:  # FSDP1's, by the names of the layers
        return {name: tuple(row) for name, row in stats.items()}
    layers = {
        names[id(param)]: tuple(stats.get(own.parameter_name(i, j), NOT_MOVED))
        for i, group in enumerate(own.param_groups)
        for j, param in enumerate(group["params"])
        if param.requires_grad
    }
    if own is not optimizer:
        layers = {name: row for rank in from_all(layers) for name, row in rank.items()}
    return layers


def _skipped(optimizer: Optimizer) -> tuple[int, int] | None:
    own = _own(optimizer)
    return own.skipped_steps() if isinstance(own, Lamb) else None


def _evidence(model: nn.Module, named: dict[str, nn.Parameter], optimizer: Optimizer) -> dict[str, Any]:
    """That it ran as it was asked to."""
    dtensors = [param for param in named.values() if isinstance(param, DTensor)]
    if isinstance(model, FullyShardedDataParallel):
        handles = [unit._handle for unit in model.fsdp_modules(model)]
        flat = [handle.flat_param for handle in handles]
        return {
            "model": type(model).__name__,
            "units": len(handles),
            "original": {handle._use_orig_params for handle in handles} == {True},
            "strategies": sorted({unit.sharding_strategy.name for unit in model.fsdp_modules(model)}),
            "sharded": sum(len(tensor._fqns) for tensor in flat),
            "empty": sum(not info.in_shard for tensor in flat for info in tensor._shard_param_infos),
            "share": sum(tensor.numel() for tensor in flat)
            / sum(tensor._unpadded_unsharded_size.numel() for tensor in flat),
        }
    return {
        "model": type(model).__name__,
        "parameters": len(named),
        "optimized": sum(len(group["params"]) for group in _own(optimizer).param_groups),
        "dtensors": len(dtensors),
        "sharded": sum(param.to_local().numel() < param.numel() for param in dtensors),
        "empty": sum(param.to_local().numel() == 0 for param in dtensors),
        "placements": sorted({type(placement).__name__ for param in dtensors for placement in param.placements}),
        "columns": sum(placement.is_shard(1) for param in dtensors for placement in param.placements),
    }


def _whole_weights(model: nn.Module, named: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    if not isinstance(model, FullyShardedDataParallel):
        return {name: _whole(param.detach()) for name, param in named.items()}
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        return {clean_name(name): param.detach().clone() for name, param in model.named_parameters()}


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.clone()


# -- deliberately broken variants, which must be seen to be wrong ----------------------------------------------------


def _local_shard_where(counts: Callable[[Any], bool]) -> Callable[..., Any]:
    def local_shard(param: Tensor, name: str) -> tuple[Tensor, Reductions]:
        if not isinstance(param, DTensor):
            return param, ()
        mesh = param.device_mesh
        spread = [dim for dim, placement in enumerate(param.placements) if counts(placement)]
        return param.to_local(), tuple(Reduction(mesh.get_group(dim), mesh.device_type) for dim in spread)

    return local_shard


# What replaces which function of hf_lamb.sharding.
MUTATIONS: dict[str, tuple[str, Callable[..., Any]]] = {
    "norms of the local shard": ("sum_over_processes", lambda parts: parts),  # as .item() of a DTensor's norm
    "only what is a Shard is sharded": ("local_shard", _local_shard_where(lambda p: isinstance(p, Shard))),
    "replicas summed as well": ("local_shard", _local_shard_where(lambda p: True)),
    "gradients taken as they lie": ("local_grad", lambda param, grad: getattr(grad, "_local_tensor", grad)),
}


@contextmanager
def mutated(mutation: str | None) -> Iterator[None]:
    if mutation is None:
        yield
    else:
        function, replacement = MUTATIONS[mutation]
        with mock.patch.object(sharding, function, replacement):
            yield


# -- measuring -------------------------------------------------------------------------------------------------------


@cache
def _unsharded(case: str) -> Outcome:
    return train(Case(**json.loads(case)), sharded=False)


def measure(case: Case) -> dict[str, Any]:
    """The distances from the unsharded run, and what each process says of itself."""
    got = train(case, sharded=True)
    expected = got.beside or _unsharded(str(replace(case, mode="_fused" if case.fused else "", mutation=None)))
    return {
        **distances(got.weights, expected.weights, got.layers, expected.layers),
        "skipped": from_all(got.skipped),
        "unsharded_skipped": expected.skipped,
        "gradient_norms": from_all(got.norms),
        "unsharded_gradient_norms": expected.norms,
        "collectives": from_all(got.collectives),
        "unsharded_collectives": expected.collectives,
        "evidence": from_all(got.evidence),
    }


if __name__ == "__main__":
    with process_group():
        measure_cases(measure)
