"""Protects the comparison of optimizers: trials that mean what they say, and a report that claims no more."""

import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_lamb import Lamb
from recipes import compare_optimizers
from recipes.compare_optimizers import CompareArguments, Data, load_data, masked, noise_scale, train_bert
from recipes.lib.corpus import facts_of_corpus
from recipes.lib.optimizers import new_optimizer, rate_factor, trust_ratios
from recipes.study import compare_report
from recipes.study.compare_report import Cell, fitted, rows_of, steps_to, target_rows
from recipes.study.sweep import Record, Trial, Tuned, read_records, trial_of
from tests.helpers import compare, torchrun

SMALL = ["--use_cpu", "True", "--optimizers", "lamb", "adamw", "--batch_sizes", "4", "8", "--vocab_size", "400"]
SMALL += ["--max_seq_length", "16", "--train_sequences", "64", "--micro_batch_size", "4", "--eval_sequences", "16"]
SMALL += ["--evaluations", "2", "--seeds", "2", "--min_steps", "10"]


@pytest.fixture(scope="module")
def study(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole study that takes seconds."""
    output = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as monkeypatch:
        compare(monkeypatch, *SMALL, "--corpus", str(texts), "--output_dir", str(output))
    return output


@pytest.fixture(scope="module")
def data(texts: Path) -> tuple[CompareArguments, Data]:
    arguments = CompareArguments(
        corpus=[str(texts)], vocab_size=400, max_seq_length=16, train_sequences=64, batch_sizes=[8], eval_sequences=16
    )
    arguments.evaluations = 2
    return arguments, load_data(arguments, torch.device("cpu"))


# -- a study ----------------------------------------------------------------------------------------------------------


def test_every_trial_is_a_line_with_all_that_was_chosen(study: Path) -> None:
    records = read_records(study / "trials.jsonl")
    assert len(records) == len(set(map(trial_of, records))) >= 2 * 2 * 4 + 2 * 2 * 2
    for record in records:
        assert record["command"].startswith("python -m ")
        assert record["study"]["train_sequences"] == 64
        assert record["steps"] == 64 // record["setting"]
        assert [step for step, _ in record["curve"]] == [record["steps"] // 2, record["steps"]]
        assert record["objective"] == record["curve"][-1][1]
        assert bool(record["noise"]) == (record["setting"] == 8)  # the batch that is accumulated
        assert len(record["trust_ratios"]) == 2
        assert all(len(ratios) == 10 for ratios in record["trust_ratios"])


def test_the_page_asks_nobody_for_anything(study: Path) -> None:
    """Styles and pictures are inside, and every picture that was drawn is there."""
    page = (study / "report.html").read_text()
    assert not re.findall(r"https?://|<script|<link|url\(", page)
    drawn = {"u_curves", "best_loss", "to_target", "regret", "trust_ratios", "noise_scale"}
    assert {path.stem for path in study.glob("*.png")} == drawn
    assert page.count('<img src="data:image/png;base64,') == len(drawn)
    assert page.count("too few steps") == 2 * 2  # batch 8 has 8 steps, of 10 that were asked for
    assert "viewport" in page


def test_nothing_runs_twice(study: Path, texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(compare_optimizers, "train_bert", lambda *_, **__: pytest.fail("trained again"))
    monkeypatch.setattr(compare_optimizers, "write_report", lambda study, records, *_: f"{len(records)} trials")
    before = (study / "trials.jsonl").read_bytes()
    compare(monkeypatch, *SMALL, "--corpus", str(texts), "--output_dir", str(study))
    assert (study / "trials.jsonl").read_bytes() == before
    assert capsys.readouterr().out == f"{len(before.splitlines())} trials\n"


def test_other_texts_in_the_same_files_are_another_study(texts: Path, tmp_path: Path) -> None:
    """The name of a folder does not tell; the embedded texts have nothing to tell apart."""
    shutil.copytree(texts, tmp_path / "texts")
    arguments = CompareArguments(corpus=[str(tmp_path / "texts")], batch_sizes=[8])
    before = compare_optimizers.facts_of(arguments)
    (tmp_path / "texts/more.txt").write_text("more")
    after = compare_optimizers.facts_of(arguments)
    assert {name for name in before if before[name] != after[name]} == {"content"}
    assert "content" not in compare_optimizers.facts_of(CompareArguments(batch_sizes=[8]))
    assert facts_of_corpus(["a/hub-dataset"], streaming=True) == {}, "a stream is not downloaded for this"


def test_the_report_of_an_unfinished_study_says_so(
    study: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Also where an optimizer diverged in every trial."""
    lines = (study / "trials.jsonl").read_text().splitlines(keepends=True)
    arguments = [*SMALL, "--corpus", str(texts), "--output_dir", str(tmp_path), "--report_only", "True"]
    (tmp_path / "trials.jsonl").write_text("".join(lines[:3]))
    compare(monkeypatch, *arguments)
    assert "3 trials in" in capsys.readouterr().out
    diverged = {"objective": None, "curve": [], "trust_ratios": [], "noise": []}
    records = [json.loads(line) for line in lines[:-1]]
    records = [record | diverged if record["optimizer"] == "adamw" else record for record in records]
    (tmp_path / "trials.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    compare(monkeypatch, *arguments)
    out = capsys.readouterr().out
    assert re.search(r"Not complete: \d of 4 combinations still miss trials", out)
    assert "| 4 | 16 | LAMB |" in out


@pytest.mark.slow
def test_five_kills_of_the_recipe(study: Path, texts: Path, tmp_path: Path) -> None:
    """SIGKILL at random moments; in the end the same trials with the same losses, each once."""
    rng = random.Random(0)
    command = [sys.executable, "-m", "recipes.compare_optimizers", *SMALL]
    command += ["--corpus", str(texts), "--output_dir", str(tmp_path)]
    trials, whole = tmp_path / "trials.jsonl", read_records(study / "trials.jsonl")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for kill in range(5):
        with (tmp_path / "log").open("ab") as log:
            run = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        end = time.monotonic() + 120
        while not trials.exists() or len(trials.read_text().splitlines()) < (kill + 1) * len(whole) // 7:
            assert run.poll() is None
            assert time.monotonic() < end
            time.sleep(0.002)
        time.sleep(rng.random() / 4)
        run.send_signal(signal.SIGKILL)
        assert run.wait(timeout=60) == -signal.SIGKILL
        read_records(trials)
    subprocess.run(command, check=True, capture_output=True, env=environment, timeout=240)
    losses = [{trial_of(r): r["curve"] for r in records} for records in (whole, read_records(trials))]
    assert len(read_records(trials)) == len(whole)
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_two_processes_run_the_same_study(study: Path, texts: Path, tmp_path: Path) -> None:
    """The same trials with the same losses, and one report."""
    torchrun(2, "recipes.compare_optimizers", *SMALL, "--corpus", str(texts), "--output_dir", str(tmp_path))
    runs = [{trial_of(r): r["curve"] for r in read_records(folder / "trials.jsonl")} for folder in (study, tmp_path)]
    assert runs[0] == runs[1]
    assert (tmp_path / "report.html").exists()


# -- a trial ----------------------------------------------------------------------------------------------------------


def test_a_trial_does_not_depend_on_the_micro_batch(data: tuple[CompareArguments, Data]) -> None:
    """Nor does it depend on anything that is not in its record: the second run equals the first to the bit."""
    arguments, tensors = data
    trial = Trial("lamb", 8, 0.02, 1)
    curves = []
    for micro_batch_size in (8, 8, 2):
        arguments.micro_batch_size = micro_batch_size
        curves.append([loss for _, loss in train_bert(trial, lambda text: None, arguments, tensors)["curve"]])
    assert curves[0] == curves[1]
    assert curves[0] == pytest.approx(curves[2], abs=2e-4)


def test_a_diverging_trial_is_recorded_as_one(data: tuple[CompareArguments, Data]) -> None:
    arguments, tensors = data
    record = train_bert(Trial("sgd", 8, 1e30, 1), lambda text: None, arguments, tensors)
    assert record["objective"] is None
    assert json.dumps(record, allow_nan=False)


def test_masks_are_berts(data: tuple[CompareArguments, Data]) -> None:
    """15 % chosen, 80 : 10 : 10; special tokens never, every row at least once."""
    _, tensors = data
    tokenizer = tensors.tokenizer
    ids = torch.randint(5, 400, (2000, 32), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, -1] = tokenizer.cls_token_id, tokenizer.sep_token_id
    special = torch.tensor(tokenizer.all_special_ids)
    batch = masked(ids, tokenizer, special, 0.15, torch.Generator().manual_seed(1))
    chosen = batch["labels"] != -100
    assert bool(chosen.any(dim=1).all())
    assert not bool(chosen[:, [0, -1]].any())
    assert torch.equal(batch["labels"][chosen], ids[chosen])
    assert torch.equal(batch["input_ids"][~chosen], ids[~chosen])
    assert chosen[:, 1:-1].float().mean().item() == pytest.approx(0.15, abs=0.01)
    inputs = batch["input_ids"][chosen]
    assert (inputs == tokenizer.mask_token_id).float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert (inputs == ids[chosen]).float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert not bool(torch.isin(inputs[inputs != tokenizer.mask_token_id], special).any())


def test_the_rate_rises_and_falls_in_straight_lines() -> None:
    factors = [rate_factor(step, 20) for step in range(20)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[-1] == pytest.approx(1 / 18)
    assert rate_factor(0, 1) == 1


def test_adamws_shadow_is_lambs_trust_ratio() -> None:
    """On the same weights and gradients, which a rate of zero keeps the same over three steps."""
    found = []
    for name in ("lamb", "adamw"):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 3))
        optimizer = new_optimizer(name, model, 0.0, weight_decay=0.1)
        for _ in range(3):
            model(torch.randn(6, 5)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(trust_ratios(optimizer, model))
    assert found[0].keys() == found[1].keys() == {"0.weight", "2.weight"}
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_the_optimizers_are_what_their_names_say() -> None:
    """Biases never decay, Adam's weights neither."""
    model = torch.nn.Linear(2, 2)
    made = {name: new_optimizer(name, model, 0.1, 0.01) for name in ("lamb", "adamw", "adam", "sgd")}
    assert [type(optimizer) for optimizer in made.values()] == [
        Lamb,
        torch.optim.AdamW,
        torch.optim.Adam,
        torch.optim.SGD,
    ]
    decays = {name: [group["weight_decay"] for group in o.param_groups] for name, o in made.items()}
    assert decays == {"lamb": [0.01, 0.0], "adamw": [0.01, 0.0], "adam": [0], "sgd": [0.01, 0.0]}
    assert all(group["eps"] == 1e-6 for name in ("lamb", "adamw", "adam") for group in made[name].param_groups)
    assert made["sgd"].param_groups[0]["nesterov"]
    assert made["adamw"].param_groups[0]["fused"]


def test_the_noise_scale_of_known_noise() -> None:
    """Gradients of norm 2 with noise of trace 40 a sequence: batches of 4 and 32, a noise scale of 10."""
    torch.manual_seed(0)
    gradient, noise = torch.ones(100) * 0.2, math.sqrt(40 / 100)
    norms = []
    for _ in range(4000):
        small = gradient + noise * torch.randn(100) / math.sqrt(4)
        rest = gradient + noise * torch.randn(100) / math.sqrt(28)
        norms.append((small.square().sum(), (small * 4 / 32 + rest * 28 / 32).square().sum()))
    assert noise_scale(norms, 4, 32) == pytest.approx(10, rel=0.05)
    assert noise_scale([(torch.tensor(9.0), torch.tensor(1.0))], 4, 32) is None


# -- what is concluded ------------------------------------------------------------------------------------------------


def cell(optimizer: str, batch_size: int, steps: int, losses: list[float], curve: Any = ()) -> Cell:
    runs: list[Record] = [{"objective": loss, "curve": curve, "steps": steps} for loss in losses]
    return Cell(optimizer, batch_size, steps, Tuned(0.1, losses[0], 4, True), runs, 0.1, runs)


def test_ties_are_called_ties() -> None:
    """And the lowest is called so only when nothing ties with it; with too few steps nothing is called anything."""
    lamb, adamw, sgd = [5.0, 5.1, 5.2], [5.1, 5.2, 5.3], [6.0, 6.1, 6.2]
    cells = [cell("sgd", 8, 500, sgd), cell("lamb", 8, 500, lamb), cell("adamw", 8, 500, adamw)]
    rows = rows_of(cells, min_steps=500)
    assert [row[2] for row in rows] == ["LAMB", "AdamW", "SGD"]
    assert [row[6] for row in rows] == ["tie", "tie", "+1.000"]
    assert [row[6] for row in rows_of(cells[:2], min_steps=500)] == ["lowest", "+1.000"]
    assert {row[6] for row in rows_of(cells, min_steps=501)} == {"too few steps"}


def test_a_best_rate_on_the_edge_is_marked() -> None:
    on_the_edge = cell("lamb", 8, 500, [5.0, 5.1])._replace(best=Tuned(0.1, 5.0, 4, interior=False))
    (row,) = rows_of([on_the_edge], 1)
    assert row[4] == "0.1 (edge)"


def test_steps_to_a_target() -> None:
    """On a straight line between evaluations; None where it is not reached; no guess before the first one."""
    curve = [(10, 6.0), (20, 5.0), (30, 5.5), (40, 4.0)]
    assert steps_to(5.25, curve) == 17.5
    assert steps_to(4.5, curve) == pytest.approx(30 + 10 * 2 / 3)
    assert steps_to(6.5, curve) == 10
    assert steps_to(3.9, curve) is None


def test_what_is_not_reached_is_said_to_take_longer() -> None:
    reached, missed = [(10, 6.0), (20, 5.0)], [(10, 6.0), (20, 5.9)]
    cells = [cell("lamb", 8, 20, [5.0, 5.0], reached), cell("adamw", 8, 20, [5.9, 5.9], missed)]
    rows = target_rows(cells, target=5.5)
    assert rows == [["8", "LAMB", "15 ± 0", "120"], ["8", "AdamW", "> 20", "> 160"]]


def test_the_hyperbola_of_known_points() -> None:
    """E = 1000 + 5 B gives a critical batch of 200; two points, or falling ones, give none."""
    sizes = [8, 64, 512]
    fit = fitted(sizes, [1000 + 5 * b for b in sizes])
    assert fit is not None
    assert (fit.e_min, fit.s_min, fit.largest, fit.b_crit) == pytest.approx((1000, 5, 512, 200))
    assert fitted([8, 64], [1040, 1320]) is None
    assert fitted(sizes, [1000, 900, 500]) is None


def test_where_the_carried_rate_is_the_best_it_costs_nothing() -> None:
    assert compare_report.standard_error(cell("lamb", 8, 500, [5.0, 5.1])) == 0


# -- bad input --------------------------------------------------------------------------------------------------------

BAD = [
    (["--optimizers", "adam"], "--optimizers adam: expected some of lamb, adamw, sgd"),
    (["--batch_sizes", "8", "4"], "--batch_sizes 8 4: expected different sizes, from small to large"),
    (["--batch_sizes", "4", "6"], "--batch_sizes 6 is no multiple of --micro_batch_size 4"),
    (["--batch_sizes", "64"], "--batch_sizes 64: --train_sequences 64 are 1 steps, fewer than --evaluations 2"),
    (
        ["--batch_sizes", "65536", "--train_sequences", "999999"],
        r"65536 is more than the corpus' \d+ training sequences of 16 tokens: leave it out",
    ),
    (["--seeds", "1"], "--seeds 1: expected at least 2, or nothing is known about the spread"),
    (["--corpus", "missing.txt"], "there is no file 'missing.txt'"),
    (["--report_only", "True"], "there is no trial in .*: run without --report_only first"),
    (["--vocab_size", "5"], "vocab_size=5 is below"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_gets_one_line(
    arguments: list[str], message: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is wrong, the value, the remedy; nothing is written."""
    output = tmp_path / "out"
    with pytest.raises(SystemExit) as exit_:
        compare(monkeypatch, *SMALL, "--corpus", str(texts), "--output_dir", str(output), *arguments)
    (line,) = str(exit_.value).splitlines()
    assert re.search(message, line), line
    assert not list(output.rglob("*.*"))
