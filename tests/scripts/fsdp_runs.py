"""Trains a tiny BERT under DDP and FSDP2, saves in the middle, resumes what was saved on other numbers of processes.

Run by tests/test_fsdp.py through torchrun: python -m tests.scripts.fsdp_runs ROOT [--whole] [--resume PROCESSES ...]

Whole runs leave ROOT/PROCESSES-LAYOUT/, resumed ones ROOT/FROM-LAYOUT-to-PROCESSES-LAYOUT/; in each of them
weights.pt, what a Trainer logged in log.json, and what a plain loop ended with in loop-KIND.pt.
"""

import argparse
import json
import logging
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from transformers import BertConfig, BertForMaskedLM, Trainer, TrainerCallback

from hf_lamb import Lamb, LambTrainer, LambTrainingArguments, lamb_param_groups
from hf_lamb.trainer.checkpoints import CheckpointError
from hf_lamb.trainer.fsdp import tied_heads_in_one_group
from recipes.lib import bert
from tests.scripts import cpu_fsdp
from tests.scripts.scaffold import QUIET, forget_accelerator, process_group
from tests.scripts.split_batch import FixedRows, trained_model

LAYOUTS = ("ddp", "sharded", "full")  # DDP; FSDP2, with sharded and with full state dicts in its checkpoints
ROWS, STEPS, SAVED_AT, SKIPPED_AT = 32, 5, 3, 2  # rows in a global batch
WRAP = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "reshard_after_forward": True}


def main(root: Path, whole: bool, resume: list[int]) -> None:
    cpu_fsdp.enable()
    n = dist.get_world_size()
    if whole:
        for layout in LAYOUTS if n < 4 else LAYOUTS[:2]:
            train(root / f"{n}-{layout}", layout)
        for layout in LAYOUTS[:2]:
            loop(root / f"{n}-{layout}", layout)
    if whole and n == 1:
        for layout in LAYOUTS[1:]:
            assert_layers_stay_whole(root, layout)
    if whole and n == 2:
        train(root / "2-sharded-recipe", "sharded", model=bert.BertForMaskedLM)
        assert_stock_trainer_crashes(root / "crash")
    if n == 1 and 2 in resume:
        assert_another_model_is_refused(root / "refused", root / f"2-sharded/checkpoint-{SAVED_AT}")
    for source, source_layout, layout in product(resume, LAYOUTS, LAYOUTS):
        folder, origin = root / f"{source}-{source_layout}-to-{n}-{layout}", root / f"{source}-{source_layout}"
        # Few processes take every way, many the usual ones.
        if source + n == 3 or (source_layout == layout and (layout != "full" or source + n < 5)):
            train(folder, layout, origin / f"checkpoint-{SAVED_AT}")
        if "full" not in (source_layout, layout):
            for kind in KINDS if source == 2 and (n < 4 or source_layout == layout) else ["sharded"]:
                resume_loop(folder, layout, origin, kind)


# -- Trainer ----------------------------------------------------------------------------------------------------------


def trainer(cls: type[Trainer], folder: Path, layout: str, model: type[BertForMaskedLM] = BertForMaskedLM) -> Trainer:
    fsdp = {}
    if layout != "ddp":
        kind = "SHARDED_STATE_DICT" if layout == "sharded" else "FULL_STATE_DICT"
        config = {"transformer_layer_cls_to_wrap": ["BertLayer"], "state_dict_type": kind, **WRAP}
        fsdp = {"fsdp": True, "fsdp_config": config}
    args = LambTrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=ROWS // dist.get_world_size(),
        per_device_eval_batch_size=16,
        learning_rate=2e-3,
        max_grad_norm=0.5,
        logging_steps=1,
        log_trust_ratio_per_layer=True,
        eval_strategy="steps",
        eval_steps=SAVED_AT,
        save_steps=SAVED_AT,
        seed=7,
        **QUIET,
        **fsdp,
    )
    return cls(
        model=model.from_pretrained(folder.parent / "start"),
        args=args,
        train_dataset=FixedRows("mlm", 640, seed=0),
        eval_dataset=FixedRows("mlm", 101, seed=1),
        callbacks=[PoisonedGradient()],
    )


