"""Protects what LambTrainer adds: a loss that no split of the batch changes, and trust ratios in the logs."""

import json
import logging
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    ElectraConfig,
    ElectraForPreTraining,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
)

from hf_lamb import Lamb, LambTrainer, LambTrainingArguments, TrustRatioCallback, optim_args
from tests.helpers import on_processes
from tests.scripts import loss_runs, split_batch

TASKS = ["mlm", "classification"]


@pytest.fixture(scope="module", params=TASKS)
def splits(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same 50 global batches of 64 as 1x64, 4x16 accumulated, and 2 processes x 32, from one trained start."""
    root, task = tmp_path_factory.mktemp("splits"), request.param
    split_batch.main(task, 64, 1, root / "1x64")
    split_batch.main(task, 16, 4, root / "4x16")
    on_processes(2, "tests.scripts.split_batch", task, "32", "1", str(root / "2 processes x 32"))
    return {name: root / name for name in ("1x64", "4x16", "2 processes x 32")}


@pytest.mark.parametrize("split", ["4x16", "2 processes x 32"])
def test_weights_do_not_depend_on_how_the_global_batch_is_split(splits: dict[str, Path], split: str) -> None:
    """50 steps with clipping active: every tensor, adapted or not, to max|Δ|/max|w| <= 1e-5 in fp32."""
    one, other = (torch.load(splits[name] / "weights.pt") for name in ("1x64", split))
    (start,) = splits["1x64"].parent.glob("*-start")
    initial = load_file(start / "model.safetensors")
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert not torch.equal(weight, initial[name]), f"{name} was not trained"
        assert float((weight - other[name]).abs().max() / weight.abs().max()) <= 1e-5, name


@pytest.mark.parametrize("split", ["4x16", "2 processes x 32"])
def test_logs_do_not_depend_on_how_the_global_batch_is_split(splits: dict[str, Path], split: str) -> None:
    """Training loss, evaluation loss (101 rows: padded on two processes), gradient norm and trust ratios."""
    one, other = (json.loads((splits[name] / "log.json").read_text()) for name in ("1x64", split))
    for key, entries in {"loss": 50, "eval_loss": 2, "grad_norm": 50, "lamb/trust_ratio_median": 50}.items():
        values = [[line[key] for line in log if key in line] for log in (one, other)]
        assert len(values[0]) == entries
        torch.testing.assert_close(*map(torch.tensor, values), rtol=1e-5, atol=1e-5)
    assert min(line["grad_norm"] for line in one if "grad_norm" in line) > 0.1, "clipping was not active"


def test_evaluated_loss_is_the_mean_over_all_labels(tmp_path: Path) -> None:
    """Not the mean of the batches' means, which depends on the evaluation batch size."""
    model = split_batch.trained_model("mlm", tmp_path / "start").eval()
    data = split_batch.FixedRows("mlm", 50, seed=1)
    with torch.no_grad():
        expected = model(input_ids=data.input_ids, labels=data.labels).loss
    for batch_size in (50, 7, 1):
        metrics = trainer(model, data, tmp_path, per_device_eval_batch_size=batch_size).evaluate(data)
        assert metrics["eval_loss"] == pytest.approx(float(expected), rel=1e-5)


# -- which models are weighted, and which are left alone --------------------------------------------------------------


def trainer(model: nn.Module, data: Any, path: Path, cls: type[Trainer] = LambTrainer, **options: Any) -> Trainer:
    defaults = {
        "output_dir": str(path),
        "max_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return cls(model=model, args=LambTrainingArguments(**defaults | options), train_dataset=data)


def first_loss(model: nn.Module, data: Any, path: Path, cls: type[Trainer] = LambTrainer, **options: Any) -> float:
    run = trainer(model, data, path, cls, **options)
    run.train()
    return run.state.log_history[0]["loss"]


def test_stock_trainer_still_inflates_the_loss(tmp_path: Path) -> None:
    """The upstream fault that LambTrainer works round: https://github.com/huggingface/transformers/issues/47688.
    When this fails, upstream has mended it: see whether the weighting in LambTrainer can go."""
    data = split_batch.FixedRows("mlm", 64, seed=0)
    losses = [
        first_loss(
            split_batch.trained_model("mlm", tmp_path / "start"),
            data,
            tmp_path,
            Trainer,
            per_device_train_batch_size=64 // accumulation,
            gradient_accumulation_steps=accumulation,
        )
        for accumulation in (1, 4)
    ]
    assert losses[1] / losses[0] == pytest.approx(4.0, rel=0.05)


def causal_lm() -> GPT2LMHeadModel:
    """Divides by num_items_in_batch itself."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=split_batch.VOCAB, n_embd=16, n_layer=1, n_head=2, n_positions=split_batch.LENGTH)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return GPT2LMHeadModel(config)


class MeanOfLabels(nn.Module):
    """A head that takes no loss kwargs at all."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(split_batch.VOCAB, split_batch.VOCAB)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.table(input_ids)
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


@pytest.mark.parametrize("make", [causal_lm, MeanOfLabels])
def test_other_kinds_of_heads_do_not_depend_on_the_split_either(make: Any, tmp_path: Path) -> None:
    """A model that normalises by itself is left alone, one without loss kwargs is weighted."""
    data = split_batch.FixedRows("mlm", 64, seed=0)
    (whole, parts) = (
        first_loss(
            make(),
            data,
            tmp_path,
            per_device_train_batch_size=64 // accumulation,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
        )
        for accumulation in (1, 8)
    )
    assert whole == pytest.approx(parts, rel=1e-5)


@pytest.mark.parametrize("number", [lambda items: items, lambda items: items.to("cpu"), lambda items: items.item()])
def test_a_compute_loss_func_is_left_alone(number: Callable[[Any], Any], tmp_path: Path) -> None:
    """Its author divides by num_items_in_batch, as Trainer asks, which gives a tensor; trial passes must, too."""
    data = split_batch.FixedRows("mlm", 64, seed=0)

    def loss_of(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        logits = outputs["logits"].flatten(0, 1)
        return nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum") / number(num_items_in_batch)

    model = split_batch.trained_model("mlm", tmp_path / "start")
    expected = model(input_ids=data.input_ids, labels=data.labels).loss.item()
    args = LambTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=4,
    )
    run = LambTrainer(model=model, args=args, train_dataset=data, compute_loss_func=loss_of)
    run.train()
    assert run.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_micro_batch_without_labels_adds_nothing(tmp_path: Path) -> None:
    """Its mean is 0/0; neither the loss nor the weights may become NaN."""
    data = split_batch.FixedRows("mlm", 64, seed=0)
    data.labels[:48] = -100
    model = split_batch.trained_model("mlm", tmp_path / "start")
    run = trainer(model, data, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=32, max_steps=1)
    run.train()
    with torch.no_grad():
        expected = split_batch.trained_model("mlm", tmp_path / "start")(input_ids=data.input_ids, labels=data.labels)
    assert run.state.log_history[0]["loss"] == pytest.approx(float(expected.loss), rel=1e-5)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


# -- a subclass's own loss --------------------------------------------------------------------------------------------


class OwnLoss(LambTrainer):
    """A `compute_loss` as people write it: `kind` says which."""

    kind = "mean"

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        asked = {"num_items_in_batch": num_items_in_batch} if self.kind in ("ours", "with a term") else {}
        if self.kind in ("ours", "with a term", "ours, uncounted"):
            loss, outputs = super().compute_loss(model, inputs, True, **asked)
            if self.kind == "with a term":
                loss = loss + 3.0
        else:
            inputs = dict(inputs)
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            reduction = "sum" if self.kind == "counted" else "mean"
            loss = nn.functional.cross_entropy(outputs["logits"].flatten(0, 1), labels.flatten(), reduction=reduction)
            if self.kind == "counted":
                loss = loss / num_items_in_batch.to(loss.device)
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize(
    ("kind", "told"),
    [(kind, told) for kind in ("mean", "ours, uncounted", "with a term") for told in (None, False)]
    + [("ours", told) for told in (None, False, True)]
    + [("counted", told) for told in (None, True)],
)
def test_a_subclasss_loss_is_divided_once(kind: str, told: bool | None, tmp_path: Path) -> None:
    """A batch mean is divided by the accumulation, as in a stock Trainer whose model takes no loss kwargs; what is
    weighted already is not, whatever `loss_is_scaled_for_ga` says of it; what an author says of his own loss holds."""
    data = split_batch.FixedRows("mlm", 64, seed=0)
    cls = type("Told", (OwnLoss,), {"kind": kind} | ({} if told is None else {"loss_is_scaled_for_ga": told}))
    model = split_batch.trained_model("mlm", tmp_path / "start")
    with torch.no_grad():
        exact = float(model(input_ids=data.input_ids, labels=data.labels).loss)
    split = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 8, "max_steps": 1}
    loss = first_loss(model, data, tmp_path, cls, **split)
    expected = {"ours": exact, "counted": exact, "with a term": exact + 3.0}.get(kind)
    if expected is None:
        stock = split_batch.trained_model("mlm", tmp_path / "start")
        stock.accepts_loss_kwargs = False
        expected = first_loss(stock, data, tmp_path, Trainer, **split)
        assert expected == pytest.approx(exact, rel=0.02)
    assert loss == pytest.approx(expected, rel=1e-5)


class RunningMetrics(Trainer):
    """Notes what it sees while it computes a loss, as trl's trainers do."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls, self.metrics, self.total = 0, {"train": []}, torch.zeros(())

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        self.metrics["train"].append(len(inputs["labels"]))
        self.total += 1
        self.seen = True
        return super().compute_loss(model, inputs, *args, **kwargs)


class LambRunningMetrics(LambTrainer, RunningMetrics):
    pass


def test_running_metrics_of_a_mixed_in_trainer_hold_the_training_only(tmp_path: Path) -> None:
    data = split_batch.FixedRows("mlm", 16, seed=0)
    model = split_batch.trained_model("mlm", tmp_path / "start")
    run = trainer(model, data, tmp_path, LambRunningMetrics, per_device_train_batch_size=4)
    batch = {"input_ids": data.input_ids, "labels": data.labels}
    assert run.loss_weighting.is_mean(model, batch)
    assert (run.calls, run.metrics, float(run.total), hasattr(run, "seen")) == (0, {"train": []}, 0.0, False)
    run.train()
    assert (run.calls, run.metrics["train"], float(run.total)) == (2, [4, 4], 2.0)


# -- losses that are means over something else, or have terms with labels of their own --------------------------------

SMALL = {"vocab_size": split_batch.VOCAB, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 16, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class TwoLosses(split_batch.FixedRows):
    """Masked tokens and one label a row: the sum of two means with different counts."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {**super().__getitem__(index), "next_sentence_label": torch.tensor(index % 3 % 2)}


class Replaced(split_batch.FixedRows):
    """Rows of different lengths, padded, with a label everywhere: ELECTRA's, a mean over what is attended to."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids, length = self.input_ids[index], 4 + index * 7 % 20
        return {
            "input_ids": ids,
            "attention_mask": (torch.arange(len(ids)) < length).long(),
            "labels": (ids % 5 == 0).long(),
        }


class MeanOfRows(nn.Module):
    """Each row's mean over its labels, and their mean: every row counts the same."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(split_batch.VOCAB, split_batch.VOCAB)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> dict[str, torch.Tensor]:
        logits = self.table(input_ids)
        each = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        return {"loss": (each.sum(1) / labels.ne(-100).sum(1)).mean(), "logits": logits}


class RareCountsMore(MeanOfRows):
    """Classes have weights, by whose sum the loss is divided: no count of labels makes it a mean."""

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> dict[str, torch.Tensor]:
        logits = self.table(input_ids)
        weight = torch.linspace(0.1, 10, split_batch.VOCAB)
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), weight), "logits": logits}


