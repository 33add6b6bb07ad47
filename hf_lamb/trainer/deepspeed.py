"""Checks of DeepSpeed's configuration and checkpoints, before anything is loaded."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from transformers import Trainer

from hf_lamb.trainer.callbacks import find_lamb
from hf_lamb.trainer.checkpoints import CheckpointError

__all__ = ["check_configuration", "check_deepspeed_checkpoint", "check_state_was_loaded", "stage_of"]

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


def check_state_was_loaded(trainer: Trainer, checkpoint: str) -> None:
    """Raise CheckpointError if DeepSpeed has read the checkpoint but not loaded LAMB's state."""
    lamb = find_lamb(trainer.optimizer)
    if trainer.is_deepspeed_enabled and lamb is not None and not lamb.state:
        raise CheckpointError(
            f"resume {checkpoint} with the precision (bf16, fp16 or neither) it was saved with: DeepSpeed has not "
            "loaded LAMB's state"
        )


def check_deepspeed_checkpoint(checkpoint: Path, stage: int | None, processes: int) -> None:
    """Check that a run can resume from this checkpoint, as far as DeepSpeed matters.

    Without this check, Trainer would continue without the optimizer's state if only the run or only the checkpoint is
    DeepSpeed's, and DeepSpeed would stop with an assertion if the stage or the number of processes differs.

    Args:
        checkpoint: the folder.
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
    if any(folder.glob("zero_pp_rank_*_model_states.pt")):
        stages = "ZeRO-3"
    else:
        stages = "ZeRO-1 or 2" if written_by else "ZeRO-0"
    if str(stage) not in stages:
        raise CheckpointError(
            f"resume {checkpoint} with DeepSpeed {stages}: DeepSpeed cannot convert it for this run's ZeRO-{stage}"
        )
