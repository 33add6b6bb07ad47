"""Protects `python -m recipes.critical_batch`: the batch that it finds, exact branches, going on, and bad input."""

import json
import math
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from hf_lamb.scaling import scaled_learning_rate
from recipes import critical_batch
from recipes.lib.corpus import load_documents
from recipes.study.critical_report import critical_batch as largest_without_loss
from recipes.study.critical_report import sentence, smoothed
from tests.helpers import on_processes, pretrain, says

BATCHES = [8, 16, 32]
TOKENS = 4 * 32 * 32  # four steps of the largest batch


def run(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["critical_batch", *map(str, arguments)])
    critical_batch.main()


def options(finished: Path, texts: Path, output: Path) -> list[Any]:
    own = [finished / "checkpoint-4", "--batches", *BATCHES, "--tokens", TOKENS, "--use_cpu"]
    return [*own, "--corpus", texts, "--output_dir", output]


def lines(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "branches.jsonl").read_text().splitlines()]


# ---- Which batch ----------------------------------------------------------------------------------------------------

WINDOW, BASE_RATE, BASE_BATCH, TOLERANCE = 8192, 0.02, 16, 0.01
DIMENSIONS, NOISE, START = 2000, 1.0, 1.0


def closed_form(batch: float) -> float:
    """The expected smoothed loss of SGD on the mean of w²/2, whose gradient has noise of variance NOISE²/batch.

    With q = 1 - rate, E w² after n steps is q²ⁿ START² + rate² NOISE² / batch · (1 - q²ⁿ) / (1 - q²).
    """
    rate, steps = BASE_RATE * math.sqrt(batch / BASE_BATCH), round(WINDOW / batch)
    q = (1 - rate) ** 2
    floor = rate**2 * NOISE**2 / batch / (1 - q)
    losses = [(q**n * START**2 + floor * (1 - q**n)) / 2 for n in range(steps)]
    return smoothed(losses)


