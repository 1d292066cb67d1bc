"""Learners that make the row of a cold item: what is frozen, what an item owns, and each formula by hand.

The contract is that of all learners (`test_contract`), with users in the place of items.
"""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from worlds import double, largest_difference, one

from metarec_jax import learners, losses, models
from metarec_jax.core import Column, Examples, Learner, MetarecError, Model, Table, Task
from metarec_jax.learners import _cold_rows as made_rows
from metarec_jax.learners.cvar import kl, wasserstein
from metarec_jax.learners.mwuf import common_row

pytestmark = pytest.mark.slow

KEY = jax.random.key(0)
COLUMNS = {
    "user_id": Column("id", 600),
    "user_age": Column("categorical", 5),
    "item_id": Column("id", 400),
    "item_genre": Column("multi", 7),
    "item_year": Column("numeric", 1),
}
MODEL = models.content_model(COLUMNS, size=3, head="mlp", hidden=(5,))
CONTENT = models.content_model(
    {name: COLUMNS[name] for name in ("item_genre", "item_year")}, size=3, head="mlp", hidden=(4,)
)
MADE = made_rows.made(MODEL, CONTENT)
LEARNERS: dict[str, Learner] = {
    "meta_embedding": learners.meta_embedding(MODEL, CONTENT, inner_lr=0.5),
    "mwuf": learners.mwuf(MODEL, CONTENT, hidden=4, inner_lr=0.5),
    "cvar": learners.cvar(MODEL, CONTENT, latent=2),
    "dropout_net": learners.dropout_net(MODEL, inner_lr=0.5),
    "made_logistic": made_rows.with_cold_loss(learners.logistic(MADE, newton_steps=4), MADE, 0.5),
}
each_learner = pytest.mark.parametrize("name", LEARNERS)


def item_tasks(key: jax.Array, count: int, support: int = 6, query: int = 4) -> Task:
    """Clicks of several users on one item a task; the last slot of task 0 is padding."""
    k_item, *keys = jax.random.split(key, 3)
    shared = {
        "item_id": jax.random.randint(k_item, (count, 1), 1, 400),
        "item_genre": jax.random.randint(k_item, (count, 1, 3), 0, 7),
        "item_year": jax.random.normal(k_item, (count, 1, 1)),
    }

    def part(key: jax.Array, n: int) -> Examples:
        users = {
            "user_id": jax.random.randint(key, (count, n), 0, 600),
            "user_age": jax.random.randint(key, (count, n), 0, 5),
        }
        target = jax.random.bernoulli(key, 0.5, (count, n)).astype(jnp.float32)
        return Examples(shared | users, target, jnp.ones((count, n)).at[0, -1].set(0.0))

    return Task(part(keys[0], support), part(keys[1], query))


@cache
def world(name: str):
    with jax.enable_x64(False):
        return LEARNERS[name], jax.jit(LEARNERS[name].init)(KEY), item_tasks(jax.random.key(1), 3)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in ("meta_embedding", "dropout_net"))) for n in LEARNERS]
)
def test_padding_has_no_gradient_nor_what_is_frozen(name):
    """Garbage in padding, nan even, changes no gradient. Of a frozen model it is exactly 0, of the learner's own part not."""
    learner, params, batch = world(name)
    task = one(batch)
    spoil = lambda e: e._replace(target=e.target.at[-1].set(jnp.nan))  # noqa: E731
    gradient = jax.jit(jax.grad(lambda p, t: learner.loss(p, t, KEY)[0]))
    found = gradient(params, task)
    assert largest_difference(found, gradient(params, Task(spoil(task.support), spoil(task.query)))) < 1e-6
    largest = lambda part: max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(part))  # noqa: E731
    of_model = largest([found["net"], *(g for n, g in found["tables"].items() if n in MODEL.tables)])
    assert (of_model == 0.0) == (name in ("meta_embedding", "mwuf", "cvar"))
    own = {"meta_embedding": "generator", "mwuf": "mwuf", "cvar": "cvar"}
    assert largest(found[own.get(name, "net")]) > 0


@each_learner
def test_an_item_owns_a_small_vector(name):
    learner, params, batch = world(name)
    leaves = jax.tree.leaves(jax.eval_shape(learner.adapt, params, one(batch).support, KEY))
    assert [leaf.shape for leaf in leaves] == [(6,) if name == "made_logistic" else (3,)]


# By hand: a model of rows alone, score_i = <row, u_i>, and a reader that gives the item's two numbers as they are.


