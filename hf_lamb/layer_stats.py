"""The trust ratio of each layer, which `step` applies, and the numbers of the last step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from hf_lamb.backends import Bucket
from hf_lamb.norms import Sum, trust_ratio


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
    """The norms and ratios of a bucket's layers, as tensors of shape [n] on its device."""

    names: list[str]
    adapted: bool
    weight_norm: Tensor
    adam_norm: Tensor
    trust_ratio: Tensor
    moved: Tensor  # 0 where the layer kept its weights, for there was neither a gradient nor a first moment, else 1


def bucket_stats(bucket: Bucket, sums: Tensor) -> BucketStats:
    """From the sums of whole layers; r is 1 without adaptation, and 0 where a layer keeps its weights."""
    group = bucket.group
    weight_norm, adam_norm = sums[Sum.WEIGHT_SQ].sqrt(), sums[Sum.UPDATE_SQ].sqrt()
    if group["layer_adaptation"]:
        moved = sums[Sum.NONZERO] > 0
        ratio = trust_ratio(weight_norm, adam_norm, group["min_trust_ratio"], group["max_trust_ratio"])
        ratio = torch.where(moved, ratio, 0.0)
    else:
        moved, ratio = sums[Sum.UPDATE_SQ] != 0, torch.ones_like(weight_norm)
    return BucketStats(bucket.names, group["layer_adaptation"], weight_norm, adam_norm, ratio, moved.to(ratio))


def layer_stats(stats: Iterable[BucketStats], adapted_only: bool) -> dict[str, LayerStats]:
    """By the layers' names, without the layers that kept their weights; synchronises with the device."""
    by_name: dict[str, LayerStats] = {}
    for bucket in stats:
        if bucket.adapted or not adapted_only:
            columns = (bucket.weight_norm, bucket.adam_norm, bucket.trust_ratio, bucket.moved)
            rows = zip(bucket.names, torch.stack(columns, dim=1).tolist(), strict=True)
            by_name.update((name, LayerStats(*row)) for name, (*row, moved) in rows if moved)
    return by_name


def count_skipped(counts: list[Tensor], finite: Tensor) -> None:
    """Count this step in `[in all, in a row]`, which is put into the empty list at first; reads nothing back."""
    if not counts:
        counts.append(torch.zeros(2, dtype=torch.int64, device=finite.device))
    total, in_a_row = counts[0]
    skipped = finite.logical_not().long()
    counts[0].copy_(torch.stack((total + skipped, (in_a_row + 1) * skipped)))
