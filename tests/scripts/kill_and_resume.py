"""Kills the pretraining recipe at random moments, and compares what the resumed runs end with.

    python -m tests.scripts.kill_and_resume [--seed 0] [--kills 10] [--plan]

Each run is killed (SIGKILL, the whole process group) at a moment drawn at random, three in ten during a save, resumed
with `--resume_from_checkpoint auto`, and must end bit for bit as the run that was not killed: weights, optimizer,
schedule, random numbers, logged losses and results. Several epochs, two accumulation steps. With --plan a run of two
phases, the first with a batch that grows, two in ten killed between them. Prints a line for each kill; the exit status
is 1 if a run ended differently.
"""

import argparse
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

from hf_lamb.trainer.checkpoints import UNFINISHED, newest_complete_checkpoint
from recipes.lib.corpus import load_documents

SAVE_STEPS = 4
RECIPE = [
    *("--vocab_size", "400", "--use_cpu", "--per_device_train_batch_size", "8", "--disable_tqdm", "True"),
    *("--save_steps", str(SAVE_STEPS), "--eval_steps", "8", "--logging_steps", "2"),
]
ONE_PHASE = ["--size", "tiny", "--max_seq_length", "32", "--global_batch_size", "16", "--max_steps", "40"]
TWO_PHASES = """
size: tiny
phases:
- {max_seq_length: 32, batch_size_schedule: '0:16 10:32', max_steps: 24, warmup_steps: 6, learning_rate: 0.02}
- {max_seq_length: 64, global_batch_size: 16, max_steps: 16, warmup_steps: 4, learning_rate: 0.01}
"""
SAVED = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")
OF_THE_CLOCK = {"time", "command", "seconds", "tokens_per_second"}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def main(seed: int = 0, kills: int = 10, plan: bool = False) -> int:
    rng = random.Random(seed)
    root = Path(tempfile.mkdtemp(prefix="kill_and_resume-"))
    say(f"seed {seed}, runs in {root}")
    write_texts(root / "texts")
    runs = Runs(root, plan)
    runs.undisturbed()
    say(
        f"the whole run: {runs.start_up:.1f} s to its first checkpoint, {runs.between_saves * 1e3:.0f} ms from one to "
        "the next\n"
    )
    row = "{:>4}  {:<46}{:<40}{:<24}{}".format
    say(row("kill", "when", "checkpoints found", "resumed from", "ends equal"))

    different = 0
    of_kinds = [runs.kill_in_a_save] * math.ceil(0.3 * kills) + [runs.kill_at_the_boundary] * (plan * -(-kills // 5))
    of_kinds += [runs.kill_between] * (kills - len(of_kinds))
    rng.shuffle(of_kinds)
    for kill, kind in enumerate(of_kinds):
        output = root / f"killed-{kill + 1}"
        when = kind(output, rng)
        found = contents(output)
        newest = [newest_complete_checkpoint(output / folder) for folder, _ in runs.phases]
        resumed = next((str(Path(path).relative_to(output)) for path in reversed(newest) if path), "(anew)")
        runs.start(output, resume=True).wait()
        wrong = differences(root / "whole", output, runs.phases)
        different += bool(wrong)
        say(row(kill + 1, when, found, resumed, f"NO: {', '.join(wrong)}" if wrong else "yes"))

    say(f"\n{kills - different} of {kills} killed runs end bit for bit as the whole one")
    if different:
        return 1
    shutil.rmtree(root)
    return 0


# -- runs -------------------------------------------------------------------------------------------------------------


class Runs:
    """The recipe's runs under `root`; `phases` are the folders that a run has checkpoints in, and their steps."""

    def __init__(self, root: Path, plan: bool) -> None:
        self.root = root
        self.options = ONE_PHASE
        self.phases = [("", 40)]
        if plan:
            (root / "plan.yaml").write_text(TWO_PHASES)
            self.options = ["--plan", str(root / "plan.yaml")]
            self.phases = [("phase-1", 24), ("phase-2", 16)]
        self.checkpoints = [
            os.path.join(folder, f"checkpoint-{step}")
            for folder, steps in self.phases
            for step in range(SAVE_STEPS, steps + 1, SAVE_STEPS)
        ]
        self.start_up = self.between_saves = 0.0

    def start(self, output: Path, resume: bool = False) -> subprocess.Popen[bytes]:
        """The recipe, in a process group of its own."""
        arguments = [*RECIPE, *self.options, "--corpus", str(self.root / "texts"), "--output_dir", str(output)]
        if resume:
            arguments += ["--resume_from_checkpoint", "auto"]
        with output.with_suffix(".log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "recipes.pretrain_bert", *arguments],
                env=ENVIRONMENT,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def undisturbed(self) -> None:
        """The whole run: seconds to its first checkpoint, and from one to the next."""
        output = self.root / "whole"
        began = time.monotonic()
        run = self.start(output)
        await_(run, lambda: (output / self.checkpoints[0]).exists())
        first = time.monotonic()
        await_(run, lambda: (output / self.checkpoints[-1]).exists())
        last = time.monotonic()
        if run.wait() != 0:
            sys.exit(output.with_suffix(".log").read_text()[-3000:])
        self.start_up, self.between_saves = first - began, (last - first) / (len(self.checkpoints) - 1)

    def kill_between(self, output: Path, rng: random.Random) -> str:
        """Somewhere between the start and the last save; a little later than drawn if the machine is slow."""
        after = rng.choice(["", *self.checkpoints[:-2]])
        delay = rng.random() * (self.between_saves if after else self.start_up)
        run = self.start(output)
        if after:
            await_(run, lambda: (output / after).exists())
        return self._kill(run, delay, after or "the start")

    def kill_at_the_boundary(self, output: Path, rng: random.Random) -> str:
        """Between the last checkpoint of phase 1 and the first one of phase 2."""
        after = rng.choice([f"phase-1/checkpoint-{self.phases[0][1]}", "phase-1/results.jsonl"])
        for _ in range(5):
            run = self.start(output)
            await_(run, lambda: (output / after).exists())
            when = self._kill(run, rng.random() * self.between_saves / 2, after)
            if not any((output / "phase-2").glob("checkpoint-*")):
                return when
            shutil.rmtree(output)  # too late: the machine is slow
        sys.exit(f"{output}: phase 2 had begun before every kill")

    def _kill(self, run: subprocess.Popen[bytes], delay: float, after: str) -> str:
        time.sleep(delay)
        os.killpg(run.pid, signal.SIGKILL)
        if run.wait() != -signal.SIGKILL:
            sys.exit("a run had ended before it was killed")
        return f"{delay * 1e3:.0f} ms after {after}"

    def kill_in_a_save(self, output: Path, rng: random.Random) -> str:
        """While a checkpoint is being written: the run is stopped first, and goes on if the save was over."""
        first = rng.randrange(len(self.checkpoints) // 2)
        run = self.start(output)
        for checkpoint in self.checkpoints[first:]:
            whole = output / checkpoint
            staged = whole.parent / UNFINISHED / whole.name
            files, delay = rng.randrange(1, 10), rng.random() / 100
            await_(run, lambda: len(list(staged.glob("*"))) >= files or whole.exists())  # noqa: B023
            time.sleep(delay)
            os.killpg(run.pid, signal.SIGSTOP)
            os.waitid(os.P_PID, run.pid, os.WSTOPPED)
            if staged.exists():
                os.killpg(run.pid, signal.SIGKILL)
                run.wait()
                assert staged.exists()
                return f"{delay * 1e3:.0f} ms after {files} files of {checkpoint}"
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
    folders = [output, *sorted(output.glob("phase-*"))]
    whole = [f"{folder.name[-1]}:" * (folder != output) + n for folder in folders for n in _steps(folder)]
    # Files there are those of a model that was being saved.
    staged = [path for folder in folders for path in (folder / UNFINISHED).glob("*") if path.is_dir()]
    half = [f"{path.name[11:]} unfinished: {len(os.listdir(path))} files" for path in staged]
    return ", ".join(whole + half) or "none"


def _steps(folder: Path) -> list[str]:
    return [str(n) for n in sorted(int(path.name[11:]) for path in folder.glob("checkpoint-*"))]


def differences(whole: Path, other: Path, phases: list[tuple[str, int]]) -> list[str]:
    """What of each phase's last checkpoint, model, log and results is not the same to the bit."""
    wrong = []
    for folder, steps in phases:
        one, two, last = whole / folder, other / folder, f"checkpoint-{steps}"
        names = [*(f"{last}/{name}" for name in SAVED), "model.safetensors"]
        wrong += [f"{folder} {name}" for name in names if content(one / name) != content(two / name)]
        if losses(one / last) != losses(two / last):
            wrong.append(f"{folder} logged losses")
        if results(one) != results(two):
            wrong.append(f"{folder} results")
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


def results(folder: Path) -> list[dict[str, Any]]:
    """The lines of results, of which there must be one, without what a clock says and where the run lies."""
    file = folder / "results.jsonl"
    lines = file.read_text().replace(str(folder.parent), "").splitlines() if file.exists() else []
    return [{k: v for k, v in json.loads(line).items() if k not in OF_THE_CLOCK} for line in lines]


def write_texts(folder: Path) -> None:
    """So little that the run takes several epochs."""
    folder.mkdir()
    for document in load_documents("embedded")[40:44]:
        (folder / f"{document.name}.txt").write_text(document.text[:8_000])


def say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--plan", action="store_true", help="a run of two phases")
    sys.exit(main(**vars(parser.parse_args())))
