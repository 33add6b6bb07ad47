"""Protects the buckets that are kept between steps: whatever changes, a step is that of buckets made anew."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from hf_lamb import Lamb, lamb_param_groups, packing
from tests.helpers import BACKENDS


class Case:
    """Three layers in two groups, one frozen, and their optimizer; the same for the same seed."""

    def __init__(self, **options: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        self.params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 4), (6,), (3, 2))]
        self.frozen = nn.Parameter(torch.randn(5, generator=generator))
        first, second, third = self.params
        names = ["first", "second", "frozen"]
        groups = [{"params": [*zip(names, (first, second, self.frozen), strict=True)]}, {"params": [("third", third)]}]
        self.optimizer = Lamb(groups, lr=0.1, **options)

    @property
    def all(self) -> list[nn.Parameter]:
        return [param for group in self.optimizer.param_groups for param in group["params"]]

    def step(self, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        for param in self.all:
            if param.requires_grad and param is not self.frozen:
                grad = torch.randn(param.shape, generator=generator).to(param.dtype)
                param.grad = grad.t().contiguous().t() if not param.is_contiguous() else grad
        self.optimizer.step()

    def replace(self, index: int, new: Tensor) -> None:
        param = nn.Parameter(new)
        group = self.optimizer.param_groups[0]
        old = group["params"][index]
        group["params"][index] = param
        self.optimizer.state[param] = self.optimizer.state.pop(old)
        self.params[index] = param


def grad_is_dropped(case: Case) -> None:
    case.params[1].requires_grad_(False)
    case.params[1].grad = None


def layer_is_unfrozen(case: Case) -> None:
    case.params.append(case.frozen)
    case.frozen = nn.Parameter(torch.zeros(1))


def data_is_replaced(case: Case) -> None:
    case.params[0].data = torch.ones(4, 4)


def data_is_transposed(case: Case) -> None:
    """The same address, the elements in another order."""
    case.params[0].data = case.params[0].data.t()


def parameter_is_replaced(case: Case) -> None:
    case.replace(0, torch.full((4, 4), 2.0))


def group_is_added(case: Case) -> None:
    case.optimizer.add_param_group({"params": [("new", nn.Parameter(torch.ones(3)))], "weight_decay": 0.5})


def parameter_is_removed(case: Case) -> None:
    group = case.optimizer.param_groups[0]
    group["params"], group["param_names"] = group["params"][1:], group["param_names"][1:]


def parameter_is_moved(case: Case) -> None:
    """To another group: the same parameters in the same order."""
    first, second = case.optimizer.param_groups
    for key in ("params", "param_names"):
        second[key].insert(0, first[key].pop())


def parameter_is_renamed(case: Case) -> None:
    case.optimizer.param_groups[0]["param_names"][0] = "other"


def options_are_changed(case: Case) -> None:
    case.optimizer.param_groups[0].update(lr=0.5, weight_decay=0.3, layer_adaptation=False, betas=(0.5, 0.9))


def backend_is_changed(case: Case) -> None:
    case.optimizer.param_groups[1].update(foreach=True, fused=False)


def state_is_loaded(case: Case) -> None:
    other = Case()
    other.step(77)
    case.optimizer.load_state_dict(other.optimizer.state_dict())


def state_is_emptied(case: Case) -> None:
    case.optimizer.state.clear()


def moment_is_replaced(case: Case) -> None:
    case.optimizer.state[case.params[0]]["exp_avg"] = torch.ones(4, 4)


def moments_data_is_replaced(case: Case) -> None:
    case.optimizer.state[case.params[0]]["exp_avg_sq"].data = torch.ones(4, 4)


def step_is_replaced(case: Case) -> None:
    case.optimizer.state[case.params[0]]["step"] = torch.tensor(50.0)


def model_is_cast(case: Case) -> None:
    for param in case.params:
        param.grad = None
        param.data = param.data.to(torch.bfloat16)


def model_is_cast_to_float64(case: Case) -> None:
    for param in case.params:
        param.grad = None
        param.data = param.data.double()


CHANGES = [
    grad_is_dropped, layer_is_unfrozen, data_is_replaced, data_is_transposed, parameter_is_replaced, group_is_added,
    parameter_is_removed, parameter_is_moved, parameter_is_renamed, options_are_changed, backend_is_changed,
    state_is_loaded, state_is_emptied, moment_is_replaced, moments_data_is_replaced, step_is_replaced, model_is_cast,
    model_is_cast_to_float64,
]  # fmt: skip


@BACKENDS
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_step_is_that_of_buckets_made_anew(
    change: Callable[[Case], None], backend: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> tuple[list[Tensor], Any]:
        case = Case(**backend)
        for number in range(6):
            if number == 3:
                change(case)
            case.step(number)
        return [param.detach() for param in case.all], case.optimizer.layer_stats()

    kept = run()
    monkeypatch.setattr(packing, "signature", lambda *_: None)
    anew = run()
    assert all(map(torch.equal, kept[0], anew[0]))
    assert kept[1] == anew[1]


@BACKENDS
def test_they_are_kept_while_only_gradients_change(backend: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """New tensors in every step, as after `zero_grad`; also with a schedule. One that is missing is a change."""
    packed: list[int] = []
    pack = packing.pack
    monkeypatch.setattr(packing, "pack", lambda *arguments: packed.append(1) or pack(*arguments))
    case = Case(**backend)
    for number in range(5):
        case.optimizer.param_groups[0]["lr"] = 0.1 / (number + 1)
        case.step(number)
    assert len(packed) == 1
    grad_is_dropped(case)
    case.step(5)
    assert len(packed) == 2


def test_gradients_are_not_kept_alive() -> None:
    """`zero_grad` gives their memory back."""
    case = Case()
    case.step(0)
    case.step(1)
    grads = [weakref.ref(param.grad) for param in case.params]
    case.optimizer.zero_grad()
    assert [grad() for grad in grads] == [None] * 3


def test_a_step_that_was_refused_leaves_no_half_made_buckets() -> None:
    case = Case()
    case.step(0)
    case.params[0].grad = torch.sparse_coo_tensor(torch.tensor([[0], [0]]), torch.ones(1), (4, 4))
    with pytest.raises(RuntimeError, match="sparse"):
        case.optimizer.step()
    control = Case()
    for number in (0, 1):
        control.step(number)
    case.step(1)
    assert all(map(torch.equal, case.params, control.params))


# -- memory that is not what it seems ---------------------------------------------------------------------------------


@BACKENDS
def test_a_tensor_that_holds_others_has_no_memory_of_its_own(backend: dict[str, Any]) -> None:
    """Such as torchao's weights: at its address there is nothing, or nothing that a kernel may read."""
    results = []
    for wrap in (lambda x: x, lambda x: TwoTensor(x, x.clone())):
        param = torch.nn.Parameter(wrap(torch.ones(3, 4)))
        lamb = Lamb([param], lr=0.1, **backend)
        for _ in range(3):
            param.grad = wrap(torch.full((3, 4), 0.5))
            lamb.step()
        value = param.detach()
        results.append(value.a if isinstance(value, TwoTensor) else value)
    torch.testing.assert_close(*results, rtol=1e-6, atol=0)
    assert not torch.equal(results[0], torch.ones(3, 4))


