"""Protects what torch.optim's users rely on: state, groups, closures, errors, and nothing read back to the host."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_lamb import Lamb, LayerStats, ShardingError
from tests.helpers import BACKENDS


def params_with_grads(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in [(8, 5), (5,), ()]]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator).to(dtype)
    return params


def snapshot(optimizer: Lamb) -> list[torch.Tensor]:
    tensors = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            tensors.append(param.detach().clone())
            tensors.extend(value.clone() for _, value in sorted(optimizer.state[param].items()))
    return tensors


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# -- options --------------------------------------------------------------------------------------------------------

BAD_OPTIONS = [
    ({"lr": -1.0}, "Invalid learning rate: -1.0"),
    ({"lr": float("nan")}, "Invalid learning rate: nan"),
    ({"lr": float("inf")}, "Invalid learning rate: inf"),
    ({"lr": torch.ones(2)}, r"a tensor lr must have one element, got shape \(2,\)"),
    ({"betas": (1.0, 0.999)}, "Invalid beta parameter at index 0: 1.0"),
    ({"betas": (0.9, -0.1)}, "Invalid beta parameter at index 1: -0.1"),
    ({"betas": (0.9,)}, r"Invalid betas: \(0.9,\): expected two numbers"),
    ({"eps": -1e-8}, "Invalid eps value: -1e-08"),
    ({"weight_decay": -0.1}, "Invalid weight_decay value: -0.1"),
    ({"min_trust_ratio": -1.0}, "Invalid min_trust_ratio: -1.0"),
    ({"max_trust_ratio": 0.0}, "Invalid max_trust_ratio: 0.0"),
    ({"min_trust_ratio": 2.0, "max_trust_ratio": 1.0}, "min_trust_ratio 2.0 is above max_trust_ratio 1.0"),
    ({"max_grad_norm": 0.0}, "Invalid max_grad_norm: 0.0: expected a positive number, or None"),
    ({"max_grad_norm": -1.0}, "Invalid max_grad_norm: -1.0"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_bad_options_are_refused_with_their_value(options: dict[str, Any], message: str) -> None:
    """At construction, and for a single group just as well."""
    with pytest.raises(ValueError, match=message):
        Lamb([torch.ones(2)], **options)
    with pytest.raises(ValueError, match=message):
        Lamb([{"params": [torch.ones(2)], **options}])
    optimizer = Lamb([torch.ones(2)])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [torch.ones(2)], **options})
    assert len(optimizer.param_groups) == 1


def test_one_kind_of_kernel_at_a_time() -> None:
    """torch's own words."""
    with pytest.raises(RuntimeError, match="cannot be `True` together"):
        Lamb([torch.ones(2)], fused=True, foreach=True)


@BACKENDS
def test_options_are_per_group(backend: dict[str, bool]) -> None:
    """Each group is updated with its own options, as if it were alone."""
    a, b, alone_a, alone_b = (params_with_grads() for _ in range(4))
    Lamb([{"params": a, "lr": 0.1, "weight_decay": 0.0}, {"params": b, "layer_adaptation": False}], **backend).step()
    Lamb(alone_a, lr=0.1, weight_decay=0.0, **backend).step()
    Lamb(alone_b, layer_adaptation=False, **backend).step()
    assert same(a, alone_a)
    assert same(b, alone_b)


# -- step -----------------------------------------------------------------------------------------------------------


def test_step_without_gradients_does_nothing() -> None:
    """No state, no change, no error."""
    params = [torch.ones(3, requires_grad=True)]
    optimizer = Lamb(params)
    optimizer.step()
    assert torch.equal(params[0], torch.ones(3))
    assert not optimizer.state
    assert optimizer.layer_stats() == {}


