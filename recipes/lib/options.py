"""The command lines of recipes: a suggestion for what is misspelt."""

from collections.abc import Sequence
from typing import Any

from transformers import HfArgumentParser

from hf_lamb.scaling import did_you_mean


def parse_options(parser: HfArgumentParser, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """The dataclasses of the parser. Raises ValueError, with the nearest name, for an option that there is not."""
    *parsed, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        word = unknown[0].partition("=")[0]
        known = [option for option in parser._option_string_actions if option.startswith("--")]
        raise ValueError(f"unknown option {word!r}{did_you_mean(word, known)}: --help lists all")
    return tuple(parsed)
