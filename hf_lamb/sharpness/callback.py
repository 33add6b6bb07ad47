"""A callback that logs sharpness and loss while Trainer trains, as in Keskar's figure 6. Needs transformers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from hf_lamb.lamb import Lamb
from hf_lamb.sharpness.ascent import adaptive_sharpness, epsilon_sharpness
from hf_lamb.sharpness.objective import LossFn, labels_loss, refuse_sharded
from hf_lamb.trainer.callbacks import TrainingLogCallback, add_to_logs

__all__ = ["SharpnessCallback"]


class SharpnessCallback(TrainingLogCallback):
    """Adds `sharpness/loss`, `sharpness/adaptive` and `sharpness/epsilon` to the log every `interval` steps.

    It measures on fixed batches, in eval mode and float32. It changes no weight, gradient or random number generator,
    so the run gives the same result to the bit with or without it. It makes Trainer log at each measurement.
    `hf_lamb.sharpness.compare` and the command line draw the curves from the `trainer_state.json` of a checkpoint.

    With several processes each one measures on its share of the batches. FSDP and ZeRO-3 are not supported. In a stock
    Trainer the console and `trainer_state.json` have the values; for TensorBoard and W&B put the callback before the
    reporters: `trainer.callback_handler.callbacks.insert(0, SharpnessCallback(...))`.

    Args:
        batches: a list of batches, the same on every process. `fixed_batches` makes one with constant masks.
        interval: optimizer steps between measurements. Each measurement makes 2 * (`steps` + 1) passes over the
            batches.
        loss_fn: see `epsilon_sharpness`. Default `labels_loss`, the model's own loss.
        rho: see `adaptive_sharpness`. Default 1e-2.
        epsilon: see `epsilon_sharpness`. Default 1e-3.
        steps: see both. Default 20.

    Raises:
        ValueError: in the constructor, if there are no batches or the interval is below 1.
        hf_lamb.ShardingError: in `on_train_begin`, if parameters are sharded.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        interval: int,
        loss_fn: LossFn = labels_loss,
        *,
        rho: float = 1e-2,
        epsilon: float = 1e-3,
        steps: int = 20,
    ) -> None:
        self.batches = list(batches)
        if not self.batches:
            raise ValueError("SharpnessCallback: no batches; pass a list of batches, such as fixed_batches returns")
        if isinstance(interval, bool) or not isinstance(interval, int) or interval < 1:
            raise ValueError(f"SharpnessCallback: interval={interval!r}: expected a whole number of steps, at least 1")
        self.interval = interval
        self.loss_fn = loss_fn
        self.rho, self.epsilon, self.steps = rho, epsilon, steps
        self._measured: dict[str, float] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        refuse_sharded(model)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if state.global_step % self.interval and state.global_step != state.max_steps:
            return
        self._measured = self._measure(model)
        control.should_log = True

    def on_training_log(self, logs: dict[str, float], state: TrainerState, lamb: Lamb | None) -> None:
        """Log the last measurement, once, with any optimizer."""
        add_to_logs(logs, state, self._measured)
        self._measured = {}

    def _measure(self, model: nn.Module) -> dict[str, float]:
        group, batches = None, self.batches
        if dist.is_initialized() and dist.get_world_size() > 1:
            group, batches = dist.group.WORLD, self.batches[dist.get_rank() :: dist.get_world_size()]
        adaptive = adaptive_sharpness(model, self.loss_fn, batches, self.rho, steps=self.steps, process_group=group)
        box = epsilon_sharpness(model, self.loss_fn, batches, self.epsilon, steps=self.steps, process_group=group)
        return {
            "sharpness/loss": adaptive.loss,
            "sharpness/adaptive": adaptive.value,
            "sharpness/epsilon": box.value,
        }
