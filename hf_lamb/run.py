"""Runs an unedited script with "lamb" registered as an optimizer of transformers.

    hf-lamb run script.py --optim lamb ...                        (or python -m hf_lamb.run)
    hf-lamb run -m package.module --optim lamb ...
    accelerate launch -m hf_lamb.run script.py --optim lamb ...
    torchrun --nproc_per_node 2 -m hf_lamb.run script.py --optim lamb ...
    hf-lamb run --trainer lamb script.py --optim lamb ...

The script runs as under plain `python`: arguments, `__main__`, `sys.path`, exit codes and tracebacks are the same.
Child processes of `multiprocessing` have "lamb" too; new commands (`subprocess.run([sys.executable, ...])`) do not.

With `--trainer lamb`, before the script's name, `transformers.Trainer` is `hf_lamb.LambTrainer` in all of these
processes, so that the script's loss does not depend on how its global batch is split. One line says so.
"""

from __future__ import annotations

import argparse
import builtins
import multiprocessing.spawn
import os
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from itertools import pairwise
from types import CodeType, ModuleType, TracebackType
from typing import Any

from hf_lamb.command_line import Parser
from hf_lamb.registration import register


def main(argv: Sequence[str] | None = None, prog: str = "python -m hf_lamb.run") -> None:
    """Run the script or module that the command line names as if it had been run directly."""
    parser = Parser(prog, __doc__ or "", usage="%(prog)s [-m] [--trainer lamb] SCRIPT ...")
    parser.add_argument("-m", dest="is_module", action="store_true", help="SCRIPT is a module's name.")
    parser.add_argument(
        "--trainer", type=_trainer, metavar="lamb", help="LambTrainer in place of transformers.Trainer."
    )
    parser.add_argument(
        "script", metavar="SCRIPT", help="A script, a folder or zip file with a __main__.py, or a module's name."
    )
    parser.add_argument("args", metavar="...", nargs=argparse.REMAINDER, help="The script's own arguments.")
    options = parser.parse_args(argv)

    try:
        if options.trainer and options.is_module:
            _replace_trainer()  # before `_load` imports the packages around the module, which may import Trainer
        module, code = _load(options.script, options.is_module)
        register()
        _call_in_spawned_processes(register)
        if options.trainer:
            _call_in_spawned_processes(_replace_trainer())
            if os.environ.get("RANK", "0") == "0":
                print(f"{parser.name}: {_WITH_TRAINER}", file=sys.stderr, flush=True)  # noqa: T201
        sys.argv = [str(module.__file__) if options.is_module else options.script, *options.args]
        sys.modules["__main__"] = module
        exec(code, vars(module))
    except _CannotRun as error:
        parser.exit(2, f"{parser.name}: {error}\n")  # as Python does
    except SystemExit as ended:
        if ended.code == 2 and _has_lamb_in_other_letters(options.args):  # argparse has listed all optimizers
            print(f"{parser.name}: write --optim lamb", file=sys.stderr)  # noqa: T201
        raise
    except BaseException as error:
        # The interpreter ends as usual, but the traceback shows only the script's frames.
        show, frames = sys.excepthook, _from_script(error.__traceback__)
        sys.excepthook = lambda kind, value, _: show(kind, value.with_traceback(frames), frames)
        raise


def _has_lamb_in_other_letters(args: list[str]) -> bool:
    values = [value for option, value in pairwise(args) if option == "--optim"]
    values += [arg.removeprefix("--optim=") for arg in args if arg.startswith("--optim=")]
    return any(value != "lamb" and value.strip().lower() in ("lamb", "hf_lamb") for value in values)


# What `--trainer lamb` changes in a run. About eps and too low a learning rate, LAMB itself says a line.
_WITH_TRAINER = (
    "transformers.Trainer is LambTrainer: loss and gradient are the mean over all labels of the global batch, however "
    "it is split, and eval_loss is the mean over all labels; Lamb clips to max_grad_norm; checkpoints get their names "
    "when they are complete; log lines have lamb/... values; optimizer, rate and schedule stay the script's"
)


