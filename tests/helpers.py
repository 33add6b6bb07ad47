"""Ways to run things from tests."""

import os
import subprocess
import sys

import pytest

# Every backend, as the options of `Lamb` that choose it.
BACKENDS = pytest.mark.parametrize(
    "backend", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=["eager", "foreach", "fused"]
)

# A run of the pretraining recipe that takes a second or two.
SMALL = ["--size", "smoke", "--use_cpu", "--max_steps", "8", "--global_batch_size", "16", "--vocab_size", "400"]


def pretrain(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """The pretraining recipe in this process, as its command line would run it."""
    from recipes import pretrain_bert  # here, so that tests of the optimizer alone need no transformers

    monkeypatch.setattr(sys, "argv", ["pretrain_bert", *arguments])
    pretrain_bert.main()


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
