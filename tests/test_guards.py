"""What compiled programs cost, counted and never timed: traces, operations, temporaries, copies of tables, collectives.

Two learners (the seed's model under MAML, ridge on content) at two sizes of the catalogue: 3,700 and 300,000 items. Nothing
of a table's size is allocated: programs are compiled for shapes.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metarec_jax import learners, models
from metarec_jax.core import Learner, Method
from metarec_jax.data.catalogue import catalogue
from metarec_jax.data.draw import TaskSource, task_source
from metarec_jax.data.interactions import Feature, Interactions, Vocabulary
from metarec_jax.data.synthetic import synthetic
from metarec_jax.data.tasks import batches, make_tasks
from metarec_jax.evaluation import evaluate as evaluation
from metarec_jax.evaluation import scoring
from metarec_jax.rows import rounded
from metarec_jax.serving import catalogue_scores
from metarec_jax.serving.linear import item_tables
from metarec_jax.serving.recommender import Recommender
from metarec_jax.training import loop
from metarec_jax.training.loop import fit
from metarec_jax.training.row_optimizers import lazy_adam
from metarec_jax.training.step import Optimizers, init_state, make_step

FEW, MANY = 3_700, 300_000
SIZE, TASKS, SHOWN, ASKED = 32, 32, 10, 10
USERS_EVALUATED, WIDTH = 64, 32
BAND = (0.9, 1.8)
"""Operations that XLA counts, over those counted by hand below: masks, means, indices and the draw are not in the hand's."""
COLLECTIVE = re.compile(
    r"\b(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast)\b"
)
PASSED_ON = {"parameter", "get-tuple-element", "bitcast", "tuple"}
WRITTEN_IN_PLACE = {"fusion", "scatter", "dynamic-update-slice", "while", "call"}
"""A fusion that makes a new table shows by the instructions inside it, which are lines of the program too."""
NAMES = ["seed", pytest.param("ridge", marks=pytest.mark.slow)]


@cache
def interactions(name: str, items: int) -> Interactions:
    """100 users with 30 ratings each, of items spread over the whole catalogue; for ridge, two genres an item."""
    rng = np.random.default_rng(0)
    genres = np.tile(np.array([[1, 2]], np.int32), (items + 1, 1))
    return Interactions(
        np.repeat(np.arange(1, 101), 30),
        rng.integers(1, items + 1, 3000),
        rng.integers(1, 6, 3000).astype(np.float32),
        None,
        Vocabulary(np.arange(100)),
        Vocabulary(np.arange(items)),
        {},
        {"item_genre": Feature("multi", genres, Vocabulary(np.arange(18)))} if name == "ridge" else {},
    )


def learner_of(name: str, data: Interactions) -> Learner:
    if name == "seed":
        return learners.maml(
            models.meta_recommender(data.users.num_rows, data.items.num_rows, size=SIZE), inner_steps=1
        )
    return learners.ridge(models.content_model(data.columns, size=SIZE))


def optimizers(rows=None) -> Optimizers:
    return Optimizers(optax.adam(1e-3), rows or lazy_adam(1e-3))


def source_of(data: Interactions) -> TaskSource:
    sizes = {"tasks": TASKS, "support": (SHOWN, SHOWN), "query": ASKED}
    return task_source(data, **sizes, user_rows="own", item_drop=0.0, cold_tasks=0.0)


def state_of(learner: Learner, by: Optimizers):
    return jax.eval_shape(lambda key: init_state(learner, by, learner.init(key), key), jax.random.key(0))


@cache
def training(name: str, items: int):
    """The program of `fit`: the loop over the outer steps of a chunk, tasks drawn inside it."""
    data = interactions(name, items)
    learner, by, source = learner_of(name, data), optimizers(), source_of(data)
    run = loop._chunk_runner(make_step(learner, source, by), 10)
    return run.lower(state_of(learner, by), source.data, 10).compile()


@cache
def one_step(name: str, items: int = FEW, *, rows=None, donate: bool = True):
    """One outer step on tasks that are there already."""
    data = interactions(name, items)
    learner, by, source = learner_of(name, data), optimizers(rows), source_of(data)
    tasks = jax.eval_shape(source.draw, source.data, jax.random.key(0))
    step = make_step(learner, TaskSource(tasks, lambda tasks, key: tasks, TASKS), by)
    return jax.jit(step, donate_argnums=0 if donate else ()).lower(state_of(learner, by), tasks).compile()


