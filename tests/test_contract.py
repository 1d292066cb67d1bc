"""One table: every learner against every property of the contract."""

from __future__ import annotations

from functools import cache, partial

import jax
import jax.numpy as jnp
import optax
import pytest
from worlds import (
    IDS,
    content,
    double,
    every_learner,
    largest_difference,
    one,
    seed_model,
    shared_columns,
    tasks,
    wide_and_deep,
)
from worlds import (
    LEARNERS as OF_REGISTRY,
)

from metarec_jax import learners, losses
from metarec_jax.core import MetarecError, Task
from metarec_jax.data.draw import TaskSource
from metarec_jax.learners import registry
from metarec_jax.training.row_optimizers import lazy_adam
from metarec_jax.training.step import Optimizers, _groups, init_state, loss_and_grads, make_step

LEARNERS = every_learner()
KEY = jax.random.key(0)
BY_DEFAULT = {"ridge", "item_map", "protonet", "maml", "autoencoder", "meta_embedding", "pair"}
"""One of each way to adapt, and one of several tables on a column; the others are slow."""
DIVIDES = {name for name in OF_REGISTRY if registry.row(name).whole}
"""Learners whose loss divides a task at random, so that it is not that of what `adapt` and `predict` give."""
each_learner = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in BY_DEFAULT)) for name in LEARNERS]
)


@cache
def world(name: str, count: int = 3):
    with jax.enable_x64(False):
        columns = set(LEARNERS[name].tables)
        batch = tasks(jax.random.key(1), count)
        if name == "gaussian_process":  # new users: of one it has counted, the loss leaves out what he gave
            batch = Task(*(e._replace(inputs={**e.inputs, "user_id": 0 * e.inputs["user_id"]}) for e in batch))
        if columns == {"user_id", "item_id"}:
            keep = lambda e: e._replace(inputs={c: e.inputs[c] for c in columns})  # noqa: E731
            batch = Task(keep(batch.support), keep(batch.query))
        params = jax.jit(LEARNERS[name].init)(KEY)
    return LEARNERS[name], params, batch


@each_learner
def test_row_view_equals_dense_and_padding_has_no_gradient(name, float64):
    """Gradient of the batch through row views, scattered back, against jax.grad over whole tables: max |diff| <= 1e-12.

    Garbage in the padded slots of support and query, nan even, changes neither.
    """
    learner, params, batch = world(name)
    params, batch = double(params), double(batch)

    def dense_loss(params, batch):
        keys = jax.random.split(KEY, 3)
        return jax.vmap(learner.loss, (None, 0, 0))(params, batch, keys)[0].mean()

    by_rows, dense = jax.jit(partial(loss_and_grads, learner)), jax.jit(jax.value_and_grad(dense_loss))
    want_value, want = dense(params, batch)
    (value, _), grads, ids = by_rows(params, batch, KEY)
    got = dict(grads["dense"], tables=dict(grads["whole"]))
    for table, rows in grads["rows"].items():
        size = params["tables"][table].shape[1]
        flat = rows.reshape(-1, size)
        got["tables"][table] = jnp.zeros_like(params["tables"][table]).at[ids[table].reshape(-1)].add(flat)
    assert grads["rows"] or not learner.tables, "the world must be large enough that some table is viewed"
    assert abs(float(value - want_value)) < 1e-12
    assert largest_difference(got, {k: want[k] for k in got}) < 1e-12
    spoil = lambda e: e._replace(target=e.target.at[0, -1].set(jnp.nan))  # noqa: E731  the last slot of task 0 has mask 0
    spoiled = Task(spoil(batch.support), spoil(batch.query))
    assert largest_difference(by_rows(params, spoiled, KEY)[1], grads) < 1e-12
    assert largest_difference(dense(params, spoiled)[1], want) < 1e-12


@pytest.mark.parametrize("name", shared_columns())
def test_served_equals_dense_where_tables_share_a_column(name, float64):
    """The loss of what `adapt` and `predict` give, and that of the loss over whole tables: |diff| <= 1e-12."""
    learner, params, batch = world(name)
    params, task = double(params), one(double(batch), 1)

    @jax.jit
    def both(params, task):
        scores = score(learner, params, task.support, task.query.inputs)
        served = losses.mse(scores, task.query.target, where=task.query.mask)
        return served, learner.loss(params, task, KEY)[1]["query_loss"]

    served, dense = both(params, task)
    assert float(served) == pytest.approx(float(dense), abs=1e-12)


