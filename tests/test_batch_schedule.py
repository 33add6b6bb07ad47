"""Protects `batch_size_schedule`: a run whose global batch grows is the run that a loop written by hand makes."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

from hf_lamb import LambTrainer, LambTrainingArguments
from hf_lamb.batch_schedule import batch_stages
from hf_lamb.scaling import norm_growth
from tests.helpers import one_line, says, torchrun
from tests.scripts import checkpointed_run, staged_runs
from tests.scripts.noise_runs import NOISE_SCALE, noise_trainer
from tests.scripts.scaffold import QUIET
from tests.scripts.split_batch import FixedRows, trained_model
from tests.scripts.staged_runs import BATCHES, LONG, LONG_ROWS, LONG_STEPS, ROWS, Stream, by_hand, lines_of

# -- the schedule -----------------------------------------------------------------------------------------------------


def batches(schedule: str, steps: int, at_once: int = 1) -> list[int]:
    return [batch_stages(schedule, at_once).at(step).batch_size for step in range(steps)]


def test_steps_and_batches() -> None:
    assert batches("0:16 2:32 5:64", 7) == [16, 16, 32, 32, 32, 64, 64]
    assert batches("  0:8 ", 3) == [8, 8, 8]
    assert batches("0:64 1:16", 3) == [64, 16, 16]


def test_a_linear_growth_ends_after_its_steps() -> None:
    """The published form: first + (last - first) * step / steps, rounded, then the last."""
    assert batches("10->20 over 4", 6) == [10, 13, 15, 18, 20, 20]
    assert batches("20->10 over 4", 6) == [20, 18, 15, 13, 10, 10]


def test_batches_are_multiples_of_a_pass() -> None:
    """The nearest one, but at least one pass; equal neighbours are one stage."""
    assert batches("0:16 1:25 2:3 3:4", 5, at_once=10) == [20, 30, 10, 10, 10]
    assert [stage.first_step for stage in batch_stages("0:16 1:25 2:3 3:4", 10).stages] == [0, 1, 2]
    assert batches("16->32 over 4", 6, at_once=8) == [16, 24, 24, 32, 32, 32]


def simulated(schedule: list[int], epochs: int, per_epoch: int) -> list[tuple[int, int]]:
    """Epoch and micro-batches taken after each step, one at a time."""
    where = [(0, 0)]
    while where[-1][0] < epochs:
        epoch, taken = where[-1]
        taken = min(taken + schedule[min(len(where) - 1, len(schedule) - 1)], per_epoch)
        where.append((epoch + 1, 0) if taken == per_epoch else (epoch, taken))
    return where


@pytest.mark.parametrize("per_epoch", [1, 2, 7, 19, 20, 31])
def test_epochs_and_positions_are_those_of_a_step_by_step_count(per_epoch: int) -> None:
    stages = batch_stages("0:2 4:4 7:8")
    where = simulated([2] * 4 + [4] * 3 + [8], 5, per_epoch)
    assert [stages.position(step, per_epoch) for step in range(len(where))] == where
    for epochs in range(1, 6):
        assert stages.steps_in(epochs, per_epoch) == where.index((epochs, 0))
    assert stages.steps_in(0.5, 20) == [taken >= 10 for _, taken in simulated([2] * 4 + [4] * 3, 1, 20)].index(True)


def test_sequences_and_the_growth_of_the_norm_add_up() -> None:
    stages = batch_stages("0:2 4:4 7:8")
    assert stages.sequences(9) == 4 * 2 + 3 * 4 + 2 * 8
    parts = [norm_growth(1e-2, 9, stage.first_step, end) for stage, end in stages.within(9)]
    assert len(parts) == 3
    assert sum(parts) == pytest.approx(norm_growth(1e-2, 9))


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (256, "batch_size_schedule 256: expected text, such as '0:256"),
        ("", "batch_size_schedule '': expected '0:256 2000:512 6000:1024'"),
        ("256", "batch_size_schedule '256': expected '0:256"),
        ("0:256, 10:512", "'0:256, 10:512': expected '0:256"),
        ("0:256 -1:8", "'0:256 -1:8': expected"),
        ("5:256", "'5:256': let it begin with the batch of step 0, such as '0:256"),
        ("0:256 9:512 3:8", "put the steps in order: 3 comes after 9"),
        ("0:256 9:512 9:8", "put the steps in order: 9 comes after 9"),
        ("0:256 9:0", "expected batches of at least 1, not 0"),
        ("256->1024", "'256->1024': expected .*'256->1024 over 6000'"),
        ("256->1024 over 0", "'256->1024 over 0': expected batches and steps of at least 1"),
        ("0->1024 over 10", "'0->1024 over 10': expected batches and steps of at least 1"),
    ],
)
def test_what_is_no_schedule_is_refused(schedule: Any, message: str, tmp_path: Path) -> None:
    with one_line(ValueError, message):
        LambTrainingArguments(output_dir=str(tmp_path), batch_size_schedule=schedule, **QUIET)


def test_an_epoch_of_nothing_is_refused() -> None:
    with one_line(ValueError, "micro_batches_per_epoch 0: expected at least 1"):
        batch_stages("0:256").position(3, 0)


# -- LambTrainer beside a loop ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("staged") / "start"
    trained_model("mlm", path)
    return path


def assert_the_same(lines: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert len(lines) == len(expected)
    for line, theirs in zip(lines, expected, strict=True):
        assert {key: line[key] for key in ("step", "epoch", "lamb/batch_size")} == {
            key: theirs[key] for key in ("step", "epoch", "lamb/batch_size")
        }
        assert line["learning_rate"] == pytest.approx(theirs["learning_rate"], rel=1e-12)
        for key in ("loss", "grad_norm"):
            assert line[key] == pytest.approx(theirs[key], rel=1e-5), (key, line, theirs)


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def assert_same_weights(model: Any, expected: Any) -> None:
    theirs = weights_of(expected)
    for name, weight in weights_of(model).items():
        assert float((weight - theirs[name]).abs().max() / theirs[name].abs().max()) <= 1e-5, name


@pytest.mark.parametrize(
    ("options", "scaled_to"),
    [
        ({}, None),
        ({"dataloader_num_workers": 2, "dataloader_persistent_workers": True}, None),
        ({"per_device_train_batch_size": 4}, None),
        ({"base_learning_rate": staged_runs.RATE, "base_batch_size": 24}, 24),
        ({"base_learning_rate": staged_runs.RATE, "base_batch_size": 24, "decay_power": 1}, 24),
    ],
    ids=["given rate", "workers", "smaller micro-batches", "scaled rate", "scaled rate, own decay"],
)
def test_every_line_is_that_of_a_loop(
    options: dict[str, Any], scaled_to: float | None, start: Path, tmp_path: Path
) -> None:
    """Loss, gradient norm, rate, batch, epoch, and the weights at the end.

    The first epoch ends inside of a stage, in a step with fewer micro-batches, the last of which is short.
    """
    data = FixedRows("mlm", ROWS, seed=0)
    run = staged_runs.trainer(tmp_path, trained_model("mlm", start), data, **options)
    run.train()
    model = trained_model("mlm", start)
    expected = by_hand(model, data, scaled_to, micro_batch=run.args.per_device_train_batch_size)
    assert_the_same(lines_of(run), expected)
    assert_same_weights(run.model, model)
    assert run.args.gradient_accumulation_steps == 1
    assert run.get_total_train_batch_size(run.args) == 64


def test_epochs_in_place_of_steps(start: Path, tmp_path: Path) -> None:
    """Two and a half epochs of 19 micro-batches: 2 x 4 + 3 x 4 in the first (seven steps), 8 + 8 + 3, 8 + 2."""
    data, seen = FixedRows("mlm", ROWS, seed=0), Events()
    run = staged_runs.trainer(
        tmp_path,
        trained_model("mlm", start),
        data,
        max_steps=-1,
        num_train_epochs=2.5,
        lr_scheduler_type="constant",
        save_strategy="epoch",
    )
    run.add_callback(seen)
    run.train()
    assert run.state.max_steps == run.state.global_step == 12
    assert seen.events == ["begin 0", "end 7", "begin 7", "end 10", "begin 10", "end 12"]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-10",
        "checkpoint-12",
        "checkpoint-7",
    ]
    assert (
        torch.load(tmp_path / "checkpoint-10/training_args.bin", weights_only=False).gradient_accumulation_steps == 1
    )


class Events(TrainerCallback):
    """The events of epochs with the steps that are done, and the accumulation at every step."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.accumulation: list[int] = []

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append(f"begin {state.global_step}")

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.events.append(f"end {state.global_step}")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.accumulation.append(args.gradient_accumulation_steps)


