"""Protects the Triton backend without a GPU: its kernels in Triton's interpreter against the float64 reference, and
compiled, though not run, for a GPU. What only a GPU can show is in test_lamb_cuda.py."""

import os
import re
import subprocess
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from hf_lamb import Lamb, backends
from hf_lamb.backends import Backend, Backends, Bucket
from hf_lamb.norms import Sum
from tests.helpers import DEFAULTS, steps_of_lamb, torch_makes
from tests.reference import ReferenceLamb
from tests.test_fused_layers import check_the_reference
from tests.test_lamb_reference import (
    IDLE_OPTIONS,
    OPTIONS,
    SCALES,
    TOLERANCE,
    check_layers_without_gradients,
    check_no_eps,
    check_no_step_to_zero,
    check_norms_are_kept,
    check_the_least_gradient,
    heterogeneous,
    worst_difference,
)

pytest.importorskip("triton", minversion="3.7", reason="needs Triton 3.7 (Linux on x86-64)")
from triton.runtime.interpreter import _convert_float

from tests.scripts.compile_kernels import fault

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1 (conftest.py: set where no GPU is)"
)

# Below, and in compile_kernels.py, private names of the backend are used: its kernels, what launches them, and how
# many sums a program adds up. Nothing public tells which kernels run, or makes small tensors go through many programs.
STEPS = 5
SHAPES = [(), (1,), (0,), (2, 0, 3), (7,), (64, 8), (3, 411), (1, 513)]


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The backend, for CPU tensors too: tensors of several chunks, and sums of several."""
    from hf_lamb.backends import triton

    monkeypatch.setattr(triton, "CHUNK", 512)
    monkeypatch.setattr(triton, "_AT_ONCE", 2)
    monkeypatch.setattr(backends, "fused_kinds", lambda device: (triton.Triton,))
    monkeypatch.setattr("triton.runtime.interpreter._convert_float", _rounded)
    return triton


def _rounded(x: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
    """What `.to(tl.bfloat16)` does on a GPU: round to nearest, where Triton 3.7's interpreter cuts off."""
    if (source.name, target.name) != ("fp32", "bf16"):
        return _convert_float(x, source, target, mode)
    return torch.from_numpy(x.astype(np.float32)).to(torch.bfloat16).view(torch.uint16).numpy()


