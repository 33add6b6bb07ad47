"""Protects layers that lie in flat tensors: each is its own layer, padding is nothing, one step is one step.

On one process; `tests/test_sharding.py` has several.
"""

import copy
import pickle
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from hf_lamb import Lamb, ShardingError
from hf_lamb.sharding import Sharding
from hf_lamb.sharding.deepspeed import DeepSpeed
from hf_lamb.sharding.layout import Layout, Segment, check_layouts
from tests.helpers import BACKENDS
from tests.layouts import attach

SHAPES = {"a.weight": (5, 3), "a.bias": (7,), "b.weight": (2, 2)}
# Three elements of padding, the first two layers, one of padding, the third layer, four of padding.
LAYOUT = Layout((Segment("a.weight", 3, 18, 15), Segment("a.bias", 18, 25, 7), Segment("b.weight", 26, 30, 4)), 34)
# Of parameters in the flat tensor that hold several layers: the numbers of elements of each.
FUSED = (("a.weight", (6, 3, 6)), ("a.bias", (4, 3)), ("b.weight", (2, 2)))
Split = tuple[tuple[str, tuple[int, ...]], ...]
EXCEPTIONS = {"undecayed": ["a.bias"], "unadapted": ["a.bias"], "unfixed": ["b.weight"]}


def draw(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator) * (i + 1) ** 3 for i, (name, shape) in enumerate(SHAPES.items())
    }


def flattened(layers: dict[str, Tensor], padding: float = torch.nan) -> Tensor:
    flat = torch.full((LAYOUT.numel,), padding)
    for segment in LAYOUT.segments:
        flat[segment.start : segment.stop] = layers[segment.name].flatten()
    return flat


def flat_lamb(split: Split = (), **options: object) -> Lamb:
    """Over one flat tensor of which nobody told the constructor, as DeepSpeed puts it there."""
    group = {"params": [nn.Parameter(torch.ones(2, 2))], "split": split, **EXCEPTIONS}
    optimizer = Lamb([group], lr=0.1, **options)
    flat = nn.Parameter(flattened(draw(0)))
    optimizer.param_groups[0]["params"] = [flat]
    attach(optimizer, {flat: LAYOUT})
    return optimizer


def plain_lamb(split: Split = (), **options: object) -> Lamb:
    named = [(name, nn.Parameter(w)) for name, w in draw(0).items()]
    groups = [
        {"params": [named[0]]},
        {"params": [named[1]], "weight_decay": 0.0, "layer_adaptation": False},
        {"params": [named[2]], "fixed_norm": False},
    ]
    for group in groups:
        group["split"] = tuple(entry for entry in split if entry[0] == group["params"][0][0])
    return Lamb(groups, lr=0.1, **options)


def steps(optimizer: Lamb, reference: Lamb, poisoned_at: int | None = None) -> Iterator[int]:
    flat = optimizer.param_groups[0]["params"][0]
    for step in range(1, 5):
        grads = draw(step)
        if step == poisoned_at:
            grads["a.bias"][3] = torch.inf
        flat.grad = flattened(grads)
        for group in reference.param_groups:
            for name, param in zip(group["param_names"], group["params"], strict=True):
                param.grad = grads[name]
        optimizer.step()
        reference.step()
        yield step


@BACKENDS
@pytest.mark.parametrize("split", [(), FUSED], ids=["", "fused"])
@pytest.mark.parametrize(
    "options",
    [{}, {"max_grad_norm": 0.5, "eps": 1e-2}, {"skip_nonfinite": False}, {"fixed_norm": True}],
    ids=str,
)
def test_a_flat_tensor_is_its_layers(backend: dict[str, bool], options: dict[str, object], split: Split) -> None:
    """Bit for bit what an optimizer of the layers does: decay, adaptation, norms, clipping, a skipped step.

    What a parameter is excepted from, all its layers are.
    """
    optimizer, reference = flat_lamb(split, **backend, **options), plain_lamb(split, **backend, **options)
    for _ in steps(optimizer, reference, poisoned_at=3 if "skip_nonfinite" not in options else None):
        assert optimizer.layer_stats() == reference.layer_stats()
    layers = {
        name: param
        for group in reference.param_groups
        for name, param in zip(group["param_names"], group["params"], strict=True)
    }
    flat = optimizer.param_groups[0]["params"][0]
    assert torch.equal(flat.nan_to_num(nan=7.0), flattened(layers, padding=7.0))
    assert optimizer.skipped_steps() == reference.skipped_steps()


