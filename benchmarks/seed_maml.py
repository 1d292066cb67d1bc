"""The seed's model on new users of ML-1M: second-order MAML against the same model trained plainly and fine-tuned.

    python benchmarks/seed_maml.py [--data ml-1m] [--steps 3000] [--json]

The model is the seed's: concatenated user and item embeddings, one linear layer, MSE. Both sides use the same users and
take the same number of inner SGD steps, on every parameter, on a new user's support. The plain side is trained without
inner steps, in two ways (with a row per user, hidden for one task in ten so that the unknown row is trained; or with only
the unknown row). The inner rate of each side, and the way of the plain side, is the best on validation users. Test users
are scored once.
"""

from __future__ import annotations

import argparse
import json

from metarec_jax import learners, models
from metarec_jax.core import Learner, MetarecError, Method
from metarec_jax.data.catalogue import catalogue
from metarec_jax.data.draw import task_source
from metarec_jax.data.interactions import Interactions
from metarec_jax.data.io.datasets import load
from metarec_jax.data.splits import split
from metarec_jax.data.tasks import make_tasks
from metarec_jax.evaluation.evaluate import evaluate
from metarec_jax.training.loop import fit

RATES = (0.01, 0.03, 0.1, 0.3, 1.0)


def train(learner: Learner, data: Interactions, steps: int, seed: int, **users) -> Method:
    source = task_source(data, tasks=64, support=(3, 64), query=10, item_drop=0.0, cold_tasks=0.0, **users)
    return fit(learner, source, steps=steps, lr=3e-3, seed=seed).method


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="ml-1m")
    parser.add_argument("--steps", type=int, default=3000, help="outer steps of each training")
    parser.add_argument("--inner", type=int, nargs="+", default=[1, 5], help="inner steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    given = parser.parse_args()
    data = load(given.data)
    parts = split(data, ["user_cold"], seed=given.seed)
    known = catalogue(data, parts.train)
    span = (float(data.rating.min()), float(data.rating.max()))
    model = models.meta_recommender(data.users.num_rows, data.items.num_rows, size=32)
    held = {"user_cold": make_tasks(parts.validation["user_cold"], support=(3, 64), seed=given.seed)}
    test = {"user_cold": make_tasks(parts.test["user_cold"], support=(3, 64), seed=given.seed)}

    def error(method: Method) -> float:
        try:
            report = evaluate({"it": method}, held, known, rating_range=span)
        except MetarecError:  # scores that are not finite: the rate is too high
            return float("inf")
        return report.summary()["it"]["user_cold"]["rmse_pooled"].mean

    plain = learners.maml(model, inner_steps=0)
    ways = {
        "own rows": train(plain, parts.train, given.steps, given.seed, user_rows="own", user_drop=0.1),
        "prior row": train(plain, parts.train, given.steps, given.seed),
    }
    out = {}
    for inner in given.inner:
        made = {rate: learners.maml(model, inner_lr=rate, inner_steps=inner) for rate in RATES}
        tuned = {
            (way, rate): Method({**method.params, "rule": {}}, made[rate].adapt, made[rate].predict)
            for way, method in ways.items()
            for rate in RATES
        }
        meta = {}
        for rate in RATES:
            try:
                meta[rate] = train(made[rate], parts.train, given.steps, given.seed)
            except MetarecError as told:  # too high a rate: training says so, and the rate is out
                print(f"{inner} inner steps, maml, rate {rate}: {told}")
        scores = {f"plain, {way}, rate {rate}": error(m) for (way, rate), m in tuned.items()}
        scores |= {f"maml, rate {rate}": error(m) for rate, m in meta.items()}
        print(f"{inner} inner steps, RMSE on validation users:")
        for name, value in scores.items():
            print(f"  {name}: {value:.4f}")
        best_plain = min(tuned, key=lambda at: scores[f"plain, {at[0]}, rate {at[1]}"])
        best_meta = min(meta, key=lambda rate: scores[f"maml, rate {rate}"])
        report = evaluate(
            {"maml": meta[best_meta], "fine_tuned": tuned[best_plain]},
            test,
            known,
            rating_range=span,
            baselines=["fine_tuned"],
        )
        means = report.summary()
        print(f"{inner} inner steps, test users (maml rate {best_meta}; plain {best_plain}):")
        for metric in ("mae", "rmse", "ndcg@5"):
            d = report.paired("maml", "fine_tuned", metric, "user_cold")
            values = [means[m]["user_cold"][metric].mean for m in ("maml", "fine_tuned")]
            print(
                f"  {metric}: maml {values[0]:.4f}, fine-tuned {values[1]:.4f}; difference {d.mean:+.4f} [{d.low:+.4f}, {d.high:+.4f}], better: {d.better}"
            )
        out[str(inner)] = report.to_json() | {
            "chosen": {"maml": best_meta, "fine_tuned": list(best_plain)},
            "validation": scores,
        }
    if given.json:
        print(json.dumps(out))


if __name__ == "__main__":
    main()
