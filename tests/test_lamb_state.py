"""Protects what must survive: optimizer state through saving, loading, other versions and other optimizers."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from hf_lamb import Lamb, ShardingError, convert_state_dict, lamb_param_groups
from tests.helpers import one_line


def model_with_grads(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3)).to(dtype)
    for param in model.parameters():
        param.data.copy_(torch.randn(param.shape, generator=generator))
        param.grad = torch.randn(param.shape, generator=generator).to(dtype)
    return model


def stepped(model: nn.Module, steps: int = 3, **options: Any) -> Lamb:
    optimizer = Lamb(lamb_param_groups(model), lr=0.1, **options)
    for _ in range(steps):
        optimizer.step()
    return optimizer


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    """torch.save and a load that unpickles nothing but tensors and plain values, as Trainer's."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_moments_keep_their_precision_to_the_bit(dtype: torch.dtype) -> None:
    """torch's load_state_dict casts fp32 moments of bf16 parameters down to bf16; ours does not."""
    model = model_with_grads(dtype)
    optimizer = stepped(model)
    saved = through_a_file(optimizer.state_dict())
    resumed_model = copy.deepcopy(model)
    for a, b in zip(resumed_model.parameters(), model.parameters(), strict=True):
        a.grad = b.grad.clone()
    resumed = Lamb(lamb_param_groups(resumed_model))
    resumed.load_state_dict(saved)
    for a, b in zip(model.parameters(), resumed_model.parameters(), strict=True):
        for key, value in optimizer.state[a].items():
            assert resumed.state[b][key].dtype == value.dtype, key
            assert torch.equal(resumed.state[b][key], value), key
    optimizer.step()
    resumed.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed_model.parameters(), strict=True))


@pytest.mark.parametrize("step", [3, 3.0, torch.tensor(3), torch.tensor([3.0])], ids=["int", "float", "long", "1-d"])
def test_the_step_is_read_however_it_was_written(step: Any) -> None:
    """Other versions and tools keep a number or another kind of tensor."""
    model = model_with_grads()
    saved = copy.deepcopy(stepped(model).state_dict())
    for state in saved["state"].values():
        state["step"] = step
    loaded = Lamb(lamb_param_groups(model))
    loaded.load_state_dict(saved)
    for param in model.parameters():
        value = loaded.state[param]["step"]
        assert (value.dtype, value.shape, value.item()) == (torch.float32, (), 3.0)
    loaded.step()


def test_hooks_of_others_see_the_dict_and_the_precise_state() -> None:
    """A pre-hook may change what is loaded; a post-hook finds fp32 moments."""
    model = model_with_grads(torch.bfloat16)
    saved = stepped(model).state_dict()
    loaded, seen = Lamb(lamb_param_groups(model)), []

    def double(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        doubled = copy.deepcopy(state_dict)
        for state in doubled["state"].values():
            state["exp_avg"] *= 2
        return doubled

    loaded.register_load_state_dict_pre_hook(double)
    loaded.register_load_state_dict_post_hook(lambda optimizer: seen.append(optimizer.state[model[0].weight]))
    loaded.load_state_dict(saved)
    assert seen[0]["exp_avg"].dtype == torch.float32
    assert torch.equal(loaded.state[model[0].weight]["exp_avg"], 2 * saved["state"][0]["exp_avg"])


def refused(optimizer: Lamb, state_dict: dict[str, Any], message: str) -> None:
    """One line with this message, and the optimizer as it was."""
    before = copy.deepcopy(optimizer.state_dict())
    with one_line(ValueError, message):
        optimizer.load_state_dict(state_dict)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert after["state"].keys() == before["state"].keys()
    # Nor is a hook left, which would see the state dict before others have put it right.
    mended = optimizer.register_load_state_dict_pre_hook(lambda *_: before)
    optimizer.load_state_dict(state_dict)
    mended.remove()


@pytest.mark.parametrize("option", ["max_grad_norm", "skip_nonfinite", "fused"])
def test_an_option_that_the_version_of_a_pickle_did_not_have_gets_its_default(option: str) -> None:
    optimizer = stepped(model_with_grads())
    expected = optimizer.defaults.copy()
    for options in (optimizer.defaults, *optimizer.param_groups):
        del options[option]
    loaded = pickle.loads(pickle.dumps(optimizer))
    assert loaded.defaults.items() >= expected.items()
    assert [group[option] for group in loaded.param_groups] == [expected[option]] * len(loaded.param_groups)
    for group in loaded.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)
    loaded.step()
    assert {float(state["step"]) for state in loaded.state.values()} == {4.0}


