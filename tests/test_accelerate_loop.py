"""Protects the plain Accelerate loop: it trains as the Trainer recipe does, also on two processes, and resumes."""

import json
import math
import os
import shutil
import subprocess
import sys
from contextlib import ExitStack, nullcontext
from logging import getLogger
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import PartialState
from accelerate.utils.other import clean_state_dict_for_safetensors
from safetensors.torch import load_file

from hf_lamb.scaling import decay_factor
from recipes import accelerate_loop
from recipes.lib import processes
from tests.helpers import on_processes, one_line, pretrain, says, torchrun

ROOT = Path(__file__).parent.parent
OPTIONS = ["--size", "smoke", "--use_cpu", "True", "--max_steps", "8", "--global_batch_size", "16"]
OPTIONS += ["--per_device_train_batch_size", "4", "--vocab_size", "400", "--max_seq_length", "32", "--save_steps", "4"]
OPTIONS += ["--warmup_steps", "2", "--learning_rate", "0.02", "--logging_steps", "1"]


def loop(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["accelerate_loop", *OPTIONS, *arguments])
    accelerate_loop.main()


def tracked(output: Path) -> dict[str, list[float]]:
    """What TensorBoard has of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (file,) = (output / "accelerate_loop").glob("events*")
    events = EventAccumulator(str(file))
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.fixture(scope="module")
def recipe(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run by Trainer."""
    output = tmp_path_factory.mktemp("recipe")
    with pytest.MonkeyPatch.context() as monkeypatch:
        more = ["--corpus", str(texts), "--output_dir", str(output), "--eval_strategy", "no"]
        pretrain(monkeypatch, *OPTIONS, *more, "--disable_tqdm", "True")
    return output


