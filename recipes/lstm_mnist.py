"""An LSTM reads images row by row, in small and in large batches: where papers about large batches begin.

    make lstm                                                            # scikit-learn's digits, batches 40 and 1,295
    python -m recipes.lstm_mnist --data_dir /usr/share/datasets/fashion-mnist     # Debian: dataset-fashion-mnist
    python -m recipes.lstm_mnist --epochs 300 --batch_sizes 1295 --output_dir runs/lstm-longer

Every optimizer is tuned as much as the others at every batch size, by the loss on a validation part; a study that was
stopped goes on. --data_dir takes a folder with the four files of MNIST, or of anything in its format.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import set_seed
from torch import Tensor, nn
from transformers import HfArgumentParser

from recipes.lib.images import Images, Split, load_images
from recipes.lib.optimizers import NAMES, new_optimizer, rate_factor, set_rate
from recipes.lib.options import parse_options
from recipes.lib.processes import make_output_dir
from recipes.study import html_report
from recipes.study.plots import COLOURS, legend_below, picture, plain_log, u_curves
from recipes.study.sweep import Record, Search, Spread, Study, Trial, hardware_of, outcomes, shuffled, spread, standing

# Where the search at the smallest batch starts; it goes on from there until the best rate lies inside.
FIRST_RATES = {"lamb": 2e-2, "adamw": 8e-3, "adam": 8e-3, "sgd": 0.5}
HEADER = ("batch", "steps", "optimizer", "trials", "best rate", "test accuracy", "", "training accuracy", "test loss")


@dataclass
class LstmArguments:
    """What is compared; every run sees the training images as often."""

    output_dir: str = field(default="runs/lstm_mnist", metadata={"help": "The folder of the study."})
    data_dir: str | None = field(
        default=None, metadata={"help": "A folder with MNIST's four files; default: scikit-learn's digits."}
    )
    optimizers: list[str] = field(
        default_factory=lambda: list(FIRST_RATES), metadata={"help": f"Of {', '.join(FIRST_RATES)}."}
    )
    batch_sizes: list[int] | None = field(
        default=None, metadata={"help": "From small to large; default: 256 8192, or a 32nd of the digits and all."}
    )
    epochs: int = field(default=30, metadata={"help": "Times that a run sees every training image."})
    hidden_size: int = field(default=64, metadata={"help": "Units of the LSTM."})
    micro_batch_size: int = field(default=256, metadata={"help": "Images at once; a larger batch is accumulated."})
    evaluations: int = field(default=10, metadata={"help": "Points of every learning curve."})
    weight_decay: float = field(default=0.01, metadata={"help": "Of weights, except with Adam, which has none."})
    seeds: int = field(default=3, metadata={"help": "Fresh seeds of the best rate, and of the untuned one."})
    use_cpu: bool = field(default=False, metadata={"help": "Leave accelerators alone."})
    report_only: bool = field(default=False, metadata={"help": "Run no trial; make the report of what is there."})


def main() -> None:
    """Run what is missing, then leave table, pictures and page in the output directory."""
    try:
        parser = HfArgumentParser(LstmArguments, description=__doc__.splitlines()[0])
        (arguments,) = parse_options(parser)
        data = load_images(arguments.data_dir)
        if arguments.batch_sizes is None:
            every = len(data.train)
            arguments.batch_sizes = [256, 8192] if arguments.data_dir else [every // 32, every]
        check(arguments, data)
        study = Study(Path(arguments.output_dir), search_of(arguments), facts_of(arguments, data))
        if arguments.report_only:
            if not (records := study.records()):
                raise ValueError(f"there is no trial in {study.path}: run without --report_only first")
        else:
            make_output_dir(arguments.output_dir)
            state = PartialState(cpu=arguments.use_cpu)
            state.destroy_process_group()  # the processes meet in the folder only
            on_device = Split(*(part.to(state.device) for part in data))
            train = partial(train_lstm, arguments=arguments, data=on_device)
            records = study.run(train, show_progress=state.is_main_process)
            if not state.is_main_process:
                return
        print(write_report(study, records))
    except (ValueError, OSError) as error:
        sys.exit(f"lstm_mnist: {' '.join(str(error).split())}")


def check(arguments: LstmArguments, data: Split) -> None:
    """Raise ValueError for options that would fail later, or compare nothing."""
    if unknown := [o for o in arguments.optimizers if o not in FIRST_RATES]:
        raise ValueError(f"--optimizers {unknown[0]}: expected some of {', '.join(FIRST_RATES)}")
    for option in ("epochs", "hidden_size", "micro_batch_size", "evaluations"):
        if getattr(arguments, option) < 1:
            raise ValueError(f"--{option} {getattr(arguments, option)}: expected at least 1")
    if arguments.seeds < 2:
        raise ValueError(f"--seeds {arguments.seeds}: expected at least 2, or nothing is known about the spread")
    sizes = arguments.batch_sizes or []
    if not sizes or min(sizes) < 1 or sizes != sorted(set(sizes)):
        raise ValueError(f"--batch_sizes {' '.join(map(str, sizes))}: expected different sizes, from small to large")
    if max(sizes) > len(data.train):
        raise ValueError(f"--batch_sizes {max(sizes)} is more than the {len(data.train)} training images: lower it")
    if (steps := arguments.epochs * len(data.train) // max(sizes)) < arguments.evaluations:
        raise ValueError(
            f"--epochs {arguments.epochs} are {steps} steps at batch {max(sizes)}, fewer than --evaluations "
            f"{arguments.evaluations}: raise the epochs or lower the evaluations"
        )


def search_of(arguments: LstmArguments) -> Search:
    """Rates follow the square root of the batch size from the smallest batch on."""
    sizes = arguments.batch_sizes or []
    return Search(
        optimizers=arguments.optimizers,
        settings=sizes,
        first_rates=FIRST_RATES,
        carry=lambda rate, batch_size: rate * math.sqrt(batch_size / sizes[0]),
        seeds=arguments.seeds,
    )


def results_of(records: list[Record]) -> list[str]:
    """What was run, and the table of it, in Markdown."""
    arguments = LstmArguments(
        optimizers=list(dict.fromkeys(record["optimizer"] for record in records)),
        batch_sizes=sorted({record["setting"] for record in records}),
        seeds=max(record["seed"] for record in records),
    )
    return [description(records), html_report.markdown_table(HEADER, rows_of(search_of(arguments), records))]


def facts_of(arguments: LstmArguments, data: Split) -> Record:
    """What decides the outcome of a trial beside its optimizer, batch size, rate and seed."""
    deciding = ("epochs", "hidden_size", "evaluations", "weight_decay")
    name = Path(arguments.data_dir).resolve().name if arguments.data_dir else "digits (scikit-learn)"
    sizes = [len(part) for part in data]
    return {"data": name, "images": sizes, **{k: v for k, v in asdict(arguments).items() if k in deciding}}


# -- a trial ----------------------------------------------------------------------------------------------------------


class RowReader(nn.Module):
    """An LSTM over the rows of an image and a linear layer on its last output; ten classes."""

    def __init__(self, columns: int, hidden_size: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(columns, hidden_size, batch_first=True)
        self.classify = nn.Linear(hidden_size, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        """[n, rows, columns] to logits [n, 10]."""
        outputs, _ = self.lstm(pixels)
        return self.classify(outputs[:, -1])


def train_lstm(trial: Trial, say: Callable[[str], None], arguments: LstmArguments, data: Split) -> Record:
    """Train an LSTM; its curves. The seed decides weights and order; gradients are clipped to a norm of 1."""
    set_seed(trial.seed)
    device = data.train.labels.device
    model = RowReader(data.train.pixels.shape[2], arguments.hidden_size).to(device)
    optimizer = new_optimizer(trial.optimizer, model, trial.learning_rate, arguments.weight_decay)
    order = shuffled(len(data.train), arguments.epochs * len(data.train), trial.seed).to(device)
    steps = len(order) // trial.setting
    evaluate_at = {round(steps * (i + 1) / arguments.evaluations) for i in range(arguments.evaluations)}
    record: Record = {"steps": steps, "curve": []}
    for step in range(steps):
        batch = data.train.take(order[step * trial.setting : (step + 1) * trial.setting])
        for pixels, labels in zip(*(part.split(arguments.micro_batch_size) for part in batch), strict=True):
            loss = nn.functional.cross_entropy(model(pixels), labels)
            (loss * len(labels) / trial.setting).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        set_rate(optimizer, trial.learning_rate * rate_factor(step, steps))
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 in evaluate_at:
            point = {"step": step + 1}
            for part in Split._fields:
                point[f"{part}_loss"], point[f"{part}_accuracy"] = score(model, getattr(data, part))
            if not math.isfinite(point["train_loss"]):
                return {"objective": None, **record}
            record["curve"].append(point)
            say(f"step {step + 1} of {steps}, test accuracy {point['test_accuracy']:.1%}")
    return {"objective": record["curve"][-1]["validation_loss"], **record}


@torch.no_grad()
def score(model: nn.Module, images: Images) -> tuple[float, float]:
    """(cross-entropy in nats, accuracy)."""
    logits = torch.cat([model(pixels) for pixels in images.pixels.split(1024)])
    loss = nn.functional.cross_entropy(logits, images.labels)
    accuracy = (logits.argmax(dim=1) == images.labels).double().mean()
    return round(loss.item(), 5), round(accuracy.item(), 5)


# -- the report -------------------------------------------------------------------------------------------------------


def finals(runs: Sequence[Record], name: str) -> Spread:
    """Of the runs' last evaluations; accuracies in per cent."""
    scale = 100 if name.endswith("accuracy") else 1
    return spread([scale * run["curve"][-1][name] if run["objective"] is not None else None for run in runs])


