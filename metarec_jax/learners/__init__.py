"""Meta-learners: one file per idea, each with one factory that returns a `core.Learner`; `registry` lists them.

A learner's file and its factory have the same name: ``learners.maml`` is the factory. Each is imported on first use,
so that the registry can be read without importing JAX.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

from metarec_jax.learners.registry import ROWS

_HOMES = {
    "ensemble": ("ensemble",),
    "gaussian_process": ("gaussian_process_start",),
    "item_map": ("item_map_start",),
    "mwuf": ("mwuf_start",),
    "rules": ("Rule", "from_optax", "lslr", "lstm", "meta_curvature", "meta_sgd", "sgd"),
    "_starts": ("warm_start",),
}
_HOME = {name: name for name in ROWS} | {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME)


class _Learners(ModuleType):
    """This package: where Python sets an imported submodule as an attribute, its factory is set instead."""

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, getattr(value, name) if isinstance(value, ModuleType) and name in _HOME else value)


sys.modules[__name__].__class__ = _Learners


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'metarec_jax.learners' has no attribute {name!r}")
    return getattr(importlib.import_module(f"metarec_jax.learners.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "registry"]
