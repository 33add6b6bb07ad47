"""python -m hf_lamb.sharpness SMALL LARGE --data FILE: compares the sharpness of two checkpoints."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from hf_lamb.sharpness import compare, labels_loss, plots
from hf_lamb.sharpness.checkpoints import check_one_tokenizer, load_batches, load_model
from hf_lamb.sharpness.compare import recorded_history


def main(argv: list[str] | None = None) -> None:
    """Measure, print the table, write the report."""
    options = parse(argv)
    try:
        plots.require_matplotlib()
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
        sys.exit(f"hf_lamb.sharpness: {' '.join(str(error).split())}")
    sys.stdout.write(comparison.table() + "\n\n" + "\n".join(map(str, written)) + "\n")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m hf_lamb.sharpness",
        description="Compare the sharpness of two checkpoints; docs/sharpness.md explains each measure.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("small", help="folder of the checkpoint trained with the small batch")
    add("large", help="folder of the checkpoint trained with the large batch")
    add("--data", required=True, help="training data: .txt, .jsonl (text, label), or .pt (a list of batches)")
    add("--held_out", help="held-out data in the same form")
    add("--rows", type=positive, default=512, help="rows to measure on, taken evenly from the file")
    add("--batch_size", type=positive, default=64, help="rows at a time; changes only memory and rounding")
    add("--max_length", type=positive, default=128, help="tokens in a row")
    add("--epsilon", type=float, default=1e-3, help="of Keskar's box")
    add("--rho", type=float, default=1e-2, help="largest relative change of a weight")
    add("--steps", type=positive, default=20, help="steps of the ascent")
    add("--subspace", type=positive, help="also Keskar's sharpness in this many random directions")
    add("--curvature", action="store_true", help="also the largest eigenvalue and traces of the Hessian")
    add("--no_layers", dest="layers", action="store_false", help="leave out the sharpness of each layer")
    add("--small_name", default="small batch", help="name of the first checkpoint in the report")
    add("--large_name", default="large batch", help="name of the second checkpoint in the report")
    add("--seed", type=int, default=0)
    add("--device", default=str(torch.accelerator.current_accelerator() or "cpu"), help="where to compute")
    add("--output_dir", default="sharpness_report", help="where to write report.json, report.txt and pictures")
    return parser.parse_args(argv)


def positive(text: str) -> int:
    """Parse a whole number above zero."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: expected a whole number, at least 1")
    return int(text)


if __name__ == "__main__":
    main()
