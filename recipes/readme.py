"""Writes the tables of README's Results, and the sentences with numbers, from the committed records.

    python -m recipes.readme

Each stands between the markers `<!-- results: NAME -->` and `<!-- /results: NAME -->`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from textwrap import fill

from recipes.lib.report import no_options
from recipes.study import compare_report, finetune_report, lstm_report, sharp_minima_report
from recipes.study.sweep import Record
from recipes.study.tables import write_tables

RESULTS = Path(__file__).parent / "results"
SECTIONS: dict[str, Callable[[list[Record]], list[str]]] = {
    "compare_optimizers": compare_report.losses_of,
    "compare_targets": compare_report.targets_of,
    "lstm_digits": lstm_report.results_of,
    "lstm_digits_longer": lstm_report.results_of,
    "lstm_fashion": lstm_report.results_of,
    "finetune_topic": finetune_report.results_of,
    "finetune_supersense": finetune_report.results_of,
    "sharp_minima": sharp_minima_report.results_of,
}
FILES = {"compare_targets": "compare_optimizers"}  # a second table of the same records


def results() -> dict[str, str]:
    """{name of the markers: tables and sentences}."""
    return {f"results: {name}": in_words(results_of(records_of(name))) for name, results_of in SECTIONS.items()}


def records_of(name: str) -> list[Record]:
    lines = (RESULTS / f"{FILES.get(name, name)}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def in_words(parts: list[str]) -> str:
    """Tables as they are, sentences in lines."""
    filled = [part if part.startswith("|") else fill(part, 120, break_on_hyphens=False) + "\n" for part in parts]
    return "\n".join(filled)


if __name__ == "__main__":
    no_options(__doc__)
    write_tables("README.md", results())
