"""sha256 of all parameters after 50 steps, of one process, DDP, FSDP2, FSDP1, ZeRO-2, and a resumed run.

    python -m tests.scripts.digests [NAME ...] [--output FILE]

Run it on two commits, on one machine and one installation, to see that a change of the code changes no result: one
thread, gloo, no GPU. ZeRO-2 needs DeepSpeed and a C++ compiler (`make test-deepspeed` installs the first).
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file

STEPS = 50
RECIPE = "recipes.pretrain_bert"
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
CONFIGS = Path(__file__).parents[2] / "recipes/configs/accelerate"
SMALL = ["--size", "smoke", "--global_batch_size", "32", "--per_device_train_batch_size", "8"]

# What starts the recipe, and the recipe's own options.
RUNS: dict[str, tuple[list[str], list[str]]] = {
    "smoke": ([sys.executable, "-m", RECIPE], ["--size", "smoke"]),
    "tiny": ([sys.executable, "-m", RECIPE], ["--size", "tiny"]),
    "resumed": ([sys.executable, "-m", RECIPE], ["--size", "smoke", "--save_steps", str(STEPS // 2)]),
    "ddp": ([*LAUNCH, "--config_file", f"{CONFIGS}/ddp.yaml", "-m", RECIPE], SMALL),
    "fsdp2": ([*LAUNCH, "--config_file", f"{CONFIGS}/fsdp2.yaml", "-m", "tests.scripts.cpu_fsdp", RECIPE], SMALL),
    "fsdp1": ([*LAUNCH, "--config_file", f"{CONFIGS}/fsdp1.yaml", "-m", "tests.scripts.cpu_fsdp", RECIPE], SMALL),
    "zero2": (
        [*LAUNCH, "--mixed_precision", "no", "--config_file", f"{CONFIGS}/deepspeed_zero2.yaml", "-m", RECIPE],
        SMALL,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(RUNS)}; default: all")
    parser.add_argument("--output", type=Path, help="a file for the lines that are printed too")
    options = parser.parse_args()
    if unknown := sorted(set(options.names) - set(RUNS)):
        parser.error(f"unknown run {unknown[0]}: expected some of {', '.join(RUNS)}")
    lines = []
    for name in options.names or RUNS:
        with tempfile.TemporaryDirectory() as folder:
            lines.append(f"{digest(run(name, Path(folder)))}  {name}")
        print(lines[-1], flush=True)
    if options.output:
        options.output.write_text("\n".join(lines) + "\n")


def run(name: str, folder: Path) -> Path:
    """The file of the weights that this run ends with."""
    launcher, own = RUNS[name]
    command = [*launcher, *own, "--max_steps", str(STEPS), "--output_dir", str(folder), "--vocab_size", "2000"]
    if name not in ("fsdp1", "fsdp2", "zero2"):
        command.append("--use_cpu")  # of the others, accelerate would make DDP
    start(command)
    if name == "resumed":
        shutil.rmtree(folder / f"checkpoint-{STEPS}")
        (folder / "model.safetensors").unlink()
        start([*command, "--resume_from_checkpoint", "latest"])
    return folder / "model.safetensors"


def start(command: list[str]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    path = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])  # DeepSpeed wants ninja
    done = subprocess.run(command, env={**environment, "PATH": path}, capture_output=True, text=True, timeout=900)
    if done.returncode:
        sys.exit(f"digests: {' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")


def digest(weights: Path) -> str:
    tensors = load_file(weights)
    sha = hashlib.sha256()
    for name in sorted(tensors):
        sha.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        sha.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


if __name__ == "__main__":
    main()
