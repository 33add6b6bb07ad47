"""Writes the tables of docs/ and README, their sentences with numbers, and the pictures of docs/study.md.

    python -m recipes.tables_in_docs

All come from the committed records. A table stands between the markers `<!-- results: NAME -->` and
`<!-- /results: NAME -->`, in docs/study.md `<!-- study: NAME, PART -->` and `<!-- /study: NAME, PART -->`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from textwrap import fill

from recipes.lib.report import no_options
from recipes.study import (
    batch_report,
    compare_report,
    critical_report,
    finetune_report,
    growth_report,
    lstm_report,
    sharp_minima_report,
)
from recipes.study.batch_study import STUDIES
from recipes.study.compare_report import MIN_STEPS
from recipes.study.sweep import Record, read_records
from recipes.study.tables import ROOT, write_tables

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


def studies() -> dict[str, str]:
    """The same for docs/study.md: what there is so far of the studies of `compare_optimizers --study`."""
    return {
        f"study: {name}, {part}": in_words(texts)
        for name in STUDIES
        for part, texts in batch_report.page(name, study_records(name)).items()
    }


def draw_studies() -> None:
    """The pictures of docs/study.md."""
    for name in STUDIES:
        if records := study_records(name):
            results = batch_report.results_of(batch_report.study_of_defaults(name), records)
            batch_report.draw(results, records, str(ROOT / f"docs/study_{name}_"), MIN_STEPS, None)


def study_records(name: str) -> list[Record]:
    path = Path(STUDIES[name]["output_dir"]) / "trials.jsonl"
    return read_records(path) if path.exists() else []


def records_of(name: str) -> list[Record]:
    lines = (RESULTS / f"{FILES.get(name, name)}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def in_words(parts: list[str]) -> str:
    """Tables as they are, sentences in lines."""
    filled = [
        part
        if part.startswith("|")
        else f"{part}\n"
        if part.startswith("![")
        else fill(part, 120, break_on_hyphens=False) + "\n"
        for part in parts
    ]
    return "\n".join(filled)


if __name__ == "__main__":
    no_options(__doc__)
    for page in PAGES:
        write_tables(page, results_in(page))
    write_tables("docs/study.md", studies())
    draw_studies()
