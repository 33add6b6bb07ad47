"""Protects the comparisons' fairness, and that a killed study loses, repeats and damages nothing."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from recipes.study import sweep
from recipes.study.sweep import Record, Search, Study, Trial, best_of, is_tie, read_records, spread, trial_of, tuned
from tests.scripts.tiny_study import BEST, SEARCH, loss


def record_of(trial: Trial, objective: float | None) -> Record:
    return {**trial._asdict(), "objective": objective, "study": {}}


def finished(
    search: Search, objective: Callable[[Trial], float | None], rng: random.Random | None = None
) -> list[Record]:
    """The records of a whole study; with rng, the trials end in an order drawn at random."""
    records: list[Record] = []
    while trials := search.next_trials(records):
        trial = rng.choice(trials) if rng else trials[0]
        records.append(record_of(trial, objective(trial)))
        assert len(records) < 500
    return records


def rates(records: list[Record], optimizer: str, setting: int) -> list[float]:
    found = [trial_of(record) for record in records]
    return sorted(t.learning_rate for t in found if (t.optimizer, t.setting, t.seed) == (optimizer, setting, 0))


# -- the search -------------------------------------------------------------------------------------------------------


def test_the_best_rate_is_found_and_lies_inside() -> None:
    """Wherever the search starts; half and twice the best rate were tried and are worse."""
    records = finished(SEARCH, loss)
    for (optimizer, setting), best in BEST.items():
        found = tuned(SEARCH, records, optimizer, setting)
        assert found.learning_rate == best
        assert found.interior
        assert {best / 2, best * 2} <= set(rates(records, optimizer, setting))


def test_all_optimizers_get_the_same_number_of_trials() -> None:
    """a starts two factors of two from its best rate, b one; they end with as many trials at every setting."""
    records = finished(SEARCH, loss)
    for setting in SEARCH.settings:
        trials = {o: tuned(SEARCH, records, o, setting).trials for o in SEARCH.optimizers}
        assert len(set(trials.values())) == 1
        assert min(trials.values()) >= SEARCH.least


def test_neighbouring_rates_differ_by_two() -> None:
    records = finished(SEARCH, loss)
    for optimizer, setting in BEST:
        tried = rates(records, optimizer, setting)
        assert [high / low for low, high in pairwise(tried)] == [2] * (len(tried) - 1)


def test_the_best_and_the_untuned_rate_are_judged_by_fresh_seeds() -> None:
    """At the second setting the untuned rate is the first one's best, times two here; b's happens to be the double."""
    records = finished(SEARCH, loss)
    fresh = Counter((r["optimizer"], r["setting"], r["learning_rate"]) for r in records if r["seed"] > 0)
    assert fresh == {
        ("a", 4, 4.0): 3,
        ("b", 4, 0.02): 3,
        ("a", 16, 2.0): 3,
        ("a", 16, 8.0): 3,
        ("b", 16, 0.02): 3,
        ("b", 16, 0.04): 3,
    }
    without = finished(replace(SEARCH, judge_carried=False), loss)
    assert not [r for r in without if r["seed"] > 0 and r["learning_rate"] in (8.0, 0.04)]


@pytest.mark.parametrize("seed", range(5))
def test_the_trials_do_not_depend_on_the_order_in_which_they_end(seed: int) -> None:
    """So that several processes run the same study as one."""
    expected = sorted(map(trial_of, finished(SEARCH, loss)))
    assert sorted(map(trial_of, finished(SEARCH, loss, random.Random(seed)))) == expected


def test_the_number_of_trials_is_foretold() -> None:
    """Never too low by more than what the search is still extended by, and right at the end."""
    records = finished(SEARCH, loss)
    assert SEARCH.expected(records) == len(records)
    assert SEARCH.expected([]) == 2 * 2 * 4 + 2 * 3 + 2 * 6
    assert SEARCH.expected(records[:10]) <= len(records)


def test_divergence_sends_the_search_down() -> None:
    """Whatever is above 0.1 diverges, and the search started from 1."""
    search = replace(SEARCH, optimizers=("a",), settings=(4,))
    records = finished(search, lambda trial: None if trial.learning_rate > 0.1 else -trial.learning_rate)
    assert tuned(search, records, "a", 4) == (0.0625, -0.0625, 7, True)


def test_a_search_that_finds_nothing_ends() -> None:
    """Everything diverges: twelve trials, and the best rate is called an edge."""
    search = replace(SEARCH, optimizers=("a",), settings=(4,))
    records = finished(search, lambda trial: None)
    found = tuned(search, records, "a", 4)
    assert (found.trials, found.interior, found.objective) == (search.most, False, math.inf)


def test_equal_objectives_do_not_send_it_anywhere() -> None:
    assert best_of({1.0: 0.5, 2.0: 0.5, 4.0: 0.5, 8.0: 0.7}) == (2.0, 0.5)
    search = replace(SEARCH, optimizers=("a",), settings=(4,))
    assert len(rates(finished(search, lambda trial: 1.0), "a", 4)) == search.least


# -- means and ties ---------------------------------------------------------------------------------------------------


def test_a_tie_is_two_standard_deviations() -> None:
    a, near, far = spread([1.0, 1.1, 1.2]), spread([1.1, 1.2, 1.3]), spread([1.4, 1.5, 1.6])
    assert (a.mean, a.sd, a.n) == (pytest.approx(1.1), pytest.approx(0.1), 3)
    assert is_tie(a, near)
    assert not is_tie(a, far)
    assert is_tie(spread([2.0, 2.0]), spread([2.0, 2.0]))
    assert not is_tie(a, spread([1.0, None]))
    assert str(spread([1.0, None])) == "diverged"


# -- the folder -------------------------------------------------------------------------------------------------------


def test_a_study_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """What an exception interrupts is run again, nothing else is."""
    ran: list[Trial] = []

    def train(trial: Trial, say: Any) -> Record:
        ran.append(trial)
        if len(ran) == 7:
            raise KeyboardInterrupt
        return {"objective": loss(trial)}

    study = Study(tmp_path, SEARCH, {"kind": "tiny"})
    with pytest.raises(KeyboardInterrupt):
        study.run(train, show_progress=False)
    assert len(study.records()) == 6
    records = study.run(train, show_progress=False)
    assert Counter(ran) == Counter([*map(trial_of, records), ran[6]])
    assert study.run(train, show_progress=False) == records
    assert {"command", "hardware", "versions", "time"} <= records[0].keys()


@pytest.mark.parametrize("kills", [1, pytest.param(5, marks=pytest.mark.slow)])
def test_kills_of_two_processes(kills: int, tmp_path: Path) -> None:
    """SIGKILL at random moments: every trial recorded once, and none begun again after it was recorded."""
    rng = random.Random(kills)
    command = [sys.executable, "-m", "tests.scripts.tiny_study", str(tmp_path), str(0.05 * kills)]

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(command)

    trials, begun = tmp_path / "trials.jsonl", tmp_path / "begun"
    workers = [start(), start()]
    try:
        for _ in range(kills):
            seen = len(begun.read_text().splitlines()) if begun.exists() else 0
            wait_for(lambda seen=seen: begun.exists() and len(begun.read_text().splitlines()) > seen + 2)
            time.sleep(rng.random() / 10)
            victim = workers.pop(rng.randrange(2))
            os.kill(victim.pid, signal.SIGKILL)
            assert victim.wait(timeout=60) in (-signal.SIGKILL, 0)
            read_records(trials)  # whole lines only, at any moment
            workers.append(start())
        assert [worker.wait(timeout=120) for worker in workers] == [0, 0]
    finally:
        for worker in workers:
            worker.kill()
    records = read_records(trials)
    assert sorted(map(trial_of, records)) == sorted(map(trial_of, finished(SEARCH, loss)))
    repeated = sum(Counter(line.split(" ", 1)[1] for line in begun.read_text().splitlines()).values()) - len(records)
    assert 0 <= repeated <= kills  # a trial that a kill interrupted begins again, no other
    assert not list(tmp_path.glob(".trials*"))


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_trials_of_another_study_are_refused(tmp_path: Path) -> None:
    Study(tmp_path, SEARCH, {"size": "smoke"}).run(lambda trial, say: {"objective": loss(trial)}, show_progress=False)
    Study(tmp_path, SEARCH, {"size": "smoke"})
    with pytest.raises(ValueError, match="holds trials with size 'smoke', not 'tiny': give --output_dir for another"):
        Study(tmp_path, SEARCH, {"size": "tiny"})


@pytest.mark.parametrize("line", ["{", "[]", "1", '{"optimizer": "a"}'])
def test_a_line_that_is_no_record_is_named(line: str, tmp_path: Path) -> None:
    good = json.dumps(record_of(Trial("a", 4, 1.0, 0), 1.0))
    (tmp_path / "trials.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(ValueError, match=r"trials\.jsonl:2 is no record of a trial: restore or remove the line"):
        Study(tmp_path, SEARCH, {})


def test_every_epoch_is_a_new_order_of_all_rows() -> None:
    order = sweep.shuffled(10, 25, seed=3)
    assert sorted(order[:10].tolist()) == sorted(order[10:20].tolist()) == list(range(10))
    assert order[:10].tolist() != order[10:20].tolist()
    assert order.tolist() == sweep.shuffled(10, 25, seed=3).tolist()
    assert order.tolist() != sweep.shuffled(10, 25, seed=4).tolist()
