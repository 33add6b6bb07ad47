"""Pretrains a BERT by masked language modelling with LAMB (or AdamW, or SGD) on the embedded corpus or your own.

    python -m recipes.pretrain_bert                                                  # a tiny BERT on a laptop
    accelerate launch --num_processes 8 -m recipes.pretrain_bert --size base --corpus HUB_NAME --streaming
    python -m recipes.pretrain_bert --optim adamw_torch_fused --learning_rate 5e-4   # everything else the same
    python -m recipes.pretrain_bert --plan recipes/configs/bert_large_64k_32k.yaml --corpus HUB_NAME   # two phases

All options of `transformers.TrainingArguments` are there, with defaults that follow `--size` and `--optim`.
`--help` lists them.
"""

import json
import os
import sys
import time
from argparse import ArgumentParser
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import AutoTokenizer, EvalPrediction, HfArgumentParser, PreTrainedTokenizerBase

from hf_lamb import (
    CARRY_OVER,
    CheckpointError,
    LambTrainer,
    LambTrainingArguments,
    check_checkpoint,
    newest_complete_checkpoint,
    noise_scale_in_words,
    trust_ratio_history,
    trust_ratio_warnings,
)
from recipes.bert import SIZES, new_bert
from recipes.corpus import Document, hub_documents, load_documents, split_documents
from recipes.masking import IGNORED, MaskedBlocks, MaskEpochCallback, StreamedBlocks, unigram_baseline
from recipes.plans import read_plan
from recipes.processes import free, leave_process_group
from recipes.report import append_json_line, hardware, plot_training, plot_trust_ratios, provenance
from recipes.tokenizer import load_or_train_tokenizer, tokenize_into_blocks

# Of a stream, whose length nobody knows: the first documents are held out, the next ones train the tokenizer.
STREAM_HELD_OUT, STREAM_SAMPLE = 200, 2000

# Sequence length, global batch, steps, warm-up steps, LAMB's rate. base: ALBERT's published LAMB settings; large: the
# paper's 32k row. Both want a corpus of their own. The small ones were tried on the embedded corpus.
DEFAULTS: dict[str, dict[str, Any]] = {
    "smoke": dict(max_seq_length=32, global_batch_size=32, max_steps=30, warmup_steps=3, learning_rate=2e-2),
    "tiny": dict(max_seq_length=64, global_batch_size=64, max_steps=2400, warmup_steps=240, learning_rate=1e-2),
    "mini": dict(max_seq_length=128, global_batch_size=256, max_steps=3000, warmup_steps=300, learning_rate=1e-2),
    "base": dict(
        max_seq_length=512, global_batch_size=4096, max_steps=125_000, warmup_steps=3125, learning_rate=1.76e-3
    ),
    "large": dict(
        max_seq_length=512, global_batch_size=32_768, max_steps=15_625, warmup_steps=3125, learning_rate=5e-3
    ),
}
# A LAMB step is lr times the weights' norm, so at BERT's initial standard deviation of 0.02 to 0.05 AdamW's
# corresponding rate is that much smaller.
RATE_BESIDE_LAMB = {"lamb": 1.0, "adamw_torch_fused": 0.05, "adamw_torch": 0.05, "sgd": 10.0}

NOT_IN_PLANS = {"plan", "output_dir", "resume_from_checkpoint"}
SAME_IN_ALL_PHASES = ("size", "optim", "vocab_size", "tokenizer_name", "corpus", "validation_file", "streaming")


@dataclass
class RecipeArguments:
    """What to train on what; everything else is in `LambTrainingArguments`."""

    size: str = field(default="tiny", metadata={"help": "Model size.", "choices": list(SIZES)})
    corpus: list[str] = field(
        default_factory=lambda: ["embedded"],
        metadata={"help": "'embedded', text or JSON-lines files, folders, patterns, or a hub dataset's name."},
    )
    validation_file: list[str] | None = field(
        default=None, metadata={"help": "Held-out documents; default: 5 % of the documents of the corpus."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read the hub dataset while training instead of downloading it first."}
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "A tokenizer's folder or hub name; default: trained on the training split."}
    )
    vocab_size: int = field(default=8192, metadata={"help": "Vocabulary of the tokenizer that is trained."})
    max_seq_length: int = field(default=64, metadata={"help": "Tokens in a training sequence; default by --size."})
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of the tokens that is masked."})
    global_batch_size: int = field(
        default=64,
        metadata={
            "help": "Sequences in an optimizer step, over all processes; default by --size. The accumulation follows "
            "from it, --per_device_train_batch_size and the number of processes."
        },
    )
    plan: str | None = field(
        default=None,
        metadata={
            "help": "A YAML file with options of this command for one or several phases, as `python -m hf_lamb.plan "
            "--output` writes; what the command line gives holds for all phases."
        },
    )
    carry_over: str = field(
        default="moments",
        metadata={
            "help": "What a phase takes over from the one before: weights and moments, whose step count starts anew, "
            "as NVIDIA does; the whole optimizer; weights only.",
            "choices": list(CARRY_OVER),
        },
    )


