"""From one batch size to another: learning rate, warm-up, decay, and whether the rate is too high. Pure functions."""

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

# The exponent of (batch / base batch).
RULES = {"sqrt": 0.5, "linear": 1.0, "none": 0.0}

# Published runs of many epochs keep lr²T/3 at 0.13 (every row of the LAMB paper), 0.08 (NVIDIA's BERT-Large) or 0.52
# (ltg-bert). Of our own small masked LMs those at 0.04 and 0.15 trained; those at 0.61 and 1.7 did not.
NORM_GROWTH_LIMIT = 0.6


class ScaledRate(NamedTuple):
    """A learning rate, and why in a line."""

    learning_rate: float
    why: str


def scaled_learning_rate(
    base_learning_rate: float, base_batch_size: int, batch_size: int, rule: str = "sqrt"
) -> ScaledRate:
    """base_learning_rate * (batch_size / base_batch_size) ** p, with p = 1/2 (sqrt), 1 (linear) or 0 (none).

    Batch sizes are sequences (rows) in an optimizer step, over micro-batches, accumulation steps and data-parallel
    processes. `sqrt` is what the LAMB paper does from 512 to 32k, where the number of epochs stays the same.

    Raises:
        ValueError: a rate that is not positive and finite, a batch below 1, an unknown rule.

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
    """The share of the peak learning rate at optimizer step `step`, counted from 0.

    Linear from 0 to 1 in `warmup_steps`, then (1 - t) ** power down to 0 at `total_steps`, where t is the share of
    the steps *after warm-up* that are done. `power` is 1 in the paper, 0.5 in NVIDIA's recipe.

    from_first_step: t is the share of *all* steps, as in NVIDIA's code: the rate then drops at the end of the warm-up
    from 1 to (1 - warmup_steps / total_steps) ** power, to 0.846 in its phase 1.

    Source: `PolyWarmUpScheduler`, https://github.com/NVIDIA/DeepLearningExamples/blob/master/PyTorch/LanguageModeling/BERT/schedulers.py
    """
    if step < warmup_steps:
        return step / warmup_steps
    first = 0 if from_first_step else warmup_steps
    return float(max(0.0, (total_steps - step) / max(1, total_steps - first)) ** power)


def check_warmup(warmup_steps: int, total_steps: int) -> None:
    """Raise where the peak learning rate would never be reached.

    The paper's warm-up, in epochs proportional to the batch, is for a fixed number of epochs the same number of steps
    at every batch size (3,125 for BERT), so a warm-up given in steps needs no scaling.

    Raises:
        ValueError: the warm-up is longer than the run.
    """
    if warmup_steps > total_steps:
        raise ValueError(
            f"warmup_steps {warmup_steps:,} is more than the run's {total_steps:,} steps: shorten the warm-up or "
            "train longer"
        )


def norm_growth(learning_rate: float, total_steps: int) -> float:
    """lr² T / 3: the sum of the squared learning rates of a linear decay from `learning_rate`.

    A LAMB step is a relative step of size lr, so while steps are nearly orthogonal to the weights and to each other
    ‖w‖² grows by the factor exp(lr² T / 3) over a run. The sqrt rule at a fixed number of epochs keeps it constant.
    """
    return learning_rate**2 * total_steps / 3


def norm_growth_warning(learning_rate: float, total_steps: int) -> str | None:
    """One line where `norm_growth` is above `NORM_GROWTH_LIMIT`, with the rate that would keep to it; else None."""
    growth = norm_growth(learning_rate, total_steps)
    if growth <= NORM_GROWTH_LIMIT:
        return None
    highest = math.sqrt(3 * NORM_GROWTH_LIMIT / total_steps)
    return (
        f"learning rate {learning_rate:.4g} over {total_steps:,} steps lets LAMB grow the weights' squared norm about "
        f"{math.exp(min(growth, 100.0)):.3g}-fold (lr²T/3 = {growth:.2g}; the paper's runs have 0.13): small masked "
        f"LMs no longer learned at 0.61. {NORM_GROWTH_LIMIT} is a rate of {highest:.2g} here"
    )


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return " (did you mean NAME?)" where one of the names is close, else nothing."""
    found = get_close_matches(name, list(names), n=1)
    return f" (did you mean {found[0]}?)" if found else ""
