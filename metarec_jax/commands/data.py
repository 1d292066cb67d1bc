"""``metarec data``: what is in a data set."""

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
    """``metarec data``: what is in a data set."""
    found = describe(build_data(config, data_dir=data_dir))
    print(directories.summary(found))
    line("density", f"{found['density']:.3%}")
    for name in ("per_user", "per_item"):
        line(name.replace("_", " "), "  ".join(f"{k} {v:,.0f}" for k, v in found[name].items()))
    if found["ratings"] is None:
        line("ratings", "none: implicit feedback")
    else:
        line("ratings", f"mean {found['ratings']['mean']:.3f}, sd {found['ratings']['sd']:.3f}")
        most = max(found["ratings"]["histogram"].values())
        for value, count in found["ratings"]["histogram"].items():
            line("", f"{value:>12}  {count:>10,}  {'#' * round(30 * count / most)}")
    if found["time"] is not None:
        line("time", f"{found['time']['first']} to {found['time']['last']} ({found['time']['days'] or 0:,.0f} days)")
    for name, share in found["concentration"].items():
        line(name.replace("_", " "), f"{share:.2f}" if name == "gini" else f"{share:.1%} of interactions")
    for side in ("users", "items"):
        few = found["cold_start"][f"{side}_with_fewer_than"]
        line(f"cold {side}", ", ".join(f"{count:,} with fewer than {n}" for n, count in few.items()))
    for name, facts in (found["user_features"] | found["item_features"]).items():
        values = f", {facts['cardinality']:,} values" if facts["cardinality"] is not None else ""
        line(printable(name), f"{facts['kind']}{values}, known for {facts['coverage']:.0%}")
    for note in found["notes"]:
        line("note", printable(note))
    if as_json:
        print(json.dumps(found))
    return 0
