"""Comparison of two networks: every metric, the losses, and whether the losses are close enough to compare."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from hf_lamb.files import atomic_write
from hf_lamb.sharpness.ascent import adaptive_sharpness, epsilon_sharpness, layer_sharpness
from hf_lamb.sharpness.flatness import epsilon_flatness
from hf_lamb.sharpness.hessian import hessian_trace, lambda_max, weighted_trace
from hf_lamb.sharpness.objective import LossFn, Scores, objective
from hf_lamb.sharpness.paths import ALPHAS, Point, check_one_architecture, interpolate

# The largest relative difference of two training losses at which sharpness can be compared. See docs/sharpness.md: at
# unequal loss the network with the lower loss measures flatter, at any batch size.
COMPARABLE = 0.10


@dataclass
class Measured:
    """The measurements of one network."""

    name: str
    train: Scores  # on the training batches
    held_out: Scores | None  # on the held-out batches
    metrics: dict[str, float]  # on the training batches, by name
    layers: dict[str, float]  # adaptive sharpness by layer
    history: list[tuple[float, float]]  # (training loss, adaptive sharpness) during training; [] if not logged


@dataclass
class Comparison:
    """The result of `compare`: `table()` is text, `to_json()` is data, `save(folder)` writes both and plots."""

    small: Measured
    large: Measured
    path: list[Point]
    held_out_path: list[Point]
    settings: dict[str, Any]

    @property
    def loss_difference(self) -> float:
        """|L₁ - L₂| / min(L₁, L₂) of the training losses."""
        a, b = self.small.train.loss, self.large.train.loss
        return abs(a - b) / min(a, b) if min(a, b) > 0 else (0.0 if a == b else math.inf)

    @property
    def warning(self) -> str | None:
        """One line if the training losses are too far apart to compare sharpness; else None."""
        if self.loss_difference <= COMPARABLE:
            return None
        return (
            f"WARNING: the training losses differ by {self.loss_difference:.0%}, {self.losses}: sharpness falls with "
            "the loss, so the network with the lower loss measures flatter and the ranking may reverse. Compare "
            "checkpoints of equal loss, or sharpness against loss along the training (SharpnessCallback)."
        )

    @property
    def note(self) -> str | None:
        """One line if more than half of an adaptive sharpness is slope; else None."""
        metrics = [side.metrics for side in (self.small, self.large)]
        shares = [m["adaptive sharpness, slope alone"] / (m["adaptive sharpness"] or math.inf) for m in metrics]
        if max(shares) <= 0.5:
            return None
        return (
            f"NOTE: the slope alone makes {shares[0]:.0%} and {shares[1]:.0%} of the adaptive sharpness: on these "
            "batches the weights are not at a minimum. Measure on more, and after the learning rate has decayed."
        )

    @property
    def losses(self) -> str:
        """Both training losses in words; they are printed with every measure."""
        return f"{self.small.name} {self.small.train.loss:.4g}, {self.large.name} {self.large.train.loss:.4g}"

    @property
    def verdict(self) -> str:
        """One sentence that compares adaptive sharpness, if the training losses are close enough."""
        a, b = (side.metrics["adaptive sharpness"] for side in (self.small, self.large))
        beside = f"by adaptive sharpness at training losses {self.losses}"
        if self.warning:
            return f"No verdict: {self.loss_difference:.0%} between the training losses, {self.losses}."
        if min(a, b) <= 0 or max(a, b) / min(a, b) < 1.05:
            return f"About equally sharp, {beside}."
        sharper, ratio = (self.large, b / a) if b > a else (self.small, a / b)
        return f"{sharper.name} is sharper, {ratio:.2f} times, {beside}."

    def table(self) -> str:
        """Return a text table: every metric, its ratio, and whether rescaling the weights changes it."""
        small, large = self.small, self.large
        rows = [("", small.name, large.name, "ratio", ""), *_score_rows("training", small.train, large.train)]
        if small.held_out is not None and large.held_out is not None:
            rows += _score_rows("held-out", small.held_out, large.held_out)
        for metric, value in small.metrics.items():
            note = "" if metric in INVARIANT else "changes with the weights' scale"
            rows.append(_row(metric, value, large.metrics[metric], note))
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        lines: list[str] = [
            "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2, 3)), row[4]]).rstrip()
            for row in rows
        ]
        return "\n".join([*lines, "", *filter(None, (self.warning, self.note)), self.verdict])

    def to_json(self) -> dict[str, Any]:
        """Return everything in JSON's types; infinite numbers become null."""
        record: dict[str, Any] = asdict(self) | {
            "loss_difference": self.loss_difference,
            "warning": self.warning,
            "note": self.note,
            "verdict": self.verdict,
        }
        for side in ("small", "large"):
            for scores in ("train", "held_out"):
                given = getattr(getattr(self, side), scores)
                record[side][scores] = given and given._asdict()
        record["path"] = [point._asdict() for point in self.path]
        record["held_out_path"] = [point._asdict() for point in self.held_out_path]
        return {key: finite(value) for key, value in record.items()}

    def save(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write report.json, report.txt and the plots, each completely or not at all.

        Returns:
            The paths of the files.

        Raises:
            ValueError: matplotlib is missing; nothing has been written then.
        """
        from hf_lamb.sharpness import plots

        plots.require_matplotlib()
        root = Path(folder)
        root.mkdir(parents=True, exist_ok=True)
        text, data = self.table() + "\n", json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n"
        pictures: dict[str, Callable[[Path], None]] = {
            "parametric.png": lambda path: plots.plot_path(self, path),
            "sharpness_vs_loss.png": lambda path: plots.plot_comparison_against_loss(self, path),
        }
        if self.small.layers:
            pictures["layers.png"] = lambda path: plots.plot_layers(self, path)
        writers: dict[str, Callable[[Path], object]] = {
            "report.json": lambda path: path.write_text(data),
            "report.txt": lambda path: path.write_text(text),
            **pictures,
        }
        for name, write in writers.items():
            with atomic_write(root / name) as unfinished:
                write(unfinished)
        return [root / name for name in writers]


# Metrics that do not change under rescalings that keep the function, such as alpha_scale.
INVARIANT = ("adaptive sharpness", "adaptive sharpness, slope alone", "weighted trace")


def compare(
    small: nn.Module | str | os.PathLike[str],
    large: nn.Module | str | os.PathLike[str],
    loss_fn: LossFn,
    batches: Iterable[Any],
    held_out: Iterable[Any] = (),
    *,
    names: tuple[str, str] = ("small batch", "large batch"),
    epsilon: float = 1e-3,
    rho: float = 1e-2,
    steps: int = 20,
    subspace: int | None = None,
    layers: bool = True,
    curvature: bool = False,
    alphas: Sequence[float] = ALPHAS,
    seed: int = 0,
    say: Callable[[str], object] = lambda _: None,
) -> Comparison:
    """Compare two networks on the same batches with every metric, and measure the line between them.

    Args:
        small: a module, or a checkpoint (a folder that `save_pretrained` or Trainer wrote).
        large: another one of the same architecture.
        loss_fn: see `epsilon_sharpness`.
        batches: the training data, see `epsilon_sharpness`.
        held_out: held-out batches. Default none.
        names: names of the two networks in the report. Default ("small batch", "large batch").
        epsilon: see `epsilon_sharpness`. Default 1e-3.
        rho: see `adaptive_sharpness`. Default 1e-2.
        steps: number of gradients of both. Default 20.
        subspace: see `epsilon_sharpness`. Default None.
        layers: measure `layer_sharpness` too, with half the steps. Default True.
        curvature: measure `lambda_max`, `hessian_trace` and `weighted_trace` too. Default False.
        alphas: see `interpolate`.
        seed: of all metrics. Default 0.
        say: a function that is called with one line before each measurement. Default: nothing is called.

    Returns:
        `Comparison`.

    Raises:
        ValueError: the architectures differ; a checkpoint cannot be loaded; a metric refuses its arguments.
    """
    batches, held_out = list(batches), list(held_out)
    sides, a, b = [], _load(small), _load(large)
    check_one_architecture(a, b)
    for name, given, model in zip(names, (small, large), (a, b), strict=True):
        say(f"{name}: adaptive sharpness")
        adaptive = adaptive_sharpness(model, loss_fn, batches, rho, steps=steps, seed=seed)
        say(f"{name}: Keskar's sharpness")
        keskar = epsilon_sharpness(model, loss_fn, batches, epsilon, steps=steps, seed=seed)
        metrics = {
            "adaptive sharpness": adaptive.value,
            "adaptive sharpness, slope alone": adaptive.slope,
            "Keskar's sharpness": keskar.value,
            "Keskar's sharpness, slope alone": keskar.slope,
        }
        if subspace is not None:
            metrics[f"Keskar's, {subspace} random directions"] = epsilon_sharpness(
                model, loss_fn, batches, epsilon, subspace=subspace, steps=steps, seed=seed
            ).value
        say(f"{name}: flatness")
        flatness = epsilon_flatness(model, loss_fn, batches, seed=seed)
        metrics |= {"flatness, median direction": flatness.median, "flatness, worst direction": flatness.worst}
        if curvature:
            say(f"{name}: curvature")
            metrics |= {
                "weighted trace": weighted_trace(model, loss_fn, batches, seed=seed).value,
                "largest eigenvalue": lambda_max(model, loss_fn, batches, seed=seed).value,
                "trace": hessian_trace(model, loss_fn, batches, seed=seed).value,
            }
        if layers:
            say(f"{name}: sharpness of each layer")
        by_layer = layer_sharpness(model, loss_fn, batches, rho, steps=max(1, steps // 2), seed=seed) if layers else {}
        sides.append(
            Measured(
                name,
                _scores(model, loss_fn, batches),
                _scores(model, loss_fn, held_out) if held_out else None,
                metrics,
                {layer: sharpness.value for layer, sharpness in by_layer.items()},
                [] if isinstance(given, nn.Module) else recorded_history(Path(given)),
            )
        )
    say("the line between them")
    path = interpolate(a, b, loss_fn, batches, alphas)
    held_out_path = interpolate(a, b, loss_fn, held_out, alphas) if held_out else []
    settings = {"epsilon": epsilon, "rho": rho, "steps": steps, "seed": seed, "batches": len(batches)}
    return Comparison(sides[0], sides[1], path, held_out_path, settings)


def recorded_history(checkpoint: Path) -> list[tuple[float, float]]:
    """Return (training loss, adaptive sharpness) that `SharpnessCallback` logged to trainer_state.json; [] if none."""
    states = [checkpoint / "trainer_state.json", *checkpoint.glob("checkpoint-*/trainer_state.json")]
    logs = [json.loads(path.read_text())["log_history"] for path in states if path.is_file()]
    lines: list[dict[str, float]] = max(logs, key=len, default=[])
    return [(line["sharpness/loss"], line["sharpness/adaptive"]) for line in lines if "sharpness/adaptive" in line]


def finite(value: Any) -> Any:
    """Replace infinities and NaNs in nested values by None, because JSON cannot represent them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def _load(given: nn.Module | str | os.PathLike[str]) -> nn.Module:
    if isinstance(given, nn.Module):
        return given
    from hf_lamb.sharpness.checkpoints import load_model

    return load_model(given)


def _scores(model: nn.Module, loss_fn: LossFn, batches: list[Any]) -> Scores:
    with objective(model, loss_fn, batches) as problem:
        return problem.scores()


def _score_rows(kind: str, a: Scores, b: Scores) -> list[tuple[str, str, str, str, str]]:
    rows = [_row(f"{kind} loss (nats)", a.loss, b.loss)]
    if a.accuracy is not None and b.accuracy is not None:
        rows.append(_row(f"{kind} accuracy", a.accuracy, b.accuracy))
    return rows


def _row(name: str, a: float, b: float, note: str = "") -> tuple[str, str, str, str, str]:
    ratio = f"{b / a:.3g}" if a and math.isfinite(a) and math.isfinite(b) else "-"
    return name, f"{a:.4g}", f"{b:.4g}", ratio, note
