"""What an optimizer does in odd cases: zero norms, bf16 weights, non-finite gradients, a save in the middle."""

from __future__ import annotations

import io
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hf_lamb.conformance.probe import LAYERS, Maker, Probe, gradients, weights

__all__ = ["Behaviour", "behaviour"]

ODD = list(LAYERS).index("middle")  # the layer that gets what is odd
BAD_STEP = 2  # of the non-finite gradient, counted from 0


@dataclass(frozen=True)
class Behaviour:
    """What happens, in words; `is_finite` and `save_is_exact` say it to a program."""

    zero_weights: str
    zero_gradients: str
    bf16: str
    nonfinite: str
    save: str
    is_finite: bool  # whether the weights stay finite where a norm is zero
    save_is_exact: bool


def behaviour(make: Maker, options: dict[str, Any], dtype: torch.dtype, device: str = "cpu") -> Behaviour:
    """Try an optimizer in the odd cases.

    Args:
        make: an optimizer class, or a function, of parameter groups and options.
        options: of the optimizer.
        dtype: of the weights.
        device: where the optimizer runs.
    """
    new = partial(Probe, make, options, device=device)
    zero_weights, moved = _or_error(partial(_zero_weights, new, dtype))
    zero_gradients, kept = _or_error(partial(_zero_gradients, new, dtype))
    bf16, _ = _or_error(partial(_bf16, new))
    answers = {str(value): _or_error(partial(_nonfinite, new, dtype, value))[0] for value in (torch.inf, torch.nan)}
    save, exact = _or_error(partial(_save, new, dtype))
    return Behaviour(
        zero_weights,
        zero_gradients,
        bf16,
        answers["inf"]
        if answers["inf"] == answers["nan"]
        else "; ".join(f"{v}: {text}" for v, text in answers.items()),
        save,
        is_finite=moved and kept,
        save_is_exact=exact,
    )


def _or_error(case: Callable[[], tuple[str, bool]]) -> tuple[str, bool]:
    """Return the answer of a case; the first line of the error if the optimizer raises one."""
    try:
        return case()
    except Exception as error:  # what other people's optimizers raise is not known
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}", False


def _zero_weights(new: Callable[..., Probe], dtype: torch.dtype) -> tuple[str, bool]:
    """Weights of zero, as of a layer that begins at zero."""
    start = weights()
    start[ODD] = torch.zeros_like(start[ODD])
    probe = new(dtype=dtype, start=start)
    probe.step(gradients()[1])  # of about 1, beside which epsilon is nothing
    step = probe.read()[ODD]
    if not step.isfinite().all():
        return "NaN", False
    if not step.any():
        return "the layer never moves", True
    return f"the layer moves by {float(step.norm()) / probe.hyper.lr / step.numel() ** 0.5:.3g} lr an element", True


def _zero_gradients(new: Callable[..., Probe], dtype: torch.dtype) -> tuple[str, bool]:
    """Gradients of zero, as of a layer that was not used under FSDP1 or ZeRO: with and without weight decay."""
    probe = new(dtype=dtype)
    before = probe.read()
    probe.step([torch.zeros_like(grad) for grad in gradients()[0]])
    after = probe.read()
    moved, last = (
        float((new - old).norm() / old.norm()) for old, new in ((before[i], after[i]) for i in (ODD, len(before) - 1))
    )
    if not all(layer.isfinite().all() for layer in after):
        return "NaN" if moved != moved else "NaN without weight decay", False
    lr, decay = probe.hyper.lr, probe.hyper.weight_decays[ODD]
    if moved == 0 == last:
        return "the weights stay", True
    close = partial(torch.isclose, rtol=1e-2, atol=0.0)
    words = f"the weights change by {moved:.2g} of their norm"
    if close(torch.tensor(moved), torch.tensor(lr)):
        words = "weight decay alone becomes a full step"
    elif decay and close(torch.tensor(moved), torch.tensor(lr * decay)):
        words = "the weights decay by lr x weight_decay"
    return words + ("" if last == 0 else ", those without weight decay too"), True


def _bf16(new: Callable[..., Probe]) -> tuple[str, bool]:
    """Weights in bfloat16."""
    probe = new(dtype=torch.bfloat16)
    for grads in gradients():
        probe.step(grads)
    state = [value for of in probe.optimizer.state.values() for value in of.values() if isinstance(value, Tensor)]
    shapes = {layer.shape for layer in probe.layers}
    dtypes = sorted({str(value.dtype).removeprefix("torch.") for value in state if value.shape in shapes})
    finite = all(layer.isfinite().all() for layer in probe.read())
    return f"{'runs' if finite else 'NaN'}, moments in {' and '.join(dtypes) or 'another form'}", finite


def _nonfinite(new: Callable[..., Probe], dtype: torch.dtype, value: float) -> tuple[str, bool]:
    """One element of one gradient is inf or NaN in one step; finite steps follow."""
    probe = new(dtype=dtype)
    steps = [*gradients()[: BAD_STEP + 1], *gradients()[BAD_STEP + 1 : BAD_STEP + 3]]
    steps[BAD_STEP][ODD].view(-1)[0] = value
    for grads in steps[:BAD_STEP]:
        probe.step(grads)
    before = probe.read()
    probe.step(steps[BAD_STEP])
    at_once = probe.read()
    for grads in steps[BAD_STEP + 1 :]:
        probe.step(grads)
    bad = [int((~layer.isfinite()).sum()) for layer in probe.read()]
    others = sum(bad) - bad[ODD]
    kept = all(torch.equal(old, now) for old, now in zip(before, at_once, strict=True))
    if others:
        return "NaN in other layers too", False
    if bad[ODD]:
        of = at_once[ODD].numel()
        return (
            "NaN in the whole layer" if bad[ODD] == of else f"NaN in {bad[ODD]} of the layer's {of} elements"
        ), False
    return "the step is skipped" if kept else "the weights stay finite and move", True


def _save(new: Callable[..., Probe], dtype: torch.dtype) -> tuple[str, bool]:
    """Save in the middle, go on in a new optimizer, and compare with the run that was not interrupted."""
    middle = len(gradients()) // 2
    for of in (dtype, torch.bfloat16):
        name = str(of).removeprefix("torch.")
        try:
            whole = new(dtype=of)
            for grads in gradients()[:middle]:
                whole.step(grads)
        except Exception:
            if of == torch.bfloat16:
                continue  # it does not take bf16 weights, which another row says
            raise
        file = io.BytesIO()
        torch.save(deepcopy(whole.optimizer.state_dict()), file)
        file.seek(0)
        resumed = new(dtype=of, start=whole.read())
        resumed.optimizer.load_state_dict(torch.load(file, weights_only=True))
        for step, grads in enumerate(gradients()[middle:], 1):
            for probe in (whole, resumed):
                probe.step(grads)
            if not all(torch.equal(a, b) for a, b in zip(whole.read(), resumed.read(), strict=True)):
                return f"{name} weights: other weights in step {step} after it", False
    return "goes on to the same bits", True
