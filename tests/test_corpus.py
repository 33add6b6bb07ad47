"""The embedded corpus is what it says, splits by document, and becomes the same blocks of ids every time."""

import copy
import gzip
import hashlib
import json
import lzma
import re
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, BertTokenizer

import recipes.lib.tokenizer
from recipes.lib.corpus import (
    EMBEDDED,
    EMBEDDED_SHA256,
    Document,
    content_of,
    hub_documents,
    load_documents,
    split_documents,
)
from recipes.lib.tokenizer import load_or_train_tokenizer, tokenize_into_blocks, train_tokenizer
from tests.helpers import one_line

VOCAB_SIZE = 600


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return load_documents("embedded")


@pytest.fixture(scope="module")
def texts(documents: list[Document]) -> list[str]:
    return [document.text[:40_000] for document in documents[::40]]


@pytest.fixture(scope="module")
def tokenizer(texts: list[str]) -> BertTokenizer:
    return train_tokenizer(texts, VOCAB_SIZE)


class TestEmbedded:
    def test_the_committed_file_is_the_one_that_code_and_readme_name(self) -> None:
        assert hashlib.sha256(EMBEDDED.read_bytes()).hexdigest() == EMBEDDED_SHA256
        assert EMBEDDED_SHA256 in (EMBEDDED.parent / "README.md").read_text()

    def test_its_size_is_the_one_in_the_readme(self, documents: list[Document]) -> None:
        readme = (EMBEDDED.parent / "README.md").read_text()
        packed = EMBEDDED.read_bytes()
        text = lzma.decompress(packed).decode()
        assert hashlib.sha256(text.encode()).hexdigest() in readme
        assert f"The {len(documents)} annual messages" in readme
        assert f"{len(text):,} characters" in readme
        assert f"{sum(len(document.text.split()) for document in documents):,} words" in readme
        assert f"{len(packed):,} bytes" in readme
        assert len(packed) < 2_000_000, "it is in the repository"

    def test_no_editor_speaks(self, documents: list[Document]) -> None:
        """Bracketed inserts, speaker tags and the audience are no part of a message."""
        for document in documents:
            foreign = re.search(r"[\[\]]|^(The President|Audience members?|Rep\.)\. ?|APP Note", document.text, re.M)
            assert foreign is None, (document.name, foreign)

    def test_names_are_unique_and_in_order_of_year(self, documents: list[Document]) -> None:
        names = [document.name for document in documents]
        years = [int(name.split()[0]) for name in names]
        assert len(set(names)) == len(names)
        assert years == sorted(years)
        assert (years[0], years[-1]) == (1900, 2026)

    def test_a_changed_file_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        changed = tmp_path / "sotu_1900.txt.xz"
        changed.write_bytes(lzma.compress(b"other text"))
        monkeypatch.setattr("recipes.lib.corpus.EMBEDDED", changed)
        with pytest.raises(ValueError, match=r"should have sha256 0ed3fa.*found .*git checkout"):
            load_documents("embedded")


