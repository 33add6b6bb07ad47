"""Protects the main job: a BERT pretrained from the command line, resumed, split over processes, and its report."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertForMaskedLM, pipeline

from recipes import bert, pretrain_bert
from tests.helpers import SMALL, pretrain, torchrun


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model.safetensors")


def test_the_line_of_results(finished: Path) -> None:
    """Versions, hardware, seed, command and the baseline stand beside the score."""
    (line,) = (finished / "results.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record["command"].startswith("python -m ")
    assert "--size smoke" in record["command"]
    assert set(record["versions"]) >= {"python", "torch", "transformers", "accelerate", "hf_lamb"}
    assert torch.__version__.startswith(record["versions"]["torch"])  # which may leave out "+cu130"
    assert (record["optim"], record["seed"], record["steps"]) == ("lamb", 42, 8)
    assert record["global_batch_size"] == 16
    assert record["learning_rate"] == 0.02
    assert 4 < record["held_out_loss"] < 8
    assert 4 < record["unigram_loss"] < 7
    assert 0 < record["unigram_accuracy"] < 0.3
    assert record["tokens_per_second"] == pytest.approx(8 * 16 * 32 / record["seconds"], rel=0.2)


def test_the_picture_is_a_picture(finished: Path) -> None:
    assert (finished / "training.png").read_bytes().startswith(b"\x89PNG")
    assert (finished / "training.png").stat().st_size > 20_000


def test_the_saved_model_fills_a_mask(finished: Path) -> None:
    """An ordinary BERT for AutoModelForMaskedLM and the fill-mask pipeline."""
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(finished), AutoTokenizer.from_pretrained(finished)
    assert type(model) is BertForMaskedLM
    assert model.config.architectures == ["BertForMaskedLM"]
    guesses = pipeline("fill-mask", model=model, tokenizer=tokenizer)("the people of the united [MASK]")
    assert len(guesses) == 5
    assert sum(guess["score"] for guess in guesses) <= 1


def test_a_resumed_run_ends_as_the_uninterrupted_one(
    finished: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, masks and data order included; the epoch changes within both parts."""
    shutil.copytree(finished / "checkpoint-4", tmp_path / "checkpoint-4")
    pretrain(
        monkeypatch,
        *SMALL,
        *("--corpus", str(texts), "--output_dir", str(tmp_path), "--save_steps", "4"),
        *("--resume_from_checkpoint", "latest"),
    )
    expected = weights(finished)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(tmp_path).items())
    log = [json.loads((folder / "checkpoint-8/trainer_state.json").read_text()) for folder in (finished, tmp_path)]
    assert log[0]["epoch"] == log[1]["epoch"]


def test_two_processes_train_the_same_model(finished: Path, texts: Path, tmp_path: Path) -> None:
    """torchrun with half the micro-batch each: the same weights to rounding, and one report."""
    command = ["recipes.pretrain_bert", *SMALL, "--corpus", str(texts), "--output_dir", str(tmp_path)]
    torchrun(2, *command, "--per_device_train_batch_size", "4")
    expected = weights(finished)
    for name, weight in weights(tmp_path).items():
        # An absolute part for attention's key biases: the loss does not depend on them, they are rounding noise.
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-6, msg=name)
    (line,) = (tmp_path / "results.jsonl").read_text().splitlines()
    record, alone = json.loads(line), json.loads((finished / "results.jsonl").read_text())
    assert (record["processes"], record["gradient_accumulation_steps"]) == (2, 2)
    assert record["held_out_loss"] == pytest.approx(alone["held_out_loss"], rel=1e-5)
    assert record["held_out_accuracy"] == pytest.approx(alone["held_out_accuracy"], abs=2e-3)