def bert_for_pretraining() -> BertForPreTraining:
    torch.manual_seed(0)
    return BertForPreTraining(BertConfig(**SMALL))


def electra() -> ElectraForPreTraining:
    torch.manual_seed(0)
    return ElectraForPreTraining(ElectraConfig(embedding_size=16, **SMALL))


@pytest.mark.parametrize(
    ("make", "data"),
    [(bert_for_pretraining, TwoLosses), (electra, Replaced), (MeanOfRows, split_batch.FixedRows)],
)
def test_other_means_do_not_depend_on_the_split_either(make: Any, data: Any, tmp_path: Path) -> None:
    """From an untrained head, whose losses all look alike; loss, gradient norm and eval_loss, down to single rows."""
    logs = []
    for batch in (16, 4, 1):
        options = {"gradient_accumulation_steps": 16 // batch, "max_steps": 3, "learning_rate": 1e-2}
        options |= {"per_device_train_batch_size": batch, "per_device_eval_batch_size": batch}
        run = trainer(make(), data("mlm", 16, seed=0), tmp_path, **options)
        run.train()
        lines = [(line["loss"], line["grad_norm"]) for line in run.state.log_history if "loss" in line]
        logs.append([*sum(lines, ()), run.evaluate(run.train_dataset)["eval_loss"]])
    assert logs[1] == pytest.approx(logs[0], rel=2e-5)
    assert logs[2] == pytest.approx(logs[0], rel=2e-5)


def test_a_loss_that_is_no_mean_over_labels_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Also while an untrained head's losses are all ln(classes): one line names the model and the remedy."""
    with caplog.at_level(logging.WARNING, logger="hf_lamb"):
        trainer(RareCountsMore(), split_batch.FixedRows("mlm", 16, seed=0), tmp_path).train()
        for make, data in ((bert_for_pretraining, TwoLosses), (MeanOfLabels, split_batch.FixedRows)):
            trainer(make(), data("mlm", 16, seed=0), tmp_path).train()
    (line,) = [record.getMessage() for record in caplog.records if "no mean over labels" in record.getMessage()]
    assert re.search(r"Pass a compute_loss_func.*RareCountsMore", line)


def test_a_compute_loss_func_that_returns_a_mean_is_weighted(tmp_path: Path) -> None:
    """The stock Trainer multiplies it by the accumulation."""
    data = split_batch.FixedRows("mlm", 64, seed=0)
    model = split_batch.trained_model("mlm", tmp_path / "start")
    expected = model(input_ids=data.input_ids, labels=data.labels).loss.item()

    def mean(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return nn.functional.cross_entropy(outputs["logits"].flatten(0, 1), labels.flatten())

    run = trainer(model, data, tmp_path, per_device_train_batch_size=8, gradient_accumulation_steps=8, max_steps=1)
    args = run.args
    run = LambTrainer(model=model, args=args, train_dataset=data, compute_loss_func=mean)
    run.train()
    assert run.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-5)


# -- finding out about a loss changes nothing and ends nothing --------------------------------------------------------


class TwoTowers(nn.Module):
    """Nested inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(split_batch.VOCAB, 8), nn.Linear(8, 3)

    def forward(self, query: Any, labels: torch.Tensor, **kwargs: Any) -> dict[str, torch.Tensor]:
        logits = self.head(self.table(query["input_ids"]).mean(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class OnlyWhileTraining(TwoTowers):
    """As torchvision's detectors: a loss in training mode, predictions else."""

    def forward(self, query: Any, labels: torch.Tensor, **kwargs: Any) -> dict[str, torch.Tensor]:
        outputs = super().forward(query, labels)
        return outputs if self.training else {"logits": outputs["logits"]}


class ImagesOfAllRows(TwoTowers):
    """One tensor holds the images of all rows, two each."""

    def forward(self, query: Any, labels: torch.Tensor, images: Any = None, **kwargs: Any) -> dict[str, torch.Tensor]:
        if len(images) != 2 * len(labels):
            raise ValueError(f"{len(images)} images of {len(labels)} rows")
        return super().forward(query, labels)


@pytest.mark.parametrize("make", [TwoTowers, OnlyWhileTraining, ImagesOfAllRows])
def test_batches_that_cannot_be_taken_apart_train_as_in_a_stock_trainer(make: Any, tmp_path: Path) -> None:
    """And no loss is inflated where it can be seen that it is a mean."""

    def collate(rows: list[dict[str, torch.Tensor]]) -> dict[str, Any]:
        batch = torch.utils.data.default_collate(rows)
        images = {"images": torch.zeros(2 * len(rows), 4)} if make is ImagesOfAllRows else {}
        return {"query": {"input_ids": batch["input_ids"]}, "labels": batch["labels"], **images}

    data, losses = split_batch.FixedRows("classification", 32, seed=0), []
    for cls, accumulation in ((Trainer, 1), (LambTrainer, 1), (LambTrainer, 4)):
        options = {"per_device_train_batch_size": 32 // accumulation, "gradient_accumulation_steps": accumulation}
        run = trainer(make(), data, tmp_path, cls, max_steps=1, remove_unused_columns=False, **options)
        run.data_collator = collate
        run.train()
        losses.append(run.state.log_history[0]["loss"])
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-5)


class Restless(MeanOfRows):
    """Counts its calls, in an attribute and in a buffer, and draws all kinds of random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.frozen = nn.Dropout().eval()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> dict[str, torch.Tensor]:
        self.calls += 1
        self.seen += 1
        random.random(), np.random.rand(), torch.rand(())
        return super().forward(input_ids, labels)


@pytest.mark.parametrize("fails", [False, True])
def test_trial_passes_leave_no_trace(fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modes module by module, buffers, attributes and random numbers of every kind; no device is seeded anew."""
    seeded = []
    monkeypatch.setattr(torch.xpu, "_is_in_bad_fork", lambda: False)
    monkeypatch.setattr(torch.xpu, "manual_seed_all", lambda seed: seeded.append(seed))
    model = Restless().train()
    model.frozen.eval()
    data = split_batch.FixedRows("mlm", 8, seed=0)
    run = trainer(model, data, tmp_path)
    if fails:
        monkeypatch.setattr(Restless, "forward", lambda self, *args, **kwargs: 1 / 0)
        model.forward = lambda *args, **kwargs: model.seen.add_(1) / torch.rand(3)[4]
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    seeded.clear()
    run.loss_weighting.is_mean(model, {"input_ids": data.input_ids, "labels": data.labels})
    assert run.loss_weighting.is_known()
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert after == before
    assert (model.calls, float(model.seen), model.training, model.frozen.training) == (0, 0.0, True, False)
    assert seeded == []


# -- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.distributed
def test_rows_that_fill_the_last_batch_are_not_evaluated(tmp_path: Path) -> None:
    """eval_loss on two processes is that on one, for float labels and for a loss that knows no -100, with and without
    predictions."""
    loss_runs.main("evaluate", tmp_path / "one.json")
    on_processes(2, "tests.scripts.loss_runs", "evaluate", str(tmp_path / "two.json"))
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    for kind, metrics in one.items():
        assert two[kind]["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-6), kind
        assert two[kind].get("eval_rows") == metrics.get("eval_rows")


@pytest.mark.distributed
@pytest.mark.parametrize("what", ["twice", "fsdp2-twice", "unequal"])
def test_processes_train_again_and_from_unequal_batches(what: str, tmp_path: Path) -> None:
    """A second `train()` after an evaluation and with more accumulation; a first batch of one row here, four there."""
    on_processes(2, "tests.scripts.loss_runs", what, str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    if what == "unequal":
        assert len(found["loss"]) == 3
    else:
        assert len(found["first"]) == len(found["second"]) == 3
        assert found["evaluated"] == sorted(found["evaluated"], reverse=True)  # it goes on learning


def test_finding_out_about_the_loss_leaves_no_trace(tmp_path: Path) -> None:
    """The trial forward passes move neither random numbers nor the model's mode."""
    model = split_batch.trained_model("mlm", tmp_path / "start").train()
    run = trainer(model, split_batch.FixedRows("mlm", 8, seed=0), tmp_path)
    before = torch.get_rng_state()
    data = split_batch.FixedRows("mlm", 8, seed=0)
    assert run.loss_weighting.is_mean(model, {"input_ids": data.input_ids, "labels": data.labels})
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training


# -- what the logs say ------------------------------------------------------------------------------------------------


def tensorboard_tags(path: Path) -> set[str]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(path))
    events.Reload()
    return set(events.Tags()["scalars"])


def test_trust_ratios_are_in_every_training_log_line_and_in_tensorboard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "tb"))
    model = split_batch.trained_model("mlm", tmp_path / "start")
    data = split_batch.FixedRows("mlm", 16, seed=0)
    run = trainer(model, data, tmp_path, report_to=["tensorboard"], log_trust_ratio_per_layer=True)
    run.train()
    (*lines, _) = run.state.log_history
    assert len(lines) == 2
    stats = run.optimizer.optimizer.layer_stats(adapted_only=True)
    for line in lines:
        assert 0 < line["lamb/trust_ratio_min"] <= line["lamb/trust_ratio_median"] <= line["lamb/trust_ratio_max"]
    layers = {f"lamb/trust_ratio/{name}": s.trust_ratio for name, s in stats.items()}
    assert {key: lines[-1][key] for key in layers} == layers
    assert not any("LayerNorm" in key or key.endswith("bias") for key in lines[-1])
    tags = tensorboard_tags(tmp_path / "tb")
    assert {"train/lamb/trust_ratio_median", *(f"train/{key}" for key in layers)} <= tags


