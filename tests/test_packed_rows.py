"""Protects packed rows: documents that share a row have the logits, gradients, labels and masks of separate ones."""

import copy
import itertools
import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    CONFIG_MAPPING,
    AutoModelForMaskedLM,
    BertTokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorWithFlattening,
    PreTrainedModel,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_lamb import newest_complete_checkpoint
from hf_lamb.packed_rows import (
    MODEL_TYPES,
    PackedRows,
    PackedRowsCollator,
    StreamedPackedRows,
    best_fit,
    take_packed_rows,
)
from recipes.lib import pretraining
from recipes.lib.bert import BertForMaskedLM
from recipes.lib.corpus import Document
from recipes.lib.labelled import compute_logits_at_labels
from recipes.lib.masking import MaskedBlocks, StreamedBlocks
from tests.helpers import SMALL, one_line, pretrain, torchrun

FAMILIES = ["bert", "roberta", "modernbert", "eurobert"]
ROW = 24
PAD = 1

# The names that configurations have for these numbers; each takes those that it has. With a window of four tokens to
# each side, which the documents exceed; the padding's id is not 0. Weights of standard deviation 0.2: with the usual
# 0.02, documents that see each other hardly differ from separate ones.
NUMBERS = {"num_hidden_layers": 3, "n_layers": 3, "hidden_size": 32, "dim": 32, "num_attention_heads": 2, "n_heads": 2}
NUMBERS |= {"intermediate_size": 64, "hidden_dim": 64, "embedding_size": 16, "num_key_value_heads": 2, "head_dim": 16}
NUMBERS |= {"vocab_size": 50, "pad_token_id": PAD, "cls_token_id": 2, "sep_token_id": 3, "mask_token_id": 4}
NUMBERS |= {"bos_token_id": 2, "eos_token_id": 3, "local_attention": 8, "max_position_embeddings": 26}
NUMBERS |= {"initializer_range": 0.2}


def new_model(
    kind: str, attention: str = "sdpa", dtype: torch.dtype = torch.float64, **others: int
) -> PreTrainedModel:
    torch.manual_seed(0)
    default = CONFIG_MAPPING[kind]()
    config = type(default)(**{name: value for name, value in (NUMBERS | others).items() if hasattr(default, name)})
    for name, value in config.to_dict().items():
        if isinstance(value, float) and ("dropout" in name or name.endswith("_prob")):
            setattr(config, name, 0.0)
    return AutoModelForMaskedLM.from_config(config, dtype=dtype, attn_implementation=attention)


def documents() -> list[dict[str, Tensor]]:
    """Seven, padded to 20 tokens; they fill three rows but for one token. Labels at the first, fourth, ... token."""
    generator, found = torch.Generator().manual_seed(1), []
    for length in (12, 3, 9, 20, 7, 4, 16):
        ids = torch.randint(5, 50, (20,), generator=generator).where(torch.arange(20) < length, PAD)
        labels = torch.where((torch.arange(20) % 3 == 0) & (ids != PAD), ids, -100)
        found.append({"input_ids": ids, "attention_mask": (ids != PAD).long(), "labels": labels})
    return found


def lengths_of(docs: list[dict[str, Tensor]]) -> list[int]:
    return [int(document["attention_mask"].sum()) for document in docs]


def all_rows(rows: PackedRows) -> list[list[Any]]:
    return rows.__getitems__(range(len(rows)))


def packed_batch(model: PreTrainedModel) -> dict[str, Any]:
    docs = documents()
    return PackedRowsCollator(model, ROW)(all_rows(PackedRows(docs, lengths_of(docs), ROW)))


def mask_of(batch: dict[str, Any]) -> Tensor:
    """The number of each token's document, 0 for padding."""
    return batch["attention_mask"]["documents"]


# -- which documents share a row --------------------------------------------------------------------------------------


def naive(lengths: list[int], row_length: int) -> list[int]:
    """What is left of each row: every document, the longest first, is tried in every row."""
    left: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row, room in enumerate(left) if room >= length]
        if fitting:
            left[min(fitting, key=left.__getitem__)] -= length
        else:
            left.append(row_length - length)
    return sorted(left)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), max_size=60))