@pytest.fixture
def launches(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Every launch, as (kernel, programs)."""
    done: list[tuple[str, int]] = []
    launch = kernels._launch

    def counted(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        done.append((kernel.fn.__name__, programs))
        launch(kernel, programs, *arguments, **constants)

    monkeypatch.setattr(kernels, "_launch", counted)
    return done


def float32_params(rng: np.random.Generator, shapes: list[tuple[int, ...]], scale: float = 0.05) -> list[torch.Tensor]:
    return [torch.tensor(heterogeneous(shape, rng, scale), dtype=torch.float32) for shape in shapes]


def give_gradients(params: list[torch.Tensor], rng: np.random.Generator, scale: float = 1.0) -> None:
    for param in params:
        param.grad = torch.tensor(heterogeneous(tuple(param.shape), rng, scale), dtype=param.grad_dtype)


@pytest.mark.parametrize("options", [o for _, o in OPTIONS], ids=[d for d, _ in OPTIONS])
def test_equals_the_float64_reference(options: dict[str, Any]) -> None:
    """Every option, awkward shapes, gradient scales 1e-8 ... 1e8, a transposed and a misaligned parameter."""
    rng = np.random.default_rng(0)
    params = float32_params(rng, SHAPES)
    params.append(torch.tensor(heterogeneous((31, 17), rng), dtype=torch.float32).t())
    params.append(torch.tensor(heterogeneous((600,), rng), dtype=torch.float32)[1:])
    params.append(torch.zeros(40))  # ‖w‖ = 0 at the first step
    optimizer = Lamb(params, fused=True, **options)
    reference = ReferenceLamb([p.double().numpy() for p in params], **options)
    for step in range(STEPS):
        give_gradients(params, rng, SCALES[step % len(SCALES)])
        optimizer.step()
        reference.step([p.grad.double().numpy() for p in params])
    assert worst_difference(params, reference.w) <= TOLERANCE[torch.float32]


def test_equals_the_reference_where_gradients_are_tiny_or_huge() -> None:
    rng = np.random.default_rng(1)
    for scale in (1e-8, 1e8):
        params = float32_params(rng, SHAPES, 1.0)
        optimizer = Lamb(params, lr=1e-2, fused=True)
        reference = ReferenceLamb([p.double().numpy() for p in params], lr=1e-2)
        for _ in range(STEPS):
            give_gradients(params, rng, scale)
            optimizer.step()
            reference.step([p.grad.double().numpy() for p in params])
        assert worst_difference(params, reference.w) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_is_the_rounded_reference(dtype: torch.dtype, grad_dtype: torch.dtype) -> None:
    """fp32 arithmetic and state whatever the dtypes; one rounding of the weights a step."""
    rng = np.random.default_rng(2)
    params = [torch.tensor(heterogeneous(shape, rng, 0.1), dtype=dtype) for shape in [(64, 11), (7,), ()]]
    for param in params:
        param.requires_grad_().grad_dtype = grad_dtype
    optimizer = Lamb(params, lr=1e-2, fused=True)
    reference = ReferenceLamb([p.detach().double().numpy() for p in params], lr=1e-2)
    half_ulp = torch.finfo(dtype).eps / 2
    for _ in range(STEPS):
        give_gradients(params, rng)
        reference.w = [p.detach().double().numpy() for p in params]
        optimizer.step()
        expected = reference.step([p.grad.double().numpy() for p in params])
        for param, w in zip(params, expected, strict=True):
            bound = np.abs(w) * half_ulp * 1.01 + torch.finfo(dtype).smallest_normal * half_ulp
            assert (np.abs(param.detach().double().numpy() - w) <= bound + 1e-6 * np.abs(w).max()).all()
    assert {optimizer.state[p][moment].dtype for p in params for moment in ("exp_avg", "exp_avg_sq")} == {
        torch.float32
    }


@pytest.mark.parametrize("options", IDLE_OPTIONS, ids=str)
def test_a_layer_without_a_gradient_keeps_its_weights(options: dict[str, Any]) -> None:
    """The reference's rule, in chunks; without eps too, where u is 0 / 0; and the least gradient is one."""
    check_layers_without_gradients(torch.float32, options, {"fused": True})
    check_no_eps({"fused": True})
    check_the_least_gradient({"fused": True})


def test_fixed_norm_keeps_norms() -> None:
    check_norms_are_kept(torch.float32, 1e-6, 12, {"fused": True}, lr=0.3)
    check_no_step_to_zero({"fused": True})


@pytest.mark.parametrize("options", [{}, {"fixed_norm": True}], ids=str)
def test_layers_of_fused_parameters_have_ratios_of_their_own(options: dict[str, Any]) -> None:
    """The kernels get views of parameters, gradients and moments that begin anywhere in them."""
    check_the_reference(options, torch.float32, {"fused": True})


def test_mixed_dtypes_in_one_group() -> None:
    """Each parameter as if it were alone, float64 by foreach."""
    rng = np.random.default_rng(3)
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    params = [torch.tensor(rng.standard_normal(700), dtype=dtype) for dtype in dtypes]
    alone = [param.clone() for param in params]
    for a, b in zip(params, alone, strict=True):
        a.grad = b.grad = torch.ones_like(a)
    Lamb(params, fused=True).step()
    for param in alone:
        Lamb([param], fused=True).step()
    assert all(torch.equal(a, b) for a, b in zip(params, alone, strict=True))


@pytest.mark.parametrize("eps", [1e-6, 0.0])
def test_a_skipped_step_changes_nothing(eps: float) -> None:
    """Nor does it if it is the first, when v is zero and without eps u is 0 / 0; and what follows is as without it."""
    rng = np.random.default_rng(4)
    params = float32_params(rng, [(600,), (3,)])
    others = [param.clone() for param in params]
    skipping, other = (Lamb(p, fused=True, eps=eps, max_grad_norm=1.0) for p in (params, others))
    for step, poison in enumerate([float("inf"), None, float("nan"), None]):
        give_gradients(params, rng)
        if poison is None:
            for a, b in zip(params, others, strict=True):
                b.grad = a.grad
            skipping.step()
            other.step()
        else:
            params[0].grad[-1] = poison
            skipping.step()
        for a, b in zip(params, others, strict=True):
            assert torch.equal(a, b), step
            for key, value in other.state[b].items():
                assert torch.equal(skipping.state[a][key], value)
    assert skipping.skipped_steps() == (2, 0)


def bucket_of(params: list[torch.Tensor], grads: list[torch.Tensor], t: float = 0.0) -> Bucket:
    bucket = Bucket(Lamb([torch.ones(1)], lr=0.1).param_groups[0], params=params, grads=grads)
    bucket.exp_avgs, bucket.exp_avg_sqs = ([torch.zeros_like(param) for param in params] for _ in range(2))
    bucket.steps = [torch.tensor(t) for _ in params]
    return bucket


def test_shards_with_sums_between_the_visits_equal_the_whole(kernels: ModuleType) -> None:
    """What sharding does to a backend: all first visits, sums over the processes, all second visits."""
    rng = np.random.default_rng(5)
    whole, grads = float32_params(rng, [(40, 30), (9,)]), float32_params(rng, [(40, 30), (9,)])
    pieces = [[w[:17].clone() for w in whole], [w[17:].clone() for w in whole]]  # of the second, one is empty
    backend, of_whole = kernels.Triton(), bucket_of(whole, grads)
    shards = [
        bucket_of(pieces[0], [g[:17].clone() for g in grads]),
        bucket_of(pieces[1], [g[17:].clone() for g in grads]),
    ]
    for key, bucket in enumerate((of_whole, *shards)):
        bucket.key = key
    for _ in range(3):
        whole_sums, held = backend.direction(of_whole)
        step_sizes = 0.1 * (whole_sums[Sum.WEIGHT_SQ] / whole_sums[Sum.UPDATE_SQ]).sqrt()
        backend.apply(of_whole, held, step_sizes, None)
        first = [backend.direction(shard) for shard in shards]
        torch.testing.assert_close(sum(sums for sums, _ in first), whole_sums, rtol=1e-6, atol=0)
        for shard, (_, held) in zip(shards, first, strict=True):
            backend.apply(shard, held, step_sizes, None)
        for w, *parts in zip(whole, *pieces, strict=True):
            assert torch.equal(w, torch.cat(parts))  # elementwise the same arithmetic


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layer_adaptation": False},
        {"min_trust_ratio": 0.5, "max_trust_ratio": 2.0},
        {"fixed_norm": True},
        {"fixed_norm": True, "lr": torch.tensor(0.5)},
    ],
    ids=str,
)
def test_step_sizes_from_sums_over_processes(kernels: ModuleType, options: dict[str, Any]) -> None:
    """In a kernel what `Bucket.step_sizes` does in operations of torch: zero norms and layers at rest too."""
    bucket = bucket_of([torch.ones(1)] * 5, [torch.ones(1)] * 5)
    bucket.group = {**bucket.group, **options}
    # ‖w‖², ‖u‖², nonzero, ⟨w, u⟩: as usual; ‖w‖ = 0; ‖u‖ = 0; at rest; a step to zero
    sums = torch.tensor([[4.0, 0, 9, 4, 4], [1.0, 2, 0, 9, 400], [1.0, 3, 1, 0, 1], [-1.5, 0, 0, 5, 40]])
    for finite in (None, torch.tensor(True), torch.tensor(False)):
        bucket.finite = finite
        for ours, theirs in zip(kernels.Triton().step_sizes(bucket, sums), bucket.step_sizes(sums), strict=True):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                torch.testing.assert_close(ours, theirs.float(), rtol=1e-6, atol=1e-9)


