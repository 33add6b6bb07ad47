"""Weights the loss of a micro-batch so that the global batch's loss does not depend on how the batch is split."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers.trainer_utils import EvalLoopOutput

from hf_lamb.optim_args import inflates_loss
from hf_lamb.trainer.trials import COUNTS, counted_labels, logits_of, perturbed, take_rows, tensor_items, unchanged

if TYPE_CHECKING:
    from hf_lamb.trainer.trainer import LambTrainer

__all__ = ["LossWeighting", "attributes"]

logger = logging.getLogger(__name__)


class MeanOver(NamedTuple):
    """A mean, and the number of items that it is over; one entry for each of DataParallel's devices."""

    mean: Tensor
    items: Tensor


class LossWeighting:
    """Weights the loss of each micro-batch by its number of labels. `LambTrainer` lists the losses it is exact for."""

    # These three hold while a micro-batch is trained.
    _divided = False  # whether Trainer divides the loss by the accumulation steps
    _divided_by = 1  # the number that Trainer divides by
    _told = False  # whether the subclass sets `loss_is_scaled_for_ga`

    def __init__(self, trainer: LambTrainer) -> None:
        self.trainer = trainer
        self.active = trainer.get_sp_size() == 1  # with DeepSpeed's sequence parallelism Trainer computes the loss
        self._model_takes_items = trainer.model_accepts_loss_kwargs
        if self.active:
            trainer.model_accepts_loss_kwargs = True  # makes Trainer count the labels of the global batch
        # None: not tried yet. True: the loss is a mean over the micro-batch and ignores num_items_in_batch.
        self._mean: bool | None = True
        if self._model_takes_items or trainer.compute_loss_func is not None:
            self._mean = None
        self._counts, self._counts_tried = "labels", False  # what the loss is the mean over, a key of COUNTS
        self._other_terms: dict[str, Any] = {}  # name of other labels -> key of their logits; the loss adds their CE
        self._items_of_others: dict[str, Any] = {}  # name of other labels -> their number in the global batch
        self._trial_mode = False  # whether trial passes run in training mode
        self._asked = False  # whether `compute` was called for this micro-batch
        self._own_share = False  # whether a subclass has used num_items_in_batch for this micro-batch
        self._parts: list[MeanOver] = []
        self._eval_sums: dict[int, Tensor] = {}  # number of the term -> float64 [sum of losses, number of items]

    # -- what is counted ---------------------------------------------------------------------------------------------

    def items_of(self, samples: list[Any], num_items_in_batch: Any) -> Any:
        """Return the number of items of the global batch. On the first batch find out what these items are."""
        if num_items_in_batch is not None and self.active and self.trainer.loss_is_ours() and not self.is_known():
            self._find_out(self.trainer.model_wrapped, self._prepared(samples[0]))
            if self.is_known():
                return self.trainer._get_num_items_in_batch(samples, self.trainer.args.device)
        return num_items_in_batch

    def count(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Count the items that the loss is a mean over, as Trainer counts labels; also count the other labels."""
        self._items_of_others = {
            name: self.trainer.count_labels([{"labels": b[name]} for b in batch_samples], device)
            for name in self._other_terms
            if batch_samples and all(isinstance(b.get(name), Tensor) for b in batch_samples)
        }
        items = self.trainer.count_labels([self._countable(batch) for batch in batch_samples], device)
        if isinstance(items, Tensor) and self.active and not self.trainer.loss_is_ours():
            return Count.of(items, self._leave_undivided)
        return items

    def share_of(self, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None) -> Tensor | float:
        """Return this micro-batch's part of the global batch: its items / all items, or 1 / all micro-batches."""
        args = self.trainer.args
        if num_items_in_batch is None or "labels" not in inputs:
            return float(1 / (self.trainer.current_gradient_accumulation_steps * args.world_size))
        processes = 1 if args.average_tokens_across_devices else args.world_size
        total = self.total(getattr(num_items_in_batch, "plain", num_items_in_batch))
        share: Tensor = self._count_items(inputs) / (total * processes)
        return share

    def total(self, items_in_batch: Tensor | int) -> Tensor | int:
        """Return the number of items of the global batch; Trainer has changed it if DataParallel is used."""
        if isinstance(items_in_batch, Tensor) and items_in_batch.dim() > 0:
            items_in_batch = items_in_batch.flatten()[0]
        several = self.trainer.args.n_gpu > 1 and not self.trainer.args.average_tokens_across_devices
        return items_in_batch * self.trainer.args.n_gpu if several else items_in_batch

    def _count_items(self, inputs: dict[str, Any]) -> Tensor:
        return self._count_labels(self._countable(inputs))

    def _count_labels(self, inputs: dict[str, Any]) -> Tensor:
        """Count the labels of this micro-batch as Trainer counts those of the global batch."""
        labels: Tensor = inputs.get("shift_labels", inputs["labels"])
        if self.trainer._loss_shifts_labels and "shift_labels" not in inputs:
            labels = labels[..., 1:]
        return labels.ne(-100).sum()

    def _countable(self, batch: Any) -> Any:
        if self._counts == "labels" or not isinstance(batch.get("labels"), Tensor):
            return batch
        return {"labels": COUNTS[self._counts](batch)}

    # -- a micro-batch -----------------------------------------------------------------------------------------------

    @contextmanager
    def training(self, num_items_in_batch: Tensor | int | None) -> Iterator[None]:
        """Make Trainer's `training_step` divide the loss of a subclass's `compute_loss` by the accumulation steps.

        It does not divide if the subclass has done so: with `loss_is_scaled_for_ga = True`, or with
        num_items_in_batch.
        """
        trainer = self.trainer
        by_function = trainer.compute_loss_func is not None
        if num_items_in_batch is None or not self.active or (by_function and not self.trainer.loss_is_ours()):
            yield
            return
        told = getattr(trainer, "loss_is_scaled_for_ga", None)  # newer versions of transformers read this
        divided = not told and not by_function
        switches = {"loss_is_scaled_for_ga": not divided}
        if not by_function:
            switches["model_accepts_loss_kwargs"] = not divided  # older versions read this
        accumulation = trainer.current_gradient_accumulation_steps if divided else 1
        self._asked = self._own_share = False
        own = {"_divided_by": accumulation, "_divided": divided, "_told": told is not None}
        with attributes(trainer, **switches), attributes(self, **own):
            yield

    def _leave_undivided(self) -> None:
        """Do not divide the loss of this micro-batch: the subclass has used num_items_in_batch."""
        self._own_share = True
        if self._divided and not self._told and not self._asked:
            self._divided_by, self._divided = 1, False
            self.trainer.loss_is_scaled_for_ga = self.trainer.model_accepts_loss_kwargs = True

    def micro_batches_are_equal(self) -> bool:
        """Return whether all micro-batches have the same weight in the loss, independent of their labels."""
        return self._divided and not self._asked

    def compute(self, model: nn.Module, inputs: dict[str, Any], items_in_batch: Tensor | int) -> tuple[Tensor, Any]:
        """Return the micro-batch's part of the global batch's mean loss, and the outputs.

        The part is mean * items / items_in_batch.

        The loss is multiplied by the number of processes, because DDP and FSDP average gradients over them. In
        `training_step` it is also multiplied by the number of accumulation steps, because Trainer then divides it, and
        whatever a subclass has added, by that number.

        Args:
            model: the model, or its wrapper.
            inputs: the micro-batch.
            items_in_batch: the number of items of the global batch.
        """
        self._asked = True
        if self.is_mean(model, inputs):
            loss, outputs = self._weighted_loss(model, inputs, items_in_batch)
        else:
            with attributes(self.trainer, model_accepts_loss_kwargs=self._model_takes_items):
                loss, outputs = self.trainer.unweighted_loss(model, inputs, True, items_in_batch)
        if self._divided_by != 1:
            loss = loss * self._divided_by
        return loss, outputs

    def _weighted_loss(
        self, model: nn.Module, inputs: dict[str, Any], items_in_batch: Tensor | int
    ) -> tuple[Tensor, Any]:
        others = {name: inputs[name] for name in self._items_of_others if isinstance(inputs.get(name), Tensor)}
        counted, items = self._countable(inputs), self._count_items(inputs)
        mean, outputs = self.trainer.unweighted_loss(model, inputs, return_outputs=True)
        if mean.dim() > 0:  # DataParallel returns one loss for the rows of each device
            parts = [{"labels": part} for part in counted["labels"].chunk(len(mean))]
            items, others = torch.stack([self._count_labels(part) for part in parts]), {}
        self._parts = []
        loss: Any = 0.0
        for name, labels in others.items():  # these terms have their own labels, so they have their own counts
            term = _term(tensor_items(outputs)[self._other_terms[name]], labels)
            mean = mean - term
            loss = loss + self._share_of_mean(term, counted_labels(labels), self._items_of_others[name])
        loss = loss + self._share_of_mean(mean, items, items_in_batch)
        if self.trainer.args.average_tokens_across_devices:
            loss = loss * (self.trainer.accelerator.num_processes // self.trainer.get_tp_size())
        return loss, outputs

    def _share_of_mean(self, mean: Tensor, items: Tensor, items_in_batch: Tensor | int) -> Tensor:
        self._parts.append(MeanOver(mean.detach(), items))
        # The mean of a micro-batch without labels is 0/0.
        return torch.where(items > 0, mean * (items / self.total(items_in_batch)), 0.0).sum()

    # -- what kind of loss it is -------------------------------------------------------------------------------------

    def is_known(self) -> bool:
        return self._mean is False or (self._mean is True and self._counts_tried)

    def is_mean(self, model: nn.Module, inputs: dict[str, Any]) -> bool:
        """Return whether the loss ignores `num_items_in_batch`; all processes find it out together, once."""
        if not self.is_known():
            self._find_out(model, inputs)
        return self._mean is not False  # None: the batch has no labels, so either answer gives the same loss

    def _find_out(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Find out by trial passes what the loss is. Every process makes the same passes and gets the same result."""
        if isinstance(model, DistributedDataParallel):
            model = model.module  # DDP's forward pass would wait for the other processes
        if self._mean is None:
            for self._trial_mode in (False, True):  # some models return a loss in training mode only
                trials = torch.stack([self._trial_loss(model, inputs, n) for n in (1, 2)])
                trials = self.trainer.accelerator.gather(trials[None])
                if not trials.isinf().any():
                    break
            else:  # the trial passes fail: read the source of `forward` instead
                self._trial_mode, self._counts_tried = False, True
                # A compute_loss_func is given the number of labels, so that it uses it.
                own = self.trainer.compute_loss_func is not None
                self._mean = not own and inflates_loss(self.trainer.accelerator.unwrap_model(self.trainer.model))
                return
            one, two = trials[trials.isfinite().all(dim=1)].float().unbind(dim=1)
            if len(one) == 0:
                return  # no labels, so no loss
            self._mean = torch.allclose(one, two, rtol=1e-3)
            if self._mean:
                logger.info(
                    f"The loss of {self._model_name()} ignores num_items_in_batch: LambTrainer weights each micro-"
                    "batch by its number of labels, so that the loss does not depend on how the global batch is split."
                )
        if self._mean and not self._counts_tried:
            self._warn_unless_additive(model, inputs)

    def _warn_unless_additive(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Find out what the loss is a mean over and which terms it adds; warn if nothing fits.

        If a guess is right, the loss of three rows is the weighted mean of the loss of the first row and the loss of
        the other two, with their counts as weights.
        """
        names = [name for name in self.trainer.label_names if name != "labels"]
        others = [name for name in names if isinstance(inputs.get(name), Tensor)]
        batch = self._three_rows(inputs)
        able = torch.tensor([batch is not None], device=self.trainer.args.device)
        if self.trainer.get_cp_size() > 1 or not self.trainer.accelerator.gather(able).all():
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
        fits = self.trainer.accelerator.gather(torch.stack([self._fits(tries, *guess) for guess in guesses])[None])
        told = fits.isfinite().all(dim=1)
        self._counts_tried = bool(told.any() or fits.isinf().any())  # False if there are no labels
        if fits.isinf().any() or not told.any():
            return
        for (count, names), fit in zip(guesses, fits[told].min(dim=0).values.tolist(), strict=True):
            if fit == 1:
                self._counts, self._other_terms = count, {name: terms[name] for name in names}
                return
        whole, first, rest = (float(loss) for _, loss, _ in tries)
        logger.warning(
            f"Pass a compute_loss_func that divides by num_items_in_batch: the loss of {self._model_name()} is no "
            "mean over labels, so it depends on how the global batch is split. On three rows of the first batch it is "
            f"{whole:.4f}, on one of them {first:.4f}, on the other two {rest:.4f}."
        )

    def _fits(
        self, tries: list[tuple[dict[str, Any], Tensor, dict[str, Tensor]]], count: str, names: list[str]
    ) -> Tensor:
        """Test a guess: the loss is a mean over `count` plus the cross-entropies of the labels `names`.

        Returns:
            1 if the guess fits, 0 if not; NaN if there are no labels to test it with; inf if a trial pass failed.
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
        with attributes(self, _counts=count):
            return self._count_items(inputs)

    def _three_rows(self, inputs: dict[str, Any]) -> dict[str, Any] | None:
        """Return the three rows with the most labels; None if the batch cannot be split into rows."""
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
        as_trainer_gives_it = torch.tensor(num_items_in_batch, device=self.trainer.args.device)
        return self._try_out(model, inputs, as_trainer_gives_it)[0]

    def _try_out(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | None = None
    ) -> tuple[Tensor, dict[Any, Tensor]]:
        """Return loss and outputs of a trial pass without gradients; the loss is inf if the pass fails.

        It changes nothing, random number generators included, and never raises: a diagnosis must not stop a run.
        """
        with unchanged(self.trainer, model, self.trainer.args.device), torch.no_grad():
            model.train(self._trial_mode)
            try:
                batch = take_rows(inputs, 0, None)
                with attributes(self.trainer, model_accepts_loss_kwargs=self._model_takes_items):
                    loss, outputs = self.trainer.unweighted_loss(model, batch, True, num_items_in_batch)
                loss = loss.detach().float().mean().to(self.trainer.args.device)
                return torch.where(loss.isinf(), math.nan, loss), tensor_items(outputs)
            except Exception as error:
                logger.debug(f"a trial pass failed: {error}")
        return torch.tensor(math.inf, device=self.trainer.args.device), {}

    def _prepared(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Move inputs to this device, without what a subclass's `_prepare_inputs` adds."""
        inputs = self.trainer._prepare_input(inputs)  # type: ignore[assignment]
        return inputs

    def _model_name(self) -> str:
        return type(self.trainer.accelerator.unwrap_model(self.trainer.model)).__name__

    # -- the loss of an evaluation: the mean over all its labels -----------------------------------------------------

    def evaluating(self) -> None:
        """Start an evaluation: reset the sums."""
        self._eval_sums.clear()

    def evaluated(self, output: EvalLoopOutput, metric_key_prefix: str) -> EvalLoopOutput:
        """Return an evaluation's output with the loss weighted by labels."""
        metrics = output.metrics or {}
        none = torch.zeros(2, dtype=torch.float64)
        sums = torch.stack([self._eval_sums.get(n, none) for n in range(1 + len(self._other_terms))])
        reduced = self.trainer.accelerator.reduce(sums.to(self.trainer.args.device, torch.float32), "sum")
        losses = [loss / items for loss, items in reduced.tolist() if items > 0]
        if losses:
            metrics[f"{metric_key_prefix}_loss"] = sum(losses)
        return output._replace(metrics=metrics)

    def predict(
        self,
        prediction_step: Callable[..., tuple[Tensor | None, Any, Any]],
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        """Return what Trainer's `prediction_step` returns, and add to the sums that `evaluated` divides."""
        if not self.is_known() and self.trainer.loss_is_ours():
            self._find_out(model, self._prepared(inputs))
        # accelerate repeats rows to fill the last batch. Trainer drops them from the predictions, but not from the
        # loss.
        data, own = self._without_padding(inputs)
        if data is not inputs and not prediction_loss_only:
            _, logits, labels = prediction_step(model, inputs, False, ignore_keys)
        else:
            logits = labels = None
        self._parts, self._asked, self._own_share = [], False, False
        loss, *found = prediction_step(model, data, prediction_loss_only or data is not inputs, ignore_keys)
        if data is inputs:
            logits, labels = found
        items = self.trainer._get_num_items_in_batch([data], self.trainer.args.device)
        if loss is None or not isinstance(items, Tensor):
            return loss, logits, labels
        count = self._count_items(self._prepared(data))
        parts = self._parts if self.trainer.loss_is_ours() else []
        if not parts and (self._asked or self._own_share):  # the loss is divided by the labels of all processes
            processes = self.trainer.accelerator.num_processes // self.trainer.get_tp_size()
            count = count * (processes if self.trainer.args.average_tokens_across_devices else 1)
            parts = [MeanOver(loss * self.total(getattr(items, "plain", items)) / count, count)]
        for n, (mean, part) in enumerate(reversed(parts or [MeanOver(loss, count)])):
            sums = torch.where(part > 0, mean * part, 0.0).sum()
            kept = self._eval_sums.setdefault(n, torch.zeros(2, dtype=torch.float64))
            kept += (own > 0) * torch.stack((sums, part.sum().to(sums))).cpu()
        return loss, logits, labels

    def _without_padding(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """Remove the rows that accelerate has repeated to fill the last batch, but keep at least one row.

        All processes must make the same number of passes: if one of them cannot split its batch, all keep their
        batches.

        Returns:
            The batch, and how many of its rows are data.
        """
        labels, state = inputs["labels"], self.trainer.accelerator.gradient_state
        rows, processes = len(labels) if labels.dim() else 1, self.trainer.accelerator.num_processes
        if processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return inputs, rows
        own = min(max(int(state.remainder) - self.trainer.accelerator.process_index * rows, 0), rows)
        data = None
        with suppress(ValueError):
            data = take_rows(inputs, rows, slice(0, max(own, 1)))
        able = torch.tensor([data is not None], device=self.trainer.args.device)
        if self.trainer.accelerator.gather(able).all():
            assert data is not None
            return data, own
        if not labels.is_floating_point():  # most losses ignore the label -100
            inputs["labels"] = labels.clone()
            inputs["labels"][own:] = -100
        return inputs, rows


def _term(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy, as the heads of transformers' models compute it."""
    return nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))


@contextmanager
def attributes(owner: Any, **values: Any) -> Iterator[None]:
    """Set attributes of an object for this block."""
    before = {name: vars(owner)[name] for name in values if name in vars(owner)}
    vars(owner).update(values)
    try:
        yield
    finally:
        for name in values:
            vars(owner).pop(name, None)
        vars(owner).update(before)


class Count(Tensor):
    """num_items_in_batch for a subclass's `compute_loss`; calls `on_use` when something is computed with it."""

    _MOVED = frozenset(
        {"to", "float", "long", "cpu", "cuda", "clone", "detach", "expand", "view", "reshape", "unsqueeze"}
    )
    _READ = frozenset({"item", "tolist", "numpy", "__int__", "__float__", "__index__"})
    _COMPARED = frozenset(
        {"eq", "ne", "lt", "le", "gt", "ge", "__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"}
    )

    plain: Tensor
    on_use: Callable[[], None]

    @classmethod
    def of(cls, items: Tensor, on_use: Callable[[], None]) -> Count:
        count = items.as_subclass(cls)
        count.plain, count.on_use = items, on_use
        return count

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        count = next((x for x in (*args, *(kwargs or {}).values()) if isinstance(x, cls)), None)
        if count is None or not hasattr(count, "on_use"):
            return result
        if name in cls._MOVED and isinstance(result, Tensor):
            return cls.of(result.as_subclass(Tensor), count.on_use)
        if name in cls._READ or (isinstance(result, Tensor) and name != "__get__" and name not in cls._COMPARED):
            count.on_use()
        return result
