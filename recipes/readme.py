"""Writes the tables of docs/ and README, and the sentences with numbers, from the committed records.

    python -m recipes.readme

Each stands between the markers `<!-- results: NAME -->` and `<!-- /results: NAME -->`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from textwrap import fill

from recipes.lib.report import no_options
from recipes.study import (
    compare_report,
    critical_report,
    finetune_report,
    growth_report,
    lstm_report,
    sharp_minima_report,
)
from recipes.study.sweep import Record
from recipes.study.tables import write_tables

RESULTS = Path(__file__).parent / "results"
README: dict[str, Callable[[list[Record]], list[str]]] = {"compare_summary": compare_report.summary_of}
RESULTS_PAGE: dict[str, Callable[[list[Record]], list[str]]] = {
    "compare_optimizers": compare_report.losses_of,
    "compare_targets": compare_report.targets_of,
    "lstm_digits": lstm_report.results_of,
    "lstm_digits_longer": lstm_report.results_of,
    "lstm_fashion": lstm_report.results_of,
    "finetune_topic": finetune_report.results_of,
    "finetune_supersense": finetune_report.results_of,
    "sharp_minima": sharp_minima_report.results_of,
}
CRITICAL_BATCH: dict[str, Callable[[list[Record]], list[str]]] = {"critical_batch": critical_report.results_of}
GROWING_BATCHES: dict[str, Callable[[list[Record]], list[str]]] = {"grow_batch": growth_report.results_of}
PAGES = {
    "README.md": README,
    "docs/results.md": RESULTS_PAGE,
    "docs/critical_batch.md": CRITICAL_BATCH,
    "docs/growing_batches.md": GROWING_BATCHES,
}
FILES = dict.fromkeys(("compare_targets", "compare_summary"), "compare_optimizers")  # more tables of the same records


def results_in(page: str) -> dict[str, str]:
    """{name of the markers: tables and sentences} of a page."""
    return {f"results: {name}": in_words(results_of(records_of(name))) for name, results_of in PAGES[page].items()}


def records_of(name: str) -> list[Record]:
    lines = (RESULTS / f"{FILES.get(name, name)}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def in_words(parts: list[str]) -> str:
    """Tables as they are, sentences in lines."""
    filled = [part if part.startswith("|") else fill(part, 120, break_on_hyphens=False) + "\n" for part in parts]
    return "\n".join(filled)


if __name__ == "__main__":
    no_options(__doc__)
    for page in PAGES:
        write_tables(page, results_in(page))