def test_launches_do_not_grow_with_the_elements_or_the_tensors(launches: list, kernels: ModuleType) -> None:
    def kernels_launched(shapes: list[int], **options: Any) -> list[str]:
        params = [torch.ones(shape) for shape in shapes]
        for param in params:
            param.grad = torch.ones_like(param)
        launches.clear()
        Lamb(params, fused=True, **options).step()
        return [kernel for kernel, _ in launches]

    step = ["_square_gradients", "_advance", "_first_visit", "_finish", "_second_visit"]
    assert kernels_launched([1000]) == step
    assert kernels_launched([30] * 32) == step
    assert kernels_launched([4000] * 3, max_grad_norm=1.0) == step
    assert kernels_launched([4000] * 3, skip_nonfinite=False) == step[1:]
    assert kernels_launched([0, 0], skip_nonfinite=False) == ["_advance", "_finish"]  # t moves without elements


def test_an_element_beyond_two_to_the_31_is_found(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last chunk of a tensor of 2**31 + 600 elements, of which only that chunk is there."""
    monkeypatch.setattr(kernels, "_finish", None)
    launch = kernels._launch
    monkeypatch.setattr(kernels, "_launch", lambda kernel, *a, **k: kernel and launch(kernel, *a, **k))
    begin, size = 2**31 + 512, 88
    chunk = begin // kernels.CHUNK
    here, alone = (bucket_of([torch.full((size,), 2.0)], [torch.full((size,), 3.0)]) for _ in range(2))
    # As if each tensor had begun that much earlier.
    table = kernels.table_of(here, None)
    table.rows[0, :4] -= 4 * begin
    table.rows[0, 5:] = torch.tensor([begin + size, -chunk])  # the one chunk that is launched is the last
    for bucket, table_of in ((here, lambda bucket, known: table), (alone, kernels.table_of)):
        backend = kernels.Triton()
        with monkeypatch.context() as patched:
            patched.setattr(kernels, "table_of", table_of)
            _, held = backend.direction(bucket)
        backend.apply(bucket, held, torch.tensor([0.1]), None)
    for tensors in ("params", "exp_avgs", "exp_avg_sqs"):
        assert torch.equal(getattr(here, tensors)[0], getattr(alone, tensors)[0])
    assert (alone.params[0] != 2.0).all()


def test_a_step_makes_one_table(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The look at the gradients, `clip_grad_norm` too, and the visits share it: a CUDA graph's capture has memory for
    one. Gradients that were only written to are where they were."""
    made: list[Bucket] = []
    table_of = kernels.table_of
    monkeypatch.setattr(kernels, "table_of", lambda bucket, known: made.append(bucket) or table_of(bucket, known))
    param = torch.ones(600)
    optimizer = Lamb([param], fused=True)
    for step in range(1, 8):
        param.grad = torch.ones(600)
        if step > 2:
            optimizer.clip_grad_norm(1.0)
        if step > 4:
            param.grad.mul_(2)
        optimizer.step()
        assert len(made) == step


def test_a_table_is_made_anew_only_when_a_tensor_moved(kernels: ModuleType) -> None:
    """Gradients may: `zero_grad` drops them. What says which chunk is whose depends on sizes alone, and stays."""
    bucket = bucket_of([torch.ones(600), torch.ones(3)], [torch.ones(600), torch.ones(3)])
    table = kernels.table_of(bucket, None)
    assert kernels.table_of(bucket, table) is table
    bucket.grads[1] = torch.ones(3)
    moved = kernels.table_of(bucket, table)
    assert moved.rows[1, 1] == bucket.grads[1].data_ptr() != table.rows[1, 1]
    assert moved.owners is table.owners
    assert moved.owners.tolist() == [0, 0, 1]


# -- which backend --------------------------------------------------------------------------------------------------


@pytest.fixture
def fused(kernels: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`fused_kinds` itself again."""
    monkeypatch.undo()
    backends.triton_kind.cache_clear()
    yield backends.fused_kinds
    backends.triton_kind.cache_clear()


def backend_on(device: str, takes: bool = True, **options: bool | None) -> Any:
    class Triton(Backend):
        def takes(self, bucket: Bucket) -> bool:
            return takes

    class There(Bucket):
        @property
        def device(self) -> torch.device:
            return torch.device(device)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(backends, "triton_kind", lambda device: Triton)
        return type(Backends().choose(There({"foreach": None, "fused": None, **options}))).__name__


def test_triton_is_for_cuda_alone_and_the_default_there(fused: Any) -> None:
    assert backend_on("cuda") == backend_on("cuda", fused=True) == "Triton"
    assert backend_on("cuda", takes=False) == backend_on("cuda", takes=False, fused=True) == "Foreach"
    assert backend_on("cuda", fused=False) == backend_on("cuda", foreach=True) == "Foreach"
    assert backend_on("cuda", foreach=False) == "Eager"
    assert backend_on("xpu") == backend_on("xpu", fused=True) == "Foreach"


def test_rocm_takes_foreach(fused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has run the kernels there."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert backend_on("cuda", fused=True) == "Foreach"


def test_without_triton_it_is_foreach(fused: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import hf_lamb.backends.triton

    monkeypatch.delattr(hf_lamb.backends, "triton")
    monkeypatch.delitem(sys.modules, "hf_lamb.backends.triton")
    monkeypatch.setitem(sys.modules, "triton", None)
    assert fused(torch.device("cuda")) == ()


def test_where_triton_does_not_run_it_is_foreach_with_the_reason(
    fused: Any, kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It compiles a C file when it starts; here there is no driver either."""

    def no_compiler(device: torch.device) -> None:
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(kernels, "check", no_compiler)
    with pytest.warns(UserWarning, match="no fused kernels on cuda, but foreach: Failed to find C compiler"):
        assert fused(torch.device("cuda")) == ()
    assert fused(torch.device("cuda")) == ()  # says so once


@pytest.mark.parametrize("default", DEFAULTS)
def test_what_torch_makes_by_default_changes_nothing(default: str, kernels: ModuleType) -> None:
    """`torch.set_default_device("cuda")` is common, and memory to copy from cannot be pinned there."""
    expected = steps_of_lamb(fused=True)
    with torch_makes(default):
        kernels.check(torch.device("cpu"))
        found = steps_of_lamb(fused=True)
    assert all(map(torch.equal, found, expected))


def test_kernels_that_compute_something_else_are_not_used(
    kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of Triton or of a device: no silently different algorithm."""
    state = torch.get_rng_state()
    kernels.check(torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)
    apply = kernels.Triton.apply

    def too_far(self: Backend, bucket: Bucket, held: Any, step_sizes: torch.Tensor, growths: Any) -> None:
        apply(self, bucket, held, step_sizes * 1.01, growths)

    monkeypatch.setattr(kernels.Triton, "apply", too_far)
    with pytest.raises(RuntimeError, match=r"a small torch.float32 step gave other params than foreach's, by up to"):
        kernels.check(torch.device("cpu"))
    monkeypatch.setattr(kernels.Triton, "direction", lambda self, bucket: (torch.ones(3, 2), None))
    monkeypatch.setattr(kernels.Triton, "apply", lambda self, bucket, *_: bucket.params[0].fill_(torch.nan))
    with pytest.raises(RuntimeError, match="other params"):
        kernels.check(torch.device("cpu"))


def test_the_kernels_compile_for_two_kinds_of_gpu() -> None:
    """With 16-byte accesses, without spills, and without atomics, whose order would change the bits."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.scripts.compile_kernels"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    for target in ("sm_80", "sm_90"):
        for kernel in ("_advance", "_square_gradients", "_first_visit", "_finish", "_second_visit"):
            assert re.search(rf"{target} {kernel} .* registers +0 bytes spilled", done.stdout), (target, kernel)


WIDE = "ld.global.v4.b32 {...}; st.global.v4.b32 [...];"


@pytest.mark.parametrize(
    ("ptx", "registers", "spilled", "words"),
    [
        (WIDE + "atom.global.add.f32 %f1;", 40, 0, "atomics"),
        (WIDE, 40, 16, "16 bytes of a thread in memory"),
        (WIDE, 128, 0, "128 registers .* at most 80"),
        (WIDE.replace("ld.global.v4.b32", "ld.global.b32"), 40, 0, "16 bytes at once"),
        (WIDE.replace("st.global.v4.b32", "st.global.b32"), 40, 0, "16 bytes at once"),
    ],
)
def test_what_a_compiled_kernel_should_not_have_is_named(ptx: str, registers: int, spilled: int, words: str) -> None:
    assert fault("_first_visit", WIDE, 80, 0) is None
    assert re.search(words, fault("_first_visit", ptx, registers, spilled) or "")
