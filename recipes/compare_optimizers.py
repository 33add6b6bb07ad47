"""LAMB against AdamW and SGD over batch sizes, each with learning rates tuned as much as the others'.

    make compare                                                     # a very small BERT on two CPU cores
    python -m recipes.compare_optimizers --output_dir runs/compare   # go on with a study that was stopped
    accelerate launch --num_processes 8 -m recipes.compare_optimizers --size mini --vocab_size 8192 \\
        --max_seq_length 128 --batch_sizes 512 2048 8192 --train_sequences 4194304 --micro_batch_size 512
    python -m recipes.compare_optimizers --study --workers 2         # batches 16 to 512, 3 to 5 hours; docs/study.md
    python -m recipes.compare_optimizers --study gpu                 # batches 256 to 8,192, 8 minutes at a time

Every trial pretrains a BERT on the same number of sequences of the embedded corpus, or your own, by masked language
modelling: one trial at a time on each device that accelerate gives. The report is made anew from the trials' records
whenever the recipe runs, also while it is incomplete (`--report_only True`). `--study` compares LAMB, LAMB with
`fixed_norm`, AdamW and Muon over 32 times in batch size; its trials are committed, and the same command goes on there.
"""

import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from torch import Tensor

from recipes.lib.bert import SIZES, new_bert
from recipes.lib.console import on_a_terminal, show_library_bars, study_command
from recipes.lib.corpus import facts_of_corpus, load_documents, split_documents
from recipes.lib.masking import IGNORED, MaskedBlocks, masked, unigram_baseline
from recipes.lib.optimizers import new_optimizer, rate_factor, set_rate, trust_ratios
from recipes.lib.options import RecipeParser, parse_options
from recipes.lib.processes import autocast
from recipes.lib.tokenizer import load_or_train_tokenizer, tokenize_into_blocks
from recipes.study import batch_report, batch_study
from recipes.study.compare_report import FIRST_RATES, MIN_STEPS, TARGET_MARGIN, search_of, write_report
from recipes.study.sweep import TUNING_SEED, Record, Study, Trial, check_over_batch_sizes, read_records, shuffled
from recipes.study.workers import complete, spawn


@dataclass
class CompareArguments:
    """What is compared; the defaults end within 15 minutes on two CPU cores."""

    study: str | None = field(
        default=None,
        metadata={
            "help": "Other defaults, those of docs/study.md: a larger model, batches over 32x, Muon and LAMB with "
            "fixed_norm, and beta2 carried from the smallest batch.",
            "nargs": "?",
            "const": "cpu",
            "choices": list(batch_study.STUDIES),
        },
    )
    output_dir: str = field(default="runs/compare", metadata={"help": "The folder of the study."})
    optimizers: list[str] = field(
        default_factory=lambda: list(FIRST_RATES),
        metadata={"help": f"Of {', '.join(FIRST_RATES)}; with --study of {', '.join(batch_study.FIRST_RATES)}."},
    )
    batch_sizes: list[int] = field(
        default_factory=lambda: [16, 32, 64, 256], metadata={"help": "Sequences in a step, from small to large."}
    )
    size: str = field(default="smoke", metadata={"help": "Model size.", "choices": list(SIZES)})
    corpus: list[str] = field(
        default_factory=lambda: ["embedded"],
        metadata={"help": "As in recipes.pretrain_bert: files, or a hub dataset."},
    )
    vocab_size: int = field(default=512, metadata={"help": "Vocabulary of the tokenizer that is trained."})
    max_seq_length: int = field(default=32, metadata={"help": "Tokens in a sequence."})
    mlm_probability: float = field(default=0.15, metadata={"help": "Share of the tokens that is masked."})
    train_sequences: int = field(
        default=32_768,
        metadata={
            "help": "Sequences that every trial is trained on; 0, as with --study gpu: as many as make the whole "
            "study last --visits times --minutes on this device, which is measured first."
        },
    )
    micro_batch_size: int = field(
        default=64, metadata={"help": "Sequences on the device at once; a larger batch is accumulated."}
    )
    eval_sequences: int = field(default=1024, metadata={"help": "Held-out sequences that the loss is measured on."})
    evaluations: int = field(default=12, metadata={"help": "Points of every loss curve."})
    weight_decay: float = field(default=0.01, metadata={"help": "Of weights; biases and norms do not decay."})
    seeds: int = field(default=3, metadata={"help": "Fresh seeds of the best rate, and of the untuned one."})
    min_steps: int = field(default=MIN_STEPS, metadata={"help": "With fewer steps than this, nothing is compared."})
    target_margin: float | None = field(
        default=None,
        metadata={
            "help": f"Nats above the best loss of the smallest batch: what steps are counted to; default: "
            f"{TARGET_MARGIN}, with --study the lowest loss that all runs at the best rates reach."
        },
    )
    minutes: float | None = field(
        default=None,
        metadata={"help": "Begin no trial that would end later, but at least one; the same command goes on."},
    )
    visits: int = field(default=1, metadata={"help": "How often the command is to be run for --minutes."})
    workers: int = field(default=1, metadata={"help": "Processes of one thread each that share the trials on a CPU."})
    use_cpu: bool = field(default=False, metadata={"help": "Use no accelerator."})
    report_only: bool = field(default=False, metadata={"help": "Run no trial; report those that are there."})