def test_a_dataset_is_streamed(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dataset that `datasets` loads by name (here a folder of text) is read while training."""
    pytest.importorskip("datasets")
    monkeypatch.setattr(pretrain_bert, "STREAM_HELD_OUT", 30)
    monkeypatch.setattr(pretrain_bert, "STREAM_SAMPLE", 300)
    output = tmp_path / "out"
    pretrain(monkeypatch, *SMALL, "--corpus", str(texts), "--streaming", "--output_dir", str(output))
    record = json.loads((output / "results.jsonl").read_text())
    assert record["steps"] == 8
    assert record["held_out_loss"] > 0


def test_a_stream_that_is_shorter_than_the_run_resumes_in_its_third_pass(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, read by two workers."""
    pytest.importorskip("datasets")
    monkeypatch.setattr(pretrain_bert, "STREAM_HELD_OUT", 30)
    monkeypatch.setattr(pretrain_bert, "STREAM_SAMPLE", 300)
    arguments = ["--corpus", str(texts), "--streaming", "--dataloader_num_workers", "2", "--global_batch_size", "256"]
    arguments += ["--max_steps", "10", "--save_steps", "8", "--eval_strategy", "no", "--output_dir"]
    pretrain(monkeypatch, *SMALL, *arguments, str(tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole/checkpoint-8", tmp_path / "resumed/checkpoint-8")
    pretrain(monkeypatch, *SMALL, *arguments, str(tmp_path / "resumed"), "--resume_from_checkpoint", "latest")
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(tmp_path / "resumed").items())


@pytest.mark.parametrize(("optim", "rate"), [("adamw_torch_fused", 1e-3), ("sgd", 0.2)])
def test_other_optimizers_with_rates_of_their_own(optim: str, rate: float, tmp_path: Path) -> None:
    """The comparison needs nothing but another --optim; the rate follows unless it is given."""
    _, args = pretrain_bert.parse([*SMALL, "--optim", optim, "--output_dir", str(tmp_path)])
    assert args.learning_rate == pytest.approx(rate)
    _, args = pretrain_bert.parse([*SMALL, "--optim", optim, "--learning_rate", "3e-4"])
    assert args.learning_rate == 3e-4
    assert args.output_dir == f"runs/pretrain_bert/smoke-{optim}"


def test_other_optimizers_train(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW leaves a picture without trust ratios."""
    arguments = ["--corpus", str(texts), "--optim", "adamw_torch_fused", "--output_dir", str(tmp_path)]
    pretrain(monkeypatch, *SMALL, *arguments, "--max_steps", "2")
    assert json.loads((tmp_path / "results.jsonl").read_text())["optim"] == "adamw_torch_fused"
    assert (tmp_path / "training.png").exists()


BAD = [
    (["--global_batch_size", "10", "--per_device_train_batch_size", "4"], "10 is no multiple of 4 = 4"),
    (["--global_batch_size", "65536"], r"65536 is more than the corpus' \d+ training sequences of 32 tokens"),
    (["--resume_from_checkpoint", "latest"], "there is no checkpoint in"),
    (["--resume_from_checkpoint", "nowhere"], "nowhere is no checkpoint: it has no trainer_state.json"),
    (["--tokenizer_name", "./nowhere"], r"--tokenizer_name \./nowhere cannot be loaded"),
    (["--corpus", "missing.txt"], "there is no file 'missing.txt'"),
    (["--streaming", "--corpus", "a", "b"], "--streaming takes one hub dataset, got --corpus a b"),
    (["--optim_args", "max_trust=10"], "optim_args: unknown option 'max_trust'"),
    (["--mlm_probability", "0"], r"mlm_probability must lie in \(0, 1\], got 0"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_gets_one_line(
    arguments: list[str], message: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is wrong, the value, the remedy; nothing is written."""
    output = tmp_path / "out"
    with pytest.raises(SystemExit) as exit_:
        pretrain(monkeypatch, *SMALL, "--corpus", str(texts), "--output_dir", str(output), *arguments)
    (line,) = str(exit_.value).splitlines()
    assert re.search(message, line), line
    assert not list(output.rglob("*.json*"))


def test_an_earlier_run_is_not_overwritten(finished: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="holds checkpoint-8 of an earlier run: add --resume_from_checkpoint latest"):
        pretrain(monkeypatch, *SMALL, "--corpus", str(texts), "--output_dir", str(finished))


def test_processes_that_are_not_connected_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without --use_cpu on CPU ranks each process would train alone, and say nothing."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    pretrain_bert.check_connected(2)
    with pytest.raises(ValueError, match="2 processes were launched, but each sees 1: add --use_cpu, or a GPU each"):
        pretrain_bert.check_connected(1)


# -- the model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_logits_at_masked_positions_give_the_same_loss_and_gradient(training: bool) -> None:
    """Against transformers' own forward on the same weights."""
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    ours = bert.BertForMaskedLM(config).train(training)
    theirs = BertForMaskedLM(config).train(training)
    theirs.load_state_dict(ours.state_dict())
    ids = torch.randint(5, 50, (3, 9))
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": (torch.arange(9) < torch.tensor([[9], [7], [4]])).long(),
        "labels": torch.where(torch.arange(9) % 3 == 1, ids, -100),
    }
    mine, reference = ours(**inputs), theirs(**inputs)
    torch.testing.assert_close(mine.loss, reference.loss)
    mine.loss.backward()
    reference.loss.backward()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=name)
    if not training:
        masked = inputs["labels"] != -100
        assert torch.equal(mine.guesses[masked], reference.logits.argmax(-1)[masked])
        assert bool((mine.guesses[~masked] == -100).all())
