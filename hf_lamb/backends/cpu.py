"""The fused backend for CPUs without a C compiler, and for float64: blocks that fit in the cache.

It uses the kernel behind `torch.optim.AdamW(fused=True)`. That kernel, given -λw in the place of the parameter and a
rate of 1, moves m and v and leaves -u there. The norms find it in the cache, and so does the second visit, unless the
tensor is too large or waits for other processes: then u is computed again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hf_lamb.backends.backend import Backend
from hf_lamb.backends.bucket import Bucket
from hf_lamb.norms import Sum, squared_norms

# Elements. w, g, m, v and u of a block should be in the cache together, of a part w and u. Best of 2^18 to 2^21 and
# of 2^20 to 2^24 with 2 MB of L2 and 32 MB of L3 on BERT-base, all within a fifth.
BLOCK = 1 << 20
PART = 1 << 21


class Span(NamedTuple):
    """Some elements of one of the bucket's tensors."""

    i: int  # the tensor
    start: int
    stop: int


Held = list[tuple[list[Span], list[Tensor]]]  # the spans of a block, and -u of each


class CPU(Backend):
    """Blocks that fit in the cache. Keeps scratch of the size of the largest tensor, one for each dtype."""

    def __init__(self) -> None:
        self._scratch: dict[torch.dtype, Tensor] = {}  # for u between the visits

    def takes(self, bucket: Bucket) -> bool:
        """Whether torch has the kernel, and the tensors lie in memory one element after another, as it wants them."""
        return bucket.contiguous and hasattr(torch, "_fused_adam_")

    def update(self, bucket: Bucket) -> Tensor:
        """Both visits, part by part: the second one finds w and u in the cache."""
        self._have_scratch(bucket)
        return torch.cat([super(CPU, self).update(part) for part in bucket.parts(PART)], dim=1)

    def _have_scratch(self, bucket: Bucket) -> None:
        """For the largest tensor, at least for a part."""
        scratch = self._scratch.get(bucket.math_dtype)
        if scratch is None or scratch.numel() < scratch_size(bucket):
            self._scratch[bucket.math_dtype] = torch.empty(scratch_size(bucket), dtype=bucket.math_dtype, device="cpu")

    def direction(self, bucket: Bucket) -> tuple[Tensor, Held | None]:
        """t += 1, move m and v; return the sums and, where there is scratch for all of them, the -u."""
        self._have_scratch(bucket)
        bucket.advance()
        beta1, beta2 = bucket.group["betas"]
        bias_correction, weight_decay = bucket.group["bias_correction"], bucket.group["weight_decay"]
        # step=inf switches off the kernel's bias correction: 1 - beta**inf = 1.
        steps = bucket.steps if bias_correction else [torch.full_like(step, torch.inf) for step in bucket.steps]
        skip = None if bucket.finite is None else bucket.finite.logical_not().float()
        scratch = self._scratch[bucket.math_dtype]
        keep = bucket.cut is None and sum(param.numel() for param in bucket.params) <= scratch.numel()

        held: Held = []
        owners: list[int] = []
        sums = []
        start = 0
        for run in _runs(bucket):
            w = [x.to(bucket.math_dtype) for x in _take(bucket.params, run)]
            given = [x.to(bucket.math_dtype) for x in _take(bucket.grads, run)]
            m = _take(bucket.exp_avgs, run)
            g = given if bucket.clip_factor is None else list(torch._foreach_mul(given, bucket.clip_factor))
            minus_u = []
            for x in w:
                minus_u.append(torch.mul(x, -weight_decay, out=scratch[start : start + x.numel()].view_as(x)))
                start += x.numel()
            torch._fused_adam_(
                minus_u,
                g,
                m,
                _take(bucket.exp_avg_sqs, run),
                [],
                [steps[i] for i, _, _ in run],
                lr=1.0,
                beta1=float(beta1),
                beta2=float(beta2),
                weight_decay=0.0,
                eps=float(bucket.group["eps"]),
                amsgrad=False,
                maximize=bool(bucket.group["maximize"]),
                found_inf=skip,
            )
            dots = -bucket.dots(w, minus_u)
            sums.append(torch.stack((squared_norms(w), squared_norms(minus_u), bucket.nonzero(given, m), dots)))
            owners.extend(i for i, _, _ in run)
            if keep:
                held.append((run, minus_u))
            else:
                start = 0
        whole = torch.zeros(len(Sum), len(bucket.params), dtype=bucket.math_dtype, device="cpu")
        whole.index_add_(1, torch.tensor(owners, device="cpu"), torch.cat(sums, dim=1))
        return whole, held if keep else None

    def apply(self, bucket: Bucket, held: Held | None, step_sizes: Tensor, growths: Tensor | None) -> None:
        """w += growth * w - step_size * u, from the last block, which is still in the cache, to the first."""
        sizes = step_sizes.unbind()
        for run, minus_u in reversed(held) if held is not None else self._computed_again(bucket):
            for x, y, (i, _, _) in zip(_take(bucket.params, run), minus_u, run, strict=True):
                step = bucket.at_rest(y, sizes[i])
                if growths is not None:
                    w = x.to(y.dtype)
                    x.copy_(torch.addcmul(w, step, sizes[i]).addcmul_(w, growths[i]))
                elif x.dtype == y.dtype:
                    x.addcmul_(step, sizes[i])
                else:
                    x.copy_(torch.addcmul(x.to(y.dtype), step, sizes[i]))

    def _computed_again(self, bucket: Bucket) -> Iterator[tuple[list[Span], list[Tensor]]]:
        """-u, block by block, from the moments as `direction` left them."""
        scratch = self._scratch[bucket.math_dtype]
        corrections = zip(*(c.unbind() for c in bucket.bias_corrections()), strict=True)
        factors = [(-1 / c1, c2.sqrt()) for c1, c2 in corrections]
        for run in _runs(bucket):
            minus_u, start = [], 0
            tensors = (_take(tensors, run) for tensors in (bucket.params, bucket.exp_avgs, bucket.exp_avg_sqs))
            for w, m, v, (i, _, _) in zip(*tensors, run, strict=True):
                minus_inverse, root = factors[i]
                x = scratch[start : start + w.numel()].view_as(w)
                start += w.numel()
                torch.sqrt(v, out=x).div_(root).add_(bucket.group["eps"])
                torch.div(m, x, out=x).mul_(minus_inverse).sub_(w, alpha=bucket.group["weight_decay"])
                minus_u.append(x)
            yield run, minus_u


def scratch_size(bucket: Bucket) -> int:
    """Elements of scratch for this bucket and its parts: those of the largest tensor, at least of a part."""
    sizes = [param.numel() for param in bucket.params]
    return max(min(sum(sizes), PART), max(sizes))


def _runs(bucket: Bucket) -> Iterator[list[Span]]:
    """Spans of about a block together: large tensors in several, small ones side by side."""
    run: list[Span] = []
    size = 0
    for i, param in enumerate(bucket.params):
        for start in range(0, max(param.numel(), 1), BLOCK):
            stop = min(start + BLOCK, param.numel())
            if run and size + stop - start > BLOCK:
                yield run
                run, size = [], 0
            run.append(Span(i, start, stop))
            size += stop - start
    yield run


def _take(tensors: list[Tensor], run: list[Span]) -> list[Tensor]:
    return [
        tensors[i] if stop - start == tensors[i].numel() else tensors[i].view(-1)[start:stop] for i, start, stop in run
    ]
