"""Works on a study of 38 trials that do nothing, for tests that kill it.

    python -m tests.scripts.tiny_study FOLDER SECONDS

Every trial takes so many seconds: on a busy machine a study of milliseconds is over before it is killed.
Notes the beginning of every trial in FOLDER/begun, by the process that runs it.
"""

import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

from recipes.study.sweep import Record, Search, Study, Trial

SEARCH = Search(
    optimizers=("a", "b"),
    settings=(4, 16),
    first_rates={"a": 1.0, "b": 0.01},
    carry=lambda rate, setting: rate * math.sqrt(setting / 4),
)
BEST = {("a", 4): 4.0, ("a", 16): 2.0, ("b", 4): 0.02, ("b", 16): 0.02}


def loss(trial: Trial) -> float:
    """A parabola in log2 of the rate, and a little for the seed."""
    return math.log2(trial.learning_rate / BEST[trial.optimizer, trial.setting]) ** 2 + trial.seed / 100


def main(folder: Path, seconds: float) -> None:
    def train(trial: Trial, say: Callable[[str], None]) -> Record:
        with (folder / "begun").open("a") as file:
            file.write(f"{os.getpid()} {trial}\n")
        time.sleep(seconds)
        return {"objective": loss(trial)}

    Study(folder, SEARCH, {"kind": "tiny"}).run(train, show_progress=False)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
