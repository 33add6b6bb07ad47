"""LambTrainingArguments: the options of a run with LAMB."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, cast

from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from hf_lamb.batch_schedule import batch_stages
from hf_lamb.optim_args import options_of
from hf_lamb.scaling import check_warmup, scaled_learning_rate

__all__ = ["LambTrainingArguments"]


@dataclass
class LambTrainingArguments(TrainingArguments):
    """`TrainingArguments` with LAMB's defaults: `optim="lamb"`, `learning_rate=1e-3`, `weight_decay=0.01`.

    `LambTrainer` never changes its arguments, so you can reuse, copy, save and load them. If both `learning_rate` and
    `base_learning_rate` are set after construction, as a hyperparameter search may do, the last one counts.

    Args:
        adam_epsilon: ε. Default 1e-6 with LAMB, and Trainer's 1e-8 with any other optimizer.
        base_learning_rate: a learning rate that works at the global batch `base_batch_size`. `LambTrainer` scales it
            to this run's global batch (micro-batch x accumulation steps x data-parallel processes) and ignores
            `learning_rate`. Default None.
        base_batch_size: the global batch of `base_learning_rate`, in sequences per optimizer step. Default None.
        learning_rate_scaling: the rule for scaling: `sqrt`, `linear` or `none`, see `hf_lamb.scaling`. Default "sqrt".
        batch_size_schedule: optimizer steps and global batches, "0:256 2000:512 6000:1024", or a linear growth,
            "256->1024 over 6000", see `hf_lamb.batch_schedule.batch_stages`. The accumulation steps follow from it;
            leave `gradient_accumulation_steps` out. `base_learning_rate` is scaled to the batch of each step;
            `learning_rate` is not. Default None: one batch.
        decay_power: after a linear warm-up, decay the rate to 0 as (1 - t)**decay_power; it replaces
            `lr_scheduler_type`. 1 is the paper's decay (and Trainer's default "linear"), 0.5 NVIDIA's. Default None.
        decay_from_first_step: t is the fraction of all steps instead of the steps after warm-up. The rate then drops
            at the end of the warm-up, as NVIDIA's does. Default False.
        log_noise_scale: log the gradient noise scale, see `hf_lamb.trainer.noise_scale`. Default True.
        log_trust_ratio_per_layer: log `lamb/trust_ratio/NAME` of every adapted parameter, in addition to minimum,
            median and maximum. Default False.

    Raises:
        ValueError: `TrainingArguments` refuses an argument; an option of LAMB is unknown or out of range;
            `base_learning_rate` is given together with `learning_rate` or without `base_batch_size`; the warm-up is
            longer than the run; `batch_size_schedule` is no schedule; `decay_power` is given together with another
            `lr_scheduler_type`.
    """

    optim: OptimizerNames | str = field(default="lamb", metadata={"help": "The optimizer to use."})
    learning_rate: float = field(
        default=1e-3, metadata={"help": "The initial learning rate; LAMB's is relative to the weights' norm."}
    )
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay; not of biases and norms."})
    adam_epsilon: float = field(
        default=cast(float, None),  # `__post_init__` sets it, because it depends on `optim`
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
    batch_size_schedule: str | None = field(
        default=None,
        metadata={
            "help": "The global batch from given optimizer steps on, '0:256 2000:512', or '256->1024 over 6000'; in "
            "place of --gradient_accumulation_steps."
        },
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
        default=False, metadata={"help": "Also log the trust ratio of every adapted parameter."}
    )

    def __post_init__(self) -> None:
        if self.adam_epsilon is None:
            self.adam_epsilon = 1e-6 if self.optim == "lamb" else default_of(TrainingArguments, "adam_epsilon")
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.check_scaling()
        if self.optim == "lamb":
            options_of(self)  # raises now instead of after the data are loaded
        self._last_rate_holds = True

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute. Setting one of the two learning rates resets the other: a search can then set either."""
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
        """Return the arguments as Trainer does, without `learning_rate` if `base_learning_rate` replaces it."""
        options: dict[str, Any] = super().to_dict()  # type: ignore[no-untyped-call]
        if self.base_learning_rate is not None:
            del options["learning_rate"]
        return options

    def check_scaling(self) -> None:
        """Check the options of rate and decay. `LambTrainer` calls it again, because users can set them later.

        Raises:
            ValueError: an option is out of range, or two options contradict each other.
        """
        rate, batch = self.base_learning_rate, self.base_batch_size
        if (rate is None) != (batch is None):
            if rate is None:
                given, missing = "base_batch_size", "base_learning_rate"
            else:
                given, missing = "base_learning_rate", "base_batch_size"
            raise ValueError(f"{given} {getattr(self, given)} without {missing}: give both, or learning_rate alone")
        for name in ("base_learning_rate", "base_batch_size", "decay_power"):
            if isinstance(getattr(self, name), str):
                raise ValueError(
                    f"{name} {getattr(self, name)!r}: expected a number, not text (in YAML, write 1.0e-3 for 1e-3)"
                )
        # The run's batch is not known yet; check rate, base batch and rule with a batch of 1.
        base = (1.0, 1) if rate is None or batch is None else (rate, batch)
        scaled_learning_rate(*base, 1, self.learning_rate_scaling)
        if rate is not None and self.learning_rate != default_of(self, "learning_rate"):
            raise ValueError(
                f"learning_rate {self.learning_rate:g} and base_learning_rate {rate:g} contradict each other: give one"
            )
        if self.batch_size_schedule is not None:
            batch_stages(self.batch_size_schedule)
            if self.gradient_accumulation_steps != 1:
                raise ValueError(
                    f"leave out gradient_accumulation_steps {self.gradient_accumulation_steps}: they follow from "
                    f"batch_size_schedule {self.batch_size_schedule!r}"
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
    """Return the default of a field in a class of arguments."""
    return next(field.default for field in fields(args) if field.name == name)
