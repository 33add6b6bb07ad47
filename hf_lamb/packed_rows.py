"""Packed rows: short documents share the rows of a batch, so that little of it is padding, and none sees another.

    rows = PackedRows(documents, lengths, row_length=512)
    collator = PackedRowsCollator(model, row_length=512, documents_collator=DataCollatorForLanguageModeling(tokenizer))
    LambTrainer(model, args, train_dataset=rows, data_collator=collator)

For encoders. Every document has the positions and the attention that it has in a row of its own, so that its logits
and gradients are the same. Position ids that begin anew are not enough for that: without flash attention the
documents of a row still attend to each other, and nothing fails.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, default_collate

__all__ = [
    "MODEL_TYPES",
    "PackedRows",
    "PackedRowsCollator",
    "StreamedPackedRows",
    "best_fit",
    "check_model_type",
    "take_packed_rows",
]

MODEL_TYPES = (
    "albert",
    "bert",
    "camembert",
    "distilbert",
    "electra",
    "eurobert",
    "modernbert",
    "roberta",
    "xlm-roberta",
)
"""Encoders whose attention takes a mask of each position for each other one.

tests/test_packed_rows.py compares every one of them with separate documents.
"""

WINDOW = 128  # rows' worth of tokens that are packed at a time when the documents are a stream
DOCUMENTS = "documents"  # the key in `attention_mask` with the number of each token's document, 0 for padding
IGNORED = -100  # the label that torch's cross-entropy leaves out


# -- which documents share a row --------------------------------------------------------------------------------------


def best_fit(lengths: Tensor, row_length: int) -> Tensor:
    """Put documents into rows: the longest first, each into the fullest row that has room for it.

    Args:
        lengths: the number of tokens of each document, integers.
        row_length: the number of tokens of a row.

    Returns:
        The number of the row of each document, int64. Rows are numbered in the order of their first documents. The
        result depends on nothing but the arguments.

    Raises:
        ValueError: a document has no token, or more than fit into a row.
    """
    if len(lengths) == 0:
        return torch.zeros(0, dtype=torch.int64)
    for wrong in (int(lengths.argmin()), int(lengths.argmax())):
        if not 1 <= lengths[wrong] <= row_length:
            raise ValueError(
                f"document {wrong} has {int(lengths[wrong])} tokens, rows have {row_length}: leave out empty "
                "documents, and cut longer ones into pieces"
            )
    longest_first = lengths.argsort(descending=True, stable=True)
    rows, count = array("q"), 0
    with_room: list[list[int]] = [[] for _ in range(row_length)]  # the rows that have room for so many tokens more
    rooms = 0  # bit r is set if with_room[r] holds a row
    for length in lengths[longest_first].tolist():
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1  # the least
            row = with_room[room].pop()
            if not with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = row_length, count
            count += 1
        rows.append(row)
        if left := room - length:
            with_room[left].append(row)
            rooms |= 1 << left
    row_of = torch.empty(len(lengths), dtype=torch.int64)
    row_of[longest_first] = torch.frombuffer(rows, dtype=torch.int64)
    numbers = torch.arange(len(lengths))
    first = torch.full((count,), len(lengths)).scatter_reduce(0, row_of, numbers, "amin")
    return first.argsort().argsort()[row_of]


class PackedRows(Dataset[list[Any]]):
    """Documents in rows, which `best_fit` has chosen; for `PackedRowsCollator`.

    An item is the list of a row's documents. Rows stay the same in every epoch and for every number of workers and
    processes; a sampler shuffles them.

    Args:
        documents: a data set whose items are documents, or a list of them. It is read as rows are, and `set_epoch`
            reaches it.
        lengths: the number of tokens of each document.
        row_length: the number of tokens of a row.

    Raises:
        ValueError: as `best_fit`, and if `lengths` has another length than `documents`.
    """

    def __init__(self, documents: Any, lengths: Tensor | Sequence[int], row_length: int) -> None:
        lengths = torch.as_tensor(lengths, dtype=torch.int64)
        if len(lengths) != len(documents):
            raise ValueError(f"{len(lengths)} lengths of {len(documents)} documents: give one for each")
        self.documents = documents
        self.row_length = row_length
        self._tokens = int(lengths.sum())
        row_of = best_fit(lengths, row_length)
        self._members = row_of.argsort(stable=True)  # the documents of row 0, then those of row 1, ...
        self._ends = row_of.bincount().cumsum(0)

    @property
    def padding(self) -> float:
        """The share of the rows' tokens that is padding."""
        return 1 - self._tokens / max(len(self) * self.row_length, 1)

    @property
    def padding_unpacked(self) -> float:
        """The share if each document had a row of its own."""
        return 1 - self._tokens / max(len(self._members) * self.row_length, 1)

    def set_epoch(self, epoch: int) -> None:
        """Tell the documents the epoch, if they want to know."""
        _set_epoch(self.documents, epoch)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, row: int) -> list[Any]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: Sequence[int]) -> list[list[Any]]:
        members = [self._members_of(row) for row in rows]
        numbers = list(itertools.chain.from_iterable(members))
        if hasattr(self.documents, "__getitems__"):
            documents = iter(self.documents.__getitems__(numbers))
        else:
            documents = map(self.documents.__getitem__, numbers)
        return [list(itertools.islice(documents, len(its))) for its in members]

    def _members_of(self, row: int) -> list[int]:
        start = 0 if row == 0 else int(self._ends[row - 1])
        members: list[int] = self._members[start : int(self._ends[row])].tolist()
        return members


