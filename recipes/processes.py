"""The end of a run on several processes."""

import gc

from transformers import Trainer


def free(trainer: Trainer) -> None:
    """Let go of what a trainer that has done its work holds, its DDP too."""
    trainer.model_wrapped = trainer.model
    trainer.accelerator.free_memory()
    gc.collect()


def leave_process_group(trainer: Trainer) -> None:
    """To be called at the end of a script: without it gloo may abort while the interpreter ends.

    DDP goes first. Where its reducer is the last to hold the process group, the two may wait for each other for ever:
    ~ProcessGroupGloo joins a thread that waits for the interpreter's lock, which the reducer's destructor holds (seen
    with torch 2.11).
    """
    free(trainer)
    trainer.accelerator.end_training()