class Data(NamedTuple):
    """What a run trains on, and what it is judged by."""

    tokenizer: PreTrainedTokenizerBase
    train: Dataset[Any]
    held_out: MaskedBlocks
    unigram_loss: float
    unigram_accuracy: float


@dataclass
class Phase:
    """A run with one sequence length, batch and schedule; most runs have one."""

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
    try:
        phases = parse_phases()
        todo = unfinished(phases)
        for phase in todo:
            with phase.args.main_process_first(desc="corpus and tokenizer"):
                phase.data = load_data(phase.recipe, phase.args.seed)
            check_global_batch(phase.recipe, phase.args, phase.data)
        for phase in todo:
            make_output_dir(phase.args.output_dir)
    except (ValueError, OSError) as error:
        sys.exit(f"pretrain_bert: {' '.join(str(error).split())}")
    if not todo and phases[0].args.should_log:
        print(f"all {len(phases)} phases are finished, see {Path(phases[0].args.output_dir).parent}")
    for phase in todo:
        trainer = pretrain(phase)
        phase.data = None
        (leave_process_group if phase is todo[-1] else free)(trainer)
        del trainer


def pretrain(phase: Phase) -> LambTrainer:
    """One phase: its line of results is the last thing that it writes."""
    recipe, args, data = phase.recipe, phase.args, phase.data
    assert data is not None
    try:
        torch.manual_seed(args.seed)
        trainer = LambTrainer(
            model=new_bert(recipe.size, data.tokenizer, phase.longest_sequence),
            args=args,
            train_dataset=data.train,
            eval_dataset=data.held_out,
            processing_class=data.tokenizer,
            compute_metrics=accuracy,
            callbacks=[MaskEpochCallback()],
        )
        if phase.previous_dir is not None and phase.checkpoint is None:
            trainer.start_from(last_checkpoint(phase), recipe.carry_over)
        if recipe.plan is not None:
            trainer.plan = f"{Path(recipe.plan).name}, phase {phase.number} of {phase.of}"
    except (ValueError, OSError) as error:
        sys.exit(f"pretrain_bert: {' '.join(str(error).split())}")
    say = print if trainer.is_world_process_zero() else lambda *_: None
    trainer.scale_learning_rate()
    say(describe(phase, trainer.model.num_parameters(), data, trainer.learning_rate_why))

    start = time.perf_counter()
    checkpoint = phase.checkpoint
    first_step = json.loads(Path(checkpoint, "trainer_state.json").read_text())["global_step"] if checkpoint else 0
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
        seconds = time.perf_counter() - start
        metrics = trainer.evaluate()
        trainer.save_model()
        trainer.create_model_card(model_name=f"BERT-{recipe.size}")
        if trainer.is_world_process_zero():
            record = result(phase, trainer, data, metrics, seconds, trainer.state.global_step - first_step)
            output = Path(args.output_dir)
            title = f"BERT-{recipe.size}, {args.optim.value}, batch {recipe.global_batch_size}"
            plot_training(trainer.state.log_history, output / "training.png", title, data.unigram_loss)
            plot_trust_ratios(trust_ratio_history(trainer.state), output / "trust_ratios.png", title)
            append_json_line(output / "results.jsonl", record)
            say(summary(record, args.output_dir))
        trainer.accelerator.wait_for_everyone()
    except (CheckpointError, OSError) as error:
        sys.exit(f"pretrain_bert: {error}")
    return trainer


