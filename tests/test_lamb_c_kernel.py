"""Protects the compiled backend for CPUs: where it runs, how it is compiled and kept, its threads, its arithmetic."""

import ctypes
import logging
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.bench_step import scratch_bytes
from hf_lamb import Lamb
from hf_lamb.backends import compiled, compiler
from tests.helpers import DEFAULTS, steps_of_lamb, torch_makes
from tests.reference import ReferenceLamb
from tests.test_lamb_fused_cpu import FUSED_BY_OPTIONS, OPTIONS, SHAPES, step_beside, stepped
from tests.test_lamb_reference import TOLERANCE, heterogeneous, worst_difference

pytestmark = pytest.mark.skipif(compiler.library() is None, reason="needs a C compiler")

# Around the block, the chunk and the part of lamb.c, and what is not a multiple of its lanes.
SIZES = (0, 1, 15, 17, 1023, 1025, compiled.CHUNK, compiled.CHUNK + 1, 5 * compiled.CHUNK + 77)


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the kernel is called for."""
    done: list[str] = []
    run = compiled.Compiled.update

    def counted(self: compiled.Compiled, bucket: Any) -> torch.Tensor:
        done.append(str(bucket.params[0].dtype))
        return run(self, bucket)

    monkeypatch.setattr(compiled.Compiled, "update", counted)
    return done


# -- where it runs ----------------------------------------------------------------------------------------------------


@FUSED_BY_OPTIONS
def test_it_is_the_default_on_cpu(options: dict[str, bool], fused: bool, tasks: list[str]) -> None:
    stepped([(3,)], **options)
    assert bool(tasks) == fused


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_float64_is_left_to_the_operations_of_torch(dtype: torch.dtype, tasks: list[str]) -> None:
    stepped([(3,)], dtype)
    assert bool(tasks) == (dtype != torch.float64)


def test_tensors_that_are_not_contiguous_are_left_to_foreach(tasks: list[str]) -> None:
    """One of them does not send the others there."""
    params = [torch.randn(4, 3), torch.randn(4, 3).t(), torch.randn(8)[::2]]
    for param in params:
        param.grad = torch.randn(param.shape)
    Lamb(params).step()
    assert len(tasks) == 1


# -- arithmetic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.3, "betas": (0.0, 0.5)}, {"max_grad_norm": 0.1}], ids=str)
def test_every_size_equals_the_reference(options: dict[str, Any]) -> None:
    """Blocks, chunks, parts and their rests."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(size, generator=generator) for size in SIZES]
    optimizer, reference = (
        Lamb(params, lr=0.1, **options),
        ReferenceLamb([p.numpy() for p in params], lr=0.1, **options),
    )
    for _ in range(3):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
        reference.step([param.grad.numpy() for param in params])
    assert worst_difference(params, reference.w) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("w", "g"), [("bfloat16", "bfloat16"), ("float16", "float16"), ("bfloat16", "float32"), ("float32", "bfloat16")]
)
def test_half_precision_is_rounded_once(w: str, g: str) -> None:
    """Weights are the float32 result, rounded to nearest; the moments are float32's. NaN and infinity stay."""
    generator = torch.Generator().manual_seed(0)
    for size in SIZES:
        given = torch.randn(size, generator=generator).to(getattr(torch, w))
        grad = torch.randn(size, generator=generator).to(getattr(torch, g))
        half, single = given.clone(), given.float()
        half.grad, single.grad = None, grad.float()
        half.grad = grad if w == g else None
        mine, theirs = Lamb([half], lr=0.1), Lamb([single], lr=0.1)
        if w != g:
            half.grad_dtype = None
            half.grad = grad
        mine.step()
        theirs.step()
        assert torch.equal(half, single.to(half.dtype))
        assert torch.equal(mine.state[half]["exp_avg_sq"], theirs.state[single]["exp_avg_sq"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_not_finite_stays_so(dtype: torch.dtype) -> None:
    """-ffast-math would make numbers of it."""
    for bad in (torch.nan, torch.inf, -torch.inf):
        param = torch.ones(40).to(dtype)
        param.grad = torch.ones_like(param)
        param.grad[3] = bad
        Lamb([param], skip_nonfinite=False).step()
        assert param[3].isnan()
        weights = torch.ones(40).to(dtype)
        weights[5] = bad
        weights.grad = torch.ones_like(weights)
        Lamb([weights], layer_adaptation=False).step()
        assert not weights[5].isfinite()
        assert weights[4].isfinite()


def test_subnormal_numbers_are_kept() -> None:
    """And loading the library does not set flush-to-zero for the process."""
    param = torch.full((40,), 1e-41)
    param.grad = torch.zeros(40)
    param.grad[0] = 1e-44
    optimizer = Lamb([param])
    optimizer.step()
    assert torch.tensor(1e-41) * 1 > 0
    assert next(iter(optimizer.layer_stats()), None) is not None  # the layer has a gradient


@settings(max_examples=600, deadline=None, derandomize=True)
@given(
    shapes=SHAPES,
    options=OPTIONS,
    scales=st.lists(st.sampled_from([1e-8, 1e-4, 1.0, 1e4, 1e8]), min_size=3, max_size=3),
    poisoned=st.sampled_from([None, 0, 1, 2]),
    idle=st.sampled_from([0, 0, 1, 3]),
    lr_is_tensor=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_random_cases_equal_the_reference(
    shapes: list[tuple[int, ...]],
    options: dict[str, Any],
    scales: list[float],
    poisoned: int | None,
    idle: int,
    lr_is_tensor: bool,
    seed: int,
) -> None:
    """A step with a NaN in it changes nothing and is not counted."""
    rng = np.random.default_rng(seed)
    params = [torch.tensor(heterogeneous(shape, rng, 0.05), dtype=torch.float32) for shape in shapes]
    reference = ReferenceLamb([param.double().numpy() for param in params], **options)
    if lr_is_tensor:
        options = {**options, "lr": torch.tensor(options.get("lr", 1e-3))}
    optimizer = Lamb(params, **options)
    step_beside(reference, optimizer, rng, scales, poisoned, idle)
    for param, w in zip(params, reference.w, strict=True):
        # A step may end near zero: what counts is how far the weights went.
        scale = np.linalg.norm(w) + float(options.get("lr", 1e-3)) * len(scales) * param.numel() ** 0.5
        assert np.linalg.norm(param.numpy() - w) <= TOLERANCE[torch.float32] * scale


@pytest.mark.parametrize("value", [0.1, 0.3, 0.7])
def test_norms_are_right_to_rounding(value: float) -> None:
    """Where all elements are alike, every addition of a sum in float32 rounds the same way."""
    param = torch.full((5 * compiled.CHUNK,), value)
    param.grad = torch.full_like(param, value)
    optimizer = Lamb([param])
    norm = param.double().norm().item()
    optimizer.step()
    assert next(iter(optimizer.layer_stats().values())).weight_norm == pytest.approx(norm, rel=3e-7)


# -- threads and memory -----------------------------------------------------------------------------------------------


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_the_number_of_threads_changes_no_bit() -> None:
    shapes = [*SIZES, (3, compiled.PART), (7, 11)]
    torch.set_num_threads(1)
    expected = stepped(shapes, max_grad_norm=1.0)
    for n in (2, 5):
        torch.set_num_threads(n)
        assert all(map(torch.equal, stepped(shapes, max_grad_norm=1.0), expected))


@pytest.mark.usefixtures("threads")
@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_it_steps_in_a_forked_process() -> None:
    """A fork has none of its parent's threads. The child calls nothing else of torch, whose threads do not survive."""
    torch.set_num_threads(2)
    params = [torch.randn(20 * compiled.CHUNK).share_memory_()]
    copies = [param.clone() for param in params]
    optimizer, other = Lamb(params, skip_nonfinite=False), Lamb(copies, skip_nonfinite=False)
    for param, copy in zip(params, copies, strict=True):
        param.grad = copy.grad = torch.randn_like(copy)
    for lamb in (optimizer, other):
        lamb.step()
    child = multiprocessing.get_context("fork").Process(target=optimizer.step)
    child.start()
    child.join(timeout=60)
    child.kill()
    other.step()
    assert child.exitcode == 0
    assert all(map(torch.equal, params, copies))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("part", [1, compiled.CHUNK, 1 << 30], ids=["each tensor", "some", "all"])
def test_the_parts_of_a_bucket_do_not_change_a_bit(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after another, each of them with several threads."""
    shapes = [(200 * (i % 7),) for i in range(300)] + [(3 * compiled.CHUNK + i,) for i in range(9)]
    expected = stepped(shapes)
    monkeypatch.setattr(compiled, "PART", part)
    torch.set_num_threads(3)
    assert all(map(torch.equal, stepped(shapes), expected))


def test_a_step_takes_no_memory_of_the_models_size() -> None:
    params = [torch.randn(3 * compiled.PART) for _ in range(2)]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = Lamb(params)
    optimizer.step()
    assert scratch_bytes(optimizer.step, "cpu") < 1e-3 * 4 * 6 * compiled.PART


# -- compiling --------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache; the library is loaded anew."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("HF_LAMB_NO_COMPILE", raising=False)
    compiler.library.cache_clear()
    yield tmp_path / "hf_lamb"
    compiler.library.cache_clear()


def compilations(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    paths: list[Path] = []
    compile_to = compiler._compile

    def counted(command: str, path: Path) -> None:
        paths.append(path)
        compile_to(command, path)

    monkeypatch.setattr(compiler, "_compile", counted)
    return paths


def test_it_is_compiled_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = compilations(monkeypatch)
    assert compiler.library() is not None
    compiler.library.cache_clear()
    assert compiler.library() is not None
    assert len(made) == 1
    assert [*cache.iterdir()] == made
    assert cache.stat().st_mode & 0o077 == 0


def test_other_flags_are_another_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler.library()
    monkeypatch.setattr(compiler, "FLAGS", (*compiler.FLAGS, "-g"))
    compiler.library.cache_clear()
    compiler.library()
    assert len([*cache.iterdir()]) == 2


def test_a_damaged_file_is_compiled_anew(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a disk that was full leaves it. In a process of its own: here the file is loaded already."""
    compiler.library()
    (file,) = cache.iterdir()
    file.unlink()
    file.write_bytes(b"\x7fELF")
    file.chmod(0o700)
    check = "from hf_lamb.backends.compiler import library; assert library() is not None"
    subprocess.run([sys.executable, "-c", check], check=True, timeout=120)
    assert file.stat().st_size > 1000


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"HF_LAMB_NO_COMPILE": "1"}, "HF_LAMB_NO_COMPILE"),
        ({"CC": "/bin/false"}, "false"),
        ({"CC": "no-such-compiler", "PATH": "/nowhere"}, "no C compiler"),
    ],
    ids=str,
)
def test_without_a_compiler_it_is_torchs_operations(
    setting: dict[str, str],
    reason: str,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """To the bit what they make of it, and one line at level debug says why."""
    for name, value in setting.items():
        monkeypatch.setenv(name, value)
    with caplog.at_level(logging.DEBUG, "hf_lamb"):
        got = stepped(SIZES)
    assert [reason in record.message for record in caplog.records] == [True]
    monkeypatch.setattr(compiled, "library", lambda: None)
    assert all(map(torch.equal, got, stepped(SIZES)))


def test_a_compiler_that_fails_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "FLAGS", ("-no-such-flag",))
    assert compiler.library() is None
    assert not [*cache.iterdir()]


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_folder_that_others_can_write_is_not_used(mode: int, cache: Path) -> None:
    """A library of theirs would run as this user."""
    cache.mkdir()
    cache.chmod(mode)
    assert compiler.library() is not None  # for this process only
    assert not [*cache.iterdir()]


