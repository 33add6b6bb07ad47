"""Protects `python -m benchmarks.host_time`: it measures whole steps of our CUDA backend and of AdamW, without their
kernels, and leaves nothing replaced."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import host_time
from hf_lamb import backends

pytest.importorskip("triton", minversion="3.7", reason="needs Triton 3.7 (Linux on x86-64)")


def test_no_kernel_runs_and_every_step_counts() -> None:
    """The weights stay; AdamW's and our step begin and end as they do on CUDA."""
    with host_time.without_kernels():
        optimizers = host_time.candidates(64, 1)
        for optimizer in optimizers.values():
            host_time.give_gradients(optimizer)
            optimizer.step()
    for name, optimizer in optimizers.items():
        params = host_time.params_of(optimizer)
        assert len(params) == 26, name
        assert all(torch.equal(param, torch.ones(1)) for param in params), name
        assert all(set(optimizer.state[param]) == {"step", "exp_avg", "exp_avg_sq"} for param in params), name
    assert "Triton" not in [kind.__name__ for kind in backends.fused_kinds(torch.device("cpu"))]


def test_our_step_launches_the_triton_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the ratio would be that of another backend."""
    from hf_lamb.backends import triton

    launched: list[str] = []
    with host_time.without_kernels():
        monkeypatch.setattr(triton, "_launch", lambda kernel, *_, **__: launched.append(kernel.fn.__name__))
        optimizer = host_time.candidates(64, 1)["hf_lamb"]
        host_time.give_gradients(optimizer)
        optimizer.step()
    assert launched.count("_first_visit") == len(optimizer.param_groups) == 2


def test_moved_gradients_lie_elsewhere() -> None:
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True) for _ in range(20)])
    host_time.give_gradients(optimizer)
    before = [param.grad.data_ptr() for param in host_time.params_of(optimizer)]
    host_time.give_gradients(optimizer)
    after = [param.grad.data_ptr() for param in host_time.params_of(optimizer)]
    assert all(a != b for a, b in zip(before, after, strict=True))


def test_the_program_prints_and_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "host_time.jsonl"
    arguments = ["--hidden_size", "64", "--layers", "1", "--steps", "3", "--output", str(path)]
    monkeypatch.setattr(sys, "argv", ["host_time", *arguments])
    host_time.main()
    (record,) = map(json.loads, path.read_text().splitlines())
    assert (record["tensors"], record["groups"], record["rounds"]) == (26, 2, 3)
    for gradients in ("kept_gradients", "moved_gradients"):
        assert record[gradients][host_time.ADAMW]["ratio_of_minima"] == 1.0
        assert all(row["microseconds_min"] > 0 for row in record[gradients].values())
    assert "hf_lamb, max_grad_norm=1.0" in capsys.readouterr().out
