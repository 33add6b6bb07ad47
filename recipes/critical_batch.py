"""Measures the critical batch of a checkpoint of recipes.pretrain_bert: up to which batch a step is worth its tokens.

    python -m recipes.critical_batch runs/pretrain_bert/tiny-lamb/checkpoint-2160 --batches 64 128 256 512

From the checkpoint, with its moments, it trains the same sequences once at each batch, with the checkpoint's learning
rate times sqrt(batch / the run's batch). The critical batch is the largest one whose loss at the end is at most 0.01
nats above that of every smaller batch. If it is stopped, the same command goes on: finished batches are kept.
"""

import hashlib
import json
import math
import shlex
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PrinterCallback

from hf_lamb import CheckpointError, LambTrainer, LambTrainingArguments, check_checkpoint, newest_complete_checkpoint
from hf_lamb.batch_schedule import batch_stages
from hf_lamb.command_line import fail, stopped
from hf_lamb.scaling import scaled_learning_rate
from recipes.lib.console import on_a_terminal, show_library_bars, what_next
from recipes.lib.masking import MaskedBlocks, MaskEpochCallback
from recipes.lib.models import longest_sequence, new_model
from recipes.lib.options import RecipeParser, parse_options, words_of
from recipes.lib.pretraining import Data, PretrainingArguments, changes, load_data
from recipes.lib.processes import (
    accumulation_of,
    check_connected,
    free,
    micro_batch_of,
    only_run_in,
)
from recipes.lib.report import append_json_line, provenance
from recipes.study.critical_report import LAST, critical_batch, draw, sentence, smoothed, table
from recipes.study.sweep import Record

STEPS = 16  # of the largest batch, in the default window
# The options of the optimizer, which are those of the checkpoint's run.
OPTIMIZERS = ("optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm")


@dataclass
class CriticalBatchArguments:
    """The recipe's options. Model, optimizer and corpus are those of the checkpoint."""

    batches: list[int] = field(
        default_factory=lambda: [64, 128, 256, 512], metadata={"help": "Global batches, in sequences."}
    )
    tokens: int | None = field(
        default=None,
        metadata={"help": f"Tokens that each batch trains on; default: {STEPS} steps of the largest batch."},
    )
    learning_rate: float | None = field(
        default=None, metadata={"help": "The rate at --base_batch_size; default: the checkpoint's."}
    )
    base_batch_size: int | None = field(
        default=None, metadata={"help": "The batch that the rate belongs to; default: that of the checkpoint's run."}
    )
    tolerance: float = field(default=0.01, metadata={"help": "Nats that a batch may lose."})
    corpus: list[str] | None = field(
        default=None, metadata={"help": "As recipes.pretrain_bert's; default: that of the checkpoint's run."}
    )
    validation_file: list[str] | None = field(default=None, metadata={"help": "As recipes.pretrain_bert's."})
    max_seq_length: int | None = field(
        default=None,
        metadata={"help": "Tokens in a sequence; default: the run's, else as many as the model has positions."},
    )
    mlm_probability: float | None = field(
        default=None, metadata={"help": "Share of the tokens that is masked; default: that of the checkpoint's run."}
    )
    per_device_train_batch_size: int | None = field(
        default=None, metadata={"help": "Sequences at a time on each process; default: at most 32, as many as fit."}
    )
    seed: int = field(
        default=1, metadata={"help": "Of data order and masks; not the run's, whose masks the model saw."}
    )
    output_dir: str = field(default="runs/critical_batch", metadata={"help": "The folder of the lines and pictures."})
    use_cpu: bool = field(default=False, metadata={"help": "Use no accelerator."})


