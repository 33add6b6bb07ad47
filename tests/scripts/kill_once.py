"""Runs a module whose last process is killed in the middle of an optimizer step, unless torchrun has restarted it.

    torchrun --max-restarts 1 ... -m tests.scripts.kill_once STEP MODULE ARGUMENTS

In the middle: the layers that adapt have moved, the others have not. FSDP works on CPUs, see `cpu_fsdp`.
"""

import os
import runpy
import signal
import sys
from itertools import count
from typing import Any

from hf_lamb import lamb
from tests.scripts import cpu_fsdp


def kill_in(step: int) -> None:
    stock, steps = lamb.BucketStats, count(1)

    def bucket_stats(names: list[str], options: dict[str, Any], sums: Any) -> Any:
        if options["layer_adaptation"] and next(steps) == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return stock(names, options, sums)

    lamb.BucketStats = bucket_stats


if __name__ == "__main__":
    cpu_fsdp.enable()
    _, step, *sys.argv = sys.argv
    last = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1
    if last and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        kill_in(int(step))
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
