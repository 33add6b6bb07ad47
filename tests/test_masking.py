"""Masks follow BERT's rule and are a function of (seed, epoch, index), however and wherever they are drawn."""

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, get_worker_info
from transformers import BertTokenizer, Trainer, TrainingArguments

from recipes.lib.corpus import Document
from recipes.lib.masking import IGNORED, MaskedBlocks, MaskEpochCallback, StreamedBlocks, unigram_baseline
from recipes.lib.pretraining import streamed_documents

PAD, UNK, CLS, SEP, MASK = range(5)
VOCAB_SIZE = 105


@pytest.fixture(scope="module")
def tokenizer() -> BertTokenizer:
    """Five special tokens and a hundred others."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(100))]
    return BertTokenizer(vocab={name: index for index, name in enumerate(names)})


@pytest.fixture(scope="module")
def blocks() -> torch.Tensor:
    """1,000 rows of 64: [CLS] tokens [SEP], every tenth row half padding, some [UNK]."""
    ids = torch.randint(5, VOCAB_SIZE, (1000, 64), generator=torch.Generator().manual_seed(1), dtype=torch.int32)
    ids[:, 0], ids[:, -1], ids[:, 7] = CLS, SEP, UNK
    ids[::10, 31], ids[::10, 32:] = SEP, PAD
    return ids


def stacked(dataset: MaskedBlocks) -> dict[str, torch.Tensor]:
    rows = dataset.__getitems__(range(len(dataset)))
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def assert_binomial(successes: int, trials: int, probability: float) -> None:
    """Within four standard deviations, which a right sampler misses once in 16,000 seeds."""
    deviation = math.sqrt(trials * probability * (1 - probability))
    assert abs(successes - trials * probability) < 4 * deviation, (successes / trials, probability)


class TestRule:
    def test_fields(self, tokenizer: BertTokenizer, blocks: torch.Tensor) -> None:
        """The attention mask is where no padding is, labels are the true ids, other positions are untouched."""
        batch = stacked(MaskedBlocks(blocks, tokenizer))
        chosen = batch["labels"] != IGNORED
        assert {name: rows.dtype for name, rows in batch.items()} == dict.fromkeys(batch, torch.int64)
        assert torch.equal(batch["attention_mask"], (blocks != PAD).long())
        assert torch.equal(batch["labels"][chosen], blocks[chosen].long())
        assert torch.equal(batch["input_ids"][~chosen], blocks[~chosen].long())

    def test_rates(self, tokenizer: BertTokenizer, blocks: torch.Tensor) -> None:
        """15 % of the ordinary tokens are chosen; of these 80 % masked, 10 % random, 10 % kept."""
        batch = stacked(MaskedBlocks(blocks, tokenizer))
        chosen = batch["labels"] != IGNORED
        total = int(chosen.sum())
        assert_binomial(total, int((blocks > MASK).sum()), 0.15)

        inputs, labels = batch["input_ids"][chosen], batch["labels"][chosen]
        kept_by_chance = 0.1 / (VOCAB_SIZE - 5)
        assert_binomial(int((inputs == MASK).sum()), total, 0.8)
        assert_binomial(int((inputs == labels).sum()), total, 0.1 + kept_by_chance)
        assert_binomial(int(((inputs != MASK) & (inputs != labels)).sum()), total, 0.1 - kept_by_chance)

    def test_every_place_and_every_token_has_its_share(self, tokenizer: BertTokenizer, blocks: torch.Tensor) -> None:
        """Neither a column of the block nor a random token is preferred (chi-square, 5 deviations)."""
        batch = stacked(MaskedBlocks(blocks, tokenizer))
        chosen = batch["labels"] != IGNORED
        columns = chosen[1::10, 8:63].sum(dim=0).double()
        replaced = batch["input_ids"][chosen & (batch["input_ids"] != MASK) & (batch["input_ids"] != blocks)]
        random_ids = torch.bincount(replaced, minlength=VOCAB_SIZE)[5:].double()
        for counts in (columns, random_ids):
            chi_square = ((counts - counts.mean()) ** 2 / counts.mean()).sum().item()
            freedom = len(counts) - 1
            assert abs(chi_square - freedom) < 5 * math.sqrt(2 * freedom)

    def test_special_tokens_are_neither_chosen_nor_drawn(self, tokenizer: BertTokenizer, blocks: torch.Tensor) -> None:
        batch = stacked(MaskedBlocks(blocks, tokenizer, mlm_probability=1.0))
        chosen = batch["labels"] != IGNORED
        assert torch.equal(chosen, blocks > MASK)
        assert (batch["input_ids"][chosen] >= MASK).all()

    def test_every_row_with_a_token_has_a_target(self, tokenizer: BertTokenizer, blocks: torch.Tensor) -> None:
        """A row without a target would give a loss of 0/0; one of padding only has none to give."""
        rows = torch.cat([blocks, torch.full((1, 64), PAD, dtype=torch.int32)])
        chosen = stacked(MaskedBlocks(rows, tokenizer, mlm_probability=1e-9))["labels"] != IGNORED
        assert (chosen[:-1].sum(dim=1) == 1).all()
        assert not chosen[-1].any()

    @pytest.mark.parametrize("probability", [0.0, -0.1, 1.1, math.nan])
    def test_a_probability_that_is_none_is_refused(
        self, tokenizer: BertTokenizer, blocks: torch.Tensor, probability: float
    ) -> None:
        with pytest.raises(ValueError, match=rf"mlm_probability must lie in \(0, 1\], got {probability}"):
            MaskedBlocks(blocks, tokenizer, mlm_probability=probability)

    def test_a_tokenizer_without_mask_is_refused(self, blocks: torch.Tensor) -> None:
        maskless = BertTokenizer()
        maskless.mask_token = None
        with pytest.raises(ValueError, match=r"BertTokenizer has no mask token"):
            MaskedBlocks(blocks, maskless)


class TestPureFunction:
    def test_one_row_alone_equals_the_row_in_any_batch(self, tokenizer: BertTokenizer, blocks: torch.Tensor) -> None:
        dataset = MaskedBlocks(blocks, tokenizer)
        all_rows = stacked(dataset)
        for index in (0, 3, 999):
            alone, last_of_three = dataset[index], dataset.__getitems__([5, 998, index])[2]
            for name, rows in all_rows.items():
                assert torch.equal(alone[name], rows[index])
                assert torch.equal(last_of_three[name], rows[index])

    def test_seed_epoch_and_index_each_change_the_mask(self, tokenizer: BertTokenizer) -> None:
        same = torch.full((2, 64), 50, dtype=torch.int32)
        dataset, other_seed = MaskedBlocks(same, tokenizer), MaskedBlocks(same, tokenizer, seed=1)
        labels = [*stacked(dataset)["labels"], *stacked(other_seed)["labels"]]
        dataset.set_epoch(1)
        labels += [*stacked(dataset)["labels"]]
        assert len({tuple(row.tolist()) for row in labels}) == 6
        dataset.set_epoch(0)
        assert torch.equal(dataset[1]["labels"], labels[1]), "going back to an epoch brings its masks back"

    def test_frozen_masks(self, tokenizer: BertTokenizer) -> None:
        """These literals keep runs that were started with an older version resumable: do not regenerate them."""
        dataset = MaskedBlocks(torch.arange(5, 25).reshape(2, 10), tokenizer, mlm_probability=0.5, seed=3)
        dataset.set_epoch(2)
        first, second = dataset.__getitems__([0, 1])
        assert first["input_ids"].tolist() == [4, 6, 4, 8, 9, 10, 4, 12, 4, 14]
        assert first["labels"].tolist() == [5, -100, 7, -100, -100, -100, 11, -100, 13, -100]
        assert second["input_ids"].tolist() == [15, 16, 17, 4, 19, 73, 21, 22, 23, 24]
        assert second["labels"].tolist() == [-100, -100, -100, 18, -100, 20, -100, -100, -100, -100]

    def test_static_masks_ignore_the_epoch(self, tokenizer: BertTokenizer, blocks: torch.Tensor) -> None:
        held_out = MaskedBlocks(blocks, tokenizer, dynamic=False)
        before = stacked(held_out)
        held_out.set_epoch(1)
        assert all(torch.equal(rows, before[name]) for name, rows in stacked(held_out).items())

    def test_workers_draw_the_same_masks_and_see_the_epoch_change(
        self, tokenizer: BertTokenizer, blocks: torch.Tensor
    ) -> None:
        """Two persistent workers were forked before the epoch changed: it reaches them through shared memory."""
        here = MaskedBlocks(blocks[:64], tokenizer)
        there = MaskedBlocks(blocks[:64], tokenizer)
        loader = DataLoader(there, batch_size=8, num_workers=2, persistent_workers=True, prefetch_factor=2)
        for epoch in (0, 1, 2):
            here.set_epoch(epoch)
            there.set_epoch(epoch)
            inputs = torch.cat([batch["input_ids"] for batch in loader])
            assert torch.equal(inputs, stacked(here)["input_ids"]), epoch


# Thirty documents of one to three rows of 16, one of them without a token.
DOCUMENTS = [Document(f"d{i}", " ".join(f"w{(7 * i + j) % 100}" for j in range(1 + 11 * (i % 4)))) for i in range(29)]
DOCUMENTS.append(Document("blank", "\u200b"))


def plain() -> Iterator[Document]:
    return iter(DOCUMENTS)


def dividing() -> Iterator[Document]:
    """A source that gives each worker its share, as streams of `datasets` do."""
    worker = get_worker_info()
    yield from DOCUMENTS if worker is None else DOCUMENTS[worker.id :: worker.num_workers]


def of_datasets() -> Iterable[Document]:
    """A stream of `datasets` in four shards, without the first two documents."""
    datasets = pytest.importorskip("datasets")

    def rows(shards: list[int]) -> Iterator[dict[str, str]]:
        for shard in shards:
            yield from ({"text": document.text} for document in DOCUMENTS[shard * 8 : shard * 8 + 8])

    stream = datasets.IterableDataset.from_generator(rows, gen_kwargs={"shards": [0, 1, 2, 3]})
    return (Document(str(i), row["text"]) for i, row in enumerate(stream) if i >= 2)


class TestStream:
    def rows(self, dataset: StreamedBlocks, workers: int, first: int | None = None) -> list[tuple[Any, ...]]:
        """Ids and masks of all rows, or of the first ones."""
        seen = []
        for batch in DataLoader(dataset, batch_size=4, num_workers=workers):
            seen += [(*a, *b) for a, b in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)]
            if first is not None and len(seen) >= first:
                return seen[:first]
        return seen

    @pytest.mark.parametrize("source", [plain, dividing, of_datasets])
    def test_an_epoch_has_the_same_rows_under_the_same_masks_with_any_number_of_workers(
        self, source: Callable[[], Iterable[Document]], tokenizer: BertTokenizer
    ) -> None:
        """Each row once, no document without a worker, whether or not the source divides itself among workers."""
        dataset = StreamedBlocks(source, tokenizer, 16)
        dataset.set_epoch(3)
        alone = self.rows(dataset, 0)
        assert len(alone) == 50 - 2 * (source is of_datasets)
        for workers in (1, 2, 4):
            assert sorted(self.rows(dataset, workers)) == sorted(alone), workers
        dataset.set_epoch(4)
        assert len(set(alone) & set(self.rows(dataset, 2))) < len(alone) / 4, "other masks in another epoch"

    def test_rows_of_equal_text_have_masks_of_their_own(self, tokenizer: BertTokenizer) -> None:
        """In one document, in two, and in those of two workers."""
        text = " ".join(["w1"] * 56)
        dataset = StreamedBlocks(partial(iter, [Document("a", text), Document("b", text)]), tokenizer, 16)
        for workers in (0, 2):
            assert len(set(self.rows(dataset, workers))) == 8

    def test_more_workers_than_documents(self, tokenizer: BertTokenizer) -> None:
        dataset = StreamedBlocks(partial(iter, DOCUMENTS[1:3]), tokenizer, 16, passes=2)
        assert sorted(self.rows(dataset, 4)) == sorted(self.rows(dataset, 0))

    @pytest.mark.parametrize("workers", [0, 2])
    def test_passes_without_end(self, workers: int, tokenizer: BertTokenizer) -> None:
        """Two passes are two epochs, and there is always a next one, but not of nothing."""
        endless = StreamedBlocks(plain, tokenizer, 16, passes=None)
        whole = len(self.rows(StreamedBlocks(plain, tokenizer, 16), 0))
        assert len(self.rows(endless, workers, first=3 * whole)) == 3 * whole
        if workers == 0:
            one = StreamedBlocks(plain, tokenizer, 16)
            one.set_epoch(1)
            assert self.rows(endless, 0, first=2 * whole)[whole:] == self.rows(one, 0)
        assert self.rows(StreamedBlocks(partial(iter, ()), tokenizer, 16, passes=None), workers) == []

    def test_spawned_workers_can_be_given_the_recipes_stream(self, tokenizer: BertTokenizer) -> None:
        ForkingPickler.dumps(StreamedBlocks(partial(streamed_documents, "some/set", first=200), tokenizer, 16))


class Recorder(torch.nn.Module):
    """A model that remembers what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.seen: list[torch.Tensor] = []

    def forward(self, input_ids: torch.Tensor, **kwargs: torch.Tensor) -> dict[str, torch.Tensor]:
        self.seen.append(input_ids.clone())
        return {"loss": self.weight**2}


