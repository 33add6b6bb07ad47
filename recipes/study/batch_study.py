"""The search of `recipes.compare_optimizers --study`: what a small batch's rate, and β₂, are worth at large batches.

Every optimizer's rate is tuned at every batch size. Beside the best rate, the one that is carried from the smallest
batch by the square root of the batch's growth runs with fresh seeds, untuned; for LAMB and AdamW it runs once more
with β₂ carried too, so that β₂ halves an old gradient's weight after as many sequences as at the smallest batch
(arXiv 2507.07101).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipes.study.sweep import Record, Search, Trial, carry_by_root, objective_of, trial_of

# Where the search at the smallest batch starts.
FIRST_RATES = {"lamb": 2e-2, "lamb_fixed_norm": 2e-2, "adamw": 2e-3, "muon": 4e-3}
# The names of trials with carried β₂, and their optimizers.
HALF_LIFE = {"lamb_half_life": "lamb", "adamw_half_life": "adamw"}
BETA2 = 0.999  # at the smallest batch, and where it is fixed
RESULTS = Path(__file__).parents[1] / "results"

# What --study changes: the defaults of other options.
STUDIES: dict[str, dict[str, Any]] = {
    "cpu": {
        "output_dir": str(RESULTS / "study"),
        "optimizers": list(FIRST_RATES),
        "batch_sizes": [16, 128, 512],
        "size": "micro",
        "vocab_size": 2048,
        "train_sequences": 256_000,
        "eval_sequences": 2048,
        "evaluations": 25,
        "seeds": 3,
        "use_cpu": True,
    },
    "gpu": {
        "output_dir": str(RESULTS / "study_gpu"),
        "optimizers": list(FIRST_RATES),
        "batch_sizes": [256, 2048, 8192],
        "size": "mini",
        "vocab_size": 8192,
        "train_sequences": 0,
        "micro_batch_size": 2048,
        "eval_sequences": 2048,
        "evaluations": 25,
        "seeds": 3,
        "minutes": 8.0,
        "visits": 8,
    },
}


@dataclass(frozen=True)
class BatchStudy(Search):
    """A search whose first results are useful by themselves.

    The smallest and the largest batch are tuned first, then judged, a seed of everything before the next seed; the
    batches between them follow.
    """

    least: int = 3

    def next_trials(self, records: Iterable[Record]) -> list[Trial]:
        records = list(records)
        done = {trial_of(record): objective_of(record) for record in records}
        carried = [trial for trial in self.half_life_trials(done) if trial not in done]
        return sorted(super().next_trials(records) + carried, key=self.turn)

    def turn(self, trial: Trial) -> Any:
        """What trials are sorted by."""
        ends = [self.settings[0], self.settings[-1]]
        places = [*ends, *self.settings]
        return trial.setting not in ends, trial.seed, places.index(trial.setting)

    def is_tuned(self, done: Mapping[Trial, float], batch_size: int) -> bool:
        """Whether the search at this batch size has ended for all optimizers."""
        return self._tuned(done, batch_size)

    def half_life_trials(self, done: Mapping[Trial, float]) -> list[Trial]:
        """The fresh seeds of the carried rates with carried β₂; none while the smallest batch is not tuned."""
        starts = {
            (name, batch_size): self.start(done, optimizer, batch_size)
            for batch_size in self.settings[1:]
            for name, optimizer in HALF_LIFE.items()
            if optimizer in self.optimizers
        }
        return [t for (name, b), rate in starts.items() if rate is not None for t in self.judging(name, b, rate)]

    def expected(self, records: Sequence[Record]) -> int:
        others = super().expected([record for record in records if record["optimizer"] not in HALF_LIFE])
        return others + self.seeds * len(self.settings[1:]) * sum(o in self.optimizers for o in HALF_LIFE.values())


def study_of(optimizers: Sequence[str], batch_sizes: Sequence[int], seeds: int) -> BatchStudy:
    """The study of these optimizers and batch sizes, from small to large."""
    return BatchStudy(optimizers, batch_sizes, FIRST_RATES, carry_by_root(batch_sizes[0]), seeds)


def runs_of(search: BatchStudy) -> dict[tuple[str, int], int]:
    """{(optimizer, batch size): runs} if every search takes four rates and ends with another than the carried one."""
    carrying = set(HALF_LIFE.values())
    return {
        (o, b): 4 + search.seeds * (1 if b == search.settings[0] else 3 if o in carrying else 2)
        for o in search.optimizers
        for b in search.settings
    }


def sequences_for(search: BatchStudy, seconds: float, cost: Mapping[tuple[str, int], float]) -> int:
    """How many sequences a trial may train on, so that the whole study takes this time: a multiple of every batch.

    cost: seconds for a sequence, by optimizer and batch size.
    """
    each = seconds / sum(n * cost[which] for which, n in runs_of(search).items())
    whole = math.lcm(*search.settings)
    return int(each) // whole * whole


def beta2_of(trial: Trial, smallest: int) -> float:
    """β₂ of a trial: by the half-life rule β₂^(B/B₀) where it is carried."""
    return BETA2 ** (trial.setting / smallest) if trial.optimizer in HALF_LIFE else BETA2