class Data(NamedTuple):
    """Ids of the training split, [n, length], and one held-out batch with fixed masks, on the device of the trials."""

    train: Tensor
    held_out: dict[str, Tensor]
    tokenizer: Any
    unigram_loss: float


def main() -> None:
    """Run what is missing, then leave table, pictures and page in the output directory."""
    start = time.monotonic()
    show_library_bars(on_a_terminal())
    with study_command("compare_optimizers"):
        arguments = parse()
        check(arguments)
        if arguments.train_sequences == 0:
            arguments.train_sequences = sized(arguments)
            check(arguments)
        study = study_behind(arguments)
        if arguments.workers > 1 and not arguments.report_only:
            load_data(arguments, torch.device("cpu"))  # a mistake in the data is found before the processes start
            spawn(work, arguments, arguments.workers)
            arguments.report_only = True
        records = run(arguments, study, start)
        if records is not None:
            margin, min_steps = arguments.target_margin, arguments.min_steps
            if arguments.study is not None:
                print(batch_report.write_report(study, records, min_steps, margin))
            else:
                print(write_report(study, records, min_steps, TARGET_MARGIN if margin is None else margin))


def parse() -> CompareArguments:
    """The options, with the defaults of the study that is asked for. Raises ValueError for a mistake in them."""
    parser = RecipeParser(CompareArguments, "compare_optimizers", __doc__)
    (arguments,) = parse_options(parser)
    if arguments.study is not None:
        parser.set_defaults(**batch_study.STUDIES[arguments.study])
        (arguments,) = parse_options(parser)
    return cast(CompareArguments, arguments)


def study_behind(arguments: CompareArguments) -> Study:
    """The trials that these options ask for, and their folder."""
    search = search_of if arguments.study is None else batch_study.study_of
    return Study(
        Path(arguments.output_dir),
        search(arguments.optimizers, arguments.batch_sizes, arguments.seeds),
        facts_of(arguments),
    )


def work(arguments: CompareArguments, is_first: bool) -> None:
    """Run trials beside other processes, until none is missing."""
    run(arguments, study_behind(arguments), time.monotonic(), show_progress=is_first)


def run(arguments: CompareArguments, study: Study, start: float, show_progress: bool = True) -> list[Record] | None:
    """Run what is missing, or what fits in the minutes since `start`; the records, None if not in the main process."""

    def prepare(device: torch.device) -> Callable[..., Record]:
        with PartialState().main_process_first():
            data = load_data(arguments, device)
        return partial(train_bert, arguments=arguments, data=data)

    def time_left(longest: float) -> bool:
        return arguments.minutes is None or longest == 0 or time.monotonic() + longest < start + 60 * arguments.minutes

    return complete(study, prepare, arguments.use_cpu, arguments.report_only, show_progress, time_left)


def sized(arguments: CompareArguments) -> int:
    """The sequences of every trial: those of the trials that are there, else by the speed of this device.

    Raises ValueError where so few fit in the visits that the largest batch has fewer steps than evaluations.
    """
    path = Path(arguments.output_dir) / "trials.jsonl"
    if path.exists() and (records := read_records(path)):
        return int(records[0]["study"].get("train_sequences", 0))  # of another study: `Study` refuses the folder
    if arguments.report_only:
        raise ValueError(f"there is no trial in {path}: run without --report_only first")
    data = load_data(arguments, PartialState(cpu=arguments.use_cpu).device)
    search = batch_study.study_of(arguments.optimizers, arguments.batch_sizes, arguments.seeds)
    cost = {(o, b): seconds_a_sequence(o, b, arguments, data) for o in search.optimizers for b in search.settings}
    minutes = cast(float, arguments.minutes) * arguments.visits
    sequences, largest = batch_study.sequences_for(search, 60 * minutes, cost), arguments.batch_sizes[-1]
    steps = sequences // largest
    if steps < arguments.evaluations:
        raise ValueError(
            f"--visits {arguments.visits} of --minutes {arguments.minutes:g} are time for {steps} steps of batch "
            f"{largest} in each trial, fewer than --evaluations {arguments.evaluations}: raise --visits or --minutes"
        )
    print(f"{minutes:g} minutes are time for trials of {sequences:,} sequences, {steps:,} steps of batch {largest:,}")
    return sequences


