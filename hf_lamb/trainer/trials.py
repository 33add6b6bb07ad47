"""Helpers for trial forward passes, which find out what kind of loss a model has and change nothing."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["COUNTS", "counted_labels", "logits_of", "perturbed", "take_rows", "tensor_items", "unchanged"]

LARGEST_RECORD = 10_000  # longest list or tensor of metrics that is restored; anything longer is taken for data


# -- nothing is changed -----------------------------------------------------------------------------------------------


@contextmanager
def unchanged(owner: Any, model: nn.Module, device: torch.device) -> Iterator[None]:
    """Restore, when the block ends, everything that forward passes through `model` may change.

    That is: the random number generators of Python, NumPy and torch (on the CPU and on `device`); the mode, the
    buffers and the plain attributes of every module; numbers and containers among the attributes of `owner`, because
    subclasses of Trainer keep running metrics there.

    Args:
        owner: a Trainer, or None.
        model: the model.
        device: the device that the passes run on.
    """
    with ExitStack() as after:
        after.callback(random.setstate, random.getstate())
        after.callback(np.random.set_state, np.random.get_state())
        after.callback(torch.set_rng_state, torch.get_rng_state())
        if device.type not in ("cpu", "meta"):
            numbers = torch.get_device_module(device)
            if hasattr(numbers, "get_rng_state_all"):
                after.callback(numbers.set_rng_state_all, numbers.get_rng_state_all())
            else:
                after.callback(numbers.set_rng_state, numbers.get_rng_state())
        for module in model.modules():
            plain = {k: v for k, v in vars(module).items() if isinstance(v, int | float | str | None)}
            after.callback(vars(module).update, plain)
        for buffer in model.buffers():
            after.callback(_put_back, buffer, buffer.detach().clone())
        if owner is not None:
            after.callback(_restore_attributes, owner, dict(vars(owner)))
            for name, value in vars(owner).items():
                if name not in ("train_dataset", "eval_dataset"):
                    after.callback(_restorer(value))
        yield


def _put_back(buffer: Tensor, before: Tensor) -> None:
    if not torch.equal(buffer, before):  # one that is a user's data may lie in memory that is read-only
        with torch.no_grad():
            buffer.copy_(before)


def _restore_attributes(owner: Any, before: dict[str, Any]) -> None:
    vars(owner).clear()
    vars(owner).update(before)


def _restorer(value: Any, depth: int = 3) -> Callable[[], None]:
    """Return a function that restores the present items of a container and of the containers in it."""
    if isinstance(value, Tensor) and value.numel() <= LARGEST_RECORD:
        before = value.detach().clone()
        return lambda: _put_back(value.detach(), before)
    if not isinstance(value, list | dict | set | deque) or len(value) > LARGEST_RECORD or depth == 0:
        return lambda: None
    items = value.copy()
    inner = [_restorer(item, depth - 1) for item in (items.values() if isinstance(items, dict) else items)]

    def restore() -> None:
        if len(value) != len(items) or any(a is not b for a, b in zip(_flat(value), _flat(items), strict=True)):
            value.clear()
            value.extend(items) if isinstance(value, list | deque) else value.update(items)
        for restore_item in inner:
            restore_item()

    return restore


def _flat(container: Any) -> Any:
    return chain.from_iterable(container.items()) if isinstance(container, dict) else container


# -- rows of a batch --------------------------------------------------------------------------------------------------


def take_rows(batch: Any, rows: int, index: Tensor | slice | None) -> Any:
    """Return a copy of a batch with some of its rows.

    Args:
        batch: a tensor, or nested mappings, lists or tuples of tensors; anything else is returned as it is.
        rows: the number of rows of each tensor.
        index: the rows to take; None for all.

    Raises:
        ValueError: a tensor has another number of rows, or a list holds other things than tensors, so the batch cannot
            be split into rows.
    """
    if isinstance(batch, Mapping):
        return {key: take_rows(value, rows, index) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        if index is not None and not all(isinstance(value, Tensor) for value in batch):
            raise ValueError("a batch that holds lists of other things than tensors")
        values = [take_rows(value, rows, index) for value in batch]
        return tuple(values) if isinstance(batch, tuple) else values
    if not isinstance(batch, Tensor):
        return batch
    if index is None or batch.dim() == 0:
        return batch.clone()
    if len(batch) != rows:
        raise ValueError(f"a tensor of {len(batch)} rows in a batch of {rows}")
    return batch[index].clone()


def tensor_items(outputs: Any) -> dict[Any, Tensor]:
    """Return the tensors of a model's outputs by name, or by position if the outputs are a tuple."""
    items = outputs.items() if isinstance(outputs, Mapping) else enumerate(outputs)
    return {key: value for key, value in items if isinstance(value, Tensor)}


