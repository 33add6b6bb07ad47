"""Part 3 of sharp_minima: a tiny BERT on the embedded corpus, by Trainer, with a small and a large batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from hf_lamb import LambTrainer, LambTrainingArguments
from hf_lamb.sharpness import SharpnessCallback, compare, fixed_batches, labels_loss
from recipes.lib.bert import new_bert
from recipes.lib.console import on_a_terminal, print_steps
from recipes.lib.corpus import load_documents, split_documents
from recipes.lib.masking import MaskedBlocks, MaskEpochCallback
from recipes.lib.tokenizer import load_or_train_tokenizer, tokenize_into_blocks

LENGTH, VOCABULARY = 32, 1024


class Setting(NamedTuple):
    """Batch size, steps and rate of a run; the steps are such that both end at about the same training loss."""

    batch_size: int
    steps: int
    rate: float


SETTINGS = {"small batch": Setting(32, 1200, 2e-2), "large batch": Setting(512, 300, 4e-2)}


def run(output: Path, keep: Callable[..., Any]) -> dict[str, Any]:
    """Train both and compare the checkpoints: the record for results.jsonl, and the table."""
    folders = {name: output / f"bert-{setting.batch_size}" for name, setting in SETTINGS.items()}
    tokenizer, train, held_out = load_text()
    measured_on = fixed_batches(train, 64, 4)
    for name, setting in SETTINGS.items():
        if not (folders[name] / "model.safetensors").exists():
            pretrain(setting, folders[name], tokenizer, train, measured_on)

    def measure() -> dict[str, Any]:
        comparison = compare(
            folders["small batch"],
            folders["large batch"],
            labels_loss,
            measured_on,
            fixed_batches(held_out, 64, 4),
            steps=10,
        )
        comparison.save(output / "bert-compared")
        record = {"part": "bert", **{name: setting._asdict() for name, setting in SETTINGS.items()}}
        return {"record": record | comparison.to_json(), "table": comparison.table()}

    return keep("bert", measure)


def load_text() -> tuple[Any, MaskedBlocks, MaskedBlocks]:
    """(tokenizer, training blocks, held-out blocks) of the embedded corpus; the training masks change every epoch."""
    documents, kept_out = split_documents(load_documents("embedded"))
    tokenizer = load_or_train_tokenizer((document.text for document in documents), VOCABULARY)
    train = MaskedBlocks(tokenize_into_blocks(documents, tokenizer, LENGTH), tokenizer)
    held_out = MaskedBlocks(tokenize_into_blocks(kept_out, tokenizer, LENGTH), tokenizer, dynamic=False)
    return tokenizer, train, held_out


def pretrain(setting: Setting, folder: Path, tokenizer: Any, train: MaskedBlocks, measured_on: list[Any]) -> None:
    """With LAMB, keeping sharpness against loss in trainer_state.json."""
    torch.manual_seed(0)
    args = LambTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=setting.batch_size,
        max_steps=setting.steps,
        learning_rate=setting.rate,
        warmup_steps=setting.steps // 10,
        logging_steps=setting.steps // 10,
        save_strategy="no",
        report_to=[],
        disable_tqdm=not on_a_terminal(),
        use_cpu=not torch.accelerator.is_available(),
    )
    trainer = LambTrainer(
        model=new_bert("smoke", tokenizer, LENGTH),
        args=args,
        train_dataset=train,
        processing_class=tokenizer,
        callbacks=[MaskEpochCallback(), SharpnessCallback(measured_on, setting.steps // 10, steps=5)],
    )
    print_steps(trainer)
    trainer.train()
    trainer.save_state()
    trainer.save_model()
