"""The whole catalogue scored quickly: the same list as one plain sort of every score, for every kind of method."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metarec_jax import learners, models
from metarec_jax.baselines.closed_form import als, item_knn
from metarec_jax.core import Examples, Method
from metarec_jax.data.catalogue import catalogue, inputs
from metarec_jax.data.interactions import Interactions, Vocabulary
from metarec_jax.serving import linear
from metarec_jax.serving.catalogue_scores import Plan, Users, best, block_size
from metarec_jax.serving.recommender import Recommender

ITEMS = 700
"""Enough for the screen of blocks to leave most of them out."""


def make(num_items=ITEMS, num_users=60, seed=0):
    rng = np.random.default_rng(seed)
    user = np.repeat(np.arange(1, num_users + 1), 30).astype(np.int32)
    item = rng.integers(1, num_items + 1, len(user)).astype(np.int32)
    item[0] = num_items
    rating = rng.integers(1, 6, len(user)).astype(np.float32)
    return Interactions(
        user, item, rating, None, Vocabulary(np.arange(num_users)), Vocabulary(np.arange(1, num_items + 1))
    )


DATA = make()
KNOWN = catalogue(DATA, DATA.take(DATA.item % 5 != 0))  # every fifth item was never seen in training
FULL = KNOWN._replace(item_row=jnp.arange(ITEMS + 1, dtype=jnp.int32))


def served(learner):
    return Method(jax.jit(learner.init)(jax.random.key(0)), learner.adapt, learner.predict, learner.tables)


def seed_model(size=4):
    return models.meta_recommender(DATA.users.num_rows, DATA.items.num_rows, size=size, table_scale=1.0)


def dot(size=4):
    return models.content_model(DATA.columns, size=size, table_scale=1.0)


LINEAR = {
    "maml_seed": lambda: served(learners.maml(seed_model(), inner_lr=0.05, inner_steps=1)),
    "maml_seed_5": lambda: served(learners.maml(seed_model(), inner_lr=0.05, inner_steps=6)),
    "maml_dot": lambda: served(learners.maml(dot(), inner_lr=0.02, inner_steps=2, only=None)),
    "maml_user_row": lambda: served(learners.maml(dot(), inner_steps=2, only=("tables/user_id",))),
    "ridge": lambda: served(learners.ridge(dot())),
}
OTHERS = {
    "maml_mlp": lambda: served(
        learners.maml(
            models.content_model(DATA.columns, head="mlp", hidden=(5,), table_scale=1.0), inner_lr=0.02, inner_steps=1
        )
    ),
    "no_tables": lambda: Method(*LINEAR["maml_seed"]()[:3]),
    "als": lambda: als(DATA, KNOWN, size=3, iterations=2),
    "item_knn": lambda: item_knn(DATA, KNOWN),
    "own": lambda: Method(
        {}, lambda p, s, k: (s.target * s.mask).sum(), lambda p, a, x: a + jnp.sin(x["item_id"] * 1.7)
    ),
}


@partial(jax.jit, static_argnums=(0, 1))
def plain_scores(adapt, predict, params, known, item, target):
    support = Examples(inputs(known, jnp.int32(0), item), target, (item > 0).astype(jnp.float32))
    rows = jnp.arange(ITEMS + 1, dtype=jnp.int32)
    return predict(params, adapt(params, support, jax.random.key(0)), inputs(known, jnp.int32(0), rows))


def plain(method, known, history):
    """Every score by one predict, [ITEMS + 1]."""
    item, target = np.zeros(8, np.int32), np.zeros(8, np.float32)  # padded as it is when served
    item[: len(history)], target[: len(history)] = list(history), list(history.values())
    return np.array(plain_scores(method.adapt, method.predict, method.params, known, item, target), np.float64)


def histories(method, known):
    """One of items at random, and one of the best items of the prior: its items stand at the top of their blocks."""
    rng = np.random.default_rng(2)
    yield {int(i): float(r) for i, r in zip(rng.permutation(ITEMS)[:6] + 1, rng.integers(1, 6, 6), strict=True)}
    top = np.argsort(-plain(method, known, {1: 3.0})[1:], kind="stable")[:8] + 1
    yield {int(i): float(5 - k % 5) for k, i in enumerate(top)}


@pytest.mark.parametrize(
    ("name", "unseen"),
    [
        *((n, True) for n in ("maml_seed", "maml_dot", "ridge", "maml_mlp", "als", "own")),
        ("maml_seed", False),
        *(
            pytest.param(n, True, marks=pytest.mark.slow)
            for n in ("maml_seed_5", "maml_user_row", "no_tables", "item_knn")
        ),
        pytest.param("ridge", False, marks=pytest.mark.slow),
    ],
)
def test_the_list_is_that_of_one_plain_sort(name, unseen):
    method, known = {**LINEAR, **OTHERS}[name](), KNOWN if unseen else FULL
    for history in histories(method, known):
        scores = plain(method, known, history)
        for drop in (True, False):
            left = scores.copy()
            left[[0, *history] if drop else [0]] = -np.inf
            got = Recommender(method, DATA, known, chunk=64).recommend(history, n=5, explain=0, exclude_seen=drop)
            rows = [r.item_id for r in got]
            np.testing.assert_allclose([r.score for r in got], np.sort(left)[::-1][:5], rtol=2e-5, atol=1e-5)
            np.testing.assert_allclose(left[rows], [r.score for r in got], rtol=2e-5, atol=1e-5)
            assert len(set(rows)) == 5


@pytest.mark.parametrize("name", ["maml_seed", "ridge", "als"])
def test_a_batch_of_users_gets_what_each_gets_alone(name):
    method = {**LINEAR, **OTHERS}[name]()
    recommender = Recommender(method, DATA, KNOWN)
    given = dict(enumerate(histories(method, KNOWN)))
    columns = [(u, i, r) for u, history in given.items() for i, r in history.items()]
    many = recommender.recommend_many(tuple(zip(*columns, strict=True)), n=5)
    for user, history in given.items():
        alone = recommender.recommend(history, n=5, explain=0)
        np.testing.assert_allclose([r.score for r in many[user]], [r.score for r in alone], rtol=2e-5, atol=1e-5)
        np.testing.assert_allclose([r.prior for r in many[user]], [r.prior for r in alone], rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("name", list(LINEAR))
def test_the_linear_form_is_the_prediction_of_each_item_outside_the_support(name):
    method = LINEAR[name]()
    history = {3: 5.0, 7: 1.0, 5: 4.0}
    scores = plain(method, KNOWN, history)
    form = form_of(method, list(history), list(history.values()))
    table = method.params["tables"]["item_id"]
    known = np.asarray(table @ form.weights["item_id"] + form.known)
    outside = np.setdiff1d(np.flatnonzero(np.asarray(KNOWN.item_row)), list(history))
    np.testing.assert_allclose(known[outside], scores[outside], rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(form.unknown, scores[10], rtol=2e-5)  # item 10 was never seen


@pytest.mark.parametrize("name", ["maml_mlp"])
def test_what_is_not_linear_has_no_linear_form(name):
    assert form_of(OTHERS[name](), [3, 7], [5.0, 1.0]) is None


def form_of(method, items, targets):
    tables = dict(linear.item_tables(method.tables, method.params, ITEMS + 1))
    assert list(tables) == ["item_id"]

    @jax.jit
    def form(params):
        support = Examples(inputs(KNOWN, jnp.int32(0), jnp.array(items)), jnp.array(targets), jnp.ones(len(items)))
        return linear.linear(method.adapt, method.predict, params, tables, support, jax.random.key(0))

    return form(method.params)


def test_tables_of_other_columns_or_other_sizes_are_not_scored_by_one_product():
    method = LINEAR["ridge"]()
    tables = method.tables
    shared = {"item_id": tables["item_id"]._replace(columns=("item_id", "item_before"))}
    assert linear.item_tables(shared, method.params, ITEMS + 1) == ()
    assert linear.item_tables(tables, method.params, ITEMS) == ()
    assert linear.item_tables({}, method.params, ITEMS + 1) == ()
    assert linear.item_tables(tables, (), ITEMS + 1) == ()


def test_one_user_reads_the_table_where_it_lies():
    """20,001 rows of 32 are 2.6 MB; what the program works in, scores of 80 kB among it, is a tenth of that."""
    items, size = 20_000, 32
    learner = learners.maml(models.meta_recommender(9, items + 1, size=size), inner_steps=1)
    params = jax.jit(learner.init)(jax.random.key(0))
    known = KNOWN._replace(item_row=jnp.zeros(items + 1, jnp.int32))
    users = Users(np.zeros((1, 16), np.int32), *(np.zeros((1, 16), np.float32) for _ in "tm"), np.zeros(1, np.int32))

    def working(tables):
        plan = Plan(learner.adapt, learner.predict, 10, 1 << 20, tables, unseen=False)
        plan = plan._replace(chunk=2048) if tables else plan
        compiled = best.lower(plan, params, known, {}, users, jax.random.key(0)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    table = 4 * (items + 1) * size
    assert working(linear.item_tables(learner.tables, params, items + 1)) < table / 5
    assert working(()) > table  # scored at once by predict, which gathers each row


def test_blocks_are_about_the_root_of_items_a_block_wanted():
    assert block_size(1_000_001, 26) == 128  # sqrt(1,000,001 / 26) = 196
    assert block_size(100, 1) == 8  # sqrt(100) = 10
    assert block_size(10**9, 1) == 256
