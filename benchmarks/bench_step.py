"""What does a step cost? hf_lamb's backends beside torch's AdamW and other LAMBs, on the same tensors in one run.

    python -m benchmarks.bench_step                                     # BERT-base, fp32
    python -m benchmarks.bench_step --shapes many-small --dtype bfloat16 --output step.jsonl

The optimizers take turns; of each, the minimum and the median of its steps, their ratio to AdamW(fused=True), the
memory that a step takes for a while, and the bytes that AdamW must move (28 a parameter in fp32) over the time, beside
what a plain copy reaches. Compared are all optimizers that are installed; no gradient is clipped.
"""

import argparse
import time
from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm
from transformers import BertConfig, BertForPreTraining

from hf_lamb import Lamb
from recipes.lib.report import append_json_line, provenance

FUSED_ADAMW = "torch AdamW fused"
# Everything that has a Lamb for `params` and `lr`: (name in the table, module, class, options, distribution).
PEERS = (
    ("timm Lamb", "timm.optim", "Lamb", {"max_grad_norm": None}, "timm"),
    ("timm Lamb foreach", "timm.optim", "Lamb", {"max_grad_norm": None, "foreach": True}, "timm"),
    ("pytorch_optimizer Lamb", "pytorch_optimizer", "Lamb", {"max_grad_norm": 0.0}, "pytorch_optimizer"),
    ("torch_optimizer Lamb", "torch_optimizer", "Lamb", {}, "torch_optimizer"),
    ("apex FusedLAMB", "apex.optimizers", "FusedLAMB", {"use_nvlamb": True}, "apex"),
    ("DeepSpeed FusedLamb", "deepspeed.ops.lamb", "FusedLamb", {}, "deepspeed"),
    ("bitsandbytes LAMB (no LAMB)", "bitsandbytes.optim", "LAMB", {}, "bitsandbytes"),
)


def bert(hidden_size: int, layers: int) -> list[torch.Size]:
    """The shapes of BERT with both pretraining heads."""
    shape = {"hidden_size": hidden_size, "num_hidden_layers": layers, "num_attention_heads": hidden_size // 64}
    with torch.device("meta"):
        return [
            p.shape for p in BertForPreTraining(BertConfig(intermediate_size=4 * hidden_size, **shape)).parameters()
        ]


SHAPES: dict[str, Callable[[], Iterable[Iterable[int]]]] = {
    "bert-base": lambda: bert(768, 12),
    "bert-large": lambda: bert(1024, 24),
    "many-small": lambda: [(1000,)] * 10_000,
    "one-huge": lambda: [(32_000, 4096)],
}


def candidates(params: list[Tensor]) -> tuple[dict[str, Optimizer], dict[str, str]]:
    """What is compared, and the versions of what is not torch's or ours."""
    found: dict[str, Optimizer] = {
        FUSED_ADAMW: torch.optim.AdamW(params, fused=True),
        "torch AdamW foreach": torch.optim.AdamW(params, foreach=True),
        "hf_lamb fused": Lamb(params, fused=True),
        "hf_lamb fused, skip_nonfinite=False": Lamb(params, fused=True, skip_nonfinite=False),
        "hf_lamb foreach": Lamb(params, foreach=True),
        "hf_lamb eager": Lamb(params, foreach=False),
    }
    versions = {}
    for name, module, cls, options, distribution in PEERS:
        try:
            optimizer = getattr(import_module(module), cls)(params, lr=1e-3, weight_decay=0.01, **options)
            optimizer.step()
        except Exception as error:  # not installed, not built, not for this device or dtype
            print(f"{name} is left out: {str(error).partition(chr(10))[0]}")
            continue
        found[name] = optimizer
        versions[distribution] = version(distribution)
    return found, versions


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds_of(call: Callable[[], Any], device: str) -> float:
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def copied_bytes_per_second(device: str) -> float:
    """Read and written by a copy of 400 MB, the best of ten."""
    source = torch.ones(100_000_000, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / min(seconds_of(lambda: target.copy_(source), device) for _ in range(10))


def scratch_bytes(call: Callable[[], Any], device: str) -> int:
    """The most memory that a call holds at once beyond what there was before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    held = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=SHAPES, default="bert-base")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of parameters, gradients")
    parser.add_argument("--steps", type=int, default=15, help="counted steps of each optimizer")
    parser.add_argument("--output", type=Path, help="a JSON-lines file to add to")
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype)
    params: list[Tensor] = []
    for shape in SHAPES[options.shapes]():
        params.append(nn.Parameter(torch.randn(*shape, device=device, dtype=dtype) * 0.02))
        params[-1].grad = torch.randn_like(params[-1]) * 1e-3
    optimizers, versions = candidates(params)
    for optimizer in optimizers.values():
        optimizer.step()  # makes the state
    seconds: dict[str, list[float]] = {name: [] for name in optimizers}
    for _ in tqdm(range(options.steps), desc="rounds"):
        for name, optimizer in optimizers.items():
            seconds[name].append(seconds_of(optimizer.step, device))

    elements = sum(param.numel() for param in params)
    least = elements * (5 * 4 + 2 * params[0].element_size())  # read w, g, m, v; write w, m, v; moments are fp32
    rows = {}
    for name, optimizer in optimizers.items():
        getattr(optimizer, "_scratch", {}).clear()  # hf_lamb's, which it would keep for the next step
        rows[name] = {
            "milliseconds_min": round(1e3 * min(seconds[name]), 3),
            "milliseconds_median": round(1e3 * median(seconds[name]), 3),
            "ratio_of_minima": round(min(seconds[name]) / min(seconds[FUSED_ADAMW]), 3),
            "ratio_of_medians": round(median(seconds[name]) / median(seconds[FUSED_ADAMW]), 3),
            "scratch_megabytes": round(scratch_bytes(optimizer.step, device) / 1e6, 1),
        }
    record = {
        "benchmark": "step",
        **provenance(),
        "shapes": options.shapes,
        "dtype": options.dtype,
        "tensors": len(params),
        "parameters": elements,
        "largest_tensor_megabytes": round(4 * max(param.numel() for param in params) / 1e6, 1),
        "gigabytes_per_second_copy": round(copied_bytes_per_second(device) / 1e9, 1),
        "gigabytes_per_second_adamw": round(least / min(seconds[FUSED_ADAMW]) / 1e9, 1),
        "rounds": options.steps,
        "steps": rows,
    }
    record["versions"] |= versions
    print(f"{len(params):,} tensors, {elements:,} parameters, {options.dtype}, {record['hardware']}")
    for name, row in rows.items():
        print(f"{name:38}", "  ".join(f"{key} {value:10,.2f}" for key, value in row.items()))
    if options.output is not None:
        append_json_line(options.output, record)


if __name__ == "__main__":
    main()
