"""What a run writes: a line of results.jsonl, and pictures."""

import argparse
import json
import math
import platform
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from hf_lamb.files import atomic_write

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "hf_lamb")


def provenance() -> dict[str, Any]:
    """Time, command, hardware and versions of this run. The script is named by its module, not by its path."""
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python -m", _module_name(), *sys.argv[1:]]),
        "hardware": hardware(),
        "versions": {"python": platform.python_version(), **{p: _version(p) for p in PACKAGES}},
    }


def hardware() -> str:
    """For example "NVIDIA H100 80GB HBM3 x 1" or "x86_64, 2 threads"."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()} x {torch.cuda.device_count()}"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def no_options(description: str) -> None:
    """The command line of a program without options: `--help` describes the program and does not run it."""
    argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()


def append_json_line(path: Path, record: dict[str, Any]) -> None:
    """Add one line to a JSON-lines file; a reader sees the old file or the new one, never half a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_text() if path.exists() else ""
    if before and not before.endswith("\n"):
        before += "\n"
    with atomic_write(path) as unfinished:
        unfinished.write_text(before + json.dumps(record) + "\n")


# Okabe and Ito's colours, which the colour-blind can tell apart.
BLUE, VERMILLION, GRAY = "#0072B2", "#D55E00", "#555555"


def plot_training(
    log_history: list[dict[str, float]],
    path: Path,
    title: str,
    baseline: float | None = None,
    batch: int | None = None,
) -> None:
    """What a run has logged over its steps, from `trainer.state.log_history`, as a PNG.

    Loss and learning rate; also trust ratios, and batch and noise scale, where they are known.

    baseline: the held-out loss of guessing by frequency, of a masked LM. batch: the global batch of a run that logs
    none, because it does not change.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    steps, ratios = series(log_history, "lamb/trust_ratio_median")
    lines = [line for line in log_history if "loss" in line]
    batches = [line.get("lamb/batch_size", batch or math.nan) for line in lines]
    noise_scale = [line.get("lamb/noise_scale", math.nan) for line in lines]  # a line without it is a gap
    has_batch, has_noise_scale = (not all(map(math.isnan, values)) for values in (batches, noise_scale))
    rows = 2 + bool(steps) + (has_batch or has_noise_scale)
    figure, axes = plt.subplots(rows, sharex=True, figsize=(8, 3 * rows), layout="constrained")
    figure.suptitle(title)
    panels = iter(axes)

    losses = next(panels)
    losses.plot(*series(log_history, "loss"), label="training", color=BLUE, linewidth=1)
    losses.plot(*series(log_history, "eval_loss"), label="held out", color=VERMILLION, marker="o")
    if baseline is not None:
        losses.axhline(baseline, label="held out, unigrams", color=GRAY, linestyle="--")
    losses.set_ylabel("loss" if baseline is None else "masked-LM loss (nats)")
    losses.legend()
    rate = next(panels)
    rate.plot(*series(log_history, "learning_rate"), color=BLUE)
    rate.set_ylabel("learning rate")
    if steps:
        trust = next(panels)
        low, high = (series(log_history, f"lamb/trust_ratio_{end}")[1] for end in ("min", "max"))
        trust.fill_between(steps, low, high, alpha=0.25, color=BLUE, label="smallest to largest layer")
        trust.plot(steps, ratios, color=BLUE, label="median layer")
        trust.set_yscale("log")
        trust.set_ylabel("trust ratio ‖w‖/‖u‖")
        trust.legend()
    if has_batch or has_noise_scale:
        samples, at = next(panels), [line["step"] for line in lines]
        if has_batch:
            samples.plot(at, batches, label="global batch", color=BLUE, drawstyle="steps-pre")
        if has_noise_scale:
            samples.plot(at, noise_scale, label="noise scale", color=VERMILLION, linestyle="--")
        samples.set_yscale("log")
        plain_log(samples.yaxis)
        samples.set_ylabel("sequences")
        samples.legend()
    axes[-1].set_xlabel("optimizer steps")
    if log_history:
        axes[-1].set_xlim(0, max(1, *(line["step"] for line in log_history)))
    try:
        with atomic_write(path) as unfinished:
            figure.savefig(unfinished, format="png", dpi=120)
    finally:
        plt.close(figure)


def plain_log(axis: Any) -> None:
    """A logarithmic axis labelled with ordinary numbers at 1, 2 and 5 times the powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(StrMethodFormatter("{x:,.6g}"))
    axis.set_minor_formatter(NullFormatter())


def plot_trust_ratios(history: dict[str, Any], path: Path, title: str) -> bool:
    """A heat map, layers x steps, of `hf_lamb.trust_ratio_history`, as a PNG.

    Returns whether there is a picture: not for fewer than two columns, nor for NaNs alone.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    steps, rows = history.get("steps", []), history.get("ratios", {})
    if len(steps) < 2 or all(math.isnan(ratio) for row in rows.values() for ratio in row):
        return False
    ratios = [[min(max(ratio, 1e-6), 1e6) for ratio in row] for row in rows.values()]
    figure, axes = plt.subplots(figsize=(9, 1.6 + 0.2 * len(ratios)), layout="constrained")
    figure.suptitle(title)
    mesh = axes.pcolormesh(steps, range(len(ratios)), ratios, norm=LogNorm(), cmap="viridis", shading="nearest")
    axes.set_yticks(range(len(ratios)), [name.removesuffix(".weight") for name in rows], fontsize=7)
    axes.invert_yaxis()  # the model's first layer on top
    axes.set_xlim(steps[0], steps[-1])
    axes.set_xlabel("optimizer steps")
    figure.colorbar(mesh, ax=axes, label="trust ratio ‖w‖/‖u‖")
    try:
        with atomic_write(path) as unfinished:
            figure.savefig(unfinished, format="png", dpi=120)
    finally:
        plt.close(figure)
    return True


def series(log_history: list[dict[str, float]], key: str) -> tuple[list[float], list[float]]:
    """Steps and values of what was logged under a key."""
    points = [(line["step"], line[key]) for line in log_history if key in line]
    return [step for step, _ in points], [value for _, value in points]


def _module_name() -> str:
    spec = sys.modules["__main__"].__spec__
    return spec.name if spec is not None else Path(sys.argv[0]).stem


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
