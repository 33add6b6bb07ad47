"""Trains a tiny BERT under DDP and FSDP1, saves in the middle, resumes, on other numbers of processes too.

Run by tests/test_fsdp1.py through torchrun: python -m tests.scripts.fsdp1_runs ROOT

On two processes: whole runs and their continuations in ROOT/NAME/ and ROOT/NAME-resumed/; on others, those continued
from the two processes' checkpoints in ROOT/NAME-to-PROCESSES/. In each of them weights.pt, and what was logged in
log.json. What is asserted here concerns what one process can see.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from transformers import BertForMaskedLM, Trainer

from hf_lamb import Lamb, LambTrainer, LambTrainingArguments, lamb_param_groups
from hf_lamb.sharding.fsdp1 import clean_name
from tests.scripts import cpu_fsdp
from tests.scripts.fsdp_runs import SplitTrainer
from tests.scripts.scaffold import QUIET, forget_accelerator, process_group
from tests.scripts.split_batch import FixedRows

ROWS, STEPS, SAVED_AT = 32, 5, 3  # rows in a global batch
# The name of a run says what its parameters and its checkpoints are.
RUNS = ("orig-sharded", "orig-full", "flat-sharded", "flat-full")


def main(root: Path) -> None:
    cpu_fsdp.enable()
    n = dist.get_world_size()
    if n == 4:
        message = what_stock_trainer_says(root / "empty", root)
        if dist.get_rank() == 3:
            (root / "empty.txt").write_text(message)
    if n != 2:
        for name in ("orig-sharded", "orig-full", "flat-sharded") if n == 4 else ("orig-sharded", "flat-full"):
            train(root / f"{name}-to-{n}", name, checkpoint=root / name / f"checkpoint-{SAVED_AT}")
        if n == 1:
            assert_layers_stay_whole(root, "orig-sharded")
        return
    train(root / "ddp", "ddp")
    for name in RUNS:
        train(root / name, name)
        train(root / f"{name}-resumed", name, checkpoint=root / name / f"checkpoint-{SAVED_AT}")
    for name in ("ddp", "orig-sharded", "flat-sharded"):
        train(root / f"stock-{name}", name, cls=Trainer)
        loop(root / f"loop-{name}", name)
    (root / "adamw.json").write_text(json.dumps(states_that_accelerate_loads(root / "adamw")))
    assert_local_checkpoints_are_refused(root / "local")


def plugin_options(name: str) -> dict[str, Any]:
    params, kind = name.split("-")
    return {
        "use_orig_params": params == "orig",
        "state_dict_type": f"{kind.upper()}_STATE_DICT",
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "sync_module_states": False,
        "cpu_ram_efficient_loading": False,
    }


# -- Trainer ----------------------------------------------------------------------------------------------------------


def trainer(cls: type[Trainer], folder: Path, name: str) -> Trainer:
    fsdp: dict[str, Any] = {}
    if name != "ddp":
        wrapped = {"version": 1, "transformer_layer_cls_to_wrap": ["BertLayer"]}
        fsdp = {"fsdp": True, "fsdp_config": {**wrapped, **plugin_options(name)}}
    args = LambTrainingArguments(
        output_dir=str(folder),
        optim="lamb",
        max_steps=STEPS,
        per_device_train_batch_size=ROWS // dist.get_world_size(),
        learning_rate=2e-3,
        weight_decay=0.1,
        max_grad_norm=0.5,
        logging_steps=1,
        log_trust_ratio_per_layer=True,
        save_steps=SAVED_AT,
        seed=7,
        **QUIET,
        **fsdp,
    )
    model = BertForMaskedLM.from_pretrained(folder.parent / "start")
    return cls(model=model, args=args, train_dataset=FixedRows("mlm", 640, seed=0))


def train(folder: Path, name: str, checkpoint: Path | None = None, cls: type[Trainer] = LambTrainer) -> None:
    run = trainer(cls, folder, name)
    run.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    if name != "ddp":
        assert_sharded(run.model, name)
    weights = whole_weights(run.model if name != "ddp" else run.accelerator.unwrap_model(run.model))
    if checkpoint is None and cls is LambTrainer:
        run.save_model(str(folder / "model"))
    if dist.get_rank() == 0:
        torch.save(weights, folder / "weights.pt")
        (folder / "log.json").write_text(json.dumps(run.state.log_history))
    forget_accelerator()


def assert_layers_stay_whole(root: Path, name: str) -> None:
    """From a checkpoint that has no word of layers, as those of older versions."""
    run = trainer(SplitTrainer, root / f"split-{name}", name)
    with pytest.warns(
        UserWarning, match=r"keeps its checkpoint's layers: .*intermediate.* is 1 there, and 2 in these"
    ):
        run.train(resume_from_checkpoint=str(root / name / f"checkpoint-{SAVED_AT}"))
    weights, expected = whole_weights(run.model), torch.load(root / f"{name}-to-1/weights.pt")
    assert all(torch.equal(weights[key], w) for key, w in expected.items())
    forget_accelerator()


def what_stock_trainer_says(folder: Path, root: Path) -> str:
    """About a sharded checkpoint on more processes than a tensor has rows; nothing if upstream has mended it."""
    message = ""
    try:
        train(folder, "orig-sharded", root / f"orig-sharded/checkpoint-{SAVED_AT}", Trainer)
    except BaseException as error:  # a CheckpointException is no Exception
        message = str(error)
    forget_accelerator()
    return message


def assert_sharded(model: nn.Module, name: str) -> None:
    assert isinstance(model, FullyShardedDataParallel)
    units = model.fsdp_modules(model)
    assert len(units) == 3
    assert all(unit._use_orig_params == name.startswith("orig") for unit in units)
    whole = dist.get_world_size() == 1
    strategy = ShardingStrategy.NO_SHARD if whole else ShardingStrategy.FULL_SHARD
    assert {unit.sharding_strategy for unit in units} == {strategy}
    flat = [unit._handle.flat_param for unit in units]
    share = sum(tensor.numel() for tensor in flat) / sum(tensor._unpadded_unsharded_size.numel() for tensor in flat)
    assert share == 1 if whole else share < 1.01 / dist.get_world_size(), share


def whole_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        return {clean_name(name): param.detach().clone() for name, param in model.named_parameters()}


def assert_local_checkpoints_are_refused(folder: Path) -> None:
    """Before the training, not when it is to be resumed."""
    run = trainer(LambTrainer, folder, "orig-local")
    with pytest.raises(ValueError, match=r"use SHARDED_STATE_DICT .* LOCAL_STATE_DICT: accelerate 1.15 writes such"):
        run.train()
    forget_accelerator()


# -- a loop of one's own, with accelerate -----------------------------------------------------------------------------


class Loop:
    """Model and optimizer as the README has it."""

    def __init__(self, start: Path, name: str, optimizer: type[torch.optim.Optimizer] = Lamb) -> None:
        plugin = None
        if name != "ddp":
            options = {**plugin_options(name), "transformer_cls_names_to_wrap": ["BertLayer"]}
            plugin = FullyShardedDataParallelPlugin(fsdp_version=1, **options)
        self.accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
        model = BertForMaskedLM.from_pretrained(start)
        if name.startswith("flat"):
            model = self.accelerator.prepare(model)
        built = optimizer(lamb_param_groups(model) if optimizer is Lamb else model.parameters(), lr=2e-3)
        if name.startswith("flat"):
            self.model, self.optimizer = model, self.accelerator.prepare(built)
        else:
            self.model, self.optimizer = self.accelerator.prepare(model, built)
        if optimizer is Lamb:
            self.optimizer.optimizer.attach(self.model)

    def steps(self, first: int, last: int) -> None:
        n, rank = dist.get_world_size(), dist.get_rank()
        data = FixedRows("mlm", 640, seed=0)
        for step in range(first, last):
            rows = slice(step * ROWS, (step + 1) * ROWS)
            ids, labels = data.input_ids[rows].chunk(n)[rank], data.labels[rows].chunk(n)[rank]
            self.accelerator.backward(self.model(input_ids=ids, labels=labels).loss)
            self.optimizer.step()
            self.optimizer.zero_grad()


def loop(folder: Path, name: str) -> None:
    """Uninterrupted, with `save_state` in the middle; and once more from there."""
    start = folder.parent / "start"
    run = Loop(start, name)
    run.steps(0, SAVED_AT)
    run.accelerator.save_state(str(folder / "state"))
    run.steps(SAVED_AT, STEPS)
    finish(run, folder / "weights.pt")

    run = Loop(folder.parent / "another-start", name)
    run.accelerator.load_state(str(folder / "state"))
    run.steps(SAVED_AT, STEPS)
    finish(run, folder / "resumed.pt")


def finish(run: Loop, file: Path) -> None:
    weights = whole_weights(run.accelerator.unwrap_model(run.model) if "ddp" in str(file) else run.model)
    if dist.get_rank() == 0:
        torch.save(weights, file)
    forget_accelerator()


def states_that_accelerate_loads(folder: Path) -> int:
    """Of torch's AdamW from a sharded checkpoint: how many parameters have state here afterwards."""
    run = Loop(folder.parent / "start", "orig-sharded", torch.optim.AdamW)
    run.steps(0, 1)
    run.accelerator.save_state(str(folder))
    forget_accelerator()
    run = Loop(folder.parent / "start", "orig-sharded", torch.optim.AdamW)
    run.accelerator.load_state(str(folder))
    states = len(run.optimizer.state)
    forget_accelerator()
    return states


if __name__ == "__main__":
    for name in ("hf_lamb", "accelerate", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with process_group():
        main(Path(sys.argv[1]))
