"""A study run by several processes: those that accelerate or torchrun has started, or some that this one starts."""

import signal
import sys
from collections.abc import Callable
from typing import Any

import torch
from accelerate import PartialState

from hf_lamb.command_line import one_line
from recipes.lib.processes import make_output_dir
from recipes.study.sweep import Record, Study


def complete(
    study: Study,
    prepare: Callable[[torch.device], Callable[..., Record]],
    use_cpu: bool,
    report_only: bool,
    show_progress: bool = True,
    time_left: Callable[[float], bool] = lambda longest: True,
) -> list[Record] | None:
    """The records, after running what is missing; None on all processes but the main one.

    prepare: takes the device of this process' trials, gives the function that `Study.run` takes. report_only: run
    nothing. time_left: as in `Study.run`. Raises ValueError where there is no record then.
    """
    if report_only:
        if not (records := study.records()):
            raise ValueError(f"there is no trial in {study.path}: run without --report_only first")
        return records
    make_output_dir(str(study.folder))
    state = PartialState(cpu=use_cpu)
    train = prepare(state.device)
    state.destroy_process_group()  # from here on, the processes meet in the folder only
    records = study.run(train, state.is_main_process and show_progress, time_left)
    return records if state.is_main_process else None


def spawn(work: Callable[[Any, bool], None], arguments: Any, processes: int) -> None:
    """Run `work(arguments, is_first)` in processes of one thread each, which end with this one.

    Raises OSError where one of them was killed, or ended with a mistake that it has printed.
    """
    try:
        torch.multiprocessing.spawn(_work, (work, arguments), nprocs=processes)  # type: ignore[no-untyped-call]
    except torch.multiprocessing.ProcessExitedException as error:
        raise OSError(f"{error}: run the same command again to go on") from None


def _work(number: int, work: Callable[[Any, bool], None], arguments: Any) -> None:
    # What torch sends when the first process has died, and what a shell ignores for jobs in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)
    try:
        work(arguments, number == 0)
    except (ValueError, OSError) as error:
        sys.exit(one_line(error))
