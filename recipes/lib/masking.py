"""BERT's masks: reproducible ones, from (seed, epoch, index) alone, and ones that are drawn on the device."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info
from torch.utils.data._utils import worker as torch_worker
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from recipes.lib.corpus import Document
from recipes.lib.labelled import IGNORED
from recipes.lib.stored import StoredBlocks
from recipes.lib.tokenizer import tokenize_each


class MaskedBlocks(Dataset[dict[str, torch.Tensor]]):
    """Blocks of ids under BERT's mask: of the 15 % chosen, 80 % become [MASK], 10 % random, 10 % stay.

    Since a row's mask depends on (seed, epoch, index) alone, a resumed run masks as the uninterrupted one does,
    whatever the number of workers and processes and however far they read ahead.

    blocks: integer ids, [n_blocks, block_size], in memory or on the disk. mlm_probability: of choosing a token;
    special tokens are never chosen, and every row that holds a token has at least one chosen. Random tokens are no
    special ones.
    dynamic: new masks every epoch (`set_epoch`); False for a held-out set, whose masks then never change.
    identities: for every block two numbers, int64, that its mask follows from in place of its index (0, index): these
    blocks are a piece of something longer.
    Items: `input_ids`, `attention_mask`, `labels` (-100 where not chosen), int64, [block_size] each.
    Raises ValueError for a probability outside (0, 1] and for a tokenizer without [MASK].
    """

    def __init__(
        self,
        blocks: torch.Tensor | StoredBlocks,
        tokenizer: PreTrainedTokenizerBase,
        mlm_probability: float = 0.15,
        seed: int = 0,
        dynamic: bool = True,
        identities: np.ndarray | None = None,
    ) -> None:
        if not 0 < mlm_probability <= 1:
            raise ValueError(f"mlm_probability must lie in (0, 1], got {mlm_probability}")
        if tokenizer.mask_token_id is None:
            raise ValueError(f"{type(tokenizer).__name__} has no mask token: use a BERT-like tokenizer")
        self.blocks = blocks
        self.mlm_probability = mlm_probability
        self.seed = seed
        self.dynamic = dynamic
        self.identities = identities
        self.mask_id, self.pad_id = tokenizer.mask_token_id, tokenizer.pad_token_id
        self.special_ids = np.array(sorted(tokenizer.all_special_ids))
        self.ordinary_ids = np.setdiff1d(np.arange(len(tokenizer)), self.special_ids)
        # Shared, so that persistent workers see the epoch change.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def set_epoch(self, epoch: int) -> None:
        """Draw the masks of this epoch from now on (nothing where they are not dynamic)."""
        if self.dynamic:
            self._epoch.fill_(epoch)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        ids = self.blocks[torch.as_tensor(indices)].numpy().astype(np.int64)
        choice, fate = self._draws(indices)

        choice = np.where(np.isin(ids, self.special_ids), np.inf, choice)
        lowest = choice.min(axis=1, keepdims=True)
        chosen = (choice < self.mlm_probability) | ((choice == lowest) & np.isfinite(choice))

        tenth, random_ids = (fate >> 32) % 10, self.ordinary_ids[(fate & 0xFFFFFFFF) % len(self.ordinary_ids)]
        replaced = np.where(tenth < 8, self.mask_id, np.where(tenth == 8, random_ids, ids))
        fields = {
            "input_ids": torch.from_numpy(np.where(chosen, replaced, ids)),
            "attention_mask": torch.from_numpy((ids != self.pad_id).astype(np.int64)),
            "labels": torch.from_numpy(np.where(chosen, ids, IGNORED)),
        }
        return [{name: rows[i] for name, rows in fields.items()} for i in range(len(ids))]

    def _draws(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """For every position of every row, one number in [0, 1) and one 64-bit integer."""
        length, epoch = self.blocks.shape[1], int(self._epoch)
        # Philox counts up from the counter's first word; the other three make every row's stream its own.
        whose = [(0, int(index)) if self.identities is None else self.identities[index] for index in indices]
        raw = np.stack(
            [np.random.Philox(key=self.seed, counter=[0, *own, epoch]).random_raw(2 * length) for own in whose]
        )
        return (raw[:, :length] >> 11) * 2.0**-53, raw[:, length:]


def masked(
    ids: torch.Tensor, tokenizer: Any, special_ids: torch.Tensor, probability: float, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """The same kind of mask, drawn on the device: of the chosen, 80 % become [MASK], 10 % random, 10 % stay."""
    draw = partial(torch.rand, ids.shape, generator=generator, device=ids.device)
    chosen = (draw() < probability) & ~torch.isin(ids, special_ids)
    chosen[:, 1] |= ~chosen.any(dim=1)  # every row has a label; position 1 holds its first token
    fate = draw()
    replacement = (draw() * (len(tokenizer) - len(special_ids))).long() + len(special_ids)
    inputs = torch.where(chosen & (fate < 0.8), tokenizer.mask_token_id, ids)
    return {
        "input_ids": torch.where(chosen & (fate >= 0.9), replacement, inputs),
        "attention_mask": (ids != tokenizer.pad_token_id).long(),
        "labels": torch.where(chosen, ids, IGNORED),
    }


class StreamedBlocks(IterableDataset[dict[str, torch.Tensor]]):
    """`MaskedBlocks` over documents that are read as they are needed: for corpora that do not fit, or not yet, here.

    An epoch has the same rows under the same masks whatever the number of workers: a row's mask depends on (seed,
    epoch, number of its document, number of the row in it). Every worker reads all documents, and tokenizes those
    whose turn is its own. The order of the rows depends on the number of workers: resume with the same.

    documents: called at the start of every pass, gives the documents in the same order every time. It need not
    handle workers, and does not see them: a `datasets.IterableDataset` does not divide its files among them here.
    With spawned workers it must be picklable. With several processes, accelerate distributes the rows.
    passes: over the documents, each with the masks of the next epoch; None: without end. Trainer counts the whole run
    as one epoch of a stream, so a stream that it resumes must not end before the run.
    """

    def __init__(
        self,
        documents: Callable[[], Iterable[Document]],
        tokenizer: PreTrainedTokenizerBase,
        block_size: int,
        mlm_probability: float = 0.15,
        seed: int = 0,
        passes: int | None = 1,
    ) -> None:
        self.documents = documents
        self.tokenizer = tokenizer
        self.block_size = block_size
        self.mlm_probability = mlm_probability
        self.seed = seed
        self.passes = passes
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def set_epoch(self, epoch: int) -> None:
        """Draw the masks of this epoch from now on."""
        self._epoch.fill_(epoch)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker, epoch = get_worker_info(), int(self._epoch)
        turn, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for number in count() if self.passes is None else range(self.passes):
            rows = 0
            for rows, row in enumerate(self._one_pass(epoch + number, turn, workers), 1):  # noqa: B007
                yield row
            if rows == 0:  # more workers than documents: there will be none in the next pass either
                return

    def _one_pass(self, epoch: int, turn: int, workers: int) -> Iterator[dict[str, torch.Tensor]]:
        with _as_outside_of_a_worker():
            documents = enumerate(self.documents())
        while True:
            with _as_outside_of_a_worker():
                some = list(islice(documents, 256 * workers))
            if not some:
                return
            mine = [(number, document) for number, document in some if number % workers == turn]
            of_each = list(tokenize_each((document for _, document in mine), self.tokenizer, self.block_size))
            identities = [
                (row, number) for (number, _), its in zip(mine, of_each, strict=True) for row in range(len(its))
            ]
            if not identities:
                continue
            rows = MaskedBlocks(
                torch.from_numpy(np.concatenate(of_each)),
                self.tokenizer,
                self.mlm_probability,
                self.seed,
                identities=np.array(identities),
            )
            rows.set_epoch(epoch)
            yield from rows.__getitems__(range(len(rows)))


@contextmanager
def _as_outside_of_a_worker() -> Iterator[None]:
    """Run the block as if it were not in a worker of a DataLoader.

    `datasets` would give each worker some of the files, and number their rows from 0 in each.
    """
    worker, torch_worker._worker_info = torch_worker._worker_info, None
    try:
        yield
    finally:
        torch_worker._worker_info = worker


class MaskEpochCallback(TrainerCallback):
    """Sets the epoch of the training set, which accelerate's loaders do not always do.

    `DataLoaderShard.set_epoch` of accelerate 1.15 reaches either a sampler two wrappers down or the dataset, not
    both: with several processes, and in the epoch in which a run resumes, the dataset keeps the epoch it had.
    In a loop of your own, call `dataset.set_epoch(epoch)` before iterating.
    """

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        kwargs["train_dataloader"].dataset.set_epoch(int(state.epoch or 0))


def unigram_baseline(
    train_blocks: torch.Tensor | StoredBlocks, held_out: MaskedBlocks, special_ids: Iterable[int], vocab_size: int
) -> tuple[float, float]:
    """(cross-entropy in nats, accuracy) of guessing each masked held-out token by its frequency in training.

    This is what a model can know without any context. Frequencies are smoothed by adding one to the count of every
    id below `vocab_size`; `special_ids` count nothing.
    """
    counts = torch.zeros(vocab_size, dtype=torch.int64)
    for some in train_blocks.split(10_000):
        more = torch.bincount(some.flatten().long(), minlength=len(counts))
        more[: len(counts)] += counts
        counts = more
    counts[torch.as_tensor(list(special_ids))] = 0
    log_probabilities = torch.log((counts + 1).double() / (counts.sum() + vocab_size))
    numbers = range(len(held_out))
    at_once = (held_out.__getitems__(numbers[start : start + 1000]) for start in numbers[::1000])
    labels = torch.cat([row["labels"] for rows in at_once for row in rows])
    labels = labels[labels != IGNORED]
    return -log_probabilities[labels].mean().item(), (labels == counts.argmax()).double().mean().item()
