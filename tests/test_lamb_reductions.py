"""Protects the meaning of the options: known settings are known optimizers."""

import pytest
import torch

from hf_lamb import Lamb
from tests.helpers import BACKENDS


def run(optimizer: torch.optim.Optimizer, params: list[torch.Tensor], steps: int = 25, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator, dtype=param.dtype) * scale
        optimizer.step()


def some_params(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in [(20, 30), (30,), (), (2, 3, 4)]]


@BACKENDS
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-6)])
def test_without_layer_adaptation_it_is_adamw(
    dtype: torch.dtype, tolerance: float, weight_decay: float, backend: dict[str, bool]
) -> None:
    """Not bitwise: AdamW multiplies w by 1 - lr*λ first, we add λw to the direction."""
    ours, theirs = some_params(dtype), some_params(dtype)
    options = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-7, "weight_decay": weight_decay}
    run(Lamb(ours, layer_adaptation=False, **backend, **options), ours)
    run(torch.optim.AdamW(theirs, **options), theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_bounds_do_not_touch_parameters_that_are_not_adapted() -> None:
    """`layer_adaptation=False` is AdamW whatever the trust-ratio bounds of the group."""
    bounded, plain = some_params(), some_params()
    run(Lamb(bounded, layer_adaptation=False, min_trust_ratio=2.0, max_trust_ratio=3.0), bounded)
    run(Lamb(plain, layer_adaptation=False), plain)
    assert all(torch.equal(a, b) for a, b in zip(bounded, plain, strict=True))


def test_a_ratio_pinned_to_one_is_adamw_too() -> None:
    """min = max = 1 leaves nothing of the adaptation."""
    pinned, plain = some_params(), some_params()
    run(Lamb(pinned, min_trust_ratio=1.0, max_trust_ratio=1.0), pinned)
    run(Lamb(plain, layer_adaptation=False), plain)
    assert all(torch.equal(a, b) for a, b in zip(pinned, plain, strict=True))


def test_adaptation_does_not_follow_from_weight_decay() -> None:
    """apex and timm become Adam where weight_decay is 0, which is Trainer's default; here ‖Δw‖ = lr·‖w‖ stays."""
    (w, *_) = params = some_params()
    optimizer = Lamb(params, lr=1e-2, weight_decay=0.0)
    before = w.clone()
    run(optimizer, params, steps=1)
    assert float((w - before).norm() / before.norm()) == pytest.approx(1e-2, rel=1e-12)


def test_max_grad_norm_equals_clip_grad_norm() -> None:
    """The clip inside is torch's clip_grad_norm_ outside (which adds 1e-6 to the norm), over all groups."""
    inside, outside = some_params(), some_params()
    # A large eps, or Adam's scale invariance would hide a clip that is not there.
    options = {"lr": 1e-2, "eps": 1.0}
    clipped = Lamb([{"params": inside[:2]}, {"params": inside[2:]}], max_grad_norm=0.5, **options)
    plain, unclipped = Lamb(outside, **options), some_params()
    generator = torch.Generator().manual_seed(1)
    for _ in range(10):
        for a, b in zip(inside, outside, strict=True):
            a.grad = torch.randn(a.shape, generator=generator, dtype=a.dtype)
            b.grad = a.grad.clone()
        torch.nn.utils.clip_grad_norm_(outside, 0.5)
        clipped.step()
        plain.step()
    for a, b in zip(inside, outside, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    run(Lamb(unclipped, **options), unclipped, steps=10)
    assert not torch.allclose(unclipped[0], outside[0], rtol=1e-3)


def test_small_gradients_are_not_scaled_up_by_the_clip() -> None:
    """A norm below max_grad_norm changes nothing, to the bit."""
    with_clip, without = some_params(), some_params()
    run(Lamb(with_clip, max_grad_norm=1e3), with_clip)
    run(Lamb(without), without)
    assert all(torch.equal(a, b) for a, b in zip(with_clip, without, strict=True))


@BACKENDS
def test_lr_as_a_tensor_is_lr_as_a_float(backend: dict[str, bool]) -> None:
    """Schedulers and CUDA graphs keep the rate in a tensor and change it in place."""
    as_float, as_tensor = some_params(), some_params()
    by_float = Lamb(as_float, lr=1e-2, **backend)
    by_tensor = Lamb(as_tensor, lr=torch.tensor(1e-2, dtype=torch.float64), **backend)
    run(by_float, as_float, steps=3)
    run(by_tensor, as_tensor, steps=3)
    by_float.param_groups[0]["lr"] = 3e-3
    by_tensor.param_groups[0]["lr"].fill_(3e-3)
    run(by_float, as_float, steps=3)
    run(by_tensor, as_tensor, steps=3)
    for a, b in zip(as_float, as_tensor, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=0)


def test_backends_agree_far_below_the_reference_tolerance() -> None:
    """eager and foreach do the same operations: they differ by a few roundings at most."""
    eager, foreach = some_params(torch.float32), some_params(torch.float32)
    run(Lamb(eager, lr=1e-2, foreach=False), eager)
    run(Lamb(foreach, lr=1e-2, foreach=True), foreach)
    for a, b in zip(eager, foreach, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
