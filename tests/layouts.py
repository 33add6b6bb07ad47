"""A runtime whose layouts a test gives, as DeepSpeed and FSDP1 read theirs from a wrapped model."""

from collections.abc import Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.optim import Optimizer

from hf_lamb import Lamb
from hf_lamb.sharding import sharding
from hf_lamb.sharding.layout import Layout


class Given:
    """What a dict of layouts says; every call is a step."""

    state_from_the_start = False

    def __init__(self, model: dict[Tensor, Layout], optimizer: Optimizer) -> None:
        self.layouts = model

    @staticmethod
    def wraps(model: Any) -> bool:
        return isinstance(model, dict)

    def starts_step(self, params: Sequence[Tensor]) -> bool:
        return True

    def gradient_norm_sq(self, device: torch.device) -> None:
        return None


def attach(optimizer: Lamb, layouts: dict[Tensor, Layout], *, check: bool = True) -> None:
    """Tell the optimizer where the layers lie; a collective where they are cut. `check`: that they add up."""
    with mock.patch.object(sharding, "RUNTIMES", (Given,)):
        if check:
            optimizer.attach(layouts)
        else:
            with mock.patch.object(sharding, "check_layouts"):
                optimizer.attach(layouts)
