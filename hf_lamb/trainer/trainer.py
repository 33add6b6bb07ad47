"""LambTrainer: the stock Trainer, with a loss that does not depend on how a global batch is split."""

from __future__ import annotations

import copy
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader
from transformers import TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from hf_lamb.registration import inflates_loss, loss_is_weighted
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
    refusing_another_model,
    refusing_another_optimizer,
    tidy,
)
from hf_lamb.trainer.deepspeed import (
    check_configuration,
    check_deepspeed_checkpoint,
    check_state_was_loaded,
    stage_of,
)
from hf_lamb.trainer.fsdp import (
    is_of_another_layout,
    load_model,
    load_optimizer,
    no_older_checkpoints,
    refuse_local_checkpoints,
    tie,
    tied_heads_in_one_group,
    whole_state_dict,
)
from hf_lamb.trainer.model_card import args_in_force, complete_model_card, options_of_groups
from hf_lamb.trainer.noise_scale import NoiseScaleTrainer
from hf_lamb.trainer.phases import PreviousPhase
from hf_lamb.trainer.trials import COUNTS, counted_labels, logits_of, perturbed, take_rows, tensor_items, unchanged

__all__ = ["LambTrainer"]

logger = logging.getLogger(__name__)


class LambTrainer(NoiseScaleTrainer):
    """`transformers.Trainer`, and what training with large batches needs.

    * Parameter groups by `lamb_param_groups` when `optim="lamb"`, as under a stock Trainer.
    * A loss, logged and differentiated, that is the mean over all labels of the global batch, however that batch is
      split into micro-batches, accumulation steps and processes. Stock transformers 5 multiplies loss and gradient
      by accumulation steps and processes for every head that accepts `num_items_in_batch` but ignores it, which
      most `ForMaskedLM`, sequence and token classification heads do
      (https://github.com/huggingface/transformers/issues/47688); for heads that do not accept it, it takes the mean
      of the micro-batches' means. Which kind a model or a `compute_loss_func` is, is found out by trying, on the
      first batch: what divides by `num_items_in_batch` itself is left alone, and so are batches without `labels`.
      Also exact: heads whose loss is a mean over what `attention_mask` lets through (ELECTRA's) or over rows, and
      sums of such a loss and of cross-entropies that have labels of their own (BERT's next sentence). A warning says
      that a loss is none of these.
    * A subclass's own `compute_loss` is divided by the accumulation steps, so that it gives the mean of the
      micro-batches' means. Not if it computes with `num_items_in_batch`, or says `loss_is_scaled_for_ga = True`.
      What `super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)` returns has its weight
      already; it may be scaled, and batch means added to it.
    * `eval_loss` as the mean over all labels too, not over batches, without the rows that pad the last batch.
    * With `LambTrainingArguments`: the learning rate of this run's global batch from one found at another, polynomial
      decay, and a warning before the run where the rate lets the weights' norms grow too far, see `hf_lamb.scaling`.
    * The gradient noise scale, about the critical batch size, in every training log line, see
      `NoiseScaleTrainer`.
    * The trust ratios in every training log line, see `TrustRatioCallback`; skipped steps, see `SkippedStepsCallback`.
    * Checkpoints that are whole whenever the run is killed, see `hf_lamb.trainer.checkpoints.Checkpoints`.
      `train(resume_from_checkpoint=True)` takes the newest complete one, also among those of a stock Trainer, whose
      last one may be torn; `train(resume_from_checkpoint="checkpoint-8")` raises CheckpointError if that one is
      damaged, or of another model or optimizer. Checkpoints of `save_only_model` cannot be resumed. A run resumed from
      its last checkpoint takes no step more; Trainer's takes one, where the last epoch is not over.
    * A second phase that begins with the weights and moments of the first, see `start_from`.
    * A model card, also that of `push_to_hub`, that names optimizer, batch, rate and plan.
    * FSDP2 with masked LMs whose head is tied, and checkpoints that go from DDP to FSDP2 and back: Trainer's load only
      their own layout. Sharded checkpoints of FSDP1 load on any number of processes. See `hf_lamb.trainer.fsdp`.
    * DeepSpeed's checkpoints resumed as they were written, or refused, see `hf_lamb.trainer.deepspeed`.

    Takes `Trainer`'s arguments; with plain `TrainingArguments` the trust ratios are not logged per layer. Mixes with
    other Trainers: `class LambSeq2SeqTrainer(LambTrainer, Seq2SeqTrainer)`.

    Attributes:
        plan: a plan's name and phase, for the model card. Default none.
        dataset_name: what it trains on, for the card, where `create_model_card` is not told. Default none.
        card_sections: what the card's sections say, by their headings, such as "Intended uses & limitations".
            Default: what the trainer knows; of a section that nobody knows anything about Trainer's "More information
            needed".
        learning_rate_why: how the learning rate follows from another batch's; None where it does not.
    """

    plan: str | None = None
    dataset_name: str | None = None
    card_sections: Mapping[str, str] = MappingProxyType({})
    learning_rate_why: str | None = None

    _previous: PreviousPhase | None = None  # what to begin with

    # While a micro-batch is trained: whether Trainer divides its loss, by what, and whether a subclass has told so.
    _divided, _divided_by, _told = False, 1, False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.checkpoints = Checkpoints(self)
        super().__init__(*args, **kwargs)
        check_configuration(self)
        per_layer = getattr(self.args, "log_trust_ratio_per_layer", False)
        # Before the reporters, which then see what these add.
        self.callback_handler.callbacks[:0] = [TrustRatioCallback(per_layer), SkippedStepsCallback()]

        self._weighs_loss = self.get_sp_size() == 1  # sequence parallelism (DeepSpeed's) brings a loss of its own
        self._model_takes_items = self.model_accepts_loss_kwargs
        if self._weighs_loss:
            self.model_accepts_loss_kwargs = True  # Trainer counts the labels of the global batch
        # None: not tried yet. True: the loss is a mean over the micro-batch, whatever num_items_in_batch says.
        self._loss_is_mean: bool | None = True
        if self._model_takes_items or self.compute_loss_func is not None:
            self._loss_is_mean = None
        self._loss_counts, self._counts_tried = "labels", False  # what it is the mean over
        self._other_terms: dict[str, Any] = {}  # other labels, and the outputs whose cross-entropy is added
        self._items_of_others: dict[str, Any] = {}  # how many of them the global batch has
        self._trial_mode = False
        # Of this micro-batch: whether `compute_loss` below was asked, and whether a subclass has divided by itself.
        self._asked = self._own_share = False
        self._parts: list[tuple[Tensor, Tensor]] = []  # means, and what they are over
        self._eval_sums: dict[int, Tensor] = {}

    # -- resuming, and beginning with another run's end --------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """As Trainer's, from a complete checkpoint that fits this run, or not at all."""
        output_dir = str(self.args.output_dir)
        if resume_from_checkpoint:
            resume_from_checkpoint = checkpoint_to_resume(resume_from_checkpoint, output_dir)
            self.check_fit(Path(resume_from_checkpoint))
            check_deepspeed_checkpoint(Path(resume_from_checkpoint), stage_of(self), self.args.world_size)
        if self.args.should_save:
            tidy(Path(output_dir))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def check_fit(self, checkpoint: Path, optimizer: bool = True) -> None:
        """Raise for another model or optimizer while nothing is loaded, as far as the heads of the files tell."""
        if optimizer:
            check_optimizer(checkpoint, self._trains_lamb())
        if self.is_fsdp_enabled or self.is_deepspeed_enabled or self.model_init is not None or self.model is None:
            return  # the shapes here are not those of the files, or not yet those of the run
        check_shapes(checkpoint, self.model)

    def _trains_lamb(self) -> bool | None:
        """Whether this run's optimizer will be a Lamb; None where that is not known before it is made."""
        if self.optimizer is not None:
            return has_lamb_options(self.optimizer)
        own = type(self).create_optimizer is LambTrainer.create_optimizer and self.optimizer_cls_and_kwargs is None
        return self.args.optim == "lamb" if own else None

    def start_from(self, checkpoint: str, carry_over: str = "moments") -> None:
        """Let `train()` begin with the weights, and with the optimizer's state, of a checkpoint of another run.

        BERT's second phase, with longer sequences, is such a run. Steps, learning rate and its schedule, warm-up,
        weight decay, data order and random numbers are this run's own. A run that resumes from a checkpoint of its own
        takes that one instead.

        Args:
            checkpoint: of the same architecture, and of the same optimizer unless only weights are taken; written by
                one process or DDP or FSDP2, on any number of processes.
            carry_over: "moments": the moments, with their step count set to 0, so that the bias correction starts
                anew, as in NVIDIA's recipe; "optimizer": the step count too; "weights": no state of the optimizer.
                Default "moments".

        Raises:
            ValueError: an unknown carry_over; DeepSpeed, whose checkpoints cannot be taken over in part.
            CheckpointError: no complete checkpoint there; when training starts, one of another model or optimizer.

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
        """As Trainer's, but for weights that are tied to one that was loaded: those are not missing."""
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        missing = [key for key in load_result.missing_keys if key not in tied]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with refusing_another_optimizer(checkpoint, self.optimizer):
            if checkpoint is not None and is_of_another_layout(checkpoint, self):
                assert self.model is not None
                assert self.optimizer is not None
                assert self.lr_scheduler is not None
                load_optimizer(self.model, self.optimizer, Path(checkpoint))
                self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, "scheduler.pt"), weights_only=True))
            else:
                with no_older_checkpoints():
                    super()._load_optimizer_and_scheduler(checkpoint)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        epochs_and_steps = super()._init_training_state(*args, **kwargs)
        load_kept(self.state, args[3])
        self.restore_noise_scale()
        return epochs_and_steps

    def _load_callback_state(self) -> None:
        with kept_apart(self.state):  # of a stock Trainer with a TrustRatioCallback
            super()._load_callback_state()

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)  # type: ignore[no-untyped-call]

    # -- saving ------------------------------------------------------------------------------------------------------

    def _get_output_dir(self, trial: Any) -> str:
        run_dir = super()._get_output_dir(trial)
        return os.path.join(run_dir, UNFINISHED) if self.checkpoints.staging else run_dir

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        run_dir = self._get_output_dir(trial)
        self.keep_noise_scale()
        with self.checkpoints.saving(run_dir):
            super()._save_checkpoint(model, trial)
        if self.args.push_to_hub:
            self._push_from_checkpoint(os.path.join(run_dir, f"checkpoint-{self.state.global_step}"))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The upload goes on in the background: not from a folder that is about to be renamed.
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
            super()._save(folder, state_dict)

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
        previous = self._previous if resume_from_checkpoint is None else None
        rate = self.scale_learning_rate()
        if self._made_optimizer and self.learning_rate_why and self.optimizer is not None:
            set_peak(self.optimizer, rate)
        warning = norm_growth_warning(rate, max_steps) if self.args.optim == "lamb" else None
        if warning and self.args.should_log:
            logger.warning(warning)
        self._asked_for = ()
        if previous is not None:
            previous.check_fit(self)
        refuse_local_checkpoints(self)
        assert self.model is not None
        with tied_heads_in_one_group(self.model):
            prepared = super()._prepare_for_training(
                max_steps, train_dataloader, resume_from_checkpoint, *args, **kwargs
            )
        if resume_from_checkpoint is not None:
            check_state_was_loaded(self, resume_from_checkpoint)
        if previous is not None:
            previous.take_over(self)
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

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; finds out on the first batch what the loss is a mean over, before that is counted."""
        samples, num_items_in_batch = super().get_batch_samples(*args, **kwargs)
        if num_items_in_batch is not None and self._weighs_loss and self._loss_is_ours() and not self._loss_is_known():
            self._find_out(self.model_wrapped, self._prepared(samples[0]))
            if self._loss_is_known():
                num_items_in_batch = self._get_num_items_in_batch(samples, self.args.device)
        return samples, num_items_in_batch

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """As Trainer's, of what the loss is a mean over; keeps the counts of the other labels that it has terms of."""
        of_others = {
            name: super(LambTrainer, self)._get_num_items_in_batch(
                [{"labels": b[name]} for b in batch_samples], device
            )
            for name in self._other_terms
            if batch_samples and all(isinstance(b.get(name), Tensor) for b in batch_samples)
        }
        self._items_of_others = of_others
        items = super()._get_num_items_in_batch([self._countable(batch) for batch in batch_samples], device)
        if isinstance(items, Tensor) and self._weighs_loss and not self._loss_is_ours():
            return Count.of(items, self._leave_undivided)
        return items

    def _countable(self, batch: Any) -> Any:
        if self._loss_counts == "labels" or not isinstance(batch.get("labels"), Tensor):
            return batch
        return {"labels": COUNTS[self._loss_counts](batch)}

    def _count_items(self, inputs: dict[str, Any]) -> Tensor:
        return super()._count_items(self._countable(inputs))

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As Trainer's, which divides what a subclass's `compute_loss` returns by the accumulation steps.

        Not where its author has: `loss_is_scaled_for_ga = True`, or a loss computed with num_items_in_batch.
        """
        by_function = self.compute_loss_func is not None
        if num_items_in_batch is None or not self._weighs_loss or (by_function and not self._loss_is_ours()):
            return super().training_step(model, inputs, num_items_in_batch)
        told = getattr(self, "loss_is_scaled_for_ga", None)  # newer versions of transformers look at it
        divided = not told and not by_function
        switches = {"loss_is_scaled_for_ga": not divided}
        if not by_function:
            switches["model_accepts_loss_kwargs"] = not divided  # older ones at this
        accumulation = self.current_gradient_accumulation_steps if divided else 1
        self._asked = self._own_share = False
        with attributes(self, _divided_by=accumulation, _divided=divided, _told=told is not None, **switches):
            return super().training_step(model, inputs, num_items_in_batch)

    def _leave_undivided(self) -> None:
        """A subclass computes with num_items_in_batch itself."""
        self._own_share = True
        if self._divided and not self._told and not self._asked:
            self._divided_by, self._divided = 1, False
            self.loss_is_scaled_for_ga = self.model_accepts_loss_kwargs = True

    def _micro_batches_are_equal(self) -> bool:
        return self._divided and not self._asked

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The micro-batch's share of the global batch's mean loss: mean * items / num_items_in_batch.

        Times the number of processes, because DDP and FSDP average gradients over them; in `training_step` times the
        number of accumulation steps, by which Trainer then divides it, and whatever a subclass has added to it.
        """
        items_in_batch = num_items_in_batch.plain if isinstance(num_items_in_batch, Count) else num_items_in_batch
        if items_in_batch is None or not self._weighs_loss:
            return super().compute_loss(model, inputs, return_outputs, items_in_batch)
        self._asked = True
        if self._is_mean(model, inputs):
            loss, outputs = self._weighted_loss(model, inputs, items_in_batch)
        else:
            with attributes(self, model_accepts_loss_kwargs=self._model_takes_items):
                loss, outputs = super().compute_loss(model, inputs, True, items_in_batch)
        if self._divided_by != 1:
            loss = loss * self._divided_by
        return (loss, outputs) if return_outputs else loss

    def _weighted_loss(
        self, model: nn.Module, inputs: dict[str, Any], items_in_batch: Tensor | int
    ) -> tuple[Tensor, Any]:
        others = {name: inputs[name] for name in self._items_of_others if isinstance(inputs.get(name), Tensor)}
        counted, items = self._countable(inputs), self._count_items(inputs)
        mean, outputs = super().compute_loss(model, inputs, return_outputs=True)
        if mean.dim() > 0:  # DataParallel: a loss of each device's rows
            parts = [{"labels": part} for part in counted["labels"].chunk(len(mean))]
            items, others = torch.stack([super(LambTrainer, self)._count_items(part) for part in parts]), {}
        self._parts = []
        loss: Any = 0.0
        for name, labels in others.items():  # terms that have labels of their own, and so a count of their own
            term = _term(tensor_items(outputs)[self._other_terms[name]], labels)
            mean = mean - term
            loss = loss + self._share_of_mean(term, counted_labels(labels), self._items_of_others[name])
        loss = loss + self._share_of_mean(mean, items, items_in_batch)
        if self.args.average_tokens_across_devices:
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return loss, outputs

    def _share_of_mean(self, mean: Tensor, items: Tensor, items_in_batch: Tensor | int) -> Tensor:
        self._parts.append((mean.detach(), items))
        # A micro-batch without a single label has the mean 0/0.
        return torch.where(items > 0, mean * (items / self._total(items_in_batch)), 0.0).sum()

    # -- what kind of loss it is -------------------------------------------------------------------------------------

    def _loss_is_ours(self) -> bool:
        """Whether no subclass has a `compute_loss` of its own."""
        return getattr(self.compute_loss, "__func__", None) is LambTrainer.compute_loss

    def _loss_is_known(self) -> bool:
        return self._loss_is_mean is False or (self._loss_is_mean is True and self._counts_tried)

    def _is_mean(self, model: nn.Module, inputs: dict[str, Any]) -> bool:
        """Whether the loss stays the same when `num_items_in_batch` doubles; found out once, by all processes."""
        if not self._loss_is_known():
            self._find_out(model, inputs)
        return self._loss_is_mean is not False  # nothing to tell it from, no label: no matter

    def _find_out(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Find out what the loss is, by trying; every process makes the same passes and comes to the same result."""
        if isinstance(model, DistributedDataParallel):
            model = model.module  # whose forward pass would wait for the other processes
        if self._loss_is_mean is None:
            for self._trial_mode in (False, True):  # some models have a loss in training mode only
                trials = torch.stack([self._trial_loss(model, inputs, n) for n in (1, 2)])
                trials = self.accelerator.gather(trials[None])
                if not trials.isinf().any():
                    break
            else:  # it cannot be tried: what its source says
                self._trial_mode, self._counts_tried = False, True
                self._loss_is_mean = inflates_loss(self.accelerator.unwrap_model(self.model))
                return
            one, two = trials[trials.isfinite().all(dim=1)].float().unbind(dim=1)
            if len(one) == 0:
                return  # no label, no loss
            self._loss_is_mean = torch.allclose(one, two, rtol=1e-3)
            if self._loss_is_mean:
                logger.info(
                    f"The loss of {self._model_name()} ignores num_items_in_batch: each micro-batch is weighted by "
                    "its number of labels, so that nothing depends on how the global batch is split."
                )
        if self._loss_is_mean and not self._counts_tried:
            self._warn_unless_additive(model, inputs)

    def _warn_unless_additive(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Find out what the loss is a mean over, and which terms it adds; warn where it is no such mean.

        Such a loss of three rows is the mean of that of the first and that of the others, each weighted by its count.
        """
        others = [name for name in self.label_names if name != "labels" and isinstance(inputs.get(name), Tensor)]
        batch = self._three_rows(inputs)
        able = torch.tensor([batch is not None], device=self.args.device)
        if self.get_cp_size() > 1 or not self.accelerator.gather(able).all():
            self._counts_tried = True
            return
        assert batch is not None
        _, outputs = self._try_out(model, batch)
        terms = {name: key for name in others if (key := logits_of(outputs, batch[name])) is not None}
        batch = perturbed(batch, ["labels", *others], outputs)
        tries = []
        for part in (slice(0, 3), slice(0, 1), slice(1, 3)):
            rows = take_rows(batch, 3, part)
            loss, outputs = self._try_out(model, rows)
            tries.append((rows, loss, {n: _term(outputs[k], rows[n]) for n, k in terms.items() if k in outputs}))
        guesses = [(count, names) for names in ([others, []] if others else [[]]) for count in COUNTS]
        fits = self.accelerator.gather(torch.stack([self._fits(tries, *guess) for guess in guesses])[None])
        told = fits.isfinite().all(dim=1)
        self._counts_tried = bool(told.any() or fits.isinf().any())  # else there are no labels
        if fits.isinf().any() or not told.any():
            return
        for (count, names), fit in zip(guesses, fits[told].min(dim=0).values.tolist(), strict=True):
            if fit == 1:
                self._loss_counts, self._other_terms = count, {name: terms[name] for name in names}
                return
        whole, first, rest = (float(loss) for _, loss, _ in tries)
        logger.warning(
            f"The loss of {self._model_name()} is {whole:.4f} on three rows of the first batch, {first:.4f} on one of "
            f"them and {rest:.4f} on the others: it is no mean over labels, so it depends on how the global batch is "
            "split. Pass a compute_loss_func that divides by num_items_in_batch."
        )

    def _fits(
        self, tries: list[tuple[dict[str, Any], Tensor, dict[str, Tensor]]], count: str, names: list[str]
    ) -> Tensor:
        """1 if the loss is the mean over what `count` says plus the terms of these labels, else 0.

        NaN if that cannot be told, without labels; infinite if the loss could not be tried.
        """
        whole, first, rest = (loss for _, loss, _ in tries)
        if any(loss.isinf() for _, loss, _ in tries):
            return whole.new_tensor(math.inf)
        counts = [self._count_as(count, rows) for rows, _, _ in tries]
        if min(counts) == 0 or not all(loss.isfinite() for _, loss, _ in tries):
            return whole.new_tensor(math.nan)
        if any(name not in terms for name in names for _, _, terms in tries):
            return whole.new_tensor(0.0)
        means = [[loss - sum(terms[name] for name in names) for _, loss, terms in tries]]
        means += [[terms[name] for _, _, terms in tries] for name in names]
        all_counts = [counts, *([counted_labels(rows[name]) for rows, _, _ in tries] for name in names)]
        expected = sum(
            (
                m * (n / total)
                for values, (total, *parts) in zip(means, all_counts, strict=True)
                for m, n in zip(values[1:], parts, strict=True)
                if n > 0
            ),
            torch.zeros_like(whole),
        )
        return ((whole - expected).abs() <= 1e-5 * whole.abs() + 5e-3 * (first - rest).abs()).to(whole)

    def _count_as(self, count: str, inputs: dict[str, Any]) -> Tensor:
        with attributes(self, _loss_counts=count):
            return self._count_items(inputs)

    def _three_rows(self, inputs: dict[str, Any]) -> dict[str, Any] | None:
        """Rows with as many labels as any; None where a batch cannot be taken apart."""
        labels = inputs["labels"]
        if not isinstance(labels, Tensor) or labels.dim() == 0 or len(labels) == 0:
            return None
        most = labels.ne(-100).reshape(len(labels), -1).sum(dim=1).argsort(descending=True, stable=True)
        try:
            batch: dict[str, Any] = take_rows(inputs, len(labels), most.repeat(3)[:3])
        except ValueError:
            return None
        return batch

    def _trial_loss(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: int) -> Tensor:
        return self._try_out(model, inputs, num_items_in_batch)[0]

    def _try_out(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: int | None = None
    ) -> tuple[Tensor, dict[Any, Tensor]]:
        """Loss and outputs without gradients, with the random numbers of now; infinite where it cannot be had.

        Leaves no trace, and never raises: a diagnosis must not end a run.
        """
        with unchanged(self, model, self.args.device), torch.no_grad():
            model.train(self._trial_mode)
            try:
                batch = take_rows(inputs, 0, None)
                with attributes(self, model_accepts_loss_kwargs=self._model_takes_items):
                    loss, outputs = super().compute_loss(model, batch, True, num_items_in_batch)
                loss = loss.detach().float().mean().to(self.args.device)
                return torch.where(loss.isinf(), math.nan, loss), tensor_items(outputs)
            except Exception as error:
                logger.debug(f"a trial pass failed: {error}")
        return torch.tensor(math.inf, device=self.args.device), {}

    def _prepared(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """On this device, without what a subclass's `_prepare_inputs` adds."""
        inputs = self._prepare_input(inputs)  # type: ignore[assignment]
        return inputs

    def _model_name(self) -> str:
        return type(self.accelerator.unwrap_model(self.model)).__name__

    # -- the model card ----------------------------------------------------------------------------------------------

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """As Trainer's, from what is in force, with the section "Large batch" where the optimizer is LAMB."""
        if len(args) < 8 and kwargs.get("dataset") is None and self.dataset_name is not None:
            kwargs["dataset"] = self.dataset_name
        with attributes(self, args=args_in_force(self)):
            super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            complete_model_card(self)

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
        self._eval_sums.clear()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        metrics = output.metrics or {}
        none = torch.zeros(2, dtype=torch.float64)
        sums = torch.stack([self._eval_sums.get(n, none) for n in range(1 + len(self._other_terms))])
        reduced = self.accelerator.reduce(sums.to(self.args.device, torch.float32), "sum")
        losses = [loss / items for loss, items in reduced.tolist() if items > 0]
        if losses:
            metrics[f"{metric_key_prefix}_loss"] = sum(losses)
        return output._replace(metrics=metrics)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """As Trainer's; keeps the sums that `evaluation_loop` divides."""
        if not self._weighs_loss or not isinstance(inputs.get("labels"), Tensor):
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if not self._loss_is_known() and self._loss_is_ours():
            self._find_out(model, self._prepared(inputs))
        # What accelerate has repeated to fill the last batch Trainer drops from the predictions, not from the loss.
        data, own = self._without_padding(inputs)
        if data is not inputs and not prediction_loss_only:
            _, logits, labels = super().prediction_step(model, inputs, False, ignore_keys)
        else:
            logits = labels = None
        self._parts, self._asked, self._own_share = [], False, False
        loss, *found = super().prediction_step(model, data, prediction_loss_only or data is not inputs, ignore_keys)
        if data is inputs:
            logits, labels = found
        items = self._get_num_items_in_batch([data], self.args.device)
        if loss is None or not isinstance(items, Tensor):
            return loss, logits, labels
        count = self._count_items(self._prepared(data))
        parts = self._parts if self._loss_is_ours() else []
        if not parts and (self._asked or self._own_share):  # divided by the labels of all processes
            processes = self.accelerator.num_processes // self.get_tp_size()
            count = count * (processes if self.args.average_tokens_across_devices else 1)
            parts = [(loss * self._total(getattr(items, "plain", items)) / count, count)]
        for n, (mean, part) in enumerate(reversed(parts or [(loss, count)])):
            sums = torch.where(part > 0, mean * part, 0.0).sum()
            kept = self._eval_sums.setdefault(n, torch.zeros(2, dtype=torch.float64))
            kept += (own > 0) * torch.stack((sums, part.sum().to(sums))).cpu()
        return loss, logits, labels

    def _without_padding(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """The batch without what accelerate has repeated to fill it, one row at least, and how many rows are data.

        The same for all processes, which must make as many passes: the batch itself where one cannot take it apart.
        """
        labels, state = inputs["labels"], self.accelerator.gradient_state
        rows, processes = len(labels) if labels.dim() else 1, self.accelerator.num_processes
        if processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return inputs, rows
        own = min(max(int(state.remainder) - self.accelerator.process_index * rows, 0), rows)
        data = None
        with suppress(ValueError):
            data = take_rows(inputs, rows, slice(0, max(own, 1)))
        able = torch.tensor([data is not None], device=self.args.device)
        if self.accelerator.gather(able).all():
            assert data is not None
            return data, own
        if not labels.is_floating_point():  # most losses leave out what is labelled so
            inputs["labels"] = labels.clone()
            inputs["labels"][own:] = -100
        return inputs, rows


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


def _term(logits: Tensor, labels: Tensor) -> Tensor:
    """A head's mean loss, as transformers' models compute it."""
    return nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))


@contextmanager
def attributes(owner: Any, **values: Any) -> Iterator[None]:
    """Give an object these attributes for a while, whatever its class says."""
    before = {name: vars(owner)[name] for name in values if name in vars(owner)}
    vars(owner).update(values)
    try:
        yield
    finally:
        for name in values:
            vars(owner).pop(name, None)
        vars(owner).update(before)


class Count(Tensor):
    """num_items_in_batch for a subclass's own `compute_loss`: says when something is computed with it."""

    _MOVED = frozenset(
        {"to", "float", "long", "cpu", "cuda", "clone", "detach", "expand", "view", "reshape", "unsqueeze"}
    )
    _READ = frozenset({"item", "tolist", "numpy", "__int__", "__float__", "__index__"})
    _COMPARED = frozenset(
        {"eq", "ne", "lt", "le", "gt", "ge", "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"}
    )

    plain: Tensor
    said: Callable[[], None]

    @classmethod
    def of(cls, items: Tensor, said: Callable[[], None]) -> Count:
        count = items.as_subclass(cls)
        count.plain, count.said = items, said
        return count

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        count = next((x for x in (*args, *(kwargs or {}).values()) if isinstance(x, cls)), None)
        if count is None or not hasattr(count, "said"):
            return result
        if name in cls._MOVED and isinstance(result, Tensor):
            return cls.of(result.as_subclass(Tensor), count.said)
        if name in cls._READ or (isinstance(result, Tensor) and name != "__get__" and name not in cls._COMPARED):
            count.said()
        return result
