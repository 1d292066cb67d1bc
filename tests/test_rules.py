"""Inner rules: where they start, by hand, and their derivatives."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from derivatives import P, agree_with_finite_differences, gradient_of, loss_at_start, off_start
from test_closed_forms import KEY, H, quadratic, query_gradient, seed_world, support_gradient
from worlds import content, double, largest_difference, one, seed_model, tasks

from metarec_jax import learners
from metarec_jax.core import MetarecError, Task

# Inner rules


def test_meta_curvature_starts_as_sgd():
    """The identity in every dimension: M_1 G M_2' = G, for tables, matrices, vectors and numbers."""
    for model in (content("dot"), content("mlp")):
        task = one(tasks(jax.random.key(3), 2), 1)
        plain = learners.maml(model, inner_lr=0.05, inner_steps=2, low_rank=False)
        curved = learners.maml(model, inner_steps=2, rule=learners.meta_curvature(0.05))
        assert loss_at_start(plain, task) == pytest.approx(loss_at_start(curved, task), rel=1e-6)


def test_derivative_of_meta_curvature(float64):
    """One step p1 = p - a M g: dL_q(p1)/dM = -a q g', and dL_q/dp = (I - a M H)' q, with q = grad L_q(p1). M not I."""
    model, task = quadratic()
    task = double(task)
    learner = learners.maml(model, inner_steps=1, rule=learners.meta_curvature(0.1))
    m = np.array([[1.0, 0.3, 0.0], [-0.2, 0.8, 0.1], [0.5, 0.0, 1.5]])
    params = double(learner.init(KEY)) | {"rule": {"net/p": {"0": jnp.asarray(m)}}}
    got = gradient_of(learner, task, params)
    g = support_gradient(P, task)
    q = query_gradient(P - 0.1 * m @ g, task)
    np.testing.assert_allclose(got["rule"]["net/p"]["0"], -0.1 * np.outer(q, g), rtol=1e-7)
    np.testing.assert_allclose(got["net"]["p"], (np.eye(3) - 0.1 * m @ H).T @ q, rtol=1e-7)


def test_curvature_of_a_dense_layer_is_a_matrix_on_each_side():
    """G [2, 3] -> M_1 G M_2'; of a table the columns alone: G M'."""
    rng = np.random.default_rng(0)
    g, left, right = (rng.normal(size=s).astype(np.float32) for s in ((2, 3), (2, 2), (3, 3)))
    rule = learners.meta_curvature(1.0)
    zero = jnp.zeros((2, 3))
    dense, _ = rule.update({"w": {"0": left, "1": right}}, {"w": g}, (), {"w": zero})
    table, _ = rule.update({"tables/t": {"1": right}}, {"tables/t": g}, (), {"tables/t": zero})
    np.testing.assert_allclose(dense["w"], -left @ g @ right.T, rtol=1e-5)
    np.testing.assert_allclose(table["tables/t"], -g @ right.T, rtol=1e-5)
    assert set(rule.init({"tables/t": zero})["tables/t"]) == {"1"}  # a row never seen has no matrix of its own


@pytest.mark.parametrize("hidden", [0, 5])
def test_lstm_starts_as_sgd(hidden, float64):
    """At its start f = 1 - e and i = a: p <- (1 - e) p - a g; k steps: q <- (1 - e) q - a grad(q), by hand; so within
    about k e |p| of SGD."""
    model, task = quadratic()
    task = double(task)
    learner = learners.maml(model, inner_steps=3, rule=learners.lstm(0.1, forget=1e-3, hidden=hidden))
    adapted = learner.adapt(double(learner.init(KEY)), task.support, KEY)["rest"]["net/p"]
    p = sgd = P
    for _ in range(3):
        p = (1 - 1e-3) * p - 0.1 * support_gradient(p, task)
        sgd = sgd - 0.1 * support_gradient(sgd, task)
    np.testing.assert_allclose(adapted, p, rtol=1e-5)  # the gates' biases are float32
    assert np.abs(adapted - sgd).max() < 3 * 1e-3 * np.abs(P).max()


def test_lstm_gates_by_hand(float64):
    """No first LSTM. x = [log|g| / 10, sign g, log L / 10, 1, p, gate before]; gates sigmoid(w . x + b), then once more."""
    rule = learners.lstm(0.1, hidden=0)
    rng = np.random.default_rng(1)
    w = {name: rng.normal(size=7) for name in ("input", "forget")}
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    p, before = 0.7, {"input": 0.0, "forget": 0.0}
    moving, state = {"a": jnp.array([p])}, None
    params = {name: jnp.asarray(value) for name, value in w.items()}
    state = rule.start(params, moving)
    for g, value in ((-0.4, 2.0), (3.0, 0.5)):
        moving, state = rule.update(params, {"a": jnp.array([g])}, state, moving, jnp.array(value))
        x = [np.log(abs(g)) / 10, np.sign(g), np.log(value) / 10, 1.0, p]
        gates = {name: sigmoid(w[name][:6] @ np.append(x, before[name]) + w[name][6]) for name in w}
        p, before = gates["forget"] * p - gates["input"] * g, gates
        np.testing.assert_allclose(moving["a"], [p], rtol=1e-12)