def test_a_file_that_others_can_write_is_not_loaded(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    compiler.library()
    (file,) = cache.iterdir()
    file.chmod(0o777)
    compiler.library.cache_clear()
    with caplog.at_level(logging.DEBUG, "hf_lamb"):
        assert compiler.library() is None
    assert "chmod go-w" in caplog.text
    assert str(file) in caplog.text


def test_a_home_that_cannot_be_written_is_no_obstacle(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert compiler.library() is not None


def test_processes_that_compile_at_once_get_whole_files(cache: Path) -> None:
    check = "from hf_lamb.backends.compiler import library; assert library() is not None"
    processes = [subprocess.Popen([sys.executable, "-c", check]) for _ in range(3)]
    assert [process.wait(timeout=180) for process in processes] == [0, 0, 0]
    assert len([*cache.iterdir()]) == 1


def test_the_struct_is_that_of_the_library() -> None:
    """Field by field, by the names and kinds in lamb.c."""
    source = compiler.SOURCE.read_text()
    begin = source.index("typedef struct {\n    int64_t tensors, ")
    body = source[begin : source.index("} Bucket;")]
    names = [
        name.strip(" *;")
        for line in body.splitlines()[1:]
        for name in line.split("/*")[0].strip().removeprefix("const ").partition(" ")[2].split(",")
        if name.strip()
    ]
    assert names == [name for name, _ in compiled._Bucket._fields_]
    assert ctypes.sizeof(compiled._Bucket) % 8 == 0


@pytest.mark.slow
@pytest.mark.parametrize("broken", [False, True], ids=["as it is", "one element too far"])
def test_sanitizers_find_no_fault(broken: bool, tmp_path: Path) -> None:
    """No access outside of a tensor, no undefined behaviour. The broken kernel reads one element too far."""
    runtime = subprocess.run(["cc", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    if not Path(runtime.stdout.strip()).is_absolute():
        pytest.skip("the compiler has no address sanitizer")
    environment = {
        **os.environ,
        "LD_PRELOAD": runtime.stdout.strip(),
        "ASAN_OPTIONS": "detect_leaks=0",
        "XDG_CACHE_HOME": str(tmp_path),
        "HF_LAMB_BROKEN_KERNEL": "1" if broken else "",
    }
    command = [sys.executable, "-m", "tests.scripts.sanitized_kernel"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert (run.returncode == 0) == (not broken), run.stderr[-3000:]
    if broken:
        assert "AddressSanitizer" in run.stderr


@pytest.mark.parametrize("default", DEFAULTS)
@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"foreach": False}], ids=["fused", "foreach", "eager"])
def test_what_torch_makes_by_default_changes_nothing(default: str, options: dict[str, Any]) -> None:
    """It was the dtype of memory which lamb.c reads and writes as float32: other norms, or an end by the allocator."""
    expected = steps_of_lamb(**options)
    with torch_makes(default):
        found = steps_of_lamb(**options)
    assert all(map(torch.equal, found, expected))
