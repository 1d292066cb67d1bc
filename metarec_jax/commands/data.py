"""``metarec data``: statistics of a data set."""

from __future__ import annotations

import json
from pathlib import Path

from metarec_jax.commands.doctor import line
from metarec_jax.data.io.datasets import describe
from metarec_jax.experiment import config as configs
from metarec_jax.experiment import directory as directories
from metarec_jax.experiment.build import build_data
from metarec_jax.messages import printable


def data(config: configs.DataConfig, *, data_dir: Path | None, as_json: bool) -> int:
    """Print the statistics of a data set. Returns 0."""
    facts = describe(build_data(config, data_dir=data_dir))
    print(directories.summary(facts))
    line("density", f"{facts['density']:.3%}")
    for name in ("per_user", "per_item"):
        line(name.replace("_", " "), "  ".join(f"{k} {v:,.0f}" for k, v in facts[name].items()))
    if facts["ratings"] is None:
        line("ratings", "none: implicit feedback")
    else:
        line("ratings", f"mean {facts['ratings']['mean']:.3f}, sd {facts['ratings']['sd']:.3f}")
        most = max(facts["ratings"]["histogram"].values())
        for value, count in facts["ratings"]["histogram"].items():
            line("", f"{value:>12}  {count:>10,}  {'#' * round(30 * count / most)}")
    if facts["time"] is not None:
        line("time", f"{facts['time']['first']} to {facts['time']['last']} ({facts['time']['days'] or 0:,.0f} days)")
    for name, share in facts["concentration"].items():
        line(name.replace("_", " "), f"{share:.2f}" if name == "gini" else f"{share:.1%} of interactions")
    for side in ("users", "items"):
        few = facts["cold_start"][f"{side}_with_fewer_than"]
        line(f"cold {side}", ", ".join(f"{count:,} with fewer than {n}" for n, count in few.items()))
    for name, feature in (facts["user_features"] | facts["item_features"]).items():
        values = f", {feature['cardinality']:,} values" if feature["cardinality"] is not None else ""
        line(printable(name), f"{feature['kind']}{values}, known for {feature['coverage']:.0%}")
    for note in facts["notes"]:
        line("note", printable(note))
    if as_json:
        print(json.dumps(facts))
    return 0