@dataclass
class Branches:
    """What all branches have in common."""

    own: CriticalBatchArguments
    checkpoint: str
    arguments: dict[int, LambTrainingArguments]  # of each branch
    model: PretrainingArguments
    data: Data
    run: dict[str, Any]  # what decides the outcome: a line of another run is no line of this one

    def train(self, batch: int) -> Record:
        """Train one branch; returns its line."""
        own, run, args = self.own, self.run, self.arguments[batch]
        start = time.perf_counter()
        torch.manual_seed(own.seed)
        trainer = LambTrainer(
            model=new_model(self.model, self.data.tokenizer, run["max_seq_length"]),
            args=args,
            train_dataset=self.data.train,
            eval_dataset=self.data.held_out,
            callbacks=[MaskEpochCallback()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.start_from(self.checkpoint, "optimizer")
        trainer.train()
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        held_out = trainer.evaluate()["eval_loss"]
        record = {
            "batch": batch,
            "learning_rate": args.learning_rate,
            "steps": trainer.state.global_step,
            "loss": smoothed(losses),
            "held_out_loss": held_out,
            "losses": losses,
            "seconds": round(time.perf_counter() - start, 1),
            "processes": args.world_size,
        }
        free(trainer)
        return record


def main() -> None:
    """Train the branches that are missing; leave branches.jsonl and critical_batch.png in the folder."""
    with ExitStack() as until_the_end:
        show_library_bars(on_a_terminal())
        try:
            own, checkpoint = parse()
            args = LambTrainingArguments(output_dir=own.output_dir, use_cpu=own.use_cpu, report_to="none")
            check_connected(args.world_size)
            with args.main_process_first(desc="corpus and tokenizer"):
                branches = prepare(own, checkpoint)
            is_first = args.process_index == 0
            until_the_end.enter_context(only_run_in([own.output_dir], is_first))
            file = Path(own.output_dir, "branches.jsonl")
            records = kept(file, branches.run)
        except (ValueError, OSError) as error:
            fail("critical_batch", error)
        say = print if is_first else lambda *_: None
        before = facts_of(checkpoint)
        for line in changes(before and before | {"seed": own.seed}, branches.data.facts):  # branches have their own
            say(f"warning: {line}")
        start = time.perf_counter()
        try:
            for batch in branches.arguments:
                if batch in records:
                    continue
                say(f"batch {batch:,}: {branches.run['sequences'] // batch:,} steps")
                records[batch] = branches.train(batch) | {"run": branches.run}
                if is_first:
                    append_json_line(file, {"recipe": "critical_batch", **provenance(), **records[batch]})
        except CheckpointError as error:
            fail("critical_batch", error)
        except KeyboardInterrupt:
            stopped("critical_batch", "the same command goes on with the batches that are missing")
        measured = [records[batch] for batch in branches.arguments]
        if is_first:
            draw(measured, Path(own.output_dir, "critical_batch.png"))
            say(f"\n{table(measured)}\n{sentence(measured)}")
            say(f"{time.perf_counter() - start:.0f} seconds; {own.output_dir}: branches.jsonl, critical_batch.png")
            best = critical_batch({record["batch"]: record["loss"] for record in measured}, own.tolerance)
            say(what_next({"train on at this batch": command_to_train_on(branches, best)}))
        leave(args)


def parse() -> tuple[CriticalBatchArguments, str]:
    """The options and the checkpoint. Raises ValueError for numbers that cannot be."""
    parser = RecipeParser(CriticalBatchArguments, "critical_batch", __doc__)
    parser.add_argument("checkpoint", help="A checkpoint of recipes.pretrain_bert, or its output directory.")
    own, rest = parse_options(parser)
    if len(set(own.batches)) < 2 or min(own.batches) < 1 or len(set(own.batches)) < len(own.batches):
        given = " ".join(map(str, own.batches))
        raise ValueError(f"--batches {given}: give two or more different numbers, such as 64 128 256")
    least = {"tokens": 1, "learning_rate": 0.0, "base_batch_size": 1, "max_seq_length": 2, "tolerance": 0.0, "seed": 0}
    for name, low in least.items():
        value = getattr(own, name)
        if value is not None and not low <= value < 2**63:
            raise ValueError(f"--{name} {value}: expected a number of at least {low:g}")
    if Path(rest.checkpoint, "trainer_state.json").exists():
        return own, rest.checkpoint
    return own, newest_complete_checkpoint(rest.checkpoint) or rest.checkpoint


def prepare(own: CriticalBatchArguments, checkpoint: str) -> Branches:
    """Read the checkpoint and its data. Raises ValueError where they do not give branches."""
    check_checkpoint(checkpoint)
    theirs, state = arguments_file(checkpoint), json.loads(Path(checkpoint, "trainer_state.json").read_text())
    rate, base = own.learning_rate, own.base_batch_size
    if rate is None:
        rate = rate_of(checkpoint)
    if base is None:
        processes = max(1, len(list(Path(checkpoint).glob("rng_state_*.pth"))))
        at_once, schedule = state["train_batch_size"] * processes, getattr(theirs, "batch_size_schedule", None)
        base = at_once * theirs.gradient_accumulation_steps
        if schedule is not None:
            base = batch_stages(schedule, at_once).at(state["global_step"]).batch_size
    if not rate > 0:
        raise ValueError(
            f"the learning rate of {checkpoint} is {rate:g}, at the end of its run: give an earlier checkpoint, or "
            "--learning_rate, such as the peak of the run"
        )
    known = facts_of(checkpoint) or {}
    length = own.max_seq_length or known.get("max_seq_length")
    length = length or longest_sequence(AutoConfig.from_pretrained(checkpoint))
    if length is None:
        raise ValueError(f"the model of {checkpoint} does not say how long its sequences are: give --max_seq_length")
    sequences = STEPS * max(own.batches) if own.tokens is None else own.tokens // length
    together = math.lcm(*own.batches)
    if sequences < 1 or sequences % together:
        fitting = max(1, round(sequences / together)) * together * length
        raise ValueError(
            f"--tokens {own.tokens or sequences * length}: every batch must make them up in whole steps: give "
            f"{fitting}, or batches that are multiples of each other"
        )
    if sequences < LAST * max(own.batches):
        raise ValueError(
            f"--tokens {sequences * length}: give at least {LAST * max(own.batches) * length}, {LAST} steps of the "
            "largest batch: the loss is smoothed over the last of them"
        )
    model = PretrainingArguments(
        model_name_or_path=checkpoint,
        corpus=own.corpus or known.get("corpus", ["embedded"]),
        validation_file=own.validation_file,
        max_seq_length=length,
        mlm_probability=own.mlm_probability or known.get("mlm_probability", 0.15),
    )
    data = load_data(model, own.seed, checkpoint)
    check_one_epoch(own, data, sequences, length)
    run = {
        "checkpoint": Path(checkpoint).name,
        "step": state["global_step"],
        "weights": digest_of(checkpoint),
        "data": data.facts["train"],
        "base_learning_rate": rate,
        "base_batch_size": base,
        "sequences": sequences,
        "max_seq_length": length,
        "mlm_probability": model.mlm_probability,
        "seed": own.seed,
        "tolerance": own.tolerance,
        "noise_scale": noise_scale_of(checkpoint),
    }
    arguments = {batch: arguments_of(own, theirs, batch, run) for batch in sorted(own.batches)}
    return Branches(own, checkpoint, arguments, model, data, run)


def check_one_epoch(own: CriticalBatchArguments, data: Data, sequences: int, length: int) -> None:
    """Raise ValueError where an epoch ends within a branch: it ends a step, at another place for each batch."""
    if not isinstance(data.train, MaskedBlocks):
        return
    if len(data.train) < max(own.batches):
        raise ValueError(
            f"--batches {max(own.batches)}: the corpus has {len(data.train)} training sequences: lower it, or give a "
            "larger --corpus"
        )
    if sequences > len(data.train):
        least = math.lcm(*own.batches)
        fitting = len(data.train) // least * least * length
        remedy = f"give --tokens {fitting}" if fitting else "give batches that are multiples of each other"
        raise ValueError(
            f"--tokens {sequences * length}: the corpus has {len(data.train)} training sequences of {length} tokens, "
            f"and a branch must end within an epoch: {remedy}, or a larger --corpus"
        )


def arguments_of(
    own: CriticalBatchArguments, theirs: LambTrainingArguments, batch: int, run: dict[str, Any]
) -> LambTrainingArguments:
    """A branch's arguments: a constant rate by the sqrt rule. Raises ValueError for a batch that cannot be made up."""
    args = LambTrainingArguments(
        output_dir=str(Path(own.output_dir, "running")),
        **{name: getattr(theirs, name) for name in OPTIMIZERS},
        learning_rate=scaled_learning_rate(run["base_learning_rate"], run["base_batch_size"], batch).learning_rate,
        lr_scheduler_type="constant",
        max_steps=run["sequences"] // batch,
        per_device_eval_batch_size=32,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        log_noise_scale=False,
        seed=own.seed,
        use_cpu=own.use_cpu or not torch.accelerator.is_available(),
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported() and not own.use_cpu,
    )
    devices = args.world_size * max(1, args.n_gpu)
    args.per_device_train_batch_size = own.per_device_train_batch_size or micro_batch_of(batch, devices)
    try:
        args.gradient_accumulation_steps = accumulation_of(batch, args.per_device_train_batch_size, devices)
    except ValueError as error:  # the batches have another option here
        raise ValueError(str(error).replace("--global_batch_size", "--batches")) from None
    return args


def arguments_file(checkpoint: str) -> LambTrainingArguments:
    """The arguments of the run. Raises ValueError where they are not those of recipes.pretrain_bert."""
    file = Path(checkpoint, "training_args.bin")
    try:
        theirs = torch.load(file, weights_only=False)
    except Exception as error:  # a pickle of any version
        theirs = error
    if not isinstance(theirs, LambTrainingArguments):
        what = f"{type(theirs).__name__}: {theirs}" if isinstance(theirs, Exception) else type(theirs).__name__
        raise ValueError(f"{file} has no LambTrainingArguments ({what}): give a checkpoint of recipes.pretrain_bert")
    return theirs


def rate_of(checkpoint: str) -> float:
    """The learning rate that the next step would have had."""
    file = Path(checkpoint, "scheduler.pt")
    if not file.exists():
        raise ValueError(f"{checkpoint} has no scheduler.pt: give --learning_rate")
    return float(max(torch.load(file, weights_only=True)["_last_lr"]))


def facts_of(checkpoint: str) -> dict[str, Any] | None:
    """What the run noted of its data, if it did."""
    kept = json.loads(Path(checkpoint, "trainer_state.json").read_text()).get("stateful_callbacks", {})
    return kept.get("RunFacts", {}).get("args", {}).get("data")


def command_to_train_on(branches: Branches, batch: int) -> str:
    """The command that trains the checkpoint on, on the same data, at this batch and the rate of its branch."""
    run, model = branches.run, branches.model
    options = {
        "model_name_or_path": branches.checkpoint,
        "carry_over": "moments",
        "max_seq_length": run["max_seq_length"],
        "mlm_probability": run["mlm_probability"],
        "global_batch_size": batch,
        "base_learning_rate": f"{run['base_learning_rate']:g}",
        "base_batch_size": run["base_batch_size"],
    }
    words = [*words_of(options), "--corpus", *model.corpus]
    if model.validation_file:
        words += ["--validation_file", *model.validation_file]
    return f"python -m recipes.pretrain_bert {shlex.join(words)}"


def noise_scale_of(checkpoint: str) -> float | None:
    """The gradient noise scale that the run had measured by then, in sequences."""
    file = Path(checkpoint, "lamb_state.json")
    kept = json.loads(file.read_text()).get("noise_scale") if file.exists() else None
    noise, signal = kept["attributes"]["averages"] if kept else (0.0, 0.0)
    return noise / signal if noise > 0 and signal > 0 else None


def digest_of(checkpoint: str) -> str:
    """The sha256 of the checkpoint's weights."""
    sha256 = hashlib.sha256()
    for file in sorted(Path(checkpoint).glob("*.safetensors")):
        sha256.update(file.read_bytes())
    return sha256.hexdigest()


def kept(file: Path, run: dict[str, Any]) -> dict[int, Record]:
    """The branches that are finished. Raises ValueError where the folder holds those of another run."""
    records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for record in records:
        for name, value in json.loads(json.dumps(run)).items():
            if name != "tolerance" and record["run"].get(name) != value:
                raise ValueError(
                    f"{file} holds branches of another run: {name} {record['run'].get(name)}, here {value}: name "
                    "another --output_dir"
                )
    return {record["batch"]: record | {"run": run} for record in records}


def leave(args: LambTrainingArguments) -> None:
    """Leave the process group."""
    if args.world_size > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