def bilinear() -> tuple[Model, Model]:
    tables = {"item": Table(5, 2, ("item_id",)), "user": Table(4, 2, ("user_id",))}
    users = jnp.array([[0.0, 0.0], [1.0, 0.5], [-0.5, 2.0], [0.25, -1.0]])
    items = jnp.array([[0.5, 0.5], [1.0, -1.0], [0.2, 0.4], [-0.3, 0.1], [0.7, 0.9]])

    def score(params, inputs):
        u, v = params["tables"]["user"][inputs["user_id"]], params["tables"]["item"][inputs["item_id"]]
        return jnp.sum(u * v, axis=1)

    model = Model(lambda key: {"tables": {"item": items, "user": users}, "net": {}}, score, tables)
    plain = lambda params, inputs: inputs["item_fact"]  # noqa: E731
    return model, Model(lambda key: {"tables": {}, "net": {}}, plain, {}, plain, 2)


FACT, USERS = np.array([0.6, -0.2]), np.array([[1.0, 0.5], [-0.5, 2.0], [0.25, -1.0]])
SUPPORT, QUERY = np.array([1.0, 0.0]), np.array([0.0, 1.0])  # users 1, 2 and 2, 3


def hand_task() -> Task:
    def part(users, target):
        inputs = {"user_id": jnp.array(users), "item_id": jnp.array([4]), "item_fact": jnp.asarray(FACT)[None]}
        return Examples(inputs, jnp.asarray(target), jnp.ones(2))

    return Task(part([1, 2], SUPPORT), part([2, 3], QUERY))


def hand_bce(row, users, target):
    logits = users @ row
    return np.mean(np.log1p(np.exp(logits)) - target * logits)


def hand_step(row, users, target, lr):
    slope = ((1 / (1 + np.exp(-users @ row)) - target)[:, None] * users).mean(0)
    return row - lr * slope


def test_meta_embedding_by_hand(float64):
    """r0 = kernel' fact + bias; r1 = r0 - 0.5 mean_i (sigmoid(r0 u_i) - y_i) u_i; 0.1 L_support(r0) + 0.9 L_query(r1)."""
    learner = learners.meta_embedding(*bilinear(), inner_lr=0.5)
    kernel, bias = np.array([[0.3, -0.4], [0.8, 0.1]]), np.array([0.05, -0.02])
    params = double(jax.jit(learner.init)(KEY)) | {
        "generator": {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}
    }
    params, task = double(params), double(hand_task())
    r0 = FACT @ kernel + bias
    r1 = hand_step(r0, USERS[:2], SUPPORT, 0.5)
    want = 0.1 * hand_bce(r0, USERS[:2], SUPPORT) + 0.9 * hand_bce(r1, USERS[1:], QUERY)
    value, told = jax.jit(learner.loss)(params, task, KEY)
    assert float(value) == pytest.approx(want, abs=1e-12)
    assert float(told["cold_loss"]) == pytest.approx(hand_bce(r0, USERS[:2], SUPPORT), abs=1e-12)
    assert np.allclose(learner.adapt(params, task.support, KEY), r1, atol=1e-12)


def finite_difference(loss, leaf, h=1e-6):
    """Central differences of a loss with respect to every entry of a leaf."""
    out = np.zeros(leaf.shape)
    for at in np.ndindex(leaf.shape):
        step = np.zeros(leaf.shape)
        step[at] = h
        out[at] = float(loss(leaf + step) - loss(leaf - step)) / (2 * h)
    return out


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("meta_embedding", ("generator", "kernel")),
        pytest.param("mwuf", ("mwuf", "scale", "kernel"), marks=pytest.mark.slow),
        pytest.param("cvar", ("cvar", "decoder", "kernel"), marks=pytest.mark.slow),
        pytest.param("cvar_kl", ("cvar", "prior", "kernel"), marks=pytest.mark.slow),
        pytest.param("meta_embedding_all", ("net", "params", "out", "kernel"), marks=pytest.mark.slow),
    ],
)
def test_gradient_against_finite_differences(name, path, float64):
    """Through all inner steps, to 1e-7."""
    learner = (
        LEARNERS.get(name)
        or {
            "cvar_kl": learners.cvar(MODEL, CONTENT, latent=2, distance="kl", inner_lr=0.5, inner_steps=1),
            "meta_embedding_all": learners.meta_embedding(MODEL, CONTENT, freeze=False),
        }[name]
    )
    params, task = double(jax.jit(learner.init)(KEY)), double(one(item_tasks(jax.random.key(1), 3)))

    def put(tree, path, leaf):
        return leaf if not path else {**tree, path[0]: put(tree[path[0]], path[1:], leaf)}

    leaf = params
    for key in path:
        leaf = leaf[key]
    leaf = leaf + 0.1
    loss = jax.jit(lambda leaf: learner.loss(put(params, path, leaf), task, KEY)[0])
    assert np.allclose(jax.jit(jax.grad(loss))(leaf), finite_difference(loss, leaf), atol=1e-7)


