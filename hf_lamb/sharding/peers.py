"""Processes that hold other parameters of the same model, as with ZeroRedundancyOptimizer."""

from __future__ import annotations

import sys
from types import FrameType

from hf_lamb.sharding.collectives import Reduction, reduction_of


def zero_redundancy_group() -> Reduction | None:
    """Return the process group of the ZeroRedundancyOptimizer that is constructing this optimizer, or None.

    ZeroRedundancyOptimizer gives the optimizer of each process some of the parameters, but does not pass its process
    group. All processes must skip a step together, so this function finds the group on the call stack.
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
