"""Sharpness against loss while Trainer trains: Keskar's figure 6. Needs transformers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_lamb.sharpness.ascent import adaptive_sharpness, epsilon_sharpness
from hf_lamb.sharpness.objective import LossFn, labels_loss, refuse_sharded
from hf_lamb.trainer.callbacks import add_to_logs

__all__ = ["SharpnessCallback"]


class SharpnessCallback(TrainerCallback):
    """Adds `sharpness/loss`, `sharpness/adaptive` and `sharpness/epsilon` to the log every `interval` steps.

    On fixed batches, in eval mode and float32; weights, gradients and random numbers of the training are left as they
    are, bit for bit, so a run with this callback is the run without it. `hf_lamb.sharpness.compare` and the command
    line draw the curves from the `trainer_state.json` of a checkpoint. A logging step is added where one measures.

    In a run on several processes each takes its share of the batches. FSDP and ZeRO-3 are refused when training
    starts. With a stock Trainer it reaches the console and `trainer_state.json`; for TensorBoard and W&B put it before
    the reporters: `trainer.callback_handler.callbacks.insert(0, SharpnessCallback(...))`.

    Args:
        batches: a list of batches, the same on every process; `fixed_batches` makes one with masks that stay.
        interval: optimizer steps between measurements, each of 2 * (`steps` + 1) passes over the batches.
        loss_fn: default `labels_loss`, the model's own.
        rho, epsilon, steps: of `adaptive_sharpness` and `epsilon_sharpness`.

    Raises:
        ValueError: in the constructor, for no batches or an interval below 1. ShardingError: in `on_train_begin`.
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
            raise ValueError("SharpnessCallback: no batches; pass a list, as fixed_batches makes it")
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

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
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
