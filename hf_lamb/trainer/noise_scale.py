"""The gradient noise scale, from gradients that training computes anyway: up to which size a larger batch helps."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.tensor import DTensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm
from transformers.trainer_pt_utils import find_batch_size

if TYPE_CHECKING:
    from hf_lamb.trainer.trainer import LambTrainer

__all__ = ["NoiseMeasurement", "NoiseScale", "noise_scale_in_words"]

logger = logging.getLogger(__name__)


class NoiseScale:
    """The noise scale tr(Σ) / |G|²: the batch size at which noise and signal in the gradient are equal.

    G is the true gradient and Σ the covariance of the gradients of single samples. The squared gradient norms of a
    small batch b and a large batch B have the expectations |G|² + tr(Σ)/b and |G|² + tr(Σ)/B, so these estimates are
    unbiased::

        tr(Σ) ≈ (‖g_b‖² - ‖g_B‖²) / (1/b - 1/B)          |G|² ≈ ‖g_B‖² - tr(Σ)/B

    The noise scale is the ratio of their moving averages.

    Args:
        decay: of the averages, per update. Default 0.99, which averages over about a hundred optimizer steps.

    It is a cheap estimate from gradients alone, of one step of plain gradient descent. What a batch costs over many
    steps of LAMB is another question, and the noise scale is mostly below the batch at which training begins to lose
    (https://arxiv.org/abs/2505.23971). `python -m recipes.critical_batch CHECKPOINT` measures that batch by training.

    Source: McCandlish et al. 2018, https://arxiv.org/abs/1812.06162, appendix A.
    """

    def __init__(self, decay: float = 0.99) -> None:
        self.decay = decay
        self.averages: Tensor | None = None  # [tr(Σ), |G|²]; their common bias towards 0 cancels in the ratio

    def update(self, small: Tensor, inverse_b: Tensor | float, large: Tensor, inverse_B: Tensor | float) -> None:
        """Add ‖g_b‖², 1/b, ‖g_B‖² and 1/B of one step to the averages; non-finite values are ignored. No host sync."""
        noise = (small - large) / (inverse_b - inverse_B)
        new = torch.stack((noise, large - noise * inverse_B))
        if self.averages is None:
            self.averages = torch.zeros_like(new)
        moved = self.averages.lerp(new, 1 - self.decay)
        self.averages = torch.where(new.isfinite().all(), moved, self.averages)

    def value(self) -> float | None:
        """Return the noise scale in the unit of b and B; None if an average is not positive yet. Synchronises."""
        if self.averages is None:
            return None
        noise, signal = self.averages.tolist()
        return noise / signal if noise > 0 and signal > 0 else None


def noise_scale_in_words(noise_scale: float, batch_size: int) -> str:
    """Describe in one line the cost of a batch size at a noise scale.

    To reach a given loss, batch B needs (1 + B/B_noise) times the minimum number of samples and (1 + B_noise/B) times
    the minimum number of steps. The noise scale is that of plain gradients, so with Adam or LAMB it gives only the
    order of magnitude of the critical batch, and mostly one that is too low; `recipes.critical_batch` measures it. It
    grows while the loss falls: use the last value of a run.

    Args:
        noise_scale: B_noise, in sequences.
        batch_size: B, the global batch, in sequences.

    Returns:
        "critical batch about ... sequences: ... cost about ... times the fewest samples and ... times the fewest
        steps".
    """
    samples, steps = 1 + batch_size / noise_scale, 1 + noise_scale / batch_size
    return (
        f"critical batch about {_about(noise_scale)} sequences: {batch_size:,} cost about "
        f"{_two_digits(samples)} times the fewest samples and {_two_digits(steps)} times the fewest steps"
    )


def _two_digits(number: float) -> str:
    return f"{round(number, 1 - math.floor(math.log10(number))):.10g}"


def _about(number: float) -> str:
    return f"{_two_digits(number / 1000)}k" if number >= 1000 else _two_digits(number)


def _record_and_reduce(seen: list[Tensor], bucket: Any) -> Future[Tensor]:
    """A communication hook of DDP: append the bucket's sum of squares to `seen`, then average the bucket as usual."""
    seen.append(torch.linalg.vector_norm(bucket.buffer(), dtype=torch.float32).square())
    return allreduce_hook(dist.group.WORLD, bucket)  # type: ignore[arg-type]


class SmallBatch(NamedTuple):
    """What was measured of the small batch on this process."""

    squared_norm: Tensor  # ‖g_b‖², 0-dim
    inverse_size: Tensor | float  # 1/b


class NoiseMeasurement:
    """Measures `trainer.noise_scale`, in sequences, during training.

    The small batch is the first micro-batch of a step on each process. Without accumulation it is the part of the
    global batch on each DDP process; a communication hook measures its gradient before DDP averages it. The large
    batch is the global batch, whose gradient norm Trainer computes anyway, before clipping.

    It costs one more norm a step and, with several processes, an all-reduce of three numbers. It synchronises with the
    device only when a line is logged. Checkpoints contain the averages.

    It is off if gradients are sharded (FSDP, DeepSpeed, tensor parallelism), if a global batch is one micro-batch, and
    with `log_noise_scale=False`. With a communication hook of accelerate's (`comm_hook`, such as bf16) it needs
    accumulation, whose first micro-batch is measured before anything is averaged; without, it is off, with a warning.
    """

    def __init__(self, trainer: LambTrainer) -> None:
        self.trainer = trainer
        self._small: SmallBatch | None = None
        self._share: Tensor | float | None = None  # the first micro-batch's part of the global batch
        self._before_all_reduce: list[Tensor] = []  # sums of squares of DDP's buckets before the all-reduce
        self._rows: int | None = None  # sequences of this step's global batch
        whole = not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)
        whole = whole and trainer.get_tp_size() == trainer.get_cp_size() == trainer.get_sp_size() == 1
        self._active = whole and getattr(trainer.args, "log_noise_scale", True)

    def attach(self, model: nn.Module) -> None:
        """Prepare for a training of this model: register the communication hook if DDP needs it."""
        self._share = self._small = None
        handler = self.trainer.accelerator.ddp_handler
        hooked = handler is not None and handler.comm_hook.value != "no"
        averages_at_once = self._averages_at_once(in_any_stage=True)
        if not self._active or not isinstance(model, DistributedDataParallel):
            return
        if hooked:
            if averages_at_once:
                self._active = False
                logger.warning(
                    f"lamb/noise_scale is off: use two or more accumulation steps, or leave accelerate's comm_hook "
                    f"{handler.comm_hook.value} out; DDP takes one hook, and another one is needed to measure the "
                    "gradients of a process before they are averaged"
                )
            return
        seen = vars(model).setdefault("hf_lamb_seen", [])  # kept on the model: DDP takes one hook, and only once
        self._before_all_reduce = seen
        if averages_at_once and not vars(model).get("hf_lamb_hooked"):
            vars(model)["hf_lamb_hooked"] = True
            # The hook must not refer to `self`: DDP would then keep the trainer alive, and the trainer DDP.
            model.register_comm_hook(None, lambda state, bucket: _record_and_reduce(seen, bucket))

    def _averages_at_once(self, in_any_stage: bool = False) -> bool:
        """Return whether DDP averages the first micro-batch's gradient in its backward pass.

        Args:
            in_any_stage: in any stage of `batch_size_schedule`. Default False: in this step.
        """
        trainer, accumulation = self.trainer, self.trainer.args.gradient_accumulation_steps
        if in_any_stage and trainer.staged is not None:
            accumulation = min(stage.accumulation for stage in trainer.staged.stages.stages)
        each = trainer.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        return trainer.args.world_size > 1 and (each or accumulation == 1)

    def count_sequences(self, samples: list[Any]) -> None:
        """Count the sequences of this step; the last step of an epoch may have fewer."""
        trainer = self.trainer
        rows = [find_batch_size(batch) for batch in samples]  # type: ignore[no-untyped-call]
        processes = trainer.args.world_size // (trainer.get_tp_size() * trainer.get_cp_size() * trainer.get_sp_size())
        self._rows = sum(rows) * processes if rows and None not in rows else None

    @contextmanager
    def measuring(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
    ) -> Iterator[None]:
        """Measure the gradient of the step's first micro-batch, which this block computes."""
        if not self._active or self._share is not None:
            yield
            return
        trainer = self.trainer
        self._share = trainer.loss_weighting.share_of(inputs, num_items_in_batch)
        self._before_all_reduce.clear()
        yield
        if trainer.loss_weighting.micro_batches_are_equal():
            self._share = trainer.loss_weighting.share_of(inputs, None)
        square = torch.stack(self._before_all_reduce).sum() if self._before_all_reduce else None
        self._before_all_reduce.clear()
        # More micro-batches follow and nothing was averaged, so `grad` has this process's first micro-batch only.
        if not trainer.accelerator.sync_gradients and not self._averages_at_once():
            grads = [param.grad for param in model.parameters() if param.grad is not None]
            if any(isinstance(grad, DTensor) or grad.is_sparse for grad in grads):
                self._active = False
            elif grads:
                square = get_total_norm(grads).float().square()
        if square is not None:
            # The loss was multiplied by the number of processes, because gradients are averaged, and by the scaler.
            weight = self._share * trainer.args.world_size
            scaler = trainer.accelerator.scaler
            if scaler is not None and scaler._scale is not None:
                weight = weight * scaler._scale
            self._small = SmallBatch(square / weight**2, 1 / (self._share * self.global_batch_size()))

    def take(self, norm: Any) -> None:
        """Update the noise scale with the norm of the global batch's gradient before clipping."""
        if self._small is not None and isinstance(norm, Tensor):
            square, inverse_b = self._small
            numbers = torch.stack(
                [torch.as_tensor(x).to(square) for x in (square, inverse_b, self.global_batch_size())]
            )
            if self.trainer.args.world_size > 1:
                numbers = self.trainer.accelerator.reduce(numbers, "mean")
            self.trainer.noise_scale.update(numbers[0], numbers[1], norm.detach().float().square(), 1 / numbers[2])
        self._share = self._small = None
        self._before_all_reduce.clear()

    def global_batch_size(self) -> float:
        """Return the number of sequences of this step's global batch."""
        if self._rows is not None:
            return self._rows
        return self.trainer.sequences_at_once() * self.trainer.current_gradient_accumulation_steps

    def add_to(self, logs: dict[str, float]) -> None:
        """Add the noise scale to a training log line as soon as it is known."""
        if self._active and "loss" in logs and (value := self.trainer.noise_scale.value()) is not None:
            logs["lamb/noise_scale"] = value

    def keep(self) -> None:
        """Put the averages into the state, so that a resumed run logs what an uninterrupted one does."""
        kept: Any = self.trainer.state.stateful_callbacks
        averages = self.trainer.noise_scale.averages
        if kept is not None and averages is not None:
            kept["noise_scale"] = {"attributes": {"averages": averages.tolist()}}

    def restore(self) -> None:
        """Load the averages of the checkpoint that the run resumes from, or reset them."""
        kept: Any = self.trainer.state.stateful_callbacks
        averages = (kept or {}).get("noise_scale", {}).get("attributes", {}).get("averages")
        device = self.trainer.args.device
        self.trainer.noise_scale.averages = None if averages is None else torch.tensor(averages, device=device)