def test_it_is_best_fit(lengths: list[int]) -> None:
    """As a search through all rows finds it; every document is in one row; rows are in the order of the corpus."""
    row_of = best_fit(torch.tensor(lengths, dtype=torch.int64), 30)
    used = row_of.bincount(torch.tensor(lengths, dtype=torch.float64)) if lengths else torch.zeros(0)
    assert sorted((30 - used).int().tolist()) == naive(lengths, 30)
    seen = list(dict.fromkeys(row_of.tolist()))
    assert seen == sorted(seen)
    rows = all_rows(PackedRows(range(len(lengths)), lengths, 30))
    assert sorted(itertools.chain.from_iterable(rows)) == list(range(len(lengths)))
    assert all(row == sorted(row) for row in rows)


def test_as_many_documents_as_a_row_can_hold() -> None:
    """Also more than a byte can number; and each as long as a row."""
    model = new_model("bert")
    one = {"input_ids": torch.tensor([7]), "attention_mask": torch.ones(1), "labels": torch.tensor([7])}
    rows = PackedRows([one] * 5000, torch.ones(5000), 5000)
    assert (len(rows), rows.padding, rows.padding_unpacked) == (1, 0.0, 1 - 1 / 5000)
    batch = PackedRowsCollator(model, 5000)(all_rows(rows))
    assert mask_of(batch).unique().tolist() == list(range(1, 5001))
    whole = PackedRows(range(3), [8, 8, 8], 8)
    assert all_rows(whole) == [[0], [1], [2]]
    assert whole.padding == 0


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([3, 25, 3], "document 1 has 25 tokens, rows have 24: leave out empty documents, and cut longer ones"),
        ([3, 4, 0], "document 2 has 0 tokens, rows have 24: leave out empty documents, and cut longer ones"),
        ([3, 4], "2 lengths of 3 documents: give one for each"),
    ],
)
def test_lengths_that_cannot_be(lengths: list[int], message: str) -> None:
    with one_line(ValueError, message):
        PackedRows(["a", "b", "c"], lengths, ROW)


# -- packed equals separate -------------------------------------------------------------------------------------------


