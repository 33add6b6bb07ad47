"""Protects what only a GPU can show: no host sync in a step, and capture in a CUDA graph without an option for it."""

import numpy as np
import pytest
import torch

from hf_lamb import Lamb, backends
from tests.helpers import BACKENDS
from tests.reference import ReferenceLamb
from tests.test_lamb_reference import SCALES, SHAPES, TOLERANCE, heterogeneous

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
OPTIONS = pytest.mark.parametrize(
    "options", [{}, {"max_grad_norm": 0.5, "max_trust_ratio": 10.0}, {"fixed_norm": True}], ids=str
)
FUSED = pytest.mark.skipif(
    not torch.cuda.is_available() or not backends.fused_kinds(torch.device("cuda")), reason="needs Triton"
)


def params_with_grads(device: str = "cuda", dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator).to(device, dtype) for shape in [(300, 70), (70,), ()]]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(device, dtype)
    return params


@BACKENDS
@OPTIONS
def test_a_step_does_not_wait_for_the_device(options: dict, backend: dict[str, bool]) -> None:
    optimizer = Lamb(params_with_grads(), **backend, **options)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@BACKENDS
@OPTIONS
def test_a_captured_step_replays_as_the_eager_one(options: dict, backend: dict[str, bool]) -> None:
    """New gradients, a new rate and a skipped step included."""
    captured, eager = params_with_grads(), params_with_grads()
    lr = torch.tensor(1e-2, device="cuda")
    in_graph = Lamb(captured, lr=lr, **backend, **options)
    by_hand = Lamb(eager, lr=1e-2, **backend, **options)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # capture wants warm kernels and existing state
        in_graph.step()
    torch.cuda.current_stream().wait_stream(stream)
    by_hand.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        in_graph.step()
    for factor, rate in [(1.0, 1e-2), (-2.0, 3e-3), (float("nan"), 3e-3), (0.5, 1e-3)]:
        lr.fill_(rate)
        by_hand.param_groups[0]["lr"] = rate
        grads = [torch.randn_like(p) * factor for p in eager]
        for a, b, grad in zip(captured, eager, grads, strict=True):
            a.grad.copy_(grad)
            b.grad = grad
        graph.replay()
        by_hand.step()
    for a, b in zip(captured, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert in_graph.skipped_steps() == by_hand.skipped_steps() == (1, 0)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_gpu_computes_what_the_cpu_computes(dtype: torch.dtype, backend: dict[str, bool]) -> None:
    on_gpu, on_cpu = params_with_grads("cuda", dtype), params_with_grads("cpu", dtype)
    for params in (on_gpu, on_cpu):
        optimizer = Lamb(params, lr=1e-2, **backend)
        for _ in range(10):
            optimizer.step()
    for a, b in zip(on_gpu, on_cpu, strict=True):
        torch.testing.assert_close(a.cpu(), b)


def test_one_group_on_two_devices() -> None:
    """A CPU parameter beside a CUDA one: one global norm, one decision to skip."""
    (gpu, *_), (cpu, *_) = params_with_grads("cuda"), params_with_grads("cpu")
    optimizer = Lamb([gpu, cpu], max_grad_norm=0.1)
    optimizer.step()
    torch.testing.assert_close(gpu.cpu(), cpu)
    cpu.grad[0, 0] = float("inf")
    before = gpu.clone()
    optimizer.step()
    assert torch.equal(gpu, before)


# -- the Triton kernels: what their interpreter (test_lamb_triton.py) cannot show -------------------------------------


def large_params(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Several parts and chunks, and a misaligned tensor."""
    generator = torch.Generator("cuda").manual_seed(0)
    sizes = [3_000_001, 1 << 21, 70_000, 1, 0, 513] + [100] * 300
    params = [torch.randn(size, generator=generator, device="cuda").to(dtype) for size in sizes]
    params.append(torch.randn(5000, generator=generator, device="cuda").to(dtype)[1:])
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator, device="cuda").to(dtype)
    return params


@FUSED
def test_triton_is_the_default() -> None:
    params = params_with_grads()
    bucket = backends.Bucket(Lamb(params).param_groups[0], params=params, grads=[param.grad for param in params])
    assert type(backends.Backends().choose(bucket)).__name__ == "Triton"


@FUSED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_give_the_same_bits(dtype: torch.dtype) -> None:
    runs = []
    for _ in range(2):
        params = large_params(dtype)
        optimizer = Lamb(params, lr=1e-2, max_grad_norm=1.0)
        for _ in range(5):
            optimizer.step()
        runs.append([*params, *(optimizer.state[p][key] for p in params for key in ("exp_avg", "exp_avg_sq"))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@FUSED
def test_triton_equals_the_float64_reference() -> None:
    rng = np.random.default_rng(0)
    shapes = [*SHAPES, (3_000_001,)]
    params = [torch.tensor(heterogeneous(shape, rng, 0.05), dtype=torch.float32, device="cuda") for shape in shapes]
    optimizer = Lamb(params, max_grad_norm=1.0)
    reference = ReferenceLamb([p.double().cpu().numpy() for p in params], max_grad_norm=1.0)
    for scale in SCALES * 2:
        for param in params:
            grad = heterogeneous(tuple(param.shape), rng, scale)
            param.grad = torch.tensor(grad, dtype=torch.float32, device="cuda")
        optimizer.step()
        reference.step([p.grad.double().cpu().numpy() for p in params])
    for param, w in zip(params, reference.w, strict=True):
        if w.size:
            difference = np.abs(param.double().cpu().numpy() - w).max() / np.abs(w).max()
            assert difference <= TOLERANCE[torch.float32]


@FUSED
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_triton_rounds_low_precision_parameters_once_a_step(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(2)
    params = [torch.tensor(heterogeneous(s, rng, 0.1), dtype=dtype, device="cuda") for s in [(640, 33), (7,), ()]]
    optimizer = Lamb(params, lr=1e-2)
    reference = ReferenceLamb([p.double().cpu().numpy() for p in params], lr=1e-2)
    half_ulp = torch.finfo(dtype).eps / 2
    for _ in range(10):
        for param in params:
            param.grad = torch.tensor(heterogeneous(tuple(param.shape), rng), dtype=dtype, device="cuda")
        reference.w = [p.double().cpu().numpy() for p in params]
        optimizer.step()
        expected = reference.step([p.grad.double().cpu().numpy() for p in params])
        for param, w in zip(params, expected, strict=True):
            bound = np.abs(w) * half_ulp * 1.01 + torch.finfo(dtype).smallest_normal * half_ulp
            assert (np.abs(param.double().cpu().numpy() - w) <= bound + 1e-6 * np.abs(w).max()).all()


@FUSED
def test_new_gradients_make_no_step_wait() -> None:
    """Where the tensors are is copied to the device again, from pinned memory."""
    params = large_params()
    optimizer = Lamb(params)
    optimizer.step()
    kept = [param.grad for param in params]
    grads = [torch.ones_like(param) for param in params]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    assert {g.data_ptr() for g in kept if g.numel()}.isdisjoint(g.data_ptr() for g in grads)
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@FUSED
def test_a_captured_backward_and_step_replay_as_the_eager_ones() -> None:
    """Gradients made in the graph lie where no step before it found them; eager steps in between change nothing."""
    weights = [torch.randn(300, 70, device="cuda"), torch.randn(70, device="cuda")]
    captured, eager = ([w.clone().requires_grad_() for w in weights] for _ in range(2))
    x = torch.randn(8, 300, device="cuda")
    in_graph, by_hand = Lamb(captured, lr=1e-2), Lamb(eager, lr=1e-2)

    def step(params: list[torch.Tensor], optimizer: Lamb) -> None:
        optimizer.zero_grad(set_to_none=True)
        (x @ params[0] + params[1]).square().mean().backward()
        optimizer.step()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(captured, in_graph)
    torch.cuda.current_stream().wait_stream(stream)
    graphs = [torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()]
    in_graph.zero_grad(set_to_none=True)
    with torch.cuda.graph(graphs[0]):
        step(captured, in_graph)
    with pytest.raises(RuntimeError, match="call step"), torch.cuda.graph(graphs[1]):
        step(captured, in_graph)
    for _ in range(2):
        step(eager, by_hand)
    for _ in range(3):
        x.normal_()
        graphs[0].replay()
        step(eager, by_hand)
        assert all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True))
        x.normal_()
        step(captured, in_graph)
        step(eager, by_hand)
        assert all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True))


@FUSED
@pytest.mark.parametrize("shapes", [[(1 << 24,)], [(1 << 10,)] * 2000], ids=["one huge", "many small"])
def test_memory_is_of_the_order_of_the_chunks(shapes: list[tuple[int, ...]]) -> None:
    """A chunk has 8 bytes of sums and 4 that say whose it is; a tensor some 100 bytes; torch rounds up to 512."""
    params = [torch.randn(shape, device="cuda") for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = Lamb(params, skip_nonfinite=False)
    optimizer.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    optimizer.step()
    chunks = sum(-(-param.numel() // 2048) for param in params)
    assert torch.cuda.max_memory_allocated() - before <= 12 * chunks + 200 * len(params) + (1 << 16)
