"""Compile the Triton kernels for an H100, without a GPU; exit with a line on what a compiled kernel should not have.

env -u TRITON_INTERPRET python -m tests.scripts.compile_kernels
"""

import re
import sys
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_lamb.backends import triton as kernels
from recipes.lib.report import no_options

TARGET = GPUTarget("cuda", 90, 32)
TYPES = {
    **dict.fromkeys(["n", "chunks", "size_of_chunk"], "i32"),
    **dict.fromkeys(["log_beta1", "log_beta2", "beta1", "one_minus_beta1", "beta2", "one_minus_beta2"], "fp32"),
    **dict.fromkeys(["eps", "weight_decay", "lr", "lowest", "highest"], "fp32"),
    **dict.fromkeys(["clip_factor", "corrections", "of_chunks", "sums", "moves", "step_sizes"], "*fp32"),
    **dict.fromkeys(["growths", "lr_at"], "*fp32"),
    **{"rows": "*i64", "owners": "*i32", "finite": "*u1"},
}


def compiled(kernel: Any, **constants: Any) -> str:
    """The PTX, after the assembler has taken it."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else TYPES[name] for name in names}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    return triton.compile(source, target=TARGET, options={"num_warps": kernels._WARPS}).asm["ptx"]


def main() -> None:
    ptx = {
        "_advance": compiled(kernels._advance, BIAS_CORRECTION=True, BLOCK=kernels._AT_ONCE),
        "_finish": compiled(kernels._finish, ADAPTS=True, FIXES_NORMS=True, BLOCK=kernels._AT_ONCE),
        "_moves_of_sums": compiled(
            kernels._moves_of_sums, ADAPTS=True, FIXES_NORMS=True, BLOCK=kernels._AT_ONCE, lr_at=None
        ),
        "_finish bare": compiled(
            kernels._finish, ADAPTS=False, FIXES_NORMS=False, BLOCK=kernels._AT_ONCE, finite=None, lr_at=None
        ),
    }
    for g in (tl.float32, tl.bfloat16, tl.float16):
        square = {"G": g, "ALIGNED": True, "CHUNK": kernels.CHUNK}
        ptx[f"_square_gradients {g}"] = compiled(kernels._square_gradients, **square)
    for w, g in [(tl.float32, tl.float32), (tl.bfloat16, tl.float32), (tl.float16, tl.float16)]:
        visit = {"W": w, "ALIGNED": True, "CHUNK": kernels.CHUNK}
        ptx[f"_first_visit {w} {g}"] = compiled(kernels._first_visit, G=g, MAXIMIZE=False, FIXES_NORMS=True, **visit)
        ptx[f"_second_visit {w}"] = compiled(kernels._second_visit, **visit)
        unasked = {"finite": None, "clip_factor": None, "FIXES_NORMS": False}
        ptx[f"_first_visit {w} {g} bare"] = compiled(kernels._first_visit, G=g, MAXIMIZE=True, **unasked, **visit)
        ptx[f"_second_visit {w} bare"] = compiled(kernels._second_visit, finite=None, growths=None, **visit)
    for name, text in ptx.items():
        if re.search(r"\b(atom|red)\.", text):
            sys.exit(f"{name} has atomics")
        if "visit" in name and not (
            re.search(r"ld\.global\.v4\.b32", text) and re.search(r"st\.global\.v4\.b32", text)
        ):
            sys.exit(f"{name} does not move 16 bytes at once")


if __name__ == "__main__":
    no_options(__doc__ or "")
    main()
