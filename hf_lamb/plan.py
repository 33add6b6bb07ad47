"""Published large-batch plans as data, and what one of them, or one for your batch, means on your machine.

    python -m hf_lamb.plan                                          # the plans that are known by name
    python -m hf_lamb.plan --plan nvidia-bert-large --gpus 8 --per_device_train_batch_size 64 8 --output plan.yaml
    python -m hf_lamb.plan --global_batch_size 8192 --gpus 8 --per_device_train_batch_size 64 \
        --seconds_per_micro_batch 0.11 --parameters 336e6

`--output` writes what `recipes.pretrain_bert --plan` takes. Time and memory are estimates: the time is that of the
micro-batches alone, as you measured one (forward and backward) on one of your devices, divided perfectly; the memory
is that of weights, gradients and two moments in float32, to which the activations of a micro-batch come.
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
    """A stretch of training with one sequence length, global batch and schedule.

    sequence_length: in tokens. global_batch_size: sequences in an optimizer step. learning_rate: the peak.
    decay_power, decay_from_first_step: see `hf_lamb.scaling.decay_factor`. min_rate: in place of decay_power, a cosine
    down to this share of the peak. from_memory: the fields that were not checked against the source.
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
        """How many are seen."""
        return self.steps * self.global_batch_size

    @property
    def decay(self) -> str:
        """In words."""
        if self.min_rate is not None:
            return f"cosine to {self.min_rate:.0%}"
        return f"(1 - t)^{self.decay_power:g}{' of all steps' if self.decay_from_first_step else ''}"

    def options(self) -> dict[str, str]:
        """The options of `recipes.pretrain_bert` and `LambTrainingArguments` that say the same."""
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
        return options | ({"decay_from_first_step": "True"} if self.decay_from_first_step else {})


@dataclass(frozen=True)
class Plan:
    """Phases in their order, where they were published, and for which `--size` of `recipes.pretrain_bert`."""

    name: str
    phases: tuple[Phase, ...]
    source: str
    size: str = "large"
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0

    def options(self) -> dict[str, str]:
        """What all phases share, beside each `phase.options()`."""
        shared = {"weight_decay": f"{self.weight_decay:g}", "max_grad_norm": f"{self.max_grad_norm:g}"}
        return {"size": self.size, **shared}


_PAPER = "BERT-Large, You et al. 2020, https://arxiv.org/abs/1904.00962"


def _paper(name: str, batch: int, steps: int, learning_rate: float, *from_memory: str) -> Plan:
    # 3,125 steps are 1/320 of the 512 row's and 1/5 of the 32k row's. The last tenth of the epochs has 512 tokens.
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
    """The plan `base` (of one phase) at another batch: as many sequences, as many warm-up steps, the rate by `rule`.

    Raises:
        ValueError: a plan or rule that is not known, a plan of several phases, a batch below 1 or so large that the
            warm-up would be longer than the run.
    """
    (phase,) = _single(find_plan(base)).phases
    scaled = scaled_learning_rate(phase.learning_rate, phase.global_batch_size, batch_size, rule)
    steps = round(phase.sequences / batch_size)
    if steps < phase.warmup_steps:
        raise ValueError(
            f"global_batch_size {batch_size:,} leaves {steps:,} steps for {phase.sequences:,} sequences, fewer than "
            f"the warm-up's {phase.warmup_steps:,}: lower it"
        )
    phase = replace(phase, global_batch_size=batch_size, steps=steps, learning_rate=scaled.learning_rate)
    return replace(PLANS[base], name=f"{base} at {batch_size:,}", phases=(phase,), source=scaled.why)


def find_plan(name: str) -> Plan:
    """Raises ValueError, with the nearest name, for one that is not known."""
    if name not in PLANS:
        raise ValueError(f"unknown plan {name!r}{did_you_mean(name, PLANS)}: known are {', '.join(PLANS)}")
    return PLANS[name]


def _single(plan: Plan) -> Plan:
    if len(plan.phases) != 1:
        raise ValueError(f"plan {plan.name} has {len(plan.phases)} phases: scale one that has one")
    return plan


# ---- The table ------------------------------------------------------------------------------------------------------


