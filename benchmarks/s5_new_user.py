"""S5: how long does one new user wait for ten recommendations, and how far is that from reading the item table once?

Adapt on 10 ratings, score every item, return the best 10, names and all: one call of `Recommender.recommend`, a different
user each time. The floor is one read of the item table in the same process. Rows take turns within each round;
times are medians over all calls, `ratio_to_floor` is the median over rounds of the ratio of medians. Then 1,000 users at
once by `recommend_many`. "not told" is the same method without its tables: what a method of one's own gets.

What is unfair: the floor reads from memory only where the table does not fit into the cache (3,706 rows do). It is the
quickest of a sum, a maximum and a product with a vector, by XLA and by NumPy; `how` says which.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from benchmarks import child
from benchmarks.harness import Options, Row, describe

USERS, GIVEN, TOP, BATCH = 6040, 10, 10, 1000
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

    calls, how = _calls(cell["items"], cell["size"], set(cell["sides"]))
    found: dict[str, dict[str, Any]] = {}
    for name, call in calls.items():
        began = time.perf_counter()
        call()
        found[name] = {"compile_s": time.perf_counter() - began, "blocks": [], "cpu": []}
    for turn in range(cell["rounds"]):
        for name, call in calls.items():
            if name == "batch" and turn >= cell["batch_rounds"]:
                continue
            cpu, times, end = time.process_time(), [], time.perf_counter() + cell["seconds"]
            while not times or time.perf_counter() < end:
                began = time.perf_counter()
                call()
                times.append(time.perf_counter() - began)
            found[name]["blocks"].append(times)
            found[name]["cpu"].append((time.process_time() - cpu) / len(times))
    floors = [statistics.median(block) for block in found["floor"]["blocks"]]
    for side in found.values():
        blocks = side.pop("blocks")
        medians = [statistics.median(block) for block in blocks]
        times = [t for block in blocks for t in block]
        side |= {"median": statistics.median(times), "range": [min(times), max(times)], "calls": len(times)}
        side["ratio"] = round(statistics.median(m / f for m, f in zip(medians, floors, strict=False)), 3)
        side["cpu"] = statistics.median(side["cpu"])
    found["floor"]["how"] = how
    return {**found, "peak_mib": peak_mib()}


def _calls(items: int, size: int, sides: set[str]) -> tuple[dict[str, Callable[[], Any]], str]:
    """What is timed, by name, and how the floor reads. Every call serves a user of its own."""
    import jax
    import numpy as np

    from metarec_jax import learners, models
    from metarec_jax.core import Learner, Method
    from metarec_jax.data.interactions import Interactions, Vocabulary
    from metarec_jax.data.tasks import catalogue
    from metarec_jax.online.recommend import Recommender

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
        parts = {"params": params, "adapt": learner.adapt, "predict": learner.predict}
        method: Any = SimpleNamespace(**parts, tables=learner.tables) if told else Method(**parts)
        return Recommender(method, data, known)

    def one(recommender: Recommender, explain: int = 0) -> Callable[[], Any]:
        def call() -> None:
            nonlocal turn
            turn += 1
            assert len(recommender.recommend(histories[turn % BATCH], TOP, explain=explain)) == TOP

        return call

    def many() -> None:
        assert len(maml.recommend_many(table, TOP)) == BATCH

    learner = learners.maml(models.meta_recommender(USERS + 1, items + 1, size=size), inner_lr=0.1)
    maml = served(learner)
    how, read = _quickest_read(maml.method.params["tables"]["item_id"])
    calls: dict[str, Callable[[], Any]] = {
        "floor": read,
        "maml": one(maml),
        "maml_why": one(maml, explain=3),
        "batch": many,
    }
    if "ridge" in sides:
        calls["ridge"] = one(served(learners.ridge(models.content_model(data.columns, size=size))))
    if "untold" in sides:
        calls["untold"] = one(served(learner, told=False))
    return {name: calls[name] for name in SIDES if name in sides}, how


def _quickest_read(table: Any) -> tuple[str, Callable[[], Any]]:
    """The quickest way found to read a table once, and its name."""
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
    best: dict[str, float] = {}
    for name, way in ways.items():
        way()
        for _ in range(7):
            began = time.perf_counter()
            way()
            best[name] = min(best.get(name, math.inf), time.perf_counter() - began)
    how = min(best, key=lambda name: best[name])
    return how, ways[how]


if __name__ == "__main__":
    child.answer(measure)
