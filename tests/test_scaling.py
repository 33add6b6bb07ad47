"""Protects the rules that carry a learning rate from one batch size to another, and how LambTrainer uses them."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments, get_polynomial_decay_schedule_with_warmup

from hf_lamb import LambTrainer, LambTrainingArguments, options_in_force, scaling
from tests.helpers import on_processes, one_line
from tests.scripts import split_batch

# The LAMB paper's batch sizes, steps and learning rates 5 / (2**(k/2) * 1000) for BERT-Large.
PAPER = [(512 * 2**k, 1_000_000 // 2**k, 5e-3 / 2 ** ((6 - k) / 2)) for k in range(7)]


@pytest.mark.parametrize(("batch", "steps", "rate"), PAPER)
def test_the_square_root_rule_gives_every_rate_of_the_paper(batch: int, steps: int, rate: float) -> None:
    """From its 32k row down to 512, and the same norm-growth budget, 0.130, in all of them."""
    assert scaling.scaled_learning_rate(5e-3, 32_768, batch).learning_rate == pytest.approx(rate)
    assert scaling.norm_growth(rate, steps) == pytest.approx(0.130, abs=5e-4)


def test_linear_and_none() -> None:
    assert scaling.scaled_learning_rate(1e-3, 256, 1024, "linear").learning_rate == pytest.approx(4e-3)
    assert scaling.scaled_learning_rate(1e-3, 256, 1024, "none").learning_rate == 1e-3


def test_why_says_the_formula_with_its_numbers() -> None:
    why = scaling.scaled_learning_rate(1e-3, 256, 1024).why
    assert why == "learning rate 0.002 = 0.001 * sqrt(1,024 / 256)"


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_the_decay_is_the_polynomial_of_transformers(power: float) -> None:
    """Whose end is 1e-7 by default, ours 0: the rate rises to its peak and falls from there without a jump."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    theirs = get_polynomial_decay_schedule_with_warmup(optimizer, 20, 100, lr_end=0.0, power=power)
    assert isinstance(theirs, LambdaLR)
    for step in range(101):
        expected = theirs.lr_lambdas[0](step)
        assert scaling.decay_factor(step, 100, 20, power) == pytest.approx(expected)