@cache
def evaluating(name: str, items: int):
    """The two programs of `evaluate` for a batch of 64 users with up to 32 support examples: adapt, predict."""
    data = interactions(name, items)
    learner = learner_of(name, data)
    params = jax.eval_shape(learner.init, jax.random.key(0))
    tasks = make_tasks(data, query=ASKED, support=(1, 20))
    _, task = next(batches(tasks, catalogue(data, user_rows="own"), USERS_EVALUATED))
    assert task.support.mask.shape == (USERS_EVALUATED, WIDTH)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), USERS_EVALUATED))
    adapt = scoring.compiled(scoring.adapt_each, learner.adapt).call.lower(params, task.support, keys)
    predict = scoring.compiled(scoring.predict_each, learner.predict).call
    predict = predict.lower(params, adapt.out_info, task.query.inputs)
    return adapt.compile(), predict.compile()


@cache
def recommending(name: str, items: int):
    """`Recommender`'s program for one user with up to 16 feedbacks: adapt, score every item, the best 10."""
    data = interactions(name, items)
    learner, known = learner_of(name, data), catalogue(data)
    params = jax.eval_shape(learner.init, jax.random.key(0))
    tables = () if known.item else item_tables(learner.tables, params, items + 1)
    plan = catalogue_scores.Plan(learner.adapt, learner.predict, 10, 2048, tables, True)
    slots = [jax.ShapeDtypeStruct((1, 16), dtype) for dtype in (jnp.int32, jnp.float32, jnp.float32)]
    users = catalogue_scores.Users(*slots, jax.ShapeDtypeStruct((1,), jnp.int32))
    return catalogue_scores.best.lower(plan, params, known, {}, users, jax.random.key(0)).compile()


def flops(program) -> float:
    return program.cost_analysis()["flops"]


def temporary(program) -> int:
    return program.memory_analysis().temp_size_in_bytes


def made(program, rows: int) -> set[str]:
    """The operations that make an array ``[rows, 2 or more, ..]``, or ``[rows]`` by copying."""
    text = program.as_text()
    matrices = re.findall(rf"= \w+\[{rows},(?!1\])[\d,]+\]\S* ([\w-]+)\(", text)
    vectors = re.findall(rf"= \w+\[{rows}(?:,1)?\]\S* (copy(?:-start)?)\(", text)
    return set(matrices) | set(vectors)


@pytest.mark.parametrize("name", NAMES)
def test_the_programs_do_not_depend_on_the_catalogue(name):
    """From 3,700 to 300,000 items: training, adapting and predicting do the same operations in the same temporaries."""
    few, many = ([training(name, n), *evaluating(name, n)] for n in (FEW, MANY))
    for small, large in zip(few, many, strict=True):
        assert flops(large) == pytest.approx(flops(small), rel=0.01)
        assert temporary(large) <= 1.01 * temporary(small) + 1024


@pytest.mark.parametrize("name", NAMES)
def test_training_makes_no_table(name):
    """In the loop over outer steps, arrays of a table's size are handed on or written to in place: none is copied or made."""
    assert made(training(name, MANY), rounded(MANY + 1)) <= PASSED_ON | WRITTEN_IN_PLACE
    assert "scatter" in training(name, MANY).as_text() or "dynamic-update-slice" in training(name, MANY).as_text()


@pytest.mark.parametrize("name", NAMES)
def test_evaluating_and_recommending_make_no_table(name):
    """A user never owns a copy of a table. A score for each item (4 bytes) is allowed, twice; a table takes 128 an item."""
    for program in (*evaluating(name, MANY), recommending(name, MANY)):
        assert made(program, rounded(MANY + 1)) <= PASSED_ON
    assert temporary(recommending(name, MANY)) < temporary(recommending(name, FEW)) + 2 * 4 * MANY


def test_the_guard_sees_tables():
    """What it is to catch: dense Adam goes through 300,000 rows of 32 in every step, in temporaries of that size; a step
    that may not write over its state copies the tables first."""
    lazy, dense = one_step("seed", MANY), one_step("seed", MANY, rows=optax.adam(1e-3))
    assert made(lazy, rounded(MANY + 1)) <= PASSED_ON | WRITTEN_IN_PLACE
    assert made(dense, rounded(MANY + 1)) - PASSED_ON - WRITTEN_IN_PLACE
    assert flops(dense) > flops(lazy) + 5 * MANY * SIZE
    assert temporary(dense) > temporary(lazy) + 3 * MANY * SIZE
    assert "copy" in made(one_step("seed", MANY, donate=False), rounded(MANY + 1))


@pytest.mark.parametrize("name", NAMES)
def test_one_device_needs_no_collectives(name):
    for program in (training(name, FEW), *evaluating(name, FEW), recommending(name, FEW)):
        assert not COLLECTIVE.search(program.as_text())


