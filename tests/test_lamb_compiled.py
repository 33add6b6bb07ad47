"""Protects `torch.compile(optimizer.step)`: whole graphs, and the weights of the plain step."""

from collections.abc import Iterator

import pytest
import torch
import torch._dynamo
from torch._dynamo.utils import counters

from hf_lamb import Lamb
from tests.helpers import BACKENDS


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@BACKENDS
def test_a_compiled_step_is_the_step_in_one_graph(backend: dict[str, bool]) -> None:
    """One graph for the step that makes the state and one for all others, a new rate and a skipped step included.

    One parameter holds two layers.

    `aot_eager` does all that the default compiler does, but for making C++ of it.
    """
    params = [torch.randn(20, 7), torch.randn(7), torch.randn(()), torch.randn(1, 1, 4)]
    others = [param.clone() for param in params]
    lr = torch.tensor(1e-2)
    optimizer, other = (
        Lamb(
            [{"params": [*zip("abcd", tensors, strict=True)], "split": (("a", (35, 105)),)}],
            lr=rate,
            max_grad_norm=1.0,
            **backend,
        )
        for tensors, rate in [(params, lr), (others, 1e-2)]
    )
    step = torch.compile(optimizer.step, backend="aot_eager")
    for rate, factor in [(1e-2, 1.0), (1e-2, 1.0), (3e-3, float("nan")), (1e-3, 1.0)]:
        lr.fill_(rate)
        other.param_groups[0]["lr"] = rate
        for a, b in zip(params, others, strict=True):
            a.grad = torch.randn_like(a) * (factor if a.ndim < 3 else 0)  # one layer has none
            b.grad = a.grad.clone()
        step()
        other.step()
    for a, b in zip(params, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert optimizer.skipped_steps() == other.skipped_steps() == (1, 0)
    assert optimizer.layer_stats().keys() == other.layer_stats().keys() == {"a[0]", "a[1]", "b", "c"}
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 2


def test_a_compiled_step_clips_as_it_was_told() -> None:
    """`clip_grad_norm` outside of the graph; the compiled step looks again, and only a clipped step is clipped."""
    params = [torch.randn(20, 7), torch.randn(7)]
    others = [param.clone() for param in params]
    optimizer, other = (Lamb(p, lr=1e-2, eps=1e-1) for p in (params, others))
    step = torch.compile(optimizer.step, backend="aot_eager")
    for max_norm in (0.5, None, 0.5, None):
        for a, b in zip(params, others, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        if max_norm is not None:
            optimizer.clip_grad_norm(max_norm)
            torch.nn.utils.clip_grad_norm_(others, max_norm)
        step()
        other.step()
    for a, b in zip(params, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert not counters["graph_break"]


def test_clip_and_step_compile_together() -> None:
    params = [torch.randn(20, 7), torch.randn(7)]
    others = [param.clone() for param in params]
    optimizer, other = (Lamb(p, lr=1e-2, eps=1e-1) for p in (params, others))

    @torch.compile(backend="aot_eager")
    def clipped_step() -> torch.Tensor:
        norm = optimizer.clip_grad_norm(0.5)
        optimizer.step()
        return norm

    for _ in range(3):
        for a, b in zip(params, others, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        expected = torch.nn.utils.clip_grad_norm_(others, 0.5)
        torch.testing.assert_close(clipped_step(), expected, rtol=1e-6, atol=0)
        other.step()
    for a, b in zip(params, others, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert not counters["graph_break"]
