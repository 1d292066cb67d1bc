"""The ten lines: a data set, a split, a learner; train, compare with plain baselines, recommend to a new user.

python examples/quickstart.py            # a synthetic data set, seconds
python examples/quickstart.py ml-1m      # the real thing, about a minute
"""

import sys

import jax

import metarec_jax as mr
from metarec_jax.report.write import terminal_table

data = mr.load(sys.argv[1] if len(sys.argv) > 1 else "synthetic:600x300")
parts = mr.split(data, ["user_cold"])
known = mr.catalogue(data, parts.train)
learner = mr.ridge(mr.content_model(data.columns, size=8))
start = mr.warm_start(learner.init(jax.random.key(0)), parts.train)
found = mr.fit(learner, parts.train, steps=200, lr=5e-4, params=start)
methods = {"ridge": found.method, **mr.fit_baselines(parts.train, known, names=["item_mean", "bias", "als"])}
tasks = {"user_cold": mr.make_tasks(parts.test["user_cold"])}
span = (float(data.rating.min()), float(data.rating.max()))
report = mr.evaluate(methods, tasks, known, rating_range=span, baselines=("item_mean", "bias", "als"))
print(terminal_table(report))

first, second = data.items.ids[:2].tolist()
for item in mr.Recommender(found.method, data, known).recommend({first: span[1], second: span[0]}, n=5):
    print(item)
