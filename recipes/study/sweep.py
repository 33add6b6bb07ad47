"""Learning-rate searches that give every optimizer the same tuning, and that may be killed at any time.

A study is a folder. Every finished trial is one line of its `trials.jsonl`, and what to run next is a function of
these lines alone, so that a study goes on where it stopped. Any number of processes may work on a folder (accelerate
gives each a device): each claims a trial with a file lock, which ends with the process, also when that is killed.
"""

import fcntl
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from recipes.lib.report import append_json_line, provenance

Record = dict[str, Any]  # a line of trials.jsonl
# Options of recipes.pretrain_bert that do not change the outcome of a trial.
NO_PART = {"use_cpu", "disable_tqdm", "dataloader_num_workers", "logging_steps", "report_to"}
TUNING_SEED = 0  # of the trials that choose a rate; those that judge it have other seeds


class Trial(NamedTuple):
    """One training run. setting: what is compared beside the optimizer, such as the batch size."""

    optimizer: str
    setting: Any
    learning_rate: float
    seed: int


class Tuned(NamedTuple):
    """The result of the search for one optimizer in one setting."""

    learning_rate: float
    objective: float  # of the tuning seed; inf where everything diverged
    trials: int
    interior: bool  # both neighbours, half and twice the rate, were tried and are worse

    @property
    def rate_in_words(self) -> str:
        """And whether it lies on the edge of what was tried."""
        return f"{self.learning_rate:.3g}" + ("" if self.interior else " (edge)")


@dataclass(frozen=True)
class Search:
    """Which trials a study consists of.

    In the first setting the search starts from `first_rates[optimizer]`, in every other from `carry(rate, setting)`,
    where `rate` is the best of the first setting: the rate that one would have used there without tuning. It tries
    the start, its half and its double, and goes on by factors of two beyond whichever end is the best. When that has
    ended for all optimizers of a setting, those with fewer trials get more, so that all have the same number. Then the
    best rate and, with `judge_carried`, the carried one run with `seeds` fresh seeds each.
    """

    optimizers: Sequence[str]
    settings: Sequence[Any]
    first_rates: Mapping[str, float]
    carry: Callable[[float, Any], float]
    seeds: int = 3
    least: int = 4  # trials of every optimizer in every setting
    most: int = 12
    judge_carried: bool = True

    def next_trials(self, records: Iterable[Record]) -> list[Trial]:
        """The trials that can be run now; nothing when the study is complete."""
        done = {trial_of(record): objective_of(record) for record in records}
        wanted: list[Trial] = []
        for setting in self.settings:
            tried = {o: self.tried(done, o, setting) for o in self.optimizers}
            starts = {o: self.start(done, o, setting) for o in self.optimizers}
            rates = {o: self._next_rates(tried[o], start) for o, start in starts.items() if start is not None}
            if len(rates) == len(self.optimizers) and not any(rates.values()):
                fair = max(self.least, *(len(losses) for losses in tried.values()))
                rates = {o: [_beyond(tried[o])] for o in self.optimizers if len(tried[o]) < fair}
            wanted += [Trial(o, setting, rate, TUNING_SEED) for o, some in rates.items() for rate in some]
            if self._tuned(done, setting):
                wanted += [
                    trial
                    for o in self.optimizers
                    for rate in self.judged_rates(done, o, setting)
                    for trial in self.judging(o, setting, rate)
                ]
        return [trial for trial in wanted if trial not in done]

    def judged_rates(self, done: Mapping[Trial, float], optimizer: str, setting: Any) -> list[float]:
        """The best rate and the carried one, which may be the same."""
        best, _ = best_of(self.tried(done, optimizer, setting))
        start = self.start(done, optimizer, setting)
        carries = self.judge_carried and setting != self.settings[0]
        return [best] if not carries or start in (best, None) else [best, start]

    def judging(self, optimizer: str, setting: Any, learning_rate: float) -> list[Trial]:
        """The trials with fresh seeds."""
        return [Trial(optimizer, setting, learning_rate, TUNING_SEED + 1 + seed) for seed in range(self.seeds)]

    def start(self, done: Mapping[Trial, float], optimizer: str, setting: Any) -> float | None:
        """Where the search in this setting starts; None while the first setting is not tuned."""
        first = self.settings[0]
        if setting == first:
            return self.first_rates[optimizer]
        return (
            self.carry(best_of(self.tried(done, optimizer, first))[0], setting) if self._tuned(done, first) else None
        )

    def tried(self, done: Mapping[Trial, float], optimizer: str, setting: Any) -> dict[float, float]:
        """{rate: objective} of the tuning trials, by rate."""
        found = {
            t.learning_rate: x for t, x in done.items() if t == (optimizer, setting, t.learning_rate, TUNING_SEED)
        }
        return dict(sorted(found.items()))

    def expected(self, records: Sequence[Record]) -> int:
        """How many trials there will be, as far as one can tell now."""
        done = {trial_of(record): objective_of(record) for record in records}
        total = 0
        for setting in self.settings:
            most = max(self.least, *(len(self.tried(done, o, setting)) for o in self.optimizers))
            for o in self.optimizers:
                known = self._tuned(done, setting)
                judged = (
                    len(self.judged_rates(done, o, setting))
                    if known
                    else 1 + (self.judge_carried and setting != self.settings[0])
                )
                total += most + self.seeds * judged
        return max(total, len(records))

    def _tuned(self, done: Mapping[Trial, float], setting: Any) -> bool:
        tried = [self.tried(done, o, setting) for o in self.optimizers]
        enough = all(self.least <= len(losses) == len(tried[0]) for losses in tried)
        return enough and not any(self._next_rates(losses, 1.0) for losses in tried)

    def _next_rates(self, losses: Mapping[float, float], start: float) -> list[float]:
        if missing := [rate for rate in (start, start / 2, start * 2) if rate not in losses and len(losses) < 3]:
            return missing
        best, _ = best_of(losses)
        return [rate for rate in (best / 2, best * 2) if rate not in losses and len(losses) < self.most]


