"""The tables, pictures and page of recipes.sharp_minima."""

from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

from hf_lamb.sharpness import Point
from hf_lamb.sharpness.plots import BLUE, ORANGE, draw_against_loss, draw_path, require_matplotlib
from recipes.lib.report import atomic_write
from recipes.study import html_report
from recipes.study.sharp_minima_digits import FURTHER, LARGE, ON_THE_WAY, RATES, SMALL, TARGET, Run, best
from recipes.study.sweep import spread
from recipes.study.tables import markdown_table

OPTIMIZERS = {"lamb": "LAMB", "adamw": "AdamW", "sgd": "SGD, momentum 0.9"}
COLORS = {SMALL: BLUE, LARGE: ORANGE}
Record = dict[str, Any]


# -- tables ----------------------------------------------------------------------------------------------------------


def results_of(records: list[Record]) -> list[str]:
    """Markdown: networks at equal loss, a comparison at unequal loss, the same function in other weights."""
    return [digits_table(records), unequal_table(records), dinh_table(records)]


def digits_table(records: list[Record]) -> str:
    """The best rate of every optimizer and batch size, over its seeds."""
    columns = {
        "training loss": "train_loss",
        "test accuracy": "test_accuracy",
        "adaptive sharpness": "adaptive",
        "Keskar's sharpness": "keskar",
        "largest eigenvalue": "lambda_max",
        "Σ w²H": "weighted_trace",
    }
    rows = []
    for optimizer, title in OPTIMIZERS.items():
        for size in (SMALL, LARGE):
            runs = seeds(records, optimizer, size)
            cells = [in_words([run[column] for run in runs], "accuracy" in column) for column in columns.values()]
            steps = in_words([run["steps"] for run in runs])
            rows.append([title, f"{size:,}", chosen_rate(records, optimizer, size), steps, *cells])
    return markdown_table(("optimizer", "batch", "rate", "steps", *columns), rows)


def chosen_rate(records: list[Record], optimizer: str, batch_size: int) -> str:
    """The rate, and whether it lies on the edge of those that were tried."""
    (rate,) = {run["rate"] for run in seeds(records, optimizer, batch_size)}
    tried = RATES[optimizer, batch_size]
    return f"{rate:g}" + (" (edge)" if rate in (min(tried), max(tried)) else "")


def unequal_table(records: list[Record]) -> str:
    """AdamW's small batch at the common loss beside its large batch trained on."""
    (further,) = [record for record in records if record.get("target") == FURTHER]
    small, large = (seeds(records, "adamw", size)[0] for size in (SMALL, LARGE))
    rows = []
    for title, run in (
        (f"batch {SMALL}", small),
        (f"batch {LARGE:,}", large),
        (f"batch {LARGE:,}, {further['steps']:,} steps instead of {large['steps']:,}", further),
    ):
        cells = [number(run[column]) for column in ("train_loss", "test_loss", "adaptive", "keskar")]
        rows.append([title, *cells])
    return markdown_table(
        ("AdamW, seed 0", "training loss", "test loss", "adaptive sharpness", "Keskar's sharpness"), rows
    )


def dinh_table(records: list[Record]) -> str:
    """One network in five sets of weights."""
    columns = {
        "largest difference of a logit": "logits_difference",
        "Keskar's sharpness": "keskar",
        "distance to +0.1 nats, worst direction": "flatness_worst",
        "largest eigenvalue": "lambda_max",
        "trace": "trace",
        "adaptive sharpness": "adaptive",
        "Σ w²H": "weighted_trace",
    }
    rows = []
    for record in of(records, "dinh"):
        cells = [
            f"{record[column]:.0e}".replace("e-0", "e-").replace("0e+00", "0")
            if column == "logits_difference"
            else number(record[column], 4)
            for column in columns.values()
        ]
        rows.append([f"{record['alpha']:g}", *cells])
    return markdown_table(("α", *columns), rows)


