"""Training, evaluation and serving are lowered for CUDA and TPU, with no such device at hand: nothing in them is of the CPU.

`jax.export` takes each program down to StableHLO for the platform. What has no rule there raises, a host callback and a call
of the CPU's LAPACK among others; calls of a vendor's library are compared with a list.
"""

from __future__ import annotations

import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export

from metarec_jax import learners, models
from metarec_jax.core import Learner
from metarec_jax.data.catalogue import catalogue
from metarec_jax.data.draw import task_source
from metarec_jax.data.synthetic import synthetic
from metarec_jax.data.tasks import batches, make_tasks
from metarec_jax.evaluation import scoring
from metarec_jax.serving import catalogue_scores
from metarec_jax.training import loop
from metarec_jax.training.row_optimizers import lazy_adam
from metarec_jax.training.step import Optimizers, init_state, make_step

pytestmark = pytest.mark.slow

VENDOR_CALLS: dict[str, set[str]] = {"cuda": {"cusolver_potrf_ffi"}, "tpu": set()}
"""Of CUDA: the Cholesky factor of ridge's normal matrix."""
DATA = synthetic(60, 40, ratings_per_user=(8, 20), seed=0).data
DOT = models.content_model(DATA.columns, size=4)
MLP = models.content_model(DATA.columns, size=4, head="mlp", hidden=(16, 16))
VARIANTS = ("maml_net_full_rank", "meta_sgd", "reptile")
LEARNERS = {
    "maml_seed": learners.maml(
        models.meta_recommender(DATA.users.num_rows, DATA.items.num_rows, size=4), inner_steps=1
    ),
    "maml_net": learners.maml(MLP, inner_steps=2, only=("net",)),
    "maml_net_full_rank": learners.maml(MLP, inner_steps=2, only=("net",), low_rank=False),
    "meta_sgd": learners.maml(DOT, inner_steps=7, rule=learners.meta_sgd(0.05)),
    "ridge": learners.ridge(DOT),
    "reptile": learners.reptile(DOT, inner_steps=2),
}
each_learner = pytest.mark.parametrize(
    "name", ["maml_net", "ridge", *(pytest.param(n, marks=pytest.mark.slow) for n in ("maml_seed", *VARIANTS))]
)


def lower(function, *arguments) -> None:
    """Lower a jitted function for CUDA and for TPU; fails where that cannot be, or calls what is not on the list."""
    for platform, known in VENDOR_CALLS.items():
        exported = export.export(function, platforms=(platform,))(*arguments)
        assert exported.platforms == (platform,)
        assert set(re.findall(r"custom_call @([\w.]+)", exported.mlir_module())) <= known


@cache
def world():
    """Interactions' catalogue, and a batch of 8 evaluation tasks."""
    known = catalogue(DATA)
    _, task = next(batches(make_tasks(DATA, query=3, support=(1, 6)), known, 8))
    return known, task


def train(learner: Learner, **options) -> None:
    """The loop over outer steps, tasks drawn inside, as an accelerator runs it: all tasks of a batch at once."""
    source = task_source(DATA, tasks=8, support=(2, 6), query=3, **options)
    optimizers = Optimizers(optax.adam(1e-3), lazy_adam(1e-3))
    state = jax.eval_shape(lambda key: init_state(learner, optimizers, learner.init(key), key), jax.random.key(0))
    run = loop._chunk_runner(make_step(learner, source, optimizers, groups=1), 5)
    lower(run, state, source.data, jax.ShapeDtypeStruct((), jnp.int32))


@each_learner
def test_training(name):
    train(LEARNERS[name])


def test_training_in_time_order_with_negatives():
    train(LEARNERS["maml_seed"], order="time", negatives=2, user_drop=0.1, user_rows="own")


@each_learner
def test_evaluation(name):
    """`evaluate`'s programs: adapt, predict, and the scores of the whole catalogue."""
    learner, (known, task) = LEARNERS[name], world()
    params = jax.eval_shape(learner.init, jax.random.key(0))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 8))
    adapt = scoring.compiled(scoring.adapt_each, learner.adapt).call
    predict, rank = (scoring.compiled(of, learner.predict).call for of in (scoring.predict_each, scoring.predictions))
    adapted = jax.eval_shape(adapt, params, task.support, keys)
    users = jax.ShapeDtypeStruct((8,), jnp.int32)
    lower(adapt, params, task.support, keys)
    lower(predict, params, adapted, task.query.inputs)
    lower(rank, params, adapted, known, users, jax.ShapeDtypeStruct((16,), jnp.int32))


@pytest.mark.parametrize("users", [1, pytest.param(4, marks=pytest.mark.slow)])
@each_learner
def test_recommending(name, users):
    """`Recommender`'s programs: adapt, score the catalogue, take the best 5; and the reasons."""
    learner, (known, _) = LEARNERS[name], world()
    params = jax.eval_shape(learner.init, jax.random.key(0))
    slots = [jax.ShapeDtypeStruct((users, 8), dtype) for dtype in (jnp.int32, jnp.float32, jnp.float32)]
    batch = catalogue_scores.Users(*slots, jax.ShapeDtypeStruct((users,), jnp.int32))
    plan = catalogue_scores.Plan(learner.adapt, learner.predict, 5, 16)
    lower(catalogue_scores.best, plan, params, known, {}, batch, jax.random.key(0))
    best = jax.ShapeDtypeStruct((users, 5), jnp.int32)
    static = (learner.adapt, learner.predict, False, 16)
    lower(catalogue_scores.contributions, *static, params, known, {}, batch, best, jax.random.key(0))


def callback(x):
    return jax.pure_callback(lambda x: np.asarray(x), x, x)


def debug_callback(x):
    jax.debug.callback(lambda x: None, x)
    return x


def lapack(x):
    """A Schur form, for which JAX has only the CPU's LAPACK."""
    return x + jax.scipy.linalg.schur(jnp.eye(3) * jax.lax.stop_gradient(x))[0].sum() * 0.0


@pytest.mark.parametrize("only_here", [callback, debug_callback, lapack])
def test_what_only_a_cpu_can_do_is_found(only_here):
    """A learner whose loss goes by the host, or by LAPACK, trains here and is not lowered for an accelerator."""
    ridge = LEARNERS["ridge"]

    def loss(params, task, key):
        value, metrics = ridge.loss(params, task, key)
        return value, {**metrics, "seen": only_here(jax.lax.stop_gradient(value))}

    learner = ridge._replace(loss=loss)
    task = jax.tree.map(lambda a: a[0], world()[1])
    assert float(jax.jit(learner.loss)(learner.init(jax.random.key(0)), task, jax.random.key(0))[0]) > 0
    with pytest.raises((NotImplementedError, ValueError, AssertionError)):
        train(learner)


def test_a_library_that_is_not_on_the_list_is_found(monkeypatch):
    monkeypatch.setitem(VENDOR_CALLS, "cuda", set())
    with pytest.raises(AssertionError, match="cusolver_potrf_ffi"):
        train(LEARNERS["ridge"])
