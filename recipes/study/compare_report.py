"""The search and the report of recipes.compare_optimizers: tables, pictures and page, from the trials' records."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from recipes.lib.optimizers import NAMES
from recipes.lib.report import plain_log
from recipes.study import html_report
from recipes.study.plots import COLOURS, MARKERS, legend_below, picture, sign, style_of, u_curves
from recipes.study.sweep import (
    Record,
    Search,
    Spread,
    Study,
    Tuned,
    hardware_of,
    judged,
    outcomes,
    over_batch_sizes,
    search_behind,
    spread,
    standing,
    tuned,
)
from recipes.study.tables import TUNED, markdown_table, tuned_cells

# Where the search at the smallest batch starts; it goes on from there until the best rate lies inside.
FIRST_RATES = {"lamb": 2e-2, "adamw": 4e-3, "sgd": 1.0}
MIN_STEPS = 500  # with fewer, nothing is compared
TARGET_MARGIN = 0.1  # nats above the best loss of the smallest batch
HEADER = ("batch", "steps", *TUNED, "loss", "", "√-rule rate", "loss, not tuned", "")
TARGET_HEADER = ("batch", "optimizer", "steps to the target", "sequences to the target")

search_of = partial(over_batch_sizes, FIRST_RATES)


def losses_of(records: list[Record]) -> list[str]:
    """What was run, the table of losses, and its notes, in Markdown; with the default for what is too few steps."""
    search = search_behind(records, search_of)
    cells = cells_of(search, records)
    table = markdown_table(HEADER, rows_of(cells, MIN_STEPS))
    return [description(records), table, *notes_on_losses(search, cells, MIN_STEPS)]


def targets_of(records: list[Record]) -> list[str]:
    """The table of steps to the default target, and its notes."""
    cells = cells_of(search_behind(records, search_of), records)
    target = target_of(cells, TARGET_MARGIN)
    notes = notes_on_target(cells, target, TARGET_MARGIN)
    return [markdown_table(TARGET_HEADER, target_rows(cells, target)), *notes]


def summary_of(records: list[Record]) -> list[str]:
    """What was run, and a row for each batch size: the loss of every optimizer, and how it compares."""
    search = search_behind(records, search_of)
    cells = cells_of(search, records)
    found = {(row[0], row[2]): f"{row[5]}, {row[6]}" for row in rows_of(cells, MIN_STEPS)}
    batches, names = (list(dict.fromkeys(column)) for column in zip(*found, strict=True))
    rows = [[batch, *(found[batch, name] for name in names)] for batch in batches]
    first, *more = notes_on_losses(search, cells, MIN_STEPS)
    notes = [first.removesuffix(" Trials: learning rates tried."), *more]  # this table has no such column
    return [description(records), markdown_table(["batch", *names], rows), *notes]


class Cell(NamedTuple):
    """One optimizer at one batch size, tuned and judged."""

    optimizer: str
    batch_size: int
    steps: int
    best: Tuned
    runs: list[Record]  # fresh seeds at the best rate
    carried_rate: float  # from the smallest batch, by the square root of the batch's growth
    carried_runs: list[Record]

    @property
    def loss(self) -> Spread:
        return spread([run["objective"] for run in self.runs])

    @property
    def carried_loss(self) -> Spread:
        return spread([run["objective"] for run in self.carried_runs])


def cells_of(search: Search, records: Sequence[Record]) -> list[Cell]:
    """Every optimizer at every batch size that has all its trials."""
    cells = []
    for (batch_size, optimizer), (best, runs) in outcomes(search, records).items():
        rate = best.learning_rate
        if batch_size != search.settings[0]:
            rate = search.carry(tuned(search, records, optimizer, search.settings[0]).learning_rate, batch_size)
        carried_runs = judged(search, records, optimizer, batch_size, rate)
        steps = runs[0]["steps"]
        cells.append(Cell(optimizer, batch_size, steps, best, runs, rate, carried_runs))
    return cells


def rows_of(cells: Sequence[Cell], min_steps: int) -> list[list[str]]:
    """The table: best first, ties called ties, and nothing called anything where there were too few steps."""
    rows = []
    for batch_size in dict.fromkeys(cell.batch_size for cell in cells):
        here = sorted((cell for cell in cells if cell.batch_size == batch_size), key=lambda cell: cell.loss.mean)
        losses, carried_losses = [cell.loss for cell in here], [cell.carried_loss for cell in here]
        for cell in here:
            comparable = cell.steps >= min_steps
            rows.append(
                [
                    f"{batch_size:,}",
                    f"{cell.steps:,}",
                    *tuned_cells(cell.optimizer, cell.best),
                    str(cell.loss),
                    standing(cell.loss, losses) if comparable else "too few steps",
                    f"{cell.carried_rate:.3g}" if cell.carried_rate != cell.best.learning_rate else "the best",
                    str(cell.carried_loss),
                    standing(cell.carried_loss, carried_losses) if comparable else "too few steps",
                ]
            )
    return rows


# -- steps to a target ------------------------------------------------------------------------------------------------


def target_of(cells: Sequence[Cell], margin: float) -> float:
    """The best mean loss at the smallest batch, plus a margin."""
    smallest = min(cell.batch_size for cell in cells)
    return min(cell.loss.mean for cell in cells if cell.batch_size == smallest) + margin


def steps_to(target: float, curve: Sequence[tuple[int, float]]) -> float | None:
    """Where the loss first reaches the target, on a straight line between evaluations; None where it does not."""
    before: tuple[int, float] | None = None
    for step, loss in curve:
        if loss <= target:
            return step if before is None else step - (step - before[0]) * (target - loss) / (before[1] - loss)
        before = (step, loss)
    return None


def steps_to_target(cell: Cell, target: float) -> Spread:
    """Of the runs at the best rate; its mean is inf where one of them does not get there."""
    return spread([steps_to(target, run["curve"]) for run in cell.runs])


class Hyperbola(NamedTuple):
    """E = E_min + S_min B sequences to the target, S = S_min + E_min/B steps (McCandlish et al. 2018)."""

    e_min: float
    s_min: float
    largest: float  # batch size among those it was fitted to

    @property
    def b_crit(self) -> float:
        """Where twice the fewest sequences, and twice the fewest steps, are needed."""
        return self.e_min / self.s_min


def fitted(batch_sizes: Sequence[float], sequences: Sequence[float]) -> Hyperbola | None:
    """Least squares of relative residuals; None for fewer than three points, or where a coefficient is negative."""
    if len(batch_sizes) < 3:
        return None
    b, e = np.array(batch_sizes, float), np.array(sequences, float)
    (e_min, s_min), *_ = np.linalg.lstsq(np.stack([1 / e, b / e], axis=1), np.ones_like(e), rcond=None)
    return Hyperbola(float(e_min), float(s_min), max(batch_sizes)) if e_min > 0 and s_min > 0 else None


def fits_of(cells: Sequence[Cell], target: float) -> dict[str, Hyperbola | None]:
    """A hyperbola for every optimizer, through the batch sizes at which all its runs reach the target."""
    fits = {}
    for optimizer in dict.fromkeys(cell.optimizer for cell in cells):
        steps = {c.batch_size: steps_to_target(c, target).mean for c in cells if c.optimizer == optimizer}
        reached = {b: b * s for b, s in steps.items() if math.isfinite(s)}
        fits[optimizer] = fitted(list(reached), list(reached.values()))
    return fits


def target_rows(cells: Sequence[Cell], target: float) -> list[list[str]]:
    rows = []
    for cell in cells:
        steps = steps_to_target(cell, target)
        if math.isfinite(steps.mean):
            numbers = [f"{steps.mean:,.0f} ± {steps.sd:,.0f}", f"{steps.mean * cell.batch_size:,.0f}"]
        else:
            numbers = [f"> {cell.steps:,}", f"> {cell.steps * cell.batch_size:,}"]
        rows.append([f"{cell.batch_size:,}", NAMES[cell.optimizer], *numbers])
    return rows


# -- pictures ---------------------------------------------------------------------------------------------------------


def plot_losses(path: Path, cells: Sequence[Cell], min_steps: int, unigram_loss: float) -> None:
    """Loss against batch size, with the rate tuned and carried."""
    titles = {"loss": "rate tuned at every batch size", "carried_loss": "rate carried by the √ rule, not tuned"}
    with picture(path, columns=2, size=(10, 4.6), sharey=True) as (figure, axes):
        for axis, (name, title) in zip(axes[0], titles.items(), strict=True):
            for optimizer in dict.fromkeys(cell.optimizer for cell in cells):
                losses = {c.batch_size: getattr(c, name) for c in cells if c.optimizer == optimizer}
                points = [(b, loss.mean, loss.sd) for b, loss in losses.items() if math.isfinite(loss.mean)]
                if points:
                    axis.errorbar(*zip(*points, strict=True), **style_of(optimizer), capsize=4, label=NAMES[optimizer])
            axis.axhline(unigram_loss, color="gray", linestyle="--", linewidth=1, label="unigrams")
            batch_axis(axis, cells, min_steps)
            axis.set_title(title)
        axes[0][0].set_ylabel("held-out masked-LM loss (nats)")
        legend_below(figure, axes[0][0], columns=5)


def plot_target(path: Path, cells: Sequence[Cell], target: float, min_steps: int) -> None:
    """Steps and sequences to the target against batch size, with the hyperbola where it could be fitted."""
    with picture(path, columns=2, size=(10, 4.8)) as (figure, axes):
        for axis, what in zip(axes[0], ("optimizer steps", "sequences"), strict=True):
            target_panel(axis, cells, target, what)
            batch_axis(axis, cells, min_steps)
        every = dict.fromkeys(cell.optimizer for cell in cells)
        signs = [sign(NAMES[o], MARKERS[o], color=COLOURS[o], markersize=5) for o in every]
        legend_below(figure, axes[0][0], extra=[*signs, NOT_REACHED], columns=3)


NOT_REACHED = sign("not reached: more than the whole run", "o", fillstyle="none")


def target_panel(axis: Any, cells: Sequence[Cell], target: float, what: str) -> None:
    """Optimizer steps, or sequences, to the target on one axis."""
    sizes, fits = sorted({cell.batch_size for cell in cells}), fits_of(cells, target)
    grid = np.geomspace(sizes[0], sizes[-1])
    power = 0 if what == "optimizer steps" else 1
    for cell in cells:
        style, unit = style_of(cell.optimizer), cell.batch_size**power
        steps = steps_to_target(cell, target)
        if math.isfinite(steps.mean):
            y, sd = steps.mean * unit, steps.sd * unit
            axis.errorbar(cell.batch_size, y, sd, **style, linestyle="", capsize=4, label=NAMES[cell.optimizer])
        else:
            style |= {"mfc": "none", "linestyle": ""}
            axis.errorbar(cell.batch_size, cell.steps * unit, 0.3 * cell.steps * unit, lolims=True, **style)
    for optimizer, fit in fits.items():
        if fit:
            curve = (fit.e_min / grid + fit.s_min) * grid**power
            axis.plot(grid, curve, color=COLOURS[optimizer], linewidth=1)
            if fit.b_crit <= fit.largest:
                axis.axvline(fit.b_crit, color=COLOURS[optimizer], linestyle=":", linewidth=1)
    axis.set_yscale("log")
    axis.set_ylabel(f"{what} to {target:.2f} nats")
    plain_log(axis.yaxis)
    fewest = min(steps_to_target(c, target).mean for c in cells if c.batch_size == sizes[0])
    if power == 0 and math.isfinite(fewest):
        straight = [fewest * sizes[0] / b for b in sizes]
        axis.plot(sizes, straight, "k--", linewidth=1, label="half the steps for twice the batch")


def plot_regret(path: Path, cells: Sequence[Cell], min_steps: int) -> None:
    """What the carried rate costs against the tuned one."""
    with picture(path, size=(6.5, 4.6)) as (figure, axes):
        axis = axes[0][0]
        for optimizer in dict.fromkeys(cell.optimizer for cell in cells):
            points = [
                (c.batch_size, c.carried_loss.mean - c.loss.mean, standard_error(c))
                for c in cells
                if c.optimizer == optimizer and math.isfinite(c.carried_loss.mean - c.loss.mean)
            ]
            if points:
                axis.errorbar(*zip(*points, strict=True), **style_of(optimizer), capsize=4, label=NAMES[optimizer])
        axis.axhline(0, color="black", linewidth=1)
        batch_axis(axis, cells, min_steps)
        axis.set_ylabel("loss of the √-rule rate − loss of\nthe tuned rate (nats)")
        legend_below(figure, axis)


def standard_error(cell: Cell) -> float:
    """Of the difference between the carried rate's mean loss and the tuned one's."""
    same = cell.carried_rate == cell.best.learning_rate
    return 0.0 if same else math.hypot(cell.carried_loss.sd, cell.loss.sd) / math.sqrt(cell.loss.n)


def plot_trust_ratios(path: Path, cells: Sequence[Cell]) -> None:
    """‖w‖/‖u‖ of every adapted weight over a run: LAMB's, and the one AdamW would have had."""
    shown = [o for o in ("lamb", "adamw") if any(c.optimizer == o for c in cells)]
    sizes = sorted({cell.batch_size for cell in cells})
    if not shown:
        return
    options = {"size": (4.5 * len(shown), 2.6 * len(sizes) + 0.8), "sharex": True, "sharey": True}
    with picture(path, len(shown), len(sizes), **options) as (figure, axes):
        for cell in (cell for cell in cells if cell.optimizer in shown):
            axis, run = axes[sizes.index(cell.batch_size)][shown.index(cell.optimizer)], cell.runs[0]
            done = [100 * step / run["steps"] for step, _ in run["curve"]]
            for name in run["trust_ratios"][0] if run["trust_ratios"] else ():
                label, colour = kind_of(name)
                ratios = [ratios[name] for ratios in run["trust_ratios"]]
                axis.plot(done, ratios, color=colour, linewidth=1.2, label=label)
            shadow = " (shadow)" if cell.optimizer == "adamw" else ""
            axis.set_title(
                f"{NAMES[cell.optimizer]}{shadow}, batch {cell.batch_size:,}, rate {cell.best.learning_rate:.3g}",
                size=10,
            )
        for axis in axes.flat:
            axis.set_yscale("log")
            axis.grid(alpha=0.25)
        for row in axes:
            row[0].set_ylabel("trust ratio ‖w‖/‖u‖")
        for axis in axes[-1]:
            axis.set_xlabel("% of the steps")
        legend_below(figure, *axes.flat)


