"""Your own Flax modules under second-order MAML: Linen directly, NNX through split and merge."""

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx

import metarec_jax as mr
from metarec_jax.data.synthetic import synthetic

made = synthetic(500, 200, ratings_per_user=(10, 30), seed=0)
data = made.data


class Multiply(nn.Module):
    """Linen. ``rows`` holds one embedding per column, ``[n, size]`` (or ``[1, size]`` where all examples share it)."""

    @nn.compact
    def __call__(self, rows, inputs):
        x = rows["user_id"] * rows["item_id"]
        return nn.Dense(1)(nn.relu(nn.Dense(16)(jnp.concatenate([x, rows["item_id"]], axis=-1))))[:, 0]


class Sum(nnx.Module):
    """NNX, the same signature."""

    def __init__(self, rngs):
        self.out = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, rows, inputs):
        return self.out(rows["user_id"] + rows["item_id"])[:, 0]


columns = {name: data.columns[name] for name in ("user_id", "item_id")}
parts = mr.split(data, ["user_cold"])
known = mr.catalogue(data, parts.train)
methods = {}
for name, model in {
    "linen": mr.models.flax_model(Multiply(), columns, size=8),
    "nnx": mr.models.nnx_model(lambda rngs: Sum(rngs), columns, size=8),
}.items():
    learner = mr.learners.maml(model, inner_lr=0.1, inner_steps=3)
    methods[name] = mr.fit(learner, parts.train, steps=300, lr=0.01).method
tasks = {"user_cold": mr.make_tasks(parts.test["user_cold"])}
report = mr.evaluate(methods, tasks, known, rating_range=(-10, 10))
for name, row in report.summary().items():
    print(f"{name}: RMSE {row['user_cold']['rmse_pooled'].mean:.3f}; the best possible is {made.best_rmse:.3f}")
