"""Lets accelerate take its FSDP paths on CPUs with gloo; by itself it falls back to DDP there and says nothing.

Call `enable` before a Trainer or an Accelerator is built. Or run a module with it:
python -m tests.scripts.cpu_fsdp MODULE ARGUMENTS
"""

import runpy
import sys
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor


def enable() -> None:
    stock = AcceleratorState.__init__

    def init(self: AcceleratorState, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin")
        if plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self.mixed_precision != "no":
                plugin.set_mixed_precision(self.mixed_precision)
            self.fsdp_plugin = plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.device = PartialState._shared_state["device"] = torch.device("cpu")

    AcceleratorState.__init__ = init

    # Moved from a CPU to a CPU, FSDP1 frees the tensor that it has "copied", and the moments become one (torch 2.13).
    stock_type = FullyShardedDataParallel.set_state_dict_type

    def set_state_dict_type(module: nn.Module, kind: Any, *configs: Any) -> Any:
        for config in filter(None, configs):
            config.offload_to_cpu = False
        return stock_type(module, kind, *configs)

    FullyShardedDataParallel.set_state_dict_type = staticmethod(set_state_dict_type)


def assert_sharded(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """That every parameter and moment is a DTensor, and that on several processes most are not here as a whole."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    assert len(params) == len(list(model.parameters())) > 0
    for param in params:
        state = optimizer.state[param]
        assert all(isinstance(tensor, DTensor) for tensor in (param, state["exp_avg"], state["exp_avg_sq"]))
        assert state["exp_avg"].to_local().shape == param.to_local().shape
    here, all_ = sum(p.to_local().numel() for p in params), sum(p.numel() for p in params)
    processes = torch.distributed.get_world_size()
    assert here == all_ if processes == 1 else here < 0.8 * all_, f"{here} of {all_} elements on this process"


if __name__ == "__main__":
    enable()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