@BACKENDS
def test_padding_is_left_alone(backend: dict[str, bool]) -> None:
    """Whatever lies there, weights or gradients: its moments stay zero, it is in no norm and skips no step."""
    optimizer = flat_lamb(**backend)
    for _ in steps(optimizer, plain_lamb(**backend)):
        pass
    flat = optimizer.param_groups[0]["params"][0]
    padding = flattened({name: torch.zeros(shape) for name, shape in SHAPES.items()}).isnan()
    assert flat[padding].isnan().all()
    assert not optimizer.state[flat]["exp_avg"][padding].any()
    assert not optimizer.state[flat]["exp_avg_sq"][padding].any()
    assert flat[~padding].isfinite().all()


@BACKENDS
def test_a_step_of_many_layers_counts_once(backend: dict[str, bool]) -> None:
    """And a skipped one not at all."""
    optimizer = flat_lamb(**backend)
    flat = optimizer.param_groups[0]["params"][0]
    counts = [int(optimizer.state[flat]["step"]) for _ in steps(optimizer, plain_lamb(), poisoned_at=3)]
    assert counts == [1, 2, 2, 3]


def test_layers_that_are_elsewhere_are_nothing_here() -> None:
    """A layer without an element in this tensor does not move it, and nobody has a gradient of it."""
    optimizer, flat = Lamb([torch.ones(1)], lr=0.1), nn.Parameter(torch.arange(1.0, 7.0))
    optimizer.param_groups[0]["params"] = [flat]
    segments = (Segment("before", 0, 0, 9), Segment("here", 0, 4, 4), Segment("after", 0, 0, 2))
    attach(optimizer, {flat: Layout(segments, 6)}, check=False)
    flat.grad = torch.ones(6)
    optimizer.step()
    assert list(optimizer.layer_stats()) == ["here"]
    assert torch.equal(flat[4:], torch.tensor([5.0, 6.0]))
    assert int(optimizer.state[flat]["step"]) == 1


def test_state_survives_saving_and_loading() -> None:
    optimizer, reference = flat_lamb(), plain_lamb()
    for step in steps(optimizer, reference):
        if step == 2:
            saved = pickle.loads(pickle.dumps(optimizer.state_dict()))
            for state in optimizer.state.values():
                for tensor in state.values():
                    tensor.fill_(torch.nan)
            optimizer.load_state_dict(saved)
        assert optimizer.layer_stats() in ({}, reference.layer_stats())


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "segments",
    [
        (Segment("one", 0, 5, 5), Segment("two", 4, 6, 2)),
        (Segment("one", 4, 6, 2), Segment("two", 0, 4, 4)),
        (Segment("one", 0, 4, 4), Segment("two", 4, 7, 3)),
    ],
    ids=["overlapping", "in another order", "beyond the end"],
)
def test_segments_that_cannot_be(segments: tuple[Segment, ...]) -> None:
    with pytest.raises(ShardingError, match=r"use FSDP2 or DDP.*elements \d to \d of a tensor of 6 should be two"):
        Layout(segments, 6)


def test_layers_of_a_parameter_that_no_tensor_holds() -> None:
    """Whose groups are those of a part of the model, with shorter names."""
    optimizer = flat_lamb(split=(("weight", (6, 9)),))
    with pytest.raises(ShardingError, match=r"lamb_param_groups of the whole model.*no parameter is named weight"):
        next(steps(optimizer, plain_lamb()))


@pytest.mark.parametrize("own", [True, False], ids=["of another group", "of no tensor"])
def test_layers_by_names_that_only_the_groups_have(own: bool) -> None:
    """Groups of a part of the model, whose parameters have longer names in the wrapped one; or those of another."""
    flat, other, plain = (nn.Parameter(torch.ones(size)) for size in (6, 4, 4))
    other_name = "layer.weight" if own else "decoder.layer.weight"
    optimizer = Lamb(
        [
            {"params": [("layer.weight", flat), ("plain", plain)], "split": (("layer.weight", (2, 4)),)},
            {"params": [("weight", other)]},
        ]
    )
    layouts = {
        flat: Layout((Segment("encoder.layer.weight", 0, 6, 6),), 6),
        other: Layout((Segment(other_name, 0, 4, 4),), 4),
    }
    attach(optimizer, layouts)
    for param in (flat, other, plain):
        param.grad = torch.ones_like(param)
    with pytest.raises(
        ShardingError, match=r"lamb_param_groups of the whole model.*no parameter is named layer.weight"
    ):
        optimizer.step()
    optimizer.param_groups[0]["split"] = (("encoder.layer.weight", (2, 4)), ("plain", (2, 2)))
    optimizer.step()
    assert {"encoder.layer.weight[1]", "plain[1]"} <= optimizer.layer_stats().keys()


