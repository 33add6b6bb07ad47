"""What went wrong in a run, in words, from what Trainer has logged. Pure functions."""

import math
from collections.abc import Iterator
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

from hf_lamb import noise_scale_in_words, trust_ratio_warnings
from recipes.lib.report import series

Log = list[dict[str, Any]]

# A rise of the loss counts if it is larger than both: usual changes from line to line, and a part of the loss.
USUAL_CHANGES, PART_OF_LOSS = 6, 0.05
LINES_BEFORE = 5  # whose median a jump is measured from
FEW_LINES = 8  # of the training loss are too few to see a jump
FEW_STEPS = 500  # are too few for a model to learn more than frequencies
FAR = 10  # times the noise scale, or a part of it


class Run(NamedTuple):
    """What is known of a run; what its folder does not say is None or empty."""

    log: Log
    steps: int
    max_steps: int
    trust_ratios: dict[str, Any]  # see `hf_lamb.trust_ratio_history`
    options: dict[str, Any]  # of the optimizer, see `hf_lamb.options_in_force`
    batch: int | None  # the global batch, in sequences
    unigram_loss: float | None  # held-out loss of guessing by frequency, of a masked LM
    vocabulary: int | None

    @property
    def last_batch(self) -> int | None:
        """The global batch of the last step, with a schedule too."""
        return next((line["lamb/batch_size"] for line in reversed(self.log) if "lamb/batch_size" in line), self.batch)

    @property
    def noise_scale(self) -> float | None:
        """The last one; None if the last training line has none, as after a divergence."""
        return next((line.get("lamb/noise_scale") for line in reversed(self.log) if "loss" in line), None)

    def last(self, key: str) -> Any:
        """The last value logged, or None."""
        return next((line[key] for line in reversed(self.log) if key in line), None)


def findings(run: Run) -> list[str]:
    """What went wrong or is unusual, each with its remedy; empty if there is nothing."""
    of_rate = [*rises(run.log), *(f"{line[0].upper()}{line[1:]}." for line in trust_ratio_warnings(run.trust_ratios))]
    return [
        *not_finite(run.log),
        *skipped_steps(run),
        *of_rate,
        *too_high(run, explained=bool(of_rate)),
        *at_bounds(run.trust_ratios, run.options),
        *far_from_noise_scale(run),
        *(["No training loss has been logged: give a lower logging_steps."] if run.last("loss") is None else []),
    ]


def looked_for(run: Run) -> str:
    """What `findings` has looked for, as a list in a sentence: it depends on what was logged."""
    known = {
        "losses and gradient norms that are inf or NaN": True,
        "skipped steps": True,
        "jumps of the training loss": len(series(run.log, "loss")[0]) >= FEW_LINES,
        "a held-out loss above that of guessing by frequency": run.unigram_loss is not None and run.last("eval_loss"),
        "trust ratios that stay very high, very low or at a bound": run.trust_ratios.get("steps"),
        "a batch far from the noise scale": run.noise_scale and run.last_batch,
    }
    *first, last = [words for words, there in known.items() if there]
    return f"{', '.join(first)}, and {last}"


def not_finite(log: Log) -> Iterator[str]:
    for words, key in (("training loss", "loss"), ("held-out loss", "eval_loss"), ("gradient norm", "grad_norm")):
        steps = [step for step, value in zip(*series(log, key), strict=True) if not math.isfinite(value)]
        if steps:
            times = f", and {len(steps):,} times in all" if len(steps) > 1 else ""
            yield (
                f"The {words} was inf or NaN at step {steps[0]:,}{times}. If the run did not recover, resume from "
                "a checkpoint before that step with a lower learning rate, or without fp16."
            )


def skipped_steps(run: Run) -> Iterator[str]:
    steps, totals = series(run.log, "lamb/skipped_steps")
    if steps:
        yield (
            f"{totals[-1]:,} of {run.steps:,} steps were skipped, the first by step {steps[0]:,}: a gradient was inf "
            "or NaN, and the weights stayed as they were. A few are usual with fp16; else lower the learning rate."
        )


