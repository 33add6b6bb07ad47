"""The data of a pretraining run: their options, the tokenizer, masked blocks, the held-out part and its baseline."""

import hashlib
import importlib.util
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_lamb.packed_rows import PackedRows, StreamedPackedRows, check_model_type
from hf_lamb.sharpness.checkpoints import has_tokenizer, one_tokenizer
from recipes.lib.corpus import Document, hub_documents, load_documents, split_documents
from recipes.lib.masking import MaskedBlocks, StreamedBlocks, unigram_baseline
from recipes.lib.models import ModelArguments, fit, model_config
from recipes.lib.stored import StoredBlocks, StoredDocuments
from recipes.lib.tokenizer import load_or_train_tokenizer, tokenize_into_blocks

# Of a stream, whose length nobody knows: the first documents are held out, the next ones train the tokenizer.
STREAM_HELD_OUT, STREAM_SAMPLE = 200, 2000


@dataclass
class PretrainingArguments(ModelArguments):
    """Which model is pretrained, and on which data."""

    corpus: list[str] = field(
        default_factory=lambda: ["embedded"],
        metadata={"help": "'embedded', text or JSON-lines files, folders, patterns, or a hub dataset's name."},
    )
    validation_file: list[str] | None = field(
        default=None, metadata={"help": "Held-out documents; default: 5 %% of the documents of the corpus."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read the hub dataset while training instead of downloading it first."}
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={
            "help": "A tokenizer's folder or hub name; default: that of --model_name_or_path, else trained on the "
            "training split."
        },
    )
    vocab_size: int = field(default=8192, metadata={"help": "Vocabulary of the tokenizer that is trained."})
    max_seq_length: int = field(default=64, metadata={"help": "Tokens in a training sequence; default by --size."})
    preprocessing_num_workers: int | None = field(
        default=None,
        metadata={
            "help": "Processes that tokenize the corpus; default: this one, in which the tokenizer uses all cores. "
            "If the run is killed while several work, they stay."
        },
    )
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of the tokens that is masked."})
    packing: bool = field(
        default=False,
        metadata={
            "help": "Let short documents share the training rows, none of which sees another. --max_seq_length is "
            "then the length of a row, and --global_batch_size counts rows."
        },
    )


Documents = list[Document] | StoredDocuments


class Data(NamedTuple):
    """What a run trains on, and what it is judged by."""

    tokenizer: PreTrainedTokenizerBase
    train: Dataset[Any]
    held_out: MaskedBlocks
    unigram_loss: float
    unigram_accuracy: float
    facts: dict[str, Any]  # a resumed run compares them: are these the same data?
    padding: float  # the share of the training tokens; of a stream that of its sample
    padding_unpacked: float  # the share without --packing


def load_data(arguments: PretrainingArguments, seed: int, checkpoint: str | None = None) -> Data:
    """The corpus, split by document, as masked blocks; the tokenizer is trained on the training split only.

    checkpoint: one that the run goes on from, whose tokenizer is then the run's.

    Raises ValueError, also where model, tokenizer and sequence length do not fit one another.
    """
    config = model_config(arguments)  # a mistake in the model's name is found before the corpus is read
    if arguments.packing and config is not None:
        try:
            check_model_type(config.model_type, arguments.attn_implementation)
        except ValueError as error:
            raise ValueError(f"--packing True: {error}") from None
    if arguments.streaming:
        return stream_data(arguments, seed, checkpoint)
    train, held_out = train_and_held_out(arguments)
    tokenizer = tokenizer_for(arguments, train, checkpoint)
    blocks = blocks_of(arguments, train, tokenizer)
    dataset = MaskedBlocks(blocks, tokenizer, arguments.mlm_probability, seed)
    return with_held_out(arguments, tokenizer, dataset, blocks, held_out)


def train_and_held_out(arguments: PretrainingArguments) -> tuple[Documents, Documents]:
    """The documents, in memory-mapped files; in memory where `datasets` is not installed."""
    if importlib.util.find_spec("datasets") is None:
        train: Documents = load_documents(arguments.corpus)
        held_out: Documents | None = load_documents(files) if (files := arguments.validation_file) else None
    else:
        train = StoredDocuments.of(arguments.corpus)
        held_out = StoredDocuments.of(files) if (files := arguments.validation_file) else None
    if held_out is not None:
        check_held_out(arguments, train, held_out)
        return train, held_out
    return train.split() if isinstance(train, StoredDocuments) else split_documents(train)


def blocks_of(
    arguments: PretrainingArguments, documents: Documents, tokenizer: PreTrainedTokenizerBase
) -> torch.Tensor | StoredBlocks:
    """The documents as rows of ids."""
    if isinstance(documents, StoredDocuments):
        return documents.blocks(tokenizer, arguments.max_seq_length, arguments.preprocessing_num_workers)
    return tokenize_into_blocks(documents, tokenizer, arguments.max_seq_length)


def check_held_out(arguments: PretrainingArguments, train: Documents, held_out: Documents) -> None:
    """Raise where a held-out document is in the training corpus too."""
    texts = {document.text for document in held_out}
    found = {document.text for document in train if document.text in texts}
    both = [document.name for document in held_out if document.text in found]
    if both:
        raise ValueError(
            f"--validation_file {' '.join(arguments.validation_file or [])}: {len(both)} of its {len(held_out)} "
            f"documents are in --corpus {' '.join(arguments.corpus)} too, such as {both[0]}: leave them out of one of "
            "the two"
        )


def stream_data(arguments: PretrainingArguments, seed: int, checkpoint: str | None = None) -> Data:
    """`load_data` for a hub dataset that is read while training."""
    if len(arguments.corpus) != 1 or arguments.corpus == ["embedded"]:
        raise ValueError(
            f"--streaming takes one hub dataset, got --corpus {' '.join(arguments.corpus)}: leave --streaming out"
        )
    if arguments.validation_file:
        raise ValueError(
            f"--validation_file does not go with --streaming, which holds out the first {STREAM_HELD_OUT} documents: "
            "leave one of them out"
        )
    start = list(islice(streamed_documents(arguments.corpus[0]), STREAM_HELD_OUT + STREAM_SAMPLE))
    held_out, sample = start[:STREAM_HELD_OUT], start[STREAM_HELD_OUT:]
    if not sample:
        raise ValueError(
            f"{arguments.corpus[0]!r} has {len(start)} documents, of which {STREAM_HELD_OUT} would be held out: "
            "leave --streaming out"
        )
    tokenizer = tokenizer_for(arguments, sample, checkpoint)
    dataset = StreamedBlocks(
        partial(streamed_documents, arguments.corpus[0], first=STREAM_HELD_OUT),
        tokenizer,
        arguments.max_seq_length,
        arguments.mlm_probability,
        seed,
        passes=None,
    )
    blocks = tokenize_into_blocks(sample, tokenizer, arguments.max_seq_length)
    return with_held_out(arguments, tokenizer, dataset, blocks, held_out)


def streamed_documents(name: str, first: int = 0) -> Iterator[Document]:
    """The documents of a hub dataset from number `first` on. Spawned workers can pickle this function."""
    return islice(hub_documents(name, streaming=True), first, None)


def tokenizer_for(
    arguments: PretrainingArguments, documents: Iterable[Document], checkpoint: str | None = None
) -> PreTrainedTokenizerBase:
    """The checkpoint's, else the one that was named, else one trained on these documents; it fits the model.

    Raises ValueError where the options ask for another one than the checkpoint's, to which its embeddings belong.
    """
    tokenizer = _tokenizer_for(arguments, documents, checkpoint)
    config = model_config(arguments)
    if config is not None:
        fit(arguments, config, tokenizer, arguments.max_seq_length)
    return tokenizer


def _tokenizer_for(
    arguments: PretrainingArguments, documents: Iterable[Document], checkpoint: str | None
) -> PreTrainedTokenizerBase:
    if checkpoint is not None and has_tokenizer(checkpoint):
        own = AutoTokenizer.from_pretrained(checkpoint)
        if arguments.tokenizer_name is not None and not one_tokenizer(own, named_tokenizer(arguments)):
            raise ValueError(
                f"--tokenizer_name {arguments.tokenizer_name} is not the tokenizer of {checkpoint}: leave it out to "
                "go on from there, or name another --output_dir"
            )
        asked = arguments.vocab_size
        if arguments.tokenizer_name is None and asked != PretrainingArguments.vocab_size and len(own) > asked:
            raise ValueError(
                f"--vocab_size {asked}: the tokenizer of {checkpoint} has {len(own)} tokens, so leave --vocab_size "
                "out to go on from there, or name another --output_dir"
            )
        return own
    if arguments.tokenizer_name is not None or arguments.model_name_or_path is not None:
        return named_tokenizer(arguments)
    return load_or_train_tokenizer(Texts(documents), arguments.vocab_size)


class Texts:
    """The texts of documents, which can be read more than once."""

    def __init__(self, documents: Iterable[Document]) -> None:
        self.documents = documents

    def __iter__(self) -> Iterator[str]:
        return (document.text for document in self.documents)


def named_tokenizer(arguments: PretrainingArguments) -> PreTrainedTokenizerBase:
    """That of --tokenizer_name, else that of --model_name_or_path. Raises ValueError where it cannot be loaded."""
    option = "tokenizer_name" if arguments.tokenizer_name is not None else "model_name_or_path"
    name = getattr(arguments, option)
    try:
        if Path(name).is_dir() and not has_tokenizer(name):
            raise ValueError("there is none in this folder")
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:  # files of all kinds are read, by several libraries
        reason = str(error).partition("\n")[0]
        if option == "model_name_or_path":
            raise ValueError(
                f"--model_name_or_path {name}: its tokenizer cannot be loaded ({reason}): give --tokenizer_name"
            ) from None
        raise ValueError(
            f"--tokenizer_name {name} cannot be loaded ({reason}): name a folder that "
            "save_pretrained wrote, or a hub tokenizer that can be reached"
        ) from None


def with_held_out(
    arguments: PretrainingArguments,
    tokenizer: PreTrainedTokenizerBase,
    train: MaskedBlocks | StreamedBlocks,
    train_blocks: torch.Tensor | StoredBlocks,
    documents: Documents,
) -> Data:
    """Add the held-out blocks, whose masks depend on nothing but their text, and the unigrams' score on them.

    With --packing the training blocks share rows. They keep their masks, and held-out blocks their rows.
    """
    blocks = blocks_of(arguments, documents, tokenizer)
    held_out = MaskedBlocks(blocks, tokenizer, arguments.mlm_probability, seed=0, dynamic=False)
    unigrams = unigram_baseline(train_blocks, held_out, held_out.special_ids, len(tokenizer))
    facts = {
        "corpus": arguments.corpus,
        "train_sequences": len(train_blocks),
        "train": digest(train_blocks),
        "held_out_sequences": len(blocks),
        "held_out": digest(blocks),
        "packing": arguments.packing,
        "max_seq_length": arguments.max_seq_length,
        "mlm_probability": arguments.mlm_probability,
        "seed": train.seed,
        "unigram_loss": unigrams[0],
    }
    lengths = lengths_of(train_blocks, tokenizer.pad_token_id)
    padding = unpacked = 1 - int(lengths.sum()) / (len(lengths) * arguments.max_seq_length)
    dataset: Dataset[Any] = train
    if arguments.packing:
        rows = PackedRows(range(len(lengths)) if arguments.streaming else train, lengths, arguments.max_seq_length)
        padding, dataset = rows.padding, rows
        if isinstance(train, StreamedBlocks):  # then those rows were of the sample
            dataset = StreamedPackedRows(train, arguments.max_seq_length)
    return Data(tokenizer, dataset, held_out, *unigrams, facts, padding, unpacked)


def lengths_of(blocks: torch.Tensor | StoredBlocks, pad_id: int) -> torch.Tensor:
    """The tokens of each block that are no padding."""
    return torch.cat([(some != pad_id).sum(dim=1) for some in blocks.split(10_000)])


def digest(blocks: torch.Tensor | StoredBlocks) -> str:
    """The sha256 of tokenized text."""
    sha256 = hashlib.sha256(str(tuple(blocks.shape)).encode())
    for some in blocks.split(10_000):
        sha256.update(some.numpy().tobytes())
    return sha256.hexdigest()


def changes(before: dict[str, Any] | None, now: dict[str, Any]) -> list[str]:
    """A line for each part of the data that is not what the checkpoint was trained on."""
    if before is None:
        return []
    lines = []
    for part, words in {"train": "training", "held_out": "held-out"}.items():
        if before[part] != now[part]:
            lines.append(
                f"other {words} data than the checkpoint's: {now[f'{part}_sequences']:,} sequences of "
                f"{' '.join(now['corpus'])}, not the {before[f'{part}_sequences']:,} of {' '.join(before['corpus'])}"
            )
    if before.get("packing", False) != now["packing"]:
        lines.append(f"the checkpoint's run had other training rows: it had --packing {not now['packing']}")
    for name, decided in {"seed": "order and masks", "mlm_probability": "masks and held-out masks"}.items():
        if before.get(name, now.get(name)) != now.get(name):
            lines.append(
                f"other {decided} than the checkpoint's: its run had --{name} {before[name]}, not {now[name]}"
            )
    return lines
