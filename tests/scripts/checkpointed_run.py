"""A run of LambTrainer that saves checkpoints, as short as can be.

Run by tests/test_checkpoints.py on one process and, through torchrun, on several, where it is run whole and then
resumed: python -m tests.scripts.checkpointed_run OUTPUT_DIR
"""

import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertForMaskedLM, Trainer

from hf_lamb import LambTrainer, LambTrainingArguments
from recipes.lib.processes import leave_process_group
from tests.scripts.scaffold import QUIET
from tests.scripts.split_batch import LENGTH, VOCAB, FixedRows

STEPS = 6


def trainer(output: Path, cls: type[Trainer] = LambTrainer, **options: Any) -> Trainer:
    """Five optimizer steps of two micro-batches an epoch, with dropout; a checkpoint every other step."""
    defaults = {
        "output_dir": str(output),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "save_steps": 2,
        **QUIET,
    }
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.2,
    )
    return cls(
        model=BertForMaskedLM(config),
        args=LambTrainingArguments(**defaults | options),
        train_dataset=FixedRows("mlm", 40, seed=0),
        eval_dataset=FixedRows("mlm", 8, seed=1),
    )


def main(output: Path) -> None:
    """OUTPUT_DIR/whole, and OUTPUT_DIR/resumed from its checkpoint-2, past a checkpoint-4 that lacks a file."""
    whole = trainer(output / "whole")
    whole.train()
    if whole.is_world_process_zero():
        for step in (2, 4):
            shutil.copytree(output / f"whole/checkpoint-{step}", output / f"resumed/checkpoint-{step}")
        (output / "resumed/checkpoint-4/rng_state_1.pth").unlink()
    whole.accelerator.wait_for_everyone()
    whole.model_wrapped = whole.model
    resumed = trainer(output / "resumed")
    resumed.train(resume_from_checkpoint=True)
    leave_process_group(resumed)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