class StreamedPackedRows(IterableDataset[list[Any]]):
    """`PackedRows` of documents that are read as they are needed.

    It packs so many documents at a time as fill 128 rows. It adds no order of its own: each worker packs the documents
    that `documents` gives to it, and a run that resumes must have the same number of workers.

    Args:
        documents: gives examples with `input_ids`, and with `attention_mask` if they are padded. `set_epoch` reaches
            it.
        row_length: the number of tokens of a row.
    """

    def __init__(self, documents: Iterable[Mapping[str, Any]], row_length: int) -> None:
        self.documents = documents
        self.row_length = row_length

    def set_epoch(self, epoch: int) -> None:
        """Tell the documents the epoch, if they want to know."""
        _set_epoch(self.documents, epoch)

    def __iter__(self) -> Iterator[list[Any]]:
        some: list[Any] = []
        lengths: list[int] = []
        tokens = 0
        for document in self.documents:
            some.append(document)
            lengths.append(_length_of(document))
            tokens += lengths[-1]
            if tokens >= WINDOW * self.row_length:
                yield from self._rows(some, lengths)
                some, lengths, tokens = [], [], 0
        yield from self._rows(some, lengths)

    def _rows(self, documents: list[Any], lengths: list[int]) -> Iterator[list[Any]]:
        rows = PackedRows(documents, lengths, self.row_length)
        return (rows[row] for row in range(len(rows)))


def _set_epoch(documents: Any, epoch: int) -> None:
    if hasattr(documents, "set_epoch"):
        documents.set_epoch(epoch)


def _length_of(document: Mapping[str, Any]) -> int:
    if "attention_mask" in document:
        return int(torch.as_tensor(document["attention_mask"]).sum())
    return len(document["input_ids"])


# -- a batch ----------------------------------------------------------------------------------------------------------


class PackedRowsCollator:
    """Makes a batch of `PackedRows`: `input_ids`, `labels` and others, [rows, row_length], and an `attention_mask`.

    The mask is a dict with the number of each token's document. `take_packed_rows`, which the constructor calls, makes
    the model take it; another model raises an error. Labels stay as they are, those of each document's first token
    included.

    Plain examples, such as those of an evaluation, are left to `documents_collator`.

    Args:
        model: the model that is trained.
        row_length: the number of tokens of a row.
        documents_collator: makes a padded batch of documents, with `attention_mask` and with `labels` if there are
            any, such as transformers' `DataCollatorForLanguageModeling(tokenizer)`. Default: stacks documents that are
            padded to one length already.

    Raises:
        ValueError: as `take_packed_rows`.
    """

    def __init__(
        self, model: nn.Module, row_length: int, documents_collator: Callable[[list[Any]], Any] = default_collate
    ) -> None:
        take_packed_rows(model)
        self.row_length = row_length
        self.documents_collator = documents_collator
        pad = getattr(model.config, "pad_token_id", None)
        self._fill = {"input_ids": 0 if pad is None else pad, "labels": IGNORED}  # anything else with 0

    @property
    def tokenizer(self) -> Any:
        """That of `documents_collator`, which Trainer saves with the model; None if it has none."""
        return getattr(self.documents_collator, "tokenizer", None)

    def __call__(self, rows: list[Any]) -> dict[str, Any]:
        """Return the batch.

        Raises:
            ValueError: the documents have no `attention_mask`, or a field that is not one number for each token; or
                those of a row do not fit into it.
        """
        if isinstance(rows[0], Mapping):
            batch: dict[str, Any] = self.documents_collator(rows)
            return batch
        fields = dict(self.documents_collator(list(itertools.chain.from_iterable(rows))))
        kept = fields.pop("attention_mask", None)
        if not isinstance(kept, Tensor) or kept.dim() != 2:
            raise ValueError(
                "the documents have no attention_mask of shape [documents, length]: give a documents_collator that "
                "pads, such as DataCollatorForLanguageModeling(tokenizer)"
            )
        kept = kept.bool()
        lengths = kept.sum(dim=1)
        row_of = torch.arange(len(rows)).repeat_interleave(torch.tensor([len(row) for row in rows]))
        row_of_token = row_of.repeat_interleave(lengths)
        in_row = row_of_token.bincount(minlength=len(rows))
        if (longest := int(in_row.max())) > self.row_length:
            raise ValueError(
                f"the documents of a row have {longest} tokens, rows have {self.row_length}: give PackedRows the "
                "lengths that they have in a batch, special tokens included"
            )
        column = torch.arange(len(row_of_token)) - (in_row.cumsum(0) - in_row)[row_of_token]
        shape = (len(rows), self.row_length)
        documents = torch.zeros(shape, dtype=torch.int64)
        documents[row_of_token, column] = torch.arange(1, len(lengths) + 1).repeat_interleave(lengths)
        batch = {"attention_mask": {DOCUMENTS: documents}}
        for name, values in fields.items():
            if not isinstance(values, Tensor) or values.shape != kept.shape:
                raise ValueError(
                    f"{name} is no number for each token, which packed rows have no place for: leave it out"
                )
            batch[name] = values.new_full(shape, self._fill.get(name, 0))
            batch[name][row_of_token, column] = values[kept]
        return batch


