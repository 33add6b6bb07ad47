"""Learning rate, warm-up and decay for another batch size, and a warning if the rate is too high. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable
from difflib import get_close_matches
from typing import NamedTuple

__all__ = [
    "NORM_GROWTH_LIMIT",
    "RULES",
    "ScaledRate",
    "check_warmup",
    "decay_factor",
    "did_you_mean",
    "norm_growth",
    "norm_growth_warning",
    "scaled_learning_rate",
]

RULES = {"sqrt": 0.5, "linear": 1.0, "none": 0.0}
"""The rules of `scaled_learning_rate`: the exponent of (batch / base batch) by name."""

NORM_GROWTH_LIMIT = 0.6
"""The value of lr²T/3 above which `norm_growth_warning` warns.

Published runs of many epochs keep it at 0.13 (every row of the LAMB paper), 0.08 (NVIDIA's BERT-Large) or 0.52
(ltg-bert). Of our own small masked LMs those at 0.04 and 0.15 trained; those at 0.61 and 1.7 did not.
"""


class ScaledRate(NamedTuple):
    """A learning rate, and one line with its calculation."""

    learning_rate: float
    why: str  # "learning rate 0.02 = 0.01 * sqrt(256 / 64)"


def scaled_learning_rate(
    base_learning_rate: float, base_batch_size: int, batch_size: int, rule: str = "sqrt"
) -> ScaledRate:
    """Scale a learning rate to another global batch: base_learning_rate * (batch_size / base_batch_size) ** p.

    Args:
        base_learning_rate: a peak learning rate that works at `base_batch_size`.
        base_batch_size: the global batch of that rate, in sequences (rows) per optimizer step: micro-batch x
            accumulation steps x data-parallel processes.
        batch_size: the global batch to scale to, in sequences.
        rule: `sqrt` (p = 1/2), `linear` (p = 1) or `none` (p = 0). Default `sqrt`, which the LAMB paper uses from 512
            to 32k at a constant number of epochs.

    Returns:
        `ScaledRate(learning_rate, why)`.

    Raises:
        ValueError: the rate is not positive and finite, a batch is below 1, or the rule is unknown.

    Source: You et al., https://arxiv.org/abs/1904.00962; Goyal et al., https://arxiv.org/abs/1706.02677 for `linear`.
    """
    if not 0 < base_learning_rate < math.inf:
        raise ValueError(f"base_learning_rate {base_learning_rate}: expected a positive number")
    for name, size in {"base_batch_size": base_batch_size, "the global batch": batch_size}.items():
        if size < 1:
            raise ValueError(f"{name} {size}: expected at least 1, in sequences per optimizer step")
    if rule not in RULES:
        raise ValueError(
            f"learning_rate_scaling {rule!r}{did_you_mean(rule, RULES)}: expected one of {', '.join(RULES)}"
        )
    rate = base_learning_rate * (batch_size / base_batch_size) ** RULES[rule]
    factor = {
        "sqrt": f" * sqrt({batch_size:,} / {base_batch_size:,})",
        "linear": f" * {batch_size:,} / {base_batch_size:,}",
        "none": f", whatever the batch (base {base_batch_size:,}, here {batch_size:,})",
    }[rule]
    return ScaledRate(rate, f"learning rate {rate:.4g} = {base_learning_rate:g}{factor}")


def decay_factor(
    step: int, total_steps: int, warmup_steps: int = 0, power: float = 1.0, from_first_step: bool = False
) -> float:
    """Return the learning rate at a step, as a fraction of the peak: linear warm-up, then polynomial decay.

    The fraction rises linearly from 0 to 1 in `warmup_steps`, then falls as (1 - t) ** power to 0 at `total_steps`. t
    is the fraction of the steps *after warm-up* that are done.

    Args:
        step: the optimizer step, counted from 0.
        total_steps: steps of the run, warm-up included.
        warmup_steps: steps of the warm-up. Default 0.
        power: 1 in the paper, 0.5 in NVIDIA's recipe. Default 1.
        from_first_step: t is the fraction of *all* steps, as in NVIDIA's code. The rate then drops at the end of the
            warm-up from 1 to (1 - warmup_steps / total_steps) ** power, which is 0.846 in NVIDIA's phase 1. Default
            False.

    Returns:
        A number from 0 to 1.

    Source: `PolyWarmUpScheduler`, https://github.com/NVIDIA/DeepLearningExamples/blob/master/PyTorch/LanguageModeling/BERT/schedulers.py
    """
    if step < warmup_steps:
        return step / warmup_steps
    first = 0 if from_first_step else warmup_steps
    return float(max(0.0, (total_steps - step) / max(1, total_steps - first)) ** power)


def check_warmup(warmup_steps: int, total_steps: int) -> None:
    """Check that the run reaches its peak learning rate.

    A warm-up in steps needs no scaling with the batch. The paper's warm-up is proportional to the batch in epochs, so
    at a constant number of epochs it has the same number of steps at every batch size (3,125 for BERT).

    Raises:
        ValueError: the warm-up is longer than the run.
    """
    if warmup_steps > total_steps:
        raise ValueError(
            f"shorten the warm-up or train longer: warmup_steps {warmup_steps:,} is more than the run's "
            f"{total_steps:,} steps"
        )


def norm_growth(learning_rate: float, total_steps: int, first_step: int = 0, end: int | None = None) -> float:
    """Return lr² T / 3, the sum of the squared learning rates of T steps with linear decay from lr.

    With `first_step` and `end`, return the part of this sum that the steps from the one until before the other have.

    A LAMB step changes the weights by a fraction lr of their norm. If steps are nearly orthogonal to the weights and
    to each other, ‖w‖² grows by the factor exp(lr² T / 3) over a run. The sqrt rule keeps this number constant at a
    constant number of epochs.
    """
    before, after = ((total_steps - step) / total_steps for step in (first_step, total_steps if end is None else end))
    return learning_rate**2 * total_steps / 3 * (before**3 - after**3)


def norm_growth_warning(learning_rate: float, total_steps: int, growth: float | None = None) -> str | None:
    """Return a one-line warning, with a rate that is low enough, if `norm_growth` is above `NORM_GROWTH_LIMIT`.

    Args:
        learning_rate: the peak.
        total_steps: the run's.
        growth: the run's `norm_growth`, if the rate also follows the batch. Default: that of a linear decay.
    """
    if growth is None:
        growth = norm_growth(learning_rate, total_steps)
    if growth <= NORM_GROWTH_LIMIT:
        return None
    highest = learning_rate * math.sqrt(NORM_GROWTH_LIMIT / growth)
    return (
        f"learning rate {learning_rate:.4g} over {total_steps:,} steps makes the weights' squared norm grow about "
        f"{math.exp(min(growth, 100.0)):.3g}-fold (lr²T/3 = {growth:.2g}; the paper's runs have 0.13). Small masked "
        f"LMs did not learn at 0.61: use at most {highest:.2g} here, where lr²T/3 is {NORM_GROWTH_LIMIT}"
    )


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return " (did you mean NAME?)" if one of the names is similar, else ""."""
    found = get_close_matches(name, list(names), n=1)
    return f" (did you mean {found[0]}?)" if found else ""