def kind_of(name: str) -> tuple[str, str]:
    """Which kind of weight a parameter's name stands for, and its colour."""
    if "embeddings" in name:
        return "embeddings", "#CC79A7"
    if "attention" in name:
        return "attention", "#0072B2"
    return ("output layer", "#009E73") if name.startswith("cls.") else ("feed-forward", "#E69F00")


def plot_noise_scale(path: Path, cells: Sequence[Cell]) -> bool:
    """tr(Σ)/‖G‖² over the runs whose batches are accumulated; False where there are none."""
    sizes = sorted({c.batch_size for c in cells if c.runs[0]["noise"]})
    if not sizes:
        return False
    with picture(path, len(sizes), size=(max(6.5, 4 * len(sizes)), 4.4), sharey=True) as (figure, axes):
        for axis, size in zip(axes[0], sizes, strict=True):
            for cell in (c for c in cells if c.batch_size == size):
                for run in cell.runs:
                    points = [(100 * step / run["steps"], noise or math.nan) for step, noise in run["noise"]]
                    style = style_of(cell.optimizer) | {"linewidth": 1, "label": NAMES[cell.optimizer]}
                    if points:
                        axis.plot(*zip(*points, strict=True), **style)
            axis.axhline(size, color="black", linestyle="--", linewidth=1, label="the batch size")
            axis.set_yscale("log")
            axis.set_title(f"batch {size:,}")
            axis.set_xlabel("% of the steps")
            axis.grid(alpha=0.25)
            plain_log(axis.yaxis)
        axes[0][0].set_ylabel("gradient noise scale (sequences)")
        legend_below(figure, axes[0][0])
    return True


