"""Implicit feedback: every row is a positive; negatives are drawn on the device; the whole catalogue is ranked."""

import metarec_jax as mr
from metarec_jax.report.write import terminal_table

data = mr.synthetic(800, 150, ratings_per_user=(15, 40), implicit=True, seed=0)
parts = mr.split(data, ["user_cold"])
known = mr.catalogue(data, parts.train)
model = mr.models.content_model(data.columns, size=8)
learner = mr.learners.maml(model, inner_lr=0.5, inner_steps=3, loss=mr.losses.bpr, only=("tables/user_id",))
source = mr.task_source(parts.train, support=(2, 16), query=8, negatives=3, item_drop=0.0, cold_tasks=0.0)
found = mr.fit(learner, source, steps=400, lr=0.01)
plain = mr.fit_baselines(parts.train, known, names=["random", "popularity", "item_knn"])
tasks = {"user_cold": mr.make_tasks(parts.test["user_cold"], negatives=3)}
report = mr.evaluate(
    {"maml_bpr": found.method, **plain},
    tasks,
    known,
    relevant=1.0,
    catalogue_ranking=True,
    baselines=tuple(plain),
    ranking_only=("maml_bpr", *plain),
)
print(terminal_table(report))
