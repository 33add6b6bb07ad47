"""Protects the page of a training run: what it finds wrong, whose runs it reads, and that it is one file."""

import json
import math
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer

from hf_lamb import LambTrainer, LambTrainingArguments
from recipes import run_report
from recipes.lib.findings import Run, findings, looked_for
from tests.helpers import one_line, says
from tests.scripts import split_batch

FALLING = [9.0, 8.0, 7.2, 6.8, 6.6, 6.5, 6.4, 6.35, 6.3, 6.28, 6.26, 6.25]


def run_with(losses: list[float] = FALLING, held_out: float = 6.3, last: Any = None, **known: Any) -> Run:
    """A run of 1,200 steps that goes well, but for what is given. last: more values of the last line."""
    log: list[dict[str, Any]] = [{"step": 100 * n, "loss": loss} for n, loss in enumerate(losses, 1)]
    log[-1] |= last or {}
    log.append({"step": 1200, "eval_loss": held_out})
    defaults: dict[str, Any] = {
        "trust_ratios": {},
        "options": {},
        "batch": 64,
        "unigram_loss": 6.6,
        "vocabulary": 8192,
    }
    return Run(log, 1200, 1200, **defaults | known)


def held_at(ratio: float) -> dict[str, Any]:
    return {"steps": [100, 200, 300, 400], "ratios": {"a": [0.1, 0.2, ratio, ratio], "b": [0.1] * 4, "c": [0.1] * 4}}


@pytest.mark.parametrize(
    "run",
    [
        run_with(),
        run_with(last={"lamb/noise_scale": 300.0, "grad_norm": 1.0}, trust_ratios=held_at(0.3)),
        run_with([9.0, 9.0, *FALLING[:6], 6.6, 6.5, 6.7, 6.4], options={"max_trust_ratio": 10.0}),  # noise is no jump
        run_with(FALLING[:7], unigram_loss=None, vocabulary=None),
    ],
)
def test_a_run_that_goes_well(run: Run) -> None:
    assert findings(run) == []
    assert "skipped steps" in looked_for(run)
    assert ("noise scale" in looked_for(run)) == (run.noise_scale is not None)  # what was not logged was not seen


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (run_with([*FALLING[:11], math.nan]), "training loss was inf or NaN at step 1,200; lower learning rate"),
        (run_with(last={"grad_norm": math.inf}), "gradient norm was inf or NaN at step 1,200"),
        (run_with(last={"lamb/skipped_steps": 3}), "3 of 1,200 steps were skipped, the first by step 1,200"),
        (
            run_with([*FALLING[:7], 8.0, 7.9, 6.3, 6.3, 6.2]),
            "jumped from 6.6 to 8 at step 800, and was back at step 1,000",
        ),
        (run_with([*FALLING[:9], 8.0, 8.1, 8.2]), "jumped from 6.4 to 8.2 at step 1,000, and did not come back"),
        (
            run_with([*FALLING[:4], 60.0, *FALLING[5:]]),
            r"rose above its first value \(9 at step 100\) to 60 at step 500; lower it",
        ),
        (run_with(held_out=6.7), "not been below that of guessing by frequency, 6.6 nats; recipes.find_rate"),
        (run_with(held_out=6.7)._replace(steps=300), "300 steps are few: plan 500 or more"),
        (run_with(held_out=20.0), "20 nats, and guessing blindly gives 9.011: the run has diverged"),
        (run_with(held_out=math.nan, vocabulary=None), "held-out loss was inf or NaN at step 1,200"),
        (run_with(trust_ratios=held_at(20.0)), "a: trust ratio above 4 since step 300"),
        (
            run_with(trust_ratios=held_at(2.0), options={"max_trust_ratio": 2.0}),
            r"1 of 3 layers .* max_trust_ratio=2 .* since step 300 \(a\): the bound",
        ),
        (run_with(last={"lamb/noise_scale": 5.0}), "much larger than the noise scale; recipes.critical_batch"),
        (run_with(last={"lamb/noise_scale": 6400.0}), "much smaller than the noise scale; saves no time"),
        (
            run_with(last={"lamb/noise_scale": 64.0, "lamb/batch_size": 1024}),  # of a schedule
            "much larger than the noise scale; 1,024 cost about 17 times",
        ),
    ],
)
def test_what_went_wrong_is_said(run: Run, message: str) -> None:
    """With the step, the value and what to do."""
    says(findings(run)[0], message)


def test_a_run_that_diverged_is_not_said_to_be_short() -> None:
    diverged = run_with([*FALLING[:4], 60.0, *FALLING[5:]], held_out=6.7)._replace(steps=300)
    rate, level = findings(diverged)
    assert "lower it" in rate
    assert "plan" not in level


