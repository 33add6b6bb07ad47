"""The readable backend: one parameter after another, every line a line of the paper."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_lamb.backends.backend import Backend
from hf_lamb.backends.bucket import Bucket
from hf_lamb.norms import squared_norms


class Eager(Backend):
    """One parameter after another."""

    def direction(self, bucket: Bucket) -> tuple[Tensor, list[Tensor]]:
        """t += 1, move m and v; return the sums and u, the direction of each parameter."""
        bucket.advance()
        beta1, beta2 = bucket.group["betas"]
        keep1, keep2 = bucket.betas
        eps, weight_decay = bucket.eps, bucket.group["weight_decay"]
        bias_corrections1, bias_corrections2 = bucket.bias_corrections()

        weights, updates = [], []
        for i, (param, grad, m, v) in enumerate(
            zip(bucket.params, bucket.grads, bucket.exp_avgs, bucket.exp_avg_sqs, strict=True)
        ):
            w, g = param.to(bucket.math_dtype), bucket.gradient(grad)
            m.mul_(keep1).add_(g, alpha=1 - beta1)
            v.mul_(keep2).addcmul_(g, g, value=1 - beta2)
            m_hat, v_hat = m / bias_corrections1[i], v / bias_corrections2[i]
            u = m_hat / (v_hat.sqrt() + eps) + weight_decay * w
            weights.append(w)
            updates.append(u)
        nonzero = bucket.nonzero(bucket.grads, bucket.exp_avgs)
        dots = bucket.dots(weights, updates)
        return torch.stack((squared_norms(weights), squared_norms(updates), nonzero, dots)), updates

    def apply(self, bucket: Bucket, held: list[Tensor], step_sizes: Tensor, growths: Tensor | None) -> None:
        """w += growth * w - step_size * u."""
        for i, (param, u) in enumerate(zip(bucket.params, held, strict=True)):
            w, step_size = param.to(u.dtype), step_sizes[i]
            moved = w - step_size * bucket.at_rest(u, step_size)
            param.copy_(moved if growths is None else moved + growths[i] * w)
