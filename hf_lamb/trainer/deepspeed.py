"""Checks of DeepSpeed's configuration, and of its checkpoints before and after they are loaded."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import transformers.trainer
from transformers import Trainer

from hf_lamb.trainer.callbacks import find_lamb
from hf_lamb.trainer.checkpoints import CheckpointError, refusing_another_model, refusing_another_optimizer
from hf_lamb.trainer.loss import attributes

__all__ = ["check_configuration", "check_deepspeed_checkpoint", "checking_what_deepspeed_loads", "stage_of"]

logger = logging.getLogger(__name__)


def check_configuration(trainer: Trainer) -> None:
    """Check that the DeepSpeed configuration does not override the training arguments.

    It warns if the run was launched with DeepSpeed but accelerate trains without it.

    Raises:
        ValueError: the configuration has an optimizer or a scheduler that would replace the one of the arguments.
    """
    args = trainer.args
    wanted = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if wanted and not trainer.is_deepspeed_enabled and args.should_log:
        logger.warning(
            "unset ACCELERATE_USE_CPU, DeepSpeed finds the CPU without it: this run was launched with DeepSpeed, but "
            "accelerate trains without it when that variable is set"
        )

    config = configuration_of(trainer)
    other = config.get("optimizer")
    if other and args.optim == "lamb":
        raise ValueError(
            f'remove "optimizer" from the DeepSpeed configuration: its {other.get("type")} would replace optim="lamb"'
        )
    ours = [name for name in ("base_learning_rate", "decay_power") if getattr(args, name, None)]
    if config.get("scheduler") and ours:
        raise ValueError(f'remove "scheduler" from the DeepSpeed configuration: it would override {ours[0]}')


def configuration_of(trainer: Trainer) -> dict[str, Any]:
    """Return DeepSpeed's configuration; empty in a run without DeepSpeed."""
    plugin = trainer.accelerator.state.deepspeed_plugin if trainer.is_deepspeed_enabled else None
    return getattr(plugin, "deepspeed_config", None) or {}


def stage_of(trainer: Trainer) -> int | None:
    """Return the stage of ZeRO; None in a run without DeepSpeed."""
    return configuration_of(trainer)["zero_optimization"]["stage"] if trainer.is_deepspeed_enabled else None


@contextmanager
def checking_what_deepspeed_loads(trainer: Trainer) -> Iterator[None]:
    """Check the checkpoint that transformers makes DeepSpeed load in this block: it has no hook of its own for that.

    Raises:
        CheckpointError: the checkpoint has another model, optimizer or precision.
    """
    stock: Any = transformers.trainer.deepspeed_load_checkpoint  # type: ignore[attr-defined]

    def load(engine: Any, checkpoint: str, *args: Any, **kwargs: Any) -> None:
        misfit = (
            f"resume {checkpoint} with the optimizer and precision (bf16, fp16 or neither) it was saved with: "
            "DeepSpeed has not loaded the optimizer's state"
        )
        try:
            with refusing_another_model(checkpoint), refusing_another_optimizer(checkpoint, trainer.optimizer):
                stock(engine, checkpoint, *args, **kwargs)
        except (FileNotFoundError, KeyError) as error:  # names of files and entries depend on the precision
            missing = getattr(error, "filename", None) or error.args[0]
            raise CheckpointError(f"{misfit} (it has no {missing})") from error
        lamb = find_lamb(trainer.optimizer)
        if lamb is not None and not any(lamb.state.values()):
            raise CheckpointError(misfit)

    with attributes(transformers.trainer, deepspeed_load_checkpoint=load):
        yield


def check_deepspeed_checkpoint(checkpoint: Path, stage: int | None, processes: int) -> None:
    """Check that a run can resume from this checkpoint, as far as DeepSpeed matters.

    Without this check, Trainer would continue without the optimizer's state if only the run or only the checkpoint is
    DeepSpeed's, and DeepSpeed would stop with an assertion if the stage or the number of processes differs.

    Args:
        checkpoint: the folder, which is complete (`check_checkpoint`).
        stage: the run's stage of ZeRO; None without DeepSpeed.
        processes: the run's number of processes.

    Raises:
        CheckpointError: the run cannot resume from this checkpoint.
    """
    if not (checkpoint / "latest").is_file():
        if stage is not None:
            raise CheckpointError(
                f"resume {checkpoint} without DeepSpeed (DDP or FSDP2): DeepSpeed did not write it and cannot read it"
            )
        return
    if stage is None:
        raise CheckpointError(
            f"resume {checkpoint} with the DeepSpeed configuration it was written with: only DeepSpeed can read its "
            "optimizer's state"
        )
    folder = checkpoint / (checkpoint / "latest").read_text().strip()
    written_by = len(list(folder.glob("*_optim_states.pt")))
    if written_by not in (0, processes):
        raise CheckpointError(
            f"resume {checkpoint} on {written_by} processes: DeepSpeed ZeRO cannot change their number, and this run "
            f"has {processes}"
        )
    stages = {1, 2} if written_by else {0}
    if any(folder.glob("zero_pp_rank_*_model_states.pt")):
        stages = {3}
    if stage not in stages:
        fitting = " or ".join(map(str, sorted(stages)))
        raise CheckpointError(
            f"resume {checkpoint} with DeepSpeed ZeRO-{fitting}: DeepSpeed cannot convert it for this run's "
            f"ZeRO-{stage}"
        )