def parse_phases(argv: list[str] | None = None) -> list[Phase]:
    """The command line; with --plan a phase for each of the plan's, in folders of their own.

    Raises ValueError for what `parse` and `read_plan` refuse, and for phases that cannot follow each other.
    """
    argv = sys.argv[1:] if argv is None else argv
    known = {f.name for cls in (RecipeArguments, LambTrainingArguments) for f in fields(cls) if f.init} - NOT_IN_PLANS
    early = ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--plan")
    path = early.parse_known_args(argv)[0].plan
    lines = [[]] if path is None else read_plan(path, known)
    phases = [Phase(*parse([*words, *argv]), number, len(lines)) for number, words in enumerate(lines, 1)]
    first, *later = phases
    for phase in later:
        for name in SAME_IN_ALL_PHASES:
            one, other = (getattr(p.recipe if hasattr(p.recipe, name) else p.args, name) for p in (first, phase))
            if one != other:
                raise ValueError(
                    f"--plan {path}: {name} is {other} in phase {phase.number} and {one} in phase 1: give it once"
                )
    if later and any(phase.args.save_strategy == "no" for phase in phases):
        raise ValueError("--save_strategy no: a phase begins with the last checkpoint of the one before")
    check_size(path, lines[0], first.recipe.size)
    folder = first.args.output_dir
    for phase in phases:
        phase.longest_sequence = max(phase.recipe.max_seq_length for phase in phases)
        if later:
            phase.args.output_dir = os.path.join(folder, f"phase-{phase.number}")
            phase.args.hub_model_id = phase.args.hub_model_id or os.path.basename(os.path.abspath(folder))
        if phase is not first:
            phase.previous_dir = os.path.join(folder, f"phase-{phase.number - 1}")
    return phases


def check_size(path: str | None, words: list[str], size: str) -> None:
    """Raise for a plan for another model: its rates and batches say nothing about this one."""
    if "--size" in words and (planned := words[words.index("--size") + 1]) != size:
        raise ValueError(
            f"--plan {path} is for --size {planned}, not {size}: leave --size out, or write size: {size} there "
            "if its batches and rates are meant for that"
        )


def unfinished(phases: list[Phase]) -> list[Phase]:
    """The phases that are still to do; the first of them goes on from a checkpoint where it has one.

    Raises ValueError for what `checkpoint_to_resume` refuses.
    """
    if len(phases) == 1:
        phases[0].checkpoint = checkpoint_to_resume(phases[0].args)
        return phases
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


def last_checkpoint(phase: Phase) -> str:
    """The checkpoint that the phase before has ended with."""
    assert phase.previous_dir is not None
    newest = newest_complete_checkpoint(phase.previous_dir)
    if newest is None:
        raise ValueError(f"{phase.previous_dir} has no checkpoint for phase {phase.number} to begin with")
    state = json.loads(Path(newest, "trainer_state.json").read_text())
    if state["global_step"] < state["max_steps"]:
        raise ValueError(
            f"{newest} is not the end of its phase ({state['global_step']} of {state['max_steps']} steps), from which "
            f"phase {phase.number} begins"
        )
    return newest


def parse(argv: list[str] | None = None) -> tuple[RecipeArguments, LambTrainingArguments]:
    """The command line, with defaults that follow the size, the optimizer and this machine.

    Raises ValueError for a global batch that the processes and micro-batches cannot make up.
    """
    parser = HfArgumentParser((RecipeArguments, LambTrainingArguments), description=__doc__.splitlines()[0])
    early, _ = parser.parse_known_args(argv)
    defaults = dict(DEFAULTS[early.size])
    defaults["learning_rate"] *= RATE_BESIDE_LAMB.get(early.optim, 0.05)
    if early.base_learning_rate is not None:
        del defaults["learning_rate"]
    if early.max_steps > 0:
        defaults["warmup_steps"] = min(defaults["warmup_steps"], early.max_steps)
    parser.set_defaults(
        **defaults,
        output_dir=f"runs/pretrain_bert/{Path(early.plan).stem if early.plan else early.size}-{early.optim}",
        per_device_train_batch_size=min(32, early.global_batch_size),
        per_device_eval_batch_size=32,
        logging_steps=10,
        eval_strategy="steps",
        eval_steps=0.1,
        save_steps=0.1,
        save_total_limit=2,
        bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported() and not early.fp16,
        use_cpu=not torch.accelerator.is_available(),
    )
    recipe, args = parser.parse_args_into_dataclasses(argv)
    check_numbers(recipe, args)
    check_connected(args.world_size)
    micro = args.per_device_train_batch_size * args.world_size
    if recipe.global_batch_size % micro:
        raise ValueError(
            f"--global_batch_size {recipe.global_batch_size} is no multiple of {micro} = "
            f"{args.per_device_train_batch_size} (--per_device_train_batch_size) x {args.world_size} processes"
        )
    steps = recipe.global_batch_size // micro
    if args.gradient_accumulation_steps not in (1, steps):
        raise ValueError(
            f"--gradient_accumulation_steps {args.gradient_accumulation_steps}: leave it out, it follows from "
            f"--global_batch_size and is {steps}"
        )
    args.gradient_accumulation_steps = steps
    return recipe, args


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


