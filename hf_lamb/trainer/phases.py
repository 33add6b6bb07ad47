"""The next phase of a run: it begins with what another run ended with, on a schedule of its own."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from hf_lamb.scaling import did_you_mean
from hf_lamb.trainer.checkpoints import check_checkpoint
from hf_lamb.trainer.deepspeed import check_deepspeed_checkpoint

if TYPE_CHECKING:
    from hf_lamb.trainer.trainer import LambTrainer

__all__ = ["CARRY_OVER", "PreviousPhase"]

CARRY_OVER = ("moments", "optimizer", "weights")


class PreviousPhase(NamedTuple):
    """What `LambTrainer.start_from` was told."""

    checkpoint: str
    carry_over: str

    def check(self, trainer: LambTrainer) -> None:
        """Refuse what cannot be taken over, as far as it can be told before training starts."""
        if self.carry_over not in CARRY_OVER:
            hint = did_you_mean(self.carry_over, CARRY_OVER)
            raise ValueError(f"carry_over {self.carry_over!r}{hint}: expected one of {', '.join(CARRY_OVER)}")
        if trainer.is_deepspeed_enabled:
            raise ValueError("start_from does not work under DeepSpeed: use DDP or FSDP2 for a run in two phases")
        check_checkpoint(self.checkpoint)
        if self.carry_over != "weights":
            check_deepspeed_checkpoint(Path(self.checkpoint), None, trainer.args.world_size)

    def check_fit(self, trainer: LambTrainer) -> None:
        """Raise for another model or optimizer while nothing is loaded."""
        trainer.check_fit(Path(self.checkpoint), optimizer=self.carry_over != "weights")

    def take_over(self, trainer: LambTrainer) -> None:
        """Load the weights, and of the optimizer's state what is carried over; the schedule stays this run's own."""
        model = trainer.model_wrapped if trainer.is_fsdp_enabled else trainer.model
        trainer._load_from_checkpoint(self.checkpoint, model)
        if self.carry_over == "weights":
            return
        assert trainer.optimizer is not None
        assert trainer.lr_scheduler is not None
        options = [{k: v for k, v in group.items() if k != "params"} for group in trainer.optimizer.param_groups]
        schedule = deepcopy(trainer.lr_scheduler.state_dict())
        trainer._load_optimizer_and_scheduler(self.checkpoint)
        trainer._load_scaler(self.checkpoint)
        for group, own in zip(trainer.optimizer.param_groups, options, strict=True):
            group.update(own)
        trainer.lr_scheduler.load_state_dict(schedule)
        if self.carry_over == "moments":
            for state in trainer.optimizer.state.values():
                if isinstance(state.get("step"), Tensor):
                    state["step"].zero_()
