"""Protects the promise that LambTrainer's extras do not make the host wait for the device between log lines."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_lamb import LambTrainer, LambTrainingArguments
from tests.scripts import split_batch

# What reads a tensor's values on the host: operators below Python, and methods that no operator stands for.
OPERATORS = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero", "aten::masked_select"}
METHODS = ("tolist", "numpy", "cpu", "__array__")


class Syncs(TorchDispatchMode):
    """Counts them."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in OPERATORS:
            self.counts[name] += 1
        return func(*args, **kwargs or {})


class PerStep(TrainerCallback):
    """Takes the counts at the end of every step."""

    def __init__(self, syncs: Syncs) -> None:
        self.syncs, self.steps = syncs, []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.steps.append(dict(self.syncs.counts))
        self.syncs.counts.clear()


def syncs_of(
    cls: type[Trainer], args: type[TrainingArguments], path: Path, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> list[dict[str, int]]:
    """Of each of seven steps in eight micro-batches, with a log line every three."""
    defaults = {"max_steps": 7, "logging_steps": 3, "save_strategy": "no", "report_to": [], "use_cpu": True}
    defaults |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 8, "disable_tqdm": True}
    run = cls(
        model=split_batch.trained_model("mlm", path / "start"),
        args=args(output_dir=str(path), **defaults | options),
        train_dataset=split_batch.FixedRows("mlm", 512, seed=0),
    )
    syncs = Syncs()
    run.add_callback(per_step := PerStep(syncs))
    with monkeypatch.context() as patched:
        for method in METHODS:
            stock = getattr(torch.Tensor, method)

            def counted(self: torch.Tensor, *a: Any, stock: Any = stock, method: str = method, **k: Any) -> Any:
                syncs.counts[method] += 1
                return stock(self, *a, **k)

            patched.setattr(torch.Tensor, method, counted)
        with syncs:
            run.train()
    return per_step.steps


def test_none_are_added_between_log_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as a stock Trainer with SGD has, in every step but the first, where the kind of loss is found out, and
    those after a log line. (torch's AdamW reads every parameter's step.) What a log line reads is counted."""
    stock = syncs_of(Trainer, TrainingArguments, tmp_path, monkeypatch, optim="sgd")
    ours = syncs_of(LambTrainer, LambTrainingArguments, tmp_path, monkeypatch)
    assert len(stock) == len(ours) == 7
    quiet = [step for step in range(1, 7) if step % 3]
    assert [ours[step] for step in quiet] == [stock[step] for step in quiet]
    assert sum(ours[3].values()) > sum(stock[3].values())
