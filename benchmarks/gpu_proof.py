"""Everything that only a GPU can show of hf_lamb, in one command, within eight minutes.

    python -m benchmarks.gpu_proof                 # on a machine with a GPU; from a checkout, nothing is installed
    python -m benchmarks.gpu_proof --output DIR    # not to benchmarks/results/gpu.jsonl, but to DIR/gpu.jsonl
    python -m benchmarks.gpu_proof --dry           # all of it at toy sizes on a CPU, to runs/gpu_proof/gpu.jsonl

It needs torch, Triton, transformers and accelerate; for the tests pytest; timm and apex are compared where they are
installed. Every part is a process with a time limit, and adds its lines as soon as it has them. A part that fails is
recorded with its last line, the others still run, and the exit code is 1. Called again, it does what is missing for
this commit on this machine. `python -m benchmarks.tables` then writes docs/gpu.md; that needs matplotlib.
"""

import argparse
import gc
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile
from transformers import BertConfig, BertForMaskedLM, Trainer, TrainerCallback

from benchmarks import bench_step
from benchmarks.records import RESULTS, ROOT, recorded, stamp
from hf_lamb import Lamb, backends, lamb_param_groups
from recipes.lib.report import append_json_line

ADAMW, CLIPPED_ADAMW = bench_step.FUSED_ADAMW, bench_step.CLIPPED_ADAMW
# Nobody chooses these on a GPU, and on 10,000 tensors they take a second a step.
TOO_SLOW = ("hf_lamb eager", "timm Lamb", "pytorch_optimizer Lamb", "torch_optimizer Lamb")
# Ways to use `Lamb`, by the names of the rows.
WAYS: dict[str, dict[str, Any]] = {
    "hf_lamb, skip_nonfinite=False": {"skip_nonfinite": False},
    "hf_lamb": {},
    "hf_lamb, max_grad_norm=1.0": {"max_grad_norm": 1.0},
}


@dataclass
class Proof:
    """Where the lines go, and how large everything is."""

    path: Path
    dry: bool

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"

    @property
    def base(self) -> tuple[int, int]:
        """Width and layers of BERT-base."""
        return (64, 1) if self.dry else (768, 12)

    @property
    def large(self) -> tuple[int, int]:
        return (64, 2) if self.dry else (1024, 24)

    def add(self, **record: Any) -> None:
        """Add a line."""
        kept = {**record.pop("stamp", stamp()), **record}
        kept["command"] = f"python -m benchmarks.gpu_proof{' --dry' if self.dry else ''}"
        kept["versions"] |= {"cuda": torch.version.cuda, "triton": version_of("triton")}
        append_json_line(self.path, {"benchmark": "gpu_proof", "dry": self.dry, **kept})

    def has(self, **keys: Any) -> bool:
        """Whether there is such a line for this commit and machine."""
        here = stamp()
        wanted = {"dry": self.dry, "commit": here["commit"], "hardware": here["hardware"], **keys}
        return any(all(line.get(key) == value for key, value in wanted.items()) for line in recorded(self.path))


def version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def say(line: str) -> None:
    print(line, flush=True)


# -- the parts --------------------------------------------------------------------------------------------------------


def tests(proof: Proof) -> None:
    """The tests that are marked `gpu`, without the settings that need plugins of pytest."""
    files = [str(p) for p in sorted((ROOT / "tests").glob("test_*.py")) if re.search(r"\bmark\.gpu\b", p.read_text())]
    command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", str(ROOT), "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-o", "markers=gpu", "-q", "-m", "gpu", *files],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    say(done.stdout)
    last = done.stdout.strip().splitlines()[-1]
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)", last)}
    proof.add(part="tests", counts=counts)
    if done.returncode != 0 or not counts.get("skipped" if proof.dry else "passed"):
        raise RuntimeError(f"pytest ended with exit code {done.returncode}: {last}")


