"""The options of each command as a page, from its parser. `docs/hooks.py` puts the pages into the site."""

import runpy
import sys
import warnings
from argparse import SUPPRESS, Action, ArgumentParser
from enum import Enum
from unittest.mock import patch

COMMANDS = (
    *("hf_lamb.run", "hf_lamb.plan", "hf_lamb.conformance", "hf_lamb.sharpness"),
    *("recipes.pretrain_bert", "recipes.find_rate", "recipes.grow_batch", "recipes.critical_batch"),
    *("recipes.run_report", "recipes.accelerate_loop"),
    *("recipes.compare_optimizers", "recipes.finetune", "recipes.lstm_mnist", "recipes.sharp_minima"),
)


def uri_of(command: str) -> str:
    """The page of a command."""
    return f"options/{command.replace('.', '_')}.md"


class _Parser(Exception):
    """Carries a parser out of the program that made it."""


def parser_of(command: str) -> ArgumentParser:
    """The parser of a program: what `python -m command --help` would print."""

    def caught(parser: ArgumentParser, *_: object) -> None:
        raise _Parser(parser)

    with (
        patch.object(ArgumentParser, "print_help", caught),
        patch.object(sys, "argv", [command, "--help"]),
        warnings.catch_warnings(action="ignore", category=RuntimeWarning),  # the module may be imported already
    ):
        try:
            runpy.run_module(command, run_name="__main__", alter_sys=True)
        except _Parser as found:
            return found.args[0]
    raise ValueError(f"python -m {command} --help has printed no help")


def options_page(command: str) -> str:
    """What a program is for, and a table for each group of its options, in the order of its help."""
    parser = parser_of(command)
    lines = [f"# {command}", "", in_a_cell(parser.description or ""), "", f"    python -m {command} --help"]
    lines += [f"    {command.replace('hf_lamb.', 'hf-lamb ')} --help"] * command.startswith("hf_lamb.")
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.dest != "help" and action.help != SUPPRESS]
        if actions:
            title = group.title or "options"
            lines += ["", f"## {title[0].upper()}{title[1:]}", ""]
            lines += ["| option | default | what it does |", "| --- | --- | --- |", *map(row_of, actions)]
    if parser.epilog:  # the docstring's examples are indented, as Markdown's are
        words = parser.epilog.strip("\n").splitlines()
        lines += ["", *(line.rstrip() if line.startswith("    ") else in_a_cell(line) for line in words)]
    return "\n".join([*lines, ""])


def row_of(action: Action) -> str:
    """An option as a row of the table: how it is written, its default, what it does."""
    names = [name for name in action.option_strings if "-" not in name.lstrip("-")] or [action.metavar or action.dest]
    text = in_a_cell(action.help or "")
    if action.choices and action.nargs != 0:
        text += f" One of {', '.join(f'`{choice}`' for choice in map(plain, action.choices))}."
    default = "" if action.default in (None, SUPPRESS, []) or action.nargs == 0 else f"`{plain(action.default)}`"
    return f"| `{', '.join(map(str, names))}` | {default} | {text} |"


def plain(value: object) -> str:
    """A default as the command line has it."""
    if isinstance(value, Enum):
        return str(value.value)
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def in_a_cell(text: str) -> str:
    """Text that a table's cell takes as it is."""
    return " ".join(text.replace("%%", "%").split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
