"""DeepSpeed checkpoints: resumed as they were written, or refused in a line before anything is loaded."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from transformers import Trainer

from hf_lamb.callbacks import find_lamb
from hf_lamb.checkpoints import CheckpointError

__all__ = ["ZeroTrainer", "check_deepspeed_checkpoint"]

logger = logging.getLogger(__name__)


class ZeroTrainer(Trainer):
    """`transformers.Trainer` that refuses a checkpoint whose optimizer state would be lost, or DeepSpeed cannot read.

    Trainer goes on without the state where one side is DeepSpeed and the other is not; DeepSpeed stops with assertions
    about its own files where stage or number of processes are others. It warns where DeepSpeed was asked for and
    accelerate trains without it.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        wanted = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
        if wanted and not self.is_deepspeed_enabled and self.args.should_log:
            logger.warning(
                "this run was launched with DeepSpeed, but accelerate trains without it, as it does where "
                "ACCELERATE_USE_CPU is set: unset that, DeepSpeed finds the CPU by itself"
            )

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None, *args: Any, **kwargs: Any
    ) -> Any:
        if resume_from_checkpoint is not None:
            config = self.accelerator.state.deepspeed_plugin.deepspeed_config if self.is_deepspeed_enabled else {}
            stage = config["zero_optimization"]["stage"] if config else None
            check_deepspeed_checkpoint(Path(resume_from_checkpoint), stage, self.args.world_size)
        prepared = super()._prepare_for_training(  # type: ignore[no-untyped-call]
            max_steps, train_dataloader, resume_from_checkpoint, *args, **kwargs
        )
        lamb = find_lamb(self.optimizer)
        if resume_from_checkpoint is not None and self.is_deepspeed_enabled and lamb is not None and not lamb.state:
            raise CheckpointError(
                f"{resume_from_checkpoint} has been read by DeepSpeed, but not LAMB's state: resume with the "
                "precision (bf16, fp16 or neither) it was saved with"
            )
        return prepared


def check_deepspeed_checkpoint(checkpoint: Path, stage: int | None, processes: int) -> None:
    """Raise CheckpointError unless a run with this stage of ZeRO (None: without DeepSpeed) can go on from here."""
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
