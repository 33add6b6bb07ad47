"""The history of each layer's trust ratio in a run, and warnings about it. Pure functions."""

from __future__ import annotations

from statistics import median
from typing import Any

__all__ = ["record_trust_ratios", "trust_ratio_warnings"]

MAX_COLUMNS = 256  # enough for a heat map; every checkpoint stores the history

# Our small masked LMs had ratios of 0.05 to 0.4 when they trained well, and of 8 to 300 when the rate was too high.
TOO_HIGH = 4.0  # for the median layer
TOO_LOW = 0.05  # relative to the median layer


def record_trust_ratios(history: dict[str, Any], step: int, ratios: dict[str, float]) -> None:
    """Add a column to `history`, in place.

    When there are 256 columns, every second one is deleted, and from then on only every second call adds a column. A
    resumed run therefore has the same history as an uninterrupted one. A call is ignored if its step is in the history
    already, or if a layer of the history is missing in `ratios` because it kept its weights. If `ratios` has new
    layers, the history starts again.

    Args:
        history: `{}` at first; then `steps`, a list of n numbers, and `ratios`, a list of n numbers for each name.
        step: the optimizer step.
        ratios: the trust ratio of each layer, by name.
    """
    if not history.get("ratios", ratios).keys() >= ratios.keys():
        history.clear()
    history.setdefault("every", 1)
    history.setdefault("seen", 0)
    steps, rows = history.setdefault("steps", []), history.setdefault("ratios", {name: [] for name in ratios})
    if (steps and step <= steps[-1]) or rows.keys() != ratios.keys():
        return
    history["seen"] += 1
    if (history["seen"] - 1) % history["every"]:
        return
    steps.append(step)
    for name, ratio in ratios.items():
        rows[name].append(float(f"{ratio:.4g}"))
    if len(steps) == MAX_COLUMNS:
        del steps[1::2]
        for row in rows.values():
            del row[1::2]
        history["every"] *= 2


def trust_ratio_warnings(history: dict[str, Any]) -> list[str]:
    """Return warnings about the second half of the history, or about its last column if it has fewer than four.

    * The median layer's ratio is mostly above 4: ‖w‖ has grown, so the learning rate is too high.

    The other two need four columns, and are left out when the first one applies:

    * A layer's ratio is always above 4: its weights are large, or its gradient is almost zero.
    * A layer's ratio is always less than 1/20 of the median layer's: it moves that much less than the others.

    Args:
        history: see `record_trust_ratios`.

    Returns:
        One line for each warning; empty if there is none.
    """
    columns = len(history.get("steps", []))
    if columns == 0:
        return []
    half = columns // 2 if columns >= 4 else columns - 1
    rows = {name: row[half:] for name, row in history["ratios"].items()}
    middle = [median(column) for column in zip(*rows.values(), strict=True)]
    since = f"since step {history['steps'][half]}"
    if (typical := median(middle)) > TOO_HIGH:
        return [
            f"lower the learning rate: the trust ratio of the median layer is mostly above {TOO_HIGH:g} {since} (its "
            f"median is {typical:.3g}), because the weights' norms have grown; good runs have ratios well below 1"
        ]
    warnings: list[str] = []
    if columns < 4:  # too few to tell whether a layer's ratio stays where it is
        return warnings
    for name, row in rows.items():
        if min(row) > TOO_HIGH:
            warnings.append(
                f"{name}: trust ratio above {TOO_HIGH:g} {since} (now {row[-1]:.3g}; the median layer's "
                f"{middle[-1]:.3g}): its weights are large or its gradient is almost zero; check whether it is "
                "trained at all"
            )
        if all(ratio < TOO_LOW * m for ratio, m in zip(row, middle, strict=True)):
            warnings.append(
                f"{name}: trust ratio {row[-1]:.3g}, less than 1/{1 / TOO_LOW:.0f} of the median layer's "
                f"{middle[-1]:.3g}, {since}: its weights are so small that it hardly moves; check its initialisation"
            )
    return warnings
