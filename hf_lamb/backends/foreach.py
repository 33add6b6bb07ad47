"""The same arithmetic with torch's multi-tensor operations: one call for all parameters of a bucket.

Takes scratch of the size of the bucket, as AdamW(foreach=True) does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lamb.backends.backend import Backend
from hf_lamb.backends.bucket import Bucket
from hf_lamb.norms import squared_norms


class Foreach(Backend):
    """All parameters of a bucket in one call for each operation."""

    def direction(self, bucket: Bucket) -> tuple[Tensor, list[Tensor]]:
        """t += 1, move m and v; return the sums and u, the direction of each parameter."""
        bucket.advance()
        beta1, beta2 = bucket.group["betas"]
        keep1, keep2 = bucket.betas
        weights = [param.to(bucket.math_dtype) for param in bucket.params]
        grads = [bucket.gradient(grad) for grad in bucket.grads]

        torch._foreach_mul_(bucket.exp_avgs, keep1)
        torch._foreach_add_(bucket.exp_avgs, grads, alpha=1 - beta1)
        torch._foreach_mul_(bucket.exp_avg_sqs, keep2)
        torch._foreach_addcmul_(bucket.exp_avg_sqs, grads, grads, 1 - beta2)

        bias_corrections1, bias_corrections2 = bucket.bias_corrections()
        updates = list(torch._foreach_div(bucket.exp_avgs, bias_corrections1.unbind()))
        denominators = torch._foreach_div(bucket.exp_avg_sqs, bias_corrections2.unbind())
        torch._foreach_sqrt_(denominators)
        eps = bucket.eps
        # A list of tensors, because the overload for one tensor reads it back to the host on CPU.
        torch._foreach_add_(denominators, [eps] * len(denominators) if isinstance(eps, Tensor) else eps)
        torch._foreach_div_(updates, denominators)
        torch._foreach_add_(updates, weights, alpha=bucket.group["weight_decay"])
        nonzero = bucket.nonzero(bucket.grads, bucket.exp_avgs)
        return torch.stack((squared_norms(weights), squared_norms(updates), nonzero)), updates

    def apply(self, bucket: Bucket, held: list[Tensor], step_sizes: Tensor) -> None:
        """w -= step_size * u."""
        sizes = step_sizes.unbind()
        updates = [bucket.at_rest(u, size) for u, size in zip(held, sizes, strict=True)]
        torch._foreach_mul_(updates, sizes)
        if bucket.params[0].dtype == bucket.math_dtype:
            torch._foreach_sub_(bucket.params, updates)
        else:
            weights = [param.to(bucket.math_dtype) for param in bucket.params]
            torch._foreach_sub_(weights, updates)
            torch._foreach_copy_(bucket.params, weights)
