"""Protects the published plans, and what `python -m hf_lamb.plan` makes of them."""

import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import get_scheduler

from hf_lamb import Lamb, LambTrainingArguments, plan
from hf_lamb.scaling import RULES, norm_growth, scaled_learning_rate
from recipes import pretrain_bert
from tests.helpers import one_line

# name: batch, steps, rate in units of 5e-3 / 2**(k/2), k, warm-up as a share of the steps. Batch and steps were read
# in the paper (v1, arxiv-vanity); rates and warm-ups are from memory of v5, but for the 4k row, which ALBERT has.
PAPER = {
    "paper-512": (512, 1_000_000, 6, 1 / 320),
    "paper-1k": (1024, 500_000, 5, 1 / 160),
    "paper-2k": (2048, 250_000, 4, 1 / 80),
    "paper-4k": (4096, 125_000, 3, 1 / 40),
    "paper-8k": (8192, 62_500, 2, 1 / 20),
    "paper-16k": (16_384, 31_250, 1, 1 / 10),
    "paper-32k": (32_768, 15_625, 0, 1 / 5),
}


def options_of(phase: plan.Phase, *names: str) -> tuple[Any, ...]:
    return tuple(phase.options[name] for name in names)


@pytest.mark.parametrize("name", PAPER)
def test_the_rows_of_the_paper(name: str) -> None:
    batch, steps, k, warmup = PAPER[name]
    (phase,) = plan.PLANS[name].phases
    options = phase.options
    assert (options["global_batch_size"], options["max_steps"]) == (batch, steps)
    assert options["learning_rate"] == pytest.approx(5e-3 / 2 ** (k / 2))
    assert options["warmup_steps"] / options["max_steps"] == pytest.approx(warmup)
    assert ("learning_rate" in phase.from_memory) is (name != "paper-4k")
    assert phase.decay == "(1 - t)^1"
    assert not {"decay_power", "lr_scheduler_type"} & set(options)


def test_albert_has_the_4k_row() -> None:
    """Its public defaults: batch 4,096, rate 0.00176, 125,000 steps, 3,125 of warm-up."""
    (phase,) = plan.PLANS["paper-4k"].phases
    assert round(phase.options["learning_rate"], 5) in (0.00176, 0.00177)
    assert options_of(phase, "global_batch_size", "max_steps", "warmup_steps") == (4096, 125_000, 3125)


def test_the_mixed_batch() -> None:
    """8,599 steps; nine tenths of the 32k row's sequences at 128 tokens in batches of 64k."""
    first, second = plan.PLANS["paper-mixed"].phases
    assert options_of(first, "max_seq_length", "global_batch_size") == (128, 65_536)
    assert options_of(second, "max_seq_length", "global_batch_size") == (512, 32_768)
    assert first.options["max_steps"] + second.options["max_steps"] == 8599
    assert first.sequences / (first.sequences + second.sequences) == pytest.approx(0.9, abs=1e-3)
    assert "learning_rate" in first.from_memory


def test_nvidias_two_phases() -> None:
    """All read in its repository."""
    expected = [(128, 65_536, 7038, 0.2843, 6e-3), (512, 32_768, 1563, 0.128, 4e-3)]
    for phase, (length, batch, steps, warmup, rate) in zip(
        plan.PLANS["nvidia-bert-large"].phases, expected, strict=True
    ):
        assert options_of(phase, "max_seq_length", "global_batch_size", "max_steps") == (length, batch, steps)
        assert phase.options["warmup_steps"] / phase.options["max_steps"] == pytest.approx(warmup, abs=5e-4)
        assert options_of(phase, "learning_rate", "decay_power", "decay_from_first_step") == (rate, 0.5, True)
        assert phase.from_memory == ()


