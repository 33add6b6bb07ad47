"""Protects `make gpu-proof`, for which there is no GPU here.

All of it runs at toy sizes on a CPU, with only the packages that the machine with the GPU has. If a part fails or
hangs, the others run. What is done is not done again.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_proof
from benchmarks.gpu_tables import NOT_RUN, gpu_report
from benchmarks.records import RESULTS, recorded
from tests.helpers import says

ROOT = Path(__file__).parent.parent
# Makes a Python that finds only what such a machine has.
HIDDEN = """
import sys
from importlib.machinery import PathFinder

class Fewer:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] not in {
            "datasets", "evaluate", "matplotlib", "pandas", "peft", "scipy", "sklearn", "tensorboard"
        }:
            return PathFinder.find_spec(name, path, target)

    @staticmethod
    def find_distributions(*arguments, **options):
        return PathFinder.find_distributions(*arguments, **options)

sys.meta_path = [Fewer if finder is PathFinder else finder for finder in sys.meta_path]
"""


# -- all of it --------------------------------------------------------------------------------------------------------


def dry(folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "sitecustomize.py").write_text(HIDDEN)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.gpu_proof", "--dry", "--output", str(folder)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=700)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_of_it_runs_and_is_reported(tmp_path: Path) -> None:
    before = recorded(RESULTS / "gpu.jsonl")
    done = dry(tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = recorded(tmp_path / "gpu.jsonl")
    ends = [line for line in lines if line["part"].startswith("end of ")]
    assert [line["part"] for line in ends] == [f"end of {name}" for name in gpu_proof.PARTS]
    assert all(line["ok"] and line["seconds"] > 0 for line in ends)
    steps = [line for line in lines if line["part"] == "steps"]
    kinds = {(line["shapes"], line["dtype"]) for line in steps}
    shapes = ("bert-base", "bert-large", "many-small", "one-huge")
    assert kinds == {(name, dtype) for name in shapes for dtype in ("float32", "bfloat16")}
    for line in lines:
        assert line["dry"]
        assert line["commit"]
        assert line["hardware"]
        assert line["versions"]["torch"] == torch.__version__
        assert str(tmp_path) not in line["command"]
    assert recorded(RESULTS / "gpu.jsonl") == before

    assert gpu_report(lines) == NOT_RUN
    report = gpu_report([line | {"dry": False, "hardware": "A GPU x 1"} for line in lines])
    assert report.startswith("## A GPU x 1")
    for words in ("many-small, bfloat16", "launches", "same bits", "FSDP2", "tokens a second", "| recipe | done |"):
        assert words in report

    again = dry(tmp_path)
    assert again.returncode == 0, again.stderr[-3000:]
    assert again.stdout.count("recorded before") == len(gpu_proof.PARTS)
    assert recorded(tmp_path / "gpu.jsonl") == lines


# -- what goes wrong --------------------------------------------------------------------------------------------------


def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scripts: dict[str, str], limit: int = 60
) -> tuple[str | int | None, list[dict[str, Any]]]:
    """The program with these Python scripts as its parts: its exit code, and the lines that it adds."""

    def command_of(name: str, proof: gpu_proof.Proof) -> list[str]:
        return [sys.executable, "-c", scripts[name]]

    monkeypatch.setattr(gpu_proof, "command_of", command_of)
    monkeypatch.setattr(gpu_proof, "PATIENCE", 1)
    monkeypatch.setattr(gpu_proof, "PARTS", dict.fromkeys(scripts, gpu_proof.Part(gpu_proof.exact, limit)))
    monkeypatch.setattr(sys, "argv", ["gpu_proof", "--dry", "--output", str(tmp_path)])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", ""))  # which main sets
    before = len(recorded(tmp_path / "gpu.jsonl"))
    code = None
    try:
        gpu_proof.main()
    except SystemExit as stopped:
        code = stopped.code
    return code, recorded(tmp_path / "gpu.jsonl")[before:]


def test_a_part_that_fails_is_recorded_and_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its last line; the others still run, and those that are done are not run again."""
    good, bad = "print('all right')", "raise RuntimeError('no such kernel')"
    code, lines = run(tmp_path, monkeypatch, {"first": bad, "second": good})
    says(str(code), "failed: first; the same command runs these again")
    assert [(line["part"], line["ok"]) for line in lines] == [("end of first", False), ("end of second", True)]
    assert lines[0]["last_line"] == "RuntimeError: no such kernel"
    code, lines = run(tmp_path, monkeypatch, {"first": good, "second": bad})
    assert code is None
    assert [(line["part"], line["ok"]) for line in lines] == [("end of first", True)]


