"""The page of one training run: what went wrong in words, what was trained, and its curves."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import TrainerState

from hf_lamb import noise_scale_in_words, options_in_force, trust_ratio_history
from recipes.lib.findings import Run, findings, looked_for
from recipes.lib.report import plot_training, plot_trust_ratios
from recipes.study.html_report import bullets, figure, heading, paragraph, table, write_page

CAPTIONS = {
    "training.png": "What the run has logged, over its optimizer steps.",
    "trust_ratios.png": "The trust ratio of each layer, over the optimizer steps; the model's first layer is on top.",
}
LOSS = "Loss: the training loss is the mean over the steps since the line before."
UNIGRAMS = " After the warm-up the held-out loss should be below that of guessing by frequency (the dashed line)."
TRUST_RATIOS = (
    "Trust ratios: they begin near the initial standard deviation of the weights, and rise while the weights grow. In "
    "good runs of small BERTs the median stayed below 0.5; when the rate was too high it rose to 8 and more."
)
NO_TRUST_RATIOS = (
    "Trust ratios: not there, because the optimizer is not LAMB, or because fewer than two log lines have them. "
    "LambTrainer logs them; a stock Trainer does with hf_lamb.TrustRatioCallback."
)
NO_NOISE_SCALE = (
    "Noise scale: not measured. LambTrainer measures it with accumulation or several processes, unless gradients are "
    "sharded (FSDP, DeepSpeed, tensor parallelism)."
)
NO_LONGER = "Noise scale: the last log line has none, because the estimate of the squared gradient was not positive."
ESTIMATE = "An estimate, mostly too low: python -m recipes.critical_batch CHECKPOINT measures it."


def read_run(folder: Path) -> tuple[TrainerState, dict[str, Any] | None]:
    """The newest state of the run in a folder, and its line of results.jsonl, which a run that has not ended has not.

    folder: the output directory of a Trainer, or a checkpoint. Raises ValueError where there is no state to read.
    """
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: give the output directory of a run")
    in_checkpoints, own = files_of(folder, "trainer_state.json"), folder / "trainer_state.json"
    states = [read_state(file) for file in (*in_checkpoints[:1], *[own] * own.is_file())]
    if not states:
        raise ValueError(
            f"{folder} has no trainer_state.json, nor has a checkpoint in it: give the output directory of a run that "
            "has saved a checkpoint"
        )
    state = max(states, key=lambda state: (state.global_step, len(state.log_history)))
    results = folder / "results.jsonl"
    lines = results.read_text().splitlines() if results.is_file() else []
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return state, next((record for record in reversed(records) if record.get("steps") == state.global_step), None)


def files_of(folder: Path, name: str) -> list[Path]:
    """The files of this name in the checkpoints of a folder, the newest first."""
    numbers = [int(path.name[11:]) for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal()]
    paths = [folder / f"checkpoint-{number}" / name for number in sorted(numbers, reverse=True)]
    return [path for path in paths if path.is_file()]


def read_state(file: Path) -> TrainerState:
    """A Trainer's state, with what LambTrainer keeps beside it. Raises ValueError where it cannot be read."""
    beside = file.with_name("lamb_state.json")
    try:
        state = TrainerState(**read_json(file))
    except TypeError:
        raise ValueError(f"{file} is no state of a Trainer: give the output directory of a run") from None
    state.stateful_callbacks |= read_json(beside) if beside.is_file() else {}
    return state


def read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} cannot be read ({error}): give an earlier checkpoint") from None


def run_of(folder: Path, state: TrainerState, record: dict[str, Any] | None) -> Run:
    """What the state, the line of results and the newest checkpoint say of a run."""
    record, kept = record or {}, state.stateful_callbacks or {}
    data = kept.get("RunFacts", {}).get("args", {}).get("data") or {}  # of recipes.pretrain_bert
    configs = [*files_of(folder, "config.json"), *folder.glob("config.json")]
    return Run(
        log=state.log_history,
        steps=state.global_step,
        max_steps=state.max_steps,
        trust_ratios=trust_ratio_history(state),
        options=record.get("options") or options_of(folder),
        batch=record.get("global_batch_size", kept.get("global_batch", {}).get("attributes", {}).get("sequences")),
        unigram_loss=record.get("unigram_loss", data.get("unigram_loss")),
        vocabulary=read_json(configs[0]).get("vocab_size") if configs else None,
    )


