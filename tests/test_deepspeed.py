"""Protects LAMB under DeepSpeed ZeRO: whatever the stage, every step is the unsharded one.

Real engines on real processes (gloo, CPU); `make test-deepspeed`. DeepSpeed compiles a small extension at its first
start, which takes a C++ compiler and a minute.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hf_lamb.norms import Sum
from tests.helpers import Case, Result, measure, on_processes
from tests.scripts.split_batch import trained_model
from tests.test_sharding import CLIPPED, FLOAT32

NO_COMPILER = pytest.mark.skipif(shutil.which("c++") is None, reason="DeepSpeed compiles an extension: install g++")
pytestmark = [pytest.mark.deepspeed, pytest.mark.timeout(900), NO_COMPILER]
pytest.importorskip("deepspeed", reason="pip install -e '.[deepspeed]'")

FLAT = ["zero1", "zero2", "zero1_round_robin", "zero2_round_robin", "zero2_aligned", "zero2_offload"]
ONE_BY_ONE = ["zero3", "zero3_subgroups", "zero3_offload"]
BF16 = ["zero0_bf16", "zero1_bf16", "zero1_bf16_fp32_gradients", "zero2_bf16_unchecked", "zero3_bf16_subgroups"]
MODES = {
    2: ["zero0", *FLAT, *ONE_BY_ONE, *BF16],
    4: ["zero1", "zero2_round_robin", "zero3_subgroups", "zero1_bf16_fp32_gradients"],
}
# DeepSpeed adds gradients up in another order, which a step clipped to a tenth with a large eps magnifies.
TOLERANCE = {"float32": 1e-6, "clipped": 1e-5}
# A ModernBERT, whose fused parameters hold several layers, beside its twin in which each layer is a parameter.
FUSED_MODES = {
    2: ["zero1_fused", "zero2_round_robin_fused", "zero3_subgroups_fused"],
    4: ["zero2_round_robin_fused", "zero3_subgroups_fused"],
}
# That norms are another algorithm's where they are of what lies here, as other LAMBs' are.
BROKEN = [{"mode": mode, "mutation": "norms of the local shard", **FLOAT32} for mode in ("zero2", "zero3")]
VARIANTS = {"float32": FLOAT32, "clipped": {"dtype": "float32", **CLIPPED}}


def cases_on(processes: int) -> list[Case]:
    return [{"mode": mode, **variant} for mode in MODES[processes] for variant in VARIANTS.values()]


def fused_cases(processes: int) -> list[Case]:
    return [{"mode": mode, **FLOAT32} for mode in FUSED_MODES[processes]]


@pytest.fixture(scope="module")
def on_2(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    return measure(2, "zero_lamb", [*cases_on(2), *BROKEN, *fused_cases(2)], tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def on_4(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    return measure(4, "zero_lamb", [*cases_on(4), *fused_cases(4)], tmp_path_factory.mktemp("four"))


@pytest.fixture
def result_of(request: pytest.FixtureRequest) -> Callable[[int, str, str], Result]:
    def result_of(processes: int, mode: str, variant: str) -> Result:
        case = {"mode": mode, **VARIANTS[variant]}
        result: Result = request.getfixturevalue(f"on_{processes}")[json.dumps(case)]
        assert "error" not in result, result["error"]
        return result

    return result_of


ALL = [(n, mode) for n, modes in MODES.items() for mode in modes]
EVERYTHING = [(n, mode, variant) for n, mode in ALL for variant in VARIANTS]


@pytest.mark.parametrize(("processes", "mode", "variant"), EVERYTHING)
def test_equals_the_unsharded_run(
    processes: int, mode: str, variant: str, result_of: Callable[[int, str, str], Result]
) -> None:
    """After ten steps: the fp32 weights; at every step: each layer's ‖w‖, ‖u‖ and trust ratio.

    Of bf16 runs, against an optimizer that is given their gradients. With clipping, `max_grad_norm` is LAMB's own.
    """
    result = result_of(processes, mode, variant)
    assert result["weights"] <= 1e-6
    assert result["ratios"] <= TOLERANCE[variant]
    assert result["norms"] <= TOLERANCE[variant]
    assert result["same_weights"], "the processes ended with different weights"
    assert result["same_layers"], "the processes report different layer_stats"


@pytest.mark.parametrize(("processes", "mode"), [(n, mode) for n, modes in FUSED_MODES.items() for mode in modes])
def test_layers_of_fused_parameters_equal_the_unfused_and_unsharded_run(
    processes: int, mode: str, request: pytest.FixtureRequest
) -> None:
    """Wherever the partitions' borders cut a layer."""
    result = request.getfixturevalue(f"on_{processes}")[json.dumps({"mode": mode, **FLOAT32})]
    assert "error" not in result, result["error"]
    assert result["weights"] <= 1e-6
    # The gradients of four processes are rounded elsewhere: on some CPUs fp32 gives 1.2e-6.
    assert result["ratios"] <= 3e-6
    assert result["norms"] <= 3e-6
    assert result["same_weights"], "the processes ended with different weights"
    assert result["same_layers"], "the processes report different layer_stats"