def test_closure_is_evaluated_with_gradients_and_its_loss_returned() -> None:
    w = torch.ones(3, requires_grad=True)
    optimizer = Lamb([w], lr=0.1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (w**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert bool((w < 1).all())


@BACKENDS
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.1}, {"maximize": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_never_written(dtype: torch.dtype, options: dict[str, Any], backend: dict[str, bool]) -> None:
    """apex overwrites p.grad with the update, timm clips it in place: other readers of .grad see garbage."""
    params = params_with_grads(dtype)
    grads = [p.grad for p in params]
    before = [g.clone() for g in grads]
    Lamb(params, **backend, **options).step()
    assert all(p.grad is g for p, g in zip(params, grads, strict=True))
    assert same(grads, before)


class NoHostSync(TorchDispatchMode):
    """Fails on every operation that hands a tensor's value to Python."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket not in {
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.is_nonzero,
            torch.ops.aten.equal,
            torch.ops.aten.nonzero,
        }, f"{func} reads a tensor's value"
        return func(*args, **(kwargs or {}))


def test_the_guard_against_host_syncs_sees_one() -> None:
    with pytest.raises(AssertionError, match="reads a tensor's value"), NoHostSync():
        torch.ones(()).item()


@BACKENDS
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.1, "max_trust_ratio": 10.0}, {"lr": torch.tensor(1e-3)}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_reads_no_value_back_to_the_host(
    dtype: torch.dtype, options: dict[str, Any], backend: dict[str, bool]
) -> None:
    """A host sync stalls a GPU and breaks graph capture."""
    params = params_with_grads(dtype)
    optimizer = Lamb(params, **backend, **options)
    with NoHostSync():
        optimizer.step()
        optimizer.step()


@BACKENDS
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("at_step", [0, 2])
def test_a_non_finite_gradient_skips_the_whole_step(at_step: int, poison: float, backend: dict[str, bool]) -> None:
    """One bad element anywhere: weights, moments and step counts of all parameters stay, to the bit.
    A finite gradient whose square overflows counts: its exp_avg_sq would be inf for ever."""
    params = params_with_grads()
    optimizer = Lamb([{"params": params[:1]}, {"params": params[1:], "max_grad_norm": 1.0}], **backend)
    for _ in range(at_step):
        optimizer.step()
    before = snapshot(optimizer)
    clean = params[1].grad.clone()
    params[1].grad[3] = poison
    optimizer.step()
    after = snapshot(optimizer)
    if at_step == 0:  # the state has just been made
        assert same([p.detach() for p in params], [p.detach() for p in params_with_grads()])
        assert all(not value.any() for state in optimizer.state.values() for value in state.values())
    else:
        assert same(before, after)
    # and the next clean step is as if nothing had been
    params[1].grad = clean
    optimizer.step()
    other = params_with_grads()
    undisturbed = Lamb([{"params": other[:1]}, {"params": other[1:], "max_grad_norm": 1.0}], **backend)
    for _ in range(at_step + 1):
        undisturbed.step()
    assert same(snapshot(optimizer), snapshot(undisturbed))


def test_skip_nonfinite_off_lets_them_through() -> None:
    """Off means off: no look at the gradients."""
    params = params_with_grads()
    params[0].grad[0, 0] = float("nan")
    Lamb(params, skip_nonfinite=False).step()
    assert bool(params[0].isnan().any())
    assert not bool(params[1].isnan().any())


@BACKENDS
def test_so_does_one_in_the_first_step_without_eps(backend: dict[str, bool]) -> None:
    """Then the moments are zero, and u is 0/0 where it is not kept from it."""
    param = torch.ones(3)
    param.grad = torch.tensor([1.0, torch.nan, 1.0])
    Lamb([param], eps=0.0, **backend).step()
    assert torch.equal(param, torch.ones(3))


def test_sparse_gradients_are_refused_by_name() -> None:
    embedding = torch.nn.Embedding(10, 4, sparse=True)
    embedding(torch.tensor([1, 2])).sum().backward()
    optimizer = Lamb(list(embedding.named_parameters()))
    with pytest.raises(RuntimeError, match="the gradient of weight is sparse"):
        optimizer.step()


def test_a_late_parameter_has_its_own_step_count() -> None:
    """A parameter that gets its first gradient at step 3 is at its own t = 1, with the full bias correction."""
    params = params_with_grads()
    late_grad, params[0].grad = params[0].grad, None
    optimizer = Lamb(params)
    optimizer.step()
    optimizer.step()
    params[0].grad = late_grad
    optimizer.step()
    assert [float(optimizer.state[p]["step"]) for p in params] == [1.0, 3.0, 3.0]
    fresh = params_with_grads()
    Lamb(fresh).step()
    assert torch.equal(params[0], fresh[0])


# -- state ----------------------------------------------------------------------------------------------------------


def test_state_names_are_torchs_and_the_step_lives_with_the_parameter() -> None:
    params = params_with_grads()
    optimizer = Lamb(params)
    optimizer.step()
    for param in params:
        state = optimizer.state[param]
        assert set(state) == {"step", "exp_avg", "exp_avg_sq"}
        assert state["step"].device == param.device
        assert state["step"].shape == ()


@pytest.mark.parametrize(
    "copied",
    [
        lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
        copy.deepcopy,
    ],
    ids=["pickle", "deepcopy"],
)
def test_a_copied_optimizer_goes_on_identically(copied: Callable[[Lamb], Lamb]) -> None:
    params = params_with_grads()
    optimizer = Lamb(params, max_trust_ratio=10.0)
    optimizer.step()
    other = copied(optimizer)
    assert other.layer_stats() == {}
    for copy_, param in zip(other.param_groups[0]["params"], params, strict=True):
        copy_.grad = param.grad.clone()
    optimizer.step()
    other.step()
    assert same(snapshot(optimizer), snapshot(other))


def test_state_dict_round_trip_goes_on_identically() -> None:
    params, others = params_with_grads(), params_with_grads()
    optimizer = Lamb(params, lr=0.1)
    optimizer.step()
    with torch.no_grad():
        for param, other in zip(params, others, strict=True):
            other.copy_(param)
    loaded = Lamb(others)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch shares tensors otherwise
    optimizer.step()
    loaded.step()
    assert same(snapshot(optimizer), snapshot(loaded))


def test_a_state_dict_without_newer_options_loads() -> None:
    """What an older version wrote lacks options; they get their defaults."""
    params = params_with_grads()
    optimizer = Lamb(params)
    optimizer.step()
    old = optimizer.state_dict()
    for option in ("fixed_norm", "skip_nonfinite", "max_trust_ratio"):
        del old["param_groups"][0][option]
    loaded = Lamb(params_with_grads(), max_trust_ratio=7.0)
    loaded.load_state_dict(old)
    assert loaded.param_groups[0]["skip_nonfinite"] is True
    assert loaded.param_groups[0]["max_trust_ratio"] == 7.0
    loaded.step()


def test_a_step_at_rate_zero_moves_nothing() -> None:
    """torch.distributed.checkpoint steps a fresh optimizer with zero gradients and lr = 0 to make its state."""
    params = params_with_grads()
    before = [p.detach().clone() for p in params]
    for param in params:
        param.grad = torch.zeros_like(param)
    Lamb(params, lr=0.0).step()
    assert same([p.detach() for p in params], before)


# -- diagnostics ----------------------------------------------------------------------------------------------------


@BACKENDS
def test_layer_stats_are_the_norms_and_ratio_of_the_last_step(backend: dict[str, bool]) -> None:
    """By the names the parameters were given with; a parameter that is not adapted has ratio 1."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    model(torch.randn(2, 4)).square().sum().backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    groups = [
        {"params": [("weight", model.weight)]},
        {"params": [("bias", model.bias)], "layer_adaptation": False},
    ]
    optimizer = Lamb(groups, lr=0.5, weight_decay=0.0, **backend)
    optimizer.step()
    stats = optimizer.layer_stats()
    assert set(stats) == {"weight", "bias"}
    for name, param in model.named_parameters():
        assert isinstance(stats[name], LayerStats)
        assert stats[name].weight_norm == pytest.approx(float(before[name].norm()), rel=1e-5)
        moved = float((before[name] - param.detach()).norm())
        assert moved == pytest.approx(0.5 * stats[name].trust_ratio * stats[name].adam_norm, rel=1e-5)
    assert stats["weight"].trust_ratio == pytest.approx(stats["weight"].weight_norm / stats["weight"].adam_norm)
    assert stats["bias"].trust_ratio == 1.0


def test_layer_stats_of_unnamed_parameters_say_where_they_are() -> None:
    optimizer = Lamb([{"params": params_with_grads()[:1]}, {"params": params_with_grads()[1:]}])
    optimizer.step()
    assert list(optimizer.layer_stats()) == [
        "param_groups.0.params.0",
        "param_groups.1.params.0",
        "param_groups.1.params.1",
    ]


def test_layer_stats_stay_out_of_the_state_dict() -> None:
    """Norms kept in `state` make sharded checkpoints crash."""
    optimizer = Lamb(params_with_grads())
    optimizer.step()
    assert set(optimizer.state_dict()) == {"state", "param_groups"}
    assert all(set(s) == {"step", "exp_avg", "exp_avg_sq"} for s in optimizer.state_dict()["state"].values())


# -- what people do with optimizers -----------------------------------------------------------------------------------


def test_step_hooks_run_around_the_step() -> None:
    """torch.optim's pre- and post-hooks, once each per step."""
    params, calls = params_with_grads(), []
    optimizer = Lamb(params)
    optimizer.register_step_pre_hook(lambda *_: calls.append(("before", params[0].detach().clone())))
    optimizer.register_step_post_hook(lambda *_: calls.append(("after", params[0].detach().clone())))
    optimizer.step()
    assert [name for name, _ in calls] == ["before", "after"]
    assert not torch.equal(calls[0][1], calls[1][1])


@BACKENDS
def test_a_group_added_during_training_starts_at_its_own_first_step(backend: dict[str, bool]) -> None:
    params, late = params_with_grads(), params_with_grads()
    optimizer = Lamb(params, **backend)
    optimizer.step()
    optimizer.add_param_group({"params": late, "lr": 0.1})
    optimizer.step()
    fresh = params_with_grads()
    Lamb(fresh, lr=0.1, **backend).step()
    assert same([p.detach() for p in late], [p.detach() for p in fresh])
    assert optimizer.state[params[0]]["step"] == 2


def test_tied_weights_are_one_parameter_with_one_update() -> None:
    """Two modules that share a weight: the gradients add up, the step is taken once."""
    first, second = torch.nn.Linear(4, 4, bias=False), torch.nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    model = torch.nn.Sequential(first, second)
    optimizer = Lamb(list(model.named_parameters()), lr=0.1, weight_decay=0.0)
    before = first.weight.detach().clone()
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert len(optimizer.state) == 1
    assert float((first.weight - before).detach().norm() / before.norm()) == pytest.approx(0.1, rel=1e-5)


@BACKENDS
def test_a_parameter_that_is_a_view_changes_its_part_only(backend: dict[str, bool]) -> None:
    """A slice of a flat buffer is updated in place, its neighbours are not."""
    buffer = torch.ones(12)
    view = buffer[3:9].view(2, 3)
    view.grad = torch.arange(6.0).view(2, 3) - 2.5
    Lamb([view], **backend).step()
    assert torch.equal(buffer[:3], torch.ones(3))
    assert torch.equal(buffer[9:], torch.ones(3))
    assert bool((buffer[3:9] != 1).all())


@BACKENDS
def test_memory_layouts_are_kept(backend: dict[str, bool]) -> None:
    """A transposed or channels-last parameter gets the values of a contiguous one, and keeps its strides."""
    generator = torch.Generator().manual_seed(0)
    plain = torch.randn(2, 3, 4, 5, generator=generator)
    plain.grad = torch.randn(2, 3, 4, 5, generator=generator)
    last = plain.clone().to(memory_format=torch.channels_last)
    last.grad = plain.grad.clone()
    Lamb([plain], **backend).step()
    optimizer = Lamb([last], **backend)
    optimizer.step()
    torch.testing.assert_close(plain, last, rtol=1e-6, atol=1e-7)
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert optimizer.state[last]["exp_avg"].is_contiguous(memory_format=torch.channels_last)


def test_learning_rate_schedulers_and_zero_grad() -> None:
    """torch's schedulers write group["lr"]; a tensor lr is changed in place."""
    params = params_with_grads()
    optimizer = Lamb(params, lr=torch.tensor(0.1))
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.5, total_iters=2)
    assert optimizer.param_groups[0]["lr"].item() == pytest.approx(0.05)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"].item() == pytest.approx(0.075)
    optimizer.zero_grad()
    assert all(p.grad is None for p in params)


