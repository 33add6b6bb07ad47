"""The fused backend for CPUs with a C compiler: `lamb.c`, in as many threads as torch uses."""

from __future__ import annotations

import ctypes
import functools
import math
import os
from array import array
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from hf_lamb.backends.backend import Backend
from hf_lamb.backends.bucket import Bucket
from hf_lamb.backends.compiler import library
from hf_lamb.norms import Sum

# As in lamb.c.
CHUNK = 1 << 14
SQUARE_GRADIENTS, FIRST_VISIT, SECOND_VISIT, UPDATE = range(4)
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# Elements. The second visit of a part should find its w, m and v, 12 bytes per element, in the cache. Best of 2^16 to
# 2^20 with 1 MB of L2 and 32 MB of L3 on BERT-base in float32, all within a tenth. To keep u of a part for the second
# visit, in memory of its own, was no faster than to compute it again.
PART = 1 << 18
# One more thread for each so many chunks.
CHUNKS_PER_THREAD = 4

# Of all memory that lamb.c reads and writes, whatever torch's default dtype and device are.
FLOATS: Any = {"dtype": torch.float32, "device": "cpu"}
INTEGERS: Any = {"dtype": torch.int64, "device": "cpu"}

_POINTERS = (
    "table", "first_tensor", "progress", "of_chunks", "sums", "inverses", "step_sizes", "growths", "finite",
    "clip_factor", "lr",
)  # fmt: skip
_NUMBERS = ("beta1", "beta2", "eps", "weight_decay", "min_ratio", "max_ratio")
_FLAGS = ("task", "w_type", "g_type", "maximize", "bias_correction", "adapts", "fixes_norms")


class _Bucket(ctypes.Structure):
    """`Bucket` of lamb.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("tensors", "parts")),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_double) for name in _NUMBERS),
        *((name, ctypes.c_int32) for name in _FLAGS),
    ]


@dataclass
class Table:
    """The addresses of a bucket's tensors, and memory for the results of the visits."""

    bucket: Bucket  # the table was made for this one
    grads: list[Tensor]  # and has the addresses of these: every step has a list of its own
    rows: Tensor  # [n, 7], int64: addresses of w, g, m, v and step; elements; first chunk
    first_tensor: Tensor  # [parts + 1], int64, of each part
    chunks: int
    of_chunks: Tensor  # [chunks, k]
    inverses: Tensor  # [2, n]: 1 / (1 - beta**t)
    moves: Tensor  # [2, n]: step sizes and growths


