"""Protects what Trainer is used with: early stopping, loss scaling, torch.compile, LoRA, Seq2SeqTrainer, cards."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers.trainer
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertForMaskedLM,
    EarlyStoppingCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
)

from hf_lamb import Lamb, LambTrainer, LambTrainingArguments
from hf_lamb.trainer.model_card import EMPTY_BASE_MODEL
from tests.scripts import split_batch

DEFAULTS: dict[str, Any] = {"max_steps": 4, "logging_steps": 1, "save_strategy": "no", "report_to": []}
DEFAULTS |= {"use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 4}


def trainer(path: Path, **options: Any) -> LambTrainer:
    """Of a small masked LM, held out the rows it trains on."""
    callbacks = options.pop("callbacks", None)
    data = split_batch.FixedRows("mlm", 64, seed=0)
    return LambTrainer(
        model=options.pop("model", None) or split_batch.trained_model("mlm", path.parent / "start"),
        args=LambTrainingArguments(output_dir=str(path), **DEFAULTS | options),
        train_dataset=data,
        eval_dataset=data,
        callbacks=callbacks,
    )


def test_early_stopping_ends_the_run_with_the_best_model(tmp_path: Path) -> None:
    """At a rate so high that the first evaluation is the best: two worse ones end it."""
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "save_total_limit": 1}
    stop = [EarlyStoppingCallback(early_stopping_patience=2)]
    run = trainer(tmp_path / "out", max_steps=20, learning_rate=2.0, callbacks=stop, **every, **best)
    run.train()
    losses = [line["eval_loss"] for line in run.state.log_history if "eval_loss" in line]
    assert run.state.global_step == len(losses) < 20
    assert losses.index(min(losses)) == len(losses) - 3
    assert run.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-5)


def test_steps_that_the_loss_scaler_skips_do_not_move_the_schedule(tmp_path: Path) -> None:
    """A scale at which the loss overflows until it is halved: neither step counts nor rates go on meanwhile."""
    run = trainer(tmp_path / "out", max_steps=12, max_grad_norm=0.0)
    scaler = run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=10_000)
    # On a CPU accelerate has no scaler; this is what it does before clipping where it has one.
    run.accelerator.unscale_gradients = lambda: scaler.unscale_(run.optimizer.optimizer)
    run.train()
    (taken,) = {int(state["step"]) for state in run.optimizer.state.values()}
    assert 0 < taken < 12
    assert run.lr_scheduler.last_epoch == taken
    rates = [line["learning_rate"] for line in run.state.log_history if "loss" in line]
    assert rates[: 12 - taken] == [1e-3] * (12 - taken)
    assert rates[-1] == pytest.approx(1e-3 * (1 - (taken - 1) / 12))


@pytest.mark.slow
def test_torch_compile_changes_nothing(tmp_path: Path) -> None:
    """Losses, and trust ratios under the same names; the backend needs no compiler."""
    logs = []
    for options in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        torch._dynamo.reset()
        run = trainer(tmp_path / f"out-{len(logs)}", log_trust_ratio_per_layer=True, **options)
        run.train()
        logs.append([line for line in run.state.log_history if "loss" in line])
    for plain, compiled in zip(*logs, strict=True):
        assert plain.keys() == compiled.keys()
        assert compiled == pytest.approx(plain, rel=1e-4)


def test_lora_adapts_its_matrices(tmp_path: Path) -> None:
    """PEFT's adapters are what LAMB gets; checkpoints hold and resume them."""

    def lora() -> Any:
        torch.manual_seed(0)
        config = peft.LoraConfig(r=4, target_modules=["query", "value"])
        return peft.get_peft_model(split_batch.trained_model("mlm", tmp_path / "start"), config)

    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "learning_rate": 1e-2}
    whole = trainer(tmp_path / "out", model=lora(), **options)
    whole.train()
    lamb = whole.optimizer.optimizer
    assert isinstance(lamb, Lamb)
    assert all(".lora_" in name for group in lamb.param_groups for name in group["param_names"])
    assert sum(len(group["params"]) for group in lamb.param_groups) == 8
    resumed = trainer(tmp_path / "out", model=lora(), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-4"))
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True))


