"""LambTrainer: the stock Trainer, with a loss that does not depend on how a global batch is split."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, SchedulerType
from transformers.training_args import OptimizerNames

from hf_lamb.callbacks import SkippedStepsCallback, TrustRatioCallback
from hf_lamb.checkpoints import WholeCheckpointTrainer
from hf_lamb.fsdp import ShardedTrainer
from hf_lamb.model_card import ModelCardTrainer, options_of_groups
from hf_lamb.noise_scale import NoiseScaleTrainer
from hf_lamb.phases import PhaseTrainer
from hf_lamb.registration import loss_is_weighted, options_of
from hf_lamb.scaling import check_warmup, decay_factor, norm_growth_warning, scaled_learning_rate
from hf_lamb.zero_trainer import ZeroTrainer

__all__ = ["LambTrainer", "LambTrainingArguments"]

logger = logging.getLogger(__name__)


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
        log_noise_scale: measure the gradient noise scale, see `hf_lamb.noise_scale`. Default True.
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


class LambTrainer(
    PhaseTrainer, NoiseScaleTrainer, WholeCheckpointTrainer, ModelCardTrainer, ZeroTrainer, ShardedTrainer
):
    """`transformers.Trainer`, and what training with large batches needs.

    * Parameter groups by `lamb_param_groups` when `optim="lamb"`, as under a stock Trainer.
    * A loss, logged and differentiated, that is the mean over all labels of the global batch, however that batch is
      split into micro-batches, accumulation steps and processes. Stock transformers 5 multiplies loss and gradient
      by accumulation steps and processes for every head that accepts `num_items_in_batch` but ignores it, which
      most `ForMaskedLM`, sequence and token classification heads do
      (https://github.com/huggingface/transformers/issues/47688); for heads that do not accept it, it takes the mean
      of the micro-batches' means. Models that divide by `num_items_in_batch` themselves, a `compute_loss_func`, and
      batches without `labels` are left alone. Which of these a model is, is found out by trying, on the first
      batch.
    * `eval_loss` as the mean over all labels too, not over batches, without the rows that pad the last batch.
    * With `LambTrainingArguments`: the learning rate of this run's global batch from one found at another, polynomial
      decay, and a warning before the run where the rate lets the weights' norms grow too far, see `hf_lamb.scaling`.
    * The gradient noise scale, about the critical batch size, in every training log line, see
      `hf_lamb.noise_scale.NoiseScaleTrainer`.
    * The trust ratios in every training log line, see `TrustRatioCallback`; skipped steps, see `SkippedStepsCallback`.
    * Checkpoints that are whole whenever the run is killed, and are checked before it resumes, see
      `hf_lamb.checkpoints.WholeCheckpointTrainer`.
    * A second phase that begins with the weights and moments of the first, see `hf_lamb.phases.PhaseTrainer`.
    * A model card that names optimizer, batch, rate and plan, see `hf_lamb.model_card.ModelCardTrainer`.
    * FSDP2 with masked LMs, and checkpoints that go from DDP to FSDP2 and back, see `hf_lamb.fsdp.ShardedTrainer`.
    * DeepSpeed's checkpoints resumed as they were written, or refused, see `hf_lamb.zero_trainer.ZeroTrainer`.

    Takes `Trainer`'s arguments; with plain `TrainingArguments` the trust ratios are not logged per layer. Mixes with
    other Trainers: `class LambSeq2SeqTrainer(LambTrainer, Seq2SeqTrainer)`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        per_layer = getattr(self.args, "log_trust_ratio_per_layer", False)
        # Before the reporters, which then see what these add.
        self.callback_handler.callbacks[:0] = [TrustRatioCallback(per_layer), SkippedStepsCallback()]

        # Sequence parallelism (DeepSpeed's) and a compute_loss_func bring a loss of their own.
        self._weighs_loss = self.compute_loss_func is None and self.get_sp_size() == 1
        # None: not tried yet. True: the loss is a mean over the micro-batch, whatever num_items_in_batch says.
        self._loss_is_mean: bool | None = None if self.model_accepts_loss_kwargs else True
        if self._weighs_loss:
            # Trainer counts the labels of the global batch, and does not divide by the accumulation steps.
            self.model_accepts_loss_kwargs = True
        self._eval_loss_and_items = torch.zeros(2, dtype=torch.float64)

    # -- the learning rate of this run's global batch ----------------------------------------------------------------

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """The global batch, in sequences: as Trainer counts, but with `split_batches`, where it counts each twice.

        accelerate then deals each of the loader's batches out to the processes, so that they do not multiply it.
        """
        if self.accelerator.split_batches:
            return int(self._train_batch_size * args.gradient_accumulation_steps)
        return int(super().get_total_train_batch_size(args))

    def scale_learning_rate(self) -> float:
        """This run's peak learning rate: `args.learning_rate`, or what follows from `base_learning_rate`, and says so.

        Another one where `auto_find_batch_size` halves the batch.
        """
        args = self.args
        if not isinstance(args, LambTrainingArguments):
            return args.learning_rate
        args.check_scaling()
        if args.base_learning_rate is None or args.base_batch_size is None:
            self.learning_rate_why = None
            return args.learning_rate
        batch = self.get_total_train_batch_size(args)
        rate, why = scaled_learning_rate(
            args.base_learning_rate, args.base_batch_size, batch, args.learning_rate_scaling
        )
        if why != self.learning_rate_why and args.should_log:
            logger.info(f"{why} (base_learning_rate, learning_rate_scaling {args.learning_rate_scaling})")
        self.learning_rate_why = why
        return rate

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None, *args: Any, **kwargs: Any
    ) -> Any:
        rate = self.scale_learning_rate()
        if self._made_optimizer and self.learning_rate_why and self.optimizer is not None:
            set_peak(self.optimizer, rate)
        warning = norm_growth_warning(rate, max_steps) if self.args.optim == "lamb" else None
        if warning and self.args.should_log:
            logger.warning(warning)
        self._asked_for = ()
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint, *args, **kwargs)
        self._look_at_what_is_in_force(rate, max_steps, resume_from_checkpoint)
        return prepared

    _asked_for: Sequence[dict[str, Any]] = ()  # the options of the optimizer's groups before a checkpoint was loaded

    def _look_at_what_is_in_force(self, rate: float, max_steps: int, checkpoint: str | None) -> None:
        """Warn where the optimizer goes on with other options than this run's, and let the schedule end as asked."""
        if self.optimizer is None or not hasattr(self.lr_scheduler, "base_lrs"):
            return
        in_force = options_of_groups(self.optimizer)
        peaks = sorted({float(group["learning_rate"]) for group in in_force})
        if not checkpoint and self.learning_rate_why and any(not math.isclose(peak, rate) for peak in peaks):
            if self.args.should_log:
                logger.warning(
                    f"the peak learning rate in force is {', '.join(f'{peak:.4g}' for peak in peaks)}, that of the "
                    f"optimizer that was passed, not {rate:.4g} of base_learning_rate: give one of them"
                )
            return
        differ = {
            f"{name} {in_force_value}, not {asked[name]}": name
            for group, asked in zip(in_force, self._asked_for, strict=False)
            for name, in_force_value in group.items()
            if name in asked and in_force_value != asked[name]
        }
        if differ and self.args.should_log:
            logger.warning(
                f"a resumed run goes on with the options of its checkpoint: {'; '.join(differ)}. To train with this "
                "run's options, begin anew from the checkpoint: trainer.start_from(checkpoint, 'optimizer')"
            )
        if (
            "learning_rate" in differ.values()
            and self._created_lr_scheduler
            and isinstance(self.lr_scheduler, LambdaLR)
        ):
            # transformers' schedules know the rate they end with as a share of the peak that was asked for.
            mine, self.lr_scheduler = self.lr_scheduler, None
            like_mine = torch.optim.SGD([torch.zeros(1)], lr=peaks[-1])
            schedule = cast(LambdaLR, self.create_scheduler(max_steps, like_mine))
            mine.lr_lambdas = schedule.lr_lambdas * len(mine.base_lrs)
            self.lr_scheduler = mine

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """As Trainer's, and the polynomial of `decay_power`."""
        args = self.args
        if isinstance(args, LambTrainingArguments):
            warmup = args.get_warmup_steps(num_training_steps)
            check_warmup(warmup, num_training_steps)
            if self.lr_scheduler is None and args.decay_power is not None:
                factor = partial(
                    decay_factor,
                    total_steps=num_training_steps,
                    warmup_steps=warmup,
                    power=args.decay_power,
                    from_first_step=args.decay_from_first_step,
                )
                optimizer = optimizer or self.optimizer
                assert optimizer is not None
                self.lr_scheduler = LambdaLR(optimizer, factor)
                self._created_lr_scheduler = True
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if hasattr(self.optimizer, "param_groups"):  # DeepSpeed has stand-ins at first
            self._asked_for = options_of_groups(self.optimizer)
        return scheduler

    _made_optimizer = False  # or the caller has, with rates of its own

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As Trainer's, at this run's rate, without the warning about the loss that this trainer puts right."""
        if self.optimizer is not None:
            return super().create_optimizer(model)
        self._made_optimizer = self.optimizer_cls_and_kwargs is None
        args, rate = self.args, self.scale_learning_rate()
        if self._made_optimizer:
            self._warn_of_default_optimizer()
        token = loss_is_weighted.set(self._weighs_loss)
        try:
            if rate != args.learning_rate:  # Trainer's handlers read it from the arguments
                self.args = copy.copy(args)
                self.args.learning_rate = rate
            return super().create_optimizer(model)
        finally:
            self.args = args
            loss_is_weighted.reset(token)

    def _trains_lamb(self) -> bool | None:
        own = type(self).create_optimizer is LambTrainer.create_optimizer and self.optimizer_cls_and_kwargs is None
        return self.args.optim == "lamb" if self.optimizer is None and own else super()._trains_lamb()

    def _warn_of_default_optimizer(self) -> None:
        args = self.args
        if args.optim != "lamb" and args.optim == default_of(args, "optim") and args.should_log:
            name = getattr(args.optim, "value", args.optim)
            logger.warning(
                f"LambTrainer trains with {name}, the default of {type(args).__name__}, at learning rate "
                f"{args.learning_rate:g}: for LAMB use LambTrainingArguments, or optim='lamb' and a rate of about "
                f"1e-3; for {name} without this line LambTrainingArguments(optim='{name}', learning_rate=...)"
            )

    # -- the loss of a micro-batch: its share of the mean over the global batch --------------------------------------

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The micro-batch's share of the global batch's mean loss: mean * items / num_items_in_batch.

        Times the number of processes, because DDP and FSDP average gradients over them.
        """
        if num_items_in_batch is None or not self._weighs_loss or not self._is_mean(model, inputs):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        items = self._count_items(inputs)
        mean, outputs = super().compute_loss(model, inputs, return_outputs=True)
        # A micro-batch without a single label has the mean 0/0.
        loss = torch.where(items > 0, mean * (items / num_items_in_batch), 0.0)
        if self.args.average_tokens_across_devices:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return (loss, outputs) if return_outputs else loss

    def _is_mean(self, model: nn.Module, inputs: dict[str, Any]) -> bool:
        """Whether the loss stays the same when `num_items_in_batch` doubles; found out once, by all processes."""
        if self._loss_is_mean is None:
            trials = torch.stack([self._trial_loss(model, inputs, n) for n in (1, 2)])
            trials = self.accelerator.gather(trials[None])
            one, two = trials[trials.isfinite().all(dim=1)].float().unbind(dim=1)  # no label, no loss
            if len(one) == 0:
                return True
            self._loss_is_mean = torch.allclose(one, two, rtol=1e-3)
            if self._loss_is_mean:
                logger.info(
                    f"The loss of {self._model_name()} ignores num_items_in_batch: each micro-batch is weighted by "
                    "its number of labels, so that nothing depends on how the global batch is split."
                )
                self._warn_unless_additive(model, inputs)
        return self._loss_is_mean

    def _warn_unless_additive(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """The weighting is exact only where the loss of a batch is the label-weighted mean of its halves' losses."""
        rows = len(inputs["labels"])
        if rows < 2:
            return
        parts = [slice(0, rows), slice(0, rows // 2), slice(rows // 2, rows)]
        batches = [{k: v[part] if _has_rows(v, rows) else v for k, v in inputs.items()} for part in parts]
        whole, *losses = torch.stack([self._trial_loss(model, batch, None) for batch in batches]).tolist()
        n, *counts = torch.stack([self._count_items(batch) for batch in batches]).tolist()
        if min(counts) == 0:
            return
        halves = sum(count * loss for count, loss in zip(counts, losses, strict=True)) / n
        if abs(whole - halves) > 1e-2 * abs(whole):
            logger.warning(
                f"The loss of {self._model_name()} is {whole:.4f} on the first batch, {halves:.4f} as the mean over "
                "its halves: it is no mean over labels, so it depends on how the global batch is split. Pass a "
                "compute_loss_func that divides by num_items_in_batch."
            )

    def _trial_loss(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: int | None) -> Tensor:
        """The loss in eval mode, without gradients, with fixed random numbers; leaves no trace."""
        training = model.training
        model.eval()
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices):
            torch.manual_seed(0)
            loss, _ = super().compute_loss(model, dict(inputs), True, num_items_in_batch)
        model.train(training)
        return loss.detach().mean()

    def _model_name(self) -> str:
        return type(self.accelerator.unwrap_model(self.model)).__name__

    # -- the loss of an evaluation: the mean over all its labels -----------------------------------------------------

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As Trainer's, with the loss weighted by labels."""
        self._eval_loss_and_items.zero_()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        metrics = output.metrics or {}
        sums = self.accelerator.reduce(self._eval_loss_and_items.to(self.args.device, torch.float32), "sum")
        loss, items = sums.tolist()
        if items > 0:
            metrics[f"{metric_key_prefix}_loss"] = loss / items
        return output._replace(metrics=metrics)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """As Trainer's; keeps the sums that `evaluation_loop` divides."""
        self._forget_padding(inputs)
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if loss is not None and self._weighs_loss:
            items = self._get_num_items_in_batch([inputs], self.args.device)
            if isinstance(items, Tensor):
                self._eval_loss_and_items += torch.stack((loss * items, items.to(loss))).cpu()
        return loss, logits, labels

    def _forget_padding(self, inputs: dict[str, Any]) -> None:
        """Unlabel the rows that accelerate repeats from the first batch so that all processes' last batches are full.

        Trainer drops what they predict, but not what they add to the loss.
        """
        state, labels = self.accelerator.gradient_state, inputs.get("labels")
        if not (isinstance(labels, Tensor) and state.end_of_dataloader and state.remainder > 0):
            return
        if self.accelerator.num_processes > 1 and not labels.is_floating_point():
            own = state.remainder - self.accelerator.process_index * len(labels)
            inputs["labels"] = labels.clone()
            inputs["labels"][max(own, 0) :] = -100


def set_peak(optimizer: Any, rate: float) -> None:
    """Another peak learning rate for an optimizer that exists; groups with rates of their own keep their share."""
    before, groups = optimizer.defaults["lr"], optimizer.param_groups
    while optimizer is not None:  # what wraps it may have defaults of its own, and transformers' schedules look there
        if hasattr(optimizer, "defaults"):
            optimizer.defaults["lr"] = rate
        optimizer = getattr(optimizer, "optimizer", None)
    for group in groups:
        peak = group.get("initial_lr", group["lr"])
        group["lr"] = group["initial_lr"] = rate if peak == before else peak * (rate / before)


def _has_rows(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == rows
