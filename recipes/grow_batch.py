"""A batch that grows to its size during the run, beside one that has it from the start, each with its own rate.

    python -m recipes.grow_batch --use_cpu True                       # a very small BERT
    python -m recipes.grow_batch --size tiny --max_seq_length 64 --vocab_size 8192 --global_batch_size 256

It takes options of recipes.pretrain_bert, and trains that recipe with --global_batch_size; with a quarter of it that
grows linearly, for as many steps; and the same for as many sequences. The rate of each is the best of three or more, a
factor of two apart, between two worse ones; three fresh seeds judge it. If it is stopped, the same command goes on:
finished trials are kept.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from hf_lamb.batch_schedule import batch_stages
from recipes import pretrain_bert
from recipes.lib.console import on_a_terminal, show_library_bars, study_command
from recipes.lib.corpus import facts_of_corpus
from recipes.lib.options import parser_beside_pretraining, words_of
from recipes.lib.pretraining import load_data
from recipes.lib.processes import be_one_process, free, make_output_dir
from recipes.pretrain_bert import PhaseRun, check_global_batch, given_options, pretrain
from recipes.study.growth_report import NAMES, results_of, search_of
from recipes.study.sweep import NO_PART, Record, Study, Trial, trained

parse = partial(pretrain_bert.parse, name="grow_batch")  # so that errors begin with this recipe's name

SHORT = {"vocab_size": 512, "max_seq_length": 32, "global_batch_size": 64, "max_steps": 400}
MODELS = {"size", "model_type", "model_name_or_path", "config_name"}
# What the study varies, or has one of, and the remedy for who gives it.
DECIDED = {
    **dict.fromkeys(
        ("batch_size_schedule", "learning_rate", "base_learning_rate", "base_batch_size", "seed"),
        "it is what this recipe varies",
    ),
    "optim": "it compares batches of LAMB",
    "plan": "give its --size, --max_seq_length and --corpus",
    "num_train_epochs": "--max_steps is the length of a trial",
    "resume_from_checkpoint": "the same command goes on with the same study",
}


@dataclass
class GrowthArguments:
    """The recipe's own option; all others are those of recipes.pretrain_bert, whose --help lists them."""

    output_dir: str = field(default="runs/grow_batch", metadata={"help": "The folder of the study."})


def main() -> None:
    """Run the trials that are missing; print the table."""
    show_library_bars(on_a_terminal())
    with study_command("grow_batch"):
        parser = parser_beside_pretraining(GrowthArguments, "grow_batch", __doc__)
        own, given = parser.parse_args_into_dataclasses(return_remaining_strings=True)
        options = given_options(given, "grow_batch")
        if decided := [name for name in DECIDED if name in options]:
            raise ValueError(f"--{decided[0]} {options[decided[0]]}: leave it out, {DECIDED[decided[0]]}")
        is_first = be_one_process()
        model = {} if MODELS & options.keys() else {"size": "smoke"}
        argv = [*words_of(model | SHORT), *given]
        recipe, args = parse(argv)
        if args.max_steps < 10:
            raise ValueError(f"--max_steps {args.max_steps}: give at least 10 steps of a trial")
        batch = recipe.global_batch_size
        if batch % 4:
            raise ValueError(f"--global_batch_size {batch}: give a multiple of 4, a quarter of it is where it begins")
        facts = {
            "model": f"BERT-{recipe.size}" if recipe.size else recipe.model_name,
            **{
                name: getattr(recipe, name) for name in ("vocab_size", "max_seq_length", "global_batch_size", "corpus")
            },
            "max_steps": args.max_steps,
            "per_device_train_batch_size": batch // 4,
        }
        facts = {name: value for name, value in options.items() if name not in NO_PART | MODELS} | facts
        facts |= facts_of_corpus(recipe.corpus, recipe.streaming)
        study = Study(Path(own.output_dir), search_of(["lamb"], list(NAMES), 3), facts)
        train = trials_of(study, argv)
        make_output_dir(own.output_dir)
        records = study.run(train, show_progress=is_first)
        if is_first:
            print("\n".join(results_of(records)))


def option_of(word: str) -> str:
    """The name of the option that a word of the command line gives; of other words "". Hyphens are underscores."""
    return word.partition("=")[0][2:].replace("-", "_") if word.startswith("--") else ""


def schedules(batch: int, steps: int) -> dict[str, tuple[str, int]]:
    """The schedule and the steps of each kind of run; a batch that grows from a quarter is 5/8 of it on average."""
    longer = round(steps * 8 / 5)
    return {
        "constant": (f"0:{batch}", steps),
        "equal-tokens": (f"{batch // 4}->{batch} over {longer}", longer),
        "equal-steps": (f"{batch // 4}->{batch} over {steps}", steps),
    }


def trials_of(study: Study, argv: list[str]) -> Callable[[Trial, Callable[[str], None]], Record]:
    """The function that runs a trial: the recipe, in a folder that is gone afterwards."""
    recipe, args = parse(argv)
    batch, data = recipe.global_batch_size, load_data(recipe, args.seed)
    check_global_batch(recipe, args, data)
    others, words = [], iter(argv)
    for word in words:
        if option_of(word) != "global_batch_size":  # the trial's schedule replaces it
            others.append(word)
        elif "=" not in word:
            next(words)

    def train(trial: Trial, say: Callable[[str], None]) -> Record:
        folder = study.folder / f"running-{trial.setting}-{trial.learning_rate!r}-{trial.seed}"
        schedule, steps = schedules(batch, args.max_steps)[trial.setting]
        own = {
            "batch_size_schedule": schedule,
            "per_device_train_batch_size": study.facts["per_device_train_batch_size"],
            "base_learning_rate": repr(trial.learning_rate),
            "base_batch_size": batch,
            "max_steps": steps,
            "warmup_steps": steps // 10,
            "seed": trial.seed,
            "output_dir": folder,
            "save_strategy": "no",
            "eval_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }
        recipe_of_trial, args_of_trial = parse([*others, *words_of(own)])
        getattr(data.train, "documents", data.train).seed = trial.seed  # of the masks, also in packed rows
        phase = PhaseRun(recipe_of_trial, args_of_trial, longest_sequence=recipe.max_seq_length, data=data)
        say("training")
        found = trained(lambda: free(pretrain(phase)), folder, study.folder / "log.txt")
        return {
            "objective": found["objective"],
            "steps": steps,
            "sequences": batch_stages(schedule, study.facts["per_device_train_batch_size"]).sequences(steps),
            "parameters": found.get("model", {}).get("parameters"),
            **{name: found[name] for name in ("unigram_loss", "noise_scale", "seconds") if name in found},
        }

    return train


if __name__ == "__main__":
    main()