def difference(model: PreTrainedModel, inputs: dict[str, Any], numbers: Tensor) -> tuple[float, float]:
    """The largest differences of logits and of gradients, over the largest, between packed and separate documents.

    inputs: what the model is given for the packed rows. numbers: the document of each of their tokens.
    """
    docs = documents()
    order = [i for row in all_rows(PackedRows(range(len(docs)), lengths_of(docs), ROW)) for i in row]
    alone, loss, labels = [], torch.zeros(()), 0
    for document in (docs[i] for i in order):
        length = int(document["attention_mask"].sum())
        output = model(**{name: values[None, :length] for name, values in document.items()})
        count = int((document["labels"] != -100).sum())
        loss, labels = loss + output.loss * count, labels + count
        alone.append(output.logits[0])
    (loss / labels).backward()
    expected = [w.grad.clone() for w in model.parameters() if w.grad is not None]
    model.zero_grad()
    together = model(**inputs)
    together.loss.backward()
    got = [w.grad for w in model.parameters() if w.grad is not None]
    model.zero_grad()

    def largest(tensors: list[Tensor]) -> float:
        return max(float(tensor.detach().abs().max()) for tensor in tensors)

    logits = [together.logits[numbers == number] for number in range(1, len(docs) + 1)]
    assert together.logits.isfinite().all()
    return (
        largest([a - b for a, b in zip(logits, alone, strict=True)]) / largest(alone),
        largest([a - b for a, b in zip(got, expected, strict=True)]) / largest(expected),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_packed_equals_separate(
    kind: str, attention: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logits and gradients, to rounding."""
    # The eager attention of EuroBERT and ModernBERT rounds to float32 within a float64 model.
    softmax = nn.functional.softmax
    monkeypatch.setattr(nn.functional, "softmax", lambda scores, dim=-1, dtype=None: softmax(scores, dim=dim))
    model = new_model(kind, attention, dtype)
    batch = packed_batch(model)
    assert sorted(lengths_of(documents())) == sorted(mask_of(batch).unique(return_counts=True)[1].tolist()[1:])
    logits, gradients = difference(model, batch, mask_of(batch))
    assert max(logits, gradients) <= (1e-12 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize(("kind", "most"), [("bert", 20), ("roberta", 22)])
def test_rows_may_be_longer_than_the_model_has_positions(kind: str, most: int) -> None:
    """Documents may not; and neither may the padding at the end of a row need positions of its own."""
    model = new_model(kind, max_position_embeddings=most)
    batch = packed_batch(model)
    assert max(difference(model, batch, mask_of(batch))) <= 1e-12
    short = PackedRowsCollator(model, 60)([[documents()[0]]])
    assert model(**short).loss.isfinite()


def positions(numbers: Tensor, first: int = 0) -> Tensor:
    """Position ids that begin anew with every document."""
    same = numbers[:, :, None] == numbers[:, None, :]
    return first + same.tril(-1).sum(dim=2).where(numbers > 0, 0)


def apart(numbers: Tensor) -> Tensor:
    """Which positions see which: those of the same document."""
    return (numbers[:, :, None] == numbers[:, None, :])[:, None]


def as_float(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)


def right(numbers: Tensor, first: int) -> dict[str, Any]:
    """What most of these models want: the comparison does not fail for other reasons."""
    return {"attention_mask": as_float(apart(numbers)), "position_ids": positions(numbers, first)}


def positions_alone(numbers: Tensor, first: int) -> dict[str, Any]:
    return {"attention_mask": (numbers > 0).long(), "position_ids": positions(numbers, first)}


def bool_mask(numbers: Tensor, first: int) -> dict[str, Any]:
    return {"attention_mask": apart(numbers), "position_ids": positions(numbers, first)}


def mask_alone(numbers: Tensor, first: int) -> dict[str, Any]:
    """Positions that go on from one document to the next."""
    index = torch.arange(first, first + ROW).expand(len(numbers), -1)
    return {"attention_mask": as_float(apart(numbers)), "position_ids": index}


def positions_from_0(numbers: Tensor, first: int) -> dict[str, Any]:
    return right(numbers, 0)


def mask_without_window(numbers: Tensor, first: int) -> dict[str, Any]:
    masks = dict.fromkeys(("full_attention", "sliding_attention"), as_float(apart(numbers)))
    return {"attention_mask": masks, "position_ids": positions(numbers, first)}


WRONG = [
    *((kind, attention, positions_alone) for kind in FAMILIES for attention in ("eager", "sdpa")),
    *((kind, "eager", bool_mask) for kind in ("bert", "roberta", "eurobert")),
    *((kind, "sdpa", mask_alone) for kind in ("bert", "roberta")),
    ("roberta", "sdpa", positions_from_0),
    *(("modernbert", attention, mask_without_window) for attention in ("eager", "sdpa")),
    *(("modernbert", attention, right) for attention in ("eager", "sdpa")),
]


@pytest.mark.parametrize(("kind", "attention", "inputs"), WRONG, ids=lambda value: getattr(value, "__name__", value))
def test_what_others_do_is_seen_to_be_wrong(
    kind: str, attention: str, inputs: Callable[[Tensor, int], dict[str, Any]]
) -> None:
    """These must fail the comparison that packed rows pass, or it would protect nothing."""
    model = new_model(kind, attention)
    batch = packed_batch(model)
    numbers = mask_of(batch)
    given = {**batch, **inputs(numbers, PAD + 1 if kind == "roberta" else 0)}
    assert max(difference(model, given, numbers)) > 0.1


@pytest.mark.parametrize("kind", ["bert", "roberta", "eurobert"])
def test_the_comparison_passes_what_is_right(kind: str) -> None:
    """Written out by hand; the hook leaves such a mask as it is."""
    model = new_model(kind)
    batch = packed_batch(model)
    given = {**batch, **right(mask_of(batch), PAD + 1 if kind == "roberta" else 0)}
    assert max(difference(model, given, mask_of(batch))) < 1e-12


def varlen_reference(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **given: Any
) -> tuple[Tensor, None]:
    """What flash attention's variable-length function computes from these arguments, sequence by sequence."""
    ends, scaling, sliding_window = (given.get(name) for name in ("cu_seq_lens_q", "scaling", "sliding_window"))
    assert attention_mask is None
    assert torch.equal(ends, given["cu_seq_lens_k"])
    assert ends.dtype == torch.int32
    assert given["max_length_q"] == given["max_length_k"] == int(ends.diff().max())
    batch, heads, length, _ = query.shape
    q, k, v = (x.repeat_interleave(heads // x.shape[1], 1).transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    found = []
    for start, end in itertools.pairwise(ends.tolist()):
        scores = torch.einsum("qhd,khd->hqk", q[start:end], k[start:end]) * (scaling or q.shape[-1] ** -0.5)
        if sliding_window is not None:
            at = torch.arange(end - start)
            scores = scores.masked_fill((at[:, None] - at).abs() > sliding_window - 1, -torch.inf)
        found.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[start:end]))
    return torch.cat(found).view(batch, length, heads, -1), None


@pytest.mark.parametrize("kind", FAMILIES)
def test_flash_attention_is_told_where_documents_begin(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its function is not installed here: a plain one with the same arguments stands in for it."""
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_reference", varlen_reference)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "flash_reference", flash_attention_mask)
    expected, model = new_model(kind), new_model(kind)
    batch = packed_batch(model)
    take_packed_rows(expected)
    model.config._attn_implementation = "flash_reference"
    torch.testing.assert_close(model(**batch).logits, expected(**batch).logits, rtol=0, atol=1e-12)


# -- a batch ----------------------------------------------------------------------------------------------------------


def test_no_label_and_no_token_is_lost() -> None:
    """transformers' flattening collator ignores the first label of every document; here they all have one."""
    docs = documents()
    batch = packed_batch(new_model("bert"))
    for name in ("input_ids", "labels"):
        expected = torch.cat([document[name][: int(document["attention_mask"].sum())] for document in docs])
        got = batch[name][mask_of(batch) > 0]
        assert got.sort().values.tolist() == expected.sort().values.tolist()
        assert (batch[name][mask_of(batch) == 0] == (PAD if name == "input_ids" else -100)).all()
    plain = [{name: document[name][document["attention_mask"] == 1].tolist() for name in ("input_ids", "labels")}
             for document in docs]  # fmt: skip
    theirs = DataCollatorWithFlattening()(plain)
    assert int((theirs["labels"] != -100).sum()) == int((batch["labels"] != -100).sum()) - len(docs)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_model_that_was_not_prepared_does_not_take_the_batch(kind: str) -> None:
    """A mask that it ignored would let documents see each other, and nothing would fail."""
    batch = packed_batch(new_model(kind))
    with pytest.raises((AttributeError, KeyError)):
        new_model(kind)(**batch)


def test_it_packs_what_another_collator_masks() -> None:
    """Documents of a tokenizer, without padding: transformers' collator pads and masks them."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(40))]
    tokenizer = BertTokenizer(vocab={name: index for index, name in enumerate(names)})
    texts = [" ".join(f"w{(3 * i + j) % 40}" for j in range(2 + i)) for i in range(9)]
    docs = [tokenizer(text) for text in texts]
    rows = PackedRows(docs, [len(document["input_ids"]) for document in docs], ROW)
    model = new_model("bert")
    collator = PackedRowsCollator(model, ROW, DataCollatorForLanguageModeling(tokenizer))
    batch = next(iter(DataLoader(rows, batch_size=len(rows), collate_fn=collator)))
    assert set(batch) == {"input_ids", "labels", "token_type_ids", "attention_mask"}
    truth = torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])
    order = list(itertools.chain.from_iterable(all_rows(rows)))
    assert truth[mask_of(batch) > 0].tolist() == [i for document in order for i in document["input_ids"]]
    assert model(**batch).loss.isfinite()
    plain = collator(docs[:2])  # an evaluation's
    assert plain["attention_mask"].shape == plain["input_ids"].shape


def test_trainer_finds_the_tokenizer_to_save() -> None:
    """In its collator, where a script gives it in no other place."""
    tokenizer = BertTokenizer(vocab={"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4})
    model = new_model("bert")
    assert PackedRowsCollator(model, ROW, DataCollatorForLanguageModeling(tokenizer)).tokenizer is tokenizer
    assert PackedRowsCollator(model, ROW).tokenizer is None


@pytest.mark.parametrize("task", [None, "TOKEN_CLS"])
def test_adapters_of_peft_are_prepared_too(task: str | None) -> None:
    """Its wrapper calls the model inside in one way or another, which depends on the task."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type=task, target_modules=["query"])
    torch.manual_seed(0)
    plain = new_model("bert")
    with_adapters = peft.get_peft_model(copy.deepcopy(plain), config).eval()
    expected = plain.eval()(**packed_batch(plain)).logits
    assert torch.equal(with_adapters(**packed_batch(with_adapters)).logits, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_mask": None}, "the documents have no attention_mask of .*: give a documents_collator that pads"),
        ({"next_sentence_label": torch.tensor(1)}, "next_sentence_label is no number for each token.*: leave it out"),
        ({"attention_mask": torch.ones(20)}, "the documents of a row have 40 tokens, rows have 24: give PackedRows"),
    ],
)
def test_documents_that_do_not_fit(change: dict[str, Any], message: str) -> None:
    docs = [
        {name: value for name, value in (document | change).items() if value is not None} for document in documents()
    ]
    collator = PackedRowsCollator(new_model("bert"), ROW)
    with one_line(ValueError, message):
        collator([docs[:2]])


@pytest.mark.parametrize(
    ("kind", "attention", "message"),
    [
        ("deberta-v2", "eager", "deberta-v2 has no attention mask that keeps .*: packed rows go with albert, bert,"),
        ("convbert", "eager", "convbert has no attention mask that keeps .*: packed rows go with albert, bert,"),
        (
            "bert",
            "flex_attention",
            "packed rows go with the attention eager, sdpa or flash.*, not with flex_attention",
        ),
    ],
)
def test_models_that_cannot_keep_documents_apart(kind: str, attention: str, message: str) -> None:
    """Refused by name; so is an attention that is chosen later."""
    if kind == "bert":
        model = new_model(kind)
        batch = packed_batch(model)
        model.config._attn_implementation = attention
        with one_line(ValueError, message):
            model(**batch)
    else:
        model = AutoModelForMaskedLM.from_config(CONFIG_MAPPING[kind](num_hidden_layers=0, vocab_size=9))
    with one_line(ValueError, message):
        PackedRowsCollator(model, ROW)


@pytest.mark.parametrize("kind", [*FAMILIES, "recipe's bert"])
@pytest.mark.parametrize("training", [True, False])
def test_logits_at_labels_only(kind: str, training: bool) -> None:
    """The recipe's models have the loss and the gradients of those that compute all logits."""
    dense = new_model(kind.split()[-1]).train(training)
    ours = BertForMaskedLM(dense.config).double() if " " in kind else new_model(kind)
    ours.load_state_dict(dense.state_dict())
    ours.train(training)
    if " " not in kind:
        compute_logits_at_labels(ours)
    batch = packed_batch(ours)
    take_packed_rows(dense)
    mine, theirs = ours(**batch), dense(**batch)
    torch.testing.assert_close(mine.loss, theirs.loss, check_dtype=False, rtol=1e-6, atol=0)
    if not training:
        masked = batch["labels"] != -100
        assert torch.equal(mine.guesses[masked], theirs.logits.argmax(-1)[masked])
    mine.loss.backward()
    theirs.loss.backward()
    for (name, a), b in zip(ours.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name, rtol=1e-5, atol=1e-6)


# -- masks of the language model, workers, streams --------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> BertTokenizer:
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(100))]
    return BertTokenizer(vocab={name: index for index, name in enumerate(names)})


