"""Published large-batch plans as data: their schedule, time and memory on your devices, for their batch or yours.

    python -m hf_lamb.plan                                          # lists the plans
    python -m hf_lamb.plan --plan nvidia-bert-large --gpus 8 --per_device_train_batch_size 64 8 --output plan.yaml
    python -m hf_lamb.plan --global_batch_size 8192 --gpus 8 --per_device_train_batch_size 64 \
        --seconds_per_micro_batch 0.11 --parameters 336e6

`--output` writes a YAML file for `recipes.pretrain_bert --plan`. Time and memory are estimates. The time counts the
micro-batches only: measure one (forward and backward) on one of your devices; perfect scaling is assumed. The memory
is that of weights, gradients and two moments in float32; add the activations of a micro-batch.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hf_lamb.files import atomic_write
from hf_lamb.scaling import did_you_mean, norm_growth, norm_growth_warning, scaled_learning_rate

__all__ = ["PLANS", "Phase", "Plan", "plan_for_batch"]

BYTES_PER_PARAMETER = 16  # float32: weight, gradient, two moments


@dataclass(frozen=True)
class Phase:
    """A part of a training run with one sequence length, global batch and schedule.

    Args:
        sequence_length: in tokens.
        global_batch_size: sequences per optimizer step.
        steps: optimizer steps, warm-up included.
        warmup_steps: optimizer steps of the linear warm-up.
        learning_rate: the peak.
        decay_power, decay_from_first_step: see `hf_lamb.scaling.decay_factor`. Defaults 1 and False.
        min_rate: use a cosine down to this fraction of the peak instead of `decay_power`. Default None.
        from_memory: names of the fields that were not checked against the source. Default none.
    """

    sequence_length: int
    global_batch_size: int
    steps: int
    warmup_steps: int
    learning_rate: float
    decay_power: float | None = 1.0
    decay_from_first_step: bool = False
    min_rate: float | None = None
    from_memory: tuple[str, ...] = ()

    @property
    def sequences(self) -> int:
        """The number of sequences that the phase trains on."""
        return self.steps * self.global_batch_size

    @property
    def decay(self) -> str:
        """The decay in words, for the table."""
        if self.min_rate is not None:
            return f"cosine to {self.min_rate:.0%}"
        return f"(1 - t)^{self.decay_power:g}{' of all steps' if self.decay_from_first_step else ''}"

    def starred(self, value: str, field: str) -> str:
        """Return `value`, with a star if this field was not checked against the source."""
        return f"{value}*" if field in self.from_memory else value

    def options(self) -> dict[str, str]:
        """Return the same as options of `recipes.pretrain_bert` and `LambTrainingArguments`."""
        options = {
            "max_seq_length": f"{self.sequence_length}",
            "global_batch_size": f"{self.global_batch_size}",
            "max_steps": f"{self.steps}",
            "warmup_steps": f"{self.warmup_steps}",
            "learning_rate": f"{self.learning_rate:.6g}",
        }
        if self.min_rate is not None:
            cosine = {"lr_scheduler_type": "cosine_with_min_lr"}
            return options | cosine | {"lr_scheduler_kwargs": f'{{"min_lr_rate": {self.min_rate:g}}}'}
        if self.decay_power != 1 or self.decay_from_first_step:
            options["decay_power"] = f"{self.decay_power:g}"
        if self.decay_from_first_step:
            options["decay_from_first_step"] = "True"
        return options


@dataclass(frozen=True)
class Plan:
    """The phases of a published run in their order, with their source.

    Args:
        name: the name for `--plan`.
        phases: one or more.
        source: where the numbers come from.
        size: the `--size` of `recipes.pretrain_bert`. Default "large".
        weight_decay: λ. Default 0.01.
        max_grad_norm: the norm that gradients are clipped to. Default 1.0.
    """

    name: str
    phases: tuple[Phase, ...]
    source: str
    size: str = "large"
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0

    def options(self) -> dict[str, str]:
        """Return the options that all phases share; `phase.options()` has the others."""
        shared = {"weight_decay": f"{self.weight_decay:g}", "max_grad_norm": f"{self.max_grad_norm:g}"}
        return {"size": self.size, **shared}


_PAPER = "BERT-Large, You et al. 2020, https://arxiv.org/abs/1904.00962"


def _paper(name: str, batch: int, steps: int, learning_rate: float, *from_memory: str) -> Plan:
    # The warm-up of 3,125 steps is 1/320 of the steps of the 512 row and 1/5 of those of the 32k row. In the paper the
    # last tenth of the epochs has sequences of 512 tokens.
    phase = Phase(128, batch, steps, 3125, learning_rate, from_memory=("sequence_length", *from_memory))
    return Plan(name, (phase,), f"{_PAPER}; the last tenth of the epochs with 512 tokens")


_RATE = ("learning_rate", "warmup_steps")
_ALL_PLANS = (
    _paper("paper-512", 512, 1_000_000, 5e-3 / 2**3, *_RATE),
    _paper("paper-1k", 1024, 500_000, 5e-3 / 2**2.5, *_RATE),
    _paper("paper-2k", 2048, 250_000, 5e-3 / 2**2, *_RATE),
    _paper("paper-4k", 4096, 125_000, 5e-3 / 2**1.5),  # the public defaults of ALBERT, too
    _paper("paper-8k", 8192, 62_500, 5e-3 / 2, *_RATE),
    _paper("paper-16k", 16_384, 31_250, 5e-3 / 2**0.5, *_RATE),
    _paper("paper-32k", 32_768, 15_625, 5e-3, *_RATE),
    Plan(
        "paper-mixed",
        (
            Phase(128, 65_536, 7037, 2815, 5e-3 * 2**0.5, from_memory=("steps", *_RATE)),
            Phase(512, 32_768, 1562, 312, 5e-3, from_memory=("steps", *_RATE)),
        ),
        f"{_PAPER}: batches, lengths, 8,599 steps in all; nine tenths of the epochs in phase 1. Rates and warm-ups "
        "follow from its 32k row by its rules",
    ),
    Plan(
        "nvidia-bert-large",
        (
            Phase(128, 65_536, 7038, 2000, 6e-3, decay_power=0.5, decay_from_first_step=True),
            Phase(512, 32_768, 1563, 200, 4e-3, decay_power=0.5, decay_from_first_step=True),
        ),
        "https://github.com/NVIDIA/DeepLearningExamples/tree/master/PyTorch/LanguageModeling/BERT",
    ),
    Plan(
        "ltg-bert",
        (Phase(128, 32_768, 15_625, 250, 1e-2, None, min_rate=0.1, from_memory=("sequence_length",)),),
        "https://github.com/ltgoslo/ltg-bert; the batch is that of https://github.com/ltgoslo/gpt-bert, with the same "
        "rate and steps",
        size="base",
        weight_decay=0.1,
        max_grad_norm=2.0,
    ),
)
PLANS = {plan.name: plan for plan in _ALL_PLANS}


def plan_for_batch(batch_size: int, base: str = "paper-32k", rule: str = "sqrt") -> Plan:
    """Scale a plan of one phase to another global batch, at the same number of sequences and of warm-up steps.

    Args:
        batch_size: the new global batch, in sequences per optimizer step.
        base: the name of the plan to scale. Default "paper-32k".
        rule: how the learning rate is scaled, see `hf_lamb.scaling.scaled_learning_rate`. Default "sqrt".

    Raises:
        ValueError: the plan or the rule is unknown; the plan has several phases; the batch is below 1, or so large
            that the warm-up would be longer than the run.
    """
    (phase,) = _single(find_plan(base)).phases
    scaled = scaled_learning_rate(phase.learning_rate, phase.global_batch_size, batch_size, rule)
    steps = round(phase.sequences / batch_size)
    if steps < phase.warmup_steps:
        raise ValueError(
            f"lower global_batch_size {batch_size:,}: with {phase.sequences:,} sequences it gives {steps:,} steps, "
            f"fewer than the warm-up's {phase.warmup_steps:,}"
        )
    phase = replace(phase, global_batch_size=batch_size, steps=steps, learning_rate=scaled.learning_rate)
    return replace(PLANS[base], name=f"{base} at {batch_size:,}", phases=(phase,), source=scaled.why)


def find_plan(name: str) -> Plan:
    """Return the plan with this name.

    Raises:
        ValueError: there is none; the message has the most similar name.
    """
    if name not in PLANS:
        raise ValueError(f"unknown plan {name!r}{did_you_mean(name, PLANS)}: expected one of {', '.join(PLANS)}")
    return PLANS[name]


def _single(plan: Plan) -> Plan:
    if len(plan.phases) != 1:
        raise ValueError(f"plan {plan.name} has {len(plan.phases)} phases: choose a plan of one phase to scale")
    return plan


# ---- The table ------------------------------------------------------------------------------------------------------


def table(
    plan: Plan,
    gpus: int = 1,
    micro_batches: Sequence[int] = (),
    seconds: Sequence[float] = (),
    parameters: float | None = None,
) -> str:
    """Return a table of a plan with one line for each phase, and its warnings.

    Args:
        plan: the plan.
        gpus: number of data-parallel devices. Default 1.
        micro_batches: sequences per device and micro-batch, one for each phase. Default: the table shows no
            accumulation steps.
        seconds: time of a micro-batch, forward and backward, one for each phase. Default: the table shows no time.
        parameters: number of parameters of the model. Default: the table shows no memory.

    Raises:
        ValueError: there is not one micro-batch or time for every phase; a global batch is not a multiple of
            micro-batch x GPUs.
    """
    for option, values in {"per_device_train_batch_size": micro_batches, "seconds_per_micro_batch": seconds}.items():
        if len(values) not in (0, len(plan.phases)):
            raise ValueError(
                f"{option}: give {len(plan.phases)} numbers, one for each phase of {plan.name}, not {len(values)}"
            )
    if seconds and not micro_batches:
        raise ValueError("seconds_per_micro_batch without per_device_train_batch_size: give both")
    head = ["sequence", "batch", "steps", "warm-up", "rate", "decay", "sequences", "tokens", "lr²T/3"]
    if micro_batches:
        head.append("split (batch x accumulation x GPUs)")
    if seconds:
        head.append("time")
    rows = [head]
    for i, phase in enumerate(plan.phases):
        row = [
            phase.starred(f"{phase.sequence_length}", "sequence_length"),
            f"{phase.global_batch_size:,}",
            phase.starred(f"{phase.steps:,}", "steps"),
            phase.starred(f"{phase.warmup_steps:,}", "warmup_steps"),
            phase.starred(f"{phase.learning_rate:.4g}", "learning_rate"),
            phase.decay,
            f"{phase.sequences / 1e6:.3g}M",
            f"{phase.sequences * phase.sequence_length / 1e9:.3g}G",
            f"{norm_growth(phase.learning_rate, phase.steps):.3f}",
        ]
        if micro_batches:
            accumulation = _accumulation(phase, micro_batches[i], gpus)
            row.append(f"{micro_batches[i]} x {accumulation} x {gpus}")
            if seconds:
                row.append(_duration(phase.steps * accumulation * seconds[i]))
        rows.append(row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines = [f"{plan.name}: weight decay {plan.weight_decay:g}, gradients clipped to {plan.max_grad_norm:g}", *lines]
    if any(phase.from_memory for phase in plan.phases):
        lines.append("* from memory or by rule, not checked against the source")
    lines.append(f"source: {plan.source}")
    if parameters is not None:
        gib = parameters * BYTES_PER_PARAMETER / 2**30
        lines.append(
            f"memory: {gib:.1f} GiB for weights, gradients and moments in float32; add one micro-batch's activations"
        )
    for phase in plan.phases:
        if warning := norm_growth_warning(phase.learning_rate, phase.steps):
            lines.append(f"warning: {warning}")
    return "\n".join(lines)


def commands(plan: Plan) -> str:
    """Return the options of `recipes.pretrain_bert`, one line for each phase."""
    lines = []
    for number, phase in enumerate(plan.phases, 1):
        words = [f"--{name} {_quoted(value)}" for name, value in (plan.options() | phase.options()).items()]
        lines.append(f"options of phase {number}: {' '.join(words)}")
    return "\n".join(lines)


def yaml_of(plan: Plan, micro_batches: Sequence[int] = ()) -> str:
    """Return the options of all phases as YAML, for `recipes.pretrain_bert --plan`."""
    lines = [f"# {plan.name}", f"# source: {plan.source}"]
    lines += [f"{name}: {value}" for name, value in plan.options().items()]
    lines.append("phases:")
    for i, phase in enumerate(plan.phases):
        options = phase.options() | ({"per_device_train_batch_size": f"{micro_batches[i]}"} if micro_batches else {})
        unsure = {{"sequence_length": "max_seq_length", "steps": "max_steps"}.get(f, f) for f in phase.from_memory}
        for n, (name, value) in enumerate(options.items()):
            comment = "  # from memory or by rule" if name in unsure else ""
            lines.append(f"{'  ' if n else '- '}{name}: {value}{comment}")
    return "\n".join(lines) + "\n"


def names() -> str:
    """Return all plans, one line each."""
    lines = []
    for plan in PLANS.values():
        batches = ", then ".join(
            f"{p.steps:,} steps of {p.global_batch_size:,} x {p.sequence_length} at {p.learning_rate:.4g}"
            for p in plan.phases
        )
        lines.append(f"{plan.name:<19}{batches}")
    return "\n".join(lines)


def write(path: Path, text: str) -> None:
    """Write a plan completely or not at all.

    Raises:
        ValueError: the file cannot be written.
    """
    try:
        with atomic_write(path) as unfinished:
            unfinished.write_text(text)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else error
        raise ValueError(f"--output {path} cannot be written ({why}): choose another file") from None


def _accumulation(phase: Phase, micro_batch: int, gpus: int) -> int:
    at_once = micro_batch * gpus
    if micro_batch < 1 or gpus < 1 or phase.global_batch_size % at_once:
        raise ValueError(
            f"global_batch_size {phase.global_batch_size:,} is no multiple of {at_once} = {micro_batch} "
            f"(per_device_train_batch_size) x {gpus} GPUs: change one of them"
        )
    return phase.global_batch_size // at_once


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def _quoted(value: str) -> str:
    return f"'{value}'" if " " in value or '"' in value else value


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    description, _, epilog = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        "python -m hf_lamb.plan", None, description, epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plan", help="The plan's name; with --global_batch_size, the plan to scale (paper-32k).")
    parser.add_argument("--global_batch_size", type=int, help="Scale a plan of one phase to this batch.")
    parser.add_argument("--learning_rate_scaling", default="sqrt", help="Rule for its rate: sqrt, linear, none.")
    parser.add_argument("--gpus", type=int, default=1, help="Data-parallel devices.")
    parser.add_argument("--per_device_train_batch_size", type=int, nargs="+", default=[], help="For every phase.")
    parser.add_argument("--seconds_per_micro_batch", type=float, nargs="+", default=[], help="Measured, every phase.")
    parser.add_argument("--parameters", type=float, help="The model's number of parameters, for the memory.")
    parser.add_argument(
        "--output", type=Path, help="Write the plan to this YAML file, for recipes.pretrain_bert --plan."
    )
    args = parser.parse_args(argv)
    if args.plan is None and args.global_batch_size is None:
        sys.stdout.write(names() + "\n")
        return
    try:
        if args.global_batch_size is None:
            plan = find_plan(args.plan)
        else:
            plan = plan_for_batch(args.global_batch_size, args.plan or "paper-32k", args.learning_rate_scaling)
        split = (args.gpus, args.per_device_train_batch_size, args.seconds_per_micro_batch, args.parameters)
        sys.stdout.write(f"{table(plan, *split)}\n{commands(plan)}\n")
        if args.output is not None:
            write(args.output, yaml_of(plan, args.per_device_train_batch_size))
    except ValueError as error:
        sys.exit(f"plan: {error}")


if __name__ == "__main__":
    main()
