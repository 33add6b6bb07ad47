"""A report as one HTML file that loads nothing else: styles and pictures are inside."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from recipes.lib.console import command_to_open, what_next
from recipes.lib.report import atomic_write
from recipes.study.tables import markdown_table

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff; margin: 0 auto; padding: 1.5rem;
       max-width: 76rem; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
figure { margin: 1rem 0 2rem; } figcaption { color: #444; font-size: .9rem; }
img { height: auto; max-width: max(100%, 40rem); } .wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid #ddd; vertical-align: bottom; }
td { white-space: nowrap; } th { overflow-wrap: normal; }
th { border-bottom: 2px solid #888; } code { font-size: .85rem; }
"""


def write_page(path: Path, title: str, parts: Sequence[str]) -> None:
    """Write a page of these parts, in this order."""
    with atomic_write(path) as unfinished:
        unfinished.write_text(
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
            + "\n".join(parts)
            + "\n</body>\n</html>\n",
            encoding="utf-8",
        )


def write_study(
    folder: Path,
    title: str,
    records: Sequence[dict[str, Any]],
    what: str,
    outcome: tuple[Sequence[str], Sequence[Sequence[str]]],
    notes: Sequence[str],
    more: Sequence[str],
) -> str:
    """report.html of a study; returns the report for the terminal.

    what: says what was run. outcome: header and rows of the table. notes: paragraphs below it. more: further parts of
    the page.
    """
    commands = "; ".join(sorted({record["command"] for record in records}))
    parts = [paragraph(what), table(*outcome), *map(paragraph, notes), *more, paragraph(f"Commands: {commands}.")]
    write_page(folder / "report.html", title, parts)
    return "\n".join([what, "", markdown_table(*outcome), *notes, *where_it_is(folder)])


def where_it_is(folder: Path) -> list[str]:
    """The last lines for the terminal."""
    page = folder / "report.html"
    return ["", f"pictures and page: {folder}/*.png, {page}", what_next({"look at it": command_to_open(page)})]


def heading(text: str) -> str:
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def bullets(lines: Sequence[str]) -> str:
    return "<ul>\n" + "\n".join(f"<li>{escape(line)}</li>" for line in lines) + "\n</ul>"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows of text; a table too wide for the screen scrolls by itself."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table></div>'


def figure(png: Path, caption: str) -> str:
    """A picture inside the page, with a caption, which is its alternative text too; on a phone it scrolls sideways."""
    data = base64.b64encode(png.read_bytes()).decode()
    text = escape(caption, quote=True)
    picture = f'<div class="wide"><img src="data:image/png;base64,{data}" alt="{text}"></div>'
    return f"<figure>{picture}<figcaption>{text}</figcaption></figure>"
