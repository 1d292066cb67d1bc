"""The whole workflow: load a data set, train a learner, compare it with baselines, recommend to a new user.

python examples/quickstart.py            # a synthetic data set, seconds
python examples/quickstart.py ml-1m      # a real data set, about a minute
"""

import sys

import metarec_jax as mr
from metarec_jax.report.write import terminal_table

data = mr.load(sys.argv[1] if len(sys.argv) > 1 else "synthetic:600x300")
run = mr.train("ridge", data, scenarios=("user_cold",), steps=200, size=8)
print(terminal_table(run.evaluate()))

first, second = data.items.ids[:2].tolist()
for item in run.recommender().recommend({first: data.rating.max(), second: data.rating.min()}, n=5):
    print(item)