def test_ltg_bert() -> None:
    (phase,) = plan.PLANS["ltg-bert"].phases
    assert options_of(phase, "global_batch_size", "max_steps", "learning_rate") == (32_768, 15_625, 1e-2)
    assert phase.options["warmup_steps"] == round(0.016 * 15_625)
    assert phase.options["lr_scheduler_kwargs"] == {"min_lr_rate": 0.1}
    assert plan.PLANS["ltg-bert"].options == {"size": "base", "weight_decay": 0.1, "max_grad_norm": 2.0}


def gpt_berts(step: int) -> tuple[int, int, float, float]:
    """Length, batch, share of the rate and masking of a step of its train_multi_gpu.py and utils.py, at 9fc1507."""
    steps, edge, done = 15_625, int(15_625 * 0.016), step / 15_625
    times = 4 if (step + 1) / steps >= 0.9 else 2 if (step + 1) / steps >= 0.7 else 1
    full = 32_768 // times
    batch = int(full / 4 * (1 - done) + full * done + 0.5)
    if step < edge:
        rate = step / edge
    elif step >= steps - edge:
        rate = 0.1 * (steps - step) / edge
    else:
        rate = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - edge) / (steps - edge)))
    return 128 * times, batch, rate, 0.3 - 0.15 * done


def test_gpt_bert_has_its_sources_batches_rates_and_masking(tmp_path: Path) -> None:
    """Step by step: batches to one sequence; rates as near as the file says; the masking of a phase is the mean."""
    published = plan.PLANS["gpt-bert"]
    assert published.options == plan.PLANS["ltg-bert"].options | {
        "vocab_size": 16_384,
        "adam_beta2": 0.98,
        "adam_epsilon": 1e-8,
        "carry_over": "optimizer",
    }
    first, far = 0, []
    for phase in published.phases:
        steps, stages = phase.options["max_steps"], phase.stages()
        args = LambTrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            **{name: phase.options[name] for name in ("max_steps", "learning_rate", "warmup_steps")},
            **{name: phase.options[name] for name in ("lr_scheduler_type", "lr_scheduler_kwargs")},
        )
        lamb = Lamb([torch.nn.Parameter(torch.ones(1))], lr=args.learning_rate)
        rate = get_scheduler(args.lr_scheduler_type, lamb, args.warmup_steps, steps, args.lr_scheduler_kwargs)
        (factor,) = rate.lr_lambdas
        expected = [gpt_berts(first + step) for step in range(steps)]
        assert {length for length, *_ in expected} == {phase.options["max_seq_length"]}
        assert all(abs(stages.at(s).batch_size - batch) <= 1 for s, (_, batch, _, _) in enumerate(expected))
        mean = sum(masking for *_, masking in expected) / steps
        assert phase.options["mlm_probability"] == pytest.approx(mean, abs=1e-4)
        own = [args.learning_rate * factor(step) / 1e-2 for step in range(steps)]
        apart = [abs(mine / theirs - 1) for mine, (_, _, theirs, _) in zip(own, expected, strict=True) if theirs > 0]
        far.append(max(apart))
        first += steps
    assert first == 15_625
    assert far[0] < 1e-3
    assert far[1] < 0.014
    assert far[2] < 0.12


@pytest.mark.parametrize("name", PAPER)
def test_scaling_the_32k_row_gives_the_other_rows(name: str) -> None:
    """Same sequences, same warm-up steps, sqrt rule: nothing else is in the table."""
    (expected,) = plan.PLANS[name].phases
    (got,) = plan.plan_for_batch(expected.options["global_batch_size"]).phases
    assert got.options == expected.options | {"learning_rate": pytest.approx(expected.options["learning_rate"])}
    assert norm_growth(got.options["learning_rate"], got.options["max_steps"]) == pytest.approx(0.130, abs=5e-4)


@pytest.mark.parametrize("rule", RULES)
def test_the_rule_is_scalings(rule: str) -> None:
    (phase,) = plan.plan_for_batch(4096, rule=rule).phases
    assert phase.options["learning_rate"] == scaled_learning_rate(5e-3, 32_768, 4096, rule).learning_rate


