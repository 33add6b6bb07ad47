"""The fused backend for CUDA, in Triton: one launch a visit, however many tensors there are.

The first visit moves m and v and leaves the sums of every chunk; the second computes u again
from w, m and v, and moves w. A part is small enough for the second visit to find it in the L2 cache where it need not
wait for other processes. There are no atomics: sums are taken in one order, so that every run gives the same bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_lamb.backends.backend import Backend
from hf_lamb.backends.bucket import Bucket
from hf_lamb.backends.foreach import Foreach
from hf_lamb.norms import Sum

# Elements. A chunk is what a program works on, 8 in each of its 256 threads. w, m and v of a part, 12 bytes an element
# in float32, are half of the 50 MB of L2 of an H100: arithmetic, not a measurement.
CHUNK = 1 << 11
PART = 1 << 21
_WARPS = 8
_AT_ONCE = 1 << 10  # partial sums that a program adds up at once, tensors whose step it advances

_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# The columns of a table: where a tensor's w, g, m, v and step are, its elements, and the first of its chunks.
_W, _G, _M, _V, _T, _NUMEL, _FIRST = (tl.constexpr(column) for column in range(7))
_COLUMNS = tl.constexpr(7)


def check(device: torch.device) -> None:
    """Raise what keeps the kernels from running here, such as a compiler that is not there, or from being right.

    Right is what foreach makes of a step of two small tensors, in float32 and in bf16. Waits for the device.
    """
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        ours, theirs = _small_bucket(dtype, device), _small_bucket(dtype, device)
        pairs: tuple[tuple[Bucket, Backend], ...] = ((ours, Triton()), (theirs, Foreach()))
        for bucket, backend in pairs:
            sums, held = backend.direction(bucket)
            ratio = (sums[Sum.WEIGHT_SQ] / sums[Sum.UPDATE_SQ]).sqrt()
            backend.apply(bucket, held, torch.where(sums[Sum.NONZERO] > 0, ratio / 10, 0.0))
        for what in ("params", "exp_avgs", "exp_avg_sqs", "steps"):
            for a, b in zip(getattr(ours, what), getattr(theirs, what), strict=True):
                if not torch.allclose(a, b, rtol=tolerance, atol=tolerance):
                    raise RuntimeError(
                        f"a small {dtype} step gave other {what} than foreach's, by up to {(a - b).abs().max():.1e}: "
                        f"a fault of Triton {triton.__version__} on this device"
                    )


def _small_bucket(dtype: torch.dtype, device: torch.device) -> Bucket:
    """A whole chunk with a rest, and a tensor smaller than one."""
    generator = torch.Generator().manual_seed(0)
    group = {"betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01, "bias_correction": True, "maximize": False}
    group["layer_adaptation"] = True
    bucket = Bucket(group, finite=torch.tensor(True, device=device))
    for size in (CHUNK + 5, 7):
        w, g, m, root_v = torch.randn(4, size, generator=generator).to(device).unbind()
        bucket.params.append(w.to(dtype))
        bucket.grads.append(g.to(dtype))
        bucket.exp_avgs.append(m.clone())
        bucket.exp_avg_sqs.append(root_v.square() + 1)
        bucket.steps.append(torch.full((), 3.0, device=device))
    return bucket


@dataclass
class Table:
    """Where the tensors of a bucket are, on its device. Its parts share it."""

    pointers: list[int]
    sizes: list[int]
    first_chunks: list[int]  # of each tensor, and the number of all
    owners: Tensor  # the tensor that each chunk is of, int32
    rows: Tensor  # the columns above, int64
    spare: Tensor | None  # pinned memory like that of `rows`, for one capture
    aligned: bool  # 16 bytes can be read at once; a view may begin anywhere


def table_of(bucket: Bucket, known: Table | None) -> Table:
    """The table of a bucket: `known`, if its tensors are where they were; else one more copy to the device.

    Nothing waits for that copy: it leaves from pinned memory. A captured one is done again in every replay, so
    the memory that it leaves from, set aside in an earlier step because none can be pinned during a capture, is its
    own; the caller keeps the table for as long as the graph may be replayed.

    Raises:
        RuntimeError: during a capture, if no step before it had these tensors.
    """
    lists = (bucket.params, bucket.grads, bucket.exp_avgs, bucket.exp_avg_sqs, bucket.steps)
    pointers = [tensor.data_ptr() for tensors in lists for tensor in tensors]
    sizes = [param.numel() for param in bucket.params]
    same_sizes = known is not None and known.sizes == sizes
    on_gpu = bucket.device.type == "cuda"
    capturing = on_gpu and torch.cuda.is_current_stream_capturing()
    if known is not None and same_sizes and known.pointers == pointers:
        if known.spare is None and on_gpu and not capturing:
            known.spare = torch.empty(known.rows.shape, dtype=torch.int64, pin_memory=True)
        return known

    first_chunks = list(accumulate((-(-size // CHUNK) for size in sizes), initial=0))
    n = len(sizes)
    columns = [*(pointers[i * n : (i + 1) * n] for i in range(5)), sizes, first_chunks[:-1]]
    rows = torch.tensor(columns, dtype=torch.int64).t().contiguous()
    aligned = all(pointer % 16 == 0 for pointer in pointers[: 4 * n])
    if capturing:
        if known is None or not same_sizes or known.spare is None:
            raise RuntimeError(
                "Lamb: a CUDA graph is being captured, but no step of these parameters came before it: "
                "call step() once outside of each capture, as torch.cuda.graph's warm-up does"
            )
        known.spare.copy_(rows)
        on_device = known.spare.to(bucket.device, non_blocking=True)
        captured = Table(pointers, sizes, first_chunks, known.owners, on_device, known.spare, aligned)
        known.spare = None
        return captured
    if known is not None and same_sizes:
        owners = known.owners
    else:
        chunks = torch.tensor(first_chunks).diff()
        owners = _to(torch.repeat_interleave(torch.arange(n, dtype=torch.int32), chunks), bucket.device)
    spare = torch.empty(rows.shape, dtype=torch.int64, pin_memory=True) if on_gpu else None
    return Table(pointers, sizes, first_chunks, owners, _to(rows, bucket.device), spare, aligned)


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class Triton(Backend):
    """The kernels, and the tables of where their tensors are: one a bucket, kept from step to step."""

    def __init__(self) -> None:
        self._tables: dict[Any, Table] = {}  # by bucket
        self._now: dict[Any, Table] = {}  # those of this step
        self._in_graphs: list[Table] = []  # CUDA graphs read these when they are replayed

    def takes(self, bucket: Bucket) -> bool:
        """Whether the kernels do these dtypes, the tensors are contiguous, and the device is new enough."""
        return (
            bucket.contiguous
            and bucket.params[0].dtype in _DTYPES
            and bucket.grads[0].dtype in _DTYPES
            and (bucket.device.type != "cuda" or torch.cuda.get_device_capability(bucket.device) >= (8, 0))
        )

    def _up_to_date(self, bucket: Bucket) -> None:
        table = self._now[bucket.key] = table_of(bucket, self._tables.get(bucket.key))
        if bucket.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._in_graphs.append(table)
        else:
            self._tables[bucket.key] = table

    def direction(self, bucket: Bucket) -> tuple[Tensor, Tensor]:
        """t += 1, move m and v; return the sums and the bias corrections, with which `apply` computes u again."""
        self._up_to_date(bucket)
        group, n = bucket.group, len(bucket.params)
        beta1, beta2 = group["betas"]
        table, first_chunk, chunks = self._place(bucket)
        corrections = torch.empty(2, n, dtype=torch.float32, device=bucket.device)
        sums = torch.empty(len(Sum), n, dtype=torch.float32, device=bucket.device)
        of_chunks = torch.empty(len(Sum), chunks, dtype=torch.float32, device=bucket.device)

        log_beta1, log_beta2 = (math.log(beta) if beta > 0 else -math.inf for beta in (beta1, beta2))
        grid = -(-n // _AT_ONCE)
        constants: dict[str, Any] = {"BIAS_CORRECTION": bool(group["bias_correction"]), "BLOCK": _AT_ONCE}
        _launch(_advance, grid, bucket, table.rows, bucket.start, n, bucket.finite, corrections, log_beta1, log_beta2,
                **constants)  # fmt: skip
        if chunks:
            _launch(
                _first_visit,
                chunks,
                bucket,
                table.rows,
                table.owners,
                bucket.start,
                first_chunk,
                n,
                bucket.finite,
                bucket.clip_factor,
                corrections,
                of_chunks,
                float(beta1),
                float(1 - beta1),
                float(beta2),
                float(1 - beta2),
                float(group["eps"]),
                float(group["weight_decay"]),
                MAXIMIZE=bool(group["maximize"]),
                W=_DTYPES[bucket.params[0].dtype],
                G=_DTYPES[bucket.grads[0].dtype],
                ALIGNED=table.aligned,
                CHUNK=CHUNK,
            )
        _launch(
            _sum, n, bucket, table.rows, bucket.start, first_chunk, n, chunks, of_chunks, sums, CHUNK, BLOCK=_AT_ONCE
        )
        return sums, corrections

    def apply(self, bucket: Bucket, held: Tensor, step_sizes: Tensor) -> None:
        """w -= step_size * u, from the last chunk, which is still in the cache, to the first."""
        table, first_chunk, chunks = self._place(bucket)
        if chunks:
            _launch(
                _second_visit,
                chunks,
                bucket,
                table.rows,
                table.owners,
                bucket.start,
                first_chunk,
                len(bucket.params),
                chunks,
                bucket.finite,
                held,
                step_sizes,
                float(bucket.group["eps"]),
                float(bucket.group["weight_decay"]),
                W=_DTYPES[bucket.params[0].dtype],
                ALIGNED=table.aligned,
                CHUNK=CHUNK,
            )

    def _place(self, bucket: Bucket) -> tuple[Table, int, int]:
        """The table; and of all chunks in it, the first of this part, and how many the part has."""
        table = self._now[bucket.key]
        first = table.first_chunks[bucket.start]
        return table, first, table.first_chunks[bucket.start + len(bucket.params)] - first


def _launch(kernel: Any, programs: int, bucket: Bucket, *arguments: Any, **constants: Any) -> None:
    with torch.cuda.device_of(bucket.params[0]):
        kernel[(programs,)](*arguments, num_warps=_WARPS, **constants)


# -- kernels ---------------------------------------------------------------------------------------------------------
# Numbers that differ between parts and steps are not specialised on: that would compile a kernel for each.


@triton.jit(do_not_specialize=["rows", "start", "n", "finite", "corrections"])
def _advance(
    rows, start, n, finite, corrections, log_beta1, log_beta2, BIAS_CORRECTION: tl.constexpr, BLOCK: tl.constexpr
):
    """t += 1 except where this step is skipped; 1 / (1 - beta1**t), 1 / (1 - beta2**t)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    steps = tl.load(rows + (start + i) * _COLUMNS + _T, mask=i < n, other=0).to(tl.pointer_type(tl.float32))
    t = tl.load(steps, mask=i < n, other=1.0)
    if finite is None:
        t += 1.0
    else:
        t += tl.load(finite).to(tl.float32)
    tl.store(steps, t, mask=i < n)
    # A parameter whose first step is skipped still has t = 0. float64, because 1 - beta**t cancels.
    t = tl.maximum(t, 1.0).to(tl.float64)
    if BIAS_CORRECTION:
        one = tl.full((BLOCK,), 1.0, tl.float64)
        inverse1 = one / (one - tl.exp(t * log_beta1))
        inverse2 = one / (one - tl.exp(t * log_beta2))
    else:
        inverse1 = tl.full((BLOCK,), 1.0, tl.float64)
        inverse2 = inverse1
    tl.store(corrections + i, inverse1.to(tl.float32), mask=i < n)
    tl.store(corrections + n + i, inverse2.to(tl.float32), mask=i < n)


