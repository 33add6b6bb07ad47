"""Large batch against small batch: which minimum is sharper, by which measure, and what that is worth.

    python -m recipes.sharp_minima        # eight minutes of CPU time; stopped and called again, it goes on from there

Part 1 trains a small rectifier network on scikit-learn's digits with LAMB, AdamW and SGD, with batches of 16 and of
the whole training set, each run as long as it takes to end at the same training loss. Part 2 rescales one of these
networks (Dinh et al. 2017). Part 3 pretrains a tiny BERT on the embedded corpus with a small and a large batch, by
Trainer, and compares the checkpoints. The report is runs/sharp_minima/report.html.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hf_lamb.command_line import Parser, fail, stopped
from hf_lamb.sharpness import plots
from recipes.lib.console import command_to_open, on_a_terminal, show_library_bars, what_next
from recipes.lib.processes import only_run_in
from recipes.lib.report import atomic_write, provenance
from recipes.study import sharp_minima_bert, sharp_minima_report
from recipes.study import sharp_minima_digits as digits

OUTPUT = Path("runs/sharp_minima")


def main() -> None:
    """Run all parts and write the report."""
    parser = Parser("python -m recipes.sharp_minima", __doc__)
    parser.add_argument("--output_dir", type=Path, default=OUTPUT, help="The folder of records, pictures and report.")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="Runs of part 1 at a time.")
    options = parser.parse_args()
    show_library_bars(on_a_terminal())
    try:
        plots.require_matplotlib()
        digits.load_digits()
        until_the_end = ExitStack()
        until_the_end.enter_context(only_run_in([str(options.output_dir)], is_main_process=True))
    except (ValueError, OSError) as error:
        fail(parser.name, error)
    with until_the_end:
        try:
            everything(options)
        except KeyboardInterrupt:
            stopped(parser.name, "the same command goes on, finished runs are kept")


def everything(options: argparse.Namespace) -> None:
    """The three parts, the records, the report."""
    start, keep = time.perf_counter(), partial(kept, options.output_dir / "parts")

    runs = digits.digits_runs(keep, options.processes)
    scaled = keep("dinh", lambda: digits.dinh(runs[digits.best("adamw", digits.SMALL, runs)]["weights"]))
    negated = keep("negated", digits.negated_path)
    paths = keep("paths", lambda: digits.digits_paths(runs))
    bert = sharp_minima_bert.run(options.output_dir, keep)

    records = [*(run["record"] for run in runs.values()), *scaled, negated["record"], bert["record"]]
    facts = provenance() | {"seconds_in_all": round(time.perf_counter() - start)}
    with atomic_write(options.output_dir / "results.jsonl") as unfinished:
        unfinished.write_text("".join(json.dumps(facts | record) + "\n" for record in records))
    written = sharp_minima_report.write(options.output_dir, runs, records, paths, negated["path"], bert["table"])
    tables = "\n".join(sharp_minima_report.results_of(records))
    print(f"{tables}\n{time.perf_counter() - start:.0f} s; {written}\n")
    print(
        what_next(
            {"look at it": command_to_open(written), "compare yours": "hf-lamb sharpness SMALL LARGE --data FILE"}
        )
    )


def kept(folder: Path, name: str, make: Callable[[], Any]) -> Any:
    """What `make` returned, kept in a file: a recipe that was stopped does not make it again."""
    path = folder / f"{name}.pt"
    if not path.exists():
        made = make()
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as unfinished:
            torch.save(made, unfinished)
    return torch.load(path, weights_only=True)


if __name__ == "__main__":
    main()
