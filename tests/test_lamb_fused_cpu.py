"""Protects the fused backend for CPUs without a compiler: where it runs, its blocks, its memory, its arithmetic."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.bench_step import scratch_bytes
from hf_lamb import Lamb
from hf_lamb.backends import compiled, cpu
from tests.reference import ReferenceLamb
from tests.test_lamb_reference import TOLERANCE, heterogeneous, worst_difference

KERNEL = torch._fused_adam_


@pytest.fixture(autouse=True)
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "library", lambda: None)


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tensors each call of torch's kernel got."""
    calls: list[int] = []

    def counted(params: list[torch.Tensor], *args: Any, **kwargs: Any) -> None:
        calls.append(len(params))
        KERNEL(params, *args, **kwargs)

    monkeypatch.setattr(torch, "_fused_adam_", counted)
    return calls


def stepped(shapes: Sequence[Any], dtype: torch.dtype = torch.float32, **options: Any) -> list[torch.Tensor]:
    """The parameters after three steps on random gradients."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    optimizer = Lamb(params, lr=0.1, **options)
    for _ in range(3):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(dtype)
        optimizer.step()
    return params


# -- where it runs ----------------------------------------------------------------------------------------------------


# Whether a fused backend steps, by the optimizer's options.
FUSED_BY_OPTIONS = pytest.mark.parametrize(
    ("options", "fused"),
    [
        ({}, True),
        ({"fused": True}, True),
        ({"fused": False}, False),
        ({"foreach": True}, False),
        ({"foreach": False}, False),
    ],
    ids=str,
)


@FUSED_BY_OPTIONS
def test_it_is_the_default_on_cpu(options: dict[str, bool], fused: bool, kernel_calls: list[int]) -> None:
    """And `fused=False` or a word about `foreach` chooses another."""
    stepped([(3,)], **options)
    assert bool(kernel_calls) == fused


def test_without_the_kernel_it_is_foreach(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's kernel is private: a version without it must train on, to the bit as `foreach=True`."""
    expected = stepped([(5, 4), (3,)], foreach=True)
    monkeypatch.delattr(torch, "_fused_adam_")
    for options in ({}, {"fused": True}):
        assert all(map(torch.equal, stepped([(5, 4), (3,)], **options), expected))


def test_tensors_that_are_not_contiguous_are_left_to_foreach(kernel_calls: list[int]) -> None:
    """One of them does not send the others there."""
    params = [torch.randn(4, 3), torch.randn(4, 3).t(), torch.randn(8)[::2]]
    for param in params:
        param.grad = torch.randn(param.shape)
    Lamb(params).step()
    assert kernel_calls == [1]


# -- blocks and parts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", [False, True], ids=["u kept", "u computed again"])
def test_blocks_and_parts_change_nothing(again: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors larger than a block, than a part, and several in one; u is computed again where there is no scratch."""
    shapes = [(10,), (), (0,), (3, 7), (100,), (2, 2), (4,), (33,)]
    expected = stepped(shapes)
    monkeypatch.setattr(cpu, "BLOCK", 8)
    monkeypatch.setattr(cpu, "PART", 24)
    if again:
        monkeypatch.setattr(cpu, "scratch_size", lambda bucket: cpu.BLOCK)
    for param, other in zip(stepped(shapes), expected, strict=True):
        torch.testing.assert_close(param, other, rtol=1e-6, atol=1e-7)


def test_the_kernel_gets_small_tensors_together_and_large_ones_in_blocks(
    kernel_calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "BLOCK", 8)
    params = [torch.ones(size) for size in (2, 3, 3, 20, 1)]
    for param in params:
        param.grad = torch.ones_like(param)
    Lamb(params).step()
    assert kernel_calls == [3, 1, 1, 2]  # 2 + 3 + 3 elements; 8; 8; 4 + 1


# -- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scratch_is_at_most_the_largest_tensor(dtype: torch.dtype) -> None:
    """Beside weights, gradients and moments; plus a few blocks where dtypes are mixed. foreach takes the model's."""
    size = 3 * cpu.PART
    params = [torch.randn(size).to(dtype) for _ in range(4)]
    for param in params:
        param.grad = torch.randn(size).to(dtype)
    with_scratch, optimizer = Lamb(params), Lamb(params)
    with_scratch.step()
    optimizer.load_state_dict(with_scratch.state_dict())
    blocks = (4.01 if dtype == torch.bfloat16 else 0.01) * 4 * cpu.BLOCK
    assert 4 * size <= scratch_bytes(optimizer.step, "cpu") <= 4 * size + blocks
    assert scratch_bytes(optimizer.step, "cpu") <= blocks  # and it is kept
    eager = Lamb(params, foreach=False)
    eager.step()
    assert scratch_bytes(eager.step, "cpu") >= 4 * 4 * size  # of four tensors, so this test can fail


# -- arithmetic -------------------------------------------------------------------------------------------------------

OPTIONS = st.fixed_dictionaries(
    {},
    optional={
        "lr": st.sampled_from([1e-4, 1e-2, 0.3]),
        "betas": st.tuples(st.sampled_from([0.0, 0.5, 0.9]), st.sampled_from([0.0, 0.9, 0.999])),
        "eps": st.sampled_from([1e-8, 1e-6, 1e-2]),
        "weight_decay": st.sampled_from([0.0, 0.01, 0.5]),
        "bias_correction": st.booleans(),
        "layer_adaptation": st.booleans(),
        "min_trust_ratio": st.sampled_from([None, 0.01]),
        "max_trust_ratio": st.sampled_from([None, 1.0, 10.0]),
        "max_grad_norm": st.sampled_from([None, 1.0]),
        "fixed_norm": st.booleans(),
        "maximize": st.booleans(),
    },
).filter(lambda options: options.get("layer_adaptation", True) or not options.get("fixed_norm"))
SHAPES = st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), min_size=1, max_size=6)


