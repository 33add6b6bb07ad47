"""Protects `Lamb.clip_grad_norm` and the LambTrainer that uses it: the weights of clip_grad_norm_, one look at the
gradients, nothing written to them."""

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_lamb import Lamb
from hf_lamb.backends import compiled, cpu, eager, foreach
from hf_lamb.layer_stats import count_skipped
from tests.helpers import BACKENDS, one_line
from tests.test_lamb_contract import NoHostSync

# A large eps, or Adam's scale invariance would hide a clip that is not there.
OPTIONS: dict[str, Any] = {"lr": 1e-2, "eps": 1e-1, "weight_decay": 0.01}
SHAPES = [(20, 7), (7,), (), (3, 4, 5)]


def some_params(*dtypes: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    dtypes = dtypes or (torch.float32,)
    return [
        nn.Parameter(torch.randn(shape, generator=generator).to(dtypes[i % len(dtypes)]))
        for i, shape in enumerate(SHAPES)
    ]


def give_gradients(params: list[nn.Parameter], step: int = 0, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    for param in params:
        param.grad = (scale * torch.randn(param.shape, generator=generator)).to(param.dtype)


def optimizer_of(params: list[nn.Parameter], *groups: dict[str, Any], **options: Any) -> Lamb:
    """Of two groups, the first of which has the first two parameters."""
    first, second = groups or ({}, {})
    return Lamb([{"params": params[:2], **first}, {"params": params[2:], **second}], **OPTIONS | options)


def assert_close(params: list[nn.Parameter], others: list[nn.Parameter], rtol: float = 1e-6) -> None:
    for a, b in zip(params, others, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=rtol, atol=rtol, equal_nan=True)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the buckets whose gradients were read for their norm. (The classes are not public: the C kernel's reads
    are no operations that a TorchDispatchMode could see.)"""
    seen: list[int] = []
    for kind in (eager.Eager, foreach.Foreach, cpu.CPU, compiled.Compiled):

        def counted(self: Any, bucket: Any, stock: Callable[..., Tensor] = kind.squared_gradients) -> Tensor:
            seen.append(len(bucket.params))
            return stock(self, bucket)

        monkeypatch.setattr(kind, "squared_gradients", counted)
    return seen


# -- the optimizer ----------------------------------------------------------------------------------------------------


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("max_norm", [0.5, 1e3, float("inf")])
@pytest.mark.parametrize("groups", [({}, {}), ({"max_grad_norm": 0.2}, {}), ({}, {"max_grad_norm": 2.0})], ids=str)
def test_it_is_clip_grad_norm_and_a_step(
    groups: Any, max_norm: float, dtype: torch.dtype, backend: dict[str, bool]
) -> None:
    """The norm that it returns, and the weights of five steps, alone and with the option `max_grad_norm` after it."""
    params, others = some_params(dtype), some_params(dtype)
    optimizer, other = optimizer_of(params, *groups, **backend), optimizer_of(others, *groups, **backend)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-12
    for step in range(5):
        give_gradients(params, step)
        give_gradients(others, step)
        norm = optimizer.clip_grad_norm(max_norm)
        expected = torch.nn.utils.clip_grad_norm_(others, max_norm)
        assert norm.shape == ()
        torch.testing.assert_close(norm, expected, rtol=tolerance, atol=0)
        optimizer.step()
        other.step()
    assert_close(params, others, tolerance)
    assert optimizer.skipped_steps() == (0, 0)


@BACKENDS
def test_parameters_of_several_dtypes_have_one_norm(backend: dict[str, bool]) -> None:
    """Against the option `max_grad_norm`, because clip_grad_norm_ rounds what it writes to bf16."""
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    params, others, unclipped = some_params(*dtypes), some_params(*dtypes), some_params(*dtypes)
    optimizer = optimizer_of(params, **backend)
    other, plain = optimizer_of(others, max_grad_norm=0.5, **backend), optimizer_of(unclipped, **backend)
    for step in range(3):
        for these in (params, others, unclipped):
            give_gradients(these, step)
        norm = optimizer.clip_grad_norm(0.5)
        for one in (optimizer, other, plain):
            one.step()
    expected = torch.stack([param.grad.double().norm() for param in params]).norm()
    assert float(norm) == pytest.approx(float(expected), rel=1e-6)
    assert_close(params, others, 1e-5)
    assert not torch.allclose(params[0], unclipped[0], rtol=1e-3)


@BACKENDS
def test_nothing_is_written_to_the_gradients_or_the_options(backend: dict[str, bool]) -> None:
    """A stock Trainer that loads the state clips itself: it must not clip twice."""
    params = some_params()
    give_gradients(params)
    grads, before = [p.grad for p in params], [p.grad.clone() for p in params]
    versions = [grad._version for grad in grads]
    optimizer, fresh = optimizer_of(params, **backend), optimizer_of(some_params(), **backend)
    optimizer.clip_grad_norm(0.1)
    assert optimizer.state_dict()["param_groups"] == fresh.state_dict()["param_groups"]
    optimizer.step()
    assert optimizer.state_dict()["param_groups"] == fresh.state_dict()["param_groups"]
    assert all(p.grad is grad for p, grad in zip(params, grads, strict=True))
    assert [grad._version for grad in grads] == versions
    assert all(map(torch.equal, grads, before))


@BACKENDS
def test_the_step_does_not_look_again(backend: dict[str, bool], looks: list[int]) -> None:
    """Neither for the clip, nor for `skip_nonfinite`, nor for `max_grad_norm`."""
    params = some_params()
    optimizer = optimizer_of(params, {"max_grad_norm": 0.2}, {}, **backend)
    for step in range(3):
        give_gradients(params, step)
        looks.clear()
        optimizer.clip_grad_norm(0.5)
        assert sum(looks) == len(params)
        optimizer.step()
        assert sum(looks) == len(params)
    give_gradients(params)
    optimizer.step()
    assert sum(looks) == 2 * len(params), "the spy sees nothing"


def double(grad: Tensor) -> None:
    grad.mul_(2)


def double_detached(grad: Tensor) -> None:
    grad.detach().mul_(2)


def double_with_others(grad: Tensor) -> None:
    torch._foreach_mul_([grad], 2.0)


def double_elsewhere(grad: Tensor) -> None:
    grad.data = 2 * grad


def double_in_parts(grad: Tensor) -> None:
    for row in grad:
        row.mul_(2)


@BACKENDS
@pytest.mark.parametrize("write", [double, double_detached, double_with_others, double_elsewhere, double_in_parts])
def test_after_a_write_the_step_looks_again(
    write: Callable[[Tensor], None], backend: dict[str, bool], looks: list[int]
) -> None:
    """It clips what the write left, to the same norm."""
    params, others = some_params(), some_params()
    optimizer, other = optimizer_of(params, **backend), optimizer_of(others, **backend)
    for step in range(2):
        give_gradients(params, step)
        give_gradients(others, step)
        optimizer.clip_grad_norm(0.5)
        write(params[0].grad)
        looks.clear()
        optimizer.step()
        assert sum(looks) == len(params)
        others[0].grad.mul_(2)
        torch.nn.utils.clip_grad_norm_(others, 0.5)
        other.step()
    assert_close(params, others)


def replace(params: list[nn.Parameter]) -> None:
    params[0].grad = params[0].grad * 2


def replace_in_the_same_place(params: list[nn.Parameter]) -> None:
    """The allocator gives the new gradient the old one's memory, and Python may give it the old one's identity."""
    params[0].grad = None
    params[0].grad = torch.zeros(SHAPES[0])


def take_away(params: list[nn.Parameter]) -> None:
    params[0].grad = None


def give_the_missing(params: list[nn.Parameter]) -> None:
    params[3].grad = torch.ones(SHAPES[3])


def another_backward(params: list[nn.Parameter]) -> None:
    sum(param.square().sum() for param in params).backward()


@BACKENDS
@pytest.mark.parametrize("change", [replace, replace_in_the_same_place, take_away, give_the_missing, another_backward])
def test_gradients_that_come_go_or_are_replaced_are_seen(
    change: Callable[[list[nn.Parameter]], None], backend: dict[str, bool]
) -> None:
    params, others = some_params(), some_params()
    optimizer, other = optimizer_of(params, **backend), optimizer_of(others, **backend)
    for step in range(2):
        for these in (params, others):
            give_gradients(these, step)
            these[3].grad = None
        optimizer.clip_grad_norm(0.5)
        change(params)
        optimizer.step()
        change(others)
        torch.nn.utils.clip_grad_norm_(others, 0.5)
        other.step()
    assert_close(params, others)


def test_a_rate_that_changes_in_between_counts() -> None:
    params, others = some_params(), some_params()
    optimizer, other = optimizer_of(params), optimizer_of(others)
    for these in (params, others):
        give_gradients(these)
    optimizer.clip_grad_norm(0.5)
    torch.nn.utils.clip_grad_norm_(others, 0.5)
    for one in (optimizer, other):
        one.param_groups[1]["lr"] = 0.3
        one.step()
    assert_close(params, others)


def after_a_step(optimizer: Lamb) -> Lamb:
    optimizer.step()
    return optimizer


def after_a_step_without_gradients(optimizer: Lamb) -> Lamb:
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = None
    optimizer.step()
    return optimizer


def after_zero_grad(optimizer: Lamb) -> Lamb:
    optimizer.zero_grad()
    return optimizer


def after_zeroing_in_place(optimizer: Lamb) -> Lamb:
    optimizer.zero_grad(set_to_none=False)
    return optimizer


def after_loading(optimizer: Lamb) -> Lamb:
    optimizer.load_state_dict(optimizer.state_dict())
    return optimizer


def after_a_closure_that_starts_anew(optimizer: Lamb) -> Lamb:
    optimizer.step(lambda: optimizer.zero_grad() or 0.0)
    return optimizer


@pytest.mark.parametrize(
    "end",
    [
        after_a_step,
        after_a_step_without_gradients,
        after_zero_grad,
        after_zeroing_in_place,
        after_loading,
        after_a_closure_that_starts_anew,
        copy.deepcopy,
        lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
    ],
)
def test_it_holds_for_one_step(end: Callable[[Lamb], Lamb]) -> None:
    """The step after that is not clipped."""
    params = some_params()
    optimizer = optimizer_of(params)
    give_gradients(params)
    optimizer.clip_grad_norm(1e-3)
    optimizer = end(optimizer)
    params = [param for group in optimizer.param_groups for param in group["params"]]
    others = [nn.Parameter(param.detach().clone()) for param in params]
    unclipped = optimizer_of(others)
    unclipped.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for these in (params, others):
        give_gradients(these, step=1)
    optimizer.step()
    unclipped.step()
    assert all(map(torch.equal, params, others))


def test_it_keeps_no_gradient_alive() -> None:
    """When the loss scaler skips the step, the next gradients need the memory."""
    params = some_params()
    optimizer = optimizer_of(params)
    give_gradients(params)
    optimizer.clip_grad_norm(1.0)
    grads = [weakref.ref(param.grad) for param in params]
    for param in params:
        param.grad = None
    gc.collect()
    assert [grad() for grad in grads] == [None] * len(params)


@BACKENDS
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_a_norm_that_is_not_finite_skips_the_step(poison: float, backend: dict[str, bool]) -> None:
    params = some_params()
    optimizer = optimizer_of(params, **backend)
    give_gradients(params)
    params[0].grad[0, 0] = poison
    assert not bool(optimizer.clip_grad_norm(1.0).isfinite())
    optimizer.step()
    assert all(map(torch.equal, params, some_params()))
    assert optimizer.skipped_steps() == (1, 1)


@BACKENDS
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_without_skipping_it_spreads_as_with_clip_grad_norm_(poison: float, backend: dict[str, bool]) -> None:
    """NaN to all parameters; an inf becomes NaN, and all other gradients zero."""
    params, others = some_params(), some_params()
    optimizer = optimizer_of(params, skip_nonfinite=False, **backend)
    other = optimizer_of(others, skip_nonfinite=False, **backend)
    for bad in (False, True):
        for these in (params, others):
            give_gradients(these)
            if bad:
                these[0].grad[0, 0] = poison
        optimizer.clip_grad_norm(1.0)
        torch.nn.utils.clip_grad_norm_(others, 1.0)
        optimizer.step()
        other.step()
    assert bool(others[0].isnan().any())
    assert bool(others[1].isnan().all()) == (poison != float("inf"))
    assert_close(params, others)


@BACKENDS
def test_it_reads_no_value_back_to_the_host(backend: dict[str, bool]) -> None:
    params = some_params()
    optimizer = optimizer_of(params, max_grad_norm=2.0, **backend)
    give_gradients(params)
    with NoHostSync():
        for _ in range(2):
            optimizer.clip_grad_norm(0.5)
            optimizer.step()
        optimizer.clip_grad_norm(0.5)
        params[0].grad.mul_(2)
        params[1].grad = params[1].grad.clone()
        optimizer.step()


def test_without_gradients_the_norm_is_zero() -> None:
    optimizer = optimizer_of(some_params())
    assert float(optimizer.clip_grad_norm(1.0)) == 0.0
    optimizer.step()


@pytest.mark.parametrize("max_norm", [0, -1.0, float("nan"), True, "1.0", None, torch.tensor(1.0)], ids=repr)
def test_what_is_no_threshold_is_refused(max_norm: Any) -> None:
    params = some_params()
    optimizer = optimizer_of(params)
    with one_line(ValueError, "Invalid max_norm: .*: expected a positive number, or inf to compute the norm only"):
        optimizer.clip_grad_norm(max_norm)


def test_a_sparse_gradient_is_refused_as_in_step() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    with one_line(RuntimeError, "is sparse, which LAMB's norms do not support: use sparse=False in the embedding"):
        Lamb(embedding.parameters()).clip_grad_norm(1.0)


@BACKENDS
def test_clipping_first_leaves_the_step_as_it_is_where_layers_copy_their_gradients(backend: dict[str, Any]) -> None:
    """Layers that are no whole rows of a transposed gradient; the copies that were clipped are gone at the step."""
    results = []
    for transposed in (False, True):
        generator = torch.Generator().manual_seed(0)
        param = torch.nn.Parameter(torch.randn(2, 8, 3, generator=generator))
        group = {"params": [param], "param_names": ["w"], "split": [("w", (12,) * 4)]}
        lamb = Lamb([group], lr=0.1, **backend)
        for _ in range(4):
            gradient = torch.randn(2, 8, 3, generator=generator)
            param.grad = gradient.mT.contiguous().mT if transposed else gradient
            lamb.clip_grad_norm(1e9)
            others = [torch.full((12,), 1e3) for _ in range(64)]  # in the memory of the copies, where it is free
            lamb.step()
            del others
        results.append(param.detach())
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


def test_skipped_steps_are_counted_where_the_gradients_are() -> None:
    """A model may move after its first steps, or have a part on another device."""
    counts: list[torch.Tensor] = []
    count_skipped(counts, torch.tensor(False))
    assert counts[0].tolist() == [1, 1]
    count_skipped(counts, torch.tensor(False, device="meta"))
    assert counts[0].is_meta
    count_skipped(counts, torch.tensor(False))
    assert counts[0].is_meta