def seeds(records: list[Record], optimizer: str, batch_size: int) -> list[Record]:
    """The runs of the rate that was chosen: the one with more than one seed."""
    runs = [r for r in of(records, "digits") if (r["optimizer"], r["batch_size"]) == (optimizer, batch_size)]
    runs = [run for run in runs if run["target"] == TARGET]
    (rate,) = {run["rate"] for run in runs if run["seed"] != 0}
    return sorted((run for run in runs if run["rate"] == rate), key=lambda run: run["seed"])


def of(records: list[Record], part: str) -> list[Record]:
    """The records of one part."""
    return [record for record in records if record["part"] == part]


def in_words(values: list[float], shares: bool = False) -> str:
    """Mean ± standard deviation; shares in per cent."""
    if shares:
        return spread([100 * value for value in values]).per_cent
    mean, sd, _ = spread(values)
    decimals = 0 if all(isinstance(value, int) for value in values) else len(number(mean).partition(".")[2])
    return f"{mean:,.{decimals}f} ± {sd:,.{decimals}f}"


def number(value: float, digits: int = 3) -> str:
    """Plain decimals."""
    return f"{value:,.{max(digits - 1 - int(f'{value:e}'.partition('e')[2]), 0)}f}" if value else "0"


# -- pictures --------------------------------------------------------------------------------------------------------


def plot_learning(runs: dict[Run, Any], path: Path) -> None:
    """Training and validation loss of the chosen runs over the epochs."""
    figure, panels = _three_panels("Digits: learning curves of the chosen rates, seed 0", height=4)
    for axes, optimizer in zip(panels, OPTIMIZERS, strict=True):
        for size in (SMALL, LARGE):
            chosen = best(optimizer, size, runs)
            _, epochs, losses, validation, _ = zip(*runs[chosen]["curve"], strict=True)
            axes.plot(epochs, losses, color=COLORS[size], label=f"batch {size:,}, training")
            axes.plot(epochs, validation, "--", color=COLORS[size], label=f"batch {size:,}, validation")
        axes.axhline(TARGET, color="gray", linewidth=0.8, linestyle=":")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("epochs of 1,200 images")
    panels[0].set_ylabel("cross-entropy (nats)")
    panels[0].legend(fontsize="small")
    _save(figure, path)


def plot_paths(runs: dict[Run, Any], paths: dict[str, Any], path: Path) -> None:
    """Keskar's parametric plot for every optimizer."""
    figure, panels = _three_panels("Digits: the straight line from the small batch's network to the large batch's")
    for axes, optimizer in zip(panels, OPTIMIZERS, strict=True):
        losses = [runs[best(optimizer, size, runs)]["record"]["train_loss"] for size in (SMALL, LARGE)]
        axes.set_title(
            f"{OPTIMIZERS[optimizer]}\ntraining losses {losses[0]:.4f} and {losses[1]:.4f}", fontsize="medium"
        )
        train, test = ([Point(*point) for point in points] for points in paths[optimizer])
        draw_path(axes, train, test, (f"batch {SMALL}", f"batch {LARGE:,}"))
    _save(figure, path)


def plot_sharpness_against_loss(runs: dict[Run, Any], path: Path) -> None:
    """Networks whose rate had decayed to zero at each loss, and (pale) the way of the last of them."""
    figure, panels = _three_panels("Digits: adaptive sharpness against training loss, seed 0", height=4)
    for axes, optimizer in zip(panels, OPTIMIZERS, strict=True):
        curves, styles = {}, {}
        for size in (SMALL, LARGE):
            chosen = best(optimizer, size, runs)
            ends = [runs[chosen._replace(target=target)]["record"] for target in (*ON_THE_WAY, TARGET)]
            settled, on_the_way = f"batch {size:,}, settled", f"batch {size:,}, while training"
            curves[settled] = [(end["train_loss"], end["adaptive"]) for end in ends]
            curves[on_the_way] = [(row[2], row[4]) for row in runs[chosen]["curve"]]
            styles[settled] = {"color": COLORS[size], "marker": "o", "linewidth": 2}
            styles[on_the_way] = {"color": COLORS[size], "marker": ".", "linewidth": 1, "alpha": 0.35}
        draw_against_loss(axes, curves, styles, "")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("adaptive sharpness, ρ = 0.01 (nats)")
    panels[0].legend(fontsize="small")
    _save(figure, path)