def test_lstm_leaves_rows_without_gradient():
    """A user meets the catalogue's other rows as they are, in training as when served; a forget gate would shrink them."""
    rule = learners.lstm(0.1, forget=0.5)
    moving = {"net/w": jnp.array([1.0]), "tables/t": jnp.ones((2, 2))}
    params = rule.init(moving)
    grads = {"net/w": jnp.zeros(1), "tables/t": jnp.array([[0.0, 1.0], [0.0, 0.0]])}
    moved, _ = jax.jit(rule.update)(params, grads, rule.start(params, moving), moving, jnp.array(1.0))
    np.testing.assert_allclose(moved["tables/t"], [[0.5, 0.4], [1.0, 1.0]], rtol=1e-6)
    np.testing.assert_allclose(moved["net/w"], [0.5], rtol=1e-6)


def test_rates_of_layer_and_step(float64):
    """Two steps of rates r0, r1 on a quadratic: p2 = p1 - r1 g1, so dL_q/dr1 = -q . g1, dL_q/dr0 = -q (I - r1 H) g0."""
    model, task = quadratic()
    task = double(task)
    learner = learners.maml(model, inner_steps=2, rule=learners.lslr(0.1, 2))
    params = double(learner.init(KEY)) | {"rule": {"net/p": jnp.array([0.1, 0.2])}}
    g0 = support_gradient(P, task)
    g1 = support_gradient(P - 0.1 * g0, task)
    q = query_gradient(P - 0.1 * g0 - 0.2 * g1, task)
    want = [-q @ (np.eye(3) - 0.2 * H) @ g0, -q @ g1]
    np.testing.assert_allclose(gradient_of(learner, task, params)["rule"]["net/p"], want, rtol=1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda m: learners.maml(m, inner_steps=2, rule=learners.lstm(0.05, hidden=3, stop_inputs=False)),
        *(
            pytest.param(make, marks=pytest.mark.slow)
            for make in (
                lambda m: learners.maml(m, inner_steps=2, rule=learners.lslr(0.05, 2)),
                lambda m: learners.maml(m, inner_steps=2, rule=learners.meta_curvature(0.05)),
                lambda m: learners.cavia(m, size=2, inner_lr=0.05, inner_steps=2),
                lambda m: learners.protomaml(m, inner_lr=0.05, inner_steps=2, only=("net",)),
                lambda m: learners.logistic(m, newton_steps=8),
                lambda m: learners.imaml(m, inner_lr=0.05, inner_steps=1000, cg_steps=100, proximal=5.0),
            )
        ),
    ],
    ids=["lstm", "lslr", "meta_curvature", "cavia", "protomaml", "logistic", "imaml"],
)
def test_meta_gradients_agree_with_finite_differences(make, float64):
    """Of all meta-parameters, near the start; iMAML and logistic by the implicit function theorem, as they have converged."""
    model, task = seed_world()
    shift = lambda e: e._replace(target=(e.target - 1) / 4)  # noqa: E731  # in [0, 1], as the logistic loss has it
    task = double(Task(shift(task.support), shift(task.query)))
    learner = make(model)
    params = double(off_start(jax.jit(learner.init)(KEY)))
    # iMAML is exact where its inner steps have converged: to 5e-8 here, beside a derivative of 0.02.
    agree_with_finite_differences(lambda p: learner.loss(p, task, KEY)[0], params, rel=5e-6)


def test_the_inputs_of_the_gates_are_constants(float64):
    """One step: they depend on no weight of the rule, so the derivative of those is the same; that of p is not."""
    model, task = seed_world()
    task = double(task)
    found = []
    for stop in (True, False):
        learner = learners.maml(model, inner_steps=1, rule=learners.lstm(0.05, hidden=3, stop_inputs=stop))
        found.append(gradient_of(learner, task, double(off_start(jax.jit(learner.init)(KEY)))))
    assert largest_difference(found[0]["rule"], found[1]["rule"]) < 1e-12
    assert largest_difference(found[0]["net"], found[1]["net"]) > 1e-6


def test_rules_refuse():
    with pytest.raises(MetarecError, match=r"lr is the initial value of a gate .* above 0 and below 1, got 1\.5"):
        learners.lstm(1.5)
    with pytest.raises(MetarecError, match="lslr: steps must be 1 or more, got 0"):
        learners.lslr(0.1, 0)
    with pytest.raises(MetarecError, match="one weight for each of 2 steps"):
        learners.maml(seed_model(), inner_steps=2, per_step_losses=jnp.ones(3))
