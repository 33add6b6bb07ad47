"""The gradient noise scale: how large a batch still pays, measured from gradients that training computes anyway."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.tensor import DTensor
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm
from transformers import Trainer
from transformers.trainer_pt_utils import find_batch_size

__all__ = ["NoiseScale", "NoiseScaleTrainer", "noise_scale_in_words"]


class NoiseScale:
    """tr(Σ) / |G|², the batch size at which noise and signal in the gradient are equal, as a moving average.

    From squared norms of gradients of a small batch b and a large one B, whose expectations are |G|² + tr(Σ)/b and
    |G|² + tr(Σ)/B. Both estimates are unbiased, and are averaged before they are divided::

        tr(Σ) ≈ (‖g_b‖² - ‖g_B‖²) / (1/b - 1/B)          |G|² ≈ ‖g_B‖² - tr(Σ)/B

    decay: of the averages, per update. Default 0.99: they look back about a hundred optimizer steps.

    Source: McCandlish et al. 2018, https://arxiv.org/abs/1812.06162, appendix A.
    """

    def __init__(self, decay: float = 0.99) -> None:
        self.decay = decay
        self.averages: Tensor | None = None  # tr(Σ), |G|²; their common bias towards 0 goes away in the ratio

    def update(self, small: Tensor, inverse_b: Tensor | float, large: Tensor, inverse_B: Tensor | float) -> None:
        """Take in ‖g_b‖², 1/b, ‖g_B‖² and 1/B of one step, without a look at them; what is not finite is left out."""
        noise = (small - large) / (inverse_b - inverse_B)
        new = torch.stack((noise, large - noise * inverse_B))
        if self.averages is None:
            self.averages = torch.zeros_like(new)
        moved = self.averages.lerp(new, 1 - self.decay)
        self.averages = torch.where(new.isfinite().all(), moved, self.averages)

    def value(self) -> float | None:
        """The noise scale, in the unit of b and B; None where the signal is not told from the noise. Waits."""
        if self.averages is None:
            return None
        noise, signal = self.averages.tolist()
        return noise / signal if noise > 0 and signal > 0 else None


def noise_scale_in_words(noise_scale: float, batch_size: int) -> str:
    """What the noise scale says about this batch: so many times the fewest samples, so many times the fewest steps.

    To reach a loss takes (1 + B/B_noise) times the fewest samples and (1 + B_noise/B) times the fewest steps. The
    noise scale is that of plain gradients; with Adam or LAMB it says the order of magnitude of the critical batch. It
    grows while the loss falls, so it is the last one that counts.
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


def _look_and_reduce(seen: list[Tensor], bucket: Any) -> Future[Tensor]:
    """Add the bucket's sum of squares to `seen`, then average it as DDP does by itself."""
    seen.append(torch.linalg.vector_norm(bucket.buffer(), dtype=torch.float32).square())
    return allreduce_hook(dist.group.WORLD, bucket)  # type: ignore[arg-type]


