"""Protects recipes/launch: the SLURM script starts the processes of all hosts, and goes on after a requeue.

`srun` and `scontrol` are stand-ins: two "hosts" are two agents of torchrun on this machine, with a process each.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.helpers import SMALL

ROOT = Path(__file__).parent.parent
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for host in $(seq "$SLURM_JOB_NUM_NODES"); do "$@" & started+=($!); done
for process in "${started[@]}"; do wait "$process" || exit $?; done
"""
STEPS = 40
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then printf 'localhost\\nsecond.host\\n'; else echo "$@" >> "$REQUEUED"; fi
"""


def start(folder: Path, texts: Path, restarts: int) -> subprocess.Popen[bytes]:
    """The job, as SLURM starts it, in a process group of its own."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PATH": f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "localhost,second.host",
        "SLURM_RESTART_COUNT": str(restarts),
        "REQUEUED": str(folder / "requeued"),
        "PORT": str(port),
        "PROCESSES_PER_HOST": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = ["bash", "recipes/launch/slurm.sh", *SMALL, "--corpus", str(texts), "--output_dir", str(folder / "out")]
    command += ["--save_steps", "5", "--max_steps", str(STEPS), "--eval_strategy", "no", "--disable_tqdm", "True"]
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)


def await_(run: subprocess.Popen[bytes], condition: Callable[[], bool], log: Path) -> None:
    end = time.monotonic() + 240
    while not condition():
        assert run.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < end, log.read_text()[-3000:]
        time.sleep(0.02)


def signal_all(run: subprocess.Popen[bytes], number: int) -> None:
    """To all processes that the script has started; torchrun's workers are in sessions of their own."""
    if run.poll() is None:
        for process in psutil.Process(run.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_that_is_requeued_and_killed_goes_on(texts: Path, tmp_path: Path) -> None:
    """At the end of its time SLURM signals the script, which asks to be requeued; then SLURM kills the job."""
    run, log = start(tmp_path, texts, restarts=0), tmp_path / "log.txt"
    try:
        await_(run, lambda: any((tmp_path / "out").glob("checkpoint-*")), log)
        signal_all(run, signal.SIGSTOP)  # or the training might end while the script is asked to requeue
        run.send_signal(signal.SIGUSR1)
        await_(run, (tmp_path / "requeued").exists, log)
    finally:
        signal_all(run, signal.SIGKILL)
        run.kill()
        run.wait()
    assert (tmp_path / "requeued").read_text() == "requeue 17\n"
    assert not (tmp_path / "out/results.jsonl").exists()

    again = start(tmp_path, texts, restarts=1)
    try:
        assert again.wait(timeout=240) == 0, log.read_text()[-3000:]
    finally:
        signal_all(again, signal.SIGKILL)
        again.kill()
    (record,) = [json.loads(line) for line in (tmp_path / "out/results.jsonl").read_text().splitlines()]
    assert (record["processes"], record["steps"]) == (2, STEPS)
    assert re.search(rf"resuming from .*checkpoint-\d+, step \d+ of {STEPS}", log.read_text())
    state = json.loads(Path(tmp_path, f"out/checkpoint-{STEPS}/trainer_state.json").read_text())
    assert [line["step"] for line in state["log_history"] if "loss" in line] == [10, 20, 30, 40]


@pytest.mark.parametrize(
    ("script", "environment", "message"),
    [
        ("slurm", {}, "SLURM_JOB_ID: start this script with sbatch, or without SLURM recipes/launch/torchrun.sh"),
        ("torchrun", {"HOSTS": "2"}, "FIRST_HOST: give the host that all others reach, such as FIRST_HOST=node1"),
    ],
)
def test_a_script_that_is_started_wrongly_ends_with_one_line(
    script: str, environment: dict[str, str], message: str
) -> None:
    command = ["bash", f"recipes/launch/{script}.sh"]
    done = subprocess.run(
        command, env={"PATH": os.environ["PATH"], **environment}, cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0
    (line,) = done.stderr.splitlines()
    assert message in line
