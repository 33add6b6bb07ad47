"""Measures a network under DDP, each process with its share of the batches, and writes what each process got.

Run by tests/test_sharpness_reports.py: torchrun --nproc_per_node 2 -m tests.scripts.sharpness_ddp OUTPUT_DIR
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerControl, TrainerState

from hf_lamb import ShardingError
from hf_lamb.sharpness import (
    SharpnessCallback,
    adaptive_sharpness,
    cross_entropy,
    epsilon_flatness,
    epsilon_sharpness,
    interpolate,
    lambda_max,
    weighted_trace,
)
from tests.scripts.scaffold import process_group
from tests.test_sharpness import digits, trained


def main(output: Path) -> None:
    rank, processes = dist.get_rank(), dist.get_world_size()
    images, classes = digits(200)
    batches = [(images[i : i + 40], classes[i : i + 40]) for i in range(0, 200, 40)]  # three and two
    model = trained(0, 16, nn.ReLU, 200)
    before = [p.detach().clone() for p in model.parameters()]
    wrapped, share = DistributedDataParallel(model), batches[rank::processes]

    metrics = {
        "adaptive": adaptive_sharpness,
        "epsilon": epsilon_sharpness,
        "subspace": lambda *args: epsilon_sharpness(*args, subspace=5),
        "lambda_max": lambda_max,
        "weighted_trace": lambda *args: weighted_trace(*args, samples=3),
    }
    found = {
        name: (metric(wrapped, cross_entropy, share).value, metric(model, cross_entropy, batches).value)
        for name, metric in metrics.items()
    }
    found["flatness"] = tuple(
        epsilon_flatness(m, cross_entropy, b, directions=2, steps=2).worst
        for m, b in ((wrapped, share), (model, batches))
    )
    found["interpolation"] = tuple(
        interpolate(m, model, cross_entropy, b, [0.5])[0].loss for m, b in ((wrapped, share), (model, batches))
    )

    callback = SharpnessCallback(batches, 1, cross_entropy)
    logs, state = {"loss": 0.0}, TrainerState()
    state.log_history.append({})
    callback.on_train_begin(None, state, TrainerControl(), model=model)
    callback.on_step_end(None, state, TrainerControl(), model=model)
    callback.on_log(None, state, TrainerControl(), logs)

    try:
        adaptive_sharpness(fully_shard(nn.Linear(64, 10)), cross_entropy, batches)
        refused = "not refused"
    except ShardingError as error:
        refused = str(error)
    record = {
        "metrics": found,
        "unchanged": all(torch.equal(p, bits) for p, bits in zip(model.parameters(), before, strict=True)),
        "refused": refused,
        "callback": logs["sharpness/adaptive"],
        "callback_alone": found["adaptive"][1],
    }
    (output / f"rank{rank}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    with process_group():
        main(Path(sys.argv[1]))
