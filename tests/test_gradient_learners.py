"""The learners and inner rules beside MAML and ridge, each against the formula of its paper."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import minimize
from test_closed_forms import KEY, H, quadratic, query_gradient, seed_world, support_gradient
from worlds import content, double, largest_difference, one, seed_model, tasks

from metarec_jax import learners, losses
from metarec_jax.config import (
    Config,
    LearnerConfig,
    ModelConfig,
    TaskConfig,
    TrainConfig,
    build_learner,
    build_optimizers,
    build_source,
)
from metarec_jax.core import Examples, MetarecError, Model, Task
from metarec_jax.data.synthetic import synthetic
from metarec_jax.learners.cavia import with_context
from metarec_jax.learners.logistic import optimum
from metarec_jax.learners.maml_plus_plus import step_weights
from metarec_jax.learners.protomaml import prototypes
from metarec_jax.training.step import init_state, make_step

P = np.array([0.3, -0.2, 0.9], np.float32).astype(float)
"""Where the quadratic world starts."""


def gradient_of(learner, task, params=None):
    params = double(learner.init(KEY)) if params is None else params
    return jax.jit(jax.grad(lambda p: learner.loss(p, task, KEY)[0]))(params)


def agree_with_finite_differences(loss, params, rel=1e-6, seeds=(0, 1)):
    """Along random directions: (L(p + e d) - L(p - e d)) / 2e = <grad L, d>."""
    loss, gradient = jax.jit(loss), jax.jit(jax.grad(loss))(params)
    leaves, form = jax.tree.flatten(params)
    for seed in seeds:
        keys = jax.random.split(jax.random.key(seed), len(leaves))
        d = form.unflatten([jax.random.normal(k, leaf.shape, np.float64) for k, leaf in zip(keys, leaves, strict=True)])
        moved = lambda e: jax.tree.map(lambda p, q: p + e * q, params, d)  # noqa: B023, E731
        numeric = (loss(moved(1e-5)) - loss(moved(-1e-5))) / 2e-5
        exact = sum(jnp.vdot(g, q) for g, q in zip(jax.tree.leaves(gradient), jax.tree.leaves(d), strict=True))
        assert float(numeric) == pytest.approx(float(exact), rel=rel, abs=1e-9)


def off_start(params, scale=0.03):
    """Parameters near the start, where nothing is 0 or the identity any more."""
    leaves, form = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(9), len(leaves))
    return form.unflatten([p + scale * jax.random.normal(k, p.shape) for k, p in zip(keys, leaves, strict=True)])


# Inner rules


def test_meta_curvature_starts_as_sgd():
    """The identity in every dimension: M_1 G M_2' = G, for tables, matrices, vectors and numbers."""
    for model in (content("dot"), content("mlp")):
        task = one(tasks(jax.random.key(3), 2), 1)
        plain = learners.maml(model, inner_lr=0.05, inner_steps=2, low_rank=False)
        curved = learners.maml(model, inner_steps=2, rule=learners.meta_curvature(0.05))
        found = [float(x.loss(x.init(KEY), task, KEY)[0]) for x in (plain, curved)]
        assert found[0] == pytest.approx(found[1], rel=1e-6)


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
    moved, _ = rule.update(params, grads, rule.start(params, moving), moving, jnp.array(1.0))
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
        lambda m: learners.maml(m, inner_steps=2, rule=learners.lslr(0.05, 2)),
        lambda m: learners.maml(m, inner_steps=2, rule=learners.meta_curvature(0.05)),
        lambda m: learners.maml(m, inner_steps=2, rule=learners.lstm(0.05, hidden=3, stop_inputs=False)),
        lambda m: learners.cavia(m, size=2, inner_lr=0.05, inner_steps=2),
        lambda m: learners.protomaml(m, inner_lr=0.05, inner_steps=2, only=("net",)),
        lambda m: learners.logistic(m, newton_steps=8),
        lambda m: learners.imaml(m, inner_lr=0.05, inner_steps=1000, cg_steps=100, proximal=5.0),
    ],
    ids=["lslr", "meta_curvature", "lstm", "cavia", "protomaml", "logistic", "imaml"],
)
def test_meta_gradients_agree_with_finite_differences(make, float64):
    """Of all meta-parameters, near the start; iMAML and logistic by the implicit function theorem, as they have converged."""
    model, task = seed_world()
    shift = lambda e: e._replace(target=(e.target - 1) / 4)  # noqa: E731  # in [0, 1], as the logistic loss has it
    task = double(Task(shift(task.support), shift(task.query)))
    learner = make(model)
    params = double(off_start(learner.init(KEY)))
    agree_with_finite_differences(lambda p: learner.loss(p, task, KEY)[0], params, rel=2e-6)


