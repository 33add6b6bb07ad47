"""Protects the update itself: both backends against the NumPy float64 reference, and against published numbers."""

import itertools

import numpy as np
import pytest
import torch

from hf_lamb import Lamb
from hf_lamb.backends.bucket import one_minus_power
from hf_lamb.norms import squared_norms, trust_ratio
from tests.helpers import BACKENDS, one_line
from tests.reference import ReferenceLamb

STEPS = 30
SCALES = [1e-8, 1e-4, 1.0, 1e4, 1e8]
SHAPES = [(), (1,), (0,), (2, 0, 3), (7,), (5, 123), (129, 65), (3, 4, 5, 6), (1, 4097), (300, 411)]
TOLERANCE = {torch.float64: 1e-10, torch.float32: 5e-6}

# (description, options)
OPTIONS = [
    ("defaults", {}),
    ("no decay", {"weight_decay": 0.0}),
    ("strong decay", {"weight_decay": 0.5}),
    ("large rate", {"lr": 0.1}),
    ("other betas", {"betas": (0.66, 0.996)}),
    ("no momentum", {"betas": (0.0, 0.9)}),
    ("signSGD", {"betas": (0.0, 0.0)}),
    ("large eps", {"eps": 1e-2}),
    ("no bias correction (v3)", {"bias_correction": False}),
    ("ratio at most 10 (v1)", {"max_trust_ratio": 10.0}),
    ("ratio at most 0.01 (LAMBC)", {"max_trust_ratio": 0.01}),
    ("ratio between 0.5 and 1.5", {"min_trust_ratio": 0.5, "max_trust_ratio": 1.5}),
    ("global clip (apex)", {"max_grad_norm": 1.0}),
    ("maximize", {"maximize": True}),
    ("fixed norm", {"fixed_norm": True, "lr": 0.1}),
    ("not adapted (AdamW)", {"layer_adaptation": False}),
]


def heterogeneous(shape: tuple[int, ...], rng: np.random.Generator, scale: float = 1.0) -> np.ndarray:
    """Entries of very different size, so that a norm over a part is not the norm over the whole."""
    return rng.standard_normal(shape) * np.exp(rng.uniform(-3, 3, shape)) * scale


