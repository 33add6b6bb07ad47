"""Trains a small BERT with DeepSpeed ZeRO, and again unsharded in the same process: how far are the two apart?

Run by tests/test_deepspeed.py and tests/scripts/sharding_report.py:
torchrun --nproc_per_node N -m tests.scripts.zero_lamb CASES.json OUTPUT.json
"""

import importlib
import os
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_lamb import Lamb, lamb_param_groups
from hf_lamb.sharding import deepspeed as zero
from tests import twins
from tests.scripts.scaffold import Case, Layers, distances, from_all, measure_cases, process_group
from tests.scripts.sharded_lamb import ROWS, STEPS, Collectives, batch, build_model, mutated

# By mode: the stage, what else is in "zero_optimization", and the rest of the configuration.
BF16 = {"bf16": {"enabled": True}}
CONFIGURATIONS: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "zero0": (0, {}, {}),
    "zero1": (1, {}, {}),
    "zero2": (2, {}, {}),
    "zero3": (3, {}, {}),
    "zero1_round_robin": (1, {"round_robin_gradients": True}, {}),
    "zero2_round_robin": (2, {"round_robin_gradients": True}, {}),
    "zero3_subgroups": (3, {"sub_group_size": 4000}, {}),
    "zero2_aligned": (2, {"parameter_alignment": True}, {}),
    "zero2_offload": (2, {"offload_optimizer": {"device": "cpu"}}, {"zero_force_ds_cpu_optimizer": False}),
    "zero3_offload": (3, {"offload_optimizer": {"device": "cpu"}}, {"zero_force_ds_cpu_optimizer": False}),
    "zero0_bf16": (0, {}, BF16),
    "zero1_bf16": (1, {}, BF16),
    "zero1_bf16_fp32_gradients": (1, {}, {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}),  # its BF16_Optimizer
    "zero2_bf16": (2, {}, BF16),
    "zero2_bf16_unchecked": (2, {}, {"bf16": {"enabled": True, "check_grad_overflow": False}}),
    "zero3_bf16": (3, {}, BF16),
    "zero3_bf16_subgroups": (3, {"sub_group_size": 4000}, BF16),
}


def configuration(mode: str) -> dict[str, Any]:
    stage, zero, rest = CONFIGURATIONS[mode]
    return {
        "train_micro_batch_size_per_gpu": ROWS // dist.get_world_size(),
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # its default is 1
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **zero},
        **rest,
    }


def groups(named: dict[str, nn.Parameter]) -> list[dict[str, Any]]:
    """Two, as most trainings have them: ZeRO makes a flat tensor of each."""
    matrices = [(name, param) for name, param in named.items() if param.ndim > 1]
    others = [(name, param) for name, param in named.items() if param.ndim <= 1]
    return [{"params": matrices}, {"params": others, "weight_decay": 0.001}]


def new_optimizer(case: Case, model: nn.Module) -> Optimizer:
    options = {"lr": 1e-2, "weight_decay": 0.01, **case.options}
    own = lamb_param_groups(model, adapt_all=True) if case.fused else groups(dict(model.named_parameters()))
    return importlib.import_module(case.optimizer).Lamb(own, **options)


def initialize(case: Case) -> tuple[Any, Optimizer]:
    """The engine, and the optimizer that it drives."""
    model = twins.fused_model(torch.float32) if case.fused else build_model(torch.float32)
    optimizer = new_optimizer(case, model)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=configuration(case.sharding))
    return engine, optimizer


