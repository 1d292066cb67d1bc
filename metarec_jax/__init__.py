"""Meta-learning for recommender systems, on JAX.

The names below are the library; each is imported when it is first used, so that ``import metarec_jax`` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metarec_jax.baselines.tuning import fit_baselines
    from metarec_jax.core import Column, Examples, Learner, MetarecError, MetarecWarning, Method, Model, Table, Task
    from metarec_jax.cpu import tune_cpu
    from metarec_jax.data.interactions import Interactions
    from metarec_jax.data.io.datasets import load
    from metarec_jax.data.io.published import read_partition
    from metarec_jax.data.io.readers import from_pandas, read
    from metarec_jax.data.splits import Split, split
    from metarec_jax.data.synthetic import synthetic
    from metarec_jax.data.tasks import catalogue, make_tasks, task_source
    from metarec_jax.evaluation.evaluate import evaluate
    from metarec_jax.learners._starts import warm_start
    from metarec_jax.learners.cavia import cavia
    from metarec_jax.learners.gaussian_process import gaussian_process, gaussian_process_start
    from metarec_jax.learners.hypernetwork import hypernetwork
    from metarec_jax.learners.imaml import imaml
    from metarec_jax.learners.in_context import in_context
    from metarec_jax.learners.item_map import item_map, item_map_start
    from metarec_jax.learners.leo import leo
    from metarec_jax.learners.logistic import logistic
    from metarec_jax.learners.maml import maml
    from metarec_jax.learners.maml_plus_plus import maml_plus_plus
    from metarec_jax.learners.matching import matching
    from metarec_jax.learners.memory import memory
    from metarec_jax.learners.neural_process import neural_process
    from metarec_jax.learners.protomaml import protomaml
    from metarec_jax.learners.protonet import protonet
    from metarec_jax.learners.reptile import reptile
    from metarec_jax.learners.ridge import ridge
    from metarec_jax.models.content import content_model, flax_model, meta_recommender, nnx_model
    from metarec_jax.report.write import write_report
    from metarec_jax.serving.recommender import Recommender
    from metarec_jax.training.devices.sharding import make_mesh
    from metarec_jax.training.loop import fit

_HOMES = {
    "core": ("Column", "Examples", "Learner", "MetarecError", "MetarecWarning", "Method", "Model", "Table", "Task"),
    "cpu": ("tune_cpu",),
    "data.io.datasets": ("load",),
    "data.interactions": ("Interactions",),
    "data.io.readers": ("from_pandas", "read"),
    "data.io.published": ("read_partition",),
    "data.splits": ("Split", "split"),
    "data.synthetic": ("synthetic",),
    "data.tasks": ("catalogue", "make_tasks", "task_source"),
    "evaluation.evaluate": ("evaluate",),
    "learners": (
        "cavia",
        "gaussian_process",
        "gaussian_process_start",
        "hypernetwork",
        "imaml",
        "in_context",
        "item_map",
        "item_map_start",
        "leo",
        "logistic",
        "maml",
        "maml_plus_plus",
        "matching",
        "memory",
        "neural_process",
        "protomaml",
        "protonet",
        "reptile",
        "ridge",
        "warm_start",
    ),
    "models.content": ("content_model", "flax_model", "meta_recommender", "nnx_model"),
    "serving.recommender": ("Recommender",),
    "report.write": ("write_report",),
    "training.loop": ("fit",),
    "training.devices.sharding": ("make_mesh",),
    "baselines.tuning": ("fit_baselines",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [  # noqa: RUF022
    "load", "read", "from_pandas", "synthetic", "Interactions", "split", "read_partition", "Split",
    "catalogue", "make_tasks", "task_source",
    "content_model", "meta_recommender", "flax_model", "nnx_model",
    "ridge", "maml", "reptile", "warm_start", "fit", "make_mesh",
    "logistic", "maml_plus_plus", "imaml", "cavia", "protomaml",
    "protonet", "matching", "neural_process", "in_context", "hypernetwork", "leo", "memory",
    "gaussian_process", "gaussian_process_start", "item_map", "item_map_start",
    "fit_baselines", "evaluate", "write_report", "Recommender", "tune_cpu",
    "Column", "Examples", "Learner", "MetarecError", "MetarecWarning", "Method", "Model", "Table", "Task",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'metarec_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"metarec_jax.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
