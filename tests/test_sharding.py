"""Devices change nothing but who does the work: the same run on 1 and on 8, and only rows of the batch between them."""

from __future__ import annotations

import re
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from worlds import ids_alone, largest_difference

from metarec_jax import learners, models
from metarec_jax.core import MetarecError
from metarec_jax.data.draw import TaskSource, task_source
from metarec_jax.data.synthetic import synthetic
from metarec_jax.rows import rounded
from metarec_jax.training.devices import exchange, sharding
from metarec_jax.training.loop import _chunk_runner, _start, fit
from metarec_jax.training.row_optimizers import lazy_adam, row_adagrad, update_rows
from metarec_jax.training.step import Optimizers, make_step

DATA = ids_alone(
    synthetic(300, 5000, ratings_per_user=(8, 20), seed=0).data
)  # 5,001 rows of items: a table that is cut
SOURCE = task_source(DATA, tasks=16, support=(2, 6), query=3, user_rows="own")
DOT = models.content_model(DATA.columns, size=3)
MLP = models.content_model(DATA.columns, size=3, head="mlp", hidden=(5,))
SEED = models.meta_recommender(DATA.users.num_rows, DATA.items.num_rows, size=3)
LEARNERS = {
    "maml": learners.maml(SEED, inner_lr=0.05, inner_steps=2),
    "fomaml": learners.maml(SEED, inner_lr=0.05, inner_steps=2, first_order=True),
    "melu": learners.maml(MLP, inner_lr=0.05, inner_steps=2, only=("net",)),
    "meta_sgd": learners.maml(DOT, inner_steps=2, rule=learners.meta_sgd(0.05), only=("tables/user_id",)),
    "reptile": learners.reptile(DOT, inner_lr=0.05, inner_steps=2),
    "ridge": learners.ridge(DOT),
}
ON_ONE = {}


def on_one_device(name: str, **arguments):
    """The run on one device, made once for each learner."""
    key = (name, *sorted(arguments))
    if key not in ON_ONE:
        ON_ONE[key] = fit(LEARNERS[name], SOURCE, steps=6, chunk=3, lr=0.01, **arguments)
    return ON_ONE[key]


def assert_same_run(many, one, digits=2e-6):
    """Parameters to rounding, and the losses on the way."""
    assert largest_difference(jax.device_get(many.params), jax.device_get(one.params)) < digits
    for a, b in zip(many.history, one.history, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "ridge")) for n in LEARNERS])
