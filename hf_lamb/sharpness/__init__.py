"""Measures of sharpness, for any module and any loss over fixed batches: is the large batch's minimum sharper?

    from hf_lamb.sharpness import adaptive_sharpness, cross_entropy
    adaptive_sharpness(model, cross_entropy, [(inputs, classes), ...])    # Sharpness(value, loss, highest_loss)

    python -m hf_lamb.sharpness SMALL_BATCH_CHECKPOINT LARGE_BATCH_CHECKPOINT --data text.txt

Every result holds the loss at which it was measured. Compare networks at the same loss only, because sharpness falls
with the loss. A sharper network need not generalise worse (Andriushchenko et al. 2023, arXiv 2302.07011).
docs/sharpness.md explains each measure. `SharpnessCallback` and loading checkpoints need transformers; the rest needs
torch only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hf_lamb.sharpness.ascent import Sharpness, adaptive_sharpness, epsilon_sharpness, layer_sharpness
from hf_lamb.sharpness.compare import Comparison, compare
from hf_lamb.sharpness.flatness import Flatness, epsilon_flatness
from hf_lamb.sharpness.hessian import Curvature, hessian_trace, lambda_max, weighted_trace
from hf_lamb.sharpness.objective import BatchLoss, cross_entropy, fixed_batches, labels_loss
from hf_lamb.sharpness.paths import Point, alpha_scale, interpolate

if TYPE_CHECKING:
    from hf_lamb.sharpness.callback import SharpnessCallback

__all__ = [
    "BatchLoss",
    "Comparison",
    "Curvature",
    "Flatness",
    "Point",
    "Sharpness",
    "SharpnessCallback",
    "adaptive_sharpness",
    "alpha_scale",
    "compare",
    "cross_entropy",
    "epsilon_flatness",
    "epsilon_sharpness",
    "fixed_batches",
    "hessian_trace",
    "interpolate",
    "labels_loss",
    "lambda_max",
    "layer_sharpness",
    "weighted_trace",
]


def __getattr__(name: str) -> Any:
    if name != "SharpnessCallback":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from hf_lamb.sharpness.callback import SharpnessCallback

    return SharpnessCallback