def test_the_inputs_of_the_gates_are_constants(float64):
    """One step: they depend on no weight of the rule, so the derivative of those is the same; that of p is not."""
    model, task = seed_world()
    task = double(task)
    found = []
    for stop in (True, False):
        learner = learners.maml(model, inner_steps=1, rule=learners.lstm(0.05, hidden=3, stop_inputs=stop))
        found.append(gradient_of(learner, task, double(off_start(learner.init(KEY)))))
    assert largest_difference(found[0]["rule"], found[1]["rule"]) < 1e-12
    assert largest_difference(found[0]["net"], found[1]["net"]) > 1e-6


def test_rules_refuse():
    with pytest.raises(MetarecError, match=r"lr is the start of a gate and must be between 0 and 1, got 1\.5"):
        learners.lstm(1.5)
    with pytest.raises(MetarecError, match="got 0 steps; give 1 or more"):
        learners.lslr(0.1, 0)
    with pytest.raises(MetarecError, match="one weight for each of 2 steps"):
        learners.maml(seed_model(), inner_steps=2, per_step_losses=jnp.ones(3))


# MAML++


@pytest.mark.slow
@pytest.mark.parametrize("first_order", [False, True])
def test_maml_plus_plus_anneals(first_order):
    """k = 4, half way: weights (1 - 1/2) / 4 = 1/8 for steps 1 to 3, and 5/8; the first half takes no second derivative."""
    model, task = seed_world()
    learner = learners.maml_plus_plus(
        model, inner_lr=0.05, inner_steps=4, first_order_until=0.6 if first_order else 0.0
    )
    params = learner.init(KEY)
    rule = learners.lslr(0.05, 4)
    for done, weights in ((0.0, [0.25] * 4), (0.5, [0.125] * 3 + [0.625]), (1.0, [0.0, 0.0, 0.0, 1.0])):
        constants = first_order and done < 0.6
        plain = learners.maml(
            model, inner_steps=4, rule=rule, per_step_losses=jnp.array(weights), first_order=constants
        )
        body = {name: part for name, part in params.items() if name != "annealed"}
        at = params | {"annealed": jnp.asarray(done, jnp.float32)}
        got = jax.jit(jax.value_and_grad(lambda p: learner.loss(p, task, KEY)[0]))(at)
        want = jax.jit(jax.value_and_grad(lambda p: plain.loss(p, task, KEY)[0]))(body)  # noqa: B023
        assert float(got[0]) == pytest.approx(float(want[0]), rel=1e-6)
        assert float(got[1].pop("annealed")) == 0.0
        assert largest_difference(got[1], want[1]) < 1e-6
    whole = learners.maml(model, inner_steps=4, rule=rule, per_step_losses=True)
    assert float(learner.loss(params, task, KEY)[0]) == pytest.approx(float(whole.loss(body, task, KEY)[0]), rel=1e-6)


def test_weights_are_those_of_thin_steps_too():
    """Low-rank steps against plain ones, weights 0.2, 0.8."""
    task = one(tasks(jax.random.key(3), 2), 1)
    of = lambda low: learners.maml(  # noqa: E731
        content("mlp"), inner_lr=0.05, inner_steps=2, low_rank=low, per_step_losses=jnp.array([0.2, 0.8])
    )
    losses_ = [float(of(low).loss(of(low).init(KEY), task, KEY)[0]) for low in (True, False)]
    assert losses_[0] == pytest.approx(losses_[1], rel=1e-6)