def test_the_order_of_tables_changes_nothing(float64):
    """Three tables on two columns, in two orders of which no place is the same: one loss and one gradient."""
    batch = double(tasks(jax.random.key(1), 3))
    runs = []
    for names in (("deep", "wide", "pair"), ("pair", "deep", "wide")):
        learner = learners.maml(wide_and_deep(names), inner_lr=0.05, inner_steps=2, only=("tables/wide",))
        params = double(jax.jit(learner.init)(KEY))
        (value, _), grads, ids = jax.jit(partial(loss_and_grads, learner))(params, batch, KEY)
        tables = {n: jnp.zeros((600, g.shape[-1])).at[ids[n]].add(g) for n, g in grads["rows"].items()}
        runs.append((value, tables))
    assert largest_difference(*runs) < 1e-12


def rough_step(name, dtype):
    learner, params, batch = world(name)
    source, optimizers = TaskSource(batch, lambda data, key: data, 3), Optimizers(optax.adam(1e-2), lazy_adam(1e-2))
    return make_step(learner, source, optimizers, dtype=dtype), init_state(learner, optimizers, params, KEY), batch


@each_learner
def test_a_step_in_bfloat16_can_be_traced_and_keeps_the_state(name):
    """What the learner computes in is not what is kept: parameters and moments have the types that they had."""
    step, state, batch = rough_step(name, jnp.bfloat16)
    after, metrics = jax.eval_shape(step, state, batch)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), after) == jax.tree.map(lambda a: (a.shape, a.dtype), state)
    assert metrics["loss"].shape == ()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["logistic", "ridge"])
def test_a_closed_form_in_bfloat16_is_near_that_in_float32(name):
    seen = []
    for dtype in (None, jnp.bfloat16):
        step, state, batch = rough_step(name, dtype)
        state, metrics = jax.jit(step)(state, batch)
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state.params))
        seen.append(float(metrics["query_loss"]))
    assert seen[1] == pytest.approx(seen[0], rel=0.05)


def score(learner, params, support, inputs, key=KEY):
    return learner.predict(params, learner.adapt(params, support, key), inputs)


@each_learner
def test_one_task_at_a_time_is_the_same(name):
    """Every property of `adapt` and `predict` that one compiled program can show.

    vmap == loop; the loss is what adapt and predict give (the compact change laid over is what the loss scores); garbage in
    padding changes nothing; support order changes nothing; no support and one example give finite scores.
    """
    learner, params, batch = world(name)
    n = batch.support.mask.shape[1]

    def spoil(e):  # the last slot of task 0 has mask 0
        inputs = {c: v.at[-1].set(v[0]) if v.shape[0] > 1 else v for c, v in e.inputs.items()}
        return e._replace(inputs=inputs, target=e.target.at[-1].set(jnp.nan))

    @jax.jit
    def run(params, batch, task):
        keys = jax.random.split(KEY, 3)
        turned = jax.tree.map(lambda a: a[::-1] if a.shape[0] == n else a, task.support)
        few = [task.support._replace(mask=task.support.mask * (jnp.arange(n) < k)) for k in (0, 1)]
        variants = jax.tree.map(lambda *a: jnp.stack(a), task.support, spoil(task.support), turned, *few)
        together = jax.vmap(lambda t, k: score(learner, params, t.support, t.query.inputs, k))(batch, keys)
        several = jax.vmap(lambda s: score(learner, params, s, task.query.inputs))(variants)
        alone = score(learner, params, task.support, task.query.inputs)
        return together[0], alone, several, learner.loss(params, task, KEY)[1]["query_loss"]

    task = one(batch)
    together, alone, (same, spoiled, turned, none, single), query_loss = run(params, batch, task)
    assert alone.shape == (4,)
    assert largest_difference(together, alone) < 2e-5
    assert largest_difference(same, alone) < 2e-5
    assert largest_difference(spoiled, alone) < 2e-5
    assert largest_difference(turned, alone) < 2e-5
    assert bool(jnp.isfinite(none).all())
    assert bool(jnp.isfinite(single).all())
    if name in DIVIDES:
        return
    mse = jnp.sum(task.query.mask * (alone - task.query.target) ** 2) / task.query.mask.sum()
    assert float(mse) == pytest.approx(float(query_loss), rel=1e-4)