def over_batch_sizes(
    first_rates: Mapping[str, float], optimizers: Sequence[str], batch_sizes: Sequence[int], seeds: int
) -> Search:
    """Rates follow the square root of the batch size from the smallest batch on."""
    return Search(
        optimizers=optimizers,
        settings=batch_sizes,
        first_rates=first_rates,
        carry=carry_by_root(batch_sizes[0]),
        seeds=seeds,
    )


def carry_by_root(smallest: int) -> Callable[[float, int], float]:
    """The rule that multiplies a rate by the square root of the batch's growth."""
    return lambda rate, batch_size: rate * math.sqrt(batch_size / smallest)


def check_over_batch_sizes(arguments: Any, optimizers: Iterable[str], at_least_one: Iterable[str]) -> None:
    """Raise ValueError for options of such a study that would fail later, or compare nothing.

    optimizers: those that there are. at_least_one: the options whose numbers must be that.
    """
    known = list(optimizers)
    if unknown := [o for o in arguments.optimizers if o not in known]:
        raise ValueError(f"--optimizers {unknown[0]}: expected some of {', '.join(known)}")
    for option in at_least_one:
        if getattr(arguments, option) < 1:
            raise ValueError(f"--{option} {getattr(arguments, option)}: expected at least 1")
    if arguments.seeds < 2:
        raise ValueError(f"--seeds {arguments.seeds}: expected at least 2, or nothing is known about the spread")
    sizes = arguments.batch_sizes or []
    if not sizes or min(sizes) < 1 or sizes != sorted(set(sizes)):
        raise ValueError(f"--batch_sizes {' '.join(map(str, sizes))}: expected different sizes, from small to large")


def search_behind(records: Sequence[Record], search_of: Callable[..., Search]) -> Search:
    """The search that led to these records. search_of: takes optimizers, settings and the number of seeds."""
    optimizers = list(dict.fromkeys(record["optimizer"] for record in records))
    settings = sorted({record["setting"] for record in records})
    return search_of(optimizers, settings, max(record["seed"] for record in records))