@BACKENDS
def test_a_gradient_may_be_a_view_that_is_negated_when_it_is_read(backend: dict[str, Any]) -> None:
    """Autograd leaves one where a complex number is conjugated, maybe in some steps: its memory has the other sign."""
    gradient = torch.arange(1.0, 9.0)
    lazily = [
        lambda g: g.clone(),
        lambda g: torch._neg_view(-g),
        lambda g: g.clone(),
        lambda g: torch._neg_view(-g),
    ]
    results = []
    for makes in ([torch.clone] * 4, lazily):
        param = torch.nn.Parameter(torch.ones(8))
        lamb = Lamb([param], lr=0.1, max_grad_norm=1.0, **backend)
        for make in makes:
            param.grad = make(gradient)
            lamb.step()
        results.append(param.detach())
    assert lazily[1](gradient).is_neg()
    torch.testing.assert_close(*results, rtol=1e-6, atol=0)


@BACKENDS
def test_a_step_is_seen_by_graphs_that_were_recorded_before_it(backend: dict[str, Any]) -> None:
    """Their gradients would be those of other weights: torch refuses, as after a step of its own optimizers."""
    layers = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    lamb = Lamb(lamb_param_groups(layers), lr=0.1, **backend)
    one, two = (layers(torch.randn(3, 4)).sum() for _ in range(2))
    one.backward()
    lamb.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        two.backward()