class PoisonedGradient(TrainerCallback):
    """One step gets a NaN: of a sharded gradient on the last process only, and all must skip the step."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        if state.global_step == SKIPPED_AT - 1:
            grad = next(p.grad for name, p in model.named_parameters() if name.endswith("word_embeddings.weight"))
            if not isinstance(grad, DTensor):
                grad[0] = torch.nan
            elif dist.get_rank() == dist.get_world_size() - 1:
                grad.to_local()[0] = torch.nan


def train(folder: Path, layout: str, checkpoint: Path | None = None, model: Any = BertForMaskedLM) -> None:
    run = trainer(LambTrainer, folder, layout, model)
    run.accelerator.clip_grad_norm_ = None  # it must not be called: the optimizer clips
    run.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    if layout != "ddp":
        cpu_fsdp.assert_sharded(run.model, run.optimizer.optimizer)
    weights = full_weights(run.model)
    if checkpoint is None:
        run.save_model(str(folder / "model"))
    if dist.get_rank() == 0:
        torch.save(weights, folder / "weights.pt")
        (folder / "log.json").write_text(json.dumps(run.state.log_history))
    forget_accelerator()


def assert_stock_trainer_crashes(folder: Path) -> None:
    """And leave what it says in crash.txt; an empty file if upstream has mended it."""
    message = ""
    try:
        trainer(Trainer, folder, "sharded").train()
    except ValueError as error:
        message = str(error)
    (folder.parent / "crash.txt").write_text(message)
    forget_accelerator()


class Smaller(BertForMaskedLM):
    """With a smaller vocabulary."""

    @classmethod
    def from_pretrained(cls, path: Path) -> "Smaller":
        return cls(BertConfig.from_pretrained(path, vocab_size=200))


def assert_another_model_is_refused(folder: Path, checkpoint: Path) -> None:
    for layout in LAYOUTS[:2]:
        run = trainer(LambTrainer, folder, layout, Smaller)
        with pytest.raises(
            CheckpointError, match=r"checkpoint-3 is of another model: Size mismatch .*word_embeddings"
        ):
            run.train(resume_from_checkpoint=str(checkpoint))
        forget_accelerator()


class SplitTrainer(LambTrainer):
    """Whose groups say that the feed-forward matrices hold two layers."""

    def create_optimizer(self, *args: Any) -> Any:
        lamb = super().create_optimizer(*args)
        for group in lamb.param_groups:
            named = zip(group["param_names"], group["params"], strict=True)
            group["split"] = tuple((n, (p.numel() // 2,) * 2) for n, p in named if "intermediate.dense.weight" in n)
        return lamb


def assert_layers_stay_whole(root: Path, layout: str) -> None:
    """From a checkpoint that has no word of layers, as those of older versions."""
    run = trainer(SplitTrainer, root / f"split-{layout}", layout)
    with pytest.warns(
        UserWarning, match=r"keeps its checkpoint's layers: .*intermediate.* is 1 there, and 2 in these"
    ):
        run.train(resume_from_checkpoint=str(root / f"1-{layout}/checkpoint-{SAVED_AT}"))
    weights, expected = full_weights(run.model), torch.load(root / f"1-{layout}/weights.pt")
    assert all(torch.equal(weights[name], w) for name, w in expected.items())
    forget_accelerator()


def full_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """On the first process."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


# -- a loop of one's own, with accelerate and torch.distributed.checkpoint --------------------------------------------

KINDS = {
    "sharded": StateDictOptions(),
    "flat": StateDictOptions(flatten_optimizer_state_dict=True),
    "full": StateDictOptions(full_state_dict=True, cpu_offload=True),
}


