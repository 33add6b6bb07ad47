"""The loss of a micro-batch: its share of the mean over the global batch, however that batch is split."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers.trainer_utils import EvalLoopOutput

from hf_lamb.registration import inflates_loss
from hf_lamb.trainer.trials import COUNTS, counted_labels, logits_of, perturbed, take_rows, tensor_items, unchanged

if TYPE_CHECKING:
    from hf_lamb.trainer.trainer import LambTrainer

__all__ = ["LossWeighting", "attributes"]

logger = logging.getLogger(__name__)


class LossWeighting:
    """Weights the loss of each micro-batch by its labels; see `LambTrainer` for which losses it is exact."""

    # While a micro-batch is trained: whether Trainer divides its loss, by what, and whether a subclass has told so.
    _divided, _divided_by, _told = False, 1, False

    def __init__(self, trainer: LambTrainer) -> None:
        self.trainer = trainer
        self.active = trainer.get_sp_size() == 1  # sequence parallelism (DeepSpeed's) brings a loss of its own
        self._model_takes_items = trainer.model_accepts_loss_kwargs
        if self.active:
            trainer.model_accepts_loss_kwargs = True  # Trainer counts the labels of the global batch
        # None: not tried yet. True: the loss is a mean over the micro-batch, whatever num_items_in_batch says.
        self._mean: bool | None = True
        if self._model_takes_items or trainer.compute_loss_func is not None:
            self._mean = None
        self._counts, self._counts_tried = "labels", False  # what it is the mean over
        self._other_terms: dict[str, Any] = {}  # other labels, and the outputs whose cross-entropy is added
        self._items_of_others: dict[str, Any] = {}  # how many of them the global batch has
        self._trial_mode = False
        # Of this micro-batch: whether `compute_loss` was asked, and whether a subclass has divided by itself.
        self._asked = self._own_share = False
        self._parts: list[tuple[Tensor, Tensor]] = []  # means, and what they are over
        self._eval_sums: dict[int, Tensor] = {}

    # -- what is counted ---------------------------------------------------------------------------------------------

    def items_of(self, samples: list[Any], num_items_in_batch: Any) -> Any:
        """The items of the global batch; on the first one finds out what the loss is a mean over, and counts that."""
        if num_items_in_batch is not None and self.active and self.trainer.loss_is_ours() and not self.is_known():
            self._find_out(self.trainer.model_wrapped, self._prepared(samples[0]))
            if self.is_known():
                return self.trainer._get_num_items_in_batch(samples, self.trainer.args.device)
        return num_items_in_batch

    def count(self, batch_samples: list[Any], device: torch.device) -> Any:
        """As Trainer counts, of what the loss is a mean over; keeps the counts of the other labels it has terms of."""
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
        """The part of the global batch that this micro-batch is: by labels where the loss is a mean over labels."""
        args = self.trainer.args
        if num_items_in_batch is None or "labels" not in inputs:
            return float(1 / (self.trainer.current_gradient_accumulation_steps * args.world_size))
        processes = 1 if args.average_tokens_across_devices else args.world_size
        total = self.total(getattr(num_items_in_batch, "plain", num_items_in_batch))
        share: Tensor = self._count_items(inputs) / (total * processes)
        return share

    def total(self, items_in_batch: Tensor | int) -> Tensor | int:
        """The items of the global batch as one number, where Trainer has prepared it for DataParallel."""
        if isinstance(items_in_batch, Tensor) and items_in_batch.dim() > 0:
            items_in_batch = items_in_batch.flatten()[0]
        several = self.trainer.args.n_gpu > 1 and not self.trainer.args.average_tokens_across_devices
        return items_in_batch * self.trainer.args.n_gpu if several else items_in_batch

    def _count_items(self, inputs: dict[str, Any]) -> Tensor:
        return self._count_labels(self._countable(inputs))

    def _count_labels(self, inputs: dict[str, Any]) -> Tensor:
        """The labels of this micro-batch, counted as Trainer counts those of the global one."""
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
        """Let Trainer's `training_step` divide what a subclass's `compute_loss` returns by the accumulation steps.

        Not where its author has: `loss_is_scaled_for_ga = True`, or a loss computed with num_items_in_batch.
        """
        trainer = self.trainer
        by_function = trainer.compute_loss_func is not None
        if num_items_in_batch is None or not self.active or (by_function and not self.trainer.loss_is_ours()):
            yield
            return
        told = getattr(trainer, "loss_is_scaled_for_ga", None)  # newer versions of transformers look at it
        divided = not told and not by_function
        switches = {"loss_is_scaled_for_ga": not divided}
        if not by_function:
            switches["model_accepts_loss_kwargs"] = not divided  # older ones at this
        accumulation = trainer.current_gradient_accumulation_steps if divided else 1
        self._asked = self._own_share = False
        own = {"_divided_by": accumulation, "_divided": divided, "_told": told is not None}
        with attributes(trainer, **switches), attributes(self, **own):
            yield

    def _leave_undivided(self) -> None:
        """A subclass computes with num_items_in_batch itself."""
        self._own_share = True
        if self._divided and not self._told and not self._asked:
            self._divided_by, self._divided = 1, False
            self.trainer.loss_is_scaled_for_ga = self.trainer.model_accepts_loss_kwargs = True

    def micro_batches_are_equal(self) -> bool:
        """Whether all count the same in the loss of the step, however many labels each has."""
        return self._divided and not self._asked

    def compute(self, model: nn.Module, inputs: dict[str, Any], items_in_batch: Tensor | int) -> tuple[Tensor, Any]:
        """The micro-batch's share of the global batch's mean loss: mean * items / items_in_batch; and the outputs.

        Times the number of processes, because DDP and FSDP average gradients over them; in `training_step` times the
        number of accumulation steps, by which Trainer then divides it, and whatever a subclass has added to it.
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
        if mean.dim() > 0:  # DataParallel: a loss of each device's rows
            parts = [{"labels": part} for part in counted["labels"].chunk(len(mean))]
            items, others = torch.stack([self._count_labels(part) for part in parts]), {}
        self._parts = []
        loss: Any = 0.0
        for name, labels in others.items():  # terms that have labels of their own, and so a count of their own
            term = _term(tensor_items(outputs)[self._other_terms[name]], labels)
            mean = mean - term
            loss = loss + self._share_of_mean(term, counted_labels(labels), self._items_of_others[name])
        loss = loss + self._share_of_mean(mean, items, items_in_batch)
        if self.trainer.args.average_tokens_across_devices:
            loss = loss * (self.trainer.accelerator.num_processes // self.trainer.get_tp_size())
        return loss, outputs

    def _share_of_mean(self, mean: Tensor, items: Tensor, items_in_batch: Tensor | int) -> Tensor:
        self._parts.append((mean.detach(), items))
        # A micro-batch without a single label has the mean 0/0.
        return torch.where(items > 0, mean * (items / self.total(items_in_batch)), 0.0).sum()

    # -- what kind of loss it is -------------------------------------------------------------------------------------

    def is_known(self) -> bool:
        return self._mean is False or (self._mean is True and self._counts_tried)

    def is_mean(self, model: nn.Module, inputs: dict[str, Any]) -> bool:
        """Whether the loss stays the same when `num_items_in_batch` doubles; found out once, by all processes."""
        if not self.is_known():
            self._find_out(model, inputs)
        return self._mean is not False  # nothing to tell it from, no label: no matter

    def _find_out(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Find out what the loss is, by trying; every process makes the same passes and comes to the same result."""
        if isinstance(model, DistributedDataParallel):
            model = model.module  # whose forward pass would wait for the other processes
        if self._mean is None:
            for self._trial_mode in (False, True):  # some models have a loss in training mode only
                trials = torch.stack([self._trial_loss(model, inputs, n) for n in (1, 2)])
                trials = self.trainer.accelerator.gather(trials[None])
                if not trials.isinf().any():
                    break
            else:  # it cannot be tried: what its source says
                self._trial_mode, self._counts_tried = False, True
                self._mean = inflates_loss(self.trainer.accelerator.unwrap_model(self.trainer.model))
                return
            one, two = trials[trials.isfinite().all(dim=1)].float().unbind(dim=1)
            if len(one) == 0:
                return  # no label, no loss
            self._mean = torch.allclose(one, two, rtol=1e-3)
            if self._mean:
                logger.info(
                    f"The loss of {self._model_name()} ignores num_items_in_batch: each micro-batch is weighted by "
                    "its number of labels, so that nothing depends on how the global batch is split."
                )
        if self._mean and not self._counts_tried:
            self._warn_unless_additive(model, inputs)

    def _warn_unless_additive(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Find out what the loss is a mean over, and which terms it adds; warn where it is no such mean.

        Such a loss of three rows is the mean of that of the first and that of the others, each weighted by its count.
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
        self._counts_tried = bool(told.any() or fits.isinf().any())  # else there are no labels
        if fits.isinf().any() or not told.any():
            return
        for (count, names), fit in zip(guesses, fits[told].min(dim=0).values.tolist(), strict=True):
            if fit == 1:
                self._counts, self._other_terms = count, {name: terms[name] for name in names}
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
        with attributes(self, _counts=count):
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
        """On this device, without what a subclass's `_prepare_inputs` adds."""
        inputs = self.trainer._prepare_input(inputs)  # type: ignore[assignment]
        return inputs

    def _model_name(self) -> str:
        return type(self.trainer.accelerator.unwrap_model(self.trainer.model)).__name__

    # -- the loss of an evaluation: the mean over all its labels -----------------------------------------------------

    def evaluating(self) -> None:
        """Forget the sums of the evaluation before."""
        self._eval_sums.clear()

    def evaluated(self, output: EvalLoopOutput, metric_key_prefix: str) -> EvalLoopOutput:
        """An evaluation's output, with the loss weighted by labels."""
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
        """What Trainer's `prediction_step` gives; keeps the sums that `evaluated` divides."""
        if not self.is_known() and self.trainer.loss_is_ours():
            self._find_out(model, self._prepared(inputs))
        # What accelerate has repeated to fill the last batch Trainer drops from the predictions, not from the loss.
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
        if not parts and (self._asked or self._own_share):  # divided by the labels of all processes
            processes = self.trainer.accelerator.num_processes // self.trainer.get_tp_size()
            count = count * (processes if self.trainer.args.average_tokens_across_devices else 1)
            parts = [(loss * self.total(getattr(items, "plain", items)) / count, count)]
        for n, (mean, part) in enumerate(reversed(parts or [(loss, count)])):
            sums = torch.where(part > 0, mean * part, 0.0).sum()
            kept = self._eval_sums.setdefault(n, torch.zeros(2, dtype=torch.float64))
            kept += (own > 0) * torch.stack((sums, part.sum().to(sums))).cpu()
        return loss, logits, labels

    def _without_padding(self, inputs: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """The batch without what accelerate has repeated to fill it, one row at least, and how many rows are data.

        The same for all processes, which must make as many passes: the batch itself where one cannot take it apart.
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
        if not labels.is_floating_point():  # most losses leave out what is labelled so
            inputs["labels"] = labels.clone()
            inputs["labels"][own:] = -100
        return inputs, rows


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
