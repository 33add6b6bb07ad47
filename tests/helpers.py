"""Ways to run things from tests."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

# Every backend, as the options of `Lamb` that choose it.
BACKENDS = pytest.mark.parametrize(
    "backend", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=["eager", "foreach", "fused"]
)

Case = dict[str, Any]  # the arguments of tests.scripts.scaffold.Case
Result = dict[str, Any]

# A run of the pretraining recipe that takes a second or two.
SMALL = ["--size", "smoke", "--use_cpu", "--max_steps", "8", "--global_batch_size", "16", "--vocab_size", "400"]


def pretrain(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """The pretraining recipe in this process, as its command line would run it."""
    from recipes import pretrain_bert  # here, so that tests of the optimizer alone need no transformers

    monkeypatch.setattr(sys, "argv", ["pretrain_bert", *arguments])
    pretrain_bert.main()


def says(line: str, message: str) -> None:
    """One line with all of `message`, the value and the remedy, in whatever order.

    message: patterns, with ".*", ": " or "; " between one and the next.
    """
    assert "\n" not in line
    missing = [part for part in re.split(r"\.\*|[:;]\\? ", message) if not re.search(part, line)]
    assert not missing, line


@contextmanager
def one_line(error: type[BaseException], message: str) -> Iterator[None]:
    """An error of this type, which `says` this."""
    with pytest.raises(error) as caught:
        yield
    says(str(caught.value), message)


def torchrun(processes: int, *command: str, timeout: float = 240, max_restarts: int = 0) -> str:
    """Run a module on several processes of this machine; torchrun finds a free port. Returns what went to stderr."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # Without it, restarted processes look for those before them (https://github.com/pytorch/pytorch/issues/135712).
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    launcher += [f"--max-restarts={max_restarts}", "-m"]
    pipe = subprocess.PIPE
    with subprocess.Popen([*launcher, *command], env=environment, stdout=pipe, stderr=pipe, text=True) as run:
        try:
            _, errors = run.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            run.terminate()  # which torchrun passes on; its workers would outlive a SIGKILL
            _, errors = run.communicate(timeout=60)
            pytest.fail(f"no end after {timeout} seconds: {errors[-3000:]}")
    assert run.returncode == 0, errors[-3000:]
    return errors


def measure(processes: int, script: str, cases: list[Case], folder: Path) -> dict[str, Result]:
    """What tests.scripts.sharded_lamb or zero_lamb measures on several processes, by the case's JSON."""
    given, results = folder / "cases.json", folder / "results.json"
    given.write_text(json.dumps(cases))
    torchrun(processes, f"tests.scripts.{script}", str(given), str(results), timeout=800)
    return dict(zip(map(json.dumps, cases), json.loads(results.read_text()), strict=True))