def plot_rates(records: list[Record], path: Path) -> None:
    """All runs that ended at the common loss: sharpness and test accuracy against the learning rate."""
    plt = require_matplotlib()
    title = f"Digits: all runs that were to end at a training loss of {TARGET:g} nats within 4 % (hollow: not reached)"
    figure, rows = plt.subplots(2, 3, figsize=(11, 6.4), layout="constrained", sharey="row", sharex="col")
    figure.suptitle(title)
    for column, optimizer in enumerate(OPTIMIZERS):
        for size in (SMALL, LARGE):
            found = [r for r in of(records, "digits") if (r["optimizer"], r["batch_size"]) == (optimizer, size)]
            for settled in (True, False):
                shown = [r for r in found if r["target"] == TARGET and r["settled"] == settled]
                rates = [r["rate"] for r in shown]
                style = {"color": COLORS[size], "linestyle": "", "fillstyle": "full" if settled else "none"}
                style |= {"marker": "o" if size == SMALL else "s", "alpha": 0.7 if settled else 1}
                label = {"label": f"batch {size:,}"} if settled else {}
                rows[0][column].plot(rates, [r["adaptive"] for r in shown], **style, **label)
                rows[1][column].plot(rates, [100 * r["test_accuracy"] for r in shown], **style)
        rows[0][column].set_title(OPTIMIZERS[optimizer])
        rows[0][column].set_xscale("log")
        rows[0][column].set_yscale("log")
        rows[1][column].set_xlabel("learning rate, at its peak")
        rates = sorted({rate for size in (SMALL, LARGE) for rate in RATES[optimizer, size]})
        rows[1][column].set_xticks(rates, [f"{rate:g}" for rate in rates], fontsize="small")
        rows[1][column].minorticks_off()
        for row in rows:
            row[column].grid(alpha=0.3)
    rows[0][0].set_ylabel("adaptive sharpness, ρ = 0.01 (nats)")
    rows[1][0].set_ylabel("test accuracy (%)")
    rows[0][0].legend(fontsize="small")
    _save(figure, path)