def batch_axis(axis: Any, cells: Sequence[Cell], min_steps: int) -> None:
    """Batch sizes along the axis, grey where the runs are too short to compare anything."""
    sizes = sorted({cell.batch_size for cell in cells})
    short = [c.batch_size for c in cells if c.steps < min_steps]
    long = [c.batch_size for c in cells if c.steps >= min_steps]
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axis.minorticks_off()
    axis.set_xlim(sizes[0] / 1.5, sizes[-1] * 1.5)
    axis.set_xlabel("batch size (sequences)")
    axis.grid(alpha=0.25)
    if short:
        left = math.sqrt(min(short) * max(long)) if long else sizes[0] / 1.5
        axis.axvspan(left, sizes[-1] * 1.5, color="0.9", zorder=0, label=f"fewer than {min_steps} steps")


# -- the report -------------------------------------------------------------------------------------------------------

CAPTIONS = {
    "best_loss": "Held-out loss against batch size, mean ± sd over fresh seeds; dashed: guessing every token by its "
    "frequency. Left: rates tuned at every batch size. Right: rates tuned at the smallest batch only, times the "
    "square root of the batch's growth.",
    "u_curves": "Held-out loss against learning rate. Lines: the tuning runs. Bars: fresh seeds at the best rate and "
    "at the carried one.",
    "regret": "What not tuning costs: the loss of the carried rate minus that of the tuned one. Bars: standard error "
    "of the difference; none where the carried rate was the best one.",
    "to_target": "Steps and sequences until the held-out loss reaches the target, in the runs at the best rates, "
    "which decay to zero at the end of the budget wherever the target lies. Curves: E = E_min + S_min B, where three "
    "batch sizes reached it; dotted: B_crit = E_min/S_min.",
    "trust_ratios": "‖w‖/‖u‖ of every weight at the best rate, first fresh seed. LAMB multiplies its rate by it; "
    "AdamW's is computed beside the run and used for nothing.",
    "noise_scale": "Gradient noise scale tr(Σ)/‖G‖² from the first micro-batch against the whole batch, means over "
    "the steps between evaluations, a line for each seed. Batches far below it waste no sequences, batches far above "
    "it save no steps. Gaps: the estimate drowned in noise.",
}


