"""What a benchmark records of itself, and the newest of its records."""

import subprocess
from collections.abc import Sequence
from hashlib import sha256
from json import loads
from pathlib import Path
from typing import Any

from recipes.lib.report import provenance

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
CODE = ("hf_lamb", "recipes", "benchmarks", "tests")
Record = dict[str, Any]


def stamp() -> Record:
    """Time, command, commit, hardware and versions of this run."""
    return {**provenance(), "commit": revision()}


def revision(root: Path = ROOT) -> str:
    """The commit of this code; where files differ from it, or without git, a digest of the code too."""
    digest = sha256()
    for path in sorted(
        path for folder in CODE for suffix in ("*.py", "*.c") for path in (root / folder).rglob(suffix)
    ):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    code = f"code {digest.hexdigest()[:12]}"
    try:
        if Path(_git(root, "rev-parse", "--show-toplevel")) != root.resolve():
            return code  # a copy of the code inside another repository
        commit = _git(root, "rev-parse", "--short=12", "HEAD")
        changed = _git(root, "status", "--porcelain", "--", "*.py", "*.c")
    except (OSError, subprocess.SubprocessError):
        return code
    return f"{commit} with changes, {code}" if changed else commit


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True, timeout=60)
    return done.stdout.strip()


def recorded(path: Path) -> list[Record]:
    """The lines of a file of records; none where there is no file."""
    return [loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def newest(records: Sequence[Record], *keys: str) -> list[Record]:
    """Of the records that are alike in all these keys the last one, in the order in which the kinds appear."""
    last: dict[tuple[Any, ...], Record] = {}
    for record in sorted(records, key=lambda record: str(record["time"])):
        last[tuple(record.get(key) for key in keys)] = record
    return list(last.values())