# -- the command line -------------------------------------------------------------------------------------------------


def printed(capsys: pytest.CaptureFixture[str], line: str) -> str:
    plan.main(shlex.split(line))
    return capsys.readouterr().out


def test_without_arguments_the_names_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed(capsys, "").splitlines()
    assert [line.split()[0] for line in lines] == list(plan.PLANS)


def test_accumulation_and_time(capsys: pytest.CaptureFixture[str]) -> None:
    """NVIDIA's DGX-1: 8 GPUs of 64 x 128 and 8 x 512; the time is steps x accumulation x seconds."""
    line = "--plan nvidia-bert-large --gpus 8 --per_device_train_batch_size 64 8 --seconds_per_micro_batch 0.1 0.05"
    out = printed(capsys, f"{line} --parameters 336e6")
    assert "64 x 128 x 8" in out
    assert "8 x 512 x 8" in out
    assert f"{7038 * 128 * 0.1 / 3600:.1f} h" in out
    assert f"{1563 * 512 * 0.05 / 3600:.1f} h" in out
    assert f"{336e6 * 16 / 2**30:.1f} GiB" in out


def test_the_stages_of_a_schedule(capsys: pytest.CaptureFixture[str]) -> None:
    """Batch, rate by the sqrt rule, accumulation on 8 GPUs; the parts of lr²T/3; the time is that of all passes."""
    line = "--plan paper-32k --batch_size_schedule '0:8192 4000:32768' --gpus 8 --per_device_train_batch_size 128"
    out = printed(capsys, f"{line} --seconds_per_micro_batch 0.1")
    rows = out.split("phase 1, 0:8192 4000:32768:")[1].splitlines()
    _, header, first, second, *_ = (re.split(r"  +", row.strip()) for row in rows)
    assert header == ["from step", "batch", "rate", "lr²T/3", "split"]
    assert first[:3] + first[4:] == ["0", "8,192", "0.0025", "128 x 8 x 8"]
    assert second[:3] + second[4:] == ["4,000", "32,768", "0.005", "128 x 32 x 8"]
    after = (11_625 / 15_625) ** 3
    total = 5e-3**2 * 15_625 / 3
    assert [float(first[3]), float(second[3])] == pytest.approx([total / 4 * (1 - after), total * after], abs=1e-4)
    assert f"{(4000 * 8 + 11_625 * 32) * 0.1 / 3600:.1f} h" in out


def test_a_schedule_of_many_stages_needs_a_micro_batch(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, "--plan gpt-bert")
    assert "phase 1: give per_device_train_batch_size, and its stages are listed" in out
    out = printed(capsys, "--plan gpt-bert --gpus 8 --per_device_train_batch_size 128 64 32")
    assert "phase 3, 7577->8192 over 1563:" in out


def check_arguments(recipe: Any, args: Any, phase: plan.Phase) -> None:
    """They say what the phase says."""
    for option, expected in phase.options.items():
        got = getattr(recipe if hasattr(recipe, option) else args, option)
        assert (json.loads(got) if isinstance(got, str) and got.startswith("{") else got) == (
            pytest.approx(expected, rel=1e-5) if option == "learning_rate" else expected
        ), option
    assert args.get_warmup_steps(args.max_steps) == phase.options["warmup_steps"]
    assert args.decay_from_first_step is phase.options.get("decay_from_first_step", False)


