"""A corpus and its blocks of ids in memory-mapped files, which `datasets` writes once for all processes and runs."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from recipes.lib.corpus import Document, content_of, held_out_numbers, read_documents
from recipes.lib.tokenizer import ends_of, tokenize_each

FORMAT = "1"  # of the files: another one for another cut of the text into documents or rows
BATCH = 256  # documents at a time


class StoredDocuments:
    """The documents of a corpus, or some of them, which are read from the disk as they are needed."""

    def __init__(self, rows: Any, content: str) -> None:
        self.rows = rows
        self.content = content  # all that the documents follow from

    @classmethod
    def of(cls, corpus: Sequence[str]) -> "StoredDocuments":
        """Those of `load_documents`. Raises ValueError as that does, and where the files cannot be written."""
        from datasets import Dataset, Features, Value

        content = _sha256(FORMAT, content_of(corpus))
        features = Features({"name": Value("string"), "text": Value("large_string")})
        with _writing():
            rows = Dataset.from_generator(
                _rows, features=features, gen_kwargs={"corpus": tuple(corpus)}, fingerprint=content[:32]
            )
        return cls(rows, content)

    def split(self) -> tuple["StoredDocuments", "StoredDocuments"]:
        """(train, held_out) as `split_documents` has them. Raises ValueError as that does."""
        chosen = held_out_numbers(self.rows["name"][:])
        train = [number for number in range(len(self.rows)) if number not in chosen]
        parts = {"train": train, "held out": sorted(chosen)}
        one, other = (StoredDocuments(self.rows.select(of), _sha256(self.content, name)) for name, of in parts.items())
        return one, other

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Document]:
        for some in self.rows.iter(BATCH):
            yield from map(Document, some["name"], some["text"])

    def blocks(
        self, tokenizer: PreTrainedTokenizerBase, block_size: int, processes: int | None = None
    ) -> "StoredBlocks":
        """Those of `tokenize_into_blocks`. Raises ValueError as that does, and where the files cannot be written.

        processes: that tokenize; None: this one, in which a tokenizer of the tokenizers library uses all cores.
        """
        from datasets import Features, List, Value

        with _writing():
            rows = self.rows.map(
                _tokenize_batch,
                batched=True,
                batch_size=BATCH,
                remove_columns=self.rows.column_names,
                features=Features({"ids": List(Value("int32"), length=block_size)}),
                fn_kwargs={"tokenizer": tokenizer, "block_size": block_size},
                num_proc=processes,
                new_fingerprint=_sha256(self.content, _key_of(tokenizer), block_size)[:32],
                desc=f"tokenize into rows of {block_size}",
            )
        if not len(rows):
            raise ValueError("the documents hold no token: check that their text is not blank")
        return StoredBlocks(rows)


class StoredBlocks:
    """Blocks of ids on the disk: as much of a tensor of int32, [n_blocks, block_size], as its users need."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows.with_format("arrow")
        self.shape = (len(rows), rows.features["ids"].length)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, numbers: torch.Tensor) -> torch.Tensor:
        return self._tensor(self.rows[numbers.numpy()])

    def split(self, size: int) -> Iterator[torch.Tensor]:
        """All blocks in their order, `size` at a time."""
        return map(self._tensor, self.rows.iter(size))

    def _tensor(self, table: Any) -> torch.Tensor:
        ids = table["ids"].combine_chunks().flatten().to_numpy()
        return torch.from_numpy(np.array(ids).reshape(-1, self.shape[1]))  # a copy, of memory that cannot be written


@contextmanager
def _writing() -> Iterator[None]:
    """Raise the ValueError that the text was refused with, or one for files that cannot be written."""
    from datasets import config
    from datasets.exceptions import DatasetGenerationError

    try:
        yield
    except (OSError, DatasetGenerationError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        if isinstance(cause, ValueError):
            raise cause from None
        if not isinstance(cause, OSError):
            raise
        folder = config.HF_DATASETS_CACHE
        raise ValueError(
            f"cannot keep the corpus in {folder} ({cause}): make room there, or set HF_DATASETS_CACHE"
        ) from None


def _rows(corpus: Sequence[str]) -> Iterator[dict[str, str]]:
    return map(_row, read_documents(corpus))


def _row(document: Document) -> dict[str, str]:
    return document._asdict()


def _tokenize_batch(batch: dict[str, list[str]], tokenizer: Any, block_size: int) -> dict[str, np.ndarray]:
    documents: Iterable[Document] = map(Document, batch["name"], batch["text"])
    return {"ids": np.concatenate(list(tokenize_each(documents, tokenizer, block_size)))}


def _key_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the rows of `tokenize_each` follow from."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        from datasets.fingerprint import Hasher

        return str(Hasher.hash(tokenizer))
    settings = json.loads(backend.to_str())
    for changes_with_use in ("truncation", "padding"):
        settings.pop(changes_with_use, None)
    return json.dumps([settings, tokenizer.pad_token_id, *ends_of(tokenizer)])


def _sha256(*facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
