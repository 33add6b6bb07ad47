"""Makes "lamb" an optimizer name of transformers: in code, on the command line, in JSON and in YAML.

transformers has no hook for optimizers of others, so `register` adds a member to `OptimizerNames` and a handler to
`_OPTIMIZER_HANDLERS`; that table is where `Trainer` looks its optimizers up since transformers 5.2,
https://github.com/huggingface/transformers/blob/v5.2.0/src/transformers/trainer_optimizer.py
"""

from __future__ import annotations

import enum
import importlib
import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import ContextVar
from functools import cache
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
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

__all__ = ["parse_optim_args", "register"]

logger = logging.getLogger(__name__)
_warn_once = cache(logger.warning)


# ---- The name -------------------------------------------------------------------------------------------------------


def register() -> None:
    """Make `optim="lamb"` valid in transformers: at once where it is loaded, else as soon as it gets loaded.

    Importing hf_lamb calls this; calling it again does no harm. A transformers that has a LAMB of its own, or no
    table of handlers (before 5.2), is left as it is, and one warning says so.
    """
    _waiting.update(_PATCHES)
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    for name in _PATCHES:
        if sys.modules.get(name) is not None:
            _patch(importlib.import_module(name))  # waits for a thread that is importing it right now


def add_member(names: type[enum.Enum], name: str, value: str) -> enum.Enum:
    """Add a member to an enumeration of strings that exists already, and have it pickle as a plain string.

    A `training_args.bin` then loads in a process that knows no such member.
    """
    # What the class statement itself does with each member, in every Python since 3.11.
    member = enum._proto_member(value)  # type: ignore[attr-defined]
    setattr(names, name, member)
    member.__set_name__(names, name)
    # Pickle looks this one up on the instance.
    names[name].__dict__["__reduce_ex__"] = lambda protocol: (str, (value,))
    return names[name]


def _add_name(training_args: ModuleType) -> None:
    names = training_args.OptimizerNames
    if importlib.util.find_spec("transformers.trainer_optimizer") is None:
        return _refuse("has no table of optimizer handlers (added in 5.2)")
    taken = next((member for member in names if member.name == "LAMB" or member.value == "lamb"), None)
    if taken is None:
        add_member(names, "LAMB", "lamb")
    elif "__reduce_ex__" not in vars(taken):
        return _refuse("has a LAMB of its own, which stays in place")
    _name_the_misspelt(names)


def _name_the_misspelt(names: type[enum.Enum]) -> None:
    """Have "LAMB" answered with "lamb", not with a list of all optimizers."""
    missing = names._missing_

    def answer(cls: type[enum.Enum], value: object) -> Any:
        # str() of a member, as some write it into YAML, is "OptimizerNames.LAMB".
        if isinstance(value, str) and value.strip().lower().removeprefix("optimizernames.") in ("lamb", "hf_lamb"):
            raise ValueError(f'optim={value!r}: write optim="lamb" (--optim lamb)')
        return missing(value)

    if missing.__name__ != answer.__name__:
        names._missing_ = classmethod(answer)  # type: ignore[assignment]


def _add_handler(trainer_optimizer: ModuleType) -> None:
    trainer_optimizer._OPTIMIZER_HANDLERS.setdefault("lamb", _lamb)
    parse = getattr(trainer_optimizer, "_parse_optim_args", None)
    if parse is None or parse.__module__ == __name__:
        return

    def parse_or_name_the_item(text: str | None) -> Any:
        """As transformers' own; but where that fails, it does not say of what, nor of which option."""
        try:
            return parse(text)
        except (AttributeError, ValueError):
            for key, _ in _items(text, "key=value,key=value"):
                if key == "betas":
                    raise ValueError(f"optim_args: betas is not set here; {_SET_ELSEWHERE['betas']}") from None
            raise

    # And where Trainer has imported it already.
    for name in (trainer_optimizer.__name__, "transformers.trainer"):
        if hasattr(sys.modules.get(name), "_parse_optim_args"):
            setattr(sys.modules[name], "_parse_optim_args", parse_or_name_the_item)  # noqa: B010 - mypy knows no such


def _refuse(reason: str) -> None:
    version = getattr(sys.modules.get("transformers"), "__version__", "")
    _warn_once(
        f'transformers {version} {reason}: optim="lamb" will not select hf_lamb\'s. '
        "Give it to the Trainer yourself: Trainer(..., optimizer_cls_and_kwargs=(hf_lamb.Lamb, {'lr': ...}))"
    )


_PATCHES: dict[str, Callable[[ModuleType], None]] = {
    "transformers.training_args": _add_name,
    "transformers.trainer_optimizer": _add_handler,
}
_waiting: set[str] = set()