class TestTrainer:
    def train(self, folder: Path, dataset: MaskedBlocks, callback: bool, resume: str | None = None) -> Recorder:
        """Two epochs of eight steps, a checkpoint after the twelfth."""
        model = Recorder()
        arguments = TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=2,
            per_device_train_batch_size=4,
            save_steps=12,
            save_only_model=False,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        callbacks = [MaskEpochCallback()] if callback else []
        Trainer(model, arguments, train_dataset=dataset, callbacks=callbacks).train(resume_from_checkpoint=resume)
        return model

    def test_a_resumed_run_sees_what_the_uninterrupted_one_sees(
        self, tokenizer: BertTokenizer, blocks: torch.Tensor, tmp_path: Path
    ) -> None:
        whole = self.train(tmp_path, MaskedBlocks(blocks[:32], tokenizer), callback=True).seen
        checkpoint = str(tmp_path / "checkpoint-12")
        rest = self.train(tmp_path, MaskedBlocks(blocks[:32], tokenizer), callback=True, resume=checkpoint).seen
        assert len(whole) == 16
        assert torch.equal(torch.stack(whole[12:]), torch.stack(rest))

    def test_upstream_without_the_callback_a_resumed_run_sees_other_masks(
        self, tokenizer: BertTokenizer, blocks: torch.Tensor, tmp_path: Path
    ) -> None:
        """When this and the next fail, accelerate tells the dataset its epoch: drop `MaskEpochCallback`."""
        whole = self.train(tmp_path, MaskedBlocks(blocks[:32], tokenizer), callback=False).seen
        checkpoint = str(tmp_path / "checkpoint-12")
        rest = self.train(tmp_path, MaskedBlocks(blocks[:32], tokenizer), callback=False, resume=checkpoint).seen
        assert not torch.equal(torch.stack(whole[12:]), torch.stack(rest))

    def test_upstream_with_two_processes_the_loader_tells_the_sampler_only(
        self, tokenizer: BertTokenizer, blocks: torch.Tensor
    ) -> None:
        """The same fault where accelerate shards the batches: `DataLoaderShard.set_epoch` has an `elif`."""
        told: dict[int, list[int]] = {1: [], 2: []}
        for processes in (1, 2):
            dataset = MaskedBlocks(blocks[:32], tokenizer)
            dataset.set_epoch = told[processes].append  # type: ignore[method-assign]
            loader = prepare_data_loader(
                DataLoader(dataset, batch_size=4, shuffle=True),
                num_processes=processes,
                process_index=0,
                use_seedable_sampler=True,
            )
            loader.set_epoch(3)
        assert told == {1: [3], 2: []}