def table(
    plan: Plan,
    gpus: int = 1,
    micro_batches: Sequence[int] = (),
    seconds: Sequence[float] = (),
    parameters: float | None = None,
) -> str:
    """A line for each phase; with a micro-batch for every phase also how they split, and with seconds how long it is.

    Raises:
        ValueError: a micro-batch or time for some phases only; a batch that the GPUs and micro-batch cannot make up.
    """
    for option, values in {"per_device_train_batch_size": micro_batches, "seconds_per_micro_batch": seconds}.items():
        if len(values) not in (0, len(plan.phases)):
            raise ValueError(f"{option}: {len(values)} numbers for the {len(plan.phases)} phases of {plan.name}")
    if seconds and not micro_batches:
        raise ValueError("seconds_per_micro_batch without per_device_train_batch_size: give both")
    rows = [["sequence", "batch", "steps", "warm-up", "rate", "decay", "sequences", "tokens", "lr²T/3"]]
    rows[0] += ["split (batch x accumulation x GPUs)"] * bool(micro_batches) + ["time"] * bool(seconds)
    for i, phase in enumerate(plan.phases):
        row = [
            f"{phase.sequence_length}{'*' * ('sequence_length' in phase.from_memory)}",
            f"{phase.global_batch_size:,}",
            f"{phase.steps:,}{'*' * ('steps' in phase.from_memory)}",
            f"{phase.warmup_steps:,}{'*' * ('warmup_steps' in phase.from_memory)}",
            f"{phase.learning_rate:.4g}{'*' * ('learning_rate' in phase.from_memory)}",
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
    """The options of `recipes.pretrain_bert` for every phase."""
    lines = []
    for number, phase in enumerate(plan.phases, 1):
        words = [f"--{name} {_quoted(value)}" for name, value in (plan.options() | phase.options()).items()]
        lines.append(f"options of phase {number}: {' '.join(words)}")
    return "\n".join(lines)


def yaml_of(plan: Plan, micro_batches: Sequence[int] = ()) -> str:
    """The same as YAML, for `recipes.pretrain_bert --plan`."""
    lines = [f"# {plan.name}", f"# source: {plan.source}"]
    lines += [f"{name}: {value}" for name, value in plan.options().items()]
    lines.append("phases:")
    for i, phase in enumerate(plan.phases):
        options = phase.options() | ({"per_device_train_batch_size": f"{micro_batches[i]}"} if micro_batches else {})
        unsure = {{"sequence_length": "max_seq_length", "steps": "max_steps"}.get(f, f) for f in phase.from_memory}
        words = [
            f"{name}: {value}{'  # from memory or by rule' * (name in unsure)}" for name, value in options.items()
        ]
        lines += [f"{'  ' if n else '- '}{line}" for n, line in enumerate(words)]
    return "\n".join(lines) + "\n"


def names() -> str:
    """All plans, a line each."""
    lines = []
    for plan in PLANS.values():
        batches = ", then ".join(
            f"{p.steps:,} steps of {p.global_batch_size:,} x {p.sequence_length} at {p.learning_rate:.4g}"
            for p in plan.phases
        )
        lines.append(f"{plan.name:<19}{batches}")
    return "\n".join(lines)


def write(path: Path, text: str) -> None:
    """All of it or nothing."""
    try:
        with atomic_write(path) as unfinished:
            unfinished.write_text(text)
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else error
        raise ValueError(f"--output {path} cannot be written ({why}): name another") from None


def _accumulation(phase: Phase, micro_batch: int, gpus: int) -> int:
    at_once = micro_batch * gpus
    if micro_batch < 1 or gpus < 1 or phase.global_batch_size % at_once:
        raise ValueError(
            f"global_batch_size {phase.global_batch_size:,} is no multiple of {at_once} = {micro_batch} "
            f"(per_device_train_batch_size) x {gpus} GPUs"
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
    """The command line."""
    description, _, epilog = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        "python -m hf_lamb.plan", None, description, epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plan", help="A plan by name; with --global_batch_size, the one to scale (paper-32k).")
    parser.add_argument("--global_batch_size", type=int, help="Scale a plan of one phase to this batch.")
    parser.add_argument("--learning_rate_scaling", default="sqrt", help="How its rate follows: sqrt, linear, none.")
    parser.add_argument("--gpus", type=int, default=1, help="Data-parallel devices.")
    parser.add_argument("--per_device_train_batch_size", type=int, nargs="+", default=[], help="For every phase.")
    parser.add_argument("--seconds_per_micro_batch", type=float, nargs="+", default=[], help="Measured, every phase.")
    parser.add_argument("--parameters", type=float, help="Of the model, for the memory: 110e6, 336e6.")
    parser.add_argument("--output", type=Path, help="Write the plan there, as YAML for recipes.pretrain_bert --plan.")
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
