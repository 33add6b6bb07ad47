"""The form that all commands share: `--help`, and errors of one line.

An error is `NAME: what is wrong, the value: the remedy`. The exit status is 2 where the command line cannot be read
(an unknown option, a value of the wrong type, an argument that is missing), and 1 where it cannot be done.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from hf_lamb.scaling import did_you_mean

__all__ = ["Help", "Parser", "fail", "one_line", "stopped"]

MANY = 20  # values of an option, which are not listed when one of them is near

_WRONG_TYPE = {
    "invalid int value: '(.*)'": "a whole number",
    "invalid float value: '(.*)'": "a number",
    r"Truthy value expected: got (\S+) but.*": "true or false",  # HfArgumentParser's
}
_METAVARS: dict[Any, str] = {int: "N", float: "X"}


class Help(argparse.RawDescriptionHelpFormatter):
    """One spelling of each option, its default where it has one, and a usage without the options."""

    def add_usage(self, usage: str | None, actions: Iterable[argparse.Action], *more: Any, **named: Any) -> None:
        """With the names of the arguments only."""
        if usage is None:
            arguments = [str(action.metavar or action.dest) for action in actions if not action.option_strings]
            usage = " ".join(["%(prog)s [options]", *arguments])
        super().add_usage(usage, actions, *more, **named)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{_option(action)} {value}"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return _METAVARS.get(action.type) or super()._get_default_metavar_for_optional(action)

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if default in (None, argparse.SUPPRESS, "", []) or action.nargs == 0 or not action.option_strings:
            return text
        if isinstance(default, list | tuple):
            return f"{text} (default: {' '.join(map(str, default)).replace('%', '%%')})"
        return f"{text} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """Parses a command's options; its errors are one line that begins with the command's name.

    Args:
        prog: how the command is called, such as `python -m hf_lamb.plan`.
        doc: the docstring of its module. The first line is what the command does; the rest is shown after the options.
        **kwargs: those of `argparse.ArgumentParser`.
    """

    def __init__(self, prog: str, doc: str, **kwargs: Any) -> None:
        description, _, epilog = doc.partition("\n")
        kwargs.setdefault("formatter_class", Help)
        # --optim would mean --optimizers where a command passes options on, and a typing error would pass unseen.
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(prog=prog, description=description, epilog=epilog.strip("\n"), **kwargs)

    @property
    def name(self) -> str:
        """What errors begin with: the command without `python -m`."""
        return self.prog.removeprefix("python -m ").removeprefix("recipes.")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, and name the nearest option where one is unknown."""
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.refuse(unknown)
        return parsed

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """End because of words that are no options or arguments of this command."""
        word = unknown[0].partition("=")[0]
        if not word.startswith("-"):
            self.error(f"unexpected argument {word!r}")
        self.error(f"unknown option {word!r}{did_you_mean(word, map(_option, self._actions))}")

    def error(self, message: str) -> NoReturn:
        """End with one line and exit status 2."""
        message = re.sub(r"^argument (-[^/: ]+)(?:/[^: ]+)*: ", r"\1: ", message)
        for pattern, words in _WRONG_TYPE.items():
            message = re.sub(rf"^(\S+): {pattern}", rf"\1 '\2': expected {words}", message)
        if found := re.match(r"(\S+): invalid choice: (.*) \(choose from (.*)\)$", message):
            option, value, choices = found.groups()
            known = choices.replace("'", "").split(", ")
            hint = did_you_mean(value.strip("'"), known)
            message = f"{option} {value}{hint}"
            if not hint or len(known) < MANY:
                message += f": expected one of {', '.join(known)}"
        remedy = "" if ": expected" in message or ": write" in message else ": --help lists all options"
        self.exit(2, f"{self.name}: {one_line(message)}{remedy}\n")


def _option(action: argparse.Action) -> str:
    """The spelling of an option that is shown: with underscores, as in transformers."""
    return action.option_strings[0] if action.option_strings else ""


def one_line(error: BaseException | str) -> str:
    """The message of an error as one line."""
    return " ".join(str(error).split())


def fail(name: str, error: BaseException) -> NoReturn:
    """End with one line and exit status 1: what the command line asks for cannot be done."""
    sys.exit(f"{name}: {one_line(error)}")


def stopped(name: str, how_to_go_on: str) -> NoReturn:
    """End after Ctrl-C, with one line and exit status 130."""
    sys.stderr.write(f"\n{name}: interrupted: {how_to_go_on}\n")
    sys.exit(130)