def test_state_of_another_model_is_refused() -> None:
    """Where torch would load it and fail, or not, at the next step."""
    optimizer = stepped(model_with_grads())
    other = stepped(nn_with_shapes((4, 5)))
    refused(optimizer, other.state_dict(), r"exp_avg of 0\.weight has shape \(5, 4\), the parameter \(5, 6\)")


def nn_with_shapes(shape: tuple[int, int]) -> nn.Module:
    model = nn.Sequential(nn.Linear(*shape), nn.LayerNorm(5), nn.Linear(5, 3))
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    return model


def test_the_same_parameters_in_another_order_are_refused() -> None:
    """By position, the moments of one would go to another of the same shape."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer = Lamb(list(model.named_parameters()))
    optimizer.step()
    turned = Lamb(list(model.named_parameters())[::-1])
    refused(turned, optimizer.state_dict(), "in the order of the state dict.* in another order, from 1.weight on")


def test_renamed_parameters_load_by_position() -> None:
    """As torch documents: a wrapper's prefix or a renamed module is no obstacle."""
    model = nn.Linear(3, 2)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    plain = Lamb(list(model.named_parameters()))
    plain.step()
    wrapped = Lamb([(f"module.{name}", param) for name, param in model.named_parameters()])
    wrapped.load_state_dict(plain.state_dict())
    assert torch.equal(wrapped.state[model.weight]["exp_avg"], plain.state[model.weight]["exp_avg"])


def test_another_optimizers_state_is_refused_with_the_way_to_take_it_over() -> None:
    model = model_with_grads()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sgd.step()
    refused(
        Lamb(model.parameters()), sgd.state_dict(), "convert_state_dict.* another optimizer's.* has momentum_buffer"
    )


# -- taking over the state of others ----------------------------------------------------------------------------------