def best_of(losses: Mapping[float, float]) -> tuple[float, float]:
    """(rate, objective) of the best trial: of several that are equal the middle one, of diverged ones the lowest."""
    objective = min(losses.values())
    equal = sorted(rate for rate, value in losses.items() if value == objective)
    return equal[len(equal) // 2 if math.isfinite(objective) else 0], objective


def _beyond(losses: Mapping[float, float]) -> float:
    """The next rate outside, on the side where fewer rates lie beyond the best."""
    rates = sorted(losses)
    place = rates.index(best_of(losses)[0])
    return rates[-1] * 2 if len(rates) - 1 - place <= place else rates[0] / 2


def trial_of(record: Record) -> Trial:
    return Trial(*(record[name] for name in Trial._fields))


def in_words(trial: Trial) -> str:
    return f"{trial.optimizer} {trial.setting} {trial.learning_rate:.2g} seed {trial.seed}"


def objective_of(record: Record) -> float:
    """What the search minimises; inf where the run diverged."""
    return math.inf if record["objective"] is None else record["objective"]


def trained(train: Callable[[], Any], folder: Path, log: Path) -> Record:
    """What a run of recipes.pretrain_bert leaves in its results.jsonl, and its held-out loss as the objective.

    train: runs it with `folder` as output directory, which is gone afterwards. log: the file for what it prints. A run
    that has diverged has no objective, and no other results if it has stopped.
    """
    shutil.rmtree(folder, ignore_errors=True)  # what a trial that was killed has left
    found: Record = {"held_out_loss": math.inf}
    try:
        with log.open("a") as file, redirect_stdout(file):
            train()
        found = json.loads((folder / "results.jsonl").read_text())
    except RuntimeError as error:
        if "were skipped" not in str(error):  # SkippedStepsCallback's: the run has diverged
            raise
    shutil.rmtree(folder, ignore_errors=True)
    return found | {"objective": found["held_out_loss"] if math.isfinite(found["held_out_loss"]) else None}


def shuffled(rows: int, wanted: int, seed: int) -> Tensor:
    """`wanted` indices below `rows`, every epoch in a new order: the same for all trials of a seed."""
    generator = torch.Generator().manual_seed(seed)
    epochs = [torch.randperm(rows, generator=generator) for _ in range(math.ceil(wanted / rows))]
    return torch.cat(epochs)[:wanted]


# -- the results ------------------------------------------------------------------------------------------------------


def tuned(search: Search, records: Sequence[Record], optimizer: str, setting: Any) -> Tuned:
    done = {trial_of(record): objective_of(record) for record in records}
    tried = search.tried(done, optimizer, setting)
    rate, objective = best_of(tried)
    return Tuned(rate, objective, len(tried), rate / 2 in tried and rate * 2 in tried and math.isfinite(objective))


def judged(search: Search, records: Sequence[Record], optimizer: str, setting: Any, rate: float) -> list[Record]:
    """The records of the fresh seeds."""
    wanted = search.judging(optimizer, setting, rate)
    return [record for record in records if trial_of(record) in wanted]


def hardware_of(records: Sequence[Record]) -> str:
    return ", ".join(sorted({record["hardware"] for record in records}))


def outcomes(search: Search, records: Sequence[Record]) -> dict[tuple[Any, str], tuple[Tuned, list[Record]]]:
    """{(setting, optimizer): (best rate, its runs with fresh seeds)} of what has all its trials, in order."""
    missing = {(trial.setting, trial.optimizer) for trial in search.next_trials(records)}
    there = {(record["setting"], record["optimizer"]) for record in records}
    found = {}
    for setting in search.settings:
        for optimizer in search.optimizers:
            if (setting, optimizer) in there - missing:
                best = tuned(search, records, optimizer, setting)
                # None as long as the search in this setting waits for another optimizer.
                if runs := judged(search, records, optimizer, setting, best.learning_rate):
                    found[setting, optimizer] = (best, runs)
    return found


class Spread(NamedTuple):
    """Mean and standard deviation over n seeds; inf where one of them diverged."""

    mean: float
    sd: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.sd:.3f}" if math.isfinite(self.mean) else "diverged"

    @property
    def per_cent(self) -> str:
        """Where the values are in per cent."""
        return f"{self.mean:.1f} ± {self.sd:.1f} %" if math.isfinite(self.mean) else "diverged"


def spread(values: Sequence[float | None]) -> Spread:
    numbers = [math.inf if value is None else value for value in values]
    if not all(map(math.isfinite, numbers)):
        return Spread(math.inf, math.nan, len(numbers))
    return Spread(mean(numbers), stdev(numbers) if len(numbers) > 1 else math.nan, len(numbers))


def is_tie(a: Spread, b: Spread) -> bool:
    """Whether two means are at most two standard deviations (pooled) apart."""
    if math.isinf(a.mean) or math.isinf(b.mean):
        return a.mean == b.mean
    return abs(a.mean - b.mean) <= 2 * math.sqrt((a.sd**2 + b.sd**2) / 2)


def standing(value: Spread, values: Sequence[Spread], highest: bool = False, digits: int = 3) -> str:
    """How a mean compares with the best: lowest (or highest), tie, or how far off; nothing where it diverged."""
    finite = [other for other in values if math.isfinite(other.mean)]
    if not math.isfinite(value.mean):
        return ""
    best = (max if highest else min)(finite, key=lambda other: other.mean)
    if not is_tie(value, best):
        return f"{value.mean - best.mean:+.{digits}f}".replace("-", "−")
    return "tie" if sum(is_tie(other, best) for other in finite) > 1 else "highest" if highest else "lowest"