def rows_of(search: Search, records: Sequence[Record]) -> list[list[str]]:
    """The table: best test accuracy first, ties called ties."""
    rows = []
    every = outcomes(search, records)
    for batch_size in dict.fromkeys(batch_size for batch_size, _ in every):
        found = {optimizer: outcome for (size, optimizer), outcome in every.items() if size == batch_size}
        accuracy = {optimizer: finals(runs, "test_accuracy") for optimizer, (_, runs) in found.items()}
        for optimizer in sorted(found, key=lambda o: -accuracy[o].mean if math.isfinite(accuracy[o].mean) else 0):
            best, runs = found[optimizer]
            rows.append(
                [
                    f"{batch_size:,}",
                    f"{runs[0]['steps']:,}",
                    NAMES[optimizer],
                    str(best.trials),
                    f"{best.learning_rate:.3g}" + ("" if best.interior else " (edge)"),
                    per_cent(accuracy[optimizer]),
                    standing(accuracy[optimizer], list(accuracy.values()), highest=True, digits=1),
                    per_cent(finals(runs, "train_accuracy")),
                    str(finals(runs, "test_loss")),
                ]
            )
    return rows


def per_cent(accuracy: Spread) -> str:
    return f"{accuracy.mean:.1f} ± {accuracy.sd:.1f} %" if math.isfinite(accuracy.mean) else "diverged"


