"""`python -m hf_lamb.run`: scripts that nobody edited run as under plain `python`, and have "lamb"."""

import json
import math
import multiprocessing.spawn
import os
import signal
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

import hf_lamb
from hf_lamb import run
from tests.helpers import says

ROOT = Path(hf_lamb.__file__).parents[1]
SCRIPTS = Path(__file__).parent / "scripts"


def execute(*arguments: object, cwd: Path, package: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run this Python with these arguments; hf_lamb is importable, from `package`, wherever it runs."""
    paths = [str(package), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"},
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )


# ---- As under plain python ------------------------------------------------------------------------------------------

FILES = {
    # Everything that a script can see of how it was started. `neighbour` is found through sys.path[0].
    "scripts/facts.py": """
        import atexit, inspect, json, multiprocessing, os, pickle, sys
        import neighbour

        class Thing:
            pass

        def where(queue):
            queue.put([Thing.__module__, __name__, sys.argv])

        def leave():
            print("leaving:", type(pickle.loads(pickle.dumps(Thing()))) is Thing)

        if __name__ == "__main__":
            atexit.register(leave)
            context = multiprocessing.get_context("spawn")
            queue = context.Queue()
            process = context.Process(target=where, args=(queue,))
            process.start()
            print("spawned:", queue.get(timeout=60), process.join())
            print("argv:", sys.argv, "path:", sys.path[0], "cwd:", os.getcwd())
            print("main:", sys.modules["__main__"].__dict__ is globals(), pickle.dumps(Thing))
            names = ("__name__", "__file__", "__package__", "__spec__", "__cached__", "__doc__", "__builtins__")
            print({name: globals()[name] for name in names}, type(__loader__).__name__)
            print(inspect.getsource(where))
    """,
    "scripts/neighbour.py": "",
    "scripts/seen.py": "import sys, neighbour; print(__file__, sys.argv, sys.path[0])",
    "exit.py": "import sys; print('working', flush=True); sys.exit(eval(sys.argv[1]))",
    "fail.py": """
        def inner():
            return {}["key"]

        def outer():
            try:
                inner()
            except KeyError as error:
                raise RuntimeError("it failed") from error

        outer()
    """,
    "hook.py": """
        import sys, traceback

        def show(kind, value, frames):
            print(kind, value, len(traceback.extract_tb(frames)), value.__traceback__ is frames)

        sys.excepthook = show
        1 / 0
    """,
    "syntax.py": "x = = 1",
    "interrupt.py": "raise KeyboardInterrupt",
    "options.py": """
        import argparse
        parser = argparse.ArgumentParser()
        parser.add_argument("--optim", help="name")
        print(parser.parse_args())
    """,
    "package/__init__.py": "print('package')",
    "package/__main__.py": "from . import module",
    "package/module.py": """
        import sys
        from .part import value
        print(value, __name__, __package__, __spec__.name, __file__, sys.argv, sys.path[0])
        if sys.argv[1:] == ["fail"]:
            raise RuntimeError("it failed")
    """,
    "package/part.py": "value = 'part'",
    "folder/__main__.py": "import sys, beside; print(__name__, __package__, __file__, sys.argv, sys.path[0])",
    "folder/beside.py": "",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("files")
    for name, source in FILES.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(textwrap.dedent(source))
    (root / "link.py").symlink_to("scripts/seen.py")
    with zipfile.ZipFile(root / "folder.zip", "w") as archive:
        for path in (root / "folder").iterdir():
            archive.write(path, path.name)
    return root


def compare(arguments: list[str], files: Path) -> subprocess.CompletedProcess[str]:
    """Run plain and launched: same exit code, same output, and same errors, so no frame of the launcher shows."""
    plain = execute(*arguments, cwd=files)
    launched = execute("-m", "hf_lamb.run", *arguments, cwd=files)
    expected = plain.stderr
    if "frozen runpy" in expected:  # `python -m` itself shows frames of runpy before the script's first
        frames = expected.splitlines(keepends=True)
        first = next(i for i, line in enumerate(frames) if line.startswith("  File") and "runpy" not in line)
        expected = "".join([frames[0], *frames[first:]])
    assert (launched.returncode, launched.stdout, launched.stderr) == (plain.returncode, plain.stdout, expected)
    assert "hf_lamb" not in launched.stdout + launched.stderr
    return launched


@pytest.mark.parametrize(
    ("arguments", "code", "end"),
    [
        # `code` and `end`, of the standard error, are there because two broken runs would be equal as well.
        pytest.param(["scripts/facts.py", "--option", "-m", "a b", "--"], 0, "", id="what a script sees"),
        pytest.param(["exit.py", "None"], 0, "", id="exit code 0"),
        pytest.param(["exit.py", "3"], 3, "", id="exit code 3"),
        pytest.param(["exit.py", "'a message'"], 1, "a message\n", id="exit message"),
        pytest.param(["fail.py"], 1, "RuntimeError: it failed\n", id="exception"),
        pytest.param(["hook.py"], 1, "", id="excepthook of the script"),
        pytest.param(["syntax.py"], 1, "SyntaxError: invalid syntax\n", id="syntax error"),
        pytest.param(["interrupt.py"], -signal.SIGINT, "KeyboardInterrupt\n", id="keyboard interrupt"),
        pytest.param(["options.py", "--help"], 0, "", id="help of the script"),
        pytest.param(["options.py", "--x"], 2, "error: unrecognized arguments: --x\n", id="usage error of the script"),
        pytest.param(["-m", "package.module", "-m", "argument"], 0, "", id="module"),
        pytest.param(["-m", "package.module", "fail"], 1, "RuntimeError: it failed\n", id="module that fails"),
        pytest.param(["-m", "package"], 0, "", id="package"),
        pytest.param(["folder", "argument"], 0, "", id="folder"),
        pytest.param(["folder.zip", "argument"], 0, "", id="zip file"),
        pytest.param(["link.py", "argument"], 0, "", id="link"),
    ],
)
def test_a_script_runs_as_under_plain_python(files: Path, arguments: list[str], code: int, end: str) -> None:
    launched = compare(arguments, files)
    assert launched.returncode == code
    assert launched.stderr.endswith(end)


# ---- Nothing to run -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: SCRIPT: --help lists all options"),
        (["-m"], "the following arguments are required: SCRIPT: --help lists all options"),
        (["missing.py"], "can't open file '{cwd}/missing.py': [Errno 2] No such file or directory"),
        (["empty"], "can't find '__main__' module in '{cwd}/empty'"),
        (["-m", "no_such_module"], "No module named no_such_module"),
        (["-m", "no_such.module"], "No module named no_such.module"),
        (["-m", "json.no_such"], "No module named json.no_such"),
        (["-m", "json.tool.deeper"], "No module named json.tool.deeper"),
        (["-m", ".relative"], "No module named .relative"),
        (
            ["-m", "json"],
            "No module named json.__main__; 'json' is a package and cannot be directly executed",
        ),
        (["-m", "_json"], "No code object available for _json"),
        (["--trainer", "adam", "script.py"], "--trainer: write --trainer lamb, not 'adam'"),
        (["--trainer", "script.py"], "--trainer: write --trainer lamb, not 'script.py'"),
        (["--trainer"], "--trainer: expected one argument"),
        (["--trainer", "lamb"], "the following arguments are required: SCRIPT: --help lists all options"),
    ],
)
def test_nothing_to_run_is_a_usage_error(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    """One clear line and exit code 2, and nothing in this process is changed by then."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run", *arguments])
    before = list(sys.path), sys.modules["__main__"], multiprocessing.spawn.get_preparation_data
    with pytest.raises(SystemExit) as stopped:
        run.main()
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    line = line.replace("SCRIPT, ...", "SCRIPT")  # some versions of argparse say so
    assert line == f"hf_lamb.run: {message.format(cwd=tmp_path)}"
    assert (sys.path, sys.modules["__main__"], multiprocessing.spawn.get_preparation_data) == before


