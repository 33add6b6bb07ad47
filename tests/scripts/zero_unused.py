"""Trains a model with a layer that its forward pass leaves out, under every stage of ZeRO and without DeepSpeed.

Run by tests/test_deepspeed.py: torchrun --nproc_per_node 2 -m tests.scripts.zero_unused OUTPUT.json
"""

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from hf_lamb import Lamb, lamb_param_groups
from tests.scripts.scaffold import from_all, process_group, write_results

STEPS, ROWS = 5, 8


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.unused, self.out = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.a(x))).square().mean()


def batch(step: int) -> Tensor:
    return torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(step))


def optimizer_of(model: nn.Module) -> Lamb:
    return Lamb(lamb_param_groups(model), lr=0.05, eps=1e-3)


def alone() -> dict[str, Tensor]:
    model = Net()
    optimizer = optimizer_of(model)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(batch(step)).backward()
        optimizer.step()
    return {name: param.detach() for name, param in model.named_parameters()}


def with_zero(stage: int) -> tuple[dict[str, Tensor], list[str]]:
    """The weights, and the layers in the statistics of the last step."""
    model, rank, world = Net(), dist.get_rank(), dist.get_world_size()
    optimizer = optimizer_of(model)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": ROWS // world,
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for step in range(STEPS):
        engine.backward(engine(batch(step)[rank::world]))
        engine.step()
    whole = {
        name: (safe_get_full_fp32_param(param) if stage == 3 else param).detach().clone()
        for name, param in model.named_parameters()
    }
    layers = list(optimizer.layer_stats())
    engine.destroy()
    return whole, layers


def main(output: Path) -> None:
    expected, results = alone(), {}
    for stage in range(4):
        whole, layers = with_zero(stage)
        far = {name: float((w - expected[name]).norm() / expected[name].norm()) for name, w in whole.items()}
        results[stage] = {
            "unused": far["unused.weight"],
            "used": max(distance for name, distance in far.items() if "unused" not in name),
            "layers": from_all(layers),
        }
    write_results(output, results)


if __name__ == "__main__":
    with process_group(deepspeed.init_distributed, verbose=False):
        main(Path(sys.argv[1]))
