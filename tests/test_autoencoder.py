"""The autoencoder: its formulas by hand, its start, and lists that it learns for new users and new items."""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metarec_jax.core import Column, Examples, MetarecError, Task
from metarec_jax.data.draw import task_source
from metarec_jax.data.interactions import Feature, Interactions, Vocabulary
from metarec_jax.learners.autoencoder import as_content, autoencoder, autoencoder_scores, autoencoder_start
from metarec_jax.training.loop import fit

KEY = jax.random.key(0)
COLUMNS = {
    "user_id": Column("id", 9),
    "item_id": Column("id", 7),
    "item_genre": Column("multi", 4),
    "item_year": Column("numeric", 1),
    "item_director": Column("categorical", 5000),
}


def drawn(size: int = 3):
    learner = autoencoder(COLUMNS, size=size)
    params = learner.init(KEY)
    leaves, tree = jax.tree.flatten(params["net"])
    keys = jax.random.split(KEY, len(leaves))
    net = [jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, leaves, strict=True)]
    fixed = {**params["fixed"], "mean": jnp.float32(3.0), "deviation": jnp.float32(2.0)}
    return learner, {**params, "net": jax.tree.unflatten(tree, net), "fixed": fixed}


INPUTS = {
    "item_id": jnp.array([2, 5, 0]),
    "item_genre": jnp.array([[1, 3], [2, 0], [3, 0]]),
    "item_year": jnp.array([[0.5], [-1.0], [2.0]]),
    "item_director": jnp.array([4, 5, 6]),
}


def test_code_and_scores_are_the_formulas(float64):
    """z = tanh(c + sum (a_i + t_i b_i) / sqrt(1 + n)); scores <v, z> + p, of own row and content; unknown: content alone."""
    learner, params = drawn()
    params = jax.tree.map(lambda a: a.astype(jnp.float64), params)
    support = Examples(INPUTS, jnp.array([5.0, 1.0, 9.0]), jnp.array([1.0, 1.0, 0.0]))
    net = jax.tree.map(np.asarray, params["net"])
    a, b = net["inward"][:, :3], net["inward"][:, 3:]
    code = np.tanh(net["shift"] + (a[2] + 1.0 * b[2] + a[5] - 1.0 * b[5]) / np.sqrt(3.0))
    adapted = learner.adapt(params, support, KEY)
    np.testing.assert_allclose(adapted["code"], code, atol=1e-12)
    content = np.array(
        [[0, 0.5, 0, 0.5, 0.5], [0, 0, 1, 0, -1], [0, 0, 0, 1, 2]]
    )  # genres by their share, then the year
    np.testing.assert_allclose(as_content(INPUTS, {"item_genre": 4, "item_year": 1}), content)
    known = np.array([1.0, 1.0, 0.0])
    vectors = known[:, None] * net["own"][[2, 5, 0], :3] + content @ net["content"][:, :3]
    bias = known * net["own_bias"][[2, 5, 0], 0] + content @ net["content_bias"][:, 0] + net["bias"][0]
    params["net"]["own"] = params["net"]["own"].at[0].set(0.0)
    np.testing.assert_allclose(learner.predict(params, adapted, INPUTS), vectors @ code + bias, atol=1e-12)


def test_scores_of_the_catalogue_are_the_predictions():
    learner, params = drawn()
    items = {
        "item_id": jnp.arange(7),
        "item_genre": jnp.array([[0, 0], [1, 2], [1, 3], [2, 0], [3, 1], [2, 0], [1, 0]]),
        "item_year": jnp.linspace(-1, 1, 7)[:, None],
        "item_director": jnp.zeros(7, int),
    }
    content = as_content(items, {"item_genre": 4, "item_year": 1})
    params["fixed"]["content"] = content
    params["net"]["own"] = params["net"]["own"].at[0].set(0.0)
    params["net"]["own_bias"] = params["net"]["own_bias"].at[0].set(0.0)
    codes = {"code": jax.random.normal(KEY, (2, 3))}
    each = jax.vmap(lambda code: learner.predict(params, {"code": code}, items))(codes["code"])
    np.testing.assert_allclose(autoencoder_scores(params, codes), each, atol=1e-5)