def write_report(study: Study, records: Sequence[Record], min_steps: int, target_margin: float) -> str:
    """The pictures and report.html in the study's folder; returns the report for the terminal."""
    search, folder = study.search, study.folder
    cells = cells_of(search, records)
    if not cells:
        return f"{len(records)} trials in {study.path}, nothing tuned and judged yet: run the recipe again to go on"
    target = target_of(cells, target_margin)
    plot_all(folder, search, records, cells, target, min_steps)
    rows, to_target = rows_of(cells, min_steps), target_rows(cells, target)
    what = description(records)
    losses, targets = notes_on_losses(search, cells, min_steps), notes_on_target(cells, target, target_margin)

    def figures(*names: str) -> list[str]:
        paths = {folder / f"{name}.png": CAPTIONS[name] for name in names}
        return [html_report.figure(path, caption) for path, caption in paths.items() if path.exists()]

    parts = [
        html_report.paragraph(what),
        html_report.heading("Held-out loss"),
        html_report.table(HEADER, rows),
        *map(html_report.paragraph, losses),
        *figures("best_loss", "u_curves", "regret"),
        html_report.heading("Steps and sequences to a target"),
        html_report.table(TARGET_HEADER, to_target),
        *map(html_report.paragraph, targets),
        *figures("to_target"),
        html_report.heading("Inside the runs"),
        *figures("trust_ratios", "noise_scale"),
        html_report.heading("How it was done"),
        *map(html_report.paragraph, protocol(search, records)),
    ]
    html_report.write_page(folder / "report.html", "LAMB against other optimizers over batch sizes", parts)
    return "\n".join(
        [
            *(what, "", markdown_table(HEADER, rows), *losses),
            *("", markdown_table(TARGET_HEADER, to_target), *targets),
            *html_report.where_it_is(folder),
        ]
    )


