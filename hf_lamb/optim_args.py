"""The options of LAMB in `--optim_args`, and how transformers' Trainer makes the optimizer "lamb"."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import torch
from torch import nn

from hf_lamb.lamb import Lamb
from hf_lamb.param_groups import split_by_adaptation
from hf_lamb.scaling import did_you_mean
from hf_lamb.sharding import fsdp1

if TYPE_CHECKING:
    from transformers import TrainingArguments
    from transformers.trainer_optimizer import OptimizerContext

__all__ = ["new_lamb", "options_of", "parse_optim_args"]

logger = logging.getLogger(__name__)
warn_once = cache(logger.warning)

SET_ELSEWHERE = {
    "lr": "use --learning_rate",
    "learning_rate": "use --learning_rate",
    "weight_decay": "use --weight_decay",
    "betas": "use --adam_beta1 and --adam_beta2 (a value holds no comma)",
}
_OF_GROUPS = ("adapt_all", "split")  # arguments of lamb_param_groups, not options of Lamb
_BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


@cache
def _options() -> dict[str, Any]:
    """Return the keys of `optim_args` and their types: beta1, beta2, `Lamb`'s signature, and `_OF_GROUPS`."""
    hints = get_type_hints(Lamb.__init__)
    own = {name: hint for name, hint in hints.items() if name not in {"params", "return", *SET_ELSEWHERE}}
    return {"beta1": float, "beta2": float, **own, **dict.fromkeys(_OF_GROUPS, bool)}


def parse_optim_args(text: str | None) -> dict[str, float | bool | None]:
    """Parse `--optim_args`, such as "max_trust_ratio=10,bias_correction=false".

    Args:
        text: items `key=value`, separated by commas. Keys are `beta1`, `beta2`, `adapt_all` and `split` (see
            `lamb_param_groups`), and the options of `Lamb` except lr, betas and weight_decay. Numbers are Python's;
            booleans are true/false, yes/no or 1/0; `none` is accepted if `Lamb` accepts None.

    Returns:
        The options in `text`, with values of their types.

    Raises:
        ValueError: `text` is not a string; an item is not key=value; a key is unknown or repeated; a value has the
            wrong type.
    """
    options: dict[str, float | bool | None] = {}
    for key, value in items_of(text, "eps=1e-6,max_trust_ratio=10"):
        if key in SET_ELSEWHERE:
            raise ValueError(f"optim_args: {key} is not set here; {SET_ELSEWHERE[key]}")
        if key not in _options():
            hint = did_you_mean(key.lower(), _options())
            raise ValueError(f"optim_args: unknown option {key!r}{hint}; LAMB has {', '.join(_options())}")
        if key in options:
            raise ValueError(f"optim_args: {key} is given twice")
        options[key] = _typed(key, value)
    return options


def items_of(text: Any, example: str) -> Iterator[tuple[str, str]]:
    """Yield the keys and values as text; raise ValueError for what is not key=value."""
    if not text:
        return
    if not isinstance(text, str):
        if isinstance(text, dict) and not any(isinstance(value, (dict, list, tuple)) for value in text.values()):
            example = ",".join(f"{key}={value}" for key, value in text.items())
        raise ValueError(f'optim_args: {text!r} is no string; write for example "{example}"')
    for item in "".join(text.split()).split(","):
        key, _, value = item.partition("=")
        if not key or not value or "=" in value:
            raise ValueError(f'optim_args: {item!r} is not key=value; write for example "{example}"')
        yield key, value


def _typed(key: str, value: str) -> float | bool | None:
    kinds = get_args(_options()[key]) or (_options()[key],)
    optional = type(None) in kinds
    if optional and value.lower() == "none":
        return None
    if bool in kinds:
        if value.lower() in _BOOLS:
            return _BOOLS[value.lower()]
        wanted = "true or false"
    else:
        try:
            return float(value)
        except ValueError:
            wanted = "a number"
    raise ValueError(f"optim_args: {key}={value}: expected {wanted}{' or none' if optional else ''}")


# True while LambTrainer creates its optimizer: its loss does not depend on the split of the batch, so `new_lamb` does
# not warn about that.
loss_is_weighted: ContextVar[bool] = ContextVar("loss_is_weighted", default=False)

# True while LambTrainer trains or creates its optimizer; other trainers do not know what LambTrainingArguments add.
is_lamb_trainer: ContextVar[bool] = ContextVar("is_lamb_trainer", default=False)