@pytest.mark.parametrize("broken", BROKEN, ids=lambda case: case["mode"])
def test_a_deliberately_broken_variant_is_seen(broken: Case, on_2: dict[str, Result]) -> None:
    assert on_2[json.dumps(broken)]["weights"] > 1e-3


@pytest.mark.parametrize(("processes", "mode"), ALL)
def test_no_weight_moves_before_the_first_step(
    processes: int, mode: str, result_of: Callable[[int, str, str], Result]
) -> None:
    """In bf16 without ZeRO, DeepSpeed does a trial step with gradients of zero when it is initialized."""
    assert result_of(processes, mode, "float32")["changed_before"] == []


@pytest.mark.parametrize(("processes", "mode"), ALL)
def test_a_nan_costs_one_step_and_nothing_else(
    processes: int, mode: str, result_of: Callable[[int, str, str], Result]
) -> None:
    """Of all layers and processes. DeepSpeed skips and counts it, or LAMB where DeepSpeed does not look."""
    result = result_of(processes, mode, "clipped")
    by_lamb = mode in ("zero0", "zero2_bf16_unchecked")
    assert result["unsharded_skipped"] == [1, 0]
    assert result["skipped"] == [[1, 0] if by_lamb else [0, 0]] * processes
    assert result["deepspeed_skipped"] == (0 if by_lamb else 1)
    assert result_of(processes, mode, "float32")["skipped"] == [[0, 0]] * processes


@pytest.mark.parametrize(("processes", "mode"), ALL)
def test_one_all_reduce_for_each_call(processes: int, mode: str, result_of: Callable[[int, str, str], Result]) -> None:
    """The sums of each layer; no more for skipping and clipping, which take the norm that DeepSpeed has computed.

    ZeRO-1 and 2 call `step` for each of the two groups, ZeRO-3 for each sub-group, BF16_Optimizer once.
    """
    for variant in VARIANTS:
        result = result_of(processes, mode, variant)
        calls, evidence = result["collectives"][0], result["evidence"][0]
        assert all(collectives == calls for collectives in result["collectives"])
        if evidence["stage"] == 0:
            assert calls == [[]]
            continue
        assert all(len(call) == 1 and call[0][0] == "allreduce" for call in calls)
        assert sum(size for [[_, size]] in calls) == evidence["layers"] * 4 * len(Sum)
        assert len(calls) == (1 if evidence["optimizer"] == "BF16_Optimizer" else evidence["tensors"])


@pytest.mark.parametrize(("processes", "mode"), ALL)
def test_really_ran_sharded(processes: int, mode: str, result_of: Callable[[int, str, str], Result]) -> None:
    result = result_of(processes, mode, "float32")
    kind = {"0": "Lamb", "1": "DeepSpeedZeroOptimizer", "2": "DeepSpeedZeroOptimizer"}.get(
        mode[4], "DeepSpeedZeroOptimizer_Stage3"
    )
    kind = {"zero0_bf16": "FP16_UnfusedOptimizer", "zero1_bf16_fp32_gradients": "BF16_Optimizer"}.get(mode, kind)
    assert {evidence["optimizer"] for evidence in result["evidence"]} == {kind}
    if mode[4] != "0":
        held = [evidence["held"] for evidence in result["evidence"]]
        assert max(held) < 1.1 * sum(held) / processes
        assert sum(evidence["padding"] for evidence in result["evidence"]) > 0
        assert result["evidence"][0]["tensors"] == 2 or "subgroups" in mode
    if "subgroups" in mode:
        assert result["evidence"][0]["tensors"] > 3


