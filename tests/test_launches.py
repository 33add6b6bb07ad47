"""Protects what a step launches on CUDA, counted without a GPU: kernels of the Triton backend and torch operations.

The kernels are replaced by nothing, so that only the host's part of the step runs. Counted are all operations that
launch a kernel or a copy: all but views and those that only set memory aside. Where gradients have moved, the step
makes a table of addresses anew; its transposed copy on the host, which only a CPU's tensors need, stands in the count
for the copy to the device.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_lamb import Lamb

pytest.importorskip("triton", minversion="3.7", reason="needs Triton 3.7 (Linux on x86-64)")

from benchmarks.host_time import give_gradients, groups_of, without_kernels

MOST = 24  # of one or two buckets; AdamW(fused) has about 10
MOST_OF_A_BUCKET = 5  # one look at the gradients, four for the two visits
MOST_SHARDED = 32  # of two buckets; torch's operations pack their sums, two for each and one for both
WAYS = {
    "plain": {"skip_nonfinite": False},
    "clipped": {"skip_nonfinite": False, "max_grad_norm": 1.0},
    "skipping": {},
    "clipped and skipping": {"max_grad_norm": 1.0},
}
SET_ASIDE = {"aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty", "aten::detach"}


class Operations(TorchDispatchMode):
    """Counts what launches something."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name.split("::")[0] in ("aten", "c10d", "_c10d_functional") and not func.is_view and name not in SET_ASIDE:
            self.counts[name] += 1
        return func(*args, **kwargs or {})


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A function that makes two steps, and returns what the second one launches, by name."""
    from hf_lamb.backends import triton

    def launched_by(optimizer: Lamb, moved: bool = False) -> Counter[str]:
        kernels: Counter[str] = Counter()

        def launch(kernel: Any, *_: Any, **__: Any) -> None:
            kernels[kernel.fn.__name__] += 1

        monkeypatch.setattr(triton, "_launch", launch)
        give_gradients(optimizer)
        optimizer.step()
        if moved:
            give_gradients(optimizer)
        kernels.clear()
        with Operations() as operations:
            optimizer.step()
        return kernels + operations.counts

    with without_kernels():
        yield launched_by


@pytest.mark.parametrize("moved", [False, True], ids=["gradients kept", "gradients moved"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layers", [1, 24])
def test_a_step_of_bert(step: Any, layers: int, way: str, moved: bool) -> None:
    """Two buckets: matrices, and what neither decays nor adapts. As many launches for 26 tensors as for 394."""
    counts = step(Lamb(groups_of(64, layers), **WAYS[way]), moved)
    assert 0 < counts.total() <= MOST, counts


def test_the_count_sees_kernels_and_operations(step: Any) -> None:
    """And neither views nor empty tensors: otherwise the bounds here mean something else."""
    counts = step(Lamb([nn.Parameter(torch.ones(1))], max_grad_norm=1.0))
    assert counts["_first_visit"] == 1
    assert counts["aten::lt"] >= 1
    assert not {"aten::unbind", "aten::empty", "aten::view"} & counts.keys()
    with Operations() as operations:
        torch.empty(3).view(3).add_(torch.ones(3)).t().contiguous().clone()
    assert operations.counts == {"aten::ones": 1, "aten::add_": 1, "aten::clone": 1}


@pytest.mark.parametrize("way", WAYS)
def test_mixed_dtypes(step: Any, way: str) -> None:
    """A bucket for each pair of dtypes, and no more operations of torch than for two."""
    dtypes = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]
    params = []
    for dtype, grad_dtype in dtypes * 50:
        params.append(nn.Parameter(torch.ones(1, dtype=dtype)))
        params[-1].grad_dtype = grad_dtype
    counts = step(Lamb(params, **WAYS[way]))
    assert counts["_first_visit"] == len(dtypes)
    assert counts.total() <= MOST + MOST_OF_A_BUCKET * (len(dtypes) - 2), counts


@pytest.fixture
def two_processes() -> Iterator[Any]:
    """A mesh of two, of which one is here: what it sends is lost."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        yield init_device_mesh("cpu", (2,))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layers", [1, 24])
def test_a_sharded_step(step: Any, two_processes: Any, layers: int, way: str) -> None:
    """As FSDP2 shards: rows of every tensor on each process. One all-reduce, and one for the look at the gradients."""
    from torch.distributed.tensor import Shard, distribute_tensor

    groups = groups_of(64, layers)
    for group in groups:
        group["params"] = [
            nn.Parameter(distribute_tensor(torch.ones(2), two_processes, [Shard(0)])) for _ in group["params"]
        ]
    counts = step(Lamb(groups, **WAYS[way]))
    assert counts["c10d::allreduce_"] == (1 if way == "plain" else 2)
    assert counts.total() <= MOST_SHARDED, counts
