"""The report of `recipes.compare_optimizers --study`, from the trials' records: tables, pictures, what they say."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from recipes.lib.optimizers import NAMES
from recipes.study.batch_study import BETA2, HALF_LIFE, STUDIES, BatchStudy, beta2_of, study_of
from recipes.study.compare_report import (
    MIN_STEPS,
    NOT_REACHED,
    TARGET_HEADER,
    Cell,
    batch_axis,
    description,
    notes_on_target,
    target_of,
    target_panel,
    target_rows,
)
from recipes.study.plots import legend_below, picture, style_of, u_curves
from recipes.study.sweep import (
    Record,
    Spread,
    Study,
    Trial,
    judged,
    objective_of,
    spread,
    standing,
    trial_of,
    tuned,
)
from recipes.study.tables import TUNED, markdown_table, tuned_cells

TUNED_HEADER = ("batch", "steps", *TUNED, "loss", "")
CARRIED_HEADER = ("batch", "optimizer", "√-rule rate", "loss, β₂ 0.999", "regret", "β₂ carried", "loss", "regret")
# The pictures: name without what it begins with, and what it shows.
SEARCH_PICTURE, PANELS = "search.png", "panels.png"
ALT = {
    SEARCH_PICTURE: "Held-out loss against learning rate: the search, and the fresh seeds",
    PANELS: "Best loss, regret of the carried rate, beta2 fixed and carried, steps to a target, over batch sizes",
}


class Results(NamedTuple):
    """What the records of a study hold so far."""

    search: BatchStudy
    cells: list[Cell]  # of the batch sizes whose search has ended; runs may be missing
    half_life: dict[tuple[str, int], list[Record]]  # runs with carried β₂, by optimizer and batch size
    missing: list[str]  # what is still to be run, in words

    @property
    def whole(self) -> list[Cell]:
        """The cells that lack no run."""
        return [c for c in self.cells if len(c.runs) == len(c.carried_runs) == self.search.seeds]


def results_of(search: BatchStudy, records: Sequence[Record]) -> Results:
    """Sort the records of a study, which need not be complete."""
    done = {trial_of(record): objective_of(record) for record in records}
    cells, half_life, missing = [], {}, []
    for batch_size in search.settings:
        if not search.is_tuned(done, batch_size):
            missing.append(f"batch {batch_size:,}: tuning, and all that follows from it")
            continue
        wanted: list[Trial] = []
        for optimizer in search.optimizers:
            best = tuned(search, records, optimizer, batch_size)
            rates = search.judged_rates(done, optimizer, batch_size)
            runs, carried = (judged(search, records, optimizer, batch_size, r) for r in (rates[0], rates[-1]))
            steps = next(record["steps"] for record in records if record["setting"] == batch_size)
            cells.append(Cell(optimizer, batch_size, steps, best, runs, rates[-1], carried))
            wanted += [trial for rate in rates for trial in search.judging(optimizer, batch_size, rate)]
        for name, optimizer in HALF_LIFE.items():
            trials = [t for t in search.half_life_trials(done) if t[:2] == (name, batch_size)]
            half_life[optimizer, batch_size] = [record for record in records if trial_of(record) in trials]
            wanted += trials
        lacking = Counter(HALF_LIFE.get(t.optimizer, t.optimizer) for t in wanted if t not in done)
        if lacking:
            runs_of = ", ".join(f"{NAMES[optimizer]} {n}" for optimizer, n in lacking.items())
            missing.append(f"batch {batch_size:,}: runs with fresh seeds of {runs_of}")
    return Results(search, cells, half_life, missing)


def regret(runs: Sequence[Record], tuned_runs: Sequence[Record]) -> Spread:
    """How much more loss runs end with than the tuned ones of the same seeds."""
    of_seed = {run["seed"]: objective_of(run) for run in tuned_runs}
    losses = [(objective_of(run), of_seed[run["seed"]]) for run in runs]
    return spread([a - b if math.isfinite(a) and math.isfinite(b) else None for a, b in losses])


def target_in(results: Results, margin: float | None) -> float:
    """The loss that steps are counted to: a margin above the smallest batch's best one, or what all runs reach.

    nan where every run diverged.
    """
    if margin is not None:
        return target_of(results.whole, margin)
    losses = [objective_of(run) for cell in results.whole for run in cell.runs]
    return max(filter(math.isfinite, losses), default=math.nan)


# -- tables -----------------------------------------------------------------------------------------------------------


def tuned_rows(results: Results, min_steps: int) -> list[list[str]]:
    """Every optimizer at its best rate; best first where all seeds have run, ties called ties."""
    rows = []
    for batch_size in results.search.settings:
        here = [cell for cell in results.cells if cell.batch_size == batch_size]
        complete = all(len(cell.runs) == results.search.seeds for cell in here)
        losses = [cell.loss for cell in here] if complete else []
        for cell in sorted(here, key=lambda cell: cell.loss.mean if complete else cell.best.objective):
            mark = standing(cell.loss, losses) if complete else ""
            rows.append(
                [
                    f"{batch_size:,}",
                    f"{cell.steps:,}",
                    *tuned_cells(cell.optimizer, cell.best),
                    loss_in_words(cell.runs, results.search.seeds, cell.best.objective),
                    mark if cell.steps >= min_steps else "too few steps",
                ]
            )
    return rows


def carried_rows(results: Results, records: Sequence[Record]) -> list[list[str]]:
    """What the rate of the smallest batch is worth at the others, with β₂ fixed and carried."""
    search, rows = results.search, []
    done = {trial_of(record): objective_of(record) for record in records}
    for cell in results.cells:
        if cell.batch_size == search.settings[0]:
            continue
        is_best = " (the best)" if cell.carried_rate == cell.best.learning_rate else ""
        row = [f"{cell.batch_size:,}", NAMES[cell.optimizer], f"{cell.carried_rate:.3g}{is_best}"]
        there = search.tried(done, cell.optimizer, cell.batch_size)[cell.carried_rate]
        row += [
            loss_in_words(cell.carried_runs, search.seeds, there),
            regret_in_words(cell, cell.carried_runs, search),
        ]
        runs = results.half_life.get((cell.optimizer, cell.batch_size))
        if cell.optimizer in HALF_LIFE.values() and runs is not None:
            name = next(name for name, optimizer in HALF_LIFE.items() if optimizer == cell.optimizer)
            beta2 = beta2_of(Trial(name, cell.batch_size, 0.0, 0), search.settings[0])
            row += [f"{beta2:.4f}", loss_in_words(runs, search.seeds), regret_in_words(cell, runs, search)]
        else:
            row += ["", "", ""]
        rows.append(row)
    return rows


def loss_in_words(runs: Sequence[Record], seeds: int, of_tuning: float | None = None) -> str:
    """The loss over fresh seeds; as long as one is missing, that of the tuning run."""
    if len(runs) == seeds:
        return str(spread([run["objective"] for run in runs]))
    if of_tuning is None:
        return "not run"
    return f"{of_tuning:.3f}, tuning only" if math.isfinite(of_tuning) else "diverged, tuning only"


def regret_in_words(cell: Cell, runs: Sequence[Record], search: BatchStudy) -> str:
    if not len(runs) == len(cell.runs) == search.seeds:
        return "not run"
    if runs == cell.runs:
        return "none"
    return signed(regret(runs, cell.runs))


def signed(value: Spread) -> str:
    """A difference with its sign."""
    if not math.isfinite(value.mean):
        return str(value)
    return f"{value.mean:+.3f} ± {value.sd:.3f}".replace("-", "−")


# -- words ------------------------------------------------------------------------------------------------------------


def conclusions(results: Results, min_steps: int) -> list[str]:
    """What the complete cells say, in sentences."""
    search, lines = results.search, []
    for batch_size in search.settings:
        here = [cell for cell in results.whole if cell.batch_size == batch_size]
        if len(here) < len(search.optimizers):
            continue
        if here[0].steps < min_steps:
            lines.append(f"Batch {batch_size:,}: fewer than {min_steps} steps, nothing is concluded.")
            continue
        losses = [cell.loss for cell in here]
        standings = {cell.optimizer: standing(cell.loss, losses) for cell in here}
        first = [NAMES[o] for o, mark in standings.items() if mark in ("lowest", "tie")]
        behind = [f"{NAMES[o]} {mark or 'diverged'}" for o, mark in standings.items() if mark not in ("lowest", "tie")]
        best = " and ".join(first) + (" tie for the lowest loss" if len(first) > 1 else " has the lowest loss")
        lines.append(f"Tuned at batch {batch_size:,}, {best}" + (f"; {', '.join(behind)}." if behind else "."))
        if batch_size == search.settings[0]:
            continue
        costs = [f"{NAMES[c.optimizer]} {regret_in_words(c, c.carried_runs, search)}" for c in here]
        lines.append(
            f"At batch {batch_size:,} the rate of batch {search.settings[0]:,} times "
            f"{math.sqrt(batch_size / search.settings[0]):.3g}, untuned, costs: {', '.join(costs)} nats."
        )
        changes = [
            f"{NAMES[c.optimizer]} {signed(regret(runs, c.carried_runs))}"
            for c in here
            if len(runs := results.half_life.get((c.optimizer, batch_size), [])) == search.seeds
        ]
        if changes:
            lines.append(f"Carrying β₂ as well changes the loss of that rate by: {', '.join(changes)} nats.")
    return lines


def budget(results: Results, records: Sequence[Record]) -> str:
    """How everybody was tuned, and with how many runs."""
    search = results.search
    counts = Counter(record["optimizer"] for record in records)
    runs = ", ".join(
        f"{NAMES[HALF_LIFE.get(o, o)]}{' with carried β₂' if o in HALF_LIFE else ''} {n}" for o, n in counts.items()
    )
    starts = ", ".join(f"{NAMES[o]} {search.first_rates[o]:g}" for o in search.optimizers)
    return (
        "Tuned: the peak learning rate, in factors of two, with one seed, until the best rate has a worse neighbour "
        "on either side; at one batch size all optimizers get the same number of trials. "
        f"Batch {search.settings[0]:,} starts from {starts}; the others from its best rate times the square root of "
        f"the batch's growth. Runs: {runs}."
    )


# -- pictures ---------------------------------------------------------------------------------------------------------


def pictures_of(results: Results) -> list[str]:
    """The search, as soon as there is a trial, and the panels as soon as there is something to show in them."""
    return [SEARCH_PICTURE, *([PANELS] if results.whole else [])]


def draw(results: Results, records: Sequence[Record], start: str, min_steps: int, target_margin: float | None) -> None:
    """Draw `pictures_of` the results. start: what their paths begin with."""
    unigram_loss = records[0]["unigram_loss"]
    steps = {record["setting"]: record["steps"] for record in records}
    titles = {b: f"batch {b:,}, {steps[b]:,} steps" for b in results.search.settings if b in steps}
    carried, quantity = "rate carried by the √ rule", "held-out masked-LM loss (nats)"
    u_curves(Path(start + SEARCH_PICTURE), results.search, records, titles, quantity, unigram_loss, carried)
    if PANELS in pictures_of(results):
        draw_panels(results, Path(start + PANELS), min_steps, target_margin)


def draw_panels(results: Results, path: Path, min_steps: int, target_margin: float | None) -> None:
    """Best loss, regret of the carried rate, the same with carried β₂, steps to a target; over batch sizes."""
    cells, first = results.whole, results.search.settings[0]
    later = [cell for cell in cells if cell.batch_size != first]
    with picture(path, columns=2, rows=2, size=(11, 8.6)) as (figure, axes):
        best, untuned, betas, steps = axes.flat
        lines(best, cells, {(c.optimizer, c.batch_size): c.loss for c in cells})
        best.set_ylabel("held-out masked-LM loss (nats)")
        best.set_title("rate tuned at every batch size")
        lines(untuned, later, {(c.optimizer, c.batch_size): regret(c.carried_runs, c.runs) for c in later})
        untuned.set_title(f"rate of batch {first:,}, carried by the √ rule, untuned")
        both = [c for c in later if len(results.half_life.get((c.optimizer, c.batch_size), [])) == len(c.runs)]
        fixed = {(c.optimizer, c.batch_size): regret(c.carried_runs, c.runs) for c in both}
        half_life = {
            (c.optimizer, c.batch_size): regret(results.half_life[c.optimizer, c.batch_size], c.runs) for c in both
        }
        lines(betas, both, fixed)
        lines(betas, both, half_life, label=", β₂ carried", mfc="none", linestyle="--")
        betas.set_title(f"the same, with β₂ {BETA2:g} and with carried β₂")
        for axis in (untuned, betas):
            axis.axhline(0, color="black", linewidth=1)
            axis.set_ylabel("loss − loss of the tuned rate (nats)")
        target_panel(steps, cells, target_in(results, target_margin), "optimizer steps")
        steps.set_title("steps to a target; curves: E = E_min + S_min B")
        for axis in axes.flat:
            batch_axis(axis, cells, min_steps)
        legend_below(figure, best, betas, steps, extra=[NOT_REACHED], columns=4)


def lines(
    axis: Any, cells: Sequence[Cell], values: Mapping[tuple[str, int], Spread], label: str = "", **style: Any
) -> None:
    """Mean and standard deviation against batch size, a line for each optimizer."""
    for optimizer in dict.fromkeys(cell.optimizer for cell in cells):
        points = [
            (batch_size, value.mean, value.sd)
            for (name, batch_size), value in values.items()
            if name == optimizer and math.isfinite(value.mean)
        ]
        if points:
            look = style_of(optimizer) | style
            axis.errorbar(*zip(*points, strict=True), **look, capsize=4, label=NAMES[optimizer] + label)


# -- the page ---------------------------------------------------------------------------------------------------------


def sections(
    search: BatchStudy, records: Sequence[Record], min_steps: int = MIN_STEPS, target_margin: float | None = None
) -> dict[str, list[str]]:
    """{name: tables and sentences, in Markdown} of what there is so far."""
    if not records:
        return {"what": ["Not run: there is no record yet."], "tuned": [], "carried": [], "targets": []}
    results = results_of(search, records)
    what = [description(records), budget(results, records)]
    what += [f"Not complete. Missing: {'; '.join(results.missing)}."] if results.missing else []
    found: dict[str, list[str]] = {"what": what, "tuned": [], "carried": [], "targets": []}
    if results.cells:
        found["tuned"] = [markdown_table(TUNED_HEADER, tuned_rows(results, min_steps)), NOTE.format(search.seeds)]
        found["tuned"] += conclusions(results, min_steps)
    if rows := carried_rows(results, records):
        found["carried"] = [markdown_table(CARRIED_HEADER, rows)]
    has_first = any(cell.batch_size == search.settings[0] for cell in results.whole)
    if has_first and math.isfinite(target := target_in(results, target_margin)):
        found["targets"] = [markdown_table(TARGET_HEADER, target_rows(results.whole, target))]
        found["targets"] += notes_on_target(results.whole, target, target_margin)
    return found


def page(name: str, records: Sequence[Record]) -> dict[str, list[str]]:
    """The sections of one of STUDIES for docs/study.md, with its pictures."""
    search = study_of_defaults(name)
    found = sections(search, records)
    if records:
        shown = pictures_of(results_of(search, records))
        found["what"] += [f"![{ALT[picture]}](study_{name}_{picture})" for picture in shown]
    return found


def study_of_defaults(name: str) -> BatchStudy:
    defaults = STUDIES[name]
    return study_of(defaults["optimizers"], defaults["batch_sizes"], defaults["seeds"])


NOTE = (
    "Losses: nats, mean ± standard deviation over {} seeds that played no part in the tuning. At most two standard "
    "deviations (pooled) apart is a tie. Regret: the loss minus that of the tuned rate with the same seed. Trials: "
    "learning rates tried."
)


def write_report(study: Study, records: Sequence[Record], min_steps: int, target_margin: float | None) -> str:
    """The pictures in the study's folder; returns the report for the terminal."""
    search: Any = study.search
    parts = sections(search, records, min_steps, target_margin)
    draw(results_of(search, records), records, f"{study.folder}/", min_steps, target_margin)
    texts = [part for some in parts.values() for part in some]
    return "\n".join([*texts, f"pictures: {study.folder}/*.png"])
