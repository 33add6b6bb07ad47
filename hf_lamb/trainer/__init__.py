"""LambTrainer and its arguments: `trainer` has the hooks of Trainer, the other modules the steps that they call."""

from hf_lamb.trainer.arguments import LambTrainingArguments
from hf_lamb.trainer.trainer import LambTrainer

__all__ = ["LambTrainer", "LambTrainingArguments"]