def test_the_loss_is_the_likelihood_of_what_is_not_shown(float64):
    """Without hiding: of examples that no code reads, minus the mean log-softmax over the items that are not shown."""
    learner = autoencoder(COLUMNS, size=3, dropout=0.0, hide=0.0, rated_weight=0.25)
    params = jax.tree.map(lambda a: a.astype(jnp.float64), drawn()[1])
    params["fixed"]["liked_from"] = jnp.float64(4.0)
    every = Examples(
        {**INPUTS, "item_id": jnp.array([2, 5, 3])}, jnp.array([5.0, 4.0, 1.0]), jnp.array([1.0, 1.0, 1.0])
    )
    nobody = jax.tree.map(lambda a: a[:0], every)
    compared = 0
    for k in range(20):
        key = jax.random.key(k)
        share = jax.random.uniform(jax.random.split(key, 4)[0], minval=0.3, maxval=0.95)
        shown = np.asarray(jax.random.bernoulli(jax.random.split(key, 4)[1], share, (3,)))
        value = learner.loss(params, Task(nobody, every), key)[0]
        support = every._replace(mask=jnp.asarray(shown, jnp.float64))
        code = learner.adapt(params, support, KEY)["code"]
        net = params["net"]
        total = 0.0
        for head, threshold, weight in ((0, 4.0, 1.0), (1, -np.inf, 0.25)):
            scores = net["own"][:, 3 * head : 3 * head + 3] @ code + net["own_bias"][:, head] + net["bias"][head]
            open_ = np.array([i not in (0, *np.array([2, 5, 3])[shown]) for i in range(7)])
            log_share = np.asarray(scores) - np.log(np.exp(np.asarray(scores))[open_].sum())
            asked = [i for i, r, s in zip((2, 5, 3), (5.0, 4.0, 1.0), shown, strict=True) if not s and r >= threshold]
            part = -np.mean(log_share[asked]) if asked else 0.0
            total += weight * part
            compared += bool(asked)
        assert float(value) == pytest.approx(total, abs=1e-9)
    assert compared > 10


@cache
def groups() -> Interactions:
    """Two kinds of users, who like the items of their kind (4 or 5 of 5) and not the others (1 or 2); genres say which."""
    rng = np.random.default_rng(0)
    users, items = 300, 60
    kind = np.arange(items) % 2
    rows = [(u, i) for u in range(users) for i in rng.choice(items, 20, replace=False)]
    user, item = np.array(rows).T
    like = kind[item] == user % 2
    rating = np.where(like, rng.integers(4, 6, len(user)), rng.integers(1, 3, len(user))).astype(np.float32)
    genre = Feature("categorical", np.concatenate([[0], kind + 1]).astype(np.int32), Vocabulary(np.array(["a", "b"])))
    ids = Vocabulary(np.arange(users)), Vocabulary(np.arange(items))
    return Interactions(user + 1, item + 1, rating, None, *ids, item_features={"item_genre": genre})


def test_start_is_popularity_and_learning_lists_what_is_liked_also_of_new_items():
    data = groups()
    learner = autoencoder(data.columns, size=4, hide=0.3)
    start = autoencoder_start(learner.init(KEY), data)
    assert float(start["fixed"]["liked_from"]) == 4.0
    items = {"item_id": jnp.arange(61), "item_genre": jnp.asarray(data.item_features["item_genre"].values)}
    nobody = Examples({"item_id": jnp.zeros(1, int)}, jnp.zeros(1), jnp.zeros(1))
    liked = np.bincount(data.item[data.rating >= 4], minlength=61)
    zero = {**start, "net": {**start["net"], "own": 0 * start["net"]["own"]}}
    scores = learner.predict(zero, learner.adapt(zero, nobody, KEY), items)
    np.testing.assert_allclose(scores[1:], np.log1p(liked[1:]), atol=1e-5)

    source = task_source(data, tasks=64, support=(3, 19), query=1, item_drop=0.0, cold_tasks=0.0, whole=True)
    params = fit(learner, source, steps=150, optimizer=optax.adam(2e-2), params=start).params
    odd = 1 + np.arange(1, 9, 2)  # four items of kind 1, and four of kind 0 that were not liked
    support = Examples(
        {"item_id": jnp.concatenate([jnp.asarray(odd), jnp.asarray(odd) - 1])},
        jnp.array([5.0] * 4 + [1.0] * 4),
        jnp.ones(8),
    )
    adapted = learner.adapt(params, support, KEY)
    rest = np.arange(9, 61)
    some = learner.predict(params, adapted, {name: value[rest] for name, value in items.items()})
    new = learner.predict(params, adapted, {"item_id": jnp.zeros(2, int), "item_genre": jnp.array([1, 2])})
    best = rest[np.argsort(-np.asarray(some))[:20]]
    assert ((best - 1) % 2 == 1).mean() > 0.9
    assert float(new[1]) > float(new[0])


def test_bad_data_is_refused():
    with pytest.raises(MetarecError, match="7 item rows, and dense_limit is 6"):
        autoencoder(COLUMNS, dense_limit=6)
    learner = autoencoder(COLUMNS)
    with pytest.raises(MetarecError, match="other items or features"):
        autoencoder_start(learner.init(KEY), groups())
