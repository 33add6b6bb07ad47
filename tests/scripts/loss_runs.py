"""LambTrainer on two processes, where they differ; run through torchrun, it writes what came out.

python -m tests.scripts.loss_runs {evaluate,twice,unequal,fsdp2-twice} OUTPUT.json

`evaluate`: eval_loss of ten rows, which fill no last batch, for whole-number and float labels. `twice`: evaluation and
training in turns, the second with another batch and accumulation. `unequal`: the first batch has one row on one
process and four on the other, under FSDP2.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import Dataset

from hf_lamb import LambTrainer, LambTrainingArguments
from tests.scripts import cpu_fsdp, split_batch
from tests.scripts.scaffold import QUIET, write_and_leave

FSDP2 = {
    "version": 2,
    "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "transformer_layer_cls_to_wrap": ["BertLayer"],
    "state_dict_type": "FULL_STATE_DICT",
    "cpu_ram_efficient_loading": False,
}


class Targets(Dataset):
    """Ten rows; float targets that differ much, or whole-number ones."""

    def __init__(self, kind: str) -> None:
        self.x = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
        numbers = torch.arange(10)
        self.labels = {"float": numbers.float() ** 2 / 10, "whole": numbers % 3}[kind]

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": self.x[index], "labels": self.labels[index]}


class Head(nn.Module):
    """A linear head with the loss of its labels' kind; a whole number that is none of its classes is an error."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.line = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        logits = self.line(x)
        if labels.is_floating_point():
            return {"loss": nn.functional.mse_loss(logits[:, 0], labels), "logits": logits}
        chosen = nn.functional.one_hot(labels, 3)
        return {"loss": -(logits.log_softmax(-1) * chosen).sum(-1).mean(), "logits": logits}


class Budget(Dataset):
    """Rows of one batch each: one long sequence, or four short ones."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        shape = (1, 16) if index % 2 == 0 else (4, 4)
        ids = torch.randint(5, 100, shape, generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": torch.arange(len(ids)) % 2}


class InOrder(LambTrainer):
    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def arguments(path: Path, **options: Any) -> LambTrainingArguments:
    defaults: dict[str, Any] = {"max_steps": 3, "logging_steps": 1, "save_strategy": "no", **QUIET}
    defaults |= {"per_device_train_batch_size": 4}
    return LambTrainingArguments(output_dir=str(path / "trainer"), **defaults | options)


def logged(trainer: LambTrainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def main(what: str, output: Path) -> None:
    path, found = output.parent, {}
    fsdp: dict[str, Any] = {}
    if what in ("unequal", "fsdp2-twice"):
        cpu_fsdp.enable()
        fsdp = {"fsdp": True, "fsdp_config": FSDP2}
    if what == "evaluate":
        for kind in ("float", "whole"):
            for metrics in (None, lambda prediction: {"rows": len(prediction.predictions)}):
                trainer = LambTrainer(
                    model=Head(),
                    args=arguments(path, per_device_eval_batch_size=3),
                    eval_dataset=Targets(kind),
                    compute_metrics=metrics,
                )
                name = kind if metrics is None else f"{kind} with predictions"
                found[name] = trainer.evaluate()
    elif what == "unequal":
        one_batch_each = {"dispatch_batches": False, "even_batches": False}
        trainer = InOrder(
            model=split_batch.trained_model("classification", path / "start"),
            args=arguments(path, per_device_train_batch_size=1, accelerator_config=one_batch_each, **fsdp),
            train_dataset=Budget(),
            data_collator=lambda rows: rows[0],
        )
        trainer.train()
        found["loss"] = logged(trainer)
    else:
        data = split_batch.FixedRows("mlm", 64, seed=0)
        trainer = LambTrainer(
            model=split_batch.trained_model("mlm", path / "start"),
            args=arguments(path, **fsdp),
            train_dataset=data,
            eval_dataset=data,
        )
        # accelerate 1.15 cannot train under FSDP2 what was evaluated before, the stock Trainer's either.
        evaluated = [] if fsdp else [trainer.evaluate()["eval_loss"]]
        trainer.train()
        found["first"] = logged(trainer)
        if not fsdp:
            evaluated.append(trainer.evaluate()["eval_loss"])
        trainer.args.gradient_accumulation_steps = 2
        trainer.train()
        found["second"] = logged(trainer)
        found["evaluated"] = [*evaluated, trainer.evaluate()["eval_loss"]]
    write_and_leave(trainer, output, found)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