@each_learner
def test_adapted_is_small(name):
    """What a user owns never has the size of the catalogue."""
    learner, params, batch = world(name)
    adapted = jax.eval_shape(learner.adapt, params, one(batch).support, KEY)
    rows = [leaf.shape[0] for leaf in jax.tree.leaves(adapted) if leaf.ndim]
    assert all(n < 400 for n in rows)


def test_adapted_holds_what_adapts_and_no_more():
    """ANIL on (dense_0, out): the last layer alone; the user's row alone: one table's rows and nothing dense."""
    for name, rest, tables in (
        ("anil", {"net/params/out/kernel", "net/params/out/bias"}, set()),
        ("maml", set(), {"user_id"}),
    ):
        learner, params, batch = world(name)
        adapted = jax.eval_shape(learner.adapt, params, one(batch).support, KEY)
        assert set(adapted["rest"]) == rest
        assert set(adapted["rows"]) == tables


@each_learner
def test_one_trace_in_ten_steps_and_the_state_keeps_its_form(name):
    learner, params, batch = world(name)
    source = TaskSource(batch, lambda data, key: data, 3)
    optimizers = Optimizers(optax.adam(1e-2), lazy_adam(1e-2))
    traces = 0

    def counted(state, data):
        nonlocal traces
        traces += 1
        return make_step(learner, source, optimizers)(state, data)

    state = init_state(learner, optimizers, params, KEY)
    step = jax.jit(counted)
    state, first = step(state, batch)
    form = jax.tree.map(lambda a: (a.shape, a.dtype), state)
    seen = traces
    for _ in range(9):
        state, metrics = step(state, batch)
    assert traces == seen == 1
    assert jax.tree.map(lambda a: (a.shape, a.dtype), state) == form
    assert name in DIVIDES or float(metrics["query_loss"]) < float(first["query_loss"])


def test_the_seed_model_is_one_linear_layer():
    """score = w . [u, v] + b, by hand: w = (1, 2, 3, 4, 5, 6), u = (1, 0, 0), v = (0, 1, 0), b = 7 -> 1 + 5 + 7."""
    model = seed_model()
    params = model.init(KEY)
    params["tables"]["user_id"] = params["tables"]["user_id"].at[1].set(jnp.array([1.0, 0, 0]))
    params["tables"]["item_id"] = params["tables"]["item_id"].at[2].set(jnp.array([0, 1.0, 0]))
    params["net"]["params"]["out"] = {"kernel": jnp.arange(1.0, 7.0)[:, None], "bias": jnp.array([7.0])}
    assert model.apply(params, {"user_id": jnp.array([1]), "item_id": jnp.array([2])}).tolist() == [13.0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ridge", *(pytest.param(n, marks=pytest.mark.slow) for n in ("maml_seed", "melu"))])
def test_groups_change_only_the_order_of_sums(name, float64):
    """6 tasks at once, in 2 groups and in 6: the same loss, metrics and gradients of everything."""
    learner, params, batch = world(name, 6)
    params, batch = double(params), double(batch)
    by_groups = jax.jit(partial(loss_and_grads, learner), static_argnums=3)
    at_once, *others = (by_groups(params, batch, jax.random.key(2), groups) for groups in (1, 2, 6))
    for other in others:
        assert largest_difference(at_once, other) < 1e-12


def test_groups_are_of_at_most_64_tasks_on_a_cpu():
    assert [_groups(n, "cpu") for n in (8, 64, 65, 67, 128, 500, 512)] == [1, 1, 5, 1, 2, 10, 8]  # 67 is prime
    assert _groups(512, "gpu") == 1
    optimizers, source = Optimizers(optax.adam(1e-3), lazy_adam()), TaskSource(None, lambda d, k: None, 6)
    with pytest.raises(MetarecError, match="groups must divide the 6 tasks of a batch on a device, got 4"):
        make_step(LEARNERS["ridge"], source, optimizers, groups=4)


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "per_step"), [(2, False), pytest.param(7, True, marks=pytest.mark.slow)])
def test_remat_changes_no_derivative(steps, per_step, float64):
    """Segments of round(sqrt(k)) steps and what is left: 2 = 2 of 1, 7 = 2 of 3 and 1."""
    batch = double(tasks(jax.random.key(0), 2, columns=IDS))
    found = []
    for remat in (False, True):
        model = content("mlp", columns=IDS)
        learner = learners.maml(model, inner_lr=0.05, inner_steps=steps, per_step_losses=per_step, remat=remat)
        params = double(jax.jit(learner.init)(KEY))
        found.append(jax.jit(partial(loss_and_grads, learner))(params, batch, KEY))
    assert largest_difference(*found) < 1e-12


