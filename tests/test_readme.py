"""Protects README and the pages of docs/: what they show runs, and what they name exists.

`make docs` builds the site and checks the links between its pages.
"""

import json
import re
import shlex
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from transformers import HfArgumentParser, TrainingArguments

import hf_lamb
from benchmarks import scaling_model, tables
from docs.options import COMMANDS, options_page, parser_of
from hf_lamb import plan
from recipes import critical_batch, find_rate, pretrain_bert, tables_in_docs
from recipes.lib.bert import SIZES
from recipes.study.tables import filled
from tests.scripts import sharding_report
from tests.test_help import programs

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DOCS = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
PAGES = {"README.md": README, **DOCS}
SHELL = list(
    dict.fromkeys(
        re.sub(r"^hf-lamb (?=\w)", "python -m hf_lamb.", line.strip())
        for page in PAGES.values()
        for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
        for line in block.splitlines()
        if line.strip() and not line.startswith("#")
    )
)
ON_TOP = ("recipes.find_rate", "recipes.grow_batch")  # which take the pretraining's options, too
AFTER = {"sharpness.md": "complete_script.md"}  # pages whose snippets continue those of another page


def python_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", PAGES[page], re.DOTALL)


def lines_with(module: str) -> list[list[str]]:
    """The arguments of all command lines that run a module."""
    found = [shlex.split(line, comments=True) for line in SHELL if re.search(rf"-m {re.escape(module)}(?= |$)", line)]
    return [words[words.index(module) + 1 :] for words in found]


def test_readme_is_short_and_has_snippets() -> None:
    assert len(README.splitlines()) <= 200
    assert len(python_of("README.md")) >= 2
    assert len(SHELL) >= 40


