"""Kills the pretraining recipe ten times, three times during a save, and compares what the resumed runs end with.

    python -m tests.scripts.kill_and_resume [SEED [KILLS]]

Each run is killed (SIGKILL, the whole process group) at a moment drawn at random, resumed with
`--resume_from_checkpoint latest` (or started anew where there is no checkpoint yet), and must end bit for bit as the
run that was not killed: weights, optimizer, schedule, random numbers and logged losses. Several epochs, two
accumulation steps. Prints a line for each kill; the exit status is 1 if a run ended differently.
"""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_lamb.checkpoints import UNFINISHED, newest_complete_checkpoint
from recipes.corpus import load_documents

KILLS = 10
STEPS, SAVE_STEPS = 40, 4
RECIPE = [
    *("--size", "tiny", "--vocab_size", "400", "--max_seq_length", "32", "--use_cpu"),
    *("--global_batch_size", "16", "--per_device_train_batch_size", "8", "--max_steps", str(STEPS)),
    *("--save_steps", str(SAVE_STEPS), "--eval_steps", "8", "--logging_steps", "2", "--disable_tqdm", "True"),
]
SAVED = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def main(seed: int = 0, kills: int = KILLS) -> int:
    rng = random.Random(seed)
    root = Path(tempfile.mkdtemp(prefix="kill_and_resume-"))
    say(f"seed {seed}, runs in {root}")
    write_texts(root / "texts")
    start_up, between_saves = run_undisturbed(root / "whole")
    say(
        f"the whole run: {start_up:.1f} s to its first checkpoint, {between_saves * 1e3:.0f} ms from one to the next\n"
    )
    row = "{:>4}  {:<44}{:<36}{:<16}{}".format
    say(row("kill", "when", "checkpoints found", "resumed from", "ends equal"))

    different, in_saves = 0, set(rng.sample(range(kills), math.ceil(0.3 * kills)))
    for kill in range(kills):
        output = root / f"killed-{kill + 1}"
        when = kill_in_a_save(output, rng) if kill in in_saves else kill_between(output, rng, start_up, between_saves)
        found = contents(output)
        checkpoint = newest_complete_checkpoint(output)
        start(output, resume=checkpoint is not None).wait()
        wrong = differences(root / "whole", output)
        different += bool(wrong)
        resumed = Path(checkpoint).name if checkpoint else "(anew)"
        say(row(kill + 1, when, found, resumed, f"NO: {', '.join(wrong)}" if wrong else "yes"))

    say(f"\n{kills - different} of {kills} killed runs end bit for bit as the whole one")
    if different:
        return 1
    shutil.rmtree(root)
    return 0


# -- runs -------------------------------------------------------------------------------------------------------------


def start(output: Path, resume: bool = False) -> subprocess.Popen[bytes]:
    """The recipe, in a process group of its own."""
    arguments = [*RECIPE, "--corpus", str(output.parent / "texts"), "--output_dir", str(output)]
    if resume:
        arguments += ["--resume_from_checkpoint", "latest"]
    with output.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "recipes.pretrain_bert", *arguments],
            env=ENVIRONMENT,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def run_undisturbed(output: Path) -> tuple[float, float]:
    """Seconds to the first checkpoint, and from one to the next."""
    began = time.monotonic()
    run = start(output)
    await_(run, lambda: (output / f"checkpoint-{SAVE_STEPS}").exists())
    first = time.monotonic()
    await_(run, lambda: (output / f"checkpoint-{STEPS}").exists())
    last = time.monotonic()
    if run.wait() != 0:
        sys.exit(output.with_suffix(".log").read_text()[-3000:])
    return first - began, (last - first) / (STEPS // SAVE_STEPS - 1)


def kill_between(output: Path, rng: random.Random, start_up: float, between_saves: float) -> str:
    """Kill somewhere between the start and the last save; a little later than drawn if the machine is slow."""
    step = rng.randrange(0, STEPS - SAVE_STEPS, SAVE_STEPS)
    delay = rng.random() * (between_saves if step else start_up)
    run = start(output)
    if step:
        await_(run, lambda: (output / f"checkpoint-{step}").exists())
    time.sleep(delay)
    os.killpg(run.pid, signal.SIGKILL)
    if run.wait() != -signal.SIGKILL:
        sys.exit(f"{output} had ended before it was killed")
    return f"{delay * 1e3:.0f} ms after " + (f"checkpoint-{step}" if step else "the start")


def kill_in_a_save(output: Path, rng: random.Random) -> str:
    """Kill while a checkpoint is being written: the run is stopped first, and goes on if the save was over."""
    first = rng.randrange(SAVE_STEPS, STEPS // 2, SAVE_STEPS)
    run = start(output)
    for step in range(first, STEPS + 1, SAVE_STEPS):
        staged, whole = output / UNFINISHED / f"checkpoint-{step}", output / f"checkpoint-{step}"
        files, delay = rng.randrange(1, 10), rng.random() / 100
        await_(run, lambda: len(list(staged.glob("*"))) >= files or whole.exists())  # noqa: B023
        time.sleep(delay)
        os.killpg(run.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, run.pid, os.WSTOPPED)
        if staged.exists():
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
            assert staged.exists()
            return f"{delay * 1e3:.0f} ms after {files} files of checkpoint-{step}"
        os.killpg(run.pid, signal.SIGCONT)
    sys.exit(f"{output}: every save was over before the kill")


def await_(run: subprocess.Popen[bytes], condition: Callable[[], bool]) -> None:
    while not condition():
        if run.poll() is not None and not condition():
            sys.exit(f"a run ended with status {run.returncode} before it was to be killed")
        time.sleep(0.0005)


# -- what they leave --------------------------------------------------------------------------------------------------


def contents(output: Path) -> str:
    """The steps of the checkpoints that a killed run left, and what the unfinished ones hold."""
    whole = sorted(int(path.name[11:]) for path in output.glob("checkpoint-*"))
    half = [f"{path.name[11:]} unfinished: {len(os.listdir(path))} files" for path in (output / UNFINISHED).glob("*")]
    return ", ".join([*map(str, whole), *half]) or "none"


def differences(whole: Path, other: Path) -> list[str]:
    """Which files of the last checkpoint, and which of the model and the log, are not the same to the bit."""
    last = f"checkpoint-{STEPS}"
    names = [*(f"{last}/{name}" for name in SAVED), "model.safetensors"]
    wrong = [name for name in names if content(whole / name) != content(other / name)]
    if losses(whole / last) != losses(other / last):
        wrong.append("logged losses")
    return wrong


def content(file: Path) -> bytes | None:
    return file.read_bytes() if file.exists() else None


def losses(checkpoint: Path) -> list[dict[str, Any]]:
    """The log without what a clock says."""
    file = checkpoint / "trainer_state.json"
    log = json.loads(file.read_text())["log_history"] if file.exists() else []
    return [
        {name: value for name, value in line.items() if "runtime" not in name and "_per_" not in name} for line in log
    ]


def write_texts(folder: Path) -> None:
    """So little that the run takes several epochs."""
    folder.mkdir()
    for document in load_documents("embedded")[40:44]:
        (folder / f"{document.name}.txt").write_text(document.text[:8_000])


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