class Loop:
    """Model and optimizer as `accelerator.prepare` returns them."""

    def __init__(self, start: Path, layout: str) -> None:
        plugin = None
        if layout != "ddp":
            plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2,
                transformer_cls_names_to_wrap=["BertLayer"],
                state_dict_type="SHARDED_STATE_DICT",
                **WRAP,
            )
        self.accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
        model = trained_model("mlm", start)
        self.lamb = Lamb(lamb_param_groups(model), lr=2e-3)
        with tied_heads_in_one_group(model):
            self.model, self.optimizer = self.accelerator.prepare(model, self.lamb)
        self.sharded = layout != "ddp"

    def steps(self, first: int, last: int) -> None:
        """Global batches of ROWS rows, split over the processes, their loss the mean over all labels."""
        n, rank = dist.get_world_size(), dist.get_rank()
        data = FixedRows("mlm", 640, seed=0)
        for step in range(first, last):
            rows = slice(step * ROWS, (step + 1) * ROWS)
            ids, labels = data.input_ids[rows], data.labels[rows]
            total = labels.ne(-100).sum()
            ids, labels = ids.chunk(n)[rank], labels.chunk(n)[rank]
            loss = self.model(input_ids=ids, labels=labels).loss
            self.accelerator.backward(loss * (labels.ne(-100).sum() / total * n))
            self.optimizer.step()
            self.optimizer.zero_grad()
        if self.sharded:
            cpu_fsdp.assert_sharded(self.model, self.lamb)
        else:
            assert isinstance(self.model, nn.parallel.DistributedDataParallel)

    def finish(self, file: Path) -> None:
        weights = full_weights(self.model)
        if dist.get_rank() == 0:
            file.parent.mkdir(exist_ok=True)
            torch.save(weights, file)
        forget_accelerator()


def loop(folder: Path, layout: str) -> None:
    """Uninterrupted, saving in the middle in every way; and once more from `save_state`."""
    run = Loop(folder.parent / "start", layout)
    run.steps(0, SAVED_AT)
    run.accelerator.save_state(str(folder / "state"))
    for kind, options in KINDS.items():
        model = get_model_state_dict(run.model, options=options)
        optim = get_optimizer_state_dict(run.model, run.optimizer, options=options)
        if kind != "full":
            dcp.save({"model": model, "optim": optim}, checkpoint_id=folder / kind)
        elif dist.get_rank() == 0:
            torch.save({"model": model, "optim": optim}, folder / "full.pt")
    run.steps(SAVED_AT, STEPS)
    run.finish(folder / "loop-whole.pt")

    run = Loop(folder.parent / "another-start", layout)
    run.accelerator.load_state(str(folder / "state"))
    run.steps(SAVED_AT, STEPS)
    run.finish(folder / "loop-state.pt")


def resume_loop(folder: Path, layout: str, origin: Path, kind: str) -> None:
    """From what torch.distributed.checkpoint, or torch.save, wrote."""
    run = Loop(folder.parent / "another-start", layout)
    before = [param.detach().clone() for param in run.model.parameters()]
    options = KINDS[kind]
    if kind == "full":
        first = dist.get_rank() == 0
        saved = torch.load(origin / "full.pt") if first else {"model": {}, "optim": {}}
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    else:
        # A fresh optimizer does a step here, so that it has state to be overwritten.
        optim = get_optimizer_state_dict(run.model, run.optimizer, options=options)
        saved = {"model": get_model_state_dict(run.model, options=options), "optim": optim}
        assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True)), "not a no-op"
        dcp.load(saved, checkpoint_id=origin / kind)
    set_optimizer_state_dict(run.model, run.optimizer, saved["optim"], options=options)
    if kind == "full":
        assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True)), "not a no-op"
    set_model_state_dict(run.model, saved["model"], options=options)
    assert run.lamb.skipped_steps() == (0, 0)
    assert run.lamb.layer_stats() == {}
    assert {int(state["step"]) for state in run.lamb.state.values()} == {SAVED_AT}
    run.steps(SAVED_AT, STEPS)
    run.finish(folder / f"loop-{kind}.pt")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--resume", type=int, nargs="*", default=[])
    given = parser.parse_args()
    logging.getLogger("hf_lamb").setLevel(logging.ERROR)
    with process_group():
        main(given.root, given.whole, given.resume)