@pytest.mark.parametrize("number", range(len(python_of("README.md"))))
def test_python_snippets_of_the_readme_run(number: int) -> None:
    """Each in a fresh interpreter."""
    snippet = python_of("README.md")[number]
    done = subprocess.run([sys.executable, "-c", snippet], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    if "print(" in snippet:
        assert done.stdout


@pytest.mark.parametrize("page", [page for page in DOCS if python_of(page)])
def test_python_snippets_of_a_page_run_in_their_order(
    page: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder where the run that the pages speak of has just been done, and with a few lines of text."""
    (tmp_path / "runs/pretrain_bert").mkdir(parents=True)
    for name in ("runs/pretrain_bert/tiny-lamb", "my_tokenizer"):
        (tmp_path / name).symlink_to(finished)
    (tmp_path / "texts.txt").write_text("The people of the United States have every reason to be thankful.\n" * 200)
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    for before in ([AFTER[page]] if page in AFTER else []) + [page]:
        for snippet in python_of(before):
            short = snippet.replace("max_steps=1000", "max_steps=2").replace("warmup_steps=100", "warmup_steps=1")
            exec(compile(short, before, "exec"), names)
    assert page != "complete_script.md" or (tmp_path / "out/model.safetensors").exists()


def test_the_complete_script_has_25_lines_of_code() -> None:
    (script,) = python_of("complete_script.md")
    assert len([line for line in script.splitlines() if line]) <= 25


@pytest.mark.parametrize("line", SHELL)
def test_what_a_command_line_names_exists(line: str) -> None:
    """Programs and their options, make's targets, extras: of every line of every page."""
    words = shlex.split(line, comments=True)
    if words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text()
    elif words[:2] == ["pip", "install"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert set(",".join(re.findall(r"\[(.*?)\]", line)).split(",")) <= {*extras, ""}
    elif "train.py" in words:  # the complete script, which its page has
        assert python_of("complete_script.md")
    elif words[0] in ("curl", "export", "tensorboard"):
        pass  # no program of ours
    else:
        module = next(word for option, word in pairwise(words) if option == "-m")
        assert find_spec(module) is not None
        given = words[words.index(module) + 1 :]
        if module == "hf_lamb.run":
            given = check_script(given)
        known = parser_of(module)._option_string_actions
        more = parser_of("recipes.pretrain_bert")._option_string_actions if module in ON_TOP else {}
        assert {word.partition("=")[0] for word in given if word.startswith("--")} <= {*known, *more}


def check_script(given: list[str]) -> list[str]:
    """The script and its arguments: TrainingArguments are valid. Returns those of hf_lamb.run itself."""
    start = next(i for i, word in enumerate(given) if word in ("-m",) or word.endswith(".py"))
    arguments = [word for word in given[start:] if not word.startswith("run_")]
    values = ["--output_dir", "out", *arguments[arguments.index("--optim") :]]
    args, *_ = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(values, return_remaining_strings=True)
    assert args.optim == "lamb"
    hf_lamb.options_of(args)
    return given[:start]


@pytest.mark.parametrize("arguments", lines_with("recipes.pretrain_bert"), ids=" ".join)
def test_recipe_lines_parse(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every value is accepted; the plans are there, or the line that writes them is."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrain_bert, "check_moments", lambda recipe: None)  # no checkpoint lies here
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    for writer in lines_with("hf_lamb.plan"):
        if "--output" in writer:
            plan.main(writer)
    for phase in pretrain_bert.parse_phases(arguments):
        per_device, accumulation = phase.args.per_device_train_batch_size, phase.args.gradient_accumulation_steps
        assert phase.args.batch_size_schedule or accumulation * per_device == phase.recipe.global_batch_size


@pytest.mark.parametrize("name", ["compare_optimizers", "lstm_mnist", "finetune"])
def test_lines_of_the_other_recipes_parse(name: str) -> None:
    """Every value is accepted."""
    recipe = import_module(f"recipes.{name}")
    arguments = [value for key, value in vars(recipe).items() if key.endswith("Arguments")]
    lines = lines_with(f"recipes.{name}")
    assert lines
    for words in lines:
        HfArgumentParser(arguments).parse_args_into_dataclasses(words)


def test_lines_of_find_rate_parse() -> None:
    lines = lines_with("recipes.find_rate")
    assert lines
    for words in lines:
        own, others = find_rate.search_parser().parse_args_into_dataclasses(words, return_remaining_strings=True)
        assert find_rate.options_of_trials(others, own.optimizers)[2].keys() == {"lamb", "adamw"}


def test_lines_of_critical_batch_parse(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = lines_with("recipes.critical_batch")
    assert lines
    for words in lines:
        monkeypatch.setattr(sys, "argv", ["critical_batch", *words])
        own, checkpoint = critical_batch.parse()
        assert checkpoint.startswith("runs/pretrain_bert/tiny-lamb")
        assert len(own.batches) >= 2


@pytest.mark.parametrize("arguments", [words for words in lines_with("hf_lamb.plan") if "--output" not in words])
def test_lines_of_plan_run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    plan.main(arguments)
    assert "steps" in capsys.readouterr().out


def test_the_configurations_of_accelerate_load_and_are_named() -> None:
    """As `accelerate launch --config_file` reads them; no unknown key."""
    named = set(re.findall(r"--config_file (\S+)", "\n".join(SHELL)))
    assert named == {str(path.relative_to(ROOT)) for path in ROOT.glob("recipes/configs/accelerate/*")}
    types = {Path(name).stem: load_config_from_file(str(ROOT / name)).distributed_type.value for name in named}
    zero = {f"deepspeed_zero{stage}": "DEEPSPEED" for stage in (1, 2, 3)}
    assert types == {"ddp": "MULTI_GPU", "ddp_8x8": "MULTI_GPU", "fsdp1": "FSDP", "fsdp2": "FSDP", **zero}


def test_make_targets_exist() -> None:
    """Those in sentences, too."""
    makefile = (ROOT / "Makefile").read_text()
    texts = [*PAGES.values(), (ROOT / "CONTRIBUTING.md").read_text()]
    named = {target for text in texts for target in re.findall(r"`make ([a-z-]+)", text)}
    assert named
    assert {target for target in named if f"\n{target}:" not in makefile} == set()


def test_local_links_of_the_readme_exist() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if not link.startswith("http")]
    assert links
    assert all((ROOT / link).exists() for link in links)


def test_every_page_of_how_it_works_has_the_same_headings() -> None:
    nav = (ROOT / "mkdocs.yml").read_text().split("  - How it works:\n")[1].split("\n  - ")[0]
    pages = re.findall(r": (\w+\.md)", nav)
    assert pages
    headings = ["What", "Use", "Requirements", "How it works", "Limits"]
    assert {page for page in pages if re.findall(r"^## (.*)$", DOCS[page], re.MULTILINE) != headings} == set()


def test_every_public_name_has_its_entry() -> None:
    """By name, or with all of its submodule."""
    entries = re.findall(r"^::: (\S+)$", "\n".join(p.read_text() for p in ROOT.glob("docs/api/*.md")), re.MULTILINE)
    submodules = [*re.findall(r"`hf_lamb\.(\w+)`", hf_lamb.__doc__), "sharpness.plots", "sharpness.checkpoints"]
    assert len(submodules) > 5
    named = {f"hf_lamb.{name}" for name in [*hf_lamb.__all__, *submodules]} - {"hf_lamb.__version__"}
    of_sharpness = {f"hf_lamb.{name}" for name in import_module("hf_lamb.sharpness").__all__}
    assert named - of_sharpness <= set(entries)


def test_every_program_has_its_page_of_options() -> None:
    """But for those that write what is committed."""
    users = {name for name in programs() if name.startswith(("hf_lamb.", "recipes."))}
    assert users - set(COMMANDS) == {"recipes.tables_in_docs", "recipes.data.make_corpus"}


def test_a_page_of_options_is_that_of_the_parser() -> None:
    """The recipe's own options come first, with the values that they take."""
    text = options_page("recipes.pretrain_bert")
    size = "| `--size` | `tiny` | The BERT of 2018 in a named size. One of `smoke`,"
    assert text.index(size) < text.index("| `--output_dir` |")
    assert "| `--decay_power` |  | Polynomial decay to 0" in text


def test_the_table_of_sizes_is_the_recipes() -> None:
    """Generated: `python -m tests.test_readme` prints it."""
    assert size_table() in DOCS["pretraining.md"]


def test_the_sharding_table_is_the_recorded_one() -> None:
    """Generated: `make sharding-report` measures and writes both."""
    records = [json.loads(line) for line in sharding_report.RESULTS.read_text().splitlines()]
    table = {sharding_report.MARKERS: sharding_report.table(records)}
    assert filled(DOCS["sharding.md"], table) == DOCS["sharding.md"]


@pytest.mark.parametrize("page", tables_in_docs.PAGES)
def test_the_tables_of_results_are_the_recorded_ones(page: str) -> None:
    """Generated: `python -m recipes.tables_in_docs` writes them."""
    text = (ROOT / page).read_text()
    assert filled(text, tables_in_docs.results_in(page)) == text


def test_the_tables_of_the_study_are_the_recorded_ones() -> None:
    """Generated: `python -m recipes.tables_in_docs` writes them, and the pictures that the page shows."""
    text = (ROOT / "docs/study.md").read_text()
    assert filled(text, tables_in_docs.studies()) == text
    assert all((ROOT / "docs" / name).exists() for name in re.findall(r"\]\((study_\S+\.png)\)", text))


@pytest.mark.parametrize("file", tables.TABLES)
def test_the_tables_of_benchmarks_are_the_recorded_ones(file: str) -> None:
    """Generated: `make bench` measures, `python -m benchmarks.tables` writes them."""
    text = (ROOT / file).read_text()
    assert filled(text, tables.tables_of(file)) == text


def test_the_table_of_predictions_is_the_models() -> None:
    """Generated: `python -m benchmarks.scaling_model` prints it."""
    assert scaling_model.table() in DOCS["scaling.md"]


@pytest.mark.parametrize("page", ["README.md", "index.md"])
@pytest.mark.parametrize("size", ["smoke", "tiny"])
def test_the_scores_of_make_first_and_make_pretrain_are_the_recorded_ones(page: str, size: str) -> None:
    runs = map(json.loads, (ROOT / "recipes/results/pretrain_bert.jsonl").read_text().splitlines())
    (run,) = (run for run in runs if run["size"] == size)
    loss, unigrams = run["held_out_loss"], run["unigram_loss"]
    numbers = [f"{number:.3f}" for number in (loss, unigrams, unigrams - loss)]
    numbers += [f"{run[accuracy]:.1%}" for accuracy in ("held_out_accuracy", "unigram_accuracy")]
    assert [number for number in numbers if number not in PAGES[page].replace(" %", "%")] == []


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