@pytest.mark.parametrize("passes", [9, 1], ids=["one long stream", "a stream that ends in the run"])
def test_streams(passes: int, start: Path, tmp_path: Path) -> None:
    """A stream that ends begins again; its last micro-batches, if too few for a step, are left out."""
    data = FixedRows("mlm", ROWS, seed=0)
    run = staged_runs.trainer(tmp_path, trained_model("mlm", start), Stream(data, passes))
    run.train()
    model, rows = trained_model("mlm", start), FixedRows("mlm", ROWS, seed=0)
    if passes > 1:
        rows.input_ids, rows.labels = data.input_ids.repeat(passes, 1), data.labels.repeat(passes, 1)
    expected = by_hand(model, rows, drop=True)
    planned, taken, epoch = sum(BATCHES) / 8, 0.0, 0
    for line, batch in zip(expected, BATCHES, strict=True):  # an epoch of a stream is the whole run
        if int(line["epoch"]) > epoch and line["epoch"] != int(line["epoch"]):
            epoch, taken = epoch + 1, 0.0
        taken += batch / 8
        line["epoch"] = epoch + taken / planned
    assert_the_same(lines_of(run), expected)
    assert_same_weights(run.model, model)


# -- resumed runs -----------------------------------------------------------------------------------------------------

RESUMED: dict[str, dict[str, Any]] = {
    "shuffled": {},
    "epochs": {"max_steps": -1, "num_train_epochs": 2.6},
    "workers": {"dataloader_num_workers": 1},
    "one long stream": {"passes": 9},
    "a stream that ends in the run": {"passes": 1},
}


