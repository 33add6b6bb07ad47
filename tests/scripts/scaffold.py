"""What the scripts that run on several processes share: the process group, cases and results, distances."""

import gc
import hashlib
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor
from transformers import Trainer

from recipes.lib.processes import leave_process_group

# A broken variant's process without a piece of a layer thinks that it kept its weights; a NaN counts as infinite.
NOT_MOVED = (math.nan, math.nan, math.nan)
Layers = dict[str, tuple[float, ...]]  # by layer: ‖w‖, ‖u‖, r

# What every LambTrainingArguments of these scripts says.
QUIET: dict[str, Any] = {"report_to": [], "use_cpu": True, "disable_tqdm": True}


# -- processes -------------------------------------------------------------------------------------------------------


@contextmanager
def process_group(init: Callable[..., Any] = dist.init_process_group, **options: Any) -> Iterator[None]:
    """Gloo, one thread a process, and an end to waiting for a process that has failed.

    init: `deepspeed.init_distributed` for DeepSpeed.
    """
    torch.set_num_threads(1)
    init("gloo", timeout=timedelta(seconds=120), **options)
    yield
    gc.collect()  # DDP's reducers before the process group, see recipes.lib.processes
    dist.destroy_process_group()


def from_all(thing: Any) -> list[Any]:
    """What each process has."""
    things = [None] * dist.get_world_size()
    dist.all_gather_object(things, thing)
    return things


def write_results(output: Path, results: Any) -> None:
    """The first process writes them."""
    if dist.get_rank() == 0:
        output.write_text(json.dumps(results))


def write_and_leave(trainer: Trainer, output: Path, results: Any) -> None:
    """The end of a script whose process group, if any, is accelerate's."""
    if trainer.is_world_process_zero():
        output.write_text(json.dumps(results))
    leave_process_group(trainer)


def forget_accelerator() -> None:
    """So that the next Trainer or Accelerator of this process may be of another kind."""
    dist.barrier()
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    os.environ.pop("ACCELERATE_USE_FSDP", None)  # accelerate sets it for good


# -- sharded runs beside unsharded ones ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One training run: how the model is sharded, and the optimizer by its module."""

    mode: str  # with "_fused" at the end of a ModernBERT; its unsharded twin has the fused layers separate
    dtype: str = "float64"
    optimizer: str = "hf_lamb"
    options: dict[str, Any] = field(default_factory=dict)
    clip: float | None = None  # what `clip_grad_norm` gets before each step; torch's of an unsharded run
    nan_at: int | None = None  # the step at which one entry of one gradient is not finite
    mutation: str | None = None

    @property
    def fused(self) -> bool:
        return self.mode.endswith("_fused")

    @property
    def sharding(self) -> str:
        """The mode, whatever the model."""
        return self.mode.removesuffix("_fused")

    def __str__(self) -> str:
        return json.dumps(asdict(self))


def measure_cases(measure: Callable[[Case], dict[str, Any]]) -> None:
    """`python -m SCRIPT CASES.json OUTPUT.json`: what `measure` says of each case, or the line that it failed with."""
    cases, output = map(Path, sys.argv[1:])
    results = []
    for arguments in json.loads(cases.read_text()):
        case = Case(**arguments)
        try:
            results.append({"case": str(case), **measure(case)})
        except Exception as error:  # of other people's optimizers, on all processes alike
            line = f"{type(error).__name__}: {error}".splitlines()[0]
            results.append({"case": str(case), "error": line})
            traceback.print_exc()
    write_results(output, results)


def distances(
    weights: dict[str, Tensor],
    expected_weights: dict[str, Tensor],
    layers: list[Layers],
    expected_layers: list[Layers],
    leave_out: int | None = None,
) -> dict[str, Any]:
    """How far a sharded run is from an unsharded one: the largest of each kind, and whether all processes agree.

    weights: ‖Δ‖/‖w‖ of a tensor after all steps. ratios, norms: relative differences at any step but `leave_out`.
    """
    tensors = [(weights[name].double(), theirs.detach().double()) for name, theirs in expected_weights.items()]
    rows = [
        (mine.get(name, NOT_MOVED), theirs)
        for step, (mine, expected) in enumerate(zip(layers, expected_layers, strict=True))
        if step != leave_out
        for name, theirs in expected.items()
    ]
    digest = hashlib.sha256(b"".join(mine.numpy().tobytes() for mine, _ in tensors)).hexdigest()
    return {
        "weights": _largest(float((mine - theirs).norm() / theirs.norm()) for mine, theirs in tensors),
        "ratios": _largest(_relative(mine[2], theirs[2]) for mine, theirs in rows),
        "norms": _largest(_relative(mine[i], theirs[i]) for mine, theirs in rows for i in (0, 1)),
        "same_weights": len(set(from_all(digest))) == 1,
        "same_layers": all(others == layers for others in from_all(layers)),
    }


def _relative(mine: float, theirs: float) -> float:
    return abs(mine - theirs) / abs(theirs) if theirs else abs(mine)


def _largest(differences: Iterable[float]) -> float | None:
    """None for none; a NaN counts as infinite."""
    return max((d if d == d else float("inf") for d in differences), default=None)
