"""Pretrains an encoder by masked language modelling with LAMB (or AdamW, or SGD) on the embedded corpus or your own.

    python -m recipes.pretrain_bert                                                  # a tiny BERT on a laptop
    accelerate launch --num_processes 8 -m recipes.pretrain_bert --size base --corpus HUB_NAME --streaming
    python -m recipes.pretrain_bert --optim adamw_torch_fused                        # everything else the same
    python -m recipes.pretrain_bert --plan recipes/configs/bert_large_64k_32k.yaml --corpus HUB_NAME   # two phases
    python -m recipes.pretrain_bert --model_name_or_path runs/pretrain_bert/tiny-lamb --corpus my_texts/   # trains on

All options of `transformers.TrainingArguments` are there, with defaults that follow `--size` and `--optim`.
`--help` lists them, with the defaults of the `--size` and `--optim` beside it.
"""

import json
import math
import os
import shlex
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from transformers import (
    EvalPrediction,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState

from hf_lamb import (
    CARRY_OVER,
    CheckpointError,
    LambTrainer,
    LambTrainingArguments,
    check_checkpoint,
    newest_complete_checkpoint,
    noise_scale_in_words,
    options_in_force,
    options_of,
    trust_ratio_history,
    trust_ratio_warnings,
)
from hf_lamb.batch_schedule import batch_stages
from hf_lamb.command_line import fail
from hf_lamb.packed_rows import PackedRowsCollator
from hf_lamb.plan import PLANS, Plan, read_plan
from recipes.lib.console import (
    command_to_fill_masks,
    command_to_open,
    on_a_terminal,
    print_steps,
    show_library_bars,
    what_next,
)
from recipes.lib.findings import blind_loss, has_diverged
from recipes.lib.labelled import IGNORED
from recipes.lib.masking import MaskEpochCallback
from recipes.lib.models import check_same_model, new_model
from recipes.lib.options import RecipeParser, checked_options, parse_options, words_of
from recipes.lib.pretraining import Data, PretrainingArguments, changes, load_data
from recipes.lib.processes import (
    accumulation_of,
    asked_for_and_off,
    check_connected,
    free,
    kind_of,
    leave_process_group,
    micro_batch_of,
    only_run_in,
)
from recipes.lib.report import append_json_line, hardware, provenance
from recipes.study.run_page import draw, run_of, write_run_page

# Sequence length, global batch, steps, warm-up steps (a share of the steps where those are given), LAMB's rate. base:
# ALBERT's published LAMB settings, whose rate and length are not those of the plan paper-4k. base and large want a
# corpus of their own. tiny and mini were tried on the embedded corpus; smoke is the model of compare_optimizers with a
# rate between its two best at batch 32, and micro is that of docs/study.md with its best rate at batch 128.
DEFAULTS: dict[str, dict[str, Any]] = {
    "smoke": dict(
        max_seq_length=32, global_batch_size=32, max_steps=1000, warmup_steps=100, learning_rate=2e-2, vocab_size=512
    ),
    "micro": dict(max_seq_length=32, global_batch_size=128, max_steps=2000, warmup_steps=200, learning_rate=1.4e-2),
    "tiny": dict(max_seq_length=64, global_batch_size=64, max_steps=2400, warmup_steps=240, learning_rate=1e-2),
    "mini": dict(max_seq_length=128, global_batch_size=256, max_steps=3000, warmup_steps=300, learning_rate=1e-2),
    "base": dict(
        max_seq_length=512, global_batch_size=4096, max_steps=125_000, warmup_steps=3125, learning_rate=1.76e-3
    ),
    "large": PLANS["paper-32k"].phases[0].options,
}
# AdamW's best rate is a fifth of LAMB's in docs/results.md, docs/find_rate.md and docs/study.md, at every batch size.
RATE_BESIDE_LAMB = {"lamb": 1.0, "adamw_torch_fused": 0.2, "adamw_torch": 0.2, "sgd": 10.0}

FEW_STEPS = 100  # evaluated and saved twice, not ten times

NOT_IN_PLANS = {"plan", "output_dir", "resume_from_checkpoint"}
MODEL_OPTIONS = ("model_name_or_path", "model_type", "config_name", "config_overrides")
DATA_OPTIONS = ("vocab_size", "tokenizer_name", "corpus", "validation_file", "streaming")
SAME_IN_ALL_PHASES = ("size", *MODEL_OPTIONS, "optim", *DATA_OPTIONS)


@dataclass
class RecipeArguments(PretrainingArguments):
    """The recipe's own options: model, data, batches and phases. `LambTrainingArguments` has all others."""

    _argument_group_name = "this recipe's options"

    global_batch_size: int = field(
        default=64,
        metadata={
            "help": "Sequences in an optimizer step, over all processes; default by --size. The accumulation follows "
            "from it, --per_device_train_batch_size and the number of processes. --batch_size_schedule replaces it."
        },
    )
    plan: str | None = field(
        default=None,
        metadata={
            "help": "A YAML file with options of this command for one or several phases, as `python -m hf_lamb.plan "
            "--output` writes; what the command line gives holds for all phases."
        },
    )
    carry_over: str | None = field(
        default=None,
        metadata={
            "help": "What a phase takes over from the one before (default: moments), and the first one from a "
            "checkpoint of LambTrainer that --model_name_or_path names (default: weights). moments: weights and "
            "moments, and the step count starts anew, as NVIDIA does; optimizer: its step count too; weights: nothing "
            "else.",
            "choices": list(CARRY_OVER),
        },
    )


class RunFacts(TrainerCallback, ExportableState):
    """Records in every checkpoint which data the run has used, and for how many seconds it has trained."""

    def __init__(self, data: dict[str, Any] | None = None, seconds: float | None = 0.0) -> None:
        self.data, self.seconds, self._start = data, seconds, time.perf_counter()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # transformers expects an entry of this callback; a checkpoint of a plain Trainer has none.
        state.stateful_callbacks.setdefault("RunFacts", self.state())

    def elapsed(self) -> float | None:
        """Seconds of training up to now, those before a resume included; None if the checkpoint does not say."""
        return None if self.seconds is None else self.seconds + time.perf_counter() - self._start

    def state(self) -> dict[str, Any]:
        return {"args": {"data": self.data, "seconds": self.elapsed()}, "attributes": {}}

    @staticmethod
    def of(checkpoint: str | None) -> dict[str, Any]:
        """What a checkpoint holds, or {}."""
        if checkpoint is None:
            return {}
        kept = json.loads(Path(checkpoint, "trainer_state.json").read_text()).get("stateful_callbacks", {})
        return kept.get("RunFacts", {}).get("args", {})


@dataclass
class PhaseRun:
    """The training of one phase of a plan; most runs have one."""

    recipe: RecipeArguments
    args: LambTrainingArguments
    number: int = 1
    of: int = 1
    longest_sequence: int = 0  # of all phases: the model has that many positions from the start
    previous_dir: str | None = None  # the output directory of the phase before
    checkpoint: str | None = None  # to resume from
    data: Data | None = None


def main() -> None:
    """Train, evaluate, and leave the model, a line of results.jsonl and pictures in the output directory.

    A plan of several phases has a folder for each: `phase-1`, `phase-2`.
    """
    phases: list[PhaseRun] = []
    with ExitStack() as until_the_end:
        try:
            phases = parse_phases()
            show_library_bars(not phases[0].args.disable_tqdm)
            todo = unfinished(phases)
            goes_on_from = todo[0].checkpoint or newest_of_the_phase_before(todo[0]) if todo else None
            for phase in todo:
                with phase.args.main_process_first(desc="corpus and tokenizer"):
                    phase.data = load_data(phase.recipe, phase.args.seed, goes_on_from)
                check_global_batch(phase.recipe, phase.args, phase.data)
            folders = [phase.args.output_dir for phase in todo]
            until_the_end.enter_context(only_run_in(folders, phases[0].args.process_index == 0))
        except (ValueError, OSError) as error:
            fail("pretrain_bert", error)
        except KeyboardInterrupt:
            interrupted(phases)
        if not todo and phases[0].args.should_log:
            print(in_words_finished(phases))
        try:
            for phase in todo:
                trainer = pretrain(phase)
                phase.data = None
                (leave_process_group if phase is todo[-1] else free)(trainer)
                del trainer
        except KeyboardInterrupt:
            interrupted(phases)


def interrupted(phases: list[PhaseRun]) -> NoReturn:
    """End after Ctrl-C with one line that says how to continue."""
    newest = [newest_complete_checkpoint(phase.args.output_dir) for phase in phases]
    line = "interrupted before the first checkpoint: start it again"
    if any(newest):
        last = next(path for path in reversed(newest) if path)
        line = f"interrupted: the same command with --resume_from_checkpoint auto goes on from {last}"
    if not phases or phases[0].args.process_index == 0:
        sys.stderr.write(f"\npretrain_bert: {line}\n")
    sys.exit(130)


def in_words_finished(phases: list[PhaseRun]) -> str:
    """The message of a run that has nothing left to do."""
    folder = phases[0].args.output_dir
    if len(phases) > 1:
        return f"all {len(phases)} phases are finished, see {Path(folder).parent}"
    return (
        f"the run in {folder} is finished, and its results are there: nothing to do. --output_dir names the place of "
        "another run, a higher --max_steps goes on with this one"
    )


def pretrain(phase: PhaseRun) -> LambTrainer:
    """Train one phase. It writes its line of results last, so that the line means that the phase is complete."""
    recipe, args, data = phase.recipe, phase.args, phase.data
    assert data is not None
    before = RunFacts.of(phase.checkpoint)
    facts = RunFacts(data.facts, before.get("seconds") if phase.checkpoint else 0.0)
    try:
        torch.manual_seed(args.seed)
        model = new_model(recipe, data.tokenizer, phase.longest_sequence)
        trainer = LambTrainer(
            model=model,
            args=args,
            data_collator=PackedRowsCollator(model, recipe.max_seq_length) if recipe.packing else None,
            train_dataset=data.train,
            eval_dataset=data.held_out,
            processing_class=data.tokenizer,
            compute_metrics=accuracy,
            callbacks=[MaskEpochCallback(), facts],
        )
        print_steps(trainer)
        if args.gradient_checkpointing and not trainer.model.supports_gradient_checkpointing:
            raise ValueError(
                f"--gradient_checkpointing: leave it out, transformers' {type(trainer.model).__name__} has none"
            )
        if phase.checkpoint is not None:
            check_same_model(phase.checkpoint, trainer.model)
        begun_with = beginning(phase)
        if phase.checkpoint is None and begun_with is not None:
            taken, source = begun_with
            if source != recipe.model_name_or_path or taken != "weights":  # whose weights the model has already
                trainer.start_from(source, taken)
        if recipe.plan is not None:
            trainer.plan = f"{Path(recipe.plan).name}, phase {phase.number} of {phase.of}"
    except (ValueError, OSError) as error:
        fail("pretrain_bert", error)
    say = print if trainer.is_world_process_zero() else lambda *_: None
    trainer.scale_learning_rate()
    say(describe(phase, trainer, data, begun_with))
    asked = "fp16" if args.fp16 else "bf16" if args.bf16 else None
    for line in [*asked_for_and_off(trainer.accelerator, asked), *changes(before.get("data"), data.facts)]:
        say(f"warning: {line}")

    start, first_step = time.perf_counter(), step_of(phase.checkpoint)
    try:
        trainer.train(resume_from_checkpoint=phase.checkpoint)
        seconds, timed_steps = facts.elapsed(), trainer.state.global_step
        if seconds is None:  # the checkpoint does not say how long it took to get there
            seconds, timed_steps = time.perf_counter() - start, timed_steps - first_step
        metrics = trainer.evaluate()
        trainer.save_model()
        trainer.create_model_card(model_name=recipe.model_name, tasks="fill-mask", **card_of(recipe.corpus))
        if trainer.is_world_process_zero():
            record = result(phase, trainer, data, metrics, seconds, timed_steps, begun_with)
            output = Path(args.output_dir)
            batch = args.batch_size_schedule or recipe.global_batch_size
            title = f"{recipe.model_name}, {args.optim.value}, batch {batch}"
            run = run_of(output, trainer.state, record)
            pictures = draw(output, run, title)
            write_run_page(output, run, record, pictures)
            append_json_line(output / "results.jsonl", record)
            files = [*(path.name for path in pictures), "report.html"]
            say(summary(record, args.output_dir, files, len(data.tokenizer)))
            say(what_next(next_commands(record, args.output_dir, data.tokenizer)))
        trainer.accelerator.wait_for_everyone()
    except (CheckpointError, OSError) as error:
        fail("pretrain_bert", error)
    return trainer


def beginning(phase: PhaseRun) -> tuple[str, str] | None:
    """What the phase takes over, one of CARRY_OVER, and from where; None if it begins with a new model.

    Raises ValueError where the phase before has not ended with a checkpoint.
    """
    if phase.previous_dir is not None:
        source = last_checkpoint(phase) if phase.checkpoint is None else phase.previous_dir
        return phase.recipe.carry_over or "moments", source
    if phase.recipe.model_name_or_path is not None:
        return phase.recipe.carry_over or "weights", phase.recipe.model_name_or_path
    return None


def check_moments(recipe: RecipeArguments) -> None:
    """Raise ValueError where the moments of --model_name_or_path are asked for and there are none."""
    name, wanted = recipe.model_name_or_path, recipe.carry_over
    if name is None or wanted in (None, "weights"):
        return
    try:
        check_checkpoint(name)
    except CheckpointError as error:
        newest = newest_complete_checkpoint(name)
        remedy = "leave --carry_over out" if newest is None else f"give --model_name_or_path {newest}"
        raise ValueError(f"--carry_over {wanted}: {str(error).partition(';')[0]}: {remedy}") from None


def step_of(checkpoint: str | None) -> int:
    """The optimizer step that a checkpoint was written after; 0 without one."""
    return json.loads(Path(checkpoint, "trainer_state.json").read_text())["global_step"] if checkpoint else 0


def card_of(corpus: list[str]) -> dict[str, Any]:
    """What a model card says of the data; of files their names only."""
    if corpus == ["embedded"]:
        return {"language": "en", "dataset": "messages of US presidents, 1900-2026"}
    return {"dataset": [item if not os.path.exists(item) else Path(item).name for item in corpus]}


def parse_phases(argv: list[str] | None = None) -> list[PhaseRun]:
    """The command line; with --plan a phase for each of the plan's, in folders of their own.

    Raises ValueError for what `read_plan`, `checked_options` and `parse` refuse, and for phases that cannot follow one
    another.
    """
    argv = sys.argv[1:] if argv is None else argv
    path = parser_of(add_help=False).parse_known_args(argv)[0].plan
    plan = Plan() if path is None else read_plan(path)
    try:
        planned = [checked_options(parser_of(), plan.options_of(phase), NOT_IN_PLANS) for phase in plan.phases]
    except ValueError as error:
        raise ValueError(f"--plan {path}: {error}") from None
    phases = [PhaseRun(*parse(argv, options), number, len(planned)) for number, options in enumerate(planned, 1)]
    first, *later = phases
    for phase in later:
        for name in SAME_IN_ALL_PHASES:
            one, other = (getattr(p.recipe if hasattr(p.recipe, name) else p.args, name) for p in (first, phase))
            if one != other:
                raise ValueError(
                    f"--plan {path}: {name} is {other} in phase {phase.number} and {one} in phase 1: give it once"
                )
    if later and first.args.deepspeed_plugin is not None:
        raise ValueError(
            f"--plan {path} has {len(phases)} phases: train it with DDP or FSDP2, DeepSpeed cannot begin a phase with "
            "the checkpoint of the one before"
        )
    if later and any(phase.args.save_strategy == "no" for phase in phases):
        raise ValueError("--save_strategy no: a phase begins with the last checkpoint of the one before: leave it out")
    check_size(path, planned[0], first.recipe.size)
    folder = first.args.output_dir
    for phase in phases:
        phase.longest_sequence = max(phase.recipe.max_seq_length for phase in phases)
        if later:
            phase.args.output_dir = os.path.join(folder, f"phase-{phase.number}")
            phase.args.hub_model_id = phase.args.hub_model_id or os.path.basename(os.path.abspath(folder))
        if phase is not first:
            phase.previous_dir = os.path.join(folder, f"phase-{phase.number - 1}")
    return phases


def check_size(path: str | None, options: dict[str, Any], size: str) -> None:
    """Raise for a plan for another model: its rates and batches say nothing about this one."""
    if (planned := options.get("size", size)) != size:
        raise ValueError(
            f"--plan {path} is for --size {planned}, not {size}: leave --size out, or write size: {size} there "
            "if its batches and rates are meant for that"
        )


def unfinished(phases: list[PhaseRun]) -> list[PhaseRun]:
    """The phases that are still to do; the first of them goes on from a checkpoint where it has one.

    Raises ValueError for what `checkpoint_to_resume` refuses.
    """
    if len(phases) == 1:
        phases[0].checkpoint = checkpoint_to_resume(phases[0].args)
        return [] if is_finished(phases[0]) else phases
    wanted = phases[0].args.resume_from_checkpoint
    folder = Path(phases[0].args.output_dir).parent
    if wanted is not None and wanted.lower() not in ("auto", "latest", "true"):
        raise ValueError(f"--resume_from_checkpoint {wanted}: with several phases give latest or auto")
    todo = [phase for phase in phases if not Path(phase.args.output_dir, "results.jsonl").exists()]
    begun = len(todo) < len(phases) or newest_complete_checkpoint(phases[0].args.output_dir) is not None
    if begun and wanted is None:
        raise ValueError(
            f"{folder} holds checkpoints of an earlier run: add --resume_from_checkpoint latest to go on from there, "
            "or --output_dir for another place"
        )
    if not begun and wanted is not None and wanted.lower() != "auto":
        raise ValueError(f"--resume_from_checkpoint {wanted}: there is no checkpoint in {folder}")
    if todo:
        todo[0].checkpoint = newest_complete_checkpoint(todo[0].args.output_dir)
    return todo


def is_finished(phase: PhaseRun) -> bool:
    """Whether the checkpoint is the last one of this run, and its results are written."""
    results = Path(phase.args.output_dir, "results.jsonl")
    if phase.checkpoint is None or not results.exists():
        return False
    state = json.loads(Path(phase.checkpoint, "trainer_state.json").read_text())
    steps = phase.args.max_steps
    if steps <= 0:  # epochs are given; how many steps they are is only known of those that were
        steps = state["max_steps"] if state["num_train_epochs"] == math.ceil(phase.args.num_train_epochs) else math.inf
    written = [json.loads(line) for line in results.read_text().splitlines() if line.endswith("}")]
    return state["global_step"] >= steps and any(line.get("steps") == state["global_step"] for line in written)


def newest_of_the_phase_before(phase: PhaseRun) -> str | None:
    """The newest checkpoint of the phase before, whose tokenizer is used in this phase too."""
    return newest_complete_checkpoint(phase.previous_dir) if phase.previous_dir is not None else None


def last_checkpoint(phase: PhaseRun) -> str:
    """The checkpoint that the phase before ended with. Raises ValueError where it is not there."""
    assert phase.previous_dir is not None
    newest = newest_complete_checkpoint(phase.previous_dir)
    if newest is None:
        raise ValueError(
            f"{phase.previous_dir} has no checkpoint for phase {phase.number} to begin with: restore the last one, or "
            "delete the folder to train that phase again"
        )
    state = json.loads(Path(newest, "trainer_state.json").read_text())
    if state["global_step"] < state["max_steps"]:
        raise ValueError(
            f"{newest} is not the end of its phase ({state['global_step']} of {state['max_steps']} steps), with which "
            f"phase {phase.number} begins: restore the last checkpoint, or delete results.jsonl beside it to train "
            "the rest of that phase"
        )
    return newest


def parse(
    argv: list[str] | None = None, planned: dict[str, Any] | None = None, name: str = "pretrain_bert"
) -> tuple[RecipeArguments, LambTrainingArguments]:
    """The command line, with defaults that a plan gives, or that follow the size, the optimizer and this machine.

    planned: the options of a plan, as `checked_options` returns them. name: of the recipe that was called.

    Raises ValueError for a global batch that the processes and micro-batches cannot make up.
    """
    early_parser = parser_of(add_help=False, name=name)
    early_parser.set_defaults(**planned or {})
    early, _ = early_parser.parse_known_args(argv)
    other = early.model_name_or_path or early.model_type or early.config_name
    size = early.size or "tiny"
    defaults = {"size": None if other else size, **DEFAULTS[size]}
    defaults["learning_rate"] *= RATE_BESIDE_LAMB.get(early.optim, 0.2)
    if early.base_learning_rate is not None:
        del defaults["learning_rate"]
    share = defaults["warmup_steps"] / defaults["max_steps"]
    if early.num_train_epochs is not None:
        if early.max_steps is not None and early.max_steps > 0:
            raise ValueError(
                f"--num_train_epochs {early.num_train_epochs:g}: --max_steps {early.max_steps} would decide: leave "
                "one out, or give --max_steps -1 beside a plan that has max_steps"
            )
        defaults["max_steps"] = -1
    global_batch, steps = (
        getattr(early, name) or defaults[name] for name in ("global_batch_size", "max_steps")
    )  # None: not given
    if early.batch_size_schedule is not None:
        if early.global_batch_size is not None:
            raise ValueError(
                f"--batch_size_schedule {early.batch_size_schedule!r}: leave out --global_batch_size "
                f"{early.global_batch_size}, which it replaces"
            )
        batches = [stage.batch_size for stage in batch_stages(early.batch_size_schedule).stages]
        global_batch, defaults["global_batch_size"] = min(batches), max(batches)
    defaults["warmup_steps"] = round(share * steps) if steps > 0 else share
    devices = int(os.environ.get("WORLD_SIZE", 1))
    folder_name = Path(other).absolute().name if other else size
    smoke = size == "smoke" and not other
    few = 0 < steps < FEW_STEPS
    parser = parser_of(name=name)
    parser.set_defaults(
        **defaults,
        output_dir=f"runs/pretrain_bert/{Path(early.plan).stem if early.plan else folder_name}-{early.optim}",
        per_device_train_batch_size=micro_batch_of(global_batch, devices),
        per_device_eval_batch_size=256 if smoke else 32,
        logging_steps=50 if smoke and not few else 10,
        eval_strategy="steps",
        eval_on_start=early.model_name_or_path is not None,
        eval_steps=0.5 if few else 0.2 if smoke else 0.1,
        save_steps=0.5 if few else 0.1,
        save_total_limit=2,
        disable_tqdm=not on_a_terminal(),
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported() and not early.fp16,
        use_cpu=not torch.accelerator.is_available(),
    )
    parser.set_defaults(**planned or {})
    recipe, args = parse_options(parser, argv)
    check_numbers(recipe, args)
    check_moments(recipe)
    check_connected(args.world_size)
    devices = args.world_size * max(1, args.n_gpu)
    if early.per_device_train_batch_size is None:
        args.per_device_train_batch_size = micro_batch_of(global_batch, devices)
    if args.batch_size_schedule is None:
        set_accumulation(recipe, args, devices)
    for name in ("eval_steps", "save_steps"):  # as Trainer does, which then compares them with a checkpoint's
        if args.max_steps > 0 and (share := getattr(args, name)) is not None and 0 < share < 1:
            setattr(args, name, math.ceil(args.max_steps * share))
    return recipe, args


def set_accumulation(recipe: RecipeArguments, args: LambTrainingArguments, devices: int) -> None:
    """Set the accumulation steps of the global batch. Raises ValueError for a batch that cannot be made up."""
    accumulation = accumulation_of(recipe.global_batch_size, args.per_device_train_batch_size, devices)
    if args.gradient_accumulation_steps not in (1, accumulation):
        raise ValueError(
            f"--gradient_accumulation_steps {args.gradient_accumulation_steps}: leave it out, it follows from "
            f"--global_batch_size and is {accumulation}"
        )
    args.gradient_accumulation_steps = accumulation


def parser_of(add_help: bool = True, name: str = "pretrain_bert") -> RecipeParser:
    """The parser, whose help has the recipe's options first, then those of LambTrainingArguments alone.

    Without `add_help`, for a first look at the command line: numbers that other defaults follow from are None unless
    they are given.
    """
    parser = RecipeParser((RecipeArguments, LambTrainingArguments), name, __doc__, add_help=add_help)
    if not add_help:
        names = ("global_batch_size", "max_steps", "num_train_epochs", "per_device_train_batch_size")
        parser.set_defaults(**dict.fromkeys(names))
    positional, inherited, own = parser._action_groups
    lambs = parser.add_argument_group("options of hf_lamb.LambTrainingArguments")
    theirs = {field.name for field in fields(TrainingArguments)} | {"help"}
    lambs._group_actions = [action for action in inherited._group_actions if action.dest not in theirs]
    inherited._group_actions = [action for action in inherited._group_actions if action.dest in theirs]
    inherited.title = "options of transformers.TrainingArguments"
    parser._action_groups = [own, lambs, inherited, positional]
    parser._option_string_actions["--resume_from_checkpoint"].help = (
        "A checkpoint's folder; 'latest': the newest complete one in --output_dir; 'auto': the same, and a new run "
        "where there is none, for runs that something restarts."
    )
    return parser


def given_options(argv: list[str], name: str) -> dict[str, Any]:
    """What a command line gives that differs from the defaults, by the options' names. name: of the recipe."""
    parser = parser_of(add_help=False, name=name)
    given, unchanged = (vars(parser.parse_known_args(words)[0]) for words in (argv, []))
    return {name: value for name, value in sorted(given.items()) if value != unchanged[name]}


def check_numbers(recipe: RecipeArguments, args: LambTrainingArguments) -> None:
    """Raise for numbers that would otherwise fail far from here, or train nothing."""
    least = {
        "global_batch_size": 1,
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "dataloader_num_workers": 0,
        "learning_rate": 0,
        "seed": 0,
        **({"num_train_epochs": 0.001} if args.max_steps == -1 else {"max_steps": 1}),
    }
    for option, low in least.items():
        value = getattr(recipe if hasattr(recipe, option) else args, option)
        if not low <= value < 2**32:
            raise ValueError(f"--{option} {value}: expected at least {low}, and less than 2**32")
    if recipe.packing and args.train_sampling_strategy == "group_by_length":
        raise ValueError("--train_sampling_strategy group_by_length: leave it out, packed rows have one length")


def check_global_batch(recipe: RecipeArguments, args: LambTrainingArguments, data: Data) -> None:
    """Raise where a step would get fewer sequences than asked for: Trainer ends a step at the end of an epoch."""
    if not recipe.streaming and len(data.train) < recipe.global_batch_size:
        kind = "packed rows" if recipe.packing else "sequences"
        raise ValueError(
            f"--global_batch_size {recipe.global_batch_size} is more than the corpus' {len(data.train)} training "
            f"{kind} of {recipe.max_seq_length} tokens: lower it, or give a larger --corpus"
        )


def checkpoint_to_resume(args: LambTrainingArguments) -> str | None:
    """The checkpoint that --resume_from_checkpoint names; `latest` is the newest complete one in the output directory.

    `auto` is `latest`, and the start of a new run where there is none: for runs that something restarts.

    Raises ValueError where there is none, where it is damaged, and where there is one that nobody asked to resume.
    """
    wanted, output = args.resume_from_checkpoint, args.output_dir
    if wanted is None:
        if (newest := newest_complete_checkpoint(output)) is not None:
            raise ValueError(
                f"{output} holds {os.path.basename(newest)} of an earlier run: add --resume_from_checkpoint latest "
                "to go on from there, or --output_dir for another place"
            )
        return None
    if wanted.lower() == "auto":
        return newest_complete_checkpoint(output)
    if wanted.lower() in ("latest", "true"):
        if (newest := newest_complete_checkpoint(output)) is None:
            raise ValueError(f"--resume_from_checkpoint {wanted}: there is no checkpoint in {output}")
        return newest
    check_checkpoint(wanted)
    return wanted


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of the masked positions where the likeliest token is the right one."""
    masked = prediction.label_ids != IGNORED
    return {"accuracy": float(np.mean(prediction.predictions[masked] == prediction.label_ids[masked]))}


def describe(phase: PhaseRun, trainer: LambTrainer, data: Data, begun_with: tuple[str, str] | None = None) -> str:
    """What is printed before the training: model, data, batch, hardware, learning rate."""
    recipe, args = phase.recipe, phase.args
    size = "a stream" if recipe.streaming else f"{len(data.train):,} {'rows' if recipe.packing else 'sequences'}"
    of_several = f"phase {phase.number} of {phase.of}: " if phase.of > 1 else ""
    steps = f"{args.max_steps:,} steps" if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    lines = [
        f"{of_several}{recipe.model_name}, {trainer.model.num_parameters():,} parameters, vocabulary "
        f"{len(data.tokenizer):,}",
        f"corpus {' '.join(recipe.corpus)}: {size} of {recipe.max_seq_length} tokens to train on, "
        f"{len(data.held_out):,} held out",
        *[in_words_packing(data, recipe.streaming)] * recipe.packing,
        f"{batch_in_words(recipe, args, trainer)}; {steps} of {args.optim.value}",
        f"{kind_of(trainer.accelerator)} on {hardware()}",
    ]
    if phase.checkpoint is None and begun_with is not None:
        words = {
            "weights": "the weights",
            "moments": "the weights and moments",
            "optimizer": "weights, moments and step",
        }
        lines.append(f"begins with {words[begun_with[0]]} of {begun_with[1]}")
    if phase.checkpoint is None:
        lines.append(trainer.learning_rate_why or f"learning rate {args.learning_rate:g}")
    else:
        of = f"step {step_of(phase.checkpoint):,} of {args.max_steps:,}" if args.max_steps > 0 else "its step"
        lines.append(f"resuming from {phase.checkpoint}, {of}, with the checkpoint's learning rate and options")
    return "\n".join(lines)


def batch_in_words(recipe: RecipeArguments, args: LambTrainingArguments, trainer: LambTrainer) -> str:
    """The global batch, or the batches of --batch_size_schedule, and what makes it up."""
    devices, micro_batch = args.world_size * max(1, args.n_gpu), args.per_device_train_batch_size
    if trainer.staged is not None:
        words = trainer.staged.in_words(args.max_steps)
        return f"global batch {words}, in passes of {micro_batch} sequences x {devices} processes"
    return (
        f"global batch {recipe.global_batch_size:,} = {micro_batch} sequences x {args.gradient_accumulation_steps} "
        f"accumulation steps x {devices} processes"
    )


def sequences_of(recipe: RecipeArguments, trainer: LambTrainer, last_steps: int) -> int:
    """The sequences that the last steps have trained on."""
    if trainer.staged is None:
        return last_steps * recipe.global_batch_size
    sequences, steps = trainer.staged.stages.sequences, trainer.state.global_step
    return sequences(steps) - sequences(steps - last_steps)


def in_words_packing(data: Data, streaming: bool) -> str:
    """The share of padding that packing saves."""
    of = f"the {data.facts['train_sequences']:,} sequences{' of the sample' * streaming}"
    return f"packing {of}: {data.padding:.1%} of the tokens are padding, {data.padding_unpacked:.1%} without it"


def result(
    phase: PhaseRun,
    trainer: LambTrainer,
    data: Data,
    metrics: dict[str, float],
    seconds: float,
    timed_steps: int,
    begun_with: tuple[str, str] | None = None,
) -> dict[str, Any]:
    """The line of results.jsonl; of the optimizer's options those in force, whatever the command line says.

    seconds: of the training of the last `timed_steps` steps, also before the run was resumed.
    begun_with: what the run took over, and from where.
    """
    recipe, args = phase.recipe, phase.args
    of_plan = {"plan": Path(recipe.plan).name, "phase": phase.number, "phases": phase.of} if recipe.plan else {}
    history, options = trust_ratio_history(trainer.state), plain(options_in_force(trainer.optimizer))
    why = trainer.learning_rate_why or "given"
    if phase.checkpoint is not None and not math.isclose(options["learning_rate"], trainer.scale_learning_rate()):
        why = "the checkpoint's"
    return {
        "recipe": "pretrain_bert",
        **provenance(),
        **of_plan,
        "size": recipe.size,
        "model": {
            "architecture": trainer.model.config.architectures[0],  # as it was saved
            "parameters": trainer.model.num_parameters(),
            **{name: value for name in MODEL_OPTIONS if (value := getattr(recipe, name)) is not None},
        },
        "carry_over": None if begun_with is None else begun_with[0],
        "carried_over_from": None if begun_with is None else begun_with[1],
        "corpus": recipe.corpus,
        "optim": args.optim.value,
        "optim_args": args.optim_args if as_given(args, options) else None,
        "options": options,
        "learning_rate": options["learning_rate"],
        "learning_rate_why": why,
        "warmup_steps": args.get_warmup_steps(args.max_steps),
        "weight_decay": options["weight_decay"],
        "max_grad_norm": args.max_grad_norm,
        "global_batch_size": trainer.get_total_train_batch_size(args),
        "batch_size_schedule": args.batch_size_schedule,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "processes": args.world_size,
        "max_seq_length": recipe.max_seq_length,
        "packing": recipe.packing,
        "padding": round(data.padding, 4),
        "steps": trainer.state.global_step,
        "seed": args.seed,
        "trust_ratios": {layer: row[-1] for layer, row in history.get("ratios", {}).items() if row},
        "trust_ratio_warnings": trust_ratio_warnings(history),
        "noise_scale": trainer.noise_scale.value(),
        "held_out_loss": metrics["eval_loss"],
        "held_out_loss_at_start": loss_at_start(trainer),
        "held_out_accuracy": metrics["eval_accuracy"],
        "unigram_loss": data.unigram_loss,
        "unigram_accuracy": data.unigram_accuracy,
        "seconds": round(seconds, 1),
        "timed_steps": timed_steps,
        "tokens_per_second": round(sequences_of(recipe, trainer, timed_steps) * recipe.max_seq_length / seconds),
    }


def loss_at_start(trainer: LambTrainer) -> float | None:
    """The held-out loss before the first step, where --eval_on_start has measured it."""
    values = (line["eval_loss"] for line in trainer.state.log_history if line["step"] == 0 and "eval_loss" in line)
    return next(values, None)


def plain(value: Any) -> Any:
    """The value in types that JSON has: DeepSpeed and others keep objects of their own in an optimizer's groups."""
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def as_given(args: LambTrainingArguments, options: dict[str, Any]) -> bool:
    """Whether the options of --optim_args are in force: those of a checkpoint may be others."""
    if args.optim != "lamb" or args.optim_args is None:
        return True
    given = plain(options_of(args))
    return all(
        options.get(name, value) == value for name, value in given.items() if name not in ("lr", "weight_decay")
    )


def summary(record: dict[str, Any], output_dir: str, pictures: list[str], vocabulary: int) -> str:
    """What is printed after the training: loss, accuracy, time, noise scale, files."""
    loss, unigram_loss, steps = record["held_out_loss"], record["unigram_loss"], record["steps"]
    verdict = f"{abs(unigram_loss - loss):.3f} nats {'better' if loss < unigram_loss else 'WORSE'}"
    if loss >= unigram_loss and steps < FEW_STEPS:
        verdict = f"{steps} steps only show that it runs"
    if has_diverged(loss, vocabulary):
        blind = blind_loss(vocabulary)
        verdict = f"DIVERGED, guessing blindly gives {blind:.3f}: lower the rate of {record['learning_rate']:g}"
    minutes = record["seconds"] / 60
    noise_scale, batch = record["noise_scale"], record["global_batch_size"]
    noise = ""  # it takes accumulation or several processes, and some steps
    if noise_scale is not None:
        noise = f"\nnoise scale              {noise_scale_in_words(noise_scale, batch)}"
        noise += "\n" + 25 * " " + "an estimate, mostly too low: python -m recipes.critical_batch measures it"
    speed = f", {record['tokens_per_second']:,} tokens/s" if record["timed_steps"] else ""
    since = "" if record["timed_steps"] == steps else f"the last {record['timed_steps']:,} of "
    start = record.get("held_out_loss_at_start")
    before = "" if start is None else f"\nbefore the first step    {start:.3f} nats"
    return f"""
held-out masked-LM loss  {loss:.3f} nats   unigrams {unigram_loss:.3f} nats: {verdict}{before}
held-out accuracy        {record["held_out_accuracy"]:.1%}        unigrams {record["unigram_accuracy"]:.1%}
time                     {since}{steps:,} steps in {minutes:.1f} minutes{speed}{noise}
model                    {output_dir} (AutoModelForMaskedLM.from_pretrained)
results, pictures        {output_dir}: {", ".join(["results.jsonl", *pictures])}"""


def next_commands(record: dict[str, Any], output_dir: str, tokenizer: Any) -> dict[str, str]:
    """What one may type after the training, by what it is for; after a run that diverged, how to find a rate."""
    commands = {"see the curves": command_to_open(Path(output_dir, "report.html"))}
    if has_diverged(record["held_out_loss"], len(tokenizer)):
        own = {name: record["model"][name] for name in MODEL_OPTIONS if name in record["model"]}
        options = own | {"max_seq_length": record["max_seq_length"]} if own else {"size": record["size"]}
        words = [*words_of(options), *(["--corpus", *record["corpus"]] if record["corpus"] != ["embedded"] else [])]
        return commands | {"find a rate": f"python -m recipes.find_rate {shlex.join(words)}"}
    try_it, output_dir = command_to_fill_masks(output_dir, tokenizer.mask_token), shlex.quote(output_dir)
    commands["try it"] = try_it
    if record["size"] == "smoke":
        return commands | {"train a larger one": "make pretrain"}
    return commands | {
        "fine-tune it": f'make finetune ARGS="--model {output_dir}"',
        "train it on": f"python -m recipes.pretrain_bert --model_name_or_path {output_dir} --corpus my_texts/",
    }


if __name__ == "__main__":
    main()