@triton.jit
def _where(row, column, begin, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Where a chunk of a tensor begins. 64 bits: a tensor may have more than 2**31 elements."""
    pointer = tl.load(row + column).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + begin


@triton.jit
def _load(pointer, offsets, size, WHOLE: tl.constexpr):
    """As float32. Without a mask where the chunk is whole, for a mask keeps loads from being wide."""
    if WHOLE:  # noqa: SIM108
        x = tl.load(pointer + offsets)
    else:
        x = tl.load(pointer + offsets, mask=offsets < size, other=0.0)
    return x.to(tl.float32)


@triton.jit
def _store(pointer, offsets, size, x, WHOLE: tl.constexpr):
    if WHOLE:
        tl.store(pointer + offsets, x)
    else:
        tl.store(pointer + offsets, x, mask=offsets < size)


@triton.jit
def _u(w, m, v, inverse1, inverse2, eps, weight_decay):
    return tl.div_rn(m * inverse1, tl.sqrt_rn(v * inverse2) + eps) + weight_decay * w


@triton.jit
def _move(
    w_at, g_at, m_at, v_at, size, keep, factor, inverse1, inverse2, beta1, rest1, beta2, rest2, eps, weight_decay,
    CHUNK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Move m and v of a chunk; its sums of squares of w and u, and 1 if g or m holds anything but zeros, else 0."""
    offsets = tl.arange(0, CHUNK)
    w = _load(w_at, offsets, size, WHOLE)
    given = _load(g_at, offsets, size, WHOLE)
    g = given * factor
    m = _load(m_at, offsets, size, WHOLE)
    v = _load(v_at, offsets, size, WHOLE)
    if keep:  # this step is skipped
        g = tl.zeros_like(g)
    else:
        m = beta1 * m + rest1 * g
        v = beta2 * v + rest2 * g * g
        _store(m_at, offsets, size, m, WHOLE)
        _store(v_at, offsets, size, v, WHOLE)
    u = _u(w, m, v, inverse1, inverse2, eps, weight_decay)
    if not WHOLE:
        u = tl.where(offsets < size, u, 0.0)  # eps may be 0, and 0 / 0 no number
    nonzero = tl.max(tl.where((given != 0) | (m != 0), 1.0, 0.0))
    return tl.sum(w * w), tl.sum(u * u), nonzero


@triton.jit(
    do_not_specialize=["rows", "owners", "start", "first", "n", "finite", "clip_factor", "corrections", "of_chunks"]
)
def _first_visit(
    rows, owners, start, first, n, finite, clip_factor, corrections, of_chunks,
    beta1, rest1, beta2, rest2, eps, weight_decay,
    MAXIMIZE: tl.constexpr, W: tl.constexpr, G: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    owner = tl.load(owners + first + program)
    row = rows + owner.to(tl.int64) * _COLUMNS
    begin = (first + program - tl.load(row + _FIRST)) * CHUNK
    size = tl.load(row + _NUMEL) - begin
    w_at = _where(row, _W, begin, W, ALIGNED)
    g_at = _where(row, _G, begin, G, ALIGNED)
    m_at = _where(row, _M, begin, tl.float32, ALIGNED)
    v_at = _where(row, _V, begin, tl.float32, ALIGNED)
    inverse1 = tl.load(corrections + owner - start)
    inverse2 = tl.load(corrections + n + owner - start)
    keep = False
    if finite is not None:
        keep = tl.load(finite) == 0
    factor = 1.0
    if clip_factor is not None:
        factor = tl.load(clip_factor)
    if MAXIMIZE:
        factor = -factor
    if size >= CHUNK:
        w_sq, u_sq, nonzero = _move(w_at, g_at, m_at, v_at, size, keep, factor, inverse1, inverse2, beta1, rest1,
                                    beta2, rest2, eps, weight_decay, CHUNK, True)  # fmt: skip
    else:
        w_sq, u_sq, nonzero = _move(w_at, g_at, m_at, v_at, size, keep, factor, inverse1, inverse2, beta1, rest1,
                                    beta2, rest2, eps, weight_decay, CHUNK, False)  # fmt: skip
    at = of_chunks + program
    tl.store(at, w_sq)
    tl.store(at + tl.num_programs(0), u_sq)
    tl.store(at + 2 * tl.num_programs(0), nonzero)


@triton.jit(do_not_specialize=["rows", "start", "first", "n", "chunks", "of_chunks", "sums", "size_of_chunk"])
def _sum(rows, start, first, n, chunks, of_chunks, sums, size_of_chunk, BLOCK: tl.constexpr):
    """The sums of a tensor from those of its chunks."""
    i = tl.program_id(0)
    row = rows + (start + i).to(tl.int64) * _COLUMNS
    begin = (tl.load(row + _FIRST) - first).to(tl.int32)
    many = ((tl.load(row + _NUMEL) + size_of_chunk - 1) // size_of_chunk).to(tl.int32)
    w_sq = tl.zeros((BLOCK,), tl.float32)
    u_sq = tl.zeros((BLOCK,), tl.float32)
    nonzero = tl.zeros((BLOCK,), tl.float32)
    for done in range(0, many, BLOCK):
        chunk = done + tl.arange(0, BLOCK)
        at = of_chunks + begin + chunk
        w_sq += tl.load(at, mask=chunk < many, other=0.0)
        u_sq += tl.load(at + chunks, mask=chunk < many, other=0.0)
        nonzero += tl.load(at + 2 * chunks, mask=chunk < many, other=0.0)
    tl.store(sums + i, tl.sum(w_sq))
    tl.store(sums + n + i, tl.sum(u_sq))
    tl.store(sums + 2 * n + i, tl.sum(nonzero))


@triton.jit
def _descend(
    w_at, m_at, v_at, size, step_size, inverse1, inverse2, eps, weight_decay, CHUNK: tl.constexpr, WHOLE: tl.constexpr
):
    offsets = tl.arange(0, CHUNK)
    w = _load(w_at, offsets, size, WHOLE)
    m = _load(m_at, offsets, size, WHOLE)
    v = _load(v_at, offsets, size, WHOLE)
    w -= step_size * _u(w, m, v, inverse1, inverse2, eps, weight_decay)
    _store(w_at, offsets, size, w.to(w_at.dtype.element_ty), WHOLE)


@triton.jit(
    do_not_specialize=["rows", "owners", "start", "first", "n", "chunks", "finite", "corrections", "step_sizes"]
)
def _second_visit(
    rows, owners, start, first, n, chunks, finite, corrections, step_sizes, eps, weight_decay,
    W: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    if finite is not None and tl.load(finite) == 0:
        return
    chunk = first + chunks - 1 - tl.program_id(0)
    owner = tl.load(owners + chunk)
    row = rows + owner.to(tl.int64) * _COLUMNS
    begin = (chunk - tl.load(row + _FIRST)) * CHUNK
    size = tl.load(row + _NUMEL) - begin
    w_at = _where(row, _W, begin, W, ALIGNED)
    m_at = _where(row, _M, begin, tl.float32, ALIGNED)
    v_at = _where(row, _V, begin, tl.float32, ALIGNED)
    inverse1 = tl.load(corrections + owner - start)
    inverse2 = tl.load(corrections + n + owner - start)
    step_size = tl.load(step_sizes + owner - start)
    if step_size == 0:  # eps may be 0, and u no number
        return
    if size >= CHUNK:
        _descend(w_at, m_at, v_at, size, step_size, inverse1, inverse2, eps, weight_decay, CHUNK, True)
    else:
        _descend(w_at, m_at, v_at, size, step_size, inverse1, inverse2, eps, weight_decay, CHUNK, False)
