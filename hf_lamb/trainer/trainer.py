"""LambTrainer: Trainer's hooks, each one a list of steps that the other modules of this package implement."""

from __future__ import annotations

import copy
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from hf_lamb.optim_args import is_lamb_trainer, loss_is_weighted
from hf_lamb.scaling import check_warmup, decay_factor, norm_growth_warning, scaled_learning_rate
from hf_lamb.trainer.arguments import LambTrainingArguments, default_of
from hf_lamb.trainer.callbacks import SkippedStepsCallback, TrustRatioCallback
from hf_lamb.trainer.checkpoints import (
    UNFINISHED,
    Checkpoints,
    check_optimizer,
    check_shapes,
    checkpoint_to_resume,
    has_lamb_options,
    kept_apart,
    load_kept,
    read_kept,
    refusing_another_model,
    refusing_another_optimizer,
    tidy,
)
from hf_lamb.trainer.clipping import clip_in_lamb
from hf_lamb.trainer.deepspeed import (
    check_configuration,
    check_deepspeed_checkpoint,
    checking_what_deepspeed_loads,
    stage_of,
)
from hf_lamb.trainer.fsdp import (
    force_current_dcp_format,
    is_of_another_layout,
    layout_of,
    load_model,
    load_optimizer,
    refuse_local_checkpoints,
    take_layers,
    tie,
    tied_heads_in_one_group,
    whole_state_dict,
)
from hf_lamb.trainer.loss import Count, LossWeighting, attributes
from hf_lamb.trainer.model_card import args_in_force, complete_model_card, options_of_groups
from hf_lamb.trainer.noise_scale import NoiseMeasurement, NoiseScale
from hf_lamb.trainer.phases import PreviousPhase
from hf_lamb.trainer.staged import StagedTraining, refuse_without_schedule

__all__ = ["LambTrainer"]

logger = logging.getLogger(__name__)


