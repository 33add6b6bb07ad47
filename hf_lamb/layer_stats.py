"""The trust ratio of each layer, which `step` applies, and the numbers of the last step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_lamb.norms import Sum, layer_ratio


class LayerStats(NamedTuple):
    """One parameter at the last step: ‖w‖ before it, ‖u‖, and the trust ratio that was applied."""

    weight_norm: float
    adam_norm: float
    trust_ratio: float


class SkippedSteps(NamedTuple):
    """Steps that changed nothing because a gradient was not finite."""

    total: int
    in_a_row: int


class BucketStats(NamedTuple):
    """A bucket's layers after a step: their names, the group's options, the sums `[k, n]`."""

    names: list[str]
    options: dict[str, Any]
    sums: Tensor


def layer_stats(stats: Iterable[BucketStats], adapted_only: bool) -> dict[str, LayerStats]:
    """By the layers' names, without the layers that kept their weights; synchronises with the device."""
    by_name: dict[str, LayerStats] = {}
    for names, options, sums in stats:
        adapted = options["layer_adaptation"]
        if adapted or not adapted_only:
            moved = sums[Sum.NONZERO] > 0 if adapted else sums[Sum.UPDATE_SQ] != 0
            ratio = layer_ratio(sums, options)
            columns = (sums[Sum.WEIGHT_SQ].sqrt(), sums[Sum.UPDATE_SQ].sqrt(), ratio, moved.to(ratio))
            rows = zip(names, torch.stack(columns, dim=1).tolist(), strict=True)
            by_name.update((name, LayerStats(*row)) for name, (*row, did_move) in rows if did_move)
    return by_name


def count_skipped(counts: list[Tensor], finite: Tensor) -> None:
    """Count this step in `[in all, in a row]`, which is put into the empty list at first; reads nothing back."""
    if not counts:
        counts.append(torch.zeros(2, dtype=torch.int64, device=finite.device))
    if counts[0].device.type == "cpu" != finite.device.type:  # the model has moved since
        counts[0] = counts[0].to(finite.device)
    total, in_a_row = counts[0].unbind()
    skipped = finite.logical_not().to(total.device)  # a part of the model on another device had a gradient
    total.add_(skipped)
    in_a_row.add_(1).mul_(skipped)
