"""S5: how long does one new user wait for ten recommendations, and how far is that from reading the item table once?

Adapt on 10 ratings, score every item, return the best 10, names and all: one call of `Recommender.recommend`, a different
user each time. The floor is one read of the item table in the same process. Rows take turns within each round;
times are medians over all calls, `ratio_to_floor` is the median over rounds of the ratio of medians. Then 1,000 users at
once by `recommend_many`. "not told" is the same method without its tables: what a method of one's own gets.

What is unfair: the floor reads from memory only where the table does not fit into the cache (3,706 rows do). It is the
quickest of a sum, a maximum and a product with a vector, by XLA and by NumPy, in each round anew; `how` says which
had the least median.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks import child
from benchmarks.harness import Options, Row, describe

USERS, GIVEN, TOP, BATCH = 6040, 10, 10, 1000
FLOOR = "floor: "
CELLS = ((3706, 32), (1_000_000, 32), (1_000_000, 16))
SIDES = {
    "floor": ("floor", "one read of the item table"),
    "maml": ("ours", "seed's model by maml"),
    "maml_why": ("ours", "seed's model, 3 reasons an item"),
    "ridge": ("ours", "dot product by ridge"),
    "untold": ("ours", "seed's model, tables not told"),
    "batch": ("ours", f"seed's model, {BATCH:,} users at once"),
}


def run(options: Options) -> list[Row]:
    rows = []
    for items, size in CELLS[:2] if options.quick else CELLS:
        sides = [name for name in SIDES if not options.quick or name not in ("ridge", "untold")]
        cell = {
            "items": items,
            "size": size,
            "sides": sides,
            "rounds": options.rounds,
            "batch_rounds": 1 if options.quick else options.rounds,
            "seconds": options.seconds / 2,
        }
        found = child.ask("benchmarks.s5_new_user", cell, options)
        rows += [_row(items, size, name, found[name], found["peak_mib"]) for name in sides]
        for row in rows[-len(sides) :]:
            print(describe(row), file=sys.stderr, flush=True)
    return rows


def _row(items: int, size: int, name: str, found: dict[str, Any], peak: float) -> Row:
    side, variant = SIDES[name]
    users = BATCH if name == "batch" else 1
    extra = {
        "size": size,
        "ms": round(1e3 * found["median"], 3),
        "ms_range": [round(1e3 * t, 3) for t in found["range"]],
        "cpu_ms": round(1e3 * found["cpu"], 3),
        "calls": found["calls"],
        "ratio_to_floor": found.get("ratio"),
    }
    if name == "floor":
        extra |= {"bytes": 4 * size * (items + 1), "how": found["how"]}
    return Row(
        "s5",
        f"{variant}, size {size}",
        side,  # type: ignore[arg-type]
        tasks=users,
        inner_steps=None if name in ("floor", "ridge") else 1,
        items=items,
        tasks_per_s=round(users / found["median"], 1),
        compile_s=round(found["compile_s"], 2),
        peak_mib=round(peak, 1),
        extra=extra,
    )


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """Medians of every side, in seconds a call."""
    from benchmarks.protocol import peak_mib

    calls = _calls(cell["items"], cell["size"], set(cell["sides"]))
    found: dict[str, dict[str, Any]] = {}
    for name, call in calls.items():
        began = time.perf_counter()
        call()
        found[name] = {"compile_s": time.perf_counter() - began, "blocks": [], "cpu": []}
    for turn in range(cell["rounds"]):
        for name, call in calls.items():
            if name == "batch" and turn >= cell["batch_rounds"]:
                continue
            share = 0.4 if name.startswith(FLOOR) else 1.0
            cpu, times, end = time.process_time(), [], time.perf_counter() + share * cell["seconds"]
            while not times or time.perf_counter() < end:
                began = time.perf_counter()
                call()
                times.append(time.perf_counter() - began)
            found[name]["blocks"].append(times)
            found[name]["cpu"].append((time.process_time() - cpu) / len(times))
    reads = {name: found.pop(name) for name in calls if name.startswith(FLOOR)}
    by_round = [[statistics.median(block) for block in side["blocks"]] for side in reads.values()]
    floors = [min(ways) for ways in zip(*by_round, strict=True)]  # the quickest way of each round
    how = min(reads, key=lambda name: statistics.median(t for block in reads[name]["blocks"] for t in block))
    found["floor"] = reads[how] | {"how": how.removeprefix(FLOOR)}
    for side in found.values():
        blocks = side.pop("blocks")
        medians = [statistics.median(block) for block in blocks]
        times = [t for block in blocks for t in block]
        side |= {"median": statistics.median(times), "range": [min(times), max(times)], "calls": len(times)}
        side["ratio"] = round(statistics.median(m / f for m, f in zip(medians, floors, strict=False)), 3)
        side["cpu"] = statistics.median(side["cpu"])
    return {**found, "peak_mib": peak_mib()}


def _calls(items: int, size: int, sides: set[str]) -> dict[str, Callable[[], Any]]:
    """What is timed, by name. Every call serves a user of its own."""
    import jax
    import numpy as np

    from metarec_jax import learners, models
    from metarec_jax.core import Learner, Method
    from metarec_jax.data.catalogue import catalogue
    from metarec_jax.data.interactions import Interactions, Vocabulary
    from metarec_jax.serving.recommender import Recommender

    rng = np.random.default_rng(0)
    user, item = rng.integers(1, USERS + 1, items), np.arange(1, items + 1)  # every item was seen
    rating = rng.integers(1, 6, items).astype(np.float32)
    ids = Vocabulary(np.arange(USERS)), Vocabulary(np.arange(1, items + 1))
    data = Interactions(user.astype(np.int32), item.astype(np.int32), rating, None, *ids)
    known = catalogue(data)
    histories = [
        {
            int(i) + 1: int(r)
            for i, r in zip(rng.choice(items, GIVEN, replace=False), rng.integers(1, 6, GIVEN), strict=True)
        }
        for _ in range(BATCH)
    ]
    columns = [(u, i, r) for u, history in enumerate(histories) for i, r in history.items()]
    table = tuple(zip(*columns, strict=True))
    turn = 0

    def served(learner: Learner, told: bool = True) -> Recommender:
        params = jax.jit(learner.init)(jax.random.key(0))
        method = Method(params, learner.adapt, learner.predict, learner.tables if told else {})
        return Recommender(method, data, known)

    def one(recommender: Recommender, explain: int = 0) -> Callable[[], Any]:
        def call() -> None:
            nonlocal turn
            turn += 1
            assert len(recommender.recommend(histories[turn % BATCH], TOP, explain=explain)) == TOP

        return call

    def many() -> None:
        assert len(maml.recommend_many(table, TOP)) == BATCH

    learner = learners.maml(models.meta_recommender(USERS + 1, items + 1, size=size), inner_lr=0.1, inner_steps=1)
    maml = served(learner)
    calls: dict[str, Callable[[], Any]] = {
        **_reads(maml.method.params["tables"]["item_id"]),
        "maml": one(maml),
        "maml_why": one(maml, explain=3),
        "batch": many,
    }
    if "ridge" in sides:
        calls["ridge"] = one(served(learners.ridge(models.content_model(data.columns, size=size))))
    if "untold" in sides:
        calls["untold"] = one(served(learner, told=False))
    return {name: call for name, call in calls.items() if name in sides or name.startswith(FLOOR)}


def _reads(table: Any) -> dict[str, Callable[[], Any]]:
    """Ways to read a table once, by name."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    def xla(function: Callable[[Any], Any]) -> Callable[[], Any]:
        compiled = jax.jit(function)
        return lambda: compiled(table).block_until_ready()

    ways = {"xla sum": xla(jnp.sum), "xla max": xla(jnp.max), "xla product": xla(lambda t: t @ jnp.ones(t.shape[1]))}
    if table.devices().pop().platform == "cpu":
        host, ones = np.asarray(table), np.ones(table.shape[1], np.float32)
        ways |= {"numpy sum": host.sum, "numpy product": lambda: host @ ones}
    return {FLOOR + name: way for name, way in ways.items()}


if __name__ == "__main__":
    child.answer(measure)