@pytest.mark.parametrize(
    ("param", "message"),
    [
        (torch.ones(2, dtype=torch.complex64), r"parameter head is of dtype torch.complex64: it takes real floating"),
        (torch.ones(2, dtype=torch.int64), r"parameter head is of dtype torch.int64"),
        (torch.ones(2, device="meta"), r"parameter head is on the meta device"),
        (torch.ones(2).to_sparse(), r"parameter head is of layout torch.sparse_coo"),
        (torch.nn.LazyLinear(2).weight, r"parameter head is not initialised yet \(a lazy module's\): run the model"),
    ],
)
def test_parameters_it_cannot_train_are_refused_by_name(param: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Lamb([("head", param)])
    optimizer = Lamb([("body", torch.ones(2))])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [("head", param)]})
    assert len(optimizer.param_groups) == 1


@BACKENDS
@pytest.mark.parametrize("number", [np.float32, np.float64, np.array])
@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lr", 0.125),
        ("betas", 0.75),
        ("eps", 0.5),
        ("weight_decay", 0.25),
        ("min_trust_ratio", 4.0),
        ("max_trust_ratio", 0.125),
        ("max_grad_norm", 0.5),
    ],
)
def test_numpys_numbers_are_numbers(
    option: str, value: float, number: Callable[[float], Any], backend: dict[str, bool]
) -> None:
    """To the bit what Python's give; as options, of a group, and where a schedule writes them into `param_groups`.

    Nor does a checkpoint hold them: `torch.load` would refuse it."""

    def options(of: Callable[[float], Any]) -> dict[str, Any]:
        return {option: (of(value), of(0.5)) if option == "betas" else of(value)}

    def stepped(make: Callable[[list[torch.Tensor]], Lamb]) -> list[torch.Tensor]:
        optimizer = make(params_with_grads())
        for _ in range(2):
            optimizer.step()
        return snapshot(optimizer)

    def edited(params: list[torch.Tensor]) -> Lamb:
        optimizer = Lamb(params, **backend)
        optimizer.param_groups[0].update(options(number))
        return optimizer

    expected = stepped(lambda params: Lamb(params, **options(float), **backend))
    assert same(stepped(lambda params: Lamb(params, **options(number), **backend)), expected)
    assert same(stepped(lambda params: Lamb([{"params": params, **options(number)}], **backend)), expected)
    assert same(stepped(edited), expected)
    saved = Lamb(params_with_grads(), **options(number)).state_dict()["param_groups"][0][option]
    assert type(saved[0] if option == "betas" else saved) is float
    other = Lamb(params_with_grads())
    other.load_state_dict(edited(params_with_grads()).state_dict())
    loaded = other.param_groups[0][option]
    assert type(loaded[0] if option == "betas" else loaded) is float