@pytest.mark.parametrize(
    ("data", "model"), [(4, 2), *(pytest.param(*mesh, marks=pytest.mark.slow) for mesh in ((1, 8), (8, 1)))]
)
def test_eight_devices_are_one(name, data, model):
    """6 steps: tables cut in 8, in 2 (four copies of each part), and not at all."""
    if (data, model) != (4, 2) and name in ("fomaml", "meta_sgd", "reptile"):
        pytest.skip("the families are covered by maml, melu and ridge")
    mesh = sharding.make_mesh(data, model)
    many = fit(LEARNERS[name], SOURCE, steps=6, chunk=3, lr=0.01, mesh=mesh)
    assert_same_run(many, on_one_device(name))
    assert many.params["tables"]["item_id"].sharding.shard_shape((5056, 3)) == (5056 // model, 3)


@pytest.mark.parametrize(
    "rows",
    [
        row_adagrad(0.01),
        pytest.param(optax.adam(0.01), marks=pytest.mark.slow),
        pytest.param(optax.chain(optax.clip_by_global_norm(1e-4), optax.sgd(1.0)), marks=pytest.mark.slow),
    ],
)
def test_other_optimisers_of_rows(rows):
    """Row-wise Adagrad on cut rows; whole-table Adam; a clip by the norm of the WHOLE table, which no device has."""
    many = fit(LEARNERS["maml"], SOURCE, steps=3, rows=rows, mesh=sharding.make_mesh(2, 4))
    one = fit(LEARNERS["maml"], SOURCE, steps=3, rows=rows)
    assert_same_run(many, one)


@pytest.mark.slow
def test_micro_batches_and_a_step_are_the_same_mean():
    """2 tasks on each of 8 devices, one at a time, against 16 tasks at once on one."""
    many = fit(LEARNERS["maml"], SOURCE, steps=6, chunk=3, lr=0.01, mesh=sharding.make_mesh(), micro_batches=2)
    assert_same_run(many, on_one_device("maml"))


@pytest.mark.slow
def test_given_parameters_are_copied_not_taken():
    """The caller's arrays live on after the run, though the step donates its buffers, on a mesh of one device too."""
    given = LEARNERS["maml"].init(jax.random.key(5))
    for mesh in (sharding.make_mesh(1, 1), sharding.make_mesh(2, 4)):
        fit(LEARNERS["maml"], SOURCE, steps=2, params=given, mesh=mesh)
        assert bool(jnp.isfinite(given["tables"]["item_id"]).all())


@pytest.mark.slow
def test_streamed_tasks_are_spread_too():
    """Host batches, cut over the devices as they come: the same parameters as on one device."""
    batches = [jax.tree.map(np.asarray, SOURCE.draw(SOURCE.data, jax.random.key(k))) for k in range(4)]
    stream = TaskSource((), lambda data, key: data[1], 16, lambda first: iter(batches[first:]))
    one = fit(LEARNERS["ridge"], stream, steps=4, chunk=3)
    assert_same_run(fit(LEARNERS["ridge"], stream, steps=4, chunk=3, mesh=sharding.make_mesh()), one)


@pytest.mark.parametrize("cut", [True, False])
def test_rows_and_updates_between_devices_are_exact(cut):
    """Lookups from a table in 4 parts, and 40 repeated ids stepped: bit for bit what one device does.

    Ids 0, 15, 16 and 63 are the ends of parts; each device asks for 5 x 1 ids.
    """
    mesh = sharding.make_mesh(2, 4)
    k = jax.random.split(jax.random.key(0), 3)
    table, grads = jax.random.normal(k[0], (64, 3)), jax.random.normal(k[1], (40, 3))
    ids = jax.random.randint(k[2], (40,), 0, 64).at[:8].set(jnp.array([0, 15, 16, 63, 0, 15, 16, 63]))
    P = jax.sharding.PartitionSpec
    held, tasks = P(sharding.MODEL) if cut else P(), sharding.TASKS
    if cut:
        take = sharding.each_device(mesh, sharding.take_rows, (held, tasks), tasks)
        assert (jax.jit(take)(table, ids[:, None])[:, 0] == table[ids]).all()
    state = lazy_adam(0.1).init(table)

    def update(table, moments, updates, slot, ids, grads):
        kept = sharding_state(moments, updates, slot)
        return update_rows(lazy_adam(0.1), table, kept, *sharding.gather_updates(table, ids, grads, cut), jnp.array(0))[
            0
        ]

    def sharding_state(moments, updates, slot):
        from metarec_jax.training.row_optimizers import LazyAdamState, TableState

        return TableState(LazyAdamState(moments, updates), slot)

    slot = jnp.zeros(64, jnp.int32)
    many = sharding.each_device(mesh, update, (held, held, held, held, tasks, tasks), held)
    got = jax.jit(many)(table, state.moments, state.updates, slot, ids, grads)
    want = jax.jit(lambda *a: update_rows(lazy_adam(0.1), *a, jnp.array(0))[0])(
        table, sharding_state(state.moments, state.updates, slot), ids, grads
    )
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("high", "full"), [(4096, False), (512, True)])
def test_owners_send_exactly_the_rows_asked_for(high, full):
    """8 devices ask for 80 ids each of 4,096 rows. Anywhere: about 10 of each owner, of 32 at the most. All in the first
    512 rows: more than 32 distinct of the first owner, so everything is gathered. The rows are the same bits."""
    mesh = sharding.make_mesh(1, 8)
    table = jax.random.normal(jax.random.key(0), (4096, 3))
    ids = jax.random.randint(jax.random.key(1), (16, 40), 0, high)

    def work(table, ids):
        found, way = exchange.fetch(table, ids, 8)
        return found, way.full

    tasks = sharding.TASKS
    found, said = jax.jit(sharding.each_device(mesh, work, (jax.sharding.PartitionSpec(sharding.MODEL), tasks), tasks))(
        table, ids
    )
    assert exchange.capacity(80, 8) == 32
    assert (found == table[ids]).all()
    assert said.tolist() == [full] * 8