def test_mwuf_starts_as_the_model_with_the_common_row_moved(float64):
    """Scale 1, shift 0: the row is that of plain gradient descent from the common row, the mean of rows 1 and 2."""
    learner = learners.mwuf(*bilinear(), inner_lr=0.5)
    params, task = double(jax.jit(learner.init)(KEY)), double(hand_task())
    params = common_row(params, jnp.array([1, 2]), table="item")
    common = np.array([(1.0 + 0.2) / 2, (-1.0 + 0.4) / 2])
    want = hand_step(common, USERS[:2], SUPPORT, 0.5)
    adapted = learner.adapt(params, task.support, KEY)
    assert np.allclose(adapted, want, atol=1e-7)
    scores = learner.predict(params, adapted, task.query.inputs)
    assert np.allclose(scores, USERS[1:] @ want, atol=1e-7)


def test_what_each_click_moved_of_a_warmed_row_is_the_whole_derivative(float64):
    """A list explains itself by it: at scale 1 and shift 0 a target moves the row by rate / n times its user's vector."""
    learner = learners.mwuf(*bilinear(), inner_lr=0.5)
    params, task = double(learner.init(KEY)), double(hand_task())

    def score(target):
        adapted = learner.adapt(params, task.support._replace(target=target), KEY)
        return learner.predict(params, adapted, task.query.inputs)[0]

    want = 0.5 / 2 * USERS[:2] @ USERS[1]
    assert np.allclose(jax.jit(jax.grad(score))(task.support.target), want, atol=1e-7)


def test_mwuf_by_hand(float64):
    """r' = r (1 + A' fact + a) + B' relu(C' u + c), u the mean of users 1 and 2; without support there is no shift."""
    learner = learners.mwuf(*bilinear(), hidden=2, inner_steps=0)
    params, task = double(jax.jit(learner.init)(KEY)), double(hand_task())
    a, shift_0 = np.array([[0.5, 0.1], [0.2, -0.3]]), np.array([[1.0, -1.0], [0.5, 2.0]])
    shift_1 = np.array([[0.3, 0.2], [-0.1, 0.4]])
    own = {
        "scale": {"kernel": jnp.asarray(a), "bias": jnp.array([0.1, 0.0])},
        "shift_0": {"kernel": jnp.asarray(shift_0), "bias": jnp.array([0.0, 0.25])},
        "shift_1": jnp.asarray(shift_1),
    }
    params = params | {"mwuf": own, "common": jnp.array([0.4, -0.6])}
    scaled = np.array([0.4, -0.6]) * (1 + FACT @ a + np.array([0.1, 0.0]))
    mean = USERS[:2].mean(0)
    shift = np.maximum(mean @ shift_0 + np.array([0.0, 0.25]), 0) @ shift_1
    assert np.allclose(learner.adapt(params, task.support, KEY), scaled + shift, atol=1e-7)
    nobody = task.support._replace(mask=jnp.zeros(2))
    assert np.allclose(learner.adapt(params, nobody, KEY), scaled, atol=1e-7)


def test_cvar_by_hand(float64):
    """With variances of e^-60 the draws are the means: z_p = P' fact + p and z_q = E' r + e, r the row of item 4."""
    learner = learners.cvar(*bilinear(), latent=1, distance_weight=0.01, reconstruction_weight=2.0)
    params, task = double(jax.jit(learner.init)(KEY)), double(hand_task())
    e, p, d = np.array([0.5, -1.0]), np.array([0.3, 0.7]), np.array([[0.9, -0.2], [0.1, 0.3]])
    known = lambda mean, bias: {  # noqa: E731
        "kernel": jnp.stack([jnp.asarray(mean), jnp.zeros(2)], 1),
        "bias": jnp.array([bias, -60.0]),
    }
    own = {"encoder": known(e, 0.1), "prior": known(p, -0.2)}
    own["decoder"] = {"kernel": jnp.asarray(d), "bias": jnp.array([0.05, 0.0])}
    row = np.array([0.7, 0.9])
    z_p, z_q = FACT @ p - 0.2, row @ e + 0.1
    decoded = lambda z: np.array([z, np.log(3.0)]) @ d + np.array([0.05, 0.0])  # noqa: E731  two examples: log(1 + 2)
    want = hand_bce(decoded(z_p), USERS[1:], QUERY) + 2.0 * np.mean((decoded(z_q) - row) ** 2) + 0.01 * (z_p - z_q) ** 2
    params = params | {"cvar": own}
    assert float(learner.loss(params, task, KEY)[0]) == pytest.approx(want, abs=1e-6)
    assert np.allclose(learner.adapt(params, task.support, KEY), decoded(z_p), atol=1e-6)


