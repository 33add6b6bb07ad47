"""Packs an optimizer's parameters into buckets, and keeps the buckets while nothing but the gradients changes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import attrgetter, itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_lamb.backends import Bucket
from hf_lamb.options import python_numbers
from hf_lamb.sharding import Block, Layout, Sharding
from hf_lamb.state import state_of

__all__ = ["Packing"]

ParamGroups = list[dict[str, Any]]
States = dict[Any, Any]
# Tensors that `Lamb` updates themselves. A subclass such as DTensor has another local tensor in every step.
PLAIN = {Tensor, torch.nn.Parameter, type(None)}
_DTYPE, _GRAD, _LAYOUT = attrgetter("dtype"), attrgetter("grad"), attrgetter("layout")


class Packing:
    """Keeps the buckets of the last step, and everything that they depend on."""

    def __init__(self) -> None:
        self._buckets: list[Bucket] = []
        self._places: list[list[int]] = []  # of each bucket's gradients among those of all parameters, then of blocks
        self._blocks: list[tuple[int, Layout]] = []  # the parameters that hold several layers, by their places
        self._steps: list[StepCopies] = []
        self._signature: list[Any] | None = None  # None: the buckets cannot be used again

    def buckets(
        self,
        param_groups: ParamGroups,
        state: States,
        sharding: Sharding,
        name_of: Callable[[int, int], str],
    ) -> list[Bucket]:
        """Return the pieces that have a gradient, packed by group, device, dtypes and sharding."""
        if torch.compiler.is_compiling():  # torch.compile cannot trace addresses
            return pack(param_groups, state, sharding, name_of)[0]
        params = [param for group in param_groups for param in group["params"]]
        grads = [*map(_GRAD, params)]
        plain = not sharding.layouts and {*map(type, params), *map(type, grads)} <= PLAIN
        if plain and self._signature is not None and self._signature == signature(param_groups, params, grads, state):
            for place, layout in self._blocks:
                grads += layout.pieces(grads[place])
            for bucket, places in zip(self._buckets, self._places, strict=True):
                bucket.group = _options(param_groups, *bucket.key[:4])
                bucket.grads = [grads[place] for place in places]
                bucket.finite = bucket.clip_factor = None
            for steps in self._steps:
                torch.stack(steps.originals, out=steps.copies)
            return self._buckets
        self._signature = None  # in case the next line raises
        self._buckets, blocks, self._steps = pack(param_groups, state, sharding, name_of)
        if plain:
            self._find_places(params, blocks)
            self._signature = signature(param_groups, params, grads, state)
        return self._buckets

    def _find_places(self, params: list[Tensor], blocks: list[dict[int, Block]]) -> None:
        """Find out where each bucket's gradients come from, `blocks` in place of parameters where there are some."""
        place_of = {id(param): place for place, param in enumerate(params)}
        self._places = [[place_of.get(id(param), -1) for param in bucket.params] for bucket in self._buckets]
        self._blocks, first, end = [], {}, len(params)
        for places, of_bucket in zip(self._places, blocks, strict=True):
            for index, (param, layout, number) in of_bucket.items():
                place = place_of[id(param)]
                if place not in first:
                    self._blocks.append((place, layout))
                    first[place], end = end, end + len(layout.segments)
                places[index] = first[place] + number


class StepCopies(NamedTuple):
    """Copies of a tensor's step count, one for each of its pieces after the first: a step must count once."""

    originals: list[Tensor]
    copies: Tensor