@pytest.mark.slow
def test_remat_needs_less_memory():
    """64 inner steps: the temporaries of the compiled gradient shrink to a third at the most (8 + 8 carries, not 64)."""
    batch, model = tasks(jax.random.key(0), 4), content("mlp", size=8)
    taken = []
    for remat in (False, True):
        learner = learners.maml(model, inner_steps=64, remat=remat, low_rank=False)
        params = jax.eval_shape(learner.init, KEY)
        compiled = jax.jit(partial(loss_and_grads, learner)).lower(params, batch, KEY).compile()
        taken.append(compiled.memory_analysis().temp_size_in_bytes)
    assert taken[1] < taken[0] / 3


STRICT = {
    "matching": ("prior", "temperature"),
    "protonet": ("prior", "sharpness"),
    "in_context": ("prior",),
    "hypernetwork": ("prior",),
    "leo": ("prior",),
    "neural_process": ("prior",),
    "memory": ("inner_lr",),
    "ridge": ("precision", "bias_precision"),
    "logistic": ("precision", "bias_precision"),
}
"""Numbers whose logarithm is learned, or that a closed form divides by."""
WEIGHTS = {
    "in_context": ("prior_weight",),
    "hypernetwork": ("prior_weight",),
    "leo": ("prior_weight",),
    "neural_process": ("prior_weight", "kl_weight"),
    "memory": ("prior_weight", "prior"),
    "maml": ("prior",),
    "reptile": ("prior",),
    "cavia": ("prior",),
    "protomaml": ("prior",),
    "maml_plus_plus": ("prior",),
}


@pytest.mark.parametrize(("name", "argument"), [(name, a) for name, given in STRICT.items() for a in given])
def test_a_number_that_must_be_above_0_is_refused_in_the_factory(name, argument):
    for value in (0, -1, float("nan"), float("inf"), 1e-40):
        with pytest.raises(MetarecError, match=f"{name}: {argument} must be"):
            getattr(learners, name)(content(), **{argument: value})


@pytest.mark.parametrize(("name", "argument"), [(name, a) for name, given in WEIGHTS.items() for a in given])
def test_a_weight_may_be_0_and_not_less(name, argument):
    factory = getattr(learners, name)
    factory(content(), **{argument: 0})
    for value in (-1, float("nan"), float("inf")):
        with pytest.raises(MetarecError, match=argument):
            factory(content(), **{argument: value})


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name != "matching"))
        for name, given in STRICT.items()
        if "prior" in given
    ],
)
def test_the_least_and_the_largest_prior_are_safe(name):
    """No support at all: a finite loss and finite gradients, at both ends of what the factory takes.

    The prior is a parameter: one program shows both.
    """
    least, largest = (getattr(learners, name)(content(columns=IDS), prior=prior) for prior in (1e-12, 1e12))
    task = one(tasks(KEY, 1), 0)
    task = task._replace(support=task.support._replace(mask=0 * task.support.mask))
    both = jax.jit(lambda key: (least.init(key), largest.init(key)))(KEY)
    assert largest_difference(*both) > 50  # log 1e24
    loss = jax.jit(jax.value_and_grad(lambda p: least.loss(p, task, KEY)[0]))
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves([loss(params) for params in both]))