@pytest.mark.slow
def test_owners_asked_for_too_much_change_nothing(monkeypatch):
    """With room for one id an owner, every step gathers everything: the run is that of one device all the same."""
    monkeypatch.setattr(exchange, "capacity", lambda ids, owners: 1)
    many = fit(LEARNERS["maml"], SOURCE, steps=6, chunk=3, lr=0.01, mesh=sharding.make_mesh(1, 8))
    assert_same_run(many, on_one_device("maml"))


@cache
def compiled_chunk(mesh, items: int):
    """The compiled program of a chunk, for a catalogue that is never made, and the shapes of its state."""
    known = models.meta_recommender(2000, items, size=8)
    learner = learners.maml(known, inner_lr=0.05, inner_steps=1)

    def draw(data, key):
        batch = SOURCE.draw(SOURCE.data, key)
        far = {"item_id": lambda a: a * (items // 5001), "user_id": lambda a: a}
        inputs = lambda part: {name: far[name](part.inputs[name]) for name in far}  # noqa: E731
        return batch._replace(
            support=batch.support._replace(inputs=inputs(batch.support)),
            query=batch.query._replace(inputs=inputs(batch.query)),
        )

    source = TaskSource((), draw, 16)
    optimizers = Optimizers(optax.adam(0.1), lazy_adam(0.1))
    from metarec_jax.training.step import init_state

    shapes = jax.eval_shape(lambda key: init_state(learner, optimizers, learner.init(key), key), jax.random.key(0))
    if mesh is not None:
        where = sharding.state_shardings(mesh, shapes)
        shapes = jax.tree.map(lambda s, w: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=w), shapes, where)
    return _chunk_runner(make_step(learner, source, optimizers, mesh=mesh), 5).lower(shapes, (), 5).compile(), shapes


_COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(-start)?\(")


def collectives(compiled) -> list[tuple[str, int]]:
    """Name and number of elements of the largest result of each collective of a program."""
    found = []
    for shape, name, _ in _COLLECTIVE.findall(compiled.as_text()):
        sizes = [int(np.prod([int(n) for n in dims.split(",") if n])) for dims in re.findall(r"\[([\d,]*)\]", shape)]
        found.append((name, max(sizes)))
    return found


@pytest.mark.parametrize(("data", "model"), [(1, 8), pytest.param(2, 4, marks=pytest.mark.slow)])
def test_only_rows_of_the_batch_cross_between_devices(data, model):
    """A million items in rows of 8: nothing that crosses is larger than the batch's 16 tasks x 10 slots x 8 numbers."""
    found = collectives(compiled_chunk(sharding.make_mesh(data, model), 1_000_000)[0])
    assert {name for name, _ in found} >= {"all-gather", "all-reduce"} | ({"all-to-all"} if model == 8 else set())
    assert max(size for _, size in found) <= 16 * (1 + 6 + 3) * 8


def test_memory_of_a_device_falls_with_the_devices():
    """A program's arguments: with 8 devices an eighth of the tables and moments, and what is small beside it; its
    temporaries do not know the size of the catalogue."""
    alone, _ = compiled_chunk(None, 1_000_000)
    many, shapes = compiled_chunk(sharding.make_mesh(1, 8), 1_000_000)
    one, eighth = (c.memory_analysis().argument_size_in_bytes for c in (alone, many))
    assert one == pytest.approx(rounded(1_000_000) * (8 * 3 + 2) * 4, rel=0.01)
    assert eighth == pytest.approx(one / 8, rel=0.02)
    assert many.memory_analysis().temp_size_in_bytes < 2**20
    where = jax.tree.map(lambda leaf: leaf.sharding, shapes)
    assert sharding.size_on_device(shapes, where) == pytest.approx(eighth, rel=0.001)


def test_parameters_are_born_cut():
    """The program that makes a million rows of 8 on 8 devices (4 MB each, 15 with moments) works in less than 8 MB a
    device and sends nothing between them."""
    mesh = sharding.make_mesh(1, 8)
    model = models.meta_recommender(2000, 1_000_000, size=8)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(sharding.MODEL))
    where = jax.tree.map(lambda s: cut if s.shape[0] > 5000 else None, shapes["tables"])
    made = jax.jit(lambda key: model.init(key)["tables"], out_shardings=where).lower(jax.random.key(0)).compile()
    assert made.memory_analysis().temp_size_in_bytes < 8 * 2**20
    assert collectives(made) == []


def test_a_table_too_large_for_one_device_trains_on_eight():
    """Small scale, same code: with room for a third of the state on each device, one refuses and eight train."""
    learner = learners.maml(models.meta_recommender(400, 40_000, size=8), inner_lr=0.05, inner_steps=1)
    optimizers = Optimizers(optax.adam(0.01), lazy_adam(0.01))
    keys = jax.random.split(jax.random.key(0))
    state = _start(learner, optimizers, None, *keys, keeps_best=False, mesh=sharding.make_mesh(1, 8))
    held = {}
    for leaf in jax.tree.leaves(state):
        if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            for shard in leaf.addressable_shards:
                held[shard.device.id] = held.get(shard.device.id, 0) + shard.data.nbytes
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves((state.params, state.tables)))
    assert max(held.values()) < whole / 8 + 400 * (8 * 3 + 2) * 4 + 10_000, "an eighth, and the small table"