# -- what a loss is the mean over -------------------------------------------------------------------------------------


def _labelled(batch: Mapping[str, Any]) -> Tensor:
    labels: Tensor = batch["labels"]
    return labels


def _attended(batch: Mapping[str, Any]) -> Tensor:
    labels, mask = batch["labels"], batch.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.shape != labels.shape or labels.is_floating_point():
        return _labelled(batch)
    attended: Tensor = labels.masked_fill(mask.to(labels.device) == 0, -100)
    return attended


def _rows(batch: Mapping[str, Any]) -> Tensor:
    return torch.zeros(len(batch["labels"]), dtype=torch.long, device=batch["labels"].device)


# What a loss may be the mean over, the most likely first. Each function returns labels; those that are not -100 count.
COUNTS = {"labels": _labelled, "labels that are attended to": _attended, "rows": _rows}


def counted_labels(labels: Tensor) -> Tensor:
    """Return the number of labels that are not -100, as a 0-dim tensor."""
    return labels.ne(-100).sum()


def logits_of(outputs: dict[Any, Tensor], labels: Any) -> Any:
    """Return the key of the logits in `outputs` that belong to these labels; None if there are none."""
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.dim() == 0:
        return None
    used = labels[labels.ne(-100)]
    if len(used) == 0 or int(used.min()) < 0:
        return None
    for key, value in outputs.items():
        if value.is_floating_point() and value.dim() > 1 and value.shape[:-1] == labels.shape:
            return key if int(used.max()) < value.shape[-1] else None
    return None


def perturbed(batch: dict[str, Any], names: list[str], outputs: dict[Any, Tensor]) -> dict[str, Any]:
    """Change the labels and the attention mask of three rows, so that each way of averaging gives another loss.

    The loss of every row of an untrained head is about ln(classes), so all averages are nearly equal. Therefore the
    first row gets the most likely labels, fewer labels, and fewer attended positions; the other rows get the least
    likely labels. Only labels that occur in the batch are used, -100 included: other labels may be invalid, and
    invalid labels end a run on a GPU.

    Args:
        batch: a batch of three rows.
        names: the keys of its labels.
        outputs: the model's outputs for the batch.

    Returns:
        The changed batch.
    """
    batch = dict(batch)
    for name in names:
        labels = batch.get(name)
        if not isinstance(labels, Tensor) or labels.dim() == 0:
            continue
        used = labels.ne(-100)
        values: Tensor = torch.unique(labels[used])
        if len(values) < 2:
            continue
        high, low = values.max().expand_as(labels), values.min().expand_as(labels)
        key = logits_of(outputs, labels)
        if key is not None:
            among = outputs[key][..., values]
            high, low = values[among.argmax(-1)], values[among.argmin(-1)]
        new = torch.cat((high[:1], low[1:]))
        if not used.all() and labels.dim() > 1:
            every_second = used[:1].flatten().cumsum(0).reshape(used[:1].shape) % 2 == 1
            used = torch.cat((used[:1] & every_second, used[1:]))
        batch[name] = torch.where(used, new, torch.where(labels.ne(-100), -100, labels))
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape == batch["labels"].shape:
        attended = mask.ne(0)
        first_half = attended.cumsum(dim=1) * 2 <= attended.sum(dim=1, keepdim=True) + 1
        first_half[1:] = True
        batch["attention_mask"] = mask * first_half.to(mask.dtype)
    return batch