def test_layers_of_which_deepspeed_shows_a_part() -> None:
    """A call of `step` may see one of a group's sub-groups, and nothing of what is frozen."""
    flat, other, frozen = (nn.Parameter(torch.ones(4)) for _ in range(3))
    sharding = Sharding()
    names = {flat: "layer.here", other: "layer.later", frozen: "layer.frozen"}
    sharding.layouts = {param: Layout((Segment(names[param], 0, 4, 4),), 4) for param in (flat, other)}
    sharding.runtime = DeepSpeed.__new__(DeepSpeed)
    sharding.runtime.engine = SimpleNamespace(param_names=names)
    group = {"params": [flat], "param_names": ["here", "later", "frozen"]}
    sharding._check_split_names({**group, "split": [(name, (2, 2)) for name in names.values()]})
    with pytest.raises(ShardingError, match="no parameter is named later"):
        sharding._check_split_names({**group, "split": [("layer.here", (2, 2)), ("later", (2, 2))]})


@pytest.mark.parametrize("start", range(15))
def test_parts_of_a_parameter_are_parts_of_its_layers(start: int) -> None:
    """Wherever the border between two processes lies."""
    w = torch.arange(15)
    held: dict[str, list[Tensor]] = {}
    for first, last in ((0, start), (start, 15)):
        shard = w[first:last]
        layout = Layout((Segment("w", 0, last - first, 15, first),), last - first).split({"w": (6, 1, 8)})
        for segment, piece in zip(layout.segments, layout.pieces(shard), strict=True):
            held.setdefault(segment.layer, []).append(piece)
            layer = w[{0: slice(0, 6), 1: slice(6, 7), 2: slice(7, 15)}[segment.block or 0]]
            assert torch.equal(piece, layer[segment.offset : segment.offset + len(piece)])
    assert {name: torch.cat(pieces).tolist() for name, pieces in held.items()} == {
        "w[0]": [*range(6)],
        "w[1]": [6],
        "w[2]": [*range(7, 15)],
    }


def test_a_parameter_whose_rows_are_in_another_order() -> None:
    """FSDP1 flattens a transposed one as it lies in memory: thirds of that are no layers."""
    with pytest.raises(ShardingError, match=r"call \.contiguous\(\) on w before FSDP1 wraps it, or .*split=False"):
        Layout((Segment("w", 0, 6, 6, in_order=False),), 6).split({"w": (3, 3)})


def test_segments_that_do_not_add_up() -> None:
    flat = torch.zeros(6)
    check_layouts({flat: Layout((Segment("one", 0, 4, 4), Segment("two", 4, 6, 2)), 6)})
    with pytest.raises(ShardingError, match="all processes together hold 2 elements of two, which has 3"):
        check_layouts({flat: Layout((Segment("one", 0, 4, 4), Segment("two", 4, 6, 3)), 6)})


def test_a_tensor_that_has_changed_since_attach() -> None:
    optimizer = flat_lamb()
    flat = optimizer.param_groups[0]["params"][0]
    flat.data = torch.ones(12)
    flat.grad = torch.ones(12)
    with pytest.raises(ShardingError, match="has 12 elements here and had 34 in attach: call step outside of summon"):
        optimizer.step()


def test_a_copy_has_to_be_attached_anew() -> None:
    """A copy's tensors are others; it must not take the flat one for a layer."""
    optimizer = copy.deepcopy(flat_lamb())
    optimizer.param_groups[0]["params"][0].grad = torch.ones(LAYOUT.numel)
    with pytest.raises(ShardingError, match=r"call optimizer\.attach\(engine\)"):
        optimizer.step()


def test_attach_takes_a_wrapped_model() -> None:
    model = nn.Linear(3, 2)
    optimizer = Lamb(model.parameters())
    optimizer.attach(model)  # nothing is hidden, nothing happens
    with pytest.raises(ValueError, match=r"Lamb\.attach: pass the wrapped model.* got neither"):
        optimizer.attach()
    with pytest.raises(ValueError, match=r"Lamb\.attach: expected the wrapped model, got Adam"):
        optimizer.attach(torch.optim.Adam(model.parameters()))
