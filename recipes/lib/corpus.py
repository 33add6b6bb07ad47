"""Where the text comes from: the embedded corpus, local files or a dataset of the hub, as named documents."""

import glob
import gzip
import hashlib
import json
import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, pairwise, starmap
from pathlib import Path
from typing import Any, NamedTuple

EMBEDDED = Path(__file__).parent.parent / "data" / "sotu_1900.txt.xz"
EMBEDDED_SHA256 = "0ed3faa2575c19faba78133a9275fca3ff031c702dd3c93e581b7535c70ad2f0"

OPENERS: dict[str, Callable[..., Any]] = {".txt": open, ".jsonl": open, ".xz": lzma.open, ".gz": gzip.open}
SUFFIXES = (".txt", ".txt.xz", ".txt.gz", ".jsonl")
HEADER = re.compile(r"^=== (.+) ===$", re.MULTILINE)


class Document(NamedTuple):
    """One whole text. A corpus is split by documents, and no block of tokens holds two of them."""

    name: str
    text: str


def load_documents(corpus: str | Sequence[str]) -> list[Document]:
    """All documents of a corpus, in order; blank ones are left out.

    corpus, or each item of it, is one of
      * `"embedded"`: the US presidential messages of 1900-2026 in `recipes/data/`, in order of date;
      * a file, a folder or a glob pattern: `.txt`, `.txt.xz` and `.txt.gz` hold a document after each line
        `=== name ===` (without such lines, the file is one document); `.jsonl` holds one a line, in "text";
      * the name of a hub dataset, as `name` or `name:config`: the column "text" of its split "train".
    Raises ValueError with one line that names the item and the remedy.
    """
    return list(read_documents(corpus))


def read_documents(corpus: str | Sequence[str]) -> Iterator[Document]:
    """The documents of `load_documents`, file by file. Raises ValueError as that does."""
    found = False
    for item in [corpus] if isinstance(corpus, str) else corpus:
        files = _files(item)
        for document in hub_documents(item) if files is None else chain.from_iterable(starmap(_file_documents, files)):
            found = True
            yield document
    if not found:
        raise ValueError(f"the corpus {corpus!r} holds no text: name files with text in them, or 'embedded'")


def content_of(corpus: Sequence[str]) -> str:
    """The sha256 of all that the documents of a corpus follow from: names and contents of files, versions of datasets.

    Raises ValueError where there is no such file or dataset, or it cannot be read.
    """
    content = []
    for item in corpus:
        files = _files(item)
        if files is None:
            content.append((item, _load_hub_dataset(item)._fingerprint))
        for name, path in files or ():
            try:
                with open(path, "rb") as file:
                    content.append((name, hashlib.file_digest(file, "sha256").hexdigest()))
            except OSError as error:
                raise _unreadable(path, error) from None
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def facts_of_corpus(corpus: Sequence[str], streaming: bool = False) -> dict[str, str]:
    """What tells texts of one's own from others in the same files; nothing of the embedded ones, or of a stream.

    To know a stream's content is to download it.
    """
    return {} if streaming or list(corpus) == ["embedded"] else {"content": content_of(corpus)}


def hub_documents(name: str, column: str = "text", streaming: bool = False) -> Iterator[Document]:
    """The rows of a hub dataset's split "train" as documents; `streaming` downloads them as they are read.

    name: `name` or `name:config`. Raises ValueError when it cannot be loaded or has no such column.
    """
    for number, row in enumerate(_load_hub_dataset(name, streaming)):
        if column not in row:
            raise ValueError(f"{name!r} has no column {column!r}, only {sorted(row)}: rename one to {column!r}")
        text = row[column]
        if not isinstance(text, str | None):
            raise ValueError(
                f"column {column!r} of {name!r} holds {type(text).__name__}, not text: name another dataset"
            )
        if text and text.strip():
            yield Document(f"{name} {number}", text)


def _load_hub_dataset(name: str, streaming: bool = False) -> Any:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(f"{name!r} is no local file, and hub datasets need: pip install datasets") from None
    path, _, config = name.partition(":")
    if not _can_be_a_hub_name(path) and not os.path.exists(path):
        raise ValueError(f"there is no file or folder {name!r}: check the path, or use 'embedded'")
    try:
        return load_dataset(path, config or None, split="train", streaming=streaming)
    except Exception as error:  # whatever hub, network or builder raise; it comes in many types
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{name!r} is no local file, and the hub gave no such dataset ({type(error).__name__}: {reason}): "
            "name text files, a hub dataset that can be reached, or 'embedded'"
        ) from error