def _model_warnings(model: nn.Module, args: TrainingArguments) -> list[str]:
    """Return warnings, one line each, about this model and these arguments under LAMB."""
    doubts = []
    base: Any = getattr(model, "get_base_model", None)
    own = base() if callable(base) else model  # the model inside of PEFT's, as Trainer does it
    low = {str(p.dtype) for p in model.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)}
    if low:
        doubts.append(
            "load the model in float32 and train with --bf16: trainable parameters are "
            f"{' and '.join(sorted(low))}, in which most small updates are rounded to zero"
        )
    splits = args.gradient_accumulation_steps * args.world_size
    if splits > 1 and not loss_is_weighted.get() and inflates_loss(own):
        doubts.append(
            f"use hf_lamb.LambTrainer, or set {type(own).__name__}.accepts_loss_kwargs = False: the model ignores "
            f"num_items_in_batch, so Trainer multiplies its loss and gradient by {splits} (accumulation x processes; "
            "https://github.com/huggingface/transformers/issues/47688)"
        )
    zero = [name for name, param in model.named_parameters() if _is_zero_matrix(param)]
    if zero:
        doubts.append(
            f"train LoRA with AdamW, or give lamb_param_groups(..., exclude_from_layer_adaptation=[...]): {len(zero)} "
            f"matrices start at 0, such as {zero[0]}, and a trust ratio lets them grow only by about the part "
            "learning_rate of their norm in a step"
        )
    return doubts


def _is_zero_matrix(param: nn.Parameter) -> bool:
    """Return whether a trainable matrix is 0, where this process has all of it and its values."""
    here = type(param.data) is torch.Tensor and not param.is_meta
    return here and param.requires_grad and sum(size > 1 for size in param.shape) > 1 and not param.any()


def inflates_loss(model: nn.Module) -> bool:
    """Return whether `forward` takes loss kwargs but ignores `num_items_in_batch` and returns its own mean.

    Trainer relies on such a `forward` to normalise the loss. This function reads the source of `forward`;
    `LambTrainer` tries the model on data instead.
    """
    forward = inspect.unwrap(type(model).forward)
    kinds = {parameter.kind for parameter in inspect.signature(forward).parameters.values()}
    if not getattr(model, "accepts_loss_kwargs", inspect.Parameter.VAR_KEYWORD in kinds):
        return False
    try:
        source = inspect.getsource(forward)
    except (OSError, TypeError):
        return False
    own_mean = "CrossEntropyLoss" in source or "loss_fct(" in source
    return own_mean and "loss_function" not in source and "num_items_in_batch" not in source


def options_of(args: TrainingArguments) -> dict[str, Any]:
    """Return the options of `Lamb` from training arguments, and `adapt_all` and `split` if `optim_args` has them.

    Raises:
        ValueError: `parse_optim_args` or `Lamb` refuse an option; the DeepSpeed configuration replaces LAMB by
            CPU-Adam.
    """
    from transformers import TrainingArguments

    _refuse_cpu_adam(getattr(args, "deepspeed_plugin", None))
    given = parse_optim_args(args.optim_args)
    options: dict[str, Any] = {
        "lr": args.learning_rate,
        "betas": (given.pop("beta1", args.adam_beta1), given.pop("beta2", args.adam_beta2)),
        "weight_decay": args.weight_decay,
    }
    trainers, own = (cls.__dataclass_fields__["adam_epsilon"].default for cls in (TrainingArguments, type(args)))
    # Trainer's default is for Adam. Use `adam_epsilon` if the user has set it, or if a subclass has another default.
    if args.adam_epsilon != trainers or own != trainers:
        options["eps"] = args.adam_epsilon
    options |= given
    try:
        Lamb([torch.empty(0)], **{option: value for option, value in options.items() if option not in _OF_GROUPS})
    except RuntimeError as error:  # options that exclude each other
        raise ValueError(f"optim_args: {error}") from None
    return options


def _refuse_cpu_adam(deepspeed_plugin: Any) -> None:
    """Raise ValueError if accelerate would replace LAMB by DeepSpeedCPUAdam.

    accelerate does this silently in `Accelerator._prepare_deepspeed`, and keeps only lr and weight_decay.
    """
    config = getattr(deepspeed_plugin, "deepspeed_config", None) or {}
    offload = (config.get("zero_optimization") or {}).get("offload_optimizer") or {}
    if offload.get("device", "none") != "none" and config.get("zero_force_ds_cpu_optimizer", True):
        raise ValueError(
            'optim="lamb": set "zero_force_ds_cpu_optimizer": false in the DeepSpeed configuration file: otherwise '
            "accelerate replaces an offloaded optimizer by DeepSpeedCPUAdam"
        )


