"""Protects recipes/sharp_minima.py: runs end at the common loss, a stopped recipe goes on, the report is whole."""

import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes import sharp_minima
from recipes.sharp_minima import kept
from recipes.study import sharp_minima_bert, sharp_minima_report
from recipes.study import sharp_minima_digits as digits
from recipes.study.sharp_minima_digits import LARGE, SMALL, Run, train_to_target
from recipes.tables_in_docs import RESULTS

RECORDS = [json.loads(line) for line in (RESULTS / "sharp_minima.jsonl").read_text().splitlines()]


def test_a_run_ends_at_the_loss_that_was_asked_for() -> None:
    """Within 4 %, with its rate decayed; and the same run gives the same weights."""
    run = Run("lamb", LARGE, 2e-2, seed=3, target=0.5)
    first, again = train_to_target(run), train_to_target(run)
    assert first["record"]["settled"]
    assert first["record"]["train_loss"] == pytest.approx(0.5, rel=0.041)
    assert first["curve"][-1][0] == first["record"]["steps"]
    assert first["curve"][-1][2] == pytest.approx(first["record"]["train_loss"])
    assert all(torch.equal(again["weights"][name], weight) for name, weight in first["weights"].items())


def test_a_target_out_of_reach_is_recorded_as_such() -> None:
    """After a few trials, not for ever; the closest run is kept."""
    found = train_to_target(Run("sgd", SMALL, 1e-5, target=0.001), most_steps=40)
    assert not found["record"]["settled"]
    assert found["record"]["train_loss"] > 1


def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    calls = []

    def make() -> dict[str, Any]:
        calls.append(1)
        return {"weights": torch.ones(2), "record": {"loss": 0.5}}

    first, again = kept(tmp_path, "part", make), kept(tmp_path, "part", make)
    assert len(calls) == 1
    assert torch.equal(again["weights"], first["weights"])
    assert [path.name for path in tmp_path.iterdir()] == ["part.pt"], "nothing unfinished is left"


def test_the_recorded_results_say_what_the_texts_say() -> None:
    """README and docs/sharpness.md: sharper at one loss, the other way round at another; Dinh's factors."""
    runs = [record for record in RECORDS if record["part"] == "digits" and record["target"] == digits.TARGET]
    for optimizer in sharp_minima_report.OPTIMIZERS:
        settled = [run for run in runs if run["optimizer"] == optimizer and run["settled"]]
        small, large = ([run["adaptive"] for run in settled if run["batch_size"] == size] for size in (SMALL, LARGE))
        assert max(small) < min(large)
        assert len(small) + len(large) >= 11
    (further,) = (record for record in RECORDS if record.get("target") == digits.FURTHER)
    small, large = (sharp_minima_report.seeds(RECORDS, "adamw", size)[0] for size in (SMALL, LARGE))
    assert large["adaptive"] > 1.5 * small["adaptive"]
    assert further["adaptive"] < small["adaptive"]
    assert further["test_loss"] > small["test_loss"]

    dinh = [record for record in RECORDS if record["part"] == "dinh"]
    for metric in ("keskar", "lambda_max", "trace"):
        values = [record[metric] for record in dinh]
        assert max(values) > 10 * min(values)
    for metric in ("adaptive", "weighted_trace"):
        values = [record[metric] for record in dinh]
        assert max(values) < (1 + 1e-3) * min(values)
    assert max(record["logits_difference"] for record in dinh) < 1e-5


def test_a_chosen_rate_on_the_edge_is_marked() -> None:
    """A lower one might have been better."""
    rates = {
        (optimizer, size): sharp_minima_report.chosen_rate(RECORDS, optimizer, size)
        for optimizer in sharp_minima_report.OPTIMIZERS
        for size in (SMALL, LARGE)
    }
    for key, rate in rates.items():
        tried = [f"{x:g}" for x in digits.RATES[key]]
        assert rate.removesuffix(" (edge)") in tried
        assert rate.endswith("(edge)") == (rate.removesuffix(" (edge)") in (tried[0], tried[-1]))
    assert any("edge" in rate for rate in rates.values())
    assert not all("edge" in rate for rate in rates.values())


def test_results_have_their_provenance() -> None:
    for record in RECORDS:
        assert record["command"] == "python -m recipes.sharp_minima"
        assert {"torch", "hf_lamb"} <= record["versions"].keys()
        assert record["seconds_in_all"] > 0
    assert all(math.isfinite(record["adaptive"]) for record in RECORDS if record["part"] == "digits")


@pytest.mark.slow
def test_the_whole_recipe_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every part on few steps: the page holds all pictures, and a second call trains nothing."""

    def run_all(runs: list[Run], keep: Callable[..., Any], processes: int, title: str) -> dict[Run, dict[str, Any]]:
        def make(run: Run) -> dict[str, Any]:
            return digits.train_to_target(run, most_steps=40, trials=1)

        return {run: keep(run.name, partial(make, run)) for run in runs}

    setting, output = sharp_minima_bert.Setting, tmp_path / "out"
    settings = {"small batch": setting(8, 20, 1e-2), "large batch": setting(32, 20, 1e-2)}
    monkeypatch.setattr(digits, "run_all", run_all)
    monkeypatch.setattr(digits, "RATES", {key: rates[1:2] for key, rates in digits.RATES.items()})
    monkeypatch.setattr(sharp_minima_bert, "SETTINGS", settings)
    monkeypatch.setattr("sys.argv", ["sharp_minima", "--output_dir", str(output)])
    sharp_minima.main()
    page = (output / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 9
    first = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    assert {record["part"] for record in first} == {"digits", "dinh", "negated", "bert"}

    monkeypatch.setattr(digits, "train_to_target", None)
    monkeypatch.setattr(digits, "dinh", None)
    monkeypatch.setattr(sharp_minima_bert, "pretrain", None)
    monkeypatch.setattr(sharp_minima_bert, "compare", None)
    sharp_minima.main()
    again = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    assert [record["part"] for record in again] == [record["part"] for record in first]
