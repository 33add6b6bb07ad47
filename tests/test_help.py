"""Protects `--help`: that of every program ends well, does nothing else, and shows the defaults that hold."""

import re
import runpy
import sys
from pathlib import Path

import pytest

from recipes import pretrain_bert

ROOT = Path(__file__).parent.parent


def programs() -> list[str]:
    """Every module that runs with `python -m`; of tests/scripts those that read a command line of their own."""
    found = []
    for folder in ("recipes", "hf_lamb", "benchmarks", "tests/scripts"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            text = path.read_text()
            if '__name__ == "__main__"' in text and (
                folder != "tests/scripts" or any(reader in text for reader in ("ArgumentParser(", "no_options("))
            ):
                name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
                found.append(name.removesuffix(".__main__"))
    return found


def help_of(name: str, *arguments: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "argv", [name, *arguments, "--help"])
    for module in (name, f"{name}.__main__"):  # of which runpy would warn
        monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    assert stopped.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def test_the_programs_are_found() -> None:
    assert {"recipes.pretrain_bert", "hf_lamb.run", "hf_lamb.plan", "hf_lamb.sharpness"} <= set(programs())
    assert {"benchmarks.tables", "recipes.tables_in_docs", "tests.scripts.sharding_report"} <= set(programs())


@pytest.mark.parametrize("name", programs())
def test_help_ends_well_and_changes_nothing(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program without options must not take `--help` for a wish to start: some rewrite README."""
    monkeypatch.setattr(Path, "write_text", lambda *_, **__: pytest.fail("it has written a file"))
    assert "usage: " in help_of(name, capsys=capsys, monkeypatch=monkeypatch)


@pytest.mark.parametrize("arguments", [[], ["--size", "mini"], ["--size", "base", "--optim", "sgd"]], ids=" ".join)
def test_the_pretraining_shows_the_defaults_that_hold(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of this size and optimizer; its own options first; and what latest and auto are."""
    text = help_of("recipes.pretrain_bert", *arguments, capsys=capsys, monkeypatch=monkeypatch)
    recipe, args = pretrain_bert.parse(arguments)
    for option in (
        *("max_seq_length", "global_batch_size", "max_steps", "warmup_steps", "learning_rate", "output_dir"),
        *("per_device_train_batch_size", "per_device_eval_batch_size", "logging_steps", "save_total_limit", "use_cpu"),
    ):
        shown = (
            re.split(rf" --{option} (?:N|X|\[?{option.upper()})", text)[1].partition("(default: ")[2].partition(")")[0]
        )
        assert shown == str(getattr(recipe if hasattr(recipe, option) else args, option)), option
    assert text.index("--size ") < text.index("--carry_over ") < text.index("--output_dir ")
    explained = text.split(" --resume_from_checkpoint ")[1][:400]
    assert "'latest': the newest complete one in --output_dir; 'auto': the same, and a new run where" in explained
