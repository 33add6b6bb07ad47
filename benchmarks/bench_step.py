"""What does a step cost? hf_lamb's backends beside torch's AdamW and other LAMBs, on the same tensors in one run.

    python -m benchmarks.bench_step                                     # BERT-base, fp32
    python -m benchmarks.bench_step --shapes many-small --dtype bfloat16 --output step.jsonl

The optimizers take turns; of each, the minimum and the median of its steps, their ratio to AdamW(fused=True), the
memory that a step takes for a while, and the bytes that AdamW must move (28 a parameter in fp32) over the time, beside
what a plain copy reaches. Compared are all optimizers that are installed. No gradient is clipped, but in the rows that
say so.

A run is thrown away and made again where AdamW's fastest steps of its two halves are more than 10 % apart: something
else ran on the machine. After the last attempt the program ends with exit code 1, and records nothing.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from tqdm import tqdm
from transformers import BertConfig, BertForPreTraining

from benchmarks.peers import PEERS
from benchmarks.records import stamp
from hf_lamb import Lamb
from recipes.lib.report import append_json_line

FUSED_ADAMW = "torch AdamW fused"
CLIPPED_ADAMW = "torch AdamW fused, clip_grad_norm_"
CLIPPED = "hf_lamb fused, max_grad_norm=1.0"
LEAST_ROUNDS = 11
MOST_APART = 0.1  # the fastest steps of AdamW's two halves


class Unsteady(RuntimeError):
    """Every attempt was thrown away."""


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


def candidates(
    params: list[Tensor], without: Sequence[str] = ()
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """The steps that are compared, and the versions of what is not torch's or ours. without: names to leave out."""
    adamw = torch.optim.AdamW(params, fused=True)

    def clipped_adamw() -> None:
        clip_grad_norm_(params, 1.0)
        adamw.step()

    found: dict[str, Callable[[], Any]] = {FUSED_ADAMW: adamw.step, CLIPPED_ADAMW: clipped_adamw}
    makers: dict[str, Callable[[], Optimizer]] = {
        "torch AdamW foreach": lambda: torch.optim.AdamW(params, foreach=True),
        "hf_lamb fused": lambda: Lamb(params, fused=True),
        "hf_lamb fused, skip_nonfinite=False": lambda: Lamb(params, fused=True, skip_nonfinite=False),
        CLIPPED: lambda: Lamb(params, fused=True, max_grad_norm=1.0),
        "hf_lamb foreach": lambda: Lamb(params, foreach=True),
        "hf_lamb foreach, skip_nonfinite=False": lambda: Lamb(params, foreach=True, skip_nonfinite=False),
        "hf_lamb eager": lambda: Lamb(params, foreach=False),
    }
    found |= {name: make().step for name, make in makers.items() if name not in without}
    versions = {}
    for peer in PEERS:
        if peer.name in without:
            continue
        try:
            optimizer = peer.load()(params, lr=1e-3, weight_decay=0.01, **peer.options)
            optimizer.step()
            versions[peer.distribution] = version(peer.distribution)
        except Exception as error:  # not installed, not built, not for this device or dtype
            print(f"{peer.name} is left out: {str(error).partition(chr(10))[0]}")
            continue
        found[peer.name] = optimizer.step
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


def copied_bytes_per_second(device: str, elements: int) -> float:
    """Read and written by a copy, the best of ten."""
    source = torch.ones(elements, device=device)
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