def test_trial_passes_write_into_no_data(tmp_path: Path) -> None:
    """Rows may lie in read-only memory, which a write to would end the process, or share their elements."""
    ids = torch.randint(5, 20, (16, 8), dtype=torch.int64)
    np.save(tmp_path / "ids.npy", ids.numpy())
    mapped = np.load(tmp_path / "ids.npy", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        rows = [{"input_ids": torch.from_numpy(row), "labels": torch.from_numpy(row)} for row in mapped]
    rows = [row | {"token_type_ids": torch.zeros(1, dtype=torch.int64).expand(8)} for row in rows]
    run = trainer(tmp_path / "out")
    run.train_dataset = run.eval_dataset = run.rows_of_a_subclass = rows
    run.train()
    assert run.state.global_step == 4


class Pairs(torch.utils.data.Dataset):
    """The labels are the input."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.arange(index, index + 6) % 20 + 4
        return {"input_ids": ids, "labels": ids.clone()}


class LambSeq2SeqTrainer(LambTrainer, Seq2SeqTrainer):
    """As the docstring of LambTrainer has it."""


@pytest.mark.parametrize("cls", [Seq2SeqTrainer, LambSeq2SeqTrainer])
def test_seq2seq_trainer(cls: type[Trainer], tmp_path: Path) -> None:
    """With `optim="lamb"`, and mixed in; generation while evaluating included."""
    config = BartConfig(
        vocab_size=30,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=32,
        forced_eos_token_id=None,
    )
    args = Seq2SeqTrainingArguments(
        output_dir=str(tmp_path),
        optim="lamb",
        learning_rate=1e-2,
        predict_with_generate=True,
        gradient_accumulation_steps=2,
        **DEFAULTS,
    )
    torch.manual_seed(0)
    run = cls(model=BartForConditionalGeneration(config), args=args, train_dataset=Pairs(), eval_dataset=Pairs())
    run.train()
    assert isinstance(run.optimizer.optimizer, Lamb)
    line = run.state.log_history[0]
    assert ("lamb/trust_ratio_median" in line) is (cls is LambSeq2SeqTrainer)
    assert run.evaluate()["eval_loss"] > 0
    assert run.predict(Pairs()).predictions.ndim == 2


# -- the model card ---------------------------------------------------------------------------------------------------


def test_the_card_names_optimizer_batch_rate_and_plan(tmp_path: Path) -> None:
    scaled = {"base_learning_rate": 1e-3, "base_batch_size": 4, "gradient_accumulation_steps": 4}
    model = BertForMaskedLM(split_batch.trained_model("mlm", tmp_path / "start").config)
    run = trainer(
        tmp_path / "out", model=model, warmup_steps=2, decay_power=0.5, optim_args="max_trust_ratio=10", **scaled
    )
    run.plan = "plan.yaml, phase 1 of 2"
    run.train()
    for _ in range(2):  # written anew, not added to
        run.create_model_card(model_name="small")
    card = (tmp_path / "out/README.md").read_text()
    _, section = card.split("## Large batch\n")
    for words in (
        "optimizer: LAMB (https://arxiv.org/abs/1904.00962), hf_lamb ",
        "eps=1e-06, bias_correction=True, max_trust_ratio=10.0\n",
        "weight decay: 0.01, ",
        "global batch: 16 sequences = 4 x 4 accumulation steps x 1 processes",
        "learning rate 0.002 = 0.001 * sqrt(16 / 4)",
        "steps: 4, 2 of them warm-up; decay: polynomial, power 0.5",
        "gradients clipped to: 1\n",
        "plan: plan.yaml, phase 1 of 2",
    ):
        assert words in section, words
    assert "This model was trained from scratch on" in card
    Trainer.create_model_card(run)  # when this fails, transformers has mended it: EMPTY_BASE_MODEL can go
    assert EMPTY_BASE_MODEL in (tmp_path / "out/README.md").read_text()
    assert card.startswith("---\n")  # the metadata block is where the hub looks for it
    assert [path.name for path in (tmp_path / "out").glob("*README*")] == ["README.md"]


def test_push_to_hub_uploads_that_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cards: list[str] = []

    class Hub:
        def upload_folder(self, folder_path: str, **kwargs: Any) -> None:
            cards.append(Path(folder_path, "README.md").read_text())

    monkeypatch.setattr(transformers.trainer, "hf_api", Hub)
    run = trainer(tmp_path / "out", max_steps=1)
    run.hub_model_id = "me/small"
    run.train()
    run.push_to_hub()
    (card,) = cards
    assert "## Large batch\n\n- optimizer: LAMB" in card


def test_the_card_of_another_optimizer_is_trainers(tmp_path: Path) -> None:
    run = trainer(tmp_path / "out", max_steps=1, optim="adamw_torch")
    run.train()
    run.create_model_card()
    assert "Large batch" not in (tmp_path / "out/README.md").read_text()