def weights(engine: Any, named: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """The fp32 ones, whole."""
    if isinstance(engine.optimizer, FP16_UnfusedOptimizer):
        pairs = zip(engine.optimizer.fp16_groups, engine.optimizer.fp32_groups, strict=True)
        masters = {id(param): master for group in pairs for param, master in zip(*group, strict=True)}
        return {name: masters[id(param)].detach().clone() for name, param in named.items()}
    if engine.zero_optimization_stage() < 3 and next(iter(named.values())).dtype == torch.float32:
        return {name: param.detach().clone() for name, param in named.items()}
    return {name: safe_get_full_fp32_param(param).detach().clone() for name, param in named.items()}


def gradient(param: nn.Parameter) -> Tensor:
    return safe_get_full_grad(param).detach().float().clone()


def evidence(engine: Any, optimizer: Optimizer) -> dict[str, Any]:
    """That it ran as it was asked to."""
    stage = engine.zero_optimization_stage()
    facts: dict[str, Any] = {"stage": stage, "optimizer": type(engine.optimizer).__name__}
    if isinstance(optimizer, Lamb) and stage > 0:
        layouts = zero.layouts(engine, optimizer).values()
        held = sum(segment.stop - segment.start for layout in layouts for segment in layout.segments)
        facts |= {"tensors": len(layouts), "held": held, "padding": sum(layout.numel for layout in layouts) - held}
        facts["layers"] = sum(len(layout.segments) for layout in layouts)
    return facts


class Unsharded:
    """The same training without DeepSpeed, step by step; or an optimizer that is given the gradients of a sharded run.

    The latter for bf16, where one weight that rounds the other way changes trust ratios by 1e-3.
    """

    def __init__(self, case: Case, whole: dict[str, Tensor] | None = None) -> None:
        self.case = case
        self.model = twins.unfuse(twins.fused_model(torch.float32)) if case.fused else build_model(torch.float32)
        self.named = dict(self.model.named_parameters())
        if whole is not None:
            for name, param in self.named.items():
                param.data.copy_(whole.get(name, param.data))
        self.optimizer = new_optimizer(case, self.model)
        self.layers: list[Layers] = []

    def step(self, step: int, grads: dict[str, Tensor] | None = None) -> None:
        if grads is None:
            self.model(**(twins.batch(step) if self.case.fused else batch(step))).loss.backward()
            if step == self.case.nan_at:
                next(iter(self.named.values())).grad[0] = torch.nan
        else:
            for name, grad in grads.items():
                self.named[name].grad = grad
        self.optimizer.step()
        self.model.zero_grad()
        self.layers.append(layers(self.optimizer))


def layers(optimizer: Optimizer) -> Layers:
    return twins.layers_of(optimizer) if isinstance(optimizer, Lamb) else {}  # BERT has no fused layers


def measure(case: Case) -> dict[str, Any]:
    """As `sharded_lamb.measure`."""
    engine, optimizer = initialize(case)
    if case.mutation:
        optimizer.attach(engine)  # whose check would find it out
    named = {name: param for name, param in engine.module.named_parameters() if param.requires_grad}
    by_gradients = "bf16" in case.mode
    dtype = torch.bfloat16 if by_gradients else torch.float32
    before = weights(engine, named)
    expected = Unsharded(case, before if by_gradients else None)
    made = twins.fused_model(torch.float32) if case.fused else build_model(torch.float32)
    given = {name: param.detach().to(dtype).float() for name, param in made.named_parameters()}
    got: list[Layers] = []
    calls: list[list[tuple[str, int]]] = []  # of the last step: what each call of the optimizer's step sends
    step_of_optimizer = optimizer.step

    def counted() -> None:
        with Collectives() as collectives:
            step_of_optimizer()
        calls.append(collectives.seen)

    optimizer.step = counted
    rank, world = dist.get_rank(), dist.get_world_size()
    for step in range(STEPS):
        loss = engine(**(twins.batch(step) if case.fused else batch(step, rank, world))).loss
        engine.backward(loss * torch.nan if step == case.nan_at and rank == world - 1 else loss)
        if by_gradients:
            expected.step(step, {name: gradient(param) for name, param in named.items()})
        else:
            expected.step(step)
        calls.clear()
        with mutated(case.mutation):
            engine.step()
        got.append(layers(optimizer))
    ours = isinstance(optimizer, Lamb)
    skipped_at = case.nan_at if engine.skipped_steps else None
    whole = weights(engine, named)
    unsharded = expected.named if case.fused else {name: expected.named[name] for name in named}
    if case.fused:
        whole, unsharded = twins.in_layers(whole), twins.in_layers(unsharded)
    result = {
        # Of a step that DeepSpeed skipped, the statistics are still those of the step before.
        **distances(whole, unsharded, got, expected.layers, leave_out=skipped_at),
        "skipped": from_all(optimizer.skipped_steps() if ours else None),
        "deepspeed_skipped": engine.skipped_steps,
        "unsharded_skipped": expected.optimizer.skipped_steps() if ours else None,
        "collectives": from_all(calls),
        "evidence": from_all(evidence(engine, optimizer)),
        "changed_before": [name for name, w in before.items() if not torch.equal(w, given[name])],
    }
    engine.destroy()
    return result


if __name__ == "__main__":
    with process_group(deepspeed.init_distributed, verbose=False):
        deepspeed.utils.logger.setLevel("ERROR")
        measure_cases(measure)
