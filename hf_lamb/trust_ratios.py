"""The trust ratios of a run, layer by layer: their history, and what to worry about in words. Pure functions."""

from __future__ import annotations

from statistics import median
from typing import Any

__all__ = ["record_trust_ratios", "trust_ratio_warnings"]

MAX_COLUMNS = 256  # a heat map shows no more, and the history is in every checkpoint

# Our small masked LMs that trained had ratios from 0.05 to 0.4; those whose rate was too high ones from 8 to 300.
TOO_HIGH, TOO_LOW = 4.0, 0.05  # in the median layer; of the median layer's


def record_trust_ratios(history: dict[str, Any], step: int, ratios: dict[str, float]) -> None:
    """Add a column to `history`, which starts as `{}` and holds `steps`, `[n]`, and `ratios`, name to `[n]`.

    At 256 columns every second one goes, and from then on half as many are taken in: the same whenever a run was
    resumed. A step that is there already is left as it is, and so is one in which a layer of the history kept its
    weights; where layers come that had kept theirs so far, the history starts anew.
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
    """What is wrong in the second half of the history, a line each; of fewer than four columns, in the last one.

    * The median layer's ratio is mostly above 4: ‖w‖ has grown, so the learning rate is too high. If not, and of four
      columns or more:
    * A layer's ratio is always above 4: its weights are large or hardly get a gradient.
    * A layer's ratio is always less than 1/20 of the median layer's: it moves that much less than the others.
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
            f"trust ratio of the median layer mostly above {TOO_HIGH:g} {since} (its median is {typical:.3g}): the "
            "weights' norms have grown, the learning rate is too high; good runs have ratios well below 1"
        ]
    warnings: list[str] = []
    if columns < 4:  # too few to say of a layer that it stays there
        return warnings
    for name, row in rows.items():
        if min(row) > TOO_HIGH:
            warnings.append(
                f"{name}: trust ratio above {TOO_HIGH:g} {since} (now {row[-1]:.3g}; the median layer's "
                f"{middle[-1]:.3g}): large weights or hardly a gradient; look whether it is trained at all"
            )
        if all(ratio < TOO_LOW * m for ratio, m in zip(row, middle, strict=True)):
            warnings.append(
                f"{name}: trust ratio {row[-1]:.3g}, less than 1/{1 / TOO_LOW:.0f} of the median layer's "
                f"{middle[-1]:.3g}, {since}: its weights are so small that it hardly moves; look at its initialisation"
            )
    return warnings
