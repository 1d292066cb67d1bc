"""Small models and tasks that several tests use."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metarec_jax import learners, losses, models
from metarec_jax.core import Column, Examples, Learner, Model, Task
from metarec_jax.learners.made_rows import made, with_cold_loss

COLUMNS = {
    "user_id": Column("id", 400),
    "user_age": Column("categorical", 5),
    "item_id": Column("id", 600),
    "item_genre": Column("multi", 7),
    "item_year": Column("numeric", 1),
}


def content(head: str = "dot", size: int = 3) -> Model:
    return models.content_model(COLUMNS, size=size, head=head, hidden=(5,))


def seed_model(size: int = 3) -> Model:
    return models.meta_recommender(400, 600, size=size)


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


def every_learner() -> dict[str, Learner]:
    """The shared table of properties runs over these."""
    dot, mlp, seed = content("dot"), content("mlp"), seed_model()
    ages = models.content_model({"user_age": COLUMNS["user_age"]}, size=3, head="mlp", hidden=(4,))
    aged = made(dot, ages, column="user_id")
    return {
        "maml": learners.maml(dot, inner_lr=0.05, inner_steps=2),
        "maml_seed": learners.maml(seed, inner_lr=0.05, inner_steps=1),
        "maml_mlp": learners.maml(mlp, inner_lr=0.05, inner_steps=7),
        "fomaml": learners.maml(seed, inner_lr=0.05, inner_steps=2, first_order=True),
        "anil": learners.maml(mlp, inner_lr=0.05, inner_steps=2, only=("net/params/out",)),
        "boil": learners.maml(mlp, inner_lr=0.05, inner_steps=2, only=("tables", "net/params/dense_0")),
        "melu": learners.maml(mlp, inner_lr=0.05, inner_steps=2, only=("net",)),
        "user_row": learners.maml(dot, inner_lr=0.05, inner_steps=2, prior=3.0, only=("tables/user_id",)),
        "meta_sgd": learners.maml(dot, inner_steps=2, rule=learners.meta_sgd(0.05)),
        "inner_adam": learners.maml(dot, inner_steps=2, rule=learners.from_optax(optax.adam(0.01, eps_root=1e-8))),
        "per_step": learners.maml(seed, inner_lr=0.05, inner_steps=3, per_step_losses=True),
        "reptile": learners.reptile(dot, inner_lr=0.05, inner_steps=2),
        "ridge": learners.ridge(dot),
        "ridge_mlp": learners.ridge(mlp),
        "lslr": learners.maml(seed, inner_steps=2, rule=learners.lslr(0.05, 2)),
        "meta_curvature": learners.maml(mlp, inner_steps=2, rule=learners.meta_curvature(0.05)),
        "lstm": learners.maml(dot, inner_steps=2, rule=learners.lstm(0.05, hidden=3)),
        "maml_plus_plus": learners.maml_plus_plus(seed, inner_lr=0.05, inner_steps=2, first_order_until=0.5),
        "imaml": learners.imaml(dot, inner_lr=0.05, inner_steps=8, cg_steps=4),
        "cavia": learners.cavia(mlp, size=2, inner_lr=0.05, inner_steps=2),
        "protomaml": learners.protomaml(dot, inner_lr=0.05, inner_steps=2),
        "logistic": learners.logistic(dot, newton_steps=4, loss=losses.mse),
        "fine_tune": learners.fine_tune(dot, lr=0.05, steps=2),
        "item_map": learners.item_map(600, size=3, loss=losses.mse),
        "meta_embedding": learners.meta_embedding(dot, ages, column="user_id", inner_lr=0.05, loss=losses.mse),
        "mwuf": learners.mwuf(dot, ages, column="user_id", other="item_id", hidden=4, inner_lr=0.05, loss=losses.mse),
        "cvar": learners.cvar(dot, ages, column="user_id", latent=2, loss=losses.mse),
        "dropout_net": learners.dropout_net(dot, column="user_id", inner_lr=0.05, loss=losses.mse),
        "made_logistic": with_cold_loss(
            learners.logistic(aged, newton_steps=4, loss=losses.mse), aged, loss=losses.mse
        ),
        "protonet": learners.protonet(dot),
        "matching": learners.matching(dot),
        "relation": learners.matching(mlp, similarity="relation", hidden=4),
        "neural_process": learners.neural_process(mlp, size=2, width=4, hidden=(4,)),
        "tanp": learners.neural_process(dot, latent=True, clusters=2, size=2, width=4, hidden=(4,)),
        "in_context": learners.in_context(dot, width=4, heads=2),
        "hypernetwork": learners.hypernetwork(dot, width=4),
        "leo": learners.leo(dot, latent=2, inner_lr=0.05, inner_steps=2, width=4),
        "written_head": learners.hypernetwork(dot, hidden=3, width=4),
        "memory": learners.memory(dot, slots=2, inner_steps=2),
        "gaussian_process": counted(learners.gaussian_process(COLUMNS, loss=losses.mse)),
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
