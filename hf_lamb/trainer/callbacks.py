"""Trust ratios and skipped steps in the logs."""

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
    """Of a run with a `TrustRatioCallback`: `steps`, `[n]`, and `ratios`, name to `[n]`, n at most 256; or `{}`.

    It is in the checkpoints, so that a resumed run goes on with it: in `lamb_state.json`, and of a stock Trainer in
    `trainer_state.json`.
    """
    kept: Any = state.stateful_callbacks
    history: dict[str, Any] = kept.setdefault("trust_ratios", {"attributes": {}})["attributes"]
    return history


class TrustRatioCallback(TrainerCallback):
    """Adds `lamb/trust_ratio_min`, `_median` and `_max` over the adapted layers to every training log line.

    Keeps every layer's ratio beside (`trust_ratio_history`), and at the end of the run warns in words of what has
    stayed out of the ordinary (`hf_lamb.trust_ratios.trust_ratio_warnings`).

    `LambTrainer` has one. With a stock Trainer it must come before the reporters, which Trainer puts first, to reach
    TensorBoard and W&B too: `trainer.callback_handler.callbacks.insert(0, TrustRatioCallback())`; added in the
    ordinary way it reaches the console and `trainer_state.json`. With another optimizer it does nothing.

    Args:
        per_layer: also log `lamb/trust_ratio/NAME` of every adapted parameter. Default False.
    """

    def __init__(self, per_layer: bool = False) -> None:
        self.per_layer = per_layer

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        lamb = find_lamb(optimizer)
        if logs is None or "loss" not in logs or lamb is None:
            return
        ratios = {name: stats.trust_ratio for name, stats in lamb.layer_stats(adapted_only=True).items()}
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


class SkippedStepsCallback(TrainerCallback):
    """Adds `lamb/skipped_steps` to the training log lines once there are any, and ends a run that only skips.

    LAMB leaves everything as it is when a gradient is not finite; the learning-rate schedule goes on all the same.
    Looked at when Trainer logs, so that no step waits for the device. `LambTrainer` has one.

    Args:
        max_in_a_row: so many skipped steps without a single good one between them raise. Default 20.

    Raises:
        RuntimeError: in `on_log`, see above.
    """

    def __init__(self, max_in_a_row: int = 20) -> None:
        self.max_in_a_row = max_in_a_row

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        lamb = find_lamb(optimizer)
        if logs is None or "loss" not in logs or lamb is None:
            return
        skipped = lamb.skipped_steps()
        if skipped.total:
            add_to_logs(logs, state, {"lamb/skipped_steps": skipped.total})
        if skipped.in_a_row >= self.max_in_a_row:
            raise RuntimeError(
                f"the last {skipped.in_a_row} steps, up to step {state.global_step}, were skipped, because gradients "
                "were inf or NaN: resume from an earlier checkpoint with a lower learning rate or without fp16"
            )


def add_to_logs(logs: dict[str, float], state: TrainerState, values: dict[str, float]) -> None:
    """Log these in the line at hand: from `on_log`, before which Trainer has copied `logs` into `log_history`."""
    logs.update(values)
    state.log_history[-1].update(values)


def find_lamb(optimizer: Any) -> Lamb | None:
    """The Lamb inside what accelerate wrapped round it."""
    while optimizer is not None and not isinstance(optimizer, Lamb):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer
