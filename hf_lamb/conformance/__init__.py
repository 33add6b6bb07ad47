"""Which LAMB is this? Says of any `torch.optim.Optimizer` which variant it is, and what it does in odd cases.

It compares ten steps with update rules in float64 that know no optimizer. `python -m hf_lamb.conformance` is the
command line, `assert_variant` is for tests of other projects. Needs torch only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_lamb.conformance.behaviour import Behaviour, behaviour
from hf_lamb.conformance.identify import Departure, Identity, identify
from hf_lamb.conformance.probe import Maker
from hf_lamb.conformance.rules import VARIANTS
from hf_lamb.scaling import did_you_mean

__all__ = ["VARIANTS", "Behaviour", "Departure", "Identity", "Report", "assert_variant", "examine", "identify"]


@dataclass(frozen=True)
class Report:
    """What `examine` finds: `identity` and `behaviour`."""

    identity: Identity
    behaviour: Behaviour

    def rows(self) -> dict[str, str]:
        """Return everything in words."""
        identity, does = self.identity, self.behaviour
        departure = identity.departure
        return {
            "variant": str(identity),
            "departs first": "nowhere" if departure is None else f"from {identity.nearest} in {departure}",
            "compared in": str(identity.dtype).removeprefix("torch."),
            "weights of zero": does.zero_weights,
            "gradients of zero": does.zero_gradients,
            "bf16 weights": does.bf16,
            "a non-finite gradient": does.nonfinite,
            "a save and a load": does.save,
        }

    def table(self) -> str:
        """Return the rows, one line each."""
        rows = self.rows()
        width = max(map(len, rows))
        return "\n".join(f"{name:<{width}}  {words}" for name, words in rows.items())


def examine(make: Maker, options: dict[str, Any] | None = None, device: str = "cpu") -> Report:
    """Say which variant an optimizer is, where it departs first, and what it does in odd cases.

    Args:
        make: an optimizer class, or a function, of parameter groups and options.
        options: of the optimizer. Default: a learning rate and a weight decay of 0.02 each.
        device: where the optimizer runs. Default "cpu".

    Raises:
        ValueError: the optimizer cannot be built with these options, or cannot step.
    """
    identity = identify(make, options, device)
    return Report(identity, behaviour(make, options or {}, identity.dtype, device))


def assert_variant(make: Maker, variant: str, device: str = "cpu", **options: Any) -> None:
    """Assert, in a test, that an optimizer is a variant of LAMB, stays finite and can be saved.

    Args:
        make: an optimizer class, or a function, of parameter groups and options.
        variant: a name in VARIANTS: v1, v2/v3, v4/v5, NVLAMB, apex, LAMBC, fixed norm, or AdamW.
        device: where the optimizer runs. Default "cpu".
        options: of the optimizer.

    Raises:
        AssertionError: it is another variant; zero weights or zero gradients give NaN; it does not go on to the same
            bits when its state is saved and loaded. The message has the table of `Report`.
        ValueError: there is no such variant; the optimizer cannot be built with these options, or cannot step.
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}{did_you_mean(variant, VARIANTS)}: one of {', '.join(VARIANTS)}")
    report = examine(make, options, device)
    wrong = []
    if report.identity.variant != variant:
        wrong.append(f"it is not {variant}")
    if not report.behaviour.is_finite:
        wrong.append("it is not finite where a norm is zero")
    if not report.behaviour.save_is_exact:
        wrong.append("it goes on differently when its state is saved and loaded")
    if wrong:
        raise AssertionError(f"{getattr(make, '__name__', make)}: {'; '.join(wrong)}\n{report.table()}")
