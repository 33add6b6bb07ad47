"""Trains a tiny BERT on fixed data with one split of the global batch of 64, and writes what came out.

Run by tests/test_trainer.py on one process and, through torchrun, on several:
python -m tests.scripts.split_batch {mlm,classification} PER_DEVICE_BATCH ACCUMULATION OUTPUT_DIR
"""

import copy
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, PreTrainedModel, set_seed

from hf_lamb import LambTrainer, LambTrainingArguments
from tests.scripts.scaffold import QUIET, write_and_leave

VOCAB, LENGTH, ROWS, STEPS = 211, 24, 640, 50
MODELS = {"mlm": BertForMaskedLM, "classification": BertForSequenceClassification}


class FixedRows(Dataset):
    """Rows of skewed token counts with fixed masks; from 1 to 12 labels a row, so that a mean of means is wrong."""

    def __init__(self, task: str, rows: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        ids = torch.rand(rows, LENGTH, generator=generator).pow(3).mul(VOCAB - 2).long() + 2
        label_counts = torch.randint(1, 13, (rows,), generator=generator)
        masked = torch.rand(rows, LENGTH, generator=generator).argsort(dim=1) < label_counts[:, None]
        self.input_ids = torch.where(masked, 1, ids) if task == "mlm" else ids
        self.labels = torch.where(masked, ids, -100) if task == "mlm" else ids[:, :5].sum(dim=1) % 3

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.input_ids[index], "labels": self.labels[index]}


def trained_model(task: str, checkpoint: Path) -> PreTrainedModel:
    """The common starting point, read from `checkpoint`, or made and written there."""
    if checkpoint.exists():
        return MODELS[task].from_pretrained(checkpoint)
    model = copy.deepcopy(_trained(task))
    set_seed(0)  # the random numbers that follow do not depend on who has trained it
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=checkpoint.parent))
    model.save_pretrained(unfinished)
    try:
        unfinished.rename(checkpoint)  # whole, for another process may be waiting to read it
    except OSError:  # which was faster
        shutil.rmtree(unfinished)
    return model


@cache
def _trained(task: str) -> PreTrainedModel:
    """A few steps of AdamW from weights that are zero nowhere (biases start at zero)."""
    set_seed(0)
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=3,
    )
    model = MODELS[task](config)
    with torch.no_grad():
        for param in model.parameters():
            param.add_(torch.randn_like(param) * 0.02)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    data = FixedRows(task, ROWS, seed=0)
    for start in list(range(0, ROWS, 64)) * 3:
        rows = slice(start, start + 64)
        model(input_ids=data.input_ids[rows], labels=data.labels[rows]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def main(task: str, per_device_batch: int, accumulation: int, output: Path) -> None:
    args = LambTrainingArguments(
        output_dir=str(output / "trainer"),
        per_device_train_batch_size=per_device_batch,
        gradient_accumulation_steps=accumulation,
        per_device_eval_batch_size=per_device_batch,
        max_steps=STEPS,
        learning_rate=5e-3,
        max_grad_norm=0.1,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=25,
        save_strategy="no",
        seed=7,
        **QUIET,
    )
    trainer = LambTrainer(
        model=trained_model(task, output.parent / f"{task}-start"),
        args=args,
        train_dataset=FixedRows(task, ROWS, seed=0),
        eval_dataset=FixedRows(task, 101, seed=1),  # divides by no number of processes
    )
    trainer.train()
    if trainer.is_world_process_zero():
        output.mkdir(parents=True, exist_ok=True)
        torch.save({n: p.detach() for n, p in trainer.model.named_parameters()}, output / "weights.pt")
    write_and_leave(trainer, output / "log.json", trainer.state.log_history)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
