r"""Published large-batch plans as data: their schedule, time and memory on your devices, for their batch or yours.

    hf-lamb plan                                                    (or python -m hf_lamb.plan) lists the plans
    hf-lamb plan --plan nvidia-bert-large --gpus 8 --per_device_train_batch_size 64 8 --output plan.yaml
    hf-lamb plan --global_batch_size 8192 --gpus 8 --per_device_train_batch_size 64 \
        --seconds_per_micro_batch 0.11 --parameters 336e6
    hf-lamb plan --plan paper-32k --batch_size_schedule '0:8192 4000:32768' --output plan.yaml
    hf-lamb plan --global_batch_size 8192 --rate runs/find_rate/base/lamb.yaml --output plan.yaml

`--output` writes a YAML file for `recipes.pretrain_bert --plan`. Time and memory are estimates. The time counts the
micro-batches only: measure one (forward and backward) on one of your devices; perfect scaling is assumed. The memory
is that of weights, gradients and two moments in float32; add the activations of a micro-batch.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml  # transformers and accelerate bring it

from hf_lamb.batch_schedule import BatchStages, Stage, batch_stages
from hf_lamb.command_line import Parser, fail, one_line
from hf_lamb.files import atomic_write
from hf_lamb.scaling import did_you_mean, norm_growth, norm_growth_warning, scaled_learning_rate

__all__ = ["PLANS", "Phase", "Plan", "plan_for_batch", "read_plan", "write_plan"]

BYTES_PER_PARAMETER = 16  # float32: weight, gradient, two moments


@dataclass(frozen=True)
class Phase:
    """A part of a training run with one sequence length, global batch and schedule.

    Args:
        options: this phase's own options, by name. The published plans have `max_seq_length` (tokens),
            `global_batch_size` (sequences per optimizer step) or `batch_size_schedule`, and options of
            `LambTrainingArguments`: `max_steps`, `warmup_steps`, `learning_rate` (the peak), and the decay if it is
            not linear.
        from_memory: names of the options that were not checked against the source.
    """

    options: dict[str, Any] = field(default_factory=dict)
    from_memory: tuple[str, ...] = ()

    @property
    def sequences(self) -> int:
        """The number of sequences that the phase trains on."""
        return self.stages().sequences(self.options["max_steps"])

    def stages(self, at_once: int = 1) -> BatchStages:
        """Return the batches of the phase's steps, in multiples of `at_once`."""
        schedule = self.options.get("batch_size_schedule") or f"0:{self.options['global_batch_size']}"
        return batch_stages(schedule, at_once)

    def rate(self, batch_size: int) -> float:
        """Return the peak learning rate at a batch."""
        if "base_learning_rate" not in self.options:
            return float(self.options["learning_rate"])
        rate, base, rule = (
            self.options.get(name, "sqrt")
            for name in ("base_learning_rate", "base_batch_size", "learning_rate_scaling")
        )
        return scaled_learning_rate(rate, base, batch_size, rule).learning_rate

    @property
    def norm_growth(self) -> float:
        """lr²T/3, with the rate of every step's batch."""
        return sum(growth for *_, growth in self.of_stages())

    def of_stages(self, at_once: int = 1) -> Iterator[tuple[int, int, int, float, float]]:
        """Yield first step, batch, accumulation, peak rate, and its part of lr²T/3, for every stage."""
        steps = self.options["max_steps"]
        for stage, end in self.stages(at_once).within(steps):
            rate = self.rate(stage.batch_size)
            growth = norm_growth(rate, steps, stage.first_step, end)
            yield stage.first_step, stage.batch_size, stage.accumulation, rate, growth

    @property
    def decay(self) -> str:
        """The decay in words, for the table."""
        shape, more = self.options.get("lr_scheduler_type"), self.options.get("lr_scheduler_kwargs", {})
        if shape == "cosine_with_min_lr":
            part = f"{2 * more['num_cycles']:.0%} of a " if "num_cycles" in more else ""
            return f"{part}cosine to {more['min_lr_rate']:.0%}"
        if shape == "polynomial":
            return f"(1 - t)^{more['power']:g} to {more['lr_end']:.3g}"
        if shape == "warmup_stable_decay":
            return f"none, then linear in {more['num_decay_steps']:,} steps"
        of_all = " of all steps" if self.options.get("decay_from_first_step") else ""
        return f"(1 - t)^{self.options.get('decay_power', 1):g}{of_all}"


