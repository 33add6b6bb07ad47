"""Writes report.html, the page of a training run, into its folder: while it runs, after a crash, or at its end.

    python -m recipes.run_report runs/pretrain_bert/tiny-lamb

The folder is the output directory of recipes.pretrain_bert, of another script with LambTrainer, or of a stock Trainer,
with a checkpoint in it; or a checkpoint. The page says what went wrong, and shows what the run has logged. A plan of
several phases has a page for each.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

from hf_lamb.command_line import Parser, fail
from recipes.study.run_page import draw, read_run, run_of, write_run_page


def main() -> None:
    """Write the pages; print the findings and where the pages are."""
    parser = Parser("python -m recipes.run_report", __doc__)
    parser.add_argument("folder", type=Path, help="The output directory of a run, or a checkpoint.")
    folder = parser.parse_args().folder
    try:
        for part in sorted(folder.glob("phase-*")) or [folder]:
            for line in [*report(part), f"report: {part / 'report.html'}"]:
                print(line)
    except (ValueError, OSError) as error:
        fail(parser.name, error)


def report(folder: Path) -> list[str]:
    """Write the page of one run, and return the findings. Raises ValueError for a folder without a run."""
    state, record = read_run(folder)
    run, title = run_of(folder, state, record), folder.resolve().name
    with TemporaryDirectory() as drawn:
        return write_run_page(folder, run, record, draw(Path(drawn), run, title))


if __name__ == "__main__":
    main()
