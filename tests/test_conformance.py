"""Protects `hf_lamb.conformance`: it tells the variants apart, finds broken optimizers, and says what odd cases do."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import SGD, Adam, AdamW, Optimizer

from benchmarks import conformance as benchmark
from benchmarks.records import recorded
from hf_lamb import Lamb
from hf_lamb.conformance import VARIANTS, assert_variant, examine, identify
from hf_lamb.conformance.__main__ import main, parse_options
from hf_lamb.conformance.probe import LAYERS, gradients, weights
from hf_lamb.conformance.rules import Hyper, Rule, golden
from recipes.study.tables import filled
from tests.helpers import one_line, says
from tests.reference import ReferenceLamb

DOCUMENT = (Path(__file__).parent.parent / "docs/conformance.md").read_text()


def apex(groups: list[dict[str, Any]], **options: Any) -> Lamb:
    """README's row of apex: parameters that do not decay do not adapt."""
    return Lamb([{**group, "layer_adaptation": group["weight_decay"] > 0} for group in groups], **options)


# README's table, in its order.
OURS: dict[str, tuple[Callable[..., Optimizer], dict[str, Any]]] = {
    "v4/v5": (Lamb, {}),
    "v1": (Lamb, {"max_trust_ratio": 10}),
    "v2/v3": (Lamb, {"bias_correction": False}),
    "NVLAMB": (Lamb, {"max_grad_norm": 1.0}),
    "apex": (apex, {"max_grad_norm": 1.0}),
    "LAMBC": (Lamb, {"max_trust_ratio": 1.0}),
    "fixed norm": (Lamb, {"fixed_norm": True}),
    "AdamW": (Lamb, {"layer_adaptation": False}),
}


class Broken(Optimizer):
    """The paper's LAMB, written plainly, with one mistake."""

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.01, mistake: str = "") -> None:
        self.mistake = mistake
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            lr, decay, eps, (beta1, beta2) = (group[name] for name in ("lr", "weight_decay", "eps", "betas"))
            for w in group["params"]:
                state = self.state[w]
                if not state:
                    state.update(step=0, m=torch.zeros_like(w), v=torch.zeros_like(w))
                state["step"] += 1
                state["m"].mul_(beta1).add_(w.grad, alpha=1 - beta1)
                state["v"].mul_(beta2).addcmul_(w.grad, w.grad, value=1 - beta2)
                m, v = state["m"] / (1 - beta1 ** state["step"]), state["v"]
                if self.mistake != "second moment":
                    v = v / (1 - beta2 ** state["step"])
                u = m / ((v + eps).sqrt() if self.mistake == "epsilon" else v.sqrt() + eps)
                if self.mistake != "decay":
                    u = u + decay * w
                w_norm = (w - lr * u).norm() if self.mistake == "updated" else w.norm()
                ratio = w_norm / u.norm() if w_norm > 0 and u.norm() > 0 else 1.0
                w.sub_(lr * ratio * u + (lr * decay * w if self.mistake == "decay" else 0))


@pytest.mark.parametrize("variant", OURS)
def test_the_variants_of_the_readme_are_told_apart(variant: str) -> None:
    make, options = OURS[variant]
    found = identify(make, options)
    assert (found.variant, found.departure) == (variant, None)


def test_every_variant_has_a_row_and_an_optimizer() -> None:
    assert (
        VARIANTS.keys() == OURS.keys() == set(re.findall(r"^\| `(.+?)` \|", DOCUMENT, re.MULTILINE)) & VARIANTS.keys()
    )


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ("second moment", "v4/v5, but no bias correction of the second moment"),
        ("updated", "v4/v5, but the trust ratio of the updated weights"),
        ("decay", "v4/v5, but weight decay outside of the trust ratio"),
        ("epsilon", "v4/v5, but epsilon inside the root"),
    ],
)
def test_a_broken_optimizer_is_found_and_the_mistake_named(mistake: str, words: str) -> None:
    assert identify(Broken, {}).variant == "v4/v5"
    found = identify(Broken, {"mistake": mistake})
    assert found.variant is None
    assert str(found) == words
    assert found.departure is not None
    assert found.departure.step == 1
    assert found.departure.size > 1e-4


def test_the_first_departure_is_where_it_is() -> None:
    """An optimizer that is LAMB until its third step, in which it doubles the step of one layer."""

    class Late(Lamb):
        steps = 0

        def step(self, closure: Any = None) -> Any:
            self.steps += 1
            layer = self.param_groups[0]["params"][1]
            before = layer.detach().clone()
            super().step(closure)
            if self.steps == 3:
                with torch.no_grad():
                    layer.add_(layer - before)

    found = identify(Late, {})
    assert (found.variant, found.nearest, found.differences) == (None, "v4/v5", ())
    assert found.departure is not None
    assert (found.departure.step, found.departure.layer) == (3, "middle")
    assert found.departure.size == pytest.approx(1.0)


def test_adam_in_lambs_clothes_is_adam() -> None:
    """Whatever it is called: torch's AdamW, and a LAMB whose layers adapt only if they decay, without decay."""
    assert identify(AdamW).variant == identify(apex, {"weight_decay": 0.0}).variant == "AdamW"
    assert str(identify(AdamW)) == "no LAMB: AdamW"


@pytest.mark.parametrize(
    "options", [{"betas": (0.8, 0.98)}, {"eps": 1e-8}, {"lr": 0.3}, {"weight_decay": 0.1}], ids=str
)
def test_other_numbers_are_no_departure(options: dict[str, Any]) -> None:
    assert identify(Lamb, options).variant == "v4/v5"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_trust_ratio": 10.0},
        {"bias_correction": False},
        {"max_grad_norm": 1.0},
        {"max_trust_ratio": 1.0},
        {"fixed_norm": True},
        {"layer_adaptation": False},
        {"min_trust_ratio": 0.01},
    ],
    ids=str,
)
def test_the_rules_are_those_of_the_reference(options: dict[str, Any]) -> None:
    """The golden trajectories against NumPy's, which stands in tests/reference.py; every layer decays."""
    fields = dict(options)
    if fields.pop("bias_correction", True) is False:
        fields["bias_correction"] = "none"
    if fields.pop("layer_adaptation", True) is False:
        fields["adapts"] = "none"
    hyper = Hyper(0.02, (0.9, 0.999), 1e-6, (0.02,) * len(LAYERS))
    given = [torch.stack([g.flatten() for g in layer]) for layer in zip(*gradients(), strict=True)]
    trajectory = golden(Rule(**fields), [w.flatten() for w in weights()], given, hyper)
    reference = ReferenceLamb([w.flatten().numpy() for w in weights()], lr=0.02, weight_decay=0.02, **options)
    for step in range(len(given[0])):
        expected = reference.step([layer[step].numpy() for layer in given])
        for layer, w in zip(trajectory, expected, strict=True):
            np.testing.assert_allclose(layer[step + 1].numpy(), w, rtol=1e-12, atol=1e-15)


def test_the_odd_cases_of_lamb() -> None:
    rows = examine(Lamb).rows()
    assert rows["weights of zero"] == "the layer moves by 1 lr an element"
    assert rows["gradients of zero"] == "the weights stay"
    assert rows["bf16 weights"] == "runs, moments in float32"
    assert rows["a non-finite gradient"] == "the step is skipped"
    assert rows["a save and a load"] == "goes on to the same bits"


