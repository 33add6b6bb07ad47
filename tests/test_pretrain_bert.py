"""Protects the main job: a BERT pretrained from the command line, resumed, split over processes, and its report."""

import fcntl
import json
import logging
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import transformers
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertConfig, BertForMaskedLM, pipeline

from recipes import pretrain_bert
from recipes.compare_optimizers import CompareArguments
from recipes.lib import bert, pretraining, processes
from recipes.lib.report import plot_training, plot_trust_ratios
from recipes.lib.tokenizer import train_tokenizer
from tests.helpers import SMALL, one_line, pretrain, torchrun

ROOT = Path(__file__).parent.parent


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
    monkeypatch.setattr(pretraining, "STREAM_HELD_OUT", 30)
    monkeypatch.setattr(pretraining, "STREAM_SAMPLE", 300)
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
    monkeypatch.setattr(pretraining, "STREAM_HELD_OUT", 30)
    monkeypatch.setattr(pretraining, "STREAM_SAMPLE", 300)
    arguments = ["--corpus", str(texts), "--streaming", "--dataloader_num_workers", "2", "--global_batch_size", "256"]
    arguments += ["--max_steps", "10", "--save_steps", "8", "--eval_strategy", "no", "--output_dir"]
    pretrain(monkeypatch, *SMALL, *arguments, str(tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole/checkpoint-8", tmp_path / "resumed/checkpoint-8")
    pretrain(monkeypatch, *SMALL, *arguments, str(tmp_path / "resumed"), "--resume_from_checkpoint", "latest")
    expected = weights(tmp_path / "whole")
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(tmp_path / "resumed").items())


@pytest.mark.parametrize(("optim", "rate"), [("adamw_torch_fused", 4e-3), ("sgd", 0.2)])
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


# -- going on -------------------------------------------------------------------------------------------------------


@pytest.fixture
def half_done(finished: Path, tmp_path: Path) -> Path:
    """An output directory with the checkpoint after 4 of 8 steps."""
    shutil.copytree(finished / "checkpoint-4", tmp_path / "half_done/checkpoint-4")
    return tmp_path / "half_done"


def resume(monkeypatch: pytest.MonkeyPatch, output: Path, corpus: Path, *arguments: str) -> None:
    options = ["--output_dir", str(output), "--corpus", str(corpus), "--save_steps", "4", *arguments]
    pretrain(monkeypatch, *SMALL, "--resume_from_checkpoint", "latest", *options)


def test_a_resumed_run_says_from_where_and_raises_no_false_alarm(
    half_done: Path,
    texts: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Tied weights are not missing, and 0.5 of 8 steps are the checkpoint's 4."""
    transformers.utils.logging.enable_propagation()
    try:
        with caplog.at_level(logging.WARNING):
            resume(monkeypatch, half_done, texts)
    finally:
        transformers.utils.logging.disable_propagation()
    assert not [line for line in caplog.messages if "missing keys" in line or "trainer_state.json" in line]
    said = capsys.readouterr().out
    assert f"resuming from {half_done / 'checkpoint-4'}, step 4 of 8" in said
    assert "warning" not in said


def test_a_run_on_another_corpus_keeps_the_tokenizer_and_says_so(
    half_done: Path,
    texts: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A new tokenizer of the same size would give the old embeddings other tokens, and nothing would fail."""
    other = tmp_path / "other"
    other.mkdir()
    for path in texts.glob("*.txt"):
        (other / path.name).write_text(path.read_text()[::-1])
    before = AutoTokenizer.from_pretrained(half_done / "checkpoint-4").get_vocab()
    resume(monkeypatch, half_done, other)
    assert AutoTokenizer.from_pretrained(half_done).get_vocab() == before
    said = capsys.readouterr().out
    for part in ("training", "held-out"):
        assert re.search(rf"warning: other {part} data than the checkpoint's: [\d,]+ sequences of .*other, not", said)


def test_another_tokenizer_than_the_checkpoints_is_refused(
    half_done: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one with as many tokens; the same one is not."""
    own = AutoTokenizer.from_pretrained(half_done / "checkpoint-4")
    own.save_pretrained(tmp_path / "same")
    words = [path.read_text()[::-1] for path in texts.glob("*.txt")]
    train_tokenizer(words, len(own)).save_pretrained(tmp_path / "other")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "other")) == len(own)
    with pytest.raises(SystemExit, match=r"--tokenizer_name .*other is not the tokenizer of .*checkpoint-4: leave it"):
        resume(monkeypatch, half_done, texts, "--tokenizer_name", str(tmp_path / "other"))
    resume(monkeypatch, half_done, texts, "--tokenizer_name", str(tmp_path / "same"))


def test_a_finished_run_gets_no_second_line(
    finished: Path, texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (finished / "results.jsonl").read_text()
    resume(monkeypatch, finished, texts)
    assert f"the run in {finished} is finished" in capsys.readouterr().out
    assert (finished / "results.jsonl").read_text() == before


def test_a_resumed_run_records_what_was_in_force(
    half_done: Path, texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint's options, not the command line's; and the seconds of all 8 steps."""
    file = half_done / "checkpoint-4/trainer_state.json"
    state = json.loads(file.read_text())
    assert 0 < state["stateful_callbacks"]["RunFacts"]["args"]["seconds"] < 1000
    state["stateful_callbacks"]["RunFacts"]["args"]["seconds"] = 5000.0
    file.write_text(json.dumps(state))
    other = ["--learning_rate", "0.001", "--weight_decay", "0.5", "--optim_args", "max_trust_ratio=0.01"]
    resume(monkeypatch, half_done, texts, *other)
    record = json.loads((half_done / "results.jsonl").read_text())
    assert (record["learning_rate"], record["learning_rate_why"]) == (0.02, "the checkpoint's")
    assert (record["weight_decay"], record["optim_args"]) == (0.01, None)
    assert (record["options"]["max_trust_ratio"], record["options"]["betas"]) == (None, [0.9, 0.999])
    assert record["seconds"] > 5000
    assert record["timed_steps"] == 8
    assert record["tokens_per_second"] == round(8 * 16 * 32 / record["seconds"])
    assert "learning rate 0.001" not in capsys.readouterr().out


def test_a_checkpoint_that_does_not_say_how_long_it_took(
    half_done: Path, texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of an earlier version, or of a stock Trainer: the seconds are those of the steps since."""
    file = half_done / "checkpoint-4/trainer_state.json"
    state = json.loads(file.read_text())
    del state["stateful_callbacks"]["RunFacts"]
    file.write_text(json.dumps(state))
    resume(monkeypatch, half_done, texts)
    assert json.loads((half_done / "results.jsonl").read_text())["timed_steps"] == 4
    assert "the last 4 of 8 steps in" in capsys.readouterr().out


def wait_for_checkpoint(run: subprocess.Popen[str], output: Path, known: Iterable[Path] = ()) -> None:
    """Wait for one that is not known."""
    end = time.monotonic() + 240
    while not {*output.glob("checkpoint-*")} - {*known}:
        assert run.poll() is None, "it has ended"
        assert time.monotonic() < end
        time.sleep(0.2)


def is_locked(output: Path) -> bool:
    with open(output / processes.LOCK, "a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return True
    return False


ENDLESS = ["--max_steps", "100000", "--warmup_steps", "10", "--save_steps", "2", "--eval_strategy", "no"]


@pytest.mark.slow
def test_a_signal_to_make_ends_the_training_which_then_goes_on(texts: Path, tmp_path: Path) -> None:
    """SIGTERM reaches it, Ctrl-C is one line, and `make pretrain` once more goes on; meanwhile nobody else may."""
    output = tmp_path / "out"
    arguments = [*SMALL, *ENDLESS, "--corpus", str(texts), "--output_dir", str(output)]
    assumed = [option for name in ("setup", f"{sys.prefix}/.installed") for option in ("-o", name)]
    command = ["make", *assumed, "pretrain", f"VENV={sys.prefix}", f"ARGS={' '.join(arguments)}"]
    options: dict[str, Any] = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    for end in (signal.SIGTERM, signal.SIGINT):
        # A process that was started in the background ignores SIGINT, and so would what it starts.
        interruptible = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        known = {*output.glob("checkpoint-*")}
        with subprocess.Popen(command, **options, start_new_session=True, preexec_fn=interruptible) as run:
            try:
                wait_for_checkpoint(run, output, known)
                deadline = time.monotonic() + 240
                while not is_locked(output) and time.monotonic() < deadline:
                    time.sleep(0.2)
                (training,) = [p for p in psutil.Process(run.pid).children(recursive=True) if "python" in p.name()]
                if end == signal.SIGTERM:
                    module = [sys.executable, "-m", "recipes.pretrain_bert", *arguments]
                    other = subprocess.run([*module, "--resume_from_checkpoint", "auto"], **options, timeout=240)
                    assert other.returncode == 1
                    assert f"another run is training into {output}: wait for it, stop it" in other.stdout
                    run.terminate()  # make alone
                else:
                    os.killpg(run.pid, signal.SIGINT)  # as a terminal does
                said, _ = run.communicate(timeout=240)
                psutil.wait_procs([training], timeout=60)
                assert not training.is_running()
                assert not is_locked(output)
            finally:
                if run.poll() is None:
                    os.killpg(run.pid, signal.SIGKILL)
        if end == signal.SIGINT:
            assert re.search(rf"resuming from {output}/checkpoint-\d+, step [\d,]+ of 100,000", said)
            line = rf"\npretrain_bert: interrupted: the same command .* auto goes on from {output}/checkpoint-\d+\n"
            assert re.search(line, said)
            assert "Traceback" not in said


def test_the_lock_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it is left at the end; what a dead run left keeps nobody out, and neither do file systems without."""
    (tmp_path / processes.LOCK).touch()
    with processes.only_run_in([str(tmp_path)], is_main_process=True):
        hold = f"from recipes.lib.processes import only_run_in\nwith only_run_in([{str(tmp_path)!r}], True): pass"
        other = subprocess.run([sys.executable, "-c", hold], capture_output=True, text=True, cwd=ROOT, timeout=240)
        assert "ValueError: another run is training into" in other.stderr
    assert not list(tmp_path.iterdir())

    def no_locks(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with processes.only_run_in([str(tmp_path)], is_main_process=True):
        pass
    assert not list(tmp_path.iterdir())


# -- what the command line means --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "warmup"),
    [
        (["--size", "tiny"], 240),
        (["--size", "tiny", "--max_steps", "40"], 4),
        (["--size", "large", "--max_steps", "1000"], 200),
        (["--size", "tiny", "--max_steps", "40", "--warmup_steps", "30"], 30),
        (["--size", "tiny", "--max_steps", "-1", "--num_train_epochs", "1"], 0.1),
        (["--size", "tiny", "--num_train_epochs", "1"], 0.1),
    ],
)
def test_the_warmup_of_a_size_is_a_share(arguments: list[str], warmup: float) -> None:
    """A given one stays."""
    assert pretrain_bert.parse(arguments)[1].warmup_steps == warmup


def test_epochs_decide_where_they_are_given() -> None:
    """Trainer would go by the steps of the size, without a word."""
    args = pretrain_bert.parse(["--num_train_epochs", "3"])[1]
    assert (args.max_steps, args.num_train_epochs) == (-1, 3)
    assert pretrain_bert.parse([])[1].max_steps == 2400
    assert pretrain_bert.parse(["--num_train_epochs", "3"], {"max_steps": -1})[1].max_steps == -1
    for argv, planned in ((["--max_steps", "5"], {}), ([], {"max_steps": 5})):
        with one_line(ValueError, "--num_train_epochs 3: --max_steps 5 would decide: leave one out"):
            pretrain_bert.parse(["--num_train_epochs", "3", *argv], planned)


def test_an_option_is_not_guessed_from_its_beginning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        pretrain_bert.parse(["--max_step", "5"])
    assert "unknown option '--max_step' (did you mean --max_steps?)" in capsys.readouterr().err


def test_the_first_run_has_the_model_of_the_comparison() -> None:
    """So that its loss stands beside that table; few evaluations and lines, for a minute on a slow core."""
    recipe, args = pretrain_bert.parse(["--size", "smoke"])
    other = CompareArguments()
    for name in ("size", "corpus", "vocab_size", "max_seq_length"):
        assert getattr(recipe, name) == getattr(other, name), name
    assert args.max_steps * recipe.global_batch_size <= other.train_sequences
    assert args.max_steps / args.eval_steps <= 5
    assert args.max_steps / args.logging_steps <= 20
    assert pretrain_bert.parse(["--size", "smoke", "--vocab_size", "400"])[0].vocab_size == 400
    assert pretrain_bert.parse(["--model_type", "bert"])[0].vocab_size == pretrain_bert.parse([])[0].vocab_size


def test_a_named_tokenizer_may_have_more_tokens_than_the_size_would_train(finished: Path) -> None:
    """--vocab_size is of a tokenizer that is trained: a run with another one resumes."""
    named = pretraining.PretrainingArguments(size=None, tokenizer_name=str(finished), vocab_size=300)
    assert len(pretraining.tokenizer_for(named, [], str(finished / "checkpoint-8"))) == 400


@pytest.mark.parametrize(
    ("arguments", "processes_", "split"),
    [
        (["--size", "smoke"], 2, (16, 1)),
        (["--size", "smoke"], 8, (4, 1)),
        (["--size", "tiny"], 1, (32, 2)),
        (["--global_batch_size", "36"], 3, (12, 1)),
        (["--global_batch_size", "80"], 1, (20, 4)),
        (["--global_batch_size", "48", "--per_device_train_batch_size", "8"], 2, (8, 3)),
    ],
)
def test_the_micro_batch_follows_from_batch_and_processes(
    arguments: list[str], processes_: int, split: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrain_bert.LambTrainingArguments, "world_size", property(lambda _: processes_))
    monkeypatch.setattr(pretrain_bert, "check_connected", lambda _: None)
    args = pretrain_bert.parse(arguments)[1]
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == split


@pytest.mark.parametrize(
    ("numbers", "remedy"),
    [
        ((32, 32, 2), "give --per_device_train_batch_size 8 or 16, or --global_batch_size 64"),
        ((100, 8, 2), "give --per_device_train_batch_size 2 or 5, or --global_batch_size 96 or 112"),
        ((10, 4, 3), "give --global_batch_size 12"),
    ],
)
def test_numbers_that_do_not_fit_are_answered_with_some_that_do(numbers: tuple[int, int, int], remedy: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"x {numbers[2]} processes: {remedy}") + "$"):
        processes.accumulation_of(*numbers)


def test_the_size_of_the_papers_row_is_the_plan_of_that_row() -> None:
    """128 tokens, as all but the last tenth of its epochs."""
    assert pretrain_bert.DEFAULTS["large"] == {
        "max_seq_length": 128,
        "global_batch_size": 32_768,
        "max_steps": 15_625,
        "warmup_steps": 3125,
        "learning_rate": 5e-3,
    }


@pytest.mark.parametrize(
    ("environment", "asked", "line"),
    [
        ({}, "fp16", "fp16 was asked for, and is off: this trains in fp32 on cpu"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, None, "fp16 was asked for, and is off: this trains in fp32 on cpu"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, None, "FSDP2 was asked for, and is off"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, None, "FSDP1 was asked for, and is off"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, None, "DeepSpeed was asked for, and is off"),
        ({}, None, None),
    ],
)
def test_what_was_asked_for_and_is_off_is_said(
    environment: dict[str, str], asked: str | None, line: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerator = Accelerator(cpu=True)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    lines = processes.asked_for_and_off(accelerator, asked)
    assert [words.startswith(line or "") for words in lines] == ([True] if line else [])
    assert processes.kind_of(accelerator) == "1 process, fp32"


def test_processes_that_the_launcher_did_not_start_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch --cpu` starts one, whatever --num_processes says."""
    config = str(ROOT / "recipes/configs/accelerate/ddp.yaml")
    for words, count in {
        "python accelerate launch --cpu --num_processes 2 -m recipes.pretrain_bert --size smoke": 2,
        f"python -m accelerate.commands.launch --cpu --config_file {config} -m recipes.pretrain_bert": 8,
        "python accelerate launch -m recipes.pretrain_bert --num_processes 3": 0,
        "bash launch": 0,
    }.items():
        monkeypatch.setattr(psutil.Process, "cmdline", lambda _, words=words: words.split())
        assert processes.launched_by_accelerate() == count, words
        said = processes.asked_for_and_off(Accelerator(cpu=True))
        assert said == (
            [
                f"{count} processes were asked for, and 1 runs: accelerate launch --cpu starts one, torchrun "
                f"--nproc_per_node {count} starts as many"
            ]
            if count
            else []
        )


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, "unigrams 6.000 nats: 1.000 nats better"),
        ({"held_out_loss": 6.5, "steps": 500}, "unigrams 6.000 nats: 0.500 nats WORSE"),
        ({"held_out_loss": 6.5}, "unigrams 6.000 nats: 30 steps only show that it runs"),
        ({"held_out_loss": 592.0}, "DIVERGED, guessing blindly gives 6.908: lower the rate of 0.02"),
        ({"held_out_loss": math.nan}, "DIVERGED, guessing blindly gives 6.908: lower the rate of 0.02"),
        ({"timed_steps": 0}, "the last 0 of 30 steps in 0.5 minutes\n"),
    ],
)
def test_closing_words(changed: dict[str, Any], words: str) -> None:
    """What came out, also where the run was short or went wrong; the pictures that there are."""
    record = {"held_out_loss": 5.0, "unigram_loss": 6.0, "steps": 30, "timed_steps": 30, "seconds": 30.0}
    record |= {"noise_scale": None, "global_batch_size": 32, "learning_rate": 0.02, "tokens_per_second": 1}
    record |= {"held_out_accuracy": 0.1, "unigram_accuracy": 0.1}
    closing = pretrain_bert.summary(record | changed, "out", ["training.png"], 1000)
    assert words in closing
    assert closing.endswith("out: results.jsonl, training.png")


def test_the_heat_map_is_named_where_there_is_one_and_ends_at_the_last_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    ends = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: ends.append(figure.axes[0].get_xlim()))
    monkeypatch.setattr(Path, "replace", lambda *_: None)
    assert not plot_trust_ratios({"steps": [10], "ratios": {"a": [0.1]}}, tmp_path / "a.png", "")
    assert plot_trust_ratios({"steps": [10, 20, 30], "ratios": {"a": [0.1] * 3}}, tmp_path / "a.png", "")
    plot_training([{"step": step, "loss": 1.0} for step in (10, 30)], tmp_path / "a.png", "")
    assert ends == [(10, 30), (0, 30)]