def plot_dinh(records: list[Record], path: Path) -> None:
    """Every metric over its value at α = 1."""
    plt = require_matplotlib()
    figure, axes = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
    figure.suptitle("The same function in other weights: (αA, B/α) instead of (A, B)")
    found = of(records, "dinh")
    (unit,) = [record for record in found if record["alpha"] == 1]
    alphas = [record["alpha"] for record in found]
    loss = unit["train_loss"]
    axes.set_title(f"training loss {loss:.4f} nats at every α", fontsize="small")
    metrics = {
        "keskar": "Keskar's sharpness, ε = 1e-3",
        "lambda_max": "largest eigenvalue of the Hessian",
        "trace": "trace of the Hessian",
        "flatness_worst": "distance to +0.1 nats, worst direction",
        "adaptive": "adaptive sharpness, ρ = 0.01",
        "weighted_trace": "Σ w²H",
    }
    for (metric, label), marker in zip(metrics.items(), "osd^vx", strict=True):
        dashed = "--" if metric in ("adaptive", "weighted_trace") else "-"
        axes.plot(alphas, [r[metric] / unit[metric] for r in found], dashed, marker=marker, label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(alphas, [f"{alpha:g}" for alpha in alphas])
    axes.minorticks_off()
    axes.set_xlabel("α")
    axes.set_ylabel("metric, relative to α = 1")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    _save(figure, path)


def plot_negated(points: list[list[Any]], path: Path) -> None:
    """From a network to itself with the signs of both layers flipped."""
    plt = require_matplotlib()
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    figure.suptitle("One function at both ends: a tanh network (A, B) and (-A, -B)")
    loss = next(point[1] for point in points if point[0] == 0)
    axes.set_title(f"training loss {loss:.4f} nats at both", fontsize="small")
    axes.plot([point[0] for point in points], [point[1] for point in points], color=BLUE)
    for end in (0, 1):
        axes.axvline(end, color="gray", linewidth=0.8, linestyle=":")
    axes.set_yscale("log")
    axes.set_xlabel("α: 0 is (A, B), 1 is (-A, -B)")
    axes.set_ylabel("training loss (nats)")
    axes.grid(alpha=0.3)
    _save(figure, path)


def _three_panels(title: str, height: float = 4.8) -> tuple[Any, Any]:
    plt = require_matplotlib()
    figure, panels = plt.subplots(1, 3, figsize=(13, height), layout="constrained", sharey=height < 4.5)
    figure.suptitle(title)
    for axes, optimizer in zip(panels, OPTIMIZERS, strict=True):
        axes.set_title(OPTIMIZERS[optimizer])
    return figure, panels


def _save(figure: Any, path: Path) -> None:
    try:
        with atomic_write(path) as unfinished:
            figure.savefig(unfinished, format="png", dpi=110)
    finally:
        require_matplotlib().close(figure)


# -- the page --------------------------------------------------------------------------------------------------------


def write(
    folder: Path, runs: dict[Run, Any], records: list[Record], paths: Any, negated: list[Any], bert_table: str
) -> Path:
    """The pictures, and report.html with all of them in it."""
    compared = folder / "bert-compared"
    pictures: dict[str, Callable[[Path], None]] = {
        "learning.png": lambda path: plot_learning(runs, path),
        "parametric.png": lambda path: plot_paths(runs, paths, path),
        "sharpness_vs_loss.png": lambda path: plot_sharpness_against_loss(runs, path),
        "rates.png": lambda path: plot_rates(records, path),
        "dinh.png": lambda path: plot_dinh(records, path),
        "negated.png": lambda path: plot_negated(negated, path),
    }
    for name, draw in pictures.items():
        draw(folder / name)

    page = [
        html_report.paragraph(EXPLANATION),
        html_report.heading("1. Digits, every network trained to one training loss"),
        _html_table(digits_table(records)),
        html_report.figure(folder / "learning.png", "Learning curves. The dotted line is the loss at which all end."),
        html_report.figure(folder / "parametric.png", "Loss and accuracy on the line through both networks."),
        html_report.figure(folder / "sharpness_vs_loss.png", SETTLED_FIRST),
        html_report.figure(folder / "rates.png", "Every point is a network; compare the colours within a panel."),
        "<h3>What a comparison at unequal loss would say</h3>",
        _html_table(unequal_table(records)),
        html_report.heading("2. One function, five sets of weights"),
        _html_table(dinh_table(records)),
        html_report.figure(folder / "dinh.png", "Solid: changes though the function does not. Dashed: stays."),
        html_report.figure(folder / "negated.png", "A hill on the line between two networks says nothing of either."),
        html_report.heading("3. A tiny BERT on the embedded corpus, LAMB"),
        f'<pre style="white-space: pre-wrap">{escape(bert_table)}</pre>',
        html_report.figure(compared / "sharpness_vs_loss.png", "As recorded by SharpnessCallback, and at the end."),
        html_report.figure(compared / "parametric.png", "The line between the two checkpoints."),
        html_report.figure(compared / "layers.png", "Each layer by itself."),
    ]
    target = folder / "report.html"
    html_report.write_page(target, "Small batch, large batch: which minimum is sharper?", page)
    return target


EXPLANATION = (
    "Sharper says how fast the loss rises when weights move; it does not say worse. All networks are measured on "
    "their training data, at the same training loss except where it is said, because sharpness changes with it."
)
SETTLED_FIRST = (
    "Compare the two bold lines, one above the other. While the rate is high, a small batch hovers above the floor of "
    "its valley, and the slope there counts as sharpness (pale)."
)


def _html_table(markdown: str) -> str:
    head, _, *rows = (line.strip("| ").split(" | ") for line in markdown.splitlines() if line)
    return html_report.table(head, rows)
