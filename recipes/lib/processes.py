"""The processes of a run: how they share a batch, what runs, their output folder, and how they end."""

import errno
import fcntl
import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from transformers import Trainer

LOCK = ".lock"


def check_connected(world_size: int) -> None:
    """Raise where the launched processes would not train together.

    Without --use_cpu, accelerate lets each process on a CPU train a model of its own, and does not warn.
    """
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != world_size:
        raise ValueError(
            f"{launched} processes were launched, but each sees {world_size}: add --use_cpu, or a GPU each"
        )


def be_one_process() -> bool:
    """Make this process a run of its own on its own device: those of torchrun meet in the folder only.

    Returns whether it is the first one.
    """
    first, local = os.environ.get("RANK", "0") == "0", int(os.environ.get("LOCAL_RANK", 0))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    if devices := torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(devices)))
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[local % devices]
    return first


# ---- The batch ------------------------------------------------------------------------------------------------------


def micro_batch_of(global_batch: int, devices: int, most: int = 32) -> int:
    """The largest micro-batch, up to `most`, that makes up the global batch on these devices; `most` if none does."""
    fitting = _fitting(global_batch, devices, most)
    return fitting[-1] if fitting else min(most, max(global_batch, 1))


def accumulation_of(global_batch: int, micro_batch: int, devices: int) -> int:
    """The accumulation steps. Raises ValueError, with numbers that fit, where there is no whole number of them."""
    at_once = micro_batch * devices
    if min(global_batch, at_once) >= 1 and global_batch % at_once == 0:
        return global_batch // at_once
    fitting = [size for size in _fitting(global_batch, devices, max(micro_batch, 1))[-2:]]
    lower = global_batch // at_once * at_once if at_once > 0 else 0
    batches = [str(batch) for batch in (lower, lower + at_once) if batch > 0]
    remedies = [f"--per_device_train_batch_size {' or '.join(map(str, fitting))}"] if fitting else []
    remedies.append(f"--global_batch_size {' or '.join(batches)}")
    raise ValueError(
        f"--global_batch_size {global_batch} is no multiple of {at_once} = {micro_batch} "
        f"(--per_device_train_batch_size) x {devices} processes: give {', or '.join(remedies)}"
    )


def _fitting(global_batch: int, devices: int, most: int) -> list[int]:
    share, rest = divmod(global_batch, devices)
    return [] if rest else [size for size in range(1, min(most, share) + 1) if share % size == 0]


# ---- What runs ------------------------------------------------------------------------------------------------------


def kind_of(accelerator: Accelerator) -> str:
    """For example "2 processes, DDP, bf16", of what really runs."""
    kinds = {DistributedType.FSDP: "FSDP", DistributedType.DEEPSPEED: "DeepSpeed ZeRO-"}
    kind = kinds.get(accelerator.distributed_type, "DDP")
    if kind == "FSDP":
        kind += str(getattr(accelerator.state.fsdp_plugin, "fsdp_version", 1))
    elif accelerator.distributed_type == DistributedType.DEEPSPEED:
        kind += str(accelerator.state.deepspeed_plugin.zero_stage)
    count = accelerator.num_processes
    words = [f"{count} processes, {kind}" if count > 1 or kind != "DDP" else "1 process"]
    return ", ".join([*words, precision_of(accelerator)])


def precision_of(accelerator: Accelerator) -> str:
    """fp32, bf16, fp16 or fp8. accelerate computes in float32 on a CPU when asked for fp16."""
    on = accelerator.native_amp or accelerator.distributed_type == DistributedType.DEEPSPEED
    return accelerator.mixed_precision if on and accelerator.mixed_precision != "no" else "fp32"


