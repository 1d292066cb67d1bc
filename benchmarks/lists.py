"""Lists of the whole catalogue from ratings, and ratings, by one default run: protocol P4.

    python -m benchmarks.lists [--data ml-1m] [--seeds 5] [--learner auto] [--out benchmarks/results/lists] [--json]

Of each split seed, the default of `metarec fit` is trained and measured beside the tuned plain methods: a tenth of the users
and of the items test, a tenth validate. A task is a new user: 10 random ratings are the query, at most 100 others the
support; relevant is what the query rates 4 or more; candidates are all items that the user is not known to have had.
Then the same from ten ratings alone: a fifth of the users are new, of the 2,000 most rated items.

Settings are chosen on validation tasks; test tasks are scored once. Intervals are over users, all seeds together.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

import metarec_jax as mr
from metarec_jax.core import Method
from metarec_jax.data.interactions import Interactions, Vocabulary
from metarec_jax.data.tasks import TaskSet, make_tasks
from metarec_jax.evaluation.evaluate import evaluate
from metarec_jax.evaluation.intervals import estimate
from metarec_jax.evaluation.results import ALL
from metarec_jax.experiment.protocol import measuring_options

METRICS = ("catalogue_ndcg@10", "catalogue_recall@20", "ndcg@5", "mae")
ITEMS, NEW_USERS, GIVEN = 2000, 0.2, 10
Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="ml-1m", help="a named data set, or the path of a file")
    parser.add_argument("--seeds", type=int, default=5, help="split seeds, from 0")
    parser.add_argument("--learner", default="auto", help="learner and options, as for metarec fit")
    parser.add_argument("--steps", type=int, default=1000, help="outer steps")
    parser.add_argument("--out", type=Path, default=None, help="file name, without an ending, of the results")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    options = parser.parse_args(arguments)
    began = time.perf_counter()
    data = mr.load(options.data) if not Path(options.data).exists() else mr.read(options.data)
    frames = []
    for seed in range(options.seeds):
        for table, frame in (("lists", whole(data, options, seed)), ("ten ratings", ten_ratings(data, options, seed))):
            frames.append(frame.assign(table=table, split=seed))
        print(f"seed {seed}: {time.perf_counter() - began:.0f} s so far", file=sys.stderr, flush=True)
    result = {
        "protocol": "P4",
        "table": table_of(pd.concat(frames, ignore_index=True)),
        "seeds": options.seeds,
        "seconds": round(time.perf_counter() - began, 1),
    }
    text = markdown(result, options)
    print(text)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(text)
    if options.json:
        print(json.dumps(result))
    return 0


def whole(data: Interactions, options: argparse.Namespace, seed: int) -> pd.DataFrame:
    """One row per method, scenario and test user of the run's own report."""
    run = mr.train(options.learner, data, steps=options.steps, split_seed=seed)
    report = run.evaluate()
    per_task = report.per_task[report.per_task["shown"] == ALL].copy()
    per_task["group"] = np.where(per_task["method"].isin(report.baselines), "plain", "ours")
    return per_task


def ten_ratings(data: Interactions, options: argparse.Namespace, seed: int) -> pd.DataFrame:
    """As `whole`, for new users of whom ten ratings are known, and who are asked about all their others."""
    data = most_rated(data, ITEMS)
    run = mr.train(
        options.learner, data, steps=options.steps, split_seed=seed, test=NEW_USERS, scenarios=("user_cold",)
    )
    methods: dict[str, Method] = {run.config.learner.name: run.method} | run.baselines
    tasks: dict[str, TaskSet] = {
        "user_cold": make_tasks(run.parts.test["user_cold"], query=100_000, support=(GIVEN, GIVEN), seed=seed)
    }
    some = evaluate(
        methods,
        tasks,
        run.catalogue,
        catalogue_ranking=True,
        baselines=tuple(run.baselines),
        seed=seed,
        **measuring_options(data, methods),
    )
    per_task = some.per_task[some.per_task["shown"] == ALL].copy()
    per_task["group"] = np.where(per_task["method"].isin(some.baselines), "plain", "ours")
    return per_task


def most_rated(data: Interactions, count: int) -> Interactions:
    """The rows of the most rated items."""
    counts = np.bincount(data.item, minlength=data.items.num_rows)
    chosen = np.sort(np.argsort(-counts[1:], kind="stable")[:count]) + 1
    kept = data.take(np.isin(data.item, chosen))
    row = np.zeros(data.items.num_rows, np.int64)
    row[chosen] = 1 + np.arange(len(chosen))
    features = {
        name: dataclasses.replace(feature, values=feature.values[np.concatenate([[0], chosen])])
        for name, feature in data.item_features.items()
    }
    titles = None if data.titles is None else data.titles[chosen - 1]
    return dataclasses.replace(
        kept,
        item=row[kept.item],
        items=Vocabulary(data.items.ids[chosen - 1]),
        item_features=features,
        titles=titles,
    )


def table_of(frame: pd.DataFrame) -> list[Row]:
    """Means and 95% intervals over users of each method and metric."""
    rows: list[Row] = []
    for (table, scenario, method, group), part in frame.groupby(
        ["table", "scenario", "method", "group"], observed=True, sort=False
    ):
        users = part["user"].to_numpy() + part["split"].to_numpy() * (1 + frame["user"].max())
        found = estimate(part[list(METRICS)].to_numpy(np.float64), users)
        for k, metric in enumerate(METRICS):
            if np.isfinite(found.mean[k]):
                name = f"{table}, {scenario}: {metric.replace('catalogue_', 'catalogue ')}"
                values = {"mean": found.mean[k], "low": found.low[k], "high": found.high[k]}
                rows.append(
                    {"method": method, "group": group, "metric": name}
                    | {key: round(float(value), 5) for key, value in values.items()}
                )
    return rows


def markdown(result: Mapping[str, Any], options: argparse.Namespace) -> str:
    """A table per part and scenario: a row per method, a column per metric."""
    lines = [
        f"# Lists and ratings of {options.data}, {result['seeds']} split seeds",
        "",
        f"`python -m benchmarks.lists --data {options.data} --seeds {options.seeds} --learner {options.learner}`: "
        f"{result['seconds']:.0f} s. Mean and half of the 95% interval over users.",
    ]
    rows = pd.DataFrame(result["table"])
    rows[["part", "column"]] = rows["metric"].str.split(": ", expand=True)
    for part, some in rows.groupby("part", sort=False):
        columns = list(dict.fromkeys(some["column"]))
        lines += ["", f"## {part}", "", "| method | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
        for method, mine in some.groupby("method", sort=False):
            cells = {r.column: f"{r.mean:.4f} ±{(r.high - r.low) / 2:.4f}" for r in mine.itertuples()}
            lines.append(f"| {method} | " + " | ".join(cells.get(c, "") for c in columns) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
