"""Protects what the benchmarks record: steady runs only, of this commit, beside the LAMBs that are installed; and that
tables show the newest record of each kind, the history all of them."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.axes import Axes

from benchmarks import bench_sharded_step, bench_step, peers, records, tables

RECORDS = records.recorded(records.RESULTS / "step.jsonl")


def params() -> list[torch.Tensor]:
    found = [torch.ones(4, 3), torch.ones(3)]
    for param in found:
        param.grad = torch.ones_like(param)
    return found


@pytest.fixture
def timm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A timm whose packages import a torchvision that does not fit, beside a file that needs torch alone."""
    (tmp_path / "timm/optim").mkdir(parents=True)
    (tmp_path / "timm-9.8.7.dist-info").mkdir()
    (tmp_path / "timm-9.8.7.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: timm\nVersion: 9.8.7\n")
    for package in ("timm", "timm/optim"):
        (tmp_path / package / "__init__.py").write_text("raise RuntimeError('torchvision does not fit')\n")
    (tmp_path / "timm/optim/_types.py").write_text("ParamsT = list\n")
    (tmp_path / "timm/optim/lamb.py").write_text(
        "import torch\nfrom ._types import ParamsT\n\n\nclass Lamb(torch.optim.AdamW):\n"
        "    def __init__(self, params: ParamsT, lr, weight_decay=0, max_grad_norm=1.0, foreach=False):\n"
        "        super().__init__(params, lr=lr, weight_decay=weight_decay, foreach=foreach)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


@pytest.fixture
def no_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda name: None)


# -- which optimizers -------------------------------------------------------------------------------------------------


def test_timm_is_compared_without_what_its_packages_import(timm: None) -> None:
    before = set(sys.modules)
    steps, versions = bench_step.candidates(params())
    assert {"timm Lamb", "timm Lamb foreach"} <= steps.keys()
    assert versions["timm"] == "9.8.7"
    assert not [name for name in set(sys.modules) - before if name.partition(".")[0] == "timm"]
    assert {"timm Lamb", "timm Lamb foreach"} <= bench_sharded_step.candidates().keys()


