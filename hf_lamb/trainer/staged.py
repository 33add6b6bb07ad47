"""Training with `batch_size_schedule`: epochs whose global batch changes on the way."""

from __future__ import annotations

import logging
import math
import os
import pickle
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import skip_first_batches
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import SchedulerType, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from hf_lamb.batch_schedule import BatchStages, Stage, batch_stages
from hf_lamb.lamb import Lamb
from hf_lamb.scaling import norm_growth, scaled_learning_rate
from hf_lamb.trainer.callbacks import TrainingLogCallback, add_to_logs
from hf_lamb.trainer.checkpoints import CheckpointError, read_kept
from hf_lamb.trainer.loss import attributes

if TYPE_CHECKING:
    from hf_lamb.trainer.trainer import LambTrainer

__all__ = ["StagedTraining"]

logger = logging.getLogger(__name__)

# What reading a damaged training_args.bin raises.
UNREADABLE: tuple[type[Exception], ...] = (OSError, EOFError, LookupError, TypeError, AttributeError, StopIteration)
UNREADABLE += (zipfile.BadZipFile, pickle.UnpicklingError)


class StagedTraining(TrainingLogCallback):
    """Makes a trainer follow `batch_size_schedule`; adds `lamb/batch_size` to every training log line.

    Trainer synchronises gradients at every micro-batch whose number in the epoch is a multiple of the accumulation
    steps. So the accumulation must not change inside of `Trainer._run_epoch`. It runs once for each part of an epoch
    that has one global batch, one part after the other on the same iterator. Events of the epoch happen once.

    A run resumes at the epoch and micro-batch that the checkpoint's `state.epoch` stands for. An epoch of a stream,
    whose length is not known, is the whole run, as in Trainer; checkpoints have the sequences taken from it. If a
    stream ends earlier, the next epoch begins, and the last micro-batches, if too few for a step, are not trained on.
    """

    def __init__(self, trainer: LambTrainer) -> None:
        self.trainer = trainer
        self.resumes_from: str | None = None  # the checkpoint, set by `LambTrainer.train`
        self._said: BatchStages | None = None
        self._stream = False  # whether the number of micro-batches in an epoch is not known
        # These four are of the epoch that runs.
        self._epoch = 0
        self._micro_batches = 1  # in the epoch, on this process; of a stream those of the run
        self._taken = 0  # how many of them are trained on
        self._is_over = False
        # These two are of the learning rate.
        self._rate_batch: int | None = None  # the batch of the optimizer's peak rate; None: the schedule's largest
        self._behind = 0  # the steps that the scheduler does not count: fp16 has skipped them

    def check(self) -> None:
        """Raise ValueError if something of the run fixes the batch."""
        remedy = "leave it out, or batch_size_schedule"
        if self.trainer.is_deepspeed_enabled:
            raise ValueError(f"DeepSpeed fixes the accumulation steps: {remedy}; DDP and FSDP2 work with it")
        if self.trainer.accelerator.split_batches:
            raise ValueError(f"split_batches fixes the global batch: {remedy}")
        strategy = self.trainer.args.train_sampling_strategy
        if strategy not in ("random", "sequential"):
            raise ValueError(f"train_sampling_strategy {strategy} groups rows for one batch size: {remedy}")
        accumulation = self.trainer.args.gradient_accumulation_steps
        if accumulation != 1:
            raise ValueError(f"gradient_accumulation_steps {accumulation}: {remedy}, from which they follow")

    @property
    def schedule(self) -> str:
        """The schedule of the arguments, which a hyperparameter search may set."""
        return str(getattr(self.trainer.args, "batch_size_schedule", None))

    @property
    def stages(self) -> BatchStages:
        """The stages, with what this run's micro-batch and processes can make."""
        return batch_stages(self.schedule, self.trainer.sequences_at_once())

    @property
    def in_force(self) -> Stage:
        """The stage of the step that comes next; after the training, of the last one."""
        state = self.trainer.state
        return self.stages.at(min(state.global_step, max(0, state.max_steps - 1)))

    def arguments_as_given(self) -> AbstractContextManager[None]:
        """Give the arguments, in this block, the accumulation steps that the user gave."""
        return attributes(self.trainer.args, gradient_accumulation_steps=1)

    def in_words(self, max_steps: int) -> str:
        """Return the stages of a run in words, all if `max_steps` is not positive; of very many only some."""
        used = [stage for stage, _ in self.stages.within(max_steps if max_steps > 0 else sys.maxsize)]
        parts = [f"{stage.batch_size:,} from step {stage.first_step:,}" for stage in used]
        return ", ".join(parts if len(parts) < 8 else [*parts[:2], f"{len(parts) - 3} more", parts[-1]])

    # -- numbers that Trainer computes once --------------------------------------------------------------------------

    def initial_values(self, args: TrainingArguments, dataloader: Any, values: Any) -> Any:
        """Correct what `Trainer.set_initial_training_values` has returned, and log the stages."""
        epochs, steps_per_epoch, examples, samples, _, micro_batches, max_steps = values
        stages = self.stages
        if not has_length(dataloader):
            micro_batches = stages.position(max_steps)[1]
        elif micro_batches:
            steps_per_epoch = stages.steps_in(1, micro_batches)
            start = self._start(micro_batches)
            if args.max_steps > 0:
                whole, more = stages.position(max_steps, micro_batches, start)
                epochs = whole + (more > 0)
            else:
                max_steps = stages.steps_in(args.num_train_epochs, micro_batches, start)
        if args.max_steps > 0:
            samples = stages.sequences(max_steps)
        self._micro_batches, self._stream = micro_batches, not has_length(dataloader)
        self._say(stages, max_steps, examples, None if self._stream else micro_batches)
        return epochs, steps_per_epoch, examples, samples, stages.at(0).batch_size, micro_batches, max_steps

    def _start(self, micro_batches: int) -> tuple[int, int, int]:
        """Return the steps, epochs and micro-batches that are done; another schedule may have made them."""
        if self.resumes_from is None:
            return 0, 0, 0
        state = TrainerState.load_from_json(os.path.join(self.resumes_from, "trainer_state.json"))
        return state.global_step, *epoch_and_micro_batches(state, micro_batches)

    def _say(self, stages: BatchStages, max_steps: int, examples: int, micro_batches: int | None) -> None:
        if not self.trainer.args.should_log or stages == self._said:
            return
        self._said = stages
        at_once, words = self.trainer.sequences_at_once(), self.in_words(max_steps)
        logger.info(f"batch_size_schedule {self.schedule}: {words}, in passes of {at_once:,} sequences")
        if "->" not in self.schedule:
            for stage, _ in stages.within(max_steps):
                if stage.batch_size != stage.asked_for:
                    logger.warning(
                        f"batch_size_schedule {self.schedule}: the batch of {stage.asked_for:,} is "
                        f"{stage.batch_size:,} here, in passes of {at_once:,} sequences (micro-batch x processes)"
                    )
        largest, _ = max(stages.within(max_steps), key=lambda used: used[0].batch_size)
        if micro_batches is not None and largest.accumulation > micro_batches:
            logger.warning(
                f"batch_size_schedule {self.schedule}: the batch of {largest.batch_size:,} is more than an epoch has: "
                f"its steps train on {examples:,} rows each, at the rate of the larger batch"
            )

    def begin(self, checkpoint: str | None) -> tuple[int, int]:
        """Return the epoch, and the micro-batches of it, after which a run begins or goes on.

        Raises:
            CheckpointError: the batches of the checkpoint's run are needed but not known.
        """
        self._rate_batch, self._behind = None, 0
        if checkpoint is None:
            return 0, 0
        self._rate_batch = self._kept().get("rate_batch")
        if self._rate_batch is None and getattr(self.trainer.args, "base_learning_rate", None) is not None:
            self._rate_batch = written_stages(self.trainer, checkpoint)[0].largest
        return self.position(checkpoint)

    def keep(self) -> None:
        """Put into the state what a run that resumes, maybe with another schedule, needs to know of this one."""
        kept: Any = self.trainer.state.stateful_callbacks
        if kept is not None:
            values = {
                "schedule": self.schedule,
                "rate_batch": self._rate_batch or self.stages.largest,
                "epoch": self._epoch,
                "sequences": self._taken * self.trainer.sequences_at_once(),  # of the epoch
            }
            kept["batch_schedule"] = {"attributes": values}

    def _kept(self) -> dict[str, Any]:
        kept: Any = self.trainer.state.stateful_callbacks
        return dict((kept or {}).get("batch_schedule", {}).get("attributes", {}))

    def position(self, checkpoint: str) -> tuple[int, int]:
        """Return the epoch, and the micro-batches of it, that the checkpoint's run was trained on."""
        if self._stream:
            return self._position_in_stream(checkpoint)
        epoch, micro_batches = epoch_and_micro_batches(self.trainer.state, self._micro_batches)
        return epoch, 0 if self.trainer.args.ignore_data_skip else micro_batches

    def _position_in_stream(self, checkpoint: str) -> tuple[int, int]:
        state, kept, at_once = self.trainer.state, self._kept(), self.trainer.sequences_at_once()
        if "sequences" in kept:
            epoch, sequences = kept["epoch"], kept["sequences"]
        else:  # an epoch of a stream is the whole run, here the one that wrote the checkpoint
            written = TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))
            (stages, theirs), done = written_stages(self.trainer, checkpoint), state.epoch or 0.0
            epoch = max(0, math.ceil(done) - 1)
            sequences = round((done - epoch) * stages.position(written.max_steps)[1]) * theirs
        if self.trainer.args.ignore_data_skip:
            return epoch, 0
        if sequences % at_once:
            raise CheckpointError(
                f"{checkpoint} has taken {sequences:,} sequences of its stream, which is no multiple of {at_once:,} "
                "(micro-batch x processes): resume with a micro-batch that fits, or with ignore_data_skip"
            )
        taken = sequences // at_once
        left = self.stages.position(state.max_steps)[1] - self.stages.position(state.global_step)[1]
        self._micro_batches = max(self._micro_batches, taken + left)  # with another schedule it has taken more or less
        return epoch, taken

    # -- an epoch ----------------------------------------------------------------------------------------------------

    def run_epoch(
        self,
        run: Callable[..., None],
        *,
        epoch: int,
        train_dataloader: Any,
        steps_in_epoch: int,
        num_update_steps_per_epoch: int,
        resume_from_checkpoint: str | None,
        epochs_trained: int,
        steps_trained_in_current_epoch: int,
        **others: Any,
    ) -> None:
        """Run an epoch, or what a resumed run has left of it.

        Args:
            run: `Trainer._run_epoch`; the other arguments are its own.
        """
        trainer, resumes = self.trainer, resume_from_checkpoint is not None and epoch == epochs_trained
        if self._stream:  # Trainer's number does not have what another schedule has taken
            steps_in_epoch = self._micro_batches
        self._epoch, self._taken, self._is_over = epoch, steps_trained_in_current_epoch if resumes else 0, False
        if resumes and not self._taken:
            trainer._load_rng_state(resume_from_checkpoint)
        if self._taken:
            train_dataloader = skip_first_batches(train_dataloader, self._taken)
        batches = self._batches_of(train_dataloader)
        if self._taken:  # as in Trainer: once the first batches are read, the random numbers are the checkpoint's
            self._is_over = not batches.read_ahead(self.in_force.accumulation)
            trainer._load_rng_state(resume_from_checkpoint)
        while not self._is_over:
            step, max_steps = trainer.state.global_step, trainer.state.max_steps
            steps, micro_batches = self.stages.advance(step, steps_in_epoch - self._taken, max_steps)
            with (
                attributes(trainer.args, gradient_accumulation_steps=self.stages.at(step).accumulation),
                attributes(trainer.callback_handler, on_epoch_end=self._at_true_ends(batches)),
            ):
                run(
                    epoch=epoch,
                    train_dataloader=batches,
                    steps_in_epoch=micro_batches,
                    num_update_steps_per_epoch=steps,
                    resume_from_checkpoint=None,
                    epochs_trained=epochs_trained,
                    steps_trained_in_current_epoch=0,
                    **others,
                )

    def _batches_of(self, loader: Any) -> Batches:
        """Return the batches of this epoch, in the order that Trainer's own epoch has."""
        sampler: Any = getattr(getattr(loader, "batch_sampler", None), "batch_sampler", None)
        for part in (loader, sampler):
            if hasattr(part, "set_epoch"):
                part.set_epoch(self._epoch)
        return Batches(self._whole_steps(iter(loader)) if self._stream else loader)

    def _whole_steps(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield the micro-batches of a stream, without those at its end that are too few for a step."""
        while len(step := list(islice(batches, self.in_force.accumulation))) == self.in_force.accumulation:
            yield from step

    def _at_true_ends(self, batches: Batches) -> Callable[..., TrainerControl]:
        """Return `on_epoch_end` of the callbacks; it does nothing if only a part of the epoch is over."""
        on_epoch_end = self.trainer.callback_handler.on_epoch_end

        def on_part_end(args: TrainingArguments, state: TrainerState, control: TrainerControl) -> TrainerControl:
            stops = control.should_epoch_stop or control.should_training_stop
            done = self._taken >= self._micro_batches or state.global_step >= state.max_steps
            self._is_over = bool(stops or done or not batches.read_ahead(1))
            return on_epoch_end(args, state, control) if self._is_over else control

        return on_part_end

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Correct the epoch, which Trainer has computed for a part of it."""
        self._taken += self.trainer.current_gradient_accumulation_steps
        state.epoch = self._epoch + self._taken / self._micro_batches

    def on_training_log(self, logs: dict[str, float], state: TrainerState, lamb: Lamb | None) -> None:
        """Log the global batch of the last step."""
        add_to_logs(logs, state, {"lamb/batch_size": self.stages.at(state.global_step - 1).batch_size})

    # -- the learning rate -------------------------------------------------------------------------------------------

    def follow_batch(self, scheduler: LRScheduler) -> LambdaLR:
        """Return a schedule whose rate is scaled to the batch in force; the given one is for the largest batch.

        Raises:
            ValueError: the schedule's rate is no function of the step.
        """
        if not isinstance(scheduler, LambdaLR):
            name = SchedulerType(self.trainer.args.lr_scheduler_type).value
            raise ValueError(
                f"lr_scheduler_type {name}: with batch_size_schedule and base_learning_rate use a function of the "
                "step, such as linear"
            )

        def scaled(factor: Callable[[int], float]) -> Callable[[int], float]:
            return lambda step: factor(step) * self._of_peak(self.stages.at(step + self._behind).batch_size)

        return LambdaLR(scheduler.optimizer, [scaled(factor) for factor in scheduler.lr_lambdas])

    def _of_peak(self, batch: int) -> float:
        """Return the rate of a batch as a fraction of the optimizer's peak rate."""
        return self._scaled(1.0, self._rate_batch or self.stages.largest, batch)

    def _scaled(self, rate: float, of_batch: int, batch: int) -> float:
        """Return the rate of a batch, given that of another one; the same if rates do not follow the batch."""
        args: Any = self.trainer.args
        if not self.trainer.learning_rate_why:
            return rate
        return scaled_learning_rate(rate, of_batch, batch, args.learning_rate_scaling).learning_rate

    @property
    def largest_of_peak(self) -> float:
        """The rate of the largest batch as a fraction of the optimizer's peak rate, which a checkpoint may have."""
        return self._of_peak(self.stages.largest)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set the rate of the step's batch; the scheduler may have that of a checkpoint, or of a skipped step."""
        trainer, scheduler = self.trainer, self.trainer.lr_scheduler
        made = trainer._created_lr_scheduler and trainer._made_optimizer
        if not (made and trainer.learning_rate_why and isinstance(scheduler, LambdaLR)):
            return
        count = scheduler.last_epoch
        self._behind = state.global_step - count
        rates = [rate * factor(count) for rate, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        if rates == scheduler.get_last_lr():
            return
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        scheduler._last_lr = rates

    def norm_growth(self, rate: float, max_steps: int) -> float:
        """Return `hf_lamb.scaling.norm_growth` of a run with this rate at the largest batch."""
        stages = self.stages
        return sum(
            norm_growth(self._scaled(rate, stages.largest, stage.batch_size), max_steps, stage.first_step, end)
            for stage, end in stages.within(max_steps)
        )


class Batches(Iterator[Any]):
    """The batches of a loader, which can be read ahead."""

    def __init__(self, loader: Iterable[Any]) -> None:
        self._left = iter(loader)

    def __next__(self) -> Any:
        return next(self._left)

    def read_ahead(self, count: int) -> bool:
        """Read `count` batches, which stay the next ones; return whether there is any."""
        first = list(islice(self._left, count))
        self._left = chain(first, self._left)
        return bool(first)


def epoch_and_micro_batches(state: TrainerState, micro_batches: int) -> tuple[int, int]:
    """Return the whole epochs that are done, and the micro-batches of the next one, which has `micro_batches`."""
    done = state.epoch or 0.0
    return int(done), round((done - int(done)) * micro_batches)


# -- the run that wrote a checkpoint ----------------------------------------------------------------------------------


def refuse_without_schedule(checkpoint: str) -> None:
    """Raise CheckpointError if a checkpoint's run had a schedule: Trainer would resume elsewhere in the data."""
    schedule = read_kept(checkpoint).get("batch_schedule", {}).get("attributes", {}).get("schedule")
    if schedule is None:
        with suppress(*UNREADABLE):
            schedule = written_arguments(checkpoint).get("batch_size_schedule")
    if schedule is not None:
        raise CheckpointError(
            f"{checkpoint} is of a run with batch_size_schedule {schedule!r}, and this run has none: give it, or "
            "another one, such as '0:256' for one batch"
        )


def written_stages(trainer: LambTrainer, checkpoint: str) -> tuple[BatchStages, int]:
    """Return the stages of the run that wrote a checkpoint, one if it had no schedule, and the sequences of a pass.

    Raises:
        CheckpointError: the checkpoint has no training_args.bin that can be read.
    """
    try:
        args = written_arguments(checkpoint)
        micro_batch = args["per_device_train_batch_size"] * max(1, trainer.args.n_gpu)
        if args["auto_find_batch_size"]:
            written = TrainerState.load_from_json(os.path.join(checkpoint, "trainer_state.json"))
            micro_batch = written.train_batch_size or micro_batch
        accumulation = args["gradient_accumulation_steps"]
    except UNREADABLE as error:
        raise CheckpointError(
            f"{checkpoint} has no training_args.bin that can be read, so its batch is not known: resume without "
            "batch_size_schedule, or start a new run with trainer.start_from"
        ) from error
    processes = len(list(Path(checkpoint).glob("rng_state*.pth")))
    processes //= trainer.get_tp_size() * trainer.get_cp_size() * trainer.get_sp_size()
    if getattr(args.get("accelerator_config"), "split_batches", False):
        processes = 1
    at_once = micro_batch * max(1, processes)
    return batch_stages(args.get("batch_size_schedule") or f"0:{at_once * accumulation}", at_once), at_once


def written_arguments(checkpoint: str) -> dict[str, Any]:
    """Return the training arguments of a checkpoint. It runs no code of the file, so only plain values are right."""
    with zipfile.ZipFile(os.path.join(checkpoint, "training_args.bin")) as file:
        name = next(name for name in file.namelist() if name.endswith("data.pkl"))
        with file.open(name) as values:
            return dict(vars(_Values(values).load()))


class _Values(pickle.Unpickler):
    """Reads a pickle with an empty class in place of each of its classes and functions."""

    def find_class(self, module: str, name: str) -> Any:
        return _Empty

    def persistent_load(self, pid: Any) -> Any:
        return None


class _Empty(dict[Any, Any]):
    def __init__(self, *args: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        vars(self).update(state if isinstance(state, dict) else {})
