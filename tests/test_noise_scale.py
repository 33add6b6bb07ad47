"""Protects the gradient noise scale: unbiased, the same however the batch is split, and nearly free."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_lamb import LambTrainer
from hf_lamb.trainer.noise_scale import NoiseScale, noise_scale_in_words
from tests.helpers import on_processes, says
from tests.scripts.noise_runs import DIMENSIONS, NOISE_SCALE, noise_trainer

KEY = "lamb/noise_scale"


def logged(trainer: LambTrainer) -> list[float]:
    return [line[KEY] for line in trainer.state.log_history if KEY in line]


def test_both_estimates_are_unbiased() -> None:
    """Noise and signal themselves, over many steps of a known Gaussian: within four standard errors."""
    torch.manual_seed(0)
    dimensions, mean, sigma, b, large_b = 10, 0.3, 2.0, 2, 8
    estimates = []
    for _ in range(4000):
        grads = mean + sigma * torch.randn(large_b, dimensions, dtype=torch.float64)
        scale = NoiseScale(decay=0.0)
        small, large = grads[:b].mean(0).square().sum(), grads.mean(0).square().sum()
        scale.update(small, 1 / b, large, 1 / large_b)
        assert scale.averages is not None
        estimates.append(scale.averages)
    seen = torch.stack(estimates)
    error = seen.std(0) / math.sqrt(len(seen))
    expected = torch.tensor([dimensions * sigma**2, dimensions * mean**2], dtype=torch.float64)
    assert ((seen.mean(0) - expected).abs() < 4 * error).all()


@pytest.mark.parametrize(("batch", "accumulation"), [(4, 4), (1, 16)])
def test_the_known_noise_scale_is_found(batch: int, accumulation: int, tmp_path: Path) -> None:
    """Through LambTrainer, clipping active (norms of around 3): within 10 % of the closed form over five seeds."""
    values = []
    for seed in range(5):
        trainer = noise_trainer(tmp_path, batch, accumulation, seed, max_steps=120)
        trainer.train()
        values.append(logged(trainer)[-1])
    mean = sum(values) / len(values)
    assert mean == pytest.approx(NOISE_SCALE, rel=0.1), values
    norm = math.sqrt(DIMENSIONS / NOISE_SCALE * (1 + NOISE_SCALE / 16))
    assert trainer.state.log_history[0]["grad_norm"] == pytest.approx(norm, rel=0.3)


@pytest.mark.distributed
@pytest.mark.parametrize(("what", "batch", "accumulation"), [("noise", 8, 1), ("noise", 2, 4), ("noise-each", 2, 4)])
def test_two_processes_find_it_too(what: str, batch: int, accumulation: int, tmp_path: Path) -> None:
    """Without accumulation from the gradients before DDP averages them, with `sync_each_batch` too, which averages
    those of every micro-batch; else from the first micro-batches."""
    on_processes(2, "tests.scripts.noise_runs", what, str(batch), str(accumulation), str(tmp_path / "log.json"))
    assert json.loads((tmp_path / "log.json").read_text())[-1] == pytest.approx(NOISE_SCALE, rel=0.2)


@pytest.mark.distributed
def test_a_communication_hook_and_the_noise_scale_work_together_or_a_line_says_why_not(tmp_path: Path) -> None:
    """With accumulation the value is found; without, one hook is one too few, and each process says so once."""
    on_processes(2, "tests.scripts.noise_runs", "noise-fp16", "2", "4", str(tmp_path / "log.json"))
    found = json.loads((tmp_path / "log.json").read_text())
    assert found["4"][-1] == pytest.approx(NOISE_SCALE, rel=0.2)
    assert found["1"] == []
    (line,) = found["warned"]
    says(line, "lamb/noise_scale is off: .*accumulation steps.*comm_hook fp16")


class Unweighted(LambTrainer):
    """The mean of each micro-batch, whatever its number of labels."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]


