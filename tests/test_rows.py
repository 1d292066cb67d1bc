"""Row views and the row optimisers, against the plain dense computation."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import largest_difference

from metarec_jax import rows
from metarec_jax.core import MetarecError, Table
from metarec_jax.training import row_optimizers as ro

LENGTHS = (1, 12)
"""Lengths of the lists that are drawn; each length is one compiled program."""


def ids_of(length: int):
    return st.lists(st.integers(0, 9), min_size=length, max_size=length)


IDS = st.sampled_from(LENGTHS).flatmap(ids_of)


@settings(max_examples=40, deadline=None)
@given(IDS)
def test_first_occurrence_both_ways(ids):
    """The pairwise way (short lists) and the sorting way (long ones) both find ids.index(id)."""
    want = [ids.index(i) for i in ids]
    assert _first_occurrence(np.array(ids)).tolist() == want
    long = ids + list(range(10, 250))
    assert _first_occurrence(np.array(long))[: len(ids)].tolist() == want


_first_occurrence = jax.jit(rows.first_occurrence)


@settings(max_examples=30, deadline=None)
@given(IDS, st.booleans())
def test_a_view_shows_the_same_rows(ids, adapted):
    """Looking up local ids in the gathered rows is looking up ids in the table; id 0 stays 0."""
    table, column = np.arange(20.0).reshape(10, 2), np.array(ids)
    local, (first, second) = jax.device_get(_viewed(column, adapted, table))
    assert local.shape == (1 + 2 * len(ids), 2)
    np.testing.assert_array_equal(local[first["a"]], table[column])
    np.testing.assert_array_equal(local[second["b"]], table[column[:, None]])
    assert ((first["a"] == 0) == (column == 0)).all()
    if adapted:  # equal ids share a row, also across examples
        assert (first["a"] == second["b"][:, 0]).all()


@partial(jax.jit, static_argnames="adapted")
def _viewed(column, adapted, table):
    """The gathered rows, and the inputs with local ids."""
    tables = {"t": Table(10, 2, ("a", "b"), adapted)}
    seen = rows.view(tables, {"a": column}, {"b": column[:, None], "c": column})
    return rows.gather({"t": table}, seen.ids)["t"], seen.inputs


@pytest.mark.parametrize(
    ("adapted", "order"),
    [(True, ("wide", "deep", "pair", "alone")), (False, ("pair", "alone", "deep", "wide"))],
)
@settings(max_examples=30, deadline=None)
@given(left=ids_of(7), right=ids_of(5))
def test_tables_that_share_a_column_are_numbered_together(left, right, adapted, order):
    """Each table shows its own rows at the local ids of its columns, whatever the order of the tables."""
    local, seen, ids, values, inputs = jax.device_get(
        _four_tables(np.array(left), np.array(right), adapted=adapted, order=order)
    )
    for name, columns in {"wide": "b", "deep": "b", "pair": "ab", "alone": "c"}.items():
        for c in columns:
            np.testing.assert_array_equal(local[name][seen[c]], values[name][inputs[c]])
    assert local["wide"].shape[0] == local["pair"].shape[0] == 1 + len(left) + len(right)
    assert set(ids["wide"].tolist()) <= {0, *right}  # no row of another column counts as touched


@partial(jax.jit, static_argnames=("adapted", "order"))
def _four_tables(left, right, adapted, order):
    """The gathered rows, the local ids and the ids of their rows; and the tables and the ids that went in."""
    tables = {
        "wide": Table(10, 1, ("b",), False),
        "deep": Table(10, 2, ("b",), adapted),
        "pair": Table(10, 2, ("a", "b"), False),
        "alone": Table(10, 2, ("c",)),
    }
    values = {n: jnp.arange(10.0 * t.size).reshape(10, t.size) + k for k, (n, t) in enumerate(tables.items())}
    inputs = {"a": left, "b": right, "c": left}
    seen = rows.view({name: tables[name] for name in order}, inputs)
    return rows.gather(values, seen.ids), seen.inputs[0], seen.ids, values, inputs


@settings(max_examples=30, deadline=None)
@given(IDS, IDS)
def test_overlay_is_a_write_to_a_copy(ids, slots):
    """overlay(table, ids, moved, slots) shows what a full copy of the table with rows ids replaced would show."""
    table = np.arange(20.0).reshape(10, 2)
    moved = -1.0 - np.arange(2.0 * len(ids)).reshape(-1, 2)
    laid = _overlay(table, np.array(ids), moved, np.array(slots))
    whole = table.copy()
    whole[ids] = moved[[ids.index(i) for i in ids]]
    np.testing.assert_array_equal(laid, whole[slots])


_overlay = jax.jit(rows.overlay)


def dense_adam_by_hand(table, ids, grads, state, lr=0.1, b1=0.9, b2=0.999, eps=1e-8):
    """Lazy Adam in numpy loops: one row at a time."""
    table, (mu, nu, count) = table.copy(), (a.copy() for a in state)
    for row in sorted(set(ids)):
        g = sum(g for i, g in zip(ids, grads, strict=True) if i == row)
        count[row] += 1
        mu[row] = b1 * mu[row] + (1 - b1) * g
        nu[row] = b2 * nu[row] + (1 - b2) * g * g
        hat = mu[row] / (1 - b1 ** count[row]), nu[row] / (1 - b2 ** count[row])
        table[row] -= lr * hat[0] / (np.sqrt(hat[1]) + eps)
    return table, (mu, nu, count)


def test_lazy_adam_by_hand(float64):
    """Three steps with repeated and absent rows, against a loop over rows; the whole-table form gives the same."""
    rng = np.random.default_rng(0)
    table = want = rng.normal(size=(12, 2))
    state = (np.zeros((12, 2)), np.zeros((12, 2)), np.zeros(12, int))
    optimizer = ro.lazy_adam(0.1)
    update_rows, update_whole = (jax.jit(partial(update, optimizer)) for update in (ro.update_rows, ro.update_whole))
    by_rows = whole = (jnp.asarray(table), ro.init_table(optimizer, jnp.asarray(table)))
    for step, ids in enumerate([[1, 3, 1, 5], [3, 3, 3, 0], [7, 1, 2, 3]]):
        grads = rng.normal(size=(4, 2))
        want, state = dense_adam_by_hand(want, ids, grads, state)
        a = jnp.asarray(ids)
        by_rows = update_rows(*by_rows, a, jnp.asarray(grads), jnp.asarray(step))
        dense = np.zeros((12, 2))
        np.add.at(dense, ids, grads)
        whole = update_whole(*whole, a, jnp.asarray(dense), jnp.asarray(step))
        np.testing.assert_allclose(by_rows[0], want, rtol=1e-9)
        np.testing.assert_allclose(whole[0], want, rtol=1e-9)
    assert by_rows[1].inner.updates.tolist() == state[2].tolist() == [1, 2, 1, 3, 0, 1, 0, 1, 0, 0, 0, 0]
    assert largest_difference(by_rows[1].inner, whole[1].inner) < 1e-12


@pytest.mark.parametrize("catch_up", [False, True])
def test_lazy_adam_without_momentum(catch_up, float64):
    """b1 = 0 is RMSProp with a corrected second moment, b2 = 0 too the sign of the gradient, by hand."""
    grads = [jnp.array([[3.0]]), jnp.array([[-1.0]])]
    nu = [9.0, (0.9 * 0.1 * 9 + 0.1 * 1) / (1 - 0.9**2)]
    for b2, lengths in ((0.9, [-3 / np.sqrt(nu[0]), 1 / np.sqrt(nu[1])]), (0.0, [-1.0, 1.0])):
        optimizer, table = ro.lazy_adam(0.1, b1=0.0, b2=b2, catch_up=catch_up), jnp.zeros((4, 1))
        state = ro.init_table(optimizer, table)
        update = jax.jit(partial(ro.update_rows, optimizer))
        for step, (grad, length) in enumerate(zip(grads, lengths, strict=True)):
            before = table[2, 0]
            table, state = update(table, state, jnp.array([2]), grad, jnp.asarray(step))
            assert float(table[2, 0] - before) == pytest.approx(0.1 * length, rel=1e-6)


@pytest.mark.parametrize(
    ("argument", "bad"), [("b1", 1.0), ("b1", -0.1), ("b2", 1.0), ("b2", np.nan), ("eps", 0.0), ("weight_decay", -1.0)]
)
def test_lazy_adam_refuses_what_divides_by_zero(argument, bad):
    with pytest.raises(MetarecError, match=f"lazy_adam: {argument} must be"):
        ro.lazy_adam(**{argument: bad})
    if argument == "eps":
        with pytest.raises(MetarecError, match="row_adagrad: eps must be"):
            ro.row_adagrad(eps=bad)


@pytest.mark.parametrize(
    "optimizer", [ro.lazy_adam(0.1, weight_decay=0.1), ro.lazy_adam(0.1, catch_up=True), ro.row_adagrad(0.1)]
)
def test_a_crowded_batch_goes_through_the_whole_table(optimizer, float64):
    """4 ids in 8 rows and the same in 100: the rows of either are the same after three steps, and none but theirs move."""
    rng = np.random.default_rng(1)
    few, many = (jnp.asarray(np.concatenate([np.arange(16.0).reshape(8, 2), np.ones((n, 2))])) for n in (0, 92))
    states = [ro.init_table(optimizer, t) for t in (few, many)]
    update = jax.jit(partial(ro.update_rows, optimizer))
    for step, ids in enumerate([[1, 3, 1, 5], [3, 3, 3, 0], [7, 1, 2, 3]]):
        grads = jnp.asarray(rng.normal(size=(4, 2)))
        few, states[0] = update(few, states[0], jnp.asarray(ids), grads, jnp.asarray(step))
        many, states[1] = update(many, states[1], jnp.asarray(ids), grads, jnp.asarray(step))
    np.testing.assert_allclose(few, many[:8], rtol=1e-12)
    for a, b in zip(jax.tree.leaves(states[0].inner), jax.tree.leaves(states[1].inner), strict=True):
        np.testing.assert_allclose(a, b[:8], rtol=1e-12)
    assert (many[8:] == 1.0).all()
    assert few[4].tolist() == [8.0, 9.0]
    assert few[6].tolist() == [12.0, 13.0]


def test_catch_up_decays_what_was_missed(float64):
    """Row 0 is touched at steps 0 and 3: its first moment decays by b1 for each of the two steps between."""
    optimizer = ro.lazy_adam(0.1, catch_up=True)
    table = jnp.zeros((2, 1))
    state = ro.init_table(optimizer, table)
    g = jnp.ones((1, 1))
    update = jax.jit(partial(ro.update_rows, optimizer))
    for step, row in enumerate([0, 1, 1, 0]):
        table, state = update(table, state, jnp.array([row]), g, jnp.asarray(step))
    mu = 0.1  # after step 0: 0.1 * 1; two missed steps; then b1 * mu + 0.1
    mu = 0.9 * (mu * 0.9**2) + 0.1
    assert float(state.inner.moments[0, 0, 0]) == pytest.approx(mu, rel=1e-12)


def test_row_adagrad_by_hand():
    """g = (3, 4): accumulator 12.5; step = 0.5 * g / sqrt(12.5)."""
    optimizer = ro.row_adagrad(0.5)
    table = jnp.zeros((3, 2))
    out, state = ro.update_rows(
        optimizer, table, ro.init_table(optimizer, table), jnp.array([2]), jnp.array([[3.0, 4.0]]), jnp.asarray(0)
    )
    np.testing.assert_allclose(out[2], -0.5 * np.array([3.0, 4.0]) / np.sqrt(12.5), rtol=1e-6)
    assert state.inner.tolist() == [0.0, 0.0, 12.5]


def test_an_optax_transformation_is_dense():
    """Momentum moves a row that the batch did not touch: the difference from the lazy optimisers."""
    momentum = optax.sgd(1.0, momentum=0.5)
    table = jnp.zeros((2, 1))
    state = ro.init_table(momentum, table)
    for row in (0, 1):
        table, state = ro.update_rows(momentum, table, state, jnp.array([row]), jnp.ones((1, 1)), jnp.asarray(0))
    assert table[:, 0].tolist() == [-1.5, -1.0]


def test_a_million_rows_cost_no_temporary_of_their_size():
    """The compiled update of 64 rows in a donated table of 1,000,000 keeps its temporaries below 1 MiB."""
    optimizer = ro.lazy_adam(0.1)
    table = jax.ShapeDtypeStruct((1_000_000, 8), jnp.float32)
    state = jax.eval_shape(lambda t: ro.init_table(optimizer, t), table)
    ids, grads = jax.ShapeDtypeStruct((64,), jnp.int32), jax.ShapeDtypeStruct((64, 8), jnp.float32)
    step = jax.ShapeDtypeStruct((), jnp.int32)
    update = jax.jit(lambda t, s, i, g, k: ro.update_rows(optimizer, t, s, i, g, k), donate_argnums=(0, 1))
    memory = update.lower(table, state, ids, grads, step).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2**20


def test_an_id_past_the_table_is_named():
    """A table of 10 rows: 9 passes, 10 and -1 do not, wherever in the columns they stand."""
    tables = {"t": Table(10, 2, ("a", "b"))}
    rows.check_ids(tables, {"a": jnp.array([0, 9])}, {"b": jnp.array([[3], [9]]), "c": jnp.array([99])})
    for bad in (10, -1):
        with pytest.raises(MetarecError, match=f"table 't' has rows 0..9, and the test has the id {bad}"):
            rows.check_ids(tables, {"a": jnp.array([0])}, {"b": jnp.array([[3], [bad]])}, source="the test")


@pytest.mark.parametrize("n", [3, 300])
def test_local_ids_stay_int32_in_double_precision(n, float64):
    tables, inputs = {"t": Table(10, 2, ("a",))}, {"a": jax.ShapeDtypeStruct((n,), jnp.int32)}
    seen = jax.eval_shape(partial(rows.view, tables), inputs)
    assert seen.ids["t"].dtype == seen.inputs[0]["a"].dtype == jnp.int32
