"""What a recipe says: bars on a terminal only, the step in each line, and at its end the next command to type."""

import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import huggingface_hub
import transformers
from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers import TrainingArguments as Arguments

from hf_lamb.command_line import fail, stopped

# What Trainer logs and nobody acts on while a run goes on; results.jsonl has the time.
NOT_PRINTED = ("_runtime", "_per_second", "train_loss", "total_flos")


def on_a_terminal() -> bool:
    """Whether somebody sees progress bars: in a file or a pipe each update is another line."""
    return sys.stderr.isatty()


def show_library_bars(shown: bool) -> None:
    """Turn the bars of datasets and huggingface_hub on or off.

    Those of transformers are always off: each checkpoint that is written would leave one between the lines of the log.
    """
    bars: Any = transformers.logging
    bars.disable_progress_bar()  # first: it turns those of huggingface_hub off, too
    bars = huggingface_hub.utils
    (bars.enable_progress_bars if shown else bars.disable_progress_bars)()
    with suppress(ImportError):
        import datasets

        (datasets.enable_progress_bars if shown else datasets.disable_progress_bars)()


@contextmanager
def study_command(name: str) -> Iterator[None]:
    """End a study's command with one line after a mistake or Ctrl-C. name: of the recipe."""
    try:
        yield
    except (ValueError, OSError) as error:
        fail(name, error)
    except KeyboardInterrupt:
        stopped(name, "the same command goes on, finished trials are kept")


def step_line(step: int, of: int, values: Mapping[str, Any]) -> str:
    """A line of the log: "step 10 of 2,400: loss 8.92, learning_rate 0.000417"."""
    words = [
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
    ]
    return f"step {step:,} of {of:,}: {', '.join(words)}"


def print_steps(trainer: Trainer) -> None:
    """Let the trainer print lines with their steps in place of its dictionaries."""
    trainer.remove_callback(PrinterCallback)
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(Bar())
    trainer.add_callback(StepLines())


class Bar(ProgressCallback):
    """Trainer's bar, without its lines."""

    def on_log(self, *_: Any, **__: Any) -> None:
        """`StepLines` prints them."""


class StepLines(TrainerCallback):
    """Prints what Trainer logs, each line with its step; the evaluation after the last step is not said twice."""

    def __init__(self) -> None:
        self.last = ""

    def on_log(
        self,
        args: Arguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        values = {name: value for name, value in (logs or {}).items() if not name.endswith(NOT_PRINTED)}
        line = step_line(state.global_step, state.max_steps, values)
        if state.is_world_process_zero and values.keys() - {"epoch"} and line != self.last:
            tqdm.write(line)
            sys.stdout.flush()
            self.last = line


def what_next(commands: Mapping[str, str]) -> str:
    """The last lines that a recipe prints: the commands that one types next, by what they are for."""
    width = max(map(len, commands))
    return "\n".join(
        f"{'' if i else 'next:':6}{what:{width}}  {command}" for i, (what, command) in enumerate(commands.items())
    )


def command_to_fill_masks(folder: str | Path, mask_token: str) -> str:
    """The command that tries a masked LM."""
    text = f"the {mask_token} of the united states"
    code = f"from transformers import pipeline; print(pipeline('fill-mask', {str(folder)!r})({text!r})[0])"
    return f'python -c "{code}"'


def command_to_open(page: Path) -> str:
    """The command that shows a page in a browser."""
    return f"python -m webbrowser {shlex.quote(page.absolute().as_uri())}"