def adamw(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    """AdamW over the same parameters and groups as `lamb_param_groups` makes, after 3 steps."""
    groups = [{"params": group["params"]} for group in lamb_param_groups(model)]
    optimizer = torch.optim.AdamW(groups, lr=0.1, **options)
    for _ in range(3):
        optimizer.step()
    return optimizer


def as_timm_and_apex(state_dict: dict[str, Any]) -> dict[str, Any]:
    """timm's and apex's LAMB keep the step in the group."""
    state_dict = copy.deepcopy(state_dict)
    for group in state_dict["param_groups"]:
        group["step"] = 3
    for state in state_dict["state"].values():
        del state["step"]
    return state_dict


def as_deepspeed(state_dict: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's FusedLamb keeps an int in the state, and its FP16 wrapper puts a dict around everything."""
    state_dict = copy.deepcopy(state_dict)
    for state in state_dict["state"].values():
        state["step"] = 3
    return {"optimizer_state_dict": state_dict, "dynamic_loss_scale": True, "fp32_groups": []}


def as_torch_optimizer(state_dict: dict[str, Any]) -> dict[str, Any]:
    """pytorch_optimizer and torch_optimizer keep the norms of the last step in the state."""
    state_dict = copy.deepcopy(state_dict)
    for state in state_dict["state"].values():
        state |= {"weight_norm": torch.ones(()), "adam_norm": torch.ones(()), "trust_ratio": 1}
    return state_dict


@pytest.mark.parametrize("layout", [dict, as_timm_and_apex, as_deepspeed, as_torch_optimizer])
def test_moments_and_steps_of_others_are_taken_over(layout: Any) -> None:
    """Whatever the layout, the next step is that of a Lamb which had seen the same gradients."""
    model, twin = model_with_grads(), model_with_grads()
    theirs = adamw(model)
    ours = stepped(twin)
    with torch.no_grad():
        for a, b in zip(twin.parameters(), model.parameters(), strict=True):
            a.copy_(b)
    taken = Lamb(lamb_param_groups(model), lr=0.1)
    taken.load_state_dict(convert_state_dict(layout(theirs.state_dict()), taken))
    assert taken.param_groups[0]["weight_decay"] == 0.01
    taken.step()
    ours.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_half_precision_moments_become_float32() -> None:
    """apex keeps the moments of fp16 parameters in fp16."""
    model = model_with_grads(torch.float16)
    optimizer = Lamb(lamb_param_groups(model))
    optimizer.load_state_dict(convert_state_dict(adamw(model).state_dict(), optimizer))
    assert optimizer.state[model[0].weight]["exp_avg"].dtype == torch.float32
    optimizer.step()


def test_timms_own_state_is_taken_over() -> None:
    timm_optim = pytest.importorskip("timm.optim", exc_type=ImportError)
    model = model_with_grads()
    theirs = timm_optim.Lamb(model.parameters(), lr=0.1)
    theirs.step()
    optimizer = Lamb(model.parameters())
    optimizer.load_state_dict(convert_state_dict(theirs.state_dict(), optimizer))
    state = optimizer.state[model[0].weight]
    assert state["step"].item() == 1
    assert torch.equal(state["exp_avg"], theirs.state[model[0].weight]["exp_avg"])


def test_named_parameters_are_matched_by_name_across_groups() -> None:
    """One group there, two here, in another order: names decide."""
    model = model_with_grads()
    theirs = torch.optim.AdamW(list(model.named_parameters())[::-1], lr=0.1)
    theirs.step()
    ours = Lamb(lamb_param_groups(model))
    ours.load_state_dict(convert_state_dict(theirs.state_dict(), ours))
    for param in model.parameters():
        assert torch.equal(ours.state[param]["exp_avg"], theirs.state[param]["exp_avg"])


def test_the_source_is_not_shared() -> None:
    """Both optimizers can go on."""
    model = model_with_grads()
    theirs = adamw(model)
    before = copy.deepcopy(theirs.state_dict()["state"][0])
    ours = Lamb(lamb_param_groups(model))
    ours.load_state_dict(convert_state_dict(theirs.state_dict(), ours))
    ours.step()
    assert all(torch.equal(before[key], value) for key, value in theirs.state_dict()["state"][0].items())


def with_state(key: str, value: torch.Tensor) -> Any:
    def change(state_dict: dict[str, Any]) -> dict[str, Any]:
        state_dict = copy.deepcopy(state_dict)
        state_dict["state"][0][key] = value
        return state_dict

    return change


REFUSED = [
    (with_state("max_exp_avg_sq", torch.ones(5, 6)), r"0\.weight has .*max_exp_avg_sq.*: .*AMSGrad's"),
    (lambda s: {**s, "state": {0: {"state1": torch.ones(30), "state2": torch.ones(30)}}}, "train.* with bitsandbytes"),
    (
        lambda s: {**s, "state": {0: {"momentum_buffer": torch.ones(5, 6)}}},
        "this is SGD's state, which has no second moment",
    ),
    (
        lambda s: {**s, "state": {0: {"step": 3, "square_avg": torch.ones(5, 6)}}},
        "square_avg.*: start with fresh moments",
    ),
    (
        with_state("exp_avg", torch.ones(30)),
        r"exp_avg of 0\.weight has shape \(30,\).*flat partitions \(ZeRO, FSDP\)",
    ),
    (
        lambda s: {**s, "state": {0: {"exp_avg": torch.ones(5, 6), "exp_avg_sq": torch.ones(5, 6)}}},
        "put the step into the state",
    ),
    (lambda s: {**s, "param_groups": s["param_groups"][:1]}, r"groups of \[2\] parameters, Lamb of \[2, 4\]"),
    (lambda s: {"base_optimizer_state": s, "zero_stage": 2}, "this has base_optimizer_state"),
    (lambda s: {}, "this has nothing"),
]


@pytest.mark.parametrize(("broken", "message"), REFUSED)
def test_what_cannot_be_taken_over_is_refused_with_the_reason(broken: Any, message: str) -> None:
    model = model_with_grads()
    state_dict = broken(adamw(model).state_dict())
    with one_line(ValueError, f"^convert_state_dict: {message}"):
        convert_state_dict(state_dict, Lamb(lamb_param_groups(model)))


def test_a_state_of_the_same_names_may_be_another_optimizers() -> None:
    """RAdam's, or AdamW's of transformers 4: their rate would replace LAMB's, and all layers would adapt."""
    model = model_with_grads()
    theirs = torch.optim.RAdam(model.parameters(), lr=5e-5)
    theirs.step()
    assert set(next(iter(theirs.state.values()))) == {"step", "exp_avg", "exp_avg_sq"}
    refused(
        Lamb(model.parameters()), theirs.state_dict(), "convert_state_dict.* another optimizer's.* layer_adaptation"
    )


def test_a_copy_of_an_optimizer_with_peers_wants_to_know_them() -> None:
    """Without them a stage would go on where the others skip, and the stages would part."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        param = torch.nn.Parameter(torch.ones(3))
        param.grad = torch.ones(3)
        lamb = Lamb([param])
        lamb.attach(process_group=torch.distributed.group.WORLD)
        lamb.step()
        for copied in (copy.deepcopy(lamb), pickle.loads(pickle.dumps(copy.deepcopy(lamb)))):
            copied.param_groups[0]["params"][0].grad = torch.ones(3)
            with one_line(ShardingError, r"Lamb: call attach\(process_group=...\) on this copy of an optimizer"):
                copied.step()
            copied.attach(process_group=torch.distributed.group.WORLD)
            copied.step()
    finally:
        torch.distributed.destroy_process_group()
