"""Other people's LAMBs, where they are installed, for the tests that compare with them and the benchmarks."""

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple

from torch.optim import Optimizer


class Peer(NamedTuple):
    """One of them: an optimizer of `params` and `lr`."""

    name: str  # in the tables
    load: Callable[[], type[Optimizer]]
    options: dict[str, Any]
    distribution: str


def timm_lamb() -> type[Optimizer]:
    """timm's Lamb from its own file, which needs torch alone: timm itself imports torchvision.

    Raises:
        ImportError: timm is not installed.
    """
    known = _forget("timm")
    try:
        spec = find_spec("timm")
        for package, folder in (("timm", ""), ("timm.optim", "/optim")):
            bare = ModuleType(package)
            places = spec.submodule_search_locations if spec is not None else None
            bare.__path__ = [place + folder for place in places or ()]
            sys.modules[package] = bare
        found: type[Optimizer] = import_module("timm.optim.lamb").Lamb
        return found
    finally:
        _forget("timm")
        sys.modules.update(known)


def _forget(package: str) -> dict[str, ModuleType]:
    """Take the modules of a package out of `sys.modules`, and return them."""
    names = [name for name in sys.modules if name.partition(".")[0] == package]
    return {name: sys.modules.pop(name) for name in names}


def _of(module: str, name: str) -> Callable[[], type[Optimizer]]:
    return lambda: getattr(import_module(module), name)


PEERS = (
    Peer("timm Lamb", timm_lamb, {"max_grad_norm": None}, "timm"),
    Peer("timm Lamb foreach", timm_lamb, {"max_grad_norm": None, "foreach": True}, "timm"),
    Peer("pytorch_optimizer Lamb", _of("pytorch_optimizer", "Lamb"), {"max_grad_norm": 0.0}, "pytorch_optimizer"),
    Peer("torch_optimizer Lamb", _of("torch_optimizer", "Lamb"), {}, "torch_optimizer"),
    Peer("apex FusedLAMB", _of("apex.optimizers", "FusedLAMB"), {"use_nvlamb": True}, "apex"),
    Peer("DeepSpeed FusedLamb", _of("deepspeed.ops.lamb", "FusedLamb"), {}, "deepspeed"),
    Peer("bitsandbytes LAMB (no LAMB)", _of("bitsandbytes.optim", "LAMB"), {}, "bitsandbytes"),
)