def make_output_dir(output_dir: str) -> None:
    """Raise before the training where its results cannot be written."""
    try:
        os.makedirs(output_dir, exist_ok=True)
        TemporaryFile(dir=output_dir).close()
    except OSError as error:
        raise ValueError(f"cannot write to --output_dir {output_dir} ({error.strerror}): name another") from None


def check_connected(world_size: int) -> None:
    """Raise where each process would train alone and say nothing, as accelerate lets CPU ranks do without use_cpu."""
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != world_size:
        raise ValueError(
            f"{launched} processes were launched, but each sees {world_size}: add --use_cpu, or a GPU each"
        )


def load_data(recipe: RecipeArguments, seed: int) -> Data:
    """The corpus, split by document, as masked blocks; the tokenizer is trained on the training split only."""
    if recipe.streaming:
        return stream_data(recipe, seed)
    train = load_documents(recipe.corpus)
    if recipe.validation_file:
        held_out = load_documents(recipe.validation_file)
    else:
        train, held_out = split_documents(train)
    tokenizer = tokenizer_for(recipe, train)
    blocks = tokenize_into_blocks(train, tokenizer, recipe.max_seq_length)
    dataset = MaskedBlocks(blocks, tokenizer, recipe.mlm_probability, seed)
    return with_held_out(recipe, tokenizer, dataset, blocks, held_out)


def stream_data(recipe: RecipeArguments, seed: int) -> Data:
    """The same from a hub dataset that is read while training."""
    if len(recipe.corpus) != 1 or recipe.corpus == ["embedded"]:
        raise ValueError(
            f"--streaming takes one hub dataset, got --corpus {' '.join(recipe.corpus)}: leave --streaming out"
        )
    start = list(islice(streamed_documents(recipe.corpus[0]), STREAM_HELD_OUT + STREAM_SAMPLE))
    held_out, sample = start[:STREAM_HELD_OUT], start[STREAM_HELD_OUT:]
    if not sample:
        raise ValueError(
            f"{recipe.corpus[0]!r} has {len(start)} documents, of which {STREAM_HELD_OUT} would be held out: "
            "leave --streaming out"
        )
    tokenizer = tokenizer_for(recipe, sample)
    dataset = StreamedBlocks(
        partial(streamed_documents, recipe.corpus[0], first=STREAM_HELD_OUT),
        tokenizer,
        recipe.max_seq_length,
        recipe.mlm_probability,
        seed,
        passes=None,
    )
    blocks = tokenize_into_blocks(sample, tokenizer, recipe.max_seq_length)
    return with_held_out(recipe, tokenizer, dataset, blocks, held_out)


def streamed_documents(name: str, first: int = 0) -> Iterator[Document]:
    """Of a hub dataset from the document `first` on; a function that spawned workers can be given."""
    return islice(hub_documents(name, streaming=True), first, None)


def tokenizer_for(recipe: RecipeArguments, documents: Iterable[Document]) -> PreTrainedTokenizerBase:
    """The tokenizer that was named, or one trained on these documents."""
    if recipe.tokenizer_name is None:
        return load_or_train_tokenizer((document.text for document in documents), recipe.vocab_size)
    try:
        return AutoTokenizer.from_pretrained(recipe.tokenizer_name)
    except Exception as error:  # files of all kinds are read, by several libraries
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"--tokenizer_name {recipe.tokenizer_name} cannot be loaded ({reason}): name a folder that "
            "save_pretrained wrote, or a hub tokenizer that can be reached"
        ) from None


def with_held_out(
    recipe: RecipeArguments,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset[Any],
    train_blocks: torch.Tensor,
    documents: list[Document],
) -> Data:
    """Add the held-out blocks, whose masks depend on nothing but their text, and the unigrams' score on them."""
    blocks = tokenize_into_blocks(documents, tokenizer, recipe.max_seq_length)
    held_out = MaskedBlocks(blocks, tokenizer, recipe.mlm_probability, seed=0, dynamic=False)
    unigrams = unigram_baseline(train_blocks, held_out, held_out.special_ids, len(tokenizer))
    return Data(tokenizer, train, held_out, *unigrams)