def options_of(folder: Path) -> dict[str, Any]:
    """The optimizer's options in the newest checkpoint; {} where it is sharded, or not there."""
    for file in [*files_of(folder, "optimizer.pt"), *folder.glob("optimizer.pt")][:1]:
        try:
            groups = torch.load(file, map_location="cpu", mmap=True, weights_only=True)["param_groups"]
            return options_in_force(SimpleNamespace(param_groups=groups))
        except Exception:  # a damaged file, or the state of another program: the page goes without it
            pass
    return {}


def draw(folder: Path, run: Run, title: str) -> list[Path]:
    """training.png, and trust_ratios.png where there are enough of them; returns those that it has drawn."""
    paths = [folder / name for name in CAPTIONS]
    plot_training(run.log, paths[0], title, run.unigram_loss, run.batch)
    has_heat_map = plot_trust_ratios(run.trust_ratios, paths[1], title)
    return paths if has_heat_map else paths[:1]


def write_run_page(folder: Path, run: Run, record: dict[str, Any] | None, pictures: Sequence[Path]) -> list[str]:
    """report.html in the folder of a run, which holds all it shows; returns the findings.

    record: the line of results.jsonl of a run that has ended. pictures: see `draw`.
    """
    found, record = findings(run), record or {}
    ended = "the training is complete" if run.steps >= run.max_steps else "the run goes on, or it was stopped"
    has_heat_map = "trust_ratios.png" in {path.name for path in pictures}
    parts = [
        paragraph(f"Step {run.steps:,} of {run.max_steps:,}: {ended}."),
        heading("What went wrong"),
        bullets(found) if found else paragraph(f"Nothing was found. Looked for: {looked_for(run)}."),
        heading("The run"),
        table(("", ""), [(name, str(value)) for name, value in facts_of(run, record) if value is not None]),
        *(paragraph(f"Command: {command}") for command in [record.get("command")] if command),
        heading("Curves"),
        bullets(
            [
                LOSS + UNIGRAMS * (run.unigram_loss is not None),
                TRUST_RATIOS if has_heat_map else NO_TRUST_RATIOS,
                noise_scale_of(run),
            ]
        ),
        *(figure(path, CAPTIONS[path.name]) for path in pictures),
    ]
    write_page(folder / "report.html", f"Run report: {folder.resolve().name}", parts)
    return found


def facts_of(run: Run, record: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The rows of the table; None where a value is not known."""
    options = run.options
    yield "model", in_words(record.get("model"))
    yield "corpus", " ".join(record["corpus"]) if "corpus" in record else None
    yield "optimizer", record.get("optim") or ("lamb" if "layer_adaptation" in options else None)
    yield "peak learning rate", number(options.get("learning_rate"))
    yield "global batch", record.get("batch_size_schedule") or number(run.last_batch)
    yield "training loss, last line", number(run.last("loss"))
    yield "held-out loss", number(run.last("eval_loss"))
    yield "guessing by frequency", number(run.unigram_loss)
    yield "noise scale, sequences", number(run.noise_scale)
    yield "minutes of training", number(record["seconds"] / 60) if "seconds" in record else None
    yield "tokens per second", number(record.get("tokens_per_second"))
    yield "hardware", record.get("hardware")


def in_words(model: dict[str, Any] | None) -> str | None:
    return None if model is None else f"{model['architecture']}, {model['parameters']:,} parameters"


def number(value: float | None) -> str | None:
    """Four digits, as people write them."""
    return None if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def noise_scale_of(run: Run) -> str:
    """What a batch costs, in words."""
    noise_scale, batch = run.noise_scale, run.last_batch
    if noise_scale is None:
        ended = run.last("lamb/noise_scale") is not None
        return NO_LONGER if ended else NO_NOISE_SCALE
    if batch is None:
        return f"Noise scale: {number(noise_scale)} sequences; the checkpoint does not say the batch. {ESTIMATE}"
    return f"Noise scale: {noise_scale_in_words(noise_scale, batch)}. {ESTIMATE}"
