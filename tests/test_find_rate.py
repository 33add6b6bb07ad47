"""Protects `python -m recipes.find_rate`: the rate that it ends with, who takes it, going on, and bad input."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_lamb import plan
from recipes import find_rate, pretrain_bert
from tests.helpers import pretrain, says

BATCH = 16  # of the trials
BEST = {"lamb": 0.08, "adamw_torch_fused": 0.0005}


@pytest.fixture
def options(texts: Path, tmp_path: Path) -> list[str]:
    """The recipe's options of a small model; the search has its own steps."""
    small = ["--size", "smoke", "--use_cpu", "--global_batch_size", str(BATCH), "--vocab_size", "400"]
    return [*small, "--max_steps", "8", "--corpus", str(texts), "--output_dir", str(tmp_path / "found")]


def search(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["find_rate", *arguments])
    find_rate.main()


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """No training: the loss is a parabola in log2 of the rate. Holds the phases that would have been trained."""
    phases: list[Any] = []

    def losses(phase: Any) -> None:
        phases.append(phase)
        distance = math.log2(phase.args.learning_rate / BEST[phase.args.optim.value])
        Path(phase.args.output_dir).mkdir(parents=True)
        record = {"held_out_loss": 5 + distance**2 / 10, "held_out_accuracy": 0.1, "steps": phase.args.max_steps}
        record |= {"unigram_loss": 6.0, "noise_scale": None}
        Path(phase.args.output_dir, "results.jsonl").write_text(json.dumps(record) + "\n")

    monkeypatch.setattr(find_rate, "pretrain", losses)
    monkeypatch.setattr(find_rate, "free", lambda trainer: None)
    return phases


