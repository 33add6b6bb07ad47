"""Says which LAMB an optimizer is, where it departs first, and what it does in odd cases.

    hf-lamb conformance hf_lamb:Lamb --options "max_trust_ratio=10"       (or python -m hf_lamb.conformance)
    hf-lamb conformance timm.optim:Lamb
    hf-lamb conformance apex.optimizers:FusedLAMB --options "use_nvlamb=True" --device cuda

It needs no data and no GPU. docs/conformance.md has the results for the LAMBs that we know of.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from hf_lamb.command_line import Parser, fail
from hf_lamb.conformance import VARIANTS, examine
from hf_lamb.scaling import did_you_mean

_NAMES = {"true": True, "false": False, "none": None}


def main(argv: Sequence[str] | None = None, prog: str = "python -m hf_lamb.conformance") -> None:
    """Run the command line."""
    parser = Parser(prog, f"{(__doc__ or '').rstrip()}\nVariants: {', '.join(VARIANTS)}.")
    parser.add_argument("optimizer", metavar="MODULE:NAME", help="An optimizer class, or a function that makes one.")
    parser.add_argument("--options", default="", help='Its options, such as "lr=0.01, betas=(0.9, 0.99)".')
    parser.add_argument("--device", default="cpu", help="Where it runs.")
    args = parser.parse_args(argv)
    try:
        make, options = load(args.optimizer), parse_options(args.options)
        try:
            report = examine(make, options, args.device)
        except ValueError as error:
            raise ValueError(f"{args.optimizer} {args.options!r} cannot be examined: {error}") from None
    except ValueError as error:
        fail(parser.name, error)
    sys.stdout.write(report.table() + "\n")


def load(name: str) -> Any:
    """Import what MODULE:NAME names.

    Raises:
        ValueError: there is no such module, or it has no such name.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ValueError(f"{name!r}: write MODULE:NAME, such as hf_lamb:Lamb")
    sys.path.insert(0, "")  # as `python -m` does: a file in this folder
    try:
        found = importlib.import_module(module)
    except Exception as error:  # an import runs code of others
        raise ValueError(
            f"{name}: {module} cannot be imported ({type(error).__name__}: {error}): install it, or correct its name"
        ) from None
    finally:
        sys.path.remove("")
    if not callable(getattr(found, attribute, None)):
        known = [known for known in dir(found) if known[:1].isupper()]  # classes, also those that are imported lazily
        raise ValueError(f"{name}: {module} has no class {attribute!r}{did_you_mean(attribute, known)}")
    return getattr(found, attribute)


def parse_options(text: str) -> dict[str, Any]:
    """Parse "lr=0.01, betas=(0.9, 0.99), foreach=true": Python's values, and true, false, none.

    Raises:
        ValueError: the text is not a list of names and values.
    """
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        assert isinstance(call, ast.Call)
        if call.args or None in [keyword.arg for keyword in call.keywords]:
            raise ValueError
        return {str(keyword.arg): _value(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, AssertionError):
        raise ValueError(
            f'--options {text!r}: write names and values with commas between them, such as "lr=0.01, foreach=true"'
        ) from None


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Name) and node.id.lower() in _NAMES:
        return _NAMES[node.id.lower()]
    return ast.literal_eval(node)


if __name__ == "__main__":
    main()
