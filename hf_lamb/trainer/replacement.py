"""Puts LambTrainer in the place of `transformers.Trainer`, for scripts that nobody edits."""

from __future__ import annotations

import sys
from typing import Any

import transformers.trainer

from hf_lamb.trainer.trainer import LambTrainer

__all__ = ["replace_trainer"]


def replace_trainer() -> None:
    """Make `transformers.Trainer` be `LambTrainer` in this process; a second call changes nothing.

    Every class that is derived from `transformers.Trainer` afterwards is derived from `LambTrainer`: Seq2SeqTrainer,
    the trainers of trl and of sentence-transformers, and the script's own.

    Raises:
        RuntimeError: another module has imported the stock Trainer already; it would continue to use that one.
    """
    module: Any = transformers.trainer
    if module.Trainer is LambTrainer:
        return
    holders = [name for name, other in list(sys.modules.items()) if _names(other).get("Trainer") is module.Trainer]
    for name in holders:
        if name not in ("transformers", module.__name__) and not name.startswith("hf_lamb."):
            raise RuntimeError(f"{name} must not import transformers.Trainer before the script starts")
    module.Trainer = LambTrainer
    # Not the name `transformers` of this file: transformers' `__init__` may have run again since, as another module.
    package: Any = sys.modules["transformers"]
    package.Trainer = LambTrainer


def _names(module: Any) -> dict[str, Any]:
    return getattr(module, "__dict__", {})  # sys.modules may hold anything