def blocks() -> Tensor:
    """90 rows of 16: [CLS], 1 to 14 tokens, [SEP], padding."""
    ids = torch.randint(5, 105, (90, 16), generator=torch.Generator().manual_seed(1))
    length = torch.arange(90)[:, None] % 14 + 3
    ids[:, 0] = 2
    return ids.where(torch.arange(16) < length - 1, 3).where(torch.arange(16) < length, 0)


Masked = set[tuple[tuple[int, ...], tuple[int, ...]]]


def masked_documents(rows: Any, workers: int = 0, most: int | None = None) -> list[Any]:
    """(ids, labels) of every document of the rows, in the order in which they come."""
    found: list[Any] = []
    for row in DataLoader(rows, batch_size=None, collate_fn=list, num_workers=workers):
        for document in row:
            kept = document["attention_mask"] == 1
            found.append(tuple(tuple(document[name][kept].tolist()) for name in ("input_ids", "labels")))
        if most is not None and len(found) >= most:
            return found
    return found


def test_a_document_has_the_mask_that_it_has_unpacked(tokenizer: BertTokenizer) -> None:
    """In every epoch, with any number of workers."""
    ids = blocks()
    separate = MaskedBlocks(ids, tokenizer, seed=3)
    rows = PackedRows(MaskedBlocks(ids, tokenizer, seed=3), (ids != 0).sum(1), 16)
    assert rows.padding < 0.1 < 0.4 < rows.padding_unpacked
    seen = []
    for epoch in (0, 1):
        separate.set_epoch(epoch)
        rows.set_epoch(epoch)
        expected = sorted(masked_documents([[separate[i]] for i in range(len(separate))]))
        for workers in (0, 2):
            assert sorted(masked_documents(rows, workers)) == expected
        seen.append(expected)
    assert seen[0] != seen[1]


