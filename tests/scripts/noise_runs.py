"""LambTrainer on one process or, through torchrun, on several; writes what it logged.

python -m tests.scripts.noise_runs {rate,split_batches,noise,noise-each,noise-fp16,split} \
    PER_DEVICE_BATCH ACCUMULATION OUTPUT.json [SEED]

`rate`: the learning rates of a scaled run. `split_batches`: those, and what it counts, where
accelerate splits its batches. `noise`: the gradient noise scale of a model where it is known: the loss
x·w has the gradient mean(x), whatever w is, so with x ~ N(mean, 1) in d dimensions the noise scale is d / ‖mean‖².
`noise-each`: the same, averaged over processes after every micro-batch. `noise-fp16`: the same, with accelerate's
fp16 communication hook (torch has bf16's on GPUs only), with and without accumulation, and the warnings.
`split`: rates and losses of a scaled run, and that model's noise scales with some seeds.
"""

import logging
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs
from torch import nn
from torch.utils.data import Dataset
from transformers import set_seed

from hf_lamb import LambTrainer, LambTrainingArguments
from tests.scripts import split_batch
from tests.scripts.scaffold import QUIET, write_and_leave

DIMENSIONS, NOISE_SCALE, SEEDS = 256, 24.0, 6


class Rows(Dataset):
    """Fresh Gaussian rows x ~ N(mean, 1), the same for the same seed and index."""

    labelled = 1.0  # the share of rows that have a label

    def __init__(self, rows: int, seed: int) -> None:
        mean = (1 / NOISE_SCALE) ** 0.5  # of each coordinate, so that ‖mean‖² = DIMENSIONS / NOISE_SCALE
        self.x = torch.randn(rows, DIMENSIONS, generator=torch.Generator().manual_seed(seed)) + mean

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": self.x[index], "labels": torch.tensor(0 if index % 10 < 10 * self.labelled else -100)}


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(DIMENSIONS))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (x @ self.w).mean()}


def noise_trainer(
    path: Path, batch: int, accumulation: int, seed: int = 0, cls: type[LambTrainer] = LambTrainer, **options: Any
) -> LambTrainer:
    set_seed(seed)
    defaults: dict[str, Any] = {"max_steps": 240, "logging_steps": 20, "save_strategy": "no", **QUIET}
    defaults |= {"learning_rate": 1e-3, "seed": seed, "optim": "lamb"}
    args = LambTrainingArguments(
        output_dir=str(path),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        **defaults | options,
    )
    return cls(model=Linear(), args=args, train_dataset=Rows(16 * 240, seed))


def scaled_trainer(path: Path, batch: int, accumulation: int, steps: int, **options: Any) -> LambTrainer:
    """A masked LM whose rate follows from the global batch."""
    args = LambTrainingArguments(
        output_dir=str(path / "trainer"),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        base_learning_rate=4e-3,
        base_batch_size=64,
        max_steps=steps,
        logging_steps=1,
        save_strategy="no",
        **QUIET,
        **options,
    )
    model = split_batch.trained_model("mlm", path / f"start-{batch}")
    return LambTrainer(model=model, args=args, train_dataset=split_batch.FixedRows("mlm", 256, seed=0))


def logged(trainer: LambTrainer, key: str) -> list[float]:
    trainer.train()
    return [line[key] for line in trainer.state.log_history if key in line]


def main(what: str, batch: int, accumulation: int, output: Path, seed: int = 0) -> None:
    path, noise = output.parent, "lamb/noise_scale"
    found: Any
    if what == "split_batches":
        trainer = scaled_trainer(path, batch, accumulation, steps=3, accelerator_config={"split_batches": True})
        rows: set[int] = set()
        hook = trainer.model.register_forward_pre_hook(
            lambda _, given, kwargs: rows.add(len(kwargs["labels"])), with_kwargs=True
        )
        found = {
            "learning_rate": logged(trainer, "learning_rate"),
            "noise_batch": trainer.noise_measurement.global_batch_size(),
        }
        hook.remove()
        trainer.create_model_card()
        found["rows"] = max(rows)  # the loss was tried on halves too
        if trainer.is_world_process_zero():
            found["card"] = (path / "trainer/README.md").read_text()
    elif what == "noise-fp16":
        hook = DistributedDataParallelKwargs(comm_hook=DDPCommunicationHookType.FP16)
        warned: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: warned.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("hf_lamb.trainer.noise_scale").addHandler(handler)
        found = {}
        for steps in (1, accumulation):
            trainer = noise_trainer(path / "trainer", batch, steps, seed, max_steps=240 if steps > 1 else 20)
            trainer.accelerator.ddp_handler = hook
            found[steps] = logged(trainer, noise)
        found["warned"] = warned
    elif what.startswith("noise"):
        each = {"gradient_accumulation_kwargs": {"sync_each_batch": what == "noise-each"}}
        trainer = noise_trainer(path / "trainer", batch, accumulation, seed, accelerator_config=each)
        found = logged(trainer, noise)
    else:
        trainer = scaled_trainer(path, batch, accumulation, steps=3 if what == "rate" else 20)
        found = logged(trainer, "learning_rate")
    if what == "split":
        found = {"learning_rate": found, "loss": [x["loss"] for x in trainer.state.log_history if "loss" in x]}
        runs = (noise_trainer(path / "trainer", batch, accumulation, s, max_steps=40) for s in range(SEEDS))
        found["noise_scale"] = [values[-1] for run in runs if (values := logged(run, noise))]
    write_and_leave(trainer, output, found)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), *map(int, sys.argv[5:]))