# ---- With "lamb" ----------------------------------------------------------------------------------------------------

OPTIONS = ["--optim", "lamb", "--optim_args", "max_trust_ratio=10", "--use_cpu", "--output_dir", "out"]


def test_spawned_processes_have_lamb_too(tmp_path: Path) -> None:
    """A worker may get the arguments by pickle, and may build its own; `torch.multiprocessing.spawn` is the same."""
    done = execute("-m", "hf_lamb.run", SCRIPTS / "spawn_workers.py", *OPTIONS, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "worker: lamb lamb\n"), done.stderr


@pytest.mark.parametrize("options", [["--optim", "LAMB"], ["--optim=Lamb"]])
def test_a_lamb_in_other_letters_is_answered_with_the_name(options: list[str], tmp_path: Path) -> None:
    """After argparse's list of all optimizers, as the last line."""
    done = execute("-m", "hf_lamb.run", SCRIPTS / "train_tiny.py", *options, "--output_dir", "out", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "hf_lamb.run: write --optim lamb"


@pytest.mark.parametrize(
    ("optim_args", "message"),
    [
        ("betas=(0.9,0.98)", "betas is not set here; use --adam_beta1 and --adam_beta2 (a value holds no comma)"),
        ("max_trust_ratio:10", "'max_trust_ratio:10' is not key=value; write for example \"key=value,key=value\""),
    ],
)
def test_malformed_optim_args_end_in_one_clear_line(optim_args: str, message: str, tmp_path: Path) -> None:
    options = ["--optim", "lamb", "--optim_args", optim_args, "--use_cpu", "--output_dir", "out", "--max_steps", "1"]
    done = execute("-m", "hf_lamb.run", SCRIPTS / "train_tiny.py", *options, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"ValueError: optim_args: {message}"


@pytest.mark.parametrize(
    ("launcher", "processes"),
    [
        pytest.param("torch.distributed.run --standalone --nproc_per_node 2", 2, id="torchrun"),
        pytest.param(
            "accelerate.commands.launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no",
            1,
            id="accelerate launch",
        ),
    ],
)
def test_launchers_train_an_unedited_script_with_lamb(launcher: str, processes: int, tmp_path: Path) -> None:
    options = ["--max_steps", "2", "--report_to", "none", "--learning_rate", "1e-2", "--save_strategy", "no"]
    script = [SCRIPTS / "train_tiny.py", *OPTIONS, *options]
    done = execute("-m", *launcher.split(), "-m", "hf_lamb.run", *script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    reports = [json.loads(path.read_text()) for path in sorted((tmp_path / "out").glob("rank*.json"))]
    assert len(reports) == processes
    assert all(report == reports[0] for report in reports), "all ranks hold the same weights"
    del reports[0]["weights"]
    assert reports[0] == {
        "optimizer": "hf_lamb.lamb.Lamb",
        "max_trust_ratio": 10.0,
        "world_size": processes,
        "steps": 2,
    }


# ---- With LambTrainer -----------------------------------------------------------------------------------------------

TRAINERS = {
    # The package imports Trainer before its module runs.
    "mine/__init__.py": "from transformers import Trainer",
    "mine/train.py": """
        import multiprocessing, sys
        import transformers
        import transformers.trainer
        from mine import Trainer as Packages
        from transformers import Seq2SeqTrainer, Trainer

        class MyTrainer(Seq2SeqTrainer):
            pass

        def names(classes):
            return [c.__name__ for c in classes]

        def tell(queue):
            queue.put(names([Trainer, transformers.trainer.Trainer]))

        if __name__ == "__main__":
            print(names([Packages, Trainer, transformers.Trainer, transformers.trainer.Trainer]))
            print("LambTrainer" in names(MyTrainer.__mro__), sys.argv[1:])
            context = multiprocessing.get_context("spawn")
            queue = context.Queue()
            process = context.Process(target=tell, args=(queue,))
            process.start()
            print(queue.get(timeout=60), process.join())
    """,
    "plain.py": "import sys, transformers; print(transformers.Trainer.__name__, sys.argv[1:])",
    "early/sitecustomize.py": "from transformers import Trainer",
}


@pytest.fixture
def trainers(tmp_path: Path) -> Path:
    for name, source in TRAINERS.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(textwrap.dedent(source))
    return tmp_path


def test_trainer_lamb_is_the_trainer_wherever_a_script_finds_it(trainers: Path) -> None:
    """In packages, in derived classes, in spawned processes; a `--trainer` after the script's name is the script's."""
    options = ["--trainer", "mine", "--optim", "lamb"]
    done = execute("-m", "hf_lamb.run", "--trainer", "lamb", "-m", "mine.train", *options, cwd=trainers)
    assert done.returncode == 0, done.stderr
    names, derived, spawned = done.stdout.splitlines()
    assert names == str(["LambTrainer"] * 4)
    assert derived == f"True {options}"
    assert spawned == "['LambTrainer', 'LambTrainer'] None"
    (line,) = (line for line in done.stderr.splitlines() if "hf_lamb.run" in line)
    says(line, "transformers.Trainer is LambTrainer: loss and gradient.*clips.*checkpoint.*lamb/.*the script's")


def test_without_the_flag_the_trainer_is_the_stock_one(trainers: Path) -> None:
    done = execute("-m", "hf_lamb.run", "plain.py", "--trainer", "lamb", cwd=trainers)
    assert done.stdout == "Trainer ['--trainer', 'lamb']\n", done.stderr


def test_a_trainer_that_was_imported_before_the_script_is_an_error(trainers: Path) -> None:
    """It would stay the stock one there, and the run would silently be another one."""
    done = execute("-m", "hf_lamb.run", "--trainer", "lamb", "plain.py", cwd=trainers, package=trainers / "early")
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    says(line, "hf_lamb.run: --trainer lamb: sitecustomize must not import transformers.Trainer before the script")


SPLITS = {
    "1x32": ("", 32, 1),
    "8x4": (
        "accelerate.commands.launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no",
        8,
        4,
    ),
    "two of 4x4": ("torch.distributed.run --standalone --nproc_per_node 2", 4, 4),
}


@pytest.mark.distributed
def test_trainer_lamb_gives_one_loss_and_one_gradient_for_every_split(tmp_path: Path) -> None:
    """Of an unedited script without dropout; the stock Trainer multiplies both by 4 and by 8."""
    options = "--optim lamb --learning_rate 1e-2 --max_steps 2 --logging_steps 1 --use_cpu --report_to none --seed 3"
    first = {}
    for split, (launcher, rows, accumulation) in SPLITS.items():
        size = ["--per_device_train_batch_size", rows, "--gradient_accumulation_steps", accumulation]
        script = [SCRIPTS / "fixed_labels.py", *options.split(), *size, "--output_dir", split]
        command = ["-m", *launcher.split()] if launcher else []
        done = execute(*command, "-m", "hf_lamb.run", "--trainer", "lamb", *script, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("transformers.Trainer is LambTrainer") == 1
        first[split] = json.loads((tmp_path / split / "trainer_state.json").read_text())["log_history"][0]
    whole = first["1x32"]
    assert whole["loss"] == pytest.approx(math.log(64), rel=0.1)
    for line in first.values():
        assert (line["loss"], line["grad_norm"]) == pytest.approx((whole["loss"], whole["grad_norm"]), rel=1e-6)
