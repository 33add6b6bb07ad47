"""recipes.accelerate_loop on several processes through torchrun, and the bytes that its training sends.

torchrun --standalone --nproc_per_node 2 -m tests.scripts.compressed OUTPUT.json --use_cpu --comm_hook bf16 ...

The options are the recipe's. The bytes are those of this process's TCP sockets, as Linux counts them, from the first
step to the end of the last one. torch refuses its bf16 hook without CUDA, by its name; Gloo runs it under another one.
"""

import json
import os
import socket
import stat
import struct
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from recipes import accelerate_loop

TCPI_BYTES_SENT = 200  # its offset in Linux's struct tcp_info (since 4.19)


def bytes_sent() -> int:
    """Of all TCP sockets of this process."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # closed meanwhile
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            with socket.fromfd(int(name), socket.AF_INET, socket.SOCK_STREAM) as own:
                info = own.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                total += struct.unpack_from("Q", info, TCPI_BYTES_SENT)[0]
    return total


def main() -> None:
    """Train, and write what was sent and what the recipe found."""
    path = Path("compressed.json" if sys.argv[1].startswith("-") else sys.argv.pop(1))
    seen: dict[str, Any] = {}
    step, evaluate = accelerate_loop.forward_and_backward, accelerate_loop.evaluate

    def first_step(*arguments: Any) -> Any:
        if not seen:
            seen["before"] = bytes_sent()
        seen["steps"] = seen.get("steps", 0) + 1
        return step(*arguments)

    def after_the_last(accelerator: Any, model: Any, held_out: Any) -> dict[str, float]:
        seen["after"] = bytes_sent()
        metrics = evaluate(accelerator, model, held_out)
        if accelerator.is_main_process:
            numbers = sum(param.numel() for param in model.parameters())
            sent = (seen["after"] - seen["before"]) / seen["steps"]
            path.write_text(json.dumps({"parameters": numbers, "bytes_per_step": sent, **metrics}))
        return metrics

    replaced = {"forward_and_backward": first_step, "evaluate": after_the_last, "check_hook": lambda *_: None}
    hook = default_hooks.bf16_compress_hook
    hook.__name__, name = "bf16_compress_hook_on_gloo", hook.__name__
    try:  # undone at the end: tests/test_readme.py calls this in the process of other tests
        with mock.patch.multiple(accelerate_loop, **replaced):
            accelerate_loop.main()
    finally:
        hook.__name__ = name


if __name__ == "__main__":
    main()