def test_the_first_micro_batchs_share_is_that_of_its_loss(tmp_path: Path) -> None:
    """A subclass's own means count the same, however many labels there are; the square of the norm is undone so."""
    trainer = noise_trainer(tmp_path, 4, 4, cls=Unweighted, max_steps=120)
    trainer.train_dataset.labelled = 0.3
    seen: list[float] = []
    update = trainer.noise_scale.update
    trainer.noise_scale.update = lambda *numbers: (seen.append(float(numbers[1])), update(*numbers))  # type: ignore
    trainer.train()
    assert seen == pytest.approx([1 / 4] * 120)


def test_a_last_micro_batch_that_is_not_full_counts_what_it_has(tmp_path: Path) -> None:
    """Ten rows as 8 + 2 in an epoch's only step: a global batch of 10, not of 16."""
    trainer = noise_trainer(tmp_path, 8, 2, max_steps=1)
    trainer.train_dataset.x = trainer.train_dataset.x[:10]
    seen: list[tuple[float, ...]] = []
    trainer.noise_scale.update = lambda *numbers: seen.append((float(numbers[1]), float(numbers[3])))  # type: ignore
    trainer.train()
    ((inverse_b, inverse_batch),) = seen
    assert (inverse_b, inverse_batch) == pytest.approx((1 / 8, 1 / 10))


def test_one_micro_batch_tells_nothing(tmp_path: Path) -> None:
    trainer = noise_trainer(tmp_path, 16, 1, max_steps=20)
    trainer.train()
    assert logged(trainer) == []


def test_it_can_be_switched_off(tmp_path: Path) -> None:
    trainer = noise_trainer(tmp_path, 4, 4, max_steps=20, log_noise_scale=False)
    trainer.train()
    assert logged(trainer) == []


def test_it_does_not_change_the_training(tmp_path: Path) -> None:
    """Bit for bit the same weights with and without."""
    weights = []
    for measured in (True, False):
        trainer = noise_trainer(tmp_path, 4, 4, max_steps=20, log_noise_scale=measured)
        trainer.train()
        weights.append(trainer.model.w.detach())
    assert torch.equal(*weights)


def test_the_host_waits_only_when_a_line_is_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The averages are read as often as there are log lines, checkpoints apart."""
    reads = []
    value = NoiseScale.value
    monkeypatch.setattr(NoiseScale, "value", lambda self: (reads.append(1), value(self))[1])
    trainer = noise_trainer(tmp_path, 4, 4, max_steps=40, logging_steps=20)
    trainer.train()
    assert len(reads) == 2


def test_a_step_without_a_finite_gradient_is_left_out() -> None:
    scale = NoiseScale()
    scale.update(torch.tensor(3.0), 1.0, torch.tensor(2.0), 0.1)
    before = scale.value()
    scale.update(torch.tensor(float("nan")), 1.0, torch.tensor(2.0), 0.1)
    scale.update(torch.tensor(3.0), 0.1, torch.tensor(2.0), 0.1)  # all labels in one micro-batch: 1/b = 1/B
    assert scale.value() == before


def test_signal_below_the_noise_is_no_number() -> None:
    scale = NoiseScale()
    assert scale.value() is None
    scale.update(torch.tensor(1.0), 1.0, torch.tensor(0.01), 0.1)
    assert scale.value() is None


def test_a_resumed_run_logs_the_same(tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 40, "save_strategy": "steps", "save_steps": 20, "logging_steps": 5}
    whole = noise_trainer(tmp_path, 4, 4, **options)
    whole.train()
    resumed = noise_trainer(tmp_path, 4, 4, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    assert len(logged(whole)) == 8
    assert logged(resumed) == logged(whole)


@pytest.mark.parametrize(
    ("noise_scale", "batch", "words"),
    [
        (
            3000.0,
            32_768,
            "critical batch about 3k sequences: 32,768 cost about 12 times the fewest samples and 1.1 times",
        ),
        (3000.0, 64, "critical batch about 3k sequences: 64 cost about 1 times the fewest samples and 48 times"),
        (87.4, 256, "critical batch about 87 sequences: 256 cost about 3.9 times the fewest samples and 1.3 times"),
    ],
)
def test_in_words(noise_scale: float, batch: int, words: str) -> None:
    assert noise_scale_in_words(noise_scale, batch).startswith(words)
