"""P2: ML-100K, the tasks of RecBole-MetaRec, over several splits of its users.

    python benchmarks/ml_100k_tasks.py --splits 10 --json

Users with 13 to 100 ratings are split 8 : 1 : 1 into training, validation and test users; the others are not used (583
users here, 582 there: films with two ids are one item). In a test task ten random ratings are the query, the rest the
support. Rating mode: the five highest of the ten are relevant, with ties at random. Click mode: a rating of 4 or 5 is 1, any
other 0, in support and query, and 1 is relevant; metrics of a task without a relevant item are undefined. P@5, nDCG@5
(binary) and MRR@5. Baselines are tuned on the validation users of each split, and so are the weights of the
ensemble; everything else is fixed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metarec_jax import learners, losses, models
from metarec_jax.baselines.tuning import fit_baselines
from metarec_jax.core import Array, MetarecError, Method, Params, Task
from metarec_jax.cpu import tune_cpu
from metarec_jax.data.catalogue import Catalogue, catalogue
from metarec_jax.data.draw import task_source
from metarec_jax.data.interactions import Interactions
from metarec_jax.data.io import datasets
from metarec_jax.data.tasks import TaskSet, batches, make_tasks
from metarec_jax.evaluation import metrics, results
from metarec_jax.evaluation.evaluate import evaluate
from metarec_jax.evaluation.results import Report
from metarec_jax.report.write import terminal_table
from metarec_jax.training.loop import fit
from metarec_jax.training.row_optimizers import lazy_adam

RATINGS, SHARES = (13, 100), (0.8, 0.9)
TRAINED, WEIGHTS = ("gaussian_process", "gaussian_process_bpr", "ridge"), (0.0, 0.25, 0.5, 0.75, 1.0)
METRICS = ("precision@5", "ndcg@5", "mrr@5")


def cut(data: Interactions, seed: int, mode: str) -> list[Interactions]:
    """The ratings of training, validation and test users."""
    count = np.bincount(data.user, minlength=data.users.num_rows)
    users = np.flatnonzero((count >= RATINGS[0]) & (count <= RATINGS[1]))
    users = np.random.default_rng(seed).permutation(users)
    ends = [round(share * len(users)) for share in SHARES]
    parts = [data.take(np.isin(data.user, chosen)) for chosen in np.split(users, ends)]
    if mode == "click":
        parts = [replace(part, rating=(part.rating >= 4).astype(np.float32)) for part in parts]
    return parts


def tasks(part: Interactions, seed: int) -> dict[str, TaskSet]:
    return {"user_cold": make_tasks(part, query=10, ratings=RATINGS, seed=seed)}


def ridge(train: Interactions, seed: int, steps: int = 200) -> Method:
    learner = learners.ridge(models.content_model(train.columns, size=8))
    params = learners.warm_start(learner.init(jax.random.key(seed)), train, seed=seed)
    dense, rows = (optax.cosine_decay_schedule(lr, steps, 0.1) for lr in (1e-2, 5e-4))
    found = fit(
        learner,
        task_source(train, tasks=64, support=(3, 64), query=10),
        steps=steps,
        params=params,
        optimizer=optax.adam(dense),
        rows=lazy_adam(rows, weight_decay=0.1),
        seed=seed,
    )
    return found.method


def process(train: Interactions, seed: int, loss: Callable[..., Array], steps: int = 200) -> Method:
    learner = learners.gaussian_process(train.columns, loss=loss)
    params = learners.gaussian_process_start(learner.init(jax.random.key(seed)), train)
    source = task_source(train, tasks=32, support=(1, 64), query=10, user_rows="own", item_drop=0.05, cold_tasks=0.0)
    return fit(learner, source, steps=steps, lr=0.05, params=params, seed=seed).method


def trained(train: Interactions, seed: int) -> dict[str, Method]:
    return {
        "gaussian_process": process(train, seed, losses.mse),
        "gaussian_process_bpr": process(train, seed, losses.bpr),
        "ridge": ridge(train, seed),
    }


def measured(methods: dict[str, Method], chosen: dict[str, TaskSet], known: Catalogue, mode: str, seed: int) -> Report:
    ours = (*TRAINED, "ensemble")
    return evaluate(
        methods,
        chosen,
        known,
        gain="binary",
        topn=(5,),
        relevant=metrics.top_rated(5) if mode == "rating" else 1.0,
        rating_range=(1.0, 5.0) if mode == "rating" else (0.0, 1.0),
        ranking_only=("popularity", "random", "gaussian_process_bpr"),
        baselines=tuple(name for name in methods if name not in ours),
        seed=seed,
    )


def mixed(methods: dict[str, Method], held: TaskSet, known: Catalogue, mode: str) -> Method:
    """The weights of the processes and of kNN that are best for nDCG@5 on validation users."""
    names = ("gaussian_process", "gaussian_process_bpr", "item_knn")
    scores = [_scores(methods[name], held, known) for name in names]
    relevant = metrics.top_rated(5) if mode == "rating" else metrics.at_least(1.0)
    target, mask = jnp.asarray(held.query_target), jnp.asarray(held.query_mask) > 0
    labels = relevant.labels(target, mask, jax.random.key(0))

    def quality(weights: tuple[float, ...]) -> float:
        total = sum(w * s for w, s in zip(weights, scores, strict=True))
        return float(jnp.nanmean(metrics.ndcg(total, labels, where=mask, topn=5, gain="binary")))

    best = max(((a, b, c) for a in WEIGHTS for b in WEIGHTS for c in WEIGHTS if a + b > 0), key=quality)
    weights = dict(zip(names, best, strict=True))
    print(f"{mode}: weights {weights}", file=sys.stderr)
    return learners.ensemble({name: methods[name] for name in names}, weights)


def _scores(method: Method, held: TaskSet, known: Catalogue) -> Array:
    @jax.jit
    def of_batch(params: Params, batch: Task) -> Array:
        def one(task: Task) -> Array:
            return method.predict(params, method.adapt(params, task.support, jax.random.key(0)), task.query.inputs)

        return jax.vmap(one)(batch)

    found = np.zeros(held.query_item.shape, np.float32)
    for index, batch in batches(held, known, 64):
        found[index] = np.asarray(of_batch(method.params, batch))[: len(index)]
    return jnp.asarray(found)


def one_split(data: Interactions, seed: int, mode: Literal["rating", "click"]) -> Report:
    train, validation, test = cut(data, seed, mode)
    known, held = catalogue(train), tasks(validation, seed)
    methods = trained(train, seed) | fit_baselines(train, known, held)
    methods["ensemble"] = mixed(methods, held["user_cold"], known, mode)
    report = measured(methods, tasks(test, seed), known, mode, seed)
    return replace(report, settings={k: v for k, v in report.settings.items() if k != "new_items"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--splits", type=int, default=10, help="splits of the users")
    parser.add_argument("--modes", default="rating,click")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    given = parser.parse_args()
    tune_cpu()
    data, found = datasets.load("ml-100k"), {}
    for mode in given.modes.split(","):
        reports = []
        for seed in range(given.splits):
            began = time.perf_counter()
            reports.append(one_split(data, seed, mode))
            print(f"{mode}: split {seed} took {time.perf_counter() - began:.0f} s", file=sys.stderr)
        report = results.merge(reports) if len(reports) > 1 else reports[0]
        print(f"{mode} mode, {given.splits} splits")
        print(terminal_table(report))
        for d in report.compare(METRICS):
            print(f"{d.method} - {d.baseline}, {d.metric}: {d.mean:+.4f} (95% {d.low:+.4f} to {d.high:+.4f})")
        found[mode] = report.to_json()
    if given.json:
        print(json.dumps(found | {"device": str(jax.devices()[0])}))


if __name__ == "__main__":
    try:
        main()
    except MetarecError as error:
        sys.exit(f"error: {error}")
