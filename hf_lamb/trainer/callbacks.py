"""Callbacks that log trust ratios and skipped steps."""

from __future__ import annotations

import logging
from statistics import median
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_lamb.lamb import Lamb
from hf_lamb.trust_ratios import record_trust_ratios, trust_ratio_warnings

__all__ = ["SkippedStepsCallback", "TrustRatioCallback", "trust_ratio_history"]

logger = logging.getLogger(__name__)


def trust_ratio_history(state: TrainerState) -> dict[str, Any]:
    """Return the history of the trust ratios of a run with a `TrustRatioCallback`.

    Checkpoints contain it, so a resumed run continues it: `LambTrainer` writes it to `lamb_state.json`, a stock
    Trainer to `trainer_state.json`.

    Returns:
        `{"steps": [n], "ratios": {name: [n]}, ...}` with n at most 256; `{}` if nothing has been logged.
    """
    kept: Any = state.stateful_callbacks
    history: dict[str, Any] = kept.setdefault("trust_ratios", {"attributes": {}})["attributes"]
    return history


class TrainingLogCallback(TrainerCallback):
    """Base class of callbacks that act when Trainer logs a training line, which is a line with a loss."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        if logs is not None and "loss" in logs:
            self.on_training_log(logs, state, find_lamb(optimizer))

    def on_training_log(self, logs: dict[str, float], state: TrainerState, lamb: Lamb | None) -> None:
        """Add values to the line with `add_to_logs`; `lamb` is None with another optimizer."""
        raise NotImplementedError


class TrustRatioCallback(TrainingLogCallback):
    """Adds `lamb/trust_ratio_min`, `_median` and `_max` over the adapted layers to every training log line.

    It keeps the history of every layer's ratio (`trust_ratio_history`). At the end of the run it logs warnings about
    ratios that stayed unusual (`hf_lamb.trust_ratios.trust_ratio_warnings`).

    `LambTrainer` has one already. In a stock Trainer put it before the reporters, so that TensorBoard and W&B log it
    too: `trainer.callback_handler.callbacks.insert(0, TrustRatioCallback())`. With `trainer.add_callback` only the
    console and `trainer_state.json` have it. With another optimizer than `Lamb` it does nothing.

    Args:
        per_layer: also log `lamb/trust_ratio/NAME` of every adapted parameter. Default False.
    """

    def __init__(self, per_layer: bool = False) -> None:
        self.per_layer = per_layer

    def on_training_log(self, logs: dict[str, float], state: TrainerState, lamb: Lamb | None) -> None:
        """Log minimum, median and maximum of the trust ratios, and record all of them."""
        stats_by_name = {} if lamb is None else lamb.layer_stats(adapted_only=True)
        ratios = {name: stats.trust_ratio for name, stats in stats_by_name.items()}
        if not ratios:
            return
        record_trust_ratios(trust_ratio_history(state), state.global_step, ratios)
        summary = {
            "lamb/trust_ratio_min": min(ratios.values()),
            "lamb/trust_ratio_median": median(ratios.values()),
            "lamb/trust_ratio_max": max(ratios.values()),
        }
        if self.per_layer:
            summary |= {f"lamb/trust_ratio/{name}": ratio for name, ratio in ratios.items()}
        add_to_logs(logs, state, summary)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.should_log:
            for line in trust_ratio_warnings(trust_ratio_history(state)):
                logger.warning(line)


class SkippedStepsCallback(TrainingLogCallback):
    """Adds `lamb/skipped_steps` to the training log lines if there are any, and stops a run that skips all steps.

    `Lamb` changes nothing in a step with a non-finite gradient, but the learning-rate schedule continues. The callback
    reads the count only when Trainer logs, so no step synchronises with the device. `LambTrainer` has one already.

    Args:
        max_in_a_row: raise after this many skipped steps in a row. Default 20.

    Raises:
        RuntimeError: in `on_log`, see `max_in_a_row`.
    """

    def __init__(self, max_in_a_row: int = 20) -> None:
        self.max_in_a_row = max_in_a_row

    def on_training_log(self, logs: dict[str, float], state: TrainerState, lamb: Lamb | None) -> None:
        """Log the number of skipped steps if there are any; raise if there are too many in a row."""
        if lamb is None:
            return
        skipped = lamb.skipped_steps()
        if skipped.total:
            add_to_logs(logs, state, {"lamb/skipped_steps": skipped.total})
        if skipped.in_a_row >= self.max_in_a_row:
            raise RuntimeError(
                "resume from an earlier checkpoint with a lower learning rate or without fp16: the last "
                f"{skipped.in_a_row} steps, up to step {state.global_step}, were skipped, because gradients were inf "
                "or NaN"
            )


def add_to_logs(logs: dict[str, float], state: TrainerState, values: dict[str, float]) -> None:
    """Add values to the current log line, from `on_log`. Trainer has copied `logs` into `log_history` already."""
    logs.update(values)
    state.log_history[-1].update(values)


def find_lamb(optimizer: Any) -> Lamb | None:
    """Return the `Lamb` inside of accelerate's wrappers, or None."""
    while optimizer is not None and not isinstance(optimizer, Lamb):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer
