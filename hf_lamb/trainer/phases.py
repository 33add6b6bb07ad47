"""The next phase of a run: it begins with what another run ended with, on a schedule of its own."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hf_lamb.scaling import near
from hf_lamb.trainer.checkpoints import WholeCheckpointTrainer, check_checkpoint
from hf_lamb.trainer.deepspeed import check_deepspeed_checkpoint

__all__ = ["CARRY_OVER", "PhaseTrainer"]

CARRY_OVER = ("moments", "optimizer", "weights")


class PhaseTrainer(WholeCheckpointTrainer):
    """`transformers.Trainer` that can begin where another run ended: BERT's second phase, with longer sequences."""

    _previous: tuple[str, str] | None = None  # the checkpoint, and what to take over

    def start_from(self, checkpoint: str, carry_over: str = "moments") -> None:
        """Let `train()` begin with the weights, and with the optimizer's state, of a checkpoint of another run.

        Steps, learning rate and its schedule, warm-up, weight decay, data order and random numbers are this run's
        own. A run that resumes from a checkpoint of its own takes that one instead.

        checkpoint: of the same architecture, and of the same optimizer unless only weights are taken; written by
            one process or DDP or FSDP2, on any number of processes.
        carry_over: "moments": the moments, with their step count set to 0, so that the bias correction starts anew;
            as in NVIDIA's recipe; "optimizer": the step count too; "weights": no state of the optimizer. Default
            "moments".

        Raises:
            ValueError: an unknown carry_over; DeepSpeed, whose checkpoints cannot be taken over in part.
            CheckpointError: no complete checkpoint there; when training starts, one of another model or optimizer.

        Source: https://github.com/NVIDIA/DeepLearningExamples/blob/master/PyTorch/LanguageModeling/BERT/run_pretraining.py
        """
        if carry_over not in CARRY_OVER:
            hint = near(carry_over, CARRY_OVER)
            raise ValueError(f"carry_over {carry_over!r}{hint}: expected one of {', '.join(CARRY_OVER)}")
        if self.is_deepspeed_enabled:
            raise ValueError("start_from does not work under DeepSpeed: use DDP or FSDP2 for a run in two phases")
        check_checkpoint(checkpoint)
        if carry_over != "weights":
            check_deepspeed_checkpoint(Path(checkpoint), None, self.args.world_size)
        self._previous = checkpoint, carry_over

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        if self._previous is not None and resume_from_checkpoint is None:
            checkpoint, carry_over = self._previous
            self.check_fit(Path(checkpoint), optimizer=carry_over != "weights")
        prepared = super()._prepare_for_training(  # type: ignore[no-untyped-call]
            max_steps, train_dataloader, resume_from_checkpoint
        )
        if self._previous is not None and resume_from_checkpoint is None:
            self._take_over(*self._previous)
        return prepared

    def _take_over(self, checkpoint: str, carry_over: str) -> None:
        model: nn.Module | None = self.model_wrapped if self.is_fsdp_enabled else self.model
        self._load_from_checkpoint(checkpoint, model)
        if carry_over == "weights":
            return
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        options = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        schedule = deepcopy(self.lr_scheduler.state_dict())
        self._load_optimizer_and_scheduler(checkpoint)
        self._load_scaler(checkpoint)
        for group, own in zip(self.optimizer.param_groups, options, strict=True):
            group.update(own)
        self.lr_scheduler.load_state_dict(schedule)
        if carry_over == "moments":
            for state in self.optimizer.state.values():
                if isinstance(state.get("step"), Tensor):
                    state["step"].zero_()
