"""Whole catalogues scored in blocks: the same numbers as one user and one item at a time."""

import jax
import jax.numpy as jnp
import numpy as np

from metarec_jax import learners, models
from metarec_jax.baselines import item_knn
from metarec_jax.core import Method
from metarec_jax.data.catalogue import Catalogue, catalogue, inputs
from metarec_jax.data.synthetic import synthetic
from metarec_jax.data.tasks import batches, make_tasks
from metarec_jax.evaluation import scoring
from metarec_jax.learners.item_map import item_map, item_map_scores

DATA = synthetic(30, 40, ratings_per_user=(8, 12), size=2).data
TRAIN = DATA.take(DATA.item != 7)  # an item that training never saw
KNOWN = catalogue(DATA, TRAIN)


def adapted_by(method):
    tasks = make_tasks(DATA, query=2)
    index, task = next(batches(tasks, KNOWN, 8))
    adapted = jax.jit(jax.vmap(method.adapt, (None, 0, None)))(method.params, task.support, jax.random.key(1))
    return adapted, jnp.asarray(tasks.user[index])


def one_by_one(method, adapted, user, items):
    each, predict = [], jax.jit(method.predict)
    for k in range(len(user)):
        own = jax.tree.map(lambda a, k=k: a[k], adapted)
        each.append(predict(method.params, own, inputs(KNOWN, user[k], jnp.asarray(items))))
    return np.stack(each)


def test_chunks_of_items_and_whole_rows_are_the_predictions(monkeypatch):
    monkeypatch.setattr(scoring, "_CHUNK", 8 * 7)  # seven items at a time: the last chunk is not full
    learner = learners.ridge(models.content_model(DATA.columns, size=3))
    ridge = Method(jax.jit(learner.init)(jax.random.key(0)), learner.adapt, learner.predict)
    some = np.array([3, 7, 40, 0])
    for method in (ridge, item_knn(TRAIN, KNOWN)):
        adapted, user = adapted_by(method)
        every = scoring.catalogue_scores(method, adapted, KNOWN, user)
        assert every.shape == (8, 41)
        np.testing.assert_allclose(every, one_by_one(method, adapted, user, np.arange(41)), atol=1e-5)
        np.testing.assert_allclose(
            scoring.catalogue_scores(method, adapted, KNOWN, user, some), every[:, some], atol=1e-5
        )


def test_blocks_hold_the_users_there_are_and_divide_the_batch(monkeypatch):
    assert [s.stop for s in scoring.user_blocks(20, 256, 100)] == [64]
    assert [s.stop for s in scoring.user_blocks(100, 100, 100)] == [50, 100]
    assert [s.stop for s in scoring.user_blocks(3, 4, 10**8)] == [1, 2, 3]  # one row may be larger than a block


def test_weighted_rows_are_a_product_with_a_sparse_matrix():
    rng = np.random.default_rng(0)
    table, ids, values = rng.normal(size=(9, 5)), rng.integers(0, 9, (3, 4)), rng.normal(size=(3, 2, 4))
    dense = np.zeros((3, 2, 9))
    for b in range(3):
        for s in range(4):
            dense[b, :, ids[b, s]] += values[b, :, s]
    found = scoring.weighted_rows(jnp.asarray(table, jnp.float32), jnp.asarray(ids), jnp.asarray(values, jnp.float32))
    np.testing.assert_allclose(found, dense @ table, atol=1e-5)


def test_lists_follow_rank_and_new_items_are_scored_by_their_columns():
    """`scores` has a row per known item; an item without one is scored by ``rank`` on its columns."""
    number = jnp.arange(6.0)[:, None]
    known = Catalogue(jnp.zeros(3, jnp.int32), jnp.array([0, 1, 2, 0, 4, 0]), {}, {"item_number": number})

    def rank(params, adapted, inputs):
        return jnp.where(inputs["item_id"] > 0, 10.0 * inputs["item_id"], inputs["item_number"][:, 0]) + adapted["user"]

    both = Method(
        (),
        lambda p, s, k: {"user": s.target.sum()},
        lambda p, a, x: -rank(p, a, x),
        scores=lambda p, a: a["user"][:, None] + 10.0 * jnp.arange(6)[None],
        rank=rank,
    )
    found = scoring.catalogue_scores(both, {"user": jnp.array([0.0, 0.5])}, known, jnp.array([1, 2]))
    assert found.tolist() == [[0.0, 10.0, 20.0, 3.0, 40.0, 5.0], [0.5, 10.5, 20.5, 3.5, 40.5, 5.5]]


def test_an_item_map_scores_the_catalogue_by_one_product():
    learner = item_map(6, size=2)
    params = learner.init(jax.random.key(0))
    vectors = {"vector": jax.random.normal(jax.random.key(1), (3, 2))}
    each = jax.vmap(lambda v: learner.predict(params, {"vector": v}, {"item_id": jnp.arange(6)}))(vectors["vector"])
    assert np.allclose(item_map_scores(params, vectors)[:, :6], each, atol=1e-6)