def asked_for_and_off(accelerator: Accelerator, precision: str | None = None) -> list[str]:
    """A line for each thing that the launcher or the command line asked for and that is off.

    precision: what the command line asked for; default that of `accelerate launch`.
    """
    lines = []
    asked = precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", "fp32", runs := precision_of(accelerator)):
        lines.append(f"{asked} was asked for, and is off: this trains in {runs} on {accelerator.device.type}")
    sharding = {
        "ACCELERATE_USE_FSDP": (DistributedType.FSDP, f"FSDP{os.environ.get('FSDP_VERSION', 1)}"),
        "ACCELERATE_USE_DEEPSPEED": (DistributedType.DEEPSPEED, "DeepSpeed"),
    }
    for variable, (kind, name) in sharding.items():
        if os.environ.get(variable, "").lower() == "true" and accelerator.distributed_type != kind:
            lines.append(f"{name} was asked for, and is off: it needs GPUs here, so that nothing is sharded")
    if (count := launched_by_accelerate()) > accelerator.num_processes:
        lines.append(
            f"{count} processes were asked for, and {accelerator.num_processes} runs: accelerate launch --cpu starts "
            f"one, torchrun --nproc_per_node {count} starts as many"
        )
    return lines


def launched_by_accelerate() -> int:
    """The processes that `accelerate launch`, if it is the parent, was told to start; else 0.

    With --cpu it starts a single one, and leaves no trace of that in the environment.
    """
    with suppress(psutil.Error, OSError, ValueError, SystemExit, TypeError):
        words = psutil.Process().parent().cmdline()
        index = next((i for i, word in enumerate(words) if word in ("launch", "accelerate.commands.launch")), None)
        if index is None or not any("accelerate" in word for word in words[: index + 1]):
            return 0
        options, _ = launch_command_parser().parse_known_args(words[index + 1 :])
        count = options.num_processes
        if count is None and options.config_file:
            count = load_config_from_file(options.config_file).num_processes
        return count or 0
    return 0


def autocast(device: torch.device) -> Any:
    """bfloat16 on accelerators; plain float32 on CPUs."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu")


# ---- The output folder ----------------------------------------------------------------------------------------------


def make_output_dir(output_dir: str) -> None:
    """Raise before the training where its results cannot be written."""
    try:
        os.makedirs(output_dir, exist_ok=True)
        TemporaryFile(dir=output_dir).close()
    except OSError as error:
        raise ValueError(f"cannot write to --output_dir {output_dir} ({error.strerror}): name another") from None


@contextmanager
def only_run_in(output_dirs: Sequence[str], is_main_process: bool) -> Iterator[None]:
    """Make the folders and lock them against other runs; raises ValueError where another run has locked one.

    The lock is the kernel's, on a file `.lock`. It ends with the process that holds it, also when that is killed;
    processes that it starts do not inherit it. On a file system without locks nothing is locked.
    """
    held: list[tuple[Path, int]] = []
    try:
        for output_dir in output_dirs:
            make_output_dir(output_dir)
            if is_main_process:
                held.append(_lock(Path(output_dir, LOCK)))
        yield
    finally:
        for path, descriptor in held:
            path.unlink(missing_ok=True)
            os.close(descriptor)


def _lock(path: Path) -> tuple[Path, int]:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                os.close(descriptor)
                raise ValueError(
                    f"another run is training into {path.parent}: wait for it, stop it, or name another --output_dir"
                ) from None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return path, descriptor
        os.close(descriptor)  # the run that held it has just ended and removed the file: try again


# ---- The end --------------------------------------------------------------------------------------------------------


def free(trainer: Trainer) -> None:
    """Free the memory of a trainer that is no longer needed, and its DDP wrapper."""
    assert trainer.model is not None
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()
    gc.collect()


def leave_process_group(trainer: Trainer) -> None:
    """Call it at the end of a script: without it gloo may abort while the interpreter ends.

    DDP goes first. Where its reducer is the last to hold the process group, the two may wait for each other for ever:
    ~ProcessGroupGloo joins a thread that waits for the interpreter's lock, which the reducer's destructor holds (seen
    with torch 2.11).
    """
    free(trainer)
    trainer.accelerator.end_training()
