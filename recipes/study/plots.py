"""Pictures of studies: what several reports draw."""

import math
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

from recipes.lib.optimizers import NAMES
from recipes.lib.report import atomic_write
from recipes.study.sweep import Record, Search, best_of, judged, objective_of, spread, trial_of

# Okabe and Ito's colours, which the colour-blind can tell apart, and markers for print.
COLOURS = {
    "lamb": "#0072B2",
    "lamb_fixed_norm": "#56B4E9",
    "adamw": "#D55E00",
    "adam": "#009E73",
    "sgd": "#555555",
    "muon": "#CC79A7",
}
MARKERS = {"lamb": "o", "lamb_fixed_norm": "v", "adamw": "s", "adam": "^", "sgd": "D", "muon": "P"}


@contextmanager
def picture(path: Path, columns: int = 1, rows: int = 1, size: tuple[float, float] = (8, 4.5), **options: Any) -> Any:
    """(figure, 2-D array of axes) of a PNG that is written when the block ends. size: inches."""
    figure, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **options)
    try:
        yield figure, axes
        with atomic_write(path) as unfinished:
            figure.savefig(unfinished, format="png", dpi=120)
    finally:
        plt.close(figure)


def legend_below(figure: Any, *axes: Any, extra: Sequence[Any] = (), columns: int = 4) -> None:
    """One legend for a figure: every label of these axes once, then the extra lines."""
    handles = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    handles |= {line.get_label(): line for line in extra}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns)


def sign(label: str, marker: Any, **style: Any) -> Line2D:
    """A marker for a legend."""
    return Line2D([], [], **{"color": "black", "linestyle": "", "marker": marker, "label": label, **style})


def style_of(optimizer: str) -> dict[str, Any]:
    return {"color": COLOURS[optimizer], "marker": MARKERS[optimizer], "markersize": 5}


def u_curves(
    path: Path,
    search: Search,
    records: Sequence[Record],
    titles: dict[Any, str],
    quantity: str,
    ceiling: float,
    carried: str,
) -> None:
    """Objective against learning rate, a panel for each setting: lines of the tuning seed, bars of the fresh ones.

    ceiling: values above it, and diverged runs, are drawn on the upper edge. carried: what the ringed rate is.
    """
    done = {trial_of(record): objective_of(record) for record in records}
    settings = [setting for setting in search.settings if setting in titles]
    columns = len(settings) if len(settings) < 4 else 2
    rows = math.ceil(len(settings) / columns)
    options = {"size": (max(7, 4 * columns), 3.6 * rows + 1.2), "sharex": True, "sharey": True}
    with picture(path, columns, rows, **options) as (figure, axes):
        for axis in axes.flat[len(settings) :]:
            axis.set_axis_off()
        for setting, axis in zip(settings, axes.flat, strict=False):
            for optimizer in search.optimizers:
                if tried := search.tried(done, optimizer, setting):
                    _u_curve(axis, search, records, optimizer, setting, tried, ceiling)
            axis.set_xscale("log")
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.set_title(titles[setting])
            axis.grid(alpha=0.25)
        for axis in axes[-1]:
            axis.set_xlabel("peak learning rate")
        for axis in axes[:, 0]:
            axis.set_ylabel(quantity)
        signs = [
            sign(f"mean ± sd of {search.seeds} fresh seeds", "|", markersize=11),
            sign(carried, "o", markersize=11, fillstyle="none"),
            sign("above the scale, or diverged", 6, markersize=9),
        ]
        legend_below(figure, *axes.flat, extra=signs, columns=3)


def _u_curve(
    axis: Any,
    search: Search,
    records: Sequence[Record],
    optimizer: str,
    setting: Any,
    tried: dict[float, float],
    ceiling: float,
) -> None:
    colour = COLOURS[optimizer]
    height = {rate: min(value, ceiling) for rate, value in tried.items()}
    axis.plot(list(height), list(height.values()), color=colour, linewidth=1)
    inside = [rate for rate in tried if tried[rate] <= ceiling]
    axis.plot(inside, [tried[rate] for rate in inside], **style_of(optimizer), linestyle="", label=NAMES[optimizer])
    above = [rate for rate in tried if tried[rate] > ceiling]
    axis.plot(above, [ceiling] * len(above), color=colour, linestyle="", marker=6, markersize=9)

    done = {trial_of(record): objective_of(record) for record in records}
    best, start = best_of(tried)[0], search.start(done, optimizer, setting)
    for rate in {best, start}:
        fresh = spread([r["objective"] for r in judged(search, records, optimizer, setting, rate)] or [None])
        if math.isfinite(fresh.mean) and fresh.mean <= ceiling:
            axis.errorbar(rate, fresh.mean, fresh.sd, color=colour, capsize=4, marker="_", markersize=9)
    if start in tried and setting != search.settings[0]:
        axis.plot(start, height[start], marker="o", markersize=13, color=colour, fillstyle="none")
