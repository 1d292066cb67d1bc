"""P1: ML-1M in four states, on the partition that MeLU published.

    python benchmarks/four_state.py --partition melu_split.parquet --content ml-1m/melu --seeds 5 --json

Methods train on all users of the warm state. A test task is a user with 13 to 100 ratings in the state: after a shuffle with
the seed, the last 10 are the query, the rest the support. Predictions are clipped to [1, 5]; nDCG has gain 2^r - 1, over
the ten query items, with ties broken at random. Hyperparameters were chosen on users and items held out from the warm state
(see docs/decisions.md); the baselines are tuned here, on such a split, before they are fitted on the whole warm state.

Users of the state with new items are known: a second table gives every method up to 200 of their ratings of the warm state,
at random, besides the support. The published rows did not use these ratings.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import optax
from melu_content import with_content

from metarec_jax import learners, losses, models
from metarec_jax.baselines.tuning import fit_baselines, tune
from metarec_jax.core import Learner, MetarecError, Method
from metarec_jax.cpu import tune_cpu
from metarec_jax.data.catalogue import Catalogue, catalogue
from metarec_jax.data.draw import task_source
from metarec_jax.data.interactions import Interactions
from metarec_jax.data.io.published import read_partition
from metarec_jax.data.splits import Split
from metarec_jax.data.tasks import TaskSet, make_tasks
from metarec_jax.evaluation import results
from metarec_jax.evaluation.evaluate import evaluate
from metarec_jax.report.write import terminal_table
from metarec_jax.training.loop import fit
from metarec_jax.training.row_optimizers import lazy_adam

SIZE = 16
HISTORY = 200
"""Ratings of the warm state for a known user; of 50, 200 and 400 chosen on validation items."""
OF_UNKNOWN = {"ridge": 0.45, "in_context": 0.3, "leo": 0.25}
"""Weights of the ensemble for unknown items."""


def tasks(parts: dict[str, Interactions], seed: int) -> dict[str, TaskSet]:
    return {name: make_tasks(part, query=10, ratings=(13, 100), seed=seed) for name, part in parts.items()}


def with_history(chosen: TaskSet, warm: Interactions, seed: int) -> TaskSet:
    """The same queries, the support preceded by ratings of the warm state."""
    order = np.lexsort((np.random.default_rng(seed).random(len(warm)), warm.user))
    begin, end = (np.searchsorted(warm.user[order], chosen.user, side=side) for side in ("left", "right"))
    slot = np.arange(HISTORY)
    real = slot < (end - begin)[:, None]
    rows = order[np.where(real, begin[:, None] + slot, 0)]

    def before(past: np.ndarray, support: np.ndarray) -> np.ndarray:
        return np.concatenate([np.where(real, past, 0).astype(support.dtype), support], axis=1)

    return replace(
        chosen,
        support_item=before(warm.item[rows], chosen.support_item),
        support_target=before(warm.rating[rows], chosen.support_target),
        support_mask=before(real, chosen.support_mask),
    )


def split(partition: Path, content: Path, validation: float) -> Split:
    bare = read_partition(partition, validation=validation)
    add = lambda data: with_content(data, content)  # noqa: E731
    return bare._replace(
        train=add(bare.train),
        validation={k: add(v) for k, v in bare.validation.items()},
        test={k: add(v) for k, v in bare.test.items()},
    )


class Entrant(NamedTuple):
    """A learner, the steps of its training, and the share of tasks of which all items are taken for unknown."""

    learner: Learner
    steps: int = 1000
    cold_tasks: float = 0.3


def train(entrant: Entrant, data: Interactions, seed: int) -> Method:
    """Meta-train from a warm start: rows at rate 5e-4, dense parameters at 0.01, both decayed to a tenth."""
    learner, steps, cold_tasks = entrant
    params = learners.warm_start(learner.init(jax.random.key(seed)), data, seed=seed)
    source = task_source(data, tasks=64, support=(3, 64), query=10, cold_tasks=cold_tasks)
    rows = lazy_adam(optax.cosine_decay_schedule(5e-4, steps, 0.1), weight_decay=0.1)
    dense = optax.adam(optax.cosine_decay_schedule(1e-2, steps, 0.1))
    return fit(learner, source, steps=steps, params=params, optimizer=dense, rows=rows, seed=seed).method


def entrants(columns: dict) -> dict[str, Entrant]:
    model = models.content_model(columns, size=SIZE)
    user = {"only": ("tables/user_id",), "inner_steps": 5, "prior": 30.0, "rule": learners.meta_sgd(0.3)}
    return {
        "ridge": Entrant(learners.ridge(model, loss=losses.mae)),
        "ridge_mse": Entrant(learners.ridge(model)),
        "maml": Entrant(learners.maml(model, **user)),
        "leo": Entrant(learners.leo(model, loss=losses.mae, inner_loss=losses.mse)),
        "in_context": Entrant(learners.in_context(model, loss=losses.mae), steps=2000, cold_tasks=0.6),
    }


def process(data: Interactions, seed: int) -> Method:
    learner = learners.gaussian_process(data.columns, loss=losses.mae)
    params = learners.gaussian_process_start(learner.init(jax.random.key(seed)), data)
    source = task_source(data, tasks=16, support=(3, 90), query=10, user_rows="own", item_drop=0.05, cold_tasks=0.4)
    return fit(learner, source, steps=300, lr=0.07, params=params, seed=seed).method


def joined(methods: dict[str, Method]) -> Method:
    """The mean of four: weights of known and of unknown items as chosen on validation users and items."""
    known = {"gaussian_process": 0.6, "in_context": 0.4, "ridge": 0.0, "leo": 0.0}
    unknown = {"gaussian_process": 0.0, **OF_UNKNOWN}
    return learners.ensemble({name: methods[name] for name in known}, known, unknown=unknown)


def scored(
    methods: dict[str, Method], plain: dict[str, Method], chosen: dict[str, TaskSet], known: Catalogue, seed: int
) -> results.Report:
    return evaluate(
        methods | plain,
        chosen,
        known,
        rating_range=(1.0, 5.0),
        baselines=tuple(plain),
        ranking_only=("popularity", "random"),
        seed=seed,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--partition", type=Path, required=True, help="table of user_id, movie_id, rating, melu_state")
    parser.add_argument(
        "--content",
        type=Path,
        required=True,
        help="folder of movies_extrainfos.dat (with users.dat there or in its parent)",
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--validation", action="store_true", help="measure on validation users, to choose settings")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    given = parser.parse_args()
    tune_cpu()
    cut = split(given.partition, given.content, 0.1)
    whole = cut if given.validation else split(given.partition, given.content, 0.0)
    held_known = catalogue(cut.train)
    settings = tune(cut.train, held_known, tasks(cut.validation, 0), say=print)
    known = catalogue(whole.train)
    plain = fit_baselines(whole.train, known, settings=settings)
    reports, knowing, seconds = [], [], {}
    for seed in range(given.seeds):
        methods = {}
        for name, entrant in entrants(whole.train.columns).items():
            began = time.perf_counter()
            methods[name] = train(entrant, whole.train, seed)
            seconds.setdefault(name, []).append(time.perf_counter() - began)
        began = time.perf_counter()
        methods["gaussian_process"] = process(whole.train, seed)
        seconds.setdefault("gaussian_process", []).append(time.perf_counter() - began)
        methods["ensemble"] = joined(methods)
        print(f"seed {seed}: {', '.join(f'{n} {s[-1]:.1f} s' for n, s in seconds.items())}", file=sys.stderr)
        chosen = tasks(cut.validation if given.validation else whole.test, seed)
        reports.append(scored(methods, plain, chosen, known, seed))
        with_past = {"item_cold": with_history(chosen["item_cold"], whole.train, seed)}
        quick = {name: method for name, method in methods.items() if name not in ("gaussian_process", "ensemble")}
        quick["ensemble"] = learners.ensemble({name: methods[name] for name in OF_UNKNOWN}, OF_UNKNOWN)
        knowing.append(scored(quick, plain, with_past, known, seed))
    report, with_past = results.merge(reports), results.merge(knowing)
    print(terminal_table(report))
    print("\nNew items, with up to 200 earlier ratings of their users\n")
    print(terminal_table(with_past))
    if given.json:
        found = report.to_json() | {"with_history": with_past.to_json()}
        print(json.dumps(found | {"train_seconds": seconds, "device": str(jax.devices()[0])}))


if __name__ == "__main__":
    try:
        main()
    except MetarecError as error:
        sys.exit(f"error: {error}")
