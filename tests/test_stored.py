"""Protects the corpus on the disk: the same rows and masks as in memory, made once, complete or not there."""

import json
import multiprocessing
import os
import pickle
import signal
from pathlib import Path

import pytest
import torch

from recipes.lib import corpus, pretraining, stored
from recipes.lib.corpus import load_documents, split_documents
from recipes.lib.masking import MaskedBlocks
from recipes.lib.pretraining import Data, PretrainingArguments, load_data
from recipes.lib.tokenizer import train_tokenizer
from tests.helpers import one_line

datasets = pytest.importorskip("datasets")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of its own."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def loaded(texts: Path, **options: object) -> Data:
    return load_data(PretrainingArguments(corpus=[str(texts)], vocab_size=400, max_seq_length=32, **options), seed=3)


def in_memory(texts: Path, monkeypatch: pytest.MonkeyPatch, **options: object) -> Data:
    with monkeypatch.context() as without:
        without.setattr(pretraining.importlib.util, "find_spec", lambda name: None)
        return loaded(texts, **options)


@pytest.mark.parametrize("processes", [None, 2])
def test_rows_masks_and_facts_are_those_of_a_corpus_in_memory(
    processes: int | None, texts: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, in every epoch; a checkpoint of the one kind goes on with the other, and nothing is said."""
    disk = loaded(texts, preprocessing_num_workers=processes)
    memory = in_memory(texts, monkeypatch)
    assert isinstance(disk.train.blocks, stored.StoredBlocks)
    assert isinstance(memory.train.blocks, torch.Tensor)
    assert disk.facts == memory.facts
    assert (disk.unigram_loss, disk.unigram_accuracy) == (memory.unigram_loss, memory.unigram_accuracy)
    assert disk.tokenizer.get_vocab() == memory.tokenizer.get_vocab()
    numbers = torch.randperm(len(memory.train)).tolist()
    for epoch in (0, 1):
        disk.train.set_epoch(epoch)
        memory.train.set_epoch(epoch)
        for one, other in zip(disk.train.__getitems__(numbers), memory.train.__getitems__(numbers), strict=True):
            assert all(torch.equal(one[name], other[name]) for name in other)
    assert torch.equal(disk.held_out[1]["input_ids"], memory.held_out[1]["input_ids"])


def test_documents_and_their_split_are_those_in_memory(cache: Path) -> None:
    documents = stored.StoredDocuments.of(["embedded"])
    train, held_out = documents.split()
    expected = split_documents(load_documents("embedded"))
    assert (list(train), list(held_out)) == expected
    assert (len(train), len(held_out)) == tuple(map(len, expected))


def test_a_corpus_is_read_and_tokenized_once(texts: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in the next phase or process, nor in the next run, until the text or the tokenizer is another one."""
    loaded(texts)
    read, tokenized = [], []
    monkeypatch.setattr(
        corpus, "_file_documents", lambda *args, f=corpus._file_documents: read.append(args) or f(*args)
    )
    monkeypatch.setattr(
        stored, "tokenize_each", lambda *args, f=stored.tokenize_each: tokenized.append(args) or f(*args)
    )
    loaded(texts)
    assert (read, tokenized) == ([], [])
    train_tokenizer(["other text, " * 9], 60).save_pretrained(cache / "other")
    loaded(texts, tokenizer_name=str(cache / "other"))
    assert (len(read), len(tokenized)) == (0, 2)
    load_data(PretrainingArguments(corpus=[str(texts)], vocab_size=400, max_seq_length=16), seed=3)
    assert (len(read), len(tokenized)) == (0, 4)


def test_other_text_in_the_same_files_is_noticed(texts: Path, tmp_path: Path, cache: Path) -> None:
    """Also where the size of the file is the same."""
    names = [path.name for path in texts.glob("*.txt")]
    for name in names:
        (tmp_path / name).write_text((texts / name).read_text())
    before = loaded(tmp_path).facts
    for name in names:
        (tmp_path / name).write_text((texts / name).read_text().replace("the", "eth"))
    assert loaded(tmp_path).facts["train"] != before["train"]


def load_until_killed(texts: Path, step: str) -> None:
    """SIGKILL this process at the second document, or at the second batch that is tokenized."""
    calls, function = [], getattr(stored, step)

    def counted(*args: object) -> object:
        calls.append(args)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)

    setattr(stored, step, counted)
    stored.BATCH = 1
    loaded(texts)


@pytest.mark.parametrize("step", ["_row", "tokenize_each"])
def test_a_kill_while_the_files_are_written_leaves_none_that_is_used(
    step: str, texts: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of the documents, and of their rows; the next run begins there anew."""
    in_memory(texts, monkeypatch)  # trains the tokenizer
    process = multiprocessing.get_context("fork").Process(target=load_until_killed, args=(texts, step))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    left = {path.name for path in cache.rglob("*.arrow") if "incomplete" not in str(path)}
    assert left == ({"generator-train.arrow"} if step == "tokenize_each" else set())
    assert loaded(texts).facts == in_memory(texts, monkeypatch).facts


def test_a_full_disk_leaves_nothing_and_says_so(texts: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither does a cache that is no folder."""

    def full(_: object) -> object:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(stored, "_row", full)
        with one_line(
            ValueError, f"cannot keep the corpus in {cache} .*No space left.*: make room .*HF_DATASETS_CACHE"
        ):
            loaded(texts)
    assert not [path for path in cache.rglob("*.arrow") if "incomplete" not in str(path)]
    assert len(loaded(texts).train) > 100
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", texts / min(path.name for path in texts.iterdir()))
    with one_line(ValueError, "cannot keep the corpus in .*txt .*: make room there, or set HF_DATASETS_CACHE"):
        loaded(texts)


def test_masks_of_workers_and_of_pickles(texts: Path, cache: Path) -> None:
    """Spawned workers get the files, not their content."""
    data = loaded(texts)
    pickled = pickle.dumps(data.train.blocks)
    assert len(pickled) < 20_000 < 4 * data.train.blocks.shape[0] * 32
    rows = MaskedBlocks(pickle.loads(pickled), data.tokenizer, seed=3)
    assert torch.equal(rows[5]["input_ids"], data.train[5]["input_ids"])
    assert json.dumps(data.facts)
