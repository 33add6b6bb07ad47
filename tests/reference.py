"""LAMB in NumPy float64, straight from the paper's Algorithm 2: slow, obviously right, the judge of every backend."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class ReferenceLamb:
    """One instance per list of arrays; `step(grads)` returns the new weights."""

    def __init__(
        self,
        weights: list[Array],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        bias_correction: bool = True,
        layer_adaptation: bool = True,
        min_trust_ratio: float | None = None,
        max_trust_ratio: float | None = None,
        fixed_norm: bool = False,
        max_grad_norm: float | None = None,
        maximize: bool = False,
        rows: dict[int, list[int]] | None = None,
    ) -> None:
        """rows: of the weights that hold several layers, by their indices, the rows of each layer."""
        self.w = [np.array(w, dtype=np.float64) for w in weights]
        self.m = [np.zeros_like(w) for w in self.w]
        self.v = [np.zeros_like(w) for w in self.w]
        self.t = 0
        self.layers: list[tuple[int, Any]] = []  # (index of the weight, rows)
        for i in range(len(self.w)):
            borders = np.cumsum([0, *(rows or {}).get(i, [])])
            blocks = [slice(a, b) for a, b in itertools.pairwise(borders)]
            self.layers += [(i, block) for block in blocks or [...]]  # ... is all of it
        self.lr, (self.beta1, self.beta2), self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.bias_correction, self.layer_adaptation = bias_correction, layer_adaptation
        self.min_trust_ratio, self.max_trust_ratio = min_trust_ratio, max_trust_ratio
        self.fixed_norm, self.max_grad_norm, self.maximize = fixed_norm, max_grad_norm, maximize

    def step(self, grads: list[Array]) -> list[Array]:
        self.t += 1
        g = [np.array(grad, dtype=np.float64) for grad in grads]
        if self.max_grad_norm is not None:
            global_norm = np.sqrt(sum((x**2).sum() for x in g))
            g = [x / max(1.0, global_norm / self.max_grad_norm) for x in g]
        if self.maximize:
            g = [-x for x in g]
        for i, rows in self.layers:
            w, grad, m, v = self.w[i][rows], g[i][rows], self.m[i][rows], self.v[i][rows]
            m[...] = self.beta1 * m + (1 - self.beta1) * grad
            v[...] = self.beta2 * v + (1 - self.beta2) * grad**2
            m_hat, v_hat = m, v
            if self.bias_correction:
                m_hat = m_hat / (1 - self.beta1**self.t)
                v_hat = v_hat / (1 - self.beta2**self.t)
            if self.layer_adaptation and not grad.any() and not m.any():
                continue  # nothing but decay, which the trust ratio would make as long as any step
            u = m_hat / (np.sqrt(v_hat) + self.eps) + self.weight_decay * w
            moved = w - self.lr * self.trust_ratio(w, u) * u
            norm = np.sqrt((w**2).sum())
            if self.fixed_norm and self.layer_adaptation and norm > 0:
                left = np.sqrt((moved**2).sum())
                moved = norm * moved / left if left > 0.01 * norm else w
            w[...] = moved
        return self.w

    def trust_ratio(self, w: Array, u: Array) -> float:
        if not self.layer_adaptation:
            return 1.0
        w_norm, u_norm = np.sqrt((w**2).sum()), np.sqrt((u**2).sum())
        ratio = float(w_norm / u_norm) if w_norm > 0 and u_norm > 0 else 1.0
        if self.min_trust_ratio is not None:
            ratio = max(ratio, self.min_trust_ratio)
        if self.max_trust_ratio is not None:
            ratio = min(ratio, self.max_trust_ratio)
        return ratio
