"""Finds the learning rate of LAMB, and of AdamW beside it, for a model and corpus of recipes.pretrain_bert.

    python -m recipes.find_rate                                            # for the tiny BERT
    python -m recipes.find_rate --size mini --corpus my_texts/ --global_batch_size 128 --max_steps 1000
    torchrun --nproc_per_node 8 -m recipes.find_rate --size base --corpus my_texts/     # a trial on each GPU
    python -m recipes.pretrain_bert --plan runs/find_rate/tiny/lamb.yaml                # trains with the rate found

It takes the options of recipes.pretrain_bert, and trains that recipe for a while at a small batch, with rates that are
factors of two apart, until the best one has worse neighbours; of rates within 0.01 nats of the best one it takes the
lowest. Both optimizers get equally many trials. If it is stopped, also by SIGKILL, the same command goes on: finished
trials are kept. Each trial runs on one device.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from recipes import pretrain_bert
from recipes.lib.console import on_a_terminal, show_library_bars, study_command
from recipes.lib.corpus import facts_of_corpus
from recipes.lib.options import RecipeParser, parser_beside_pretraining, words_of
from recipes.lib.pretraining import load_data
from recipes.lib.processes import be_one_process, free, make_output_dir
from recipes.pretrain_bert import DEFAULTS, PhaseRun, check_global_batch, given_options, pretrain
from recipes.study.rate_report import OPTIM, search_at, write_report
from recipes.study.sweep import NO_PART, Record, Study, Trial, trained

parse = partial(pretrain_bert.parse, name="find_rate")  # so that errors begin with this recipe's name

# By default a quarter of the recipe's batch and half of its steps, but not more than these.
LARGEST_BATCH, MOST_STEPS = 256, 2000

# What the search decides itself, and the remedy for who gives it.
DECIDED = {
    "learning_rate": "the search finds it",
    "base_learning_rate": "the search finds it",
    "base_batch_size": "--global_batch_size is the batch of the search",
    "batch_size_schedule": "the search has one batch, --global_batch_size",
    "optim": "--optimizers lamb adamw chooses what is searched for",
    "plan": "give its --size, --max_seq_length and --corpus, and a small --global_batch_size",
    "resume_from_checkpoint": "the same command goes on with the same search",
    "num_train_epochs": "--max_steps is the length of a trial",
}
# What belongs to the search, and not to the run that uses its rate.
OF_THE_SEARCH = {"global_batch_size", "max_steps", "warmup_steps", "per_device_train_batch_size"}


@dataclass
class SearchArguments:
    """The search's own options; all others are those of recipes.pretrain_bert, whose --help lists them."""

    output_dir: str | None = field(
        default=None, metadata={"help": "The folder of the search; default: runs/find_rate/ and the model's size."}
    )
    optimizers: list[str] = field(
        default_factory=lambda: list(OPTIM), metadata={"help": "For which a rate is found.", "choices": list(OPTIM)}
    )


def main() -> None:
    """Run the trials that are missing; leave lamb.yaml, adamw.yaml, rates.png and trials.jsonl in the folder."""
    show_library_bars(on_a_terminal())
    with study_command("find_rate"):
        own, argv = search_parser().parse_args_into_dataclasses(return_remaining_strings=True)
        is_first = be_one_process()
        argv, options, first_rates = options_of_trials(argv, own.optimizers)
        recipe, args = parse(argv)
        folder = Path(own.output_dir or f"runs/find_rate/{Path(args.output_dir).name.rpartition('-')[0]}")
        facts = options | facts_of_corpus(recipe.corpus, recipe.streaming)
        study = Study(folder, search_at(recipe.global_batch_size, first_rates), facts)
        make_output_dir(str(folder))
        records = study.run(trials_of(study, argv, is_first), show_progress=is_first)
        if is_first:
            size = {} if recipe.size is None else {"size": recipe.size}
            print(write_report(study, records, size | {k: v for k, v in options.items() if k not in OF_THE_SEARCH}))


def search_parser() -> RecipeParser:
    """The parser of the search's own options."""
    return parser_beside_pretraining(SearchArguments, "find_rate", __doc__)


def options_of_trials(argv: list[str], optimizers: list[str]) -> tuple[list[str], dict[str, Any], dict[str, float]]:
    """The command line of the trials; the options that decide their outcome; the rates that the search starts from.

    Raises ValueError for options that the search decides itself, and for what `parse` refuses.
    """
    given = given_options(argv, "find_rate")
    if taken := [name for name in DECIDED if name in given]:
        raise ValueError(f"--{taken[0]} {given[taken[0]]}: leave it out, {DECIDED[taken[0]]}")
    recipe, args = parse(argv)
    usual = DEFAULTS[recipe.size or "tiny"]["global_batch_size"]
    short = {"global_batch_size": min(usual // 4, LARGEST_BATCH), "max_steps": min(args.max_steps // 2, MOST_STEPS)}
    options = short | {name: value for name, value in given.items() if name not in NO_PART}
    argv = [*words_of(short), *argv]
    scale = math.sqrt(options["global_batch_size"] / usual)
    rates = {o: parse([*argv, "--optim", OPTIM[o]])[1].learning_rate * scale for o in optimizers}
    return argv, options, {o: float(f"{rate:.3g}") for o, rate in rates.items()}


def trials_of(study: Study, argv: list[str], is_first: bool) -> Callable[[Trial, Callable[[str], None]], Record]:
    """The function that runs a trial: the recipe, in a folder that is gone afterwards."""
    recipe, args = parse(argv)
    data = load_data(recipe, args.seed)
    check_global_batch(recipe, args, data)

    def train(trial: Trial, say: Callable[[str], None]) -> Record:
        folder = study.folder / "running" / f"{trial.optimizer}-{trial.learning_rate!r}"
        own = {
            "optim": OPTIM[trial.optimizer],
            "learning_rate": repr(trial.learning_rate),
            "output_dir": str(folder),
            "save_strategy": "no",
            "eval_strategy": "no",
            "eval_on_start": "False",
            "report_to": "none",
            "disable_tqdm": str(not (is_first and on_a_terminal())),
        }
        recipe, args = parse([*argv, *words_of(own)])
        phase = PhaseRun(recipe, args, longest_sequence=recipe.max_seq_length, data=data)
        say("training")
        start = time.perf_counter()
        results = trained(lambda: free(pretrain(phase)), folder, study.folder / "log.txt")
        found: Record = {"steps": args.max_steps} | results
        return {
            "objective": found["objective"],
            "steps": found["steps"],
            "seconds": round(time.perf_counter() - start, 1),
            "tokens": found["steps"] * recipe.global_batch_size * recipe.max_seq_length,
            **{name: found[name] for name in ("held_out_accuracy", "unigram_loss", "noise_scale") if name in found},
        }

    return train


if __name__ == "__main__":
    main()
