"""The search and the report of recipes.lstm_mnist: table, pictures and page, from the trials' records."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from recipes.lib.optimizers import NAMES
from recipes.lib.report import plain_log
from recipes.study import html_report
from recipes.study.plots import COLOURS, legend_below, picture, sign, u_curves
from recipes.study.sweep import (
    Record,
    Search,
    Spread,
    Study,
    hardware_of,
    outcomes,
    over_batch_sizes,
    search_behind,
    spread,
    standing,
)
from recipes.study.tables import TUNED, markdown_table, tuned_cells

# Where the search at the smallest batch starts; it goes on from there until the best rate lies inside.
FIRST_RATES = {"lamb": 2e-2, "adamw": 8e-3, "adam": 8e-3, "sgd": 0.5}
HEADER = ("batch", "steps", *TUNED, "test accuracy", "", "training accuracy", "test loss")

search_of = partial(over_batch_sizes, FIRST_RATES)


def results_of(records: list[Record]) -> list[str]:
    """What was run, and the table of it, in Markdown."""
    return [
        description(records),
        markdown_table(HEADER, rows_of(search_behind(records, search_of), records)),
    ]


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
                    *tuned_cells(optimizer, best),
                    accuracy[optimizer].per_cent,
                    standing(accuracy[optimizer], list(accuracy.values()), highest=True, digits=1),
                    finals(runs, "train_accuracy").per_cent,
                    str(finals(runs, "test_loss")),
                ]
            )
    return rows


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
        lines = [sign("test, ± sd shaded", None, linestyle="-"), sign("training", None, linestyle="--")]
        legend_below(figure, *axes[0], extra=lines, columns=6)


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
    more = [
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
    ]
    title = "Small and large batches: an LSTM reads images by rows"
    return html_report.write_study(folder, title, records, what, (HEADER, rows), notes, more)
