"""The commands of hf_lamb: LAMB for PyTorch, the Hugging Face Trainer and Accelerate.

    hf-lamb run script.py --optim lamb ...              run an unedited script, which then knows --optim lamb
    hf-lamb plan --plan nvidia-bert-large --gpus 8      published large-batch plans, on your devices
    hf-lamb sharpness SMALL LARGE --data text.txt       which of two checkpoints lies in the sharper minimum
    hf-lamb conformance timm.optim:Lamb                 which LAMB an optimizer is

`hf-lamb COMMAND --help` lists the options of a command. `python -m hf_lamb.COMMAND` is the same command, in the form
that `accelerate launch -m` and `torchrun -m` take. The recipes of the repository are `python -m recipes.NAME`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

from hf_lamb._version import __version__
from hf_lamb.command_line import Parser
from hf_lamb.scaling import did_you_mean

# The modules whose `main` takes the rest of the command line, and the name by which the command was called.
COMMANDS = {
    "run": "hf_lamb.run",
    "plan": "hf_lamb.plan",
    "sharpness": "hf_lamb.sharpness.__main__",
    "conformance": "hf_lamb.conformance.__main__",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command. Only its module is imported: `--help` and `--version` import neither torch nor transformers."""
    parser = Parser("hf-lamb", __doc__ or "", usage="hf-lamb COMMAND [options]")
    parser.add_argument("--version", action="version", version=f"hf_lamb {__version__}")
    parser.add_argument("command", metavar="COMMAND", nargs="?", help=f"One of {', '.join(COMMANDS)}.")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.command is None:
        parser.print_help(sys.stderr)
        sys.exit(2)
    if options.command not in COMMANDS:
        hint = did_you_mean(options.command, COMMANDS)
        parser.error(f"unknown command {options.command!r}{hint}: expected one of {', '.join(COMMANDS)}")
    if not sys.flags.safe_path:
        sys.path[0] = os.getcwd()  # as under `python -m`; a console script has its own folder there
    importlib.import_module(COMMANDS[options.command]).main(options.rest, f"hf-lamb {options.command}")


if __name__ == "__main__":
    main()