def _refuse_ignored(args: TrainingArguments) -> None:
    """Raise ValueError for options of LambTrainingArguments that this trainer would ignore."""
    for name in ("base_learning_rate", "batch_size_schedule", "decay_power"):
        if getattr(args, name, None) is not None and not is_lamb_trainer.get():
            raise ValueError(
                f"{name} {getattr(args, name)!r}: use hf_lamb.LambTrainer in place of this trainer, which would "
                f"ignore it, or leave {name} out"
            )


def new_lamb(ctx: OptimizerContext) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Trainer's handler: return the class and the options of the optimizer, and log warnings.

    Raises:
        ValueError: as `options_of`; or the arguments give a rate, decay or batch that the trainer does not know.
    """
    args = ctx.args
    _refuse_ignored(args)
    kwargs = options_of(args)
    choices = {name: bool(kwargs.pop(name)) for name in _OF_GROUPS if name in kwargs}
    choices["fixed_norm"] = bool(kwargs.get("fixed_norm", False))
    warnings = []
    if args.learning_rate < 1e-4:
        warnings.append(
            f"learning_rate is {args.learning_rate:g}: use about 1e-3 to 1e-2 for BERT pretraining; LAMB's rate is "
            "relative to the norm of the weights, so with AdamW's rates they hardly change"
        )
    if "eps" not in kwargs:
        eps = inspect.signature(Lamb).parameters["eps"].default
        warnings.append(
            f"eps is {eps:g}, LAMB's default, because adam_epsilon is at Trainer's default {args.adam_epsilon:g}; "
            f'choose it with --optim_args "eps={eps:g}"'
        )
    if ctx.model is None:
        warnings.append("no model was given, so the caller's parameter groups decide what decays and what adapts")
    else:
        warnings += _model_warnings(fsdp1.unwrapped(ctx.model), args)
    if args.should_log:
        for line in warnings:
            warn_once(f'optim="lamb": {line}')
    return (Lamb if ctx.model is None else _lamb_of(ctx.model, choices)), kwargs


def _lamb_of(model: nn.Module, choices: dict[str, bool]) -> type[Lamb]:
    """Return a class that builds `Lamb` from Trainer's parameter groups of this model.

    Trainer's groups, also those of a subclass, decide weight decay and learning rates; `split_by_adaptation` adds
    names, which parameters adapt, the layers of fused ones and, with `fixed_norm`, which keep their norms; `choices`
    are its arguments. It must be a class: Trainer does not pass its groups to a factory function.
    """

    class LambOfModel(Lamb):
        def __new__(cls, params: Iterable[Any], **options: Any) -> Any:
            groups = split_by_adaptation(model, params, **choices)
            if options.get("layer_adaptation") is False:
                # The groups have "layer_adaptation", which would override this option.
                groups = [{**group, "layer_adaptation": False} for group in groups]
            optimizer = Lamb(groups, **options)
            optimizer.attach(model)  # changes nothing unless a runtime hides the layers
            if not loss_is_weighted.get():
                optimizer.register_step_post_hook(_SkippedSteps())
            return optimizer  # a plain Lamb, because it must pickle

    LambOfModel.__name__ = LambOfModel.__qualname__ = Lamb.__name__
    return LambOfModel


class _SkippedSteps:
    """A step hook that warns of skipped steps, and raises after 20 in a row.

    It is for a stock Trainer, which logs a loss of 0.0 and continues; `LambTrainer` has `SkippedStepsCallback`. It
    checks after each of the first ten steps and every twentieth step, because each check synchronises with the device.

    Raises:
        RuntimeError: the last 20 steps were skipped.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.warned = False

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.steps += 1
        if self.steps > 10 and self.steps % 20:
            return
        assert isinstance(optimizer, Lamb)
        total, in_a_row = optimizer.skipped_steps()
        remedy = "check weights and data for inf or NaN, and lower the learning rate"
        if in_a_row >= 20:
            raise RuntimeError(
                f'optim="lamb": the last {in_a_row} steps were skipped, because gradients were inf or NaN: {remedy}'
            )
        if total and not self.warned:
            self.warned = True
            logger.warning(
                f'optim="lamb": {total} of the first {self.steps} steps skipped, because gradients were inf or NaN; '
                f"a skipped step does not change the weights: {remedy}"
            )
