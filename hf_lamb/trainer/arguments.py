"""LambTrainingArguments: the options of a run with LAMB."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, cast

from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from hf_lamb.registration import options_of
from hf_lamb.scaling import check_warmup, scaled_learning_rate

__all__ = ["LambTrainingArguments"]


@dataclass
class LambTrainingArguments(TrainingArguments):
    """`TrainingArguments` with LAMB's defaults: `optim="lamb"`, `learning_rate=1e-3`, `weight_decay=0.01`.

    No trainer writes a run's own numbers into them, so that they can be used again, copied and read back. Of
    `learning_rate` and `base_learning_rate` the one that is set last, as a hyperparameter search does, holds.

    Args:
        adam_epsilon: ε. Default 1e-6 with LAMB, and Trainer's 1e-8 with any other optimizer.
        base_learning_rate, base_batch_size: a rate and the global batch (sequences in an optimizer step) it was found
            at; in place of `learning_rate`, which does not count then: `LambTrainer` trains at the rate of this run's
            global batch, micro-batch x accumulation x data-parallel processes. Default none.
        learning_rate_scaling: how: `sqrt`, `linear` or `none`, see `hf_lamb.scaling`. Default "sqrt".
        decay_power: after a linear warm-up let the rate fall to 0 as (1 - t)**decay_power; in place of
            `lr_scheduler_type`. 1 is the paper's decay (and Trainer's default "linear"), 0.5 NVIDIA's. Default none.
        decay_from_first_step: t is the share of all steps, not of those after warm-up, so that the rate drops at the
            end of the warm-up, as NVIDIA's does. Default False.
        log_noise_scale: measure the gradient noise scale, see `hf_lamb.trainer.noise_scale`. Default True.
        log_trust_ratio_per_layer: log `lamb/trust_ratio/NAME` of every adapted parameter beside the summary.
            Default False.

    Raises:
        ValueError: what `TrainingArguments` refuses; options that LAMB does not understand or that are out of range;
            `base_learning_rate` beside `learning_rate` or without `base_batch_size`; a warm-up longer than the run;
            `decay_power` beside another `lr_scheduler_type`.
    """

    optim: OptimizerNames | str = field(default="lamb", metadata={"help": "The optimizer to use."})
    learning_rate: float = field(
        default=1e-3, metadata={"help": "The initial learning rate; LAMB's is relative to the weights' norm."}
    )
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay; not of biases and norms."})
    adam_epsilon: float = field(
        default=cast(float, None),  # until __post_init__, which knows the optimizer
        metadata={"help": "Epsilon of LAMB, default 1e-6, or of Adam, default 1e-8."},
    )
    base_learning_rate: float | None = field(
        default=None,
        metadata={"help": "In place of --learning_rate: the rate at --base_batch_size, scaled to the global batch."},
    )
    base_batch_size: int | None = field(
        default=None, metadata={"help": "The global batch, in sequences, that --base_learning_rate was found at."}
    )
    learning_rate_scaling: str = field(
        default="sqrt", metadata={"help": "How --base_learning_rate follows the batch: sqrt, linear or none."}
    )
    decay_power: float | None = field(
        default=None,
        metadata={"help": "Polynomial decay to 0 after warm-up: 1 as in the paper, 0.5 as NVIDIA's. Default: none."},
    )
    decay_from_first_step: bool = field(
        default=False, metadata={"help": "With --decay_power: NVIDIA's drop of the rate at the end of the warm-up."}
    )
    log_noise_scale: bool = field(
        default=True, metadata={"help": "Log the gradient noise scale, in sequences, as lamb/noise_scale."}
    )
    log_trust_ratio_per_layer: bool = field(
        default=False, metadata={"help": "Log the trust ratio of every adapted parameter beside the summary."}
    )

    def __post_init__(self) -> None:
        if self.adam_epsilon is None:
            self.adam_epsilon = 1e-6 if self.optim == "lamb" else default_of(TrainingArguments, "adam_epsilon")
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.check_scaling()
        if self.optim == "lamb":
            options_of(self)  # now, not when the data are there; and Trainer does not name a malformed item
        self._last_rate_holds = True

    def __setattr__(self, name: str, value: Any) -> None:
        """The last of the two rates that is set holds; without that a search's suggestion would be of no effect."""
        super().__setattr__(name, value)
        if value is None or not vars(self).get("_last_rate_holds"):
            return
        if name == "learning_rate" and self.base_learning_rate is not None:
            self._base_batch_size = self.base_batch_size
            self.base_learning_rate = self.base_batch_size = None
        elif name == "base_learning_rate":
            vars(self)["learning_rate"] = default_of(self, "learning_rate")
            if self.base_batch_size is None:
                self.base_batch_size = vars(self).get("_base_batch_size")

    def to_dict(self) -> dict[str, Any]:
        """As Trainer's, for JSON and reports, without the `learning_rate` that `base_learning_rate` replaces."""
        options: dict[str, Any] = super().to_dict()  # type: ignore[no-untyped-call]
        if self.base_learning_rate is not None:
            del options["learning_rate"]
        return options

    def check_scaling(self) -> None:
        """Refuse what cannot be or contradicts itself; also when training begins, as all of it can be set later."""
        rate, batch = self.base_learning_rate, self.base_batch_size
        if (rate is None) != (batch is None):
            given, missing = ("base_learning_rate", "base_batch_size")[:: -1 if rate is None else 1]
            raise ValueError(f"{given} {getattr(self, given)} without {missing}: give both, or learning_rate alone")
        for name in ("base_learning_rate", "base_batch_size", "decay_power"):
            if isinstance(getattr(self, name), str):
                raise ValueError(
                    f"{name} {getattr(self, name)!r}: expected a number, not text (in YAML, write 1.0e-3 for 1e-3)"
                )
        # Whatever the batch will be, these and the rule can be checked now.
        base = (1.0, 1) if rate is None or batch is None else (rate, batch)
        scaled_learning_rate(*base, 1, self.learning_rate_scaling)
        if rate is not None and self.learning_rate != default_of(self, "learning_rate"):
            raise ValueError(
                f"learning_rate {self.learning_rate:g} and base_learning_rate {rate:g} contradict each other: give one"
            )
        if self.decay_power is not None:
            if not 0 < self.decay_power < math.inf:
                raise ValueError(f"decay_power {self.decay_power}: expected a positive number, such as 1 or 0.5")
            schedule = SchedulerType(self.lr_scheduler_type)
            if schedule != SchedulerType.LINEAR:
                raise ValueError(
                    f"decay_power {self.decay_power:g} and lr_scheduler_type {schedule.value} contradict each other: "
                    "give one"
                )
        elif self.decay_from_first_step:
            raise ValueError("decay_from_first_step without decay_power: add decay_power=0.5 for NVIDIA's schedule")
        if self.max_steps > 0:
            check_warmup(self.get_warmup_steps(self.max_steps), self.max_steps)


def default_of(args: TrainingArguments | type[TrainingArguments], name: str) -> Any:
    """A field's default in a class of arguments."""
    return next(field.default for field in fields(args) if field.name == name)
