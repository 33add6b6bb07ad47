"""LambTrainer and its arguments. `trainer.py` overrides Trainer's hooks; the other modules do the work of a hook."""

from hf_lamb.trainer.arguments import LambTrainingArguments
from hf_lamb.trainer.trainer import LambTrainer

__all__ = ["LambTrainer", "LambTrainingArguments"]
