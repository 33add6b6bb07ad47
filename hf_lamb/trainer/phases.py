"""A phase that starts with the weights and moments of another run, on its own schedule."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from hf_lamb.scaling import did_you_mean
from hf_lamb.trainer.checkpoints import check_checkpoint
from hf_lamb.trainer.deepspeed import check_deepspeed_checkpoint

if TYPE_CHECKING:
    from hf_lamb.trainer.trainer import LambTrainer

__all__ = ["CARRY_OVER", "PreviousPhase"]

CARRY_OVER = ("moments", "optimizer", "weights")


class NoSchedule:
    """Takes the place of a schedule that is not loaded: the checkpoint's may be of another kind."""

    def load_state_dict(self, state: Any) -> None:
        """Load nothing."""


class PreviousPhase(NamedTuple):
    """The arguments of `LambTrainer.start_from`."""

    checkpoint: str
    carry_over: str

    def check(self, trainer: LambTrainer) -> None:
        """Check everything that can be checked before training starts.

        Raises:
            ValueError: `carry_over` is unknown, or the run uses DeepSpeed.
            CheckpointError: the checkpoint is missing, incomplete or DeepSpeed's.
        """
        if self.carry_over not in CARRY_OVER:
            hint = did_you_mean(self.carry_over, CARRY_OVER)
            raise ValueError(f"carry_over {self.carry_over!r}{hint}: expected one of {', '.join(CARRY_OVER)}")
        if trainer.is_deepspeed_enabled:
            raise ValueError("use DDP or FSDP2 for a run in two phases: start_from does not work under DeepSpeed")
        check_checkpoint(self.checkpoint)
        if self.carry_over != "weights":
            check_deepspeed_checkpoint(Path(self.checkpoint), None, trainer.args.world_size)

    def check_fit(self, trainer: LambTrainer) -> None:
        """Raise CheckpointError if the checkpoint has another model or optimizer; load nothing."""
        trainer.check_fit(Path(self.checkpoint), optimizer=self.carry_over != "weights")

    def take_over(self, trainer: LambTrainer) -> None:
        """Load the weights and the state of the optimizer that `carry_over` names; keep this run's schedule."""
        model = trainer.model_wrapped if trainer.is_fsdp_enabled else trainer.model
        trainer._load_from_checkpoint(self.checkpoint, model)
        if self.carry_over == "weights":
            return
        assert trainer.optimizer is not None
        options = [{k: v for k, v in group.items() if k != "params"} for group in trainer.optimizer.param_groups]
        schedule, nothing = trainer.lr_scheduler, NoSchedule()
        trainer.lr_scheduler = nothing  # type: ignore[assignment]
        try:
            with warnings.catch_warnings():
                # It would be the contrary of what happens: this run's layers stay, as all of its options do.
                warnings.filterwarnings("ignore", "Lamb: this run keeps its checkpoint's layers")
                trainer._load_optimizer_and_scheduler(self.checkpoint)
        finally:
            trainer.lr_scheduler = schedule
        trainer._load_scaler(self.checkpoint)
        for group, own in zip(trainer.optimizer.param_groups, options, strict=True):
            group.pop("split", None)
            group.update(own)
        if self.carry_over == "moments":
            for state in trainer.optimizer.state.values():
                if isinstance(state.get("step"), Tensor):
                    state["step"].zero_()
