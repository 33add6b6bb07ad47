"""Protects parameters that hold several layers: each layer is one, as if it were a parameter of its own.

Sharded: `tests/test_sharding.py` and `tests/test_deepspeed.py`.
"""

import pytest
import torch

from hf_lamb import Lamb, lamb_param_groups
from tests.helpers import BACKENDS
from tests.twins import batch, fused_model, fused_name, in_layers, unfuse

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
OPTIONS = [
    {},
    {"fixed_norm": True},
    {"max_grad_norm": 0.1, "max_trust_ratio": 2.0},
    {"skip_nonfinite": False, "bias_correction": False, "min_trust_ratio": 0.1},
]


@BACKENDS
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_fused_model_takes_the_steps_of_the_unfused_one(
    options: dict[str, object], dtype: torch.dtype, backend: dict[str, bool]
) -> None:
    """Ten steps: the weights, and each layer's norms and ratio. Biases adapt too, so that theirs count."""
    fused, unfused = fused_model(dtype), unfuse(fused_model(dtype))
    # Rounding noise of the smallest gradients would become part of a direction at an eps of 1e-6.
    shared = {"lr": 1e-2, "eps": 1e-3 if dtype == torch.float32 else 1e-6, **backend, **options}
    keeps = bool(options.get("fixed_norm"))
    ours, theirs = (Lamb(lamb_param_groups(m, adapt_all=True, fixed_norm=keeps), **shared) for m in (fused, unfused))
    for step in range(10):
        for model, optimizer in ((fused, ours), (unfused, theirs)):
            optimizer.zero_grad()
            model(**batch(step)).loss.backward()
            optimizer.step()
        expected = {fused_name(name): stats for name, stats in theirs.layer_stats().items()}
        found = ours.layer_stats()
        assert found.keys() == expected.keys()
        for name, stats in found.items():
            assert stats == pytest.approx(expected[name], rel=10 * TOLERANCE[dtype]), name
    layers = in_layers({name: param.detach() for name, param in fused.named_parameters()})
    for name, param in unfused.named_parameters():
        w = layers[fused_name(name)]
        assert float((w - param.detach()).norm() / param.detach().norm()) <= TOLERANCE[dtype], name
