"""Writes the tables of README's Results from the committed records.

    python -m recipes.readme

Each stands between the markers `<!-- results: NAME -->` and `<!-- /results: NAME -->`.
"""

from collections.abc import Callable
from pathlib import Path

from recipes import compare_optimizers, finetune, lstm_mnist
from recipes.html_report import markdown_table
from recipes.report import replacing
from recipes.sweep import Record, read_records

README = Path(__file__).parent.parent / "README.md"
RESULTS = Path(__file__).parent / "results"
TABLES: dict[str, Callable[[list[Record]], tuple[tuple[str, ...], list[list[str]]]]] = {
    "compare_optimizers": compare_optimizers.table_of,
    "compare_targets": compare_optimizers.target_table_of,
    "lstm_digits": lstm_mnist.table_of,
    "lstm_digits_longer": lstm_mnist.table_of,
    "lstm_fashion": lstm_mnist.table_of,
    "finetune_topic": finetune.table_of,
}
FILES = {"compare_targets": "compare_optimizers"}  # a second table of the same records


def with_tables(readme: str) -> str:
    for name, table_of in TABLES.items():
        begin, end = f"<!-- results: {name} -->\n", f"<!-- /results: {name} -->\n"
        before, rest = readme.split(begin)
        records = read_records(RESULTS / f"{FILES.get(name, name)}.jsonl")
        readme = before + begin + markdown_table(*table_of(records)) + end + rest.split(end)[1]
    return readme


if __name__ == "__main__":
    with replacing(README) as unfinished:
        unfinished.write_text(with_tables(README.read_text()))