def worst_difference(params: list[torch.Tensor], reference: list[np.ndarray]) -> float:
    """The largest max|Δ|/max|w_ref| over the tensors."""
    worst = 0.0
    for param, expected in zip(params, reference, strict=True):
        if expected.size:
            difference = np.abs(param.detach().double().numpy() - expected).max()
            worst = max(worst, float(difference / np.abs(expected).max()))
    return worst


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("options", [o for _, o in OPTIONS], ids=[d for d, _ in OPTIONS])
def test_equals_the_float64_reference(options: dict, dtype: torch.dtype, backend: dict[str, bool]) -> None:
    """Every option, awkward shapes and gradient scales 1e-8 ... 1e8 (changing within the run): 30 steps."""
    rng = np.random.default_rng(0)
    params = [torch.tensor(heterogeneous(shape, rng, 0.05), dtype=dtype) for shape in SHAPES]
    params.append(torch.tensor(heterogeneous((31, 17), rng), dtype=dtype).t())  # not contiguous
    params.append(torch.zeros(40, dtype=dtype))  # ‖w‖ = 0 at the first step
    optimizer = Lamb(params, **backend, **options)
    reference = ReferenceLamb([p.double().numpy() for p in params], **options)
    for step in range(STEPS):
        scale = SCALES[step % len(SCALES)]
        for i, param in enumerate(params):
            own_scale = SCALES[(step // 10 + i) % len(SCALES)] if step >= 10 else scale
            param.grad = torch.tensor(heterogeneous(tuple(param.shape), rng, own_scale), dtype=dtype)
        optimizer.step()
        reference.step([p.grad.double().numpy() for p in params])
    assert worst_difference(params, reference.w) <= TOLERANCE[dtype]


@BACKENDS
@pytest.mark.parametrize("scale", SCALES)
def test_equals_the_reference_at_every_gradient_scale(scale: float, backend: dict[str, bool]) -> None:
    """A constant scale per run: eps matters at 1e-8, squares reach 1e16 at 1e8."""
    rng = np.random.default_rng(1)
    params = [torch.tensor(heterogeneous(shape, rng), dtype=torch.float32) for shape in SHAPES]
    optimizer = Lamb(params, lr=1e-2, **backend)
    reference = ReferenceLamb([p.double().numpy() for p in params], lr=1e-2)
    for _ in range(STEPS):
        for param in params:
            param.grad = torch.tensor(heterogeneous(tuple(param.shape), rng, scale), dtype=torch.float32)
        optimizer.step()
        reference.step([p.grad.double().numpy() for p in params])
    assert worst_difference(params, reference.w) <= TOLERANCE[torch.float32]


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_are_the_rounded_reference(dtype: torch.dtype, backend: dict[str, bool]) -> None:
    """bf16/fp16 weights: fp32 arithmetic and state, one rounding a step. A reference that starts each step from
    the rounded weights is met to half a unit in the last place, plus fp32's own error."""
    rng = np.random.default_rng(2)
    params = [torch.tensor(heterogeneous(shape, rng, 0.1), dtype=dtype) for shape in [(64, 33), (7,), ()]]
    optimizer = Lamb(params, lr=1e-2, **backend)
    reference = ReferenceLamb([p.double().numpy() for p in params], lr=1e-2)
    half_ulp = torch.finfo(dtype).eps / 2
    for _ in range(STEPS):
        for param in params:
            param.grad = torch.tensor(heterogeneous(tuple(param.shape), rng), dtype=dtype)
        reference.w = [p.double().numpy() for p in params]
        optimizer.step()
        expected = reference.step([p.grad.double().numpy() for p in params])
        for param, w in zip(params, expected, strict=True):
            # A normal number is off by at most half an ulp of its own size, a subnormal one by half the smallest.
            bound = np.abs(w) * half_ulp * 1.01 + torch.finfo(dtype).smallest_normal * half_ulp
            assert (np.abs(param.double().numpy() - w) <= bound + 1e-7 * np.abs(w).max()).all()
    for param in params:
        assert optimizer.state[param]["exp_avg"].dtype == torch.float32
        assert optimizer.state[param]["exp_avg_sq"].dtype == torch.float32


def test_mixed_dtypes_in_one_group() -> None:
    """One group may hold float64, float32 and bf16 parameters: each gets its own arithmetic."""
    rng = np.random.default_rng(3)
    params = [torch.tensor(rng.standard_normal(9), dtype=d) for d in (torch.float64, torch.float32, torch.bfloat16)]
    alone = [p.clone() for p in params]
    grads = [torch.ones_like(p) for p in params]
    for p, q, g in zip(params, alone, grads, strict=True):
        p.grad = q.grad = g
    Lamb(params).step()
    for q in alone:
        Lamb([q]).step()
    for p, q in zip(params, alone, strict=True):
        assert torch.equal(p, q)


# -- fixed norms ------------------------------------------------------------------------------------------------------


def norms(params: list[torch.Tensor]) -> np.ndarray:
    return np.array([param.detach().double().norm() for param in params])


def check_norms_are_kept(
    dtype: torch.dtype, bound: float, steps: int, backend: dict[str, bool], lr: float = 0.03
) -> None:
    """Weights turn, and every norm stays; scaling by ‖w‖/‖w - ηru‖ as it stands drifts in float32."""
    rng = np.random.default_rng(4)
    params = [torch.tensor(heterogeneous(shape, rng, 0.05), dtype=dtype) for shape in [(65, 257), (400,), (30, 5, 2)]]
    before, start = norms(params), [param.clone() for param in params]
    optimizer = Lamb(params, lr=lr, fixed_norm=True, **backend)
    for _ in range(steps):
        for param in params:
            param.grad = torch.tensor(rng.standard_normal(param.shape), dtype=dtype)
        optimizer.step()
    assert np.abs(norms(params) / before - 1).max() <= bound
    for param, first in zip(params, start, strict=True):
        assert torch.cosine_similarity(param.view(-1), first.view(-1), dim=0) < 0.9  # so the norm could have changed


@BACKENDS
@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["float64", "float32"]
)
def test_fixed_norm_keeps_norms_over_1000_steps(dtype: torch.dtype, bound: float, backend: dict[str, bool]) -> None:
    check_norms_are_kept(dtype, bound, 1000, backend)


@BACKENDS
def test_fixed_norm_leaves_what_has_no_norm_or_does_not_adapt(backend: dict[str, bool]) -> None:
    """A layer of zeros takes the plain step, then keeps the norm it has; a group that does not adapt is as without."""
    for options in ({}, {"layer_adaptation": False}):
        stepped = []
        for fixed_norm in (False, True):
            w = torch.zeros(5) if not options else torch.ones(5)
            optimizer = Lamb([{"params": [w], **options}], lr=0.1, fixed_norm=fixed_norm, **backend)
            w.grad = torch.arange(1.0, 6)
            optimizer.step()
            stepped.append(w)
        assert stepped[0].any()
        assert torch.equal(*stepped)


def check_no_step_to_zero(backend: dict[str, bool]) -> None:
    """A step that ends at zero, w - ηru = 0, is not made: rounding would choose the direction, or 0/0."""
    w = torch.full((4,), 0.5)
    w.grad = torch.ones(4)
    Lamb([w], lr=1.0, weight_decay=0.0, eps=0.0, fixed_norm=True, **backend).step()
    assert torch.equal(w, torch.full((4,), 0.5))


@BACKENDS
def test_fixed_norm_makes_no_step_to_zero(backend: dict[str, bool]) -> None:
    check_no_step_to_zero(backend)


def test_fixed_norm_needs_layers_that_adapt() -> None:
    with one_line(ValueError, "fixed_norm=True needs layer_adaptation=True, which is False"):
        Lamb([torch.ones(2)], fixed_norm=True, layer_adaptation=False)


# -- layers without a gradient ---------------------------------------------------------------------------------------

# What a runtime, or a model, may hand a layer, step by step: factors of a random gradient.
IDLE = {
    "never": [0, 0, 0, 0, 0],
    "not at first": [0, 0, 1, 1, 1],
    "not later on": [1, 1, 0, 0, 0],
    "now and then": [1, 0, 0, 1, 0],
    "hardly": [1e-30, 1e-30, 0, 0, 1e-30],  # whose squares underflow in float32
    "always": [1, 1, 1, 1, 1],
}


def check_layers_without_gradients(dtype: torch.dtype, options: dict, backend: dict[str, bool]) -> None:
    """Zeros in the place of gradients: the reference, to the bit where a layer has never had another gradient.

    Its step and its state go on, and the statistics are those of layers that moved.
    """
    rng = np.random.default_rng(0)
    kinds = [(kind, shape) for kind in IDLE for shape in ((7,), (), (3, 411))]
    params = [torch.tensor(heterogeneous(shape, rng), dtype=dtype) for _, shape in kinds]
    names = [f"{kind} {shape}" for kind, shape in kinds]
    start = [param.clone() for param in params]
    optimizer = Lamb(zip(names, params, strict=True), lr=0.1, **backend, **options)
    reference = ReferenceLamb([p.double().numpy() for p in params], lr=0.1, **options)
    adapts = options.get("layer_adaptation", True)
    for step in range(5):
        before_step = [param.clone() for param in params]
        for (kind, shape), param in zip(kinds, params, strict=True):
            param.grad = torch.tensor(heterogeneous(shape, rng, IDLE[kind][step]), dtype=dtype)
        optimizer.step()
        reference.step([p.grad.double().numpy() for p in params])
        idle = {
            name
            for (kind, _), name, m in zip(kinds, names, reference.m, strict=True)
            if adapts and not m.any() and not IDLE[kind][step]
        }
        assert set(optimizer.layer_stats()) == set(names) - idle
        for name, param, before in zip(names, params, before_step, strict=True):
            if name in idle:
                assert torch.equal(param, before), name
    assert worst_difference(params, reference.w) <= TOLERANCE[dtype]
    assert {float(optimizer.state[param]["step"]) for param in params} == {5.0}
    for param, before, (kind, _) in zip(params, start, kinds, strict=True):
        if kind == "never":
            assert torch.equal(param, before) == adapts


IDLE_OPTIONS = [
    {},
    {"betas": (0.0, 0.0)},
    {"max_grad_norm": 1e-3, "maximize": True},
    {"min_trust_ratio": 0.5, "weight_decay": 0.5},
    {"layer_adaptation": False},
    {"fixed_norm": True},
]


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("options", IDLE_OPTIONS, ids=str)
def test_a_layer_without_a_gradient_keeps_its_weights(
    options: dict, dtype: torch.dtype, backend: dict[str, bool]
) -> None:
    """FSDP1 and ZeRO hand zeros where there was no gradient; so does `set_to_none=False`, and LoRA's first step."""
    check_layers_without_gradients(dtype, options, backend)


def check_the_least_gradient(backend: dict[str, bool]) -> None:
    """A gradient too small for m, or one that cancels what was in m, is a gradient: r = 1/λ, w = (1 - lr)*w."""
    smallest = torch.tensor(2.0**-149)
    m = torch.tensor(1.0)
    for grad, first_moment, beta1 in ((smallest, 0 * m, 0.9), (-smallest, 0 * m, 0.9), (-m, m, 0.5)):
        w = torch.ones(5)
        optimizer = Lamb([w], lr=0.1, betas=(beta1, 0.999), **backend)
        w.grad = torch.zeros(5)
        optimizer.step()
        assert torch.equal(w, torch.ones(5))
        optimizer.state[w]["exp_avg"].fill_(first_moment)
        w.grad[3] = grad
        w.grad[:3] = w.grad[4:] = -first_moment
        optimizer.step()
        assert not optimizer.state[w]["exp_avg"].any()
        torch.testing.assert_close(w, torch.full((5,), 0.9))


@BACKENDS
def test_the_least_gradient_is_a_gradient(backend: dict[str, bool]) -> None:
    check_the_least_gradient(backend)


def check_no_eps(backend: dict[str, bool]) -> None:
    """Without eps, 0 / 0: of a layer that keeps its weights it is not taken."""
    idle, other = torch.ones(700), torch.ones(700)
    idle.grad, other.grad = torch.zeros(700), torch.ones(700)
    optimizer = Lamb([("idle", idle), ("other", other)], lr=0.1, eps=0.0, **backend)
    optimizer.step()
    assert torch.equal(idle, torch.ones(700))
    torch.testing.assert_close(other, torch.full((700,), 0.9))
    assert list(optimizer.layer_stats()) == ["other"]


@BACKENDS
def test_a_layer_without_a_gradient_needs_no_eps(backend: dict[str, bool]) -> None:
    check_no_eps(backend)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_layers_without_a_gradient(dtype: torch.dtype, backend: dict[str, bool]) -> None:
    """Whatever the gradient's least value is: the layer moves, and with zeros it does not."""
    idle, least = torch.ones(9, dtype=dtype), torch.ones(9, dtype=dtype)
    idle.grad, least.grad = torch.zeros_like(idle), torch.zeros_like(least)
    least.grad[4] = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    Lamb([idle, least], lr=0.1, **backend).step()
    assert torch.equal(idle, torch.ones_like(idle))
    assert (least != 1).any()


@BACKENDS
def test_a_layer_not_adapted_is_adamws_without_a_gradient_too(backend: dict[str, bool]) -> None:
    """It decays: nothing there depends on whether gradients are zero."""
    ours, theirs = (torch.linspace(-1, 1, 9, dtype=torch.float64) for _ in range(2))
    optimizers = [
        Lamb([ours], lr=0.1, weight_decay=0.5, layer_adaptation=False, **backend),
        torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.5, eps=1e-6),
    ]
    for param, optimizer in zip((ours, theirs), optimizers, strict=True):
        for factor in (0.0, 0.0, 1.0, 0.0):
            param.grad = torch.full_like(param, factor)
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


