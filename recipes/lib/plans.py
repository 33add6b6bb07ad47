"""Plans: YAML files with the options of a run in one or several phases, as `python -m hf_lamb.plan` writes them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hf_lamb.scaling import did_you_mean


def read_plan(path: str, known: Iterable[str]) -> list[list[str]]:
    """The command line of every phase: the options at the top of the file, then the phase's own.

    The file is a mapping of options, without the dashes, and the list `phases` of such mappings; without `phases` it
    is a run of one phase. known: the options that it may have.
    Raises ValueError where it is none, or names an option that is not known.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"--plan {path} cannot be read ({error.strerror}): `python -m hf_lamb.plan --output` writes one"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--plan {path} is no YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"--plan {path} holds no options: give lines like `max_steps: 1000`")
    phases = content.pop("phases", [{}])
    if not isinstance(phases, list) or not phases or not all(isinstance(phase, dict) for phase in phases):
        raise ValueError(f"--plan {path}: phases is no list: let each phase begin like `- max_steps: 1000`")
    known = list(known)
    for name in [name for options in (content, *phases) for name in options]:
        if name not in known:
            raise ValueError(f"--plan {path}: unknown option {name!r}{did_you_mean(str(name), known)}")
    return [_words(content | phase) for phase in phases]


def _words(options: dict[str, Any]) -> list[str]:
    """{"max_steps": 10, "corpus": ["a", "b"]} as --max_steps 10 --corpus a b."""
    words = []
    for name, value in options.items():
        words.append(f"--{name}")
        values = value if isinstance(value, list) else [value]
        words += [json.dumps(v) if isinstance(v, dict) else str(v) for v in values]
    return words
