"""What a run writes: a line of results.jsonl, and pictures."""

import argparse
import json
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


def plot_training(log_history: list[dict[str, float]], path: Path, title: str, baseline: float | None = None) -> None:
    """Loss, learning rate and trust ratios over the steps of a run, from `trainer.state.log_history`, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, middle, bottom) = plt.subplots(3, 1, figsize=(8, 9), sharex=True, layout="constrained")
    figure.suptitle(title)
    top.plot(*_series(log_history, "loss"), label="training", linewidth=1)
    top.plot(*_series(log_history, "eval_loss"), label="held out", marker="o")
    if baseline is not None:
        top.axhline(baseline, label="held out, unigrams", color="gray", linestyle="--")
    top.set_ylabel("masked-LM loss (nats)")
    top.legend()
    middle.plot(*_series(log_history, "learning_rate"))
    middle.set_ylabel("learning rate")
    steps, ratios = _series(log_history, "lamb/trust_ratio_median")
    if steps:
        low, high = (_series(log_history, f"lamb/trust_ratio_{end}")[1] for end in ("min", "max"))
        bottom.fill_between(steps, low, high, alpha=0.25, label="smallest to largest layer")
        bottom.plot(steps, ratios, label="median layer")
        bottom.set_yscale("log")
        bottom.legend()
        bottom.set_ylabel("trust ratio ‖w‖/‖u‖")
    else:
        bottom.text(0.5, 0.5, "no trust ratios: not LAMB", ha="center", transform=bottom.transAxes)
        bottom.set_yticks([])
    bottom.set_xlabel("optimizer steps")
    if log_history:
        bottom.set_xlim(0, max(1, *(line["step"] for line in log_history)))
    try:
        with atomic_write(path) as unfinished:
            figure.savefig(unfinished, format="png", dpi=120)
    finally:
        plt.close(figure)


def plot_trust_ratios(history: dict[str, Any], path: Path, title: str) -> bool:
    """A heat map, layers x steps, of `hf_lamb.trust_ratio_history`, as a PNG; nothing for fewer than two columns.

    Returns whether there is a picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    steps, rows = history.get("steps", []), history.get("ratios", {})
    if len(steps) < 2:
        return False
    ratios = [[max(ratio, 1e-6) for ratio in row] for row in rows.values()]
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


def _series(log_history: list[dict[str, float]], key: str) -> tuple[list[float], list[float]]:
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
