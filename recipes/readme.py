"""Writes the tables of README's Results, and the sentences with numbers, from the committed records.

    python -m recipes.readme

Each stands between the markers `<!-- results: NAME -->` and `<!-- /results: NAME -->`.
"""

from collections.abc import Callable
from pathlib import Path
from textwrap import fill

from recipes import compare_optimizers, finetune, lstm_mnist
from recipes.lib.report import no_options, replacing
from recipes.study.sweep import Record, read_records

README = Path(__file__).parent.parent / "README.md"
RESULTS = Path(__file__).parent / "results"
SECTIONS: dict[str, Callable[[list[Record]], list[str]]] = {
    "compare_optimizers": compare_optimizers.losses_of,
    "compare_targets": compare_optimizers.targets_of,
    "lstm_digits": lstm_mnist.results_of,
    "lstm_digits_longer": lstm_mnist.results_of,
    "lstm_fashion": lstm_mnist.results_of,
    "finetune_topic": finetune.results_of,
    "finetune_supersense": finetune.results_of,
}
FILES = {"compare_targets": "compare_optimizers"}  # a second table of the same records


def with_results(readme: str) -> str:
    """The README with its results as they are recorded."""
    for name, results_of in SECTIONS.items():
        begin, end = f"<!-- results: {name} -->\n", f"<!-- /results: {name} -->\n"
        before, rest = readme.split(begin)
        records = read_records(RESULTS / f"{FILES.get(name, name)}.jsonl")
        parts = [
            part if part.startswith("|") else fill(part, 120, break_on_hyphens=False) + "\n"
            for part in results_of(records)
        ]
        readme = before + begin + "\n".join(parts) + end + rest.split(end)[1]
    return readme


if __name__ == "__main__":
    no_options(__doc__)
    with replacing(README) as unfinished:
        unfinished.write_text(with_results(README.read_text()))