def plot_all(
    folder: Path, search: Search, records: Sequence[Record], cells: Sequence[Cell], target: float, min_steps: int
) -> None:
    unigram_loss = records[0]["unigram_loss"]
    steps = {record["setting"]: record["steps"] for record in records}
    titles = {b: f"batch {b:,}, {n:,} steps" + (": too few" if n < min_steps else "") for b, n in steps.items()}
    means = [cell.loss.mean for cell in cells if math.isfinite(cell.loss.mean)]
    ceiling = unigram_loss + 0.5 * (unigram_loss - min(means)) if min(means) < unigram_loss else 1.1 * max(means)
    carried, quantity = "rate carried by the √ rule", "held-out masked-LM loss (nats)"
    u_curves(folder / "u_curves.png", search, records, titles, quantity, ceiling, carried)
    plot_losses(folder / "best_loss.png", cells, min_steps, unigram_loss)
    plot_target(folder / "to_target.png", cells, target, min_steps)
    plot_regret(folder / "regret.png", cells, min_steps)
    plot_trust_ratios(folder / "trust_ratios.png", cells)
    if not plot_noise_scale(folder / "noise_scale.png", cells):
        (folder / "noise_scale.png").unlink(missing_ok=True)


def description(records: Sequence[Record]) -> str:
    facts = records[0]["study"]
    tokens = facts["train_sequences"] * facts["max_seq_length"]
    return (
        f"BERT of size {facts['size']}, {records[0]['parameters']:,} parameters, vocabulary {facts['vocab_size']:,}, "
        f"pretrained by masked language modelling; corpus: {' '.join(facts['corpus'])}. Every run sees "
        f"{facts['train_sequences']:,} sequences of {facts['max_seq_length']} tokens ({tokens / 1e6:.3g} million), "
        f"whatever the batch size. Guessing every token by its frequency: {records[0]['unigram_loss']:.3f} nats. "
        f"{len(records)} runs on {hardware_of(records)}."
    )


