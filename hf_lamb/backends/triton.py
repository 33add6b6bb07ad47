"""The fused backend for CUDA, in Triton: one launch a visit, however many tensors there are.

The first visit moves m and v and leaves the sums of every chunk. One more launch adds them up and makes the step
sizes. The second visit computes u again from w, m and v, and moves w. There are no atomics: sums are taken in one
order, so that every run gives the same bits.
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
from torch.autograd.graph import increment_version

from hf_lamb.backends.backend import Backend
from hf_lamb.backends.bucket import Bucket
from hf_lamb.backends.foreach import Foreach
from hf_lamb.norms import Sum

CHUNK = 1 << 11  # elements that a program works on, 8 in each of its 256 threads
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
            bucket.clip_factor = backend.squared_gradients(bucket).sum().rsqrt()
            backend.update(bucket)
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
    group = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.01, "bias_correction": True}
    group |= {"layer_adaptation": True, "min_trust_ratio": None, "max_trust_ratio": None, "fixed_norm": False}
    group |= {"maximize": False}
    bucket = Bucket(group, finite=torch.tensor(True, device=device))
    for size in (CHUNK + 5, 7):
        numbers = torch.randn(4, size, generator=generator, dtype=torch.float32, device="cpu")
        w, g, m, root_v = numbers.to(device).unbind()
        bucket.params.append(w.to(dtype))
        bucket.grads.append(g.to(dtype))
        bucket.exp_avgs.append(m.clone())
        bucket.exp_avg_sqs.append(root_v.square() + 1)
        bucket.steps.append(torch.full((), 3.0, dtype=torch.float32, device=device))
    return bucket


@dataclass
class Table:
    """Where the tensors of a bucket are, on its device."""

    pointers: list[int]
    sizes: list[int]
    chunks: int
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
            known.spare = torch.empty(known.rows.shape, dtype=torch.int64, device="cpu", pin_memory=True)
        return known

    first_chunks = [*accumulate((-(-size // CHUNK) for size in sizes), initial=0)]
    chunks, n = first_chunks.pop(), len(sizes)
    columns = [*(pointers[i * n : (i + 1) * n] for i in range(5)), sizes, first_chunks]
    rows = torch.tensor(columns, dtype=torch.int64, device="cpu").t().contiguous()
    aligned = all(pointer % 16 == 0 for pointer in pointers[: 4 * n])
    if capturing:
        if known is None or not same_sizes or known.spare is None:
            raise RuntimeError(
                "Lamb: a CUDA graph is being captured, but no step of these parameters came before it: "
                "call step() once outside of each capture, as torch.cuda.graph's warm-up does"
            )
        known.spare.copy_(rows)
        on_device = known.spare.to(bucket.device, non_blocking=True)
        captured = Table(pointers, sizes, chunks, known.owners, on_device, known.spare, aligned)
        known.spare = None
        return captured
    if known is not None and same_sizes:
        owners = known.owners
    else:
        of_tensors = torch.tensor([-(-size // CHUNK) for size in sizes], device="cpu")
        numbers = torch.arange(n, dtype=torch.int32, device="cpu")
        owners = _to(torch.repeat_interleave(numbers, of_tensors), bucket.device)
    spare = torch.empty(rows.shape, dtype=torch.int64, device="cpu", pin_memory=True) if on_gpu else None
    return Table(pointers, sizes, chunks, owners, _to(rows, bucket.device), spare, aligned)


def _to(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class Triton(Backend):
    """The kernels, and the tables of where their tensors are: one a bucket, kept from step to step."""

    def __init__(self) -> None:
        self._tables: dict[Any, Table] = {}  # by bucket
        self._now: dict[Any, tuple[list[Tensor], Table]] = {}  # those of this step, which its list of gradients tells
        self._in_graphs: list[Table] = []  # CUDA graphs read these when they are replayed

    def takes(self, bucket: Bucket) -> bool:
        """Whether the kernels do these dtypes, the tensors are contiguous, and the device is new enough."""
        return (
            bucket.contiguous
            and bucket.params[0].dtype in _DTYPES
            and bucket.grads[0].dtype in _DTYPES
            and (bucket.device.type != "cuda" or torch.cuda.get_device_capability(bucket.device) >= (8, 0))
        )

    def squared_gradients(self, bucket: Bucket) -> Tensor:
        """The squared norm of each chunk of a gradient, shape [chunks]."""
        table = self._table(bucket)
        of_chunks = torch.empty(table.chunks, dtype=torch.float32, device=bucket.device)
        if table.chunks:
            types = {"G": _DTYPES[bucket.grads[0].dtype], "ALIGNED": table.aligned, "CHUNK": CHUNK}
            _launch(_square_gradients, table.chunks, bucket, table.rows, table.owners, of_chunks, **types)
        return of_chunks

    def direction(self, bucket: Bucket) -> tuple[Tensor, Tensor]:
        """t += 1, move m and v; return the sums and the bias corrections, with which `apply` computes u again."""
        sums, corrections, _ = self._first(bucket)
        return sums, corrections

    def apply(self, bucket: Bucket, held: Tensor, step_sizes: Tensor, growths: Tensor | None) -> None:
        """w += growth * w - step_size * u, from the last chunk, which may still be in the cache, to the first."""
        table = self._table(bucket)
        if table.chunks:
            _launch(
                _second_visit,
                table.chunks,
                bucket,
                table.rows,
                table.owners,
                len(bucket.params),
                bucket.finite,
                held,
                step_sizes,
                growths,
                float(bucket.group["eps"]),
                float(bucket.group["weight_decay"]),
                W=_DTYPES[bucket.params[0].dtype],
                ALIGNED=table.aligned,
                CHUNK=CHUNK,
            )
            increment_version(bucket.params)

    def step_sizes(self, bucket: Bucket, sums: Tensor) -> tuple[Tensor, Tensor | None]:
        """Step sizes and growths from sums over all processes, in one kernel."""
        n = len(bucket.params)
        moves = torch.empty(2, n, dtype=torch.float32, device=bucket.device)
        _launch(
            _moves_of_sums, -(-n // _AT_ONCE), bucket, n, sums, moves, *_rate(bucket), BLOCK=_AT_ONCE, **_kind(bucket)
        )
        return moves[0], moves[1] if bucket.fixes_norms else None

    def update(self, bucket: Bucket) -> Tensor:
        """Both visits, with the step sizes from a kernel."""
        sums, corrections, (step_sizes, growths) = self._first(bucket)
        self.apply(bucket, corrections, step_sizes, growths if bucket.fixes_norms else None)
        return sums

    def _table(self, bucket: Bucket) -> Table:
        """Return this step's table: a capture can make only one."""
        if bucket.key in self._now and self._now[bucket.key][0] is bucket.grads:
            return self._now[bucket.key][1]
        table = table_of(bucket, self._tables.get(bucket.key))
        self._now[bucket.key] = bucket.grads, table
        if bucket.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            self._in_graphs.append(table)
        else:
            self._tables[bucket.key] = table
        return table

    def _first(self, bucket: Bucket) -> tuple[Tensor, Tensor, Tensor]:
        """The first visit; sums [k, n], bias corrections [2, n], and of whole layers step sizes and growths [2, n]."""
        table, group, n = self._table(bucket), bucket.group, len(bucket.params)
        beta1, beta2 = group["betas"]
        corrections = torch.empty(2, n, dtype=torch.float32, device=bucket.device)
        sums = torch.empty(len(Sum), n, dtype=torch.float32, device=bucket.device)
        moves = torch.empty(2, n, dtype=torch.float32, device=bucket.device)
        of_chunks = torch.empty(len(Sum), table.chunks, dtype=torch.float32, device=bucket.device)

        log_beta1, log_beta2 = (math.log(beta) if beta > 0 else -math.inf for beta in (beta1, beta2))
        constants: dict[str, Any] = {"BIAS_CORRECTION": bool(group["bias_correction"]), "BLOCK": _AT_ONCE}
        _launch(_advance, -(-n // _AT_ONCE), bucket, table.rows, n, bucket.finite, corrections, log_beta1, log_beta2,
                **constants)  # fmt: skip
        if table.chunks:
            _launch(
                _first_visit,
                table.chunks,
                bucket,
                table.rows,
                table.owners,
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
                FIXES_NORMS=bucket.fixes_norms,
                ALIGNED=table.aligned,
                CHUNK=CHUNK,
            )
        _launch(
            _finish,
            n,
            bucket,
            table.rows,
            n,
            table.chunks,
            of_chunks,
            sums,
            moves,
            CHUNK,
            *_rate(bucket),
            BLOCK=_AT_ONCE,
            **_kind(bucket),
        )
        return sums, corrections, moves


def _rate(bucket: Bucket) -> tuple[Any, ...]:
    """The arguments of `_move`: finite, lr on the host or on the device, and the bounds of the trust ratio."""
    lr, lowest, highest = (bucket.group[option] for option in ("lr", "min_trust_ratio", "max_trust_ratio"))
    on_device = lr.to(bucket.device, torch.float32) if isinstance(lr, Tensor) and lr.device.type != "cpu" else None
    bounds = 0.0 if lowest is None else float(lowest), math.inf if highest is None else float(highest)
    return bucket.finite, float(lr) if on_device is None else 0.0, on_device, *bounds


def _kind(bucket: Bucket) -> dict[str, bool]:
    """The constants of `_move`."""
    return {"ADAPTS": bool(bucket.group["layer_adaptation"]), "FIXES_NORMS": bucket.fixes_norms}


def _launch(kernel: Any, programs: int, bucket: Bucket, *arguments: Any, **constants: Any) -> None:
    with torch.cuda.device_of(bucket.params[0]):
        kernel[(programs,)](*arguments, num_warps=_WARPS, **constants)


# -- kernels ---------------------------------------------------------------------------------------------------------
# Numbers that differ between buckets and steps are not specialised on: that would compile a kernel for each.


@triton.jit(do_not_specialize=["rows", "n", "finite", "corrections"])
def _advance(rows, n, finite, corrections, log_beta1, log_beta2, BIAS_CORRECTION: tl.constexpr, BLOCK: tl.constexpr):
    """t += 1 except where this step is skipped; 1 / (1 - beta1**t), 1 / (1 - beta2**t)."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    steps = tl.load(rows + i * _COLUMNS + _T, mask=i < n, other=0).to(tl.pointer_type(tl.float32))
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
def _update_moments(
    w_at, g_at, m_at, v_at, size, skip, factor, inverse1, inverse2, beta1, one_minus_beta1, beta2, one_minus_beta2,
    eps, weight_decay, FIXES_NORMS: tl.constexpr, CHUNK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Move m and v of a chunk; its sums ‖w‖², ‖u‖², 1 if g or m holds anything but zeros, else 0, and ⟨w, u⟩."""
    offsets = tl.arange(0, CHUNK)
    w = _load(w_at, offsets, size, WHOLE)
    given = _load(g_at, offsets, size, WHOLE)
    g = given * factor
    m = _load(m_at, offsets, size, WHOLE)
    v = _load(v_at, offsets, size, WHOLE)
    if skip:
        g = tl.zeros_like(g)
    else:
        m = beta1 * m + one_minus_beta1 * g
        v = beta2 * v + one_minus_beta2 * g * g
        _store(m_at, offsets, size, m, WHOLE)
        _store(v_at, offsets, size, v, WHOLE)
    u = _u(w, m, v, inverse1, inverse2, eps, weight_decay)
    if not WHOLE:
        u = tl.where(offsets < size, u, 0.0)  # eps may be 0, and 0 / 0 no number
    nonzero = tl.max(tl.where((given != 0) | (m != 0), 1.0, 0.0))
    dot = 0.0
    if FIXES_NORMS:
        dot = tl.sum(w * u)
    return tl.sum(w * w), tl.sum(u * u), nonzero, dot


@triton.jit(do_not_specialize=["rows", "owners", "of_chunks"])
def _square_gradients(rows, owners, of_chunks, G: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr):
    program = tl.program_id(0)
    row = rows + tl.load(owners + program).to(tl.int64) * _COLUMNS
    begin = (program - tl.load(row + _FIRST)) * CHUNK
    size = tl.load(row + _NUMEL) - begin
    g_at = _where(row, _G, begin, G, ALIGNED)
    offsets = tl.arange(0, CHUNK)
    if size >= CHUNK:  # noqa: SIM108
        g = _load(g_at, offsets, size, True)
    else:
        g = _load(g_at, offsets, size, False)
    tl.store(of_chunks + program, tl.sum(g * g))


@triton.jit(do_not_specialize=["rows", "owners", "n", "finite", "clip_factor", "corrections", "of_chunks"])
def _first_visit(
    rows, owners, n, finite, clip_factor, corrections, of_chunks,
    beta1, one_minus_beta1, beta2, one_minus_beta2, eps, weight_decay,
    MAXIMIZE: tl.constexpr, W: tl.constexpr, G: tl.constexpr, FIXES_NORMS: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    owner = tl.load(owners + program)
    row = rows + owner.to(tl.int64) * _COLUMNS
    begin = (program - tl.load(row + _FIRST)) * CHUNK
    size = tl.load(row + _NUMEL) - begin
    w_at = _where(row, _W, begin, W, ALIGNED)
    g_at = _where(row, _G, begin, G, ALIGNED)
    m_at = _where(row, _M, begin, tl.float32, ALIGNED)
    v_at = _where(row, _V, begin, tl.float32, ALIGNED)
    inverse1 = tl.load(corrections + owner)
    inverse2 = tl.load(corrections + n + owner)
    skip = False
    if finite is not None:
        skip = tl.load(finite) == 0
    factor = 1.0
    if clip_factor is not None:
        factor = tl.load(clip_factor)
    if MAXIMIZE:
        factor = -factor
    if size >= CHUNK:
        w_sq, u_sq, nonzero, dot = _update_moments(
            w_at, g_at, m_at, v_at, size, skip, factor, inverse1, inverse2, beta1, one_minus_beta1, beta2,
            one_minus_beta2, eps, weight_decay, FIXES_NORMS, CHUNK, True)  # fmt: skip
    else:
        w_sq, u_sq, nonzero, dot = _update_moments(
            w_at, g_at, m_at, v_at, size, skip, factor, inverse1, inverse2, beta1, one_minus_beta1, beta2,
            one_minus_beta2, eps, weight_decay, FIXES_NORMS, CHUNK, False)  # fmt: skip
    at = of_chunks + program
    tl.store(at, w_sq)
    tl.store(at + tl.num_programs(0), u_sq)
    tl.store(at + 2 * tl.num_programs(0), nonzero)
    tl.store(at + 3 * tl.num_programs(0), dot)


@triton.jit
def _norm_keeping(w_sq, u_sq, dot, step_size):
    """As hf_lamb.norms.norm_keeping: the step size and the growth of a step that keeps the norm."""
    moves = (w_sq > 0) & (step_size != 0)
    x = tl.where(moves, step_size * (step_size * u_sq - 2.0 * dot) / tl.where(moves, w_sq, 1.0), 0.0)
    q = tl.sqrt_rn(tl.maximum(1.0 + x, 1e-4))
    growth = tl.where(x <= -0.9999, 0.0, -x / (q * (1.0 + q)))
    return tl.where(x <= -0.9999, 0.0, step_size * (1.0 + growth)), growth


@triton.jit
def _move(
    w_sq, u_sq, nonzero, dot, finite, lr, lr_at, lowest, highest, ADAPTS: tl.constexpr, FIXES_NORMS: tl.constexpr
):
    """The step size lr * r and the growth, of one layer or of many."""
    ratio = 1.0
    if ADAPTS:
        both = (w_sq > 0) & (u_sq > 0)
        ratio = tl.where(both, tl.sqrt_rn(w_sq) / tl.sqrt_rn(tl.where(both, u_sq, 1.0)), 1.0)
        ratio = tl.minimum(tl.maximum(ratio, lowest), highest)
        ratio = tl.where(nonzero == 0, 0.0, ratio)
    if lr_at is not None:
        lr = tl.load(lr_at)
    step_size = lr * ratio
    if finite is not None:
        step_size = tl.where(tl.load(finite) == 0, 0.0, step_size)
    growth = 0.0
    if FIXES_NORMS:
        step_size, growth = _norm_keeping(w_sq, u_sq, dot, step_size)
    return step_size, growth


@triton.jit(do_not_specialize=["n", "sums", "moves", "finite", "lr", "lr_at", "lowest", "highest"])
def _moves_of_sums(
    n, sums, moves, finite, lr, lr_at, lowest, highest,
    ADAPTS: tl.constexpr, FIXES_NORMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    w_sq = tl.load(sums + i, mask=i < n, other=0.0)
    u_sq = tl.load(sums + n + i, mask=i < n, other=0.0)
    nonzero = tl.load(sums + 2 * n + i, mask=i < n, other=0.0)
    dot = tl.load(sums + 3 * n + i, mask=i < n, other=0.0)
    step_size, growth = _move(w_sq, u_sq, nonzero, dot, finite, lr, lr_at, lowest, highest, ADAPTS, FIXES_NORMS)
    tl.store(moves + i, step_size, mask=i < n)
    tl.store(moves + n + i, growth, mask=i < n)


@triton.jit(
    do_not_specialize=["rows", "n", "chunks", "of_chunks", "sums", "moves", "finite", "lr", "lr_at", "lowest",
                       "highest", "size_of_chunk"]
)  # fmt: skip
def _finish(
    rows, n, chunks, of_chunks, sums, moves, size_of_chunk, finite, lr, lr_at, lowest, highest,
    ADAPTS: tl.constexpr, FIXES_NORMS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sums of a tensor from those of its chunks; its trust ratio r, the step size lr * r, and the growth."""
    i = tl.program_id(0)
    row = rows + i.to(tl.int64) * _COLUMNS
    begin = tl.load(row + _FIRST).to(tl.int32)
    many = ((tl.load(row + _NUMEL) + size_of_chunk - 1) // size_of_chunk).to(tl.int32)
    w_sqs = tl.zeros((BLOCK,), tl.float32)
    u_sqs = tl.zeros((BLOCK,), tl.float32)
    nonzeros = tl.zeros((BLOCK,), tl.float32)
    dots = tl.zeros((BLOCK,), tl.float32)
    for done in range(0, many, BLOCK):
        chunk = done + tl.arange(0, BLOCK)
        at = of_chunks + begin + chunk
        w_sqs += tl.load(at, mask=chunk < many, other=0.0)
        u_sqs += tl.load(at + chunks, mask=chunk < many, other=0.0)
        nonzeros += tl.load(at + 2 * chunks, mask=chunk < many, other=0.0)
        dots += tl.load(at + 3 * chunks, mask=chunk < many, other=0.0)
    w_sq = tl.sum(w_sqs)
    u_sq = tl.sum(u_sqs)
    nonzero = tl.sum(nonzeros)
    dot = tl.sum(dots)
    tl.store(sums + i, w_sq)
    tl.store(sums + n + i, u_sq)
    tl.store(sums + 2 * n + i, nonzero)
    tl.store(sums + 3 * n + i, dot)
    step_size, growth = _move(w_sq, u_sq, nonzero, dot, finite, lr, lr_at, lowest, highest, ADAPTS, FIXES_NORMS)
    tl.store(moves + i, step_size)
    tl.store(moves + n + i, growth)


@triton.jit
def _apply_update(
    w_at, m_at, v_at, size, step_size, growth, inverse1, inverse2, eps, weight_decay,
    CHUNK: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    offsets = tl.arange(0, CHUNK)
    w = _load(w_at, offsets, size, WHOLE)
    m = _load(m_at, offsets, size, WHOLE)
    v = _load(v_at, offsets, size, WHOLE)
    w = w - step_size * _u(w, m, v, inverse1, inverse2, eps, weight_decay) + growth * w
    _store(w_at, offsets, size, w.to(w_at.dtype.element_ty), WHOLE)


@triton.jit(do_not_specialize=["rows", "owners", "n", "finite", "corrections", "step_sizes", "growths"])
def _second_visit(
    rows, owners, n, finite, corrections, step_sizes, growths, eps, weight_decay,
    W: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    if finite is not None and tl.load(finite) == 0:
        return
    chunk = tl.num_programs(0) - 1 - tl.program_id(0)
    owner = tl.load(owners + chunk)
    row = rows + owner.to(tl.int64) * _COLUMNS
    begin = (chunk - tl.load(row + _FIRST)) * CHUNK
    size = tl.load(row + _NUMEL) - begin
    w_at = _where(row, _W, begin, W, ALIGNED)
    m_at = _where(row, _M, begin, tl.float32, ALIGNED)
    v_at = _where(row, _V, begin, tl.float32, ALIGNED)
    inverse1 = tl.load(corrections + owner)
    inverse2 = tl.load(corrections + n + owner)
    step_size = tl.load(step_sizes + owner)
    if step_size == 0:  # eps may be 0, and u no number
        return
    growth = 0.0
    if growths is not None:
        growth = tl.load(growths + owner)
    if size >= CHUNK:
        _apply_update(w_at, m_at, v_at, size, step_size, growth, inverse1, inverse2, eps, weight_decay, CHUNK, True)
    else:
        _apply_update(w_at, m_at, v_at, size, step_size, growth, inverse1, inverse2, eps, weight_decay, CHUNK, False)
