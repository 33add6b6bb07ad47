"""A study run by the processes that accelerate or torchrun has started."""

from collections.abc import Callable

import torch
from accelerate import PartialState

from recipes.lib.processes import make_output_dir
from recipes.study.sweep import Record, Study


def complete(
    study: Study, prepare: Callable[[torch.device], Callable[..., Record]], use_cpu: bool, report_only: bool
) -> list[Record] | None:
    """The records, after running what is missing; None on all processes but the main one.

    prepare: takes the device of this process' trials, gives the function that `Study.run` takes. report_only: run
    nothing. Raises ValueError where there is no record then.
    """
    if report_only:
        if not (records := study.records()):
            raise ValueError(f"there is no trial in {study.path}: run without --report_only first")
        return records
    make_output_dir(str(study.folder))
    state = PartialState(cpu=use_cpu)
    train = prepare(state.device)
    state.destroy_process_group()  # from here on, the processes meet in the folder only
    records = study.run(train, show_progress=state.is_main_process)
    return records if state.is_main_process else None