def stream_of(tokenizer: BertTokenizer, passes: int | None = 1) -> StreamedPackedRows:
    texts = [" ".join(f"w{(7 * i + j) % 100}" for j in range(1 + 11 * (i % 4))) for i in range(60)]
    source = partial(iter, [Document(str(i), text) for i, text in enumerate(texts)])
    return StreamedPackedRows(StreamedBlocks(source, tokenizer, 16, passes=passes), 16)


def test_a_stream_has_every_document_once(tokenizer: BertTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under its own mask, with any number of workers, whatever is packed at a time; it can be cut at any place."""
    stream = stream_of(tokenizer)
    expected = sorted(masked_documents([[document] for document in stream.documents]))
    assert len(expected) > 60
    for window, workers in ((128, 0), (3, 0), (3, 2), (1, 0)):
        monkeypatch.setattr("hf_lamb.packed_rows.WINDOW", window)
        found = masked_documents(stream, workers)
        assert sorted(found) == expected, (window, workers)
        assert masked_documents(stream, workers) == found
    stream.set_epoch(1)
    assert sorted(masked_documents(stream)) != expected


def test_a_stream_is_packed_nearly_as_well(tokenizer: BertTokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """And does not end between two passes: only the end of the last one leaves rows short."""
    monkeypatch.setattr("hf_lamb.packed_rows.WINDOW", 32)
    once = stream_of(tokenizer)
    lengths = [int(document["attention_mask"].sum()) for document in once.documents]
    best = len(PackedRows(lengths, lengths, 16))
    assert best <= len(list(once)) <= 1.1 * best
    assert len(list(stream_of(tokenizer, passes=4))) <= 4.2 * best
    endless = masked_documents(stream_of(tokenizer, passes=None), most=5 * len(lengths))
    assert len(endless) >= 5 * len(lengths)
    assert list(StreamedPackedRows([], 16)) == []


def test_spawned_workers_can_be_given_both(tokenizer: BertTokenizer) -> None:
    ForkingPickler.dumps(PackedRows(MaskedBlocks(blocks(), tokenizer), (blocks() != 0).sum(1), 16))
    ForkingPickler.dumps(stream_of(tokenizer))
    assert len(ForkingPickler.dumps(PackedRowsCollator(new_model("bert"), ROW))) < 5000  # without the model


# -- the recipe -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sentences(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some 500 documents, each a part of a sentence; some are longer than a row of 32 tokens."""
    file = tmp_path_factory.mktemp("sentences") / "sentences.jsonl"
    found = re.split(r"[.,;] ", " ".join(path.read_text()[:9_000] for path in sorted(texts.glob("*.txt"))))
    file.write_text("".join(json.dumps({"text": part}) + "\n" for part in found))
    return file


# Two epochs of several steps, the last of which is shorter, and two workers; checkpoints in the middle of both.
PACKED = [*SMALL[:-6], "--vocab_size", "400", "--packing", "True", "--global_batch_size", "64"]
PACKED += ["--save_steps", "2", "--save_total_limit", "9", "--eval_strategy", "no"]
PACKED += ["--dataloader_num_workers", "2", "--per_device_train_batch_size", "16", "--logging_steps", "1"]
STREAMED, PACKED = [*PACKED, "--max_steps", "10"], [*PACKED, "--num_train_epochs", "2"]


@pytest.fixture(scope="module")
def whole(sentences: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output directory of an uninterrupted packed run."""
    output = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as monkeypatch:
        pretrain(monkeypatch, *PACKED, "--corpus", str(sentences), "--output_dir", str(output))
    return output


def record_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "results.jsonl").read_text().splitlines()[-1])


def assert_same_bits(output: Path, expected: Path) -> None:
    weights = load_file(expected / "model.safetensors")
    assert all(torch.equal(weight, weights[name]) for name, weight in load_file(output / "model.safetensors").items())
    losses = [
        [line["loss"] for line in json.loads(Path(str(folder), "trainer_state.json").read_text())["log_history"]]
        for folder in map(newest_complete_checkpoint, (output, expected))
    ]
    assert losses[0] == losses[1]


def test_the_recipe_packs(
    whole: Path, sentences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says how much padding that saves; loss and noise scale do not depend on the split into micro-batches."""
    other = ["--per_device_train_batch_size", "32", "--corpus", str(sentences), "--output_dir", str(tmp_path)]
    pretrain(monkeypatch, *PACKED, *other)
    said = capsys.readouterr().out
    record, expected = record_of(tmp_path), record_of(whole)
    assert re.search(r"jsonl: [\d,]+ rows of 32 tokens to train on, \d+ held out\n", said)
    saved = re.search(r"packing the ([\d,]+) sequences: (.+)% of the tokens are padding, (.+)% without it\n", said)
    assert saved is not None
    assert float(saved[2]) < 5 < 15 < float(saved[3])
    assert record["padding"] == pytest.approx(float(saved[2]) / 100, abs=1e-3)
    assert record["packing"] is True
    assert record["noise_scale"] > 0
    assert record["held_out_loss"] == pytest.approx(expected["held_out_loss"], rel=1e-5)
    for name, weight in load_file(whole / "model.safetensors").items():
        torch.testing.assert_close(load_file(tmp_path / "model.safetensors")[name], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("share", [0.25, 0.75])
def test_a_packed_run_resumes_to_the_same_bits(
    share: float, whole: Path, sentences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the middle of the first epoch, through its end, and from the middle of the last one."""
    steps = record_of(whole)["steps"]
    checkpoint = f"checkpoint-{2 * round(share * steps / 2)}"
    shutil.copytree(whole / checkpoint, tmp_path / checkpoint)
    where = ["--corpus", str(sentences), "--output_dir", str(tmp_path), "--resume_from_checkpoint", "latest"]
    pretrain(monkeypatch, *PACKED, *where)
    assert record_of(tmp_path)["steps"] == steps
    assert_same_bits(tmp_path, whole)


def test_a_run_that_is_packed_no_longer_says_so(whole: Path) -> None:
    """And one that is packed from now on; a checkpoint of an earlier version does not say."""
    packed = json.loads(Path(newest_complete_checkpoint(whole), "trainer_state.json").read_text())
    packed = packed["stateful_callbacks"]["RunFacts"]["args"]["data"]
    separate = packed | {"packing": False}
    earlier = {name: value for name, value in separate.items() if name != "packing"}
    for before, now, had in ((packed, separate, True), (separate, packed, False), (earlier, packed, False)):
        line = f"the checkpoint's run had other training rows: it had --packing {had}"
        assert pretraining.changes(before, now) == [line]
    assert pretraining.changes(packed, packed) == pretraining.changes(earlier, separate) == []


def test_a_run_that_resumes_with_other_masks_or_another_order_says_so(whole: Path) -> None:
    """A checkpoint of an earlier version does not know."""
    now = json.loads(Path(newest_complete_checkpoint(whole), "trainer_state.json").read_text())
    now = now["stateful_callbacks"]["RunFacts"]["args"]["data"]
    assert pretraining.changes(now | {"seed": 9, "mlm_probability": 0.3}, now) == [
        f"other order and masks than the checkpoint's: its run had --seed 9, not {now['seed']}",
        "other masks and held-out masks than the checkpoint's: its run had --mlm_probability 0.3, not 0.15",
    ]
    earlier = {name: value for name, value in now.items() if name not in ("seed", "mlm_probability")}
    assert pretraining.changes(earlier, now) == []


def test_phases_with_and_without(
    sentences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each phase of a plan has its own rows; ModernBERT wants other masks than BERT."""
    plan = tmp_path / "plan.yaml"
    plan.write_text(
        "model_type: modernbert\nglobal_batch_size: 16\nmax_steps: 2\neval_strategy: 'no'\n"
        "config_overrides: num_hidden_layers=2,hidden_size=32,num_attention_heads=2,intermediate_size=48,"
        "local_attention=16\n"
        "phases:\n- {max_seq_length: 32}\n- {max_seq_length: 64, packing: true}\n"
    )
    where = ["--corpus", str(sentences), "--output_dir", str(tmp_path / "out"), "--use_cpu", "--vocab_size", "400"]
    pretrain(monkeypatch, "--plan", str(plan), *where)
    one, two = (record_of(tmp_path / f"out/phase-{number}") for number in (1, 2))
    assert (one["packing"], two["packing"]) == (False, True)
    assert two["padding"] < 0.1 < one["padding"]
    assert "packing the" in capsys.readouterr().out.partition("phase 2 of 2")[2]


def test_a_packed_stream_resumes_to_the_same_bits(
    sentences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Read by two workers, in its second pass or later."""
    folder = tmp_path / "data"
    folder.mkdir()
    shutil.copy(sentences, folder)
    monkeypatch.setattr(pretraining, "STREAM_HELD_OUT", 30)
    monkeypatch.setattr(pretraining, "STREAM_SAMPLE", 100)
    arguments = [*STREAMED, "--streaming", "--corpus", str(folder), "--save_steps", "8"]
    pretrain(monkeypatch, *arguments, "--output_dir", str(tmp_path / "whole"))
    said = capsys.readouterr().out
    assert re.search(r"a stream of 32 tokens .*\npacking the \d+ sequences of the sample: \d\.\d% of the tokens", said)
    shutil.copytree(tmp_path / "whole/checkpoint-8", tmp_path / "resumed/checkpoint-8")
    where = ["--output_dir", str(tmp_path / "resumed"), "--resume_from_checkpoint", "latest"]
    pretrain(monkeypatch, *arguments, *where)
    assert_same_bits(tmp_path / "resumed", tmp_path / "whole")


@pytest.mark.distributed
def test_two_processes_resume_to_the_same_bits(sentences: Path, tmp_path: Path) -> None:
    """From the middle of the first epoch."""
    command = ["recipes.pretrain_bert", *PACKED, "--dataloader_num_workers", "0", "--corpus", str(sentences)]
    torchrun(2, *command, "--output_dir", str(tmp_path / "two"))
    shutil.copytree(tmp_path / "two/checkpoint-2", tmp_path / "resumed/checkpoint-2")
    torchrun(2, *command, "--output_dir", str(tmp_path / "resumed"), "--resume_from_checkpoint", "latest")
    assert_same_bits(tmp_path / "resumed", tmp_path / "two")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model_type deberta-v2", "--packing True: deberta-v2 has no attention mask .*: packed rows go with albert"),
        (
            "--attn_implementation flex_attention",
            "packed rows go with the attention eager, .* not with flex_attention",
        ),
        ("--train_sampling_strategy group_by_length", "group_by_length: leave it out, packed rows have one length"),
        ("--global_batch_size 8192", r"8192 is more than the corpus' \d+ training packed rows of 32 tokens: lower it"),
    ],
)
def test_bad_input(
    arguments: str, message: str, sentences: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, and nothing is written."""
    command = [*(PACKED[2:] if "model_type" in arguments else PACKED), "--corpus", str(sentences), *arguments.split()]
    with one_line(SystemExit, message):
        pretrain(monkeypatch, *command, "--output_dir", str(tmp_path / "out"))
    assert not list(tmp_path.rglob("*.json*"))