def _trainer(name: str) -> str:
    if name != "lamb":
        raise argparse.ArgumentTypeError(f"write --trainer lamb, not {name!r}")
    return name


def _replace_trainer() -> Callable[[], None]:
    """Put LambTrainer in the place of Trainer; return the function that does so."""
    from hf_lamb.trainer.replacement import replace_trainer  # imports transformers

    try:
        replace_trainer()
    except RuntimeError as error:
        raise _CannotRun(f"--trainer lamb: {error}") from None
    return replace_trainer


class _CannotRun(Exception):
    """The target cannot be run; the message is one line with the reason."""


def _load(target: str, is_module: bool) -> tuple[ModuleType, CodeType]:
    """Return the target's `__main__` module and its code, without running it; set `sys.path[0]` as `python` does."""
    if is_module:
        return _main_module(_module_spec(target))
    path = os.path.abspath(target)
    spec = PathFinder.find_spec("__main__", [path])  # a folder or zip file with a __main__.py
    if spec is not None:
        _set_path(path)
        return _main_module(spec)
    if os.path.isdir(path):
        raise _CannotRun(f"can't find '__main__' module in {path!r}")

    loader = SourceFileLoader("__main__", path)
    try:
        source = loader.get_data(path)
    except OSError as error:
        raise _CannotRun(f"can't open file {path!r}: [Errno {error.errno}] {error.strerror}") from None
    spec = spec_from_file_location("__main__", path, loader=loader)
    assert spec is not None
    module = module_from_spec(spec)
    # `__spec__` is None, as for every script: multiprocessing then finds the script by its path.
    module.__dict__.update(__spec__=None, __package__=None, __cached__=None, __builtins__=builtins)
    _set_path(os.path.dirname(os.path.realpath(path)))
    return module, loader.source_to_code(source, path)


def _set_path(entry: str) -> None:
    if not sys.flags.safe_path:
        sys.path[0] = entry


def _module_spec(name: str) -> ModuleSpec:
    """Return the spec of what `python -m name` runs: the module, or the `__main__` of a package."""
    spec = _find(name)
    if spec is None:
        raise _CannotRun(f"No module named {name}")
    if spec.submodule_search_locations is None:
        return spec
    spec = _find(f"{name}.__main__")
    if spec is None:
        raise _CannotRun(f"No module named {name}.__main__; {name!r} is a package and cannot be directly executed")
    return spec


def _find(name: str) -> ModuleSpec | None:
    if not all(name.split(".")):
        return None
    try:
        return find_spec(name)
    except ModuleNotFoundError as error:
        # Return None if the module or a parent package is missing. Any other missing import is the script's own error.
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            return None
        raise


def _main_module(spec: ModuleSpec) -> tuple[ModuleType, CodeType]:
    module = module_from_spec(spec)
    module.__dict__.update(__name__="__main__", __builtins__=builtins)
    loader: Any = spec.loader
    code = loader.get_code(spec.name)
    if code is None:
        raise _CannotRun(f"No code object available for {spec.name}")
    return module, code


def _from_script(frames: TracebackType | None) -> TracebackType | None:
    """Remove the frames of this module and of the import system from the start of a traceback."""
    while frames is not None and (
        frames.tb_frame.f_globals is globals() or frames.tb_frame.f_code.co_filename.startswith("<frozen ")
    ):
        frames = frames.tb_next
    return frames


def _call_in_spawned_processes(function: Callable[[], None]) -> None:
    """Call a function of hf_lamb in processes that multiprocessing spawns too: they may build `TrainingArguments`.

    A spawned process unpickles the preparation data before it loads the script; multiprocessing ignores the additional
    key.
    """
    preparation_data = multiprocessing.spawn.get_preparation_data

    def with_call(name: str) -> dict[str, Any]:
        return {**preparation_data(name), f"hf_lamb {function.__name__}": _Call(function)}

    multiprocessing.spawn.get_preparation_data = with_call


class _Call:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Callable[[], None]) -> None:
        self.function = function

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return self.function, ()


if __name__ == "__main__":
    main()
