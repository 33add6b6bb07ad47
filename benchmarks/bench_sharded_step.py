"""What does a step cost when the parameters are sharded (FSDP2)? LAMB beside AdamW and timm's LAMB, in one run.

    torchrun --standalone --nproc_per_node 2 -m benchmarks.bench_sharded_step --hidden_size 256
    torchrun --standalone --nproc_per_node 4 -m benchmarks.bench_sharded_step --output sharded_step.jsonl

The optimizers take turns, step by step, on the same sharded gradients; reported is the median of their steps, the
ratio to AdamW(foreach=True), and the collectives of one step as counted. gloo on CPU, NCCL where there are GPUs.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from transformers import BertConfig, BertModel

from benchmarks.peers import PEERS
from benchmarks.records import stamp
from hf_lamb import Lamb, lamb_param_groups
from recipes.lib.report import append_json_line


def candidates() -> dict[str, Callable[[nn.Module], torch.optim.Optimizer]]:
    """What is compared; timm where it is installed."""
    found: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
        "torch AdamW foreach": lambda model: torch.optim.AdamW(model.parameters(), foreach=True),
        "torch AdamW per tensor": lambda model: torch.optim.AdamW(model.parameters(), foreach=False),
        "hf_lamb": lambda model: Lamb(lamb_param_groups(model)),
        "hf_lamb foreach": lambda model: Lamb(lamb_param_groups(model), foreach=True),
        "hf_lamb, no look at gradients": lambda model: Lamb(lamb_param_groups(model), skip_nonfinite=False),
    }
    for peer in PEERS:
        if peer.distribution == "timm":  # the only one that takes DTensors
            try:
                lamb = peer.load()
            except ImportError as error:
                if dist.get_rank() == 0:
                    print(f"{peer.name} is left out: {error}")
            else:
                found[peer.name] = partial(_new, lamb, peer.options)
    return found


def _new(lamb: type[torch.optim.Optimizer], options: dict[str, Any], model: nn.Module) -> torch.optim.Optimizer:
    return lamb(model.parameters(), **options)


def sharded_bert(hidden_size: int, layers: int, device: str) -> nn.Module:
    """A BERT under FSDP2, layer by layer, with random gradients."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=8192,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32,
        intermediate_size=4 * hidden_size,
    )
    model = BertModel(config).to(device)
    mesh = init_device_mesh(device, (dist.get_world_size(),))
    for layer in model.encoder.layer:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=64)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--steps", type=int, default=12, help="counted steps of each optimizer")
    parser.add_argument("--output", type=Path, help="a JSON-lines file to add to")
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group()
    if device == "cuda":
        torch.cuda.set_device(dist.get_rank())
    model = sharded_bert(options.hidden_size, options.layers, device)
    optimizers = {name: make(model) for name, make in candidates().items()}
    collectives = {}
    for name, optimizer in optimizers.items():
        optimizer.step()
        with CommDebugMode() as counter:
            optimizer.step()
        collectives[name] = counter.get_total_counts()

    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(options.steps):
        for name, optimizer in optimizers.items():
            dist.barrier()
            start = time.perf_counter()
            optimizer.step()
            if device == "cuda":
                torch.cuda.synchronize()
            dist.barrier()
            seconds[name].append(time.perf_counter() - start)

    if dist.get_rank() == 0:
        rows = {
            name: {
                "milliseconds": round(1e3 * median(times), 2),
                "ratio_to_adamw_foreach": round(median(times) / median(seconds["torch AdamW foreach"]), 2),
                "collectives": collectives[name],
            }
            for name, times in seconds.items()
        }
        tensors = len(list(model.parameters()))
        parameters = sum(param.numel() for param in model.parameters())
        print(f"{dist.get_world_size()} processes, {tensors} tensors, {parameters:,} parameters")
        for name, row in rows.items():
            print(f"{name:32} {row['milliseconds']:9.2f} ms {row['ratio_to_adamw_foreach']:7.2f}x", end="")
            print(f" {row['collectives']:5} collectives")
        if options.output is not None:
            record = {"benchmark": "sharded_step", **stamp(), "processes": dist.get_world_size()}
            shape = {"hidden_size": options.hidden_size, "layers": options.layers, "parameters": parameters}
            append_json_line(options.output, {**record, **shape, "tensors": tensors, "steps": rows})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
