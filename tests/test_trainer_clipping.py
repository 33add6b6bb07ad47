"""Protects clipping in LambTrainer: one look by the optimizer gives what Trainer's clipping gives; where it could not,
Trainer clips."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from hf_lamb import Lamb, LambTrainer, LambTrainingArguments
from hf_lamb.backends import compiled, cpu, eager, foreach
from tests.scripts import split_batch

STEPS = 4


class StockClipping(LambTrainer):
    """A subclass that overrides the hook, here with what a stock Trainer does."""

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return Trainer._clip_grad_norm(self, model)


def trainer(path: Path, cls: type[Trainer] = LambTrainer, optimizer: Any = None, **options: Any) -> Trainer:
    """Of a small masked LM. With its eps Adam does not undo the clipping; the norms are around 1."""
    defaults: dict[str, Any] = {"max_steps": STEPS, "logging_steps": 1, "save_strategy": "no", "report_to": []}
    defaults |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 1e-2}
    defaults |= {"use_cpu": True, "disable_tqdm": True, "max_grad_norm": 0.3, "adam_epsilon": 1e-1}
    model, callbacks = options.pop("model", None), options.pop("callbacks", None)
    model = model or split_batch.trained_model("mlm", path.parent / "start")
    return cls(
        model=model,
        args=LambTrainingArguments(output_dir=str(path), **defaults | options),
        train_dataset=split_batch.FixedRows("mlm", 64, seed=0),
        optimizers=(optimizer(model) if optimizer else None, None),
        callbacks=callbacks,
    )


def weights(run: Trainer) -> list[Tensor]:
    return [param.detach() for param in run.model.parameters()]


def logged(run: Trainer, key: str) -> list[float]:
    return [line[key] for line in run.state.log_history if key in line]


def assert_equal_runs(run: Trainer, other: Trainer) -> None:
    for a, b in zip(weights(run), weights(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for key in ("loss", "grad_norm", "lamb/noise_scale", "lamb/trust_ratio_median"):
        assert logged(run, key) == pytest.approx(logged(other, key), rel=1e-5), key
    assert len(logged(run, "grad_norm")) == len(logged(run, "loss")) > 0


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What reads all gradients: "lamb" for each bucket, "clip_grad_norm_" for torch's, which Trainer's clipping calls.
    (The backends' classes are not public: the C kernel's reads are no operations of torch.)"""
    seen: list[str] = []

    def spy(owner: Any, function: str, name: str) -> None:
        stock = getattr(owner, function)

        def counted(*args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            return stock(*args, **kwargs)

        monkeypatch.setattr(owner, function, counted)

    for kind in (eager.Eager, foreach.Foreach, cpu.CPU, compiled.Compiled):
        spy(kind, "squared_gradients", "lamb")
    spy(torch.nn.utils, "clip_grad_norm_", "clip_grad_norm_")
    return seen


def buckets_of(run: Trainer) -> int:
    """Of adapting and other parameters, all of one dtype."""
    return len(run.optimizer.param_groups)


@pytest.mark.parametrize("max_grad_norm", [0.3, 1e3, 0.0])
def test_weights_and_log_are_those_of_trainers_clipping(max_grad_norm: float, tmp_path: Path) -> None:
    """Losses, norms, noise scale and trust ratios as logged: thresholds below and above the norm, and none."""
    run, other = (trainer(tmp_path / "out", cls, max_grad_norm=max_grad_norm) for cls in (LambTrainer, StockClipping))
    run.train()
    other.train()
    assert_equal_runs(run, other)
    assert min(logged(run, "grad_norm")) > 0.35, "clipping was not active"


@pytest.mark.parametrize("max_grad_norm", [0.3, 0.0])
def test_a_step_looks_at_the_gradients_once(max_grad_norm: float, tmp_path: Path, looks: list[str]) -> None:
    """For clipping, the logged norm and `skip_nonfinite` together. The noise scale, which is off, looks at others."""
    run = trainer(tmp_path / "out", max_grad_norm=max_grad_norm, log_noise_scale=False)
    run.train()
    assert looks == ["lamb"] * (STEPS * buckets_of(run))


def test_a_subclass_that_clips_keeps_its_clipping(tmp_path: Path, looks: list[str]) -> None:
    run = trainer(tmp_path / "out", StockClipping)
    run.train()
    assert looks.count("clip_grad_norm_") == STEPS
    assert looks.count("lamb") == STEPS * buckets_of(run)


class ByValue(Trainer):
    """Another library's Trainer, with another kind of clipping."""

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        nn.utils.clip_grad_value_(model.parameters(), 1e-3)
        return None  # then Trainer computes the norm


class LambByValue(LambTrainer, ByValue):
    """LambTrainer first, so that its hooks are called before those of the mix-in."""


def test_a_mixed_in_trainer_keeps_its_clipping(tmp_path: Path, looks: list[str]) -> None:
    run = trainer(tmp_path / "out", LambByValue)
    run.train()
    assert looks.count("clip_grad_norm_") == STEPS  # with threshold inf, for the log
    assert max(logged(run, "grad_norm")) < 0.3


class Forgetful(LambTrainer):
    """It calls the method that it overrides, but does not return the norm."""

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        super()._clip_grad_norm(model)


def test_a_subclass_that_returns_no_norm_is_clipped_too(tmp_path: Path) -> None:
    run, other = trainer(tmp_path / "out", Forgetful), trainer(tmp_path / "out", StockClipping)
    run.train()
    other.train()
    for a, b in zip(weights(run), weights(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


class Writes(TrainerCallback):
    """Freezes rows of the embeddings, as callbacks do that mask gradients; their part of the norm is large."""

    def on_pre_optimizer_step(self, *args: Any, model: nn.Module, **kwargs: Any) -> None:
        model.get_input_embeddings().weight.grad[: split_batch.VOCAB // 2] = 0


class ClipsAfterWriting(LambTrainer):
    """What is expected then: stock clipping of what the callback left."""

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        Writes().on_pre_optimizer_step(model=model)
        return Trainer._clip_grad_norm(self, model)


def test_what_a_callback_writes_is_clipped(tmp_path: Path, looks: list[str]) -> None:
    run = trainer(tmp_path / "out", callbacks=[Writes()], log_noise_scale=False)
    run.train()
    assert looks == ["lamb"] * (2 * STEPS * buckets_of(run))
    other = trainer(tmp_path / "out", ClipsAfterWriting)
    other.train()
    for a, b in zip(weights(run), weights(other), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert logged(run, "grad_norm") != pytest.approx(logged(other, "grad_norm"), rel=1e-3), "the write is too small"


def all_but_the_embeddings(model: nn.Module) -> Lamb:
    rest = [(name, param) for name, param in model.named_parameters() if "embeddings" not in name]
    return Lamb(rest, lr=1e-2, eps=1e-1)


def with_one_of_its_own(model: nn.Module) -> Lamb:
    return Lamb([*model.parameters(), nn.Parameter(torch.ones(2))], lr=1e-2, eps=1e-1)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-1)


@pytest.mark.parametrize("optimizer", [all_but_the_embeddings, with_one_of_its_own, adamw])
def test_otherwise_trainer_clips(
    optimizer: Callable[[nn.Module], torch.optim.Optimizer], tmp_path: Path, looks: list[str]
) -> None:
    """Its norm is that of the model's gradients: a Lamb of other parameters has another one."""
    run = trainer(tmp_path / "out", optimizer=optimizer)
    run.train()
    assert looks.count("clip_grad_norm_") == STEPS
    other = trainer(tmp_path / "out", StockClipping, optimizer)
    other.train()
    assert all(map(torch.equal, weights(run), weights(other)))
    assert logged(run, "grad_norm") == logged(other, "grad_norm")


def test_frozen_parameters_do_not_matter(tmp_path: Path, looks: list[str]) -> None:
    model = split_batch.trained_model("mlm", tmp_path / "start")
    model.get_input_embeddings().requires_grad_(False)
    run = trainer(tmp_path / "out", model=model, log_noise_scale=False)
    run.train()
    assert "clip_grad_norm_" not in looks


def test_under_a_loss_scaler_the_norm_is_that_of_the_unscaled_gradients(tmp_path: Path) -> None:
    """A scale at which the loss overflows until it is halved: the scaler skips those steps, and clips the others."""
    runs = []
    for cls in (LambTrainer, StockClipping):
        run = trainer(tmp_path / "out", cls, max_steps=12)
        scaler = run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=10_000)
        # On a CPU accelerate has no scaler; this is what it does before clipping where it has one.
        run.accelerator.unscale_gradients = lambda run=run, scaler=scaler: scaler.unscale_(run.optimizer.optimizer)
        run.train()
        runs.append(run)
    steps = [{int(state["step"]) for state in run.optimizer.state.values()} for run in runs]
    assert steps[0] == steps[1]
    (taken,) = steps[0]
    assert 0 < taken < 12
    for a, b in zip(*map(weights, runs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    norms = [[norm for norm in logged(run, "grad_norm") if norm < 1e3] for run in runs]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert len(norms[0]) == taken


def test_a_stock_trainer_resumes_as_if_it_had_clipped_itself(tmp_path: Path) -> None:
    """It must not find a threshold in the checkpoint, or it would clip twice."""
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 1}
    first = trainer(tmp_path / "lamb", **options)
    first.train()
    whole = trainer(tmp_path / "stock", Trainer, **options)
    whole.train()
    groups = [torch.load(tmp_path / name / "checkpoint-2/optimizer.pt")["param_groups"] for name in ("lamb", "stock")]
    assert groups[0] == groups[1]
    resumed = trainer(tmp_path / "resumed", Trainer, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "lamb/checkpoint-2"))
    for run in (first, resumed):
        for a, b in zip(weights(run), weights(whole), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_step_with_nan_is_skipped_and_the_next_one_is_clipped(tmp_path: Path) -> None:
    """`lamb/skipped_steps` in the log, and the weights of Trainer's clipping after it."""

    class Poisons(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
            if state.global_step == 1:
                model.get_input_embeddings().weight.grad[0, 0] = torch.nan

    run, other = (trainer(tmp_path / "out", cls, callbacks=[Poisons()]) for cls in (LambTrainer, StockClipping))
    run.train()
    other.train()
    assert_equal_runs(run, other)
    assert logged(run, "lamb/skipped_steps") == [1] * (STEPS - 1)
