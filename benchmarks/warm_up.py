"""P3: warm-up of ML-1M items: clicks (rating >= 4) on items with 0, 20, 40 and 60 known ratings.

    python benchmarks/warm_up.py --data ml-1m --seeds 3 --json

The folder holds ratings.dat (or .gz) and users.dat, and MeLU's movies_extrainfos.dat in melu/. Items with more than 200
ratings are base: a DeepFM is trained on them for one epoch. Those with 60 to 200 are cold: in the time order of each the
first 20, next 20 and next 20 ratings are the stages a, b and c, and the rest is the test, scored cold and after each stage.

A method adapts to all stages so far (a; a and b; a, b and c), and only per item: to the row of its id, or a vector of the
same kind. Settings were chosen with --validation, on base items that are held out at random and serve as cold ones, without
using any test row.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from melu_content import with_content
from scipy.stats import rankdata

from metarec_jax import learners, models
from metarec_jax.core import Column, Learner, MetarecError, Params
from metarec_jax.data.catalogue import Catalogue
from metarec_jax.data.epochs import epoch_source, steps_of
from metarec_jax.data.interactions import Interactions
from metarec_jax.data.io.datasets import load
from metarec_jax.data.item_tasks import (
    WarmUp,
    clicks,
    exchanged,
    item_batches,
    item_catalogue,
    item_task_source,
    joined,
    place_in_time,
    warm_up,
)
from metarec_jax.data.tasks import TaskSet, make_tasks
from metarec_jax.learners._cold_rows import made, on_base, with_cold_loss
from metarec_jax.learners.mwuf import common_row
from metarec_jax.models import ctr as ctr_models
from metarec_jax.training.loop import fit
from metarec_jax.training.row_optimizers import lazy_adam

STAGES = ("cold", "a", "b", "c")
BATCH, LR = 1024, 3e-3
META_STEPS, OURS_STEPS = 300, 1200
WARM = {"inner_lr": 0.1, "inner_steps": 20}
"""The warm-up of every method that takes gradient steps."""


def prepared(folder: Path) -> Interactions:
    """Clicks with user features (gender, age, occupation) and item features (genres, half-decade)."""
    data = with_content(clicks(load(str(folder))), folder / "melu")
    kept = {name: data.item_features[name] for name in ("item_genre", "item_half_decade")}
    return replace(data, item_features=kept)


def pretended(base: Interactions, seed: int = 0) -> Interactions:
    """A fifth of the base items, cut to their first 150 ratings, so that they are cold items; the others as they are."""
    items = np.unique(base.item)
    chosen = np.random.default_rng(seed).choice(items, len(items) // 5, replace=False)
    return base.take(~np.isin(base.item, chosen) | (place_in_time(base) < 150))


def tasks_of(cut: WarmUp) -> list[TaskSet]:
    """The test as tasks of items, the same queries in the same order, with what is known at each stage as support."""
    found = []
    for stage in range(len(cut.stages) + 1):
        known = joined(cut.stages[: max(stage, 1)])
        longest = int(np.bincount(cut.test.item).max())
        tasks = make_tasks(
            exchanged(cut.test), history=exchanged(known), query=longest, support=(0, 1000), order="time"
        )
        nothing = {f"support_{n}": np.zeros_like(getattr(tasks, f"support_{n}")) for n in ("item", "target", "mask")}
        found.append(tasks if stage else replace(tasks, **nothing))
    return found


class Entrant(NamedTuple):
    """A learner as it is trained and as it is tested, and ``train(learner, base items, base parameters, seed)``."""

    trained: Learner
    tested: Learner
    train: Callable[[Learner, Interactions, Params | None, int], Params]


def rates(steps: int) -> dict[str, Any]:
    schedule = optax.cosine_decay_schedule(LR, steps, 0.1)
    return {"optimizer": optax.adam(schedule), "rows": lazy_adam(schedule), "steps": steps, "chunk": 100}


def plainly(epochs: int) -> Callable[..., Params]:
    def train(learner: Learner, base: Interactions, params: Params | None, seed: int) -> Params:
        steps = epochs * steps_of(base, BATCH)
        return fit(learner, epoch_source(base, batch=BATCH, seed=seed), seed=seed, **rates(steps)).params

    return train


def from_base(steps: int, support: tuple[int, int]) -> Callable[..., Params]:
    def train(learner: Learner, base: Interactions, params: Params | None, seed: int) -> Params:
        start = on_base(learner.init(jax.random.key(seed + 1)), params)
        if "common" in start:
            start = common_row(start, np.unique(base.item))
        source = item_task_source(base, tasks=64, support=support, query=20)
        return fit(learner, source, params=start, seed=seed, **rates(steps)).params

    return train


def entrants(columns: dict[str, Column]) -> dict[str, Entrant]:
    """Every method by name."""
    model = ctr_models.deepfm(columns, size=16, hidden=(16, 16))
    known = {name: columns[name] for name in columns if name.startswith("item_") and name != "item_id"}
    content = models.content_model(known, size=16, head="mlp", hidden=(), table_scale=0.01)

    def plain(start: str, drop: float, epochs: int) -> Entrant:
        make = partial(learners.dropout_net, model, drop=drop, start=start)
        return Entrant(make(inner_steps=0), make(**WARM), plainly(epochs))

    def generated(make: Callable[..., Learner], trained: dict[str, Any], support: tuple[int, int]) -> Entrant:
        return Entrant(make(model, content, **trained), make(model, content, **WARM), from_base(META_STEPS, support))

    ours = made(model, content)
    ours_learner = with_cold_loss(learners.logistic(ours, precision=4.0, bias_precision=4.0, newton_steps=5), ours, 0.5)
    return {
        "base": plain("own", 0.0, 1),
        "base_unknown": plain("unknown", 0.0, 1),
        "base_3_epochs": plain("unknown", 0.0, 3),
        "base_5_epochs": plain("unknown", 0.0, 5),
        "dropout_net": plain("unknown", 0.5, 1),
        "meta_embedding": generated(learners.meta_embedding, {"inner_lr": 0.1}, (20, 20)),
        "mwuf": generated(learners.mwuf, WARM, (0, 40)),
        "cvar": generated(learners.cvar, {}, (0, 40)),
        "made_logistic": Entrant(ours_learner, ours_learner, from_base(OURS_STEPS, (0, 40))),
    }


def scorer(learner: Learner) -> Callable[[Params, TaskSet, Catalogue], np.ndarray]:
    """Scores ``[T, Q]`` of fixed tasks; one program for each width of the support."""

    @jax.jit
    def run(params: Params, batch: Any) -> jax.Array:
        def one(task: Any) -> jax.Array:
            adapted = learner.adapt(params, task.support, jax.random.key(0))
            return learner.predict(params, adapted, task.query.inputs)

        return jax.vmap(one)(batch)

    def score(params: Params, tasks: TaskSet, known: Catalogue) -> np.ndarray:
        out = np.zeros(tasks.query_mask.shape, np.float32)
        for index, batch in item_batches(tasks, known, 64):
            out[index] = np.asarray(run(params, batch))[: len(index)]
        return out

    return score


def auc(scores: np.ndarray, clicked: np.ndarray) -> float:
    """The chance that a click is scored above one that is none, ties counting half.

    >>> auc(np.array([1.0, 2.0, 2.0, 3.0]), np.array([0.0, 1.0, 0.0, 1.0]))  # pairs: 1, 1/2, 1, 1
    0.875
    """
    ones = clicked > 0
    n1, n0 = int(ones.sum()), int((~ones).sum())
    return float((rankdata(scores)[ones].sum() - n1 * (n1 + 1) / 2) / (n1 * n0))


def f1(scores: np.ndarray, clicked: np.ndarray) -> float:
    """F1 of the clicks, where what is scored at the mean or above is said to be one."""
    said = scores >= scores.mean()
    return float(2 * (said & (clicked > 0)).sum() / (said.sum() + (clicked > 0).sum()))


class Weighted:
    """The AUC of one list of scores under many weightings of its items, sorted once."""

    def __init__(self, scores: np.ndarray, clicked: np.ndarray, item: np.ndarray) -> None:
        order = np.argsort(scores, kind="stable")
        self.clicked, self.item = clicked[order] > 0, item[order]
        tied = np.flatnonzero(np.append(True, np.diff(scores[order]) > 0))
        self.tied = tied

    def __call__(self, times: np.ndarray) -> float:
        """``times [items]``: how often each item was drawn."""
        weight = times[self.item].astype(np.float64)
        one = np.add.reduceat(np.where(self.clicked, weight, 0.0), self.tied)
        zero = np.add.reduceat(np.where(self.clicked, 0.0, weight), self.tied)
        below = np.cumsum(zero) - zero
        return float((one * (below + 0.5 * zero)).sum() / (one.sum() * zero.sum()))


def gains(scores: dict[str, np.ndarray], tasks: TaskSet, over: list[str], resamples: int) -> dict[str, Any]:
    """Gain in AUC over each of ``over`` at one stage, mean over seeds, and its 95% interval: items drawn anew, the same for all.

    Args:
      scores: by method ``[seeds, T, Q]``.
    """
    real = tasks.query_mask > 0
    clicked, item = tasks.query_target[real], np.broadcast_to(np.arange(len(tasks))[:, None], real.shape)[real]
    lists = {name: [Weighted(s[real], clicked, item) for s in seeds] for name, seeds in scores.items()}
    rng = np.random.default_rng(0)
    drawn = [np.ones(len(tasks), int)]
    drawn += [np.bincount(rng.integers(0, len(tasks), len(tasks)), minlength=len(tasks)) for _ in range(resamples)]
    found = {name: np.array([np.mean([one(times) for one in of]) for times in drawn]) for name, of in lists.items()}

    def told(gap: np.ndarray) -> dict[str, float]:
        low, high = np.percentile(gap[1:], [2.5, 97.5]) if resamples else (gap[0], gap[0])
        return {"gain": float(gap[0]), "low": float(low), "high": float(high)}

    return {against: {name: told(values - found[against]) for name, values in found.items()} for against in over}


def measured(
    data: Interactions, cut: WarmUp, seeds: range, only: list[str] | None, resamples: int, kept: Path | None
) -> dict[str, Any]:
    """The tables: by method and stage AUC and F1 of each seed, gains over plain bases, seconds of training.

    Args:
      kept: a folder of scores; what is there is read, and what is not is computed and put there.
    """
    known, tasks = item_catalogue(data), tasks_of(cut)
    real = tasks[0].query_mask > 0
    clicked = tasks[0].query_target[real]
    entered = {n: e for n, e in entrants(data.columns).items() if not only or n in only or n == "base"}
    scorers = {name: scorer(entrant.tested) for name, entrant in entered.items()}
    scores: dict[str, list[list[np.ndarray]]] = {name: [] for name in entered}
    seconds: dict[str, list[float]] = {name: [] for name in entered}
    for seed in seeds:
        base, took_base = None, 0.0
        for name, entrant in entered.items():
            file = None if kept is None else kept / f"{name}-{seed}.npz"
            if file is not None and file.is_file():
                with np.load(file) as found:
                    scores[name].append(list(found["scores"]))
                    seconds[name].append(float(found["seconds"]))
                continue
            began = time.perf_counter()
            if base is None:
                base = entered["base"].train(entered["base"].trained, cut.base, None, seed)
                took_base, began = time.perf_counter() - began, time.perf_counter()
            if name in ("base", "base_unknown"):  # the same parameters, asked with another row
                params, took = base, took_base
            else:
                params = entrant.train(entrant.trained, cut.base, base, seed)
                took = time.perf_counter() - began
            seconds[name].append(took)
            scores[name].append([scorers[name](params, stage, known) for stage in tasks])
            if file is not None:
                np.savez(file, scores=np.stack(scores[name][-1]), seconds=seconds[name][-1])
            told = " ".join(f"{auc(s[real], clicked):.4f}" for s in scores[name][-1])
            print(f"seed {seed}: {name}: AUC {told} ({seconds[name][-1]:.0f} s)", file=sys.stderr, flush=True)
    by_stage = {
        stage: {name: np.stack([seed[k] for seed in found]) for name, found in scores.items()}
        for k, stage in enumerate(STAGES)
    }
    table = {
        name: {
            stage: {
                "auc": [auc(s[real], clicked) for s in by_stage[stage][name]],
                "f1": [f1(s[real], clicked) for s in by_stage[stage][name]],
            }
            for stage in STAGES
        }
        for name in entered
    }
    over = [name for name in ("base", "base_unknown", "base_3_epochs", "base_5_epochs") if name in entered]
    at = {s: gains(by_stage[s], t, over, resamples) for s, t in zip(STAGES, tasks, strict=True)}
    gained = {against: {stage: at[stage][against] for stage in STAGES} for against in over}
    return {"table": table, "gains": gained, "train_seconds": seconds}


def printed(found: dict[str, Any]) -> str:
    """Mean +- standard error over seeds, F1 behind it; then the gains with their intervals."""

    def cell(values: dict[str, list[float]]) -> str:
        scores = np.array(values["auc"])
        se = scores.std(ddof=1) / len(scores) ** 0.5 if len(scores) > 1 else float("nan")
        return f"{scores.mean():.4f} +- {se:.4f} ({np.mean(values['f1']):.3f})"

    lines = ["| AUC (F1) | cold | after a | after b | after c |", "|---|---|---|---|---|"]
    lines += [
        f"| {name} | " + " | ".join(cell(stages[s]) for s in STAGES) + " |" for name, stages in found["table"].items()
    ]
    for against, stages in found["gains"].items():
        lines += ["", f"| AUC over {against} | cold | after a | after b | after c |", "|---|---|---|---|---|"]
        for name in found["table"]:
            if name != against:
                told = (stages[s][name] for s in STAGES)
                cells = (f"{g['gain']:+.4f} ({g['low']:+.4f} to {g['high']:+.4f})" for g in told)
                lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of ML-1M's files, with a subfolder melu/")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--scores", type=Path, help="cache scores in this folder")
    parser.add_argument("--methods", nargs="+", help="run only these methods, besides base")
    parser.add_argument(
        "--resamples", type=int, default=1000, help="bootstrap resamples of the items, for the intervals"
    )
    parser.add_argument("--validation", action="store_true", help="measure on base items that serve as cold ones")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    given = parser.parse_args()
    data = prepared(given.data)
    cut = warm_up(data)
    cut = warm_up(pretended(cut.base)) if given.validation else cut
    sizes = {"base": len(cut.base), "stages": [len(part) for part in cut.stages], "test": len(cut.test)}
    print(f"rows: {sizes}", file=sys.stderr)
    if given.scores is not None:
        given.scores.mkdir(parents=True, exist_ok=True)
    seeds = range(given.first_seed, given.first_seed + given.seeds)
    found = measured(data, cut, seeds, given.methods, given.resamples, given.scores)
    print(printed(found))
    if given.json:
        print(json.dumps({"rows": sizes, **found, "device": str(jax.devices()[0])}))


if __name__ == "__main__":
    from metarec_jax.cpu import tune_cpu

    tune_cpu()
    try:
        main()
    except MetarecError as error:
        sys.exit(f"error: {error}")
