"""Protects the commands' one form: hf-lamb and its commands, errors of one line, what is printed and where."""

import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import PrinterCallback, ProgressCallback, TrainerControl

from docs.options import COMMANDS, parser_of
from hf_lamb.__main__ import COMMANDS as OF_THE_PACKAGE
from hf_lamb.__main__ import main
from recipes import pretrain_bert
from recipes.lib import console
from recipes.study.sweep import Study
from tests.scripts.tiny_study import SEARCH, loss

# What a command cannot do without.
NEEDED = {"hf_lamb.conformance": ["a:b"], "hf_lamb.sharpness": ["a", "b", "--data", "c"]}
NEEDED |= {"recipes.critical_batch": ["checkpoint"]}


def console_script(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """hf-lamb as pip installs it: a script in another folder than the one where it is called."""
    script = folder / "bin/hf-lamb"
    script.parent.mkdir()
    script.write_text("import sys\nfrom hf_lamb.__main__ import main\nsys.exit(main())\n")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)


# ---- hf-lamb --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argument", ["--help", "--version", "plann", "plan"])
def test_it_answers_without_torch(argument: str) -> None:
    """In a tenth of a second where importing torch takes seconds; a command imports what it needs itself."""
    script = "import sys\nfrom hf_lamb.__main__ import main\ntry: main()\nexcept SystemExit: pass\n"
    script += "print(sorted({'torch', 'transformers', 'hf_lamb.run'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-c", script, argument], capture_output=True, text=True, timeout=200)
    assert done.stdout.endswith("[]\n"), done.stderr


@pytest.mark.parametrize("name", OF_THE_PACKAGE)
def test_each_command_has_its_line_and_its_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    assert f"    hf-lamb {name} " in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: hf-lamb {name} ")


def test_the_commands_are_those_of_the_package() -> None:
    assert {f"hf_lamb.{name}" for name in OF_THE_PACKAGE} == {name for name in COMMANDS if "hf_lamb." in name}


def test_without_a_command_it_shows_its_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2
    assert "hf-lamb conformance" in capsys.readouterr().err


def test_an_unknown_command_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["sharpnes", "a", "b"])
    assert stopped.value.code == 2
    wanted = "hf-lamb: unknown command 'sharpnes' (did you mean sharpness?): expected one of run, plan, sharpness, "
    assert capsys.readouterr().err == f"{wanted}conformance\n"


def test_run_finds_modules_where_it_is_called(tmp_path: Path) -> None:
    """As `python -m` does; options after the module's name are the module's."""
    (tmp_path / "mine.py").write_text("import sys; print(__name__, sys.argv[1:], sys.path[0])")
    done = console_script(tmp_path, "run", "-m", "mine", "--help", "--version")
    assert done.stdout == f"__main__ ['--help', '--version'] {tmp_path}\n", done.stderr


