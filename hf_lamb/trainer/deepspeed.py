"""DeepSpeed checkpoints: resumed as they were written, or refused in a line before anything is loaded."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import TrainOutput

from hf_lamb.trainer.callbacks import find_lamb
from hf_lamb.trainer.checkpoints import CheckpointError

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

        config = self._deepspeed_config()
        instead = config.get("optimizer")
        if instead and self.args.optim == "lamb":
            raise ValueError(
                f"the DeepSpeed configuration's optimizer, {instead.get('type')}, would train in place of "
                'optim="lamb": remove "optimizer" there'
            )
        of_its_own = [name for name in ("base_learning_rate", "decay_power") if getattr(self.args, name, None)]
        if config.get("scheduler") and of_its_own:
            raise ValueError(
                f"the DeepSpeed configuration's scheduler would be in place of {of_its_own[0]}: remove "
                '"scheduler" there'
            )

    def _deepspeed_config(self) -> dict[str, Any]:
        plugin = self.accelerator.state.deepspeed_plugin if self.is_deepspeed_enabled else None
        return getattr(plugin, "deepspeed_config", None) or {}

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As Trainer's, with a look at the checkpoint before anything of it is loaded."""
        if resume_from_checkpoint and isinstance(resume_from_checkpoint, (str, os.PathLike)):
            stage = self._deepspeed_config()["zero_optimization"]["stage"] if self.is_deepspeed_enabled else None
            check_deepspeed_checkpoint(Path(resume_from_checkpoint), stage, self.args.world_size)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None, *args: Any, **kwargs: Any
    ) -> Any:
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
