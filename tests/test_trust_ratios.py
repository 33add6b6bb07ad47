"""Protects the per-layer trust-ratio history: small, the same after resuming, drawn, and put into words."""

import json
import logging
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

from hf_lamb import LambTrainer, LambTrainingArguments, TrustRatioCallback, trust_ratio_history
from hf_lamb.trust_ratios import MAX_COLUMNS, record_trust_ratios, trust_ratio_warnings
from recipes.lib.report import plot_trust_ratios
from tests.scripts import split_batch


def history_of(**rows: list[float]) -> dict[str, Any]:
    history: dict[str, Any] = {}
    for step in range(len(next(iter(rows.values())))):
        record_trust_ratios(history, 10 * (step + 1), {name: row[step] for name, row in rows.items()})
    return history


def test_a_history_keeps_steps_and_layers() -> None:
    history = history_of(a=[0.1, 0.2, 0.3], b=[1.0, 2.0, 3.0])
    assert history["steps"] == [10, 20, 30]
    assert history["ratios"] == {"a": [0.1, 0.2, 0.3], "b": [1.0, 2.0, 3.0]}


def test_a_long_history_is_thinned_evenly() -> None:
    """Never 256 columns or more, the first step always there, and the same distance between all."""
    history: dict[str, Any] = {}
    for step in range(1, 10_001):
        record_trust_ratios(history, step, {"a": float(step)})
        assert len(history["steps"]) < MAX_COLUMNS
    steps = history["steps"]
    assert steps[0] == 1
    assert len({b - a for a, b in pairwise(steps)}) == 1
    assert steps[-1] > 10_000 - history["every"]
    assert history["ratios"]["a"] == [float(f"{step:.4g}") for step in steps]


def test_thinning_goes_on_where_a_checkpoint_left_it() -> None:
    """Through JSON at any column: the same history."""
    whole: dict[str, Any] = {}
    resumed: dict[str, Any] = {}
    for step in range(1, 1500):
        record_trust_ratios(whole, step, {"a": 0.1})
        record_trust_ratios(resumed, step, {"a": 0.1})
        if step % 97 == 0:
            resumed = json.loads(json.dumps(resumed))
    assert resumed == whole


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ({"a": [0.1] * 8, "b": [0.2] * 8, "c": [0.3] * 8}, []),
        ({"a": [9.0] * 8, "b": [20.0] * 8, "c": [0.3] * 8}, ["lower the learning rate"]),
        ({"a": [0.1] * 8, "b": [20.0] * 8, "c": [0.3] * 8}, ["b: trust ratio above 4 since step 50 (now 20"]),
        ({"a": [1e-3] * 8, "b": [0.2] * 8, "c": [0.3] * 8}, ["a: trust ratio 0.001, less than 1/20"]),
        ({"a": [0.1] * 8, "b": [20.0] * 6 + [1.0] * 2, "c": [0.3] * 8}, []),  # it has come down
        ({"a": [0.1] * 3, "b": [20.0] * 3, "c": [0.3] * 3}, []),  # too few to say "stays"
        ({"a": [9.0], "b": [20.0], "c": [0.3]}, ["lower the learning rate"]),  # diverged, and logged once
        ({"a": [0.1, 9.0, 9.0], "b": [0.1, 1.0, 20.0], "c": [0.3] * 3}, ["lower the learning rate"]),
    ],
)
def test_what_stays_wrong_is_said(rows: dict[str, list[float]], words: list[str]) -> None:
    lines = trust_ratio_warnings(history_of(**rows))
    assert len(lines) == len(words)
    assert all(word in line for word, line in zip(words, lines, strict=True))


def test_an_empty_history_says_nothing(tmp_path: Path) -> None:
    """Another optimizer than LAMB, a run without a log line, or NaNs alone."""
    assert trust_ratio_warnings({}) == []
    for history in ({}, {"steps": [1, 2], "ratios": {"a": [math.nan] * 2}}):
        assert not plot_trust_ratios(history, tmp_path / "none.png", "")
    assert not list(tmp_path.iterdir())