class TestUnigramBaseline:
    def test_equals_counting_by_hand(self, tokenizer: BertTokenizer, blocks: torch.Tensor) -> None:
        train, held_out = blocks[:50] // 3 + 5, MaskedBlocks(blocks[50:60] // 3 + 5, tokenizer, dynamic=False)
        train[:, 0] = CLS
        counts = dict.fromkeys(range(VOCAB_SIZE), 0)
        for token in train.flatten().tolist():
            if token > MASK:
                counts[token] += 1
        total = sum(counts.values())
        best = max(counts, key=lambda token: counts[token])
        losses, hits = [], []
        for i in range(10):
            for label in held_out[i]["labels"].tolist():
                if label != IGNORED:
                    losses.append(-math.log((counts[label] + 1) / (total + VOCAB_SIZE)))
                    hits.append(label == best)
        loss, accuracy = unigram_baseline(train, held_out, tokenizer.all_special_ids, VOCAB_SIZE)
        assert loss == pytest.approx(sum(losses) / len(losses), rel=1e-12)
        assert accuracy == sum(hits) / len(hits)
        assert sum(hits) > 0

    def test_a_token_that_training_never_showed_costs_finitely(self, tokenizer: BertTokenizer) -> None:
        train, unseen = torch.full((1, 10), 7), torch.full((1, 10), 8)
        loss, accuracy = unigram_baseline(
            train, MaskedBlocks(unseen, tokenizer, dynamic=False), tokenizer.all_special_ids, VOCAB_SIZE
        )
        assert loss == pytest.approx(math.log(10 + VOCAB_SIZE))
        assert accuracy == 0