def test_a_mesh_that_does_not_fit_is_an_error():
    with pytest.raises(MetarecError, match=r"requires 16 devices, and there are 8"):
        sharding.make_mesh(2, 8)
    with pytest.raises(MetarecError, match=r"a batch has 12 tasks, and 8 devices .*draw 16 tasks"):
        fit(LEARNERS["ridge"], task_source(DATA, tasks=12), steps=2, mesh=sharding.make_mesh())


@pytest.mark.slow
def test_a_loss_that_is_not_finite_names_its_task():
    """Task 11 of 16 has a target of 1e30 (its square is beyond float32): step 0, on one device and on eight."""

    def draw(data, key):
        batch = SOURCE.draw(data, key)
        return batch._replace(query=batch.query._replace(target=batch.query.target.at[11].set(1e30)))

    source = SOURCE._replace(draw=draw)
    for mesh in (None, sharding.make_mesh()):
        with pytest.raises(MetarecError, match=r"the loss of step 0 is inf, first in task 11 of its batch"):
            fit(LEARNERS["maml"], source, steps=2, mesh=mesh)


@pytest.mark.slow
def test_half_precision_keeps_whole_rows():
    """bfloat16 inside the learner, float32 outside: the loss agrees to 2%, the parameters stay float32."""
    half = fit(LEARNERS["maml"], SOURCE, steps=6, chunk=3, lr=0.01, dtype=jnp.bfloat16)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(half.params)} == {"float32"}
    assert half.history[-1]["loss"] == pytest.approx(on_one_device("maml").history[-1]["loss"], rel=0.02)
    assert largest_difference(half.params, on_one_device("maml").params) > 0
