"""Protects recipes.grow_batch: three kinds of runs, tuned equally, and what its table says of them."""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from hf_lamb.batch_schedule import batch_stages
from recipes import grow_batch
from recipes.study import growth_report
from recipes.study.sweep import Record, Study, Trial
from tests.helpers import one_line

TINY = ["--size", "smoke", "--vocab_size", "400", "--global-batch-size=8", "--max_steps", "10", "--use_cpu", "True"]
FACTS = {"model": "BERT-smoke", "per_device_train_batch_size": 2}


def test_equal_steps_and_equal_sequences() -> None:
    """A batch that grows from a quarter is 5/8 of the constant one on average."""
    runs = grow_batch.schedules(64, 400)
    sequences = {name: batch_stages(text, 16).sequences(steps) for name, (text, steps) in runs.items()}
    assert {name: steps for name, (_, steps) in runs.items()} == {
        "constant": 400,
        "equal-tokens": 640,
        "equal-steps": 400,
    }
    assert sequences["constant"] == 64 * 400
    assert sequences["equal-tokens"] == pytest.approx(64 * 400, rel=0.01)
    assert sequences["equal-steps"] == pytest.approx(5 / 8 * 64 * 400, rel=0.01)


def test_a_trial_is_a_run_of_the_pretraining_with_its_schedule_and_seed(texts: Path, tmp_path: Path) -> None:
    """The same seed gives the same loss, and nothing is left but the record."""
    argv = [*grow_batch.words_of(grow_batch.SHORT), *TINY, "--corpus", str(texts)]
    study = Study(tmp_path, growth_report.search_of(["lamb"], list(growth_report.NAMES), 3), FACTS)
    train = grow_batch.trials_of(study, argv)
    found = [train(Trial("lamb", "equal-tokens", 0.02, seed), lambda _: None) for seed in (1, 2, 1)]
    assert [(r["steps"], r["sequences"]) for r in found] == [(16, 78)] * 3
    assert found[0]["objective"] == found[2]["objective"] != found[1]["objective"]
    assert [path.name for path in tmp_path.iterdir()] == ["log.txt"]
    assert "global batch 2 from step 0" in (tmp_path / "log.txt").read_text()


def test_processes_of_torchrun_train_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes another trial: connected, they would average the gradients of two of them."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["grow_batch", "--use_cpu", "True", "--output_dir", str(tmp_path)])
    monkeypatch.setattr(Study, "run", lambda *_, **__: [])
    monkeypatch.setattr(grow_batch, "trials_of", lambda *_: None)
    grow_batch.main()
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & {*os.environ}


def record(setting: str, rate: float, seed: int, loss: float) -> Record:
    study = {"model": "BERT-smoke", "max_seq_length": 32, "global_batch_size": 64}
    return {
        "study": study,
        "optimizer": "lamb",
        "setting": setting,
        "learning_rate": rate,
        "seed": seed,
        "objective": loss,
        "steps": 400,
        "sequences": 25_600,
        "parameters": 24_016,
        "hardware": "x86_64 CPU, 1 threads",
        "command": "python -m recipes.grow_batch",
    }


def test_the_table_says_what_is_lowest_and_what_is_a_tie() -> None:
    losses = {"constant": 4.0, "equal-tokens": 3.9, "equal-steps": 4.001}
    records = [
        record(name, rate, seed, loss + 0.002 * (seed - 2) + 0.1 * (rate != 0.02))
        for name, loss in losses.items()
        for rate, seed in [(0.01, 0), (0.02, 0), (0.04, 0), (0.02, 1), (0.02, 2), (0.02, 3)]
    ]
    words, table = growth_report.results_of(records)
    assert "grows linearly from 16 to 64" in words
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    assert [row[0] for row in rows] == list(growth_report.NAMES.values())
    assert [row[3:] for row in rows] == [
        ["3", "0.02", "4.000 ± 0.002", "+0.100"],
        ["3", "0.02", "3.900 ± 0.002", "lowest"],
        ["3", "0.02", "4.001 ± 0.002", "+0.101"],
    ]


def test_trials_with_other_options_are_of_another_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In either direction; options that change no result are none of it."""
    own = ["grow_batch", "--use_cpu", "True", "--output_dir", str(tmp_path)]
    monkeypatch.setattr(grow_batch, "trials_of", lambda *_: None)
    seen: list[dict[str, Any]] = []
    monkeypatch.setattr(grow_batch.Study, "run", lambda study, *_, **__: seen.append(study.facts) or [])
    monkeypatch.setattr(grow_batch, "results_of", lambda _: [])
    for given in ([], ["--weight_decay", "0.1"], ["--logging_steps", "5"]):
        monkeypatch.setattr(sys, "argv", [*own, *given])
        grow_batch.main()
    assert seen[0] == seen[2] != seen[1]
    for first, given in ((seen[1], []), (seen[0], ["--weight_decay", "0.1"])):
        line = record("constant", 0.02, 0, 4.0) | {"study": first}
        (tmp_path / "trials.jsonl").write_text(json.dumps(line) + "\n")
        monkeypatch.setattr(sys, "argv", [*own, *given])
        with one_line(SystemExit, "holds trials with weight_decay .*, not .*: give --output_dir for another study"):
            grow_batch.main()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--learning_rate", "1"], "grow_batch: --learning_rate: leave it out, it is what this recipe varies"),
        (["--batch_size_schedule=0:8"], "--batch_size_schedule 0:8: leave it out"),
        (["--base-learning-rate", "1"], "--base_learning_rate 1.0: leave it out"),
        (["--optim", "adamw_torch"], "--optim adamw_torch: leave it out, it compares batches of LAMB"),
        (["--num_train_epochs", "2"], "--num_train_epochs 2.0: leave it out, --max_steps is the length of a trial"),
        (["--model_type", "no_type"], "--model_type no_type"),
        (["--global_batch_size", "10"], "--global_batch_size 10: give a multiple of 4"),
        (["--max_steps", "5"], "--max_steps 5: give at least 10"),
    ],
)
def test_bad_input_gets_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["grow_batch", "--use_cpu", "True", "--output_dir", str(output), *arguments])
    with one_line(SystemExit, message):
        grow_batch.main()
    assert not output.exists()
