"""A WordPiece tokenizer for the corpus at hand, and the corpus as blocks of its ids."""

import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from huggingface_hub.constants import HF_HOME
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.trainers import WordPieceTrainer
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerBase

from recipes.lib.corpus import Document

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def train_tokenizer(texts: Iterable[str], vocab_size: int = 8192) -> BertTokenizer:
    """A lower-casing BERT tokenizer whose WordPiece vocabulary is learnt from `texts`.

    vocab_size: an upper bound; a small corpus gives fewer tokens, so size the model by `len(tokenizer)`.
    The same texts give the same ids, in every process.
    Raises ValueError when the vocabulary has no room for every character of the texts.
    """
    texts = _repeatable(texts)
    normalizer, pre_tokenizer = BertNormalizer(lowercase=True), BertPreTokenizer()
    # By default the trainer numbers the characters in the order of a randomly seeded hash table, and breaks
    # ties between merges by these numbers: ids, and now and then tokens, differ from run to run. So we number
    # them. A character that is split off from an "a" before it (punctuation) never continues a word.
    found: set[str] = set()
    for text in texts:
        found.update(normalizer.normalize_str(text))
    characters = sorted(found - set(" "))
    inner = [f"##{char}" for char in characters if len(pre_tokenizer.pre_tokenize_str(f"a{char}")) == 1]
    fixed = [*SPECIAL_TOKENS, *characters, *inner]
    if vocab_size < len(fixed):
        raise ValueError(
            f"vocab_size={vocab_size} is below the {len(fixed)} special tokens and characters of the corpus: "
            "raise vocab_size, or clean the text of rare characters"
        )
    tokenizer = Tokenizer(WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    trainer = WordPieceTrainer(vocab_size=vocab_size, special_tokens=fixed, show_progress=False)
    # The trainer counts words text by text: lines let it use all cores.
    tokenizer.train_from_iterator((line for text in texts for line in text.splitlines()), trainer)
    return BertTokenizer(vocab=tokenizer.get_vocab())


def load_or_train_tokenizer(
    texts: Iterable[str], vocab_size: int = 8192, cache_dir: str | os.PathLike[str] | None = None
) -> PreTrainedTokenizerBase:
    """`train_tokenizer`, kept on disk by the sha256 of the texts and by `vocab_size`.

    cache_dir: default `$HF_HOME/hf_lamb/tokenizers`. Processes may race for an entry: it is written elsewhere
    and then renamed. Raises ValueError when the folder cannot be written.
    """
    texts = _repeatable(texts)
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    root = Path(cache_dir or Path(HF_HOME) / "hf_lamb" / "tokenizers")
    entry, unfinished = root / f"wordpiece-{vocab_size}-{digest.hexdigest()}", root / f"unfinished-{uuid4().hex}"
    if not entry.is_dir():
        tokenizer = train_tokenizer(texts, vocab_size)
        try:
            tokenizer.save_pretrained(unfinished)
            os.rename(unfinished, entry)
        except OSError as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            if not entry.is_dir():  # else another process was faster, with the same tokenizer
                raise ValueError(f"cannot keep a tokenizer in {str(root)!r} ({error}): set HF_HOME") from None
    return AutoTokenizer.from_pretrained(entry)


def _repeatable(texts: Iterable[str]) -> Iterable[str]:
    """Texts that can be read more than once; in memory only where they would be gone after the first time."""
    return list(texts) if isinstance(texts, Iterator) else texts


def tokenize_into_blocks(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, block_size: int
) -> torch.Tensor:
    """The documents as int32 ids, [n_blocks, block_size], each row `[CLS] ids [SEP]`, in order.

    A document fills row after row and never shares one. Its last row is padded with `[PAD]`; a rest of less
    than an eighth of a row is dropped, unless it is the whole document.
    Raises ValueError when block_size is below 3, the documents hold no token, or the tokenizer lacks [PAD], [CLS] or
    [SEP].
    """
    blocks = list(tokenize_each(documents, tokenizer, block_size))
    if not any(map(len, blocks)):
        raise ValueError("the documents hold no token: check that their text is not blank")
    return torch.from_numpy(np.concatenate(blocks))


def ends_of(tokenizer: PreTrainedTokenizerBase) -> tuple[Any, Any]:
    """The ids that a row begins and ends with: of [CLS] and [SEP], or of a text's beginning and end; None for none."""
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    return (
        tokenizer.bos_token_id if first is None else first,  # such as EuroBERT's
        tokenizer.eos_token_id if last is None else last,
    )


def tokenize_each(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase, block_size: int
) -> Iterator[np.ndarray]:
    """The rows of `tokenize_into_blocks`, document by document, [n, block_size]; n is 0 where one holds no token.

    Raises ValueError as that does, but for documents without a token.
    """
    room = block_size - 2
    if room < 1:
        raise ValueError(f"block_size={block_size} has no room between [CLS] and [SEP]: give 3 or more")
    first, last = ends_of(tokenizer)
    ids_of = {"pad": tokenizer.pad_token_id, "cls": first, "sep": last}
    lacking = [kind for kind, token_id in ids_of.items() if token_id is None]
    if lacking:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path} has no {' and no '.join(lacking)} token: use a BERT one"
        )
    documents = iter(documents)
    while texts := [document.text for document in islice(documents, 1024)]:
        encoded = tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
        )
        for ids in encoded["input_ids"]:
            rest = len(ids) % room
            if len(ids) > room and 8 * rest < room:
                ids = ids[: len(ids) - rest]
            starts = range(0, len(ids), room)
            rows = np.full((len(starts), block_size), tokenizer.pad_token_id, np.int32)
            rows[:, 0] = first
            for row, start in zip(rows, starts, strict=True):
                piece = ids[start : start + room]
                row[1 : len(piece) + 1] = piece
                row[len(piece) + 1] = last
            yield rows