def rises(log: Log) -> Iterator[str]:
    """The training loss went above where it began, or jumped."""
    points = [(step, loss) for step, loss in zip(*series(log, "loss"), strict=True) if math.isfinite(loss)]
    if len(points) < FEW_LINES:
        return
    losses = [loss for _, loss in points]
    usual = median(abs(after - before) for before, after in pairwise(losses))

    def limit(level: float) -> float:
        return level + max(USUAL_CHANGES * usual, PART_OF_LOSS * abs(level))

    (first_step, first), (top_step, top) = points[0], max(points, key=lambda point: point[1])
    if top > limit(first):
        yield (
            f"The training loss rose above its first value ({first:.4g} at step {first_step:,}) to {top:.4g} at step "
            f"{top_step:,}, and ended at {losses[-1]:.4g}. The learning rate was too high there: lower it, or make "
            "the warm-up longer."
        )
        return
    jumps, number = [], LINES_BEFORE
    while number < len(points):
        before = median(losses[number - LINES_BEFORE : number])
        if losses[number] > limit(before):
            back = next((n for n in range(number, len(points)) if losses[n] <= limit(before)), len(points))
            peak = max(losses[number:back])
            after = f"was back at step {points[back][0]:,}" if back < len(points) else "did not come back"
            jumps.append(f"from {before:.4g} to {peak:.4g} at step {points[number][0]:,}, and {after}")
            number = back + LINES_BEFORE
        number += 1
    if jumps:
        more = f"; {len(jumps) - 3:,} more like these" if len(jumps) > 3 else ""
        yield (
            f"The training loss jumped {'; '.join(jumps[:3])}{more}. If that happens often or it does not come back, "
            "lower the learning rate or clip gradients (max_grad_norm)."
        )


def blind_loss(vocabulary: int | None) -> float:
    """The loss of a masked LM that takes all tokens for equally likely; inf where their number is not known."""
    return math.inf if vocabulary is None else math.log(vocabulary)


def has_diverged(loss: float, vocabulary: int | None) -> bool:
    """Whether a held-out loss is clearly above that of guessing blindly; NaN is, too."""
    return not loss < 1.1 * blind_loss(vocabulary)


def too_high(run: Run, explained: bool) -> Iterator[str]:
    """The held-out loss of a masked LM is no better than guessing. explained: whether something else says why."""
    losses = series(run.log, "eval_loss")[1]
    if run.unigram_loss is None or not losses:
        return
    if has_diverged(losses[-1], run.vocabulary):
        blind = blind_loss(run.vocabulary)
        yield (
            f"The held-out loss is {losses[-1]:.4g} nats, and guessing blindly gives {blind:.4g}: the run has "
            "diverged. Lower the learning rate."
        )
    elif not min(losses) < run.unigram_loss:
        why = "Too few steps, or a rate that is too high or too low: python -m recipes.find_rate looks for one."
        if run.steps < FEW_STEPS:
            why = f"{run.steps:,} steps are few: plan {FEW_STEPS} or more."
        yield (
            f"The held-out loss has not been below that of guessing by frequency, {run.unigram_loss:.4g} nats; its "
            f"lowest value is {min(losses):.4g}." + ("" if explained else f" {why}")
        )


def at_bounds(history: dict[str, Any], options: dict[str, Any]) -> Iterator[str]:
    """Layers whose ratio was clamped most of the time in the second half."""
    half = len(history.get("steps", [])) // 2
    for name in ("min_trust_ratio", "max_trust_ratio"):
        if (bound := options.get(name)) is None or half == 0:
            continue
        rows = {layer: row[half:] for layer, row in history["ratios"].items()}
        held = [
            layer
            for layer, row in rows.items()
            if sum(math.isclose(ratio, bound, rel_tol=1e-3) for ratio in row) > len(row) / 2
        ]
        if held:
            names = f"{', '.join(held[:3])}{', ...' if len(held) > 3 else ''}"
            yield (
                f"{len(held)} of {len(rows)} layers have had the trust ratio of {name}={bound:g} most of the time "
                f"since step {history['steps'][half]:,} ({names}): the bound, and not the norm of their weights, "
                "decides how far they move. Change it if that was not meant."
            )


def far_from_noise_scale(run: Run) -> Iterator[str]:
    noise_scale, batch = run.noise_scale, run.last_batch
    if noise_scale is None or batch is None or 1 / FAR < batch / noise_scale < FAR:
        return
    words = noise_scale_in_words(noise_scale, batch)
    if batch > noise_scale:
        yield (
            f"The batch is much larger than the noise scale ({words}): most of its samples add little. The noise "
            "scale is mostly too low: python -m recipes.critical_batch measures up to which batch nothing is lost."
        )
    else:
        yield (
            f"The batch is much smaller than the noise scale ({words}): with more devices, a larger batch would need "
            "fewer steps. With the devices that you have, it saves no time."
        )