def train(folder: Path, cls: type[Trainer] = LambTrainer, **options: Any) -> None:
    """Eight steps of a tiny model, by a script that is no recipe."""
    defaults: dict[str, Any] = {"max_steps": 8, "logging_steps": 1, "save_steps": 4, "report_to": [], "use_cpu": True}
    args = LambTrainingArguments(output_dir=str(folder), disable_tqdm=True, **defaults | options)
    model, data = split_batch.trained_model("mlm", folder / "start"), split_batch.FixedRows("mlm", 64, seed=0)
    cls(model=model, args=args, train_dataset=data).train()


def page_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "argv", ["run_report", str(folder)])
    run_report.main()
    page = (folder / "report.html").read_text()
    assert not re.findall(r"https?://|<script|<link|url\(", page)  # one file, that asks nobody for anything
    return page


def test_the_recipe_leaves_a_page(finished: Path) -> None:
    """With the pictures that lie beside it, and what the command line and the corpus were."""
    page = (finished / "report.html").read_text()
    assert "Step 8 of 8: the training is complete." in page
    assert page.count('<img src="data:image/png;base64,') == len(list(finished.glob("*.png")))
    assert "8 steps are few" in page
    assert (
        "No training loss has been logged: give a lower logging_steps." in page
    )  # Trainer's lines are 10 steps apart
    assert all(words in page for words in ("Command: python -m ", "<td>guessing by frequency</td>", "viewport"))
    assert not re.findall(r"https?://|<script|<link|url\(", page)


def test_a_stopped_run_of_the_recipe_has_one_too(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From its newest checkpoint, which says batch, rate and the loss of guessing; a phase of a plan has its own."""
    shutil.copytree(finished / "checkpoint-4", tmp_path / "phase-1/checkpoint-4")
    monkeypatch.setattr(sys, "argv", ["run_report", str(tmp_path)])
    run_report.main()
    page = (tmp_path / "phase-1/report.html").read_text()
    assert "Step 4 of 8: the run goes on, or it was stopped." in page
    record = json.loads((finished / "results.jsonl").read_text())
    for name, value in (
        ("global batch", "16"),
        ("peak learning rate", "0.02"),
        ("guessing by frequency", f"{record['unigram_loss']:.4g}"),
    ):
        assert f"<tr><td>{name}</td><td>{value}</td></tr>" in page
    *found, last = capsys.readouterr().out.splitlines()
    assert last == f"report: {tmp_path / 'phase-1/report.html'}"
    assert "4 steps are few" in found[0]


@pytest.mark.parametrize("cls", [LambTrainer, Trainer])
def test_the_run_of_another_script(cls: type[Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LambTrainer's has everything; a stock Trainer's has what it logs, and says what is not there."""
    train(tmp_path, cls, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    page, whole = page_of(tmp_path, monkeypatch), cls is LambTrainer
    assert page.count("<img") == (2 if whole else 1)
    assert ("Trust ratios: not there" in page) == (not whole)
    assert ("<td>global batch</td><td>8</td>" in page) == whole
    assert "<td>optimizer</td><td>lamb</td>" in page
    assert "frequency" not in page


def test_a_scripts_own_state_counts_if_it_is_newer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`trainer.save_state()` at the end of run_mlm.py and others."""
    older, newer = {"global_step": 4, "max_steps": 9, "log_history": []}, {"global_step": 9, "max_steps": 9}
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4/trainer_state.json").write_text(json.dumps(older))
    assert "Step 4 of 9" in page_of(tmp_path, monkeypatch)
    (tmp_path / "trainer_state.json").write_text(json.dumps(newer))
    assert "Step 9 of 9" in page_of(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (None, "there is no folder .*nowhere: give the output directory"),
        ({"notes.txt": ""}, "nowhere has no trainer_state.json, nor has a checkpoint in it: give"),
        ({"trainer_state.json": '{"global'}, r"trainer_state.json cannot be read \(.*\): give an earlier"),
        ({"trainer_state.json": "[]"}, "trainer_state.json is no state of a Trainer: give"),
        ({"trainer_state.json": "{}", "lamb_state.json": ""}, r"lamb_state.json cannot be read \(.*\): give"),
    ],
)
def test_a_folder_that_is_no_run_gets_one_line(
    files: dict[str, str] | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "nowhere"
    for name, text in (files or {}).items():
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    monkeypatch.setattr(sys, "argv", ["run_report", str(folder)])
    with one_line(SystemExit, message):
        run_report.main()
    assert not list(tmp_path.rglob("report.html"))