def steps(proof: Proof) -> None:
    """`bench_step` for all sets of tensors, in fp32 and bf16."""
    sizes: dict[str, Callable[[], Any]] = {
        "bert-base": lambda: bench_step.bert(*proof.base),
        "bert-large": lambda: bench_step.bert(*proof.large),
        "many-small": lambda: [(10,)] * 20 if proof.dry else bench_step.SHAPES["many-small"](),
        "one-huge": lambda: [(60, 50)] if proof.dry else bench_step.SHAPES["one-huge"](),
    }
    options = {"attempts": 1, "most_apart": float("inf"), "copied": 1000} if proof.dry else {"attempts": 3}
    unsteady = []
    for shapes, shapes_of in sizes.items():
        for dtype in (torch.float32, torch.bfloat16):
            kind = {"shapes": shapes, "dtype": str(dtype).removeprefix("torch.")}
            if proof.has(part="steps", **kind):
                continue
            try:
                record = bench_step.measure(shapes_of(), dtype, bench_step.LEAST_ROUNDS, without=TOO_SLOW, **options)
            except bench_step.Unsteady as error:
                unsteady.append(f"{shapes}, {kind['dtype']}: {error}")
                say(unsteady[-1])
                continue
            proof.add(part="steps", stamp=record, **kind)
            rows = record["steps"]
            say(f"{shapes}, {kind['dtype']}: " + ", ".join(f"{n} {rows[n]['ratio_of_minima']:.2f}" for n in rows))
            gc.collect()
            free()
    if unsteady:
        raise RuntimeError(unsteady[-1])


def free() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def launches(proof: Proof) -> None:
    """Of a step of BERT-large: what it launches, its time on the device and on the host, and its memory."""
    model = bert(*proof.large, proof.device)
    params = list(model.parameters())
    adamw = torch.optim.AdamW(params, fused=True)
    lambs: dict[str, Optimizer] = {n: Lamb(lamb_param_groups(model), **options) for n, options in WAYS.items()}
    calls: dict[str, Callable[[], Any]] = {
        ADAMW: adamw.step,
        CLIPPED_ADAMW: lambda: (clip_grad_norm_(params, 1.0), adamw.step()),
        **{name: optimizer.step for name, optimizer in lambs.items()},
    }
    rows: dict[str, Any] = {}
    for name, call in calls.items():
        give_gradients(model)
        call()
        profiled(call, proof.device)  # the first one sets the profiler up
        kept = profiled(call, proof.device)
        give_gradients(model)
        moved = profiled(call, proof.device)
        rows[name] = {
            "launches": kept["launches"],
            "launches_with_moved_gradients": moved["launches"],
            "milliseconds_on_device": kept["milliseconds"],
            "milliseconds_of_host": round(1e3 * min(host_seconds(call, proof.device) for _ in range(20)), 3),
            "megabytes_of_a_step": round(bench_step.scratch_bytes(call, proof.device) / 1e6, 2),
        }
        say(f"{name}: {rows[name]}; the longest kernels: {kept['longest']}")
    for name, optimizer in ((ADAMW, adamw), *lambs.items()):
        held = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, Tensor)]
        elements = sum(param.numel() for param in params)
        rows[name]["bytes_of_state_a_parameter"] = round(sum(x.nbytes for x in held) / elements, 2)
    proof.add(part="launches", tensors=len(params), rows=rows)


