"""Networks and their tables, by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from metarec_jax import models
from metarec_jax.core import Column
from metarec_jax.models.content import normal_rows


def test_a_first_layer_over_parts_is_a_layer_over_their_concatenation():
    """User row (2 numbers, shared), item row (2), year (1): [u, i, y] W + b with W [5, 3], then ReLU and the output."""
    columns = {"user_id": Column("id", 4), "item_id": Column("id", 6), "item_year": Column("numeric", 1)}
    model = models.content_model(columns, size=2, head="mlp", hidden=(3,))
    params = model.init(jax.random.key(0))
    inputs = {"user_id": jnp.array([3]), "item_id": jnp.array([1, 5]), "item_year": jnp.array([[0.5], [-2.0]])}
    net = jax.tree.map(np.asarray, params["net"]["params"])
    assert net["dense_0"]["kernel"].shape == (5, 3)
    users, items = (np.asarray(params["tables"][name]) for name in ("user_id", "item_id"))
    x = np.stack([np.concatenate([users[3], items[i], y]) for i, y in [(1, [0.5]), (5, [-2.0])]])
    hidden = np.maximum(x @ net["dense_0"]["kernel"] + net["dense_0"]["bias"], 0)
    want = hidden @ net["out"]["kernel"][:, 0] + net["out"]["bias"]
    np.testing.assert_allclose(model.apply(params, inputs), want, rtol=1e-5)


def test_large_tables_are_drawn_in_blocks():
    """150,000 rows of 8, rounded up to 74 * 2048 = 151,552: standard normal throughout, no row twice; the temporaries do
    not know the number of rows (at 10,000,000 rows, 65,536 are drawn together: 4 MiB of bits and of floats)."""
    draw = jax.jit(lambda key: normal_rows(key, 150_000, 8)).lower(jax.random.key(0)).compile()
    rows = np.asarray(draw(jax.random.key(0)))
    assert rows.shape == (74 * 2048, 8)
    n = rows.size  # standard error of the mean 1 / sqrt(n), of the variance sqrt(2 / n)
    assert abs(rows.mean()) < 4 / np.sqrt(n)
    assert abs(rows.var() - 1) < 4 * np.sqrt(2 / n)
    assert len(np.unique(rows, axis=0)) == 74 * 2048
    assert np.abs(np.corrcoef(rows[:65536, 0], rows[65536:131072, 0])[0, 1]) < 4 / np.sqrt(65536)
    many = jax.jit(lambda key: normal_rows(key, 10**7, 8)).lower(jax.random.key(0)).compile()
    assert many.memory_analysis().temp_size_in_bytes < 2**24
