"""``python -m benchmarks --check``: every rival's outer gradient beside ours, the same numbers in, at float64."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import ours
from benchmarks.cells import VOCAB, batches, melu_cell, seed_cell
from benchmarks.harness import ROOT
from metarec_jax.core import Params
from metarec_jax.training.step import loss_and_grads

LIMIT = 1e-9


def check(torch_python: str | None) -> int:
    """Print the largest difference of every variant from ours, and return 1 where one is beyond 1e-9."""
    if torch_python is None:
        print("no interpreter with torch: nothing to check; give --torch-python", file=sys.stderr)
        return 2
    worst = 0.0
    seed = [{**seed_cell(4, steps, items=60), "repeats": True} for steps in (1, 3)]
    for cell in [*seed, *(melu_cell(4, steps) for steps in (1, 3))]:
        print(f"{cell['model']}, {cell['tasks']} tasks x {cell['inner_steps']} inner steps", flush=True)
        for name, difference in differences(cell, torch_python).items():
            print(f"  {name:28s} largest difference {difference:.1e}", flush=True)
            worst = max(worst, difference)
    print(f"largest of all {worst:.1e}; the limit is {LIMIT:.0e}")
    return int(not worst <= LIMIT)


def differences(cell: dict[str, Any], torch_python: str) -> dict[str, float]:
    """Variant -> the largest absolute difference of its outer gradient from ours."""
    with jax.enable_x64(True):
        learner = ours.make_learner(cell)
        params = jax.tree.map(lambda a: a.astype(float), learner.init(jax.random.key(0)))
        task = jax.tree.map(
            lambda a: a[0].astype(float) if a.dtype.kind == "f" else a[0], ours.make_tasks({**cell, "batches": 1})
        )
        _, grads, ids = jax.jit(lambda p, t: loss_and_grads(learner, p, t, jax.random.key(0)))(params, task)
        tables = {
            name: np.zeros(params["tables"][name].shape) + grads["whole"].get(name, 0.0) for name in params["tables"]
        }
        for name, rows in grads["rows"].items():
            np.add.at(tables[name], np.asarray(ids[name]).reshape(-1), np.asarray(rows).reshape(-1, rows.shape[-1]))
        wanted = as_torch({**grads["dense"], "tables": tables})
        given = as_torch(params)
    made = batches({**cell, "batches": 1})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "gradients.npz"
        np.savez(path, allow_pickle=False, cell=json.dumps(cell), ids=made.ids[0], rating=made.rating[0], **given)
        command = [torch_python, "-W", "ignore", "-m", "benchmarks.torch_rivals.worker", "--gradients", str(path)]
        subprocess.run(command, cwd=ROOT, check=True)
        with np.load(path, allow_pickle=False) as file:
            found = dict(file)
    worst: dict[str, float] = {}
    for key, theirs in found.items():
        variant, name = key.split("/")
        worst[variant] = max(worst.get(variant, 0.0), float(np.abs(theirs - wanted[name]).max()))
    return worst


def as_torch(params: Params) -> dict[str, np.ndarray]:
    """Our parameters (or their gradient) under the names and in the layout of PyTorch's modules."""
    net, tables = params["net"]["params"], params["tables"]
    without_unknown = {name: np.asarray(table)[1:] for name, table in tables.items()}
    if "user_id" in tables:
        named = {"head.user.weight": without_unknown["user_id"], "head.item.weight": without_unknown["item_id"]}
        layers = {"head.out": net["out"]}
    else:
        named = {f"emb.{c}.weight": without_unknown[ours.MELU_COLUMNS[c]] for c in range(len(VOCAB))}
        layers = {"head.0": net["dense_0"], "head.2": net["dense_1"], "head.4": net["out"]}
    for name, layer in layers.items():
        named |= {f"{name}.weight": np.asarray(layer["kernel"]).T, f"{name}.bias": np.asarray(layer["bias"])}
    return named
