"""Small models and tasks that several tests use."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metarec_jax import learners, losses, models
from metarec_jax.core import Column, Examples, Learner, Model, Table, Task
from metarec_jax.data.interactions import Interactions
from metarec_jax.learners import registry
from metarec_jax.learners._cold_rows import made, with_cold_loss

COLUMNS = {
    "user_id": Column("id", 400),
    "user_age": Column("categorical", 5),
    "item_id": Column("id", 600),
    "item_genre": Column("multi", 7),
    "item_year": Column("numeric", 1),
}

IDS = {column: COLUMNS[column] for column in ("user_id", "item_id")}


LEARNERS = [name for name, row in registry.ROWS.items() if row.built_from != "methods"]
"""The learners of the registry that the engine trains: all but the mixture of fitted methods."""


def ids_alone(data: Interactions) -> Interactions:
    """Without features: programs half the size, where a test is not about them."""
    return replace(data, user_features={}, item_features={})


def content(head: str = "dot", size: int = 3, columns=COLUMNS) -> Model:
    return models.content_model(columns, size=size, head=head, hidden=(5,))


def seed_model(size: int = 3) -> Model:
    return models.meta_recommender(400, 600, size=size)


def wide_and_deep(names: tuple[str, ...] = ("deep", "wide", "pair")) -> Model:
    """Three tables that share columns, listed in the order of ``names``: two of ``item_id``, one of both ids."""
    both = ("user_id", "item_id")
    tables = {"deep": Table(600, 3, both[1:]), "wide": Table(600, 1, both[1:]), "pair": Table(600, 3, both)}

    def init(key: jax.Array):
        keys = dict(zip(tables, jax.random.split(key, 3), strict=True))
        drawn = {n: 0.3 * jax.random.normal(keys[n], (tables[n].num_rows, tables[n].size)) for n in names}
        return {"tables": {n: rows.at[0].set(0.0) for n, rows in drawn.items()}, "net": {"mean": jnp.zeros(())}}

    def apply(params, inputs):
        of, user, item = params["tables"], inputs["user_id"], inputs["item_id"]
        joint = of["deep"][item] * of["pair"][user] + of["pair"][item]
        return params["net"]["mean"] + of["wide"][item, 0] + joint.sum(-1)

    return Model(init, apply, {n: tables[n] for n in names})


def tasks(key: jax.Array, count: int, support: int = 6, query: int = 4, columns=COLUMNS) -> Task:
    """Random tasks with repeated items, padding in both parts, and shared user columns."""

    def examples(key: jax.Array, n: int, users: dict) -> Examples:
        k = jax.random.split(key, 5)
        inputs = {
            "item_id": jax.random.randint(k[0], (count, n), 0, columns["item_id"].size).at[:, 1].set(3).at[:, 2].set(3),
            "item_genre": jax.random.randint(k[1], (count, n, 3), 0, 7),
            "item_year": jax.random.normal(k[2], (count, n, 1)),
        }
        inputs = {name: value for name, value in inputs.items() if name in columns} | users
        mask = jnp.ones((count, n)).at[0, -1].set(0.0)
        return Examples(inputs, jax.random.randint(k[3], (count, n), 1, 6).astype(float), mask)

    k = jax.random.split(key, 4)
    users = {
        "user_id": jax.random.randint(k[0], (count, 1), 0, columns["user_id"].size),
        "user_age": jax.random.randint(k[1], (count, 1), 0, 5),
    }
    users = {name: value for name, value in users.items() if name in columns}
    return Task(examples(k[2], support, users), examples(k[3], query, users))


def one(batch: Task, k: int = 0) -> Task:
    return jax.tree.map(lambda a: a[k], batch)


def reads_all_columns(name: str) -> bool:
    """Features reach a learner through the model alone: all columns for two learners and those that read them."""
    return name in ("maml", "ridge", "memory") or registry.row(name).family == "cold rows"


def of_the_registry(name: str, *, whole: bool) -> Learner:
    """A learner of the registry on the small world, with the small options of its row, scored by squares.

    Args:
      whole: with all columns, or with the ids alone.
    """
    row = registry.row(name)
    dot = content("dot", columns=COLUMNS if whole else IDS)
    first = {"columns": COLUMNS, "items": 600}.get(row.built_from, dot)
    options = dict(row.small)
    if row.feedback == "clicks" or row.family == "cold rows" or name == "gaussian_process":
        options["loss"] = losses.mse
    if row.family == "cold rows":
        options["column"] = "user_id"
    if name == "mwuf":
        options["other"] = "item_id"
    built = registry.factory(name)(*((first, ages()) if row.built_from == "content" else (first,)), **options)
    return counted(built) if name == "gaussian_process" else built


def ages() -> Model:
    return models.content_model({"user_age": COLUMNS["user_age"]}, size=3, head="mlp", hidden=(4,))


def every_learner() -> dict[str, Learner]:
    """The shared table of properties runs over these: all of the registry, and variants."""
    dot, mlp, seed = content("dot"), content("mlp"), seed_model()
    aged = made(dot, ages(), column="user_id")
    of_rows = {name: of_the_registry(name, whole=reads_all_columns(name)) for name in LEARNERS}
    with_features = {
        f"{name}_with_features": of_the_registry(name, whole=True)
        for name, row in registry.ROWS.items()
        if not reads_all_columns(name) and row.built_from not in ("columns", "items", "methods")
    }
    return (
        of_rows
        | with_features
        | {
            "maml_all": learners.maml(dot, inner_lr=0.05, inner_steps=2, only=None),
            "maml_seed": learners.maml(seed, inner_lr=0.05, inner_steps=1),
            "maml_mlp": learners.maml(mlp, inner_lr=0.05, inner_steps=7),
            "fomaml": learners.maml(seed, inner_lr=0.05, inner_steps=2, first_order=True),
            "anil": learners.maml(mlp, inner_lr=0.05, inner_steps=2, only=("net/params/out",)),
            "boil": learners.maml(mlp, inner_lr=0.05, inner_steps=2, only=("tables", "net/params/dense_0")),
            "melu": learners.maml(mlp, inner_lr=0.05, inner_steps=2, only=("net",)),
            "meta_sgd": learners.maml(dot, inner_steps=2, rule=learners.meta_sgd(0.05), only=None),
            "inner_adam": learners.maml(
                dot, inner_steps=2, rule=learners.from_optax(optax.adam(0.01, eps_root=1e-8)), only=None
            ),
            "per_step": learners.maml(seed, inner_lr=0.05, inner_steps=3, per_step_losses=True),
            "reptile_all": learners.reptile(dot, inner_lr=0.05, inner_steps=2, only=None),
            "ridge_mlp": learners.ridge(mlp),
            "lslr": learners.maml(seed, inner_steps=2, rule=learners.lslr(0.05, 2)),
            "meta_curvature": learners.maml(mlp, inner_steps=2, rule=learners.meta_curvature(0.05)),
            "lstm": learners.maml(dot, inner_steps=2, rule=learners.lstm(0.05, hidden=3), only=None),
            "first_order_until": learners.maml_plus_plus(seed, inner_lr=0.05, inner_steps=2, first_order_until=0.5),
            "imaml_all": learners.imaml(dot, inner_lr=0.05, inner_steps=8, cg_steps=4, only=None),
            "cavia_mlp": learners.cavia(mlp, size=2, inner_lr=0.05, inner_steps=2),
            "made_logistic": with_cold_loss(
                learners.logistic(aged, newton_steps=4, loss=losses.mse), aged, loss=losses.mse
            ),
            "relation": learners.matching(mlp, similarity="relation", hidden=4),
            "tanp": learners.neural_process(dot, latent=True, clusters=2, size=2, width=4, hidden=(4,)),
            "written_head": learners.hypernetwork(dot, hidden=3, width=4),
            **shared_columns(),
        }
    )


def shared_columns() -> dict[str, Learner]:
    """Learners whose model has several tables on one column, of which some adapt."""
    aged, joint = made(content(), ages(), column="user_id"), wide_and_deep()
    return {
        "own_of_two": learners.maml(aged, inner_lr=0.05, inner_steps=2, only=("tables/user_age",)),
        "made_of_two": learners.maml(aged, inner_lr=0.05, inner_steps=2, only=("tables/content_user_age",)),
        "wide": learners.maml(joint, inner_lr=0.05, inner_steps=2, only=("tables/wide",)),
        "pair": learners.maml(joint, inner_lr=0.05, inner_steps=2, only=("tables/pair", "net")),
        "deep_and_wide": learners.reptile(joint, inner_lr=0.05, inner_steps=2, only=("tables/deep", "tables/wide")),
        "made_in_pair": learners.meta_embedding(joint, ages(), column="user_id", inner_lr=0.05, loss=losses.mse),
        "context_of_pair": learners.cavia(joint, size=2, table="pair", inner_lr=0.05, inner_steps=2),
    }


def counted(learner: Learner) -> Learner:
    """A Gaussian process with counts of 50 invented users."""

    def init(key: jax.Array):
        rated = (jax.random.uniform(key, (50, 600)) < 0.2).astype(jnp.float32)
        residual = rated * jax.random.normal(key, (50, 600))
        sums = {"gram": residual.T @ residual, "pairs": rated.T @ rated, "rest": residual.sum(0), "mu": jnp.float32(3)}
        params = learner.init(key)
        return {**params, "fixed": {**params["fixed"], **sums}}

    return learner._replace(init=init)


def double(tree):
    """Floating leaves as float64."""
    return jax.tree.map(lambda a: a.astype(np.float64) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)


def largest_difference(a, b) -> float:
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max((float(jnp.max(jnp.abs(x - y), initial=0.0)) for x, y in leaves), default=0.0)
