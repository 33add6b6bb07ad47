"""Steps on every size and dtype with the C kernel under the address and the undefined-behaviour sanitizer.

LD_PRELOAD=$(cc -print-file-name=libasan.so) ASAN_OPTIONS=detect_leaks=0 python -m tests.scripts.sanitized_kernel
"""

import os
import tempfile
from pathlib import Path

import torch

from hf_lamb.backends import compiler
from tests.test_lamb_c_kernel import SIZES, stepped

FLAGS = "-O1 -g -march=native -std=c11 -fno-math-errno -shared -fPIC"
SANITIZERS = "-fsanitize=address,undefined -fno-sanitize-recover=all"


def main() -> None:
    torch.set_num_threads(3)
    compiler.FLAGS = (*FLAGS.split(), *SANITIZERS.split())
    compiler.library.cache_clear()
    if os.environ.get("HF_LAMB_BROKEN_KERNEL"):  # so that the test is seen to fail
        compiler.SOURCE = Path(tempfile.mkdtemp()) / "lamb.c"
        whole = Path(compiler.__file__).with_name("lamb.c").read_text()
        compiler.SOURCE.write_text(whole.replace("start < CHUNK ? row[NUMEL] :", "start < CHUNK ? row[NUMEL] + 1 :"))
    assert compiler.library() is not None
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        stepped(SIZES, dtype, max_grad_norm=0.1)
    print("no fault found")


if __name__ == "__main__":
    main()
