"""The program this library descends from meta-learns nothing; ours does."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from worlds import largest_difference, one, seed_model, tasks

from metarec_jax import learners
from metarec_jax.core import Column

KEY = jax.random.key(0)
COLUMNS = {"user_id": Column("id", 400), "item_id": Column("id", 600)}


def test_the_seed_as_first_written_has_no_gradient_in_pytorch():
    """Its own code: after one outer step no meta-parameter has a gradient. Skips where PyTorch is not installed."""
    pytest.importorskip(
        "torch", reason="PyTorch is no dependency; pip install torch==2.13.0 runs the seed's own program"
    )
    path = Path(__file__).parent.parent / "benchmarks" / "seed_program.py"
    spec = importlib.util.spec_from_file_location("seed_program", path)
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    assert program.demonstrate() == [None, None, None, None]


def test_the_seed_as_first_written_has_no_gradient_in_jax():
    """The same program: adaptation starts from a copy of the values, cut from the graph. Every gradient is exactly 0."""
    learner = learners.maml(seed_model(), inner_lr=0.1, inner_steps=2)
    params = learner.init(KEY)
    task = one(tasks(KEY, 2, columns=COLUMNS))

    def as_first_written(params):
        copy = jax.lax.stop_gradient(params)  # load_state_dict(state_dict()): values, not the graph
        return learner.loss(copy, task, KEY)[0]

    gradient = jax.jit(jax.grad(as_first_written))(params)
    assert largest_difference(gradient, jax.tree.map(jnp.zeros_like, params)) == 0.0


def test_ours_reaches_every_meta_parameter():
    """The gradient of the same loss, not cut: none of the four parameter arrays is left without."""
    learner = learners.maml(seed_model(), inner_lr=0.1, inner_steps=2)
    params = learner.init(KEY)
    task = one(tasks(KEY, 2, columns=COLUMNS))
    gradient = jax.jit(jax.grad(lambda p: learner.loss(p, task, KEY)[0]))(params)
    largest = {
        "/".join(map(str, path)): float(jnp.abs(g).max()) for path, g in jax.tree_util.tree_leaves_with_path(gradient)
    }
    assert len(largest) == 4
    assert min(largest.values()) > 1e-4