def test_the_clock_is_the_optimisers():
    """3 of 4 steps: annealed = 3/4, other parameters as by the optimiser alone; other parameters' trees are refused."""
    params, grads = {"annealed": jnp.array(0.0), "w": jnp.array([1.0])}, {"annealed": jnp.array(0.0), "w": jnp.ones(1)}
    by = learners.anneal(optax.adam(0.1), 4)
    alone = optax.adam(0.1)
    state, other = by.init(params), alone.init(params)
    plain = params
    for _ in range(3):
        updates, state = by.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        updates, other = alone.update(grads, other, plain)
        plain = optax.apply_updates(plain, updates)
    assert float(params["annealed"]) == 0.75
    assert params["w"] == plain["w"]
    with pytest.raises(MetarecError, match="wants the parameters of maml_plus_plus; these are"):
        by.init({"w": jnp.array([1.0])})
    with pytest.raises(MetarecError, match="1 outer step or more"):
        learners.anneal(alone, 0)
    assert step_weights(1, jnp.array(0.3)).tolist() == [1.0]


# Implicit MAML


@pytest.mark.parametrize("proximal", [0.5, 3.0])
def test_imaml_on_a_quadratic(proximal, float64):
    """The minimum of L_s(q) + s/2 |q - p|^2 is q = (H + s I)^-1 (s p - c), c the gradient of L_s at 0; the meta-gradient
    s (H + s I)^-1 grad L_q(q). 3 different eigenvalues: 3 conjugate-gradient steps."""
    model, task = quadratic()
    task = double(task)
    learner = learners.imaml(model, inner_lr=0.3, inner_steps=300, proximal=proximal, cg_steps=3)
    inverse = np.linalg.inv(H + proximal * np.eye(3))
    q = inverse @ (proximal * P - support_gradient(np.zeros(3), task))
    params = double(learner.init(KEY))
    np.testing.assert_allclose(learner.adapt(params, task.support, KEY)["rest"]["net/p"], q, rtol=1e-7)
    got = gradient_of(learner, task, params)["net"]["p"]
    np.testing.assert_allclose(got, proximal * inverse @ query_gradient(q, task), rtol=1e-6)


