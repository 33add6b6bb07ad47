"""What a step on CUDA costs the host, measured without a GPU: our Triton backend beside AdamW(fused=True).

    python -m benchmarks.host_time                                       # BERT-large: 394 tensors in two groups
    python -m benchmarks.host_time --steps 400 --output benchmarks/results/host_time.jsonl

One thread. The tensors have one element each and lie on the CPU, where the operations around the kernels take about
what they take to launch on CUDA; the launches of our kernels, and AdamW's one operation, do nothing. What CUDA adds to
each launch comes on top: tests/test_launches.py counts them. The optimizers take turns; the table has the fastest
step of each. Moved gradients lie elsewhere in every step, so that our table of addresses is made anew.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import BertConfig, BertForMaskedLM

from benchmarks.records import stamp
from hf_lamb import Lamb, backends, lamb_param_groups
from recipes.lib.report import append_json_line

ADAMW = "torch AdamW fused"


@contextmanager
def without_kernels() -> Iterator[None]:
    """Take CPU tensors for CUDA ones: the Triton backend updates them, and no kernel of either side runs."""
    from hf_lamb.backends import triton

    def triton_alone(device: torch.device) -> tuple[type[backends.Backend], ...]:
        return (triton.Triton,)

    def nothing(*arguments: Any, **options: Any) -> None:
        pass

    with (
        mock.patch.object(backends, "fused_kinds", triton_alone),
        mock.patch.object(triton, "_launch", nothing),
        mock.patch.object(torch, "_fused_adamw_", nothing),
    ):
        yield


def groups_of(hidden_size: int, layers: int) -> list[dict[str, Any]]:
    """The groups of `lamb_param_groups` for a BERT with its masked-LM head, every tensor with one element."""
    shape = {"hidden_size": hidden_size, "num_hidden_layers": layers, "num_attention_heads": hidden_size // 64}
    with torch.device("meta"):
        model = BertForMaskedLM(BertConfig(intermediate_size=4 * hidden_size, **shape))
    groups = lamb_param_groups(model, weight_decay=0.01)
    for group in groups:
        group["params"] = [nn.Parameter(torch.ones(1)) for _ in group["params"]]
    return groups


def candidates(hidden_size: int, layers: int) -> dict[str, Optimizer]:
    """What is compared, each with tensors of its own."""
    adamw = [{key: group[key] for key in ("params", "weight_decay")} for group in groups_of(hidden_size, layers)]
    ours: dict[str, dict[str, Any]] = {
        "hf_lamb, skip_nonfinite=False": {"skip_nonfinite": False},
        "hf_lamb": {},
        "hf_lamb, max_grad_norm=1.0": {"max_grad_norm": 1.0},
    }
    return {ADAMW: torch.optim.AdamW(adamw, fused=True)} | {
        name: Lamb(groups_of(hidden_size, layers), **options) for name, options in ours.items()
    }


def give_gradients(optimizer: Optimizer) -> None:
    """New ones, none of them where an old one is."""
    for param in params_of(optimizer):
        param.grad = torch.ones_like(param, dtype=param.grad_dtype)  # the old one is freed after this


def params_of(optimizer: Optimizer) -> list[nn.Parameter]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def microseconds(optimizers: dict[str, Optimizer], steps: int, before: Callable[[Optimizer], Any]) -> dict[str, Any]:
    """Of `steps` steps of each optimizer, which take turns; `before` each of them is not timed."""
    spent: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in range(steps):
        for name, optimizer in optimizers.items():
            before(optimizer)
            start = time.perf_counter()
            optimizer.step()
            spent[name].append(1e6 * (time.perf_counter() - start))
    least = min(spent[ADAMW])
    return {
        name: {
            "microseconds_min": round(min(times), 1),
            "microseconds_median": round(median(times), 1),
            "ratio_of_minima": round(min(times) / least, 3),
        }
        for name, times in spent.items()
    }


def measure(hidden_size: int, layers: int, steps: int) -> dict[str, Any]:
    """Of every optimizer, with gradients that stay where they are and with gradients that move."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with without_kernels():
            optimizers = candidates(hidden_size, layers)
            for optimizer in optimizers.values():
                give_gradients(optimizer)
                optimizer.step()  # makes the state
            return {
                "tensors": len(params_of(optimizers[ADAMW])),
                "groups": len(optimizers["hf_lamb"].param_groups),
                "rounds": steps,
                "kept_gradients": microseconds(optimizers, steps, lambda optimizer: None),
                "moved_gradients": microseconds(optimizers, steps, give_gradients),
            }
    finally:
        torch.set_num_threads(threads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--steps", type=int, default=200, help="counted steps of each optimizer")
    parser.add_argument("--output", type=Path, help="a JSON-lines file to add to")
    options = parser.parse_args()
    result = measure(options.hidden_size, options.layers, options.steps)
    print(f"{result['tensors']} tensors in {result['groups']} groups, one thread, kernels replaced by nothing")
    for gradients in ("kept", "moved"):
        for name, row in result[f"{gradients}_gradients"].items():
            print(f"{gradients:6}{name:32}", "  ".join(f"{key} {value:9,.2f}" for key, value in row.items()))
    if options.output is not None:
        shape = {"hidden_size": options.hidden_size, "layers": options.layers}
        append_json_line(options.output, {"benchmark": "host_time", **stamp(), **shape, **result})


if __name__ == "__main__":
    main()
