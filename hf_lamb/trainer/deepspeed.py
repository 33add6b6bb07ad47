"""DeepSpeed checkpoints: resumed as they were written, or refused in a line before anything is loaded."""

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
    """Refuse a DeepSpeed configuration that would train with something else than was asked for.

    Warns where DeepSpeed was asked for and accelerate trains without it.
    """
    args = trainer.args
    wanted = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    if wanted and not trainer.is_deepspeed_enabled and args.should_log:
        logger.warning(
            "this run was launched with DeepSpeed, but accelerate trains without it, as it does where "
            "ACCELERATE_USE_CPU is set: unset that, DeepSpeed finds the CPU by itself"
        )

    config = configuration_of(trainer)
    instead = config.get("optimizer")
    if instead and args.optim == "lamb":
        raise ValueError(
            f"the DeepSpeed configuration's optimizer, {instead.get('type')}, would train in place of "
            'optim="lamb": remove "optimizer" there'
        )
    of_its_own = [name for name in ("base_learning_rate", "decay_power") if getattr(args, name, None)]
    if config.get("scheduler") and of_its_own:
        raise ValueError(
            f'the DeepSpeed configuration\'s scheduler would be in place of {of_its_own[0]}: remove "scheduler" there'
        )


def configuration_of(trainer: Trainer) -> dict[str, Any]:
    """The configuration of DeepSpeed; empty in a run without it."""
    plugin = trainer.accelerator.state.deepspeed_plugin if trainer.is_deepspeed_enabled else None
    return getattr(plugin, "deepspeed_config", None) or {}


def stage_of(trainer: Trainer) -> int | None:
    """The stage of ZeRO; None in a run without DeepSpeed."""
    return configuration_of(trainer)["zero_optimization"]["stage"] if trainer.is_deepspeed_enabled else None


def check_state_was_loaded(trainer: Trainer, checkpoint: str) -> None:
    """Raise CheckpointError if DeepSpeed has read the checkpoint and left LAMB's state out."""
    lamb = find_lamb(trainer.optimizer)
    if trainer.is_deepspeed_enabled and lamb is not None and not lamb.state:
        raise CheckpointError(
            f"{checkpoint} has been read by DeepSpeed, but not LAMB's state: resume with the precision (bf16, fp16 or "
            "neither) it was saved with"
        )


def check_deepspeed_checkpoint(checkpoint: Path, stage: int | None, processes: int) -> None:
    """Raise CheckpointError unless a run with this stage of ZeRO (None: without DeepSpeed) can go on from here.

    Trainer goes on without the optimizer's state where one side is DeepSpeed and the other is not; DeepSpeed stops
    with assertions about its own files where stage or number of processes are others.
    """
    if not (checkpoint / "latest").is_file():
        if stage is not None:
            raise CheckpointError(
                f"{checkpoint} was not written under DeepSpeed, which cannot read it: resume it without (DDP or FSDP2)"
            )
        return
    if stage is None:
        raise CheckpointError(
            f"{checkpoint} was written under DeepSpeed, which alone can read its optimizer's state: resume it with "
            "the same configuration of DeepSpeed"
        )
    folder = checkpoint / (checkpoint / "latest").read_text().strip()
    written_by = len(list(folder.glob("*_optim_states.pt")))
    if written_by not in (0, processes):
        raise CheckpointError(
            f"{checkpoint} was written under DeepSpeed ZeRO on {written_by} processes, this run has {processes}: "
            f"DeepSpeed cannot divide it anew, so resume on {written_by}"
        )
    if any(folder.glob("zero_pp_rank_*_model_states.pt")):
        stages = "ZeRO-3"
    else:
        stages = "ZeRO-1 or 2" if written_by else "ZeRO-0"
    if str(stage) not in stages:
        raise CheckpointError(
            f"{checkpoint} was written under DeepSpeed {stages}, this run has ZeRO-{stage}: DeepSpeed cannot turn one "
            f"into the other, so resume with {stages}"
        )