def _patch(module: ModuleType) -> None:
    try:
        _PATCHES[module.__name__](module)
    except AttributeError as error:  # their insides have changed; importing transformers must not fail for that
        _refuse(f"differs from what hf_lamb knows (no {error.name})")
    _waiting.discard(module.__name__)
    if not _waiting and _FINDER in sys.meta_path:
        sys.meta_path.remove(_FINDER)


class _Finder(MetaPathFinder):
    """Lets the other finders find the two modules of `_PATCHES`, and patches each once its own code has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _PATCHES:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            _patch_after_exec(spec.loader)
        return spec


_FINDER = _Finder()


def _patch_after_exec(loader: Any) -> None:
    def exec_module(module: ModuleType) -> None:
        del loader.exec_module  # the loader is itself again
        loader.exec_module(module)
        if module.__name__ in _PATCHES:  # else a loader that several modules share
            _patch(module)

    loader.exec_module = exec_module


# ---- The options ----------------------------------------------------------------------------------------------------

_SET_ELSEWHERE = {
    "lr": "use --learning_rate",
    "learning_rate": "use --learning_rate",
    "weight_decay": "use --weight_decay",
    "betas": "use --adam_beta1 and --adam_beta2 (a value holds no comma)",
}
_BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


@cache
def _options() -> dict[str, Any]:
    """The keys of `optim_args` and their types: the options of `Lamb`, as its signature has them, and three more."""
    hints = get_type_hints(Lamb.__init__)
    own = {name: hint for name, hint in hints.items() if name not in {"params", "return", *_SET_ELSEWHERE}}
    return {"beta1": float, "beta2": float, **own, "adapt_all": bool}


def parse_optim_args(text: str | None) -> dict[str, float | bool | None]:
    """Read `--optim_args "max_trust_ratio=10,bias_correction=false"`: the options given, typed.

    Keys are `beta1`, `beta2`, `adapt_all` (see `lamb_param_groups`) and the options of `Lamb`, but for lr, betas and
    weight_decay. Numbers are read as Python does; booleans are true/false, yes/no or 1/0; `none` is accepted where
    `Lamb` accepts None.

    Raises:
        ValueError: no string; an item that is not key=value, an unknown or repeated key, a value of the wrong type.
    """
    options: dict[str, float | bool | None] = {}
    for key, value in _items(text, "eps=1e-6,max_trust_ratio=10"):
        if key in _SET_ELSEWHERE:
            raise ValueError(f"optim_args: {key} is not set here; {_SET_ELSEWHERE[key]}")
        if key not in _options():
            hint = did_you_mean(key.lower(), _options())
            raise ValueError(f"optim_args: unknown option {key!r}{hint}; LAMB has {', '.join(_options())}")
        if key in options:
            raise ValueError(f"optim_args: {key} is given twice")
        options[key] = _typed(key, value)
    return options


def _items(text: Any, example: str) -> Iterator[tuple[str, str]]:
    """The keys and values, not read yet; one line for what is malformed."""
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


# LambTrainer's loss does not depend on the split of the batch; its handler need not warn.
loss_is_weighted: ContextVar[bool] = ContextVar("loss_is_weighted", default=False)


def _doubts(model: nn.Module, args: TrainingArguments) -> list[str]:
    """What makes LAMB pointless or wrong with this model, in a line each."""
    doubts = []
    base: Any = getattr(model, "get_base_model", None)
    own = base() if callable(base) else model  # inside of PEFT's; Trainer looks at it too
    low = {str(p.dtype) for p in model.parameters() if p.requires_grad and p.dtype in (torch.bfloat16, torch.float16)}
    if low:
        doubts.append(
            f"trainable parameters are {' and '.join(sorted(low))}, which rounds most small steps away: load the "
            "model in float32 and train with --bf16"
        )
    splits = args.gradient_accumulation_steps * args.world_size
    if splits > 1 and not loss_is_weighted.get() and inflates_loss(own):
        doubts.append(
            f"{type(own).__name__} ignores num_items_in_batch, so Trainer multiplies its loss and gradient by "
            f"{splits} (accumulation x processes; https://github.com/huggingface/transformers/issues/47688): use "
            f"hf_lamb.LambTrainer, or set {type(own).__name__}.accepts_loss_kwargs = False"
        )
    return doubts


def inflates_loss(model: nn.Module) -> bool:
    """Whether `forward` takes loss kwargs, so that Trainer lets it normalise, but computes a mean of its own.

    Read from the source of `forward`; `LambTrainer`, which has data, finds out by trying.
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
    """The options of `Lamb` that these arguments ask for, and `adapt_all` where it is among them.

    Raises:
        ValueError: what `parse_optim_args` or `Lamb` refuse; a DeepSpeed configuration that replaces LAMB by CPU-Adam.
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
    if args.adam_epsilon != trainers or own != trainers:  # a class with a default of its own means what it holds
        options["eps"] = args.adam_epsilon
    options |= given
    try:
        Lamb([torch.empty(0)], **{option: value for option, value in options.items() if option != "adapt_all"})
    except RuntimeError as error:  # options that this version does not have, or not together
        raise ValueError(f"optim_args: {error}") from None
    return options


def _refuse_cpu_adam(deepspeed_plugin: Any) -> None:
    """accelerate does it without a word (`Accelerator._prepare_deepspeed`), and keeps lr and weight_decay only."""
    config = getattr(deepspeed_plugin, "deepspeed_config", None) or {}
    offload = (config.get("zero_optimization") or {}).get("offload_optimizer") or {}
    if offload.get("device", "none") != "none" and config.get("zero_force_ds_cpu_optimizer", True):
        raise ValueError(
            'optim="lamb": with an offloaded optimizer accelerate puts DeepSpeedCPUAdam in its place: set '
            '"zero_force_ds_cpu_optimizer": false in the DeepSpeed configuration file'
        )


def _lamb(ctx: OptimizerContext) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The handler: what `Trainer` shall build for these arguments and, if given, this model."""
    args = ctx.args
    kwargs = options_of(args)
    adapt_all = bool(kwargs.pop("adapt_all", False))
    said = []
    if args.learning_rate < 1e-4:
        said.append(
            f"learning_rate is {args.learning_rate:g}: LAMB's rate is relative to the weight norm, so AdamW's rates "
            "hardly move it; BERT pretraining takes about 1e-3 to 1e-2"
        )
    if "eps" not in kwargs:
        eps = inspect.signature(Lamb).parameters["eps"].default
        said.append(
            f"eps is {eps:g}, LAMB's default, because adam_epsilon is at Trainer's default {args.adam_epsilon:g}; "
            f'choose it with --optim_args "eps={eps:g}"'
        )
    if ctx.model is None:
        said.append("no model was given, so the caller's parameter groups decide what decays and what adapts")
    else:
        said += _doubts(fsdp1.unwrapped(ctx.model), args)
    if args.should_log:
        for line in said:
            _warn_once(f'optim="lamb": {line}')
    return (Lamb if ctx.model is None else _lamb_of(ctx.model, adapt_all)), kwargs


