"""Protects what LambTrainer adds: a loss that no split of the batch changes, and trust ratios in the logs."""

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining, GPT2Config, GPT2LMHeadModel, Trainer

from hf_lamb import Lamb, LambTrainer, LambTrainingArguments, TrustRatioCallback, registration
from tests.helpers import torchrun
from tests.scripts import split_batch

TASKS = ["mlm", "classification"]


@pytest.fixture(scope="module", params=TASKS)
def splits(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same 50 global batches of 64 as 1x64, 4x16 accumulated, and 2 processes x 32, from one trained start."""
    root, task = tmp_path_factory.mktemp("splits"), request.param
    split_batch.main(task, 64, 1, root / "1x64")
    split_batch.main(task, 16, 4, root / "4x16")
    torchrun(2, "tests.scripts.split_batch", task, "32", "1", str(root / "2 processes x 32"))
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


def test_a_compute_loss_func_is_left_alone(tmp_path: Path) -> None:
    """Its author divides by num_items_in_batch, as Trainer asks."""
    data = split_batch.FixedRows("mlm", 64, seed=0)

    def loss_of(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        logits = outputs["logits"].flatten(0, 1)
        return nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum") / num_items_in_batch

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


class TwoLosses(split_batch.FixedRows):
    """Masked tokens and one label a row: the sum of two means with different counts."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {**super().__getitem__(index), "next_sentence_label": torch.tensor(index % 2)}


def test_a_loss_that_is_no_mean_over_labels_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """BERT's two-headed pretraining loss cannot be weighted from outside: one line names the model and the remedy."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=split_batch.VOCAB,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        initializer_range=1.0,
    )
    two_headed, one_headed = BertForPreTraining(config), split_batch.trained_model("mlm", tmp_path / "start")
    with caplog.at_level(logging.WARNING, logger="hf_lamb"):
        trainer(two_headed, TwoLosses("mlm", 16, seed=0), tmp_path).train()
        trainer(one_headed, split_batch.FixedRows("mlm", 16, seed=0), tmp_path).train()
    (line,) = [record.getMessage() for record in caplog.records if "no mean over labels" in record.getMessage()]
    assert re.search(r"BertForPreTraining.*Pass a compute_loss_func", line)


def test_finding_out_about_the_loss_leaves_no_trace(tmp_path: Path) -> None:
    """The trial forward passes move neither random numbers nor the model's mode."""
    model = split_batch.trained_model("mlm", tmp_path / "start").train()
    run = trainer(model, split_batch.FixedRows("mlm", 8, seed=0), tmp_path)
    before = torch.get_rng_state()
    data = split_batch.FixedRows("mlm", 8, seed=0)
    assert run._is_mean(model, {"input_ids": data.input_ids, "labels": data.labels})
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
    with pytest.raises(RuntimeError, match=r"the last 24 steps, up to step 24, were skipped.*resume from an earlier"):
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
    registration._warn_once.cache_clear()
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
    assert [registration.inflates_loss(unmade(cls)) for cls in inflating] == [True] * 3
    assert [registration.inflates_loss(unmade(c)) for c in (ModernBertForMaskedLM, GPT2LMHeadModel)] == [False] * 2