# -- published and precomputed numbers ------------------------------------------------------------------------------

# TF-Addons' formula (the implementation that the paper's abstract names), float64, eps 1e-6, lr 1e-3, constant
# gradients, one row a step.
TF_ADDONS = [
    (
        {"weight_decay": 0.0},
        [[1, 2], [3, 4]],
        [[0.1, 0.1], [0.01, 0.01]],
        {
            1: [[0.998418861170, 1.998418861170], [2.996464466094, 3.996464466094]],
            2: [[0.996839222261, 1.996839222261], [2.992932432153, 3.992932432153]],
            3: [[0.995261081691, 1.995261081691], [2.989403894640, 3.989403894640]],
        },
    ),
    (
        {"weight_decay": 0.0},
        [[1, 1, 2], [3, 3, 4]],
        [[0.1, 0, 0.1], [0.01, 0, 0.01]],
        {3: [[0.994808345195, 1, 1.994808345195], [2.987641177270, 3, 3.987641177270]]},
    ),
    (
        {"weight_decay": 0.01, "inverse_time_decay": 0.5},
        [[1, 2], [3, 4]],
        [[0.1, 0.1], [0.01, 0.01]],
        {
            1: [[0.998426669198, 1.998411091511], [2.996481588682, 3.996447426032]],
            3: [[0.996593358503, 1.996559629045], [2.992382002378, 3.992308034055]],
        },
    ),
]