def test_an_error_names_the_command_as_it_was_called(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "--gpus", "many"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "hf-lamb plan: --gpus 'many': expected a whole number\n"
    with pytest.raises(SystemExit, match=r"^hf-lamb plan: unknown plan 'paper'"):
        main(["plan", "--plan", "paper"])


# ---- Errors and help of all commands --------------------------------------------------------------------------------


def refused(command: str, *arguments: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> str:
    """What a program writes that cannot read its command line: one line, and exit status 2."""
    monkeypatch.setattr(sys, "argv", [command, *arguments])
    for module in (command, f"{command}.__main__"):  # of which runpy would warn
        monkeypatch.delitem(sys.modules, module, raising=False)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(command, run_name="__main__", alter_sys=True)
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    name = command.removeprefix("recipes.")
    assert line.startswith(f"{name}: ")
    return line.removeprefix(f"{name}: ")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_line_that_cannot_be_read_gets_one_line(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An unknown option, and a value of the wrong type; no list of all options in front of it."""

    def line(*arguments: str) -> str:
        return refused(command, *NEEDED.get(command, []), *arguments, monkeypatch=monkeypatch, capsys=capsys)

    unknown = line("--optins", "3")
    assert unknown.startswith("unknown option '--optins'")
    assert unknown.endswith(": --help lists all options")
    actions = [action for action in parser_of(command)._actions if action.type is int and action.option_strings]
    for action in actions[:1]:
        option = action.option_strings[0]
        assert line(option, "many") == f"{option} 'many': expected a whole number"


def test_a_value_that_is_none_of_the_choices_gets_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the nearest choice; where there are many, they are not listed in addition."""
    given = {"monkeypatch": monkeypatch, "capsys": capsys}
    few = "--size 'smal': expected one of smoke, micro, tiny, mini, base, large"
    assert refused("recipes.accelerate_loop", "--size", "smal", **given) == few
    many = "--optim 'lamp' (did you mean lamb?): --help lists all options"
    assert refused("recipes.pretrain_bert", "--optim", "lamp", **given) == many
    wrong = "--streaming 'perhaps': expected true or false"
    assert refused("recipes.pretrain_bert", "--streaming", "perhaps", **given) == wrong


def test_help_has_one_spelling_and_no_default_that_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """The recipe's options, then LambTrainingArguments', then the 130 of transformers."""
    with pytest.raises(SystemExit):
        pretrain_bert.parse_phases(["--help"])
    text = capsys.readouterr().out
    assert text.startswith("usage: python -m recipes.pretrain_bert [options]\n")
    own, lambs, theirs = (text.index(f"\n  --{name} ") for name in ("size", "batch_size_schedule", "max_grad_norm"))
    assert own < lambs < theirs
    assert "--max-grad-norm" not in text
    assert "(default: None)" not in text
    assert "    python -m recipes.pretrain_bert --plan recipes/configs/" in text


# ---- What a run prints ----------------------------------------------------------------------------------------------


def test_a_checkpoint_leaves_no_bar_between_the_lines_of_the_log() -> None:
    """On a terminal, where the other libraries' bars are shown."""
    import datasets
    import huggingface_hub
    import transformers

    try:
        console.show_library_bars(True)
        assert not transformers.logging.is_progress_bar_enabled()
        assert datasets.are_progress_bars_disabled() is huggingface_hub.utils.are_progress_bars_disabled() is False
    finally:
        console.show_library_bars(False)


def test_lines_of_the_log_begin_with_their_step(capsys: pytest.CaptureFixture[str]) -> None:
    """The evaluation that follows the last step is not said again, nor what nobody acts on."""
    lines, state = console.StepLines(), SimpleNamespace(global_step=10, max_steps=2400, is_world_process_zero=True)
    evaluated = {"eval_loss": 8.5, "eval_runtime": 2.0, "eval_steps_per_second": 3.0, "epoch": 0.5}
    for logs in ({"loss": 9.0, "learning_rate": 1e-3, "epoch": 0.5}, evaluated, {"train_loss": 1.0}, evaluated):
        lines.on_log(None, state, TrainerControl(), dict(logs))
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "step 10 of 2,400: loss 9, learning_rate 0.001, epoch 0.5"
    assert said[1:] == ["step 10 of 2,400: eval_loss 8.5, epoch 0.5"]


@pytest.mark.parametrize("theirs", [PrinterCallback, ProgressCallback])
def test_trainers_own_lines_are_replaced_and_its_bar_stays(theirs: type) -> None:
    from transformers.trainer_callback import CallbackHandler

    handler = CallbackHandler([theirs()], None, None, None, None)
    console.print_steps(handler)
    kinds = [type(callback) for callback in handler.callbacks]
    assert kinds == [console.Bar] * (theirs is ProgressCallback) + [console.StepLines]


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_are_for_terminals_unless_one_says_otherwise(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    assert pretrain_bert.parse([])[1].disable_tqdm is not terminal
    for given in (True, False):
        assert pretrain_bert.parse(["--disable_tqdm", str(given)])[1].disable_tqdm is given


def test_a_run_in_a_log_has_no_bars_and_its_steps(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is said from the first line to the last, where stderr is no terminal; the commands exist."""
    from tests.helpers import SMALL, pretrain

    output = tmp_path / "out"
    pretrain(monkeypatch, *SMALL, "--corpus", str(texts), "--output_dir", str(output), "--logging_steps", "4")
    said = capsys.readouterr()
    assert said.err == ""
    assert "\r" not in said.out
    steps = [line for line in said.out.splitlines() if "loss " in line and "nats" not in line]
    assert [line.partition(":")[0] for line in steps] == ["step 4 of 8"] * 2 + ["step 8 of 8"] * 2
    *_, curves, guess, larger = said.out.splitlines()
    assert curves.startswith("next: see the curves ")
    assert (output / "report.html").as_uri() in curves
    assert larger.split()[-2:] == ["make", "pretrain"]
    code = shlex.split(guess[guess.index("python -c") :])[2]
    exec(code)
    assert "token_str" in capsys.readouterr().out


def test_the_next_commands_exist() -> None:
    """Programs and options, after a run of any size but the smallest."""
    tokenizer = type("Tokenizer", (), {"mask_token": "[MASK]", "__len__": lambda self: 1000})()
    commands = pretrain_bert.next_commands({"held_out_loss": 5.0, "size": "tiny"}, "an output", tokenizer)
    make, target, arguments = shlex.split(commands["fine-tune it"])
    assert (make, target, arguments) == ("make", "finetune", "ARGS=--model 'an output'")
    assert "recipes.finetune --use_cpu True $(ARGS)\n" in Path(__file__).parent.with_name("Makefile").read_text()
    for module, words in (
        ("recipes.finetune", shlex.split(arguments.removeprefix("ARGS="))),
        ("recipes.pretrain_bert", shlex.split(commands["train it on"])[3:]),
    ):
        assert {word for word in words if word.startswith("--")} <= set(parser_of(module)._option_string_actions)
        assert words[1] == "an output"


def test_a_study_in_a_log_says_a_line_for_each_trial(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And no bar, unless stderr is a terminal."""
    records = Study(tmp_path, SEARCH, {}).run(lambda trial, say: {"objective": loss(trial)})
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(records)
    assert lines[-1].startswith(f"trial {len(records)} of {len(records)}: ")
    assert lines[0].endswith(f": {records[0]['objective']:.4g}")


def test_the_next_commands_stand_below_each_other() -> None:
    said = console.what_next({"try it": "python -c 1", "look": "python -m webbrowser x"})
    assert said == "next: try it  python -c 1\n      look    python -m webbrowser x"
    page = console.command_to_open(Path("a folder/report.html"))
    assert shlex.split(page)[:3] == ["python", "-m", "webbrowser"]
    assert page.endswith("/a%20folder/report.html")


def test_a_run_that_diverged_is_followed_by_a_search_for_a_rate() -> None:
    """Of the same model and corpus."""
    record: dict[str, Any] = {"held_out_loss": float("nan"), "max_seq_length": 64, "corpus": ["embedded"], "model": {}}
    tokenizer = type("Tokenizer", (), {"mask_token": "[MASK]", "__len__": lambda self: 1000})()
    _, rate = pretrain_bert.next_commands(record | {"size": "mini"}, "out", tokenizer).values()
    assert rate == "python -m recipes.find_rate --size mini"
    record |= {"size": None, "model": {"parameters": 1, "model_type": "roberta"}, "corpus": ["my texts", "b.txt"]}
    _, rate = pretrain_bert.next_commands(record, "out", tokenizer).values()
    assert rate == ("python -m recipes.find_rate --model_type roberta --max_seq_length 64 --corpus 'my texts' b.txt")