def profiled(call: Callable[[], Any], device: str) -> dict[str, Any]:
    """What one call launches on the device: kernels, copies and fills; their time, and the longest of them."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    bench_step.synchronize(device)
    with profile(activities=activities) as seen:
        call()
        bench_step.synchronize(device)
    on_device = [
        event
        for event in seen.events() or ()
        if event.device_type != torch.autograd.DeviceType.CPU
        and not getattr(event, "is_user_annotation", False)
        and not event.name.startswith("Optimizer.")
    ]
    on_device.sort(key=lambda event: event.time_range.start - event.time_range.end)
    microseconds = [event.time_range.end - event.time_range.start for event in on_device]
    longest = [f"{event.name[:40]} {us:.0f} us" for event, us in zip(on_device[:3], microseconds[:3], strict=True)]
    return {"launches": len(on_device), "milliseconds": round(sum(microseconds) / 1e3, 3), "longest": longest}


def host_seconds(call: Callable[[], Any], device: str) -> float:
    """Until the call returns, on an idle device."""
    bench_step.synchronize(device)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def bert(hidden_size: int, layers: int, device: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    shape = {"hidden_size": hidden_size, "num_hidden_layers": layers, "num_attention_heads": hidden_size // 64}
    torch.manual_seed(0)
    with torch.device(device):
        return BertForMaskedLM(BertConfig(intermediate_size=4 * hidden_size, **shape)).to(dtype)


def give_gradients(model: nn.Module) -> None:
    """New ones, where the old ones are not."""
    for param in model.parameters():
        param.grad = torch.randn_like(param) * 1e-3


def exact(proof: Proof) -> None:
    """Two runs give the same bits; a captured step replays as the eager one; both through a step that is skipped."""
    for dtype in (torch.float32, torch.bfloat16):
        eager, again = train(proof, dtype), train(proof, dtype)
        captured = train(proof, dtype, captured=True)
        same = {"same_bits_twice": all(map(torch.equal, eager, again))}
        same["capture_equals_eager"] = all(map(torch.equal, eager, captured))
        name = str(dtype).removeprefix("torch.")
        say(f"{name}: {same}")
        proof.add(part="exact", dtype=name, **same)
        if not all(same.values()):
            raise RuntimeError(f"{name}: {same}")


def train(proof: Proof, dtype: torch.dtype, captured: bool = False) -> list[Tensor]:
    """Six steps of BERT-base, the fourth of them skipped; weights and moments after them."""
    model = bert(*proof.base, proof.device, dtype)
    params = list(model.parameters())
    lr = torch.tensor(1e-2, device=proof.device)
    optimizer = Lamb(lamb_param_groups(model), lr=lr, max_grad_norm=1.0)
    generator = torch.Generator(proof.device).manual_seed(1)
    for param in params:
        param.grad = torch.zeros_like(param)
    step: Callable[[], Any] = optimizer.step
    for number in range(6):
        for param in params:
            assert param.grad is not None
            param.grad.normal_(std=1e-3, generator=generator)
        if number == 3:
            assert params[0].grad is not None
            params[0].grad.view(-1)[0] = torch.nan
        if number == 1 and captured and proof.device == "cuda":
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):  # which runs nothing
                optimizer.step()
            step = graph.replay
        step()
    if optimizer.skipped_steps() != (1, 0):
        raise RuntimeError(f"of six steps one is to be skipped, the fourth: {optimizer.skipped_steps()}")
    state = [optimizer.state[param][moment] for param in params for moment in ("exp_avg", "exp_avg_sq")]
    return [param.detach().clone() for param in params] + state


def sharded(proof: Proof) -> None:
    """FSDP2 on one process whose group communicates all the same: the visits, the packing, the all-reduces."""
    from torch.distributed.tensor.debug import CommDebugMode

    from benchmarks.bench_sharded_step import sharded_bert

    dist.init_process_group("gloo" if proof.dry else "nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = sharded_bert(*proof.base, proof.device)
        params = list(model.parameters())
        whole = [nn.Parameter(param.to_local().detach().clone()) for param in params]
        for param, copy in zip(params, whole, strict=True):
            copy.grad = param.grad.to_local().clone()
        rows: dict[str, Any] = {}
        worst = 0.0
        with communicating_alone():
            ours, alone = (Lamb(p, max_grad_norm=1.0) for p in (params, whole))
            for _ in range(3):
                ours.step()
                alone.step()
            for param, copy in zip(params, whole, strict=True):
                difference = param.to_local().detach() - copy.detach()
                worst = max(worst, float(difference.norm() / copy.detach().norm().clamp(min=1e-30)))
            calls: dict[str, Callable[[], Any]] = {"torch AdamW foreach": torch.optim.AdamW(params, foreach=True).step}
            calls |= {name: Lamb(params, **options).step for name, options in WAYS.items()}
            calls[ADAMW] = torch.optim.AdamW(params, fused=True).step
            for call in calls.values():
                call()
            seconds = bench_step.rounds_of(calls, bench_step.LEAST_ROUNDS, proof.device)
            for name, call in calls.items():
                with CommDebugMode() as counter:
                    call()
                rows[name] = {
                    "milliseconds_min": round(1e3 * min(seconds[name]), 3),
                    "ratio_of_minima": round(min(seconds[name]) / min(seconds[ADAMW]), 3),
                    "collectives": counter.get_total_counts(),
                    "launches": profiled(call, proof.device)["launches"],
                }
                say(f"{name}: {rows[name]}")
            waits = host_waits(ours.step, proof.device)
    finally:
        dist.destroy_process_group()
    proof.add(part="sharded", tensors=len(params), rows=rows, worst_difference=worst, host_waits=waits)
    if worst > 1e-6 or waits is not None:
        raise RuntimeError(f"‖Δw‖/‖w‖ to the unsharded run is {worst:.1e}, at most 1e-6; host waits: {waits}")
    if rows["hf_lamb"]["collectives"] != 2:
        raise RuntimeError(f"a step has {rows['hf_lamb']['collectives']} collectives instead of 2")


@contextmanager
def communicating_alone() -> Iterator[None]:
    """Let groups of one process communicate, which a step leaves out, so that one GPU runs what many would."""
    from torch.distributed.tensor import DTensor

    from hf_lamb.sharding import sharding
    from hf_lamb.sharding.collectives import Reduction, Reductions
    from hf_lamb.sharding.plain import local_shard

    def cut_shard(param: Tensor, name: str) -> tuple[Tensor, Reductions]:
        local, reductions = local_shard(param, name)
        if isinstance(param, DTensor):
            mesh = param.device_mesh
            cut = (i for i, placement in enumerate(param.placements) if not placement.is_replicate())
            reductions = tuple(Reduction(mesh.get_group(i), mesh.device_type) for i in cut)
        return local, reductions

    with mock.patch.object(sharding, "local_shard", cut_shard):
        yield


def host_waits(call: Callable[[], Any], device: str) -> str | None:
    """What makes the host wait for the device in a call, or None."""
    if device != "cuda":
        call()
        return None
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


class StepTimes(TrainerCallback):
    """When each optimizer step of a run ended."""

    def __init__(self, device: str) -> None:
        self.device, self.ends = device, []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        bench_step.synchronize(self.device)
        self.ends.append(time.perf_counter())


def recipe(proof: Proof) -> None:
    """Tokens a second of the pretraining recipe with LAMB in LambTrainer, and of a stock Trainer with AdamW(fused)."""
    from hf_lamb import LambTrainer
    from recipes import pretrain_bert
    from recipes.lib.bert import new_bert
    from recipes.lib.masking import MaskEpochCallback
    from recipes.lib.pretraining import load_data

    options = {"size": "base", "max_seq_length": 128, "global_batch_size": 256, "per_device_train_batch_size": 64}
    options |= {"max_steps": 25, "bf16": True}
    with tempfile.TemporaryDirectory() as folder:
        if proof.dry:
            options = {"size": "smoke", "global_batch_size": 8, "per_device_train_batch_size": 4, "max_steps": 8}
            options |= {"use_cpu": True, "vocab_size": 400, "corpus": few_texts(Path(folder))}
        options |= {"output_dir": folder, "eval_strategy": "no", "save_strategy": "no", "report_to": "none"}
        line = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        given, args = pretrain_bert.parse([*line, "--disable_tqdm", "True"])
        data = load_data(given, args.seed)
        per_step = given.global_batch_size * given.max_seq_length
        rates: dict[str, list[float]] = {"LambTrainer, lamb": [], "Trainer, adamw_torch_fused": []}
        peaks: dict[str, float] = {}
        for _ in range(2):
            for (name, seen), optim in zip(rates.items(), ("lamb", "adamw_torch_fused"), strict=True):
                _, args = pretrain_bert.parse([*line, "--disable_tqdm", "True", "--optim", optim])
                torch.manual_seed(args.seed)
                if not proof.dry:
                    torch.cuda.reset_peak_memory_stats()
                times = StepTimes(proof.device)
                trainer = (LambTrainer if optim == "lamb" else Trainer)(
                    model=new_bert(given.size, data.tokenizer, given.max_seq_length),
                    args=args,
                    train_dataset=data.train,
                    processing_class=data.tokenizer,
                    callbacks=[MaskEpochCallback(), times],
                )
                trainer.train()
                spent = [after - before for before, after in zip(times.ends, times.ends[1:], strict=False)]
                seen.append(round(per_step / median(spent[len(spent) // 4 :]), 1))  # without the warm-up
                peaks[name] = 0.0 if proof.dry else round(torch.cuda.max_memory_allocated() / 1e9, 3)
                say(f"{name}: {seen[-1]:,.0f} tokens a second, {peaks[name]} GB")
                del trainer
                gc.collect()
                free()
    rows = {name: {"tokens_per_second": seen, "peak_gigabytes": peaks[name]} for name, seen in rates.items()}
    proof.add(
        part="recipe", options={k: v for k, v in options.items() if k not in ("output_dir", "corpus")}, rows=rows
    )


def few_texts(folder: Path) -> str:
    """A folder with some of the embedded corpus."""
    from recipes.lib.corpus import load_documents

    for document in load_documents("embedded")[40:44]:
        (folder / f"{document.name}.txt").write_text(document.text[:20_000])
    return str(folder)


# -- one after the other ----------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """A part, and the seconds that it may take; together eight minutes."""

    run: Callable[[Proof], None]
    limit: int


PARTS = {
    "tests": Part(tests, 100),
    "steps": Part(steps, 150),
    "launches": Part(launches, 45),
    "exact": Part(exact, 35),
    "sharded": Part(sharded, 45),
    "recipe": Part(recipe, 105),
}


PATIENCE = 4  # times the limit for a dry run, on a CPU that others may use too

# No network, and output of a few lines: no bars of progress, nothing of the profiler's own.
QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1", "KINETO_LOG_LEVEL": "99"}


def command_of(name: str, proof: Proof) -> list[str]:
    """The command line of one part."""
    command = [sys.executable, "-m", "benchmarks.gpu_proof", "--part", name, "--output", str(proof.path.parent)]
    return [*command, *(["--dry"] if proof.dry else [])]


def in_a_process(name: str, proof: Proof, limit: float) -> tuple[bool, str]:
    """Run a part; whether it ended well within its limit, and the last line of its output, which is passed on."""
    last = "no output"
    with subprocess.Popen(
        command_of(name, proof),
        cwd=ROOT,
        env={**os.environ, **QUIET},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        killed = threading.Event()

        def kill() -> None:
            killed.set()
            os.killpg(process.pid, signal.SIGKILL)  # with what it has started

        timer = threading.Timer(limit, kill)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                print(f"  {line}", end="", flush=True)
                last = line.strip() or last
            process.wait()
        finally:
            timer.cancel()
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    if killed.is_set():
        return False, f"killed after {limit:.0f} seconds; its last line: {last}"
    return process.returncode == 0, last


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="toy sizes on a CPU")
    parser.add_argument("--output", type=Path, help="the folder of gpu.jsonl")
    parser.add_argument("--part", choices=PARTS, help="this part alone, in this process and without a limit")
    options = parser.parse_args()
    # One GPU, or Trainer would use all; read when CUDA starts, which it has not yet.
    os.environ["CUDA_VISIBLE_DEVICES"] = "" if options.dry else os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    if not options.dry and not torch.cuda.is_available():
        sys.exit("gpu_proof: torch sees no CUDA device here: --dry runs everything at toy sizes on a CPU")
    if options.dry:
        torch.set_num_threads(1)
    folder = options.output or (ROOT / "runs/gpu_proof" if options.dry else RESULTS)
    proof = Proof((folder / "gpu.jsonl").resolve(), options.dry)
    if options.part is not None:
        if not options.dry and options.part != "tests" and not backends.fused_kinds(torch.device("cuda")):
            sys.exit("the Triton kernels do not run here, see the warning above: what follows would measure foreach")
        PARTS[options.part].run(proof)
        return

    begin = time.perf_counter()
    failed = []
    for name, part in PARTS.items():
        if proof.has(part=f"end of {name}", ok=True):
            say(f"{name}: recorded before, for this commit and machine")
            continue
        limit = part.limit * (PATIENCE if proof.dry else 1)
        say(f"{name}: at most {limit} seconds")
        start = time.perf_counter()
        ok, last = in_a_process(name, proof, limit)
        seconds = round(time.perf_counter() - start, 1)
        proof.add(part=f"end of {name}", ok=ok, seconds=seconds, **({} if ok else {"last_line": last}))
        say(f"{name}: {'done' if ok else 'FAILED'} in {seconds} seconds{'' if ok else f': {last}'}")
        failed += [] if ok else [name]
    say(
        f"{len(PARTS) - len(failed)} of {len(PARTS)} parts are done, {time.perf_counter() - begin:.0f} s; {proof.path}"
    )
    if failed:
        sys.exit(f"gpu_proof: failed: {', '.join(failed)}; the same command runs these again")


if __name__ == "__main__":
    main()
