"""Makes "lamb" an optimizer name of transformers: in code, on the command line, in JSON and in YAML.

transformers has no hook for third-party optimizers, so `register` adds a member to `OptimizerNames` and a handler to
`_OPTIMIZER_HANDLERS`, the table in which `Trainer` looks up optimizers since transformers 5.2:
https://github.com/huggingface/transformers/blob/v5.2.0/src/transformers/trainer_optimizer.py
"""

from __future__ import annotations

import enum
import importlib
import importlib.util
import logging
import sys
from collections.abc import Callable, Sequence
from functools import cache
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["register"]

logger = logging.getLogger(__name__)
warn_once = cache(logger.warning)


def register() -> None:
    """Make `optim="lamb"` valid in transformers, now if transformers is imported, otherwise when it is imported.

    Importing hf_lamb calls this function; more calls change nothing. If transformers has its own LAMB, or has no table
    of handlers (before 5.2), `register` warns once and changes nothing.
    """
    _waiting.update(_PATCHES)
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    for name in _PATCHES:
        if sys.modules.get(name) is not None:
            _patch(importlib.import_module(name))  # waits for a thread that is importing it right now


def add_member(names: type[enum.Enum], name: str, value: str) -> enum.Enum:
    """Add a member to an existing enumeration of strings. The member pickles as a plain string.

    So a process without this member can load a `training_args.bin`.
    """
    # The class statement itself does this with each member, in every Python since 3.11.
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
    """For "LAMB" and similar names, raise an error that names "lamb" instead of listing all optimizers."""
    missing = names._missing_

    def answer(cls: type[enum.Enum], value: object) -> Any:
        # str() of a member is "OptimizerNames.LAMB", which may be in a user's YAML file.
        if isinstance(value, str) and value.strip().lower().removeprefix("optimizernames.") in ("lamb", "hf_lamb"):
            raise ValueError(f'optim={value!r}: write optim="lamb" (--optim lamb)')
        return missing(value)

    if missing.__name__ != answer.__name__:
        names._missing_ = classmethod(answer)  # type: ignore[assignment]


def _add_handler(trainer_optimizer: ModuleType) -> None:
    from hf_lamb.optim_args import SET_ELSEWHERE, items_of, new_lamb  # imports torch, which transformers has now

    trainer_optimizer._OPTIMIZER_HANDLERS.setdefault("lamb", new_lamb)
    parse = getattr(trainer_optimizer, "_parse_optim_args", None)
    if parse is None or parse.__module__ == __name__:
        return

    def parse_or_name_the_item(text: str | None) -> Any:
        """Parse as transformers does; its error names neither the item nor the option, so raise a better one."""
        try:
            return parse(text)
        except (AttributeError, ValueError):
            for key, _ in items_of(text, "key=value,key=value"):
                if key == "betas":
                    raise ValueError(f"optim_args: betas is not set here; {SET_ELSEWHERE['betas']}") from None
            raise

    # Replace it also in transformers.trainer, which may have imported it already.
    for name in (trainer_optimizer.__name__, "transformers.trainer"):
        if hasattr(sys.modules.get(name), "_parse_optim_args"):
            setattr(sys.modules[name], "_parse_optim_args", parse_or_name_the_item)  # noqa: B010 - mypy knows no such


def _refuse(reason: str) -> None:
    version = getattr(sys.modules.get("transformers"), "__version__", "")
    warn_once(
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
    except AttributeError as error:  # private parts have changed; importing transformers must still work
        _refuse(f"differs from what hf_lamb knows (no {error.name})")
    _waiting.discard(module.__name__)
    if not _waiting and _FINDER in sys.meta_path:
        sys.meta_path.remove(_FINDER)


class _Finder(MetaPathFinder):
    """Finds the modules of `_PATCHES` with the other finders, and patches each one after its own code has run."""

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
        del loader.exec_module  # restores the loader's own method
        loader.exec_module(module)
        if module.__name__ in _PATCHES:  # False if several modules share the loader
            _patch(module)

    loader.exec_module = exec_module
