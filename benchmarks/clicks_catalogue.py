"""Clicks: ranking the whole catalogue for a new user with 5, 10 or 20 known liked items.

    python benchmarks/clicks_catalogue.py [--data ml-1m] [--splits 1] [--draws 3] [--fast] [--out benchmarks/results/clicks_catalogue]

A rating of 4 or more is a click; lower ratings are dropped. A tenth of the users are test users and a tenth validation
users, drawn with the seed. A task is a user and a draw: 5, 10 or 20 of the user's clicks are the support, and all others are
the targets in the whole catalogue except the support. nDCG@10 (gain 1) and recall@20 (fraction of all targets), as means
over tasks.

Everything is chosen on validation users by nDCG@10, separately for each support size: a baseline's arguments (each point of
its grid), a meta-learner's step of training; two_tower on the mean of the sizes. All methods use only ids.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metarec_jax import baselines, learners, losses, models
from metarec_jax.baselines.trained import fit_plain
from metarec_jax.core import Examples, Learner, MetarecError, Method, Params
from metarec_jax.cpu import tune_cpu
from metarec_jax.data.catalogue import Catalogue, catalogue, inputs
from metarec_jax.data.draw import TaskSource, task_source
from metarec_jax.data.interactions import Interactions
from metarec_jax.data.io.datasets import load
from metarec_jax.data.splits import split
from metarec_jax.data.tasks import TaskSet, make_tasks
from metarec_jax.evaluation.intervals import estimate
from metarec_jax.evaluation.scoring import catalogue_scores
from metarec_jax.factorization import Factors, implicit_als_factors
from metarec_jax.training.loop import fit
from metarec_jax.training.row_optimizers import lazy_adam

SUPPORTS = (5, 10, 20)
METRICS = ("ndcg@10", "recall@20")
GRIDS: Mapping[str, Mapping[str, Sequence[float]]] = {
    "ease": {"reg": (1000.0, 3000.0, 10_000.0, 30_000.0)},
    "item_knn": {"shrinkage": (1.0, 20.0, 100.0, 300.0)},
    "als": {"size": (16, 32, 64, 128), "alpha": (2.0, 10.0), "reg": (50.0, 200.0, 800.0)},
}
MAP_GRID = {"size": (32, 64, 128), "support": (3, 5, 10), "reg": (1.0, 3.0)}
SLOW = ("two_tower", "maml", "hypernetwork", "in_context")
PLAIN = ("random", "popularity", "item_knn", "ease", "als", "two_tower")


def clicks_of(data: Interactions) -> Interactions:
    """Ratings of 4 and more, as clicks; nothing but ids."""
    liked = data.take(data.rating >= 4)
    return replace(liked, rating=None, user_features={}, item_features={})


def tasks_of(part: Interactions, seed: int) -> dict[str, TaskSet]:
    return {f"{n} clicks": make_tasks(part, query=100_000, support=(n, n), negatives=0, seed=seed) for n in SUPPORTS}


def grid(values: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]


class World:
    """The data of one seed, and how good a method is on its validation users."""

    def __init__(self, data: Interactions, seed: int, draws: int) -> None:
        parts = split(data, ["user_cold"], seed=seed)
        self.train, self.known, self.seed = parts.train, catalogue(data, parts.train), seed
        self.test = [tasks_of(parts.test["user_cold"], draw) for draw in range(draws)]
        self.held = parts.validation["user_cold"]
        self.validation = tasks_of(self.held, seed)

    def scores(self, method: Method) -> dict[str, float]:
        """nDCG@10 on validation users, by support size."""
        return {n: float(measured(method, t, self.known)[:, 0].mean()) for n, t in self.validation.items()}

    def best(
        self, made: Callable[..., Method], points: Sequence[dict[str, Any]]
    ) -> dict[str, tuple[Method, Any, float]]:
        """For each support size the method, its point of the grid, and its score."""
        found: dict[str, tuple[Method, Any, float]] = {}
        for point in points:
            method = made(**point)
            for n, score in self.scores(method).items():
                if n not in found or score > found[n][2]:
                    found[n] = (method, point, score)
        return found


def with_query_negatives(source: TaskSource, most: int) -> TaskSource:
    """The same tasks with negatives in the query alone: a support is clicks, as it is when a user is served.

    Positives come first among the support's slots.
    """

    def draw(data: Any, key: Any) -> Any:
        task = source.draw(data, key)
        cut = lambda a: a[:, :most] if a.shape[1] > 1 else a  # noqa: E731
        return task._replace(support=jax.tree.map(cut, task.support))

    return TaskSource(source.data, draw, source.tasks)


def from_factors(params: Params, train: Interactions, factors: Factors, scale: float, logits: bool) -> Params:
    """Parameters of a dot product, started from a factorisation: popularity as the bias, factors as item vectors."""
    table = params["tables"]["item_id"]
    share = np.bincount(train.item, minlength=train.items.num_rows) / len(np.unique(train.user))
    bias = np.log(share + 1e-4) if logits else share
    rows = np.column_stack([bias, scale * factors.item_factors]).astype(np.float32)
    rows[0] = 0.0
    tables = {name: jnp.zeros_like(t) for name, t in params["tables"].items()}
    tables["item_id"] = jnp.asarray(np.pad(rows, ((0, len(table) - len(rows)), (0, 0))))
    return {**params, "tables": tables}


def entrants(columns: dict, num_items: int, size: int) -> dict[str, tuple[Learner, bool]]:
    """Meta-learners, and whether their scores are logits."""
    model = models.content_model(columns, size=size)
    sampled = {"loss": losses.sampled_softmax, "expected": jax.nn.sigmoid}
    row = {"only": ("tables/user_id",), "inner_steps": 5, "prior": 0.0, "rule": learners.meta_sgd(0.3)}
    return {
        "ridge": (learners.ridge(model, precision=1.0), False),
        "logistic": (learners.logistic(model, loss=losses.sampled_softmax), True),
        "maml": (learners.maml(model, loss=losses.bce, **row), True),
        "hypernetwork": (learners.hypernetwork(model, **sampled), True),
        "in_context": (learners.in_context(model, **sampled), True),
        "item_map": (learners.item_map(num_items, size=128), True),
    }


def meta_train(world: World, learner: Learner, params: Params, steps: int, lr: float) -> dict[str, Method]:
    """Meta-train on supports of 3 to 30 clicks; for each support size the best step by validation."""
    source = task_source(world.train, tasks=64, support=(3, 30), query=10, item_drop=0.0, cold_tasks=0.0, negatives=20)
    kept: dict[str, tuple[float, Params]] = {}

    def validate(params: Params) -> dict[str, float]:
        found = world.scores(Method(params, learner.adapt, learner.predict))
        for n, score in found.items():
            if n not in kept or score > kept[n][0]:
                kept[n] = (score, jax.tree.map(jnp.copy, params))
        return {"error": -float(np.mean(list(found.values())))}

    validate(params)
    schedule = optax.cosine_decay_schedule(lr, steps, 0.1)
    fit(
        learner,
        with_query_negatives(source, 30),
        steps=steps,
        params=params,
        optimizer=optax.adam(optax.cosine_decay_schedule(3e-3, steps, 0.1)),
        rows=lazy_adam(schedule, weight_decay=0.1),
        seed=world.seed,
        validate=validate,
        validate_every=max(1, steps // 5),
        monitor="error",
        patience=3,
    )
    return {n: Method(p, learner.adapt, learner.predict, learner.tables) for n, (_, p) in kept.items()}


def fitted(
    world: World, steps: int, without: Sequence[str], say: Callable[[str], None]
) -> tuple[dict[str, dict[str, Method]], dict[str, Any]]:
    """Every method by name, for each support size; and what was chosen for the closed forms."""
    train, known, seed = world.train, world.known, world.seed
    methods: dict[str, dict[str, Method]] = {}
    picked: dict[str, Any] = {}

    def tell(name: str, of_size: Mapping[str, Method], began: float, chosen: Any = "") -> None:
        methods[name] = dict(of_size)
        if chosen:
            picked[name] = chosen
        scored = ", ".join(f"{world.scores(m)[n]:.4f}" for n, m in of_size.items())
        say(f"seed {seed}: {name} {scored} (validation nDCG@10) in {time.perf_counter() - began:.0f} s {chosen}")

    for name in ("random", "popularity"):
        methods[name] = dict.fromkeys(world.validation, baselines.BASELINES[name](train, known))
    for name, values in GRIDS.items():
        began = time.perf_counter()
        found = world.best(lambda name=name, **point: baselines.BASELINES[name](train, known, **point), grid(values))
        tell(name, {n: f[0] for n, f in found.items()}, began, {n: f[1] for n, f in found.items()})
        if name == "als":
            settings = found["10 clicks"][1]
    if "two_tower" not in without:
        began = time.perf_counter()
        few = {n: make_tasks(world.held, query=10, support=(k, k), negatives=0, seed=seed) for n, k in zip(world.validation, SUPPORTS, strict=True)}  # fmt: skip
        tower = fit_plain("two_tower", train, known, few, steps=steps, seed=seed, say=say)
        tell("two_tower", dict.fromkeys(world.validation, tower), began)

    def mapped(size: int, **point: Any) -> Method:
        made = learners.item_map(train.items.num_rows, size=size)
        params = learners.item_map_start(made.init(jax.random.key(0)), train, **point)
        return Method(params, made.adapt, made.predict, made.tables)

    began = time.perf_counter()
    found = world.best(mapped, grid(MAP_GRID))
    tell("item_map, closed form", {n: f[0] for n, f in found.items()}, began, {n: f[1] for n, f in found.items()})
    factors = implicit_als_factors(train, seed=seed, **settings)
    for name, (learner, logits) in entrants(train.columns, train.items.num_rows, settings["size"]).items():
        if name in without:
            continue
        began, params = time.perf_counter(), learner.init(jax.random.key(seed))
        if name == "item_map":
            start = mapped(128, support=5, reg=1.0).params["tables"]["item_id"]
            scale = jnp.concatenate([jnp.full(1, 10.0), jnp.ones(128), jnp.full(128, 10.0)])
            params, rate = {"tables": {"item_id": start * scale[None]}}, 1e-4
        else:
            params, rate = from_factors(params, train, factors, 3.0 if logits else 1.0, logits), 1e-3
        tell(name, meta_train(world, learner, params, steps, rate), began)
    return methods, picked


@partial(jax.jit, static_argnums=0)
def _adapted(adapt: Any, params: Any, support: Examples) -> Any:
    return jax.vmap(lambda one: adapt(params, one, jax.random.key(0)))(support)


def _best_items(method: Method, known: Catalogue, support: Examples, user: Any, shown: np.ndarray) -> np.ndarray:
    """The 20 best items of the catalogue for each task, ``[T, 20]``, the support and the unknown row left out."""
    scores = catalogue_scores(method, _adapted(method.adapt, method.params, support), known, user)
    np.put_along_axis(scores, shown, -np.inf, axis=1)
    scores[:, 0] = -np.inf
    return np.asarray(jax.lax.top_k(scores, 20)[1])


def measured(method: Method, tasks: TaskSet, known: Catalogue) -> np.ndarray:
    """nDCG@10 and recall@20 of each task, ``[T, 2]``."""
    liked = np.zeros((len(tasks), known.item_row.shape[0]), bool)
    task, slot = np.nonzero(tasks.query_mask)
    liked[task, tasks.query_item[task, slot]] = True
    hits = np.zeros((len(tasks), 20))
    for start in range(0, len(tasks), 128):
        index = np.minimum(np.arange(start, start + 128), len(tasks) - 1)
        some = tasks.take(index)
        user = jnp.asarray(some.user)
        columns = jax.vmap(inputs, (None, 0, 0))(known, user, jnp.asarray(some.support_item))
        support = Examples(columns, jnp.asarray(some.support_target), jnp.asarray(some.support_mask))
        top = _best_items(method, known, support, user, some.support_item)
        hits[index] = np.take_along_axis(liked[index], top, axis=1)
    discount = 1 / np.log2(2 + np.arange(10))
    wanted = liked.sum(1)
    ideal = np.cumsum(discount)[np.minimum(wanted, 10) - 1]
    return np.stack([hits[:, :10] @ discount / ideal, hits.sum(1) / wanted], 1)


def table(
    values: Mapping[str, Mapping[str, np.ndarray]], users: Mapping[str, np.ndarray]
) -> tuple[str, dict[str, Any]]:
    """Markdown and JSON: means, and what a meta-learner has more than the best plain method of that column.

    Args:
      values: by support size and method, ``[tasks, 2]`` of all seeds; users: by support size, who the tasks are.
    """
    lines: list[str] = []
    found: dict[str, Any] = {}
    for n, of_method in values.items():
        rivals = [name for name in PLAIN if name in of_method]
        best = [max(rivals, key=lambda r, m=m: of_method[r][:, m].mean()) for m in range(2)]
        heads = [f"{metric} less {name}'s" for metric, name in zip(METRICS, best, strict=True)]
        lines += ["", f"**{n}**, {len(users[n])} tasks", "", f"| | {' | '.join((*METRICS, *heads))} |", "|---|---|---|---|---|"]  # fmt: skip
        found[n] = {"tasks": len(users[n])}
        for name, each in of_method.items():
            mean = estimate(each, users[n])
            against = np.stack([of_method[b][:, m] for m, b in enumerate(best)], 1)
            gap = estimate(each - against, users[n])
            cells = [f"{mean.mean[m]:.4f} ± {mean.se[m]:.4f}" for m in range(2)]
            cells += ["" if name in PLAIN else f"{gap.mean[m]:+.4f} [{gap.low[m]:+.4f}, {gap.high[m]:+.4f}]" for m in range(2)]  # fmt: skip
            lines.append(f"| {name} | {' | '.join(cells)} |")
            found[n][name] = {
                metric: {"mean": float(mean.mean[m]), "se": float(mean.se[m]), "against": best[m], "gap": [float(a[m]) for a in (gap.mean, gap.low, gap.high)]}
                for m, metric in enumerate(METRICS)
            }  # fmt: skip
    return "\n".join(lines), found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="ml-1m")
    parser.add_argument(
        "--splits", type=int, default=1, help="number of splits of the users; everything is fitted on each"
    )
    parser.add_argument("--first", type=int, default=0, help="seed of the first split")
    parser.add_argument("--fast", action="store_true", help=f"skip {', '.join(SLOW)}")
    parser.add_argument("--draws", type=int, default=3, help="supports drawn per test user")
    parser.add_argument("--steps", type=int, default=1000, help="outer steps of each training")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    given = parser.parse_args()
    tune_cpu()
    data, began = clicks_of(load(given.data)), time.perf_counter()
    say = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    values: dict[str, dict[str, list[np.ndarray]]] = {}
    users: dict[str, list[np.ndarray]] = {}
    picked: dict[int, Any] = {}
    for seed in range(given.first, given.first + given.splits):
        world = World(data, seed, given.draws)
        methods, picked[seed] = fitted(world, given.steps, SLOW if given.fast else (), say)
        for n, tasks in itertools.chain.from_iterable(draw.items() for draw in world.test):
            users.setdefault(n, []).append(tasks.user)
            for name, of_size in methods.items():
                values.setdefault(n, {}).setdefault(name, []).append(measured(of_size[n], tasks, world.known))
        seconds = time.perf_counter() - began
        say(f"seed {seed}: measured, {seconds:.0f} s in all")
        joined = {n: {name: np.concatenate(v) for name, v in by.items()} for n, by in values.items()}
        text, found = table(joined, {n: np.concatenate(u) for n, u in users.items()})
        if given.out:
            told = {
                "data": data.name,
                "clicks": len(data),
                "splits": list(picked),
                "chosen": picked,
                "draws": given.draws,
                "steps": given.steps,
            }
            told |= {"device": str(jax.devices()[0]), "seconds": seconds, "results": found}
            given.out.with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n")
            about = (__doc__ or "").split("\n\n", 2)[2]
            given.out.with_suffix(".md").write_text(
                f"# Clicks, the whole catalogue: {data.name}\n\n{about}\nSplits of the users (seeds): {list(picked)}, draws of supports: "
                f"{given.draws}. Means ± standard errors over users; differences paired by task, with 95% t-intervals over users.\n{text}\n"
            )
    print(text)


if __name__ == "__main__":
    try:
        main()
    except MetarecError as error:
        sys.exit(f"error: {error}")