@BACKENDS
@pytest.mark.parametrize("option", ["betas", "eps", "weight_decay", "min_trust_ratio", "max_grad_norm"])
def test_a_tensor_put_into_a_group_is_refused_before_anything_moves(option: str, backend: dict[str, bool]) -> None:
    """It would have to be read back to the host. `lr` alone may be one."""
    params = params_with_grads()
    optimizer = Lamb(params, **backend)
    optimizer.step()
    before = snapshot(optimizer)
    value = torch.tensor(0.9)
    optimizer.param_groups[0][option] = (value, 0.99) if option == "betas" else value
    with NoHostSync(), pytest.raises(ValueError, match=r"expected a number, not a tensor, which only lr may be"):
        optimizer.step()
    assert same(snapshot(optimizer), before)


@BACKENDS
@pytest.mark.parametrize("lr", [torch.tensor(0.1), torch.tensor([0.1]), torch.tensor([[0.1]], dtype=torch.float64)])
def test_a_tensor_rate_of_any_one_element_shape(lr: torch.Tensor, backend: dict[str, bool]) -> None:
    params, others = params_with_grads(), params_with_grads()
    Lamb(params, lr=lr, **backend).step()
    Lamb(others, lr=0.1, **backend).step()
    for param, other in zip(params, others, strict=True):
        torch.testing.assert_close(param, other, rtol=1e-6, atol=0)