@dataclass(frozen=True)
class Plan:
    """A run in one or several phases: what `read_plan` reads, `write_plan` writes, and a recipe trains.

    Args:
        phases: the phases, in their order.
        options: the options that all phases share, by name. The published plans have the model's `size`.
        name: the name of a published plan. Default "".
        source: where the plan was published. Default "".
    """

    phases: tuple[Phase, ...] = (Phase(),)
    options: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    source: str = ""

    def options_of(self, phase: Phase) -> dict[str, Any]:
        """Return all options of a phase; its own replace the shared ones."""
        return self.options | phase.options


def read_plan(path: str | Path) -> Plan:
    """Read a plan from a YAML file: a mapping of options, and a list `phases` of such mappings.

    Without `phases` the plan has one phase. The names and types of the options are not checked here: the recipe does.

    Raises:
        ValueError: the file cannot be read, or is not such a mapping.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"the plan {path} cannot be read ({error.strerror}): `python -m hf_lamb.plan --output` writes one"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"the plan {path} is no YAML: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"the plan {path} holds no options: give lines like `max_steps: 1000`")
    phases = content.pop("phases", [{}])
    if not isinstance(phases, list) or not phases or not all(isinstance(phase, dict) for phase in phases):
        raise ValueError(f"the plan {path}: phases is no list: let each phase begin like `- max_steps: 1000`")
    return Plan(tuple(Phase(options) for options in phases), content)


def write_plan(plan: Plan, path: Path) -> None:
    """Write the file that `read_plan` reads, completely or not at all.

    Name, source, and which options are from memory stand in comments.

    Raises:
        ValueError: the file cannot be written.
    """
    lines = [f"# {plan.name}", f"# source: {plan.source}"]
    for number, phase in enumerate(plan.phases, 1):
        if phase.from_memory:
            lines.append(f"# phase {number}, from memory or by rule: {', '.join(phase.from_memory)}")
    content = _rounded(plan.options) | {"phases": [_rounded(phase.options) for phase in plan.phases]}
    try:
        with atomic_write(path) as unfinished:
            unfinished.write_text("\n".join([*lines, yaml.safe_dump(content, sort_keys=False)]), encoding="utf-8")
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else error
        raise ValueError(f"--output {path} cannot be written ({why}): name another") from None


def _rounded(options: dict[str, Any]) -> dict[str, Any]:
    """Rates that follow from a rule, to six digits."""
    return {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in options.items()}


# ---- Published plans ------------------------------------------------------------------------------------------------


_PAPER = "BERT-Large, You et al. 2020, https://arxiv.org/abs/1904.00962"


_LARGE = {"size": "large", "weight_decay": 0.01, "max_grad_norm": 1.0}
_BASE = {"size": "base", "weight_decay": 0.1, "max_grad_norm": 2.0}
_NVIDIA = {"decay_power": 0.5, "decay_from_first_step": True}
_COSINE = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}
_RATE = ("learning_rate", "warmup_steps")


def _phase(
    tokens: int, batch: int | str, steps: int, warmup_steps: int, rate: float, *from_memory: str, **decay: Any
) -> Phase:
    options = {
        "max_seq_length": tokens,
        "global_batch_size" if isinstance(batch, int) else "batch_size_schedule": batch,
        "max_steps": steps,
        "warmup_steps": warmup_steps,
        "learning_rate": rate,
    }
    return Phase(options | decay, from_memory)


def _paper(name: str, batch: int, steps: int, rate: float, *from_memory: str) -> Plan:
    # 3,125 steps are 1/320 of the 512 row's and 1/5 of the 32k row's. The last tenth of the epochs has 512 tokens.
    phase = _phase(128, batch, steps, 3125, rate, "max_seq_length", *from_memory)
    return Plan((phase,), _LARGE, name, f"{_PAPER}; the last tenth of the epochs with 512 tokens")


_ALL_PLANS = (
    _paper("paper-512", 512, 1_000_000, 5e-3 / 2**3, *_RATE),
    _paper("paper-1k", 1024, 500_000, 5e-3 / 2**2.5, *_RATE),
    _paper("paper-2k", 2048, 250_000, 5e-3 / 2**2, *_RATE),
    _paper("paper-4k", 4096, 125_000, 5e-3 / 2**1.5),  # the public defaults of ALBERT, too
    _paper("paper-8k", 8192, 62_500, 5e-3 / 2, *_RATE),
    _paper("paper-16k", 16_384, 31_250, 5e-3 / 2**0.5, *_RATE),
    _paper("paper-32k", 32_768, 15_625, 5e-3, *_RATE),
    Plan(
        (
            _phase(128, 65_536, 7037, 2815, 5e-3 * 2**0.5, "max_steps", *_RATE),
            _phase(512, 32_768, 1562, 312, 5e-3, "max_steps", *_RATE),
        ),
        _LARGE,
        "paper-mixed",
        f"{_PAPER}: batches, lengths, 8,599 steps in all; nine tenths of the epochs in phase 1. Rates and warm-ups "
        "follow from its 32k row by its rules",
    ),
    Plan(
        (_phase(128, 65_536, 7038, 2000, 6e-3, **_NVIDIA), _phase(512, 32_768, 1563, 200, 4e-3, **_NVIDIA)),
        _LARGE,
        "nvidia-bert-large",
        "https://github.com/NVIDIA/DeepLearningExamples/tree/master/PyTorch/LanguageModeling/BERT",
    ),
    Plan(
        (_phase(128, 32_768, 15_625, 250, 1e-2, "max_seq_length", **_COSINE),),
        _BASE,
        "ltg-bert",
        "https://github.com/ltgoslo/ltg-bert; the batch is that of https://github.com/ltgoslo/gpt-bert, with the same "
        "rate and steps",
    ),
    # In the source one run: lengths and batches change at 70 and 90 % of 15,625 steps, the rest step by step. The
    # masking is the mean over each phase. The rate of phase 2 is within 1.3 % of the source's cosine. That of phase 3
    # is its root mean square, at most 11 % away from it; then the source's cooldown.
    Plan(
        (
            _phase(
                128,
                "8192->25394 over 10937",
                10_937,
                250,
                1e-2,
                "mlm_probability",
                mlm_probability=0.2475,
                lr_scheduler_type="cosine_with_min_lr",
                lr_scheduler_kwargs={"min_lr_rate": 0.1, "num_cycles": 0.3475},
            ),
            _phase(
                256,
                "12697->15155 over 3125",
                3125,
                0,
                2.911e-3,
                "mlm_probability",
                "learning_rate",
                mlm_probability=0.18,
                lr_scheduler_type="polynomial",
                lr_scheduler_kwargs={"lr_end": 1.228e-3, "power": 1.31},
            ),
            _phase(
                512,
                "7577->8192 over 1563",
                1563,
                0,
                1.092e-3,
                "mlm_probability",
                "learning_rate",
                mlm_probability=0.1575,
                lr_scheduler_type="warmup_stable_decay",
                lr_scheduler_kwargs={"num_stable_steps": 1313, "num_decay_steps": 250, "decay_type": "linear"},
            ),
        ),
        {**_BASE, "vocab_size": 16_384, "adam_beta2": 0.98, "adam_epsilon": 1e-8, "carry_over": "optimizer"},
        "gpt-bert",
        "https://github.com/ltgoslo/gpt-bert at 9fc1507, pretraining/train_multi_gpu.py, utils.py, configs/base.json; "
        "without its causal objective, z-loss, average of the weights (EMA), and architecture",
    ),
)
PLANS = {plan.name: plan for plan in _ALL_PLANS}
"""The published plans by name."""


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
    plan = find_plan(base)
    if len(plan.phases) != 1:
        raise ValueError(f"plan {base} has {len(plan.phases)} phases: choose a plan of one phase to scale")
    (phase,) = plan.phases
    warmup, rate, batch = (phase.options[name] for name in ("warmup_steps", "learning_rate", "global_batch_size"))
    scaled = scaled_learning_rate(rate, batch, batch_size, rule)
    steps = round(phase.sequences / batch_size)
    if steps < warmup:
        raise ValueError(
            f"lower global_batch_size {batch_size:,}: with {phase.sequences:,} sequences it gives {steps:,} steps, "
            f"fewer than the warm-up's {warmup:,}"
        )
    own = {"global_batch_size": batch_size, "max_steps": steps, "learning_rate": scaled.learning_rate}
    phase = replace(phase, options=phase.options | own)
    return replace(plan, name=f"{base} at {batch_size:,}", phases=(phase,), source=scaled.why)


def with_found_rate(plan: Plan, path: str | Path, rule: str = "sqrt") -> Plan:
    """Return the plan with the model and the learning rate of a file that `recipes.find_rate` wrote.

    Args:
        plan: the plan. Its batches, steps and sequence lengths stay.
        path: the file: the options of a model, `base_learning_rate` and `base_batch_size`.
        rule: how the rate is scaled to the batch of each phase, see `hf_lamb.scaling.scaled_learning_rate`. Default
            "sqrt".

    Raises:
        ValueError: the file cannot be read, or has no rate; the rule is unknown.
    """
    try:
        found = dict(read_plan(path).options)
    except ValueError as error:
        why = str(error).partition(": ")[0]
        raise ValueError(f"--rate: {why}: `python -m recipes.find_rate` writes such a file") from None
    rate, batch = found.pop("base_learning_rate", None), found.pop("base_batch_size", None)
    if not isinstance(rate, float | int) or not isinstance(batch, int):
        raise ValueError(
            f"--rate {path} has no base_learning_rate and base_batch_size: `python -m recipes.find_rate` writes them"
        )
    found.pop("max_seq_length", None)  # of the search; a plan has its own
    if scheduled := [
        phase.options["batch_size_schedule"] for phase in plan.phases if "batch_size_schedule" in phase.options
    ]:
        raise ValueError(f"--rate: choose a plan with one batch in each phase, not {scheduled[0]!r}")
    scaled = [scaled_learning_rate(rate, batch, phase.options["global_batch_size"], rule) for phase in plan.phases]
    phases = (
        replace(p, options=p.options | {"learning_rate": s.learning_rate}, from_memory=_without_rate(p.from_memory))
        for p, s in zip(plan.phases, scaled, strict=True)
    )
    options = {name: value for name, value in plan.options.items() if name != "size"} | found
    source = f"{plan.source}; {', then '.join(s.why for s in scaled)} ({path})"
    return replace(plan, options=options, phases=tuple(phases), name=f"{plan.name} with a rate found", source=source)


def _without_rate(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if name != "learning_rate")


def with_schedules(plan: Plan, schedules: Sequence[str], rule: str = "sqrt") -> Plan:
    """Return the plan with one `batch_size_schedule` for each phase; without schedules, the plan itself.

    The plan's own rate is then that of its own batch, and is scaled to the batch of each step.

    Raises:
        ValueError: there are not as many schedules as phases; one of them is no schedule; the phase has one already.
    """
    if not schedules:
        return plan
    _check_one_for_each(plan, "batch_size_schedule", schedules)
    phases = []
    for phase, schedule in zip(plan.phases, schedules, strict=True):
        batch_stages(schedule)
        options = dict(phase.options)
        batch, rate = options.pop("global_batch_size", None), options.pop("learning_rate")
        if batch is None:
            raise ValueError(f"batch_size_schedule {schedule!r}: plan {plan.name} has its own, leave it out")
        options |= {"batch_size_schedule": schedule, "base_learning_rate": rate, "base_batch_size": batch}
        options |= {"learning_rate_scaling": rule}
        phases.append(replace(phase, options=options, from_memory=(*phase.from_memory, "batch_size_schedule")))
    return replace(plan, name=f"{plan.name} with a schedule of the batch", phases=tuple(phases))


def find_plan(name: str) -> Plan:
    """Return the plan with this name.

    Raises:
        ValueError: there is none; the message has the most similar name.
    """
    if name not in PLANS:
        raise ValueError(f"unknown plan {name!r}{did_you_mean(name, PLANS)}: expected one of {', '.join(PLANS)}")
    return PLANS[name]


def split_over(plan: Plan, micro_batches: Sequence[int]) -> Plan:
    """Return the plan with a `per_device_train_batch_size` in every phase; without micro-batches, the plan itself.

    Raises:
        ValueError: there are not as many micro-batches as phases.
    """
    if not micro_batches:
        return plan
    _check_one_for_each(plan, "per_device_train_batch_size", micro_batches)
    pairs = zip(plan.phases, micro_batches, strict=True)
    phases = (replace(p, options=p.options | {"per_device_train_batch_size": micro}) for p, micro in pairs)
    return replace(plan, phases=tuple(phases))


def _check_one_for_each(plan: Plan, option: str, values: Sequence[Any]) -> None:
    if len(values) != len(plan.phases):
        raise ValueError(
            f"{option}: give {len(plan.phases)} values, one for each phase of {plan.name}, not {len(values)}"
        )


# ---- The table ------------------------------------------------------------------------------------------------------

MOST_STAGES = 40  # in a list, if no micro-batch says how coarse it is

COLUMNS = {
    "sequence": "max_seq_length",
    "batch": "global_batch_size",
    "steps": "max_steps",
    "warm-up": "warmup_steps",
    "rate": "learning_rate",
}


def table(plan: Plan, gpus: int = 1, seconds: Sequence[float] = (), parameters: float | None = None) -> str:
    """Return a table with one line for each phase: its schedule, and if given its split over GPUs and its time.

    Raises:
        ValueError: there are not as many times as phases, or no micro-batches; the global batch is not a multiple of
            GPUs x micro-batch.
    """
    split = "per_device_train_batch_size" in plan.phases[0].options
    if seconds:
        _check_one_for_each(plan, "seconds_per_micro_batch", seconds)
        if not split:
            raise ValueError("seconds_per_micro_batch without per_device_train_batch_size: give both")
    rows = [[*COLUMNS, "decay", "sequences", "tokens", "lr²T/3"]]
    if split:
        rows[0].append("split (batch x accumulation x GPUs)")
    if seconds:
        rows[0].append("time")
    for i, phase in enumerate(plan.phases):
        options = phase.options
        pairs = zip(_numbers(phase), COLUMNS.values(), strict=True)
        row = [f"{number}*" if name in phase.from_memory else number for number, name in pairs]
        row += [
            phase.decay,
            f"{phase.sequences / 1e6:.3g}M",
            f"{phase.sequences * options['max_seq_length'] / 1e9:.3g}G",
            f"{phase.norm_growth:.3f}",
        ]
        if split:
            at_once = _at_once(options, gpus)
            stages = phase.stages(at_once)
            accumulation = " to ".join(
                f"{number}" for number in _ends([s.accumulation for s, _ in _used(phase, stages)])
            )
            row.append(f"{options['per_device_train_batch_size']} x {accumulation} x {gpus}")
            if seconds:
                row.append(_duration(stages.sequences(options["max_steps"]) / at_once * seconds[i]))
        rows.append(row)
    lines = _aligned(rows)
    weight_decay, max_grad_norm = plan.options["weight_decay"], plan.options["max_grad_norm"]
    lines = [f"{plan.name}: weight decay {weight_decay:g}, gradients clipped to {max_grad_norm:g}", *lines]
    if any(phase.from_memory for phase in plan.phases):
        lines.append("* from memory or by rule, not checked against the source")
    lines.append(f"source: {plan.source}")
    if parameters is not None:
        gib = parameters * BYTES_PER_PARAMETER / 2**30
        lines.append(
            f"memory: {gib:.1f} GiB for weights, gradients and moments in float32; add one micro-batch's activations"
        )
    for phase in plan.phases:
        rate = phase.rate(phase.stages().largest)
        if warning := norm_growth_warning(rate, phase.options["max_steps"], phase.norm_growth):
            lines.append(f"warning: {warning}")
    for number, phase in enumerate(plan.phases, 1):
        if "batch_size_schedule" in phase.options:
            lines += stage_table(phase, number, gpus)
    return "\n".join(lines)


def stage_table(phase: Phase, number: int, gpus: int) -> list[str]:
    """Return lines with batch, rate, lr²T/3 and if given the split of every stage of a phase."""
    micro_batch = phase.options.get("per_device_train_batch_size")
    if micro_batch is None and len(phase.stages().stages) > MOST_STAGES:
        return [f"phase {number}: give per_device_train_batch_size, and its stages are listed"]
    rows = [["from step", "batch", "rate", "lr²T/3"] + ["split"] * (micro_batch is not None)]
    for first, batch, accumulation, rate, growth in phase.of_stages(
        1 if micro_batch is None else _at_once(phase.options, gpus)
    ):
        rows.append([f"{first:,}", f"{batch:,}", f"{rate:.4g}", f"{growth:.4f}"])
        if micro_batch is not None:
            rows[-1].append(f"{micro_batch} x {accumulation} x {gpus}")
    return [f"phase {number}, {phase.options['batch_size_schedule']}:", *_aligned(rows)]


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _used(phase: Phase, stages: BatchStages) -> list[tuple[Stage, int]]:
    return list(stages.within(phase.options["max_steps"]))


def _ends(numbers: list[int]) -> list[int]:
    """Return the first and the last number, or the one that both are."""
    return numbers[:1] if numbers[0] == numbers[-1] else [numbers[0], numbers[-1]]


def commands(plan: Plan) -> str:
    """The options of every phase, as on a command line."""
    lines = []
    for number, phase in enumerate(plan.phases, 1):
        options = _rounded(plan.options_of(phase))
        texts = {name: json.dumps(v) if isinstance(v, dict) else str(v) for name, v in options.items()}
        words = [f"--{name} {shlex.quote(text)}" for name, text in texts.items()]
        lines.append(f"options of phase {number}: {' '.join(words)}")
    return "\n".join(lines)


def names() -> str:
    """Return all plans, one line each."""
    lines = []
    for plan in PLANS.values():
        each = ["{2} steps of {1} x {0} at {4}".format(*_numbers(phase)) for phase in plan.phases]
        lines.append(f"{plan.name:<19}{', then '.join(each)}")
    return "\n".join(lines)


def _numbers(phase: Phase) -> list[str]:
    """What the columns of the table begin with."""
    batches = _ends([stage.batch_size for stage, _ in _used(phase, phase.stages())])
    own = {
        "global_batch_size": " to ".join(f"{batch:,}" for batch in batches),
        "learning_rate": " to ".join(f"{rate:.4g}" for rate in sorted({phase.rate(batch) for batch in batches})),
    }
    return [own.get(name) or f"{phase.options[name]:,}" for name in COLUMNS.values()]


def _at_once(options: dict[str, Any], gpus: int) -> int:
    """Return micro-batch x GPUs. A schedule's batches are rounded to its multiples; a single batch must be one."""
    batch, micro_batch = options.get("global_batch_size", 0), options["per_device_train_batch_size"]
    at_once: int = micro_batch * gpus
    if micro_batch < 1 or gpus < 1 or batch % at_once:
        raise ValueError(
            f"global_batch_size {batch:,} is no multiple of {at_once} = {micro_batch} "
            f"(per_device_train_batch_size) x {gpus} GPUs"
        )
    return at_once


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def main(argv: Sequence[str] | None = None, prog: str = "python -m hf_lamb.plan") -> None:
    """Run the command line."""
    parser = Parser(prog, __doc__ or "")
    parser.add_argument("--plan", help="The plan's name; with --global_batch_size, the plan to scale (paper-32k).")
    parser.add_argument("--global_batch_size", type=int, help="Scale a plan of one phase to this batch.")
    parser.add_argument(
        "--batch_size_schedule",
        nargs="+",
        default=[],
        help="Batches that change during a phase, such as '0:8192 4000:32768' or '8192->32768 over 4000', one of "
        "these for every phase. The rate follows the batch.",
    )
    parser.add_argument("--learning_rate_scaling", default="sqrt", help="Rule for its rate: sqrt, linear, none.")
    parser.add_argument("--rate", help="A file of recipes.find_rate: its model and rate, scaled to the plan's batch.")
    parser.add_argument("--gpus", type=int, default=1, help="Data-parallel devices.")
    parser.add_argument("--per_device_train_batch_size", type=int, nargs="+", default=[], help="For every phase.")
    parser.add_argument("--seconds_per_micro_batch", type=float, nargs="+", default=[], help="Measured, every phase.")
    parser.add_argument("--parameters", type=float, help="The model's number of parameters, for the memory.")
    parser.add_argument(
        "--output", type=Path, help="Write the plan to this YAML file, for recipes.pretrain_bert --plan."
    )
    args = parser.parse_args(argv)
    if args.plan is None and args.global_batch_size is None and args.rate is None and not args.batch_size_schedule:
        sys.stdout.write(names() + "\n")
        return
    try:
        if args.global_batch_size is None:
            plan = find_plan(args.plan or "paper-32k")
        else:
            plan = plan_for_batch(args.global_batch_size, args.plan or "paper-32k", args.learning_rate_scaling)
        if args.rate is not None:
            plan = with_found_rate(plan, args.rate, args.learning_rate_scaling)
        plan = with_schedules(plan, args.batch_size_schedule, args.learning_rate_scaling)
        plan = split_over(plan, args.per_device_train_batch_size)
        overview = table(plan, args.gpus, args.seconds_per_micro_batch, args.parameters)
        sys.stdout.write(f"{overview}\n{commands(plan)}\n")
        if args.output is not None:
            write_plan(plan, args.output)
    except ValueError as error:
        fail(parser.name, error)


if __name__ == "__main__":
    main()