def plot_curves(path: Path, search: Search, records: Sequence[Record]) -> None:
    """Loss and accuracy over the steps at the best rate: means of the fresh seeds, training dashed, test solid."""
    every = outcomes(search, records)
    sizes = list(dict.fromkeys(batch_size for batch_size, _ in every))
    options = {"size": (max(7, 4.5 * len(sizes)), 7), "sharey": "row", "sharex": "col"}
    with picture(path, len(sizes), 2, **options) as (figure, axes):
        for column, batch_size in enumerate(sizes):
            for optimizer, runs in ((o, runs) for (size, o), (_, runs) in every.items() if size == batch_size):
                for axis, quantity in zip(axes[:, column], ("loss", "accuracy"), strict=True):
                    for part, line in (("train", "--"), ("test", "-")):
                        steps, means, sds = mean_curve(runs, f"{part}_{quantity}")
                        colour = COLOURS[optimizer]
                        label = NAMES[optimizer] if part == "test" else None
                        axis.plot(steps, means, color=colour, linestyle=line, linewidth=1.3, label=label)
                        if part == "test":
                            low, high = ([m + s * sd for m, sd in zip(means, sds, strict=True)] for s in (-1, 1))
                            axis.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
            axes[0][column].set_title(f"batch {batch_size:,}")
            axes[0][column].set_yscale("log")
            plain_log(axes[0][column].yaxis)
            axes[1][column].set_xlabel("optimizer steps")
        for axis in axes.flat:
            axis.grid(alpha=0.25)
        axes[0][0].set_ylabel("cross-entropy (nats)")
        axes[1][0].set_ylabel("accuracy (%)")
        lines = [plot_line("-", "test, ± sd shaded"), plot_line("--", "training")]
        legend_below(figure, *axes[0], extra=lines, columns=6)