def saved_run(folder: Path, passes: int = 0, **options: Any) -> LambTrainer:
    """Steps of 8, 16, 32 rows with dropout; a checkpoint after every step."""
    defaults = {"gradient_accumulation_steps": 1, "batch_size_schedule": "0:8 3:16 5:32", "max_steps": 9}
    defaults |= {"save_steps": 1, "base_learning_rate": 4e-3, "base_batch_size": 16}
    run = checkpointed_run.trainer(folder, **defaults | options)
    run.train_dataset = FixedRows("mlm", 70, seed=0)
    if passes:
        run.train_dataset = Stream(run.train_dataset, passes)
    return run


def assert_equal_to_the_bit(run: LambTrainer, other: LambTrainer) -> None:
    """Weights, moments, schedule and log."""
    for (name, one), two in zip(run.model.named_parameters(), other.model.parameters(), strict=True):
        assert torch.equal(one, two), name
    one, two = (r.optimizer.state_dict()["state"] for r in (run, other))
    assert all(torch.equal(one[i][key], two[i][key]) for i in two for key in two[i])
    assert run.lr_scheduler.state_dict() == other.lr_scheduler.state_dict()
    assert lines_of(run) == lines_of(other)
    assert torch.equal(torch.get_rng_state(), other.random_numbers)


@pytest.mark.parametrize("kind", RESUMED)
def test_a_run_killed_anywhere_ends_bit_for_bit_alike(kind: str, tmp_path: Path) -> None:
    """After each step: in each stage, at the borders of stages, at the end of an epoch."""
    options = RESUMED[kind]
    whole = saved_run(tmp_path, **options)
    whole.train()
    whole.random_numbers = torch.get_rng_state()
    assert {line["lamb/batch_size"] for line in lines_of(whole)} == {8, 16, 32}
    for step in range(1, whole.state.max_steps) if kind == "shuffled" else (3, 6, 7):
        run = saved_run(tmp_path, **options, save_strategy="no")
        run.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_equal_to_the_bit(run, whole)


