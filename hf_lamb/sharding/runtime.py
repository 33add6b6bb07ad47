"""What a runtime tells that has cut or flattened the parameters and left no word of it on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_lamb.sharding.layout import Layout


class Runtime(Protocol):
    """One wrapped model: where the layers of its parameters lie, and how its steps are cut into calls.

    Built from what wraps the model and the optimizer of its parameters. All processes build it together.
    """

    layouts: dict[Tensor, Layout]  # of the tensors that the optimizer is given
    state_from_the_start: bool  # whether their state must exist before the first step

    @staticmethod
    def wraps(model: Any) -> bool:
        """Whether this runtime wraps the model."""

    def __init__(self, model: Any, optimizer: torch.optim.Optimizer) -> None:
        """Read where the layers lie.

        Raises:
            ShardingError: what this runtime does that cannot be done right, or that is not understood.
        """

    def starts_step(self, params: Sequence[Tensor]) -> bool:
        """Whether a call of `step` with these parameters is the first of an optimizer step."""

    def gradient_norm_sq(self, device: torch.device) -> Tensor | None:
        """Squared norm of all gradients of all processes where the runtime has it, else None; 0-dim, on `device`."""