def test_without_timm_a_line_says_so(
    no_timm: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps, versions = bench_step.candidates(params())
    assert "timm" not in versions
    assert not [name for name in steps if "timm" in name]
    assert "timm Lamb is left out: No module named 'timm" in capsys.readouterr().out
    monkeypatch.setattr(bench_sharded_step.dist, "get_rank", lambda: 0)
    assert "hf_lamb" in bench_sharded_step.candidates()
    assert "timm Lamb is left out: No module named 'timm" in capsys.readouterr().out


# -- steady runs ------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set what the steps take: those of an optimizer in the first half of the rounds, in the second, by attempt."""
    attempts: list[tuple[float, float]] = []
    asked = {"rounds": 0}

    def rounds_of(calls: dict[str, Any], rounds: int, device: str) -> dict[str, list[float]]:
        first, second = attempts[min(asked["rounds"], len(attempts) - 1)]
        asked["rounds"] += 1
        half = rounds // 2
        return {name: [first] * half + [second] * (rounds - half) for name in calls}

    monkeypatch.setattr(bench_step, "rounds_of", rounds_of)
    monkeypatch.setattr(bench_step, "copied_bytes_per_second", lambda device, elements: 1e9)
    monkeypatch.setattr(bench_step, "SHAPES", {"two": lambda: [(4, 3), (3,)]})
    return lambda *halves: attempts.extend(halves)


def bench(monkeypatch: pytest.MonkeyPatch, path: Path, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_step", "--shapes", "two", "--output", str(path), *arguments])
    bench_step.main()


def test_an_unsteady_run_is_thrown_away_and_made_again(
    clock: Any, no_timm: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock((0.010, 0.0111), (0.020, 0.0219))
    bench(monkeypatch, tmp_path / "step.jsonl")
    (record,) = records.recorded(tmp_path / "step.jsonl")
    rows = record["steps"]
    assert {row["milliseconds_min"] for row in rows.values()} == {20.0}
    assert {bench_step.FUSED_ADAMW, bench_step.CLIPPED_ADAMW, bench_step.CLIPPED} <= rows.keys()
    assert record["commit"] == records.revision()
    assert record["time"]
    assert record["hardware"]
    assert record["rounds"] >= 11
    assert "attempt 1 of 5 is thrown away" in capsys.readouterr().out


def test_a_machine_that_stays_unsteady_leaves_no_record(
    clock: Any, no_timm: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock((0.010, 0.020))
    with pytest.raises(SystemExit) as stopped:
        bench(monkeypatch, tmp_path / "step.jsonl", "--attempts", "2")
    line = str(stopped.value.code)
    assert "\n" not in line
    assert all(words in line for words in ("nothing is recorded", "In 2 attempts", "10.000 and 20.000 ms", "quiet"))
    assert not (tmp_path / "step.jsonl").exists()


@pytest.mark.parametrize("arguments", [["--steps", "10"], ["--attempts", "0"]])
def test_too_few_steps_are_refused(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_step", "--output", str(tmp_path / "step.jsonl"), *arguments])
    with pytest.raises(SystemExit) as stopped:
        bench_step.main()
    assert stopped.value.code == 2
    assert f"{' '.join(arguments)}: give 1" in capsys.readouterr().err


def test_the_optimizers_take_turns() -> None:
    called: list[str] = []
    calls = {name: lambda name=name: called.append(name) for name in "abc"}
    seconds = bench_step.rounds_of(calls, 11, "cpu")
    assert "".join(called) == "abc" * 11
    assert [len(times) for times in seconds.values()] == [11] * 3


# -- the commit -------------------------------------------------------------------------------------------------------


def test_the_revision_tells_any_two_codes_apart(tmp_path: Path) -> None:
    """The commit where nothing was changed; what a run records is no change."""

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=A", "-c", "user.email=a@b.c"]
        command = ["git", *identity, *arguments]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()

    code, results = tmp_path / "hf_lamb/lamb.py", tmp_path / "benchmarks/results/step.jsonl"
    for path in (code, results):
        path.parent.mkdir(parents=True)
        path.write_text("a = 1\n")
    seen = [records.revision(tmp_path)]
    assert seen[0].startswith("code ")
    git("init", "--quiet")
    git("add", "--all")
    git("commit", "--quiet", "--message", "first")
    seen.append(records.revision(tmp_path))
    assert seen[1] == git("rev-parse", "--short=12", "HEAD")
    results.write_text("{}\n")
    assert records.revision(tmp_path) == seen[1]
    code.write_text("a = 2\n")
    seen.append(records.revision(tmp_path))
    assert seen[2].startswith(f"{seen[1]} with changes, code ")
    code.with_name("new.py").write_text("")
    seen.append(records.revision(tmp_path))
    assert len(set(seen)) == 4


# -- tables and pictures ----------------------------------------------------------------------------------------------


def later(record: dict[str, Any], **changed: Any) -> dict[str, Any]:
    copy = json.loads(json.dumps(record)) | {"time": "2099-01-02T03:04:05+00:00", "commit": "0123456789ab"} | changed
    for row in copy["steps"].values():
        row["ratio_of_minima"] = 77.0
    return copy


def test_the_table_shows_the_newest_of_each_kind() -> None:
    """Wherever it stands in the file; another machine has a table of its own."""
    kind = ("bert-base", "float32")
    (record, *_) = [record for record in RECORDS if (record["shapes"], record["dtype"]) == kind]
    before, after = tables.step_table(RECORDS), tables.step_table([later(record), *RECORDS])
    assert "77.00" not in before
    assert after.count("77.00") == len(record["steps"])
    assert "2099-01-02, 0123456789ab" in after
    assert after.count("bert-base, float32") == 1
    elsewhere = tables.step_table([*RECORDS, later(record, hardware="NVIDIA H100 x 1")])
    assert elsewhere.startswith(before)
    assert "\nNVIDIA H100 x 1:\n" in elsewhere


def test_the_history_has_a_point_for_each_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of another machine, and those that have no row without the look at the gradients."""
    bare = later(RECORDS[0])
    del bare["steps"]["hf_lamb fused, skip_nonfinite=False"]
    drawn: list[int] = []
    plot = Axes.plot

    def counted(axis: Axes, dates: Any, *arguments: Any, **style: Any) -> Any:
        drawn.append(len(dates))
        return plot(axis, dates, *arguments, **style)

    monkeypatch.setattr(Axes, "plot", counted)
    tables.draw_history([*RECORDS, bare, later(RECORDS[0], hardware="another")], tmp_path / "history.png")
    assert (tmp_path / "history.png").stat().st_size > 10_000
    assert sum(drawn) == 2 * (len(RECORDS) + 2) - 1
