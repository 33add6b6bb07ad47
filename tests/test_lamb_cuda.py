"""Protects what only a GPU can show: no host sync in a step, and capture in a CUDA graph without an option for it."""

import pytest
import torch

from hf_lamb import Lamb

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
OPTIONS = pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5, "max_trust_ratio": 10.0}])
BACKENDS = pytest.mark.parametrize("foreach", [False, True], ids=["eager", "foreach"])


def params_with_grads(device: str = "cuda", dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator).to(device, dtype) for shape in [(300, 70), (70,), ()]]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(device, dtype)
    return params


@BACKENDS
@OPTIONS
def test_a_step_does_not_wait_for_the_device(options: dict, foreach: bool) -> None:
    optimizer = Lamb(params_with_grads(), foreach=foreach, **options)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@BACKENDS
@OPTIONS
def test_a_captured_step_replays_as_the_eager_one(options: dict, foreach: bool) -> None:
    """New gradients, a new rate and a skipped step included."""
    captured, eager = params_with_grads(), params_with_grads()
    lr = torch.tensor(1e-2, device="cuda")
    in_graph = Lamb(captured, lr=lr, foreach=foreach, **options)
    by_hand = Lamb(eager, lr=1e-2, foreach=foreach, **options)
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
def test_the_gpu_computes_what_the_cpu_computes(dtype: torch.dtype, foreach: bool) -> None:
    on_gpu, on_cpu = params_with_grads("cuda", dtype), params_with_grads("cpu", dtype)
    for params in (on_gpu, on_cpu):
        optimizer = Lamb(params, lr=1e-2, foreach=foreach)
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