def test_distances_by_numeric_integration(float64):
    """KL = integral q log(q / p); W2^2 = integral over (0, 1) of the squared gap of the quantiles. N(0.3, 0.8), N(-0.5, 1.5)."""
    from scipy import stats

    (m, v), (n, w) = (0.3, 0.8), (-0.5, 1.5)
    q, p = stats.norm(m, v**0.5), stats.norm(n, w**0.5)
    given = [jnp.array([x]) for x in (m, np.log(v), n, np.log(w))]
    x = np.linspace(-12, 12, 200_001)
    assert float(kl(*given)) == pytest.approx(np.trapezoid(q.pdf(x) * (q.logpdf(x) - p.logpdf(x)), x), abs=1e-8)
    level = (np.arange(400_000) + 0.5) / 400_000
    assert float(wasserstein(*given)) == pytest.approx(np.mean((q.ppf(level) - p.ppf(level)) ** 2), abs=1e-5)
    assert float(kl(*given[:2], *given[:2])) == float(wasserstein(*given[:2], *given[:2])) == 0.0


def test_dropout_hides_the_share_that_was_asked():
    """A model whose score tells a hidden id: over 4,000 examples the mean is 0.3 to within 4 deviations of 0.0072."""
    hidden = Model(
        lambda key: {"tables": {"item": jnp.zeros((5, 1))}},
        lambda params, inputs: (inputs["item_id"] == 0) + 0.0 * params["tables"]["item"][inputs["item_id"], 0],
        {"item": Table(5, 1, ("item_id",))},
    )
    mean = lambda scores, target, where: jnp.mean(scores)  # noqa: E731
    part = Examples({"item_id": jnp.full(2000, 3)}, jnp.zeros(2000), jnp.ones(2000))
    found = {}
    for drop in (0.0, 0.3):
        learner = learners.dropout_net(hidden, drop=drop, loss=mean)
        found[drop] = float(learner.loss(jax.jit(learner.init)(KEY), Task(part, part), KEY)[0])
    assert found[0.0] == 0.0
    assert abs(found[0.3] - 0.3) < 4 * (0.3 * 0.7 / 4000) ** 0.5


def test_dropout_net_starts_from_the_unknown_row_or_the_own(float64):
    model, _ = bilinear()
    task = double(hand_task())
    for start, row in (("unknown", [0.5, 0.5]), ("own", [0.7, 0.9])):
        learner = learners.dropout_net(model, start=start, inner_lr=0.5)
        adapted = learner.adapt(double(jax.jit(learner.init)(KEY)), task.support, KEY)
        assert np.allclose(adapted, hand_step(np.array(row), USERS[:2], SUPPORT, 0.5), atol=1e-7)


def test_plain_training_is_the_mean_loss_of_all_examples(float64):
    learner = learners.dropout_net(MODEL, drop=0.0, start="own")
    params, task = double(jax.jit(learner.init)(KEY)), double(one(item_tasks(KEY, 2), 1))
    scores = np.concatenate([jax.jit(MODEL.apply)(params, part.inputs) for part in task])
    want = losses.bce(jnp.asarray(scores), jnp.concatenate([part.target for part in task]))
    assert float(jax.jit(learner.loss)(params, task, KEY)[0]) == pytest.approx(float(want), abs=1e-12)


def test_a_made_row_is_as_if_it_stood_in_the_table():
    """Put into the table of the model itself at the item's id: the same scores and features."""
    params, task = jax.jit(MADE.init)(KEY), one(item_tasks(KEY, 2), 1)
    inputs = task.query.inputs
    reader = {"tables": {n: params["tables"]["content_" + n] for n in CONTENT.tables}, "net": params["content"]}
    row = CONTENT.features(reader, inputs)[0] @ params["made"]["kernel"] + params["made"]["bias"]
    table = params["tables"]["item_id"].at[inputs["item_id"][0]].set(row)
    laid = {"tables": {**params["tables"], "item_id": table}, "net": params["net"]}
    found, want = (
        jax.jit(lambda params, model=model: (model.apply(params, inputs), model.features(params, inputs)))(of_model)
        for model, of_model in ((MADE, params), (MODEL, laid))
    )
    assert largest_difference(found, want) < 1e-6