def check_global_batch(recipe: RecipeArguments, args: LambTrainingArguments, data: Data) -> None:
    """Raise where a step would quietly get fewer sequences than asked for: Trainer ends a step with the epoch."""
    if isinstance(data.train, MaskedBlocks) and len(data.train) < recipe.global_batch_size:
        raise ValueError(
            f"--global_batch_size {recipe.global_batch_size} is more than the corpus' {len(data.train)} training "
            f"sequences of {recipe.max_seq_length} tokens: lower it, or give a larger --corpus"
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
    """Share of the masked positions whose token was the first guess."""
    masked = prediction.label_ids != IGNORED
    return {"accuracy": float(np.mean(prediction.predictions[masked] == prediction.label_ids[masked]))}


def describe(phase: Phase, parameters: int, data: Data, why: str | None) -> str:
    """Before the run: what is about to happen."""
    recipe, args = phase.recipe, phase.args
    size = f"{len(data.train):,} sequences" if isinstance(data.train, MaskedBlocks) else "a stream"
    of_several = f"phase {phase.number} of {phase.of}: " if phase.of > 1 else ""
    return (
        f"{of_several}BERT-{recipe.size}, {parameters:,} parameters, vocabulary {len(data.tokenizer):,}\n"
        f"corpus {' '.join(recipe.corpus)}: {size} of {recipe.max_seq_length} tokens to train on, "
        f"{len(data.held_out):,} held out\n"
        f"global batch {recipe.global_batch_size:,} = {args.per_device_train_batch_size} sequences x "
        f"{args.gradient_accumulation_steps} accumulation steps x {args.world_size} processes; "
        f"{args.max_steps:,} steps of {args.optim.value} on {hardware()}\n"
        f"{why or f'learning rate {args.learning_rate:g}'}"
    )


def result(
    phase: Phase,
    trainer: LambTrainer,
    data: Data,
    metrics: dict[str, float],
    seconds: float,
    steps_now: int,
) -> dict[str, Any]:
    """The line of results.jsonl."""
    recipe, args = phase.recipe, phase.args
    of_plan = {"plan": Path(recipe.plan).name, "phase": phase.number, "phases": phase.of} if recipe.plan else {}
    history = trust_ratio_history(trainer.state)
    return {
        "recipe": "pretrain_bert",
        **provenance(),
        **of_plan,
        "size": recipe.size,
        "corpus": recipe.corpus,
        "optim": args.optim.value,
        "optim_args": args.optim_args,
        "learning_rate": args.learning_rate,
        "learning_rate_why": trainer.learning_rate_why or "given",
        "warmup_steps": args.get_warmup_steps(args.max_steps),
        "weight_decay": args.weight_decay,
        "max_grad_norm": args.max_grad_norm,
        "global_batch_size": recipe.global_batch_size,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "processes": args.world_size,
        "max_seq_length": recipe.max_seq_length,
        "steps": trainer.state.global_step,
        "seed": args.seed,
        "trust_ratios": {layer: row[-1] for layer, row in history.get("ratios", {}).items() if row},
        "trust_ratio_warnings": trust_ratio_warnings(history),
        "noise_scale": trainer.noise_scale.value(),
        "held_out_loss": metrics["eval_loss"],
        "held_out_accuracy": metrics["eval_accuracy"],
        "unigram_loss": data.unigram_loss,
        "unigram_accuracy": data.unigram_accuracy,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(steps_now * recipe.global_batch_size * recipe.max_seq_length / seconds),
    }


def summary(record: dict[str, Any], output_dir: str) -> str:
    """After the run: what came out, for people."""
    loss, unigram_loss = record["held_out_loss"], record["unigram_loss"]
    verdict = f"{abs(unigram_loss - loss):.3f} nats {'better' if loss < unigram_loss else 'WORSE'}"
    minutes = record["seconds"] / 60
    noise_scale, batch = record["noise_scale"], record["global_batch_size"]
    noise = "not measured: it takes accumulation or several processes, and some steps"
    if noise_scale is not None:
        noise = noise_scale_in_words(noise_scale, batch)
    return f"""
held-out masked-LM loss  {loss:.3f} nats   unigrams {unigram_loss:.3f} nats: {verdict}
held-out accuracy        {record["held_out_accuracy"]:.1%}        unigrams {record["unigram_accuracy"]:.1%}
time                     {record["steps"]:,} steps in {minutes:.1f} minutes, {record["tokens_per_second"]:,} tokens/s
noise scale              {noise}
model                    {output_dir} (AutoModelForMaskedLM.from_pretrained)
results, picture         {output_dir}/results.jsonl, {output_dir}/training.png, trust_ratios.png"""


if __name__ == "__main__":
    main()
