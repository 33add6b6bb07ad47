"""The options of a recipe: from the command line and from a plan's file."""

import argparse
import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from hf_lamb.command_line import Help, Parser
from hf_lamb.scaling import did_you_mean


def words_of(options: Mapping[str, Any]) -> list[str]:
    """The words of the command line that give these options."""
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


class RecipeParser(HfArgumentParser, Parser):
    """The parser of a recipe's dataclasses.

    recipe: the recipe's name. doc: its docstring. **kwargs: those of `argparse.ArgumentParser`.
    """

    def __init__(self, dataclass_types: Any, recipe: str, doc: str, **kwargs: Any) -> None:
        super().__init__(dataclass_types, prog=f"python -m recipes.{recipe}", doc=doc, formatter_class=Help, **kwargs)


def parser_beside_pretraining(own: Any, recipe: str, doc: str) -> RecipeParser:
    """The parser of a recipe's own options, which leaves those of recipes.pretrain_bert alone."""
    return RecipeParser(
        own,
        recipe,
        f"{doc.rstrip()}\nAll other options are those of recipes.pretrain_bert: see its --help.",
    )


def parse_options(parser: RecipeParser, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """The dataclasses of the parser, which ends the program where the command line cannot be read."""
    *parsed, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        parser.refuse(unknown)
    return tuple(parsed)


def checked_options(parser: RecipeParser, options: Mapping[str, Any], excluded: Collection[str]) -> dict[str, Any]:
    """The options of a plan in the types that the parser gives them.

    Raises ValueError for an option that there is not, or is excluded, and for a value that it does not take.
    """
    known = {action.dest for action in parser._actions} - {"help", *excluded}
    for name in options:
        if name not in known:
            raise ValueError(f"unknown option {name!r}{did_you_mean(str(name), known)}")
    return {name: _value(parser._option_string_actions[f"--{name}"], given) for name, given in options.items()}


def _value(action: argparse.Action, given: Any) -> Any:
    """One option's value. A number may be text, as YAML's 1e-3 is; a list may be given as its only item."""
    values, several = given if isinstance(given, list) else [given], action.nargs == "+"
    if None in values or not values or (len(values) > 1 and not several):
        raise ValueError(f"{action.dest} {given!r}: give {'one value or more' if several else 'one value'}")
    convert: Any = action.type
    try:
        # A mapping as JSON, which TrainingArguments reads.
        typed = [convert(json.dumps(value) if isinstance(value, dict) else str(value)) for value in values]
    except (ValueError, TypeError, argparse.ArgumentTypeError):
        kind = {string_to_bool: "true or false"}.get(convert, f"a value of type {convert.__name__}")
        raise ValueError(f"{action.dest} {given!r}: expected {kind}") from None
    if action.choices is not None and any(value not in action.choices for value in typed):
        raise ValueError(f"{action.dest} {given!r}: expected one of {', '.join(map(repr, action.choices))}")
    return typed if several else typed[0]