def rounds_of(calls: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds of each call, which take turns."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in tqdm(range(rounds), desc="rounds"):
        for name, call in calls.items():
            seconds[name].append(seconds_of(call, device))
    return seconds


def steady_rounds(
    calls: dict[str, Callable[[], Any]], rounds: int, attempts: int, device: str, most_apart: float = MOST_APART
) -> dict[str, list[float]]:
    """`rounds_of`, made again while AdamW's two halves differ.

    Raises:
        Unsteady: they did in all attempts.
    """
    for attempt in range(1, attempts + 1):
        seconds = rounds_of(calls, rounds, device)
        of_adamw = seconds[FUSED_ADAMW]
        first, second = (1e3 * min(half) for half in (of_adamw[: rounds // 2], of_adamw[rounds // 2 :]))
        if max(first, second) <= (1 + most_apart) * min(first, second):
            return seconds
        print(
            f"attempt {attempt} of {attempts} is thrown away: AdamW's fastest steps of its two halves took "
            f"{first:.3f} and {second:.3f} ms, more than {most_apart:.0%} apart"
        )
    raise Unsteady(
        f"nothing is recorded: run it again on a quiet machine. In {attempts} attempts AdamW's fastest steps of the "
        f"two halves were more than {most_apart:.0%} apart, the last time {first:.3f} and {second:.3f} ms"
    )


def measure(
    shapes: Iterable[Iterable[int]],
    dtype: torch.dtype,
    rounds: int,
    attempts: int,
    without: Sequence[str] = (),
    most_apart: float = MOST_APART,
    copied: int = 100_000_000,
) -> dict[str, Any]:
    """Of every optimizer, on tensors of these shapes.

    without: names of rows to leave out; copied: elements of the copy that the memory's speed is measured with.

    Raises:
        Unsteady: no attempt was steady.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    params: list[Tensor] = []
    for shape in shapes:
        params.append(nn.Parameter(torch.randn(*shape, device=device, dtype=dtype) * 0.02))
        params[-1].grad = torch.randn_like(params[-1]) * 1e-3
    steps, versions = candidates(params, without)
    for step in steps.values():
        step()  # makes the state
    seconds = steady_rounds(steps, rounds, attempts, device, most_apart)

    elements = sum(param.numel() for param in params)
    rows = {
        name: {
            "milliseconds_min": round(1e3 * min(seconds[name]), 3),
            "milliseconds_median": round(1e3 * median(seconds[name]), 3),
            "ratio_of_minima": round(min(seconds[name]) / min(seconds[FUSED_ADAMW]), 3),
            "ratio_of_medians": round(median(seconds[name]) / median(seconds[FUSED_ADAMW]), 3),
            "scratch_megabytes": round(scratch_bytes(step, device) / 1e6, 1),
        }
        for name, step in steps.items()
    }
    record = {
        **stamp(),
        "dtype": str(dtype).removeprefix("torch."),
        "tensors": len(params),
        "parameters": elements,
        "largest_tensor_megabytes": round(4 * max(param.numel() for param in params) / 1e6, 1),
        "gigabytes_per_second_copy": round(copied_bytes_per_second(device, copied) / 1e9, 1),
        "rounds": rounds,
        "steps": rows,
    }
    record["versions"] |= versions
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=SHAPES, default="bert-base")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of parameters, gradients")
    parser.add_argument("--steps", type=int, default=15, help="counted steps of each optimizer, 11 or more")
    parser.add_argument("--attempts", type=int, default=5, help="how often an unsteady run is made at most")
    parser.add_argument("--output", type=Path, help="a JSON-lines file to add to")
    options = parser.parse_args()
    if options.steps < LEAST_ROUNDS:
        parser.error(f"--steps {options.steps}: give {LEAST_ROUNDS} or more, fewer say too little")
    if options.attempts < 1:
        parser.error(f"--attempts {options.attempts}: give 1 or more")

    try:
        measured = measure(SHAPES[options.shapes](), getattr(torch, options.dtype), options.steps, options.attempts)
    except Unsteady as error:
        sys.exit(f"bench_step: {error}")
    record = {"benchmark": "step", "shapes": options.shapes, **measured}
    print(f"{record['tensors']:,} tensors, {record['parameters']:,} parameters, {options.dtype}, {record['hardware']}")
    for name, row in record["steps"].items():
        print(f"{name:38}", "  ".join(f"{key} {value:10,.2f}" for key, value in row.items()))
    if options.output is not None:
        append_json_line(options.output, record)


if __name__ == "__main__":
    main()
