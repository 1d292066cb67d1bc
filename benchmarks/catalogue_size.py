"""The time of an outer step as the catalogue grows: same tasks, seed's model, second-order MAML on every parameter.

    python benchmarks/catalogue_size.py [--items 3706 100000 1000000] [--json]

The tasks are those of one synthetic data set; its items are spread evenly over the larger tables, so that rows lie far
apart in memory. Sizes alternate in one process; medians over rounds. `ratio` is to the smallest catalogue.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace

import jax
import numpy as np
import optax

from metarec_jax import learners, models
from metarec_jax.data.interactions import Vocabulary
from metarec_jax.data.synthetic import synthetic
from metarec_jax.data.tasks import task_source
from metarec_jax.training.row_optimizers import lazy_adam
from metarec_jax.training.step import Optimizers, init_state, make_step

USERS, ITEMS = 6040, 3706


def runner(items: int, tasks: int, inner: int, size: int, length: int):
    """A compiled scan of outer steps over a table of ``items`` rows, and its state."""
    data = synthetic(USERS, ITEMS, ratings_per_user=(20, 60), seed=0).data
    spread = (data.item.astype(np.int64) * (items // ITEMS)).astype(np.int32)
    data = replace(data, item=spread, items=Vocabulary(np.arange(items)), item_features={}, user_features={})
    learner = learners.maml(models.meta_recommender(USERS + 1, items + 1, size=size), inner_lr=0.1, inner_steps=inner)
    source = task_source(data, tasks=tasks, support=(10, 10), query=10, user_rows="own", item_drop=0.0, cold_tasks=0.0)
    optimizers = Optimizers(optax.adam(1e-3), lazy_adam(1e-3))
    state = jax.jit(lambda k: init_state(learner, optimizers, learner.init(k), k))(jax.random.key(0))
    step = make_step(learner, source, optimizers)
    scan = lambda s, d: jax.lax.scan(lambda s, _: step(s, d), s, None, length=length)[0]  # noqa: E731
    run = jax.jit(scan, donate_argnums=0).lower(state, source.data).compile()
    return run, state, source.data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, nargs="+", default=[3706, 100_000, 1_000_000])
    parser.add_argument("--tasks", type=int, default=32)
    parser.add_argument("--inner", type=int, default=1)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    given = parser.parse_args()
    length = 100
    made = {n: runner(n, given.tasks, given.inner, given.size, length) for n in given.items}
    states = {n: jax.block_until_ready(run(state, data)) for n, (run, state, data) in made.items()}
    seconds: dict[int, list[float]] = {n: [] for n in made}
    for _ in range(given.rounds):
        for n, (run, _, data) in made.items():
            began = time.perf_counter()
            states[n] = jax.block_until_ready(run(states[n], data))
            seconds[n].append((time.perf_counter() - began) / length)
    median = {n: statistics.median(s) for n, s in seconds.items()}
    rows = [
        {
            "items": n,
            "tasks": given.tasks,
            "inner_steps": given.inner,
            "us_per_step": round(1e6 * median[n], 1),
            "range_us": [round(1e6 * min(s), 1), round(1e6 * max(s), 1)],
            "tasks_per_s": round(given.tasks / median[n]),
            "ratio": round(median[n] / median[min(median)], 3),
            "temporary_mib": round(made[n][0].memory_analysis().temp_size_in_bytes / 2**20, 2),
        }
        for n, s in seconds.items()
    ]
    for row in rows:
        print(row)
    if given.json:
        print(json.dumps({"device": str(jax.devices()[0]), "rows": rows}))


if __name__ == "__main__":
    main()
