"""Trains a tiny BERT under DDP and DeepSpeed ZeRO, through Trainer and through Accelerate; resumes under ZeRO.

Run by tests/test_deepspeed.py: torchrun --nproc_per_node 2 -m tests.scripts.zero_runs ROOT

ROOT/start is the model to start from. Each run leaves its weights in ROOT/NAME/model.safetensors and what a Trainer
logged in ROOT/NAME/log.json; what was refused is in ROOT/refused.json.
"""

import gc
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch
import torch.distributed as dist
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import InitProcessGroupKwargs
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from transformers import BertForMaskedLM, Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from hf_lamb import CheckpointError, Lamb, LambTrainer, LambTrainingArguments, lamb_param_groups
from hf_lamb.trainer import deepspeed as deepspeed_checkpoints
from tests.scripts.scaffold import QUIET, forget_accelerator, process_group, write_results
from tests.scripts.split_batch import FixedRows

ROWS, STEPS, SAVED_AT = 32, 6, 3  # rows in a global batch


def main(root: Path) -> None:
    train(root / "ddp", None)
    for stage in (1, 2, 3):
        train(root / f"zero{stage}", stage)
    for stage in (2, 3):
        train(root / f"zero{stage}-resumed", stage, root / f"zero{stage}/checkpoint-{SAVED_AT}")
    for stage in (None, 2):
        train(root / f"stock-{stage}", stage, cls=Trainer)
    record_refusals(root)
    for stage in (None, 1, 2, 3):
        loop(root / f"loop-{stage}", root / "start", stage)


@contextmanager
def launched(stage: int | None) -> Iterator[None]:
    """What `accelerate launch` says by environment variables; nothing is left of it afterwards."""
    said = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage),
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    }
    if stage is not None:
        os.environ.update(said)
    try:
        yield
    finally:
        for variable in said:
            os.environ.pop(variable, None)
        unset_hf_deepspeed_config()
        forget_accelerator()
        gc.collect()


def trainer(folder: Path, cls: type[Trainer]) -> Trainer:
    args = LambTrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=ROWS // 2 // dist.get_world_size(),
        gradient_accumulation_steps=2,
        per_device_eval_batch_size=16,
        learning_rate=2e-3,
        max_grad_norm=0.5,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=SAVED_AT,
        save_steps=SAVED_AT,
        seed=7,
        **QUIET,
    )
    # With ZeRO-3 in pieces from the start, by deepspeed.zero.Init.
    model = BertForMaskedLM.from_pretrained(folder.parent / "start")
    return cls(
        model=model,
        args=args,
        train_dataset=FixedRows("mlm", 640, seed=0),
        eval_dataset=FixedRows("mlm", 101, seed=1),
    )


def train(folder: Path, stage: int | None, checkpoint: Path | None = None, cls: type[Trainer] = LambTrainer) -> None:
    with launched(stage):
        run = trainer(folder, cls)
        run.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        assert_ran_under(run.model_wrapped, stage)
        run.save_model(str(folder))
        write_results(folder / "log.json", run.state.log_history)


def assert_ran_under(engine: torch.nn.Module, stage: int | None) -> None:
    if stage is None:
        assert isinstance(engine, torch.nn.parallel.DistributedDataParallel)
    else:
        assert isinstance(engine, deepspeed.DeepSpeedEngine)
        assert engine.zero_optimization_stage() == stage
        assert isinstance(engine.basic_optimizer, Lamb)


def record_refusals(root: Path) -> None:
    """What LambTrainer says to checkpoints of another kind, by what was resumed under what."""
    said = {}
    for origin, stage in (("ddp", 2), ("zero2", None), ("zero2", 3), ("zero3", 1)):
        with launched(stage):
            run = trainer(root / "refused", LambTrainer)
            try:
                run.train(resume_from_checkpoint=str(root / origin / f"checkpoint-{SAVED_AT}"))
            except CheckpointError as error:
                said[f"{origin} under {stage}"] = str(error)
    with (
        launched(2),
        mock.patch.dict(os.environ, ACCELERATE_USE_CPU="true"),
        mock.patch.object(deepspeed_checkpoints.logger, "warning") as warning,
    ):
        trainer(root / "refused", LambTrainer)
    said["on the CPU under 2"] = str(warning.call_args.args[0]) if warning.called else ""
    try:
        deepspeed_checkpoints.check_deepspeed_checkpoint(root / f"zero3/checkpoint-{SAVED_AT}", 3, processes=4)
    except CheckpointError as error:
        said["zero3 on 4"] = str(error)
    write_results(root / "refused.json", said)


def loop(folder: Path, start: Path, stage: int | None) -> None:
    """A plain loop with accelerate; uninterrupted, and from `load_state` in the middle."""
    for resumed in (False, True):
        with launched(None):
            plugin = DeepSpeedPlugin(zero_stage=stage, gradient_clipping=0.5, zero3_init_flag=False) if stage else None
            accelerator = Accelerator(
                cpu=stage is None, deepspeed_plugin=plugin, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")]
            )
            model = BertForMaskedLM.from_pretrained(start)
            lamb = Lamb(lamb_param_groups(model), lr=2e-3)
            rows = DataLoader(FixedRows("mlm", 640, seed=0), batch_size=ROWS // dist.get_world_size())
            model, optimizer, rows = accelerator.prepare(model, lamb, rows)
            lamb.attach(model)
            if resumed:
                accelerator.load_state(str(folder / "state"))
            for step, batch in enumerate(rows):
                if resumed and step < SAVED_AT:
                    continue
                accelerator.backward(model(**batch).loss)
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
                if step == SAVED_AT - 1:
                    accelerator.save_state(str(folder / "state"))
                if step == STEPS - 1:
                    break
            assert_ran_under(model, stage)
            with deepspeed.zero.GatheredParameters(list(model.parameters()), enabled=stage == 3):
                if accelerator.is_main_process:
                    name = "resumed.safetensors" if resumed else "model.safetensors"
                    named = accelerator.unwrap_model(model).named_parameters()
                    save_file({n: param.detach().clone() for n, param in named}, folder / name)
            accelerator.wait_for_everyone()


if __name__ == "__main__":
    logging.getLogger("hf_lamb").setLevel(logging.ERROR)
    with process_group(deepspeed.init_distributed, verbose=False):
        deepspeed.utils.logger.setLevel("ERROR")
        main(Path(sys.argv[1]))
