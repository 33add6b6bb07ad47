"""Ways to run things from tests."""

import json
import multiprocessing
import os
import re
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_lamb import Lamb

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


def compare(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """The comparison of optimizers in this process, as its command line would run it."""
    from recipes import compare_optimizers

    monkeypatch.setattr(sys, "argv", ["compare_optimizers", *arguments])
    compare_optimizers.main()


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


def on_processes(processes: int, module: str, *arguments: str, timeout: float = 240) -> None:
    """Run a module of tests.scripts on several processes, in the environment that torchrun would give them.

    The processes are forked from one that has imported torch and transformers. Under `torchrun`, each would import
    them anew, for seconds.
    """
    from torch.distributed import TCPStore

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["datasets", "transformers.trainer", "torch.distributed.fsdp", "hf_lamb.trainer"])
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    environment |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder, str(rank)) for rank in range(processes)]
        workers = []
        for rank in range(processes):
            ranked = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            workers.append(context.Process(target=_as_main, args=(ranked, said[rank], module, arguments)))
            workers[-1].start()
        end = time.monotonic() + timeout
        try:
            while any(worker.is_alive() for worker in workers) and not any(worker.exitcode for worker in workers):
                if not wait([worker.sentinel for worker in workers if worker.is_alive()], end - time.monotonic()):
                    break
            codes = [worker.exitcode for worker in workers]  # None: it still ran when another failed or time was over
        finally:  # also if pytest's own time limit ends the test
            for worker in workers:
                worker.kill()
                worker.join()
        failed = [
            f"rank {rank} ended with {code}: {said[rank].read_text()[-3000:] if said[rank].exists() else ''}"
            for rank, code in enumerate(codes)
            if code != 0
        ]
        assert not failed, failed


def _as_main(environment: dict[str, str], said: Path, module: str, arguments: tuple[str, ...]) -> None:
    """A worker of `on_processes`: what it prints goes to a file."""
    os.environ.update(environment)
    descriptor = os.open(said, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def measure(processes: int, script: str, cases: list[Case], folder: Path) -> dict[str, Result]:
    """What tests.scripts.sharded_lamb or zero_lamb measures on several processes, by the case's JSON."""
    given, results = folder / "cases.json", folder / "results.json"
    given.write_text(json.dumps(cases))
    on_processes(processes, f"tests.scripts.{script}", str(given), str(results), timeout=800)
    return dict(zip(map(json.dumps, cases), json.loads(results.read_text()), strict=True))


# What torch may make where nothing else is asked for.
DEFAULTS = ("float64", "bfloat16", "meta")


@contextmanager
def torch_makes(default: str) -> Iterator[None]:
    """Another default dtype of torch, or device."""
    torch.set_default_device(default) if default == "meta" else torch.set_default_dtype(getattr(torch, default))
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


def steps_of_lamb(**options: Any) -> list[torch.Tensor]:
    """Parameters, moments and trust ratios after three clipped steps on the CPU in float32."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    kind: Any = {"generator": generator, "dtype": torch.float32, "device": "cpu"}
    params = [torch.randn(shape, requires_grad=True, **kind) for shape in ((300, 40), (400,), (30, 40))]
    lamb = Lamb(params, lr=0.01, max_grad_norm=1.0, **options)
    for _ in range(3):
        for param in params:
            param.grad = torch.randn(param.shape, **kind)
        lamb.step()
    ratios = [float(stats.trust_ratio) for stats in lamb.layer_stats().values()]
    moments = [lamb.state[param][name] for param in params for name in ("exp_avg", "exp_avg_sq", "step")]
    return [*(p.detach() for p in params), *moments, torch.tensor(ratios, dtype=torch.float64, device="cpu")]