def _lamb_of(model: nn.Module, adapt_all: bool) -> type[Lamb]:
    """`Lamb` for parameter groups of this model that somebody else has made, Trainer or a subclass of it.

    They say what decays, at which rate; `split_by_adaptation` adds what adapts, and the names. A class and no
    factory, because Trainer keeps its groups, with what its `get_decay_parameter_names` says, from factories.
    """

    class LambOfModel(Lamb):
        def __new__(cls, params: Iterable[Any], **options: Any) -> Any:
            groups = split_by_adaptation(model, params, adapt_all=adapt_all)
            if options.get("layer_adaptation") is False:
                # The groups say which parameters adapt, and would overrule the option.
                groups = [{**group, "layer_adaptation": False} for group in groups]
            optimizer = Lamb(groups, **options)
            if fsdp1.layouts(model):
                optimizer.attach(model)
            if not loss_is_weighted.get():
                optimizer.register_step_post_hook(_SkippedSteps())
            return optimizer  # a plain one, which pickles

    LambOfModel.__name__ = LambOfModel.__qualname__ = Lamb.__name__
    return LambOfModel


class _SkippedSteps:
    """After a step, tells of steps that Lamb has skipped, and ends a run that only skips.

    For a stock Trainer, which logs a loss of 0.0 then and goes on; `LambTrainer` has `SkippedStepsCallback`. Looks
    after each of the first ten steps and every twentieth, because looking waits for the device.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.said = False

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self.steps += 1
        if self.steps > 10 and self.steps % 20:
            return
        assert isinstance(optimizer, Lamb)
        total, in_a_row = optimizer.skipped_steps()
        remedy = "look for inf or NaN in weights and data, and lower the learning rate"
        if in_a_row >= 20:
            raise RuntimeError(
                f'optim="lamb": the last {in_a_row} steps were skipped, because gradients were inf or NaN: {remedy}'
            )
        if total and not self.said:
            self.said = True
            logger.warning(
                f'optim="lamb": {total} of the first {self.steps} steps skipped, because gradients were inf or NaN; '
                f"the weights stay as they are then: {remedy}"
            )