def test_a_longer_run_goes_on_in_a_stream(tmp_path: Path) -> None:
    """The position is that of the checkpoint's run, whatever the new run's length."""
    short = saved_run(tmp_path / "run", passes=9, max_steps=6)
    short.train()
    seen: list[torch.Tensor] = []
    longer = saved_run(tmp_path / "run", passes=9, max_steps=8)
    longer.model.register_forward_pre_hook(lambda _, given, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    longer.train(resume_from_checkpoint=True)
    rows, taken = FixedRows("mlm", 70, seed=0).input_ids.repeat(9, 1), 3 * 8 + 2 * 16 + 32
    trained = torch.cat(seen)[-64:]  # the model was tried on the first batch before
    assert torch.equal(trained, rows[taken : taken + 64])


@pytest.mark.parametrize("first", ["0:16 2:32", None], ids=["another schedule", "no schedule"])
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "older checkpoint"])
def test_another_schedule_goes_on_in_a_stream(first: str | None, kept: bool, tmp_path: Path) -> None:
    """At the next row, whatever the batches were; with one more run on top, whose stages are smaller."""
    saved_run(tmp_path, passes=9, max_steps=6 if first else 24, batch_size_schedule=first, save_steps=4).train()
    taken = 2 * 16 + 2 * 32 if first else 4 * 4
    if not kept:
        (tmp_path / "checkpoint-4/lamb_state.json").unlink()
    rows, saved = FixedRows("mlm", 70, seed=0).input_ids.repeat(9, 1), 4
    for schedule, steps, more in (("0:4 5:16", 6, 4 + 16), ("0:4", 8, 8)):
        seen: list[torch.Tensor] = []
        run = saved_run(tmp_path, passes=9, max_steps=steps, batch_size_schedule=schedule)
        run.model.register_forward_pre_hook(
            lambda _, given, kwargs, seen=seen: seen.append(kwargs["input_ids"]), with_kwargs=True
        )
        run.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{saved}"))
        assert run.state.global_step == steps
        assert torch.equal(torch.cat(seen)[-more:], rows[taken : taken + more])
        taken, saved = taken + more, steps


def test_a_stream_goes_on_only_at_a_whole_pass(tmp_path: Path) -> None:
    saved_run(tmp_path, passes=9, max_steps=1, batch_size_schedule="0:12").train()
    run = saved_run(tmp_path, passes=9, max_steps=2, batch_size_schedule="0:8", per_device_train_batch_size=8)
    with one_line(ValueError, "checkpoint-1 has taken 12 sequences of its stream, which is no multiple of 8"):
        run.train(resume_from_checkpoint=True)


def test_a_checkpoint_whose_batch_is_not_known_is_refused(tmp_path: Path) -> None:
    saved_run(tmp_path, passes=9, max_steps=1, batch_size_schedule=None).train()
    (tmp_path / "checkpoint-1/training_args.bin").write_bytes(b"damaged")
    run = saved_run(tmp_path, passes=9, max_steps=2)
    with one_line(ValueError, "checkpoint-1 has no training_args.bin that can be read, so its batch is not known"):
        run.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("kept", [True, False], ids=["kept", "older checkpoint"])
def test_a_run_without_a_schedule_does_not_resume_from_one_with(kept: bool, tmp_path: Path) -> None:
    saved_run(tmp_path, max_steps=1).train()
    if not kept:
        (tmp_path / "checkpoint-1/lamb_state.json").unlink()
    run = saved_run(tmp_path, max_steps=2, batch_size_schedule=None)
    with one_line(ValueError, "checkpoint-1 is of a run with batch_size_schedule '0:8 3:16 5:32', and this run has"):
        run.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("length", "last"),
    [({"max_steps": 9}, 9), ({"max_steps": -1, "num_train_epochs": 3}, 17)],
    ids=["steps", "epochs"],
)
def test_a_smaller_batch_goes_on_for_the_whole_length(length: dict[str, Any], last: int, tmp_path: Path) -> None:
    """Epochs of 18 micro-batches; two of them and 8 micro-batches are done, in more rows than the new stages have."""
    saved_run(tmp_path, max_steps=7, batch_size_schedule="0:32", save_steps=7).train()
    run = saved_run(tmp_path, batch_size_schedule="0:4", save_strategy="no", **length)
    run.train(resume_from_checkpoint=True)
    assert run.state.global_step == run.state.max_steps == last
    assert run.state.epoch == pytest.approx(2 + (8 + last - 7) / 18)


