"""Protects what is read of DeepSpeed's insides: where ZeRO's layers lie, and that what is not understood is refused.

With engines of cardboard; tests/test_deepspeed.py has real ones.
"""

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import TrainingArguments

from hf_lamb import Lamb, ShardingError
from hf_lamb.optim_args import options_of
from hf_lamb.sharding import deepspeed as zero
from hf_lamb.sharding.layout import Layout, Segment
from tests.helpers import one_line

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=8)


# -- where the layers lie --------------------------------------------------------------------------------------------


@given(SIZES, st.integers(1, 5), st.integers(0, 3))
def test_partitions_of_a_whole_hold_every_element_once(sizes: list[int], processes: int, gap: int) -> None:
    """ZeRO-1 and 2: gaps (`parameter_alignment`) between layers, padding at the end."""
    layers, end = [], 0
    for i, size in enumerate(sizes):
        layers.append(zero.Whole(str(i), end, size))
        end += size + gap
    partition = -(-end // processes)
    flat = torch.full((partition * processes,), -1)
    for name, offset, size in layers:
        flat[offset : offset + size] = int(name) * 1000 + torch.arange(size)
    found: dict[str, list[Tensor]] = {str(i): [] for i in range(len(sizes))}
    for rank in range(processes):
        start = rank * partition
        segments = zero.cut_together(layers, start, start + partition)
        Layout(segments, partition)  # in order, without overlap
        for segment in segments:
            found[segment.name].append(flat[start:][segment.start : segment.stop])
    for i, size in enumerate(sizes):
        assert torch.equal(torch.cat(found[str(i)]), i * 1000 + torch.arange(size))


@given(SIZES, st.integers(1, 5))
def test_parts_of_each_layer_hold_every_element_once(sizes: list[int], processes: int) -> None:
    """ZeRO-3: several processes may have nothing but padding of a small layer."""
    parts = [-(-size // processes) for size in sizes]
    held = [0] * len(sizes)
    for rank in range(processes):
        segments = zero.cut_one_by_one([str(i) for i in range(len(sizes))], sizes, parts, rank)
        Layout(segments, sum(parts))
        for i, segment in enumerate(segments):
            assert segment.start == sum(parts[:i])
            assert segment.stop - segment.start == min(max(sizes[i] - rank * parts[i], 0), parts[i])
            held[i] += segment.stop - segment.start
    assert held == sizes


# -- engines of cardboard --------------------------------------------------------------------------------------------


class DeepSpeedZeroOptimizer(SimpleNamespace):
    """One process' view of ZeRO-2 on one process: two layers and a padded end."""


class ZenFlowZeroOptimizer(DeepSpeedZeroOptimizer):
    pass


def cardboard(monkeypatch: pytest.MonkeyPatch, lamb: Lamb, version: str = "0.19.8", **facts: Any) -> Any:
    deepspeed = ModuleType("deepspeed")
    deepspeed.__version__, deepspeed.DeepSpeedEngine = version, SimpleNamespace
    monkeypatch.setitem(sys.modules, "deepspeed", deepspeed)
    monkeypatch.setattr("torch.distributed.get_rank", lambda group=None: 0)
    group = SimpleNamespace(_device_types=[torch.device("cpu")])
    params = [param for own in lamb.param_groups for param in own["params"]]
    flat = torch.cat([param.detach().flatten() for param in params] + [torch.full((2,), torch.nan)])
    inside = DeepSpeedZeroOptimizer(
        single_partition_of_fp32_groups=[flat],
        real_dp_process_group=[group],
        round_robin_bit16_groups=[params],
        round_robin_bit16_offsets=[[0, 6]],
        model_parallel_world_size=1,
        clip_grad=0.0,
    )
    engine = {
        "optimizer": inside,
        "basic_optimizer": lamb,
        "param_names": {param: name for name, param in zip("ab", params, strict=True)},
        "has_moe_layers": False,
        "pipeline_parallelism": False,
        "zero_optimization": lambda: True,
        "zero_offload_optimizer": lambda: None,
        "zero_offload_param": lambda: None,
        "zero_partial_offload": lambda: 1.0,
        "zero_hpz_partition_size": lambda: 1,
        "autotp_size": lambda: 0,
    }
    return SimpleNamespace(**{**engine, **facts})


@pytest.fixture
def optimizer() -> Lamb:
    return Lamb([nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(4))])


def test_reads_an_engine(optimizer: Lamb, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = cardboard(monkeypatch, optimizer)
    ((tensor, layout),) = zero.layouts(engine, optimizer).items()
    assert tensor is engine.optimizer.single_partition_of_fp32_groups[0]
    assert layout.segments == (Segment("a", 0, 6, 6), Segment("b", 6, 10, 4))
    assert layout.numel == 12
    assert len(layout.reductions) == 1


def offload(device: str) -> Callable[[], Any]:
    return lambda: SimpleNamespace(device=device)


WAY_OUT = "is not supported: use ZeRO-1, 2 or 3 without it, or FSDP2"
ENGINES = {
    "CPU-Adam in place of LAMB": (
        {"basic_optimizer": type("DeepSpeedCPUAdam", (), {})()},
        'set "zero_force_ds_cpu_optimizer": false.*steps with DeepSpeedCPUAdam, not with this Lamb',
    ),
    "experts": ({"has_moe_layers": True}, rf"ZeRO with experts \(MoE\) {WAY_OUT}"),
    "tensor parallelism": ({"autotp_size": lambda: 2}, f"ZeRO with tensor parallelism {WAY_OUT}"),
    "pipeline parallelism": ({"pipeline_parallelism": True}, f"ZeRO with pipeline parallelism {WAY_OUT}"),
    "optimizer on NVMe": ({"zero_offload_optimizer": offload("nvme")}, f"ZeRO with offloading to NVMe {WAY_OUT}"),
    "weights on NVMe": ({"zero_offload_param": offload("nvme")}, f"ZeRO with offloading to NVMe {WAY_OUT}"),
    "offload in part": (
        {"zero_offload_optimizer": offload("cpu"), "zero_partial_offload": lambda: 0.5},
        rf"offloading in part \(ratio 0.5; the rest is stepped by AdamW\) {WAY_OUT}",
    ),
    "hierarchical": ({"zero_hpz_partition_size": lambda: 8}, rf"\(zero_hpz_partition_size\) {WAY_OUT}"),
    "another kind": ({"optimizer": ZenFlowZeroOptimizer()}, f"DeepSpeed's ZenFlowZeroOptimizer {WAY_OUT}"),
}


@pytest.mark.parametrize(("facts", "message"), ENGINES.values(), ids=ENGINES)
def test_refuses_by_name(
    facts: dict[str, Any], message: str, optimizer: Lamb, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused(cardboard(monkeypatch, optimizer, **facts), optimizer, message)


def refused(engine: Any, optimizer: Lamb, message: str) -> None:
    with one_line(ShardingError, message):
        zero.layouts(engine, optimizer)


def test_refuses_a_model_parallel_unit(optimizer: Lamb, monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron's, by `mpu`."""
    engine = cardboard(monkeypatch, optimizer)
    engine.optimizer.model_parallel_world_size = 2
    refused(engine, optimizer, f"ZeRO with tensor parallelism {WAY_OUT}")


@pytest.mark.parametrize("option", [{"max_grad_norm": 1.0, "skip_nonfinite": False}, {}])
def test_refuses_what_needs_a_norm_that_nobody_computes(
    option: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = Lamb([nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(4))], **option)
    engine = cardboard(monkeypatch, optimizer)
    engine.optimizer.compute_grad_norm = False
    name = "max_grad_norm" if option else "skip_nonfinite"
    refused(engine, optimizer, f'set "compute_grad_norm": true.*, or {name}=(None|False): {name} needs the norm')


def test_refuses_weights_that_are_elsewhere(optimizer: Lamb, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the version: offsets that are read wrong, or weights that were loaded behind DeepSpeed's back."""
    engine = cardboard(monkeypatch, optimizer)
    engine.optimizer.round_robin_bit16_offsets = [[4, 0]]
    with pytest.raises(ShardingError, match=r"load weights before.*weights of a are not where DeepSpeed"):
        zero.layouts(engine, optimizer)


def test_refuses_insides_that_have_changed(optimizer: Lamb, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = cardboard(monkeypatch, optimizer)
    del engine.optimizer.round_robin_bit16_offsets
    with pytest.raises(ShardingError, match=r"pip install.*DeepSpeed 0.19.8 differs.*_bit16_offsets"):
        zero.layouts(engine, optimizer)


def test_warns_of_versions_that_were_not_tested(optimizer: Lamb, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = cardboard(monkeypatch, optimizer, version="0.21.0")
    with pytest.warns(UserWarning, match=r"tested with DeepSpeed 0.19, this is 0.21.0"):
        assert zero.layouts(engine, optimizer)


# -- DeepSpeed's gradient norm ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("norm", "clip_grad", "expected"),
    [(3.0, 0.0, 9.0), (3.0, 2.0, 4.0), (1.0, 2.0, 1.0), (torch.inf, 2.0, torch.inf), (-1.0, 2.0, torch.inf)],
)
def test_takes_over_the_norm_that_deepspeed_computed(
    norm: float, clip_grad: float, expected: float, optimizer: Lamb, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After its clipping; -1 is what it makes of a norm that is not finite."""
    for given_norm in (norm, torch.tensor(norm)):
        inside = SimpleNamespace(_global_grad_norm=given_norm, clip_grad=clip_grad)
        engine = SimpleNamespace(optimizer=inside, zero_optimization=lambda: True)
        monkeypatch.setattr(zero, "layouts", lambda engine, optimizer: {torch.empty(0): None})
        runtime = zero.DeepSpeed(engine, optimizer)
        assert float(runtime.gradient_norm_sq(torch.device("cpu"))) == expected


def test_clip_grad_norm_refuses_an_engine(optimizer: Lamb, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine has the gradients until it calls `step`, and clips them itself."""
    monkeypatch.setattr(zero, "layouts", lambda engine, optimizer: {})
    monkeypatch.setattr(zero.DeepSpeed, "wraps", staticmethod(lambda model: True))
    optimizer.attach(SimpleNamespace(zero_optimization=lambda: False))
    with one_line(
        ShardingError, "clip_grad_norm: set gradient_clipping in DeepSpeed's configuration, or max_grad_norm"
    ):
        optimizer.clip_grad_norm(1.0)


# -- Trainer ---------------------------------------------------------------------------------------------------------


def test_trainer_refuses_cpu_adam_before_it_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate would put it in LAMB's place without a word."""
    args = TrainingArguments(optim="lamb", use_cpu=True)
    config: dict[str, Any] = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    monkeypatch.setattr(args, "deepspeed_plugin", SimpleNamespace(deepspeed_config=config))
    with pytest.raises(ValueError, match=r'"zero_force_ds_cpu_optimizer": false.*DeepSpeedCPUAdam'):
        options_of(args)
    config["zero_force_ds_cpu_optimizer"] = False
    assert options_of(args)
    config.pop("zero_force_ds_cpu_optimizer")
    config["zero_optimization"]["offload_optimizer"]["device"] = "none"
    assert options_of(args)
