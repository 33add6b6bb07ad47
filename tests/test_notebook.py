"""Protects the notebook: every cell runs, what is committed came from a run, and its numbers are those in the text."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from docs.notebook import page_of

NOTEBOOK = Path(__file__).parent.parent / "notebooks/large_batch.ipynb"
CELLS = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
PRINTED = "".join("".join(output.get("text", [])) for cell in CODE for output in cell["outputs"])


def test_every_cell_runs() -> None:
    """In a fresh interpreter, in their order, as Jupyter does; with a few steps."""
    cells = ["".join(cell["source"]) for cell in CODE]
    short = "\n".join(cells).replace("STEPS = {SMALL: 768, LARGE: 192}", "STEPS = {SMALL: 8, LARGE: 8}")
    assert short.count("LARGE: 8}") == 1
    script = f"import matplotlib\nmatplotlib.use('Agg')\n{short}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=NOTEBOOK.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "lamb, batch 256, 8 steps: learning rate 0.04 = 0.01 * sqrt(256 / 16)" in done.stdout
    assert "critical batch about" in done.stdout


def test_what_is_committed_came_from_one_run() -> None:
    """From top to bottom, without an error or a warning, with its pictures; small enough for a clone."""
    assert [cell["execution_count"] for cell in CODE] == list(range(1, len(CODE) + 1))
    outputs = [output for cell in CODE for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "display_data"}
    assert {output["name"] for output in outputs if "name" in output} == {"stdout"}
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 3
    assert NOTEBOOK.stat().st_size <= 300_000


def test_the_numbers_of_the_text_are_those_of_the_run() -> None:
    text = "".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "markdown")
    losses = set(re.findall(r"\b5\.\d{3}\b", text))
    assert len(losses) == 4
    assert {loss for loss in losses if f"{loss} nats" not in PRINTED} == set()


@pytest.mark.parametrize("number", range(len(CELLS)))
def test_the_page_of_the_site_has_every_cell(number: int) -> None:
    page, cell = page_of(NOTEBOOK), CELLS[number]
    assert "".join(cell["source"]).replace("](../docs/", "](") in page
    for output in cell.get("outputs", []):
        assert "".join(output.get("data", {}).get("image/png", output.get("text", []))).strip() in page
