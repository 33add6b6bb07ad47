"""Protects the study of `compare_optimizers --study`: its order, what is carried, and that it can be stopped."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from recipes import compare_optimizers
from recipes.lib.optimizers import Muon, new_optimizer
from recipes.study import batch_report
from recipes.study.batch_study import FIRST_RATES, HALF_LIFE, beta2_of, runs_of, sequences_for, study_of
from recipes.study.sweep import TUNING_SEED, Record, Trial, read_records, trial_of
from recipes.study.workers import spawn
from tests.helpers import compare

SMALL = ["--study", "--optimizers", "lamb", "muon", "--batch_sizes", "4", "16", "--size", "smoke"]
SMALL += ["--vocab_size", "400", "--max_seq_length", "16", "--train_sequences", "64", "--micro_batch_size", "4"]
SMALL += ["--eval_sequences", "16", "--evaluations", "2", "--seeds", "2"]


@pytest.fixture(scope="module")
def study(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole study that takes seconds."""
    output = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as monkeypatch:
        compare(monkeypatch, *SMALL, "--corpus", str(texts), "--output_dir", str(output))
    return output


def loss(trial: Trial) -> float:
    """A bowl around a rate that grows more slowly than the square root of the batch."""
    best = 2 * FIRST_RATES[HALF_LIFE.get(trial.optimizer, trial.optimizer)] * (trial.setting / 16) ** 0.25
    return 5 + math.log2(trial.learning_rate / best) ** 2 + 0.01 * trial.seed


STUDY = {"size": "micro", "vocab_size": 2048, "corpus": ["embedded"], "train_sequences": 256_000, "max_seq_length": 32}