def run(
    path: Path, resume: str | None = None, cls: type[Trainer] = LambTrainer, callbacks: Any = None, **options: Any
) -> Trainer:
    defaults: dict[str, Any] = {"max_steps": 8, "logging_steps": 1, "save_steps": 4, "report_to": []}
    args = LambTrainingArguments(
        output_dir=str(path), use_cpu=True, disable_tqdm=True, **defaults | {"learning_rate": 5e-3} | options
    )
    model, data = split_batch.trained_model("mlm", path / "start"), split_batch.FixedRows("mlm", 64, seed=0)
    trainer = cls(model=model, args=args, train_dataset=data, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_resumed_run_has_the_whole_history(tmp_path: Path) -> None:
    """Every adapted layer, every logged step, and the last column is what the optimizer says."""
    whole = run(tmp_path)
    history = trust_ratio_history(whole.state)
    assert history["steps"] == list(range(1, 9))
    stats = whole.optimizer.optimizer.layer_stats(adapted_only=True)
    assert {name: row[-1] for name, row in history["ratios"].items()} == pytest.approx(
        {name: s.trust_ratio for name, s in stats.items()}, rel=1e-3
    )
    resumed = run(tmp_path, str(tmp_path / "checkpoint-4"))
    assert trust_ratio_history(resumed.state) == history


def test_a_checkpoint_without_a_history_resumes(tmp_path: Path) -> None:
    """Of an earlier version, or of a stock Trainer."""
    run(tmp_path)
    (tmp_path / "checkpoint-4/lamb_state.json").unlink()
    assert trust_ratio_history(run(tmp_path, str(tmp_path / "checkpoint-4")).state)["steps"] == [5, 6, 7, 8]


@pytest.mark.parametrize("resumed", [LambTrainer, Trainer])
@pytest.mark.parametrize("first", [LambTrainer, Trainer])
def test_what_is_kept_is_not_called_ignored(
    first: type[Trainer], resumed: type[Trainer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Trainer warns of entries that are no callback of the run, under restore_callback_states_from_checkpoint."""
    run(tmp_path, cls=first, gradient_accumulation_steps=2)
    caplog.clear()
    options = {"gradient_accumulation_steps": 2, "restore_callback_states_from_checkpoint": True}
    trainer = run(tmp_path, str(tmp_path / "checkpoint-4"), cls=resumed, **options)
    assert not any("Ignoring" in message for message in caplog.messages)
    if first is resumed is LambTrainer:
        assert trust_ratio_history(trainer.state)["steps"] == list(range(1, 9))


def test_a_history_of_a_stock_trainer_is_taken_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Which has it in trainer_state.json."""
    run(tmp_path, cls=Trainer, callbacks=[TrustRatioCallback()])
    resumed = run(tmp_path, str(tmp_path / "checkpoint-4"), restore_callback_states_from_checkpoint=True)
    assert trust_ratio_history(resumed.state)["steps"] == list(range(1, 9))
    assert not any("Ignoring" in message for message in caplog.messages)


def test_a_rate_that_is_too_high_is_said_at_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="hf_lamb"):
        run(tmp_path, learning_rate=1.0, lr_scheduler_type="constant", max_steps=16, save_strategy="no")
    assert any("lower the learning rate" in message for message in caplog.messages)


def test_the_recipe_leaves_a_heat_map_and_the_last_ratios(finished: Path) -> None:
    assert (finished / "checkpoint-8").is_dir()
    record = json.loads((finished / "results.jsonl").read_text())
    assert set(record) >= {"trust_ratios", "trust_ratio_warnings", "noise_scale", "learning_rate_why"}


def test_the_heat_map_is_a_picture(tmp_path: Path) -> None:
    plot_trust_ratios(history_of(a=[0.1, 0.2, 0.0], b=[1.0, 2.0, 3.0]), tmp_path / "map.png", "title")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")


def test_layers_that_kept_their_weights() -> None:
    """LoRA's A has no gradient in the first step; an expert has none in some. What is in the history is whole."""
    history: dict[str, Any] = {}
    for step, ratios in enumerate([{"B": 1.0}, {"A": 2.0, "B": 3.0}, {"B": 4.0}, {"A": 5.0, "B": 6.0}]):
        record_trust_ratios(history, step, ratios)
    assert history["steps"] == [1, 3]
    assert history["ratios"] == {"A": [2.0, 5.0], "B": [3.0, 6.0]}