# -- the model --------------------------------------------------------------------------------------------------------


def check_model_type(model_type: str, attention: str | None = None) -> None:
    """Raise ValueError if packed rows would not be exact with this model type or attention implementation."""
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"{model_type} has no attention mask that keeps the documents of a row apart: packed rows go with "
            f"{', '.join(MODEL_TYPES)}"
        )
    if attention is not None and attention not in ("eager", "sdpa") and "flash" not in attention:
        raise ValueError(f"packed rows go with the attention eager, sdpa or flash_attention_2, not with {attention}")


def take_packed_rows(model: nn.Module) -> None:
    """Make an encoder of transformers take the batches of `PackedRowsCollator`; others stay as they are.

    A hook of the base model turns the numbers of the documents into position ids and into the mask that the model and
    its attention implementation want. Rows may be longer than the model has positions: documents may not.

    Raises:
        ValueError: the model is of a type that is not in MODEL_TYPES, or its attention takes no such mask.
    """
    own: Any = getattr(model, "get_base_model", None)
    if callable(own):  # PEFT's wrapper, which calls the model inside, and not always that model's base_model
        model = own()
    config: Any = getattr(model, "config", None)
    check_model_type(
        getattr(config, "model_type", type(model).__name__), getattr(config, "_attn_implementation", None)
    )
    base: Any = model.base_model
    if _with_masks not in base._forward_pre_hooks.values():
        base.register_forward_pre_hook(_with_masks, with_kwargs=True)


def _with_masks(base: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    given = kwargs.get("attention_mask")
    if not isinstance(given, Mapping) or DOCUMENTS not in given:
        return None
    documents = given[DOCUMENTS]
    index = torch.arange(documents.shape[1], device=documents.device)
    begins = documents != documents.roll(1, dims=1)
    begins[:, 0] = True
    position = index - torch.where(begins, index, 0).cummax(dim=1).values
    position = position.where(documents > 0, 0) + _first_position(base)
    return args, {**kwargs, "position_ids": position, **_masks(base, documents, begins, index)}


def _first_position(base: Any) -> int:
    """Return 0, or the padding's id + 1 for RoBERTa and its kin."""
    for name, module in base.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.padding_idx) + 1
    return 0


def _masks(base: Any, documents: Tensor, begins: Tensor, index: Tensor) -> dict[str, Any]:
    """Return the arguments that keep documents apart. Padding attends to padding: a softmax over nothing is NaN."""
    attention = base.config._attn_implementation
    check_model_type(base.config.model_type, attention)  # it may have been changed
    if "flash" in attention:  # all rows as one sequence of documents
        starts = begins.flatten().nonzero().flatten().to(torch.int32)
        ends = nn.functional.pad(starts, (0, 1), value=documents.numel())
        longest = int(ends.diff().max())
        return {
            "attention_mask": None,
            **{f"cu_seq_lens_{side}": ends for side in "qk"},
            **{f"max_length_{side}": longest for side in "qk"},
        }
    same = (documents[:, :, None] == documents[:, None, :])[:, None]
    masks = {"full_attention": same}
    if base.config.model_type == "modernbert":
        near = (index[:, None] - index).abs() <= base.config.sliding_window
        masks["sliding_attention"] = same & near
    if attention == "eager":  # which adds the mask to the scores: a bool one would add 0 or 1
        dtype = next((p.dtype for p in base.parameters()), torch.float32)  # replicas of DataParallel have none
        low = torch.finfo(dtype).min
        masks = {name: torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, low) for name, mask in masks.items()}
    return {"attention_mask": masks if len(masks) > 1 else masks["full_attention"]}