def test_the_callback_serves_a_stock_trainer_too(tmp_path: Path) -> None:
    """With LAMB it adds the summary; with another optimizer it stays silent."""
    data = split_batch.FixedRows("mlm", 16, seed=0)
    for optim, expected in [("lamb", True), ("adamw_torch", False)]:
        model = split_batch.trained_model("mlm", tmp_path / "start")
        run = trainer(model, data, tmp_path, Trainer, optim=optim)
        run.add_callback(TrustRatioCallback())
        run.train()
        assert ("lamb/trust_ratio_median" in run.state.log_history[0]) is expected


def test_optim_lamb_gets_named_groups_by_default(tmp_path: Path) -> None:
    """LambTrainingArguments asks for LAMB; biases and norms neither decay nor adapt."""
    model = split_batch.trained_model("mlm", tmp_path / "start")
    optimizer = trainer(model, split_batch.FixedRows("mlm", 16, seed=0), tmp_path).create_optimizer()
    assert isinstance(optimizer, Lamb)
    assert [(g["weight_decay"], g["layer_adaptation"]) for g in optimizer.param_groups] == [(0.01, True), (0.0, False)]
    assert optimizer.param_groups[0]["param_names"][0] == "bert.embeddings.word_embeddings.weight"
    assert isinstance(model, BertForMaskedLM)