class Compiled(Backend):
    """One call of the library a visit, and one for both where layers are whole; keeps a table for each bucket."""

    def __init__(self) -> None:
        self._tables: dict[Any, Table] = {}

    def takes(self, bucket: Bucket) -> bool:
        """Return whether the library is compiled and takes these dtypes, and the tensors are contiguous."""
        w, g = bucket.params[0].dtype, bucket.grads[0].dtype
        return bucket.contiguous and w in TYPES and g in TYPES and library() is not None

    def squared_gradients(self, bucket: Bucket) -> Tensor:
        """Return the squared norm of each gradient, shape [n]."""
        return self._run(bucket, SQUARE_GRADIENTS)[0]

    def direction(self, bucket: Bucket) -> tuple[Tensor, None]:
        """Add 1 to t, update m and v; return the sums."""
        return self._run(bucket, FIRST_VISIT), None

    def apply(self, bucket: Bucket, held: None, step_sizes: Tensor, growths: Tensor | None) -> None:
        """Compute u again, and w += growth * w - step_size * u."""
        moves = self._tables[bucket.key].moves
        moves[0] = step_sizes
        moves[1] = 0 if growths is None else growths
        self._run(bucket, SECOND_VISIT)
        increment_version(bucket.params)

    def update(self, bucket: Bucket) -> Tensor:
        """Do both visits, part by part: the second one finds small parts in the cache."""
        sums = self._run(bucket, UPDATE)
        increment_version(bucket.params)
        return sums

    def _run(self, bucket: Bucket, task: int) -> Tensor:
        """Do one task of lamb.c with all threads; return the sums, or zeros if the task computes none."""
        table, group = self._table(bucket), bucket.group
        sums = torch.zeros(len(Sum), len(bucket.params), **FLOATS)
        progress = torch.zeros(table.first_tensor.numel() - 1, 4, **INTEGERS)
        lr = torch.as_tensor(group["lr"], dtype=torch.float64, device="cpu")
        lowest, highest = group["min_trust_ratio"], group["max_trust_ratio"]
        finite, clip_factor = bucket.finite, bucket.clip_factor
        arguments = _Bucket(
            tensors=len(bucket.params),
            parts=len(progress),
            table=table.rows.data_ptr(),
            first_tensor=table.first_tensor.data_ptr(),
            progress=progress.data_ptr(),
            of_chunks=table.of_chunks.data_ptr(),
            sums=sums.data_ptr(),
            inverses=table.inverses.data_ptr(),
            step_sizes=table.moves[0].data_ptr(),
            growths=table.moves[1].data_ptr(),
            finite=None if finite is None else finite.data_ptr(),
            clip_factor=None if clip_factor is None else clip_factor.data_ptr(),
            lr=lr.data_ptr(),
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            min_ratio=0.0 if lowest is None else lowest,
            max_ratio=math.inf if highest is None else highest,
            task=task,
            w_type=TYPES[bucket.params[0].dtype],
            g_type=TYPES[bucket.grads[0].dtype],
            maximize=bool(group["maximize"]),  # NumPy's are taken too
            bias_correction=bool(group["bias_correction"]),
            adapts=bool(group["layer_adaptation"]),
            fixes_norms=bucket.fixes_norms,
        )
        kernel: Any = library()
        here = ctypes.byref(arguments)
        if task in (FIRST_VISIT, UPDATE):
            kernel.lamb_begin(here)
        others = max(min(torch.get_num_threads(), table.chunks // CHUNKS_PER_THREAD) - 1, 0)
        running = [_pool(os.getpid()).submit(kernel.lamb_run, here) for _ in range(others)]
        try:
            kernel.lamb_run(here)
        finally:
            wait(running)
        return sums

    def _table(self, bucket: Bucket) -> Table:
        """Return the bucket's table. If the bucket is that of the last step, only the gradients have moved."""
        known = self._tables.get(bucket.key)
        if known is not None and known.bucket is bucket:
            if known.grads is not bucket.grads:
                known.rows[:, 1] = torch.frombuffer(array("q", map(Tensor.data_ptr, bucket.grads)), dtype=torch.int64)
                known.grads = bucket.grads
            return known
        lists = (bucket.params, bucket.grads, bucket.exp_avgs, bucket.exp_avg_sqs, bucket.steps)
        sizes = [param.numel() for param in bucket.params]
        *first_chunks, total = accumulate((-(-size // CHUNK) for size in sizes), initial=0)
        starts = [*accumulate((len(part.params) for part in bucket.parts(PART)), initial=0)]
        columns = [*([tensor.data_ptr() for tensor in tensors] for tensors in lists), sizes, first_chunks]
        n = len(sizes)
        table = Table(
            bucket,
            bucket.grads,
            rows=torch.tensor(columns, **INTEGERS).t().contiguous(),
            first_tensor=torch.tensor(starts, **INTEGERS),
            chunks=total,
            of_chunks=torch.empty(total, len(Sum), **FLOATS),
            inverses=torch.empty(2, n, **FLOATS),
            moves=torch.zeros(2, n, **FLOATS),
        )
        self._tables[bucket.key] = table
        return table


@functools.lru_cache(maxsize=1)
def _pool(process: int) -> ThreadPoolExecutor:
    """Return the threads of this process; a forked process does not have its parent's threads."""
    return ThreadPoolExecutor(max_workers=os.cpu_count() or 1, thread_name_prefix="hf_lamb")
