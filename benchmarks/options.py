"""Cost and benefit of the options for memory and precision: ``python -m benchmarks.options``.

One outer step of a MeLU-like learner (dense layers adapt) and of the seed's model: time, working memory, and the loss after
some steps. The options alternate within one run; figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import optax

import metarec_jax as mr
from metarec_jax import learners, models
from metarec_jax.core import Learner
from metarec_jax.data.draw import task_source
from metarec_jax.data.synthetic import synthetic
from metarec_jax.training.devices import budget as memory
from metarec_jax.training.row_optimizers import lazy_adam
from metarec_jax.training.step import Optimizers, init_state, make_step

OPTIONS = {
    "as it is": {},
    "one batch": {"groups": 1},
    "8 micro-batches": {"groups": 8},
    "bfloat16": {"dtype": jnp.bfloat16},
    "remat": {"remat": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", type=int, default=128)
    parser.add_argument("--inner-steps", type=int, default=10)
    parser.add_argument("--steps", type=int, default=60, help="outer steps per round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    mr.tune_cpu()
    data = synthetic(2000, 3000, ratings_per_user=(30, 60), seed=0).data
    source = task_source(data, tasks=given.tasks, support=(10, 10), query=10, user_rows="own")

    def learner(remat: bool) -> Learner:
        model = models.content_model(data.columns, size=32, head="mlp", hidden=(64, 64))
        return learners.maml(model, inner_lr=0.02, inner_steps=given.inner_steps, only=("net",), remat=remat)

    runs = {}
    for name, options in OPTIONS.items():
        options = dict(options)
        own, optimizers = learner(options.pop("remat", False)), Optimizers(optax.adam(1e-3), lazy_adam(1e-3))
        step = make_step(own, source, optimizers, **options)
        state = init_state(own, optimizers, own.init(jax.random.key(0)), jax.random.key(1))
        run = jax.jit(step, donate_argnums=0).lower(state, source.data).compile()
        found = memory.estimate(run)
        runs[name] = {"run": run, "state": state, "working": found.working if found else None, "ms": [], "loss": []}
        print(f"compiled: {name}", file=sys.stderr)
    for _ in range(given.rounds):
        for entry in runs.values():
            began = time.perf_counter()
            for _ in range(given.steps):
                entry["state"], metrics = entry["run"](entry["state"], source.data)
            entry["loss"].append(float(metrics["loss"]))
            entry["ms"].append((time.perf_counter() - began) / given.steps * 1e3)
    rows = [
        {
            "option": name,
            "ms": round(statistics.median(e["ms"]), 2),
            "working_mib": round(e["working"] / 2**20, 1),
            "loss": round(e["loss"][-1], 4),
        }
        for name, e in runs.items()
    ]
    if given.json:
        print(json.dumps(rows))
        return
    print(
        f"MeLU-like, {given.tasks} tasks x {given.inner_steps} inner steps, {given.rounds * given.steps} outer steps, {jax.devices()[0].device_kind}\n"
    )
    print("| option | ms a step | works in MiB | loss at the end |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['option']} | {row['ms']} | {row['working_mib']} | {row['loss']} |")


if __name__ == "__main__":
    main()