@BACKENDS
@pytest.mark.parametrize(("options", "weights", "grads", "expected"), TF_ADDONS)
def test_golden_vectors_of_tensorflow_addons(
    options: dict, weights: list, grads: list, expected: dict, backend: dict[str, bool]
) -> None:
    """Numbers that no change to this project may move."""
    options = dict(options)
    decay = options.pop("inverse_time_decay", 0.0)
    params = [torch.tensor(w, dtype=torch.float64) for w in weights]
    optimizer = Lamb(params, **backend, **options)
    for step in range(1, max(expected) + 1):
        optimizer.param_groups[0]["lr"] = 0.001 / (1 + decay * (step - 1))
        for param, grad in zip(params, grads, strict=True):
            param.grad = torch.tensor(grad, dtype=torch.float64)
        optimizer.step()
        if step in expected:
            for param, w in zip(params, expected[step], strict=True):
                torch.testing.assert_close(param, torch.tensor(w, dtype=torch.float64), rtol=0, atol=1e-12)


@BACKENDS
def test_golden_single_step_of_keras(backend: dict[str, bool]) -> None:
    """keras/src/optimizers/lamb_test.py: one step at lr 0.5, with Keras' eps of 1e-7."""
    w = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    w.grad = torch.tensor([1.0, 6.0, 7.0, 2.0], dtype=torch.float64)
    Lamb([w], lr=0.5, eps=1e-7, weight_decay=0.0, **backend).step()
    exact = torch.tensor([-0.369306318777, 0.630693567114, 1.630693563854, 2.630693612757], dtype=torch.float64)
    torch.testing.assert_close(w, exact, rtol=0, atol=1e-12)
    published = torch.tensor([-0.3693, 0.6306, 1.6306, 2.6306], dtype=torch.float64)
    torch.testing.assert_close(w, published, rtol=0, atol=1e-4)


