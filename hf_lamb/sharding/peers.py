"""Processes with other parameters of the same model: ZeroRedundancyOptimizer's, the stages of a pipeline."""

from __future__ import annotations

import sys
from types import FrameType

from hf_lamb.sharding.collectives import Reduction, reduction_of


def zero_redundancy_group() -> Reduction | None:
    """The group of the ZeroRedundancyOptimizer that is constructing an optimizer right now, if one is.

    It gives each process's optimizer some of the parameters and no other word, but all must skip a step together.
    """
    module = sys.modules.get("torch.distributed.optim")
    if module is None:
        return None
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, module.ZeroRedundancyOptimizer):
            return reduction_of(caller.process_group, caller.param_groups[0]["params"][0].device)
        frame = frame.f_back
    return None