def moved_rows(length: int) -> int:
    """Operations on the rows of a view: for each number Adam's 16, the sum over duplicates, the inner step and its transpose."""
    return length * 20


def by_hand(name: str) -> float:
    """Multiplications and additions of one outer step.

    seed: 24 rows a task (the user twice, 20 items, 2 unknown), 32 numbers each. A score is ``w . [u, v]``: 2 * 32 for the
    item, the user's half is shared by a task. The inner step passes the support forward and back (3 score's worth), and
    back again for the outer gradient (6); the query takes 3.
    ridge: vectors of 32 and a bias. The normal matrix of 33 x 33 from 10 examples: 2 * 10 * 33^2, and twice that back
    from it; the solve and its transpose 2 * 33^2 each, and 2 * 33^2 for the gradient of the matrix. Rows of 33: 24.
    """
    if name == "seed":
        scores = (9 * SHOWN + 3 * ASKED) * 2 * SIZE
        return TASKS * (moved_rows(24 * SIZE) + scores)
    wide = SIZE + 1
    return TASKS * (moved_rows(24 * wide) + 6 * SHOWN * wide**2 + 6 * wide**2 + 3 * (SHOWN + ASKED) * 2 * wide)


@pytest.mark.parametrize("name", NAMES)
def test_operations_of_an_outer_step(name):
    assert BAND[0] < flops(one_step(name)) / by_hand(name) < BAND[1]


@pytest.mark.parametrize("name", NAMES)
def test_operations_of_adapting(name):
    """64 users, 32 slots. seed: 3 scores' worth a slot, and 35 rows of 32 gathered and moved. ridge: its normal matrix."""
    if name == "seed":
        count = USERS_EVALUATED * (3 * WIDTH * 2 * SIZE + 4 * 35 * SIZE)
    else:
        count = USERS_EVALUATED * 2 * WIDTH * (SIZE + 1) ** 2
    assert BAND[0] < flops(evaluating(name, FEW)[0]) / count < BAND[1]


def test_operations_of_scoring_the_catalogue():
    """The seed's score is linear in the item's row: one product with the table, 2 * 32 an item, and the maxima of blocks."""
    assert BAND[0] < flops(recommending("seed", MANY)) / (2 * SIZE * MANY) < BAND[1]


DATA = synthetic(60, 40, ratings_per_user=(8, 20), seed=0).data


def counted(learner: Learner) -> tuple[Learner, list[tuple[int, ...]]]:
    """The learner, and a list that grows by the size of the support whenever it is traced."""
    traces: list[tuple[int, ...]] = []

    def adapt(params, support, key):
        traces.append(support.mask.shape)
        return learner.adapt(params, support, key)

    def loss(params, task, key):
        traces.append(task.support.mask.shape)
        return learner.loss(params, task, key)

    return learner._replace(adapt=adapt, loss=loss), traces


def small(name: str) -> tuple[Interactions, Learner]:
    data = DATA if name == "ridge" else replace(DATA, item_features={}, user_features={})
    return data, learner_of(name, data)


@pytest.mark.parametrize("name", NAMES)
def test_ten_outer_steps_are_traced_once(name):
    """In chunks of 4, 4 and 2 steps."""
    data, learner = small(name)
    learner, traces = counted(learner)
    source = task_source(data, tasks=8, support=(2, 6), query=3)
    assert fit(learner, source, steps=10, chunk=4).step == 10
    assert traces == [(6,)]


@pytest.mark.parametrize("name", NAMES)
def test_evaluating_again_traces_nothing(name):
    data, learner = small(name)
    learner, traces = counted(learner)
    method = Method(jax.jit(learner.init)(jax.random.key(0)), learner.adapt, learner.predict)
    tasks = {"users": make_tasks(data, query=3, support=(1, 6))}
    evaluation.evaluate({"one": method}, tasks, catalogue(data))
    first = len(traces)
    assert first == len(set(traces))  # once for each width of the support
    evaluation.evaluate({"one": method}, tasks, catalogue(data), seed=1)
    assert len(traces) == first


@pytest.mark.parametrize("name", NAMES)
def test_ten_recommendations_are_traced_once(name):
    """Ten users with 1 to 8 ratings: the first compiles, nobody after."""
    data, learner = small(name)
    learner, traces = counted(learner)
    method = Method(jax.jit(learner.init)(jax.random.key(0)), learner.adapt, learner.predict)
    server = Recommender(method, data, catalogue(data))
    after = []
    for k in range(10):
        ids = data.items.decode(np.arange(1, 2 + k % 8)).tolist()
        assert len(server.recommend(dict.fromkeys(ids, 4.0), 5, explain=0)) == 5
        after.append(len(traces))
    assert after == [after[0]] * 10
