"""Protects checkpoints: whole or not there whenever a run is killed, looked at before a run resumes, resumed exactly.

`make kill-test` kills the real thing; here a kill is an exception that nothing catches.
"""

import errno
import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import BertForMaskedLM, Trainer, TrainerState
from transformers.trainer_utils import get_last_checkpoint

from hf_lamb import Lamb, LambTrainer
from hf_lamb.trainer import checkpoints
from hf_lamb.trainer.checkpoints import (
    KEPT_FILE,
    REPLACED,
    UNFINISHED,
    CheckpointError,
    check_checkpoint,
    newest_complete_checkpoint,
)
from hf_lamb.trainer.deepspeed import check_deepspeed_checkpoint
from recipes.lib import bert
from tests.helpers import SMALL, on_processes, pretrain
from tests.scripts.checkpointed_run import STEPS, trainer

SAVED = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")


class Killed(BaseException):
    """No `except Exception` sees it, as none sees a SIGKILL."""


@pytest.fixture(scope="module", autouse=True)
def _hasty() -> Iterator[None]:
    """A power cut is not tested, so nothing need wait for the disk."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run with a checkpoint at every step."""
    output = tmp_path_factory.mktemp("whole")
    trainer(output, save_steps=1).train()
    return output


def assert_same_end(output: Path, whole: Path) -> None:
    """The last checkpoint to the bit, the losses, and nothing left over."""
    for name in SAVED:
        ends = [(folder / f"checkpoint-{STEPS}" / name).read_bytes() for folder in (output, whole)]
        assert ends[0] == ends[1], name
    logs = [
        json.loads((folder / f"checkpoint-{STEPS}/trainer_state.json").read_text())["log_history"]
        for folder in (output, whole)
    ]
    assert [line["loss"] for line in logs[0]] == [line["loss"] for line in logs[1]]
    assert names(output) == {f"checkpoint-{STEPS}"} | {
        name for name in names(output) if name.startswith("checkpoint-")
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def names(output: Path) -> set[str]:
    return {path.name for path in output.iterdir()}


# -- exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 4, 5, STEPS])
def test_a_resumed_run_ends_bit_for_bit_alike(step: int, whole: Path, tmp_path: Path) -> None:
    """In an epoch, at its end (step 5), at the end of the run; dropout and accumulation included."""
    shutil.copytree(whole / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    trainer(tmp_path).train(resume_from_checkpoint=True)
    assert_same_end(tmp_path, whole)


def test_a_run_resumed_with_another_batch_says_that_it_goes_on_elsewhere_in_the_data(
    whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Trainer warns of another micro-batch only. Another accumulation changes the global batch in the same way."""
    shutil.copytree(whole / "checkpoint-4", tmp_path / "checkpoint-4")
    for accumulation, said in ((None, False), (1, True)):
        options = {} if accumulation is None else {"gradient_accumulation_steps": accumulation}
        caplog.clear()
        trainer(tmp_path, save_strategy="no", max_steps=5, **options).train(resume_from_checkpoint=True)
        lines = [record.getMessage() for record in caplog.records if "global batch of" in record.getMessage()]
        assert len(lines) == said
    assert "give batch_size_schedule='0:" in lines[0]


@pytest.mark.parametrize(("cls", "steps"), [(LambTrainer, STEPS), (Trainer, STEPS + 1)])
def test_a_run_resumed_at_its_end_takes_no_step_more(
    cls: type[Trainer], steps: int, whole: Path, tmp_path: Path
) -> None:
    """As after a kill between the last checkpoint and what the script does with it. The stock Trainer of transformers
    5.23 looks at max_steps after a step only; when its row fails, see whether `_run_epoch` can go."""
    shutil.copytree(whole / f"checkpoint-{STEPS}", tmp_path / f"checkpoint-{STEPS}")
    run = trainer(tmp_path, cls)
    run.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS}"))
    assert run.state.global_step == steps


def test_the_recipe_resumes_exactly_with_dropout(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Base and large have it; the run resumes from a folder that is named otherwise."""
    monkeypatch.setitem(bert.SIZES, "base", bert.SIZES["smoke"])
    options = [*SMALL, "--size", "base", "--max_seq_length", "32", "--warmup_steps", "2", "--learning_rate", "2e-2"]
    options += ["--corpus", str(texts), "--save_steps", "3", "--max_steps", "6", "--eval_strategy", "no"]
    pretrain(monkeypatch, *options, "--output_dir", str(tmp_path / "a"))
    (tmp_path / "a/checkpoint-3").rename(tmp_path / "elsewhere")
    resume = ["--resume_from_checkpoint", str(tmp_path / "elsewhere")]
    pretrain(monkeypatch, *options, "--output_dir", str(tmp_path / "b"), *resume)
    for name in ("model.safetensors", *(f"checkpoint-6/{name}" for name in SAVED)):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


@pytest.mark.xfail(
    Version(transformers.__version__) < Version("5.23"),
    reason="transformers 5.17 cannot resume on several CPU processes: it asks torch.load for the device cpu:0",
    strict=False,
)
def test_two_processes_leave_their_parts_and_resume(tmp_path: Path) -> None:
    """Both processes' random numbers are in every checkpoint; one that lacks some is passed over."""
    on_processes(2, "tests.scripts.checkpointed_run", str(tmp_path))
    numbers = ("rng_state_0.pth", "rng_state_1.pth")
    for folder in (tmp_path / "whole").glob("checkpoint-*"):
        assert {file.name for file in folder.glob("rng_state*")} == set(numbers)
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", *numbers):
        ends = [(tmp_path / run / f"checkpoint-{STEPS}" / name).read_bytes() for run in ("whole", "resumed")]
        assert ends[0] == ends[1], name
    assert names(tmp_path / "resumed") == {"checkpoint-2", "checkpoint-4", "checkpoint-6"}


# -- killed while saving ----------------------------------------------------------------------------------------------


def kill_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, call: int, after: bool = False) -> None:
    """The process ends in the n-th call of a function: before it does anything, or when it has done it."""
    original, calls = getattr(owner, name), iter(range(1, 1000))

    def killed(*args: Any, **kwargs: Any) -> Any:
        last = next(calls) == call
        if last and not after:
            raise Killed
        result = original(*args, **kwargs)
        if last:
            raise Killed
        return result

    monkeypatch.setattr(owner, name, killed)


# What is killed in saving checkpoint-4, in the order of events, and the checkpoint that is then the newest.
PHASES: dict[str, tuple[Any, str, int, bool, int]] = {
    "before anything is written": (Trainer, "save_model", 2, False, 2),
    "after the weights": (Trainer, "save_model", 2, True, 2),
    "after the optimizer": (Trainer, "_save_optimizer_and_scheduler", 2, True, 2),
    "after the random numbers": (Trainer, "_save_rng_state", 2, True, 2),
    "after the state": (TrainerState, "save_to_json", 2, True, 2),
    "before the rename": (checkpoints, "publish", 2, False, 2),
    "after the rename": (checkpoints, "publish", 2, True, 4),
    "before the old one is deleted": (checkpoints, "rotate", 2, False, 4),
    "after the old one is deleted": (checkpoints, "rotate", 2, True, 4),
}


@pytest.mark.parametrize("phase", PHASES)
def test_a_run_killed_while_saving_resumes_from_the_newest_complete_checkpoint(
    phase: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers, which looks for the highest number, finds the same one."""
    owner, name, call, after, newest = PHASES[phase]
    with monkeypatch.context() as patch:
        kill_at(patch, owner, name, call, after)
        with pytest.raises(Killed):
            trainer(tmp_path, save_total_limit=1).train()
    found = newest_complete_checkpoint(tmp_path)
    assert found == get_last_checkpoint(str(tmp_path)) == str(tmp_path / f"checkpoint-{newest}")
    trainer(tmp_path, save_total_limit=1).train(resume_from_checkpoint=True)
    assert_same_end(tmp_path, whole)


@pytest.mark.parametrize("call", [1, 2, 3])
@pytest.mark.parametrize("name", ["rename", "mkdir"])
def test_a_checkpoint_is_replaced_without_being_missed(
    name: str, call: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at any point, the old one or the new one is there, whole, though it is the only one."""
    shutil.copytree(whole / "checkpoint-3", tmp_path / "checkpoint-4")
    shutil.copytree(whole / "checkpoint-4", tmp_path / UNFINISHED / "checkpoint-4")
    with monkeypatch.context() as patch:
        kill_at(patch, Path, name, call)
        try:
            checkpoints.publish(tmp_path / UNFINISHED / "checkpoint-4", tmp_path / "checkpoint-4")
            new = True
        except Killed:
            new = False
    assert newest_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    state = json.loads((tmp_path / "checkpoint-4/trainer_state.json").read_text())
    assert state["global_step"] == (4 if new else 3)
    checkpoints.tidy(tmp_path)
    assert names(tmp_path) == {"checkpoint-4"}


def test_a_run_that_went_back_replaces_the_later_checkpoints(whole: Path, tmp_path: Path) -> None:
    """And what a killed run left is deleted at the start."""
    for step in (1, 2, 6):
        shutil.copytree(whole / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    shutil.copytree(whole / "checkpoint-5", tmp_path / UNFINISHED / "checkpoint-5")
    (tmp_path / "checkpoint-2/optimizer.pt").write_bytes(b"of another run")
    trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_same_end(tmp_path, whole)
    assert names(tmp_path) == {f"checkpoint-{step}" for step in range(1, STEPS + 1)}  # save_steps is resumed too
    assert newest_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
    check_checkpoint(tmp_path / "checkpoint-2")


def test_a_full_disk(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says what was not saved and how much room there is; nothing half-named stays, and a run goes on."""
    save = torch.save

    def full(state: Any, file: str, **kwargs: Any) -> None:
        if "checkpoint-4" in file and file.endswith("optimizer.pt"):
            save(state, file)
            Path(file).write_bytes(Path(file).read_bytes()[:100])
            raise OSError(errno.ENOSPC, "No space left on device")
        save(state, file, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        message = r"^checkpoint-4 was not saved in .* \([\d,]+\.\d MB free\): .*No space left on device"
        with pytest.raises(CheckpointError, match=f"{message}; earlier checkpoints are complete$"):
            trainer(tmp_path).train()
    assert names(tmp_path) == {"checkpoint-2"}
    trainer(tmp_path).train(resume_from_checkpoint=True)
    assert_same_end(tmp_path, whole)


def test_no_room_for_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was there stays, and the error says so, whatever kind of error the library below raises."""
    run = trainer(tmp_path / "run")
    run.save_model(str(tmp_path / "model"))
    before = contents(tmp_path / "model")

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(BertForMaskedLM, "save_pretrained", full)
    with pytest.raises(CheckpointError, match=r"^the model was not saved in .* MB free\): .*No space left"):
        run.save_model(str(tmp_path / "model"))
    assert contents(tmp_path / "model") == before


def test_a_saved_model_is_never_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed while saving over an earlier model, the earlier one is whole."""
    run = trainer(tmp_path / "run")
    run.save_model(str(tmp_path / "model"))
    before = (tmp_path / "model/model.safetensors").read_bytes()
    with torch.no_grad():
        run.model.cls.predictions.bias.fill_(1.0)
    with monkeypatch.context() as patch:
        kill_at(patch, BertForMaskedLM, "save_pretrained", 1, after=True)
        with pytest.raises(Killed):
            run.save_model(str(tmp_path / "model"))
    assert (tmp_path / "model/model.safetensors").read_bytes() == before
    run.save_model(str(tmp_path / "model"))
    assert load_file(tmp_path / "model/model.safetensors")["cls.predictions.bias"].eq(1.0).all()
    assert names(tmp_path / "model") == {"config.json", "model.safetensors", "training_args.bin"}


# -- as a stock Trainer's ---------------------------------------------------------------------------------------------


def test_the_same_checkpoints_as_a_stock_trainer(tmp_path: Path) -> None:
    """Their names under save_total_limit, the files in them but one, and which one is the best (here, the first)."""
    found = []
    for cls in (Trainer, LambTrainer):
        output = tmp_path / cls.__name__
        best = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss", "greater_is_better": True}
        run = trainer(output, cls, save_steps=1, save_total_limit=2, load_best_model_at_end=True, **best)
        run.train()
        state = json.loads((output / f"checkpoint-{STEPS}/trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == run.state.best_model_checkpoint == str(output / "checkpoint-1")
        found.append(sorted(str(path.relative_to(output)) for path in output.rglob("*")))
    assert [file for file in found[1] if not file.endswith(f"/{KEPT_FILE}")] == found[0]


def test_what_is_uploaded_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The upload goes on in the background, so it must not start from the folder that is renamed."""
    pushed: list[str] = []

    def push(self: Trainer, folder: str) -> None:
        assert newest_complete_checkpoint(tmp_path) == folder
        pushed.append(Path(folder).name)

    monkeypatch.setattr(Trainer, "_push_from_checkpoint", push)
    run = trainer(tmp_path)
    run.args.push_to_hub = True
    run.train()
    assert pushed == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


# -- damaged checkpoints ----------------------------------------------------------------------------------------------


def truncate(name: str, size: float) -> Callable[[Path], None]:
    def damage(checkpoint: Path) -> None:
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(content[: int(len(content) * size)])

    return damage


def remove(name: str) -> Callable[[Path], None]:
    return lambda checkpoint: (checkpoint / name).unlink()


def rename(name: str, new: str) -> Callable[[Path], None]:
    return lambda checkpoint: os.rename(checkpoint / name, checkpoint / new)


def empty(checkpoint: Path) -> None:
    for file in checkpoint.iterdir():
        file.unlink()


def shard(checkpoint: Path) -> None:
    """Weights in two files, the second of which is missing."""
    (checkpoint / "model.safetensors").rename(checkpoint / "model-00001-of-00002.safetensors")
    files = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


MODEL = "global_step4/mp_rank_00_model_states.pt"
SHARD = "global_step4/bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt"


def deepspeeds(checkpoint: Path, processes: int = 1, lost: str = "", emptied: str = "") -> None:
    """What DeepSpeed writes with ZeRO-1 or 2, in place of the optimizer."""
    (checkpoint / "optimizer.pt").unlink()
    (checkpoint / "global_step4").mkdir()
    (checkpoint / "latest").write_text("global_step4")
    (checkpoint / "zero_to_fp32.py").touch()
    for name in (MODEL, *(SHARD.format(rank) for rank in range(processes))):
        (checkpoint / name).write_bytes(b"what torch.save wrote")
    for rank in range(processes if processes > 1 else 0):
        shutil.copy(checkpoint / "rng_state.pth", checkpoint / f"rng_state_{rank}.pth")
    if emptied:
        truncate(emptied, 0)(checkpoint)
    if lost:
        rename(lost, "lost")(checkpoint)


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty folder": (empty, "has no trainer_state.json"),
    "no state": (remove("trainer_state.json"), "has no trainer_state.json"),
    "half a state": (truncate("trainer_state.json", 0.5), r"has a damaged trainer_state.json \(.+\)"),
    "no weights": (remove("model.safetensors"), "has no model.safetensors"),
    "half the weights": (truncate("model.safetensors", 0.5), r"has a damaged model.safetensors \(.+\)"),
    "empty weights": (truncate("model.safetensors", 0), r"has a damaged model.safetensors \(.+\)"),
    "a missing shard": (shard, r"has a damaged model.safetensors.index.json \(model-00002-of-.* is missing\)"),
    "no optimizer": (remove("optimizer.pt"), "has no optimizer.pt"),
    "half an optimizer": (truncate("optimizer.pt", 0.5), r"has a damaged optimizer.pt \(.+\)"),
    "no schedule": (remove("scheduler.pt"), "has no scheduler.pt"),
    "empty schedule": (truncate("scheduler.pt", 0), r"has a damaged scheduler.pt \(.+\)"),
    "no random numbers": (remove("rng_state.pth"), "has no rng_state.pth"),
    "one process' random numbers": (rename("rng_state.pth", "rng_state_0.pth"), "has no rng_state_1.pth"),
    "no folder of DeepSpeed's": (partial(deepspeeds, lost="global_step4"), "has no global_step4/"),
    "no name of that folder": (partial(deepspeeds, lost="latest"), "has no latest, the file that names the folder.*"),
    "empty name of that folder": (partial(deepspeeds, emptied="latest"), r"has a damaged latest \(it is empty\)"),
    "no model of DeepSpeed's": (partial(deepspeeds, lost=MODEL), r"has no global_step4/\*_model_states.pt"),
    "no shard of ZeRO's": (partial(deepspeeds, lost=SHARD.format(0)), r"has no global_step4/\*_optim_states.pt"),
    "empty shard of ZeRO's": (
        partial(deepspeeds, emptied=SHARD.format(0)),
        rf"has a damaged {SHARD.format(0)} \(it is empty\)",
    ),
    **{
        f"no shard {rank} of ZeRO's": (partial(deepspeeds, processes=3, lost=name), f"has no {name}")
        for rank, name in enumerate(map(SHARD.format, range(3)))
    },
    "transformers' own mark": (rename("config.json", "checkpoint-is-incomplete.txt"), "was still being written"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_or_refused(
    damage: str, whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """`latest` takes the one before it and says why; asked for by name, it is refused before anything happens."""
    inflict, fault = DAMAGE[damage]
    for step in (3, 5):
        shutil.copytree(whole / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    inflict(tmp_path / "checkpoint-5")
    with caplog.at_level(logging.WARNING, "hf_lamb"):
        assert newest_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-3")
    (line,) = caplog.messages
    assert re.fullmatch(rf"skipping .*/checkpoint-5: it {fault}", line)
    with pytest.raises(CheckpointError) as caught:
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    remedy = "resume from an earlier one, or start without one"
    assert re.fullmatch(rf".*/checkpoint-5 is no checkpoint: it {fault}; {remedy}", str(caught.value))


def test_no_complete_checkpoint_at_all(tmp_path: Path) -> None:
    assert newest_complete_checkpoint(tmp_path / "nowhere") is None
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / REPLACED).mkdir()
    with pytest.raises(CheckpointError, match=r"there is no complete checkpoint in .*: start without one"):
        trainer(tmp_path).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_the_model_alone_is_not_resumed(tmp_path: Path) -> None:
    """A stock Trainer would, with an optimizer and random numbers that start anew."""
    trainer(tmp_path, save_only_model=True, max_steps=2).train()
    with pytest.raises(CheckpointError, match=r"checkpoint-2 is no checkpoint: it has no optimizer\.pt"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


REFUSED = [
    (["--vocab_size", "300"], r"has \d+ tokens, so leave --vocab_size out"),
    (["--size", "tiny"], r"is of another model: its hidden_size is 32, this run's 128: resume with the options"),
    (["--optim", "adamw_torch"], "does not fit this run: resume with LAMB"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_the_recipe_refuses_a_checkpoint_of_another_run_in_one_line(
    options: list[str], message: str, finished: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["--corpus", str(texts), "--output_dir", str(tmp_path), *options]
    with pytest.raises(SystemExit) as exit_:
        pretrain(monkeypatch, *SMALL, *arguments, "--resume_from_checkpoint", str(finished / "checkpoint-4"))
    (line,) = str(exit_.value).splitlines()
    assert re.search(rf"checkpoint-4 {message}", line), line


def test_the_recipe_refuses_a_damaged_checkpoint_in_one_line(
    finished: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished / "checkpoint-4", tmp_path / "checkpoint-4")
    truncate("optimizer.pt", 0.5)(tmp_path / "checkpoint-4")
    arguments = ["--corpus", str(texts), "--output_dir", str(tmp_path), "--resume_from_checkpoint"]
    with pytest.raises(SystemExit, match=r"checkpoint-4 is no checkpoint: it has a damaged optimizer\.pt"):
        pretrain(monkeypatch, *SMALL, *arguments, str(tmp_path / "checkpoint-4"))
    with pytest.raises(SystemExit, match="there is no checkpoint in"):
        pretrain(monkeypatch, *SMALL, *arguments, "latest")


def test_the_recipe_refuses_the_state_of_another_optimizer_in_one_line(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = [
        *SMALL,
        "--corpus",
        str(texts),
        "--output_dir",
        str(tmp_path),
        "--max_steps",
        "4",
        "--save_steps",
        "2",
    ]
    pretrain(monkeypatch, *arguments, "--optim", "sgd", "--optim_args", "momentum=0.9")
    shutil.rmtree(tmp_path / "checkpoint-4")
    with pytest.raises(SystemExit) as exit_:
        pretrain(monkeypatch, *arguments, "--resume_from_checkpoint", "latest")
    (line,) = str(exit_.value).splitlines()
    assert re.search("checkpoint-2 does not fit this run: ", line), line


# -- before anything is loaded, and on every file system --------------------------------------------------------------


def other_shape(checkpoint: Path) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    last = list(weights)[-1]  # so that load_state_dict would have copied the others
    save_file(weights | {last: torch.zeros(3, 5, 7)}, checkpoint / "model.safetensors", {"format": "pt"})


def adams_state(checkpoint: Path) -> None:
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    state["param_groups"] = [{"lr": 1e-3, "amsgrad": False, "params": g["params"]} for g in state["param_groups"]]
    torch.save(state, checkpoint / "optimizer.pt")


def resumed(run: LambTrainer, checkpoint: str) -> None:
    run.train(resume_from_checkpoint=checkpoint)


def next_phase(run: LambTrainer, checkpoint: str) -> None:
    run.start_from(checkpoint)
    run.train()


REFUSED_AT_ONCE = [
    (deepspeeds, {}, "with the DeepSpeed configuration it was written with: only DeepSpeed can read its"),
    (other_shape, {}, r"is of another model: size mismatch for .*\(\[3, 5, 7\]\) in the checkpoint"),
    (adams_state, {}, "does not fit this run: resume with the optimizer that wrote it"),
    (lambda _: None, {"optim": "adamw_torch"}, "does not fit this run: resume with LAMB"),
]


@pytest.mark.parametrize(("change", "options", "message"), REFUSED_AT_ONCE)
@pytest.mark.parametrize("begin", [resumed, next_phase])
def test_a_refused_checkpoint_changes_no_weight(
    change: Callable[[Path], None], options: Any, message: str, begin: Any, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole / "checkpoint-4", tmp_path / "checkpoint-4")
    change(tmp_path / "checkpoint-4")
    run = trainer(tmp_path, **options)
    before = {name: weight.clone() for name, weight in run.model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        begin(run, str(tmp_path / "checkpoint-4"))
    assert all(torch.equal(weight, before[name]) for name, weight in run.model.state_dict().items())


@pytest.fixture
def under_deepspeed(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, Callable[..., Any]], None]:
    """Resumes a run of ZeRO-2 whose engine loads by the given function."""

    def resume(checkpoint: Path, load: Callable[..., Any], **options: Any) -> None:
        run = trainer(checkpoint.parent, **options)
        run.is_deepspeed_enabled = True
        monkeypatch.setattr("hf_lamb.trainer.trainer.stage_of", lambda _: 2)
        monkeypatch.setattr("transformers.trainer.deepspeed_init", lambda *_, **__: (None, None))
        monkeypatch.setattr("transformers.trainer.deepspeed_load_checkpoint", lambda *_, **__: load(run))
        run.train(resume_from_checkpoint=str(checkpoint))

    return resume


def cannot_find(run: LambTrainer) -> None:
    raise ValueError("Can't find a valid checkpoint at checkpoint-4")


def misfits(run: LambTrainer) -> None:
    raise RuntimeError("Error(s) in loading state_dict for Bert:\n\tsize mismatch for a.weight: 3 and 4.\n")


def loads(cls: type[torch.optim.Optimizer], **options: Any) -> Callable[[LambTrainer], None]:
    """As ZeRO does: into the optimizer inside."""

    def load(run: LambTrainer) -> None:
        other = cls([{"params": group["params"]} for group in run.optimizer.param_groups], **options)
        for group in other.param_groups:
            for param in group["params"]:
                param.grad = torch.ones_like(param)
        other.step()
        run.optimizer.load_state_dict(other.state_dict())

    return load


LOADED_BY_DEEPSPEED = [
    (cannot_find, {}, "does not fit this run: Can't find a valid checkpoint"),
    (misfits, {}, "is of another model: size mismatch for a.weight: 3 and 4; resume with the options"),
    (loads(torch.optim.SGD, lr=0.1, momentum=0.9), {}, "does not fit this run: .*convert_state_dict.*momentum_buffer"),
    (loads(torch.optim.AdamW), {}, "does not fit this run: .*convert_state_dict.*amsgrad"),
    (loads(Lamb), {"optim": "adamw_torch"}, "does not fit this run: resume with LAMB"),
]


@pytest.mark.parametrize(("load", "options", "message"), LOADED_BY_DEEPSPEED)
def test_what_deepspeed_cannot_load_is_refused_in_one_line(
    load: Any, options: Any, message: str, under_deepspeed: Any, whole: Path, tmp_path: Path
) -> None:
    """It loads in transformers' own preparation, where LambTrainer has no hook."""
    shutil.copytree(whole / "checkpoint-4", tmp_path / "checkpoint-4")
    deepspeeds(tmp_path / "checkpoint-4")
    with pytest.raises(CheckpointError) as caught:
        under_deepspeed(tmp_path / "checkpoint-4", load, **options)
    (line,) = str(caught.value).splitlines()
    assert re.search(f"checkpoint-4 {message}", line), line


def loads_weights_alone(run: LambTrainer) -> None:
    """ZeRO-2 has made an entry without moments for each parameter."""
    run.optimizer.state[run.optimizer.param_groups[0]["params"][0]] = {}


def finds_no_shard(run: LambTrainer) -> None:
    raise FileNotFoundError(2, "No such file or directory", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")


def finds_no_entry(run: LambTrainer) -> None:
    raise KeyError("dynamic_loss_scale")


OTHER_PRECISION = [
    (loads_weights_alone, ""),
    (finds_no_shard, r" \(it has no bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt\)"),
    (finds_no_entry, r" \(it has no dynamic_loss_scale\)"),
]


@pytest.mark.parametrize(("load", "ending"), OTHER_PRECISION)
def test_a_checkpoint_of_another_precision_is_refused_under_deepspeed(
    load: Any, ending: str, under_deepspeed: Any, whole: Path, tmp_path: Path
) -> None:
    """The three ways in which DeepSpeed 0.19 then fails, or does not."""
    shutil.copytree(whole / "checkpoint-4", tmp_path / "checkpoint-4")
    deepspeeds(tmp_path / "checkpoint-4")
    message = r"resume .*checkpoint-4 with the optimizer and precision \(bf16, fp16 or neither\) it was saved with: "
    with pytest.raises(CheckpointError, match=f"^{message}DeepSpeed has not loaded the optimizer's state{ending}$"):
        under_deepspeed(tmp_path / "checkpoint-4", load)


REFUSED_UNDER_ZERO = [
    (1, 3, "with DeepSpeed ZeRO-1 or 2: .* this run's ZeRO-3$"),
    (1, 0, "with DeepSpeed ZeRO-1 or 2: .* this run's ZeRO-0$"),
    (2, 2, "on 2 processes: .* this run has 1$"),
]


@pytest.mark.parametrize(("processes", "stage", "message"), REFUSED_UNDER_ZERO)
def test_a_complete_checkpoint_of_another_stage_or_number_of_processes_is_refused(
    processes: int, stage: int, message: str, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole / "checkpoint-4", tmp_path / "checkpoint-4")
    deepspeeds(tmp_path / "checkpoint-4", processes)
    check_checkpoint(tmp_path / "checkpoint-4")
    with pytest.raises(CheckpointError, match=f"^resume .*checkpoint-4 {message}"):
        check_deepspeed_checkpoint(tmp_path / "checkpoint-4", stage, 1)


@pytest.mark.parametrize("number", ["EINVAL", "ENOTSUP", "EBADF", "EACCES"])
def test_a_file_system_that_syncs_no_folders_is_no_failure(
    number: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As SMB shares, FUSE and NFS mounts answer."""

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)))

    monkeypatch.setattr(os, "fsync", fsync)
    run = trainer(tmp_path, max_steps=2)
    run.train()
    run.save_model()
    assert newest_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-2")
    assert names(tmp_path) >= {"checkpoint-2", "model.safetensors"}


def test_a_disk_that_fails_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(CheckpointError, match=r"checkpoint-2 was not saved .* Input/output error"):
        trainer(tmp_path, max_steps=2).train()


@pytest.mark.parametrize("number", ["EXDEV", "ENOTSUP", "EPERM"])
def test_a_file_system_that_renames_nothing_gets_copies(
    number: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Object stores behind FUSE; also onto a checkpoint of that name, and under save_total_limit."""

    def rename(self: Path, target: Path) -> None:
        raise OSError(getattr(errno, number), os.strerror(getattr(errno, number)))

    shutil.copytree(whole / "checkpoint-4", tmp_path / "checkpoint-4")
    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(Path, "replace", rename)
    run = trainer(tmp_path, save_total_limit=2)
    run.train()
    run.save_model()
    assert newest_complete_checkpoint(tmp_path) == str(tmp_path / f"checkpoint-{STEPS}")
    assert {name for name in names(tmp_path) if name.startswith("checkpoint")} == {"checkpoint-4", "checkpoint-6"}
    assert not list(tmp_path.glob("_*"))
    assert (tmp_path / "model.safetensors").exists()


def test_a_checkpoint_that_is_a_link_is_replaced(whole: Path, tmp_path: Path) -> None:
    """To a disk that is there, or is gone."""
    for step, place in ((2, tmp_path / "gone"), (4, whole / "checkpoint-4")):
        (tmp_path / f"checkpoint-{step}").symlink_to(place)
    trainer(tmp_path).train()
    assert not any((tmp_path / f"checkpoint-{step}").is_symlink() for step in (2, 4))
    assert_same_end(tmp_path, whole)
    assert (whole / "checkpoint-4/model.safetensors").exists()
