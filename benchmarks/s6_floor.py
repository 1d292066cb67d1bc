"""S6: what does the hardware allow: bytes and operations of an outer step, and how far are we from them?

For each cell of S1 to S3: the bytes that a step must move (each distinct row that the batch touches, its two moments and its
count, read and written once; the batch itself and the dense parameters) over the measured bandwidth of a large copy, and the
operations of the step (XLA's count) over the measured rate of a matrix product, both through JAX on the core of the timings. The
floor is the larger of the two times. Tables that fit a cache can be moved faster than memory, so that the floor of a small
catalogue is not strict; rows apart in memory are moved slower than a copy, so that no program reaches that of a large one.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks import rivals
from benchmarks.cells import HIDDEN, ITEMS, SIZE, VOCAB, batches, melu_cell, seed_cell
from benchmarks.harness import ROOT, Options, Row, Unavailable, compare, name_of


def run(options: Options) -> list[Row]:
    cells = _cells(options)
    told = {"cores": rivals.pinned(options), "cells": [cell for _, cell, _ in cells]}
    command = [sys.executable, "-m", "benchmarks.s6_floor", json.dumps(told)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"the measuring process failed: {done.stderr[-300:]}")
    measured = json.loads(done.stdout.splitlines()[-1])
    rows = []
    for (question, cell, ours), flops in zip(cells, measured["flops"], strict=True):
        moved = bytes_per_step(cell)
        memory, arithmetic = moved / measured["copy_bytes_per_s"], flops / measured["flops_per_s"]
        floor = max(memory, arithmetic)
        extra = {
            "of": question,
            "bytes_per_step": moved,
            "flops_per_step": flops,
            "copy_gb_per_s": round(measured["copy_bytes_per_s"] / 1e9, 2),
            "gflop_per_s": round(measured["flops_per_s"] / 1e9, 2),
            "memory_us": round(1e6 * memory, 2),
            "arithmetic_us": round(1e6 * arithmetic, 2),
            "ours_us": ours.extra["us_per_step"],
            "ours_over_floor": round(ours.extra["us_per_step"] / (1e6 * floor), 2),
        }
        bound = "memory" if memory >= arithmetic else "arithmetic"
        sizes = (cell["tasks"], cell["inner_steps"], cell["items"])
        rows.append(Row("s6", f"{bound} floor of {question}", "floor", *sizes, cell["tasks"] / floor, extra=extra))
        print(f"s6 {name_of(cell)}: {extra['ours_over_floor']} x the {bound} floor", file=sys.stderr, flush=True)
    return rows


def _cells(options: Options) -> list[tuple[str, dict[str, Any], Row]]:
    """Cells with our row: those of this run's S1 to S3, or measured now."""
    ours = [r for r in options.done if r.side == "ours" and r.variant == "prepared tasks, lazy rows"]
    if ours:
        return [(r.question, _cell(r), r) for r in ours]
    cells = [("s1", seed_cell(32, 1)), ("s3", melu_cell(32, 1))]
    if not options.quick:
        cells += [("s1", seed_cell(128, 5)), ("s2", seed_cell(32, 1, 1_000_000, 256)), ("s3", melu_cell(128, 5))]
    return [(q, cell, row) for q, cell in cells for row in compare(options, q, rivals.ours(options, cell))]


def _cell(row: Row) -> dict[str, Any]:
    assert row.tasks is not None
    assert row.inner_steps is not None
    if row.question == "s3":
        return melu_cell(row.tasks, row.inner_steps)
    return seed_cell(row.tasks, row.inner_steps, row.items or ITEMS, 256 if row.question == "s2" else 8)


def bytes_per_step(cell: Mapping[str, Any]) -> int:
    """Bytes that one outer step must read and write, mean over the cell's batches.

    A row of 32 float32 with its two moments and its int32 count is 388 bytes, read and written: 776. One task of a
    seed cell with one user, 20 items and the unknown row of both tables: 23 rows, the batch's 42 numbers (a user, 20
    items, 20 ratings, ids and ratings of 4 bytes: 164 bytes), and 65 dense parameters with moments: 1,560.

    >>> bytes_per_step({**seed_cell(1, 1, 50), "batches": 1}) == 23 * 776 + 164 + 1560
    True
    """
    made = batches({**cell, "batches": min(cell["batches"], 8)})
    columns = range(made.ids.shape[-1])
    rows = np.mean([sum(1 + len(np.unique(batch[..., c])) for c in columns) for batch in made.ids])
    user_columns = len(VOCAB) // 2 if cell["model"] == "melu" else 1
    tasks, examples = made.rating.shape[1:]
    batch = 4 * tasks * (user_columns + examples * (len(columns) - user_columns) + examples)
    widths = (len(columns) * SIZE, *(HIDDEN if cell["model"] == "melu" else ()), 1)
    dense = sum(a * b + b for a, b in itertools.pairwise(widths))
    return int(rows * 2 * (4 * 3 * SIZE + 4) + batch + 2 * 3 * 4 * dense)


def _best_of(f: Callable[[Any], Any], value: Any, calls: int = 20) -> float:
    """Least wall seconds of a call that is given what the last one gave, the first not counted."""
    import jax

    value, times = jax.block_until_ready(f(value)), []
    for _ in range(calls):
        begin = time.perf_counter()
        value = jax.block_until_ready(f(value))
        times.append(time.perf_counter() - begin)
    return min(times)


def _measure(cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Bandwidth of a copy far larger than the caches, rate of a matrix product, operations of each cell's step."""
    import jax
    import jax.numpy as jnp

    from benchmarks import ours
    from metarec_jax.training.step import make_step

    on_cpu = jax.default_backend() == "cpu"
    large = jnp.ones((2**24 if on_cpu else 2**28,), jnp.float32)
    size = large.nbytes
    bandwidth = 2 * size / _best_of(jax.jit(lambda a: a + 1.0, donate_argnums=0), large)  # in place: no fresh pages
    n = 512 if on_cpu else 8192
    rate = 2 * n**3 / _best_of(jax.jit(lambda a: a @ a), jnp.eye(n))
    flops = []
    for cell in cells:
        learner, source = ours.make_learner({**cell, "items": 1000}), ours.prepared({**cell, "batches": 1})
        optimizers = ours.make_optimizers(cell)
        state = ours.make_state(cell, learner, optimizers)
        # XLA's count of the program before it is compiled: 2% below that of the compiled one, without the wait.
        # It counts a loop once, so the tasks go in one group.
        counted = jax.jit(make_step(learner, source, optimizers, groups=1)).lower(state, source.data).cost_analysis()
        flops.append(float((counted or {})["flops"]))
    return {"copy_bytes_per_s": bandwidth, "flops_per_s": rate, "flops": flops}


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    if given["cores"] and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, given["cores"])
    print(json.dumps(_measure(given["cells"])))
