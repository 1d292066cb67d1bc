"""Our side of the speed questions: a worker that scans outer steps (`protocol.serve`), and what `s6` asks of them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from benchmarks.cells import EXAMPLES, HIDDEN, SIZE, USERS, VOCAB, batches
from benchmarks.protocol import Cell, resident_mib, serve
from metarec_jax import learners, models
from metarec_jax.core import Array, Column, Examples, Learner, Task
from metarec_jax.cpu import huge_pages, tune_cpu
from metarec_jax.data.draw import TaskSource, task_source
from metarec_jax.data.interactions import Interactions, Vocabulary
from metarec_jax.training.row_optimizers import lazy_adam
from metarec_jax.training.step import Optimizers, TrainState, init_state, make_step

MELU_COLUMNS = ("user_0", "user_1", "user_2", "user_3", "item_0", "item_1", "item_2", "item_3")
BLOCK = 50


def make_learner(cell: Mapping[str, Any]) -> Learner:
    """The learner of a cell."""
    if cell["model"] == "melu":
        columns = {name: Column("categorical", rows + 1) for name, rows in zip(MELU_COLUMNS, VOCAB, strict=True)}
        model = models.content_model(columns, head="mlp", hidden=HIDDEN, size=SIZE)
        return learners.maml(model, inner_lr=cell["lr"], inner_steps=cell["inner_steps"], only=("net",))
    model = models.meta_recommender(USERS + 1, cell["items"] + 1, size=SIZE)
    return learners.maml(model, inner_lr=cell["lr"], inner_steps=cell["inner_steps"])


def make_tasks(cell: Mapping[str, Any]) -> Task:
    """The prepared batches as tasks, leading axes ``[batches, tasks]``; a user's columns stand once for a task."""
    made = batches(cell)
    names = MELU_COLUMNS if cell["model"] == "melu" else ("user_id", "item_id")

    def part(where: slice) -> Examples:
        columns = {n: made.ids[:, :, where, c] + 1 for c, n in enumerate(names)}
        inputs = {n: jnp.asarray(ids[:, :, :1] if n.startswith("user") else ids) for n, ids in columns.items()}
        rating = jnp.asarray(made.rating[:, :, where])
        return Examples(inputs, rating, jnp.ones_like(rating))

    return Task(part(slice(0, EXAMPLES)), part(slice(EXAMPLES, None)))


def prepared(cell: Mapping[str, Any]) -> TaskSource:
    """A source that draws nothing: it picks one of the prepared batches, as PyTorch's side does."""

    def pick(tasks: Task, key: Array) -> Task:
        at = jax.random.randint(key, (), 0, cell["batches"])
        return jax.tree.map(lambda a: a[at], tasks)

    return TaskSource(make_tasks(cell), pick, cell["tasks"])


def drawn(cell: Mapping[str, Any]) -> TaskSource:
    """Tasks of the same sizes drawn on the device, from random histories of 20 to 60 ratings a user."""
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(1, USERS + 1), rng.integers(2 * EXAMPLES, 61, USERS)).astype(np.int32)
    item = rng.integers(1, cell["items"] + 1, len(user)).astype(np.int32)
    rating = rng.integers(1, 6, len(user)).astype(np.float32)
    data = Interactions(user, item, rating, None, Vocabulary(np.arange(USERS)), Vocabulary(np.arange(cell["items"])))
    sizes = {"tasks": cell["tasks"], "support": (EXAMPLES, EXAMPLES), "query": EXAMPLES}
    return task_source(data, **sizes, user_rows="own", item_drop=0.0, cold_tasks=0.0)


def make_optimizers(cell: Mapping[str, Any]) -> Optimizers:
    """Adam at 1e-3; on the rows of the batch alone unless ``cell["optimizer"]`` is "dense"."""
    rows = optax.adam(1e-3) if cell.get("optimizer") == "dense" else lazy_adam(1e-3)
    return Optimizers(optax.adam(1e-3), rows)


def make_state(cell: Mapping[str, Any], learner: Learner, optimizers: Optimizers) -> TrainState:
    """The first state, born on the device."""
    make = jax.jit(lambda key: init_state(learner, optimizers, learner.init(key), key))
    return make(jax.random.key(0))


def setup(cell: dict[str, Any]) -> Cell:
    """Compile a scan of outer steps; ``cell["optimizer"]``: "lazy" or "dense" rows; ``cell["tasks_from"]``."""
    tune_cpu()  # once pinned: it asks for threads by the cores there are
    before = resident_mib()
    learner = make_learner(cell)
    source = drawn(cell) if cell.get("tasks_from") == "device" else prepared(cell)
    optimizers = make_optimizers(cell)
    state = jax.block_until_ready(make_state(cell, learner, optimizers))
    huge_pages(state)
    groups = None
    if cell.get("devices", 1) > 1:  # tables on every device, tasks over them
        mesh = jax.make_mesh((cell["devices"],), ("data",), axis_types=(AxisType.Auto,))
        state, data = jax.device_put((state, source.data), NamedSharding(mesh, PartitionSpec()))
        draw, over = source.draw, NamedSharding(mesh, PartitionSpec("data"))
        source = TaskSource(data, lambda d, k: jax.lax.with_sharding_constraint(draw(d, k), over), source.tasks)
        groups = 1
    step = make_step(learner, source, optimizers, groups=groups)

    def scan(state: TrainState, data: Any) -> TrainState:
        return jax.lax.scan(lambda s, _: (step(s, data)[0], None), state, None, length=BLOCK)[0]

    begin = time.perf_counter()
    program = jax.jit(scan, donate_argnums=0).lower(state, source.data).compile()
    compile_s = time.perf_counter() - begin

    def run(blocks: int) -> None:
        nonlocal state
        for _ in range(blocks):
            state = program(state, source.data)
        jax.block_until_ready(state)

    run(1)
    tables = jax.tree.leaves((state.params["tables"], state.tables))
    memory = program.memory_analysis()
    device = jax.devices()[0]
    stats = device.memory_stats() if device.platform != "cpu" else None
    extra = {
        "device": device.device_kind,
        "added_mib": round(resident_mib() - before, 1),
        "tables_and_moments_mib": round(sum(a.nbytes for a in tables) / 2**20, 1),
        "temporary_mib": round(memory.temp_size_in_bytes / 2**20, 2) if memory else None,
    }
    peak = (lambda: device.memory_stats()["peak_bytes_in_use"]) if stats else None
    return Cell(run, BLOCK, compile_s, extra, peak)


if __name__ == "__main__":
    serve(setup)