@pytest.fixture(scope="module")
def whole(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("tensorboard")
    output = tmp_path_factory.mktemp("loop")
    with pytest.MonkeyPatch.context() as monkeypatch:
        loop(monkeypatch, "--corpus", str(texts), "--output_dir", str(output))
    return output


def assert_as_trainer(output: Path, recipe: Path) -> None:
    """Loss, rate and gradient norm of every step, the evaluation, and the weights."""
    state = json.loads((recipe / "checkpoint-8/trainer_state.json").read_text())
    values = tracked(output)
    for key in ("loss", "learning_rate", "grad_norm"):
        theirs = [line[key] for line in state["log_history"] if "loss" in line]
        assert len(values[key]) == 8
        assert values[key] == pytest.approx(theirs, rel=1e-5, abs=1e-7), key
    ours, theirs = (json.loads((folder / "results.jsonl").read_text()) for folder in (output, recipe))
    assert ours["held_out_loss"] == pytest.approx(theirs["held_out_loss"], rel=1e-5)
    assert ours["held_out_accuracy"] == pytest.approx(theirs["held_out_accuracy"], abs=2e-3)
    expected = load_file(recipe / "model.safetensors")
    for name, weight in load_file(output / "model.safetensors").items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_the_same_run_as_trainers(whole: Path, recipe: Path) -> None:
    assert_as_trainer(whole, recipe)


def test_the_same_run_as_trainers_with_a_batch_that_grows(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, and resumed inside of a stage."""
    pytest.importorskip("tensorboard")
    at = OPTIONS.index("--global_batch_size")
    growing = [*OPTIONS[:at], "--batch_size_schedule", "0:8 3:16 6:32", *OPTIONS[at + 2 :], "--corpus", str(texts)]
    more = ["--eval_strategy", "no", "--disable_tqdm", "True"]
    pretrain(monkeypatch, *growing, "--output_dir", str(tmp_path / "recipe"), *more)
    monkeypatch.setattr(sys, "argv", ["accelerate_loop", *growing, "--output_dir", str(tmp_path / "loop")])
    accelerate_loop.main()
    assert_as_trainer(tmp_path / "loop", tmp_path / "recipe")
    whole = (tmp_path / "loop/model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "loop/checkpoint-8")
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--resume", "True"])
    accelerate_loop.main()
    assert (tmp_path / "loop/model.safetensors").read_bytes() == whole
    record = json.loads((tmp_path / "recipe/results.jsonl").read_text())
    assert (record["global_batch_size"], record["batch_size_schedule"]) == (32, "0:8 3:16 6:32")
    seconds, tokens = record["seconds"], (3 * 8 + 3 * 16 + 2 * 32) * 32
    assert record["tokens_per_second"] == pytest.approx(tokens / seconds, rel=0.2 / max(seconds, 0.1))


@pytest.mark.distributed
def test_the_same_run_as_trainers_on_two_processes(texts: Path, recipe: Path, tmp_path: Path) -> None:
    """Half the accumulation on each; the held-out rows do not divide by two."""
    torchrun(2, "recipes.accelerate_loop", *OPTIONS, "--corpus", str(texts), "--output_dir", str(tmp_path))
    assert_as_trainer(tmp_path, recipe)
    assert json.loads((tmp_path / "results.jsonl").read_text())["processes"] == 2


@pytest.mark.distributed
@pytest.mark.parametrize(("fsdp", "file"), [("fsdp1", "pytorch_model_fsdp.bin"), ("fsdp2", "pytorch_model_fsdp_0")])
def test_the_same_run_as_trainers_under_fsdp(fsdp: str, file: str, texts: Path, recipe: Path, tmp_path: Path) -> None:
    """`accelerate launch` with the README's configuration, but on two CPUs; resumed, it ends bit for bit alike."""
    config = ["--config_file", f"recipes/configs/accelerate/{fsdp}.yaml", "--num_processes", "2"]
    config += ["--mixed_precision", "no", "--main_process_port", "0", "-m", "tests.scripts.cpu_fsdp"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *config, "recipes.accelerate_loop", *OPTIONS]
    command += ["--corpus", str(texts), "--output_dir", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    for more in ([], ["--resume", "True"]):
        done = subprocess.run(
            [*command, *more], env=environment, capture_output=True, text=True, timeout=240, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr[-3000:]
        if not more:
            assert_as_trainer(tmp_path, recipe)
            assert (tmp_path / "checkpoint-8" / file).exists()
            whole = (tmp_path / "model.safetensors").read_bytes()
            shutil.rmtree(tmp_path / "checkpoint-8")
    assert (tmp_path / "model.safetensors").read_bytes() == whole


@pytest.mark.parametrize("step", [4, 8])
def test_a_resumed_run_ends_bit_for_bit_alike(
    step: int, whole: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the middle, with what a killed save left, and from the end, where the results are not written yet."""
    shutil.copytree(whole / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished/model.safetensors").write_text("half")
    loop(monkeypatch, "--corpus", str(texts), "--output_dir", str(tmp_path), "--resume", "True")
    for name in ("model.safetensors", "checkpoint-8/model.safetensors", "checkpoint-8/optimizer.bin"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes(), name
    ours, theirs = (json.loads((folder / "results.jsonl").read_text()) for folder in (tmp_path, whole))
    assert ours["held_out_loss"] == theirs["held_out_loss"]
    if step < 8:
        assert tracked(tmp_path)["loss"] == tracked(whole)["loss"][step:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--global_batch_size", "18"],
            "18 is no multiple of 4 = 4 (--per_device_train_batch_size) x 1 processes: give",
        ),
        (["--corpus", "missing.txt"], "there is no file 'missing.txt'"),
        (["--max_seq_length", "2"], "block_size=2 has no room"),
        (["--warmup_steps", "9"], "warmup_steps 9 is more than the run's 8 steps"),
        (["--report_to", "abacus"], "--report_to abacus"),
        ([], "holds checkpoint-8: add --resume, or --output_dir for another place"),
    ],
)
def test_bad_input_gets_one_line(
    arguments: list[str], message: str, whole: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output: Any = tmp_path / "out" if arguments else whole
    with pytest.raises(SystemExit) as stopped:
        loop(monkeypatch, "--corpus", str(texts), "--output_dir", str(output), *arguments)
    (line,) = str(stopped.value.code).splitlines()
    assert line.startswith("accelerate_loop: ")
    assert message in line
    assert not (tmp_path / "out").exists()


def test_processes_that_are_not_connected_are_noticed(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under a configuration for GPUs where there are none: each would train into the same folder."""
    monkeypatch.setattr(accelerate_loop, "check_connected", lambda size: check_launched(2, size))
    with pytest.raises(SystemExit, match="accelerate_loop: 2 processes were launched, but each sees 1: add --use_cpu"):
        loop(monkeypatch, "--corpus", str(texts), "--output_dir", str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def check_launched(launched: int, world_size: int) -> None:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("WORLD_SIZE", str(launched))
        processes.check_connected(world_size)


def test_a_run_on_another_corpus_keeps_the_tokenizer_and_says_so(
    whole: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other, output = tmp_path / "other", tmp_path / "out"
    other.mkdir()
    for path in texts.glob("*.txt"):
        (other / path.name).write_text(path.read_text()[::-1])
    shutil.copytree(whole / "checkpoint-4", output / "checkpoint-4")
    loop(monkeypatch, "--corpus", str(other), "--output_dir", str(output), "--resume", "True")
    assert json.loads((output / "tokenizer.json").read_text()) == json.loads((whole / "tokenizer.json").read_text())
    said = capsys.readouterr().out
    assert "warning: other training data than the checkpoint's" in said
    assert f"resuming from {output / 'checkpoint-4'}, step 4 of 8" in said
    assert not (output / processes.LOCK).exists()


def test_a_resumed_run_has_the_rate_of_its_own_steps_and_the_options_of_its_optimizer(
    whole: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """More steps: the last rate of the first part was zero. Another rate: the optimizer's state has the old one."""
    shutil.copytree(whole / "checkpoint-8", tmp_path / "checkpoint-8")
    more = ["--corpus", str(texts), "--output_dir", str(tmp_path), "--resume", "True", "--max_steps", "12"]
    loop(monkeypatch, *more, "--learning_rate", "0.5", "--weight_decay", "0.7")
    said = capsys.readouterr().out
    assert "warning: --learning_rate 0.5: the checkpoint's optimizer goes on with 0.02" in said
    assert "warning: --weight_decay 0.7: the checkpoint's optimizer goes on with 0.01" in said
    record = json.loads((tmp_path / "results.jsonl").read_text())
    assert (record["learning_rate"], record["weight_decay"]) == (0.02, 0.01)
    expected = [0.02 * decay_factor(step, total_steps=12, warmup_steps=2) for step in range(8, 12)]
    assert tracked(tmp_path)["learning_rate"] == pytest.approx(expected)
    assert min(expected) > 0


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--size", "tiny", "--size tiny: the checkpoint's run had smoke: give that, or --output_dir for another run"),
        ("--max_seq_length", "16", "--max_seq_length 16: the checkpoint's run had 32: give that, or --output_dir"),
    ],
)
def test_another_model_does_not_resume(
    option: str, value: str, message: str, whole: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with one_line(SystemExit, message):
        loop(monkeypatch, "--corpus", str(texts), "--output_dir", str(whole), "--resume", "True", option, value)


def test_another_batch_is_remarked_on() -> None:
    args = accelerate_loop.LoopArguments(global_batch_size=8)
    (line,) = accelerate_loop.take_options_of({"global_batch_size": 16}, args)
    assert "--global_batch_size 8: the checkpoint's run had 16, so this one goes on at another place" in line
    assert accelerate_loop.take_options_of({"global_batch_size": 16, "batch_size_schedule": "0:16"}, args) == []


def test_no_checkpoint_warns_of_the_tied_head(caplog: pytest.LogCaptureFixture) -> None:
    """BERT finds its weight in the embedding; accelerate cannot know that, and says so at every checkpoint."""
    PartialState(cpu=True)  # accelerate's loggers want it
    weight = torch.ones(2)
    assert list(clean_state_dict_for_safetensors({"embedding": weight, "head": weight})) == ["embedding"]
    assert caplog.messages == []
    getLogger("accelerate.utils.other").warning("anything else")
    assert caplog.messages == ["anything else"]


def test_a_tenth_of_the_steps_is_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["accelerate_loop", "--max_steps", "40", "--use_cpu", "--size", "smoke"])
    monkeypatch.setattr(accelerate_loop, "load_data", lambda *_: SimpleNamespace(facts={}))
    monkeypatch.setattr(accelerate_loop, "only_run_in", lambda *_: nullcontext())
    with ExitStack() as until_the_end:
        _, args, _, stages, _ = accelerate_loop.prepare(until_the_end)
    assert (args.warmup_steps, args.per_device_train_batch_size, stages.at(0).accumulation) == (4, 32, 2)


def test_what_torch_has_on_gpus_only_is_refused() -> None:
    """Before DDP raises a TypeError: a machine without GPUs, two processes."""
    accelerator = SimpleNamespace(
        num_processes=2, distributed_type="MULTI_CPU", native_amp=False, device=torch.device("cpu")
    )
    with pytest.raises(ValueError, match="--comm_hook bf16: give fp16 or leave it out"):
        accelerate_loop.check_hook("bf16", accelerator)
    accelerate_loop.check_hook("fp16", accelerator)


@pytest.mark.distributed
def test_the_bf16_hook_sends_half_the_bytes(texts: Path, tmp_path: Path) -> None:
    """Two bytes for each parameter and step, and little else, which its sockets count; float32 has four."""
    output = tmp_path / "found.json"
    own = ["--comm_hook", "bf16", "--corpus", str(texts), "--output_dir", str(tmp_path / "run"), "--report_to", "none"]
    on_processes(2, "tests.scripts.compressed", str(output), *OPTIONS, "--save_steps", "8", *own)
    found = json.loads(output.read_text())
    assert 2.0 <= found["bytes_per_step"] / found["parameters"] < 2.5
    assert found["held_out_loss"] < math.log(400)


def test_a_hook_without_processes_that_average_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as refused:
        loop(monkeypatch, "--comm_hook", "bf16", "--output_dir", str(tmp_path / "run"), "--report_to", "none")
    says(str(refused.value.code), "accelerate_loop: --comm_hook bf16: leave it out.*several processes.*1 process")