def test_the_odd_cases_of_others() -> None:
    """One that divides by a norm of zero, keeps its moments in the weights' precision, and forgets its step count."""

    class Odd(Broken):
        def state_dict(self) -> dict[str, Any]:
            kept = super().state_dict()
            return {**kept, "state": {i: {**of, "step": 0} for i, of in kept["state"].items()}}

        @torch.no_grad()
        def step(self) -> None:  # type: ignore[override]
            super().step()
            for group in self.param_groups:
                for w in group["params"]:
                    w.add_(0 / w.norm())

    report = examine(Odd)
    assert report.identity.variant == "v4/v5"
    assert report.behaviour.zero_weights == "the layer moves by 1 lr an element"
    assert report.behaviour.zero_gradients == "weight decay alone becomes a full step"
    assert report.behaviour.bf16 == "runs, moments in bfloat16"
    assert "NaN in the whole layer" in report.behaviour.nonfinite
    assert report.behaviour.save == "float64 weights: other weights in step 1 after it"
    with pytest.raises(AssertionError, match="it goes on differently when its state is saved"):
        assert_variant(Odd, "v4/v5")


def test_the_assertion_says_what_is_wrong() -> None:
    assert_variant(Lamb, "v1", max_trust_ratio=10)
    with pytest.raises(AssertionError, match="it is not v4/v5") as failed:
        assert_variant(Broken, "v4/v5", mistake="epsilon")
    assert "v4/v5, but epsilon inside the root" in str(failed.value)
    with one_line(ValueError, r"unknown variant 'v4'.*v4/v5"):
        assert_variant(Lamb, "v4")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["Lamb"], "'Lamb': write MODULE:NAME"),
        (["no_such_module:Lamb"], "no_such_module cannot be imported .*install it"),
        (["hf_lamb:Lam"], "hf_lamb has no class 'Lam' .did you mean Lamb"),
        (["hf_lamb:Lamb", "--options", "lr"], "--options 'lr': write names and values"),
        (["hf_lamb:Lamb", "--options", "lr=x"], "--options 'lr=x': write names and values"),
        (["hf_lamb:Lamb", "--options", "rate=1"], "'rate=1' cannot be examined: .*rate"),
        (["hf_lamb:Lamb", "--options", "eps=-1"], "'eps=-1' cannot be examined: .*-1"),
        (["torch.optim:SGD"], "the groups of SGD have no betas: give an optimizer like Adam or LAMB"),
        (["builtins:dict"], "builtins:dict '' cannot be examined: .*dict"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_ends_in_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as refused:
        main(arguments)
    says(str(refused.value.code), f"^hf_lamb.conformance: {message}")


def test_the_command_prints_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    main(["hf_lamb:Lamb", "--options", "max_trust_ratio=10, foreach=true"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["variant", "v1"]
    assert len(lines) == 8


def test_options_are_pythons_values() -> None:
    assert parse_options("") == {}
    given = "lr=1e-3, betas=(0.9, 0.98), foreach=true, max_grad_norm=None, name='x'"
    assert parse_options(given) == {
        "lr": 1e-3,
        "betas": (0.9, 0.98),
        "foreach": True,
        "max_grad_norm": None,
        "name": "x",
    }


@pytest.mark.parametrize("optimizer", [Adam, SGD])
def test_what_is_no_lamb_is_none(optimizer: type[Optimizer]) -> None:
    """Adam with L2 decay follows no rule; SGD has no moments to compare."""
    if optimizer is SGD:
        with one_line(ValueError, "SGD have no betas"):
            identify(SGD)
    else:
        found = identify(Adam)
        assert (found.variant, found.nearest, found.differences) == (None, "AdamW", ())


# ---- The document ---------------------------------------------------------------------------------------------------


def test_the_documents_table_is_the_recorded_one() -> None:
    """Generated: `python -m benchmarks.conformance` examines and writes it."""
    assert filled(DOCUMENT, {benchmark.MARKERS: benchmark.table(recorded(benchmark.FILE))}) == DOCUMENT


def test_the_recorded_answers_of_what_is_installed_hold() -> None:
    """Of hf_lamb and torch: they are examined anew."""
    recorded_rows = {(row["name"], row["options"]): row["rows"] for row in recorded(benchmark.FILE)[-1]["lambs"]}
    for candidate in benchmark.CANDIDATES:
        if candidate.distribution in ("hf_lamb", "torch"):
            now = benchmark.examined(candidate)
            assert now is not None
            assert recorded_rows[now["name"], now["options"]] == now["rows"]