# -- a folder of trials -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Study:
    """A search in a folder. facts: everything that all its trials have in common, and that decides their outcome.

    Raises ValueError when the folder holds trials of other facts, or lines that are none.
    """

    folder: Path
    search: Search
    facts: dict[str, Any]

    def __post_init__(self) -> None:
        facts = json.loads(json.dumps(self.facts))
        for record in self.records():
            theirs = record["study"]
            if differing := [key for key in facts | theirs if theirs.get(key) != facts.get(key)]:
                key = differing[0]
                raise ValueError(
                    f"{self.path} holds trials with {key} {theirs.get(key)!r}, not {facts.get(key)!r}: give "
                    "--output_dir for another study, or the same options to go on with this one"
                )

    @property
    def path(self) -> Path:
        return self.folder / "trials.jsonl"

    def records(self) -> list[Record]:
        return read_records(self.path) if self.path.exists() else []

    def run(
        self,
        train: Callable[[Trial, Callable[[str], None]], Record],
        show_progress: bool = True,
        time_left: Callable[[float], bool] = lambda longest: True,
    ) -> list[Record]:
        """Run what is missing, with other processes if there are any; the records of all trials.

        time_left: takes the seconds of the longest trial so far, 0 before the first one, and says whether to begin
        another.
        train: takes a trial and a function that shows a line about where it is; gives what to record of it, with
        "objective", the number to minimise, None where the run diverged.
        """
        (self.folder / ".claims").mkdir(parents=True, exist_ok=True)
        records, longest = self.records(), 0.0
        disable = None if show_progress else True  # None: off where stderr is no terminal; lines take its place
        with tqdm(unit="trial", initial=len(records), disable=disable, smoothing=0) as bar:
            while (trials := self.search.next_trials(records)) and time_left(longest):
                bar.total, bar.n = self.search.expected(records), len(records)
                bar.refresh()
                start = time.monotonic()
                if self._run_one(trials, train, bar):
                    longest = max(longest, time.monotonic() - start)
                else:
                    time.sleep(0.2)  # other processes are running all that can be run now
                before, records = len(records), self.records()
                if show_progress and bar.disable and len(records) > before:
                    self._say_the_last(records)
            bar.total, bar.n = self.search.expected(records), len(records)
        return records

    def _say_the_last(self, records: Sequence[Record]) -> None:
        """A line of the log: which trial has ended, with which outcome."""
        count, trial, outcome = len(records), trial_of(records[-1]), objective_of(records[-1])
        words = f"{outcome:.4g}" if math.isfinite(outcome) else "diverged"
        print(
            f"trial {count} of {self.search.expected(records)}: {in_words(trial)}: {words}",
            file=sys.stderr,
            flush=True,
        )

    def _run_one(self, trials: list[Trial], train: Callable[..., Record], bar: Any) -> bool:
        """Run the first trial that nobody else is running; whether there was one."""
        for trial in trials:
            with self._claim(trial) as mine:
                if mine:
                    name = in_words(trial)
                    result = train(trial, lambda text, name=name: bar.set_postfix_str(f"{name}: {text}"))
                    record = {"study": self.facts, **provenance(), **trial._asdict(), **result}
                    with _locked(self.folder / ".claims" / "writing"):
                        for unfinished in self.folder.glob(f".{self.path.name}.*"):  # of a process killed as it wrote
                            unfinished.unlink()
                        append_json_line(self.path, record)
                    return True
        return False

    @contextmanager
    def _claim(self, trial: Trial) -> Iterator[bool]:
        """Whether the trial is this process' to run: nobody else is running it, nor has run it in the meantime."""
        name = f"{trial.optimizer}-{trial.setting}-{trial.learning_rate!r}-{trial.seed}"
        with _locked(self.folder / ".claims" / name, wait=False) as locked:
            yield locked and trial not in map(trial_of, self.records())


@contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of this name, which the system releases when the process dies; yields whether it is held."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def read_records(path: Path) -> list[Record]:
    """The lines of a trials.jsonl. Raises ValueError with the number of a line that is no record."""
    records = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            record = json.loads(line)
            trial_of(record), record["objective"], record["study"]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}:{number} is no record of a trial: restore or remove the line") from None
        records.append(record)
    return records