def rates_and_steps(run: LambTrainer) -> dict[int, float]:
    return {int(line["step"]): line["learning_rate"] for line in lines_of(run)}


@pytest.mark.parametrize("first", ["0:8 3:16", None], ids=["a smaller largest batch", "a constant batch"])
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "older checkpoint"])
def test_another_schedule_goes_on_with_the_rate_of_each_batch(
    first: str | None, kept: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Base 1e-3 at 8: at 16 it is times sqrt(2), at 32 times 2, whatever the checkpoint's largest batch was."""
    options = {"base_learning_rate": 1e-3, "base_batch_size": 8, "lr_scheduler_type": "constant"}
    saved_run(tmp_path, batch_size_schedule=first, max_steps=4, **options).train()
    again = saved_run(tmp_path, batch_size_schedule="0:8 3:16 6:32", max_steps=7, **options)
    if not kept:
        (tmp_path / "checkpoint-4/lamb_state.json").unlink()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    third = saved_run(tmp_path, batch_size_schedule="0:8 3:16 8:64", max_steps=10, **options)
    third.train(resume_from_checkpoint=str(tmp_path / "checkpoint-7"))
    rates = rates_and_steps(third)
    assert [rates[step] for step in (5, 6, 7, 8, 9, 10)] == pytest.approx(
        [1e-3 * (batch / 8) ** 0.5 for batch in (16, 16, 32, 16, 64, 64)]
    )
    assert not [record.message for record in caplog.records if "learning_rate" in record.message]


def test_the_scaler_skips_a_step_and_the_rate_is_still_that_of_the_batch(tmp_path: Path) -> None:
    """Trainer does not step the schedule then, but the batch grows as planned."""
    options = {"base_learning_rate": 1e-3, "base_batch_size": 8, "lr_scheduler_type": "constant"}
    run = saved_run(tmp_path, batch_size_schedule="0:8 3:32", max_steps=6, save_strategy="no", **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            type(run.accelerator),
            "optimizer_step_was_skipped",
            property(lambda _: run.state.global_step in (1, 2)),
        )
        run.train()
    assert run.lr_scheduler.last_epoch == 4
    assert list(rates_and_steps(run).values()) == pytest.approx([1e-3] * 3 + [2e-3] * 3)


# -- what goes with it ------------------------------------------------------------------------------------------------


def test_the_noise_scale_is_found_through_all_stages(tmp_path: Path) -> None:
    values = []
    for seed in range(3):
        run = noise_trainer(tmp_path, 8, 1, seed, max_steps=100, logging_steps=100, batch_size_schedule="0:16 50:32")
        run.train()
        values.append([line["lamb/noise_scale"] for line in lines_of(run)][-1])
    assert sum(values) / len(values) == pytest.approx(NOISE_SCALE, rel=0.15), values


def test_callbacks_see_the_accumulation_in_force(start: Path, tmp_path: Path) -> None:
    seen = Events()
    run = staged_runs.trainer(tmp_path, trained_model("mlm", start), FixedRows("mlm", ROWS, seed=0))
    run.add_callback(seen)
    run.train()
    assert seen.accumulation == [batch // 8 for batch in BATCHES]


def test_a_callback_ends_the_training_inside_of_a_stage(start: Path, tmp_path: Path) -> None:
    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_training_stop = state.global_step == 5

    seen = Events()
    run = staged_runs.trainer(tmp_path, trained_model("mlm", start), FixedRows("mlm", ROWS, seed=0))
    run.add_callback(Stop())
    run.add_callback(seen)
    run.train()
    assert run.state.global_step == 5
    assert seen.events == ["begin 0", "end 5"]


def test_memory_that_runs_out_halves_the_micro_batch_and_keeps_the_batches(start: Path, tmp_path: Path) -> None:
    """`auto_find_batch_size` begins again, with the accumulation that the smaller micro-batch needs."""
    model = trained_model("mlm", start)

    def refuse(_: Any, given: Any, kwargs: Any) -> None:
        if len(kwargs["input_ids"]) > 4:
            raise RuntimeError("CUDA out of memory.")

    model.register_forward_pre_hook(refuse, with_kwargs=True)
    seen, data = Events(), FixedRows("mlm", ROWS, seed=0)
    run = staged_runs.trainer(tmp_path, model, data, auto_find_batch_size=True, max_steps=8)
    run.add_callback(seen)
    run.train()
    assert [line["lamb/batch_size"] for line in lines_of(run)] == BATCHES[:8]
    assert seen.accumulation[-8:] == [batch // 4 for batch in BATCHES[:8]]


def test_rounded_batches_are_said(start: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="hf_lamb"):
        run = staged_runs.trainer(
            tmp_path,
            trained_model("mlm", start),
            FixedRows("mlm", 64, seed=0),
            batch_size_schedule="0:16 1:20",
            max_steps=2,
        )
        run.train()
    assert [line["lamb/batch_size"] for line in lines_of(run)] == [16, 24]
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    says(warnings[0], "batch_size_schedule 0:16 1:20: the batch of 20 is 24 here, in passes of 8 sequences")
    assert any("16 from step 0, 24 from step 1" in record.message for record in caplog.records)


def test_a_batch_above_an_epoch_is_said(start: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data, options = FixedRows("mlm", 20, seed=0), {"batch_size_schedule": "0:8 1:64", "max_steps": 2}
    staged_runs.trainer(tmp_path, trained_model("mlm", start), data, **options).train()
    warnings = [record.message for record in caplog.records if "more than an epoch" in record.message]
    assert len(warnings) == 1
    says(warnings[0], "0:8 1:64: the batch of 64 is more than an epoch has: its steps train on 20 rows each")


def test_a_schedule_may_change_after_construction_but_not_appear(start: Path, tmp_path: Path) -> None:
    """As `hyperparameter_search` does, which sets the arguments of the same trainer."""
    data = FixedRows("mlm", ROWS, seed=0)
    run = staged_runs.trainer(tmp_path, trained_model("mlm", start), data, max_steps=2)
    run.args.batch_size_schedule = "0:8 1:24"
    run.train()
    assert [line["lamb/batch_size"] for line in lines_of(run)] == [8, 24]
    run.args.batch_size_schedule = None
    with one_line(ValueError, "batch_size_schedule None was set after LambTrainer was made: make it with a schedule"):
        run.train()
    run = staged_runs.trainer(tmp_path, trained_model("mlm", start), data, max_steps=2, batch_size_schedule=None)
    run.args.batch_size_schedule = "0:8 1:24"
    with one_line(ValueError, "batch_size_schedule '0:8 1:24' was set after LambTrainer was made"):
        run.train()


@pytest.mark.parametrize(("schedule", "active"), [("0:32 4:64", True), ("0:16 4:64", False)])
def test_a_comm_hook_needs_accumulation_in_every_stage(
    schedule: str, active: bool, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On two processes with passes of 16, 16 is a stage without accumulation."""
    data = FixedRows("mlm", ROWS, seed=0)
    run = staged_runs.trainer(tmp_path, trained_model("mlm", start), data, batch_size_schedule=schedule)
    monkeypatch.setattr(LambTrainingArguments, "world_size", 2)
    run.accelerator.ddp_handler = SimpleNamespace(comm_hook=SimpleNamespace(value="bf16"))
    ddp = torch.nn.parallel.DistributedDataParallel
    run.noise_measurement.attach(ddp.__new__(ddp))
    assert run.noise_measurement._active is active


def test_the_model_card_has_the_stages(start: Path, tmp_path: Path) -> None:
    run = staged_runs.trainer(tmp_path, trained_model("mlm", start), FixedRows("mlm", ROWS, seed=0))
    run.train()
    run.create_model_card()
    card = (tmp_path / "README.md").read_text()
    assert (
        "- global batch: 16 from step 0, 32 from step 4, 64 from step 7; 8 sequences at a time on each of 1 " in card
    )
    assert "total_train_batch_size: 64" in card


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"gradient_accumulation_steps": 4},
            "leave out gradient_accumulation_steps 4: they follow from batch_size_schedule '0:16 4:32 7:64'",
        ),
        (
            {"accelerator_config": {"split_batches": True}},
            "split_batches fixes the global batch: leave it out, or batch_",
        ),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy group_by_length groups rows"),
        ({"train_sampling_strategy": "batch_rebalance"}, "train_sampling_strategy batch_rebalance groups rows"),
        (
            {"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 2}}},
            "gradient_accumulation_steps 2: leave it out, or batch_size_schedule",
        ),
        (
            {
                "base_learning_rate": 1e-3,
                "base_batch_size": 16,
                "lr_scheduler_type": "greedy",
                "eval_strategy": "epoch",
            },
            "lr_scheduler_type greedy: with batch_size_schedule and base_learning_rate use a function of the step",
        ),
    ],
)
def test_what_fixes_the_batch_is_refused(options: dict[str, Any], message: str, start: Path, tmp_path: Path) -> None:
    with one_line(ValueError, message):
        staged_runs.trainer(tmp_path, trained_model("mlm", start), FixedRows("mlm", ROWS, seed=0), **options).train()
    assert not list(tmp_path.iterdir())


def test_deepspeed_is_refused(start: Path, tmp_path: Path) -> None:
    run = staged_runs.trainer(tmp_path, trained_model("mlm", start), FixedRows("mlm", ROWS, seed=0))
    run.is_deepspeed_enabled = True
    with one_line(ValueError, "DeepSpeed fixes the accumulation steps: leave it out, or batch_size_schedule"):
        run.train()


def test_a_script_without_the_option_is_left_alone(start: Path, tmp_path: Path) -> None:
    """Plain TrainingArguments, as those of a script under `hf_lamb.run --trainer lamb`, do not know it."""
    args = TrainingArguments(
        output_dir=str(tmp_path), optim="lamb", max_steps=1, gradient_accumulation_steps=2, **QUIET
    )
    run = LambTrainer(model=trained_model("mlm", start), args=args, train_dataset=FixedRows("mlm", 64, seed=0))
    run.train()
    assert run.staged is None
    assert run.get_total_train_batch_size(args) == 16


# -- two processes ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("two")
    torchrun(2, "tests.scripts.staged_runs", str(folder))
    return json.loads((folder / "found.json").read_text())


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_train_as_a_loop_of_accelerates(kind: str, two_processes: dict[str, Any]) -> None:
    found = two_processes[kind]
    assert found["apart"] <= 1e-5
    assert [line["loss"] for line in found["lines"]] == pytest.approx(found["losses"], rel=1e-5)
    assert [line["lamb/batch_size"] for line in found["lines"]] == BATCHES


@pytest.mark.distributed
def test_two_processes_train_as_one(two_processes: dict[str, Any], start: Path, tmp_path: Path) -> None:
    """Fifty steps, shuffled: losses, rates, epochs and batches."""
    run = staged_runs.trainer(tmp_path, trained_model("mlm", start), FixedRows("mlm", LONG_ROWS, seed=0), **LONG)
    run.train()
    lines, theirs = lines_of(run), two_processes["long"]
    assert len(lines) == len(theirs) == LONG_STEPS
    assert [line["loss"] for line in lines] == pytest.approx([line["loss"] for line in theirs], abs=1e-5)
    for key in ("learning_rate", "epoch", "lamb/batch_size"):
        assert [line[key] for line in lines] == [line[key] for line in theirs], key


@pytest.mark.distributed
def test_two_processes_read_a_stream_as_one(two_processes: dict[str, Any], start: Path) -> None:
    rows = FixedRows("mlm", ROWS, seed=0)
    rows.input_ids, rows.labels = rows.input_ids.repeat(9, 1), rows.labels.repeat(9, 1)
    expected, lines = by_hand(trained_model("mlm", start), rows), two_processes["stream"]
    for key in ("loss", "learning_rate", "lamb/batch_size"):
        assert [line[key] for line in lines] == pytest.approx([line[key] for line in expected], rel=1e-5), key
    assert lines[-1]["epoch"] == 1


@pytest.mark.distributed
def test_two_processes_resume_bit_for_bit_alike(two_processes: dict[str, Any]) -> None:
    assert two_processes["resumed"] is True
