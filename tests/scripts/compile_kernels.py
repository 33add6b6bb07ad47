"""Compile the Triton kernels for an A100 and an H100, without a GPU, and print what registers they take.

It exits with a line for each thing that a compiled kernel should not have: atomics, spills, narrow accesses.

env -u TRITON_INTERPRET python -m tests.scripts.compile_kernels
"""

import re
import subprocess
import sys
import tempfile
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_lamb.backends import triton as kernels
from recipes.lib.report import no_options

TARGETS = [GPUTarget("cuda", arch, 32) for arch in (80, 90)]
MOST_REGISTERS = 80  # a thread, of a multiprocessor's 65,536: three programs of 256 threads run there at a time
TYPES = {
    **dict.fromkeys(["n", "chunks", "size_of_chunk"], "i32"),
    **dict.fromkeys(["log_beta1", "log_beta2", "beta1", "one_minus_beta1", "beta2", "one_minus_beta2"], "fp32"),
    **dict.fromkeys(["eps", "weight_decay", "lr", "lowest", "highest"], "fp32"),
    **dict.fromkeys(["clip_factor", "corrections", "of_chunks", "sums", "moves", "step_sizes"], "*fp32"),
    **dict.fromkeys(["growths", "lr_at"], "*fp32"),
    **{"rows": "*i64", "owners": "*i32", "finite": "*u1"},
}


def compiled(kernel: Any, **constants: Any) -> list[Any]:
    """What Triton and its assembler make of a kernel, for each target."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else TYPES[name] for name in names}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    return [triton.compile(source, target, options={"num_warps": kernels._WARPS}) for target in TARGETS]


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of memory that a thread has for what does not fit into them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    registers, stack, local = (
        int(number) for number in re.search(r"REG:(\d+) STACK:(\d+).* LOCAL:(\d+)", text).groups()
    )
    return registers, stack + local


def fault(name: str, ptx: str, registers: int, spilled: int) -> str | None:
    """What a kernel should not have, in words."""
    if re.search(r"\b(atom|red)\.", ptx):
        return "it has atomics, whose order would change the bits: add up in one order"
    if spilled:
        return f"it keeps {spilled} bytes of a thread in memory: give a thread fewer elements"
    if registers > MOST_REGISTERS:
        return f"{registers} registers a thread leave no room for three programs: at most {MOST_REGISTERS}"
    loads, stores = (re.search(rf"{way}\.global\.(v4\.b32|v2\.b64)", ptx) for way in ("ld", "st"))
    if ("visit" in name and not (loads and stores)) or ("square" in name and not loads):
        return "it does not move 16 bytes at once"
    return None


def main() -> None:
    found = {
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
        found[f"_square_gradients {g}"] = compiled(kernels._square_gradients, **square)
    for w, g in [(tl.float32, tl.float32), (tl.bfloat16, tl.float32), (tl.float16, tl.float16)]:
        visit = {"W": w, "ALIGNED": True, "CHUNK": kernels.CHUNK}
        found[f"_first_visit {w} {g}"] = compiled(kernels._first_visit, G=g, MAXIMIZE=False, FIXES_NORMS=True, **visit)
        found[f"_second_visit {w}"] = compiled(kernels._second_visit, **visit)
        unasked = {"finite": None, "clip_factor": None, "FIXES_NORMS": False}
        found[f"_first_visit {w} {g} bare"] = compiled(kernels._first_visit, G=g, MAXIMIZE=True, **unasked, **visit)
        found[f"_second_visit {w} bare"] = compiled(kernels._second_visit, finite=None, growths=None, **visit)
    faults = []
    for name, results in found.items():
        for target, result in zip(TARGETS, results, strict=True):
            registers, spilled = resources(result.asm["cubin"])
            print(f"sm_{target.arch} {name:42} {registers:4} registers {spilled:4} bytes spilled")
            if (line := fault(name, result.asm["ptx"], registers, spilled)) is not None:
                faults.append(f"{name} for sm_{target.arch}: {line}")
    if faults:
        sys.exit("\n".join(faults))


if __name__ == "__main__":
    no_options(__doc__ or "")
    main()
