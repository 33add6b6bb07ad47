"""Tables in Markdown, and the one writer of those that README and docs/ hold."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from recipes.lib.optimizers import NAMES
from recipes.lib.report import atomic_write
from recipes.study.sweep import Tuned

TUNED = ("optimizer", "trials", "best rate")  # the columns of `tuned_cells`
ROOT = Path(__file__).parents[2]


def tuned_cells(optimizer: str, best: Tuned) -> list[str]:
    """What the row of a tuned optimizer says of the tuning, below TUNED."""
    return [NAMES[optimizer], str(best.trials), best.rate_in_words]


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of text, for a README or a terminal."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def filled(text: str, tables: Mapping[str, str]) -> str:
    """The text with each table between `<!-- NAME -->` and `<!-- /NAME -->`, whatever stood there."""
    for name, table in tables.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, rest = text.split(begin)
        text = before + begin + table + end + rest.split(end)[1]
    return text


def write_tables(file: str, tables: Mapping[str, str]) -> None:
    """Replace the tables of a file of this repository by these."""
    path = ROOT / file
    with atomic_write(path) as unfinished:
        unfinished.write_text(filled(path.read_text(), tables))