@pytest.mark.parametrize("optim_args", ["max_trust_ratio", "max_trust_ratio=10,", "max_ratio=10"])
def test_bad_optim_args_are_refused_by_name_at_once(optim_args: str, tmp_path: Path) -> None:
    """A stock Trainer dies later, at a malformed item, with "not enough values to unpack"."""
    with pytest.raises(ValueError, match="optim_args: "):
        LambTrainingArguments(output_dir=str(tmp_path), optim_args=optim_args)
    LambTrainingArguments(output_dir=str(tmp_path), optim="adamw_torch", optim_args=optim_args)


# -- what must survive ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_resumed_run_equals_the_uninterrupted_one(dtype: torch.dtype, tmp_path: Path) -> None:
    """Bit for bit, bf16 weights with fp32 moments included, under the stock Trainer too."""
    data = split_batch.FixedRows("mlm", 64, seed=0)
    for cls in (LambTrainer, Trainer):
        path = tmp_path / cls.__name__
        options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "logging_steps": 8}
        whole = trainer(split_batch.trained_model("mlm", tmp_path / "start").to(dtype), data, path, cls, **options)
        whole.train()
        resumed = trainer(split_batch.trained_model("mlm", tmp_path / "start").to(dtype), data, path, cls, **options)
        resumed.train(resume_from_checkpoint=str(path / "checkpoint-4"))
        for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
            assert a.dtype == dtype
            assert torch.equal(a, b), name
            for key, value in whole.optimizer.state[a].items():
                assert value.dtype == torch.float32, key
                assert torch.equal(value, resumed.optimizer.state[b][key]), (name, key)


