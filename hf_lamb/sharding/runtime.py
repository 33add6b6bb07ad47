"""The interface to a runtime that shards or flattens parameters without layout metadata on the tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_lamb.sharding.layout import Layout


class Runtime(Protocol):
    """One model that the runtime wraps: the layouts of its tensors, and which calls of `step` form one step."""

    layouts: dict[Tensor, Layout]  # of each tensor that the optimizer updates
    state_from_the_start: bool  # whether the optimizer's state must exist before the first step

    @staticmethod
    def wraps(model: Any) -> bool:
        """Return whether this runtime wraps the model."""

    def __init__(self, model: Any, optimizer: torch.optim.Optimizer) -> None:
        """Read the layouts. All processes call it together.

        Args:
            model: the wrapped model, for which `wraps` returned True.
            optimizer: the optimizer of its parameters.

        Raises:
            ShardingError: the runtime does something that `Lamb` does not support, or has an unknown version.
        """

    def starts_step(self, params: Sequence[Tensor]) -> bool:
        """Return whether a call of `step` with these parameters is the first one of an optimizer step."""

    def gradient_norm_sq(self, device: torch.device) -> Tensor | None:
        """Return the squared norm of all processes' gradients, 0-dim, on `device`; None if `Lamb` shall compute it."""
