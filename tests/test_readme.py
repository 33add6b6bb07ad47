"""Protects the README: what it shows runs, and what it names exists."""

import json
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from transformers import HfArgumentParser

from benchmarks import scaling_model, tables
from hf_lamb import plan
from recipes import find_rate, pretrain_bert, readme
from recipes.lib.bert import SIZES
from recipes.study.tables import filled
from tests.scripts import sharding_report

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SHELL = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines() if line]


def test_the_readme_has_snippets() -> None:
    assert len(PYTHON) >= 4
    assert len(SHELL) >= 8


@pytest.mark.parametrize("number", range(len(PYTHON)))
def test_python_snippets_run(number: int, finished: Path, tmp_path: Path) -> None:
    """Each in a fresh interpreter, in a folder where the run that the README speaks of has just been done."""
    (tmp_path / "runs/pretrain_bert").mkdir(parents=True)
    (tmp_path / "runs/pretrain_bert/tiny-lamb").symlink_to(finished)
    done = subprocess.run([sys.executable, "-c", PYTHON[number]], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    if "print(" in PYTHON[number]:
        assert done.stdout


@pytest.mark.parametrize("line", [line for line in SHELL if "recipes.pretrain_bert" in line])
def test_recipe_lines_parse(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every option exists and every value is accepted; the plans are there, or the line that writes them is."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    for writer in [line for line in SHELL if "hf_lamb.plan" in line and "--output" in line]:
        plan.main(shlex.split(writer)[3:])
    arguments = shlex.split(line, comments=True)
    arguments = arguments[arguments.index("recipes.pretrain_bert") + 1 :]
    for phase in pretrain_bert.parse_phases(arguments):
        per_device, accumulation = phase.args.per_device_train_batch_size, phase.args.gradient_accumulation_steps
        assert accumulation * per_device == phase.recipe.global_batch_size


def test_the_configurations_of_accelerate_load_and_are_named() -> None:
    """As `accelerate launch --config_file` reads them; no unknown key."""
    named = set(re.findall(r"--config_file (\S+)", README))
    assert named == {str(path.relative_to(ROOT)) for path in ROOT.glob("recipes/configs/accelerate/*")}
    types = {Path(name).stem: load_config_from_file(str(ROOT / name)).distributed_type.value for name in named}
    zero = {f"deepspeed_zero{stage}": "DEEPSPEED" for stage in (1, 2, 3)}
    assert types == {"ddp": "MULTI_GPU", "ddp_8x8": "MULTI_GPU", "fsdp1": "FSDP", "fsdp2": "FSDP", **zero}


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"\bmake ([a-z-]+)", README))
    assert named
    assert all(f"\n{target}:" in makefile for target in named)


def test_local_links_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links
    assert all((ROOT / link).exists() for link in links)


def test_the_table_of_sizes_is_the_recipes() -> None:
    """Generated: `python -m tests.test_readme` prints it."""
    assert size_table() in README


def test_the_sharding_table_is_the_recorded_one() -> None:
    """Generated: `make sharding-report` measures and writes both."""
    records = [json.loads(line) for line in sharding_report.RESULTS.read_text().splitlines()]
    assert filled(README, {sharding_report.MARKERS: sharding_report.table(records)}) == README


def test_the_tables_of_results_are_the_recorded_ones() -> None:
    """Generated: `python -m recipes.readme` writes them."""
    assert filled(README, readme.results()) == README


@pytest.mark.parametrize("name", ["compare_optimizers", "lstm_mnist", "finetune"])
def test_lines_of_the_other_recipes_parse(name: str) -> None:
    """Every option exists and every value is accepted."""
    recipe = import_module(f"recipes.{name}")
    arguments = [value for key, value in vars(recipe).items() if key.endswith("Arguments")]
    lines = [line for line in SHELL if f"-m recipes.{name} " in line]
    assert lines
    for line in lines:
        words = shlex.split(line, comments=True)
        HfArgumentParser(arguments).parse_args_into_dataclasses(words[words.index(f"recipes.{name}") + 1 :])


def test_lines_of_find_rate_parse() -> None:
    lines = [line for line in SHELL if "-m recipes.find_rate" in line]
    assert lines
    for line in lines:
        words = shlex.split(line, comments=True)
        words = words[words.index("recipes.find_rate") + 1 :]
        own, others = find_rate.search_parser().parse_args_into_dataclasses(words, return_remaining_strings=True)
        assert find_rate.options_of_trials(others, own.optimizers)[2].keys() == {"lamb", "adamw"}


@pytest.mark.parametrize("file", tables.TABLES)
def test_the_tables_of_benchmarks_are_the_recorded_ones(file: str) -> None:
    """Generated: `make bench` measures, `python -m benchmarks.tables` writes them."""
    text = (ROOT / file).read_text()
    assert filled(text, tables.tables_of(file)) == text


def test_the_table_of_predictions_is_the_models() -> None:
    """Generated: `python -m benchmarks.scaling_model` prints it."""
    assert scaling_model.table() in (ROOT / "docs/scaling.md").read_text()


def test_the_score_of_make_pretrain_is_the_recorded_one() -> None:
    (line,) = (ROOT / "recipes/results/pretrain_bert.jsonl").read_text().splitlines()
    run = json.loads(line)
    loss, unigrams = run["held_out_loss"], run["unigram_loss"]
    numbers = [f"{number:.3f}" for number in (loss, unigrams, unigrams - loss)]
    numbers += [f"{run[accuracy]:.1%}" for accuracy in ("held_out_accuracy", "unigram_accuracy")]
    assert [number for number in numbers if number not in README.replace(" %", "%")] == []


def size_table() -> str:
    rows = []
    for size, defaults in pretrain_bert.DEFAULTS.items():
        shape = SIZES[size]
        rows.append(
            f"| `{size}` | {shape['num_hidden_layers']} x {shape['hidden_size']} | {defaults['max_seq_length']} "
            f"| {defaults['global_batch_size']:,} | {defaults['max_steps']:,} | {defaults['learning_rate']:g} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    print(size_table())  # noqa: T201