class LambTrainer(Trainer):
    """`transformers.Trainer` with additions for training with large batches.

    * Parameter groups: `lamb_param_groups` makes them when `optim="lamb"`, as under a stock Trainer.
    * Loss: the logged loss and its gradient are the mean over all labels of the global batch. They do not depend on
      the split into micro-batches, accumulation steps and processes. Stock transformers 5 multiplies loss and gradient
      by accumulation steps x processes for every head that accepts `num_items_in_batch` but ignores it, as most
      `ForMaskedLM`, sequence and token classification heads do
      (https://github.com/huggingface/transformers/issues/47688). For heads that do not accept it, stock transformers
      averages the means of the micro-batches. `LambTrainer` tries the model, or the `compute_loss_func`, on the first
      batch to find out which kind it is. It changes nothing if the loss divides by `num_items_in_batch` itself, or if
      batches have no `labels`. These losses are exact too: means over the positions that `attention_mask` keeps
      (ELECTRA's) or over rows, and sums of such a mean and cross-entropies with their own labels (BERT's next
      sentence). `LambTrainer` warns if a loss is none of these.
    * A subclass's `compute_loss`: `LambTrainer` divides its loss by the accumulation steps, which gives the mean of
      the micro-batches' means. It does not divide if `compute_loss` uses `num_items_in_batch`, or if the subclass sets
      `loss_is_scaled_for_ga = True`. A subclass may scale what `super().compute_loss(model, inputs,
      num_items_in_batch=num_items_in_batch)` returns, and may add batch means.
    * Clipping: with a `Lamb` of exactly the model's trainable parameters, the optimizer clips to `max_grad_norm`
      (`Lamb.clip_grad_norm`), and the gradients are read once for clipping, `grad_norm`, the noise scale and
      `skip_nonfinite`. Weights and log are those of Trainer's clipping, but callbacks that read `param.grad` see the
      gradients before clipping. If `on_pre_optimizer_step` changes a gradient, the optimizer clips what that leaves.
      Checkpoints do not contain it: a stock Trainer that resumes clips itself. DeepSpeed clips as in a stock Trainer.
    * `eval_loss`: the mean over all labels, not over batches, without the rows that pad the last batch.
    * With `LambTrainingArguments`: a learning rate scaled from another global batch, polynomial decay, and a warning
      before the run if the rate would make the weights' norms grow too far, see `hf_lamb.scaling`.
    * With `batch_size_schedule`: a global batch that changes at given optimizer steps, also in the middle of an epoch,
      see `hf_lamb.trainer.staged.StagedTraining`. Loss, rate, epochs and resumed runs are exact.
    * Log: the gradient noise scale (`hf_lamb.trainer.noise_scale.NoiseMeasurement`), which is close to the critical
      batch size; the trust ratios (`TrustRatioCallback`); the skipped steps (`SkippedStepsCallback`).
    * Checkpoints: they are complete even if the run is killed, see `hf_lamb.trainer.checkpoints.Checkpoints`.
      `train(resume_from_checkpoint=True)` resumes from the newest complete one, also after a stock Trainer, whose last
      one may be incomplete. `train(resume_from_checkpoint="checkpoint-8")` raises CheckpointError if that one is
      damaged or has another model or optimizer. Checkpoints of `save_only_model` cannot be resumed. A run that resumes
      from its last checkpoint does no further step; Trainer does one if the last epoch is not complete.
    * Phases: `start_from` begins a run with the weights and moments of another one.
    * Model card: it has optimizer, batch, learning rate and plan, also with `push_to_hub`.
    * FSDP: masked LMs with tied heads train under FSDP2; a run under DDP can resume under FSDP2 and the other way
      round, which Trainer cannot; sharded checkpoints of FSDP1 load on any number of processes. See
      `hf_lamb.trainer.fsdp`.
    * DeepSpeed: checkpoints that cannot be resumed exactly are refused, see `hf_lamb.trainer.deepspeed`.

    The constructor takes `Trainer`'s arguments. With plain `TrainingArguments` the trust ratios are not logged per
    layer. It combines with other Trainers: `class LambSeq2SeqTrainer(LambTrainer, Seq2SeqTrainer)`.

    Attributes:
        plan: a plan's name and phase, for the model card. Default None.
        dataset_name: the name of the data set for the model card, if `create_model_card` is called without one.
            Default None.
        card_sections: texts for sections of the model card, by heading, such as "Intended uses & limitations".
            Sections without a text keep Trainer's "More information needed", except those that the trainer can fill.
        learning_rate_why: one line with the calculation of the learning rate, if it was scaled. Default None.
    """

    plan: str | None = None
    dataset_name: str | None = None
    card_sections: Mapping[str, str] = MappingProxyType({})
    learning_rate_why: str | None = None

    staged: StagedTraining | None = None  # with `batch_size_schedule`
    _previous: PreviousPhase | None = None  # set by `start_from`

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.checkpoints = Checkpoints(self)
        super().__init__(*args, **kwargs)
        check_configuration(self)
        per_layer = getattr(self.args, "log_trust_ratio_per_layer", False)
        if getattr(self.args, "batch_size_schedule", None) is not None:
            self.staged = StagedTraining(self)
        # Before the reporters, so that these report the added values.
        first = [TrustRatioCallback(per_layer), SkippedStepsCallback(), *([self.staged] if self.staged else [])]
        self.callback_handler.callbacks[:0] = first

        self.noise_scale = NoiseScale()
        self.noise_measurement = NoiseMeasurement(self)
        self.loss_weighting = LossWeighting(self)

    # -- resuming, and starting from another run's checkpoint --------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as Trainer does; resume only from a complete checkpoint that fits this run.

        Raises:
            CheckpointError: there is no complete checkpoint, or this one is damaged or does not fit this run.
        """
        if self.staged is not None:
            self.staged.check()
        output_dir = str(self.args.output_dir)
        if resume_from_checkpoint:
            resume_from_checkpoint = checkpoint_to_resume(resume_from_checkpoint, output_dir)
            self.check_fit(Path(resume_from_checkpoint))
            if getattr(self.args, "batch_size_schedule", None) is None:
                refuse_without_schedule(resume_from_checkpoint)
            check_deepspeed_checkpoint(Path(resume_from_checkpoint), stage_of(self), self.args.world_size)
        if self.staged is not None:
            self.staged.resumes_from = str(resume_from_checkpoint) if resume_from_checkpoint else None
        if self.args.should_save:
            tidy(Path(output_dir))
        with set_to(is_lamb_trainer, True):  # also for a subclass that creates its optimizer itself
            return super().train(resume_from_checkpoint, *args, **kwargs)

    def check_fit(self, checkpoint: Path, optimizer: bool = True) -> None:
        """Raise CheckpointError if the headers of the files show another model or optimizer; load nothing."""
        if optimizer:
            check_optimizer(checkpoint, self._trains_lamb())
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or self.model_init is not None or self.model is None:
            return  # this process has other shapes than the files, or has no model yet
        check_shapes(checkpoint, self.model)

    def _trains_lamb(self) -> bool | None:
        """Return whether this run's optimizer is or will be a Lamb; None if that is not known yet."""
        if self.optimizer is not None:
            return has_lamb_options(self.optimizer)
        own = type(self).create_optimizer is LambTrainer.create_optimizer and self.optimizer_cls_and_kwargs is None
        return self.args.optim == "lamb" if own else None

    def start_from(self, checkpoint: str, carry_over: str = "moments") -> None:
        """Make `train()` start with the weights and the optimizer's state of another run's checkpoint.

        BERT's second phase, with longer sequences, is such a run. Steps, learning rate, schedule, warm-up, weight
        decay, data order and random numbers are this run's own. If this run resumes from its own checkpoint, it
        ignores `start_from`.

        Args:
            checkpoint: a folder with a checkpoint of the same architecture, and of the same optimizer unless
                `carry_over` is "weights". It may come from one process, DDP or FSDP2, with any number of processes.
            carry_over: "moments" loads the moments and sets their step count to 0, so that the bias correction starts
                again, as in NVIDIA's recipe; "optimizer" loads the step count too; "weights" loads no state of the
                optimizer. Default "moments".

        Raises:
            ValueError: `carry_over` is unknown; DeepSpeed is used, whose checkpoints cannot be loaded in part.
            CheckpointError: the checkpoint is missing or incomplete; when training starts, also if it has another
                model or optimizer.

        Source: https://github.com/NVIDIA/DeepLearningExamples/blob/master/PyTorch/LanguageModeling/BERT/run_pretraining.py
        """
        previous = PreviousPhase(checkpoint, carry_over)
        previous.check(self)
        self._previous = previous

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with refusing_another_model(resume_from_checkpoint):
            if is_of_another_layout(resume_from_checkpoint, self):
                model = model or self.model
                assert model is not None
                load_model(model, Path(resume_from_checkpoint))
            else:
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Warn as Trainer does, but not of weights that are tied to one that was loaded: those are not missing."""
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        missing = [key for key in load_result.missing_keys if key not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with refusing_another_optimizer(checkpoint, self.optimizer):
            if checkpoint is not None and (self.is_fsdp_enabled or layout_of(Path(checkpoint)) is not None):
                assert self.optimizer is not None
                take_layers(self.optimizer, Path(checkpoint))
            if checkpoint is not None and is_of_another_layout(checkpoint, self):
                assert self.model is not None
                assert self.optimizer is not None
                assert self.lr_scheduler is not None
                load_optimizer(self.model, self.optimizer, Path(checkpoint))
                self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, "scheduler.pt"), weights_only=True))
            else:
                with force_current_dcp_format():
                    super()._load_optimizer_and_scheduler(checkpoint)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        epochs_and_steps = super()._init_training_state(*args, **kwargs)
        checkpoint = args[3]
        load_kept(self.state, checkpoint)
        self.noise_measurement.restore()
        if self.staged is not None:
            return self.staged.begin(checkpoint)
        if checkpoint is not None:
            self._warn_of_another_batch(str(checkpoint))
        return epochs_and_steps

    def _warn_of_another_batch(self, checkpoint: str) -> None:
        now = self.get_total_train_batch_size(self.args)
        before = read_kept(checkpoint).get("global_batch", {}).get("attributes", {}).get("sequences", now)
        if before != now:
            logger.warning(
                f"{checkpoint} was trained with a global batch of {before:,} sequences, and this run has {now:,}: "
                "Trainer counts what was seen in batches of the new size, so it goes on at another place in the data; "
                f"for a batch that changes give batch_size_schedule='0:{now}'"
            )

    def set_initial_training_values(self, args: TrainingArguments, dataloader: Any) -> Any:
        """Return Trainer's numbers of steps and epochs; with `batch_size_schedule` those of its batches.

        Raises:
            ValueError: the trainer was made without a schedule and now there is one, or the other way round.
        """
        schedule = getattr(args, "batch_size_schedule", None)
        if (schedule is None) != (self.staged is None):  # a hyperparameter search sets options after construction
            raise ValueError(
                f"batch_size_schedule {schedule!r} was set after LambTrainer was made: make it with a schedule, such "
                "as '0:256' for one batch, and change that, or leave it out"
            )
        values = super().set_initial_training_values(args, dataloader)
        return values if self.staged is None else self.staged.initial_values(args, dataloader, values)

    def _load_callback_state(self) -> None:
        with kept_apart(self.state):  # a stock Trainer with a TrustRatioCallback has written entries there
            super()._load_callback_state()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        elif self.staged is not None:
            self.staged.run_epoch(super()._run_epoch, *args, **kwargs)
        else:
            super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]

    # -- saving ------------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        run_dir = super()._get_output_dir(trial)
        return os.path.join(run_dir, UNFINISHED) if self.checkpoints.staging else run_dir

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = self._get_output_dir(trial)
        self.noise_measurement.keep()
        kept: Any = self.state.stateful_callbacks
        if kept is not None:  # for reports: Trainer's own files do not say it
            kept["global_batch"] = {"attributes": {"sequences": self.get_total_train_batch_size(self.args)}}
        if self.staged is not None:
            self.staged.keep()
        with self.checkpoints.saving(run_dir):
            super()._save_checkpoint(model, trial)
        if self.args.push_to_hub:
            self._push_from_checkpoint(os.path.join(run_dir, f"checkpoint-{self.state.global_step}"))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The upload runs in the background, so it must not read a folder that is about to be renamed.
        if not self.checkpoints.staging:
            super()._push_from_checkpoint(checkpoint_folder)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        with whole_state_dict(self) if self.is_fsdp_enabled and not _internal_call else nullcontext():
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with self.checkpoints.saving_model(output_dir) as folder:
            if (self.is_fsdp_enabled or self.is_deepspeed_enabled) and state_dict:
                assert self.model is not None
                tie(state_dict, self.model)
            with self.staged.arguments_as_given() if self.staged else nullcontext():
                super()._save(folder, state_dict)

    # -- the learning rate of this run's global batch ----------------------------------------------------------------

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        """Return the global batch in sequences; with `batch_size_schedule` that of the next step."""
        if self.staged is not None:
            return self.staged.in_force.batch_size
        return self.sequences_at_once() * args.gradient_accumulation_steps

    def sequences_at_once(self) -> int:
        """Return micro-batch x data-parallel processes. `split_batches` splits the micro-batch between them."""
        if self.accelerator.split_batches:  # Trainer would count it for each process
            return int(self._train_batch_size)
        args = self.args
        return int(super().get_total_train_batch_size(args)) // args.gradient_accumulation_steps

    def scale_learning_rate(self) -> float:
        """Return this run's peak learning rate: `args.learning_rate`, or the scaled `base_learning_rate`.

        It logs the calculation and keeps it in `learning_rate_why`. The result changes when `auto_find_batch_size`
        halves the batch.
        """
        args = self.args
        if not isinstance(args, LambTrainingArguments):
            return args.learning_rate
        args.check_scaling()
        if args.base_learning_rate is None or args.base_batch_size is None:
            self.learning_rate_why = None
            return args.learning_rate
        batch = self.staged.stages.largest if self.staged else self.get_total_train_batch_size(args)
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
        previous = self._previous if resume_from_checkpoint is None else None
        rate = self.scale_learning_rate()
        if self._made_optimizer and self.learning_rate_why and self.optimizer is not None:
            set_peak(self.optimizer, rate)
        growth = self.staged.norm_growth(rate, max_steps) if self.staged else None
        warning = norm_growth_warning(rate, max_steps, growth) if self.args.optim == "lamb" else None
        if warning and self.args.should_log:
            logger.warning(warning)
        self._asked_for = ()
        if previous is not None:
            previous.check_fit(self)
        refuse_local_checkpoints(self)
        assert self.model is not None
        with tied_heads_in_one_group(self.model), checking_what_deepspeed_loads(self):
            prepared = super()._prepare_for_training(  # type: ignore[no-untyped-call]
                max_steps, train_dataloader, resume_from_checkpoint, *args, **kwargs
            )
        self.noise_measurement.attach(prepared[0])
        if previous is not None:
            previous.take_over(self)
        self._check_options_in_force(rate, max_steps, resume_from_checkpoint)
        return prepared

    _asked_for: Sequence[dict[str, Any]] = ()  # the options of the optimizer's groups before a checkpoint was loaded

    def _check_options_in_force(self, rate: float, max_steps: int, checkpoint: str | None) -> None:
        """Warn if the optimizer uses other options than this run's arguments; adapt the schedule's final rate."""
        if self.optimizer is None or not hasattr(self.lr_scheduler, "base_lrs"):
            return
        in_force = options_of_groups(self.optimizer)
        peaks = sorted({float(group["learning_rate"]) for group in in_force})
        if not checkpoint and self.learning_rate_why and any(not math.isclose(peak, rate) for peak in peaks):
            if self.args.should_log:
                logger.warning(
                    f"give base_learning_rate or an optimizer, not both: the run uses the optimizer's peak learning "
                    f"rate {', '.join(f'{peak:.4g}' for peak in peaks)}, not {rate:.4g} of base_learning_rate"
                )
            return
        # The checkpoint's peak may be that of another batch than this schedule's largest: compare at that batch.
        of_peak = self.staged.largest_of_peak if self.staged is not None and self._made_optimizer else 1.0
        asked_for = [asked | {"learning_rate": asked["learning_rate"] / of_peak} for asked in self._asked_for]
        differ = {
            f"{name} {in_force_value}, not {asked[name]}": name
            for group, asked in zip(in_force, asked_for, strict=False)
            for name, in_force_value in group.items()
            if name in asked
            and in_force_value != asked[name]
            and not (name == "learning_rate" and math.isclose(in_force_value, asked[name]))
        }
        if differ and self.args.should_log:
            logger.warning(
                f"a resumed run uses the options of its checkpoint: {'; '.join(differ)}. To train with this run's "
                "options, start a new run from the checkpoint: trainer.start_from(checkpoint, 'optimizer')"
            )
        if (
            "learning_rate" in differ.values()
            and self._created_lr_scheduler
            and isinstance(self.lr_scheduler, LambdaLR)
        ):
            # transformers' schedules store their final rate as a fraction of the requested peak. The checkpoint's peak
            # differs, so compute the fraction again.
            mine, self.lr_scheduler = self.lr_scheduler, None
            like_mine = torch.optim.SGD([torch.zeros(1)], lr=peaks[-1] * of_peak)
            schedule = cast(LambdaLR, self.create_scheduler(max_steps, like_mine))
            mine.lr_lambdas = schedule.lr_lambdas * len(mine.base_lrs)
            self.lr_scheduler = mine

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """Create the scheduler of `decay_power`, or Trainer's.

        Raises:
            ValueError: the warm-up is longer than the run.
        """
        args, is_new = self.args, self.lr_scheduler is None
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
        if self.staged is not None and is_new and self._made_optimizer and self.learning_rate_why:
            self.lr_scheduler = self.staged.follow_batch(scheduler)
            scheduler = self.lr_scheduler
        if hasattr(self.optimizer, "param_groups"):  # DeepSpeed has a dummy optimizer at first
            self._asked_for = options_of_groups(self.optimizer)
        return scheduler

    _made_optimizer = False  # False if the caller passed an optimizer, which has its own learning rates

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer as Trainer does, with this run's learning rate.

        It logs no warning about the loss of models that ignore `num_items_in_batch`: `LambTrainer` corrects that loss.
        """
        if self.optimizer is not None:
            return super().create_optimizer(model)
        self._made_optimizer = self.optimizer_cls_and_kwargs is None
        args, rate = self.args, self.scale_learning_rate()
        if self._made_optimizer:
            self._warn_of_default_optimizer()
        try:
            if rate != args.learning_rate:  # Trainer's handlers read the rate from the arguments
                self.args = copy.copy(args)
                self.args.learning_rate = rate
            with set_to(is_lamb_trainer, True), set_to(loss_is_weighted, self.loss_weighting.active):
                return super().create_optimizer(model)
        finally:
            self.args = args

    def _warn_of_default_optimizer(self) -> None:
        args = self.args
        if args.optim != "lamb" and args.optim == default_of(args, "optim") and args.should_log:
            name = getattr(args.optim, "value", args.optim)
            logger.warning(
                "for LAMB use LambTrainingArguments, or optim='lamb' (--optim lamb) and a learning rate of about "
                f"1e-3: this run uses {name}, the default of {type(args).__name__}, at rate {args.learning_rate:g}. "
                f"To use {name} without this warning: LambTrainingArguments(optim='{name}', learning_rate=...)"
            )

    # -- a step: the loss of its micro-batches, and their gradients ---------------------------------------------------

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Return the micro-batches of a global batch and the number of its items, as Trainer does."""
        samples, num_items_in_batch = super().get_batch_samples(*args, **kwargs)
        self.noise_measurement.count_sequences(samples)
        return samples, self.loss_weighting.items_of(samples, num_items_in_batch)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        return self.loss_weighting.count(batch_samples, device)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Train on a micro-batch as Trainer does, with the loss divided by the accumulation steps exactly once."""
        with (
            self.loss_weighting.training(num_items_in_batch),
            self.noise_measurement.measuring(model, inputs, num_items_in_batch),
        ):
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """Return the micro-batch's part of the global batch's mean loss, see `LossWeighting.compute`."""
        items_in_batch = num_items_in_batch.plain if isinstance(num_items_in_batch, Count) else num_items_in_batch
        if items_in_batch is None or not self.loss_weighting.active:
            return super().compute_loss(model, inputs, return_outputs, items_in_batch)
        loss, outputs = self.loss_weighting.compute(model, inputs, items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def unweighted_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Return the loss of `compute_loss` of Trainer or of a mix-in."""
        return super().compute_loss(*args, **kwargs)

    def count_labels(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Count the labels of a global batch as Trainer or a mix-in does."""
        return super()._get_num_items_in_batch(batch_samples, device)

    def loss_is_ours(self) -> bool:
        """Return whether no subclass overrides `compute_loss`."""
        return getattr(self.compute_loss, "__func__", None) is LambTrainer.compute_loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        stock = super()._clip_grad_norm
        norm = clip_in_lamb(self, model, self.args.max_grad_norm, stock)
        return stock(model) if norm is None else norm  # type: ignore[no-untyped-call]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None and not self.args.max_grad_norm > 0:  # else a subclass has clipped and returned no norm
            grad_norm = clip_in_lamb(self, model, math.inf, super()._get_grad_norm)
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
        self.noise_measurement.take(norm)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as Trainer does; add the noise scale to training log lines as soon as it is known."""
        self.noise_measurement.add_to(logs)
        super().log(logs, start_time)

    # -- an evaluation: the mean over all its labels -----------------------------------------------------------------

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Evaluate as Trainer does, with the loss weighted by labels."""
        self.loss_weighting.evaluating()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        return self.loss_weighting.evaluated(output, metric_key_prefix)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Predict as Trainer does, and add to the sums from which `evaluation_loop` computes the loss."""
        if not self.loss_weighting.active or not isinstance(inputs.get("labels"), Tensor):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        return self.loss_weighting.predict(super().prediction_step, model, inputs, prediction_loss_only, ignore_keys)

    # -- the model card ----------------------------------------------------------------------------------------------

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Create Trainer's model card with the options in force; with LAMB add the section "Large batch"."""
        if len(args) < 8 and kwargs.get("dataset") is None and self.dataset_name is not None:
            kwargs["dataset"] = self.dataset_name
        with attributes(self, args=args_in_force(self)):
            super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            complete_model_card(self)


@contextmanager
def set_to(variable: ContextVar[bool], value: bool) -> Iterator[None]:
    """Set a context variable for this block."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def set_peak(optimizer: Any, rate: float) -> None:
    """Set the peak learning rate of an existing optimizer; groups with other rates keep their ratio to it."""
    before, groups = optimizer.defaults["lr"], optimizer.param_groups
    while optimizer is not None:  # wrappers may have their own defaults, and transformers' schedules read those
        if hasattr(optimizer, "defaults"):
            optimizer.defaults["lr"] = rate
        optimizer = getattr(optimizer, "optimizer", None)
    for group in groups:
        peak = group.get("initial_lr", group["lr"])
        group["lr"] = group["initial_lr"] = rate if peak == before else peak * (rate / before)