def record_of(trial: Trial, objective: float | None) -> Record:
    """A line whose loss falls in a straight line, from a nat above where it ends."""
    steps = 256_000 // trial.setting
    curve = [] if objective is None else [(steps // 2, objective + 0.5), (steps, objective)]
    facts = {"unigram_loss": 6.4, "parameters": 239_680, "hardware": "a CPU", "study": STUDY}
    return {**trial._asdict(), "objective": objective, "steps": steps, "curve": curve, **facts}


def finished(search: Any, objective: Callable[[Trial], float | None], most: int = 500) -> list[Record]:
    """The records of a whole study, or of its start, in the order in which one process runs the trials."""
    records: list[Record] = []
    while (trials := search.next_trials(records)) and len(records) < most:
        assert search.expected(records) >= len(records)
        records.append(record_of(trials[0], objective(trials[0])))
    assert trials or search.expected(records) == len(records)
    return records


WHOLE = study_of(list(FIRST_RATES), [16, 128, 512], 3)


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return finished(WHOLE, loss)


# -- the search -------------------------------------------------------------------------------------------------------


def test_the_smallest_and_the_largest_batch_are_tuned_first(records: list[Record]) -> None:
    """Then all seeds of these, one after the other, so that a study that is stopped has something of everything."""
    order = [(t.setting, t.seed) for t in map(trial_of, records)]
    stages = list(dict.fromkeys(order))
    assert stages == [
        (16, 0),
        (512, 0),
        *((b, s) for s in (1, 2, 3) for b in (16, 512)),
        *((128, s) for s in range(4)),
    ]


def test_everybody_is_tuned_alike(records: list[Record]) -> None:
    trials = [trial_of(record) for record in records]
    for batch_size in (16, 128, 512):
        tuning = [t.optimizer for t in trials if t.setting == batch_size and t.seed == TUNING_SEED]
        assert len({tuning.count(optimizer) for optimizer in FIRST_RATES}) == 1


def test_the_carried_rate_runs_untuned_with_beta2_fixed_and_carried(records: list[Record]) -> None:
    """A factor of the square root above the best rate of the smallest batch; with the seeds of all other rates."""
    trials = [trial_of(record) for record in records]
    for name in (*FIRST_RATES, *HALF_LIFE):
        best = 2 * FIRST_RATES[HALF_LIFE.get(name, name)]
        for batch_size in (128, 512):
            carried = pytest.approx(best * math.sqrt(batch_size / 16))
            seeds = [
                t.seed
                for t in trials
                if t[:2] == (name, batch_size) and t.learning_rate == carried and t.seed != TUNING_SEED
            ]
            assert seeds == [1, 2, 3]


def test_carried_beta2_forgets_after_as_many_sequences() -> None:
    """Half of a gradient's weight is gone after ln(1/2)/ln(β₂) steps: equally many sequences at every batch size."""
    fixed, carried = (beta2_of(Trial(name, 512, 0.1, 1), 16) for name in ("lamb", "lamb_half_life"))
    assert fixed == 0.999
    assert math.log(0.5) / math.log(carried) * 512 == pytest.approx(math.log(0.5) / math.log(fixed) * 16)


# -- Muon -------------------------------------------------------------------------------------------------------------


def test_muon_steps_hidden_matrices_and_adamw_the_rest() -> None:
    """Every parameter once; embeddings, the output layer, biases and norms are AdamW's."""
    model = torch.nn.ModuleDict({"embeddings": torch.nn.Embedding(7, 4), "hidden": torch.nn.Linear(4, 4)})
    model["norm"] = torch.nn.LayerNorm(4)
    muon, adamw = new_optimizer("muon", model, 0.1).optimizers
    assert [p.shape for group in muon.param_groups for p in group["params"]] == [(4, 4)]
    assert sum(p.numel() for group in adamw.param_groups for p in group["params"]) == 28 + 4 + 8
    assert {group["weight_decay"] for o in (muon, adamw) for group in o.param_groups} == {0.0, 0.01}


def test_muon_in_float32_is_torchs_muon() -> None:
    """To the rounding of bfloat16, which one step alone differs by."""
    generator = torch.Generator().manual_seed(0)
    start, gradient = torch.randn(2, 24, 8, generator=generator)
    moved = []
    for kind in (torch.optim.Muon, Muon):
        weight = torch.nn.Parameter(start.clone())
        weight.grad = gradient.clone()
        kind([weight], lr=1.0, weight_decay=0.0).step()
        assert torch.equal(weight.grad, gradient)
        moved.append(weight.detach() - start)
    assert ((moved[0] - moved[1]).norm() / moved[0].norm()).item() < 0.02
    assert not torch.equal(*moved)


# -- the report -------------------------------------------------------------------------------------------------------


def in_words(search: Any, records: list[Record]) -> str:
    return "\n".join(text for texts in batch_report.sections(search, records).values() for text in texts)


def test_a_table_that_lacks_trials_says_which(records: list[Record]) -> None:
    """Before the first trial, while the smallest batch is tuned, while seeds run; one seed judges nothing."""
    assert "Not run" in in_words(WHOLE, [])
    assert "Missing" not in in_words(WHOLE, records)
    assert "Missing: batch 16: tuning, and all that follows from it; batch 128" in in_words(WHOLE, records[:5])
    tuning = sum(r["seed"] == TUNING_SEED and r["setting"] != 128 for r in records)
    text = in_words(WHOLE, records[:tuning])
    assert text.count("tuning only") == 2 * 4 + 4  # two batches tuned, one with carried rates
    assert "batch 512: runs with fresh seeds of LAMB 9, LAMB (fixed norm) 6, AdamW 9, Muon 6." in text
    assert not any(word in text for word in ("lowest", "| tie |", "± 0"))
    some = [record for record in records if (record["optimizer"], record["seed"]) != ("muon", 3)]
    missing = in_words(WHOLE, some).split("Missing: ")[1]
    assert "batch 16: runs with fresh seeds of Muon 1;" in missing


def test_the_regret_is_what_the_carried_rate_costs_with_the_same_seeds(records: list[Record]) -> None:
    """In the bowl it is a known number; beta2 changes nothing there."""
    results = batch_report.results_of(WHOLE, records)
    cell = next(c for c in results.whole if (c.optimizer, c.batch_size) == ("adamw", 512))
    found = batch_report.regret(cell.carried_runs, cell.runs)
    best, carried = (loss(Trial("adamw", 512, rate, 0)) for rate in (cell.best.learning_rate, cell.carried_rate))
    assert (found.mean, found.sd, found.n) == pytest.approx((carried - best, 0, 3))
    assert carried - best > 0.1
    both = batch_report.regret(results.half_life["adamw", 512], cell.carried_runs)
    assert both.mean == pytest.approx(0)


def test_losing_and_diverging_rows_stay() -> None:
    """Muon is far behind at 512 and diverges at 128: both stand in the table and in the sentences."""

    def worse(trial: Trial) -> float | None:
        if trial.optimizer != "muon" or trial.setting == 16:
            return loss(trial)
        return None if trial.setting == 128 else loss(trial) + 1

    text = in_words(WHOLE, finished(WHOLE, worse))
    rows = [line for line in text.splitlines() if "| Muon |" in line]
    assert any(row.startswith("| 128 |") and "diverged" in row for row in rows)
    assert any(row.startswith("| 512 |") and "+1.0" in row for row in rows)
    assert "Muon diverged" in text
    assert "Muon +1.0" in text


def test_a_study_in_which_everything_diverges_is_reported(tmp_path: Path) -> None:
    records = finished(WHOLE, lambda trial: None)
    text = in_words(WHOLE, records)
    assert text.count("| diverged |") >= len(FIRST_RATES) * len(WHOLE.settings)
    assert "nan" not in text
    batch_report.draw(batch_report.results_of(WHOLE, records), records, f"{tmp_path}/", 500, None)


def test_all_runs_reach_the_target_and_the_fit_goes_through_them(records: list[Record]) -> None:
    text = in_words(WHOLE, records)
    assert "which all runs reach" in text
    assert " > " not in text
    assert text.count("so B_crit = ") == len(FIRST_RATES)


def test_the_pictures_are_drawn(records: list[Record], tmp_path: Path) -> None:
    """Of a study that has only begun, the search alone."""
    for some, names in ((records[:3], {"search.png"}), (records, {"search.png", "panels.png"})):
        results = batch_report.results_of(WHOLE, some)
        assert set(batch_report.pictures_of(results)) == names
        batch_report.draw(results, some, f"{tmp_path}/", 500, None)
        assert {path.name for path in tmp_path.glob("*.png")} == names


# -- a run ------------------------------------------------------------------------------------------------------------


def test_every_trial_is_a_line(study: Path) -> None:
    """With all that was chosen, beta2 among it, and losses along the run."""
    records = read_records(study / "trials.jsonl")
    assert len(records) == len(set(map(trial_of, records)))
    assert {record["optimizer"] for record in records} == {"lamb", "muon", "lamb_half_life"}
    for record in records:
        assert record["study"]["carried_from"] == 4
        assert record["beta2"] == beta2_of(trial_of(record), 4)
        assert [step for step, _ in record["curve"]] == [record["steps"] // 2, record["steps"]]
        assert bool(record["noise"]) == (record["setting"] == 16)


@pytest.mark.slow
def test_two_workers_run_the_same_study(study: Path, texts: Path, tmp_path: Path) -> None:
    """The same trials with the same losses."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        compare(monkeypatch, *SMALL, "--workers", "2", "--corpus", str(texts), "--output_dir", str(tmp_path))
    runs = [{trial_of(r): r["curve"] for r in read_records(folder / "trials.jsonl")} for folder in (study, tmp_path)]
    assert runs[0] == runs[1]


@pytest.mark.slow
def test_workers_end_with_the_first_process(texts: Path, tmp_path: Path) -> None:
    """Also when that is killed from a shell that ignores Ctrl-C for it; what was finished is whole."""
    command = [sys.executable, "-m", "recipes.compare_optimizers", *SMALL, "--workers", "2"]
    command += ["--corpus", str(texts), "--output_dir", str(tmp_path)]
    shell = ["bash", "-c", 'trap "" INT; exec "$@"', "bash", *command]
    with (tmp_path / "log").open("wb") as log:
        first = subprocess.Popen(shell, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"})
    end, trials = time.monotonic() + 200, tmp_path / "trials.jsonl"
    while not trials.exists():
        assert first.poll() is None, (tmp_path / "log").read_text()
        assert time.monotonic() < end
        time.sleep(0.01)
    workers = psutil.Process(first.pid).children()
    first.kill()
    assert first.wait(timeout=60) == -signal.SIGKILL
    assert len(workers) >= 2
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive
    assert read_records(trials)


# -- on a GPU, rehearsed ----------------------------------------------------------------------------------------------


def test_trials_are_sized_by_their_cost() -> None:
    """The planned runs fill the time, at a thousandth of a second for a sequence and twice that with Muon."""
    cost = {(o, b): (2e-3 if o == "muon" else 1e-3) for o in FIRST_RATES for b in (16, 128, 512)}
    planned = runs_of(WHOLE)
    assert planned["lamb", 16] == planned["muon", 16] == 4 + 3
    assert (planned["lamb", 512], planned["muon", 512]) == (4 + 9, 4 + 6)
    sequences = sequences_for(WHOLE, 3600, cost)
    assert sequences % 512 == 0
    spent = [sum(planned[which] * cost[which] * n for which in planned) for n in (sequences, sequences + 512)]
    assert spent[0] <= 3600 < spent[1]


def test_visits_go_on_where_the_last_one_stopped(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one measures the speed; a visit whose time is over after a trial leaves the rest to the next one."""
    words = ["--study", "gpu", *SMALL[1:], "--train_sequences", "0", "--use_cpu", "True", "--corpus", str(texts)]
    words += ["--output_dir", str(tmp_path), "--visits", "1000"]
    really, measured = compare_optimizers.seconds_a_sequence, []

    def measure(*arguments: Any) -> float:
        measured.append(really(*arguments))
        return 0.01

    monkeypatch.setattr(compare_optimizers, "seconds_a_sequence", measure)
    for visit in (1, 2):
        compare(monkeypatch, *words, "--minutes", "0.001")
        records = read_records(tmp_path / "trials.jsonl")
        assert len(records) == visit
        # A minute in all, for 12 runs at batch 4 and 18 at batch 16: 200 sequences, in whole batches.
        assert {record["study"]["train_sequences"] for record in records} == {192}
    assert len(measured) == 2 * 2
    assert min(measured) > 0


BAD = [
    (["--optimizers", "sgd"], "--optimizers sgd: expected some of lamb, lamb_fixed_norm, adamw, muon"),
    (["--workers", "0"], "--workers 0: expected at least 1"),
    (["--minutes", "0"], "--minutes 0: expected a positive number"),
    (["--minutes", "nan"], "--minutes nan: expected a positive number"),
    (["--visits", "0"], "--visits 0: expected at least 1"),
    (["--train_sequences", "0"], "--train_sequences 0: expected at least 1"),
    (["--train_sequences", "0", "--minutes", "1", "--workers", "2"], "one process is measured, and there are 2"),
    (["--batch_sizes", "8", "16"], "holds trials with carried_from 4, not 8"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_input_gets_one_line(
    arguments: list[str], message: str, study: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as exit_:
        compare(monkeypatch, *SMALL, "--corpus", str(texts), "--output_dir", str(study), *arguments)
    (line,) = str(exit_.value).splitlines()
    assert message in line


def test_a_worker_ends_with_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    """What went wrong, such as a full disk, and not where in the code."""
    with pytest.raises(OSError, match="exit code 1: run the same command again"):
        spawn(refuse, "no space left on device", 2)
    said = capfd.readouterr().err
    assert "no space left on device" in said
    assert "Traceback" not in said


def refuse(reason: str, is_first: bool) -> None:
    raise OSError(reason)


def test_workers_are_not_started_by_processes_that_share_the_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit, match="--workers 2: accelerate or torchrun has started 3 processes"):
        compare(monkeypatch, *SMALL, "--workers", "2")


def test_trials_of_another_recipe_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also where their length would be read from them."""
    record = {**Trial("lamb", 16, 0.1, 0)._asdict(), "objective": 1.0, "study": {"epochs": 3}}
    (tmp_path / "trials.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(SystemExit, match="holds trials with study None, not 'gpu': give --output_dir"):
        compare(monkeypatch, "--study", "gpu", "--use_cpu", "True", "--output_dir", str(tmp_path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_study_of_a_gpu_needs_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="torch sees no GPU: give --use_cpu True to rehearse it"):
        compare(monkeypatch, "--study", "gpu", "--output_dir", str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())
