"""Plots of a comparison. Each plot shows the training losses at which it was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_lamb.sharpness.paths import Point

if TYPE_CHECKING:
    from hf_lamb.sharpness.compare import Comparison

__all__ = [
    "BLUE",
    "ORANGE",
    "draw_against_loss",
    "draw_path",
    "plot_comparison_against_loss",
    "plot_layers",
    "plot_path",
    "require_matplotlib",
]

BLUE = "#2066a8"
"""The first colour of the plots."""
ORANGE = "#d1661f"
"""The second colour of the plots."""


def require_matplotlib() -> Any:
    """Return pyplot, set to draw to files.

    Raises:
        ValueError: matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError:
        raise ValueError("pip install matplotlib: the plots need it") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def draw_path(axes: Any, train: Sequence[Point], held_out: Sequence[Point], ends: tuple[str, str]) -> None:
    """Draw Keskar's parametric plot into one panel: loss on the left axis, accuracy on the right axis."""
    for points, style, label in ((train, "-", "training"), (held_out, "--", "held out")):
        if points:
            alphas = [point.alpha for point in points]
            axes.plot(alphas, [point.loss for point in points], style, color=BLUE, label=f"loss, {label}")
    axes.set_yscale(_scale([point.loss for point in (*train, *held_out)]))
    axes.set_xlabel(f"α: 0 is {ends[0]}, 1 is {ends[1]}")
    axes.set_ylabel("loss (nats)", color=BLUE)
    lines, labels = axes.get_legend_handles_labels()
    if all(point.accuracy is not None for point in train):
        right = axes.twinx()
        for points, style, label in ((train, "-", "training"), (held_out, "--", "held out")):
            if points:
                accuracies = [100 * (point.accuracy or 0) for point in points]
                right.plot([p.alpha for p in points], accuracies, style, color=ORANGE, label=f"accuracy, {label}")
        right.set_ylabel("accuracy (%)", color=ORANGE)
        right.set_ylim(0, 102)
        more, names = right.get_legend_handles_labels()
        lines, labels = lines + more, labels + names
    for end in (0, 1):
        axes.axvline(end, color="gray", linewidth=0.8, linestyle=":")
    axes.legend(lines, labels, fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)


def draw_against_loss(
    axes: Any,
    curves: Mapping[str, Sequence[tuple[float, float]]],
    styles: Mapping[str, Mapping[str, Any]],
    ylabel: str = "adaptive sharpness (nats)",
) -> None:
    """Draw sharpness against training loss, one curve for each run; the loss falls from left to right."""
    for name, points in curves.items():
        ordered = [(loss, value) for loss, value in points if loss > 0 and value > 0]
        if ordered:
            axes.plot(*zip(*ordered, strict=True), label=name, **styles.get(name, {}))
    lines = [(line.get_xdata(), line.get_ydata()) for line in axes.get_lines()]
    axes.set_xscale(_scale([x for xs, _ in lines for x in xs]))
    axes.set_yscale(_scale([y for _, ys in lines for y in ys]))
    axes.xaxis.set_inverted(True)
    axes.set_xlabel("training loss (nats), falling")
    axes.set_ylabel(ylabel)


def plot_path(comparison: Comparison, path: Path) -> None:
    """Save the parametric plot as a PNG."""
    plt = require_matplotlib()
    figure, axes = plt.subplots(figsize=(7, 4.8), layout="constrained")
    figure.suptitle("The straight line between the two networks")
    axes.set_title(f"training loss: {comparison.losses}", fontsize="small")
    draw_path(axes, comparison.path, comparison.held_out_path, (comparison.small.name, comparison.large.name))
    _save(figure, path)


def plot_comparison_against_loss(comparison: Comparison, path: Path) -> None:
    """Save a plot of both networks as points, with the curves of their training if `SharpnessCallback` logged them."""
    plt = require_matplotlib()
    figure, axes = plt.subplots(figsize=(7, 4.8), layout="constrained")
    figure.suptitle("Adaptive sharpness at the training loss where it was measured")
    if comparison.warning:
        axes.set_title("the training losses are too far apart for a comparison", fontsize="small")
    for side, color, marker in ((comparison.small, BLUE, "o"), (comparison.large, ORANGE, "s")):
        if side.history:
            label = f"{side.name}, in training, on its callback's batches"
            draw_against_loss(axes, {label: side.history}, {label: {"color": color, "alpha": 0.5}})
        loss, value = side.train.loss, side.metrics["adaptive sharpness"]
        axes.plot([loss], [value], marker, color=color, markersize=9, label=f"{side.name}, loss {loss:.4g}")
    draw_against_loss(axes, {}, {}, f"adaptive sharpness, ρ = {comparison.settings['rho']:g} (nats)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    _save(figure, path)


def plot_layers(comparison: Comparison, path: Path) -> None:
    """Save a bar plot of the adaptive sharpness of each layer."""
    plt = require_matplotlib()
    layers = list(comparison.small.layers)
    figure, axes = plt.subplots(figsize=(8, 1.8 + 0.32 * len(layers)), layout="constrained")
    figure.suptitle("Adaptive sharpness of each layer, the others fixed")
    axes.set_title(f"training loss: {comparison.losses}", fontsize="small")
    for side, color, offset in ((comparison.small, BLUE, -0.2), (comparison.large, ORANGE, 0.2)):
        places = [i + offset for i in range(len(layers))]
        axes.barh(places, [side.layers[layer] for layer in layers], height=0.38, color=color, label=side.name)
    axes.set_yticks(range(len(layers)), layers, fontsize="small")
    axes.invert_yaxis()
    axes.set_xlabel(f"adaptive sharpness, ρ = {comparison.settings['rho']:g} (nats)")
    axes.xaxis.set_major_locator(plt.MaxNLocator(6))
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize="small")
    _save(figure, path)


def _scale(values: Sequence[float]) -> str:
    """Return "log" if the values span more than a factor of five; else "linear", whose ticks are easier to read."""
    return "log" if values and 0 < 5 * min(values) < max(values) else "linear"


def _save(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path, format="png", dpi=120)
    finally:
        require_matplotlib().close(figure)