def test_it_ends_with_a_rate_for_each_optimizer_between_two_worse_ones(
    options: list[str], trained: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Within a factor of sqrt(2) of the best one, after equally many trials of the same length; in a tie the lower."""
    search(monkeypatch, *options)
    found = {name: yaml.safe_load((tmp_path / f"found/{name}.yaml").read_text()) for name in ("lamb", "adamw")}
    assert found["lamb"]["base_learning_rate"] < BEST["lamb"]  # which lies in the middle of two rates that were tried
    for content in found.values():
        assert 1 / 1.42 < content["base_learning_rate"] / BEST[content["optim"]] < 1.42
        assert (content["base_batch_size"], content["size"], content["vocab_size"]) == (BATCH, "smoke", 400)
        rate = ("base_learning_rate", "base_batch_size")
        assert content.keys() == {"size", "vocab_size", "corpus", "optim", *rate}, "what was given, and the rate"
    assert {(p.args.max_steps, p.recipe.global_batch_size, p.args.seed) for p in trained} == {(8, BATCH, 42)}
    optimizers = [phase.args.optim.value for phase in trained]
    assert optimizers.count("lamb") == optimizers.count("adamw_torch_fused") >= 4
    text = capsys.readouterr().out
    (line,) = (line for line in text.splitlines() if line.startswith("LAMB: "))
    rate = found["lamb"]["base_learning_rate"]
    says(line, f"--optim lamb --base_learning_rate {rate:.6g} --base_batch_size {BATCH}.*lamb.yaml")
    says(text.replace("\n", " "), f"cost: {len(trained)} runs of 8 steps.*minutes.*tokens.*rates.png")
    away = math.log2(rate / BEST["lamb"])
    for step in (-1, 1):  # how sharp the optimum is: the loss at half and at twice the rate
        assert f"{((away + step) ** 2 - away**2) / 10:+.3f}" in text
    assert (tmp_path / "found/rates.png").stat().st_size > 1000
    assert not list((tmp_path / "found/running").iterdir())


def test_the_recipe_and_the_plan_take_its_file(
    options: list[str], trained: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rate is scaled to their batches; the model is that of the search, not batch and steps."""
    search(monkeypatch, *options)
    file = tmp_path / "found/lamb.yaml"
    rate = yaml.safe_load(file.read_text())["base_learning_rate"]
    (phase,) = pretrain_bert.parse_phases(["--plan", str(file), "--output_dir", str(tmp_path / "run"), "--use_cpu"])
    assert (phase.recipe.size, phase.recipe.vocab_size, phase.recipe.global_batch_size) == ("smoke", 400, 32)
    assert (phase.args.base_learning_rate, phase.args.base_batch_size, phase.args.max_steps) == (rate, BATCH, 1000)

    plan.main(["--global_batch_size", "4096", "--rate", str(file), "--output", str(tmp_path / "plan.yaml")])
    planned = plan.read_plan(tmp_path / "plan.yaml")
    (phase,) = planned.phases
    assert planned.options["size"] == "smoke"
    assert phase.options["max_steps"] == plan.plan_for_batch(4096).phases[0].options["max_steps"]
    assert phase.options["learning_rate"] == pytest.approx(rate * math.sqrt(4096 / BATCH), rel=1e-5)


def test_it_goes_on_where_it_was_stopped(
    options: list[str], trained: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No finished trial runs again, and what an unfinished one has left does no harm."""
    whole = find_rate.pretrain

    def stopped(phase: Any) -> None:
        if len(trained) == 3:
            Path(phase.args.output_dir, "half").mkdir(parents=True)
            raise KeyboardInterrupt
        whole(phase)

    with monkeypatch.context() as first:
        first.setattr(find_rate, "pretrain", stopped)
        with pytest.raises(SystemExit, match="130"):
            search(first, *options)
    search(monkeypatch, *options)
    trials = [(phase.args.optim.value, phase.args.learning_rate) for phase in trained]
    assert len(trials) == len(set(trials)) == len((tmp_path / "found/trials.jsonl").read_text().splitlines())
    before = len(trials)
    search(monkeypatch, *options)
    assert len(trained) == before
    with pytest.raises(SystemExit) as other:
        search(monkeypatch, *options, "--max_seq_length", "16")
    says(str(other.value.code), "find_rate: .*max_seq_length.*--output_dir")


@pytest.mark.parametrize("diverged", [math.nan, RuntimeError("the last 20 steps were skipped, because ...")], ids=str)
def test_a_rate_that_diverges_is_no_end(
    diverged: Any, options: list[str], trained: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    whole: Callable[[Any], None] = find_rate.pretrain

    def diverging(phase: Any) -> None:
        whole(phase)
        if phase.args.learning_rate > BEST[phase.args.optim.value]:
            if isinstance(diverged, Exception):
                raise diverged
            Path(phase.args.output_dir, "results.jsonl").write_text('{"held_out_loss": NaN, "steps": 8}\n')

    monkeypatch.setattr(find_rate, "pretrain", diverging)
    search(monkeypatch, *options)
    content = yaml.safe_load((tmp_path / "found/lamb.yaml").read_text())
    assert BEST["lamb"] / 2 < content["base_learning_rate"] <= BEST["lamb"]
    assert "diverged" in capsys.readouterr().out


def test_processes_of_torchrun_are_runs_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """They meet in the folder; connected ones would train one model together."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert not find_rate.be_one_process()
    pretrain_bert.parse(["--use_cpu"])  # which refuses processes that are not connected
    assert find_rate.be_one_process()


def test_a_search_that_trains_ends_with_a_file_that_the_recipe_runs(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    search(monkeypatch, *options, "--optimizers", "lamb", "--eval_steps", "8")
    records = [json.loads(line) for line in (tmp_path / "found/trials.jsonl").read_text().splitlines()]
    assert len(records) >= 4
    assert all(record["objective"] == pytest.approx(math.log(400), rel=0.2) for record in records)
    assert all(record["tokens"] == 8 * BATCH * 32 for record in records)
    file, output = str(tmp_path / "found/lamb.yaml"), tmp_path / "run"
    pretrain(monkeypatch, "--plan", file, "--output_dir", str(output), "--use_cpu", "--max_steps", "2")
    result = json.loads((output / "results.jsonl").read_text())
    rate = yaml.safe_load(Path(file).read_text())["base_learning_rate"]
    assert result["learning_rate"] == pytest.approx(rate * math.sqrt(32 / BATCH))


REFUSED = [
    (["--learning_rate", "0.1"], "--learning_rate 0.1: leave it out, the search finds it"),
    (["--base_learning_rate", "0.1"], "--base_learning_rate 0.1: leave it out"),
    (["--batch_size_schedule", "0:8"], "--batch_size_schedule 0:8: leave it out, the search has one batch"),
    (["--optim", "sgd"], "--optim sgd: leave it out, --optimizers"),
    (["--plan", "x.yaml"], "--plan x.yaml: leave it out, give its --size"),
    (["--num_train_epochs", "2"], "--num_train_epochs 2.0: leave it out, --max_steps"),
    (["--resume_from_checkpoint", "auto"], "--resume_from_checkpoint auto: leave it out, the same command"),
    (["--global_batch_size", "100000000"], "--global_batch_size 100000000 is more than the corpus.*lower it"),
    (["--max_steps", "0"], "--max_steps 0: expected at least 1"),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=lambda value: " ".join(value) if value else "")
def test_bad_input_ends_in_one_line(
    arguments: list[str], message: str, options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And trains nothing."""
    with pytest.raises(SystemExit) as refused:
        search(monkeypatch, *options, *arguments)
    says(str(refused.value.code), f"^find_rate: {message}")
    assert not list(tmp_path.glob("found/trials*"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("size: tiny\n", "--rate .*: .*no base_learning_rate and base_batch_size.*find_rate"),
        ("base_learning_rate: 1e-2\nbase_batch_size: 16\n", "no base_learning_rate"),  # YAML 1.1 takes it for text
        ("base_learning_rate: -1\nbase_batch_size: 16\n", "base_learning_rate -1: expected a positive number"),
        (None, "--rate: .*rate.yaml cannot be read.*find_rate"),
    ],
)
def test_the_plan_refuses_a_file_without_a_rate(text: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "rate.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SystemExit) as refused:
        plan.main(["--plan", "paper-32k", "--rate", str(file)])
    says(str(refused.value.code), f"^hf_lamb.plan: .*{message}")