def notes_on_losses(search: Search, cells: Sequence[Cell], min_steps: int) -> list[str]:
    """What a reader must know before believing the table."""
    notes = [
        f"Losses: nats, mean ± standard deviation over {cells[0].loss.n} seeds that played no part in the tuning. "
        "At most two standard deviations (pooled) apart is a tie. Trials: learning rates tried."
    ]
    if short := sorted({c.batch_size for c in cells if c.steps < min_steps}):
        sizes = " and ".join(f"{b:,}" for b in short)
        notes.append(f"Batch {sizes}: fewer than {min_steps} steps are too few to compare optimizers; no conclusion.")
    if edges := [c for c in cells if not c.best.interior]:
        where = ", ".join(f"{NAMES[c.optimizer]} at {c.batch_size:,}" for c in edges)
        notes.append(f"The best rate lies on the edge of what was tried: {where}.")
    if missing := len(search.optimizers) * len(search.settings) - len(cells):
        notes.append(f"Not complete: {missing} of {len(cells) + missing} combinations still miss trials.")
    return notes


def notes_on_target(cells: Sequence[Cell], target: float, margin: float | None) -> list[str]:
    """margin: above the best loss of the smallest batch; None if the target is what all runs reach."""
    origin = "which all runs reach" if margin is None else f"{margin:g} above the best loss of the smallest batch"
    notes = [f"Target: {target:.3f} nats, {origin}."]
    for optimizer, fit in fits_of(cells, target).items():
        if fit:
            hyperbola = f"E = {fit.e_min:,.0f} + {fit.s_min:,.0f} B sequences, so B_crit = {fit.b_crit:,.0f} sequences"
            beyond = f", extrapolated from batches of up to {fit.largest:,}" if fit.b_crit > fit.largest else ""
            notes.append(f"{NAMES[optimizer]}: {hyperbola}{beyond}.")
        else:
            reason = "fewer than three batch sizes reached the target, or the sequences do not grow with the batch"
            notes.append(f"{NAMES[optimizer]}: no critical batch size: {reason}.")
    return notes


def protocol(search: Search, records: Sequence[Record]) -> list[str]:
    """The tuning, the constants, the versions."""
    facts = records[0]["study"]
    starts = ", ".join(f"{NAMES[o]} {rate:g}" for o, rate in search.first_rates.items() if o in search.optimizers)
    versions = ", ".join(f"{name} {version}" for name, version in records[-1]["versions"].items() if version)
    commands = "; ".join(sorted({record["command"] for record in records}))
    return [
        "Tuned: the peak learning rate, in factors of two, with one seed. At the smallest batch the search starts "
        f"from {starts}; at the others from the best rate of the smallest batch times the square root of the batch's "
        "growth. It goes on until the best rate has a worse neighbour on either side; then the optimizers that took "
        "fewer trials get more, so that at one batch size all have the same number.",
        f"Not tuned: betas 0.9 and 0.999, epsilon 1e-6, weight decay {facts['weight_decay']:g} (none for biases and "
        "norms), SGD's Nesterov momentum 0.9, gradients clipped to a norm of 1, warm-up over a tenth of the steps, "
        "linear decay to zero. The seed decides weights, data order and masks, alike for all optimizers.",
        f"Held out: at most {facts['eval_sequences']:,} sequences of whole documents that no run was trained on. The "
        "rates were chosen by the loss on the same sequences.",
        f"Commands: {commands}. Versions: {versions}.",
    ]