def pack(
    param_groups: ParamGroups, state: States, sharding: Sharding, name_of: Callable[[int, int], str]
) -> tuple[list[Bucket], list[dict[int, Block]], list[StepCopies]]:
    """Pack the pieces that have a gradient into buckets.

    Returns:
        The buckets; for each bucket its pieces that are not whole tensors, by their indices; copies of step counts.
    """
    buckets: dict[Any, Bucket] = {}
    blocks: dict[Any, dict[int, Block]] = {}
    for index, piece in sharding.pieces(param_groups, name_of, partial(state_of, state)):
        name, w, g, m, v, step, cut, place, block, *kept = piece
        contiguous = all(map(_is_plain, (w, g, m, v)))
        key = (index, *kept, w.device, w.dtype, g.dtype, cut, contiguous)
        bucket = buckets.get(key)
        if bucket is None:
            bucket = buckets[key] = Bucket(_options(param_groups, index, *kept), key, cut, contiguous)
            blocks[key] = {}
        if block is not None:
            blocks[key][len(bucket.params)] = block
        bucket.add(name, place, w, g, m, v, step)
    steps = []
    for bucket, of_bucket in zip(buckets.values(), blocks.values(), strict=True):
        later = [index for index, block in of_bucket.items() if block.number > 0]
        if later:
            originals = [bucket.steps[index] for index in later]
            copies = torch.stack(originals)
            steps.append(StepCopies(originals, copies))
            for index, copy in zip(later, copies.unbind(), strict=True):
                bucket.steps[index] = copy
    return list(buckets.values()), list(blocks.values()), steps


def _is_plain(tensor: Tensor) -> bool:
    """Return whether a kernel may read and write a tensor's memory as it is.

    Not that of a subclass which is no tensor itself but holds some, such as torchao's; nor of a view that is negated
    only when it is read, which autograd may leave as a gradient; nor of zeros without memory.
    """
    if torch.compiler.is_compiling():
        return tensor.is_contiguous()
    is_tensor = type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__
    return is_tensor and tensor.is_contiguous() and not tensor.is_neg() and not tensor._is_zerotensor()


def _options(param_groups: ParamGroups, index: int, decays: bool, adapts: bool, keeps_norm: bool) -> dict[str, Any]:
    """Return a group's options for this step. A user's schedule may have written NumPy numbers there."""
    options = {**param_groups[index], **python_numbers(param_groups[index])}
    options |= {} if decays else {"weight_decay": 0.0}
    options |= {} if adapts else {"layer_adaptation": False}
    options |= {} if keeps_norm else {"fixed_norm": False}
    return options


def signature(
    param_groups: ParamGroups,
    params: list[Tensor],
    grads: list[Tensor | None],
    state: States,
) -> list[Any] | None:
    """Return everything that the buckets depend on, for comparison with `==`; None if the buckets cannot be kept.

    It has the identity and the address of each tensor: `.data = ...` changes the address, a replaced parameter or
    moment the identity. The buckets keep the tensors alive, so no new tensor can have their identity.
    """
    # By `map`, which takes half the time of comprehensions: there may be 10,000 parameters.
    present = [grad for grad in grads if grad is not None]
    if not {*map(_LAYOUT, present)} <= {torch.strided}:
        return None
    missing = [grad is None for grad in grads] if len(present) < len(grads) else None
    of_present = params if missing is None else [p for p, grad in zip(params, grads, strict=True) if grad is not None]
    in_order = [*map(id, state)] == [*map(id, of_present)]  # mostly; to look 10,000 tensors up takes longer
    states = [entry for entry in (state.values() if in_order else map(state.get, of_present)) if entry]
    try:
        of_state = [[*map(itemgetter(name), states)] for name in ("exp_avg", "exp_avg_sq", "step")]
    except KeyError:
        return None
    found: list[Any] = [
        (len(group["params"]), [*(group.get("param_names") or ())], group.get("split")) for group in param_groups
    ]
    found += [missing, [*map(Tensor.numel, params)]]
    for tensors in (params, present):
        found += [[*map(_DTYPE, tensors)], [*map(Tensor.is_contiguous, tensors)]]
    found += [[*map(Tensor.is_neg, present)], [*map(Tensor._is_zerotensor, present)]]  # see _is_plain
    for tensors in (params, *of_state):
        found += [[*map(id, tensors)], [*map(Tensor.data_ptr, tensors)]]
    return found
