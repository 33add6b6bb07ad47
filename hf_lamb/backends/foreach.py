"""The same arithmetic with torch's multi-tensor operations: one call for all parameters of a bucket.

Takes scratch of twice the size of the bucket; on a CPU, of a part of it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_lamb.backends.backend import Backend
from hf_lamb.backends.bucket import Bucket
from hf_lamb.norms import squared_norms

# Elements. On a CPU the operations should find a part of each tensor in the cache, and scratch should be used again.
PART = 1 << 22


class Held(NamedTuple):
    """The u of each parameter divided by k, and k, shape [n]."""

    updates: list[Tensor]
    k: Tensor


class Foreach(Backend):
    """All parameters of a bucket in one call for each operation; on a CPU, of a part of a bucket."""

    def update(self, bucket: Bucket) -> Tensor:
        """Do both visits; on a CPU part by part."""
        if bucket.device.type != "cpu" or torch.compiler.is_compiling():
            return super().update(bucket)
        return torch.cat([super(Foreach, self).update(part) for part in bucket.parts(PART)], dim=1)

    def direction(self, bucket: Bucket) -> tuple[Tensor, Held]:
        """t += 1, move m and v; return the sums and the direction of each parameter.

        With k = √(1 - β₂ᵗ) / (1 - β₁ᵗ), u / k = m / (√v + ε√(1 - β₂ᵗ)) + λw / k, which saves two passes over the
        elements.
        """
        bucket.advance()
        beta1, beta2 = bucket.group["betas"]
        keep1, keep2 = bucket.betas
        weights = [param.to(bucket.math_dtype) for param in bucket.params]
        grads = [bucket.gradient(grad) for grad in bucket.grads]

        if bucket.finite is None:
            torch._foreach_lerp_(bucket.exp_avgs, grads, 1 - beta1)
        else:  # one more pass, but with a weight for each tensor lerp would launch a kernel for each
            torch._foreach_mul_(bucket.exp_avgs, keep1)
            torch._foreach_add_(bucket.exp_avgs, grads, alpha=1 - beta1)
        torch._foreach_mul_(bucket.exp_avg_sqs, keep2)
        torch._foreach_addcmul_(bucket.exp_avg_sqs, grads, grads, 1 - beta2)

        bias_corrections1, bias_corrections2 = bucket.bias_corrections()
        root = bias_corrections2.sqrt()
        k = root / bias_corrections1
        denominators = torch._foreach_sqrt(bucket.exp_avg_sqs)
        torch._foreach_add_(denominators, (bucket.eps * root).unbind())
        updates = list(torch._foreach_mul(weights, (bucket.group["weight_decay"] / k).unbind()))
        torch._foreach_addcdiv_(updates, bucket.exp_avgs, denominators)
        sums = (
            squared_norms(weights),
            squared_norms(updates) * k.square(),
            bucket.nonzero(bucket.grads, bucket.exp_avgs),
            bucket.dots(weights, updates) * k,
        )
        return torch.stack(sums), Held(updates, k)

    def apply(self, bucket: Bucket, held: Held, step_sizes: Tensor, growths: Tensor | None) -> None:
        """w += growth * w - step_size * u."""
        sizes = step_sizes.unbind()
        updates = [bucket.at_rest(u, size) for u, size in zip(held.updates, sizes, strict=True)]
        weights = [param.to(bucket.math_dtype) for param in bucket.params]  # themselves, if that is their dtype
        if growths is not None:
            torch._foreach_mul_(updates, (held.k * step_sizes).unbind())
            torch._foreach_sub_(updates, torch._foreach_mul(weights, growths.unbind()))
            torch._foreach_sub_(weights, updates)
        else:
            for w, u, size in zip(weights, updates, (-held.k * step_sizes).unbind(), strict=True):
                w.addcmul_(u, size)
        if bucket.params[0].dtype != bucket.math_dtype:
            torch._foreach_copy_(bucket.params, weights)
