"""Trust ratios in the logs."""

from __future__ import annotations

from statistics import median
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_lamb.lamb import Lamb

__all__ = ["TrustRatioCallback"]


class TrustRatioCallback(TrainerCallback):
    """Adds `lamb/trust_ratio_min`, `_median` and `_max` over the adapted layers to every training log line.

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
        lamb = _find_lamb(optimizer)
        if logs is None or "loss" not in logs or lamb is None:
            return
        ratios = {name: stats.trust_ratio for name, stats in lamb.layer_stats(adapted_only=True).items()}
        if not ratios:
            return
        summary = {
            "lamb/trust_ratio_min": min(ratios.values()),
            "lamb/trust_ratio_median": median(ratios.values()),
            "lamb/trust_ratio_max": max(ratios.values()),
        }
        if self.per_layer:
            summary |= {f"lamb/trust_ratio/{name}": ratio for name, ratio in ratios.items()}
        logs.update(summary)
        state.log_history[-1].update(summary)  # Trainer has copied `logs` there before it calls us


def _find_lamb(optimizer: Any) -> Lamb | None:
    """The Lamb inside what accelerate wrapped round it."""
    while optimizer is not None and not isinstance(optimizer, Lamb):
        optimizer = getattr(optimizer, "optimizer", None)
    return optimizer
