"""Clipping in the optimizer, which looks at the gradients anyway, in place of Trainer's own pass over them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedType
from torch import Tensor, nn
from transformers import Trainer

from hf_lamb.lamb import Lamb

if TYPE_CHECKING:
    from hf_lamb.trainer.trainer import LambTrainer

__all__ = ["clip_in_lamb"]

# Their own code clips, or must run before the norm is taken.
CLIP_THEMSELVES = {DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA}


def clip_in_lamb(trainer: LambTrainer, model: nn.Module, max_norm: float, hook: Callable[..., Any]) -> Tensor | None:
    """Make the next step of a `Lamb` clip the gradients; return their norm, or None if Trainer must clip.

    Trainer must clip if the optimizer is not a `Lamb` or is inside of another one, or if it does not have exactly the
    model's trainable parameters: Trainer's norm is that of the model's gradients.

    Args:
        trainer: whose gradients are complete.
        model: as Trainer passes it to `hook`.
        max_norm: see `Lamb.clip_grad_norm`.
        hook: Trainer's method that this replaces; a mix-in that overrides it keeps it.
    """
    lamb = trainer.optimizer
    while isinstance(lamb, AcceleratedOptimizer):
        lamb = lamb.optimizer
    if not isinstance(lamb, Lamb) or trainer.accelerator.distributed_type in CLIP_THEMSELVES:
        return None
    if getattr(hook, "__func__", None) is not getattr(Trainer, hook.__name__):
        return None
    optimized = (param for group in lamb.param_groups for param in group["params"])
    if trainable(optimized) != trainable(model.parameters()):
        return None
    trainer.accelerator.unscale_gradients()
    return lamb.clip_grad_norm(max_norm)


def trainable(params: Any) -> set[int]:
    """Return the identities of the parameters that get a gradient."""
    return {id(param) for param in params if param.requires_grad}