def seconds_a_sequence(optimizer: str, batch_size: int, arguments: CompareArguments, data: Data) -> float:
    """Of training: what 20 steps more take, after a run that compiles kernels."""
    spent = []
    for steps in (2, 2, 22):
        start, few = time.perf_counter(), replace(arguments, train_sequences=steps * batch_size, evaluations=1)
        train_bert(Trial(optimizer, batch_size, 1e-6, TUNING_SEED), lambda text: None, few, data)
        spent.append(time.perf_counter() - start)
    _, short, long = spent
    return (long - min(short, long / 2)) / (20 * batch_size)  # on a busy machine the short run may be the longer one


def check(arguments: CompareArguments) -> None:
    """Raise ValueError for options that would fail later, or compare nothing."""
    by_time = arguments.train_sequences == 0 and arguments.minutes is not None and arguments.study is not None
    positive = ["micro_batch_size", "eval_sequences", "evaluations", "visits", "workers"]
    positive += [] if by_time else ["train_sequences"]
    check_over_batch_sizes(arguments, FIRST_RATES if arguments.study is None else batch_study.FIRST_RATES, positive)
    if arguments.minutes is not None and not 0 < arguments.minutes < math.inf:
        raise ValueError(f"--minutes {arguments.minutes:g}: expected a positive number")
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if arguments.workers > 1 and launched > 1:
        raise ValueError(
            f"--workers {arguments.workers}: accelerate or torchrun has started {launched} processes, which share the "
            "trials already: leave it out"
        )
    if by_time and max(arguments.workers, launched) > 1:
        raise ValueError(
            "--train_sequences 0: the speed of one process is measured, and there are "
            f"{max(arguments.workers, launched)}: give a number of sequences"
        )
    if arguments.study == "gpu" and not (arguments.use_cpu or arguments.report_only or torch.cuda.is_available()):
        raise ValueError(
            "--study gpu: torch sees no GPU: give --use_cpu True to rehearse it, or --study alone for that on a CPU"
        )
    for size in arguments.batch_sizes:
        if size % min(size, arguments.micro_batch_size):
            raise ValueError(f"--batch_sizes {size} is no multiple of --micro_batch_size {arguments.micro_batch_size}")
        if not by_time and (steps := arguments.train_sequences // size) < arguments.evaluations:
            raise ValueError(
                f"--batch_sizes {size}: --train_sequences {arguments.train_sequences} are {steps} steps, fewer than "
                f"--evaluations {arguments.evaluations}: raise the sequences or leave this size out"
            )


def facts_of(arguments: CompareArguments) -> Record:
    """What decides the outcome of a trial beside its optimizer, batch size, rate and seed."""
    no_part = (
        "output_dir",
        "optimizers",
        "batch_sizes",
        "seeds",
        "min_steps",
        "target_margin",
        "minutes",
        "visits",
        "workers",
        "use_cpu",
        "report_only",
    )
    facts = {name: value for name, value in asdict(arguments).items() if name not in no_part}
    if arguments.study is not None:
        facts["carried_from"] = arguments.batch_sizes[0]
    return facts | facts_of_corpus(arguments.corpus)


def load_data(arguments: CompareArguments, device: torch.device) -> Data:
    """The corpus, split by document. Raises ValueError where it is smaller than the largest batch."""
    train, held_out = split_documents(load_documents(arguments.corpus))
    tokenizer = load_or_train_tokenizer((document.text for document in train), arguments.vocab_size)
    blocks = tokenize_into_blocks(train, tokenizer, arguments.max_seq_length)
    if len(blocks) < max(arguments.batch_sizes):
        raise ValueError(
            f"--batch_sizes {max(arguments.batch_sizes)} is more than the corpus' {len(blocks)} training sequences of "
            f"{arguments.max_seq_length} tokens: leave it out, or give a larger --corpus"
        )
    held_out_blocks = tokenize_into_blocks(held_out, tokenizer, arguments.max_seq_length)
    every = max(1, len(held_out_blocks) // arguments.eval_sequences)  # of all documents, not of the first ones
    masked = MaskedBlocks(
        held_out_blocks[::every][: arguments.eval_sequences], tokenizer, arguments.mlm_probability, dynamic=False
    )
    rows = masked.__getitems__(range(len(masked)))
    unigram_loss, _ = unigram_baseline(blocks, masked, masked.special_ids, len(tokenizer))
    batch = {name: torch.stack([row[name] for row in rows]).to(device) for name in rows[0]}
    return Data(blocks.to(device), batch, tokenizer, unigram_loss)


# -- a trial ----------------------------------------------------------------------------------------------------------


def train_bert(trial: Trial, say: Any, arguments: CompareArguments, data: Data) -> Record:
    """Train a BERT and return the record of it.

    The seed decides the initial weights, the order of the data and the masks: the same for all optimizers, rates and
    batch sizes. Gradients are clipped to a global norm of 1.
    """
    device, batch_size = data.train.device, trial.setting
    set_seed(trial.seed)
    model = new_bert(arguments.size, data.tokenizer, arguments.max_seq_length).to(device)
    name = batch_study.HALF_LIFE.get(trial.optimizer, trial.optimizer)
    beta2 = batch_study.beta2_of(trial, arguments.batch_sizes[0])
    optimizer = new_optimizer(name, model, trial.learning_rate, arguments.weight_decay, beta2)
    masks = torch.Generator(device).manual_seed(trial.seed)
    order = shuffled(len(data.train), arguments.train_sequences, trial.seed).to(device)
    steps = arguments.train_sequences // batch_size
    evaluate_at = {round(steps * (i + 1) / arguments.evaluations) for i in range(arguments.evaluations)}
    special_ids = torch.tensor(data.tokenizer.all_special_ids, device=device)

    record: Record = {"steps": steps, "parameters": model.num_parameters(), "unigram_loss": data.unigram_loss}
    record |= (
        {"curve": [], "trust_ratios": [], "noise": []}
        if arguments.study is None
        else {"beta2": beta2, "curve": [], "noise": []}
    )
    squared_norms: list[tuple[Tensor, Tensor]] = []
    for step in range(steps):
        ids = data.train[order[step * batch_size : (step + 1) * batch_size]].long()
        batch = masked(ids, data.tokenizer, special_ids, arguments.mlm_probability, masks)
        small = backward(model, batch, arguments.micro_batch_size)
        large = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if small is not None:
            squared_norms.append((small**2, large**2))
        set_rate(optimizer, trial.learning_rate * rate_factor(step, steps))
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 in evaluate_at:
            loss = held_out_loss(model, data.held_out, arguments.micro_batch_size)
            if not math.isfinite(loss):
                break
            record["curve"].append((step + 1, round(loss, 4)))
            if arguments.study is None:  # whose lines have more points
                ratios = trust_ratios(optimizer, model)
                record["trust_ratios"].append({name: float(f"{ratio:.4g}") for name, ratio in ratios.items()})
            if squared_norms:
                record["noise"].append((step + 1, noise_scale(squared_norms, arguments.micro_batch_size, batch_size)))
            squared_norms.clear()
            say(f"step {step + 1} of {steps}, {loss:.3f} nats")
    finished = bool(record["curve"]) and record["curve"][-1][0] == steps
    return {"objective": record["curve"][-1][1] if finished else None, **record}


def backward(model: Any, batch: dict[str, Tensor], micro_batch_size: int) -> Tensor | None:
    """The gradient of the mean loss over all labels of the batch, micro-batch by micro-batch.

    Returns the norm of the first micro-batch's own gradient, from which the noise scale follows; None where the
    batch is one micro-batch.
    """
    labels, first_norm = (batch["labels"] != IGNORED).sum(), None
    for micro in zip(*(batch[name].split(micro_batch_size) for name in batch), strict=True):
        inputs = dict(zip(batch, micro, strict=True))
        share = (inputs["labels"] != IGNORED).sum() / labels
        with autocast(inputs["labels"].device):
            loss = model(**inputs).loss
        (loss * share).backward()
        if first_norm is None and len(inputs["labels"]) < len(batch["labels"]):
            first_norm = torch.nn.utils.get_total_norm([w.grad for w in model.parameters()]) / share
    return first_norm


@torch.no_grad()
def held_out_loss(model: Any, batch: dict[str, Tensor], micro_batch_size: int) -> float:
    """Mean loss, nats, over all labels of the batch."""
    model.eval()
    total = torch.zeros((), device=batch["labels"].device)
    for micro in zip(*(batch[name].split(4 * micro_batch_size) for name in batch), strict=True):
        inputs = dict(zip(batch, micro, strict=True))
        with autocast(inputs["labels"].device):
            total += model(**inputs).loss * (inputs["labels"] != IGNORED).sum()
    model.train()
    return (total / (batch["labels"] != IGNORED).sum()).item()


def noise_scale(squared_norms: list[tuple[Tensor, Tensor]], small: int, large: int) -> float | None:
    """tr(Σ)/‖G‖² in sequences, from gradients of batches of two sizes (McCandlish et al. 2018, appendix A.1).

    squared_norms: (small batch's, large batch's) of a run of steps. None where noise swamps the gradient.
    """
    of_small, of_large = torch.tensor([[float(a), float(b)] for a, b in squared_norms]).double().mean(dim=0).tolist()
    gradient = (large * of_large - small * of_small) / (large - small)
    noise = (of_small - of_large) / (1 / small - 1 / large)
    return float(f"{noise / gradient:.4g}") if gradient > 0 else None


if __name__ == "__main__":
    main()