def test_a_layer_that_nothing_uses_keeps_its_weights(tmp_path: Path) -> None:
    """ZeRO hands zeros for it. As without DeepSpeed it keeps its weights to the bit, and is in no statistics."""
    on_processes(2, "tests.scripts.zero_unused", str(tmp_path / "results.json"), timeout=400)
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == ["0", "1", "2", "3"]
    for stage, result in results.items():
        assert result["unused"] == 0, stage
        assert result["used"] <= 4e-6, stage  # a bias of one element ends near zero, one rounding is 4e-7
        assert all("unused.weight" not in names for names in result["layers"]), stage


# -- through Trainer and Accelerate ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    trained_model("mlm", root / "start")
    on_processes(2, "tests.scripts.zero_runs", str(root), timeout=600)
    return root


def weights(run: Path, file: str = "model") -> dict[str, Tensor]:
    """By today's names: after ZeRO-3, transformers saves BERT's by those of 2018, which it also loads."""
    saved = load_file(run / f"{file}.safetensors")
    return {name.replace(".gamma", ".weight").replace(".beta", ".bias"): w for name, w in saved.items()}


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() <= other.keys()
    return max(float((one[name] - other[name]).norm() / one[name].norm()) for name in one)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_lamb_trainer_ends_as_under_ddp(stage: int, runs: Path) -> None:
    """Weights, losses, held-out losses, gradient norms and trust ratios; the model saved is whole.

    Two accumulation steps, clipping, unequal numbers of labels; ZeRO-3 cuts the model to pieces before LAMB sees it.
    """
    assert weights(runs / f"zero{stage}").keys() == weights(runs / "ddp").keys(), "tied weights are saved twice"
    assert difference(weights(runs / "ddp"), weights(runs / f"zero{stage}")) <= 1e-6
    expected = json.loads((runs / "ddp/log.json").read_text())
    log = json.loads((runs / f"zero{stage}/log.json").read_text())
    assert len(log) == len(expected)
    for line, theirs in zip(log, expected, strict=True):
        for key in theirs.keys() & {"loss", "eval_loss", "grad_norm", "lamb/trust_ratio_min", "lamb/trust_ratio_max"}:
            assert line[key] == pytest.approx(theirs[key], rel=1e-5), key


def test_stock_trainer_needs_nothing_either(runs: Path) -> None:
    """With `--optim lamb`."""
    assert difference(weights(runs / "stock-None"), weights(runs / "stock-2")) <= 1e-6


@pytest.mark.parametrize("stage", [2, 3])
def test_lamb_trainer_resumes_bit_for_bit(stage: int, runs: Path) -> None:
    assert difference(weights(runs / f"zero{stage}"), weights(runs / f"zero{stage}-resumed")) == 0


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_accelerate_loop_ends_as_under_ddp(stage: int, runs: Path) -> None:
    """And goes on from `save_state` bit for bit."""
    whole = weights(runs / f"loop-{stage}")
    assert difference(weights(runs / "loop-None"), whole) <= 1e-6
    assert all(torch.equal(whole[n], w) for n, w in weights(runs / f"loop-{stage}", "resumed").items())


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("ddp under 2", r"resume .*checkpoint-3 without DeepSpeed .*: DeepSpeed did not write it"),
        ("zero2 under None", r"resume .*checkpoint-3 with the DeepSpeed configuration .*: only DeepSpeed can read"),
        ("zero2 under 3", r"resume .* with DeepSpeed ZeRO-1 or 2: .* this run's ZeRO-3$"),
        ("zero3 under 1", r"resume .* with DeepSpeed ZeRO-3: .* this run's ZeRO-1$"),
        (
            "on the CPU under 2",
            r"unset ACCELERATE_USE_CPU.* launched with DeepSpeed, but .*without it",
        ),
        ("zero3 on 4", r"resume .* on 2 processes: .*, and this run has 4$"),
    ],
)
def test_says_what_would_go_unsaid(what: str, message: str, runs: Path) -> None:
    """Trainer would lose the optimizer's state without a word, or DeepSpeed stop at an assertion."""
    said = json.loads((runs / "refused.json").read_text())[what]
    assert "\n" not in said
    assert re.search(message, said), said
