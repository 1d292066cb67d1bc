"""A new method is an object of four functions. Here: a learned blend of the user's mean residual and the prior."""

import jax
import jax.numpy as jnp

import metarec_jax as mr
from metarec_jax.report.write import terminal_table


def shrunken_mean(model: mr.Model) -> mr.Learner:
    """score = apply(x) + w * mean residual of the support, with w = n / (n + k) and k learned."""

    def init(key):
        return {**model.init(key), "shrink": {"log_k": jnp.zeros(())}}

    def adapt(params, support, key):
        residual = support.mask * (support.target - model.apply(params, support.inputs))
        return residual.sum() / (support.mask.sum() + jnp.exp(params["shrink"]["log_k"]))

    def predict(params, adapted, inputs):
        return model.apply(params, inputs) + adapted

    def loss(params, task, key):
        error = predict(params, adapt(params, task.support, key), task.query.inputs) - task.query.target
        value = jnp.sum(task.query.mask * error**2) / jnp.maximum(task.query.mask.sum(), 1)
        return value, {"query_loss": value}

    return mr.Learner(init, adapt, predict, loss, model.tables)


data = mr.synthetic(600, 200, seed=0)
parts = mr.split(data, ["user_cold"])
known = mr.catalogue(data, parts.train)
learner = shrunken_mean(mr.models.content_model(data.columns, size=4))
start = mr.warm_start(learner.init(jax.random.key(0)), parts.train)
found = mr.fit(learner, parts.train, steps=200, params=start)
methods = {"shrunken_mean": found.method, **mr.fit_baselines(parts.train, known, names=["item_mean", "bias"])}
tasks = {"user_cold": mr.make_tasks(parts.test["user_cold"])}
report = mr.evaluate(methods, tasks, known, rating_range=(-10, 10), baselines=("item_mean", "bias"))
print(terminal_table(report))
print(f"learned k: {float(jnp.exp(found.params['shrink']['log_k'])):.2f}")