def split_documents(
    documents: Sequence[Document], held_out_fraction: float = 0.05, seed: int = 0
) -> tuple[list[Document], list[Document]]:
    """(train, held_out): whole documents, each in one of the two, in their order; neither is empty.

    Raises ValueError as `held_out_numbers` does.
    """
    chosen = held_out_numbers([document.name for document in documents], held_out_fraction, seed)
    train = [document for index, document in enumerate(documents) if index not in chosen]
    return train, [documents[index] for index in sorted(chosen)]


def held_out_numbers(names: Sequence[str], held_out_fraction: float = 0.05, seed: int = 0) -> set[int]:
    """Which of the documents with these names are held out.

    The documents are cut, in their order, into as many runs of equal length as documents are to be held out,
    and each run gives the one whose sha256 of seed and name is lowest. So the held-out messages of the embedded
    corpus, which is in order of date, spread over all its decades.
    Raises ValueError for a single document or a fraction outside (0, 1).
    """
    if not 0 < held_out_fraction < 1:
        raise ValueError(f"held_out_fraction must lie between 0 and 1, got {held_out_fraction}")
    total = len(names)
    if total < 2:
        raise ValueError(
            f"cannot hold out one of {total} document(s): give --validation_file, more files, "
            "or put a line `=== name ===` before each document"
        )
    runs = min(max(round(total * held_out_fraction), 1), total - 1)
    bounds = [run * total // runs for run in range(runs + 1)]

    def lot(index: int) -> bytes:
        return hashlib.sha256(f"{seed} {names[index]}".encode()).digest()

    return {min(range(start, end), key=lot) for start, end in pairwise(bounds)}


def _files(item: str) -> list[tuple[str, Path]] | None:
    """Name and path of the files of one item of a corpus; None for a hub dataset.

    A name is the path below the folder that the item names, or that its pattern searches: a corpus that is moved or
    copied holds out the same documents.
    """
    if item == "embedded":
        found = hashlib.sha256(EMBEDDED.read_bytes()).hexdigest() if EMBEDDED.is_file() else "no file"
        if found != EMBEDDED_SHA256:
            raise ValueError(
                f"{EMBEDDED} should have sha256 {EMBEDDED_SHA256}, found {found}: "
                "restore it with `git checkout` or recipes/data/make_corpus.py"
            )
        return [(EMBEDDED.name, EMBEDDED)]
    elif item and Path(item).is_dir():
        files = _files_in(item)
        if not files:
            raise ValueError(f"the folder {item!r} holds no {', '.join(SUFFIXES)} file: name another")
        return [(path.relative_to(item).as_posix(), path) for path in files]
    elif files := sorted(map(Path, glob.glob(item, recursive=True))) or ([Path(item)] * Path(item).is_file()):
        folder = next(parent for parent in Path(item).parents if parent.is_dir())
        return [(path.relative_to(folder).as_posix(), path) for path in files]
    elif Path(item).is_absolute() or item.startswith(".") or item.endswith(SUFFIXES) or glob.has_magic(item):
        raise ValueError(f"there is no file {item!r}: check the path, or use 'embedded'")
    return None


def _can_be_a_hub_name(path: str) -> bool:
    """Letters, digits, `-`, `_` and `.`, and at most one slash, inside."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path, re.ASCII) is not None and ".." not in path


def _files_in(folder: str) -> list[Path]:
    """The text files in a folder and its subfolders, none of which is passed over because it cannot be read."""

    def refuse(error: OSError) -> None:
        raise ValueError(f"cannot read the folder {error.filename!r} ({error.strerror}): check its permissions")

    found = (Path(root, name) for root, _, names in os.walk(folder, onerror=refuse) for name in names)
    return sorted(path for path in found if path.name.endswith(SUFFIXES))


def _file_documents(file_name: str, path: Path) -> Iterator[Document]:
    """The documents of one local file, which is read as UTF-8; those without a header go by the file's name."""
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"cannot read {str(path)!r}: give {', '.join(SUFFIXES)} files")
    try:
        with OPENERS[path.suffix](path, "rt", encoding="utf-8-sig") as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not UTF-8 at byte {error.start}: convert it, e.g. with iconv") from None
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise _unreadable(path, error) from None

    if path.suffix == ".jsonl":
        texts = [(f"{file_name}:{n}", _json_text(path, n, line)) for n, line in enumerate(text.split("\n"), 1) if line]
    else:
        before_any_header, *rest = HEADER.split(text)
        texts = [(file_name, before_any_header), *zip(rest[::2], rest[1::2], strict=True)]
    yield from (Document(name, text.strip()) for name, text in texts if text.strip())


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"cannot read {str(path)!r} ({error}): check the file and its permissions")


def _json_text(path: Path, number: int, line: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{number} is not JSON ({error}): give one object a line") from None
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise ValueError(f'{path}:{number} has no string "text": give lines like {{"text": "..."}}')
    return text