def simulated(batch: int, generator: torch.Generator) -> list[float]:
    """The losses of one run of it, before each step."""
    rate = scaled_learning_rate(BASE_RATE, BASE_BATCH, batch).learning_rate
    w, losses = torch.full((DIMENSIONS,), START), []
    for _ in range(WINDOW // batch):
        losses.append(float(w.square().mean() / 2))
        noise = torch.randn(DIMENSIONS, generator=generator) * NOISE / math.sqrt(batch)
        w = w - rate * (w + noise)
    return losses


def test_the_critical_batch_of_a_noisy_quadratic_is_that_of_the_closed_form() -> None:
    """Within a factor of two, which is the distance of the batches that are tried."""
    best, exact = closed_form(BASE_BATCH), 0
    for batch in range(BASE_BATCH, 2048):
        if closed_form(batch) > best + TOLERANCE:
            break
        best, exact = min(best, closed_form(batch)), batch
    generator = torch.Generator().manual_seed(0)
    losses = {batch: smoothed(simulated(batch, generator)) for batch in (16, 32, 64, 128, 256, 512, 1024)}
    found = largest_without_loss(losses, TOLERANCE)
    assert 64 < exact < 1024
    assert exact / 2 <= found <= exact * 2
    for batch, loss in losses.items():
        assert loss == pytest.approx(closed_form(batch), rel=0.1, abs=0.003)


@pytest.mark.parametrize("steps", [4, 6, 7, 10, 16])
def test_the_window_holds_the_same_sequences_at_every_batch(steps: int) -> None:
    """Also where a quarter of the steps is no whole number: a whole one of a curve that falls would favour a batch."""
    curve = [10 - 0.1 * i for i in range(steps)]  # of the largest batch; eight times as many steps of another
    finer = [loss for loss in curve for _ in range(8)]
    assert smoothed(curve) == pytest.approx(smoothed(finer), abs=1e-12)


def test_a_batch_must_not_lose_to_any_smaller_one() -> None:
    assert largest_without_loss({64: 5.0, 128: 4.9, 256: 4.905, 512: 4.95}, 0.01) == 256
    assert largest_without_loss({64: 5.0, 128: 5.02, 256: 5.005}, 0.01) == 256
    assert largest_without_loss({64: 5.0, 128: 5.02, 256: math.nan}, 0.01) == 64


@pytest.mark.parametrize(
    ("losses", "words"),
    [
        ({64: 5.0, 128: 5.0, 256: 5.25}, "between 128 and 256 sequences: after 4,096 tokens 256 is 0.250 nats above"),
        ({64: 5.0, 128: 5.25}, "below 128 sequences: after 4,096 tokens 128 is 0.250 nats above"),
        ({64: 5.0, 128: 4.9}, "128 sequences or more: after 4,096 tokens it is at most 0.01 nats above"),
    ],
)
def test_the_sentence_says_what_was_found(losses: dict[int, float], words: str) -> None:
    run = {"tolerance": 0.01, "sequences": 128, "max_seq_length": 32, "noise_scale": 304.1}
    said = sentence([{"batch": batch, "loss": loss, "run": run} for batch, loss in losses.items()])
    assert words in said
    assert said.endswith("The noise scale of the checkpoint's gradients is 304 sequences.")


# ---- The branches ---------------------------------------------------------------------------------------------------


def test_every_batch_trains_the_same_sequences_from_the_checkpoint_and_its_moments(
    finished: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And the command goes on where it was stopped: what is left trains to the same bits, and finished lines stay."""
    states: list[Any] = []
    rows: list[list[bytes]] = []

    class Seen(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            inner = kwargs["optimizer"]
            states.append({k: (int(v["step"]), v["exp_avg"].clone()) for k, v in inner.state_dict()["state"].items()})
            rows.append([])

    train = critical_batch.LambTrainer.train

    def watched(self: Any, *arguments: Any) -> Any:
        self.add_callback(Seen())
        self.model.register_forward_pre_hook(
            lambda _, given, kwargs: (
                rows[-1].extend(row.numpy().tobytes() for row in kwargs["input_ids"]) if self.model.training else None
            ),
            with_kwargs=True,
        )
        return train(self, *arguments)

    monkeypatch.setattr(critical_batch.LambTrainer, "train", watched)
    arguments = options(finished, texts, tmp_path)
    run(monkeypatch, *arguments)
    kept = torch.load(finished / "checkpoint-4/optimizer.pt", weights_only=True)["state"]
    assert len(states) == len(BATCHES)
    for state in states:
        assert state.keys() == kept.keys()
        assert all(step == int(kept[k]["step"]) == 4 for k, (step, _) in state.items())
        assert all(torch.equal(moment, kept[k]["exp_avg"]) for k, (_, moment) in state.items())
    assert all(len(seen) == TOKENS // 32 for seen in rows)
    assert sorted(rows[0]) == sorted(rows[1]) == sorted(rows[2])

    whole = lines(tmp_path)
    assert [line["batch"] for line in whole] == BATCHES
    assert [line["steps"] for line in whole] == [16, 8, 4]
    rates = [line["learning_rate"] for line in whole]
    assert rates == pytest.approx([rates[1] / math.sqrt(2), rates[1], rates[1] * math.sqrt(2)])  # of the run: 16
    assert rates[1] == torch.load(finished / "checkpoint-4/scheduler.pt", weights_only=True)["_last_lr"][0]
    said = capsys.readouterr().out
    assert "The critical batch is" in said
    assert " seconds; " in said
    assert (tmp_path / "critical_batch.png").stat().st_size > 10_000

    (tmp_path / "branches.jsonl").write_text(json.dumps(whole[0]) + "\n")
    run(monkeypatch, *arguments)
    assert [(line["batch"], line["losses"]) for line in lines(tmp_path)] == [(r["batch"], r["losses"]) for r in whole]
    assert len(states) == 2 * len(BATCHES) - 1

    with pytest.raises(SystemExit) as other:
        run(monkeypatch, *arguments, "--seed", "2")
    says(
        str(other.value.code),
        "critical_batch: .*branches.jsonl holds branches of another run: seed 1, here 2.*output_dir",
    )


def test_the_rate_belongs_to_the_batch_in_force(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a run whose batch has grown, not to the batch of one pass."""
    small = ["--size", "smoke", "--use_cpu", "--max_steps", "8", "--vocab_size", "400", "--corpus", str(texts)]
    small += ["--batch_size_schedule", "0:8 2:32", "--per_device_train_batch_size", "8", "--save_steps", "4"]
    pretrain(monkeypatch, *small, "--output_dir", str(tmp_path))
    given = options(tmp_path, texts, tmp_path / "branches")
    monkeypatch.setattr(sys, "argv", ["critical_batch", *map(str, given)])
    branches = critical_batch.prepare(*critical_batch.parse())
    assert branches.run["base_batch_size"] == 32
    assert branches.arguments[32].learning_rate == pytest.approx(critical_batch.rate_of(branches.checkpoint))


def test_the_next_command_trains_the_checkpoint_on_at_the_batch_that_was_found(
    finished: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the rate of its branch, on its data; it named a recipe and a plan of another model."""
    run(monkeypatch, *options(finished, texts, tmp_path / "branches"))
    command = capsys.readouterr().out.split("next:")[1].split("python -m recipes.pretrain_bert")[1]
    own = ["--max_steps", "1", "--use_cpu", "--output_dir", str(tmp_path / "on")]
    pretrain(monkeypatch, *shlex.split(command), *own)
    record = json.loads((tmp_path / "on/results.jsonl").read_text())
    batch = record["global_batch_size"]
    branch = next(line for line in lines(tmp_path / "branches") if line["batch"] == batch)
    assert record["learning_rate"] == pytest.approx(branch["learning_rate"], rel=1e-5)
    assert record["carried_over_from"] == str(finished / "checkpoint-4")
    assert critical_batch.facts_of(str(tmp_path / "on/checkpoint-1"))["train"] == branch["run"]["data"]


@pytest.mark.distributed
def test_two_processes_find_the_same(
    finished: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The held-out loss too, for a number of rows that no pass makes up."""
    arguments = options(finished, texts, tmp_path / "two")
    arguments[arguments.index("--batches") : arguments.index("--tokens")] = ["--batches", 16, 32]
    (tmp_path / "held_out.txt").write_text(load_documents("embedded")[50].text[:23_000])
    arguments += ["--validation_file", tmp_path / "held_out.txt"]
    on_processes(2, "recipes.critical_batch", *map(str, arguments))
    arguments[arguments.index("--output_dir") + 1] = tmp_path / "one"
    run(monkeypatch, *arguments)
    assert len(critical_batch.prepare(*critical_batch.parse()).data.held_out) % 64 > 32
    for two, one in zip(lines(tmp_path / "two"), lines(tmp_path / "one"), strict=True):
        assert two["processes"] == 2
        assert two["losses"] == pytest.approx(one["losses"], rel=1e-4)
        assert two["held_out_loss"] == pytest.approx(one["held_out_loss"], rel=1e-5)


# ---- Bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batches", "16"], "--batches 16: give two or more"),
        (["--batches", "16", "16"], "--batches 16 16: give two or more different"),
        (["--batches", "0", "16"], "--batches 0 16: give two"),
        (["--tokens", "1000"], "--tokens 1000: every batch must make them up in whole steps: give 1024"),
        (["--learning_rate", "-1"], "--learning_rate -1.0: expected a number of at least 0"),
        (["--learning_rate", "0"], "learning rate of .*checkpoint-4 is 0.*--learning_rate"),
        (["--tolerance", "nan"], "--tolerance nan: expected"),
        (["--max_seq_length", "64", "--tokens", "8192"], "64.*32"),
        (["--batches", "16", "1048576"], "--batches 1048576: the corpus has .* sequences: lower it"),
        (
            ["--batches", "8", "16", "--tokens", "1048576"],
            "--tokens 1048576: .* must end within an epoch: give --tokens",
        ),
        (["--per_device_train_batch_size", "5"], "--batches 8 is no multiple of 5"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_ends_in_one_line(
    arguments: list[str], message: str, finished: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And trains nothing."""
    output = tmp_path / "output"
    given = options(finished, texts, output)
    if "1048576" in arguments:
        given[given.index("--tokens") : given.index("--tokens") + 2] = []
    with pytest.raises(SystemExit) as refused:
        run(monkeypatch, *given, *arguments)
    says(str(refused.value.code), f"^critical_batch: {message}")
    assert not output.exists()


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("checkpoint-8", "learning rate of .*checkpoint-8 is 0, at the end of its run: give an earlier checkpoint"),
        (".", "checkpoint-8 is 0"),  # a run's folder is its newest checkpoint
        ("nothing", "nothing is no checkpoint"),
    ],
)
def test_a_checkpoint_that_gives_no_branches_is_refused(
    checkpoint: str, message: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as refused:
        run(monkeypatch, finished / checkpoint, "--use_cpu", "--output_dir", tmp_path / "output")
    says(str(refused.value.code), f"^critical_batch: .*{message}")
    assert not (tmp_path / "output").exists()


def test_a_checkpoint_of_something_else_is_refused(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoint-4"
    folder.mkdir()
    for file in (finished / "checkpoint-4").iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "training_args.bin").unlink()
    torch.save({"not": "arguments"}, folder / "training_args.bin")
    with pytest.raises(SystemExit) as refused:
        run(monkeypatch, folder, "--use_cpu", "--output_dir", tmp_path / "output")
    says(str(refused.value.code), "training_args.bin has no LambTrainingArguments .dict.*recipes.pretrain_bert")
