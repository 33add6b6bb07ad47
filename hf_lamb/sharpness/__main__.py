"""Compares the sharpness of the minima of two checkpoints; docs/sharpness.md explains each measure.

    hf-lamb sharpness SMALL LARGE --data train.txt --held_out held_out.txt     (or python -m hf_lamb.sharpness)

It prints a table, and leaves report.json, report.txt and pictures in the folder of the report.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from hf_lamb.command_line import Parser, fail
from hf_lamb.sharpness import compare, labels_loss, plots
from hf_lamb.sharpness.checkpoints import check_one_tokenizer, load_batches, load_model
from hf_lamb.sharpness.compare import recorded_history


def check_device(device: str) -> None:
    """Raise ValueError for a device that is not there."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter from a torch that was built without CUDA
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device {device} cannot be used ({reason}): give cpu, or one that is there") from None


def main(argv: Sequence[str] | None = None, prog: str = "python -m hf_lamb.sharpness") -> None:
    """Measure, print the table, write the report."""
    parser = parser_of(prog)
    options = parser.parse_args(argv)
    if not sys.stderr.isatty():
        transformers.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        plots.require_matplotlib()
        check_device(options.device)
        small, large = (load_model(path).to(options.device) for path in (options.small, options.large))
        # Both get the same batches, with the first checkpoint's tokenizer and masks: else the losses do not compare.
        sizes = options.rows, options.batch_size, options.max_length
        batches = load_batches(options.data, options.small, small, *sizes)
        held_out = load_batches(options.held_out, options.small, small, *sizes) if options.held_out else []
        if any(Path(data).suffix != ".pt" for data in (options.data, options.held_out) if data):
            check_one_tokenizer(options.small, options.large)
        comparison = compare(
            small,
            large,
            labels_loss,
            batches,
            held_out,
            names=(options.small_name, options.large_name),
            epsilon=options.epsilon,
            rho=options.rho,
            steps=options.steps,
            subspace=options.subspace,
            layers=options.layers,
            curvature=options.curvature,
            seed=options.seed,
            say=lambda line: sys.stderr.write(f"{line}\n"),
        )
        comparison.small.history = recorded_history(Path(options.small))
        comparison.large.history = recorded_history(Path(options.large))
        written = comparison.save(options.output_dir)
    except (ValueError, OSError) as error:
        fail(parser.name, error)
    sys.stdout.write(comparison.table() + "\n\n" + "\n".join(map(str, written)) + "\n")


def parser_of(prog: str) -> Parser:
    """Return the parser of the command line."""
    parser = Parser(prog, __doc__ or "")
    add = parser.add_argument
    add("small", help="Folder of the checkpoint trained with the small batch.")
    add("large", help="Folder of the checkpoint trained with the large batch.")
    add("--data", required=True, help="Training data: .txt, .jsonl (text, label), or .pt (a list of batches).")
    add("--held_out", help="Held-out data in the same form.")
    add("--rows", type=positive, default=512, help="Rows to measure on, taken evenly from the file.")
    add("--batch_size", type=positive, default=64, help="Rows at a time; changes only memory and rounding.")
    add("--max_length", type=positive, default=128, help="Tokens in a row.")
    add("--epsilon", type=float, default=1e-3, help="Of Keskar's box.")
    add("--rho", type=float, default=1e-2, help="Largest relative change of a weight.")
    add("--steps", type=positive, default=20, help="Steps of the ascent.")
    add("--subspace", type=positive, help="Also Keskar's sharpness in this many random directions.")
    add("--curvature", action="store_true", help="Also the largest eigenvalue and traces of the Hessian.")
    add("--no_layers", dest="layers", action="store_false", help="Leave out the sharpness of each layer.")
    add("--small_name", default="small batch", help="Name of the first checkpoint in the report.")
    add("--large_name", default="large batch", help="Name of the second checkpoint in the report.")
    add("--seed", type=int, default=0, help="Of the batches, the ascent and the directions.")
    add("--device", default=str(torch.accelerator.current_accelerator() or "cpu"), help="Where to compute.")
    add("--output_dir", default="sharpness_report", help="Where to write report.json, report.txt and pictures.")
    return parser


def positive(text: str) -> int:
    """Parse a whole number above zero."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number, at least 1")
    return int(text)


if __name__ == "__main__":
    main()
