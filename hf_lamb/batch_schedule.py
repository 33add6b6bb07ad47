"""A global batch that changes during a run: which batch each optimizer step has, and what makes it up. Pure."""

from __future__ import annotations

import math
import re
import sys
from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

__all__ = ["BatchStages", "Stage", "batch_stages"]

EXAMPLES = "'0:256 2000:512 6000:1024' (optimizer step:global batch), or '256->1024 over 6000'"


class Stage(NamedTuple):
    """The optimizer steps that have one global batch."""

    first_step: int  # counted from 0
    accumulation: int  # micro-batches of each process in a step
    batch_size: int  # sequences in a step
    asked_for: float  # the schedule's own number at `first_step`


@lru_cache
def batch_stages(schedule: str, at_once: int = 1) -> BatchStages:
    """Return the stages of a schedule, with batches that whole micro-batches make up.

    Args:
        schedule: optimizer steps and global batches, "0:256 2000:512 6000:1024": 256 sequences from the first step
            on, 512 from step 2,000 on. Or "256->1024 over 6000": the batch grows linearly in 6,000 steps and stays.
        at_once: sequences of one pass: micro-batch x data-parallel processes. Each batch is rounded to the nearest
            multiple of it, but not to 0. Default 1.

    Raises:
        ValueError: the text is no schedule.
    """
    stages: list[Stage] = []
    for step, batch in _batches(schedule):
        accumulation = max(1, math.floor(batch / at_once + 0.5))
        if not stages or stages[-1].accumulation != accumulation:
            stages.append(Stage(step, accumulation, accumulation * at_once, batch))
    return BatchStages(tuple(stages))


def _batches(schedule: str) -> Iterator[tuple[int, float]]:
    """Yield each step at which the batch may change, and the batch from there on."""
    wrong = f"batch_size_schedule {schedule!r}: "
    if not isinstance(schedule, str):
        raise ValueError(f"{wrong}expected text, such as {EXAMPLES}")
    linear = re.fullmatch(r"\s*(\d+)\s*->\s*(\d+)\s+over\s+(\d+)\s*", schedule)
    if linear:
        first, last, steps = map(int, linear.groups())
        if min(first, last, steps) < 1:
            raise ValueError(f"{wrong}expected batches and steps of at least 1, such as '256->1024 over 6000'")
        for step in range(steps + 1):
            yield step, first + (last - first) * step / steps
        return
    words = schedule.split()
    if not words or not all(re.fullmatch(r"\d+:\d+", word) for word in words):
        raise ValueError(f"{wrong}expected {EXAMPLES}")
    before = -1
    for step, batch in (map(int, word.split(":")) for word in words):
        if before < 0 < step:
            raise ValueError(f"{wrong}let it begin with the batch of step 0, such as '0:{batch} ...'")
        if step <= before:
            raise ValueError(f"{wrong}put the steps in order: {step} comes after {before}")
        if batch < 1:
            raise ValueError(f"{wrong}expected batches of at least 1, not {batch}")
        yield step, batch
        before = step


class BatchStages(NamedTuple):
    """The stages of a run. `batch_stages` makes it. A loop of your own needs `at` and `position`."""

    stages: tuple[Stage, ...]

    def at(self, step: int) -> Stage:
        """Return the stage of an optimizer step, counted from 0."""
        return self.stages[self._number(step)]

    def _number(self, step: int) -> int:
        return bisect_right(self.stages, step, key=lambda stage: stage.first_step) - 1

    @property
    def largest(self) -> int:
        """The largest global batch."""
        return max(stage.batch_size for stage in self.stages)

    def within(self, steps: int) -> Iterator[tuple[Stage, int]]:
        """Yield each stage of a run of `steps` optimizer steps, and the step before which it ends."""
        for number, stage in enumerate(self.stages):
            if stage.first_step < steps:
                yield stage, min(self._end(number), steps)

    def _end(self, number: int) -> int:
        return self.stages[number + 1].first_step if number + 1 < len(self.stages) else sys.maxsize

    def sequences(self, steps: int) -> int:
        """Return the number of sequences that the first `steps` optimizer steps train on."""
        return sum((end - stage.first_step) * stage.batch_size for stage, end in self.within(steps))

    def advance(self, step: int, left: int, max_steps: int = sys.maxsize) -> tuple[int, int]:
        """Return how many steps with one batch come next in an epoch, and how many micro-batches they take.

        An epoch's last step takes the micro-batches that are left, which may be fewer than the other steps take.

        Args:
            step: the optimizer steps that are done.
            left: the micro-batches of the epoch that are left, on each process.
            max_steps: the last step of the run. Default: none.
        """
        number = self._number(step)
        accumulation = self.stages[number].accumulation
        steps = min(min(self._end(number), max_steps) - step, -(-left // accumulation))
        return steps, min(steps * accumulation, left)

    def position(
        self, steps: int, micro_batches_per_epoch: int = sys.maxsize, start: tuple[int, int, int] = (0, 0, 0)
    ) -> tuple[int, int]:
        """Return where a run stands after `steps` optimizer steps: its epoch, and the micro-batches taken from it.

        Args:
            steps: the optimizer steps that are done.
            micro_batches_per_epoch: on each process. Default: an epoch without end.
            start: where these stages begin, if other ones came before: steps that are done, epoch, micro-batches
                taken from it. Default: the begin of the run.

        Raises:
            ValueError: an epoch has no micro-batch.
        """
        if micro_batches_per_epoch < 1:
            raise ValueError(f"micro_batches_per_epoch {micro_batches_per_epoch}: expected at least 1")
        step, epoch, taken = start
        while step < steps:
            more, micro_batches = self.advance(step, micro_batches_per_epoch - taken, steps)
            step, taken = step + more, taken + micro_batches
            if taken == micro_batches_per_epoch:
                epoch, taken = epoch + 1, 0
        return epoch, taken

    def steps_in(self, epochs: float, micro_batches_per_epoch: int, start: tuple[int, int, int] = (0, 0, 0)) -> int:
        """Return the number of optimizer steps of a run of so many epochs; `start` is that of `position`."""
        (step, epoch, taken), whole = start, int(epochs)
        rest = math.ceil((epochs - whole) * micro_batches_per_epoch - 1e-6)  # 0.3 epochs of 10 are 3, not 4
        for number, left in enumerate([*[micro_batches_per_epoch] * whole, rest][epoch:]):
            left -= taken if number == 0 else 0
            while left > 0:
                more, micro_batches = self.advance(step, left)
                step, left = step + more, left - micro_batches
        return step