@pytest.mark.parametrize("name", plan.PLANS)
def test_the_options_are_those_of_the_recipe(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    """What is printed parses there and says the plan's numbers."""
    out = printed(capsys, f"--plan {name}")
    lines = [line.partition(": ")[2] for line in out.splitlines() if line.startswith("options of phase")]
    assert len(lines) == len(plan.PLANS[name].phases)
    for line, phase in zip(lines, plan.PLANS[name].phases, strict=True):
        recipe, args = pretrain_bert.parse([*shlex.split(line), "--size", "smoke", "--output_dir", str(tmp_path)])
        check_arguments(recipe, args, phase)


@pytest.mark.parametrize("name", plan.PLANS)
def test_what_is_written_is_read(name: str, tmp_path: Path) -> None:
    """All options, and nothing else."""
    expected = plan.split_over(plan.PLANS[name], [8] * len(plan.PLANS[name].phases))
    plan.write_plan(expected, tmp_path / "plan.yaml")
    got = plan.read_plan(tmp_path / "plan.yaml")
    assert got.options == expected.options
    assert [phase.options for phase in got.phases] == [
        phase.options | {"learning_rate": pytest.approx(phase.options["learning_rate"], rel=1e-5)}
        for phase in expected.phases
    ]


@pytest.mark.parametrize("name", plan.PLANS)
def test_the_yaml_is_what_the_recipe_takes(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Any) -> None:
    """Phases, model, numbers and the micro-batches say the same."""
    phases = plan.PLANS[name].phases
    micro = " ".join(str(2 ** (6 - 3 * n)) for n in range(len(phases)))
    printed(capsys, f"--plan {name} --gpus 8 --per_device_train_batch_size {micro} --output {tmp_path}/plan.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.yaml"]
    got = pretrain_bert.parse_phases(["--plan", f"{tmp_path}/plan.yaml"])
    assert len(got) == len(phases)
    for a, phase, batch in zip(got, phases, micro.split(), strict=True):
        assert a.recipe.size == plan.PLANS[name].options["size"]
        check_arguments(a.recipe, a.args, phase)
        assert a.args.per_device_train_batch_size == int(batch)
        assert a.longest_sequence == max(p.options["max_seq_length"] for p in phases)


def test_a_rate_that_is_too_high_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert "warning: " not in printed(capsys, "--global_batch_size 65536")
    assert "warning: " in printed(capsys, "--plan paper-512 --global_batch_size 32768 --learning_rate_scaling linear")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--plan nvidia-bert", r"unknown plan 'nvidia-bert' \(did you mean nvidia-bert-large\?\)"),
        ("--global_batch_size 0", "the global batch 0: expected at least 1"),
        (
            "--global_batch_size 1000000",
            "lower global_batch_size 1,000,000: with 512,000,000 sequences it gives 512 steps, fewer than",
        ),
        ("--global_batch_size 1024 --plan paper-mixed", "plan paper-mixed has 2 phases"),
        ("--plan paper-32k --gpus 8 --per_device_train_batch_size 60", "32,768 is no multiple of 480 = 60"),
        (
            "--plan nvidia-bert-large --per_device_train_batch_size 64",
            "give 2 values, one for each phase of nvidia-bert-large, not 1",
        ),
        ("--plan paper-32k --seconds_per_micro_batch 1", "without per_device_train_batch_size: give both"),
        (
            "--plan paper-32k --output /nowhere/plan.yaml",
            "--output /nowhere/plan.yaml cannot be written .No such file",
        ),
        ("--plan paper-32k --batch_size_schedule 8192", "batch_size_schedule '8192': expected '0:256"),
        ("--plan paper-mixed --batch_size_schedule 0:8", "give 2 values, one for each phase of paper-mixed, not 1"),
        ("--plan gpt-bert --batch_size_schedule 0:8 0:8 0:8", "plan gpt-bert has its own, leave it out"),
        ("--global_batch_size 64 --learning_rate_scaling squrt", r"'squrt' \(did you mean sqrt\?\)"),
    ],
)
def test_bad_input_gets_one_line(line: str, message: str) -> None:
    with one_line(SystemExit, message):
        plan.main(shlex.split(line))


def test_sequences_are_the_same_in_every_row() -> None:
    """The paper compares at the same number of epochs."""
    assert {phase.sequences for name in PAPER for phase in plan.PLANS[name].phases} == {512_000_000}
    assert math.isclose(sum(p.sequences for p in plan.PLANS["paper-mixed"].phases), 512e6, rel_tol=2e-3)
