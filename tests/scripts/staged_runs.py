"""Runs whose global batch grows from 16 to 32 to 64, by LambTrainer and by hand.

Run by tests/test_batch_schedule.py on two processes through torchrun: python -m tests.scripts.staged_runs FOLDER
"""

import json
import shutil
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel

from hf_lamb import Lamb, LambTrainer, LambTrainingArguments, lamb_param_groups, tied_heads_in_one_group
from tests.scripts import cpu_fsdp
from tests.scripts.fsdp_runs import full_weights
from tests.scripts.loss_runs import FSDP2
from tests.scripts.scaffold import QUIET, forget_accelerator, process_group
from tests.scripts.split_batch import FixedRows, trained_model

SCHEDULE = "0:16 4:32 7:64"
BATCHES = [16] * 4 + [32] * 3 + [64] * 5  # of every step
ROWS = 150  # in micro-batches of 8 an epoch of 19, the last one of 6 rows; it ends inside of a stage
LONG_SCHEDULE, LONG_ROWS, LONG_STEPS = "0:16 20:32 35:64", 640, 50
RATE, CLIP = 5e-3, 0.1


class Stream(IterableDataset):
    """The rows of a data set in their order, some times."""

    def __init__(self, data: FixedRows, passes: int) -> None:
        self.data, self.passes = data, passes

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for _ in range(self.passes):
            yield from (self.data[i] for i in range(len(self.data)))


def trainer(folder: Path, model: PreTrainedModel, data: Any, **options: Any) -> LambTrainer:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "batch_size_schedule": SCHEDULE,
        "per_device_train_batch_size": 8,
        "max_steps": len(BATCHES),
        **({} if "base_learning_rate" in options else {"learning_rate": RATE}),
        "max_grad_norm": CLIP,
        "logging_steps": 1,
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
        "seed": 7,
        **QUIET,
    }
    args = LambTrainingArguments(**defaults | options)
    return LambTrainer(model=model, args=args, train_dataset=data, eval_dataset=data if args.do_eval else None)


def lines_of(run: LambTrainer) -> list[dict[str, float]]:
    return [line for line in run.state.log_history if "loss" in line]


# -- by hand ----------------------------------------------------------------------------------------------------------