@BACKENDS
@pytest.mark.parametrize(
    "make",
    [
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=5),
        lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    ],
    ids=["OneCycleLR", "CyclicLR"],
)
def test_schedules_of_the_first_beta(make: Callable[[Lamb], Any], backend: dict[str, bool]) -> None:
    """What torch's schedules write into `betas` is used in the next step."""
    (param, *_), (other, *_) = params_with_grads(), params_with_grads()
    optimizer = Lamb([param], **backend)
    schedule, used = make(optimizer), set()
    plain = Lamb([other], **backend)
    for _ in range(3):
        used.add(optimizer.param_groups[0]["betas"][0])
        for name in ("lr", "betas"):
            plain.param_groups[0][name] = optimizer.param_groups[0][name]
        optimizer.step()
        plain.step()
        schedule.step()
    assert len(used) == 3
    assert torch.equal(param, other)


@BACKENDS
def test_a_layer_resized_to_the_shape_of_another_is_refused(backend: dict[str, bool]) -> None:
    """Its moments would be broadcast, or another's."""
    params = params_with_grads()
    optimizer = Lamb(params, **backend)
    optimizer.step()
    before = snapshot(optimizer)[1:]
    params[0].data = torch.ones(5)
    params[0].grad = torch.ones(5)
    with pytest.raises(ShardingError, match=r"has shape \(5,\).*and its moments \(8, 5\): for a resized layer build"):
        optimizer.step()
    assert same(snapshot(optimizer)[1:], before)


