"""Meta-learning for recommender systems, on JAX.

`train` is the command line's ``metarec fit`` in Python; `fit`, `evaluate` and the rest are its parts. Learners, models,
losses, metrics and baselines are in namespaces: ``mr.learners.maml``. Each name is imported when it is first used, so
that ``import metarec_jax`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "core": ("Column", "Examples", "Learner", "MetarecError", "MetarecWarning", "Method", "Model", "Table", "Task"),
    "cpu": ("tune_cpu",),
    "data.interactions": ("Interactions",),
    "data.io.datasets": ("load",),
    "data.io.published": ("read_partition",),
    "data.io.readers": ("from_pandas", "read"),
    "data.splits": ("Split", "split"),
    "data.catalogue": ("catalogue",),
    "data.draw": ("task_source",),
    "data.tasks": ("make_tasks",),
    "evaluation.evaluate": ("evaluate",),
    "experiment.run": ("Run", "open_run", "recipe", "train"),
    "learners": ("warm_start",),
    "baselines.tuning": ("fit_baselines",),
    "report.write": ("write_report",),
    "serving.recommender": ("Recommender",),
    "training.devices.sharding": ("make_mesh",),
    "training.loop": ("fit",),
}
_HOME = {name: (home, name) for home, names in _HOMES.items() for name in names}
_HOME["synthetic"] = ("data.synthetic", "interactions")
_NAMESPACES = {
    "baselines": "baselines",
    "data": "data",
    "learners": "learners",
    "losses": "losses",
    "metrics": "evaluation.metrics",
    "models": "models",
}

__all__ = [  # noqa: RUF022
    "train", "open_run", "Run", "Recommender", "recipe",
    "load", "read", "from_pandas", "synthetic", "Interactions", "split", "read_partition", "Split",
    "catalogue", "make_tasks", "task_source", "warm_start", "fit", "make_mesh", "fit_baselines", "evaluate",
    "write_report", "tune_cpu",
    "Column", "Examples", "Learner", "MetarecError", "MetarecWarning", "Method", "Model", "Table", "Task",
    "baselines", "data", "learners", "losses", "metrics", "models",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _NAMESPACES:
        return importlib.import_module(f"metarec_jax.{_NAMESPACES[name]}")
    if name not in _HOME:
        raise AttributeError(f"module 'metarec_jax' has no attribute {name!r}")
    home, own_name = _HOME[name]
    return getattr(importlib.import_module(f"metarec_jax.{home}"), own_name)


def __dir__() -> list[str]:
    return sorted(__all__)