class Poisoned(nn.Module):
    """Its gradient is NaN for as long as told, then finite."""

    def __init__(self, bad_steps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.left = bad_steps

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        loss = self.weight.sum() + 0 * (input_ids.sum() + labels.sum())
        if self.training:
            self.left -= 1
            if self.left >= 0:
                loss = loss * float("nan")
        return {"loss": loss}


def test_skipped_steps_are_logged_and_the_schedule_advances(tmp_path: Path) -> None:
    """Three steps with NaN gradients: weights stay, the count is in the log, the rate falls as planned."""
    data = split_batch.FixedRows("mlm", 64, seed=0)
    model = Poisoned(bad_steps=3)
    run = trainer(model, data, tmp_path, max_steps=5, per_device_train_batch_size=4)
    run.train()
    lines = [line for line in run.state.log_history if "loss" in line]
    assert [line.get("lamb/skipped_steps") for line in lines] == [1, 2, 3, 3, 3]
    assert [line["learning_rate"] for line in lines] == pytest.approx([1e-3, 8e-4, 6e-4, 4e-4, 2e-4])
    # two steps moved the weights, at the last two rates
    assert float((1 - model.weight.detach()).mean()) == pytest.approx(4e-4 + 2e-4, rel=1e-2)


def test_a_run_that_only_skips_is_ended(tmp_path: Path) -> None:
    """Looked at when logging: 20 in a row raise, with the step and the remedy."""
    data = split_batch.FixedRows("mlm", 64, seed=0)
    run = trainer(Poisoned(10_000), data, tmp_path, max_steps=60, logging_steps=8, per_device_train_batch_size=2)
    with pytest.raises(RuntimeError, match=r"resume from an earlier.*the last 24 steps, up to step 24, were skipped"):
        run.train()


@pytest.mark.parametrize(
    ("cls", "accumulation", "dtype", "expected"),
    [
        (Trainer, 4, torch.float32, "multiplies its loss and gradient by 4"),
        (Trainer, 1, torch.float32, None),
        (LambTrainer, 4, torch.float32, None),
        (LambTrainer, 1, torch.bfloat16, r"trainable parameters are torch\.bfloat16"),
    ],
)
def test_the_handler_warns_of_what_makes_lamb_wrong_or_pointless(
    cls: type[Trainer],
    accumulation: int,
    dtype: torch.dtype,
    expected: str | None,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Under any Trainer: an inflated loss (not under LambTrainer, which puts it right), low-precision weights."""
    model = split_batch.trained_model("mlm", tmp_path / "start").to(dtype)
    data = split_batch.FixedRows("mlm", 16, seed=0)
    with caplog.at_level(logging.WARNING, logger="hf_lamb"):
        trainer(model, data, tmp_path, cls, gradient_accumulation_steps=accumulation).create_optimizer()
    doubts = [m for m in caplog.messages if "multiplies" in m or "bfloat16" in m]
    if expected is None:
        assert doubts == []
    else:
        (line,) = doubts
        assert re.search(expected, line)


def test_which_heads_inflate_their_loss_is_read_from_their_source() -> None:
    """transformers' own loss function divides by num_items_in_batch; a CrossEntropyLoss in `forward` does not."""
    from transformers import BertForSequenceClassification, DistilBertForMaskedLM, ModernBertForMaskedLM

    def unmade(cls: type[nn.Module]) -> nn.Module:
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        return model

    inflating = (BertForMaskedLM, BertForSequenceClassification, DistilBertForMaskedLM)
    assert [optim_args.inflates_loss(unmade(cls)) for cls in inflating] == [True] * 3
    assert [optim_args.inflates_loss(unmade(c)) for c in (ModernBertForMaskedLM, GPT2LMHeadModel)] == [False] * 2
