"""The command lines of recipes: `--help` with the defaults that hold, and a suggestion for what is misspelt."""

import argparse
from collections.abc import Sequence
from typing import Any

from transformers import HfArgumentParser

from hf_lamb.scaling import near


def parse_options(parser: HfArgumentParser, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """The dataclasses of the parser. Raises ValueError, with the nearest name, for an option that there is not."""
    *parsed, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        word = unknown[0].partition("=")[0]
        known = [option for option in parser._option_string_actions if option.startswith("--")]
        raise ValueError(f"unknown option {word!r}{near(word, known)}: --help lists all")
    return tuple(parsed)


def no_options(description: str) -> None:
    """For programs that take none: `--help` says what they do, and does not do it."""
    argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