def laid_out(array: np.ndarray, dtype: torch.dtype, layout: str) -> torch.Tensor:
    """The same values, contiguous, as a view into something larger, or transposed."""
    tensor = torch.tensor(array, dtype=dtype)
    if layout == "view":
        return torch.stack((tensor, torch.zeros_like(tensor)), dim=-1)[..., 0]
    return tensor.t().contiguous().t() if layout == "transposed" and tensor.dim() == 2 else tensor


def step_beside(
    reference: ReferenceLamb,
    optimizer: Lamb,
    rng: np.random.Generator,
    scales: list[float],
    poisoned: int | None,
    idle: int,
) -> None:
    """Step both on random gradients of these scales, the reference not with the poisoned ones, which hold a NaN.

    The last layer has gradients of zero in its first `idle` steps.
    """
    (group,) = optimizer.param_groups
    params = group["params"]
    for step, scale in enumerate(scales):
        for param in params:
            param.grad = torch.tensor(heterogeneous(tuple(param.shape), rng, scale), dtype=param.dtype)
        if step < idle:
            params[-1].grad.zero_()
        full = [param for param in params if param.numel()]
        if step == poisoned and full:
            full[0].grad.view(-1)[0] = torch.nan
            optimizer.step()
        else:
            optimizer.step()
            reference.step([param.grad.double().numpy() for param in params])


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(
    shapes=SHAPES,
    options=OPTIONS,
    dtype=st.sampled_from([torch.float32, torch.float64]),
    layouts=st.lists(st.sampled_from(["contiguous", "view", "transposed"]), min_size=6, max_size=6),
    scales=st.lists(st.sampled_from([1e-8, 1e-4, 1.0, 1e4, 1e8]), min_size=3, max_size=3),
    poisoned=st.sampled_from([None, 0, 1, 2]),
    idle=st.sampled_from([0, 0, 1, 3]),
    block=st.sampled_from([3, 16, 1 << 20]),
    seed=st.integers(0, 2**16),
)
def test_random_cases_equal_the_reference(
    shapes: list[tuple[int, ...]],
    options: dict[str, Any],
    dtype: torch.dtype,
    layouts: list[str],
    scales: list[float],
    poisoned: int | None,
    idle: int,
    block: int,
    seed: int,
) -> None:
    """Any shapes, layouts, options and block sizes; a step with a NaN in it changes nothing and is not counted."""
    rng = np.random.default_rng(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "BLOCK", block)
        patch.setattr(cpu, "PART", 2 * block)
        weights = [heterogeneous(shape, rng, 0.05) for shape in shapes]
        params = [laid_out(w, dtype, layout) for w, layout in zip(weights, layouts, strict=False)]
        optimizer = Lamb(params, fused=True, **options)
        reference = ReferenceLamb([param.double().numpy() for param in params], **options)
        step_beside(reference, optimizer, rng, scales, poisoned, idle)
    assert worst_difference(params, reference.w) <= TOLERANCE[dtype]