def test_imaml_keeps_no_path():
    """1024 inner steps need hardly more memory than 4; MAML through them many times more."""
    batch, model = one(tasks(jax.random.key(0), 2)), content("mlp", size=8)

    def temporaries(learner):
        params = jax.eval_shape(learner.init, KEY)
        compiled = jax.jit(jax.grad(lambda p, t: learner.loss(p, t, KEY)[0])).lower(params, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    few, many = (temporaries(learners.imaml(model, inner_steps=k)) for k in (4, 1024))
    assert many < 1.1 * few
    assert temporaries(learners.maml(model, inner_steps=1024, low_rank=False)) > 10 * many


def test_imaml_refuses():
    with pytest.raises(MetarecError, match="proximal is 0"):
        learners.imaml(seed_model(), proximal=0)


# CAVIA


def test_cavia_is_maml_on_the_context_alone():
    """The same loss and gradients as `maml` with ``only=`` the context, which starts at 0."""
    model, task = content("mlp"), one(tasks(jax.random.key(3), 2), 1)
    cavia = learners.cavia(model, size=2, inner_lr=0.3, inner_steps=3)
    maml = learners.maml(with_context(model, 2, "user_id"), inner_lr=0.3, inner_steps=3, only=("context/start",))
    params, full = cavia.init(KEY), maml.init(KEY)
    assert float(cavia.loss(params, task, KEY)[0]) == float(maml.loss(full, task, KEY)[0])
    adapted = cavia.adapt(params, task.support, KEY)
    assert set(adapted["rest"]) == {"context/start"}
    assert adapted["rows"] == {}
    got, want = (
        jax.jit(jax.grad(lambda p, f=learner: f.loss(p, task, KEY)[0]))(at)
        for learner, at in ((cavia, params), (maml, full))
    )
    del want["context"]["start"]
    assert largest_difference(got, want) < 1e-6


def test_one_step_of_a_context_by_hand(float64):
    """score = u . v with the unknown user's row u, so c1 = -a M grad_u L_s(u), and scores are (u + M'c1) . v."""
    model, task = content("dot"), double(one(tasks(jax.random.key(3), 2), 1))
    learner = learners.cavia(model, size=2, inner_lr=0.1)
    params = double(learner.init(KEY))
    user = task.support.inputs["user_id"][0]

    def at(row, part):
        tables = params["tables"] | {"user_id": params["tables"]["user_id"].at[user].set(row)}
        return model.apply({**params, "tables": tables}, part.inputs)

    row, mapping = params["tables"]["user_id"][user], params["context"]["map"]
    pull = jax.grad(lambda row: losses.mse(at(row, task.support), task.support.target, task.support.mask))(row)
    context = -0.1 * mapping @ pull
    adapted = learner.adapt(params, task.support, KEY)
    np.testing.assert_allclose(adapted["rest"]["context/start"], context, rtol=1e-9)
    want = at(row + context @ mapping, task.query)
    np.testing.assert_allclose(learner.predict(params, adapted, task.query.inputs), want, rtol=1e-9)


def test_a_context_before_dense_layers_is_concatenated(float64):
    """With linear layers alone: w . [u + M'c, v] + b = [w, M w_u] . [u, v, c] + b."""
    model = seed_model()
    params = double(with_context(model, 2, "user_id").init(KEY))
    params["context"]["start"] = jnp.array([0.7, -1.1])
    inputs = {"user_id": jnp.array([5]), "item_id": jnp.array([2, 0, 9])}
    w, b = (np.asarray(params["net"]["params"]["out"][name]) for name in ("kernel", "bias"))
    u, v = params["tables"]["user_id"][jnp.array([5, 5, 5])], params["tables"]["item_id"][inputs["item_id"]]
    wide = np.concatenate([w[:, 0], params["context"]["map"] @ w[:3, 0]])
    want = np.concatenate([u, v, np.tile([0.7, -1.1], (3, 1))], axis=1) @ wide + b
    np.testing.assert_allclose(with_context(model, 2, "user_id").apply(params, inputs), want, rtol=1e-9)


def test_cavia_wants_its_table():
    with pytest.raises(MetarecError, match=r"no table 'user', it has \['item_id', 'user_id'\]"):
        learners.cavia(seed_model(), table="user")


# Proto-MAML


def test_prototypes_score_as_a_prototypical_network(float64):
    """Two liked and three disliked, k = 0, level = 0: w . x + b = |x - mean of disliked|^2 - |x - mean of liked|^2."""
    rng = np.random.default_rng(0)
    phi, x = rng.normal(size=(6, 3)), rng.normal(size=(4, 3))
    liking = np.array([1.0, 1.0, -1.0, -1.0, -1.0, 0.0])
    learned = {"log_gain": 0.0, "log_prior": -jnp.inf, "level": 0.0}
    head = prototypes(learned, jnp.asarray(phi), jnp.asarray(liking), jnp.array([1.0] * 5 + [0.0]))
    distance = lambda rows: ((x - rows.mean(0)) ** 2).sum(1)  # noqa: E731
    want = distance(phi[2:5]) - distance(phi[:2])
    np.testing.assert_allclose(x @ head["weight"] + head["bias"], want, rtol=1e-10)


def test_the_prototypes_of_clicks(float64):
    """No inner step, a prior of even odds: each click pulls by 1 - 1/2, each miss by 1/2; all weigh alike, so the means
    are plain. And of ratings by twice the residual."""
    model, task = content("dot"), double(one(tasks(jax.random.key(3), 2), 1))
    clicks = task.support._replace(target=jnp.array([1.0, 0, 0, 1, 1, 0]))
    zero = lambda params, inputs: jnp.zeros(max(v.shape[0] for v in inputs.values()))  # noqa: E731
    even = Model(model.init, zero, model.tables, model.features, model.num_features)
    learner = learners.protomaml(even, inner_steps=0, loss=losses.bce)
    params = double(learner.init(KEY)) | {"prototypes": {"log_gain": 0.0, "log_prior": -1e9, "level": 0.0}}
    params["prototypes"] = jax.tree.map(jnp.asarray, params["prototypes"])
    phi = np.asarray(model.features(params, clicks.inputs))
    up, down = phi[[0, 3, 4]].mean(0), phi[[1, 2, 5]].mean(0)
    head = learner.adapt(params, clicks, KEY)["rest"]
    np.testing.assert_allclose(head["head/weight"], 2 * (up - down), rtol=1e-9)
    np.testing.assert_allclose(head["head/bias"], down @ down - up @ up, rtol=1e-9)
    ratings = learners.protomaml(model, inner_steps=0)
    residual = np.asarray(task.support.target - model.apply(params, task.support.inputs))
    up = np.maximum(residual, 0) @ phi / np.maximum(residual, 0).sum()
    down = np.maximum(-residual, 0) @ phi / max(np.maximum(-residual, 0).sum(), 1e-30)
    head = ratings.adapt(params, task.support, KEY)["rest"]
    np.testing.assert_allclose(head["head/weight"], 2 * (up - down), rtol=1e-9)


def test_a_step_of_the_head_by_hand(float64):
    """From the head (w, b) one step of rate a on mse: w - a 2/n phi' (s - t), b - a 2/n sum (s - t)."""
    model, task = content("dot"), double(one(tasks(jax.random.key(3), 2), 1))
    params = double(learners.protomaml(model).init(KEY))
    start, moved = (
        learners.protomaml(model, inner_lr=0.1, inner_steps=k).adapt(params, task.support, KEY)["rest"] for k in (0, 1)
    )
    phi = np.asarray(model.features(params, task.support.inputs))
    scores = model.apply(params, task.support.inputs) + phi @ start["head/weight"] + start["head/bias"]
    pull = 2 / 6 * np.asarray(scores - task.support.target)
    np.testing.assert_allclose(moved["head/weight"], start["head/weight"] - 0.1 * pull @ phi, rtol=1e-9)
    np.testing.assert_allclose(moved["head/bias"], start["head/bias"] - 0.1 * pull.sum(), rtol=1e-9)


@pytest.mark.parametrize("make", [learners.protomaml, learners.logistic])
def test_without_support_the_prior_speaks(make):
    model, task = content("dot"), one(tasks(KEY, 2))
    learner = make(model)
    params = learner.init(KEY)
    empty = task.support._replace(mask=jnp.zeros_like(task.support.mask))
    scores = learner.predict(params, learner.adapt(params, empty, KEY), task.query.inputs)
    np.testing.assert_allclose(scores, model.apply(params, task.query.inputs), rtol=1e-6)


@pytest.mark.parametrize("make", [learners.protomaml, learners.logistic])
def test_features_are_wanted(make):
    bare = Model(lambda key: {}, lambda params, inputs: jnp.zeros(1), {})
    with pytest.raises(MetarecError, match=f"{make.__name__} wants a model with features"):
        make(bare)


# As a run configures them


@pytest.mark.parametrize("head", ["dot", pytest.param("mlp", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "given",
    [
        *({"name": "maml", "rule": rule} for rule in ("lslr", "meta_curvature", "lstm")),
        {"name": "maml_plus_plus", "first_order": True},
        {"name": "imaml", "proximal": 2.0},
        {"name": "cavia", "context": 3, "first_order": True},
        {"name": "protomaml", "only": ("all",)},
        {"name": "protomaml", "inner_steps": 0},
        {"name": "logistic", "precision": 2.0},
    ],
    ids=lambda given: "-".join(map(str, given.values())),
)
def test_a_configured_learner_takes_a_step(given, head):
    """One outer step of every learner and rule, from its options, moves parameters and stays finite."""
    data = synthetic(30, 20, ratings_per_user=(8, 12), size=2, implicit=given["name"] == "logistic").data
    run = Config(
        model=ModelConfig(size=2, head=head, hidden=(3,)),
        learner=LearnerConfig(**({"inner_steps": 2} | given)),
        tasks=TaskConfig(tasks=2, support=(2, 4), query=3),
        train=TrainConfig(steps=4, warm_start=False),
    )
    learner, optimizers = build_learner(run, data), build_optimizers(run, data)
    params = learner.init(KEY)
    state = init_state(learner, optimizers, params, KEY)
    source = build_source(run, data)
    state, metrics = jax.jit(make_step(learner, source, optimizers))(state, source.data)
    assert np.isfinite(float(metrics["loss"]))
    assert largest_difference(state.params, params) > 0
    if given["name"] == "maml_plus_plus":
        assert float(state.params["annealed"]) == 0.25


def test_logistic_is_for_clicks():
    data = synthetic(30, 20, ratings_per_user=(8, 12), size=2).data
    with pytest.raises(MetarecError, match="'logistic' is for clicks, and the data has ratings; give --implicit"):
        build_learner(Config(learner=LearnerConfig(name="logistic")), data)


# Logistic regression


def clicks_world(seed=0, n=12, d=3, offset=1.0):
    rng = np.random.default_rng(seed)
    phi, prior, precision = rng.normal(size=(n, d)), offset * rng.normal(size=n), np.exp(rng.normal(size=d))
    target = (rng.random(n) < 0.5).astype(float)
    return phi, prior, target, rng.random(n) + 0.1, precision


@pytest.mark.parametrize("offset", [1.0, 30.0])
def test_logistic_reaches_the_optimum(offset, float64):
    """Against BFGS on the same objective. With a prior of +-30 the whole Newton step from there is wild."""
    phi, prior, target, weight, precision = clicks_world(offset=offset)

    def objective(d):
        s = prior + phi @ d
        return (weight * (np.logaddexp(0, s) - target * s)).sum() + 0.5 * (precision * d**2).sum()

    want = minimize(objective, np.zeros(3), method="BFGS", options={"gtol": 1e-9}).x
    got = optimum(*(jnp.asarray(a) for a in (phi, prior, target, weight, precision)), 12)
    assert objective(np.asarray(got)) <= objective(want) + 1e-12
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_newton_steps_until_float32():
    """8 steps in float32 are within 1e-5 of 30 steps in float64, in 50 worlds."""
    worlds = [np.stack(a) for a in zip(*(clicks_world(s, n=24, d=5, offset=2.0) for s in range(50)), strict=True)]
    many = lambda dtype, steps: jax.vmap(lambda *w: optimum(*w, steps))(*(jnp.asarray(a, dtype) for a in worlds))  # noqa: E731
    got = many(jnp.float32, 8)
    with jax.enable_x64(True):
        want = many(jnp.float64, 30)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_derivative_of_the_optimum(float64):
    """Of features, prior, targets, weights and precisions, against finite differences of the converged solution."""
    world = dict(zip("abcde", (jnp.asarray(a) for a in clicks_world()), strict=True))
    direction = jnp.array([0.3, -1.0, 0.7])
    agree_with_finite_differences(lambda w: optimum(*(w[k] for k in "abcde"), 12) @ direction, world)


def test_padding_of_logistic_may_be_nan():
    phi, prior, target, weight, precision = (jnp.asarray(a, jnp.float32) for a in clicks_world())
    spoiled = (phi.at[0].set(jnp.nan), prior.at[0].set(jnp.nan), target.at[0].set(jnp.nan), weight.at[0].set(0.0))
    got = optimum(*spoiled, precision)
    np.testing.assert_allclose(got, optimum(phi[1:], prior[1:], target[1:], weight[1:], precision), atol=1e-6)
    slope = jax.grad(lambda p: optimum(*spoiled, p).sum())(precision)
    assert bool(jnp.isfinite(slope).all())


def test_logistic_learner_solves_for_the_user(float64):
    """predict = prior + phi . d with d the optimum on [features, 1]: two clicks, two misses."""
    model, task = content("dot"), double(one(tasks(jax.random.key(3), 2), 1))
    support = Examples(task.support.inputs, jnp.array([1.0, 0, 0, 1, 0, 0]), jnp.array([1.0, 1, 1, 1, 0, 0]))
    learner = learners.logistic(model, precision=2.0, bias_precision=0.5)
    params = double(learner.init(KEY))
    d = np.asarray(learner.adapt(params, support, KEY))
    phi = np.column_stack([model.features(params, support.inputs), np.ones(6)])[:4]
    chance = 1 / (1 + np.exp(-(np.asarray(model.apply(params, support.inputs))[:4] + phi @ d)))
    slope = phi.T @ (chance - np.array([1, 0, 0, 1])) + np.array([2.0, 2, 2, 0.5]) * d
    np.testing.assert_allclose(slope, 0, atol=1e-7)  # precisions are kept as float32 logarithms