def test_a_part_that_hangs_is_killed_with_what_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it started holds its output open: this test would not end."""
    hangs = "import subprocess, sys; subprocess.run([sys.executable, '-c', {0!r}])"
    scripts = {"first": hangs.format("import time; time.sleep(1000)"), "second": "print(1)"}
    code, lines = run(tmp_path, monkeypatch, scripts, limit=3)
    assert "failed: first" in str(code)
    assert lines[0]["last_line"].startswith("killed after 3 seconds; its last line: ")
    assert lines[1]["ok"]


def test_another_commit_is_measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripts = {"first": "print('all right')"}
    assert len(run(tmp_path, monkeypatch, scripts)[1]) == 1
    assert run(tmp_path, monkeypatch, scripts)[1] == []
    monkeypatch.setattr("benchmarks.records.revision", lambda: "another commit")
    assert len(run(tmp_path, monkeypatch, scripts)[1]) == 1


def test_a_bit_that_differs_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And recorded."""

    def train(proof: gpu_proof.Proof, dtype: torch.dtype, captured: bool = False) -> list[torch.Tensor]:
        return [torch.tensor([1.0, 2.0 + 1e-6 * captured])]

    monkeypatch.setattr(gpu_proof, "train", train)
    with pytest.raises(RuntimeError, match="'capture_equals_eager': False"):
        gpu_proof.exact(gpu_proof.Proof(tmp_path / "gpu.jsonl", dry=True))
    (record,) = recorded(tmp_path / "gpu.jsonl")
    assert (record["same_bits_twice"], record["capture_equals_eager"]) == (True, False)


def test_without_pytest_the_part_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nexec {sys.executable} -c \"raise SystemExit('No module named pytest')\"\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(RuntimeError, match="pytest ended with exit code 1: No module named pytest"):
        gpu_proof.tests(gpu_proof.Proof(tmp_path / "gpu.jsonl", dry=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_one_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_proof"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # which main sets
    with pytest.raises(SystemExit) as stopped:
        gpu_proof.main()
    says(str(stopped.value.code), "no CUDA device here: --dry runs everything at toy sizes on a CPU")


def test_all_parts_together_take_at_most_eight_minutes() -> None:
    assert sum(part.limit for part in gpu_proof.PARTS.values()) <= 480


# -- the report -------------------------------------------------------------------------------------------------------


def line(**values: Any) -> dict[str, Any]:
    known = {"dry": False, "hardware": "A GPU x 1", "time": "2026-01-02T03:04:05+00:00", "commit": "0123456789ab"}
    versions = dict.fromkeys(("python", "torch", "cuda", "triton", "transformers", "accelerate"), "1.2")
    return known | {"versions": versions} | values


def test_the_report_of_no_gpu_says_so() -> None:
    """Nor does a dry run count as one."""
    assert gpu_report([]) == NOT_RUN
    assert gpu_report([line(part="end of exact", ok=True, seconds=1.0, dry=True)]) == NOT_RUN


def test_the_report_has_failures_until_they_are_mended() -> None:
    failed = line(part="end of exact", ok=False, seconds=35.0, last_line="killed | after 35 seconds")
    text = gpu_report([failed])
    assert "| exact | failed: killed / after 35 seconds | 35 | 2026-01-02, 0123456789ab |" in text
    mended = line(part="end of exact", ok=True, seconds=20.0, time="2026-01-02T04:00:00+00:00")
    exact = line(part="exact", dtype="float32", same_bits_twice=True, capture_equals_eager=False)
    text = gpu_report([failed, exact, mended])
    assert "failed" not in text
    assert "| float32 | yes | no |" in text


def test_machines_have_sections_of_their_own() -> None:
    text = gpu_report([line(part="end of exact", ok=True, seconds=1.0, hardware=name) for name in ("One", "Two")])
    assert re.findall("^## (.*)$", text, re.MULTILINE) == ["One", "Two"]
