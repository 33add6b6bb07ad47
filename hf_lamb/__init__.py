"""LAMB (You et al., arXiv 1904.00962) for PyTorch, the Hugging Face Trainer and Accelerate.

Importing this package imports nothing else. It makes `optim="lamb"` valid in `transformers.TrainingArguments`, whether
transformers is imported before or after. Its names import torch, and those that need it transformers, at their first
use.

Public submodules, which are imported by name: `hf_lamb.scaling` (batch size to learning rate, warm-up, decay),
`hf_lamb.batch_schedule` (batches that change during a run), `hf_lamb.plan` (published plans and the files of plans),
`hf_lamb.sharpness` with its `plots` and `checkpoints`, `hf_lamb.conformance` (which LAMB an optimizer is),
`hf_lamb.files` (files that are whole or not there), `hf_lamb.packed_rows` (documents that share rows).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_lamb._version import __version__
from hf_lamb.registration import register

if TYPE_CHECKING:
    from hf_lamb.convert import convert_state_dict
    from hf_lamb.lamb import Lamb, LayerStats, SkippedSteps
    from hf_lamb.optim_args import options_of
    from hf_lamb.param_groups import lamb_param_groups
    from hf_lamb.sharding import ShardingError
    from hf_lamb.sharpness import (
        SharpnessCallback,
        adaptive_sharpness,
        alpha_scale,
        epsilon_flatness,
        epsilon_sharpness,
        lambda_max,
        weighted_trace,
    )
    from hf_lamb.trainer import LambTrainer, LambTrainingArguments
    from hf_lamb.trainer.callbacks import SkippedStepsCallback, TrustRatioCallback, trust_ratio_history
    from hf_lamb.trainer.checkpoints import CheckpointError, check_checkpoint, newest_complete_checkpoint
    from hf_lamb.trainer.fsdp import tied_heads_in_one_group
    from hf_lamb.trainer.model_card import options_in_force
    from hf_lamb.trainer.noise_scale import noise_scale_in_words
    from hf_lamb.trainer.phases import CARRY_OVER
    from hf_lamb.trust_ratios import trust_ratio_warnings

__all__ = [
    "CARRY_OVER",
    "CheckpointError",
    "Lamb",
    "LambTrainer",
    "LambTrainingArguments",
    "LayerStats",
    "ShardingError",
    "SharpnessCallback",
    "SkippedSteps",
    "SkippedStepsCallback",
    "TrustRatioCallback",
    "__version__",
    "adaptive_sharpness",
    "alpha_scale",
    "check_checkpoint",
    "convert_state_dict",
    "epsilon_flatness",
    "epsilon_sharpness",
    "lamb_param_groups",
    "lambda_max",
    "newest_complete_checkpoint",
    "noise_scale_in_words",
    "options_in_force",
    "options_of",
    "register",
    "tied_heads_in_one_group",
    "trust_ratio_history",
    "trust_ratio_warnings",
    "weighted_trace",
]

_LAZY = {
    "CARRY_OVER": "hf_lamb.trainer.phases",
    "CheckpointError": "hf_lamb.trainer.checkpoints",
    "Lamb": "hf_lamb.lamb",
    "LambTrainer": "hf_lamb.trainer",
    "LambTrainingArguments": "hf_lamb.trainer",
    "LayerStats": "hf_lamb.lamb",
    "ShardingError": "hf_lamb.sharding",
    "SharpnessCallback": "hf_lamb.sharpness",
    "SkippedSteps": "hf_lamb.lamb",
    "SkippedStepsCallback": "hf_lamb.trainer.callbacks",
    "TrustRatioCallback": "hf_lamb.trainer.callbacks",
    "adaptive_sharpness": "hf_lamb.sharpness",
    "alpha_scale": "hf_lamb.sharpness",
    "check_checkpoint": "hf_lamb.trainer.checkpoints",
    "convert_state_dict": "hf_lamb.convert",
    "epsilon_flatness": "hf_lamb.sharpness",
    "epsilon_sharpness": "hf_lamb.sharpness",
    "lamb_param_groups": "hf_lamb.param_groups",
    "lambda_max": "hf_lamb.sharpness",
    "newest_complete_checkpoint": "hf_lamb.trainer.checkpoints",
    "noise_scale_in_words": "hf_lamb.trainer.noise_scale",
    "options_in_force": "hf_lamb.trainer.model_card",
    "options_of": "hf_lamb.optim_args",
    "tied_heads_in_one_group": "hf_lamb.trainer.fsdp",
    "trust_ratio_history": "hf_lamb.trainer.callbacks",
    "trust_ratio_warnings": "hf_lamb.trust_ratios",
    "weighted_trace": "hf_lamb.sharpness",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return __all__


register()