class TestFiles:
    def test_text_before_and_after_headers_in_every_kind_of_file(self, tmp_path: Path) -> None:
        """A file without headers is one document; packed files read like plain ones; blank documents go."""
        plain, headed = "one\n\nstill one\n", "=== a ===\ntext of a\n\n=== b ===\n\n=== c ===\ntext of c\n"
        (tmp_path / "1.txt").write_text(plain)
        (tmp_path / "2.txt.gz").write_bytes(gzip.compress(headed.encode()))
        (tmp_path / "3.txt.xz").write_bytes(lzma.compress(headed.encode()))
        (tmp_path / "4.jsonl").write_text(json.dumps({"text": "from json"}) + "\n")
        expected = ["one\n\nstill one", "text of a", "text of c", "text of a", "text of c", "from json"]
        by_folder = load_documents(str(tmp_path))
        assert [document.text for document in by_folder] == expected
        assert [document.name for document in by_folder[1:3]] == ["a", "c"]
        assert load_documents(str(tmp_path / "*")) == by_folder
        assert load_documents([str(path) for path in sorted(tmp_path.iterdir())]) == by_folder

    def test_a_corpus_holds_out_the_same_documents_wherever_it_lies(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Or a run that is resumed after a move trains on what was held out before."""
        for place in ("here", "there/deep"):
            for number in range(40):
                path = tmp_path / place / f"{number % 3}" / f"{number}.txt"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(f"text {number}")
            (tmp_path / place / "lines.jsonl").write_text("".join(f'{{"text": "line {n}"}}\n' for n in range(40)))
        monkeypatch.chdir(tmp_path)
        here = load_documents(str(tmp_path / "here"))
        assert (len(here), here[0].name, here[-1].name) == (80, "0/0.txt", "lines.jsonl:40")
        for corpus in ("there/deep", "./there/deep/", "there/../here", "there/deep/**/*.*", "."):
            same = corpus != "."
            assert (load_documents(corpus)[:80] == here) == same, corpus
            assert (content_of([corpus]) == content_of(["here"])) == same, corpus

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("missing.txt", None, r"there is no file '.*missing\.txt': check the path"),
            ("*.txt", None, r"there is no file '.*\*\.txt': check the path"),
            ("", None, r"the folder '.*' holds no \.txt"),
            ("empty.txt", b" \n", r"the corpus '.*empty\.txt' holds no text"),
            ("latin.txt", b"caf\xe9 noir", r"'.*latin\.txt' is not UTF-8 at byte 3: convert it"),
            ("table.csv", b"a,b", r"cannot read '.*table\.csv': give \.txt"),
            ("cut.txt.xz", lzma.compress(b"text")[:-9], r"cannot read '.*cut\.txt\.xz' \(.*\): check the file"),
            (
                "cut.txt.gz",
                gzip.compress(b"text", mtime=0)[:-9],
                r"cannot read '.*cut\.txt\.gz' \(.*\): check the file",
            ),
            ("bad.jsonl", b'{"text": "a"}\nnot json', r"bad\.jsonl:2 is not JSON \(.*\): give one object a line"),
            ("column.jsonl", b'{"body": "a"}', r'column\.jsonl:1 has no string "text": give lines like'),
            ("number.jsonl", b'{"text": 1}', r'number\.jsonl:1 has no string "text": give lines like'),
        ],
    )
    def test_bad_files_are_named_in_one_line(
        self, tmp_path: Path, name: str, content: bytes | None, message: str
    ) -> None:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with one_line(ValueError, message):
            load_documents(str(tmp_path / name))


class TestHub:
    """Neither the hub nor its data sets are needed here: a stub answers."""

    def rows(self, *rows: dict[str, Any]) -> Callable[..., list[dict[str, Any]]]:
        return lambda path, config, split, streaming: list(rows) if split == "train" else []

    def test_rows_become_documents(self, monkeypatch: pytest.MonkeyPatch) -> None:
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(
            datasets, "load_dataset", self.rows({"text": "a"}, {"text": " "}, {"text": None}, {"text": "b"})
        )
        assert load_documents("some/set:config") == [("some/set:config 0", "a"), ("some/set:config 3", "b")]

    def test_streaming_reads_no_further_than_asked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def load_dataset(path: str, config: str | None, split: str, streaming: bool) -> Iterator[dict[str, str]]:
            assert streaming
            yield {"body": "a"}
            pytest.fail("the second row was read")

        monkeypatch.setattr(pytest.importorskip("datasets"), "load_dataset", load_dataset)
        assert next(hub_documents("some/set", column="body", streaming=True)) == ("some/set 0", "a")

    def test_a_column_without_text_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(pytest.importorskip("datasets"), "load_dataset", self.rows({"text": ["a"]}))
        with one_line(ValueError, "column 'text' of 'some/set' holds list, not text: name another dataset"):
            load_documents("some/set")

    def test_a_missing_column_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets, "load_dataset", self.rows({"body": "a"}))
        with pytest.raises(ValueError, match=r"'some/set' has no column 'text', only \['body'\]"):
            load_documents("some/set")

    def test_an_unreachable_one_is_named_in_one_line(self) -> None:
        pytest.importorskip("datasets")
        with one_line(ValueError, "'no/such-set' is no local file.*the hub gave no such"):
            load_documents("no/such-set")

    def test_without_datasets_the_remedy_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "datasets", None)
        with pytest.raises(ValueError, match=r"'some/set' is no local file.*pip install datasets"):
            load_documents("some/set")


class TestSplit:
    def test_each_document_lies_in_exactly_one_part(self, documents: list[Document]) -> None:
        train, held_out = split_documents(documents)
        assert sorted(train + held_out) == sorted(documents)
        assert len(held_out) == 6

    def test_it_depends_on_names_and_seed_only(self, documents: list[Document]) -> None:
        renamed_text = [Document(document.name, "other") for document in documents]
        held_out = [document.name for document in split_documents(documents)[1]]
        assert held_out == [document.name for document in split_documents(renamed_text)[1]]
        assert held_out != [document.name for document in split_documents(documents, seed=1)[1]]

    def test_held_out_messages_spread_over_the_decades(self, documents: list[Document]) -> None:
        """One out of every run of 21 messages, so that no two runs' worth lies between two of them."""
        for seed in range(20):
            indices = [documents.index(document) for document in split_documents(documents, seed=seed)[1]]
            assert all(later - earlier < 2 * 21 for earlier, later in pairwise([0, *indices, len(documents)]))

    @pytest.mark.parametrize("fraction", [1e-9, 0.5, 1 - 1e-9])
    def test_neither_part_is_ever_empty(self, fraction: float) -> None:
        train, held_out = split_documents([Document("a", "x"), Document("b", "y")], fraction)
        assert (len(train), len(held_out)) == (1, 1)

    @pytest.mark.parametrize(
        ("count", "fraction", "message"),
        [
            (1, 0.05, r"cannot hold out one of 1 document.*--validation_file"),
            (0, 0.05, r"cannot hold out one of 0 document"),
            (9, 0.0, r"between 0 and 1, got 0\.0"),
            (9, 1.0, r"between 0 and 1, got 1\.0"),
        ],
    )
    def test_what_cannot_be_split_is_refused(self, count: int, fraction: float, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            split_documents([Document(str(i), "text") for i in range(count)], fraction)


class TestTokenizer:
    def test_reloads_as_a_bert_tokenizer_with_the_same_ids(
        self, tokenizer: BertTokenizer, texts: list[str], tmp_path: Path
    ) -> None:
        tokenizer.save_pretrained(tmp_path)
        reloaded = AutoTokenizer.from_pretrained(tmp_path)
        assert type(reloaded) is BertTokenizer
        assert reloaded.get_vocab() == tokenizer.get_vocab()
        assert reloaded(texts[0])["input_ids"] == tokenizer(texts[0])["input_ids"]
        assert reloaded.mask_token == "[MASK]"
        assert len(reloaded) == VOCAB_SIZE

    def test_lower_cases_frames_and_gives_the_text_back(self, tokenizer: BertTokenizer) -> None:
        ids = tokenizer("The CONGRESS, and the States.")["input_ids"]
        assert tokenizer.decode(ids) == "[CLS] the congress, and the states. [SEP]"
        assert tokenizer.convert_tokens_to_ids(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]) == [0, 1, 2, 3, 4]

    def test_training_is_deterministic(self, tokenizer: BertTokenizer, texts: list[str]) -> None:
        """The trainer of `tokenizers` alone is not: each call numbers the characters anew."""
        for _ in range(3):
            assert train_tokenizer(texts, VOCAB_SIZE).get_vocab() == tokenizer.get_vocab()

    def test_a_vocabulary_below_the_characters_is_refused(self, texts: list[str]) -> None:
        with pytest.raises(ValueError, match=r"vocab_size=20 is below the \d+ special tokens and characters"):
            train_tokenizer(texts, 20)

    def test_a_second_call_takes_it_from_the_cache(
        self, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = load_or_train_tokenizer(texts, VOCAB_SIZE, tmp_path)
        trained = []
        monkeypatch.setattr(
            recipes.lib.tokenizer, "train_tokenizer", lambda *args: trained.append(args) or train_tokenizer(*args)
        )
        second = load_or_train_tokenizer(texts, VOCAB_SIZE, tmp_path)
        assert second.get_vocab() == first.get_vocab()
        assert trained == []
        load_or_train_tokenizer(texts[1:], VOCAB_SIZE, tmp_path)
        load_or_train_tokenizer(texts, VOCAB_SIZE + 1, tmp_path)
        assert len(trained) == 2, "other texts or another size are another tokenizer"
        assert not list(tmp_path.glob("unfinished*"))

    def test_a_faster_process_wins_the_race_for_the_cache(
        self, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The other process finishes while this one trains; both end with its entry, and nothing is left over."""

        def train_slowly(*args: object) -> BertTokenizer:
            monkeypatch.setattr(recipes.lib.tokenizer, "train_tokenizer", train_tokenizer)
            load_or_train_tokenizer(texts, VOCAB_SIZE, tmp_path)
            return train_tokenizer(texts, VOCAB_SIZE)

        monkeypatch.setattr(recipes.lib.tokenizer, "train_tokenizer", train_slowly)
        load_or_train_tokenizer(texts, VOCAB_SIZE, tmp_path)
        (entry,) = tmp_path.iterdir()
        assert entry.name.startswith(f"wordpiece-{VOCAB_SIZE}-")

    def test_an_unwritable_cache_is_named(self, texts: list[str], tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(ValueError, match=r"cannot keep a tokenizer in '.*file' \(.*\): set HF_HOME"):
            load_or_train_tokenizer(texts[:1], VOCAB_SIZE, tmp_path / "file")


class TestBlocks:
    def test_blocks_hold_all_tokens_of_a_document_in_order(
        self, tokenizer: BertTokenizer, documents: list[Document]
    ) -> None:
        """Each block is [CLS] … [SEP]; only a document's last one is padded, only a tiny rest is dropped."""
        for size in (8, 32, 128):
            blocks = tokenize_into_blocks(documents[:1], tokenizer, size)
            assert blocks.dtype == torch.int32
            assert blocks.shape[1] == size
            assert (blocks[:, 0] == tokenizer.cls_token_id).all()
            assert ((blocks == tokenizer.sep_token_id).sum(dim=1) == 1).all()
            assert (blocks[:-1] != tokenizer.pad_token_id).all()
            ids = tokenizer(documents[0].text, add_special_tokens=False)["input_ids"]
            frame = [tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id]
            kept = blocks[~torch.isin(blocks, torch.tensor(frame))].tolist()
            assert kept == ids[: len(kept)]
            assert 0 <= len(ids) - len(kept) < size / 8

    def test_no_block_crosses_documents(self, tokenizer: BertTokenizer, documents: list[Document]) -> None:
        together = tokenize_into_blocks(documents[:3], tokenizer, 64)
        apart = [tokenize_into_blocks([document], tokenizer, 64) for document in documents[:3]]
        assert torch.equal(together, torch.cat(apart))

    def test_a_tokenizer_without_cls_and_sep_frames_with_the_ends_of_a_text(self, tokenizer: BertTokenizer) -> None:
        """As EuroBERT's may be."""
        other = copy.deepcopy(tokenizer)
        other.bos_token, other.eos_token, other.cls_token, other.sep_token = "[CLS]", "[SEP]", None, None
        document = [Document("a", "the people of the united states")]
        expected = tokenize_into_blocks(document, tokenizer, 8)
        assert torch.equal(tokenize_into_blocks(document, other, 8), expected)

    def test_a_short_document_is_one_padded_block(self, tokenizer: BertTokenizer) -> None:
        (block,) = tokenize_into_blocks([Document("a", "the")], tokenizer, 128)
        assert tokenizer.decode(block[:3]) == "[CLS] the [SEP]"
        assert (block[3:] == tokenizer.pad_token_id).all()

    @pytest.mark.parametrize(
        ("text", "size", "message"),
        [("the", 2, r"block_size=2 has no room"), (" \n", 8, r"the documents hold no token")],
    )
    def test_what_gives_no_block_is_refused(
        self, tokenizer: BertTokenizer, text: str, size: int, message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            tokenize_into_blocks([Document("a", text)], tokenizer, size)
