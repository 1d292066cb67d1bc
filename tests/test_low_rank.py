"""Low-rank inner steps against the plain inner loop: the same losses, the same derivatives."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from worlds import COLUMNS, double, largest_difference, tasks

from metarec_jax import learners, models
from metarec_jax.core import Column, Examples, Model, Table, Task
from metarec_jax.learners import _low_rank as low_rank
from metarec_jax.training.step import loss_and_grads


def both(model: Model, batch: Task, **options) -> tuple[list, list]:
    """Loss and gradients of a batch, low-rank and plain."""
    found = []
    for thin in (True, False):
        learner = learners.maml(model, low_rank=thin, **{"inner_lr": 0.05, "inner_steps": 1, **options})
        params = double(jax.jit(learner.init)(jax.random.key(0)))
        (loss, _), grads, _ = jax.jit(partial(loss_and_grads, learner))(params, batch, jax.random.key(1))
        found.append([loss, grads])
    return found[0], found[1]


def low(model: Model, batch: Task, steps: int) -> set[str]:
    """The matrices that `maml` keeps low-rank for one task of the batch."""
    params = jax.jit(model.init)(jax.random.key(0))
    moving = {
        "net/" + k: v
        for k, v in jax.tree_util.tree_leaves_with_path(params["net"])
        for k in ["/".join(p.key for p in k)]
    }
    task = jax.tree.map(lambda a: a[0], batch)

    def apply(moving, fixed, inputs):
        net = jax.tree.unflatten(jax.tree.structure(params["net"]), [moving[name] for name in moving])
        return model.apply({**fixed, "net": net}, inputs)

    return set(low_rank.worth(low_rank.trace(apply, moving, params, task.support.inputs), steps))


MLP = models.content_model(COLUMNS, size=8, head="mlp", hidden=(16, 16))


def test_what_is_kept_low_rank():
    """Support of 3: both hidden kernels after one step; a 16 x 1 output (3 (16 + 1) > 2 * 16) never."""
    batch = tasks(jax.random.key(2), 2, support=3)
    assert low(MLP, batch, 1) == {"net/params/dense_0/kernel", "net/params/dense_1/kernel"}
    # 8 steps: rank 4 * 3 in the mean, 12 * 32 < 512 still. With a support of 9, 36 * 32 > 512, and only the first,
    # whose inputs stay, keeps its rank of 9. Longer loops are not unrolled.
    assert low(MLP, batch, 8) == {"net/params/dense_0/kernel", "net/params/dense_1/kernel"}
    assert low(MLP, tasks(jax.random.key(2), 2, support=9), 8) == {"net/params/dense_0/kernel"}
    assert low(MLP, batch, 9) == set()


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"only": ("net",), "inner_steps": 4}, marks=pytest.mark.slow),
        pytest.param({"inner_steps": 3}, marks=pytest.mark.slow),
        pytest.param({"only": ("net",), "inner_steps": 2, "first_order": True}, marks=pytest.mark.slow),
        pytest.param({"only": ("net",), "inner_steps": 3, "per_step_losses": True}, marks=pytest.mark.slow),
        {"only": ("net/params/dense_1",), "inner_steps": 2, "prior": 4.0},
    ],
    ids=str,
)
def test_the_same_derivative(options, float64):
    batch = double(tasks(jax.random.key(3), 3, support=3))
    thin, plain = both(MLP, batch, **options)
    assert largest_difference(thin, plain) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize(("support", "query"), [(3, 1), (1, 3)])
def test_a_part_of_one_example(support, query, float64):
    """With one example the user's part and the items' are one product, with more they are two: rows 0:24 and 0:8, 8:24."""
    cut = lambda part, n: jax.tree.map(lambda a: a if a.shape[1] == 1 else a[:, :n], part)  # noqa: E731
    batch = double(tasks(jax.random.key(3), 2, support=3, query=3))
    batch = Task(cut(batch.support, support), cut(batch.query, query))
    assert batch.support.mask.sum() > 0
    thin, plain = both(MLP, batch, only=("net",), inner_steps=2)
    assert largest_difference(thin, plain) < 1e-12


def test_a_model_that_prints_still_adapts(float64, capsys):
    """An operation without outputs is kept, and is no part of any product."""

    def apply(w, x):
        jax.debug.print("seen {}", x.shape[0])
        return (x @ w).sum(-1)

    thin, plain = both(one_matrix(apply), numbers(), inner_steps=2)
    assert largest_difference(thin, plain) < 1e-12


def one_matrix(apply) -> Model:
    """A model of one 6 x 6 matrix W on six numbers."""
    init = lambda key: {"tables": {}, "net": {"w": jax.random.normal(key, (6, 6)) / 3}}  # noqa: E731
    return Model(init, lambda params, inputs: apply(params["net"]["w"], inputs["item_x"]), {})


def numbers(n: int = 2) -> Task:
    k = jax.random.split(jax.random.key(5), 4)

    def part(a, b):
        return Examples({"item_x": jax.random.normal(a, (1, n, 6))}, jax.random.normal(b, (1, n)), jnp.ones((1, n)))

    return Task(part(k[0], k[1]), part(k[2], k[3]))


def test_one_step_by_hand(float64):
    """Scores are row sums of X W: the gradient of mse is X' (2/n r 1'), and W moves by a matrix of rank n = 2."""
    batch = numbers()
    model = one_matrix(lambda w, x: (x @ w).sum(-1))
    assert low(model, batch, 1) == {"net/w"}
    learner = learners.maml(model, inner_lr=0.05, inner_steps=1)
    params = double(jax.jit(learner.init)(jax.random.key(0)))
    w = np.asarray(params["net"]["w"])
    (xs, ys), (xq, yq) = ((np.asarray(p.inputs["item_x"][0]), np.asarray(p.target[0])) for p in batch)
    residual = (xs @ w).sum(-1) - ys
    moved = w - 0.05 * xs.T @ (2 / 2 * residual[:, None] * np.ones((1, 6)))
    want = np.mean(((xq @ moved).sum(-1) - yq) ** 2)
    loss, _ = jax.jit(learner.loss)(params, jax.tree.map(lambda a: a[0], batch), jax.random.key(0))
    assert float(loss) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(
    ("apply", "kept"),
    [
        (lambda w, x: (jnp.tanh(x @ w) @ w).sum(-1), True),  # one matrix in two layers
        (lambda w, x: (x[:, :2] @ w[:2] + x[:, 2:] @ w[2:]).sum(-1), True),  # by rows
        (lambda w, x: (x[:, :4] @ w[:4] + x[:, 2:] @ w[2:]).sum(-1), True),  # rows that overlap
        (lambda w, x: (x @ w @ w.T).sum(-1), False),  # transposed
        (lambda w, x: (x @ w).sum(-1) + 0.1 * (w**2).sum(), False),  # a penalty on it
    ],
    ids=["twice", "rows", "overlap", "transposed", "penalty"],
)
def test_matrices_used_in_other_ways(apply, kept, float64):
    """Low-rank where that is exact, plain where it would not be; the same result."""
    model, batch = one_matrix(apply), numbers()
    assert bool(low(model, batch, 2)) == kept
    thin, plain = both(model, batch, inner_steps=2)
    assert largest_difference(thin, plain) < 1e-12


@pytest.mark.slow
def test_an_nnx_model(float64):
    """Layers of another library: it is the jaxpr that counts."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = nnx.Linear(16, 12, rngs=rngs), nnx.Linear(12, 1, rngs=rngs)

        def __call__(self, rows, inputs):
            n = rows["item_id"].shape[0]
            x = jnp.concatenate([jnp.broadcast_to(rows["user_id"], (n, 8)), rows["item_id"]], -1)
            return self.b(nnx.relu(self.a(x)))[:, 0]

    columns = {"user_id": Column("id", 400), "item_id": Column("id", 600)}
    model = models.nnx_model(Net, columns, size=8)
    batch = double(tasks(jax.random.key(3), 2, support=3, columns=columns))
    thin, plain = both(model, batch, inner_steps=2)
    assert largest_difference(thin, plain) < 1e-12
    assert isinstance(model.tables["user_id"], Table)