def test_cold_loss_is_weighed_in(float64):
    """alpha of the loss before adaptation, 1 - alpha of that after it."""
    inner = learners.logistic(MADE, newton_steps=4)
    both = made_rows.with_cold_loss(inner, MADE, 0.25)
    params, task = double(jax.jit(inner.init)(KEY)), double(one(item_tasks(KEY, 2), 1))
    cold = losses.bce(jax.jit(MADE.apply)(params, task.query.inputs), task.query.target)
    want = 0.75 * float(jax.jit(inner.loss)(params, task, KEY)[0]) + 0.25 * float(cold)
    assert float(jax.jit(both.loss)(params, task, KEY)[0]) == pytest.approx(want, abs=1e-12)


def test_users_can_be_made_as_well():
    """column="user_id": tasks of users, as elsewhere; the row of a new user comes from the user's age."""
    ages = models.content_model({"user_age": COLUMNS["user_age"]}, size=3, head="mlp", hidden=(4,))
    learner = learners.meta_embedding(MODEL, ages, column="user_id")
    params = jax.jit(learner.init)(KEY)
    task = one(item_tasks(KEY, 2), 1)

    def turned(part):  # one user, several items
        n = part.target.shape[0]
        inputs = {c: v[:1] if c.startswith("user_") else jnp.repeat(v, n, 0) for c, v in part.inputs.items()}
        return part._replace(inputs=inputs)

    task = Task(turned(task.support), turned(task.query))
    adapted = jax.eval_shape(learner.adapt, params, task.support, KEY)
    assert jax.eval_shape(learner.predict, params, adapted, task.query.inputs).shape == (4,)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: learners.meta_embedding(MODEL, CONTENT, alpha=2.0), "alpha must be between 0 and 1, got 2.0"),
        (lambda: learners.meta_embedding(MODEL, CONTENT, column="item_shelf"), "no table for the column 'item_shelf'"),
        (
            lambda: learners.meta_embedding(MODEL, MODEL._replace(features=None)),
            "requires a content model with features",
        ),
        (lambda: learners.mwuf(MODEL, CONTENT, hidden=0), "hidden must be 1 or more, got 0"),
        (lambda: learners.cvar(MODEL, CONTENT, distance="cosine"), "distance: 'cosine'.*choose from wasserstein, kl"),
        (lambda: learners.dropout_net(MODEL, drop=1.0), "drop must be below 1, got 1"),
        (lambda: learners.dropout_net(MODEL, start="mean"), "start: 'mean' is not known"),
        (lambda: made_rows.with_cold_loss(LEARNERS["cvar"], MODEL, 1.5), "alpha must be between 0 and 1, got 1.5"),
    ],
)
def test_a_setting_out_of_bounds_is_refused(make, message):
    with pytest.raises(MetarecError, match=message):
        make()


def test_a_made_row_of_a_table_over_two_columns():
    """score = row[item] + 10 row[last] + wide[last]: the made row 5 for the item, the table's own 7 and 2 for the last."""

    def score(params, inputs):
        of = params["tables"]
        return (
            of["item"][inputs["item_id"], 0]
            + 10 * of["item"][inputs["item_last"], 0]
            + of["wide"][inputs["item_last"], 0]
        )

    tables = {"item": Table(9, 1, ("item_id", "item_last")), "wide": Table(9, 1, ("item_last",))}
    params = {"tables": {"item": jnp.arange(9.0)[:, None], "wide": jnp.full((9, 1), 2.0).at[0].set(0.0)}}
    scores = made_rows.with_row(score, tables, "item", "item_id")
    inputs = {"item_id": jnp.array([4]), "item_last": jnp.array([7, 0, 1])}
    assert scores(params, jnp.array([5.0]), inputs).tolist() == [5 + 70 + 2, 5.0, 5 + 10 + 2]


def test_a_column_of_two_tables_has_no_one_row_to_make():
    for learner in (learners.meta_embedding, learners.mwuf, learners.cvar, made_rows.made):
        with pytest.raises(MetarecError, match=r"2 tables for the column 'item_id' \(deep, wide\)"):
            learner(wide_only(), CONTENT)


def wide_only() -> Model:
    tables = {name: Table(9, size, ("item_id",)) for name, size in (("deep", 3), ("wide", 1))}
    return Model(lambda key: {"tables": {}}, lambda params, inputs: jnp.zeros(1), tables)