def plot_line(style: str, label: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color="black", linestyle=style, label=label)


def mean_curve(runs: Sequence[Record], name: str) -> tuple[list[int], list[float], list[float]]:
    """(steps, means, sds) over the runs, as far as all of them got; accuracies in per cent."""
    scale = 100 if name.endswith("accuracy") else 1
    points = list(zip(*(run["curve"] for run in runs), strict=False))
    spreads = [spread([scale * point[name] for point in point_of_runs]) for point_of_runs in points]
    return [some[0]["step"] for some in points], [s.mean for s in spreads], [s.sd for s in spreads]


def description(records: Sequence[Record]) -> str:
    facts = records[0]["study"]
    train, validation, test = facts["images"]
    return (
        f"{facts['data']}: {train:,} training images, {validation:,} to choose the rates by, {test:,} for testing. An "
        f"LSTM of {facts['hidden_size']} units reads them row by row, each of them {facts['epochs']} times in every "
        f"run, whatever the batch size. {len(records)} runs on {hardware_of(records)}."
    )


def write_report(study: Study, records: Sequence[Record]) -> str:
    """The pictures and report.html in the study's folder; returns the report for the terminal."""
    search, folder, facts = study.search, study.folder, study.facts
    rows = rows_of(search, records)
    if not rows:
        return f"{len(records)} trials in {study.path}, nothing tuned and judged yet: run the recipe again to go on"
    steps = {record["setting"]: record["steps"] for record in records}
    titles = {batch_size: f"batch {batch_size:,}, {n:,} steps" for batch_size, n in steps.items()}
    objectives = sorted(record["objective"] for record in records if record["objective"] is not None)
    ceiling = min(2.5, objectives[-1])  # ln 10 = 2.3 nats: guessing
    quantity, carried = "validation cross-entropy (nats)", "rate carried by the √ rule"
    u_curves(folder / "u_curves.png", search, records, titles, quantity, ceiling, carried)
    plot_curves(folder / "curves.png", search, records)

    what = description(records)
    notes = [
        f"Accuracies and losses are means ± standard deviations over {search.seeds} seeds that played no part in the "
        "tuning. At most two standard deviations (pooled) apart is a tie. Trials: learning rates tried.",
        "The same number of epochs means fewer steps for the larger batch: what it loses by that is a matter of how "
        "long one trains, not of what large batches converge to. Repeat with more --epochs.",
    ]
    parts = [
        *map(html_report.paragraph, [what]),
        html_report.table(HEADER, rows),
        *map(html_report.paragraph, notes),
        html_report.figure(
            folder / "curves.png",
            "Learning curves at the best rates, means over fresh seeds. The distance from dashed (training) to solid "
            "(test) is the generalisation gap.",
        ),
        html_report.figure(
            folder / "u_curves.png",
            "Validation loss against learning rate. Lines: the tuning runs. Bars: fresh seeds at the best rate and at "
            "the one carried from the smallest batch.",
        ),
        html_report.paragraph(
            "Tuned: the peak learning rate, in factors of two, until the best has a worse neighbour on either side; "
            "the same number of trials for all at one batch size. Not tuned: betas 0.9 and 0.999, epsilon 1e-6, "
            f"weight decay {facts['weight_decay']:g} (Adam: none), SGD's Nesterov momentum 0.9, gradients clipped to "
            "a norm of 1, warm-up over a tenth of the steps, linear decay to zero."
        ),
        html_report.paragraph(f"Commands: {'; '.join(sorted({record['command'] for record in records}))}."),
    ]
    html_report.write_page(folder / "report.html", "Small and large batches: an LSTM reads images by rows", parts)
    table = html_report.markdown_table(HEADER, rows)
    return "\n".join([what, "", table, *notes, "", f"pictures and page: {folder}/*.png, {folder}/report.html"])


if __name__ == "__main__":
    main()
