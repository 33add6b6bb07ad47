"""Protects the toolkit as a whole: nothing that it chooses or measures depends on how a global batch is split."""

import json
import math
from itertools import combinations
from statistics import mean, stdev
from typing import Any

import pytest

from tests.helpers import on_processes
from tests.scripts import noise_runs

SPLITS = [(processes, accumulation) for processes in (1, 2) for accumulation in (1, 4, 16)]
BATCH = 32


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], dict[str, Any]]:
    """The same global batches of 32 on one and two processes, in 1, 4 and 16 accumulation steps."""
    root, found = tmp_path_factory.mktemp("splits"), {}
    for processes, accumulation in SPLITS:
        output = root / f"{processes}-{accumulation}" / "found.json"
        output.parent.mkdir()
        split = BATCH // processes // accumulation, accumulation
        if processes == 1:
            noise_runs.main("split", *split, output)
        else:
            on_processes(processes, "tests.scripts.noise_runs", "split", *map(str, split), str(output))
        found[processes, accumulation] = json.loads(output.read_text())
    return found


@pytest.mark.distributed
@pytest.mark.timeout(900)
@pytest.mark.parametrize("key", ["learning_rate", "loss"])
def test_rate_and_loss_do_not_depend_on_the_split(key: str, runs: dict[tuple[int, int], dict[str, Any]]) -> None:
    """Twenty steps: the scaled rate to the bit, the loss to 1e-5."""
    expected = runs[1, 1][key]
    assert len(expected) == 20
    if key == "learning_rate":
        assert expected[0] == pytest.approx(4e-3 * math.sqrt(BATCH / 64))
    for split, run in runs.items():
        tolerance = {"learning_rate": 0.0, "loss": 1e-5}[key]
        assert run[key] == pytest.approx(expected, rel=tolerance, abs=0), split


@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_the_noise_scale_agrees_within_its_own_error(runs: dict[tuple[int, int], dict[str, Any]]) -> None:
    """Means over the seeds differ by less than four standard errors, from each other and from the closed form."""
    assert runs[1, 1]["noise_scale"] == []  # one micro-batch tells nothing
    values = {split: run["noise_scale"] for split, run in runs.items() if split != (1, 1)}
    assert {len(seeds) for seeds in values.values()} == {noise_runs.SEEDS}
    average = {split: mean(seeds) for split, seeds in values.items()}
    error = {split: stdev(seeds) / math.sqrt(len(seeds)) for split, seeds in values.items()}
    assert max(error.values()) < 0.15 * noise_runs.NOISE_SCALE
    for split in values:
        assert abs(average[split] - noise_runs.NOISE_SCALE) < 4 * error[split], (split, average, error)
    for a, b in combinations(values, 2):
        assert abs(average[a] - average[b]) < 4 * math.hypot(error[a], error[b]), (a, b, average, error)
