"""Costs: what else does a user wait for - import, --help, the first compilation and the second start, evaluation, memory?

Starts are whole processes, begun in turns; the floor of the import is importing jax alone. Compilation is of one outer step
of the seed's model (32 tasks x 1 inner step), first with an empty compile cache, then in a new process with what the first
one kept. Evaluation is `metarec_jax.evaluate` on 1,000 users of 10 + 10 ratings, compiled before. Memory is what the
compiler says that an outer step works in as inner steps grow, for a tower of dense layers that all adapt.

What is unfair: files come from the disk cache of a machine that has read them before.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks import child
from benchmarks.harness import ROOT, Options, Row, Unavailable, describe

STARTS = {
    "python alone": ("floor", ["-c", "pass"]),
    "import jax": ("floor", ["-c", "import jax"]),
    "import metarec_jax": ("ours", ["-c", "import metarec_jax"]),
    "import metarec_jax, all names": ("ours", ["-c", "import metarec_jax as m; [getattr(m, n) for n in m.__all__]"]),
    "metarec --help": ("ours", ["-m", "metarec_jax.cli", "--help"]),
}
INNER_STEPS = (1, 5, 20, 50)
USERS, EXAMPLES = 1000, 10


def run(options: Options) -> list[Row]:
    rows = [*_starts(options), *_compilation(options)]
    seconds = child.ask(__name__, {"ask": "evaluate", "rounds": options.rounds}, options)
    rows.append(
        Row(
            "costs",
            "evaluate, seed's model by maml",
            "ours",
            tasks=USERS,
            inner_steps=1,
            tasks_per_s=round(USERS / seconds["median"], 1),
            compile_s=round(seconds["first"], 2),
            extra={"s": round(seconds["median"], 3), "s_range": seconds["range"]},
        )
    )
    for steps in (5,) if options.quick else INNER_STEPS:
        for remat in (False,) if options.quick else (False, True):
            try:
                found = child.ask(__name__, {"ask": "memory", "inner_steps": steps, "remat": remat}, options)
            except Unavailable as reason:
                options.note(f"costs: {reason}")
                continue
            if not found:
                continue
            name = "an outer step's memory" + ", remat" * remat
            extra = {"working_mib": found["working_mib"], "parameters_and_moments_mib": found["held_mib"]}
            rows.append(
                Row(
                    "costs",
                    name,
                    "ours",
                    tasks=32,
                    inner_steps=steps,
                    compile_s=round(found["compile_s"], 2),
                    extra=extra,
                )
            )
    for row in rows:
        print(describe(row), file=sys.stderr, flush=True)
    return rows


def _starts(options: Options) -> list[Row]:
    """Wall seconds of whole processes, in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in STARTS}
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}

    def pin() -> None:
        if options.core is not None and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, [options.core])

    if options.quick:
        seconds.pop("import metarec_jax, all names")
    for turn in range(options.rounds + 1):
        for name in seconds:
            arguments = STARTS[name][1]
            began = time.perf_counter()
            command = [sys.executable, *arguments]
            subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, preexec_fn=pin)
            if turn:  # the first reads the files into the disk cache
                seconds[name].append(time.perf_counter() - began)
    rows = []
    for name, taken in seconds.items():
        side, median, ends = STARTS[name][0], statistics.median(taken), (min(taken), max(taken))
        extra = {"s": round(median, 3), "s_range": [round(end, 3) for end in ends]}
        rows.append(Row("costs", name, side, extra=extra))  # type: ignore[arg-type]
    return rows