class NoiseScaleTrainer(Trainer):
    """`transformers.Trainer` with `lamb/noise_scale`, in sequences, in its training log lines.

    The small batch is the first of a step's micro-batches on each process, or, without accumulation, the share of each
    DDP process, whose gradient is seen before DDP averages it; the large batch is the global one, whose norm Trainer
    computes anyway, before clipping. Costs one more norm a step and, on several processes, an all-reduce of two
    numbers; nothing waits for the device except when a line is logged. The averages are in the checkpoints.

    Off where gradients are sharded (FSDP, DeepSpeed, tensor parallelism), where a global batch is one micro-batch, and
    with `log_noise_scale=False`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.noise_scale = NoiseScale()
        self._small: tuple[Tensor, Tensor | float] | None = None  # ‖g_b‖² of this process, and its 1/b
        self._share: Tensor | float | None = None  # of this step's first micro-batch, in the global batch
        self._before_all_reduce: list[Tensor] = []  # sums of squares of what DDP is about to average
        self._rows: int | None = None  # sequences of this step's global batch
        whole = not (self.is_fsdp_enabled or self.is_deepspeed_enabled)
        whole = whole and self.get_tp_size() == self.get_cp_size() == self.get_sp_size() == 1
        self._measures_noise = whole and getattr(self.args, "log_noise_scale", True)

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        model, dataloader = super()._prepare_for_training(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._share = self._small = None
        handler = self.accelerator.ddp_handler
        hooked = handler is not None and handler.comm_hook.value != "no"
        if not self._measures_noise or hooked or not isinstance(model, DistributedDataParallel):
            return model, dataloader
        seen = vars(model).setdefault("hf_lamb_seen", [])  # trained before: DDP takes one hook, once
        self._before_all_reduce = seen
        if self._averages_at_once() and not vars(model).get("hf_lamb_hooked"):
            vars(model)["hf_lamb_hooked"] = True
            # Without self: DDP would keep the trainer, and the trainer DDP.
            model.register_comm_hook(None, lambda state, bucket: _look_and_reduce(seen, bucket))
        return model, dataloader

    def _averages_at_once(self) -> bool:
        """Whether the first micro-batch's gradient is averaged over processes before it can be seen."""
        each = self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        return self.args.world_size > 1 and (each or self.args.gradient_accumulation_steps == 1)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """As Trainer's; counts the sequences of this step, of which the last of an epoch may have fewer."""
        samples, num_items_in_batch = super().get_batch_samples(*args, **kwargs)
        rows = [find_batch_size(batch) for batch in samples]  # type: ignore[no-untyped-call]
        processes = self.args.world_size // (self.get_tp_size() * self.get_cp_size() * self.get_sp_size())
        self._rows = sum(rows) * processes if rows and None not in rows else None
        return samples, num_items_in_batch

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As Trainer's, with a look at the gradient of the step's first micro-batch."""
        if not self._measures_noise or self._share is not None:
            return super().training_step(model, inputs, num_items_in_batch)
        self._share = self._share_of(inputs, num_items_in_batch)
        self._before_all_reduce.clear()
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._micro_batches_are_equal():
            self._share = self._share_of(inputs, None)
        square = torch.stack(self._before_all_reduce).sum() if self._before_all_reduce else None
        self._before_all_reduce.clear()
        # More micro-batches follow, and no process has averaged: these are nobody else's gradients.
        if not self.accelerator.sync_gradients and not self._averages_at_once():
            grads = [param.grad for param in model.parameters() if param.grad is not None]
            if any(isinstance(grad, DTensor) or grad.is_sparse for grad in grads):
                self._measures_noise = False
            elif grads:
                square = get_total_norm(grads).float().square()
        if square is not None:
            # The loss was multiplied by the number of processes, over which gradients are averaged, and by the scaler.
            weight = self._share * self.args.world_size
            scaler = self.accelerator.scaler
            if scaler is not None and scaler._scale is not None:
                weight = weight * scaler._scale
            self._small = square / weight**2, 1 / (self._share * self._global_batch_size())
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The gradient norm that Trainer logs: that of the global batch before clipping."""
        norm = super()._get_grad_norm(model, grad_norm)  # type: ignore[no-untyped-call]
        if self._small is not None and isinstance(norm, Tensor):
            square, inverse_b = self._small
            numbers = torch.stack(
                [torch.as_tensor(x).to(square) for x in (square, inverse_b, self._global_batch_size())]
            )
            if self.args.world_size > 1:
                numbers = self.accelerator.reduce(numbers, "mean")
            self.noise_scale.update(numbers[0], numbers[1], norm.detach().float().square(), 1 / numbers[2])
        self._share = self._small = None
        self._before_all_reduce.clear()
        return norm

    def _micro_batches_are_equal(self) -> bool:
        """Whether all count the same in the loss of the step, however many labels each has."""
        return False

    def _global_batch_size(self) -> float:
        """The sequences of this step."""
        if self._rows is not None:
            return self._rows
        planned = self.args.gradient_accumulation_steps
        return self.get_total_train_batch_size(self.args) * self.current_gradient_accumulation_steps / planned

    def _share_of(self, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None) -> Tensor | float:
        """The part of the global batch that this micro-batch is: by labels where the loss is a mean over labels."""
        if num_items_in_batch is None or "labels" not in inputs:
            return float(1 / (self.current_gradient_accumulation_steps * self.args.world_size))
        processes = 1 if self.args.average_tokens_across_devices else self.args.world_size
        total = self._total(getattr(num_items_in_batch, "plain", num_items_in_batch))
        share: Tensor = self._count_items(inputs) / (total * processes)
        return share

    def _total(self, items_in_batch: Tensor | int) -> Tensor | int:
        """The items of the global batch as one number, where Trainer has prepared it for DataParallel."""
        if isinstance(items_in_batch, Tensor) and items_in_batch.dim() > 0:
            items_in_batch = items_in_batch.flatten()[0]
        several = self.args.n_gpu > 1 and not self.args.average_tokens_across_devices
        return items_in_batch * self.args.n_gpu if several else items_in_batch

    def _count_items(self, inputs: dict[str, Any]) -> Tensor:
        """The labels of this micro-batch, counted as Trainer counts those of the global one."""
        labels: Tensor = inputs.get("shift_labels", inputs["labels"])
        if self._loss_shifts_labels and "shift_labels" not in inputs:
            labels = labels[..., 1:]
        return labels.ne(-100).sum()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer's, with the noise scale in training log lines once it can be told."""
        if self._measures_noise and "loss" in logs and (value := self.noise_scale.value()) is not None:
            logs["lamb/noise_scale"] = value
        super().log(logs, start_time)

    # -- a resumed run logs what the uninterrupted one does ----------------------------------------------------------

    def restore_noise_scale(self) -> None:
        kept: Any = self.state.stateful_callbacks
        averages = (kept or {}).get("noise_scale", {}).get("attributes", {}).get("averages")
        self.noise_scale.averages = None if averages is None else torch.tensor(averages, device=self.args.device)

    def keep_noise_scale(self) -> None:
        kept: Any = self.state.stateful_callbacks
        averages = self.noise_scale.averages
        if kept is not None and averages is not None:
            kept["noise_scale"] = {"attributes": {"averages": averages.tolist()}}
