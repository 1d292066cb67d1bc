"""Factorisation machine, DeepFM, two towers: against sums written out by hand."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metarec_jax.core import Column, MetarecError
from metarec_jax.models.content import content_model
from metarec_jax.models.ctr import deepfm, factorization_machine, two_tower

pytestmark = pytest.mark.slow

COLUMNS = {
    "user_id": Column("id", 5),
    "user_age": Column("categorical", 3),
    "item_id": Column("id", 7),
    "item_genre": Column("multi", 4),
    "item_year": Column("numeric", 2),
}
INPUTS = {
    "user_id": jnp.array([2]),
    "user_age": jnp.array([1]),
    "item_id": jnp.array([3, 0, 6]),
    "item_genre": jnp.array([[1, 3], [2, 0], [0, 0]]),
    "item_year": jnp.array([[0.5, -1.0], [2.0, 0.0], [0.0, 1.0]]),
}
KEY = jax.random.key(0)


def filled(model):
    """Parameters of which none is 0, so that nothing is right by chance."""
    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(model.init, KEY)
    return jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.normal(size=leaf.shape), jnp.float32), shapes)


def fields(params, n):
    """The rows of example n by field, [5, 1 + size], by hand: a table's row, the mean of the genres, year times W."""
    tables = {name: np.asarray(table, np.float64) for name, table in params["tables"].items()}
    genres = [g for g in INPUTS["item_genre"][n].tolist() if g > 0]
    genre = tables["item_genre"][genres].mean(0) if genres else np.zeros(tables["item_genre"].shape[1])
    year = np.asarray(INPUTS["item_year"][n]) @ np.asarray(params["net"]["params"]["item_year"]["kernel"])
    user, age, item = (
        tables[c][int(INPUTS[c][n if c == "item_id" else 0])] for c in ("user_id", "user_age", "item_id")
    )
    return np.stack([user, age, item, genre, year])


def test_a_factorization_machine_is_its_double_sum():
    """mean + sum_f w_f + sum_{f < g} <v_f, v_g>, the pairs one by one, against the form that is linear in the fields."""
    model = factorization_machine(COLUMNS, size=3)
    params = filled(model)
    got = jax.jit(model.apply)(params, INPUTS)
    for n in range(3):
        rows = fields(params, n)
        pairs = sum(rows[f, 1:] @ rows[g, 1:] for f, g in itertools.combinations(range(5), 2))
        want = float(params["net"]["params"]["mean"]) + rows[:, 0].sum() + pairs
        assert float(got[n]) == pytest.approx(want, abs=1e-4)


def test_without_pairs_it_is_a_linear_model():
    model = factorization_machine(COLUMNS, size=3, pairs=False)
    params = filled(model)
    want = [float(params["net"]["params"]["mean"]) + fields(params, n)[:, 0].sum() for n in range(3)]
    np.testing.assert_allclose(jax.jit(model.apply)(params, INPUTS), want, atol=1e-5)


def test_with_the_ids_alone_it_is_matrix_factorisation():
    """The dot-product model of the same parameters: mean + b_u + b_i + <u, v>."""
    ids = {name: COLUMNS[name] for name in ("user_id", "item_id")}
    one, other = factorization_machine(ids, size=3), content_model(ids, size=3)
    params = filled(one)
    assert jax.tree.structure(params) == jax.tree.structure(jax.eval_shape(other.init, KEY))
    np.testing.assert_allclose(jax.jit(one.apply)(params, INPUTS), jax.jit(other.apply)(params, INPUTS), rtol=1e-5)


def test_features_are_the_derivative_by_the_users_vector():
    """A machine and two towers are linear in a user field's vector... the machine exactly, of every item alike."""
    model = factorization_machine(COLUMNS, size=3)
    params = filled(model)

    def scores(vector):
        table = params["tables"]["user_id"].at[2, 1:].set(vector)
        return model.apply({**params, "tables": {**params["tables"], "user_id": table}}, INPUTS)

    slope = jax.jit(jax.jacobian(scores))(params["tables"]["user_id"][2, 1:])
    age = params["tables"]["user_age"][1, 1:]  # the pair of the user's own two fields, the same for every item
    np.testing.assert_allclose(slope, jax.jit(model.features)(params, INPUTS) + age[None], atol=1e-5)


def test_deepfm_is_the_machine_plus_dense_layers_of_the_vectors():
    """The dense part by NumPy: vectors of the five fields side by side, [15], two layers with ReLU, one output."""
    model = deepfm(COLUMNS, size=3, hidden=(4, 2))
    params = filled(model)
    net = jax.tree.map(np.asarray, params["net"]["params"])
    machine = factorization_machine(COLUMNS, size=3)
    of_machine = {"params": {name: net[name] for name in ("mean", "item_year")}}
    first = np.asarray(jax.jit(machine.apply)({"tables": params["tables"], "net": of_machine}, INPUTS))
    x = np.stack([fields(params, n)[:, 1:].ravel() for n in range(3)])
    for layer in ("dense_0", "dense_1"):
        x = np.maximum(x @ net[layer]["kernel"] + net[layer]["bias"], 0)
    np.testing.assert_allclose(jax.jit(model.features)(params, INPUTS), x, atol=1e-5)
    want = first + x @ net["out"]["kernel"][:, 0] + net["out"]["bias"]
    np.testing.assert_allclose(jax.jit(model.apply)(params, INPUTS), want, atol=1e-4)


def test_two_towers_by_hand():
    """f = s + out relu(A [v_1, ..., v_F] + a) for each side; the score is mean + weights + <f, g>."""
    model = two_tower(COLUMNS, size=3, hidden=(4,))
    params = filled(model)
    net = jax.tree.map(np.asarray, params["net"]["params"])

    def side(rows, name):
        hidden = np.maximum(rows[:, 1:].ravel() @ net[f"{name}dense_0"]["kernel"] + net[f"{name}dense_0"]["bias"], 0)
        return rows[:, 1:].sum(0) + hidden @ net[f"{name}out"]["kernel"] + net[f"{name}out"]["bias"]

    got, vectors = jax.jit(model.apply)(params, INPUTS), jax.jit(model.features)(params, INPUTS)
    for n in range(3):
        rows = fields(params, n)
        f, g = side(rows[:2], "user_"), side(rows[2:], "item_")
        assert float(got[n]) == pytest.approx(float(net["mean"]) + rows[:, 0].sum() + f @ g, abs=1e-3)
        np.testing.assert_allclose(vectors[n], g, atol=1e-4)


def test_bad_columns_are_refused():
    with pytest.raises(MetarecError, match="must start with 'user_' or 'item_', with some of each"):
        deepfm({"item_id": Column("id", 3)})
    with pytest.raises(MetarecError, match="must start with"):
        two_tower({**COLUMNS, "genre": Column("id", 3)})
    with pytest.raises(MetarecError, match="or use factorization_machine"):
        deepfm(COLUMNS, hidden=())
