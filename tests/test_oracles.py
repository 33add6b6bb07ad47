"""Protects the update against other people's LAMBs, where they are installed (`make test-peers` installs them)."""

import importlib
import os
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import peers
from hf_lamb import Lamb

SHAPES = [(17, 9), (9,), (3, 4, 5)]


def peer(name: str) -> Any:
    """A module of another project; without it the test skips, or fails where HF_LAMB_PEERS=required."""
    if os.environ.get("HF_LAMB_PEERS") == "required":
        return importlib.import_module(name)
    return pytest.importorskip(name, exc_type=ImportError)


@pytest.fixture
def timm_lamb() -> type[torch.optim.Optimizer]:
    """timm's Lamb; without timm the test skips, or fails where HF_LAMB_PEERS=required."""
    try:
        return peers.timm_lamb()
    except ImportError as error:
        if os.environ.get("HF_LAMB_PEERS") == "required":
            raise
        pytest.skip(str(error))


def trajectories(weight_decay: float) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    """Heterogeneous start weights and 25 steps of gradients, float64."""
    generator = torch.Generator().manual_seed(0)

    def draw(scale: float) -> list[torch.Tensor]:
        return [torch.randn(s, generator=generator, dtype=torch.float64) * scale for s in SHAPES]

    return draw(0.3), [draw(10.0 ** (step % 5 - 2)) for step in range(25)]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_equals_optax(weight_decay: float) -> None:
    """optax.lamb adapts every leaf and decays every leaf."""
    jax, optax = peer("jax"), peer("optax")
    jax.config.update("jax_enable_x64", True)
    params, steps = trajectories(weight_decay)
    transform = optax.lamb(1e-2, weight_decay=weight_decay)
    theirs: Any = [jax.numpy.asarray(p.numpy()) for p in params]
    state = transform.init(theirs)
    optimizer = Lamb(params, lr=1e-2, weight_decay=weight_decay)
    for grads in steps:
        updates, state = transform.update([jax.numpy.asarray(g.numpy()) for g in grads], state, theirs)
        theirs = optax.apply_updates(theirs, updates)
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()
    for ours, their in zip(params, theirs, strict=True):
        np.testing.assert_allclose(ours.numpy(), np.asarray(their), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_equals_timm(weight_decay: float, timm_lamb: Any) -> None:
    """timm's Lamb with its trust ratio always on and its gradient clip off."""
    params, steps = trajectories(weight_decay)
    theirs = [p.clone() for p in params]
    options = {"lr": 1e-2, "weight_decay": weight_decay}
    ours_optimizer = Lamb(params, **options)
    their_optimizer = timm_lamb(theirs, always_adapt=True, max_grad_norm=None, **options)
    for grads in steps:
        for ours, their, grad in zip(params, theirs, grads, strict=True):
            ours.grad, their.grad = grad, grad.clone()
        ours_optimizer.step()
        their_optimizer.step()
    for ours, their in zip(params, theirs, strict=True):
        torch.testing.assert_close(ours, their, rtol=1e-8, atol=1e-10)