def by_hand(
    model: PreTrainedModel,
    data: FixedRows,
    scaled_to: float | None = None,
    drop: bool = False,
    micro_batch: int = 8,
) -> list[dict[str, float]]:
    """Train on one process without a split; return what Trainer logs. An epoch's last step has the rows that are left.

    scaled_to: the batch that RATE is for; each step's rate is then that of its own batch by the sqrt rule.
    drop: leave out an epoch's last rows if they are too few for a step.
    micro_batch: an epoch is counted in these.
    """
    lamb = Lamb(lamb_param_groups(model), lr=RATE)
    micro_batches = -(-len(data) // micro_batch)
    epoch, row, lines = 0, 0, []
    for step, batch in enumerate(BATCHES):
        if row >= len(data) or (drop and row + batch > len(data)):
            epoch, row = epoch + 1, 0
        rows = slice(row, min(row + batch, len(data)))
        row = rows.stop
        rate = RATE * (1 - step / len(BATCHES)) * (1 if scaled_to is None else (batch / scaled_to) ** 0.5)
        for group in lamb.param_groups:
            group["lr"] = rate
        loss = model(input_ids=data.input_ids[rows], labels=data.labels[rows]).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        lamb.step()
        lamb.zero_grad()
        values = {"loss": loss.item(), "learning_rate": rate, "grad_norm": norm.item(), "lamb/batch_size": batch}
        lines.append(values | {"step": step + 1, "epoch": epoch + -(-row // micro_batch) / micro_batches})
    return lines


def with_accelerate(
    model: PreTrainedModel, data: FixedRows, fsdp: bool
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train by accelerate; return each step's loss and the weights."""
    plugin = None
    if fsdp:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            transformer_cls_names_to_wrap=["BertLayer"],
            auto_wrap_policy="TRANSFORMER_BASED_WRAP",
            cpu_ram_efficient_loading=False,
        )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    lamb, loader = Lamb(lamb_param_groups(model), lr=RATE), DataLoader(data, 8)
    with tied_heads_in_one_group(model):
        model, optimizer, loader = accelerator.prepare(model, lamb, loader)
    losses: list[float] = []
    while len(losses) < len(BATCHES):
        batches = iter(loader)
        while len(losses) < len(BATCHES):
            step = len(losses)
            some = list(islice(batches, BATCHES[step] // 8 // accelerator.num_processes))
            if not some:
                break
            for group in lamb.param_groups:
                group["lr"] = RATE * (1 - step / len(BATCHES))
            counts = [batch["labels"].ne(-100).sum() for batch in some]
            total = accelerator.reduce(sum(counts), "sum")
            loss = torch.zeros(())
            for i, (batch, count) in enumerate(zip(some, counts, strict=True)):
                accelerator.gradient_state._set_sync_gradients(i == len(some) - 1)
                if i == len(some) - 1:
                    part = model(**batch).loss * count / total
                    accelerator.backward(part * accelerator.num_processes)
                else:
                    with accelerator.no_sync(model):
                        part = model(**batch).loss * count / total
                        accelerator.backward(part * accelerator.num_processes)
                loss += part.detach()
            lamb.clip_grad_norm(CLIP)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(accelerator.reduce(loss, "sum")))
    weights = full_weights(model)
    forget_accelerator()
    return losses, weights


# -- on two processes -------------------------------------------------------------------------------------------------


def main(folder: Path) -> None:
    cpu_fsdp.enable()
    found: dict[str, Any] = {}
    data = FixedRows("mlm", ROWS, seed=0)
    fsdp2 = {"fsdp": True, "fsdp_config": FSDP2}
    for name, options in {"ddp": {}, "fsdp2": fsdp2}.items():
        run = trainer(folder / name, trained_model("mlm", folder / "start"), data, **options)
        run.train()
        weights = full_weights(run.model)
        lines = lines_of(run)
        forget_accelerator()
        losses, expected = with_accelerate(trained_model("mlm", folder / "start"), data, fsdp=name == "fsdp2")
        apart = {key: float((weights[key] - w).abs().max() / w.abs().max()) for key, w in expected.items()}
        found[name] = {"lines": lines, "losses": losses, "apart": max(apart.values(), default=0.0)}

    long = trainer(
        folder / "long", trained_model("mlm", folder / "start"), FixedRows("mlm", LONG_ROWS, seed=0), **LONG
    )
    long.train()
    found["long"] = lines_of(long)
    forget_accelerator()

    stream = trainer(folder / "stream", trained_model("mlm", folder / "start"), Stream(data, 9))
    stream.train()
    found["stream"] = lines_of(stream)
    forget_accelerator()

    ways = []  # of ending after the kill: the weights of all processes
    for resumed in (False, True):
        run = trainer(
            folder / "saved",
            trained_model("mlm", folder / "start"),
            data,
            train_sampling_strategy="random",
            save_strategy="steps",
            save_steps=5,
        )
        run.train(resume_from_checkpoint=str(folder / "saved/checkpoint-5") if resumed else None)
        ways.append(full_weights(run.model))
        forget_accelerator()
    found["resumed"] = all(torch.equal(w, ways[1][key]) for key, w in ways[0].items())
    if torch.distributed.get_rank() == 0:
        shutil.rmtree(folder / "saved")
        (folder / "found.json").write_text(json.dumps(found))


LONG: dict[str, Any] = {
    "batch_size_schedule": LONG_SCHEDULE,
    "max_steps": LONG_STEPS,
    "train_sampling_strategy": "random",
}


if __name__ == "__main__":
    with process_group():
        main(Path(sys.argv[1]))