def test_the_model_card_names_what_was_trained_on(finished: Path) -> None:
    card = (finished / "README.md").read_text()
    assert "unknown dataset" not in card
    assert pretrain_bert.card_of(["embedded"])["language"] == "en"
    assert pretrain_bert.card_of([str(finished), "some/set"])["dataset"] == [finished.name, "some/set"]


BAD = [
    (["--global_batch_size", "10", "--per_device_train_batch_size", "4"], "10 is no multiple of 4 = 4"),
    (["--batch_size_schedule", "0:8 4:16"], "'0:8 4:16': leave out --global_batch_size 16, which it replaces"),
    (["--corpus", "./my_texts/"], r"there is no file '\./my_texts/': check the path"),
    (["--corpus", "my_texts/"], "there is no file or folder 'my_texts/': check the path, or use 'embedded'"),
    (["--corpus", "data/en/texts"], "there is no file or folder 'data/en/texts': check the path"),
    (["--corpus", "~/texts"], "there is no file or folder '~/texts': check the path"),
    (["--streaming", "--corpus", "my texts"], "there is no file or folder 'my texts': check the path"),
    (["--streaming", "--corpus", "a/b", "--validation_file", "c.txt"], "--validation_file does not go with --stream"),
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


def test_a_validation_file_that_is_part_of_the_corpus_is_refused(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model would be judged by what it was trained on."""
    validation = str(min(texts.glob("*.txt")))
    arguments = ["--corpus", str(texts), "--validation_file", validation, "--output_dir", str(tmp_path / "out")]
    with pytest.raises(
        SystemExit, match=r"--validation_file .*: 1 of its 1 documents are in --corpus .* leave them out"
    ):
        pretrain(monkeypatch, *SMALL, *arguments)


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
