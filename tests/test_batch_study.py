"""Protects the study of `compare_optimizers --study`: its order, what is carried, and that it can be stopped."""

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes import compare_optimizers
from recipes.lib.optimizers import Muon, new_optimizer
from recipes.study.batch_study import FIRST_RATES, HALF_LIFE, beta2_of, study_of
from recipes.study.sweep import TUNING_SEED, Record, Trial, read_records, trial_of

SMALL = ["--study", "--optimizers", "lamb", "muon", "--batch_sizes", "4", "16", "--size", "smoke"]
SMALL += ["--vocab_size", "400", "--max_seq_length", "16", "--train_sequences", "64", "--micro_batch_size", "4"]
SMALL += ["--eval_sequences", "16", "--evaluations", "2", "--seeds", "2"]


def compare(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["compare_optimizers", *arguments])
    compare_optimizers.main()


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


def run(search: Any) -> list[Trial]:
    """The trials of a whole study, in the order in which one process runs them."""
    records: list[Record] = []
    while trials := search.next_trials(records):
        assert search.expected(records) >= len(records)
        records.append({**trials[0]._asdict(), "objective": loss(trials[0])})
    assert search.expected(records) == len(records)
    return [trial_of(record) for record in records]


# -- the search -------------------------------------------------------------------------------------------------------


def test_the_smallest_and_the_largest_batch_are_tuned_first() -> None:
    """Then all seeds of these, one after the other, so that a study that is stopped has something of everything."""
    order = [(t.setting, t.seed) for t in run(study_of(list(FIRST_RATES), [16, 128, 512], 3))]
    stages = list(dict.fromkeys(order))
    assert stages == [
        (16, 0),
        (512, 0),
        *((b, s) for s in (1, 2, 3) for b in (16, 512)),
        *((128, s) for s in range(4)),
    ]


def test_everybody_is_tuned_alike() -> None:
    trials = run(study_of(list(FIRST_RATES), [16, 128, 512], 3))
    for batch_size in (16, 128, 512):
        tuning = [t.optimizer for t in trials if t.setting == batch_size and t.seed == TUNING_SEED]
        assert len({tuning.count(optimizer) for optimizer in FIRST_RATES}) == 1


def test_the_carried_rate_runs_untuned_with_beta2_fixed_and_carried() -> None:
    """A factor of the square root above the best rate of the smallest batch; with the seeds of all other rates."""
    trials = run(study_of(list(FIRST_RATES), [16, 128, 512], 3))
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


BAD = [
    (["--optimizers", "sgd"], "--optimizers sgd: expected some of lamb, lamb_fixed_norm, adamw, muon"),
    (["--workers", "0"], "--workers 0: expected at least 1"),
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