# -- pieces ---------------------------------------------------------------------------------------------------------


def test_step_length_is_the_rate_times_the_weight_norm() -> None:
    """‖Δw‖ = lr·‖w‖ for an adapted tensor at every step: the probe that tells LAMB from its imitations."""
    for weight_norm, weight_decay in itertools.product([5.0, 100.0], [0.0, 0.01]):
        w = torch.randn(50, 20, dtype=torch.float64)
        w *= weight_norm / w.norm()
        optimizer = Lamb([w], lr=1e-3, weight_decay=weight_decay)
        for _ in range(3):
            before = w.clone()
            w.grad = torch.randn_like(w)
            optimizer.step()
            assert float((w - before).norm() / (1e-3 * before.norm())) == pytest.approx(1.0, abs=1e-9)


def test_bias_correction_is_right_at_the_first_step_in_fp32() -> None:
    """1 - 0.999**1 in fp32 is off by 1.3e-5; ours by one rounding. beta = 0 gives 1."""
    t = torch.arange(1, 10_001, dtype=torch.float32)
    exact = 1 - 0.999 ** t.double()
    relative = ((one_minus_power(0.999, t).double() - exact) / exact).abs()
    assert relative.max() < 2e-7
    assert torch.equal(one_minus_power(0.0, t[:3]), torch.ones(3))


@pytest.mark.parametrize("numel", [0, 1, 4097, 16_384, 16_385, 32_768, 10_000_019])
def test_squared_norm_is_exact_to_rounding_at_every_size(numel: int) -> None:
    """torch's own fp32 norm loses 4e-4 of ‖x‖² at ten million elements on CPU; a sharded norm would not agree."""
    x = torch.rand(numel) + 0.5
    expected = float(x.double().square().sum())
    assert squared_norms([x]).tolist() == pytest.approx([expected], rel=1e-6)
    small = torch.ones(3)
    assert squared_norms([small, x, small]).tolist() == pytest.approx([3.0, expected, 3.0], rel=1e-6)


def test_trust_ratio_of_zero_norms_is_one() -> None:
    """A zero weight must be able to move, a zero update has nothing to scale."""
    w_norm, u_norm = torch.tensor([0.0, 2.0, 0.0, 3.0]), torch.tensor([1.0, 0.0, 0.0, 2.0])
    assert trust_ratio(w_norm, u_norm).tolist() == [1.0, 1.0, 1.0, 1.5]
    assert trust_ratio(w_norm, u_norm, 1.25, 1.3).tolist() == pytest.approx([1.25, 1.25, 1.25, 1.3])