def test_nvidias_jump_only_when_asked() -> None:
    """Phase 1 of NVIDIA's BERT-Large: 7,038 steps, 28.43 % of them warm-up, power 0.5."""
    steps, warmup = 7038, 2000
    asked = scaling.decay_factor(warmup, steps, warmup, 0.5, from_first_step=True)
    assert asked == pytest.approx(math.sqrt(1 - 0.2843), abs=2e-3)
    assert scaling.decay_factor(warmup, steps, warmup, 0.5) == 1
    for jump in (True, False):
        assert scaling.decay_factor(steps, steps, warmup, 0.5, jump) == 0
        assert scaling.decay_factor(warmup // 2, steps, warmup, 0.5, jump) == 0.5
        assert scaling.decay_factor(steps + 1, steps, warmup, 0.5, jump) == 0


def test_norm_growth_is_what_orthogonal_steps_of_a_linear_decay_do() -> None:
    """log(‖w_T‖²/‖w_0‖²) of a vector that takes relative steps lr_t at right angles to itself."""
    rate, steps, square = 0.05, 400, 1.0
    for step in range(steps):
        square *= 1 + (rate * scaling.decay_factor(step, steps)) ** 2
    assert math.log(square) == pytest.approx(scaling.norm_growth(rate, steps), rel=0.01)


def test_the_warning_names_a_rate_that_keeps_to_the_budget() -> None:
    assert scaling.norm_growth_warning(1e-2, 15_625) is None  # ltg-bert's
    warning = scaling.norm_growth_warning(0.1, 1000)
    assert warning is not None
    assert "lr²T/3 = 3.3" in warning
    assert "use at most 0.042" in warning
    assert scaling.norm_growth_warning(0.042, 1000) is None


# -- in LambTrainingArguments and LambTrainer ------------------------------------------------------------------------

BAD: list[tuple[dict[str, Any], str]] = [
    ({"base_learning_rate": 1e-3}, "base_learning_rate 0.001 without base_batch_size: give both"),
    ({"base_batch_size": 256}, "base_batch_size 256 without base_learning_rate: give both"),
    ({"base_learning_rate": 1e-3, "base_batch_size": 0}, "base_batch_size 0: expected at least 1"),
    ({"base_learning_rate": -1.0, "base_batch_size": 256}, r"base_learning_rate -1\.0: expected a positive number"),
    ({"base_learning_rate": "1e-3", "base_batch_size": 256}, r"base_learning_rate '1e-3': .*write 1\.0e-3"),
    (
        {"learning_rate": 2e-3, "base_learning_rate": 1e-3, "base_batch_size": 256},
        r"learning_rate 0\.002 and base_learning_rate 0\.001 contradict",
    ),
    ({"learning_rate_scaling": "squrt"}, r"'squrt' \(did you mean sqrt\?\): expected one of sqrt, linear, none"),
    ({"max_steps": 10, "warmup_steps": 11}, "warmup_steps 11 is more than the run's 10 steps"),
    ({"decay_power": 0.0}, r"decay_power 0\.0: expected a positive number"),
    ({"decay_power": 0.5, "lr_scheduler_type": "cosine"}, "decay_power 0.5 and lr_scheduler_type cosine contradict"),
    ({"decay_from_first_step": True}, "decay_from_first_step without decay_power"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_contradictions_are_one_line_each(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with one_line(ValueError, message):
        LambTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **options)


def scaled_trainer(path: Path, **options: Any) -> LambTrainer:
    defaults = {"base_learning_rate": 4e-3, "base_batch_size": 64, "per_device_train_batch_size": 4, "max_steps": 6}
    defaults |= {"logging_steps": 1, "save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True}
    return LambTrainer(
        model=split_batch.trained_model("mlm", path / "start"),
        args=LambTrainingArguments(output_dir=str(path), **defaults | options),
        train_dataset=split_batch.FixedRows("mlm", 256, seed=0),
    )


def test_the_rate_follows_the_global_batch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Accumulation counts; one line says the rate and why, and the schedule of the optimizer starts from it."""
    with caplog.at_level(logging.INFO, logger="hf_lamb"):
        run = scaled_trainer(tmp_path, gradient_accumulation_steps=4)
        run.train()
    (line,) = [m for m in caplog.messages if "learning rate" in m]
    assert line.startswith("learning rate 0.002 = 0.004 * sqrt(16 / 64)")
    rates = [entry["learning_rate"] for entry in run.state.log_history if "loss" in entry]
    assert rates == pytest.approx([2e-3 * (1 - step / 6) for step in range(6)])
    assert options_in_force(run.optimizer)["learning_rate"] == pytest.approx(2e-3)


@pytest.mark.distributed
def test_processes_count_in_the_global_batch(tmp_path: Path) -> None:
    """Two processes of 8: a batch of 16, as that of 4 accumulated four times above, and the same rate."""
    on_processes(2, "tests.scripts.noise_runs", "rate", "8", "1", str(tmp_path / "rates.json"))
    rates = json.loads((tmp_path / "rates.json").read_text())
    assert rates == pytest.approx([2e-3, 2e-3 * 2 / 3, 2e-3 / 3])


@pytest.mark.distributed
def test_split_batches_are_dealt_out_not_multiplied(tmp_path: Path) -> None:
    """accelerate splits each batch of 16 between two processes: the global batch is 16 for rate, noise and card."""
    on_processes(2, "tests.scripts.noise_runs", "split_batches", "16", "1", str(tmp_path / "found.json"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["learning_rate"] == pytest.approx([2e-3, 2e-3 * 2 / 3, 2e-3 / 3])
    assert found["rows"] == 8
    assert found["noise_batch"] == 16
    assert "- global batch: 16 sequences = 8 x 1 accumulation steps x 2 processes\n" in found["card"]
    assert "- train_batch_size: 8\n" in found["card"]
    assert "- total_train_batch_size: 16\n" in found["card"]


def test_the_decay_of_the_arguments_reaches_the_optimizer(tmp_path: Path) -> None:
    run = scaled_trainer(tmp_path, warmup_steps=2, decay_power=0.5, decay_from_first_step=True)
    run.train()
    rates = [entry["learning_rate"] / 1e-3 for entry in run.state.log_history if "loss" in entry]
    assert rates == pytest.approx([0, 0.5, *((1 - step / 6) ** 0.5 for step in range(2, 6))])


ABSOLUTE_ENDS: list[dict[str, Any]] = [
    {},
    {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr": 1e-3}},
    {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"lr_end": 1e-3, "power": 1.0}},
]


@pytest.mark.parametrize("schedule", ABSOLUTE_ENDS, ids=["linear", "cosine_with_min_lr", "polynomial"])
def test_a_halved_micro_batch_gets_its_own_rate(schedule: dict[str, Any], tmp_path: Path) -> None:
    """auto_find_batch_size starts anew with half the micro-batch when memory runs out, as if it had begun so."""
    run = scaled_trainer(tmp_path, per_device_train_batch_size=64, auto_find_batch_size=True, **schedule)
    step, failures = run.training_step, iter([RuntimeError("CUDA out of memory.")])

    def training_step(*args: Any, **kwargs: Any) -> Any:
        for failure in failures:
            raise failure
        return step(*args, **kwargs)

    run.training_step = training_step  # type: ignore[method-assign]
    run.train()
    batch = run.state.train_batch_size
    assert batch < 64
    first = next(entry["learning_rate"] for entry in run.state.log_history if "loss" in entry)
    assert first == pytest.approx(4e-3 * math.sqrt(batch / 64))
    same = scaled_trainer(tmp_path, per_device_train_batch_size=batch, **schedule)
    same.train()
    rates = [[e["learning_rate"] for e in r.state.log_history if "loss" in e] for r in (run, same)]
    assert rates[0] == pytest.approx(rates[1], rel=1e-12)


def test_a_checkpoint_of_another_batch_keeps_its_rate_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Trainer restores the schedule with its peak; the line with the scaled rate must not stand alone."""
    scaled_trainer(tmp_path, save_strategy="steps", save_steps=3).train()
    with caplog.at_level(logging.WARNING, logger="hf_lamb"):
        scaled_trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert not any("uses the options" in message for message in caplog.messages)
        run = scaled_trainer(tmp_path, gradient_accumulation_steps=4)
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    (line,) = [message for message in caplog.messages if "uses the options" in message]
    assert ": learning_rate 0.001, not 0.002. To train with this run's options" in line
    assert run.state.log_history[3]["learning_rate"] == pytest.approx(1e-3 / 2)


def test_too_high_a_rate_is_said_before_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="hf_lamb"):
        scaled_trainer(tmp_path, base_learning_rate=8.0, max_steps=1).train()
    assert any("lr²T/3" in message for message in caplog.messages)


def test_plain_training_arguments_do(tmp_path: Path) -> None:
    """No base rate, no polynomial: Trainer's own, a line from the rate to zero."""
    args = TrainingArguments(
        output_dir=str(tmp_path), optim="lamb", max_steps=2, logging_steps=1, report_to=[], use_cpu=True
    )
    data, model = split_batch.FixedRows("mlm", 64, seed=0), split_batch.trained_model("mlm", tmp_path / "start")
    run = LambTrainer(model=model, args=args, train_dataset=data)
    run.train()
    assert [entry["learning_rate"] for entry in run.state.log_history if "loss" in entry] == [5e-5, 2.5e-5]