def _compilation(options: Options) -> list[Row]:
    """A first start with an empty cache, and a second with what that one kept."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("first start, empty cache", "second start, cache kept"):
            found = child.ask(__name__, {"ask": "step"}, options, env={"METAREC_COMPILE_CACHE_DIR": folder})
            extra = {"s_to_first_step": round(found["to_first_step"], 2), "programs_kept": len(os.listdir(folder))}
            rows.append(
                Row(
                    "costs",
                    f"one outer step, {name}",
                    "ours",
                    tasks=32,
                    inner_steps=1,
                    compile_s=round(found["compile_s"], 3),
                    peak_mib=round(found["peak_mib"], 1),
                    extra=extra,
                )
            )
    return rows


def measure(cell: dict[str, Any]) -> dict[str, Any]:
    """One of `_step`, `_evaluate`, `_memory`."""
    return {"step": _step, "evaluate": _evaluate, "memory": _memory}[cell.pop("ask")](**cell)


def _step() -> dict[str, Any]:
    """Seconds to compile an outer step, or to find it in the cache; and from the start of the import to its end."""
    began = time.perf_counter()
    from benchmarks.protocol import peak_mib
    from metarec_jax import learners
    from metarec_jax.data.synthetic import synthetic
    from metarec_jax.experiment.compiled import compile_cache
    from metarec_jax.models.content import meta_recommender
    from metarec_jax.training.loop import fit

    compile_cache()
    data = synthetic(1000, 3706, seed=0).data
    learner = learners.maml(meta_recommender(data.users.num_rows, data.items.num_rows), inner_steps=1)
    found = fit(learner, data, steps=1)
    return {
        "compile_s": found.compile_seconds,
        "to_first_step": time.perf_counter() - began,
        "peak_mib": peak_mib(),
    }


def _evaluate(rounds: int) -> dict[str, Any]:
    """Seconds of `evaluate` over all users, the first time and then."""
    import jax

    from metarec_jax import learners
    from metarec_jax.core import Method
    from metarec_jax.data.catalogue import catalogue
    from metarec_jax.data.synthetic import synthetic
    from metarec_jax.data.tasks import make_tasks
    from metarec_jax.evaluation.evaluate import evaluate
    from metarec_jax.models.content import meta_recommender

    data = synthetic(USERS, 3706, ratings_per_user=(2 * EXAMPLES, 2 * EXAMPLES), seed=0).data
    learner = learners.maml(meta_recommender(data.users.num_rows, data.items.num_rows), inner_steps=1)
    method = Method(jax.jit(learner.init)(jax.random.key(0)), learner.adapt, learner.predict)
    known, tasks = catalogue(data), {"users": make_tasks(data, query=EXAMPLES)}
    span = float(data.rating.min()), float(data.rating.max())
    seconds = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        evaluate({"maml": method}, tasks, known, rating_range=span)
        seconds.append(time.perf_counter() - began)
    first, *rest = seconds
    ends = [round(min(rest), 3), round(max(rest), 3)]
    return {"first": first, "median": statistics.median(rest), "range": ends}


def _memory(inner_steps: int, remat: bool) -> dict[str, Any]:
    """MiB that a compiled outer step works in, beside its state; empty where `maml` has no such option."""
    import inspect

    import jax
    import optax

    from metarec_jax import learners, models
    from metarec_jax.data.draw import task_source
    from metarec_jax.data.synthetic import synthetic
    from metarec_jax.training.devices.budget import estimate
    from metarec_jax.training.row_optimizers import lazy_adam
    from metarec_jax.training.step import Optimizers, init_state, make_step

    if remat and "remat" not in inspect.signature(learners.maml).parameters:
        return {}
    data = synthetic(200, 1000, ratings_per_user=(64, 100), seed=0).data
    model = models.content_model(data.columns, head="mlp", hidden=(64, 64), size=32)
    options: dict[str, Any] = {"remat": True} if remat else {}
    learner = learners.maml(model, inner_lr=0.01, inner_steps=inner_steps, only=("net",), **options)
    optimizers = Optimizers(optax.adam(1e-3), lazy_adam(1e-3))
    source = task_source(data, tasks=32, support=(32, 32), query=10)
    state = jax.eval_shape(lambda key: init_state(learner, optimizers, learner.init(key), key), jax.random.key(0))
    began = time.perf_counter()
    step = make_step(learner, source, optimizers)
    found = estimate(jax.jit(step, donate_argnums=0).lower(state, source.data).compile())
    seconds = time.perf_counter() - began
    if found is None:
        return {}
    return {
        "working_mib": round(found.working / 2**20, 3),
        "held_mib": round(found.arguments / 2**20, 2),
        "compile_s": seconds,
    }


if __name__ == "__main__":
    child.answer(measure)