@BACKENDS
def test_a_model_may_be_cast_between_steps(backend: dict[str, bool]) -> None:
    """As if it had been cast, and its state loaded: the moments follow."""
    params, others = params_with_grads(), params_with_grads()
    optimizer, other = Lamb(params, **backend), Lamb(others, **backend)
    optimizer.step()
    other.step()
    for param, twin in zip(params, others, strict=True):
        param.grad = twin.grad = None
        param.data, twin.data = param.data.double(), twin.data.double()
        param.grad = torch.ones_like(param)
        twin.grad = torch.ones_like(twin)
    loaded = Lamb(others, **backend)
    loaded.load_state_dict(copy.deepcopy(other.state_dict()))
    optimizer.step()
    loaded.step()
    assert optimizer.state[params[0]]["exp_avg"].dtype == torch.float64
    assert same(snapshot(optimizer), snapshot(loaded))


# -- steps that are skipped -------------------------------------------------------------------------------------------


def test_skipped_steps_are_counted_without_a_sync() -> None:
    params = params_with_grads()
    optimizer = Lamb(params)
    clean, poisoned = params[0].grad, torch.full_like(params[0], float("nan"))
    counts = []
    for grad in (clean, poisoned, poisoned, clean, poisoned):
        params[0].grad = grad
        with NoHostSync():
            optimizer.step()
        counts.append(tuple(optimizer.skipped_steps()))
    assert counts == [(0, 0), (1, 1), (2, 2), (2, 0), (3, 1)]
    assert Lamb(params, skip_nonfinite=False).skipped_steps() == (0, 0)


def test_grad_scaler_through_accelerate_skips_and_says_so() -> None:
    """GradScaler does not call step on an overflow, and accelerate notices: the schedule waits.
    Claiming torch's fused protocol (`_step_supports_amp_scaling`) would hide that."""
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    Accelerator(cpu=True)
    (param, *_) = params_with_grads()
    optimizer = Lamb([param])
    assert not hasattr(optimizer, "_step_supports_amp_scaling")
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    wrapped = AcceleratedOptimizer(optimizer, scaler=scaler)
    before = param.detach().clone()
    for factor, skipped in [(float("inf"), True), (1.0, False)]:
        param.grad = None
        scaler.scale((param * factor).sum()).backward()
        wrapped.step()
        assert wrapped.step_was_skipped is skipped
    assert optimizer.state[param]["step"] == 1
    assert scaler.get_scale() == 4.0
    twin = before.clone()
    twin.grad = torch.ones_like(twin)
    Lamb([twin]).step()
    assert torch.equal(param.detach(), twin)


def test_a_parameter_of_a_shape_it_never_saw_is_refused() -> None:
    """DeepSpeed ZeRO replaces the parameters of a group by one flat partition, and says nothing."""
    (param, *_) = params_with_grads()
    optimizer = Lamb([("encoder.weight", param)])
    flat = torch.ones(40)
    flat.grad = torch.ones(40)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(ShardingError, match=r"encoder\.weight has shape \(40,\).*call optimizer\.attach\(engine\)"):
        optimizer.step()
    copied = copy.deepcopy(Lamb([param]))
    copied.param_groups[0]["params"][0].grad = param.grad
    copied.step()  # a copy knows its own shapes
